"""Reading a queue or stream. Deliveries wait in a list that the prefetch count bounds."""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import partial
from typing import Any

import pika
from pika.spec import Basic

from kvrep.brokers.interface import EARLIEST, LATEST, STORED, Delivery, Message
from kvrep.brokers.outstanding import Outstanding
from kvrep.brokers.rabbitmq.link import Link, Place
from kvrep.brokers.rabbitmq.publisher import KEY_HEADER
from kvrep.errors import ClosedError, Error, OpenError, again

__all__ = ["RabbitSubscriber"]

OFFSET_HEADER = "x-stream-offset"
SAVE_INTERVAL_S = 0.2
CLOSE_S = 5.0
PERSISTENT = 2


class RabbitSubscriber:
    """See :class:`kvrep.brokers.interface.Subscriber`.

    A tag is (generation, delivery tag, offset in the stream); every connection is a generation of its own.
    """

    def __init__(self, place: Place, queue: str, group: str, start: str, prefetch: int) -> None:
        self._queue, self._prefetch, self._stream = queue, prefetch, place.stream
        self._position_queue = f"{queue}.{group}.position"
        self._start = _start(start)
        # Protects what follows; announces arrivals.
        self._changed = threading.Condition()
        self._arrived: deque[Delivery] = deque()
        self._outstanding = Outstanding()
        """Delivery tags of this generation."""
        self._generation = 0
        self.closed = False
        self._ended: Error | None = None
        self._next: int | None = None
        """Of a stream: the offset behind the last one up to which all are acked."""
        self._saved: int | None = None
        self._channel: Any = None
        self._saving = False
        self._link = Link(place, queue, "subscriber", self._on_ready, self._on_lost)
        self._link.on_ended = self._on_ended
        self._link.open()

    # -- the reading thread ------------------------------------------------------------------------

    def receive(self, max_messages: int, timeout_s: float) -> list[Delivery]:
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(lambda: self.closed or self._ended or self._ready(), timeout_s)
            if self.closed:
                raise ClosedError("the subscriber is closed")
            if self._ended is not None:
                raise again(self._ended)
            count = min(max_messages, self._ready())
            return [self._arrived.popleft() for _ in range(count)]

    def _ready(self) -> int:
        """How many may be handed out: a stream's chunks bring more than the prefetch count."""
        arrived = len(self._arrived)
        return min(arrived, self._prefetch - (len(self._outstanding) - arrived))

    def ack(self, delivery: Delivery, *, through: bool = True) -> None:
        generation, tag, offset = delivery.tag
        save = False
        with self._changed:
            if self.closed or generation != self._generation:
                return
            tags = self._outstanding.ack(tag, through=through)
            if not tags:
                return
            done_through = self._outstanding.done_through
            self._changed.notify_all()
            if self._stream and done_through is not None:
                self._next = done_through + 1 + (offset - tag)  # offsets and tags grow alike
                save, self._saving = not self._saving, True
        self._link.call(partial(self._send_acks, generation, tags, through))
        if save:
            self._link.call(self._save_soon)

    def close(self) -> None:
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._arrived.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_S
        if self._stream:
            self._link.call(self._save)
        self._link.close(max(0.2, deadline - time.monotonic()))

    # -- the link's thread -------------------------------------------------------------------------

    def _send_acks(self, generation: int, tags: list[int], through: bool) -> None:
        channel = self._channel
        if channel is None or not channel.is_open or generation != self._generation:
            return
        if through:
            channel.basic_ack(tags[-1], multiple=True)
        else:
            for tag in tags:
                channel.basic_ack(tag)

    def _on_ready(self, channel: Any) -> None:
        with self._changed:
            self._channel = channel
            self._generation += 1
        channel.add_on_cancel_callback(lambda _: self._link.break_off(f"{self._queue!r} was deleted"))
        channel.basic_qos(prefetch_count=self._prefetch)
        if not self._stream:
            channel.basic_consume(self._queue, self._on_message)
            return
        channel.queue_declare(
            self._position_queue,
            durable=True,
            arguments={"x-max-length": 1, "x-overflow": "drop-head"},
            callback=lambda _: self._read_position(channel),
        )

    def _on_lost(self) -> None:
        """Everything that is not acked arrives again, what waits here included."""
        with self._changed:
            self._channel = None
            self._arrived.clear()
            self._outstanding.clear()
            self._generation += 1
            self._saving = False

    def _on_ended(self, error: Error) -> None:
        with self._changed:
            self._ended = error
            self._changed.notify_all()

    def _on_message(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        headers = properties.headers or {}
        offset = int(headers.get(OFFSET_HEADER, 0)) if self._stream else 0
        tag = method.delivery_tag
        key = headers.get(KEY_HEADER, b"")
        texts = {
            str(name): str(value)
            for name, value in headers.items()
            if name not in (KEY_HEADER, OFFSET_HEADER)
        }
        message = Message(
            body=body,
            key=key if isinstance(key, bytes) else str(key).encode(),
            headers=texts,
            id=properties.message_id or "",
        )
        with self._changed:
            if self.closed:
                return
            if self._stream and isinstance(self._start, int) and offset < self._start:
                self._channel.basic_ack(tag)  # the server starts at a whole chunk
                return
            self._outstanding.add(tag)
            self._arrived.append(
                Delivery(
                    message,
                    position=str(offset) if self._stream else "",
                    redelivered=bool(method.redelivered),
                    tag=(self._generation, tag, offset),
                )
            )
            self._changed.notify()

    # -- positions in a stream ---------------------------------------------------------------------

    def _read_position(self, channel: Any) -> None:
        if not channel.is_open:  # closed while it was about to begin
            return
        if self._next is not None:
            self._start = self._next
        if self._start != STORED:
            self._consume(channel, self._start)
            return
        channel.add_callback(
            lambda _: self._on_position(channel, None, None, b""), [Basic.GetEmpty], one_shot=True
        )
        channel.basic_get(self._position_queue, self._on_position)

    def _on_position(self, channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        if not channel.is_open:
            return
        if method is not None:
            channel.basic_nack(method.delivery_tag, requeue=True)
        self._consume(channel, int(body) if body.isdigit() else EARLIEST)

    def _consume(self, channel: Any, start: str | int) -> None:
        self._start = start
        offset = {EARLIEST: "first", LATEST: "next"}.get(start, start) if isinstance(start, str) else start
        channel.basic_consume(self._queue, self._on_message, arguments={OFFSET_HEADER: offset})

    def _save_soon(self) -> None:
        channel = self._channel
        if channel is None:
            self._saving = False
            return
        channel.connection.ioloop.call_later(SAVE_INTERVAL_S, self._save)

    def _save(self) -> None:
        self._saving = False
        channel, position = self._channel, self._next
        if channel is None or not channel.is_open or position is None or position == self._saved:
            return
        self._saved = position
        properties = pika.BasicProperties(delivery_mode=PERSISTENT)
        channel.basic_publish("", self._position_queue, str(position).encode(), properties)


def _start(start: str) -> str | int:
    """A name, or the offset behind a position."""
    if start in (STORED, EARLIEST, LATEST):
        return start
    if not start.isdecimal():
        raise OpenError(f"not a position in a stream: {start[:300]!r}")
    return int(start) + 1
