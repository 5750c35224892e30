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

from kvrep.brokers.broker import BaseBroker
from kvrep.brokers.publisher import Window
from kvrep.brokers.rabbitmq.link import Place
from kvrep.brokers.rabbitmq.publisher import RabbitPublisher
from kvrep.brokers.rabbitmq.subscriber import RabbitSubscriber
from kvrep.brokers.url import BrokerUrl
from kvrep.errors import OpenError

__all__ = ["RabbitBroker", "connect"]

OPTIONS = ("heartbeat_s", "timeout_s", "cafile", "queue_type")
PORT, TLS_PORT = 5672, 5671
NAME_BYTES_MAX = 255
PREFETCH_MAX = 65_535


def connect(url: BrokerUrl) -> RabbitBroker:
    """The broker at ``url``; nothing is connected yet. ``ConfigurationMismatch`` for an unknown option."""
    return RabbitBroker(url)


class RabbitBroker(BaseBroker):
    """See :class:`kvrep.brokers.interface.Broker`."""

    def __init__(self, url: BrokerUrl) -> None:
        super().__init__(url, options=OPTIONS, is_log=url.scheme.endswith("+stream"))
        self._place = _place(url, stream=self.is_log)

    def _publisher(self, topic: str, window: Window) -> RabbitPublisher:
        return RabbitPublisher(self._place, _name(topic), window)

    def _subscriber(self, topic: str, group: str, start: str, prefetch: int) -> RabbitSubscriber:
        if not 1 <= prefetch <= PREFETCH_MAX:
            raise OpenError(f"prefetch={prefetch} is not allowed: 1 to {PREFETCH_MAX}")
        return RabbitSubscriber(self._place, _name(topic), _name(group), start, prefetch)


def _place(url: BrokerUrl, *, stream: bool) -> Place:
    tls = url.scheme.startswith("amqps")
    usual = TLS_PORT if tls else PORT
    return Place(
        shown=str(url),
        hosts=tuple((host, port or usual) for host, port in url.hosts or (("localhost", 0),)),
        user=url.user or "guest",
        password=url.password or "guest",
        vhost=url.path or "/",
        tls=tls,
        cafile=url.options.get("cafile", ""),
        heartbeat_s=url.number("heartbeat_s", 30, 1, 3600),
        timeout_s=url.number("timeout_s", 10, 1, 3600),
        stream=stream,
        queue_type=url.choice("queue_type", "classic", "quorum"),
    )


def _name(name: str) -> str:
    if len(name.encode()) > NAME_BYTES_MAX:
        raise OpenError(f"names in RabbitMQ have at most {NAME_BYTES_MAX} bytes: {name[:300]!r}")
    return name
