"""What the tests of the kvrep command share: running it here or as a process, and small clusters."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import kvrep
from kvrep.cli import main

WAIT_S = 30.0


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        """The output as JSON; fails when it is none."""
        return json.loads(self.out)


def run_here(capture: Any, *arguments: object) -> Result:
    """Run the command in this process; ``capture`` is the fixture ``capfdbinary``."""
    capture.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capture.readouterr()
    return Result(int(code), out, err.decode())


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvrep", *map(str, arguments)]


def run_process(*arguments: object, stdin: bytes = b"", timeout_s: float = WAIT_S) -> Result:
    """Run the command as a process of its own."""
    done = subprocess.run(
        command(*arguments), input=stdin, capture_output=True, timeout=timeout_s, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr.decode())


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = WAIT_S) -> None:
    """Wait for something to become true; fails when it does not in time."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        select.select([], [], [], 0.01)


@contextmanager
def pair(folder: Path, *, acks: int = 1, **options: Any) -> Iterator[tuple[kvrep.Store, kvrep.Store]]:
    """A primary ``a`` and a follower ``b`` in this process; the follower is a voter already."""
    with kvrep.open(folder / "a", name="a", listen="127.0.0.1:0", acks=acks, **options) as a:
        with kvrep.open(folder / "b", name="b", listen="127.0.0.1:0", follow=a.address, **options) as b:
            wait_until(lambda: a.status().voters == ("a", "b"), "b is a voter")
            wait_until(lambda: not a.status().not_writable, "a takes writes")
            yield a, b


class Served:
    """A ``kvrep serve`` process."""

    def __init__(self, path: Path, *flags: object) -> None:
        self.process = subprocess.Popen(
            command("serve", path, "--listen", "127.0.0.1:0", "--json", "--until-stdin-closes", *flags),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.process.kill()
            raise AssertionError(f"it did not start: {self.process.communicate()[1].decode()}")
        self.ready = json.loads(line)
        self.address: str = self.ready["address"]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal and wait: (exit code, what it logged)."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            os.kill(self.process.pid, number)
        _, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, err.decode()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.end(signal.SIGKILL)
