"""Who tries to be primary, and when: the built-in quorum coordinator as a state machine.

Events in, actions out. It holds no clock, no thread and no chance of its own: ``now`` is an argument (seconds
of one monotonic clock), chance a function that the shell passes in. It gives liveness only. What is safe is
decided by promises alone (:mod:`kvrep.replication.promotion`), however wrong a clock or a timeout is.

::

    FOLLOWING ── silence, or news that the primary is gone ──> ASKING      would you promise? (binds nobody)
    ASKING ──── enough would, and nobody who answers is better ──> PROMISING  own promise first, then theirs
    PROMISING ─ F data voters and most voters promised ──> STARTING        the node fetches, begins its epoch
    STARTING ── the epoch start is in the log ──> LEADING                  asks every voter to confirm, always
    LEADING ─── most voters silent for T, or a newer epoch ──> FOLLOWING

* **Pre-vote.** Asking changes nothing, so a node that is cut off does not raise epochs meanwhile.
* **Stickiness.** Whoever has heard of the primary within the limit promises nobody else, and tells so.
* **News.** A broken connection that is refused on reconnect means that the process is gone. The others are
  asked at once; whoever is asked so, and still believes in that primary, looks for itself.
* **The best stands first**: the most up-to-date log, then priority, then the lower member number. The others
  give it ``patience_s``. A voter whose own log is ahead of the candidate's answers no.
* **A pause of our own** proves nothing about others: after one, everybody gets time to be heard.
* **A group is formed once**: see :meth:`Election._found`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from kvrep.model.configuration import Configuration, Voter
from kvrep.model.position import EPOCH_MEMBERS, ZERO, EpochTable, Position, epoch_after
from kvrep.replication.ballots import Answer, PrimarySeen, PromiseReply, PromiseRequest, Question
from kvrep.replication.messages import Promise
from kvrep.replication.promotion import Promotion, most

__all__ = [
    "Action",
    "Adopt",
    "Ask",
    "BecomePrimary",
    "Election",
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

INFINITY = float("inf")


class Phase(Enum):
    """What an :class:`Election` is doing; the values are for people."""

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


def enough_votes(rules: Iterable[Configuration], stores: set[bytes], *, permit: bool) -> bool:
    """Whether ``stores`` are most voters under every rule; a permit counts as one voter more."""
    return all(most(rule, stores, outside=permit) for rule in rules)


def enough_fenced(rules: Iterable[Configuration], stores: set[bytes]) -> bool:
    """Whether ``stores`` hold F data voters under every rule."""
    return all(sum(v.store_id in stores for v in rule.voters if v.counts) >= rule.fence for rule in rules)


class Election:
    """One per node. Not thread-safe: the shell serializes all calls.

    Call :meth:`observe` whenever the node may have changed, and before any other event.
    """

    def __init__(
        self,
        settings: ElectionSettings,
        own: Standing,
        *,
        peers: Mapping[str, str],
        chance: Callable[[], float],
        now: float,
        priority: int = 0,
        needs_permit: bool = False,
    ) -> None:
        """``peers``: addresses by name, this node's own included; ``chance`` returns [0, 1).

        ``needs_permit``: stand only while :meth:`permit` allows it (an outside service decides who tries).
        """
        self.settings = settings
        self.outside_epoch = 0
        """The highest epoch that a service outside is known to have promised."""
        self.own = own
        self.peers = dict(peers)
        self.phase = Phase.FOLLOWING
        self.problem = "no primary is known yet"
        """What keeps this node from knowing or being a primary, for people; empty when nothing does."""
        self.primary: PrimarySeen | None = None
        self.wants_permit = False
        """Whether this node would stand if the outside service let it."""
        self._chance = chance
        self._priority = priority
        self._needs_permit = needs_permit
        self._permit_until = 0.0
        self._heard = now
        self._gone = False
        self._over = 0
        """The newest epoch whose primary has resigned: what still arrives of it is old."""
        self._ask_at = now
        self._extra = self._random(settings.spread_s)
        self._deferred = False
        self._failures = 0
        self._number = 0
        self._round: Ask | None = None
        self._answers: dict[str, Answer] = {}
        self._silent: set[str] = set()
        self._known: dict[str, Answer] = {}
        """The newest answer of each peer, for addresses and names."""
        self._probing_until = 0.0
        self._probe_at = INFINITY
        self._wanted = 0
        self._wanted_at = 0.0
        self._promotion: Promotion | None = None
        self._founding: tuple[Voter, ...] = ()
        self._replied: set[bytes] = set()
        self._failed_replies: set[str] = set()
        self._confirmed: dict[bytes, float] = {}
        self._led_at = -INFINITY
        self._challenged_at = 0.0
        self._challenger = 0
        self._pardoned_until = 0.0
        self._led_epoch = 0
        self._resigned = 0
        self._ticked = now

    # -- what others ask ---------------------------------------------------------------------------

    @property
    def wakes_at(self) -> float:
        """When :meth:`tick` is due at the latest."""
        s = self.settings
        if self.phase is Phase.LEADING or self.phase is Phase.STARTING:
            return self._led_at + s.heartbeat_interval_s
        if self.phase is Phase.ASKING:
            assert self._round is not None
            began = self._round.asked_at
            due = began + s.settle_s
            return due if self._ticked < due else began + s.answer_timeout_s
        if self.phase is Phase.PROMISING:
            return self._wanted_at + s.answer_timeout_s
        return min(self._due(), self._probe_at, self._ticked + s.heartbeat_interval_s)

    @property
    def leading_epoch(self) -> int:
        """The epoch this node is primary in, 0 when it is not (or has just stepped down)."""
        epoch = self.own.primary_epoch
        return epoch if epoch > self._resigned else 0

    def confirmed_until(self, now: float) -> float:
        """Until when most voters are known to have confirmed us, plus T; 0 when we are no primary.

        In asynchronous mode nothing may be acknowledged later than that.
        """
        return self._most_confirmed(now) + self.settings.step_down_s if self.leading_epoch else 0.0

    def alive(self, now: float) -> PrimarySeen | None:
        """The primary that we have heard of within the limit, ourselves included."""
        if self.leading_epoch:
            return self._myself() if now < max(self.confirmed_until(now), self._pardoned_until) else None
        if self.primary is None or self._gone or now > self._heard + self.settings.timeout_s:
            return None
        return self.primary

    # -- the node and its clock --------------------------------------------------------------------

    def observe(self, own: Standing, now: float) -> list[Action]:
        """The node as it is now."""
        if self.own.rules != own.rules and self.phase is Phase.LEADING:
            for rule in own.rules:
                for voter in rule.voters:
                    # It has not been asked as a voter yet; that is not silence.
                    if not self._votes(voter.store_id):
                        self._confirmed.setdefault(voter.store_id, now)
        self.own = own
        epoch = self.leading_epoch
        if epoch and self.phase is not Phase.LEADING and self.phase is not Phase.STARTING:
            return self._lead(now)
        if self.phase is Phase.LEADING:
            if not epoch:
                self._follow_nobody(now, "this node is no longer primary")
                return self._fenced_by_promise()
            elif not own.able:
                return self._step_down("this node cannot store any more", now)
        return []

    def _fenced_by_promise(self) -> list[Action]:
        """We lead no more because of a promise: the node is to refuse writes, if it does not yet."""
        promised = self.own.promised_epoch
        if promised <= self._led_epoch:
            return []
        self._resigned = self._led_epoch
        return [StepDown(reason=f"epoch {promised} was promised to another node", epoch=promised)]

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        s = self.settings
        if now - self._ticked > max(2 * s.heartbeat_interval_s, s.timeout_s / 2):
            self._after_pause(now)
        self._ticked = now
        match self.phase:
            case Phase.LEADING:
                return self._lead_on(now)
            case Phase.STARTING:
                return self._announce(now, begun=False)
            case Phase.ASKING:
                return self._consider(now)
            case Phase.PROMISING:
                if now >= self._wanted_at + s.answer_timeout_s:
                    return self._give_up(now, "too few voters promised in time: " + self._missing())
                return []
            case Phase.FOLLOWING:
                if now >= self._due():
                    return self._ask(now)
                if now >= self._probe_at:
                    self._probe_at, self._probing_until = INFINITY, 0.0
                    return self._probe(now)
                return []

    def permit(self, until: float, now: float) -> list[Action]:
        """An outside service lets us try until then (and counts as one more vote); 0 takes it back."""
        self._permit_until = until
        if until > now and self.phase is Phase.FOLLOWING and self.alive(now) is None:
            self._ask_at = now
        return []

    def found(self, now: float) -> list[Action]:
        """An outside service chose this empty node to begin a new group, alone."""
        if not self.own.empty or self.own.witness or self.phase is not Phase.FOLLOWING:
            return []
        own = self.own
        voter = Voter(
            store_id=own.store_id, name=own.name, member=1, address=own.address, priority=self._priority
        )
        return self._collect(now, epoch_after(own.promised_epoch, 1), (voter,))

    def _due(self) -> float:
        if self.own.witness:
            return INFINITY
        if self.primary is None or self._gone:
            return self._ask_at
        return max(self._ask_at, self._heard + self.settings.timeout_s + self._extra)

    def _after_pause(self, now: float) -> None:
        """We did not run for a while, so what we did not hear proves nothing."""
        s = self.settings
        grace = 2 * s.heartbeat_interval_s
        self._heard = max(self._heard, now - s.timeout_s + grace)
        self._pardoned_until = now + max(s.answer_timeout_s, grace)

    # -- signs of life -----------------------------------------------------------------------------

    def heard_from_primary(self, primary: PrimarySeen, now: float) -> list[Action]:
        """The replication stream brought something of this primary. Cheap; for every heartbeat."""
        if primary.epoch < self.own.promised_epoch or self.leading_epoch >= primary.epoch:
            return []
        if primary.epoch <= self._over:
            return []
        self._believe(primary, now)
        return []

    def connection_lost(self, why: WhyGone, now: float) -> list[Action]:
        """The replication stream from the primary ended."""
        if self.primary is None or self.leading_epoch or self.own.witness:
            return []
        if why is WhyGone.REFUSED:
            return self._is_gone(now)
        return self._probe(now)

    def resign(self, now: float) -> list[Action]:
        """The node is being closed, in order: tell the others so that they need no timeout."""
        epoch = self.leading_epoch
        if not epoch:
            return []
        self._resigned = epoch
        self._follow_nobody(now, "this node has resigned")
        return self._tell_resigned(epoch, now)

    def _believe(self, primary: PrimarySeen, now: float) -> bool:
        """This primary is alive. Whether it is news."""
        news = self.primary is None or self.primary.epoch != primary.epoch
        self.primary = primary
        self._heard = now
        self._gone = False
        self._deferred = False
        self._failures = 0
        self.wants_permit = False
        self.problem = ""
        if self.phase is Phase.ASKING or (self.phase is Phase.PROMISING and primary.epoch > self._wanted):
            self._rest()
        if news:
            self._extra = self._random(self.settings.spread_s)
        return news

    def _is_gone(self, now: float) -> list[Action]:
        """The primary's process is known to be gone."""
        self._gone = True
        self.problem = "the primary is gone"
        if self.own.witness or self.phase is not Phase.FOLLOWING:
            return []
        return self._ask(now)

    def _probe(self, now: float) -> list[Action]:
        """Look whether the primary that we believe in is still there."""
        primary = self.primary
        if primary is None or not primary.address or now < self._probing_until:
            return []
        self._probing_until = now + self.settings.answer_timeout_s
        self._probe_at = INFINITY
        return [self._question("look", (Peer(primary.name, primary.address),), now)]

    def _follow_nobody(self, now: float, problem: str) -> None:
        self.primary = None
        self._gone = False
        self.problem = problem
        self._rest()
        self._ask_at = now + self._random(self.settings.retry_s)

    def _rest(self) -> None:
        """Back to following, whatever was under way."""
        self.phase = Phase.FOLLOWING
        self._round = None
        self._promotion = None
        self._founding = ()
        self._wanted = 0

    # -- asking ------------------------------------------------------------------------------------

    def _ask(self, now: float) -> list[Action]:
        stands = self._could and not self._barred(now)
        peers = self._others()
        self.phase = Phase.ASKING
        self._answers, self._silent = {}, set()
        ask = self._question("stand" if stands else "look", peers, now)
        self._round = ask
        return [*([ask] if peers else []), *self._consider(now)]

    @property
    def _could(self) -> bool:
        """Whether this node may become primary by itself, at some time."""
        own, voter = self.own, self.own.voter
        return own.able and not own.witness and voter is not None and voter.priority >= 0 and not voter.away

    def _barred(self, now: float) -> bool:
        return self._needs_permit and now >= self._permit_until

    def _others(self) -> tuple[Peer, ...]:
        """Everybody whose answer may matter, each once, by name; ``peers`` knows addresses best."""
        found: dict[str, str] = {}
        for rule in self.own.rules:
            for voter in rule.voters:
                known = self._known.get(voter.name)
                found[voter.name] = voter.address or (known.address if known is not None else "")
        found.update(self.peers)
        found.pop(self.own.name, None)
        return tuple(Peer(name, address) for name, address in sorted(found.items()) if address)

    def _voters(self) -> tuple[Peer, ...]:
        names = {v.name for rule in self.own.rules for v in rule.voters}
        return tuple(p for p in self._others() if p.name in names)

    def _question(
        self, purpose: str, to: tuple[Peer, ...], now: float, *, epoch: int = 0, begun: bool = False
    ) -> Ask:
        own = self.own
        self._number += 1
        question = Question(
            purpose=purpose,  # type: ignore[arg-type]  # one of Purpose, from this module only
            store_id=own.store_id,
            name=own.name,
            address=own.address,
            lineage=own.lineage,
            epoch=epoch,
            last=own.last,
            gone=self._gone,
            begun=begun,
            peers=self._list() if own.empty else (),
        )
        return Ask(to=to, question=question, asked_at=now, number=self._number)

    def _list(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(self.peers.items()))

    def on_answer(self, ask: Ask, name: str, answer: Answer, now: float) -> list[Action]:
        """One of those asked has answered."""
        if answer.store_id == self.own.store_id:
            return self.on_no_answer(ask, name, WhyGone.SILENT, now)
        self._known[name] = answer
        if ask.question.purpose == "lead":
            return self._on_confirmation(ask, answer, now)
        actions = self._learn(answer, now)
        if self._round is None or ask.number != self._round.number:
            return actions
        self._answers[name] = answer
        return [*actions, *self._consider(now)]

    def on_no_answer(self, ask: Ask, name: str, why: WhyGone, now: float) -> list[Action]:
        """One of those asked cannot be reached, or did not answer in time."""
        actions = self._on_refused(ask, now) if self._refuses(name, why) else []
        if self._round is None or ask.number != self._round.number:
            return actions
        self._silent.add(name)
        return [*actions, *self._consider(now)]

    def _refuses(self, name: str, why: WhyGone) -> bool:
        primary = self.primary
        return why is WhyGone.REFUSED and primary is not None and name == primary.name and not self._gone

    def _on_refused(self, ask: Ask, now: float) -> list[Action]:
        """Nobody listens where the primary was. What came from it after we asked may be a late message."""
        if ask.asked_at >= self._heard:
            return self._is_gone(now)
        self._probe_at = now + self.settings.retry_s
        return []

    def _learn(self, answer: Answer, now: float) -> list[Action]:
        """Somebody tells of a living primary. What we saw ourselves counts more than hearsay of the same."""
        alive = answer.alive
        own = self.own
        if alive is None or alive.epoch < own.promised_epoch or alive.store_id == own.store_id:
            return []
        if alive.epoch <= self._over:
            return []
        if own.lineage and answer.lineage != own.lineage:
            return []
        if self.leading_epoch:
            return self._superseded(alive, now) if alive.epoch > self.leading_epoch else []
        first_hand = answer.store_id == alive.store_id
        known = self.primary
        if known is not None and known.epoch > alive.epoch:
            return []
        if known is None or alive.epoch > known.epoch:
            self._believe(alive, now)
            return [FollowPrimary(primary=alive)]
        if first_hand:
            self._believe(alive, now)
        return []

    def _consider(self, now: float) -> list[Action]:
        """Decide upon the answers so far."""
        ask, s = self._round, self.settings
        if self.phase is not Phase.ASKING or ask is None:
            return []
        waiting = {p.name for p in ask.to} - self._answers.keys() - self._silent
        over = not waiting or now >= ask.asked_at + s.answer_timeout_s
        if self.own.empty:
            return self._found(now) if over else []
        if ask.question.purpose != "stand":
            if not over:
                return []
            if self._could and self._gives_way(now):
                return []
            self.wants_permit = self._could
            return self._later(now, self._why_not_standing(now))
        if not self._could:  # it was taken off the voters, or lost its disk, since it asked
            return self._later(now, self._why_not_standing(now))
        yes = {self.own.store_id} | {a.store_id for a in self._answers.values() if a.would}
        if not self._sufficient(yes, now):
            return self._later(now, self._why_not_enough()) if over else []
        if not over and now < ask.asked_at + s.settle_s and any(self._may_be_better(n) for n in waiting):
            return []
        return [] if self._gives_way(now) else self._stand(now)

    def _gives_way(self, now: float) -> bool:
        """Leave the one who answered and is better a little time, once."""
        if self._deferred or not any(self._better(a) for a in self._answers.values()):
            return False
        self._deferred = True
        self._rest()
        self._ask_at = now + self.settings.patience_s
        return True

    def _sufficient(self, stores: set[bytes], now: float) -> bool:
        rules = self.own.rules
        if not enough_votes(rules, stores, permit=self._has_permit(now)):
            return False
        return enough_fenced((r for r in rules if r.synchronous), stores)

    def _has_permit(self, now: float) -> bool:
        return now < self._permit_until

    def _better(self, answer: Answer) -> bool:
        """Whether the one who answered should stand in our place."""
        if not answer.able or answer.lineage != self.own.lineage:
            return False
        return (answer.last, answer.priority, -answer.member) > self._rank()

    def _rank(self) -> tuple[Position, int, int]:
        voter = self.own.voter
        assert voter is not None
        return self.own.last, voter.priority, -voter.member

    def _may_be_better(self, name: str) -> bool:
        if self._gone and self.primary is not None and name == self.primary.name:
            return False
        voter = next((v for rule in self.own.rules for v in rule.voters if v.name == name), None)
        return voter is not None and voter.counts and voter.priority >= 0

    def _why_not_enough(self) -> str:
        told = [f"{name}: {a.why}" for name, a in sorted(self._answers.items()) if not a.would and a.why]
        mute = sorted({p.name for p in self._voters()} - self._answers.keys())
        if mute:
            told.append("no answer from " + ", ".join(mute))
        return "too few voters would promise (" + "; ".join(told)[:600] + ")"

    def _why_not_standing(self, now: float) -> str:
        own = self.own
        if own.witness:
            return "a witness keeps no data"
        if own.voter is None:
            return "this node is not a voter, and knows no primary"
        if not own.able:
            return "this node may not become primary by itself: its copy is not whole"
        if own.voter.away:
            return "the ack rule went on without this node, which may lack acknowledged records"
        if self._barred(now):
            return "another node has the key"
        return "this node's priority is below 0"

    def _later(self, now: float, problem: str) -> list[Action]:
        """Ask again after a pause that grows, with a random part."""
        s = self.settings
        self._rest()
        self.problem = problem
        self._failures += 1
        pause = min(s.retry_s * 2 ** min(self._failures - 1, 10), s.timeout_s / 2)
        self._ask_at = now + pause * (0.5 + self._chance())
        return []

    # -- forming a group ---------------------------------------------------------------------------

    def _found(self, now: float) -> list[Action]:
        """This node is empty: form the group it was told of, exactly once, or join the one that exists.

        All listed peers must answer, be empty and have the same list; then the one with the first name (no
        witness) asks **all** of them for their promise. A peer that has a lineage ends that for good: an
        empty node then waits for its primary and joins as a non-voter. So nodes that were wiped never
        outvote the one that holds the data: they are other stores, which no configuration lists.

        One that is listed and empty has never had anything (what it confirmed and lost would make it unable):
        its promise is as good as any. Without it a founder that failed before anybody had joined could
        never lead again.
        """
        # Who has our own lineage without a record is from an attempt of ours that was interrupted.
        ours = self.own.lineage
        held = sorted(
            name
            for name, a in self._answers.items()
            if a.lineage and not (a.lineage == ours and (a.empty or a.witness))
        )
        if held:
            return self._later(now, f"{held[0]} belongs to a group already; waiting for its primary, to join")
        if self._needs_permit or not self.peers:
            return self._later(now, "waiting for a group to be formed")
        if self.own.name not in self.peers:
            return self._later(now, f"{self.own.name} is not in the list of peers it was given")
        mute = sorted(self.peers.keys() - self._answers.keys() - {self.own.name})
        if mute:
            return self._later(now, "a new group needs all its nodes once; no answer from " + ", ".join(mute))
        for name, answer in sorted(self._answers.items()):
            if answer.name != name:
                return self._later(now, f"the node at the address of {name} is named {answer.name!r}")
            if answer.peers != self._list():
                return self._later(now, f"{name} was given another list of peers")
            if not answer.empty and not answer.lineage:
                return self._later(now, f"{name} holds data without a group")
        return self._found_now(now)

    def _found_now(self, now: float) -> list[Action]:
        own = self.own
        members = {name: i for i, name in enumerate(sorted(self.peers), 1)}
        if len(members) >= EPOCH_MEMBERS:
            return self._later(now, "too many peers")
        voters = [
            Voter(
                store_id=a.store_id,
                name=name,
                member=members[name],
                address=self.peers[name],
                priority=a.priority,
                witness=a.witness,
            )
            for name, a in self._answers.items()
        ]
        voters.append(
            Voter(
                store_id=own.store_id,
                name=own.name,
                member=members[own.name],
                address=self.peers[own.name],
                priority=self._priority,
                witness=own.witness,
            )
        )
        voters.sort(key=lambda v: v.member)
        first = next(v for v in voters if not v.witness or v is voters[-1])
        if first.store_id != own.store_id:
            return self._later(now, f"{first.name} is to begin the new group")
        seen = max([own.promised_epoch, *(a.promised_epoch for a in self._answers.values())])
        return self._collect(now, epoch_after(seen, members[own.name]), tuple(voters))

    # -- collecting promises -----------------------------------------------------------------------

    def _stand(self, now: float) -> list[Action]:
        own = self.own
        voter = own.voter
        assert voter is not None
        told = (a.promised_epoch for a in self._answers.values())
        seen = max([own.promised_epoch, own.last.epoch, self.outside_epoch, *told])
        return self._collect(now, epoch_after(seen, voter.member), ())

    def _collect(self, now: float, epoch: int, founding: tuple[Voter, ...]) -> list[Action]:
        self._rest()
        self.phase = Phase.PROMISING
        self.problem = "this node stands for primary"
        self._wanted, self._wanted_at = epoch, now
        self._founding = founding
        return [GivePromise(epoch=epoch, to=self.own.store_id)]

    def on_own_promise(self, epoch: int, promise: Promise | None, now: float) -> list[Action]:
        """Our own promise of ``epoch`` is durable, or could not be given."""
        if self.phase is not Phase.PROMISING or epoch != self._wanted:
            return []
        if promise is None:
            return self._give_up(now, "this node could not store its own promise")
        own = self.own
        rules = self._founding_rules() or own.rules
        self._promotion = Promotion(rules[0], own.store_id, epoch, promise, proposed=rules[1:])
        self._replied, self._failed_replies = {own.store_id}, set()
        request = PromiseRequest(
            epoch=epoch,
            store_id=own.store_id,
            name=own.name,
            address=own.address,
            lineage=own.lineage,
            peers=self._list() if self._founding else (),
        )
        to = self._others() if len(self._founding) > 1 else () if self._founding else self._voters()
        actions: list[Action] = [RequestPromises(to=to, request=request)] if to else []
        return [*actions, *self._decide(now)]

    def _founding_rules(self) -> tuple[Configuration, ...]:
        if not self._founding:
            return ()
        return (Configuration(acks=0, voters=self._founding, next_member=len(self._founding) + 1),)

    def on_reply(self, request: PromiseRequest, name: str, reply: PromiseReply, now: float) -> list[Action]:
        """A voter promised, or refused."""
        promotion = self._promotion
        if self.phase is not Phase.PROMISING or promotion is None or request.epoch != self._wanted:
            return []
        if reply.promise is not None and reply.promise.epoch == request.epoch:
            promotion.on_promise(reply.store_id, reply.promise)
            self._replied.add(reply.store_id)
            return self._decide(now)
        if reply.promised_epoch > request.epoch:
            return self._give_up(now, f"{name} has promised epoch {reply.promised_epoch}")
        return self.on_no_reply(request, name, now)

    def on_no_reply(self, request: PromiseRequest, name: str, now: float) -> list[Action]:
        """A voter gave no promise and cannot be asked again in this attempt."""
        if self.phase is not Phase.PROMISING or self._promotion is None or request.epoch != self._wanted:
            return []
        self._failed_replies.add(name)
        asked = {p.name for p in (self._others() if self._founding else self._voters())}
        answered = {v.name for v in self._all_voters() if v.store_id in self._replied}
        if asked <= self._failed_replies | answered:
            return self._give_up(now, "too few voters promised: " + self._missing())
        return []

    def _all_voters(self) -> tuple[Voter, ...]:
        rules = self._founding_rules() or self.own.rules
        return tuple({v.store_id: v for rule in rules for v in rule.voters}.values())

    def _missing(self) -> str:
        return ", ".join(v.name for v in self._all_voters() if v.store_id not in self._replied)

    def _decide(self, now: float) -> list[Action]:
        promotion = self._promotion
        assert promotion is not None
        if promotion.superseded:
            return self._give_up(now, f"epoch {promotion.highest_seen} exists")
        if self._founding:
            if any(v.store_id not in self._replied for v in self._founding):
                return []
        elif not self._sufficient(self._replied, now):
            return []
        self.phase = Phase.STARTING
        self._led_at = now
        self._confirmed = dict.fromkeys(self._replied, now)
        addresses = {v.store_id: self._address_of(v) for v in self._all_voters()}
        return [
            BecomePrimary(
                epoch=self._wanted,
                promotion=promotion,
                fenced=promotion.fenced,
                founding=self._founding,
                addresses=addresses,
            )
        ]

    def _address_of(self, voter: Voter) -> str:
        known = self._known.get(voter.name)
        return self.peers.get(voter.name) or voter.address or (known.address if known is not None else "")

    def _give_up(self, now: float, problem: str) -> list[Action]:
        """This attempt failed; others may stand meanwhile, so the next comes after a random pause."""
        self._later(now, problem)
        self._ask_at += self._random(self.settings.patience_s)
        return []

    def on_started(self, epoch: int, problem: str, now: float) -> list[Action]:
        """The node has begun the epoch (``problem`` is empty), or could not."""
        if self.phase is not Phase.STARTING or epoch != self._wanted:
            return []
        if problem or self.leading_epoch < epoch:
            return self._give_up(now, problem or "the epoch could not be begun")
        return self._lead(now)

    # -- leading -----------------------------------------------------------------------------------

    def _myself(self) -> PrimarySeen:
        own = self.own
        return PrimarySeen(
            store_id=own.store_id, name=own.name, address=own.address, epoch=self.leading_epoch
        )

    def _lead(self, now: float) -> list[Action]:
        if self.phase is not Phase.STARTING:
            self._confirmed = {}
            self._pardoned_until = now + self.settings.step_down_s
        self._rest()
        self.phase = Phase.LEADING
        self._led_epoch = self.leading_epoch
        self.primary, self._gone = None, False
        self._failures, self._deferred, self.wants_permit = 0, False, False
        self._challenged_at, self._challenger = 0.0, 0
        self.problem = ""
        self._led_at = -INFINITY
        return self._announce(now, begun=True)

    def _announce(self, now: float, *, begun: bool) -> list[Action]:
        if now < self._led_at + self.settings.heartbeat_interval_s:
            return []
        self._led_at = now
        to = self._others()
        if not to:
            return []
        epoch = self.leading_epoch if begun else self._wanted
        return [self._question("lead", to, now, epoch=epoch, begun=begun)]

    def _lead_on(self, now: float) -> list[Action]:
        s = self.settings
        if now >= max(self.confirmed_until(now), self._pardoned_until):
            why = f"most voters have not confirmed this primary for {s.step_down_s:g} s"
            return self._step_down(why, now)
        if self._challenged_at and now >= self._challenged_at + 2 * s.patience_s:
            why = f"epoch {self._challenger} was promised to another node"
            return self._step_down(why, now, self._challenger)
        return self._announce(now, begun=True)

    def _on_confirmation(self, ask: Ask, answer: Answer, now: float) -> list[Action]:
        epoch = self.leading_epoch
        if not epoch or ask.question.epoch != epoch:
            return []
        if answer.alive is not None and answer.alive.epoch > epoch and answer.lineage == self.own.lineage:
            return self._superseded(answer.alive, now)
        if answer.would:
            before = self._confirmed.get(answer.store_id, -INFINITY)
            self._confirmed[answer.store_id] = max(before, ask.asked_at)
        elif answer.promised_epoch > epoch and not self._challenged_at and self._votes(answer.store_id):
            self._challenged_at, self._challenger = now, answer.promised_epoch
        return []

    def _votes(self, store_id: bytes) -> bool:
        return any(rule.voter(store_id) is not None for rule in self.own.rules)

    def _most_confirmed(self, now: float) -> float:
        """The latest moment at which most voters (under every rule) had confirmed us."""
        worst = INFINITY
        for rule in self.own.rules:
            times = [
                now if v.store_id == self.own.store_id else self._confirmed.get(v.store_id, -INFINITY)
                for v in rule.voters
            ]
            best = _held_by_most(times)
            if self._permit_until:
                best = max(best, _held_by_most([*times, self._permit_until - self.settings.step_down_s]))
            worst = min(worst, best)
        return worst

    def _superseded(self, newer: PrimarySeen, now: float) -> list[Action]:
        self._resigned = self.leading_epoch
        self._follow_nobody(now, "")
        self._believe(newer, now)
        reason = f"{newer.name} is primary in epoch {newer.epoch}"
        return [StepDown(reason=reason, epoch=newer.epoch), FollowPrimary(primary=newer)]

    def _step_down(self, reason: str, now: float, newer: int = 0) -> list[Action]:
        epoch = self.leading_epoch
        self._resigned = epoch
        self._follow_nobody(now, reason)
        return [StepDown(reason=reason, epoch=newer), *self._tell_resigned(epoch, now)]

    def _tell_resigned(self, epoch: int, now: float) -> list[Action]:
        to = self._voters()
        return [self._question("resign", to, now, epoch=epoch)] if to else []

    # -- being asked -------------------------------------------------------------------------------

    def on_question(self, question: Question, now: float) -> tuple[Answer, list[Action]]:
        """Somebody asks. The answer promises nothing."""
        own = self.own
        stranger = bool(question.lineage and own.lineage and question.lineage != own.lineage)
        actions: list[Action] = []
        would, why = False, ""
        if stranger:
            why = "this node belongs to another group"
        elif question.purpose == "lead":
            would, why, actions = self._on_lead(question, now)
        elif question.purpose == "stand":
            would, why = self._would(question, now)
            actions = self._look_too(question, now)
        elif question.purpose == "resign":
            actions = self._on_resign(question, now)
        return self._answer(would, why, now), actions

    def _answer(self, would: bool, why: str, now: float) -> Answer:
        own = self.own
        voter = own.voter
        priority = voter.priority if voter is not None else self._priority
        return Answer(
            store_id=own.store_id,
            name=own.name,
            address=own.address,
            lineage=own.lineage,
            promised_epoch=own.promised_epoch,
            last=own.last,
            would=would,
            why=why,
            able=self._could,
            priority=priority,
            member=voter.member if voter is not None else 0,
            witness=own.witness,
            empty=own.empty,
            alive=self.alive(now),
            peers=self._list() if own.empty or own.witness else (),
        )

    def _would(self, question: Question, now: float) -> tuple[bool, str]:
        own = self.own
        if not own.lineage and not own.empty:
            return False, "this node holds data without a group"
        if not own.able and not own.witness:
            return False, "this node's copy is not whole"
        alive = self.alive(now)
        if alive is not None and alive.store_id != question.store_id:
            return False, f"{alive.name} is primary, and alive"
        if self._could and own.last > question.last:
            return False, f"this node holds {own.last}, the candidate {question.last}"
        if own.lowered > question.last:
            return False, f"records from {own.lowered} on were acknowledged without the candidate"
        return True, ""

    def _look_too(self, question: Question, now: float) -> list[Action]:
        """The asker says that the primary is gone. If we believe otherwise, see for ourselves."""
        if not question.gone or self.leading_epoch or self.alive(now) is None:
            return []
        return self._probe(now)

    def _on_lead(self, question: Question, now: float) -> tuple[bool, str, list[Action]]:
        own, epoch = self.own, question.epoch
        if epoch < own.promised_epoch:
            return False, f"this node has promised epoch {own.promised_epoch}", []
        if epoch <= self._over:
            return False, "its primary has resigned", []
        if self.leading_epoch >= epoch:
            return False, f"this node is primary in epoch {self.leading_epoch}", []
        if self.primary is not None and self.primary.epoch > epoch:
            return False, f"{self.primary.name} is primary in epoch {self.primary.epoch}", []
        seen = PrimarySeen(
            store_id=question.store_id, name=question.name, address=question.address, epoch=epoch
        )
        if not question.begun:
            # It collected its promises and prepares; whoever promised it leaves it time for that.
            if own.promised_epoch == epoch:
                self._ask_at = max(self._ask_at, now + self.settings.timeout_s + self._extra)
                return True, "", []
            return False, "it has not begun", []
        actions: list[Action] = []
        if self.leading_epoch:
            return True, "", self._superseded(seen, now)
        if own.witness and not own.lineage and question.lineage:
            actions.append(Adopt(lineage=question.lineage))
        if self.phase is Phase.STARTING and epoch > self._wanted:
            self._rest()
        if self._believe(seen, now) and not own.witness:
            actions.append(FollowPrimary(primary=seen))
        return True, "", actions

    def _on_resign(self, question: Question, now: float) -> list[Action]:
        primary = self.primary
        if primary is None or (primary.store_id, primary.epoch) != (question.store_id, question.epoch):
            return []
        self._over = question.epoch
        return self._is_gone(now)

    def on_promise_request(self, request: PromiseRequest, now: float) -> GivePromise | str:
        """What to promise durably, or why not. Tell :meth:`gave_promise` afterwards."""
        own = self.own
        if request.epoch < own.promised_epoch:
            return f"epoch {own.promised_epoch} was promised here"
        if not request.lineage:
            if own.lineage or not own.empty:
                return "this node belongs to a group already"
            if request.peers != self._list():
                return "this node was given another list of peers"
        elif request.lineage != own.lineage and (own.lineage or not own.empty):
            return "this node belongs to another group"
        if not own.able and not own.witness:
            return "this node's copy is not whole"
        alive = self.alive(now)
        if alive is not None and alive.store_id != request.store_id and not request.planned:
            return f"{alive.name} is primary, and alive"
        return GivePromise(epoch=request.epoch, to=request.store_id)

    def gave_promise(self, epoch: int, to: bytes, now: float) -> list[Action]:
        """This node has durably promised ``epoch`` to another store, to which we now leave time."""
        own = self.own
        if to == own.store_id:
            return []
        actions: list[Action] = []
        if 0 < self.leading_epoch < epoch:
            self._resigned = self.leading_epoch
            actions = [StepDown(reason=f"epoch {epoch} was promised to another node", epoch=epoch)]
        if self.primary is not None and self.primary.epoch >= epoch:
            return actions
        starting = self.phase is Phase.STARTING and self._wanted > epoch
        if not starting:
            self._rest()
        self.primary, self._gone, self._deferred = None, False, False
        self.problem = "waiting for the node that this one has promised to follow"
        self._extra = self._random(self.settings.spread_s)
        self._ask_at = now + self.settings.timeout_s + self._extra
        return actions

    def reply(self, promise: Promise | None, refused: str, now: float) -> PromiseReply:
        """The reply to a request for a promise; ``promise`` only if it is durable."""
        return PromiseReply(
            store_id=self.own.store_id,
            promised_epoch=max(self.own.promised_epoch, promise.epoch if promise is not None else 0),
            promise=promise,
            refused=refused,
            alive=self.alive(now),
        )

    def _random(self, limit: float) -> float:
        return self._chance() * limit


def _held_by_most(times: list[float]) -> float:
    """The latest moment that more than half of ``times`` have reached."""
    return sorted(times, reverse=True)[len(times) // 2] if times else INFINITY


def without_data(epoch: int, lowered: Position = ZERO) -> Promise:
    """The promise of a witness: it binds like any other and says nothing of a log."""
    return Promise(epoch=epoch, last=ZERO, committed=0, epochs=EpochTable(), lowered=lowered)
