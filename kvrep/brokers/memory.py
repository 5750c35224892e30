"""A broker inside the process: the twin of the real ones, for tests; it can also misbehave.

::

    brokers = MemoryBrokers()                                  # whoever makes it owns what is in it
    broker = kvrep.brokers.connect("memory://site/orders", brokers=brokers)
    brokers["site"].stop()                                     # unreachable until start(); loses nothing
    brokers["site"].faults = Faults(duplicate=0.2, reorder=0.2, drop=0.01, delay=0.1)

The host in the address is the broker's name, the path its topic; ``?kind=queue`` makes queues (each message
to one subscriber, gone once acked) where a log is the default. No threads: what is published is stored by the
publishing call, or by the ``start()`` that ends an outage.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from kvrep.brokers.interface import (
    BUFFER_BYTES,
    BUFFER_MESSAGES,
    EARLIEST,
    LATEST,
    STORED,
    Delivery,
    Message,
    PublisherStatus,
    Unconfirmed,
)
from kvrep.brokers.outstanding import Outstanding
from kvrep.brokers.sizes import check_message
from kvrep.brokers.url import DEFAULT_TOPIC, BrokerUrl
from kvrep.errors import AuthenticationFailed, ClosedError, OpenError, Overloaded, PeerUnavailable

__all__ = ["Faults", "MemoryBroker", "MemoryBrokers", "MemoryServer", "connect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Chances, 0 to 1, that befall each message behind the confirm."""

    duplicate: float = 0.0
    """It is stored twice."""
    reorder: float = 0.0
    """It is stored behind one of the next three."""
    delay: float = 0.0
    """It is stored behind one of the next fifty, or once a reader finds nothing else."""
    drop: float = 0.0
    """It is confirmed and lost."""


class MemoryBrokers:
    """The brokers of one test, by name; each comes into being when it is first named."""

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed
        self._servers: dict[str, MemoryServer] = {}

    def __getitem__(self, name: str) -> MemoryServer:
        if name not in self._servers:
            self._servers[name] = MemoryServer(self._seed)
        return self._servers[name]

    def connect(self, url: str) -> MemoryBroker:
        """As :func:`kvrep.brokers.connect`, for those who take a function that connects."""
        return connect(BrokerUrl.parse(url), brokers=self)


def connect(url: BrokerUrl, *, brokers: MemoryBrokers | None = None) -> MemoryBroker:
    """The broker named by the address's host; ``OpenError`` without the ``brokers`` that it is one of."""
    url.only("topic", "kind")
    if brokers is None:
        raise OpenError("memory:// needs to know whose broker it is", hint="pass brokers=MemoryBrokers()")
    if len(url.hosts) != 1 or url.options.get("kind", "log") not in ("log", "queue"):
        raise OpenError(f"not a memory broker: {url}", hint="memory://name/topic?kind=log or kind=queue")
    return MemoryBroker(url, brokers[url.hosts[0][0]])


class MemoryServer:
    """What stays when connections come and go. Any thread."""

    def __init__(self, seed: int) -> None:
        self.faults = Faults()
        self.password = ""
        """If set, the one that addresses must carry."""
        self.connections = 0
        self._chance = random.Random(seed)
        # Protects all below, and what publishers and subscribers hold; announces every change.
        self.changed = threading.Condition(threading.RLock())
        self._up = True
        self._blocked = False
        self._topics: dict[tuple[str, bool], _Topic] = {}
        self._publishers: list[MemoryPublisher] = []

    def stop(self) -> None:
        """Be unreachable. Unacked deliveries of queues go back."""
        with self.changed:
            self._up = False
            for topic in self._topics.values():
                topic.disconnected()
            self.changed.notify_all()

    def start(self) -> None:
        """Be reachable again."""
        with self.changed:
            self._up = True
            self._pump()

    def block(self) -> None:
        """Take nothing from publishers until :meth:`unblock`."""
        with self.changed:
            self._blocked = True

    def unblock(self) -> None:
        with self.changed:
            self._blocked = False
            self._pump()

    @property
    def state(self) -> str:
        return "connecting" if not self._up else "blocked" if self._blocked else "ready"

    def topic(self, name: str, *, queue: bool) -> _Topic:
        with self.changed:
            return self._topics.setdefault((name, queue), _Topic(queue))

    def attach(self, publisher: MemoryPublisher) -> None:
        with self.changed:
            self._publishers.append(publisher)

    def detach(self, publisher: MemoryPublisher) -> None:
        with self.changed:
            if publisher in self._publishers:
                self._publishers.remove(publisher)

    def take(self, topic: _Topic, message: Message) -> None:
        """Store a confirmed message, or do to it what ``faults`` says. The lock is held."""
        faults, chance = self.faults, self._chance.random
        topic.pass_by()
        if chance() < faults.drop:
            return
        for _ in range(2 if chance() < faults.duplicate else 1):
            if chance() < faults.delay:
                topic.hold(message, self._chance.randint(1, 50))
            elif chance() < faults.reorder:
                topic.hold(message, self._chance.randint(1, 3))
            else:
                topic.store(message)

    def _pump(self) -> None:
        for publisher in self._publishers:
            publisher.pump()
        self.changed.notify_all()


