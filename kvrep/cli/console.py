"""What people see: sizes and times as text, tables, progress, and a block that redraws itself."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO

__all__ = [
    "Live",
    "Progress",
    "binary",
    "duration",
    "key_values",
    "log_to_stderr",
    "megabytes",
    "number",
    "style",
    "table",
]

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def colourful(stream: TextIO) -> bool:
    """Whether escape codes mean something to whoever reads ``stream``."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def style(text: str, *names: str, stream: TextIO | None = None) -> str:
    """``text`` in colour on a terminal, unchanged elsewhere (and with ``NO_COLOR``)."""
    if not colourful(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(_CODES[n] for n in names)}m{text}\x1b[0m"


def log_to_stderr(level: str) -> None:
    """The log of a command that goes on until it is ended. ``level``: ``debug``, ``info``, …"""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if level != "debug":
        # A dozen lines for every broken connection, which we tell in one.
        logging.getLogger("pika").setLevel(logging.CRITICAL)


# -- numbers ---------------------------------------------------------------------------------------


def number(value: int) -> str:
    """``12 345``-like: thousands apart."""
    return f"{value:,}".replace(",", " ")


def binary(value: float) -> str:
    """Bytes in powers of 1024: ``0 B``, ``64 MiB``, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def megabytes(value: float) -> str:
    """Bytes as MB (a million bytes), with one decimal."""
    return f"{value / 1e6:.1f} MB"


def duration(value: float | None) -> str:
    """Seconds at the size people say them: ``3.1 ms``, ``2.4 s``, ``3 min 20 s``; ``-`` when not known."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 1000:.1f} ms" if value >= 0.00005 else "0 ms"
    if value < 90:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 90:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


# -- tables ----------------------------------------------------------------------------------------


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Aligned columns as lines; the columns in ``right`` are aligned to the right."""
    widths = [max([len(h), *(len(row[i]) for row in rows)]) for i, h in enumerate(headers)]

    def line(cells: Sequence[str]) -> str:
        parts = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return [line(headers), *(line(row) for row in rows)]


def key_values(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """``name   value`` lines, aligned."""
    width = max(len(name) for name, _ in pairs)
    return [f"{name.ljust(width)}  {value}".rstrip() for name, value in pairs]


# -- a block that redraws itself -------------------------------------------------------------------


class Live:
    """Shows the lines that ``render`` returns: redrawn in place on a terminal, else one line now and then.

    ``plain`` gives that one line. Call :meth:`tick` often, from one thread; it draws when it is time.
    ``say`` prints a line that stays, above the block.
    """

    def __init__(
        self,
        render: Callable[[], list[str]],
        plain: Callable[[], str],
        *,
        stream: TextIO | None = None,
        plain_interval_s: float = 2.0,
    ) -> None:
        self._render = render
        self._plain = plain
        self.stream = stream or sys.stdout
        self._tty = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._interval_s = 0.1 if self._tty else plain_interval_s
        self._next_s = time.monotonic() + (0 if self._tty else plain_interval_s)
        self._height = 0

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._erase()

    def tick(self) -> None:
        """Draw if it is time."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + self._interval_s
        if self._tty:
            self._draw()
        else:
            print(self._plain(), file=self.stream, flush=True)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._erase()
        print(line, file=self.stream, flush=True)
        if self._tty:
            self._draw()

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns
        lines = [clip(line, width - 1) for line in self._render()]
        up = f"\x1b[{self._height}F" if self._height else ""
        body = "".join(f"{line}\x1b[K\n" for line in lines)
        self.stream.write(f"{up}{body}\x1b[J")
        self.stream.flush()
        self._height = len(lines)

    def _erase(self) -> None:
        if self._height:
            self.stream.write(f"\x1b[{self._height}F\x1b[J")
            self.stream.flush()
            self._height = 0


def clip(line: str, width: int) -> str:
    """``line`` cut to ``width`` visible characters; escape codes take no width."""
    seen, at = 0, 0
    while at < len(line):
        if line[at] == "\x1b":
            end = line.find("m", at)
            at = len(line) if end < 0 else end + 1
            continue
        if seen == width:
            return line[:at] + ("\x1b[0m" if "\x1b" in line else "")
        seen += 1
        at += 1
    return line


def bar(done: float, width: int = 30) -> str:
    """A bar of ``width`` characters; ``done`` is 0 to 1."""
    full = round(max(0.0, min(1.0, done)) * width)
    return "█" * full + "░" * (width - full)


# -- progress of load and dump ---------------------------------------------------------------------


class Progress:
    """Progress on stderr: a bar by ``rich`` on a terminal if it is installed, else a line every few seconds.

    ``total`` is in bytes, ``None`` when not known. Use it in a ``with`` block.
    """

    def __init__(self, what: str, total: int | None, *, quiet: bool = False, interval_s: float = 2.0) -> None:
        self._what = what
        self._total = total
        self.done_bytes = 0
        self.done_pairs = 0
        self._began_s = time.monotonic()
        self._interval_s = interval_s
        self._next_s = self._began_s + interval_s
        self._quiet = quiet
        self._rich: Any = None
        self._task: Any = None

    @property
    def elapsed_s(self) -> float:
        return max(1e-9, time.monotonic() - self._began_s)

    @property
    def rate(self) -> float:
        """Bytes per second since the beginning."""
        return self.done_bytes / self.elapsed_s

    @property
    def eta_s(self) -> float | None:
        """Seconds that are left at this rate; ``None`` when not known."""
        if self._total is None or not self.done_bytes:
            return None
        return max(0, self._total - self.done_bytes) / self.rate

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            self._rich = _rich_progress()
        if self._rich is not None:
            self._rich.start()
            self._task = self._rich.add_task(self._what, total=self._total, pairs="0")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def add(self, size: int, pairs: int) -> None:
        """``size`` bytes and ``pairs`` more are done. Call it from one thread."""
        self.done_bytes += size
        self.done_pairs += pairs
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done_bytes, pairs=number(self.done_pairs))
        elif not self._quiet and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._interval_s
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Where it stands, as one line."""
        share = f" ({self.done_bytes / self._total:.0%})" if self._total else ""
        eta = f", {duration(self.eta_s)} left" if self.eta_s is not None else ""
        return (
            f"{self._what}: {number(self.done_pairs)} pairs, {megabytes(self.done_bytes)}{share},"
            f" {megabytes(self.rate)}/s{eta}"
        )


def _rich_progress() -> Any:
    """A ``rich`` progress bar, or ``None`` where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[pairs]} pairs"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
