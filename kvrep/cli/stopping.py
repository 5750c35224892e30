"""How a command that runs until it is told to end is told."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["Stop", "stoppable"]


class Stop:
    """Told by SIGTERM and SIGINT, and by the end of standard input where that is watched.

    A second signal ends the process at once, which loses nothing. The main thread alone may wait.

    The kernel may hand a signal to any thread, and Python's handlers run on the main one, which a wait of
    ``threading`` would keep asleep. So the interpreter writes a byte for each signal, and waits look for that;
    and the handler takes no lock, which the code that it interrupts might hold.
    """

    def __init__(self, woken: int, stdin: int | None) -> None:
        self.signal = 0
        """The number of the signal, if it was one."""
        self._over = False
        self._woken = woken
        self._stdin = stdin

    def on_signal(self, number: int, frame: object) -> None:
        del frame
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self._over = True

    def tell(self) -> None:
        """Have waits end, or not begin."""
        self._over = True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until told to end; False when ``timeout_s`` passed first."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._over:
            left = None if deadline_s is None else deadline_s - time.monotonic()
            if left is not None and left < 0:
                break
            watched = [self._woken] if self._stdin is None else [self._woken, self._stdin]
            ready, _, _ = select.select(watched, [], [], left)
            if self._woken in ready:
                with suppress(BlockingIOError):
                    os.read(self._woken, 4096)
            if self._stdin in ready:
                self._over |= not os.read(self._stdin, 4096)
        return self._over


@contextmanager
def stoppable(*, stdin: bool = False) -> Iterator[Stop]:
    """Within the block signals tell the :class:`Stop`; with ``stdin`` the end of standard input does, too:
    whoever started this process holds it open. On the main thread."""
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    stop = Stop(woken, 0 if stdin else None)
    if stdin and sys.__stdin__ is None:  # it was closed before this process began
        stop.tell()
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    outer = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(outer)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(woken)
        os.close(wake)
