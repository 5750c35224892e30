"""Publishing into a queue or stream with publisher confirms.

::

    publish() ──> waiting ──(the link's thread)──> sent ──(confirms)──> counted
                     ^                               │
                     └──────── lost connection ──────┘   sent again, in order

Both lists together are the bounded buffer. Confirms may come out of order; what is counted has no gap.
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
from kvrep.errors import ClosedError, Overloaded

__all__ = ["KEY_HEADER", "RabbitPublisher"]

KEY_HEADER = "kvrep-key"
PERSISTENT = 2
PUMP_MESSAGES = 128
"""How many are written before the loop looks for confirms."""


class RabbitPublisher:
    """See :class:`kvrep.brokers.interface.Publisher`."""

    def __init__(self, place: Place, queue: str, buffer_messages: int, buffer_bytes: int) -> None:
        self._queue = queue
        self._messages_max, self._bytes_max = buffer_messages, buffer_bytes
        # Protects what follows; announces confirms to those who wait.
        self._changed = threading.Condition()
        self._waiters = 0
        self._waiting: deque[tuple[Message, int]] = deque()
        self._sent: deque[tuple[Message, int]] = deque()
        self._bytes = 0
        self._pumping = False
        """A call of the pump is under way already."""
        self._closed = False
        self.published = 0
        self.confirmed = 0
        # Of the thread:
        self._channel: Any = None
        self._first_tag = 1
        """The delivery tag of the first in ``sent``."""
        self._early: set[int] = set()
        """Confirmed ones behind it."""
        self._link = Link(place, queue, "publisher", self._on_ready, self._on_lost)
        self._link.on_unblocked = self._pump
        self._link.open()

    # -- from other threads ------------------------------------------------------------------------

    def publish(self, message: Message, timeout_s: float = 30.0) -> int:
        size = check_message(message, self._bytes_max)
        with self._changed:
            if self._bytes + size > self._bytes_max or self.published - self.confirmed >= self._messages_max:
                self._await_room(size, timeout_s)
            if self._closed:
                raise ClosedError("the publisher is closed")
            self._waiting.append((message, size))
            self._bytes += size
            self.published += 1
            number = self.published
            wake, self._pumping = not self._pumping, True
        if wake:
            self._link.call(self._pump)
        return number

    def _await_room(self, size: int, timeout_s: float) -> None:
        def room() -> bool:
            return self._closed or (
                self.published - self.confirmed < self._messages_max and self._bytes + size <= self._bytes_max
            )

        if not self._wait_for(room, timeout_s):
            raise Overloaded(
                f"{self.published - self.confirmed} messages wait to be confirmed{self._why()}",
                hint="nothing was taken; try again later",
            )

    def _wait_for(self, condition: Any, timeout_s: float) -> bool:
        self._waiters += 1
        try:
            return bool(self._changed.wait_for(condition, timeout_s))
        finally:
            self._waiters -= 1

    def _why(self) -> str:
        link = self._link
        if link.blocked:
            return f": the broker blocks publishers ({link.blocked})"
        return f": {link.problem}" if link.problem else ""

    def wait(self, number: int, timeout_s: float) -> bool:
        with self._changed:
            self._wait_for(lambda: self.confirmed >= number or self._closed, timeout_s)
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
        elif link.problem:
            state = "connecting"
        else:
            state = "blocked" if link.blocked else "ready"
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
            self.wait(self.published, timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._link.close(max(0.2, deadline - time.monotonic()))

    # -- the link's thread -------------------------------------------------------------------------

    def _on_ready(self, channel: Any) -> None:
        self._channel = channel
        self._first_tag = 1
        self._early.clear()
        channel.add_on_return_callback(self._on_returned)
        channel.confirm_delivery(self._on_confirm)
        self._pump()

    def _on_lost(self) -> None:
        with self._changed:
            self._channel = None
            self._waiting.extendleft(reversed(self._sent))
            self._sent.clear()
            self._pumping = False

    def _pump(self) -> None:
        """Write what waits, some at a time."""
        channel, link = self._channel, self._link
        if channel is None or not channel.is_open or link.blocked:
            self._pumping = False  # whatever ends this state pumps again
            return
        waiting, sent, publish, queue = self._waiting, self._sent, channel.basic_publish, self._queue
        for _ in range(PUMP_MESSAGES):
            try:
                entry = waiting.popleft()
            except IndexError:
                break
            sent.append(entry)
            message = entry[0]
            publish("", queue, message.body, _properties(message), mandatory=True)
        with self._changed:
            self._pumping = bool(waiting)
        if self._pumping:
            link.call(self._pump)

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        if method.NAME != "Basic.Ack":
            self._link.break_off("refused by the broker: a message could not be stored (is the queue full?)")
            return
        tag, first = method.delivery_tag, self._first_tag
        if not method.multiple and tag != first:
            self._early.add(tag)
            return
        first = tag + 1
        early = self._early
        if early:
            while first in early:
                first += 1
            self._early = {one for one in early if one > first}
        with self._changed:
            sent, size = self._sent, 0
            for _ in range(first - self._first_tag):
                size += sent.popleft()[1]
            self._bytes -= size
            self.confirmed += first - self._first_tag
            self._first_tag = first
            if self._waiters and (not sent or self._bytes * 2 <= self._bytes_max or not self._waiting):
                self._changed.notify_all()

    def _on_returned(self, _channel: Any, _method: Any, _properties: Any, _body: bytes) -> None:
        """The queue has been deleted: what was sent is nowhere. Make it anew and send again."""
        self._link.break_off(f"refused by the broker: {self._queue!r} is gone")


def _properties(message: Message) -> pika.BasicProperties:
    headers: dict[str, Any] | None = None
    if message.headers or message.key:
        headers = dict(message.headers)
        if message.key:
            headers[KEY_HEADER] = message.key
    return pika.BasicProperties(delivery_mode=PERSISTENT, message_id=message.id or None, headers=headers)
