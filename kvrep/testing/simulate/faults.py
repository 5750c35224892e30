"""Deliberate faults, planted from outside, to see whether the simulation finds them.

Each replaces a few functions of the code under test, or of the shell that stands for the runtime, for as long
as one run lasts; the product itself has no switches for this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from kvrep.model.configuration import Configuration
from kvrep.model.position import ZERO, Position, epoch_after
from kvrep.replication import acks
from kvrep.replication.acks import CommitTracker
from kvrep.replication.ballots import PromiseRequest
from kvrep.replication.election import Election, GivePromise, Standing, candidate
from kvrep.replication.join import Continue, plan_join
from kvrep.replication.messages import Refused, Truncate
from kvrep.replication.promises import Verdict, judge
from kvrep.replication.promotion import Promotion
from kvrep.replication.receiver import Append, Commit, Receiver
from kvrep.testing.simulate import feeding, node, promoting
from kvrep.testing.simulate.degrading import Degrading
from kvrep.testing.simulate.disk import Disk
from kvrep.testing.simulate.feeding import Feeding
from kvrep.testing.simulate.following import Following, Inbound
from kvrep.testing.simulate.node import Node

__all__ = ["PLANTS", "Plant", "planted"]

Change = tuple[Any, str, Any]
"""(where, name, what stands there instead)."""


@dataclass(frozen=True, slots=True)
class Plant:
    line: str
    """What the code does wrong, in one line."""
    changes: Callable[[], list[Change]]


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The code is wrong in this way meanwhile; ``KeyError`` when there is no such fault, nothing for ``""``."""
    changes = PLANTS[name].changes() if name else []
    before = [(where, what, where.__dict__[what]) for where, what, _ in changes]
    try:
        for where, what, new in changes:
            setattr(where, what, new)
        yield
    finally:
        for where, what, old in before:
            setattr(where, what, old)


# -- what is synced --------------------------------------------------------------------------------


def _ack_before_sync() -> list[Change]:
    later = Inbound.sync

    def sync(self: Inbound) -> None:
        self._do(self.receiver.appended(self._node.disk.last))
        later(self)

    return [(Inbound, "sync", sync)]


def _commit_before_own_sync() -> list[Change]:
    later = Feeding.sync

    def sync(self: Feeding) -> None:
        self._durable(self.node.disk.end)
        later(self)

    return [(Feeding, "sync", sync)]


def _apply_before_commit() -> list[Change]:
    return [(Node, "flush_through", lambda self: self.disk.end)]


def _show_before_commit() -> list[Change]:
    honest = Receiver.appended

    def appended(self: Receiver, last: Position) -> Any:
        return [*honest(self, last), Commit(last.offset)]

    return [(Receiver, "appended", appended)]


# -- promises --------------------------------------------------------------------------------------


def _vote_not_persisted() -> list[Change]:
    crash = Node.crash
    stored: dict[Node, tuple[int, bytes]] = {}

    def store(self: Node, epoch: int, to: bytes) -> None:
        stored.setdefault(self, (self.disk.promised, self.disk.promised_to))
        self.disk.promised, self.disk.promised_to = epoch, to

    def forget(self: Node, *, power: bool) -> None:
        crash(self, power=power)
        if power and self in stored:
            self.disk.promised, self.disk.promised_to = stored.pop(self)

    return [(Node, "store_promise", store), (Node, "crash", forget)]


def _promise_forgotten() -> list[Change]:
    recover = Disk.recover

    def forgetful(self: Disk) -> int:
        self.promised, self.promised_to = self.epochs.last_epoch, b""
        return recover(self)

    return [(Disk, "recover", forgetful)]


def _stale_epoch_accepted() -> list[Change]:
    def store(self: Inbound, action: Append) -> None:
        self._node.world.check.obeys(self._node, self.receiver.epoch)
        self._node.append(action.data)

    def deaf(*_: Any) -> None:
        return None

    return [
        (Inbound, "store", store),
        (Following, "promised", deaf),
        (Receiver, "promised", deaf),
        (Receiver, "_stale", lambda self: []),
    ]


def _promise_to_two() -> list[Change]:
    def careless(epoch: int, store_id: bytes, *, promised: int, promised_to: bytes) -> Verdict:
        verdict = judge(epoch, store_id, promised=promised, promised_to=promised_to)
        return Verdict.NEW if epoch == promised else verdict

    return [(node, "judge", careless), *_shared_epochs()]


def _shared_epochs() -> list[Change]:
    def after(epoch: int, _: int) -> int:
        return epoch_after(epoch, 1)

    return [(candidate, "epoch_after", after), (promoting, "epoch_after", after)]


# -- promotions ------------------------------------------------------------------------------------


def _fence_too_few() -> list[Change]:
    honest = Configuration.__dict__["fence"].fget
    return [(Configuration, "fence", property(lambda self: max(1, honest(self) - 1)))]


def _no_fetch() -> list[Change]:
    return [
        (Promotion, "fetch", property(lambda self: None)),
        (Promotion, "ahead", property(lambda self: ())),
    ]


def _lowered_in_silence() -> list[Change]:
    return [(Degrading, "_ask", lambda self, what, then: then())]


def _lowered_forgotten() -> list[Change]:
    return [(Promotion, "lacks", property(lambda self: False)), (Node, "standing", _unlowered(Node.standing))]


def _unlowered(standing: Callable[[Node], Standing]) -> Callable[[Node], Standing]:
    return lambda self: replace(standing(self), lowered=ZERO)


# -- joins -----------------------------------------------------------------------------------------


