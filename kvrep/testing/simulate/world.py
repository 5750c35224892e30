"""The whole cluster: its nodes, their network and clocks, who writes, and what is checked after each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from kvrep.model.configuration import Acks, Configuration
from kvrep.replication.election import ElectionSettings
from kvrep.testing.simulate.clock import Clock, Time
from kvrep.testing.simulate.disk import Disk
from kvrep.testing.simulate.feeding import Feeding
from kvrep.testing.simulate.invariants import Invariants
from kvrep.testing.simulate.network import DELAY_S, Network
from kvrep.testing.simulate.node import Node

__all__ = ["Settings", "World"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one run is like."""

    names: str = "abc"
    """One letter per node; a capital one is a witness."""
    observers: str = ""
    """Nodes beside them that only follow (``voter=False``)."""
    acks: Acks = "majority"
    degrade_after_s: float = 0.0
    """How long copies may be missing before the rule goes on without them; 0: for ever."""
    lag_records_max: int = 0
    """With ``acks=0``: how many acknowledged records the furthest other voter may lack; 0: any."""
    elects: bool = True
    """The quorum coordinator decides who is primary; else people do, by ``promote()``."""
    segment_bytes_max: int = 1 << 20
    credit_bytes: int = 8 << 20
    heartbeat_interval_s: float = 0.5
    heartbeat_timeout_s: float = 2.0
    election: ElectionSettings = field(default_factory=ElectionSettings)


class World:
    """One seed. ``note`` gets (time, node, text) of everything that happens."""

    def __init__(
        self, seed: int, settings: Settings, note: Callable[[float, str, str], None] | None = None
    ) -> None:
        self.chance = Random(seed)
        self.settings = settings
        self.elects = settings.elects
        self.synchronous = settings.acks != 0
        self.time = Time()
        self.network = Network(self.time, self.chance)
        self.check = Invariants(synchronous=self.synchronous, lag_records_max=settings.lag_records_max)
        self.nodes: dict[str, Node] = {}
        self.begun: list[tuple[float, str, int]] = []
        """(when, who, epoch) of every epoch start."""
        self.lineages = 0
        self.degraded = 0
        """How often a rule went on with fewer copies."""
        self._note = note
        self._values = 0
        for name in settings.names + settings.observers:
            clock = Clock(self.time, start=self.chance.uniform(10, 1000))
            self.nodes[name] = Node(self, name, clock, witness=name.isupper(), voter=name in settings.names)

    @property
    def first(self) -> Node:
        """Who began the group, where people began it; the others were opened to follow it."""
        return self.nodes[self.settings.names[0]]

    def say(self, node: Node, text: str, *values: object) -> None:
        """Something happened; the text is made only if somebody reads it."""
        if self._note is not None:
            self._note(self.time.now, node.name, text % values)

    def new_lineage(self) -> bytes:
        self.lineages += 1
        return b"lineage-%08d" % self.lineages

    # -- time --------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let so much time pass; raises :class:`Violation`."""
        until, nodes, orders = self.time.now + seconds, tuple(self.nodes.values()), self.check.orders
        while self.time.step(until):
            orders(nodes)

    def until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Let time pass until the condition holds; whether it did in time."""
        until, nodes, orders = self.time.now + seconds, tuple(self.nodes.values()), self.check.orders
        while not condition():
            if not self.time.step(until):
                return bool(condition())
            orders(nodes)
        return True

    # -- who is what -------------------------------------------------------------------------------

    def primaries(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.primary_epoch]

    def leader(self) -> Node | None:
        """The primary of the highest epoch, if it may take itself for one."""
        found = sorted(self.primaries(), key=lambda n: n.primary_epoch)
        if not found:
            return None
        electing = found[-1].electing
        return found[-1] if electing is None or electing.election.alive(found[-1].now) else None

    def data_nodes(self) -> list[Node]:
        return [n for n in self.nodes.values() if not n.witness]

    def acknowledged_after(self, moment: float, epoch: int) -> float | None:
        """When the first write of an epoch above ``epoch`` was acknowledged, after ``moment``."""
        times = [t for t, e in self.check.acknowledged.values() if t > moment and e > epoch]
        return min(times) if times else None

    # -- faults that concern several nodes ---------------------------------------------------------

    def cut(self, source: str, target: str, *, both: bool = True) -> None:
        """Nothing that ``source`` sends reaches ``target`` (and the other way round)."""
        self.network.blocked.add((source, target))
        if both:
            self.network.blocked.add((target, source))

    def isolate(self, name: str) -> None:
        """Cut a node off from all others."""
        for other in self.nodes:
            if other != name:
                self.cut(name, other)

    def mend(self) -> None:
        """The network works as it should."""
        self.network.blocked.clear()
        self.network.loss, self.network.delay_s = 0.0, DELAY_S

    def heal(self) -> None:
        """Everything works again, and whoever is down, or cannot store any more, is started."""
        self.mend()
        for node in self.nodes.values():
            node.disk.full = False
            node.disk.slow = 1.0
            if node.paused:
                node.resume()
            if node.up and (node.failed or node.disk.eio):
                node.crash(power=True)
            if not node.up:
                node.start()

    def wipe(self, name: str) -> None:
        """A node that is down loses its disk: it will start as a new store, with an id of its own."""
        node = self.nodes[name]
        assert not node.up
        node.store_id += b"+"
        node.disk = Disk()

    # -- users -------------------------------------------------------------------------------------

    def write(self, node: Node, *, large: bool = False) -> int:
        """A user's write to a node that takes itself for primary; its value, or 0 when it is refused."""
        feeding = node.feeding
        if feeding is None:
            return 0
        self._values += 1
        value = b"%0*d" % (400 if large else 1, self._values)
        return self._values if feeding.write(b"key-%d" % (self._values % 7), value) else 0

    def writing(self, every_s: float) -> None:
        """From now on somebody writes to every node that takes itself for primary."""

        def again() -> None:
            for node in self.primaries():
                if not node.paused:
                    self.write(node, large=self.chance.random() < 0.05)
            self.time.after(every_s, again)

        again()

    # -- forming -----------------------------------------------------------------------------------

    def start(self, *names: str) -> None:
        for name in names or tuple(self.nodes):
            self.nodes[name].start()

    def form(self) -> Node:
        """Start all nodes empty, and wait until a write is acknowledged."""
        self.start()
        if not self.elects:
            self._found_by_hand()
        assert self.until(self.leader, 5.0), "no group is formed"
        leader = self.leader()
        assert leader is not None
        others = len(self.data_nodes()) - 1
        self.until(lambda: leader.feeding is not None and len(leader.feeding.joined) == others, 5.0)
        voters = len(self.settings.names)
        assert self.until(lambda: len(leader.rules[0].voters) == voters, 5.0), "not all became voters"
        value = self.write(leader)
        assert self.until(lambda: value in self.check.acknowledged, 5.0), "nothing is acknowledged"
        return leader

    def _found_by_hand(self) -> None:
        """The first node was opened as the primary of a new store, the others with follow=."""
        first = self.first
        first.disk.lineage = self.new_lineage()
        seed = Configuration(
            acks=self.settings.acks,
            degrade_after_s=self.settings.degrade_after_s,
            lag_records_max=self.settings.lag_records_max,
        ).with_voter(first.store_id, first.name, first.address)
        assert first.following is not None
        first.following.stop()
        first.following = None
        first.feeding = Feeding(first, 1001, fenced=True)
        first.feeding.begin((first.store_id,), seed, lambda: None)
        for node in self.nodes.values():
            if node is not first:
                node.follow(first.name)
