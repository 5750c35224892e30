"""One stream as the follower sees it: from its Hello to the end of the stream.

Messages in, actions out. The shell does the actions in order, and stops the stream when one fails::

    MakePromise   store the promise durably (if it is not yet); `reply`: then send a Promise
    Join          the join is verified; adopt lineage, branch and features
    Append        check the bytes against the log's running checksum, store and sync them; then appended()
    Commit        show everything through this offset
    Grant         send a Credit
    AckNow        send ack(); several in a row may become one
    Answer        send a Confirm with what this node has promised now
    Cut           save the tail to a rescue file, cut the log, end this stream, say Hello again
    NeedBootstrap fetch a snapshot
    Stop          the stream is over; says why

**Staleness** needs no synchronised clocks. An Ack carries a stamp s of the follower's own clock: the moment
of its newest probe. The primary reads its commit offset c after it received that Ack, and sends both back in
one heartbeat. Hence everything visible on that primary at the moment s is <= c: once c is visible here, this
copy lacks nothing that was visible there at s, and is at most ``now - s`` old, both of the same clock. (It
says nothing about a newer primary that this one does not know of; only fencing does.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from kvrep.errors import ProtocolError
from kvrep.model.position import ZERO, Position
from kvrep.replication.messages import (
    Ack,
    Fence,
    FromPrimary,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Probe,
    Refused,
    Segment,
    Truncate,
    Welcome,
)

__all__ = [
    "AckNow",
    "Action",
    "Answer",
    "Append",
    "Commit",
    "Cut",
    "Grant",
    "Join",
    "MakePromise",
    "Receiver",
    "Stop",
]

ECHOES_MAX = 64
"""Heartbeats that wait for their commit offset to become visible here."""


@dataclass(frozen=True, slots=True)
class Join:
    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell the primary that this node, at this moment, has promised nothing above its epoch."""

    round: int


@dataclass(frozen=True, slots=True)
class Append:
    """Whole records. ``committed`` is what is committed once they are stored."""

    first: int
    last: int
    data: bytes
    committed: int


