"""The command line: ``python -m kvrep.testing.soak``."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvrep.errors import Error
from kvrep.testing.namespaces import NotPrivileged
from kvrep.testing.soak.faults import KINDS
from kvrep.testing.soak.picture import picture
from kvrep.testing.soak.report import progress_line, text
from kvrep.testing.soak.run import Progress, Result, Settings, soak

KEPT, BROKEN, CANNOT, INTERRUPTED = 0, 1, 3, 130

HELP = """\
Run a cluster of processes under mixed load while everything that can break is broken at random, check every
promise, and watch for anything that grows.

Clients put, delete, compare and set, write batches, read (the newest, and from followers) and scan. What they
were told is checked against itself a few seconds later: linearizable, nothing acknowledged is lost, one primary
in each epoch, sessions never go back, batches are never seen half, values are what somebody wrote. At the end
all nodes must hold the same, old data included, and each store must agree with its log and its digests.
"""

EPILOG = """\
faults (--faults takes their names, by comma):
{faults}
exit status:
  0  every promise was kept            3  the soak could not run (the reason is on stderr)
  1  violations; the report has them   130  interrupted (Ctrl-C); what had run was in order

examples:
  python -m kvrep.testing.soak --minutes 1
  python -m kvrep.testing.soak --minutes 10 --report soak/        soak/soak.txt and soak/soak.svg
  python -m kvrep.testing.soak --minutes 5 --seed 7 --faults kill,pause
  python -m kvrep.testing.soak --minutes 480 --namespaces         as root: packets are lost in the kernel
  python -m kvrep.testing.soak --minutes 10 --disk-mib 96         as root: disks that can be full

A seed decides which faults come in which order; when what happens in between is up to the machine. Ctrl-C ends
a soak early, with all checks and the report; a second one ends it at once. After violations the stores are kept
for a look (but not with --disk-mib, whose disks are in memory), and the report has a timeline of all nodes.
"""


def _parser() -> argparse.ArgumentParser:
    faults = "".join(f"  {kind.name:10} {kind.what}\n" for kind in KINDS.values())
    parser = argparse.ArgumentParser(
        prog="python -m kvrep.testing.soak", description=HELP, epilog=EPILOG.format(faults=faults),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--minutes",
        type=_positive,
        metavar="N",
        default=10.0,
        help="how long (default 10; parts are fine: 0.5)",
    )
    add(
        "--seed",
        type=_whole,
        metavar="S",
        help="what the faults are drawn from (default: a random one, told)",
    )
    add("--report", type=Path, metavar="DIR", help="write soak.txt, soak.svg and soak.log there")
    add("--nodes", type=_whole, metavar="N", default=3, help="nodes, 3 to 9 (default 3)")
    add("--clients", type=_whole, metavar="N", default=4, help="clients, one call at a time each (default 4)")
    add(
        "--rate",
        type=_positive,
        metavar="N",
        default=300.0,
        help="calls a second, of all together (default 300)",
    )
    add("--faults", type=_kinds, metavar="NAMES", default=tuple(KINDS), help="only these (default: all)")
    add("--namespaces", action="store_true", help="cut packets with nftables, not in a proxy (needs root)")
    add("--disk-mib", type=_whole, metavar="N", help="a disk of its own for each node, of N MiB (needs root)")
    return parser


def _positive(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number above 0")
    return value


def _whole(given: str) -> int:
    if not (given.isascii() and given.isdecimal()):
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number")
    return int(given)


def _kinds(names: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    unknown = [name for name in chosen if name not in KINDS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is no fault; see --help")
    return chosen


def _settings(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Settings:
    if not 3 <= given.nodes <= 9:
        parser.error("--nodes is 3 to 9: a majority must be left when one is broken")
    if not 1 <= given.clients <= 64:
        parser.error("--clients is 1 to 64")
    if given.disk_mib is not None and given.disk_mib < 48:
        parser.error("--disk-mib is at least 48: log files are kept ready ahead of time")
    total_s = given.minutes * 60
    return Settings(
        seconds=total_s,
        seed=random.randrange(1 << 32) if given.seed is None else given.seed,
        nodes=given.nodes,
        clients=given.clients,
        calls_per_s=given.rate,
        base_keys=20_000 if total_s >= 60 else 2000,
        namespaces=given.namespaces,
        disk_bytes=None if given.disk_mib is None else given.disk_mib << 20,
        faults=given.faults,
        sample_s=1.0 if total_s >= 120 else 0.25,
    )


class _Display(threading.Thread):
    """Tells on stderr how it goes: one line written over on a terminal, else a line now and then."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="kvrep-soak-display", daemon=True)
        self._interval_s = 10.0 if settings.seconds > 120 else 2.0
        self._over = threading.Event()
        self._terminal = sys.stderr.isatty()
        self._progress: Callable[[], Progress] | None = None

    def tell(self, progress: Callable[[], Progress]) -> None:
        """Begin to show."""
        self._progress = progress
        self.start()

    def run(self) -> None:
        assert self._progress is not None
        while not self._over.wait(0.5 if self._terminal else self._interval_s):
            line = progress_line(self._progress())
            if self._terminal:
                shown = line[: shutil.get_terminal_size().columns - 1]
                print(f"\r\x1b[K{shown}", end="", file=sys.stderr, flush=True)
            else:
                print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        self._over.set()
        if self.is_alive():
            self.join()
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _interruptible(over: threading.Event) -> Iterator[None]:
    """Ctrl-C (or SIGTERM) sets ``over``; a second one raises KeyboardInterrupt."""

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        if over.is_set():
            raise KeyboardInterrupt
        over.set()

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = result.timeline + "\n"
    for name, content in (("soak.txt", text(result)), ("soak.svg", picture(result)), ("soak.log", log)):
        path = folder / name
        path.write_text(content, encoding="utf-8")
        print(path, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    settings = _settings(parser, given)
    if given.report is not None:
        given.report.mkdir(parents=True, exist_ok=True)  # before an hour's work
    print(f"seed {settings.seed}", file=sys.stderr, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="kvrep-soak-"))
    display, over, keep = _Display(settings), threading.Event(), False
    try:
        with _interruptible(over):
            result = soak(settings, folder, over, display.tell)
        keep = not result.ok and settings.disk_bytes is None
    except (NotPrivileged, Error, OSError, TimeoutError) as error:
        display.stop()
        print(f"the soak could not run: {type(error).__name__}: {error}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        display.stop()
        return INTERRUPTED
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    display.stop()
    print(text(result), end="")
    if given.report is not None:
        _write(result, given.report)
    if keep:
        print(f"the stores are kept in {folder}", file=sys.stderr)
    if not result.ok:
        return BROKEN
    return INTERRUPTED if result.interrupted else KEPT


if __name__ == "__main__":
    sys.exit(main())
