"""The life of a publisher, whatever its broker: a window of what is unconfirmed, waits with deadlines, one end.

::

    publish() ──> room in the window? ──> _send() ──> (the broker) ──> _confirm() ──> wait(), flush()
                                                           │
                                                           └──> _end(): no hope; everybody is told

A broker's own publisher derives from :class:`BasePublisher`, hands messages over in ``_send`` and calls
``_confirm`` for what is safe, in the order of publishing. Everything that the interface promises comes from here.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from kvrep.brokers.interface import (
    BUFFER_BYTES,
    BUFFER_MESSAGES,
    Message,
    PublisherStatus,
    Unconfirmed,
    headers_chars,
)
from kvrep.errors import ClosedError, Error, Overloaded, ValueTooLarge, again

__all__ = ["BasePublisher", "Window"]

MESSAGE_OVERHEAD_BYTES = 256
"""What a message is counted for besides its content: objects, frames, headers."""
NEVER = 1 << 62


class Window(NamedTuple):
    """How much may be unconfirmed."""

    messages: int = BUFFER_MESSAGES
    bytes: int = BUFFER_BYTES


class BasePublisher(ABC):
    """See :class:`kvrep.brokers.interface.Publisher`.

    ``message_bytes_max`` is the broker's own bound of one message, if it is below the window's. ``changed`` is
    given by those who must share a lock; it may be entered twice by one thread.
    """

    def __init__(
        self,
        window: Window,
        *,
        message_bytes_max: int | None = None,
        changed: threading.Condition | None = None,
    ) -> None:
        self._messages_max, self._bytes_max = window
        self._message_bytes_max = min(message_bytes_max or window.bytes, window.bytes)
        # Protects what follows and all that a broker keeps of its messages; announces confirms and the end.
        self._changed = changed or threading.Condition()
        self._acquire, self._release = self._changed.acquire, self._changed.release
        self.published = 0
        self.confirmed = 0
        self.closed = False
        self._ended: Error | None = None
        """What ended it before it was closed."""
        self._bytes = 0
        self._waiters = 0
        self._wanted = NEVER
        """The first number that somebody waits for."""

    # -- a broker's own ----------------------------------------------------------------------------

    @abstractmethod
    def _send(self, message: Message, size: int) -> None:
        """Hand ``message`` over, which counts as ``size`` bytes. What it raises is raised to the publishing
        thread, and nothing was taken. The lock is held."""

    def _health(self) -> tuple[str, str]:
        """``connecting``, ``ready`` or ``blocked``, and what is wrong, if anything is."""
        return "ready", ""

    @abstractmethod
    def _disconnect(self, deadline: float) -> None:
        """It is closed: end threads and connections, by ``deadline`` if that can be. Every ``close()`` comes
        here, so a second call finds nothing to do."""

    # -- for them ----------------------------------------------------------------------------------

    def _confirm(self, count: int, size: int) -> None:
        """The next ``count`` messages are safe, ``size`` bytes in all. The lock is held."""
        self.confirmed += count
        self._bytes -= size
        # Those who wait for room are woken at half of the window, not at every confirm.
        half = (
            self._bytes * 2 <= self._bytes_max and (self.published - self.confirmed) * 2 <= self._messages_max
        )
        if self._waiters and (half or self.confirmed >= self._wanted):
            self._wanted = NEVER
            self._changed.notify_all()

    def _end(self, error: Error) -> None:
        """Nothing goes on after ``error``."""
        with self._changed:
            self._ended = error
            self._changed.notify_all()

    # -- the interface -----------------------------------------------------------------------------

    def publish(self, message: Message, timeout_s: float = 30.0) -> int:
        size = _size(message, self._message_bytes_max)
        self._acquire()  # "with" would go through two functions of the condition's
        try:
            if self._bytes + size > self._bytes_max or self.published - self.confirmed >= self._messages_max:
                self._await_room(size, timeout_s)
            if self.closed or self._ended is not None:
                self._need_alive()
            # Counted first: it may be confirmed before _send() returns.
            self.published += 1
            self._bytes += size
            try:
                self._send(message, size)
            except Exception:
                self.published -= 1
                self._bytes -= size
                raise
            return self.published
        finally:
            self._release()

    def wait(self, number: int, timeout_s: float) -> bool:
        with self._changed:
            self._wait_for(lambda: self._reached(number), time.monotonic() + timeout_s)
            if self.confirmed < number and self._ended is not None:
                raise again(self._ended)
            return self.confirmed >= number

    def flush(self, timeout_s: float) -> None:
        with self._changed:
            number = self.published
        if not self.wait(number, timeout_s):
            raise Unconfirmed(
                f"{number - self.confirmed} messages are not confirmed{self._why()}",
                confirmed=self.confirmed,
                published=number,
            )

    def status(self) -> PublisherStatus:
        state, problem = self._health()
        if self.closed:
            state = "closed"
        elif self._ended is not None:
            state = "failed"
        return PublisherStatus(
            state=state,
            problem=str(self._ended or problem),
            published=self.published,
            confirmed=self.confirmed,
            buffered_bytes=self._bytes,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        try:
            self.wait(self.published, timeout_s)
        except Error:
            pass  # said already, by what waits or by the status
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self._disconnect(deadline)

    # -- waiting; the lock is held -----------------------------------------------------------------

    @property
    def _over(self) -> bool:
        return self.closed or self._ended is not None

    def _need_alive(self) -> None:
        if self.closed:
            raise ClosedError("the publisher is closed")
        if self._ended is not None:
            raise again(self._ended)

    def _has_room(self, size: int) -> bool:
        return self._bytes + size <= self._bytes_max and self.published - self.confirmed < self._messages_max

    def _await_room(self, size: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        if not self._wait_for(lambda: self._over or self._has_room(size), deadline):
            raise Overloaded(
                f"{self.published - self.confirmed} messages wait to be confirmed{self._why()}",
                hint="nothing was taken; try again later",
            )

    def _reached(self, number: int) -> bool:
        """Whether a wait for ``number`` is over; asks to be woken for it."""
        if self.confirmed >= number or self._over:
            return True
        self._wanted = min(self._wanted, number)
        return False

    def _wait_for(self, condition: Callable[[], bool], deadline: float) -> bool:
        self._waiters += 1
        try:
            return self._changed.wait_for(condition, deadline - time.monotonic())
        finally:
            self._waiters -= 1

    def _why(self) -> str:
        _, problem = self._health()
        return f": {problem}" if problem else ""


def _size(message: Message, bytes_max: int) -> int:
    """What ``message`` costs in a buffer; ``ValueTooLarge`` when that is never there; ``TypeError`` when it
    holds something else than bytes."""
    body, key, headers = message.body, message.key, message.headers
    if type(body) is not bytes or type(key) is not bytes:
        raise TypeError("a message's body and key are bytes")
    size = len(body) + len(key) + len(message.id) + MESSAGE_OVERHEAD_BYTES
    if headers:
        size += headers_chars(headers)
    if size > bytes_max:
        raise ValueTooLarge(f"a message of {size} bytes is above the bound of {bytes_max}")
    return size