class _Topic:
    """Messages, and how far each group is. Used under the server's lock."""

    def __init__(self, queue: bool) -> None:
        self.queue = queue
        self.log: list[Message] = []
        self.groups: dict[str, int] = {}
        """group: how many messages it has acked."""
        self.ready: deque[tuple[int, Message, bool]] = deque()
        """Of a queue: (number, message, redelivered)."""
        self.taken: dict[int, Message] = {}
        self._count = 0
        self._held: list[tuple[int, Message]] = []
        self.generation = 0

    def store(self, message: Message) -> None:
        if self.queue:
            self.ready.append((self._count, message, False))
        else:
            self.log.append(message)
        self._count += 1

    def hold(self, message: Message, steps: int) -> None:
        self._held.append((steps, message))

    def pass_by(self) -> None:
        """One more message comes: what waited long enough goes before it."""
        held = [(steps - 1, message) for steps, message in self._held]
        self._held = [(steps, message) for steps, message in held if steps > 0]
        for steps, message in held:
            if steps <= 0:
                self.store(message)

    def settle(self) -> None:
        """Nothing else comes: nothing is held any longer."""
        held, self._held = self._held, []
        for _, message in held:
            self.store(message)

    def disconnected(self) -> None:
        """Unacked deliveries go back to where they were."""
        self.generation += 1
        for number, message in sorted(self.taken.items(), reverse=True):
            self.ready.appendleft((number, message, True))
        self.taken.clear()


class MemoryBroker:
    """See :class:`kvrep.brokers.interface.Broker`."""

    def __init__(self, url: BrokerUrl, server: MemoryServer) -> None:
        self._url = url
        self._server = server
        self._queue = url.options.get("kind", "log") == "queue"
        self._open: list[Any] = []

    @property
    def url(self) -> str:
        return str(self._url)

    @property
    def topic(self) -> str:
        return self._url.options.get("topic") or self._url.path or DEFAULT_TOPIC

    @property
    def is_log(self) -> bool:
        return not self._queue

    def _reach(self, topic: str) -> _Topic:
        server = self._server
        if server.state == "connecting":
            raise PeerUnavailable(f"{self.url} does not answer", address=self.url)
        if server.password and server.password != self._url.password:
            raise AuthenticationFailed(
                f"{self.url} refused user {self._url.user!r}", hint="check user and password in the address"
            )
        return server.topic(topic or self.topic, queue=self._queue)

    def publisher(
        self,
        topic: str = "",
        *,
        buffer_messages: int = BUFFER_MESSAGES,
        buffer_bytes: int = BUFFER_BYTES,
        transactional_id: str = "",
    ) -> MemoryPublisher:
        if transactional_id:
            raise OpenError("memory:// has no transactions", hint="leave transactional_id out")
        made = MemoryPublisher(self._server, self._reach(topic), buffer_messages, buffer_bytes)
        self._open.append(made)
        return made

    def subscriber(
        self, topic: str = "", *, group: str = "kvrep", start: str = STORED, prefetch: int = 500
    ) -> MemorySubscriber:
        place = self._reach(topic)
        if self._queue:
            if start not in (STORED, EARLIEST):
                raise OpenError(f"a queue cannot start at {start!r}", hint="start it at STORED")
            at = 0
        elif start in (STORED, EARLIEST, LATEST):
            with self._server.changed:
                at = {STORED: place.groups.get(group, 0), EARLIEST: 0, LATEST: len(place.log)}[start]
        else:
            at = _after(start)
        made = MemorySubscriber(self._server, place, group, at, prefetch)
        self._open.append(made)
        return made

    def close(self) -> None:
        for one in self._open:
            one.close()
        self._open.clear()


def _after(position: str) -> int:
    if not position.isdecimal():
        raise OpenError(f"not a position in a memory broker: {position!r}")
    return int(position) + 1