def _no_checksum_at_join() -> list[Change]:
    return [(feeding, "check_running", lambda plan, *_: plan)]


def _log_not_cut() -> list[Change]:
    def lenient(hello: Any, view: Any) -> Any:
        plan = plan_join(hello, view)
        return Continue(at=hello.last, protocol=1) if isinstance(plan, Truncate) else plan

    return [(feeding, "plan_join", lenient), *_no_checksum_at_join()]


# -- mistakes that were really there ---------------------------------------------------------------


def _empty_log_refused() -> list[Change]:
    def strict(hello: Any, view: Any) -> Any:
        if hello.lineage and hello.branch not in (view.branch, *view.ancestors):
            return Refused(reason="lineage", message="it holds a history that was forced apart")
        return plan_join(hello, view)

    return [(feeding, "plan_join", strict)]


def _founding_once_only() -> list[Change]:
    def empty(self: Standing) -> bool:
        return not self.lineage and self.last == ZERO and not self.rules

    return [(Standing, "empty", property(empty))]


def _empty_voter_never_promises() -> list[Change]:
    honest = Election.on_promise_request

    def strict(self: Election, request: PromiseRequest, now: float) -> GivePromise | str:
        if request.lineage and not self.own.lineage:
            return "this node is empty"
        return honest(self, request, now)

    return [(Election, "on_promise_request", strict)]


# -- commits ---------------------------------------------------------------------------------------


def _commit_by_counting() -> list[Change]:
    class Counting(CommitTracker):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.epoch_start = 0

    return [(feeding, "CommitTracker", Counting)]


def _acks_of_non_voters() -> list[Change]:
    def reached(self: Any, synced: dict[bytes, int]) -> int:
        held = sorted(synced.values(), reverse=True)
        copies: int = self.configuration.copies
        return held[copies - 1] if len(held) >= copies else 0

    return [(acks._Rule, "reached", reached)]


def _acks_counted_twice() -> list[Change]:
    def reached(self: Any, synced: dict[bytes, int]) -> int:
        held = sorted((synced.get(i, 0) for i in self.voters for _ in range(2)), reverse=True)
        copies: int = self.configuration.copies
        return held[copies - 1]

    return [(acks._Rule, "reached", reached)]


def _old_rule_forgotten() -> list[Change]:
    honest = CommitTracker.propose

    def propose(self: CommitTracker, offset: int, configuration: Configuration) -> None:
        honest(self, offset, configuration)
        self._effective = self._proposed.pop()[1]

    return [(CommitTracker, "propose", propose)]


def _bound_ignored() -> list[Change]:
    return [(CommitTracker, "_rule", lambda self, configuration: acks._Rule(configuration, self._self))]


def _configure_too_early() -> list[Change]:
    return [(CommitTracker, "may_propose", property(lambda self: not self._proposed))]


PLANTS: dict[str, Plant] = {
    "ack-before-sync": Plant("a follower acks what it has written and not yet synced", _ack_before_sync),
    "commit-before-own-sync": Plant(
        "a primary counts its own copy before it is synced", _commit_before_own_sync
    ),
    "apply-before-commit": Plant("a flush takes over what is not committed", _apply_before_commit),
    "show-before-commit": Plant("a follower shows what it has stored", _show_before_commit),
    "vote-not-persisted": Plant("a promise is answered and not synced", _vote_not_persisted),
    "promise-forgotten": Plant("a restarted node knows its promise from its log only", _promise_forgotten),
    "stale-epoch-accepted": Plant(
        "a follower goes on with its stream after promising a higher epoch", _stale_epoch_accepted
    ),
    "promise-to-two": Plant("one epoch is promised to whoever asks for it", _promise_to_two),
    "shared-epochs": Plant("epochs are plain numbers, without the member's own", _shared_epochs),
    "fence-too-few": Plant("a promotion fences one voter too few", _fence_too_few),
    "no-fetch": Plant("a promotion does not fetch what a fenced voter has more", _no_fetch),
    "no-checksum-at-join": Plant("a join compares epochs only, not the checksum", _no_checksum_at_join),
    "log-not-cut": Plant("a follower keeps its divergent tail and goes on behind it", _log_not_cut),
    "commit-by-counting": Plant(
        "records of an older epoch commit without one of the new epoch", _commit_by_counting
    ),
    "acks-of-non-voters": Plant("acks of nodes that do not vote are counted", _acks_of_non_voters),
    "acks-counted-twice": Plant("every copy is counted twice", _acks_counted_twice),
    "old-rule-forgotten": Plant(
        "a changed configuration counts before the old rule has committed it", _old_rule_forgotten
    ),
    "configure-too-early": Plant(
        "a configuration changes before the epoch start is committed", _configure_too_early
    ),
    "bound-ignored": Plant("with acks=0 nobody looks how far the other voters are behind", _bound_ignored),
    "lowered-in-silence": Plant(
        "a rule goes on with fewer copies before most voters know", _lowered_in_silence
    ),
    "lowered-forgotten": Plant(
        "a promotion does not ask since when fewer copies may have been enough", _lowered_forgotten
    ),
    "empty-log-refused": Plant(
        "a follower that lost its first stream before its first record is refused (once real)",
        _empty_log_refused,
    ),
    "founding-once-only": Plant(
        "a founder that stopped before its first record was safe founds no more (once real)",
        _founding_once_only,
    ),
    "empty-voter-never-promises": Plant(
        "voters that have no record yet never promise, so a founder that stopped is stuck (once real)",
        _empty_voter_never_promises,
    ),
}
