"""What primary and follower say to each other, as values. ``transport/wire.py`` gives them their bytes.

A follower calls its primary and opens one stream::

    follower                               primary
    Hello ───────────────────────────────>
          <─────────────────────────────── Fence        (only while the primary is collecting promises)
    Promise ─────────────────────────────>
          <─────────────────────────────── Truncate     (cut your log there and say Hello again)
          <─────────────────────────────── NeedBootstrap (what you need is trimmed: fetch a snapshot)
          <─────────────────────────────── Refused      (final; says why and who is primary)
          <─────────────────────────────── Welcome      (the join is verified; records follow)
    Credit ──────────────────────────────>
          <─────────────────────────────── Segment …
    Ack … ───────────────────────────────>
          <─────────────────────────────── Heartbeat …
          <─────────────────────────────── Probe        (a linearizable read: am I still primary?)
    Confirm ─────────────────────────────>
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrep.model.position import ZERO, EpochTable, Position

__all__ = [
    "PROBES",
    "PROTOCOL",
    "PROTOCOL_MIN",
    "Ack",
    "Confirm",
    "Credit",
    "Fence",
    "FromFollower",
    "FromPrimary",
    "Heartbeat",
    "Hello",
    "NeedBootstrap",
    "Probe",
    "Promise",
    "Refused",
    "Segment",
    "SlotState",
    "Truncate",
    "Welcome",
]

PROTOCOL = 1
"""The newest protocol version this code speaks."""
PROTOCOL_MIN = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The follower says who it is and what it holds. ``lineage`` is empty for a new store."""

    store_id: bytes
    name: str
    lineage: bytes = b""
    branch: bytes = b""
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL
    features: tuple[str, ...] = ()
    """Optional abilities, such as ``"zstd"``; those both ends name are used."""
    voter: bool = True
    """False declines to become a voter."""
    address: str = ""
    """Where this follower can be reached itself, if it listens."""
    promised_epoch: int = 0
    last: Position = ZERO
    """The last record that is durable here."""
    running: int = 0
    """The running checksum through ``last``."""
    applied: int = 0
    """Contained in LMDB: a cut below it needs a bootstrap."""
    committed: int = 0
    epochs: EpochTable = field(default_factory=EpochTable)
    credit_bytes: int = 0
    """How many bytes of segments may be sent before more credit arrives."""
    durability: str = ""
    """How it stores what it writes as a primary, ``"sync"`` or ``"os"``; empty: not told. What it acks is synced
    either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """The answer to a Fence: stored durably, and this is what the log held at that moment."""

    epoch: int
    last: Position
    committed: int
    epochs: EpochTable
    lowered: Position = ZERO
    """From that record on fewer copies may have been enough: whoever is promoted must hold it, or go on from
    a later epoch. ``ZERO`` when this voter never agreed to such a thing."""

    @classmethod
    def without_data(cls, epoch: int, lowered: Position = ZERO) -> Promise:
        """The promise of a witness: it binds like any other and says nothing of a log."""
        return cls(epoch=epoch, last=ZERO, committed=0, epochs=EpochTable(), lowered=lowered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """How far this follower is. ``stamp_us`` is its own clock; the next heartbeat echoes it."""

    written: int
    synced: int
    visible: int
    promised_epoch: int = 0
    stamp_us: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """The follower has room for so many more bytes of segments."""

    bytes_granted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Promise to refuse every epoch below this one."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncate:
    """Your log holds records that this history does not: keep nothing above ``to``, then say Hello again."""

    to: Position
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedBootstrap:
    """The records that follow yours are not in the log any more (or never fitted)."""

    first: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """No stream for you. ``reason`` is one of the codes below; ``message`` is for people."""

    reason: str
    """``lineage``, ``protocol``, ``not-primary``, ``superseded``, ``starting``, ``full``, ``self``,
    ``bad-hello``, ``closing``, ``auth``, or ``unfenced``: to join, the follower would have to drop records it
    knows to be committed, for an epoch that was made without a full fence or force."""
    message: str
    primary_address: str = ""
    epoch: int = 0

    @property
    def final(self) -> bool:
        """Whether trying again cannot help without somebody changing something."""
        return self.reason in ("lineage", "protocol", "self", "bad-hello", "auth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The join is verified: segments follow from ``last.offset + 1``."""

    lineage: bytes
    branch: bytes
    store_id: bytes
    name: str
    epoch: int
    protocol: int
    features: tuple[str, ...] = ()
    heartbeat_interval_ms: int = 1000
    last: Position = ZERO
    """Where the stream joins: what the follower holds and the primary verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Whole records ``first``…``last``, or part ``part`` of ``parts`` of the single record ``first``."""

    epoch: int
    first: int
    last: int
    data: bytes
    committed: int
    part: int = 0
    parts: int = 1
    compressed: bool = False
    more: bool = False
    """Whether the log goes on behind it: more follows at once, as credit allows, so a follower that catches
    up may sync several segments together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """What the primary remembers of one follower; rides in heartbeats so that a failover keeps it."""

    store_id: bytes
    name: str
    acked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Sent at least every interval, and at once when ``committed`` moved and nothing else is to be sent."""

    epoch: int
    last: int
    committed: int
    stamp_us: int = 0
    """The newest Ack's stamp, echoed: how old the follower's view can be at most."""
    time_us: int = 0
    """The primary's wall clock, for lag in seconds as people read it."""
    slots: tuple[SlotState, ...] = ()
    path: tuple[str, ...] = ()
    """The names of the nodes between the primary and this follower, for cascades and loop detection."""
    behind_bytes: int = 0
    """Bytes of log that this follower has not confirmed yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The primary asks whether it still is one, for linearizable reads; where both ends name ``PROBES``."""

    epoch: int
    round: int
    """Grows; a read counts the answers to rounds that began after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirm:
    """When the Probe ``round`` had arrived, this follower had promised nothing above ``promised_epoch``."""

    round: int
    promised_epoch: int


PROBES = "probes"
"""The feature of Probe and Confirm."""

FromFollower = Hello | Promise | Ack | Credit | Confirm
FromPrimary = Welcome | Truncate | NeedBootstrap | Refused | Fence | Segment | Heartbeat | Probe
