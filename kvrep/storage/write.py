"""A write under way: one small object from the caller's hands to its outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from kvrep.model.position import Position
from kvrep.model.record import writes_in
from kvrep.model.sessions import Origin

__all__ = ["Inbox", "Write", "complete_all", "renew_lock", "tell_again"]

# Protects the callbacks of all writes; held for a few instructions, and only where there are callbacks.
_callbacks_lock = threading.Lock()


def renew_lock() -> None:
    """In a forked child: whoever held the lock is not there to let it go."""
    global _callbacks_lock  # noqa: PLW0603 - one lock for all writes; each write would pay for its own
    _callbacks_lock = threading.Lock()


class Inbox(Protocol):
    """Where an event loop learns of the writes it waits for: one delivery for many of them."""

    def deliver(self, writes: Sequence[Write]) -> None:
        """``writes`` are done. Any thread; must be quick and must not raise."""


class Write:
    """A record to be logged, and then the way its outcome is told.

    States follow each other: ordered -> logged (``offset`` > 0) -> done (committed, or ``error`` set). A lock
    or a callback is attached only when somebody waits: it costs more than the write itself.
    """

    __slots__ = (
        "_callbacks", "_waiter", "awaited", "done", "epoch", "error", "inbox", "kind", "lead", "offset",
        "origin", "payload", "size",
    )  # fmt: skip

    def __init__(self, kind: int, payload: Any, size: int) -> None:
        self.kind = kind
        self.payload = payload
        self.size = size
        """Bytes of keys and values, for the bounds on unfinished work."""
        self.offset = 0
        self.epoch = 0
        """Of a forwarded write that is not logged yet: the only epoch in which it may be."""
        self.origin: Origin | None = None
        """Who forwarded it. To be set before the write is put in order."""
        self.error: BaseException | None = None
        self.done = False
        self.lead = False
        """Set when the waiting thread is asked to write the next group."""
        self.awaited = False
        """A thread is going to wait for it. To be set before the write is put in order."""
        self.inbox: Inbox | None = None
        """Told when done. To be set before the write is put in order."""
        self._waiter: threading.Lock | None = None
        self._callbacks: list[Callable[[Write], None]] | None = None

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.offset)

    @property
    def deletes_only(self) -> bool:
        """Whether a write record does nothing but delete."""
        writes = writes_in(self.kind, self.payload)
        return all(value is None for flat in writes[1::2] for value in flat[1::2])

    def attach(self) -> None:
        """Let the present thread be found by :meth:`wake`. Only one thread may wait for one write."""
        if self._waiter is None:
            waiter = threading.Lock()
            waiter.acquire()
            self._waiter = waiter

    def park(self, timeout_s: float) -> bool:
        """Sleep until done or asked to lead; False after ``timeout_s``. Returns early now and then."""
        self.attach()
        waiter = self._waiter
        assert waiter is not None
        return self.done or self.lead or waiter.acquire(timeout=timeout_s)

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
        complete_all((self,), error)

    def settle(self) -> None:
        """``done`` is set: tell who waits."""
        self.wake()
        if self._callbacks is not None:
            self._call_back()

    def when_done(self, callback: Callable[[Write], None]) -> None:
        """Call ``callback(write)`` once done, on the thread that completes it, or now if it is done.

        The callback must be quick and must not raise. Any thread.
        """
        with _callbacks_lock:
            if self._callbacks is None:
                self._callbacks = []
            self._callbacks.append(callback)
        if self.done:  # looked at last: whoever completes the write looks at the callbacks last
            self._call_back()

    def _call_back(self) -> None:
        while True:
            with _callbacks_lock:  # one by one, so that an interrupt loses none that was not called
                callbacks = self._callbacks
                if not callbacks:
                    self._callbacks = None
                    return
                callback = callbacks.pop(0)
            callback(self)


def complete_all(writes: Iterable[Write], error: BaseException | None = None) -> None:
    """Tell the outcome of writes that end together; each inbox among theirs gets one delivery."""
    mail: dict[Inbox, list[Write]] = {}
    for write in writes:
        if write.done:
            continue
        write.error = error
        write.done = True
        if write._waiter is not None:
            write.wake()
        if write._callbacks is not None:
            write._call_back()
        if (inbox := write.inbox) is not None:
            if inbox in mail:
                mail[inbox].append(write)
            else:
                mail[inbox] = [write]
    for inbox, theirs in mail.items():
        inbox.deliver(theirs)


def tell_again(writes: Iterable[Write]) -> None:
    """Complete what :func:`complete_all` left, because an interrupt ended it. Who was told is told once more."""
    for write in writes:
        if not write.done:
            write.complete()
            continue
        write.settle()
        if write.inbox is not None:
            write.inbox.deliver((write,))
