"""A write under way: one small object from the caller's hands to its outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kvrep.model.position import Position

__all__ = ["Write"]


class Write:
    """A record to be logged, and then the way its outcome is told.

    States follow each other: ordered -> logged (``offset`` > 0) -> done (committed, or ``error`` set). A lock
    or a callback is attached only when somebody waits: it costs more than the write itself.
    """

    __slots__ = ("_callbacks", "_waiter", "done", "epoch", "error", "kind", "lead", "offset", "payload", "size")

    def __init__(self, kind: int, payload: Any, size: int) -> None:
        self.kind = kind
        self.payload = payload
        self.size = size
        """Bytes of keys and values, for the bounds on unfinished work."""
        self.offset = 0
        self.epoch = 0
        self.error: BaseException | None = None
        self.done = False
        self.lead = False
        """Set when the waiting thread is asked to write the next group."""
        self._waiter: threading.Lock | None = None
        self._callbacks: list[Callable[[Write], None]] | None = None

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.offset)

    def park(self, timeout_s: float) -> None:
        """Sleep until done, asked to lead, or ``timeout_s``. Only one thread may wait for one write."""
        waiter = self._waiter
        if waiter is None:
            waiter = threading.Lock()
            waiter.acquire()
            self._waiter = waiter
        if not (self.done or self.lead):
            waiter.acquire(timeout=timeout_s)

    @property
    def has_waiter(self) -> bool:
        return self._waiter is not None

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and waiter.locked():
            try:
                waiter.release()
            except RuntimeError:
                pass  # somebody else released it in between: the thread is awake

    def complete(self, error: BaseException | None = None) -> None:
        """Tell the outcome. Once; later calls change nothing."""
        if self.done:
            return
        self.error = error
        self.done = True
        self.wake()
        callbacks, self._callbacks = self._callbacks, None
        if callbacks:
            for callback in callbacks:
                callback(self)

    def when_done(self, callback: Callable[[Write], None]) -> None:
        """Call ``callback(write)`` once done, on the thread that completes it, or now if it is done.

        The callback must be quick and must not raise.
        """
        callbacks = self._callbacks
        if callbacks is None:
            callbacks = self._callbacks = []
        callbacks.append(callback)
        if self.done and self._callbacks is callbacks:
            self._callbacks = None
            callback(self)
