"""What the tests of brokers share: every broker as a site that can be reached, frozen and thawed."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, EntryPoints
from itertools import count
from typing import Any

import pytest

from kvrep import brokers
from kvrep.brokers.interface import Broker, Delivery, Message, Subscriber
from kvrep.brokers.memory import MemoryBrokers

WAIT_S = 30.0
_names = count(1)


class Site:
    """One broker: makes connections to it, and outages."""

    def __init__(
        self,
        url: Callable[[str], str],
        freeze: Callable[[], object],
        thaw: Callable[[], object],
        **options: Any,
    ) -> None:
        self._url, self._freeze, self._thaw, self._options = url, freeze, thaw, options
        self._open: list[Broker] = []

    def url(self, topic: str = "") -> str:
        return self._url(topic or self.topic())

    @staticmethod
    def topic() -> str:
        """A name that no test has used."""
        return f"t{time.time_ns()}-{next(_names)}"

    def connect(self, topic: str = "") -> Broker:
        broker = brokers.connect(self.url(topic), **self._options)
        self._open.append(broker)
        return broker

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Nobody answers inside."""
        self._freeze()
        try:
            yield
        finally:
            self._thaw()

    def close(self) -> None:
        for broker in self._open:
            broker.close()


SITES = ("memory-log", "memory-queue", "rabbitmq-queue", "rabbitmq-stream", "kafka", "table")


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Each of the brokers in turn; what a test leaves open is closed."""
    made = make_site(request.param, request)
    yield made
    made.close()


def make_site(kind: str, request: pytest.FixtureRequest) -> Site:
    if kind.startswith("memory"):
        memory = MemoryBrokers()
        server = memory["here"]
        end = "?kind=queue" if kind == "memory-queue" else ""
        return Site(lambda t: f"memory://here/{t}{end}", server.stop, server.start, brokers=memory)
    if kind.startswith("rabbitmq"):
        rabbit = request.getfixturevalue("shared_rabbitmq")
        stream = kind == "rabbitmq-stream"
        return Site(lambda t: rabbit.url(t, stream=stream), rabbit.freeze, rabbit.thaw)
    if kind == "table":
        return _table_site(request)
    kafka = request.getfixturevalue("shared_kafka")
    return Site(kafka.url, kafka.freeze, kafka.thaw)


def _table_site(request: pytest.FixtureRequest) -> Site:
    """The example of a broker of one's own, found by its entry point. Who locks the file stops all writing."""
    point = EntryPoint("table", "examples.table_broker:TableBroker", brokers.ENTRY_POINTS)
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(brokers, "entry_points", EntryPoints([point]).select)
    path = request.getfixturevalue("tmp_path") / "messages.db"
    other = sqlite3.connect(path, isolation_level=None)
    request.addfinalizer(other.close)
    return Site(
        lambda t: f"table://{path}?topic={t}",
        lambda: other.execute("BEGIN IMMEDIATE"),
        lambda: other.execute("ROLLBACK"),
    )


def numbered(first: int, last: int, keys: int = 3) -> list[Message]:
    """Messages whose bodies are their numbers, spread over some keys."""
    return [Message(b"%d" % n, key=b"key-%d" % (n % keys), id=str(n)) for n in range(first, last + 1)]


def numbers(deliveries: list[Delivery]) -> list[int]:
    return [int(d.message.body) for d in deliveries]


def read(subscriber: Subscriber, wanted: int, timeout_s: float = WAIT_S) -> list[Delivery]:
    """Deliveries until there are so many."""
    deadline = time.monotonic() + timeout_s
    found: list[Delivery] = []
    while len(found) < wanted:
        left = deadline - time.monotonic()
        assert left > 0, f"{len(found)} of {wanted} messages came in {timeout_s} s"
        found += subscriber.receive(wanted - len(found), min(left, 1.0))
    return found


def in_order(deliveries: list[Delivery]) -> None:
    """Per key: first arrivals in the order of publishing."""
    seen: dict[bytes, int] = {}
    known: set[int] = set()
    for delivery in deliveries:
        number, key = int(delivery.message.body), delivery.message.key
        if number in known:
            continue
        known.add(number)
        assert number > seen.get(key, 0), f"{number} after {seen[key]} of {key!r}"
        seen[key] = number
