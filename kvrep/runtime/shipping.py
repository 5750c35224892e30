"""The primary's side of replication: becoming primary, feeding followers, counting their acks."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from kvrep.errors import (
    AckTimeout,
    Error,
    Fenced,
    NotEnoughFollowers,
    NotPrimary,
    Overloaded,
)
from kvrep.model.configuration import Acks, Configuration
from kvrep.model.position import Position, member_of
from kvrep.replication.acks import CommitTracker, Level
from kvrep.replication.messages import Ack, Promise, Refused, SlotState
from kvrep.replication.promotion import Promotion
from kvrep.runtime.session import FollowerSession, wants_vote
from kvrep.runtime.slots import Slots
from kvrep.status import FollowerStatus
from kvrep.storage.write import Write

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["Shipping"]

log = logging.getLogger("kvrep.replication")

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
        self.slots = Slots(self.engine.home.path / "SLOTS")
        # Protects everything below. Taken inside the committer's locks, never the other way round.
        self._lock = threading.Lock()
        self._sessions: dict[bytes, FollowerSession] = {}
        self._promotion: Promotion | None = None
        self._tracker: CommitTracker | None = None
        self._configuring: Write | None = None
        self._problem = "this node is not a primary yet"
        self._superseded_by = 0
        self._stopped = False
        # Announces acks to writes that wait for more than the commit rule.
        self._acked = threading.Condition()
        self._more_waiting = 0

    # -- becoming primary --------------------------------------------------------------------------

    def start(self) -> None:
        """Begin an epoch, or begin to collect the promises that it takes."""
        engine, home = self.engine, self.engine.home
        engine.writable = self._check_writable
        engine.keep_from = self._keep_from
        engine.on_tick = self._tick
        configuration = engine.configuration
        epoch = self.node.next_epoch()
        if not configuration.voters or not configuration.synchronous:
            # Alone, or asynchronous: there is nobody whose promise could show what was acknowledged.
            others = [v for v in configuration.voters if v.store_id != home.store_id]
            self._begin(epoch, (home.store_id,), unfenced=bool(others))
            return
        if configuration.voter(home.store_id) is None:
            self._problem = "this node is not a voter of its own configuration"
            return
        home.promise(epoch, home.store_id)
        with self._lock:
            self._promotion = Promotion(configuration, home.store_id, epoch, self._own_promise(epoch))
        self._try_to_begin()

    def _own_promise(self, epoch: int) -> Promise:
        engine = self.engine
        tail = engine.tail
        return Promise(
            epoch=epoch,
            last=Position(tail.epoch, tail.offset),
            committed=engine.committer.committed,
            epochs=engine.epochs,
        )

    @property
    def collecting(self) -> bool:
        return self._promotion is not None

    def greeted(self, session: FollowerSession) -> None:
        """A follower said Hello while promises are collected."""
        promotion = self._promotion
        if promotion is None:
            session.resume()
            return
        hello = session.hello
        assert hello is not None
        if hello.promised_epoch > promotion.epoch or hello.last.epoch > promotion.epoch:
            self._again_above(max(hello.promised_epoch, hello.last.epoch))
            return
        session.fence(promotion.epoch)

    def on_promise(self, session: FollowerSession, promise: Promise) -> None:
        """A follower answered a Fence."""
        promotion = self._promotion
        if promotion is None:
            session.resume()
            return
        with self._lock:
            promotion.on_promise(session.store_id, promise)
        if promise.epoch > promotion.epoch:
            self._again_above(promise.epoch)
            return
        self._try_to_begin()

    def _again_above(self, seen: int) -> None:
        """Somebody promised a higher epoch: try again above it."""
        engine, home = self.engine, self.engine.home
        with self._lock:
            promotion = self._promotion
            if promotion is None or promotion.epoch > seen:
                return
            epoch = self.node.next_epoch(seen)
            home.promise(epoch, home.store_id)
            self._promotion = Promotion(engine.configuration, home.store_id, epoch, self._own_promise(epoch))
            sessions = list(self._sessions.values())
        for session in sessions:
            session.end(Refused(reason="starting", message="promises are asked for again", epoch=epoch))

    def _try_to_begin(self) -> None:
        with self._lock:
            promotion = self._promotion
            if promotion is None:
                return
            if not promotion.enough:
                names = ", ".join(promotion.missing)
                self._problem = (
                    f"this node waits for the promises of {promotion.needed - 1} more voters"
                    f" ({names}) before it may write again"
                )
                return
            home = self.engine.home
            voter = promotion._rules[0].voter(home.store_id)
            member = voter.member if voter is not None else 0
            strangers = [
                v for v in promotion.ahead
                if member_of(promotion._answers[v.store_id].last.epoch) != member
            ]  # fmt: skip
            if strangers:
                # A primary commits nothing that is not durable here, so what its own followers have beyond
                # it was never acknowledged. What another primary wrote may have been.
                self._problem = (
                    f"{strangers[0].name} holds records of another primary that this node lacks;"
                    " follow it instead"
                )
                return
            fenced = tuple(promotion._promised())
            epoch = promotion.epoch
            self._promotion = None
        self._begin(epoch, fenced, unfenced=False)

    def _begin(self, epoch: int, fenced: tuple[bytes, ...], *, unfenced: bool) -> None:
        engine = self.engine
        committer = engine.committer
        committed = committer.committed
        effective = engine.configuration_at(committed)
        newest = engine.configurations[-1]
        first = self.node.first_configuration() if not newest[1].voters else newest[1]
        tracker = CommitTracker(
            effective[1] if effective[1].voters else first,
            engine.home.store_id,
            epoch_start=engine.tail.offset + 1,
            committed=committed,
            proposed=newest if newest[0] > max(committed, effective[0]) else None,
        )
        self._tracker = tracker
        self.fenced = not unfenced
        self.epoch = epoch
        committer.rule = self._rule
        engine.on_configuration = self._on_configuration
        write = self.node.begin_epoch(epoch, fenced=fenced, unfenced=unfenced)
        self._problem = ""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.resume()
        log.info("%s: primary in epoch %d", self.node.label, epoch)
        write.when_done(self._begun)

    def _begun(self, write: Write) -> None:
        if write.error is not None:
            log.error("%s: the epoch start could not be written: %s", self.node.label, write.error)

    def superseded(self, epoch: int) -> None:
        """A follower has promised, or holds, a newer epoch: this node may not write any more."""
        if epoch <= self._superseded_by:
            return
        self._superseded_by = epoch
        log.warning("%s: fenced by epoch %d", self.node.label, epoch)
        self.engine.committer.refuse(Fenced(f"epoch {epoch} is newer than {self.epoch}", epoch=epoch))

    # -- writing -----------------------------------------------------------------------------------

    def _rule(self, durable: int) -> int:
        tracker = self._tracker
        if tracker is None:
            return 0
        with self._lock:
            return tracker.local_durable(durable)

    def _check_writable(self) -> None:
        tracker = self._tracker
        if tracker is None:
            raise NotPrimary(self._problem, hint="start the missing voters", epoch=self.epoch,
                             primary_address=None)  # fmt: skip
        if tracker.configuration.acks == 0 and tracker.proposed is None:
            return
        with self._lock:
            missing = tracker.missing(self._sessions)
            needed = tracker.configuration.copies_wanted
        if missing:
            raise NotEnoughFollowers(
                f"the ack rule needs {needed} copies, {needed - missing} can be made now",
                needed=needed,
                connected=needed - missing,
            )

    def on_written(self) -> None:
        """The log has grown: ship before it is flushed here."""
        for session in list(self._sessions.values()):
            session.wake()

    def on_committed(self, committed: int) -> None:
        """Followers are told when nothing else is on its way to them."""
        del committed
        for session in list(self._sessions.values()):
            session.wake()

    def shippable(self) -> int:
        return self.engine.tail.offset

    # -- configurations ----------------------------------------------------------------------------

    def propose(self, configuration: Configuration, deadline_s: float) -> Write:
        """Order a configuration record; one at a time, after the epoch start is committed."""
        while True:
            with self._lock:
                tracker = self._tracker
                if tracker is None:
                    raise NotPrimary(self._problem, primary_address=None, epoch=self.epoch)
                ready = tracker.committed >= tracker.epoch_start and tracker.proposed is None
                if ready and (self._configuring is None or self._configuring.done):
                    write = self.engine.configure(configuration)
                    self._configuring = write
                    break
            if time.monotonic() >= deadline_s:
                raise Overloaded("another configuration change is not committed yet")
            with self._acked:
                self._more_waiting += 1
                self._acked.wait(0.02)
                self._more_waiting -= 1
        self.engine.committer.kick()
        return write

    def _on_configuration(self, offset: int, configuration: Configuration) -> None:
        """A configuration record is in the log, and not committed yet."""
        with self._lock:
            tracker = self._tracker
            if tracker is not None and tracker.proposed is None and offset > tracker.committed:
                tracker.propose(offset, configuration)

    def _admit_voter(self, session: FollowerSession) -> None:
        """Make a follower that has caught up a voter, unless another change is under way."""
        hello = session.hello
        configuration = self.engine.configuration
        if hello is None or not wants_vote(session, configuration):
            return
        with self._lock:
            tracker = self._tracker
            if (
                tracker is None
                or tracker.proposed is not None
                or tracker.committed < tracker.epoch_start
                or (self._configuring is not None and not self._configuring.done)
            ):
                return
            try:
                new = configuration.with_voter(hello.store_id, hello.name, hello.address)
            except ValueError as error:
                log.warning("%s: %s cannot become a voter: %s", self.node.label, hello.name, error)
                return
            try:
                self._configuring = self.engine.configure(new)
            except Error as error:
                log.warning("%s: %s cannot become a voter now: %s", self.node.label, hello.name, error)
                return
        log.info("%s: %s becomes a voter", self.node.label, hello.name)
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
            if self._tracker is not None:
                self._tracker.left(hello.store_id)
        if old is not None and old is not session:
            old.end(Refused(reason="closing", message="a newer stream of the same store took over"))
        return None

    def reserve(self, session: FollowerSession) -> None:
        """A follower needs a snapshot: from now on the log is kept for it."""
        hello = session.hello
        if hello is not None:
            applied = self.engine.tree.state.applied.offset
            self.slots.note(
                hello.store_id, name=hello.name, address=hello.address, voter=hello.voter, acked=applied
            )

    def joined(self, session: FollowerSession, at: int) -> None:
        """The join is verified: what the follower holds counts from here on."""
        hello = session.hello
        assert hello is not None
        if hello.name:
            self.slots.note(
                hello.store_id, name=hello.name, address=hello.address, voter=hello.voter, acked=at
            )
        self.engine.committer.on_written = self.on_written

    def on_ack(self, session: FollowerSession, ack: Ack) -> None:
        """A follower progressed: perhaps something is committed now."""
        store_id = session.store_id
        if self._sessions.get(store_id) is not session:
            return
        self._count(store_id, ack.synced, ack.written, ack.visible)
        self.slots.acked(store_id, ack.synced)
        if self._more_waiting:
            with self._acked:
                self._acked.notify_all()
        if self.engine.tail.offset - ack.synced <= ADMIT_LAG_RECORDS and wants_vote(
            session, self.engine.configuration
        ):
            self._admit_voter(session)

    def _count(self, store_id: bytes, synced: int, written: int, visible: int) -> None:
        tracker = self._tracker
        if tracker is None:
            return
        with self._lock:
            committed = tracker.acked(store_id, synced, written, visible)
        committer = self.engine.committer
        if committed > committer.committed:
            committer.commit_through(committed)

    def left(self, session: FollowerSession, error: Exception | None) -> None:
        """A stream ended."""
        store_id = session.store_id
        with self._lock:
            if self._sessions.get(store_id) is not session:
                return
            del self._sessions[store_id]
            if self._tracker is not None:
                self._tracker.left(store_id)
            if not self._sessions:
                self.engine.committer.on_written = None
        if error is not None:
            log.info("%s: the stream of %s ended: %s", self.node.label, session.peer, error)

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
        log_size = self.engine.committer.log.size
        keep = self.slots.keep_from()
        while keep is not None and log_size > self.options.retention_bytes_max:
            slowest = self.slots.slowest()
            slot = self.slots.drop(slowest) if slowest is not None else None
            if slot is None:
                break
            log.warning(
                "%s: the slot of %s is released: the log kept for it exceeds retention_bytes_max",
                self.node.label, slot.name or slot.store_id,
            )  # fmt: skip
            keep = self.slots.keep_from()
        committed = self.engine.committer.committed
        return committed + 1 if keep is None else min(keep, committed + 1)

    def _tick(self) -> None:
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
            possible = tracker.reachable(self._sessions)
        if needed > possible:
            raise NotEnoughFollowers(
                f"the write asks for {needed} copies, {possible} can be made now",
                needed=needed,
                connected=possible,
            )

    def await_more(self, position: Position, acks: Acks | None, level: Level, deadline_s: float) -> None:
        """Wait until enough copies of a committed write are at ``level``."""
        needed = self._copies_asked(acks)
        with self._acked:
            self._more_waiting += 1
            try:
                while (reached := self.copies_at(position.offset, level)) < needed:
                    left = deadline_s - time.monotonic()
                    if left <= 0:
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
                        state="gone",
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
        """End all streams and save the slots."""
        del timeout_s
        with self._lock:
            self._stopped = True
            sessions = list(self._sessions.values())
        for session in sessions:
            session.end(Refused(reason="closing", message=f"{self.node.label} is closing"))
        self.engine.committer.on_written = None
        self.slots.save(now=True)
