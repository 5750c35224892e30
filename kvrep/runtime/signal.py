"""Ways to wake threads that wait: one of them for anything, or many for what comes with commits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Moves", "Signal"]


class Signal:
    """A flag that one thread waits for and any thread sets. Setting a set flag costs next to nothing."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the waiting thread, or let its next wait return at once."""
        if self._lock.locked():
            try:
                self._lock.release()
            except RuntimeError:
                pass  # another thread set it in between

    def wait(self, timeout_s: float) -> bool:
        """Wait until set, and clear it; False after ``timeout_s``."""
        return self._lock.acquire(timeout=max(0.0, timeout_s))


class Moves:
    """Announces every commit of one node, and its end, to those who wait. Any thread."""

    def __init__(self) -> None:
        self.waiting = 0
        """How many threads wait: while nobody does, nobody is told."""
        self.on_move: Callable[[], None] = lambda: None
        """For those who wait without a thread: called after every commit and at the end, on any thread."""
        # Guards the count and announces the moves.
        self._moved = threading.Condition()
        self._ended = False

    def stir(self) -> None:
        """Have everybody who waits look again."""
        with self._moved:
            self._moved.notify_all()

    def end(self) -> None:
        """Nobody waits any longer: the node is closing."""
        with self._moved:
            self._ended = True
            self._moved.notify_all()
        self.on_move()

    def until(self, condition: Callable[[], bool], deadline_s: float, look_s: float = 0.02) -> bool:
        """Wait until something that comes with commits is so; False when it is not by ``deadline_s``, or at the
        end. What shows without notice is looked at every ``look_s``."""
        if condition():
            return True
        with self._moved:
            self.waiting += 1
            try:
                while not condition():
                    left = deadline_s - time.monotonic()
                    if left <= 0 or self._ended:
                        return condition()
                    self._moved.wait(min(left, look_s))
            finally:
                self.waiting -= 1
        return True

    def wait_once(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait for the next move, or until ``timeout_s`` have passed; not at all if ``ready()``. A part of what
        is waited for shows without notice: look again every quarter second."""
        with self._moved:
            self.waiting += 1
            try:
                if not ready() and not self._ended:
                    self._moved.wait(timeout_s)
            finally:
                self.waiting -= 1
