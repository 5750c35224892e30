"""What a node says of itself: frozen values, safe to keep, cheap to make, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from kvrep.model.configuration import Acks
from kvrep.model.position import Position

__all__ = ["Event", "EventKind", "FollowerStatus", "Outcome", "Role", "SourceStatus", "Status"]


class Role(StrEnum):
    """What a node is now."""

    PRIMARY = "primary"
    """Takes writes (``Status.not_writable`` says why not, if it does not yet)."""
    FOLLOWER = "follower"
    CLOSED = "closed"


class EventKind(StrEnum):
    """What an :class:`Event` tells."""

    PRIMARY = "primary"
    """This node is primary now, in ``epoch``."""
    FOLLOWER = "follower"
    """This node follows ``address`` now."""
    FENCED = "fenced"
    """A newer ``epoch`` exists: this node takes no writes any more."""
    ROLLED_BACK = "rolled back"
    """Records ``first`` to ``last`` were dropped, and saved to the rescue file ``path``."""
    FOLLOWER_JOINED = "follower joined"
    FOLLOWER_LOST = "follower lost"
    """The stream of the follower ``name`` ended."""
    DEGRADED = "degraded"
    """From record ``first`` on writes are acknowledged without copies at ``name``, as ``degrade_after_s`` says."""
    NOT_DEGRADED = "not degraded"
    """They would be, but too few voters agreed: ``reason``. Writes stay refused."""
    RESTORED = "restored"
    """All copies count again; what was acknowledged with fewer are records ``first`` to ``last``."""
    DIVERGED = "diverged"
    """The state digest at ``first`` differs from the primary's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a node; the fields that its kind names are set."""

    kind: EventKind
    node: str
    time_s: float
    """Wall clock."""
    epoch: int = 0
    name: str = ""
    address: str = ""
    first: int = 0
    last: int = 0
    path: str = ""
    reason: str = ""


class Outcome(StrEnum):
    """What became of a write whose outcome was unknown."""

    COMMITTED = "committed"
    PENDING = "pending"
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowerStatus:
    """A follower as its primary sees it."""

    name: str
    store_id: str
    address: str
    state: str
    """``streaming``, ``bootstrapping``, ``fencing``, ``joining`` or ``gone``."""
    voter: bool
    durability: str
    """``sync`` or ``os``, as it said when it joined; empty while it is gone, or was not told. What it acks is synced
    either way: with ``os`` it is its own copy, should it become primary, that counts before it is on its disk."""
    connected: bool
    sent: int
    written: int
    synced: int
    visible: int
    lag_records: int
    """Records that it has not confirmed as synced."""
    lag_bytes: int
    lag_s: float
    """Age of the oldest record that it has not confirmed as synced: this node's wall clock now, less that of whoever
    was primary when the record was logged, and not below 0. Exact for records of this primary, unless its clock
    jumped since; for older ones as good as the two clocks agree. For people: nothing is decided by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """Where a follower gets its records from, as the follower sees it."""

    address: str
    connected: bool
    name: str
    state: str
    """``connecting``, ``joining``, ``streaming``, ``bootstrapping``, ``waiting`` or ``refused``."""
    problem: str
    """The last thing that went wrong, for people; empty when all is well."""
    lag_records: int
    lag_bytes: int
    staleness_s: float
    """How old this copy is at the most; infinite while not known."""
    bootstrap_bytes: int
    bootstrap_bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One node at one moment."""

    role: Role
    name: str
    store_id: str
    lineage: str
    address: str
    """Where it listens, as others are told; empty when it does not."""
    path: str
    epoch: int
    first_offset: int
    """The first record still in the log."""
    last_offset: int
    durable_offset: int
    committed_offset: int
    applied_offset: int
    position: Position
    """What reads show now."""
    acks: Acks
    ack_timeout_s: float
    durability: str
    voters: tuple[str, ...]
    copies: int
    """W: copies that a commit needs, the primary's included."""
    away: tuple[str, ...]
    """Voters without whose copies writes are acknowledged now; empty while the ack rule holds in full."""
    unprotected: tuple[tuple[int, int], ...]
    """(from, to): records acknowledged with fewer copies than ``acks`` asks for; ``to`` is 0 while it goes on.
    The newest 16 spans, the oldest first."""
    degrade_after_s: float
    """See :func:`kvrep.open`; 0: never."""
    lag_records_max: int
    """See :func:`kvrep.open`; 0: no bound."""
    not_writable: str
    """Why a write would be refused now; empty when it would not."""
    primary_address: str
    followers: tuple[FollowerStatus, ...]
    source: SourceStatus | None
    verified_through: int
    """Digests were compared with the primary's, and equal, through this record; 0: not yet compared."""
    diverged_at: int
    """The first digest mark at which they were not; 0: none."""
    memtable_bytes: int
    log_bytes: int
    lmdb_bytes: int
    flushes: int
    uncommitted_bytes: int
    snapshot_age_s: float
    rescued: tuple[str, ...]
    """Rescue files made since this store was opened."""

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it: the position as text, infinities as ``None``."""
        data = asdict(self)
        data["position"] = str(self.position)
        source = data["source"]
        if source is not None and source["staleness_s"] == float("inf"):
            source["staleness_s"] = None
        return data
