"""The follower's shell: stay connected, store what comes, tell how far it got."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from kvrep.errors import ProtocolError
from kvrep.replication.ballots import PrimarySeen
from kvrep.replication.election import WhyGone
from kvrep.replication.messages import Credit, FromPrimary, Heartbeat, NeedBootstrap, Refused, Segment
from kvrep.replication.receiver import (
    AckNow,
    Action,
    Append,
    Commit,
    Cut,
    Grant,
    Join,
    MakePromise,
    Receiver,
    Stop,
)
from kvrep.testing.simulate.disk import Copy
from kvrep.testing.simulate.node import StorageError

if TYPE_CHECKING:
    from kvrep.replication.messages import Hello
    from kvrep.testing.simulate.network import Stream
    from kvrep.testing.simulate.node import Node

__all__ = ["Following", "Inbound"]

BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 1.0
HURRIED_S = 0.01
SNAPSHOT_TIMEOUT_S = 3.0
RECORD_BYTES_MAX = 1 << 20


class _Over(Exception):
    """The stream is over; ``again``: a new one is to be opened at once."""

    def __init__(self, text: str, *, again: bool = False) -> None:
        super().__init__(text)
        self.again = again


class Following:
    """For as long as a node is a follower: one stream after the other."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.primary_address = ""
        self.stream: Inbound | None = None
        self._next = ""
        self._sources: list[str] = []
        """Where we were ever sent, tried in turn with the voters that the configuration names."""
        self._turn = 0
        self._failures = 0
        self._stopped = False
        self._waiting = 0
        """The number of the pause that is under way; a newer one makes the older void."""

    def start(self, name: str) -> None:
        self._sent_to(name)
        self._connect_in(0.0)
        self._watch()

    def stop(self) -> None:
        self._stopped = True
        self._end_stream()

    def go_to(self, name: str) -> None:
        """Leave the present source for this one at once."""
        self._sent_to(name)
        if self.stream is None or self.stream.source != name:
            self._end_stream()
            self._failures = 0
            self._connect_in(0.0)

    def promised(self, epoch: int, to: str) -> None:
        """This node has promised ``epoch``: the stream of an older one is over."""
        stream = self.stream
        if to:
            self._sent_to(to)
        if stream is not None:
            stream.receiver.promised(epoch)
            if stream.receiver.epoch < epoch:
                self.lost(stream, _Over(f"epoch {epoch} was promised"))

    def reset(self) -> None:
        """The connection breaks: both ends learn of it, and what was on its way is lost."""
        if self.stream is not None:
            self.lost(self.stream, _Over("the connection was reset"), WhyGone.BROKEN)

    def _end_stream(self) -> None:
        if self.stream is not None:
            self.stream.end()
            self.stream = None

    # -- connecting --------------------------------------------------------------------------------

    def _connect_in(self, seconds: float) -> None:
        self._waiting += 1
        number = self._waiting
        self.node.after(seconds, lambda: self._connect(number))

    def _connect(self, number: int) -> None:
        if self._stopped or number != self._waiting or self.stream is not None or self.node.bootstrapping:
            return
        name = self._choose()
        if not name:
            self._connect_in(0.25)
            return
        try:
            hello = self.node.hello()
        except StorageError:
            return  # it says so, and waits to be restarted
        self.stream = Inbound(self, name, hello)

    def _choose(self) -> str:
        """Where we were sent, else one voter after the other, each of whom says who is primary."""
        named, self._next = self._next, ""
        if named:
            return named
        known = list(self._sources)
        for voter in self.node.disk.configurations[-1][1].voters:
            if voter.name not in known and voter.name != self.node.name and not voter.witness:
                known.append(voter.name)
        return known[self._turn % len(known)] if known else ""

    def lost(self, stream: Inbound, why: _Over, gone: WhyGone | None = None) -> None:
        """The stream is over."""
        if self.stream is not stream:
            return
        node, joined = self.node, stream.receiver.epoch != 0
        node.world.say(node, "leaves %s: %s", stream.source, why)
        self._end_stream()
        if node.electing is not None and gone is not None and (joined or gone is WhyGone.REFUSED):
            node.electing.connection_lost(gone)
        if self._stopped:
            return
        if why.again:
            self._next = self._next or stream.source
            self._connect_in(0.0)
            return
        if joined:
            self._failures = 0
        else:
            self._turn += 1
        self._failures += 1
        limit = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(self._failures, 6))
        if self._next and self._failures < 5:
            limit = HURRIED_S
        self._connect_in(limit * (0.5 + node.world.chance.random() / 2))

    def redirected(self, address: str) -> None:
        self._sent_to(address.partition(":")[0])

    def _sent_to(self, name: str) -> None:
        self._next = name
        if name and name not in self._sources:
            self._sources.append(name)

    # -- the clock ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Notice silence; probe how fresh this copy is."""
        if self._stopped:
            return
        stream = self.stream
        if stream is not None:
            stream.probe()
            if not stream.busy and stream.receiver.expired(self.node.now):
                self.lost(stream, _Over("the primary is silent"), WhyGone.SILENT)
        self.node.after(self.node.world.settings.heartbeat_timeout_s / 8, self._watch)

    # -- bootstrap ---------------------------------------------------------------------------------

    def bootstrap(self, stream: Inbound, need: NeedBootstrap) -> None:
        """Fetch a copy from the primary; the log goes on behind it."""
        node, world = self.node, self.node.world
        node.bootstrapping = True
        world.say(node, "needs a copy of %s: %s", stream.source, need.reason)

        def serve(give: Any) -> None:
            primary = world.nodes[stream.source]
            feeding = primary.feeding
            if feeding is not None and feeding.leading:
                told = (primary.disk.copy.clone(), primary.disk.lineage, feeding.epoch, primary.disk.end)
                primary.after(0.02, lambda: give(told))

        def done(told: tuple[Copy, bytes, int, int]) -> None:
            node.bootstrapping = False
            if not self._stopped:
                self._replace(need, *told)
                self._connect_in(0.0)

        def failed(_: WhyGone) -> None:
            node.bootstrapping = False
            self._connect_in(BACKOFF_MIN_S)

        world.network.call(node, world.nodes[stream.source], serve, done, failed, SNAPSHOT_TIMEOUT_S)

    def _replace(self, need: NeedBootstrap, copy: Copy, lineage: bytes, epoch: int, last: int) -> None:
        node, disk = self.node, self.node.disk
        if epoch < disk.promised or node.failed or (disk.lineage and disk.lineage != lineage):
            return
        confirmed = disk.end if need.reason == "checksum" else disk.copy.applied.offset
        floor = max(disk.vote_floor, min(confirmed, last))
        try:
            if floor > max(copy.applied.offset, disk.vote_floor):
                disk.vote_floor = floor
            node.world.check.obeys(node, epoch)
            disk.replace(copy)
        except OSError as error:
            node.world.say(node, "cannot store the copy: %s", error.strerror)
            return
        disk.lineage = lineage
        node.rotten = False
        node.committed = copy.applied.offset
        node.world.check.shows(node, node.committed)
        node.world.say(node, "has a copy through %s", copy.applied)


