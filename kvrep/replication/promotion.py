"""Becoming primary: whose promises are needed, who has them, and what must be fetched first.

Any F data voters meet every set of W that can have acknowledged a write (``Configuration.fence``). Once F of
them, this node included, have promised this epoch, their logs together hold everything that is committed,
and nothing more can be committed below this epoch. The most up-to-date of them, compared as Raft does
(epoch of the last record, then offset), holds all of it: this node takes over what it lacks, and only then
appends its epoch start.

Where the ack rule may go on without voters that are away, most voters have stored from which record on before
the first such record is acknowledged. So a promotion needs the promises of most voters there, too, and one of
them tells; whoever does not hold that record, nor one of a later epoch, is not promoted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvrep.model.configuration import Configuration, Voter
from kvrep.model.position import ZERO, Position, epoch_after, member_of
from kvrep.replication.messages import Promise

__all__ = ["Fetch", "Promotion", "most", "why_not_go_on"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Make our log equal to that of ``voter``: cut ours after ``after``, take what follows through ``to``."""

    voter: Voter
    after: Position
    to: Position
    below_committed: bool
    """We know records above ``after`` as committed. No full fence leads here; do not go on without force."""

    def problem(self, applied: int, *, may_drop: bool) -> str:
        """What forbids to take that history over, where LMDB holds ``applied``; empty when nothing does.

        ``may_drop``: what is known to be committed may go, by force or in asynchronous mode.
        """
        if self.after.offset < applied:
            return f"part from ours at {self.after}, below what LMDB holds"
        if self.below_committed and not may_drop:
            return f"part from ours at {self.after}, below what is committed here"
        return ""


def most(rule: Configuration, stores: Collection[bytes], *, outside: bool) -> bool:
    """Whether ``stores`` are most voters, where a service outside may count as one voter more."""
    votes, total = sum(v.store_id in stores for v in rule.voters), len(rule.voters)
    return 2 * votes > total or (outside and 2 * (votes + 1) > total + 1)


def why_not_go_on(
    held: Promise, answers: Iterable[tuple[Voter, Promise]], member: int, *, synchronous: bool
) -> str:
    """Why a primary that was restarted, and holds ``held``, may not begin again without fetching what data
    voters have beyond it; empty when it may. ``member`` is its own number.

    A primary commits nothing that is not durable at itself, so what its own followers have beyond it was never
    acknowledged, unless it lost its disk. What another primary wrote may have been. (Asynchronous primaries
    that lost their unsynced tail go on without it.)
    """
    own = held.last
    for voter, promise in answers:
        if promise.last <= own:
            continue
        if member_of(promise.last.epoch) != member:
            return f"{voter.name} holds records of another primary that this node lacks; follow it instead"
        if promise.committed > own.offset and synchronous:
            return (
                f"{voter.name} knows records through {promise.committed} as committed, and this node,"
                f" which wrote them, ends at {own.offset}: it lost data; follow {voter.name} instead"
            )
    return ""


