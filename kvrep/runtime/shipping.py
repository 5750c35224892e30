"""The primary's side of replication: becoming primary, feeding followers, counting their acks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrep.errors import (
    AckTimeout,
    Error,
    Fenced,
    NotEnoughFollowers,
    NotPrimary,
    Overloaded,
    ProtocolError,
    StaleRead,
    StorageFailed,
    StorageFull,
    again,
)
from kvrep.model.configuration import Acks, Configuration, Voter
from kvrep.model.position import EPOCH_MAX, Position, member_of
from kvrep.replication.acks import CommitTracker, Level
from kvrep.replication.join import voter_change
from kvrep.replication.messages import Ack, Promise, Refused, SlotState
from kvrep.replication.promotion import Promotion
from kvrep.replication.rounds import Rounds
from kvrep.runtime.degrading import Degrading
from kvrep.runtime.session import FollowerSession
from kvrep.runtime.slots import Slots
from kvrep.runtime.spooling import Spools
from kvrep.status import EventKind, FollowerStatus
from kvrep.storage.write import Write

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.runtime.promoting import Peer

__all__ = ["Shipping", "nothing_commits"]

log = logging.getLogger("kvrep.replication")

ASK_S_MAX = 3.0
"""How long an asynchronous primary waits at its start for followers that were voters."""
ASYNC_LINGER_S = 0.008
ADMIT_LAG_RECORDS = 1000
"""How far behind a follower may be to count as caught up: it is made a voter then."""


class Shipping:
    """One per node that is, or is becoming, primary."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.engine = node.engine
        self.options = node.options
        self.epoch = 0
        """The epoch that this node feeds in; 0 while it is collecting promises."""
        self.fenced = False
        """Whether that epoch was made by a full fence."""
        self.forced = False
        """Whether it was made by force: then followers may be told to drop what they know to be committed."""
        # Until an epoch begins, nothing that is logged here may be taken for committed.
        self.engine.committer.rule = nothing_commits
        self.slots = Slots(self.engine.home.path / "SLOTS")
        self.spools = Spools(self.engine, node.label, self.slots)
        # Protects everything below. Taken inside the committer's ``lead`` and before its ``_order``, never
        # the other way round; no session is called while it is held.
        self._lock = threading.Lock()
        self._sessions: dict[bytes, FollowerSession] = {}
        self._joined: dict[bytes, FollowerSession] = {}
        """Those whose join is verified: they can store a copy."""
        self._promotion: Promotion | None = None
        self._tracker: CommitTracker | None = None
        self._open = False
        """Whether the epoch start is in order, so that writes may follow it."""
        self._configuring: Write | None = None
        self._problem = "this node is not a primary yet"
        self._unfenced_at = float("inf")
        """When an asynchronous primary goes on without the promises that are still missing."""
        self._complaints: set[str] = set()
        self._superseded_by = 0
        self._superseded_s = 0.0
        self._superseded_address = ""
        """Where the node is that a higher epoch was promised to; empty when that is not known."""
        self._led = False
        """Whether an epoch of this role has begun: then it was replaced, not restarted."""
        self._held = False
        """Whether this node lacks what it had acknowledged: it never asks to be primary by itself."""
        self._replaced = False
        """Whether records of another primary of a higher epoch were seen: this node must fetch them before it
        may go on, as only a whole promotion does."""
        self._told: Configuration | None = None
        """The configuration in force when protection was last looked at."""
        self._announced = 0
        """The last offset that followers were told to fetch."""
        self._stopped = False
        # Announces acks to writes that wait for more than the commit rule, and the begin of the epoch.
        self._acked = threading.Condition()
        self._more_waiting = 0
        self._rounds = Rounds(self.engine.home.store_id)
        # Announces answers to reads that wait for them, and the end of the epoch. Before ``_lock``.
        self._confirmed = threading.Condition()
        self.degrading = Degrading(self)

    # -- becoming primary --------------------------------------------------------------------------

    def start(self) -> None:
        """Begin an epoch, or begin to collect the promises that it takes.

        With ``acks=0`` the voters are asked, too, for as long as those that are there need to connect; then
        this node goes on without the others, marked as unfenced.
        """
        engine = self.engine
        self._hook()
        self._become(0)
        if not self._open:
            self.node.roles.seek()
        if not engine.configuration.synchronous:
            self._await_begin()
            self._begin_unfenced()

    def _hook(self) -> None:
        engine = self.engine
        engine.writable = self._check_writable
        engine.keep_from = self._keep_from
        engine.on_tick = self._tick
        engine.flush_limit = self._flush_limit
        if not self._open and engine.tail.offset > engine.committer.committed:
            # Some of these may have been acknowledged: a primary that did not show them would read backwards.
            engine.view.withheld = self._await_epoch

    def _flush_limit(self) -> int | None:
        """In asynchronous mode, what no voter has confirmed stays out of LMDB for a while: should another
        node be promoted, this one can cut its log instead of fetching a whole copy. ``None``: no limit."""
        configuration = self.engine.configuration
        if configuration.synchronous or configuration.data_voters < 2:
            return None
        others = (v.store_id for v in configuration.voters if v.store_id != self.engine.home.store_id)
        return max((slot.acked for i in others if (slot := self.slots.get(i)) is not None), default=0)

    def _become(self, seen: int) -> None:
        """Ask for promises of an epoch above ``seen``; begin at once where nobody has to be asked."""
        engine, home = self.engine, self.engine.home
        effective, proposed = self.engine.configurations_in_force()
        epoch = self.node.next_epoch(seen)
        if not effective.voters:
            self._begin(epoch, (home.store_id,), unfenced=False)
            return
        if engine.configuration.voter(home.store_id) is None:
            self._problem = "this node is not a voter of its own configuration"
            return
        home.promise(epoch, home.store_id)
        rules = () if proposed is None else (proposed[1],)
        own = self._own_promise(epoch)
        with self._lock:
            if self._stopped:
                return
            self._promotion = Promotion(effective, home.store_id, epoch, own, proposed=rules)
            if not engine.configuration.synchronous:
                ask_s = min(ASK_S_MAX, self.options.reconnect_backoff_max_s + 0.5)
                self._unfenced_at = time.monotonic() + ask_s
        self._try_to_begin()

    def _own_promise(self, epoch: int) -> Promise:
        engine = self.engine
        tail = engine.tail
        return Promise(
            epoch=epoch,
            last=Position(tail.epoch, tail.offset),
            committed=engine.committer.committed,
            epochs=engine.epochs,
            lowered=engine.home.lowered,
        )

    @property
    def leading(self) -> bool:
        """Whether this node's epoch has begun and no higher one is known."""
        return self._open and not self._superseded_by

    @property
    def primary_address(self) -> str:
        """Where the primary is, as far as this node knows: here, unless a higher epoch is known."""
        return self._superseded_address if self._superseded_by else self.node.address

    def superseded_s(self, now: float) -> float:
        """For how long a higher epoch has been known in which no primary has shown itself; 0 without one."""
        with self._lock:
            return now - self._superseded_s if self._superseded_by else 0.0

    @property
    def replaced(self) -> bool:
        """Whether only a whole promotion may make this node primary again."""
        return self._replaced

    def missing_voters(self) -> list[bytes]:
        """The data voters whose join is not verified now."""
        with self._lock:
            joined = set(self._joined)
        me = self.engine.home.store_id
        voters = self.engine.configuration.voters
        return [v.store_id for v in voters if not v.witness and v.store_id != me and v.store_id not in joined]

    def missing_copies(self) -> int:
        """How many more copies a user's write needs than can be made now; 0 while this node does not lead."""
        with self._lock:
            tracker = self._tracker
            return tracker.missing(self._joined) if tracker is not None and self.leading else 0

    @property
    def degrade_after_s(self) -> float:
        """Of the configuration in force; 0 where there is none."""
        tracker = self._tracker
        return tracker.configuration.degrade_after_s if tracker is not None else 0.0

    def go_on_without(self) -> bool:
        """Order a configuration without the voters whose copies are missing; see ``runtime/degrading.py``.

        False when nobody is missing any more; ``Overloaded`` while another change is under way.
        """
        with self._lock:
            tracker = self._tracker
            if tracker is None or not self.leading or not tracker.missing(self._joined):
                return False
            proposed, old, me = tracker.proposed, self.engine.configuration, self.engine.home.store_id
            ordered = self._configuring
            if ordered is not None and not ordered.done and not ordered.offset:
                raise Overloaded("another configuration change is not logged yet")
            here = {me, *self._joined}
            lost = [v.store_id for v in old.voters if v.counts and v.store_id not in here]
            if proposed is not None and proposed[1].away and not lost:
                return True  # of an attempt before, or of the primary before
            if proposed is not None and not _same_voters(tracker.configuration, old):
                raise Overloaded("another configuration change is not committed yet")
            first = self.engine.committer.committed + 1
            self._configuring = self.engine.configure(old.without(lost, first).changed(me, away=False))
        self.engine.committer.kick()
        return True

    def ready_without(self) -> int:
        """The offset through which every copy that is left holds what was ordered by :meth:`go_on_without`
        and the start of this epoch; 0 while they do not."""
        with self._lock:
            tracker = self._tracker
            proposed = tracker.proposed if tracker is not None else None
            if tracker is None or proposed is None or not proposed[1].away:
                return 0
            offset = max(proposed[0], tracker.epoch_start)
            return offset if tracker.proposed_reached() >= offset else 0

    def effect(self, epoch: int, offset: int) -> None:
        """Most voters have stored that what :meth:`go_on_without` ordered is enough: it is in force."""
        with self._lock:
            tracker = self._tracker
            if tracker is None or not self.leading or self.epoch != epoch:
                return
            proposed = tracker.proposed
            if proposed is None or max(proposed[0], tracker.epoch_start) != offset:
                return  # those who were missing have come back meanwhile
            committed = tracker.effect()
        if committed > self.engine.committer.committed:
            self.engine.committer.commit_through(committed)

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
        self._hook()
        self.forced = forced is not None or unfenced  # with acks=0 an election drops what nobody else had
        self._begin(epoch, fenced, unfenced=unfenced or forced is not None, forced=forced, founding=founding)

    def hold(self, problem: str) -> None:
        """Do not even ask to be primary, because of ``problem``; look for another one."""
        self._hook()
        self._problem, self._held = problem, True
        self.node.roles.seek()

    def promised_away(self, epoch: int, address: str) -> None:
        """This node itself has promised ``epoch`` to the node at ``address``: nothing is acknowledged any
        more. If no primary of that epoch shows itself, this node asks to be primary above it."""
        with self._lock:
            asking = self._promotion.epoch if self._promotion is not None else 0
            if self._stopped or epoch <= max(self._superseded_by, self.epoch, asking):
                return
            self._promotion = None
            self._superseded_by = epoch
            self._superseded_s = time.monotonic()
            self._superseded_address = address
            self._problem = f"this node has promised epoch {epoch} to {address}"
        log.warning("%s: promised epoch %d to %s", self.node.label, epoch, address)
        self._fence(epoch, address)

    def _fence(self, epoch: int, address: str) -> None:
        with self._lock:
            self._tracker = None  # what is logged now waits for the new primary's word
        self.node.tell(EventKind.FENCED, epoch=epoch, address=address)
        self.engine.committer.refuse(
            Fenced(f"epoch {epoch} is newer than {self.epoch}", epoch=epoch, primary_address=address or None)
        )

    def synced_by(self, store_id: bytes) -> int:
        """The last offset that a follower has confirmed; 0 when it is not connected."""
        session = self._joined.get(store_id)
        progress = session.progress if session is not None else None
        return progress.synced if progress is not None else 0

    def hurry(self, store_id: bytes) -> None:
        """Tell that follower at once what is committed."""
        session = self._joined.get(store_id)
        if session is not None:
            session.hurry()

    def await_ack(self, timeout_s: float) -> None:
        """Wait for the next ack of any follower."""
        with self._acked:
            self._more_waiting += 1
            self._acked.wait(timeout_s)
            self._more_waiting -= 1

    def stage(self) -> tuple[int, int]:
        """(the epoch that promises are asked for, the epoch that this node feeds in); 0 for none."""
        with self._lock:
            return (self._promotion.epoch if self._promotion is not None else 0), self.epoch

    def greeted(self, session: FollowerSession) -> None:
        """A follower said Hello, and is admitted."""
        hello = session.hello
        assert hello is not None
        seen = max(hello.promised_epoch, hello.last.epoch)
        if self._asking_below(seen) and self._votes(hello.store_id):
            self._again_above(seen)
        session.proceed()

    def on_promise(self, session: FollowerSession, promise: Promise) -> None:
        """A follower answered a Fence."""
        with self._lock:
            if self._promotion is not None:
                self._promotion.on_promise(session.store_id, promise)
        if self._asking_below(promise.epoch) and self._votes(session.store_id):
            self._again_above(promise.epoch)
        self._try_to_begin()
        session.proceed()

    def _asking_below(self, seen: int) -> bool:
        asking = self.stage()[0]
        return 0 < asking < seen

    def _votes(self, store_id: bytes) -> bool:
        """Whether the word of this store can bind us: strangers cannot fence a primary."""
        return any(c.voter(store_id) is not None for _, c in self.engine.configurations[-8:])

    def _again_above(self, seen: int) -> None:
        """Somebody promised a higher epoch: ask again above it."""
        home = self.engine.home
        epoch = self._next_epoch(seen)
        if not epoch:
            return
        home.promise(epoch, home.store_id)
        own = self._own_promise(epoch)
        effective, proposed = self.engine.configurations_in_force()
        rules = () if proposed is None else (proposed[1],)
        with self._lock:
            promotion = self._promotion
            if promotion is None or promotion.epoch >= epoch:
                return
            self._promotion = Promotion(effective, home.store_id, epoch, own, proposed=rules)
            sessions = list(self._sessions.values())
        for session in sessions:
            session.proceed()

    def _next_epoch(self, seen: int) -> int:
        """An epoch of ours above ``seen``; 0 when there is none."""
        epoch = self.node.next_epoch(seen)
        if epoch <= EPOCH_MAX:
            return epoch
        log.error(
            "%s: a voter claims to have promised epoch %d, the last one there is", self.node.label, seen
        )
        return 0

    def _try_to_begin(self) -> None:
        with self._lock:
            promotion = self._promotion
            if promotion is None or self._stopped:
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
            problem = self._ahead(promotion)
            if problem:
                self._problem = problem
                if (
                    not self._led
                    or member_of(promotion.answer(promotion.ahead[0]).last.epoch) == self._member()
                ):
                    return
                # Its records are to be fetched, which only a whole promotion does: see Roles.
                self._replaced, self._superseded_by = True, promotion.epoch
                self._superseded_s = time.monotonic() - self.options.heartbeat_timeout_s
            self._promotion = None
        if problem:
            self.node.roles.seek()
        else:
            self._begin_with(promotion, unfenced=False)

    def _begin_with(self, promotion: Promotion, *, unfenced: bool) -> None:
        """Begin, unless a higher epoch was promised meanwhile or the promise cannot be stored."""
        try:
            self._begin(promotion.epoch, promotion.promised, unfenced=unfenced)
        except Fenced as error:
            with self._lock:
                if not self._stopped and self._superseded_by < error.epoch:
                    self._superseded_by, self._superseded_s = error.epoch, time.monotonic()
                self._problem = error.message
            self.node.roles.seek()
        except (OSError, StorageFailed, StorageFull) as error:
            log.error("%s: the epoch could not begin: %s", self.node.label, error)
            with self._lock:  # tried again in a while, as if somebody had promised this epoch away
                self._problem = f"the epoch could not begin: {error}"
                if not self._superseded_by:
                    self._superseded_by, self._superseded_s = promotion.epoch, time.monotonic()

    def _ahead(self, promotion: Promotion) -> str:
        """Why the log of a voter that has promised forbids to begin; empty when it does not.

        A primary commits nothing that is not durable here, so what its own followers have beyond it was never
        acknowledged, unless this node lost its disk. What another primary wrote may have been. (Asynchronous
        primaries that lost their unsynced tail go on without it.)
        """
        answers = [(voter, promotion.answer(voter)) for voter in promotion.ahead]
        return self._lost(promotion.own, answers)

    def lost(self, peers: list[Peer]) -> str:
        """As :meth:`_ahead`, of voters that were only asked."""
        own = self._own_promise(0)
        return self._lost(own, [(p.voter, p.promise) for p in peers if not p.voter.witness])

    def _lost(self, held: Promise, answers: list[tuple[Voter, Promise]]) -> str:
        mine, own = self._member(), held.last
        for voter, promise in answers:
            if promise.last <= own:
                continue
            if member_of(promise.last.epoch) != mine:
                return (
                    f"{voter.name} holds records of another primary that this node lacks; follow it instead"
                )
            if promise.committed > own.offset and self.engine.configuration.synchronous:
                return (
                    f"{voter.name} knows records through {promise.committed} as committed, and this node,"
                    f" which wrote them, ends at {own.offset}: it lost data; follow {voter.name} instead"
                )
        return ""

    def _member(self) -> int:
        voter = self.engine.configuration.voter(self.engine.home.store_id)
        return voter.member if voter is not None else 0

    def _await_begin(self) -> None:
        with self._acked:
            while self._promotion is not None and not self._stopped:
                left = self._unfenced_at - time.monotonic()
                if left <= 0:
                    return
                self._acked.wait(left)

    def _begin_unfenced(self) -> None:
        """Go on without those that did not answer, as only the asynchronous mode may."""
        with self._lock:
            promotion = self._promotion
            if promotion is None or self._stopped or self._ahead(promotion):
                return
            self._promotion = None
        log.warning("%s: goes on without the promises of %s", self.node.label, ", ".join(promotion.missing))
        self._begin_with(promotion, unfenced=not promotion.enough)
        self.node.roles.seek()

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
        engine = self.engine
        committer = engine.committer
        given = forced or founding
        effective, proposed = (given, None) if given is not None else engine.configurations_in_force()

        def prepare() -> None:
            tracker = CommitTracker(
                effective if effective.voters else self.node.first_configuration(),
                engine.home.store_id,
                epoch_start=engine.tail.offset + 1,
                committed=committer.committed,
                proposed=proposed,
            )
            with self._lock:
                if self._stopped:
                    raise Fenced(f"this role of {self.node.label} has ended", epoch=epoch)
                self._tracker, self._told = tracker, tracker.configuration
                self._rounds = Rounds(engine.home.store_id)
                self.fenced = not unfenced
                self.epoch = epoch
                self._superseded_by, self._superseded_address, self._replaced = 0, "", False
            committer.rule = self._rule
            engine.on_configuration = self._on_configuration

        try:
            self.node.begin_epoch(
                epoch, fenced=fenced, unfenced=unfenced, forced=forced, founding=founding, prepare=prepare
            )
        except BaseException:
            with self._lock:
                self._tracker, self.epoch = None, 0
            raise
        with self._lock:
            self._problem = ""
            self._open = self._led = True
            sessions = list(self._sessions.values())
        with self._acked:
            self._acked.notify_all()
        for session in sessions:
            session.proceed()
        log.info("%s: primary in epoch %d", self.node.label, epoch)
        self.node.tell(EventKind.PRIMARY, epoch=epoch)
        self.node.knows_primary(epoch)

    def complain(self, text: str) -> None:
        """Log something that only people can mend; once, however often it is met."""
        if text not in self._complaints and len(self._complaints) < 100:
            self._complaints.add(text)
            log.error("%s", text)

    def superseded(self, store_id: bytes, seen: int, *, written: int, follows: bool = False) -> None:
        """A voter has promised epoch ``seen``, above ours, and holds records of epoch ``written``.

        This node may not write any more. If no primary of that epoch shows itself, it begins again above it:
        soon, if the epoch is the voter's own and it ``follows`` all the same, because then it has given up.
        """
        if not self._votes(store_id):
            log.warning("%s: a store that does not vote claims epoch %d; ours is %d",
                        self.node.label, seen, self.epoch)  # fmt: skip
            return
        with self._lock:
            if not self.epoch or seen <= max(self._superseded_by, self.epoch):
                return
            self._superseded_by = seen
            self._superseded_s = time.monotonic()
            self._superseded_address = ""
            if written > self.epoch and member_of(written) != self._member():
                self._replaced = True
            voter = self.engine.configuration.voter(store_id)
            if follows and voter is not None and voter.member == member_of(seen):
                self._superseded_s -= self.options.heartbeat_timeout_s
        log.warning("%s: fenced by epoch %d", self.node.label, seen)
        self._fence(seen, "")
        self.node.roles.seek()

    def renew(self, now: float) -> None:
        """A voter promised a higher epoch in which nobody has written since: be primary above it."""
        with self._lock:
            seen = self._superseded_by
            if not seen or self._replaced or self._held or self._stopped:
                return
            if now - self._superseded_s < self.options.heartbeat_timeout_s:
                return
        if not self._next_epoch(seen):
            return
        if not self.node.roles.lock.acquire(blocking=False):
            return  # a change of roles is under way; at the next tick
        try:
            log.warning("%s: nobody became primary in epoch %d; this node tries again above it",
                        self.node.label, seen)  # fmt: skip
            self.suspend(f"this node asks to be primary above epoch {seen}")
            self._become(seen)
        finally:
            self.node.roles.lock.release()

    def suspend(self, problem: str) -> None:
        """Write and feed nothing, ask nobody, until :meth:`resume` or the end of this role."""
        with self._lock:
            if self._stopped:
                return
            self._superseded_by, self._superseded_address = 0, ""
            self._tracker = self._promotion = None
            self._open = False
            self.epoch = 0
            self._problem = problem
            sessions = list(self._sessions.values())
            self._sessions.clear()
            self._joined.clear()
        for session in sessions:
            session.end(Refused(reason="starting", message="promises are asked for again"))
        self._end_epoch(NotPrimary(problem, primary_address=None, epoch=None))

    def _end_epoch(self, error: Error) -> None:
        """Nothing more is written or committed by this role. What is logged waits for its outcome."""
        committer = self.engine.committer
        committer.refuse(error)
        with committer.lead:
            committer.end_epoch(error)
            committer.on_written = None

    def resume(self) -> None:
        """After :meth:`suspend`: ask for promises again, by the streams of followers."""
        self._hook()
        if not self._held:
            self._become(0)

    def retire(self, error: Error) -> None:
        """This role is over: no epoch of it can begin any more, and nothing is committed by it."""
        with self._lock:
            self._stopped = True
            self._tracker = self._promotion = None
        self._end_epoch(error)
        with self.engine.committer.lead:
            self.engine.committer.rule = nothing_commits

    # -- writing -----------------------------------------------------------------------------------

    def _rule(self, durable: int) -> int:
        tracker = self._tracker
        if tracker is None:
            return 0
        if self._announced < self.engine.tail.offset and self._joined:
            self.on_written()  # a follower joined while the group was written
        coordinator = self.node.coordinator
        if (
            coordinator is not None
            and not self.engine.configuration.synchronous
            and time.monotonic() > coordinator.confirmed_until
        ):
            # Cut off from most voters for too long, another node may be primary: acknowledge nothing more.
            return tracker.committed
        with self._lock:
            return tracker.local_durable(durable)

    def _check_writable(self) -> None:
        self._check_primary()
        tracker = self._tracker
        if tracker is None:
            raise self._not_primary()
        if tracker.configuration.acks == 0 and tracker.proposed is None:
            coordinator = self.node.coordinator
            if coordinator is not None and time.monotonic() > coordinator.confirmed_until:
                raise NotPrimary("most voters have not confirmed this primary for too long",
                                 hint="reach the other voters", primary_address=None, epoch=self.epoch)  # fmt: skip
            return
        with self._lock:
            missing = tracker.missing(self._joined)
        if missing:
            needed = max(rule.copies_wanted for rule in tracker.rules)
            raise NotEnoughFollowers(
                f"the ack rule needs {needed} copies, {needed - missing} can be made now",
                needed=needed,
                connected=needed - missing,
            )

    def _not_primary(self) -> NotPrimary:
        return NotPrimary(
            self._problem, hint="start the missing voters", epoch=self.epoch, primary_address=None
        )

    def _check_primary(self) -> None:
        """Raise unless the epoch has begun and the store is open; followers may be missing."""
        if not self._open:
            raise self._not_primary()
        closed = self.engine.committer.closed
        if closed is not None:
            raise again(closed)

    @property
    def linger_s(self) -> float:
        """How far apart segments shall be: an asynchronous primary lets them gather."""
        tracker = self._tracker
        return 0.0 if tracker is None or tracker.configuration.synchronous else ASYNC_LINGER_S

    def on_written(self) -> None:
        """The log has grown: ship before it is flushed here."""
        self._announced = self.engine.tail.offset
        for session in list(self._joined.values()):
            session.wake_for_write()

    def _await_epoch(self) -> None:
        """A read of a primary that restarted with records above its commit mark.

        Some of them may have been acknowledged, so nothing is shown before the epoch start is committed, and
        all of them with it. ``StaleRead`` when that takes longer than an ack may take.
        """
        deadline = time.monotonic() + self.node.ack_timeout_s
        with self._acked:
            while self.engine.view.withheld is not None and not self._stopped:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise StaleRead(
                        "this node was primary before and cannot tell yet which of its last writes count:"
                        f" {self._problem or 'its epoch start is not committed'}",
                        position=self.engine.committed_position,
                        hint="start the missing voters",
                    )
                self._acked.wait(left)

    def on_committed(self, committed: int) -> None:
        """Followers are told when nothing else is on its way to them."""
        if self.engine.view.withheld is not None:
            tracker = self._tracker
            if tracker is not None and committed >= tracker.epoch_start:
                with self._acked:
                    self.engine.view.withheld = None
                    self._acked.notify_all()
        for session in list(self._joined.values()):
            session.wake_for_commit()
        tracker = self._tracker
        if tracker is not None and tracker.configuration is not self._told:
            self._tell_protection(tracker.configuration)

    def _tell_protection(self, configuration: Configuration) -> None:
        """Another configuration is in force: tell if the rule goes on without voters now, or with all again."""
        before, self._told = self._told, configuration
        if before is not None and before.away != configuration.away:
            first, last = configuration.unprotected[-1] if configuration.unprotected else (0, 0)
            names = ", ".join(v.name for v in configuration.away)
            kind = EventKind.DEGRADED if names else EventKind.RESTORED
            log.warning("%s: %s", self.node.label,
                        f"writes from {first} on are acknowledged without copies at {names}" if names
                        else f"all copies count again; {first} to {last} were acknowledged with fewer")  # fmt: skip
            self.node.tell(kind, name=names, first=first, last=last, epoch=self.epoch)

    @property
    def started(self) -> bool:
        """Whether the start of this epoch is committed, and with it all that came before."""
        tracker = self._tracker
        return tracker is not None and tracker.committed >= tracker.epoch_start

    # -- linearizable reads ------------------------------------------------------------------------

    def confirm(self, deadline_s: float) -> None:
        """Return once it is certain that this node was the primary at some moment after the call began, and
        that all that was committed before is visible here.

        :class:`StaleRead` when that is not known by ``deadline_s``, or never with ``acks=0``;
        :class:`NotPrimary` when another node is, or may be.
        """
        tracker = self._tracker
        if tracker is None or not self._open:
            raise self._no_more_primary()
        if not self.engine.configuration.synchronous or not tracker.configuration.synchronous:
            raise StaleRead(
                "linearizable reads need a commit rule that waits for followers, and this store has acks=0",
                position=self.engine.committed_position,
                hint='reconfigure(acks="majority"), or read without consistency="linearizable"',
            )
        if not self.node.until(
            lambda: self._stopped or self._tracker is not tracker or self.started, deadline_s
        ):
            raise self._unconfirmed("the start of its epoch is not committed yet")
        with self._lock:
            rounds = self._rounds
            number = rounds.ask()
            sessions = list(self._joined.values())
        for session in sessions:
            session.wake()
        with self._confirmed:
            while True:
                with self._lock:
                    if self._tracker is not tracker or self._stopped:
                        break
                    if rounds.confirmed(number, tracker.rules):
                        return
                left = deadline_s - time.monotonic()
                if left <= 0:
                    raise self._unconfirmed("too few voters have confirmed in time that it still is")
                self._confirmed.wait(min(left, 0.05))
        raise self._no_more_primary()

    def _unconfirmed(self, why: str) -> StaleRead:
        return StaleRead(
            f"this node was the primary, and {why}",
            position=self.engine.committed_position,
            hint="allow more time, or see whether another node is primary",
        )

    def _no_more_primary(self) -> NotPrimary:
        address = self.primary_address if self._superseded_by else ""
        return NotPrimary(
            self._problem or "this node is the primary no more",
            primary_address=address or None,
            epoch=self._superseded_by or self.epoch,
        )

    @property
    def probes_wanted(self) -> int:
        """The newest round of questions that somebody waits for."""
        return self._rounds.wanted

    def probing(self) -> int:
        """That round; a follower is about to be asked for it."""
        with self._lock:
            return self._rounds.sending()

    def on_confirm(self, session: FollowerSession, number: int) -> None:
        """A follower that has joined has promised no higher epoch, as of a moment after that round began."""
        with self._lock:
            if self._joined.get(session.store_id) is not session:
                return
            try:
                fresh = self._rounds.answer(session.store_id, number)
            except ValueError as error:
                raise ProtocolError(str(error)) from None
        if fresh:
            with self._confirmed:
                self._confirmed.notify_all()

    def shippable(self) -> int:
        return self.engine.tail.offset

    # -- configurations ----------------------------------------------------------------------------

    def propose(self, change: Callable[[Configuration], Configuration], deadline_s: float) -> Write:
        """Order a changed configuration; one at a time, after the epoch start is committed."""
        while True:
            with self._lock:
                if self._open and self._may_configure():
                    old = self.engine.configuration
                    new = change(old)
                    write = self._configuring = self.engine.configure(new)
                    break
            self._check_primary()
            if time.monotonic() >= deadline_s:
                raise Overloaded("another configuration change, or the epoch itself, is not committed yet")
            with self._acked:
                self._more_waiting += 1
                self._acked.wait(0.02)
                self._more_waiting -= 1
        self.engine.committer.kick()
        return write

    def with_voter(self, configuration: Configuration, name: str) -> Configuration:
        """``configuration`` with the follower ``name`` as a voter; ``ValueError`` when it cannot be one."""
        known = [(i, slot) for i, slot in self.slots.all() if slot.name == name]
        if not known:
            raise ValueError(f"no follower named {name!r} is known here")
        store_id, slot = known[0]
        if configuration.voter(store_id) is not None:
            return configuration
        if not slot.voter:
            raise ValueError(f"{name!r} was opened with voter=False")
        return configuration.with_voter(store_id, name, slot.address)

    def _may_configure(self) -> bool:
        """Whether no other change is under way. The lock is held."""
        tracker, write = self._tracker, self._configuring
        return tracker is not None and tracker.may_propose and (write is None or write.done)

    def _on_configuration(self, offset: int, configuration: Configuration) -> None:
        """A configuration record is in the log, and not committed yet."""
        with self._lock:
            tracker = self._tracker
            if tracker is None or offset <= tracker.committed:
                return
            if tracker.proposed is None or configuration.away:
                tracker.propose(offset, configuration)

    def _change_for(self, session: FollowerSession, configuration: Configuration) -> Configuration | None:
        """The configuration with this follower as a voter at its present address; ``None`` if it is that
        already, or cannot be."""
        hello = session.hello
        assert hello is not None
        if session.vote_refused and configuration.voter(hello.store_id) is None:
            return None
        try:
            return voter_change(hello, configuration)
        except ValueError as error:
            session.vote_refused = True
            log.warning("%s: %s cannot become a voter: %s", self.node.label, hello.name, error)
            return None

    def _admit_voter(self, session: FollowerSession) -> None:
        """Make a follower that has caught up a voter, or note where it is now; one change at a time."""
        hello = session.hello
        assert hello is not None
        with self._lock:
            configuration = self.engine.configuration
            if not (self._open and self._joined.get(hello.store_id) is session and self._may_configure()):
                return
            try:
                new = self._change_for(session, configuration)
                if new is None:
                    return
                self._configuring = self.engine.configure(new)
            except Error as error:
                log.warning("%s: %s cannot become a voter: %s", self.node.label, hello.name, error)
                return
        voter = configuration.voter(hello.store_id)
        what = "becomes a voter" if voter is None else "counts again" if voter.away else "has moved"
        log.info("%s: %s %s", self.node.label, hello.name, what)
        self.engine.committer.kick()

    def _count_myself(self) -> None:
        """A primary without whose copies the rule went on before, or was about to, has fetched all since."""
        store_id = self.engine.home.store_id
        with self._lock:
            me = self.engine.configuration.voter(store_id)
            if me is None or not me.away or not self._open or not self._may_configure():
                return
            self._configuring = self.engine.configure(self.engine.configuration.with_copy_of(store_id))
        self.engine.committer.kick()

    # -- followers ---------------------------------------------------------------------------------

    def open_session(self, peer: str) -> FollowerSession:
        return FollowerSession(self, peer)

    def admit(self, session: FollowerSession) -> Refused | None:
        """Register a stream; an older stream of the same store ends."""
        hello = session.hello
        assert hello is not None
        with self._lock:
            if self._stopped:
                return Refused(reason="closing", message=f"{self.node.label} is closing")
            old = self._sessions.get(hello.store_id)
            self._sessions[hello.store_id] = session
            self._joined.pop(hello.store_id, None)
            if self._tracker is not None:
                self._tracker.left(hello.store_id)
        if old is not None and old is not session:
            old.end(Refused(reason="closing", message="a newer stream of the same store took over"))
        return None

    def reserve(self, session: FollowerSession) -> None:
        """A follower needs a snapshot: from now on the log is kept for it."""
        hello = session.hello
        if hello is not None:
            kept = self.spools.position_for(hello.store_id)
            applied = self.engine.tree.state.applied.offset if kept is None else kept
            self.slots.note(
                hello.store_id, name=hello.name, address=hello.address, voter=hello.voter, acked=applied
            )

    def joined(self, session: FollowerSession, at: int) -> None:
        """The join is verified: what the follower holds counts from here on."""
        hello = session.hello
        assert hello is not None
        with self._lock:
            if self._stopped or self._sessions.get(hello.store_id) is not session:
                return  # it has left already
            self._joined[hello.store_id] = session
        if hello.name:
            self.slots.note(
                hello.store_id, name=hello.name, address=hello.address, voter=hello.voter, acked=at
            )
        self.spools.joined(hello.store_id)
        self.node.tell(EventKind.FOLLOWER_JOINED, name=hello.name, address=hello.address)
        self.engine.committer.on_written = self.on_written

    def on_ack(self, session: FollowerSession, ack: Ack) -> None:
        """A follower progressed: perhaps something is committed now."""
        store_id = session.store_id
        if not self._count(session, store_id, ack):
            return
        self.slots.acked(store_id, ack.synced)
        self.node.on_acked()
        if self._more_waiting:
            with self._acked:
                self._acked.notify_all()
        configuration = self.engine.configuration
        if session.settled_in is not configuration:
            if self._change_for(session, configuration) is None:
                session.settled_in = configuration
            elif self.engine.tail.offset - ack.synced <= ADMIT_LAG_RECORDS:
                self._admit_voter(session)

    def _count(self, session: FollowerSession, store_id: bytes, ack: Ack) -> bool:
        """Count an ack, unless its stream was replaced or has ended."""
        with self._lock:
            tracker = self._tracker
            if tracker is None or self._joined.get(store_id) is not session:
                return False
            committed = tracker.acked(store_id, ack.synced, ack.written, ack.visible)
        committer = self.engine.committer
        if committed > committer.committed:
            committer.commit_through(committed)
        return True

    def left(self, session: FollowerSession, error: Exception | None) -> None:
        """A stream ended."""
        store_id = session.store_id
        with self._lock:
            if self._sessions.get(store_id) is not session:
                return
            del self._sessions[store_id]
            self._joined.pop(store_id, None)
            if self._tracker is not None:
                self._tracker.left(store_id)
            if not self._joined:
                self.engine.committer.on_written = None
        if session.hello is not None:
            self.node.tell(
                EventKind.FOLLOWER_LOST,
                name=session.hello.name,
                address=session.hello.address,
                reason=str(error) if error is not None else "",
            )
        self.node.roles.seek()  # perhaps it has found another primary
        if error is not None:
            log.info("%s: the stream of %s ended: %s", self.node.label, session.peer, error)

    def inherit(self, heard: tuple[SlotState, ...]) -> None:
        """The slots that the former primary told of: what they need of the log is kept."""
        addresses = {v.store_id: v.address for _, c in self.engine.configurations[-2:] for v in c.voters}
        for slot in heard:
            if slot.store_id != self.engine.home.store_id:
                self.slots.note(
                    slot.store_id,
                    name=slot.name,
                    address=addresses.get(slot.store_id, ""),
                    voter=slot.store_id in addresses,
                    acked=min(slot.acked, self.engine.tail.offset),
                )

    def slot_states(self) -> tuple[SlotState, ...]:
        return tuple(
            SlotState(store_id=i, name=slot.name, acked=slot.acked)
            for i, slot in self.slots.all()
            if slot.name
        )

    def path(self) -> tuple[str, ...]:
        return (self.engine.home.name,) if self.engine.home.name else ()

    def _keep_from(self) -> int:
        """What trimming must leave: all that slots need, unless they need more than the cap."""
        engine_log, bytes_max = self.engine.committer.log, self.options.retention_bytes_max
        while (slowest := self.slots.slowest()) is not None:
            slot = self.slots.get(slowest)
            if slot is None or engine_log.bytes_after(slot.acked) <= bytes_max:
                break
            self.slots.drop(slowest)
            log.warning(
                "%s: the slot of %s is released: the log kept for it exceeds retention_bytes_max",
                self.node.label, slot.name or slot.store_id,
            )  # fmt: skip
        keep = self.slots.keep_from()
        committed = self.engine.committer.committed
        return committed + 1 if keep is None else min(keep, committed + 1)

    def _tick(self) -> None:
        """Twice a second: what needs no event to happen."""
        now = time.monotonic()
        with self._lock:
            joined = list(self._joined.values())
            connected = set(self._sessions)
        for session in joined:
            # Its own sender would see it, too, unless the network has taken it in and does not let go.
            silent_s = session.silent_s(now)
            if silent_s >= self.options.heartbeat_timeout_s:
                session.end()
                self.left(session, ProtocolError(f"nothing heard from it for {silent_s:.1f} s"))
        self.renew(now)
        self.degrading.tick(now)
        self._count_myself()
        if now >= self._unfenced_at and self._promotion is not None:
            self._begin_unfenced()
        self.slots.expire(connected)
        self.spools.tick()
        self.slots.save()

    # -- writes that ask for more ------------------------------------------------------------------

    def _copies_asked(self, acks: Acks | None) -> int:
        configuration = self.engine.configuration
        if acks is None:
            return configuration.copies_wanted
        if acks == "majority":
            asked = len(configuration.voters) // 2 + 1
        elif acks == "all":
            asked = configuration.data_voters
        else:
            assert isinstance(acks, int)
            asked = acks + 1
        return max(asked, configuration.copies_wanted)

    def check_more(self, acks: Acks | None) -> None:
        """Refuse a write that asks for more copies than can be made now."""
        needed = self._copies_asked(acks)
        tracker = self._tracker
        if tracker is None:
            return
        with self._lock:
            possible = tracker.reachable(self._joined)
        if needed > possible:
            raise NotEnoughFollowers(
                f"the write asks for {needed} copies, {possible} can be made now",
                needed=needed,
                connected=possible,
            )

    def await_more(self, position: Position, acks: Acks | None, level: Level, deadline_s: float) -> None:
        """Wait until enough copies of a committed write are at ``level``."""
        needed = self._copies_asked(acks)
        if level == "visible":
            for session in list(self._joined.values()):
                session.hurry()
        with self._acked:
            self._more_waiting += 1
            try:
                while (reached := self.copies_at(position.offset, level)) < needed:
                    left = deadline_s - time.monotonic()
                    if left <= 0 or self._stopped:
                        raise AckTimeout(
                            f"the write at {position} is committed;"
                            f" {reached} of the {needed} copies asked for are {level}",
                            position=position,
                            reached=reached,
                            needed=needed,
                        )
                    self._acked.wait(min(left, 0.25))
            finally:
                self._more_waiting -= 1

    def copies_at(self, offset: int, level: Level = "synced") -> int:
        tracker = self._tracker
        if tracker is None:
            return 1
        with self._lock:
            return tracker.copies_at(offset, level)

    # -- status and end ----------------------------------------------------------------------------

    def followers(self) -> tuple[FollowerStatus, ...]:
        """Connected followers and those whose slots are kept, by name."""
        with self._lock:
            sessions = dict(self._sessions)
        found = [self._status(i, s) for i, s in sessions.items()]
        for store_id, slot in self.slots.all():
            if store_id not in sessions:
                lag = self._lag(slot.acked)
                found.append(
                    FollowerStatus(
                        name=slot.name,
                        store_id=slot.store_id,
                        address=slot.address,
                        state="bootstrapping" if self.spools.serving(store_id) else "gone",
                        voter=self.engine.configuration.voter(store_id) is not None,
                        connected=False,
                        sent=slot.acked,
                        written=slot.acked,
                        synced=slot.acked,
                        visible=0,
                        lag_records=lag[0],
                        lag_bytes=lag[1],
                        lag_s=lag[2],
                    )
                )
        return tuple(sorted(found, key=lambda f: (f.name, f.store_id)))

    def _status(self, store_id: bytes, session: FollowerSession) -> FollowerStatus:
        progress, hello = session.progress, session.hello
        assert progress is not None
        assert hello is not None
        lag = self._lag(progress.synced)
        return FollowerStatus(
            name=hello.name,
            store_id=store_id.hex(),
            address=hello.address or session.peer,
            state=progress.state.value,
            voter=self.engine.configuration.voter(store_id) is not None,
            connected=True,
            sent=progress.sent,
            written=progress.written,
            synced=progress.synced,
            visible=progress.visible,
            lag_records=lag[0],
            lag_bytes=lag[1],
            lag_s=lag[2],
        )

    def _lag(self, acked: int) -> tuple[int, int, float]:
        """(records, bytes, seconds) that a follower which confirmed ``acked`` is behind."""
        engine = self.engine
        records = max(0, engine.tail.offset - acked)
        if records == 0:
            return 0, 0, 0.0
        engine_log = engine.committer.log
        since_us = engine.time_at(acked + 1)
        seconds = max(0.0, time.time() - since_us / 1e6) if since_us else float(records > 0)
        return records, engine_log.bytes_after(acked), seconds

    def stop(self, timeout_s: float) -> None:
        """End all streams and copies, save the slots."""
        with self._lock:
            self._stopped = True
            sessions = list(self._sessions.values())
        with self._acked:
            self._acked.notify_all()
        for session in sessions:
            session.end(Refused(reason="closing", message=f"{self.node.label} is closing"))
        self.engine.committer.on_written = None
        self.degrading.stop(timeout_s)
        self.spools.close(timeout_s)
        self.slots.save(now=True)


def _same_voters(one: Configuration, other: Configuration) -> bool:
    return [v.store_id for v in one.voters] == [v.store_id for v in other.voters]


def nothing_commits(durable: int) -> int:
    """The rule of a follower: only its primary says what is committed."""
    del durable
    return 0
