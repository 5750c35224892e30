"""Reading a queue or stream. Deliveries wait in a list that the prefetch count bounds, and a number of bytes.

RabbitMQ bounds what it sends by a count alone. So when messages turn out to be large, the connection is given up
(it would bring all that is on its way) and the next one asks for as many as fit. Whoever holds all of these without
an ack and wants more, for the rest of something large, gets as many again, from a new consumer. Of a stream, RabbitMQ
sends whole chunks: what publishers have written at one time arrives at one time.
"""

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
_OFFSETS: dict[str | int | None, str] = {EARLIEST: "first", LATEST: "next"}
BUFFER_BYTES = 16 << 20
"""Of deliveries that nobody has taken yet; twice as much ends the connection."""
LATE_MESSAGES = 64
"""A large message is forgotten, little by little, over some times this number."""
SAVE_INTERVAL_S = 0.2
CLOSE_S = 5.0
PERSISTENT = 2


class RabbitSubscriber:
    """See :class:`kvrep.brokers.interface.Subscriber`.

    A tag is (generation, delivery tag); every connection is a generation of its own.
    """

    def __init__(self, place: Place, queue: str, group: str, start: str, prefetch: int) -> None:
        self._queue, self._prefetch, self._stream = queue, prefetch, place.stream
        self._position_queue = f"{queue}.{group}.position"
        self._start = _start(start)
        """Of a stream: where the next connection begins, unless something was acked."""
        # Protects what follows; announces arrivals.
        self._changed = threading.Condition()
        self._arrived: deque[Delivery] = deque()
        self._outstanding = Outstanding()
        """Delivery tags of this generation."""
        self._offsets: dict[int, int] = {}
        """Of a stream: where they stand."""
        self._generation = 0
        self._window = prefetch
        """How many the broker was asked for."""
        self._credit = prefetch
        """How many of them may still come, at the most, before more are acked."""
        self._first_tag, self._last_tag = 1, 0
        """Of the present consumer's deliveries; of all."""
        self._begin, self._last_offset = 0, -1
        """The first offset of the present consumer; of the last delivery."""
        self._widening = False
        """As many again were asked for, and nothing has come since."""
        self._held = 0
        """Bytes in ``arrived``."""
        self._large = 0
        """Bytes of the largest message of late."""
        self._consumer = ""
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

    @property
    def problem(self) -> str:
        return self._link.problem

    # -- the reading thread ------------------------------------------------------------------------

    def receive(self, max_messages: int, timeout_s: float) -> list[Delivery]:
        self._widen()
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(lambda: self.closed or self._ended or self._ready(), timeout_s)
            if self.closed:
                raise ClosedError("the subscriber is closed")
            if self._ended is not None:
                raise again(self._ended)
            count = min(max_messages, self._ready())
            found = [self._arrived.popleft() for _ in range(count)]
            self._held -= sum(len(delivery.message.body) for delivery in found)
            return found

    def _widen(self) -> None:
        """All that a narrowed window brought was taken and waits for its ack: ask for as many again.

        Nothing is on its way then, which a consumer that is cancelled would refuse; of a stream nothing can be.
        """
        with self._changed:
            full = len(self._outstanding) >= self._prefetch
            if self._arrived or self._widening or self._credit > 0 or full:
                return
            self._widening = True
            generation = self._generation
        self._link.call(partial(self._consume_anew, generation))

    def _ready(self) -> int:
        """How many may be handed out: a stream's chunks bring more than the prefetch count."""
        arrived = len(self._arrived)
        return min(arrived, self._prefetch - (len(self._outstanding) - arrived))

    def ack(self, delivery: Delivery, *, through: bool = True) -> None:
        generation, tag = delivery.tag
        save = False
        with self._changed:
            if self.closed or generation != self._generation:
                return
            tags = self._outstanding.ack(tag, through=through)
            if not tags:
                return
            self._credit += sum(one >= self._first_tag for one in tags)
            self._changed.notify_all()
            if self._stream:
                for one in tags:
                    del self._offsets[one]
                self._next = next(iter(self._offsets.values()), self._last_offset + 1)
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
        if not self._stream:
            self._consume(channel)
            return
        channel.queue_declare(
            self._position_queue,
            durable=True,
            arguments={"x-max-length": 1, "x-overflow": "drop-head"},
            callback=lambda _: self._read_position(channel),
        )

    def _consume(self, channel: Any, start: str | int | None = None) -> None:
        """Ask for as many as fit, for all that are allowed while messages are small; of a stream from ``start`` on."""
        with self._changed:
            fit = BUFFER_BYTES // max(1, self._large)
            self._window = self._credit = max(1, min(self._prefetch, fit))
            self._first_tag = self._last_tag + 1
            self._begin = start if isinstance(start, int) else 0
        offset = _OFFSETS.get(start, start)
        channel.basic_qos(prefetch_count=self._window)
        self._consumer = channel.basic_consume(
            self._queue, self._on_message, arguments={OFFSET_HEADER: offset} if self._stream else None
        )

    def _consume_anew(self, generation: int) -> None:
        """The window counts for each consumer: a new one has all of it."""
        channel = self._channel
        if channel is not None and channel.is_open and generation == self._generation:
            channel.basic_cancel(self._consumer)
            self._consume(channel, self._last_offset + 1 if self._stream else None)

    def _on_lost(self) -> None:
        """Everything that is not acked arrives again, what waits here included."""
        with self._changed:
            self._channel = None
            self._held, self._widening, self._last_tag = 0, False, 0
            self._credit = (
                self._prefetch
            )  # or receive() would ask for more before the next consumer has begun
            self._arrived.clear()
            self._outstanding.clear()
            self._offsets.clear()
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
        if properties.content_type:
            texts.setdefault("content-type", properties.content_type)
        message = Message(
            body=body,
            key=key if isinstance(key, bytes) else str(key).encode(),
            headers=texts,
            id=properties.message_id or "",
        )
        with self._changed:
            if self.closed:
                return
            self._last_tag = tag
            if self._stream:
                if offset < self._begin:
                    self._channel.basic_ack(tag)  # the server starts at a whole chunk
                    return
                if self._start == LATEST:
                    self._start = offset  # it is not acked yet: the next connection must not pass it over
                self._offsets[tag] = self._last_offset = offset
            self._outstanding.add(tag)
            self._credit -= 1
            self._held += len(body)
            self._large = max(len(body), self._large - self._large // LATE_MESSAGES)
            self._widening = False
            self._arrived.append(
                Delivery(
                    message,
                    position=str(offset) if self._stream else "",
                    redelivered=bool(method.redelivered),
                    tag=(self._generation, tag),
                )
            )
            self._changed.notify()
            too_much = self._held > 2 * BUFFER_BYTES and self._window * self._large > 2 * BUFFER_BYTES
            alone = self._window == 1  # a message that is larger than the bound by itself
        if too_much and not alone:
            self._link.break_off(f"messages of {self._queue!r} became larger: fewer at once from now on")

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
        self._start = int(body) if body.isdigit() else EARLIEST
        self._consume(channel, self._start)

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
