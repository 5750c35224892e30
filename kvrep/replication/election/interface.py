"""What an election is told of its node, and what it tells the shell to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from kvrep.model.configuration import Configuration, Voter
from kvrep.model.position import ZERO, Position
from kvrep.replication.ballots import PrimarySeen, PromiseRequest, Question
from kvrep.replication.promotion import Promotion

__all__ = [
    "Action",
    "Adopt",
    "Ask",
    "BecomePrimary",
    "ElectionSettings",
    "FollowPrimary",
    "GivePromise",
    "Peer",
    "Phase",
    "RequestPromises",
    "Standing",
    "StepDown",
    "WhyGone",
]


class Phase(Enum):
    """What an election is doing; the values are for people."""

    FOLLOWING = "following"
    ASKING = "asking"
    PROMISING = "collecting promises"
    STARTING = "starting"
    LEADING = "leading"


class WhyGone(Enum):
    """How a connection to the primary ended."""

    REFUSED = "refused"
    """The host answered that nobody listens there: the process is gone."""
    BROKEN = "broken"
    """It ended with an error; somebody should look."""
    SILENT = "silent"
    """Nothing came for too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElectionSettings:
    """Times in seconds. ``ValueError`` when they contradict each other."""

    heartbeat_interval_s: float = 0.25
    """How often a primary asks its voters to confirm it."""
    timeout_s: float = 1.0
    """The heartbeat limit: silence after which a primary counts as dead."""
    spread_s: float = 0.3
    """The random part added to the limit before a node asks the others."""
    step_down_s: float = 1.0
    """T: a primary that most voters have not confirmed for so long steps down."""
    answer_timeout_s: float = 0.4
    """How long one round of questions or promises may take."""
    patience_s: float = 0.15
    """How long a node waits for a better candidate that has answered."""
    settle_s: float = 0.02
    """How long it waits for the answer of one that may be better."""
    retry_s: float = 0.04
    """The first pause after a round without success; doubles with each further one."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.001 <= value <= 3600:
                raise ValueError(f"{name} must be 0.001 to 3600 seconds, not {value!r}")
        if self.timeout_s < 3 * self.heartbeat_interval_s:
            raise ValueError("timeout_s must be at least three heartbeat intervals")
        if self.step_down_s < 2 * self.heartbeat_interval_s:
            raise ValueError("step_down_s must be at least two heartbeat intervals")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a node is at this moment, as far as an election cares."""

    store_id: bytes
    name: str
    address: str
    lineage: bytes = b""
    rules: tuple[Configuration, ...] = ()
    """The configuration in force, then those in the log that are not known to be committed."""
    promised_epoch: int = 0
    last: Position = ZERO
    """The last record that is durable here."""
    lowered: Position = ZERO
    """See :attr:`kvrep.replication.messages.Promise.lowered`."""
    primary_epoch: int = 0
    """The epoch in which this node is primary: its start is in the log and no higher promise was given."""
    able: bool = True
    """False: it bootstraps, restarted behind what it acknowledged, or its disk failed. It must not become
    primary by itself, and its promise says nothing about what it has stored, so it gives none."""
    witness: bool = False

    @property
    def empty(self) -> bool:
        """Whether it holds nothing. A node with a lineage and no record has begun a group, or was about to
        join one, and was interrupted; a witness has no records, so its lineage says all."""
        return self.last == ZERO and not self.rules and not (self.witness and self.lineage)

    @property
    def voter(self) -> Voter | None:
        """Itself in the newest configuration."""
        return self.rules[-1].voter(self.store_id) if self.rules else None

    def votes(self, store_id: bytes) -> bool:
        """Whether a store is a voter under any rule."""
        return any(rule.voter(store_id) is not None for rule in self.rules)

    @property
    def could(self) -> bool:
        """Whether this node may become primary by itself, at some time."""
        voter = self.voter
        return self.able and not self.witness and voter is not None and voter.priority >= 0 and not voter.away


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom to ask. The name is the key by which answers are told apart."""

    name: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask each of ``to`` in parallel; tell ``on_answer`` or ``on_no_answer`` for each, with this object."""

    to: tuple[Peer, ...]
    question: Question
    asked_at: float
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GivePromise:
    """Store durably: no epoch below ``epoch`` is obeyed, and ``epoch`` itself only of the store ``to``.

    For our own: then tell ``on_own_promise``. Without durable storage nothing may be answered.
    """

    epoch: int
    to: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPromises:
    """Ask each of ``to`` in parallel; tell ``on_reply`` or ``on_no_reply`` for each."""

    to: tuple[Peer, ...]
    request: PromiseRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BecomePrimary:
    """Fetch what ``promotion`` says, begin ``epoch``, tell ``on_started``.

    ``fenced`` is false only in asynchronous mode (``acks=0``), where a promotion without the old primary is
    possible but cannot know what was acknowledged. ``founding`` is not empty for the very first epoch of a
    new group: these are its voters, and the lineage is to be made.
    """

    epoch: int
    promotion: Promotion
    fenced: bool
    founding: tuple[Voter, ...] = ()
    addresses: Mapping[bytes, str]
    """Where to fetch from, by store id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowPrimary:
    """Follow this primary. An empty node joins as a non-voter; the configuration alone says who votes."""

    primary: PrimarySeen


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDown:
    """Refuse writes from now on. ``epoch`` is the newer one if that is why, else 0."""

    reason: str
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """A witness learns the lineage whose promises it keeps; store it durably."""

    lineage: bytes


Action = Ask | GivePromise | RequestPromises | BecomePrimary | FollowPrimary | StepDown | Adopt
