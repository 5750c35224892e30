"""Whether this node leads, and in which epoch: asking for promises by the streams of followers, beginning,
being superseded, beginning again above.

A restart is a promotion by streams: the primary that was asks its followers as they connect. Any other
promotion comes from ``runtime/promoting.py`` or a coordinator and ends in :meth:`Leadership.take_over`.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from kvrep.errors import (
    Error,
    Fenced,
    NotEnoughFollowers,
    NotPrimary,
    StaleRead,
    StorageFailed,
    StorageFull,
    again,
)
from kvrep.model.configuration import Configuration, Voter
from kvrep.model.position import EPOCH_MAX, member_of
from kvrep.replication.acks import CommitTracker
from kvrep.replication.messages import Promise, Refused
from kvrep.replication.promotion import Promotion, why_not_go_on
from kvrep.runtime.promoting import Peer, promise_of, rules_of
from kvrep.status import EventKind

if TYPE_CHECKING:
    from kvrep.runtime.followers import Followers
    from kvrep.runtime.node import Node

__all__ = ["Leadership", "nothing_commits"]

log = logging.getLogger("kvrep.replication")

ASK_S_MAX = 3.0
"""How long an asynchronous primary waits at its start for followers that were voters."""


class _Rival(NamedTuple):
    """A higher epoch than ours that a voter, or this node itself, has promised."""

    epoch: int
    since_s: float
    """Since when it is known. The monotonic clock; earlier where nobody needs to be waited for."""
    address: str
    """Where the node is that it was promised to; empty when that is not known."""


class Leadership:
    """One per role as primary. Any thread."""

    def __init__(self, node: Node, followers: Followers) -> None:
        self._node = node
        self._engine = node.engine
        self._followers = followers
        self.epoch = 0
        """The epoch that this node feeds in; 0 while it is collecting promises."""
        self.fenced = False
        """Whether that epoch was made by a full fence."""
        self.forced = False
        """Whether it was made by force: then followers may be told to drop what they know to be committed."""
        self.open = False
        """Whether the epoch start is in order, so that writes may follow it."""
        self.over = False
        """Whether this role has ended; no epoch of it begins any more."""
        # Protects everything here. Taken inside the committer's ``lead`` and before the lock of the followers;
        # no stream is called while it is held.
        self._lock = threading.Lock()
        self._promotion: Promotion | None = None
        self._beginning = False
        """Whether some thread begins the epoch of what was the promotion."""
        self._rival: _Rival | None = None
        self._problem = "this node is not a primary yet"
        self._unfenced_at = float("inf")
        """When an asynchronous primary goes on without the promises that are still missing."""
        self._led = False
        """Whether an epoch of this role has begun: then it was replaced, not restarted."""
        self._held = False
        """Whether this node lacks what it had acknowledged: it never asks to be primary by itself."""
        self.replaced = False
        """Whether records of another primary of a higher epoch were seen: this node must fetch them before it
        may go on, as only a whole promotion does."""
        # Announces that an epoch has begun or could not, and that its start is committed.
        self._begun = threading.Condition()

    # -- what it is --------------------------------------------------------------------------------

    @property
    def leading(self) -> bool:
        """Whether this node's epoch has begun and no higher one is known."""
        return self.open and self._rival is None

    @property
    def primary_address(self) -> str:
        """Where the primary is, as far as this node knows: here, unless a higher epoch is known."""
        rival = self._rival
        return self._node.address if rival is None else rival.address

    def superseded_s(self, now: float) -> float:
        """For how long a higher epoch has been known in which no primary has shown itself; 0 without one."""
        rival = self._rival
        return now - rival.since_s if rival is not None else 0.0

    def stage(self) -> tuple[int, int]:
        """(the epoch that promises are asked for, the epoch that this node feeds in); 0 for none."""
        with self._lock:
            if self.over:
                return 0, 0
            return (self._promotion.epoch if self._promotion is not None else 0), self.epoch

    def check(self) -> None:
        """Raise unless the epoch has begun and the store is open; followers may be missing."""
        if not self.open:
            raise self._not_yet()
        closed = self._engine.committer.closed
        if closed is not None:
            raise again(closed)

    def check_writable(self) -> None:
        """Raise what refuses a user's write now: the engine's ``writable``."""
        self.check()
        tracker = self._followers.tracker
        if tracker is None:
            raise self._not_yet()
        configuration = tracker.configuration
        if configuration.acks == 0 and tracker.proposed is None:
            if time.monotonic() > self._node.coordinator.confirmed_until:
                raise NotPrimary("most voters have not confirmed this primary for too long",
                                 hint="reach the other voters", primary_address=None, epoch=self.epoch)  # fmt: skip
            if not configuration.lag_records_max:
                return
        self._followers.check_enough(tracker)

    @property
    def short_of_copies(self) -> bool:
        """Whether this node leads, and refuses writes because too few others are there."""
        try:
            self.check_writable()
        except NotEnoughFollowers:
            return self.leading
        except Error:
            return False
        return False

    def _not_yet(self) -> NotPrimary:
        return NotPrimary(
            self._problem, hint="start the missing voters", epoch=self.epoch, primary_address=None
        )

    def no_more(self) -> NotPrimary:
        """The error for who counted on this node's being primary."""
        rival = self._rival
        return NotPrimary(
            self._problem or "this node is the primary no more",
            primary_address=(rival.address if rival is not None else "") or None,
            epoch=rival.epoch if rival is not None else self.epoch,
        )

    # -- asking for promises -----------------------------------------------------------------------

    def start(self) -> None:
        """Begin an epoch, or begin to collect the promises that it takes.

        With ``acks=0`` the voters are asked, too, for as long as those that are there need to connect; then
        this node goes on without the others, marked as unfenced.
        """
        self._withhold()
        self._ask_above(0)
        if not self.open:
            self._node.roles.seek()
        if not self._engine.configuration.synchronous:
            with self._begun:
                while self._promotion is not None and not self.over:
                    left = self._unfenced_at - time.monotonic()
                    if left <= 0:
                        break
                    self._begun.wait(left)
            self._begin_unfenced()
            with self._begun:  # a follower's promise, or the clock, may have come first
                self._begun.wait_for(lambda: not self._beginning or self.over, ASK_S_MAX)

    def hold(self, problem: str) -> None:
        """Do not even ask to be primary, because of ``problem``; look for another one."""
        self._withhold()
        self._problem, self._held = problem, True
        self._node.roles.seek()

    def resume(self) -> None:
        """After :meth:`suspend`: ask for promises again, by the streams of followers."""
        self._withhold()
        if not self._held:
            self._ask_above(0)

    def _ask_above(self, seen: int) -> None:
        """Ask for promises of an epoch above ``seen``; begin at once where nobody has to be asked."""
        engine, home = self._engine, self._engine.home
        epoch = self._node.next_epoch(seen)
        if not engine.configurations_in_force()[0].voters:
            self._begin(epoch, (home.store_id,), unfenced=False)
            return
        if engine.configuration.voter(home.store_id) is None:
            self._problem = "this node is not a voter of its own configuration"
            return
        promotion = self._promise(epoch)
        with self._lock:
            if self.over:
                return
            self._promotion = promotion
            if not engine.configuration.synchronous:
                ask_s = min(ASK_S_MAX, self._node.options.reconnect_backoff_max_s + 0.5)
                self._unfenced_at = time.monotonic() + ask_s
        self._try_to_begin()

    def _promise(self, epoch: int) -> Promotion:
        """Promise ``epoch`` to ourselves, durably; returns what it takes to begin it."""
        home = self._engine.home
        home.promise(epoch, home.store_id)
        effective, rules = rules_of(self._engine)
        return Promotion(effective, home.store_id, epoch, promise_of(self._node, epoch), proposed=rules)

    def on_promise(self, store_id: bytes, promise: Promise) -> None:
        """A follower answered a Fence."""
        with self._lock:
            if self._promotion is not None:
                self._promotion.on_promise(store_id, promise)
        self.heard(store_id, promise.epoch)
        self._try_to_begin()

    def heard(self, store_id: bytes, seen: int) -> None:
        """A follower has promised, or holds records of, epoch ``seen``: ask above it."""
        if not 0 < self.stage()[0] < seen or not self._votes(store_id):
            return
        epoch = self._next_epoch(seen)
        if not epoch:
            return
        promotion = self._promise(epoch)
        with self._lock:
            if self._promotion is None or self._promotion.epoch >= epoch:
                return
            self._promotion = promotion
        self._followers.proceed()

    def _votes(self, store_id: bytes) -> bool:
        """Whether the word of this store can bind us: strangers cannot fence a primary."""
        return any(c.voter(store_id) is not None for _, c in self._engine.configurations[-8:])

    def _next_epoch(self, seen: int) -> int:
        """An epoch of ours above ``seen``; 0 when there is none."""
        epoch = self._node.next_epoch(seen)
        if epoch <= EPOCH_MAX:
            return epoch
        log.error(
            "%s: a voter claims to have promised epoch %d, the last one there is", self._node.label, seen
        )
        return 0

    # -- beginning ---------------------------------------------------------------------------------

    def _try_to_begin(self) -> None:
        with self._lock:
            promotion = self._promotion
            if promotion is None or self.over:
                return
            if not promotion.enough:
                names = ", ".join(promotion.missing)
                count = promotion.needed - 1
                self._problem = (
                    f"this node was primary before and waits for the promises of {count} of its voters"
                    f" before it may write again (missing: {names})"
                )
                return
            if promotion.lacks:
                self._problem = f"records from {promotion.lowered} on were acknowledged without this node"
                return
            problem = self._why_not(promotion)
            if problem:
                self._problem = problem
                best = promotion.answer(promotion.ahead[0])
                if not self._led or member_of(best.last.epoch) == self._member():
                    return
                # Its records are to be fetched, which only a whole promotion does: see Roles.
                long_ago = time.monotonic() - self._node.options.heartbeat_timeout_s
                self.replaced, self._rival = True, _Rival(promotion.epoch, long_ago, "")
            self._promotion, self._beginning = None, not problem
        if problem:
            self._node.roles.seek()
        else:
            self._begin_with(promotion, unfenced=False)

    def _why_not(self, promotion: Promotion) -> str:
        """Why the log of a voter that has promised forbids to begin; empty when it does not."""
        return self._lost(promotion.own, [(voter, promotion.answer(voter)) for voter in promotion.ahead])

    def lost(self, peers: list[Peer]) -> str:
        """The same, of voters that were only asked."""
        answers = [(p.voter, p.promise) for p in peers if not p.voter.witness]
        return self._lost(promise_of(self._node, 0), answers)

    def _lost(self, held: Promise, answers: list[tuple[Voter, Promise]]) -> str:
        synchronous = self._engine.configuration.synchronous
        return why_not_go_on(held, answers, self._member(), synchronous=synchronous)

    def _member(self) -> int:
        voter = self._engine.configuration.voter(self._engine.home.store_id)
        return voter.member if voter is not None else 0

    def _begin_with(self, promotion: Promotion, *, unfenced: bool) -> None:
        """Begin what is beginning, unless a higher epoch was promised meanwhile or it cannot be stored."""
        try:
            self._begin(promotion.epoch, promotion.promised, unfenced=unfenced)
        except Fenced as error:
            with self._lock:
                if not self.over and (self._rival is None or self._rival.epoch < error.epoch):
                    self._rival = _Rival(error.epoch, time.monotonic(), "")
                self._problem = error.message
            self._node.roles.seek()
        except (OSError, StorageFailed, StorageFull) as error:
            log.error("%s: the epoch could not begin: %s", self._node.label, error)
            with self._lock:  # tried again in a while, as if somebody had promised this epoch away
                self._problem = f"the epoch could not begin: {error}"
                self._rival = self._rival or _Rival(promotion.epoch, time.monotonic(), "")
        finally:
            with self._begun:
                self._beginning = False
                self._begun.notify_all()

    def _begin_unfenced(self) -> None:
        """Go on without those that did not answer, as only the asynchronous mode may."""
        with self._lock:
            promotion = self._promotion
            if promotion is None or self.over or self._why_not(promotion):
                return
            self._promotion, self._beginning = None, True
        log.warning("%s: goes on without the promises of %s", self._node.label, ", ".join(promotion.missing))
        self._begin_with(promotion, unfenced=not promotion.enough)
        self._node.roles.seek()

    def take_over(
        self,
        epoch: int,
        fenced: tuple[bytes, ...],
        forced: Configuration | None,
        *,
        founding: Configuration | None = None,
        unfenced: bool = False,
    ) -> None:
        """Be primary in ``epoch``, which ``fenced`` have promised.

        ``forced``: the configuration from then on; ``founding``: that of a new group. Raises
        :class:`Fenced` when a higher epoch was promised meanwhile.
        """
        self._withhold()
        self.forced = forced is not None or unfenced  # with acks=0 an election drops what nobody else had
        self._begin(epoch, fenced, unfenced=unfenced or forced is not None, forced=forced, founding=founding)

    def _begin(
        self,
        epoch: int,
        fenced: tuple[bytes, ...],
        *,
        unfenced: bool,
        forced: Configuration | None = None,
        founding: Configuration | None = None,
    ) -> None:
        """Raises :class:`Fenced` or ``OSError``; then nothing has changed."""
        node, engine = self._node, self._engine
        given = forced or founding
        effective, proposed = (given, None) if given is not None else engine.configurations_in_force()

        def prepare() -> None:
            tracker = CommitTracker(
                effective if effective.voters else node.first_configuration(),
                engine.home.store_id,
                epoch_start=engine.tail.offset + 1,
                committed=engine.committer.committed,
                proposed=proposed,
            )
            with self._lock:
                if self.over:
                    raise Fenced(f"this role of {node.label} has ended", epoch=epoch)
                self._followers.begin(tracker)
                self.fenced = not unfenced
                self.epoch = epoch
                self._rival, self.replaced = None, False
            engine.committer.rule = self._followers.rule

        try:
            node.begin_epoch(
                epoch, fenced=fenced, unfenced=unfenced, forced=forced, founding=founding, prepare=prepare
            )
        except BaseException:
            with self._lock:
                self._followers.end()
                self.epoch = 0
            raise
        with self._lock:
            self._problem = ""
            self.open = self._led = True
        with self._begun:
            self._begun.notify_all()
        self._followers.proceed()
        log.info("%s: primary in epoch %d", node.label, epoch)
        node.tell(EventKind.PRIMARY, epoch=epoch)
        node.link.knows(epoch)

    # -- reads before the epoch start is committed -------------------------------------------------

    def _withhold(self) -> None:
        """Some of what is not committed may have been acknowledged: a primary that did not show it would read
        backwards, so nothing is shown before the epoch start is committed, and all of it with it."""
        engine = self._engine
        if not self.open and engine.tail.offset > engine.committer.committed:
            engine.view.withheld = self._await_epoch

    def _await_epoch(self) -> None:
        """A read meanwhile. ``StaleRead`` when that takes longer than an ack may take."""
        deadline = time.monotonic() + self._node.ack_timeout_s
        with self._begun:
            while self._engine.view.withheld is not None and not self.over:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise StaleRead(
                        "this node was primary before and cannot tell yet which of its last writes count:"
                        f" {self._problem or 'its epoch start is not committed'}",
                        position=self._engine.committed_position,
                        hint="start the missing voters",
                    )
                self._begun.wait(left)

    def reveal(self) -> None:
        """The epoch start is committed."""
        with self._begun:
            self._engine.view.withheld = None
            self._begun.notify_all()

    # -- a higher epoch ----------------------------------------------------------------------------

    def promised_away(self, epoch: int, address: str) -> None:
        """This node itself has promised ``epoch`` to the node at ``address``: nothing is acknowledged any
        more. If no primary of that epoch shows itself, this node asks to be primary above it."""
        with self._lock:
            asking = self._promotion.epoch if self._promotion is not None else 0
            rival = self._rival.epoch if self._rival is not None else 0
            if self.over or epoch <= max(rival, self.epoch, asking):
                return
            self._promotion = None
            self._rival = _Rival(epoch, time.monotonic(), address)
            self._problem = f"this node has promised epoch {epoch} to {address or 'another node'}"
        log.warning("%s: promised epoch %d to %s", self._node.label, epoch, address or "another node")
        self._fence(epoch, address)

    def superseded(self, store_id: bytes, seen: int, *, written: int, follows: bool = False) -> None:
        """A voter has promised epoch ``seen``, above ours, and holds records of epoch ``written``.

        This node may not write any more. If no primary of that epoch shows itself, it begins again above it:
        soon, if the epoch is the voter's own and it ``follows`` all the same, because then it has given up.
        """
        if not self._votes(store_id):
            log.warning("%s: a store that does not vote claims epoch %d; ours is %d",
                        self._node.label, seen, self.epoch)  # fmt: skip
            return
        with self._lock:
            rival = self._rival.epoch if self._rival is not None else 0
            if not self.epoch or seen <= max(rival, self.epoch):
                return
            since_s = time.monotonic()
            voter = self._engine.configuration.voter(store_id)
            if follows and voter is not None and voter.member == member_of(seen):
                since_s -= self._node.options.heartbeat_timeout_s
            self._rival = _Rival(seen, since_s, "")
            if written > self.epoch and member_of(written) != self._member():
                self.replaced = True
        log.warning("%s: fenced by epoch %d", self._node.label, seen)
        self._fence(seen, "")
        self._node.roles.seek()

    def _fence(self, epoch: int, address: str) -> None:
        self._followers.end()  # what is logged now waits for the new primary's word
        self._node.tell(EventKind.FENCED, epoch=epoch, address=address)
        self._engine.committer.refuse(
            Fenced(f"epoch {epoch} is newer than {self.epoch}", epoch=epoch, primary_address=address or None)
        )

    def tick(self, now: float) -> None:
        """Twice a second: what needs no event to happen."""
        self.renew(now)
        if now >= self._unfenced_at and self._promotion is not None:
            self._begin_unfenced()

    def renew(self, now: float) -> None:
        """A voter promised a higher epoch in which nobody has written since: be primary above it."""
        with self._lock:
            rival = self._rival
            if rival is None or self.replaced or self._held or self.over:
                return
            if now - rival.since_s < self._node.options.heartbeat_timeout_s:
                return
        if not self._next_epoch(rival.epoch):
            return
        if not self._node.roles.lock.acquire(blocking=False):
            return  # a change of roles is under way; at the next tick
        try:
            log.warning("%s: nobody became primary in epoch %d; this node tries again above it",
                        self._node.label, rival.epoch)  # fmt: skip
            self.suspend(f"this node asks to be primary above epoch {rival.epoch}")
            self._ask_above(rival.epoch)
        finally:
            self._node.roles.lock.release()

    # -- the end -----------------------------------------------------------------------------------

    def suspend(self, problem: str) -> None:
        """Write and feed nothing, ask nobody, until :meth:`resume` or the end of this role."""
        with self._lock:
            if self.over:
                return
            self._promotion = self._rival = None
            self.open = False
            self.epoch = 0
            self._problem = problem
            self._followers.end()
        self._followers.drop(Refused(reason="starting", message="promises are asked for again"))
        self._end_epoch(NotPrimary(problem, primary_address=None, epoch=None))

    def retire(self, error: Error) -> None:
        """This role is over: no epoch of it can begin any more, and nothing is committed by it."""
        with self._lock:
            self.over = True
            self._promotion = None
            self._followers.end()
        self._end_epoch(error)
        with self._engine.committer.lead:
            self._engine.committer.rule = nothing_commits

    def _end_epoch(self, error: Error) -> None:
        """Nothing more is written or committed by this role. What is logged waits for its outcome."""
        committer = self._engine.committer
        committer.refuse(error)
        with committer.lead:
            committer.end_epoch(error)
            committer.on_written = None

    def stop(self) -> None:
        """Wake those who wait for an epoch: there will be none."""
        with self._lock:
            self.over = True
        with self._begun:
            self._begun.notify_all()


def nothing_commits(durable: int) -> int:
    """The rule of a follower: only its primary says what is committed."""
    del durable
    return 0
