"""All decisions wired back to back: a whole cluster in one thread, over a network that loses and repeats.

Nodes keep real encoded records. Any node may crash, be cut off, be promoted while the old primary goes on,
or be reconfigured. A ledger remembers every record that any primary ever committed; nobody may ever
commit something else at its place, or become primary without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrep.errors import Fenced, ProtocolError
from kvrep.model.codec import RecordEncoder, decode, walk
from kvrep.model.configuration import Acks, Configuration, Voter
from kvrep.model.position import ZERO, EpochTable, Position, epoch_after
from kvrep.model.record import Kind, Record
from kvrep.replication.acks import CommitTracker
from kvrep.replication.join import Continue, LogView, Superseded, check_running, plan_join
from kvrep.replication.messages import (
    Ack,
    Credit,
    FromFollower,
    FromPrimary,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Promise,
    Segment,
    Welcome,
)
from kvrep.replication.progress import Progress, State
from kvrep.replication.promotion import Promotion
from kvrep.replication.receiver import AckNow, Append, Commit, Cut, Grant, Join, MakePromise, Receiver, Stop
from kvrep.replication.sender import Dead, Sender, SendHeartbeat, SendSegment

LINEAGE = b"lineage"
SEGMENT = 120
CREDIT = 400
ENCODER = RecordEncoder()


@dataclass
class Node:
    """A store: a log of encoded records, how much of it would survive a crash, and a promise."""

    number: int
    records: list[Record] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    runnings: list[int] = field(default_factory=lambda: [0])
    durable: int = 0
    committed: int = 0
    first: int = 1
    promised: int = 0
    owed: Position = ZERO
    """The most it ever acked before a bootstrap: below that its promise says nothing about what it stored."""
    fresh_us: int = 0

    @property
    def store_id(self) -> bytes:
        return bytes([self.number])

    @property
    def end(self) -> int:
        return len(self.records)

    @property
    def last(self) -> Position:
        return self.records[-1].position if self.records else ZERO

    @property
    def epochs(self) -> EpochTable:
        firsts: dict[int, int] = {}
        for record in self.records:
            firsts.setdefault(record.epoch, record.offset)
        return EpochTable(firsts.items())

    def write(self, epoch: int, kind: Kind, payload: object) -> int:
        offset = self.end + 1
        data, _ = ENCODER.encode(offset, epoch, 0, kind, payload, self.runnings[-1])
        self.store(data)
        return offset

    def store(self, data: bytes) -> None:
        records, running = decode(data, self.end + 1, self.runnings[-1])
        starts, end, _ = walk(data, self.runnings[-1])
        for record, start, stop in zip(records, starts, [*starts[1:], end], strict=True):
            self.records.append(record)
            self.frames.append(data[start:stop])
            self.runnings.append(walk(data[start:stop], self.runnings[-1])[2])
        assert self.runnings[-1] == running

    def cut(self, last: int) -> None:
        del self.records[last:], self.frames[last:], self.runnings[last + 1 :]
        self.durable = min(self.durable, last)
        self.committed = min(self.committed, last)

    def configurations(self, base: Configuration) -> list[tuple[int, Configuration]]:
        found = [(r.offset, r.payload) for r in self.records if r.kind == Kind.CONFIGURATION]
        return [(0, base)] + [(offset, Configuration.from_wire(payload)) for offset, payload in found]

    def promise(self) -> Promise:
        return Promise(epoch=self.promised, last=self.last, committed=self.committed, epochs=self.epochs)

    def hello(self) -> Hello:
        return Hello(
            store_id=self.store_id,
            name=f"n{self.number}",
            lineage=LINEAGE if self.records else b"",
            promised_epoch=self.promised,
            last=self.last,
            running=self.runnings[-1],
            applied=self.committed // 2,
            committed=self.committed,
            epochs=self.epochs,
            credit_bytes=CREDIT,
        )


@dataclass
class Link:
    """One stream: two queues that keep their order, and lose everything when it breaks."""

    follower: Node
    receiver: Receiver
    progress: Progress
    sender: Sender | None = None
    down: deque[FromPrimary] = field(default_factory=deque)
    up: deque[FromFollower] = field(default_factory=deque)


@dataclass
class Primary:
    node: Node
    epoch: int
    tracker: CommitTracker
    links: dict[int, Link] = field(default_factory=dict)
    alive: bool = True


class Cluster:
    def __init__(self, size: int, acks: Acks) -> None:
        self.now = 1000.0
        self.nodes = [Node(i) for i in range(1, size + 1)]
        voters = tuple(Voter(store_id=n.store_id, name=f"n{n.number}", member=n.number) for n in self.nodes)
        self.base = Configuration(acks=acks, voters=voters, next_member=size + 1)
        self.primaries: list[Primary] = []
        self.ledger: dict[int, bytes] = {}
        self.value = 0
        self.promotions = 0

    # What is promised.

    def commit(self, node: Node, offset: int) -> None:
        """Whatever a node takes for committed is what the first one to commit there took."""
        for at in range(node.committed + 1, offset + 1):
            frame = node.frames[at - 1]
            assert self.ledger.setdefault(at, frame) == frame, f"two histories at {at}"
        node.committed = max(node.committed, offset)

    def check(self) -> None:
        for primary in self.living():
            for link in primary.links.values():
                p, receiver = link.progress, link.receiver
                assert p.visible <= p.synced <= p.written <= p.sent <= primary.node.end
                assert p.in_flight_bytes == sum(size for _, size in p.unconfirmed)
                assert receiver.committed <= receiver.last.offset <= receiver.received
                assert link.follower.committed <= link.follower.end
                if p.state is State.STREAMING and link.follower.promised <= primary.epoch:
                    mine = link.follower.frames
                    assert mine == primary.node.frames[: len(mine)], "not a prefix of its primary's log"

    # Primaries.

    def living(self) -> list[Primary]:
        return [p for p in self.primaries if p.alive]

    def end_primary(self, primary: Primary) -> None:
        primary.alive = False
        primary.links.clear()

    def promote(self, node: Node, reachable: list[Node]) -> None:
        """One attempt, with the promises of whoever is reachable."""
        in_force = node.configurations(self.base)
        known = max(i for i, (offset, _) in enumerate(in_force) if offset <= node.committed)
        highest = max(n.promised for n in [node, *reachable])
        epoch = epoch_after(max(highest, node.last.epoch), node.number)
        if node.last < node.owed:
            return
        for primary in self.living():
            self.disconnect(primary, node)
        self.give_promise(node, epoch)
        promotion = Promotion(
            in_force[known][1],
            node.store_id,
            epoch,
            node.promise(),
            proposed=tuple(c for _, c in in_force[known + 1 :]),
        )
        for other in reachable:
            if other is not node and other.last >= other.owed:
                self.give_promise(other, epoch)
                promotion.on_promise(other.store_id, other.promise())
        while promotion.enough and (fetch := promotion.fetch) is not None:
            voter = self.nodes[fetch.voter.store_id[0] - 1]
            assert not fetch.below_committed
            node.cut(fetch.after.offset)
            node.store(b"".join(voter.frames[node.end :]))
            node.durable = node.end
            promotion.fetched(node.promise())
            for offset, configuration in node.configurations(self.base):
                if offset > node.committed:
                    promotion.learned(configuration)
        if promotion.ready:
            self.start(node, epoch)

    def give_promise(self, node: Node, epoch: int) -> None:
        node.promised = max(node.promised, epoch)
        for primary in self.living():
            link = primary.links.get(node.number)
            if link is not None:
                link.receiver.promised(epoch)
            if primary.node is node:
                self.end_primary(primary)

    def start(self, node: Node, epoch: int) -> None:
        for offset, frame in self.ledger.items():
            assert node.frames[offset - 1 : offset] == [frame], f"committed {offset} is lost"
        in_log = node.configurations(self.base)
        pending = [pair for pair in in_log if pair[0] > node.committed]
        effective = in_log[-2] if pending else in_log[-1]
        self.promotions += 1
        node.first = min(node.first, node.end + 1)
        tracker = CommitTracker(
            effective[1],
            node.store_id,
            epoch_start=node.write(epoch, Kind.EPOCH, {}),
            committed=node.committed,
            proposed=pending[-1] if pending else None,
        )
        tracker.local_durable(node.durable)
        self.primaries.append(Primary(node, epoch, tracker))

    def write(self, primary: Primary, size: int) -> None:
        self.value += 1
        primary.node.write(primary.epoch, Kind.WRITE, ["k", [b"k", b"%d" % self.value + bytes(size)]])

    def reconfigure(self, primary: Primary, acks: Acks, voters: int) -> None:
        """A change of the rule and of the voters, at the end of the log; one at a time."""
        tracker = primary.tracker
        if tracker.proposed is not None:
            return
        chosen = tuple(v for v in self.base.voters if voters >> v.member & 1) or self.base.voters
        configuration = replace(tracker.configuration, acks=acks, voters=chosen)
        tracker.propose(primary.node.end + 1, configuration)
        primary.node.write(primary.epoch, Kind.CONFIGURATION, configuration.to_wire())

    def sync(self, primary: Primary) -> None:
        primary.node.durable = primary.node.end
        self.committed(primary, primary.tracker.local_durable(primary.node.durable))

    def committed(self, primary: Primary, offset: int) -> None:
        assert offset >= primary.node.committed
        self.commit(primary.node, offset)

    def trim(self, node: Node) -> None:
        node.first = max(node.first, node.committed // 2 + 1)

    def crash(self, node: Node) -> None:
        """The process ends; what was not synced is gone."""
        for primary in self.living():
            if primary.node is node:
                self.end_primary(primary)
            elif node.number in primary.links:
                self.disconnect(primary, node)
        assert node.committed <= node.durable
        node.cut(node.durable)

    # Streams.

    def disconnect(self, primary: Primary, node: Node) -> None:
        link = primary.links.pop(node.number, None)
        if link is not None:
            link.progress.enter(State.GONE)
            primary.tracker.left(node.store_id)
            node.fresh_us = link.receiver.fresh_us(node.committed)

    def connect(self, primary: Primary, node: Node) -> None:
        """A follower calls a primary. It follows one at a time; the newest call counts."""
        if node is primary.node or any(p.node is node for p in self.living()):
            return
        for other in self.living():
            self.disconnect(other, node)
        hello = node.hello()
        plan = plan_join(hello, self.view(primary))
        if isinstance(plan, Continue):
            plan = check_running(plan, hello, primary.node.runnings[plan.at.offset], self.view(primary))
        receiver = Receiver(
            hello, heartbeat_timeout_s=5, record_bytes_max=10_000, fresh_us=node.fresh_us, now=self.now
        )
        progress = Progress(store_id=node.store_id, name=hello.name)
        link = Link(node, receiver, progress)
        if isinstance(plan, Superseded):
            self.end_primary(primary)
            return
        primary.links[node.number] = link
        if isinstance(plan, Continue):
            self.welcome(primary, link, hello, plan)
        else:
            link.down.append(plan)

    def view(self, primary: Primary) -> LogView:
        node = primary.node
        return LogView(
            store_id=node.store_id,
            name=f"n{node.number}",
            lineage=LINEAGE,
            branch=b"",
            epoch=primary.epoch,
            fenced=True,
            first=node.first,
            last=node.end,
            epochs=node.epochs,
        )

    def welcome(self, primary: Primary, link: Link, hello: Hello, plan: Continue) -> None:
        link.progress.join(plan.at, hello.credit_bytes, primary.epoch, self.now)
        link.sender = Sender(
            link.progress,
            epoch=primary.epoch,
            segment_bytes_max=SEGMENT,
            heartbeat_interval_s=1,
            heartbeat_timeout_s=5,
            now=self.now,
        )
        node = primary.node
        link.down.append(
            Welcome(
                lineage=LINEAGE,
                branch=b"",
                store_id=node.store_id,
                name=f"n{node.number}",
                epoch=primary.epoch,
                protocol=plan.protocol,
                last=plan.at,
            )
        )

    def pump(self, primary: Primary, link: Link) -> bool:
        """One step of a sender; whether it sent anything."""
        node = primary.node
        sender = link.sender
        if sender is None:
            return False
        step = sender.next(self.now, node.end, node.committed)
        if isinstance(step, SendSegment):
            self.send_segment(primary, link, step)
            return True
        if isinstance(step, SendHeartbeat):
            sender.sent_heartbeat(self.now, node.committed)
            link.down.append(
                Heartbeat(
                    epoch=primary.epoch, last=node.end, committed=node.committed, stamp_us=sender.stamp_us
                )
            )
            return True
        if isinstance(step, Dead):
            self.disconnect(primary, link.follower)
        return False

    def send_segment(self, primary: Primary, link: Link, step: SendSegment) -> None:
        node, sender = primary.node, link.sender
        assert sender is not None
        data, last = node.frames[step.after], step.after + 1
        while last < node.end and len(data) + len(node.frames[last]) <= step.bytes_max:
            data, last = data + node.frames[last], last + 1
        sender.sent_segment(step.after + 1, last, len(data), self.now, node.committed)
        pieces = [data[at : at + SEGMENT] for at in range(0, len(data), SEGMENT)]
        for part, piece in enumerate(pieces):
            segment = Segment(
                epoch=primary.epoch,
                first=step.after + 1,
                last=last,
                data=piece,
                committed=node.committed,
                part=part,
                parts=len(pieces),
            )
            link.down.append(segment)

    def deliver_down(self, primary: Primary, link: Link) -> bool:
        if not link.down:
            return False
        message = link.down.popleft()
        try:
            actions = link.receiver.on_message(message, self.now)
        except ProtocolError:
            self.disconnect(primary, link.follower)
            return True
        for action in actions:
            self.act(primary, link, action)
        return True

    def act(self, primary: Primary, link: Link, action: object) -> None:
        """What the shell of a follower does."""
        node, receiver = link.follower, link.receiver
        match action:
            case Append(first, last, data, _):
                assert first == node.end + 1
                node.store(data)
                assert last == node.end
                node.durable = node.end
                for more in receiver.appended(node.last):
                    self.act(primary, link, more)
            case Commit(offset):
                self.commit(node, offset)
            case Cut(to):
                assert not action.below_committed
                node.cut(to.offset)
                self.disconnect(primary, node)
            case NeedBootstrap():
                self.bootstrap(primary, node)
                self.disconnect(primary, node)
            case MakePromise(epoch):
                assert epoch >= node.promised
                node.promised = epoch
            case Grant(size):
                link.up.append(Credit(bytes_granted=size))
            case AckNow():
                receiver.probe(int(self.now * 1e6))
                link.up.append(receiver.ack(node.committed))
            case Stop():
                if receiver.epoch and receiver.promised_epoch > receiver.epoch:
                    receiver.probe(int(self.now * 1e6))
                    link.up.append(receiver.ack(node.committed))
                else:
                    self.disconnect(primary, node)
            case Join():
                pass
            case _:
                raise AssertionError(action)

    def bootstrap(self, primary: Primary, node: Node) -> None:
        """A copy of what the primary has committed, in place of everything."""
        source = primary.node
        if source.committed == 0:
            return
        node.owed = max(node.owed, node.last)
        node.cut(0)
        node.store(b"".join(source.frames[: source.committed]))
        node.durable = node.end
        self.commit(node, source.committed)

    def deliver_up(self, primary: Primary, link: Link) -> bool:
        if not link.up:
            return False
        message, sender = link.up.popleft(), link.sender
        assert sender is not None
        if isinstance(message, Credit):
            sender.on_credit(message.bytes_granted, self.now)
        if isinstance(message, Ack):
            self.on_ack(primary, link, message)
        return True

    def on_ack(self, primary: Primary, link: Link, ack: Ack) -> None:
        assert link.sender is not None
        try:
            progressed = link.sender.on_ack(ack, self.now)
        except Fenced:
            self.end_primary(primary)
            return
        if progressed:
            p = link.progress
            self.committed(primary, primary.tracker.acked(p.store_id, p.synced, p.written, p.visible))

    def flow(self, primary: Primary, rounds: int) -> None:
        for _ in range(rounds):
            moved = False
            for link in list(primary.links.values()):
                for step in (self.pump, self.deliver_down, self.deliver_up):
                    if primary.links.get(link.follower.number) is link:
                        moved |= step(primary, link)
            self.check()
            if not moved:
                return

    def duplicate(self, link: Link) -> None:
        if link.down and isinstance(link.down[0], Segment | Heartbeat):
            link.down.appendleft(link.down[0])
        if link.up and isinstance(link.up[0], Ack):
            link.up.appendleft(link.up[0])

    # Steps that a test draws.

    def step(self, name: str, a: int, b: int) -> None:
        self.now += 0.001
        node = self.nodes[a % len(self.nodes)]
        if name == "promote":
            self.promote(node, [n for n in self.nodes if b >> n.number & 1])
        elif name == "crash":
            self.crash(node)
        elif name == "trim":
            self.trim(node)
        elif name == "tick":
            self.now += a % 7
        elif self.living():
            primary = self.living()[-1 - b % len(self.living())]
            self.step_of(primary, node, name, a)
        self.check()

    def step_of(self, primary: Primary, node: Node, name: str, a: int) -> None:
        link = primary.links.get(node.number)
        steps: dict[str, Callable[[], object]] = {
            "write": lambda: self.write(primary, a % 8 * 90),
            "sync": lambda: self.sync(primary),
            "connect": lambda: self.connect(primary, node),
            "break": lambda: self.disconnect(primary, node),
            "flow": lambda: self.flow(primary, a),
            "all": lambda: [self.connect(primary, n) for n in self.nodes if n.number not in primary.links],
            "reconfigure": lambda: self.reconfigure(primary, (0, 1, "majority", "all", 2)[a % 5], a // 5),
        }
        with_link: dict[str, Callable[[Link], object]] = {
            "pump": lambda link: self.pump(primary, link),
            "down": lambda link: self.deliver_down(primary, link),
            "up": lambda link: self.deliver_up(primary, link),
            "duplicate": self.duplicate,
        }
        if name in steps:
            steps[name]()
        elif link is not None:
            with_link[name](link)

    def heal(self) -> Primary:
        """Everybody is there again: one node becomes primary, the others follow until nothing moves."""
        for primary in self.living():
            self.end_primary(primary)
        for node in self.nodes:
            self.promote(node, self.nodes)
            if self.living():
                break
        (primary,) = self.living()
        self.write(primary, 10)
        for _ in range(8):
            self.sync(primary)
            self.step_of(primary, self.nodes[0], "all", 0)
            self.flow(primary, 1000)
            self.now += 1.1
        return primary


WEIGHTS = {
    **dict.fromkeys(("write", "flow"), 3),
    **dict.fromkeys(("sync", "all"), 2),
    **dict.fromkeys(("connect", "break", "pump", "down", "up", "duplicate"), 1),
    **dict.fromkeys(("promote", "crash", "trim", "tick", "reconfigure"), 1),
}
NAMES = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
steps = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 39), st.integers(0, 63)), min_size=20, max_size=120
)


def run(size: int, acks: Acks, script: list[tuple[str, int, int]]) -> Cluster:
    cluster = Cluster(size, acks)
    cluster.promote(cluster.nodes[0], cluster.nodes)
    for name, a, b in script:
        cluster.step(name, a, b)
    primary = cluster.heal()
    for node in cluster.nodes:
        assert node.frames == primary.node.frames
        assert node.committed == primary.node.committed == primary.node.end
    return cluster


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([2, 3, 5]), st.sampled_from([0, 1, "majority", "all"]), steps)
def test_nothing_committed_is_ever_lost(size: int, acks: Acks, script: list[tuple[str, int, int]]) -> None:
    """Whatever crashes, splits and is promoted, committed records stay, and in the end all logs are equal."""
    run(size, acks, script)


@pytest.mark.prove
@pytest.mark.timeout(1800)
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([2, 3, 4, 5]), st.sampled_from([0, 1, 2, "majority", "all"]), steps)
def test_nothing_committed_is_ever_lost_for_long(
    size: int, acks: Acks, script: list[tuple[str, int, int]]
) -> None:
    """The same, many times over."""
    run(size, acks, script)
