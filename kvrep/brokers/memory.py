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

from kvrep.brokers.broker import BaseBroker
from kvrep.brokers.interface import EARLIEST, LATEST, STORED, Delivery, Message
from kvrep.brokers.outstanding import Outstanding
from kvrep.brokers.publisher import BasePublisher, Window
from kvrep.brokers.url import BrokerUrl
from kvrep.errors import AuthenticationFailed, ClosedError, OpenError, PeerUnavailable

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
    if brokers is None:
        raise OpenError("memory:// needs to know whose broker it is", hint="pass brokers=MemoryBrokers()")
    if len(url.hosts) != 1:
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

    def begin(self, group: str, start: str) -> int:
        """How many messages of a log are behind ``start``."""
        if start == STORED:
            return self.groups.get(group, 0)
        if start in (EARLIEST, LATEST):
            return len(self.log) if start == LATEST else 0
        if not start.isdecimal():
            raise OpenError(f"not a position in a memory broker: {start[:300]!r}")
        return int(start) + 1

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


class MemoryBroker(BaseBroker):
    """See :class:`kvrep.brokers.interface.Broker`."""

    def __init__(self, url: BrokerUrl, server: MemoryServer) -> None:
        is_log = url.choice("kind", "log", "queue") == "log"
        super().__init__(url, topic=url.path, options=("kind",), is_log=is_log)
        self._address, self._server = url, server

    def _reach(self, topic: str) -> _Topic:
        server = self._server
        if server.state == "connecting":
            raise PeerUnavailable(f"{self.url} does not answer", address=self.url)
        if server.password and server.password != self._address.password:
            raise AuthenticationFailed(
                f"{self.url} refused user {self._address.user!r}",
                hint="check user and password in the address",
            )
        return server.topic(topic, queue=not self.is_log)

    def _publisher(self, topic: str, window: Window) -> MemoryPublisher:
        return MemoryPublisher(self._server, self._reach(topic), window)

    def _subscriber(self, topic: str, group: str, start: str, prefetch: int) -> MemorySubscriber:
        place = self._reach(topic)
        with self._server.changed:
            at = place.begin(group, start)
        return MemorySubscriber(self._server, place, group, at, prefetch)


class MemoryPublisher(BasePublisher):
    """See :class:`kvrep.brokers.interface.Publisher`. Its lock is the server's."""

    def __init__(self, server: MemoryServer, topic: _Topic, window: Window) -> None:
        super().__init__(window, changed=server.changed)
        self._server, self._topic = server, topic
        self._waiting: list[Message] = []
        server.attach(self)

    def _send(self, message: Message, _size: int) -> None:
        self._waiting.append(message)
        self.pump()

    def pump(self) -> None:
        """Hand over what waits, if the server takes it. The lock is held."""
        if self._server.state != "ready" or not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self._server.take(self._topic, message)
        self._confirm(len(waiting), self._bytes)
        self._changed.notify_all()

    def _health(self) -> tuple[str, str]:
        state = self._server.state
        return state, "" if state == "ready" else f"the broker is {state}"

    def _disconnect(self, _deadline: float) -> None:
        self._server.detach(self)


class MemorySubscriber:
    """See :class:`kvrep.brokers.interface.Subscriber`."""

    def __init__(self, server: MemoryServer, topic: _Topic, group: str, at: int, prefetch: int) -> None:
        self._server, self._topic, self._group, self._prefetch = server, topic, group, prefetch
        self._at = at
        self._outstanding = Outstanding()
        self._generation = topic.generation
        self.closed = False

    def receive(self, max_messages: int, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        with self._server.changed:
            while True:
                if self.closed:
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
            if self.closed or (generation != self._topic.generation and self._topic.queue):
                return
            for done in self._outstanding.ack(number, through=through):
                self._topic.taken.pop(done, None)
            done_through = self._outstanding.done_through
            if not self._topic.queue and done_through is not None:
                groups = self._topic.groups
                groups[self._group] = max(groups.get(self._group, 0), done_through + 1)

    def close(self) -> None:
        with self._server.changed:
            if not self.closed and self._topic.queue and self._generation == self._topic.generation:
                for number in reversed(list(self._outstanding)):
                    message = self._topic.taken.pop(number, None)
                    if message is not None:
                        self._topic.ready.appendleft((number, message, True))
            self.closed = True
            self._server.changed.notify_all()
