"""Publishing into a queue or stream with publisher confirms.

::

    publish() ──> waiting ──(the link's thread)──> sent ──(confirms)──> done
                     ^                               │
                     └─ lost connection, or refused ─┘

All that is not counted yet is the bounded buffer, in order. Confirms may come out of order; what is counted has
no gap. After a lost connection everything that is not done is sent again, in order. What a full queue refuses is
sent again, too, once all else that was sent is decided; then it may arrive behind what followed it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import pika

from kvrep.brokers.interface import Message, PublisherStatus, Unconfirmed
from kvrep.brokers.rabbitmq.link import Link, Place
from kvrep.brokers.sizes import check_message
from kvrep.errors import ClosedError, Error, Overloaded, again

__all__ = ["KEY_HEADER", "RabbitPublisher"]

KEY_HEADER = "kvrep-key"
PERSISTENT = 2
PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0
PUMP_MESSAGES = 128
NEVER = 1 << 62
"""How many are written before the loop looks for confirms."""


class RabbitPublisher:
    """See :class:`kvrep.brokers.interface.Publisher`."""

    def __init__(self, place: Place, queue: str, buffer_messages: int, buffer_bytes: int) -> None:
        self._queue = queue
        self._messages_max, self._bytes_max = buffer_messages, buffer_bytes
        # Protects what follows; announces confirms to those who wait.
        self._changed = threading.Condition()
        self._waiters = 0
        self._wanted = NEVER
        """The first number that somebody waits for."""
        self._buffer: deque[_Entry] = deque()
        """What is not counted yet, in order."""
        self._waiting: deque[_Entry] = deque()
        """What of it is not sent on this connection yet."""
        self._bytes = 0
        self._pumping = False
        """A call of the pump is under way already."""
        self._closed = False
        self.published = 0
        self.confirmed = 0
        # Of the thread:
        self._channel: Any = None
        self._sent: deque[_Entry] = deque()
        """What the broker has not decided on, by its delivery tags."""
        self._first_tag = 1
        """The tag of the first in ``sent``."""
        self._early: dict[int, bool] = {}
        """Decided ones behind it: whether they are stored."""
        self._refused: list[_Entry] = []
        self._pause_s = 0.0
        self._link = Link(place, queue, "publisher", self._on_ready, self._on_lost)
        self._link.on_unblocked = self._pump
        self._link.on_ended = self._on_ended
        self._link.open()

    # -- from other threads ------------------------------------------------------------------------

    def publish(self, message: Message, timeout_s: float = 30.0) -> int:
        size = check_message(message, self._bytes_max)
        with self._changed:
            if self._bytes + size > self._bytes_max or self.published - self.confirmed >= self._messages_max:
                self._await_room(size, timeout_s)
            self._need_alive()
            entry = _Entry(message, size)
            self._buffer.append(entry)
            self._waiting.append(entry)
            self._bytes += size
            self.published += 1
            number = self.published
            wake, self._pumping = not self._pumping, True
        if wake:
            self._link.call(self._pump)
        return number

    def _await_room(self, size: int, timeout_s: float) -> None:
        def room() -> bool:
            return self._over or (
                self.published - self.confirmed < self._messages_max and self._bytes + size <= self._bytes_max
            )

        if not self._wait_for(room, timeout_s):
            raise Overloaded(
                f"{self.published - self.confirmed} messages wait to be confirmed{self._why()}",
                hint="nothing was taken; try again later",
            )

    def _need_alive(self) -> None:
        if self._closed:
            raise ClosedError("the publisher is closed")
        if self._link.ended is not None:
            raise again(self._link.ended)

    def _wait_for(self, condition: Any, timeout_s: float) -> bool:
        self._waiters += 1
        try:
            return bool(self._changed.wait_for(condition, timeout_s))
        finally:
            self._waiters -= 1

    @property
    def _over(self) -> bool:
        return self._closed or self._link.ended is not None

    def _why(self) -> str:
        link = self._link
        if link.blocked:
            return f": the broker blocks publishers ({link.blocked})"
        if link.full:
            return f": {link.full}"
        return f": {link.problem}" if link.problem else ""

    def wait(self, number: int, timeout_s: float) -> bool:
        with self._changed:
            self._wait_for(lambda: self._reached(number), timeout_s)
            if self.confirmed < number and self._link.ended is not None:
                raise again(self._link.ended)
            return self.confirmed >= number

    def flush(self, timeout_s: float) -> None:
        number = self.published
        if not self.wait(number, timeout_s):
            raise Unconfirmed(
                f"{number - self.confirmed} messages are not confirmed{self._why()}",
                confirmed=self.confirmed,
                published=number,
            )

    def status(self) -> PublisherStatus:
        link = self._link
        if self._closed:
            state = "closed"
        elif link.ended is not None:
            state = "failed"
        elif link.problem:
            state = "connecting"
        else:
            state = "blocked" if link.blocked or link.full else "ready"
        return PublisherStatus(
            state=state,
            problem=self._why().removeprefix(": "),
            published=self.published,
            confirmed=self.confirmed,
            buffered_bytes=self._bytes,
            reconnects=link.reconnects,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        if not self._closed:
            try:
                self.wait(self.published, timeout_s)
            except Error:
                pass  # said already
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._link.close(max(0.2, deadline - time.monotonic()))

    # -- the link's thread -------------------------------------------------------------------------

    def _on_ready(self, channel: Any) -> None:
        self._channel = channel
        self._first_tag = 1
        channel.add_on_return_callback(self._on_returned)
        channel.confirm_delivery(self._on_confirm)
        self._pump()

    def _on_lost(self) -> None:
        with self._changed:
            self._channel = None
            self._sent.clear()
            self._early.clear()
            self._refused.clear()
            self._waiting = deque(entry for entry in self._buffer if not entry.done)
            self._pumping = False

    def _on_ended(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _pump(self) -> None:
        """Write what waits, some at a time."""
        channel, link = self._channel, self._link
        if channel is None or not channel.is_open or link.blocked or link.full:
            self._pumping = False  # whatever ends this state pumps again
            return
        waiting, sent, publish, queue = self._waiting, self._sent, channel.basic_publish, self._queue
        for _ in range(PUMP_MESSAGES):
            try:
                entry = waiting.popleft()
            except IndexError:
                break
            sent.append(entry)
            message = entry.message
            publish("", queue, message.body, _properties(message), mandatory=True)
        with self._changed:
            self._pumping = bool(waiting)
        if self._pumping:
            link.call(self._pump)

    def _on_confirm(self, frame: Any) -> None:
        if self._channel is None:
            return  # what was returned is confirmed, too: it counts for nothing
        method = frame.method
        stored, tag, first = method.NAME == "Basic.Ack", method.delivery_tag, self._first_tag
        if not stored:
            self._link.full = "refused by the broker: a message could not be stored (is the queue full?)"
        if not method.multiple and tag != first:
            self._early[tag] = stored
            return
        sent, early = self._sent, self._early
        for one in range(first, tag + 1):
            self._decide(sent.popleft(), early.pop(one, stored) if early else stored)
        first = tag + 1
        while early and first in early:
            self._decide(sent.popleft(), early.pop(first))
            first += 1
        self._first_tag = first
        self._count()
        if not sent and self._link.full:
            self._retry_later()

    def _decide(self, entry: _Entry, stored: bool) -> None:
        if stored:
            entry.done = True
        else:
            self._refused.append(entry)

    def _count(self) -> None:
        with self._changed:
            buffer, size, number = self._buffer, 0, 0
            while buffer and buffer[0].done:
                size += buffer.popleft().size
                number += 1
            self._bytes -= size
            self.confirmed += number
            if number:
                self._pause_s = 0.0
            self._wake()

    def _reached(self, number: int) -> bool:
        """Whether a wait for ``number`` is over; asks to be woken for it. The lock is held."""
        if self.confirmed >= number or self._over:
            return True
        self._wanted = min(self._wanted, number)
        return False

    def _wake(self) -> None:
        """Wake those who wait, if it is worth it: at half of the buffer, not at every confirm. The lock is held."""
        half = (
            self._bytes * 2 <= self._bytes_max and (self.published - self.confirmed) * 2 <= self._messages_max
        )
        if self._waiters and (half or self.confirmed >= self._wanted):
            self._wanted = NEVER
            self._changed.notify_all()

    def _retry_later(self) -> None:
        """Everything is decided, and something was refused: again, after a pause that grows while all is."""
        with self._changed:
            self._waiting.extendleft(reversed(self._refused))
            self._refused.clear()
            self._pumping = True
        self._pause_s = min(PAUSE_MAX_S, max(PAUSE_MIN_S, self._pause_s * 2))
        self._channel.connection.ioloop.call_later(self._pause_s, self._retry)

    def _retry(self) -> None:
        self._link.full = ""
        self._pump()

    def _on_returned(self, _channel: Any, _method: Any, _properties: Any, _body: bytes) -> None:
        """The queue has been deleted: what was sent is nowhere. Make it anew and send again."""
        self._channel = None
        self._link.break_off(f"{self._queue!r} is gone")


class _Entry:
    """A message on its way."""

    __slots__ = ("done", "message", "size")

    def __init__(self, message: Message, size: int) -> None:
        self.message, self.size, self.done = message, size, False


def _properties(message: Message) -> pika.BasicProperties:
    headers: dict[str, Any] | None = None
    if message.headers or message.key:
        headers = dict(message.headers)
        if message.key:
            headers[KEY_HEADER] = message.key
    return pika.BasicProperties(
        delivery_mode=PERSISTENT, message_id=message.id or None, headers=headers,
        content_type=message.headers.get("content-type"),  # where others look for it
    )  # fmt: skip