@dataclass(frozen=True, slots=True)
class Commit:
    offset: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Keep nothing above ``to``. ``below_committed``: records known to be committed go; report it loudly."""

    to: Position
    epoch: int
    below_committed: bool


@dataclass(frozen=True, slots=True)
class Stop:
    refused: Refused


@dataclass(frozen=True, slots=True)
class MakePromise:
    """Refuse lower epochs from now on. With ``reply``, the Promise that is sent names this very epoch, even
    where it is above the one that was asked for: that is how a promoter learns of a higher promise."""

    epoch: int
    reply: bool


@dataclass(frozen=True, slots=True)
class Grant:
    bytes_granted: int


@dataclass(frozen=True, slots=True)
class AckNow:
    pass


Action = Answer | Join | Append | Commit | Cut | NeedBootstrap | Stop | MakePromise | Grant | AckNow

_ACK_NOW = AckNow()


class _State(Enum):
    GREETED = "greeted"
    """Hello is sent; nothing is verified yet."""
    JOINED = "joined"
    ENDED = "ended"


class Receiver:
    """One per Hello.

    Invariant: committed <= last.offset (stored and synced) <= received (handed out as Append).
    """

    __slots__ = (
        "_consumed",
        "_credit",
        "_echoes",
        "_fresh_us",
        "_heard",
        "_hello",
        "_parts",
        "_parts_bytes",
        "_parts_of",
        "_record_bytes_max",
        "_stamp_us",
        "_state",
        "_timeout",
        "_unstored",
        "committed",
        "epoch",
        "last",
        "last_heard",
        "primary_last",
        "promised_epoch",
        "received",
    )

    def __init__(
        self,
        hello: Hello,
        *,
        heartbeat_timeout_s: float,
        record_bytes_max: int,
        fresh_us: int = 0,
        now: float,
    ) -> None:
        """``fresh_us`` is that of the stream before, so that a reconnect does not forget how fresh we are."""
        self._hello = hello
        self._timeout = heartbeat_timeout_s
        self._record_bytes_max = record_bytes_max
        self._state = _State.GREETED
        self.epoch = 0
        """The epoch of this stream, once joined."""
        self.promised_epoch = hello.promised_epoch
        self.last = hello.last
        self.received = hello.last.offset
        self.committed = hello.committed
        self._heard = 0
        """The highest commit offset the primary told; may be above what we hold."""
        self.primary_last = hello.last.offset
        """The end of the primary's log as last heard."""
        self.last_heard = now
        self._parts: list[bytes] = []
        self._parts_of = (0, 0)
        """(offset, number of parts) of the record being joined from parts."""
        self._parts_bytes = 0
        self._unstored: deque[tuple[int, int]] = deque()
        """(last offset, size) of each Append not yet stored."""
        self._credit = hello.credit_bytes
        self._consumed = 0
        """Bytes stored and not yet granted again. Invariant: below half of the credit between calls."""
        self._stamp_us = 0
        self._echoes: deque[tuple[int, int]] = deque()
        """(commit offset, stamp) of heartbeats whose commit offset is not visible here yet; ascending."""
        self._fresh_us = fresh_us

    # What the primary says.

    def on_message(self, message: FromPrimary, now: float) -> list[Action]:
        """What to do. After a :class:`ProtocolError` the stream is over.

        A compressed segment arrives here decompressed: all sizes are those of the records themselves.
        """
        self.last_heard = now
        if self._state is _State.ENDED:
            raise ProtocolError(f"{type(message).__name__} after the end of the stream")
        match message:
            case Segment():
                return self._stale() or self._on_segment(message)
            case Heartbeat():
                return self._stale() or self._on_heartbeat(message)
            case Probe():
                return self._stale() or self._on_probe(message)
            case Welcome():
                return self._on_welcome(message)
            case Fence():
                return self._on_fence(message)
            case Truncate():
                return self._on_truncate(message)
            case NeedBootstrap():
                return self._end(message)
            case Refused():
                return self._end(Stop(message))

    def _on_welcome(self, welcome: Welcome) -> list[Action]:
        self._must_be(_State.GREETED, welcome)
        hello = self._hello
        if welcome.epoch < self.promised_epoch:
            return self._superseded(welcome.epoch)
        if hello.lineage and welcome.lineage != hello.lineage:
            raise self._broken("welcomed into another lineage")
        if welcome.last != hello.last:
            raise self._broken(f"welcomed at {welcome.last}, we hold {hello.last}")
        if not hello.protocol_min <= welcome.protocol <= hello.protocol_max:
            raise self._broken(f"protocol {welcome.protocol} was not offered")
        if not set(welcome.features) <= set(hello.features):
            raise self._broken(f"features {welcome.features} were not offered")
        promise = self._promise(welcome.epoch)
        self.epoch = welcome.epoch
        self._state = _State.JOINED
        return [*promise, Join(welcome), _ACK_NOW]

    def _on_fence(self, fence: Fence) -> list[Action]:
        self._must_be(_State.GREETED, fence)
        self.promised_epoch = max(fence.epoch, self.promised_epoch)
        return [MakePromise(self.promised_epoch, reply=True)]

    def _on_truncate(self, order: Truncate) -> list[Action]:
        self._must_be(_State.GREETED, order)
        if order.epoch < self.promised_epoch:
            return self._superseded(order.epoch)
        hello, to = self._hello, order.to
        if to != ZERO and not hello.epochs.holds(to, hello.last.offset):
            raise self._broken(f"told to cut at {to}, which we do not hold")
        if not hello.applied <= to.offset < hello.last.offset:
            raise self._broken(f"told to cut at {to}, outside of {hello.applied}..{hello.last}")
        cut = Cut(to, order.epoch, below_committed=to.offset < hello.committed)
        return [*self._promise(order.epoch), *self._end(cut)]

    def _on_segment(self, segment: Segment) -> list[Action]:
        self._in_this_epoch(segment)
        first, last = segment.first, segment.last
        if not (0 < first <= last and 0 <= segment.part < segment.parts and segment.data):
            raise self._broken(f"a segment {first}..{last} that cannot be")
        if last <= self.received and not self._parts:
            return [*self._consume(len(segment.data)), _ACK_NOW]
        if first != self.received + 1:
            raise self._broken(f"expected record {self.received + 1}, got {first}..{last}")
        if segment.parts > 1 or self._parts:
            return self._on_part(segment)
        return [self._append(segment, segment.data)]

    def _on_part(self, segment: Segment) -> list[Action]:
        """Parts come in order, with nothing but heartbeats between them. Each is acked as a sign of life."""
        if not self._parts:
            self._parts_of = (segment.first, segment.parts)
        expected = (*self._parts_of, len(self._parts))
        if (segment.last, segment.parts, segment.part) != expected or segment.first != segment.last:
            raise self._broken(f"part {segment.part} of {segment.parts} does not fit")
        self._parts_bytes += len(segment.data)
        if self._parts_bytes > self._record_bytes_max:
            raise self._broken(f"record {segment.first} is larger than {self._record_bytes_max} bytes")
        self._parts.append(segment.data)
        if len(self._parts) < segment.parts:
            return [_ACK_NOW]
        data = b"".join(self._parts)
        self._parts = []
        self._parts_bytes = 0
        return [self._append(segment, data)]

    def _append(self, segment: Segment, data: bytes) -> Append:
        last = self.received = segment.last
        self._heard = max(self._heard, segment.committed)
        self.primary_last = max(self.primary_last, last)
        self._unstored.append((last, len(data)))
        return Append(segment.first, last, data, min(self._heard, last))

    def _on_heartbeat(self, heartbeat: Heartbeat) -> list[Action]:
        self._in_this_epoch(heartbeat)
        if heartbeat.stamp_us > self._stamp_us:
            raise self._broken("a heartbeat echoes a stamp that we did not send")
        self._heard = max(self._heard, heartbeat.committed)
        self.primary_last = max(self.primary_last, heartbeat.last)
        if heartbeat.stamp_us:
            self._remember(heartbeat.committed, heartbeat.stamp_us)
        return [*self._commit(), _ACK_NOW]

    def _on_probe(self, probe: Probe) -> list[Action]:
        self._must_be(_State.JOINED, probe)
        if probe.epoch != self.epoch:
            raise self._broken(f"a message of epoch {probe.epoch} in a stream of {self.epoch}")
        return [Answer(probe.round)]

    # What this node did.

    def appended(self, last: Position) -> list[Action]:
        """Everything through ``last`` is stored and synced."""
        assert self.last.offset <= last.offset <= self.received, (self.last, last, self.received)
        stale = self._stale()
        if stale:
            return stale
        self.last = last
        size = 0
        while self._unstored and self._unstored[0][0] <= last.offset:
            size += self._unstored.popleft()[1]
        return [*self._commit(), *self._consume(size), _ACK_NOW]

    def promised(self, epoch: int) -> None:
        """This node promised ``epoch`` elsewhere. If it is above this stream's, the stream is over."""
        self.promised_epoch = max(self.promised_epoch, epoch)

    def probe(self, now_us: int) -> None:
        """The next acks carry this moment: the primary echoes a new stamp at once."""
        self._stamp_us = max(self._stamp_us, now_us)

    def ack(self, visible: int) -> Ack:
        """The Ack to send now. After a higher promise it tells the primary so, and counts for nothing."""
        assert visible <= self.last.offset, (visible, self.last)
        offset = self.last.offset
        return Ack(
            written=offset,
            synced=offset,
            visible=visible,
            promised_epoch=self.promised_epoch,
            stamp_us=self._stamp_us,
        )

    # What this node asks.

    def expired(self, now: float) -> bool:
        """Whether the primary has been silent for too long."""
        return now - self.last_heard >= self._timeout

    def fresh_us(self, visible: int) -> int:
        """The moment, by our clock, from which on this copy may lack something; 0 when it is not known."""
        while self._echoes and self._echoes[0][0] <= visible:
            self._fresh_us = max(self._fresh_us, self._echoes.popleft()[1])
        return self._fresh_us

    def staleness_s(self, now_us: int, visible: int) -> float:
        """How old this copy is at most, with so much visible; infinite when it is not known."""
        fresh = self.fresh_us(visible)
        return (now_us - fresh) / 1e6 if fresh else float("inf")

    # How.

    def _commit(self) -> list[Action]:
        offset = min(self._heard, self.last.offset)
        if offset <= self.committed:
            return []
        self.committed = offset
        return [Commit(offset)]

    def _consume(self, size: int) -> list[Action]:
        """Grant what was stored in halves of the credit, not message by message."""
        self._consumed += size
        if self._consumed == 0 or self._consumed < self._credit // 2:
            return []
        granted, self._consumed = self._consumed, 0
        return [Grant(granted)]

    def _remember(self, committed: int, stamp_us: int) -> None:
        """A full list gives up its newest entry: a later one says more."""
        if len(self._echoes) == ECHOES_MAX:
            self._echoes.pop()
        self._echoes.append((committed, stamp_us))

    def _promise(self, epoch: int) -> list[Action]:
        if epoch == self.promised_epoch:
            return []
        self.promised_epoch = epoch
        return [MakePromise(epoch, reply=False)]

    def _stale(self) -> list[Action]:
        if self._state is _State.JOINED and self.promised_epoch > self.epoch:
            return self._superseded(self.epoch)
        return []

    def _superseded(self, epoch: int) -> list[Action]:
        message = f"epoch {epoch} is over: this node has promised {self.promised_epoch}"
        return self._end(Stop(Refused(reason="superseded", message=message, epoch=self.promised_epoch)))

    def _end(self, action: Action) -> list[Action]:
        self._state = _State.ENDED
        return [action]

    def _in_this_epoch(self, message: Segment | Heartbeat) -> None:
        self._must_be(_State.JOINED, message)
        if message.epoch != self.epoch:
            raise self._broken(f"a message of epoch {message.epoch} in a stream of {self.epoch}")

    def _must_be(self, state: _State, message: FromPrimary) -> None:
        if self._state is not state:
            raise self._broken(f"{type(message).__name__} in a stream that is {self._state.value}")

    def _broken(self, text: str) -> ProtocolError:
        self._state = _State.ENDED
        return ProtocolError(text)
