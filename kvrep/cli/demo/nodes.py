"""The nodes of the demo: one ``kvrep serve`` process each."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvrep.errors import Error

__all__ = ["DemoFailed", "Node", "uninterrupted"]

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class DemoFailed(Error):
    """The demo could not go on."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds signals back for a moment in which they would leave something behind; they act afterwards."""
    held: list[int] = []

    def hold(number: int, frame: object) -> None:
        del frame
        held.append(number)

    # Handlers, not a signal mask: a process that is started meanwhile would inherit the mask.
    before = {n: signal.signal(n, hold) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held_back in held[:1]:
            signal.raise_signal(held_back)


class Node:
    """A store in a folder of its own, served by a process of its own."""

    def __init__(self, name: str, folder: Path, *flags: str) -> None:
        self.name = name
        self.path = folder / name
        self.log = folder / f"{name}.log"
        self.address = ""
        self._flags = flags
        self._listen = "127.0.0.1:0"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start the process and return once it answers."""
        self.launch()
        self.wait_ready()

    def launch(self, *flags: str) -> None:
        """Start the process; ``flags`` are added for good. :meth:`wait_ready` waits for it."""
        self._flags += flags
        command = [
            sys.executable, "-m", "kvrep", "serve", str(self.path), "--name", self.name,
            "--listen", self._listen, "--json", "--until-stdin-closes", *self._flags,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            # Its standard input is our end of a pipe: however we end, it closes, and the node ends, too.
            # A session of its own keeps the terminal's Ctrl-C away from it: we end the nodes in order.
            with uninterrupted():  # a process that was started must be known, to be ended
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
                )

    def wait_ready(self) -> None:
        """Return once the node answers; from then on it keeps its port, over restarts, too."""
        line = self._read_line(time.monotonic() + START_TIMEOUT_S)
        self.address = self._listen = str(json.loads(line)["address"])

    def _read_line(self, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, line = self._process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(pipe, 4096) if readable else b""
            if not part:
                what = "ended" if readable else f"was not ready within {START_TIMEOUT_S:g} s"
                raise DemoFailed(f"node {self.name} {what}: {self._last_words()}")
            line += part
        return line

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def kill(self) -> None:
        """SIGKILL: no goodbye, nothing flushed."""
        if self._process is not None:
            self._process.kill()

    def reap(self) -> None:
        """Wait for the end of a killed process."""
        self._end(time.monotonic() + STOP_TIMEOUT_S)

    def ask_to_stop(self) -> None:
        """SIGTERM; :meth:`reap` waits for the end."""
        if self._process is not None:
            self._process.terminate()

    def _end(self, deadline: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