class MemoryPublisher:
    """See :class:`kvrep.brokers.interface.Publisher`."""

    def __init__(self, server: MemoryServer, topic: _Topic, buffer_messages: int, buffer_bytes: int) -> None:
        self._server, self._topic = server, topic
        self._messages_max, self._bytes_max = buffer_messages, buffer_bytes
        self._waiting: deque[Message] = deque()
        self._bytes = 0
        self.published = self.confirmed = 0
        self._closed = False
        server.attach(self)

    def publish(self, message: Message, timeout_s: float = 30.0) -> int:
        size = check_message(message, self._bytes_max)
        deadline = time.monotonic() + timeout_s
        with self._server.changed:
            while not self._closed and not self._has_room(size):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Overloaded(f"the buffer is full: the broker is {self._server.state}")
                self._server.changed.wait(left)
            if self._closed:
                raise ClosedError("the publisher is closed")
            self._waiting.append(message)
            self._bytes += size
            self.published += 1
            number = self.published
            self.pump()
        return number

    def _has_room(self, size: int) -> bool:
        return len(self._waiting) < self._messages_max and (
            not self._waiting or self._bytes + size <= self._bytes_max
        )

    def pump(self) -> None:
        """Hand over what waits, if the server takes it. The server's lock is held."""
        if self._server.state != "ready" or not self._waiting:
            return
        while self._waiting:
            self._server.take(self._topic, self._waiting.popleft())
            self.confirmed += 1
        self._bytes = 0
        self._server.changed.notify_all()

    def wait(self, number: int, timeout_s: float) -> bool:
        with self._server.changed:
            self._server.changed.wait_for(lambda: self.confirmed >= number or self._closed, timeout_s)
            return self.confirmed >= number

    def flush(self, timeout_s: float) -> None:
        number = self.published
        if not self.wait(number, timeout_s):
            raise Unconfirmed(
                f"{number - self.confirmed} messages are not confirmed: the broker is {self._server.state}",
                confirmed=self.confirmed,
                published=number,
            )

    def status(self) -> PublisherStatus:
        return PublisherStatus(
            state="closed" if self._closed else self._server.state,
            published=self.published,
            confirmed=self.confirmed,
            buffered_bytes=self._bytes,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        if not self._closed:
            self.wait(self.published, timeout_s)
        with self._server.changed:
            self._closed = True
            self._server.detach(self)
            self._server.changed.notify_all()


class MemorySubscriber:
    """See :class:`kvrep.brokers.interface.Subscriber`."""

    def __init__(self, server: MemoryServer, topic: _Topic, group: str, at: int, prefetch: int) -> None:
        self._server, self._topic, self._group, self._prefetch = server, topic, group, prefetch
        self._at = at
        self._outstanding = Outstanding()
        self._generation = topic.generation
        self._closed = False

    @property
    def problem(self) -> str:
        return "the broker does not answer" if self._server.state == "connecting" else ""

    def receive(self, max_messages: int, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        with self._server.changed:
            while True:
                if self._closed:
                    raise ClosedError("the subscriber is closed")
                found = self._fetch(min(max_messages, self._prefetch - len(self._outstanding)))
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._server.changed.wait(left)

    def _fetch(self, count: int) -> list[Delivery]:
        """What is there now. The server's lock is held."""
        topic = self._topic
        if self._generation != topic.generation and topic.queue:
            self._outstanding.clear()
            self._generation = topic.generation
        if self._server.state == "connecting" or count <= 0:
            return []
        if not (topic.ready if topic.queue else self._at < len(topic.log)):
            topic.settle()
        found = self._from_queue(count) if topic.queue else self._from_log(count)
        for delivery in found:
            self._outstanding.add(delivery.tag[1])
        return found

    def _from_queue(self, count: int) -> list[Delivery]:
        topic = self._topic
        found: list[Delivery] = []
        while topic.ready and len(found) < count:
            number, message, again = topic.ready.popleft()
            topic.taken[number] = message
            found.append(Delivery(message, redelivered=again, tag=(self._generation, number)))
        return found

    def _from_log(self, count: int) -> list[Delivery]:
        first, self._at = self._at, min(self._at + count, len(self._topic.log))
        return [
            Delivery(self._topic.log[at], position=str(at), tag=(self._generation, at))
            for at in range(first, self._at)
        ]

    def ack(self, delivery: Delivery, *, through: bool = True) -> None:
        with self._server.changed:
            generation, number = delivery.tag
            if self._closed or (generation != self._topic.generation and self._topic.queue):
                return
            for done in self._outstanding.ack(number, through=through):
                self._topic.taken.pop(done, None)
            done_through = self._outstanding.done_through
            if not self._topic.queue and done_through is not None:
                groups = self._topic.groups
                groups[self._group] = max(groups.get(self._group, 0), done_through + 1)

    def close(self) -> None:
        with self._server.changed:
            if not self._closed and self._topic.queue and self._generation == self._topic.generation:
                for number in reversed(list(self._outstanding)):
                    message = self._topic.taken.pop(number, None)
                    if message is not None:
                        self._topic.ready.appendleft((number, message, True))
            self._closed = True
            self._server.changed.notify_all()