class Promotion:
    """One attempt at one epoch. An answer above that epoch ends it: try again with ``next_epoch``."""

    __slots__ = ("_answers", "_outside", "_rules", "_self", "epoch", "outside_votes", "own")

    def __init__(
        self,
        configuration: Configuration,
        store_id: bytes,
        epoch: int,
        own: Promise,
        *,
        proposed: tuple[Configuration, ...] = (),
        outside_votes: bool = False,
    ) -> None:
        """``proposed`` are configurations in our log that are not known to be committed.

        Records may have been committed under each of them, so each must be fenced. ``outside_votes``: a
        service that is no voter, such as etcd, can promise, too, and counts as one voter more.
        """
        self._outside: Position | None = None
        self.outside_votes = outside_votes
        self._self = store_id
        self._rules = [configuration]
        self._answers: dict[bytes, Promise] = {store_id: own}
        self.epoch = epoch
        self.own = own
        """Our own promise, and what our log holds."""
        for other in proposed:
            self.learned(other)

    # Events.

    def on_promise(self, store_id: bytes, promise: Promise) -> None:
        """An answer. Only a promise of exactly this epoch counts; any other only tells what it says.

        An epoch below ours is an answer to a question asked beforehand, without a promise.
        """
        before = self._answers.get(store_id)
        if store_id != self._self and (before is None or before.epoch <= promise.epoch):
            self._answers[store_id] = promise

    def on_outside(self, lowered: Position) -> None:
        """The service outside has promised this epoch, and tells what it was told before."""
        self._outside = lowered

    def left(self, store_id: bytes) -> None:
        """A node cannot be reached any more. Its promise still binds it, so it still counts."""
        promise = self._answers.get(store_id)
        if promise is not None and promise.epoch < self.epoch:
            del self._answers[store_id]

    def fetched(self, own: Promise) -> None:
        """Our log now ends elsewhere. If it brought a new configuration, ``learned`` comes with it."""
        self.own = self._answers[self._self] = own

    def learned(self, configuration: Configuration) -> None:
        """The log holds this configuration: it must be fenced, too."""
        if configuration not in self._rules:
            self._rules.append(configuration)

    # Decisions.

    @property
    def ready(self) -> bool:
        """Whether the epoch start may be appended."""
        return self.enough and not self.superseded and not self.ahead and not self.lacks

    @property
    def superseded(self) -> bool:
        """Whether somebody promised, or wrote in, a higher epoch: this attempt cannot succeed."""
        return self.highest_seen > self.epoch

    @property
    def enough(self) -> bool:
        """Whether F data voters promised, under every configuration that may be in force; and most voters,
        where they may know of records that were acknowledged with fewer copies."""
        return self.fenced and (
            not self.needs_majority or self._most(self._promised(), self._outside is not None)
        )

    @property
    def fenced(self) -> bool:
        """Whether F data voters promised, under every configuration that may be in force."""
        return self._fence(self._promised())

    @property
    def would_be_enough(self) -> bool:
        """Whether enough voters answered at all; worth asking for promises."""
        return self._fence(self._answers) and (
            not self.needs_majority or self._most(self._answers, self.outside_votes)
        )

    @property
    def majority(self) -> bool:
        """Whether most voters promised, witnesses included; automatic promotions need this, too."""
        return self._most(self._promised(), outside=False)

    @property
    def needs_majority(self) -> bool:
        """Whether F data voters are not enough."""
        return any(rule.degrade_after_s for rule in self._rules) or self.lowered > ZERO

    @property
    def lowered(self) -> Position:
        """From which record on, by what anybody told, fewer copies may have been enough."""
        return max(self._outside or ZERO, *(promise.lowered for promise in self._answers.values()))

    @property
    def lacks(self) -> bool:
        """Whether our log, as it is now, may lack records that were acknowledged with fewer copies."""
        return self.own.last < self.lowered

    @property
    def would_lack(self) -> bool:
        """The same, after fetching from the best of those that answered."""
        voters = self._data_voters()
        return (
            max([self.own.last, *(p.last for v in voters if (p := self._answers.get(v.store_id)))])
            < self.lowered
        )

    @property
    def needed(self) -> int:
        """F, the largest where several configurations may be in force."""
        return max(rule.fence for rule in self._rules)

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of the voters that have not promised and whose promises would help."""
        promised = self._promised()
        voters = self._data_voters()
        if self.needs_majority and not self.majority:
            voters = tuple({v.store_id: v for rule in self._rules for v in rule.voters}.values())
        return tuple(v.name for v in voters if v.store_id not in promised)

    @property
    def promised(self) -> tuple[bytes, ...]:
        """The stores that promised this epoch."""
        return tuple(self._promised())

    def answer(self, voter: Voter) -> Promise:
        """What a voter that has answered said last."""
        return self._answers[voter.store_id]

    @property
    def ahead(self) -> tuple[Voter, ...]:
        """The data voters that promised and whose log is more up to date than ours; the best first."""
        promised = self._promised()
        found = [
            (promised[v.store_id].last, v)
            for v in self._data_voters()
            if v.store_id in promised and promised[v.store_id].last > self.own.last
        ]
        return tuple(v for _, v in sorted(found, key=lambda pair: pair[0], reverse=True))

    @property
    def fetch(self) -> Fetch | None:
        """What to take over before the epoch start; ``None`` when nobody that promised is ahead."""
        if not self.ahead:
            return None
        voter = self.ahead[0]
        theirs, own = self._answers[voter.store_id], self.own
        after = own.epochs.common(own.last.offset, theirs.epochs, theirs.last.offset)
        return Fetch(
            voter=voter,
            after=Position(own.epochs.epoch_at(after), after),
            to=theirs.last,
            below_committed=after < own.committed,
        )

    @property
    def committed(self) -> int:
        """Through which offset those that promised know our log, as it is now, to be committed.

        Unique epochs make a record of the same epoch at the same offset the same record; what somebody knows
        of another branch says nothing of ours.
        """
        own = self.own
        return max(
            p.committed
            for p in self._promised().values()
            if p.committed <= own.last.offset
            and p.epochs.epoch_at(p.committed) == own.epochs.epoch_at(p.committed)
        )

    @property
    def highest_seen(self) -> int:
        """The highest epoch that anybody promised or wrote in."""
        return max(max(p.epoch, p.last.epoch) for p in self._answers.values())

    def next_epoch(self, member: int) -> int:
        """The epoch for another attempt of the voter with this member number."""
        return epoch_after(max(self.highest_seen, self.epoch), member)

    # How.

    def _promised(self) -> dict[bytes, Promise]:
        return {i: p for i, p in self._answers.items() if p.epoch == self.epoch}

    def _data_voters(self) -> tuple[Voter, ...]:
        found = {v.store_id: v for rule in self._rules for v in rule.voters if not v.witness}
        return tuple(found.values())

    def _fence(self, stores: dict[bytes, Promise]) -> bool:
        return all(self._count(rule, stores) >= rule.fence for rule in self._rules)

    def _most(self, stores: dict[bytes, Promise], outside: bool) -> bool:
        """Any two such sets share a voter, or both have the word of the service outside."""
        return all(most(rule, stores, outside=outside) for rule in self._rules)

    @staticmethod
    def _count(rule: Configuration, stores: dict[bytes, Promise]) -> int:
        return sum(v.store_id in stores for v in rule.voters if v.counts)