class Inbound:
    """One stream as the follower has it."""

    def __init__(self, following: Following, source: str, hello: Hello) -> None:
        node = following.node
        self._following = following
        self._node = node
        self.source = source
        self.receiver = Receiver(
            hello,
            heartbeat_timeout_s=node.world.settings.heartbeat_timeout_s,
            record_bytes_max=RECORD_BYTES_MAX,
            now=node.now,
        )
        self.busy = False
        """Whether something is being stored: meanwhile the silence is our own."""
        self._inbox: deque[FromPrimary] = deque()
        self._unsynced = 0
        self._open = True
        self._stream: Stream = node.world.network.open(node, node.world.nodes[source], self, hello)

    def end(self) -> None:
        self._open = False
        self._stream.end_by_follower()

    def on_end(self, why: WhyGone) -> None:
        if self._open:
            self._following.lost(self, _Over(f"the stream is {why.value}"), why)

    def on_message(self, message: FromPrimary) -> None:
        self._inbox.append(message)
        self._work()

    def _work(self) -> None:
        while self._inbox and self._open and not self.busy:
            self._take(self._inbox.popleft())

    def _take(self, message: FromPrimary) -> None:
        more = isinstance(message, Segment) and message.more
        try:
            if isinstance(message, Heartbeat):
                self._heard()
            self._do(self.receiver.on_message(message, self._node.now), more=more)
            if self._unsynced and not more:
                self.sync()
        except (ProtocolError, StorageError) as error:
            self._following.lost(self, _Over(str(error)))
        except _Over as over:
            self._following.lost(self, over)
        self.receiver.last_heard = self._node.now

    def _do(self, actions: list[Action], *, more: bool = False) -> None:
        """Carry out what the receiver decided, in order."""
        node, ack = self._node, False
        for action in actions:
            match action:
                case Append():
                    self._append(action, more=more)
                case Commit(offset):
                    node.commit_through(offset)
                case AckNow():
                    ack = True
                case Grant(granted):
                    self._stream.to_primary(Credit(bytes_granted=granted))
                case Join(welcome):
                    self._joined(welcome.lineage)
                case MakePromise(epoch, _):
                    if not node.give(epoch, b""):
                        raise _Over(f"epoch {epoch} is below {node.disk.promised}, promised before")
                case Cut():
                    node.world.check.obeys(node, action.epoch)
                    node.cut(action.to.offset, f"epoch {action.epoch} does not contain them")
                    raise _Over("it told us to cut our log", again=True)
                case NeedBootstrap():
                    self._following.bootstrap(self, action)
                    raise _Over(action.reason, again=True)
                case Stop(refused):
                    self._stop(refused)
        if ack and self._open:
            self.send_ack()

    def _joined(self, lineage: bytes) -> None:
        node = self._node
        self.receiver.probe(node.clock.now_us)
        if not node.disk.lineage:
            node.disk.lineage = lineage
        primary = node.world.nodes[self.source]
        self._following.primary_address = primary.address
        node.world.say(node, "joins %s at %s", self.source, self.receiver.last)
        node.world.check.joined(node, primary, self.receiver.last.offset)
        self._heard()

    def _heard(self) -> None:
        node, epoch = self._node, self.receiver.epoch
        if node.electing is not None and epoch:
            primary = node.world.nodes[self.source]
            node.electing.heard(
                PrimarySeen(
                    store_id=primary.store_id, name=primary.name, address=primary.address, epoch=epoch
                )
            )

    def _stop(self, refused: Refused) -> None:
        if refused.reason == "not-primary" and refused.primary_address:
            self._following.redirected(refused.primary_address)
        raise _Over(refused.message)

    # -- storing -----------------------------------------------------------------------------------

    def _append(self, action: Append, *, more: bool) -> None:
        self.store(action)
        self._unsynced += len(action.data)
        if not more or self._unsynced >= self._node.world.settings.credit_bytes // 4:
            self.sync()

    def store(self, action: Append) -> None:
        """Nothing is taken of an epoch once a higher one is promised."""
        node, epoch = self._node, self.receiver.epoch
        if node.disk.promised > epoch:
            raise _Over(f"epoch {node.disk.promised} has been promised, above {epoch}")
        node.world.check.obeys(node, epoch)
        added = node.append(action.data)
        node.world.say(node, "stores %d..%d of %s", action.first, action.last, self.source)
        assert added[-1].record.offset == action.last

    def sync(self) -> None:
        """It takes a while; then, and only then, the primary is told."""
        if not self.busy:
            self.busy = True
            self._node.after(self._node.sync_s(), self._synced)

    def _synced(self) -> None:
        if not self._open:
            return
        self._unsynced = 0
        try:
            self._node.sync()
            self.busy = False
            self._do(self.receiver.appended(self._node.disk.last))
        except (ProtocolError, StorageError) as error:
            self._following.lost(self, _Over(str(error)))
        except _Over as over:
            self._following.lost(self, over)
        self._work()

    # -- acks --------------------------------------------------------------------------------------

    def send_ack(self) -> None:
        ack = self.receiver.ack(min(self._node.committed, self.receiver.last.offset))
        self._node.world.check.acks(self._node, ack, self.receiver.epoch)
        self._stream.to_primary(ack)

    def probe(self) -> None:
        """Ask the primary to tell at once how fresh this copy is."""
        if self.receiver.epoch:
            self.receiver.probe(self._node.clock.now_us)
            self.send_ack()
