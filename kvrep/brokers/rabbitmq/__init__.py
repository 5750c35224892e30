"""RabbitMQ, over AMQP 0-9-1 with pika: ``amqp://`` and ``amqps://`` queues, ``amqp+stream://`` streams.

``amqp://user:password@host:5672/vhost?topic=NAME``; several hosts of one cluster separated by commas. Options:
``topic`` (the queue or stream), ``heartbeat_s`` (30), ``timeout_s`` (10: of one attempt to connect), ``cafile``
(amqps: whom to trust instead of the system's list), ``queue_type`` (``classic`` or ``quorum``: how a queue that
does not exist yet is made). An existing queue or stream is used as it is.

Each publisher and subscriber has a connection and a thread of its own (``kvrep-rabbitmq-…``).

Of a stream, RabbitMQ keeps no reader's position for AMQP 0-9-1: the position of a group lives in a queue beside
it, ``NAME.GROUP.position``, that holds one message.
"""

from __future__ import annotations

from typing import Any

from kvrep.brokers.interface import BUFFER_BYTES, BUFFER_MESSAGES, EARLIEST, LATEST, STORED
from kvrep.brokers.rabbitmq.link import Place
from kvrep.brokers.rabbitmq.publisher import RabbitPublisher
from kvrep.brokers.rabbitmq.subscriber import RabbitSubscriber
from kvrep.brokers.url import DEFAULT_TOPIC, BrokerUrl
from kvrep.errors import ClosedError, ConfigurationMismatch, OpenError

__all__ = ["RabbitBroker", "connect"]

PORT, TLS_PORT = 5672, 5671
NAME_BYTES_MAX = 255
PREFETCH_MAX = 65_535


def connect(url: BrokerUrl) -> RabbitBroker:
    """The broker at ``url``; nothing is connected yet. ``ConfigurationMismatch`` for an unknown option."""
    url.only("topic", "heartbeat_s", "timeout_s", "cafile", "queue_type")
    tls = url.scheme.startswith("amqps")
    queue_type = url.options.get("queue_type", "classic")
    if queue_type not in ("classic", "quorum"):
        raise ConfigurationMismatch(
            f"queue_type={queue_type!r} is not allowed: classic or quorum",
            option="queue_type",
            given=queue_type,
        )
    return RabbitBroker(
        Place(
            shown=str(url),
            hosts=tuple((h, p or (TLS_PORT if tls else PORT)) for h, p in url.hosts or (("localhost", 0),)),
            user=url.user or "guest",
            password=url.password or "guest",
            vhost=url.path or "/",
            tls=tls,
            cafile=url.options.get("cafile", ""),
            heartbeat_s=_seconds(url, "heartbeat_s", 30),
            timeout_s=_seconds(url, "timeout_s", 10),
            stream=url.scheme.endswith("+stream"),
            queue_type=queue_type,
        ),
        url.options.get("topic") or DEFAULT_TOPIC,
    )


def _seconds(url: BrokerUrl, name: str, default: int) -> int:
    text = url.options.get(name, str(default))
    if not text.isdecimal() or not 1 <= int(text) <= 3600:
        raise ConfigurationMismatch(
            f"{name}={text!r} is not allowed: 1 to 3600 whole seconds", option=name, given=text
        )
    return int(text)


class RabbitBroker:
    """See :class:`kvrep.brokers.interface.Broker`."""

    def __init__(self, place: Place, topic: str) -> None:
        self._place = place
        self._topic = topic
        self._open: list[Any] = []
        self._closed = False

    @property
    def url(self) -> str:
        return self._place.shown

    @property
    def topic(self) -> str:
        return self._topic

    @property
    def is_log(self) -> bool:
        return self._place.stream

    def publisher(
        self,
        topic: str = "",
        *,
        buffer_messages: int = BUFFER_MESSAGES,
        buffer_bytes: int = BUFFER_BYTES,
        transactional_id: str = "",
    ) -> RabbitPublisher:
        if transactional_id:
            raise OpenError("RabbitMQ has no transactions here", hint="leave transactional_id out")
        made = RabbitPublisher(self._place, self._name(topic), buffer_messages, buffer_bytes)
        self._open.append(made)
        return made

    def subscriber(
        self, topic: str = "", *, group: str = "kvrep", start: str = STORED, prefetch: int = 500
    ) -> RabbitSubscriber:
        if self._place.stream:
            good = start in (STORED, EARLIEST, LATEST) or start.isdecimal()
        else:
            good = start in (STORED, EARLIEST)
        if not good:
            raise OpenError(f"{self.url} cannot start at {start!r}")
        if not 1 <= prefetch <= PREFETCH_MAX:
            raise OpenError(f"prefetch={prefetch} is not allowed: 1 to {PREFETCH_MAX}")
        made = RabbitSubscriber(self._place, self._name(topic), self._name(group), start, prefetch)
        self._open.append(made)
        return made

    def _name(self, name: str) -> str:
        if self._closed:
            raise ClosedError(f"the broker {self.url} is closed")
        name = name or self._topic
        if len(name.encode()) > NAME_BYTES_MAX:
            raise OpenError(f"names in RabbitMQ have at most {NAME_BYTES_MAX} bytes: {name[:300]!r}")
        return name

    def close(self) -> None:
        self._closed = True
        for one in self._open:
            one.close()
        self._open.clear()
