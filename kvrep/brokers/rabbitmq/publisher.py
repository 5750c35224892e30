"""Publishing into a queue or stream with publisher confirms.

::

    publish() ──> waiting ──(the link's thread)──> sent ──(confirms)──> done
                     ^                               │
                     └─ lost connection, or refused ─┘

All that is not counted yet is the bounded buffer, in order. Confirms may come out of order; what is counted has
no gap. After a lost connection everything that is not done is sent again, in order. What a full queue refuses is
sent again, too, once all else that was sent is decided, and behind it what followed it of the same key: that may
have been stored before it, so a later one can be seen too early, but the last one of each key comes last.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Any

import pika

from kvrep.brokers.interface import Message, PublisherStatus
from kvrep.brokers.publisher import BasePublisher, Window
from kvrep.brokers.rabbitmq.link import Link, Place

__all__ = ["KEY_HEADER", "RabbitPublisher"]

KEY_HEADER = "kvrep-key"
PERSISTENT = 2
PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0
PUMP_MESSAGES = 128
"""How many are written before the loop looks for confirms."""
CLOSE_MIN_S = 0.2


class RabbitPublisher(BasePublisher):
    """See :class:`kvrep.brokers.interface.Publisher`."""

    def __init__(self, place: Place, queue: str, window: Window) -> None:
        super().__init__(window)
        self._queue = queue
        self._buffer: deque[_Entry] = deque()
        """What is not counted yet, in order."""
        self._waiting: deque[_Entry] = deque()
        """What of it is not sent on this connection yet."""
        self._pumping = False
        """A call of the pump is under way already."""
        # Of the link's thread:
        self._channel: Any = None
        self._sent: deque[_Entry] = deque()
        """What the broker has not decided on, by its delivery tags."""
        self._first_tag = 1
        """The tag of the first in ``sent``."""
        self._early: dict[int, bool] = {}
        """Decided ones behind it: whether they are stored."""
        self._pause_s = 0.0
        self._link = Link(place, queue, "publisher", self._on_ready, self._on_lost)
        self._link.on_unblocked = self._pump
        self._link.on_ended = self._end
        self._link.open()

    def _send(self, message: Message, size: int) -> None:
        entry = _Entry(message, size)
        self._buffer.append(entry)
        self._waiting.append(entry)
        if not self._pumping:
            self._pumping = True
            self._link.call(self._pump)

    def _health(self) -> tuple[str, str]:
        link = self._link
        if link.blocked:
            return "blocked", f"the broker blocks publishers ({link.blocked})"
        if link.full:
            return "blocked", link.full
        return ("connecting", link.problem) if link.problem else ("ready", "")

    def status(self) -> PublisherStatus:
        return replace(super().status(), reconnects=self._link.reconnects)

    def _disconnect(self, deadline: float) -> None:
        self._link.close(max(CLOSE_MIN_S, deadline - time.monotonic()))

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
            self._begin_again()
            self._pumping = False

    def _begin_again(self) -> None:
        """What is not done waits once more, and with it what followed it of its key. The lock is held."""
        again: set[bytes] = set()
        for entry in self._buffer:
            if not entry.done:
                again.add(entry.message.key)
            elif entry.message.key in again:
                entry.done = False
        self._waiting = deque(entry for entry in self._buffer if not entry.done)

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
            sent.popleft().done = early.pop(one, stored) if early else stored
        first = tag + 1
        while early and first in early:
            sent.popleft().done = early.pop(first)
            first += 1
        self._first_tag = first
        self._count()
        if not sent and self._link.full:
            self._retry_later()

    def _count(self) -> None:
        with self._changed:
            buffer, size, number = self._buffer, 0, 0
            while buffer and buffer[0].done:
                size += buffer.popleft().size
                number += 1
            if number:
                self._pause_s = 0.0
                self._confirm(number, size)

    def _retry_later(self) -> None:
        """Everything is decided, and something was refused: again, after a pause that grows while all is."""
        with self._changed:
            self._begin_again()
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
