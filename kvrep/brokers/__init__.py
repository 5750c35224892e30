"""Message brokers: one interface, one module per broker, imported when its scheme is first used.

::

    interface     Broker, Publisher, Subscriber, Message, Delivery: what all of them offer
    url           their addresses
    broker        BaseBroker: opens publishers and subscribers, and closes them
    publisher     BasePublisher: a publisher's life, from the window of what is unconfirmed to the end
    outstanding   Outstanding: what a subscriber has delivered and nobody has acked
    memory        memory://   a broker inside the process, for tests; can duplicate, reorder, delay and drop
    rabbitmq      amqp://, amqps:// (queues), amqp+stream://, amqps+stream:// (streams)   kvrep[rabbitmq]
    kafka         kafka://, kafkas:// (TLS)                                               kvrep[kafka]

Others add a broker by an entry point of the group ``kvrep.brokers``: its name is the scheme, its object is
called with the :class:`~kvrep.brokers.url.BrokerUrl` and the options, and returns a Broker. The two bases leave
little to write: ``examples/table_broker.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from kvrep.brokers.broker import BaseBroker
from kvrep.brokers.interface import (
    EARLIEST,
    LATEST,
    STORED,
    Broker,
    Delivery,
    Message,
    Publisher,
    PublisherStatus,
    Subscriber,
    Unconfirmed,
)
from kvrep.brokers.outstanding import Outstanding
from kvrep.brokers.publisher import BasePublisher, Window
from kvrep.brokers.url import BrokerUrl, is_broker_url
from kvrep.errors import OpenError

__all__ = [
    "EARLIEST",
    "LATEST",
    "STORED",
    "BaseBroker",
    "BasePublisher",
    "Broker",
    "BrokerUrl",
    "Delivery",
    "Message",
    "Outstanding",
    "Publisher",
    "PublisherStatus",
    "Subscriber",
    "Unconfirmed",
    "Window",
    "connect",
    "is_broker_url",
]

ENTRY_POINTS = "kvrep.brokers"
_OWN = {
    "memory": ("memory", "", ""),
    "amqp": ("rabbitmq", "pika", "rabbitmq"),
    "amqps": ("rabbitmq", "pika", "rabbitmq"),
    "amqp+stream": ("rabbitmq", "pika", "rabbitmq"),
    "amqps+stream": ("rabbitmq", "pika", "rabbitmq"),
    "kafka": ("kafka", "confluent_kafka", "kafka"),
    "kafkas": ("kafka", "confluent_kafka", "kafka"),
}
"""scheme: (module, the package it needs, the extra that installs it)"""


def connect(url: str, **options: Any) -> Broker:
    """The broker at ``url``. Connects when its first publisher or subscriber is made.

    ``options`` are the broker's own (see its module); what can stand in the address need not be one.
    ``OpenError`` for an address, option or scheme that is not understood, or a package that is missing.
    """
    parsed = BrokerUrl.parse(url)
    make = _own(parsed.scheme) or _others(parsed.scheme)
    if make is None:
        raise OpenError(
            f"no broker is known for {parsed.scheme}://",
            hint=f"known are: {', '.join(sorted(_OWN))}, and what packages add as entry points {ENTRY_POINTS!r}",
        )
    broker: Broker = make(parsed, **options)
    return broker


def _own(scheme: str) -> Callable[..., Any] | None:
    if scheme not in _OWN:
        return None
    module, package, extra = _OWN[scheme]
    try:
        make: Callable[..., Any] = import_module(f"kvrep.brokers.{module}").connect
    except ModuleNotFoundError as error:
        if not package or (error.name or "").partition(".")[0] != package:
            raise
        raise OpenError(
            f"{scheme}:// needs the package {package}", hint=f'pip install "kvrep[{extra}]"'
        ) from error
    return make


def _others(scheme: str) -> Callable[..., Any] | None:
    for point in entry_points(group=ENTRY_POINTS, name=scheme):
        make: Callable[..., Any] = point.load()
        return make
    return None
