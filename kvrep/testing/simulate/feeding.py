"""The primary's shell: begin an epoch, write, feed followers, count their acks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvrep.errors import Fenced, ProtocolError
from kvrep.model.codec import RecordEncoder
from kvrep.model.configuration import Acks, Configuration
from kvrep.model.record import DEFAULT_KEYSPACE, Kind, write_payload
from kvrep.replication.acks import CommitTracker
from kvrep.replication.join import (
    Continue,
    LogView,
    Superseded,
    check_loss,
    check_running,
    plan_join,
    refusal,
    voter_change,
)
from kvrep.replication.messages import (
    Ack,
    Credit,
    FromFollower,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Refused,
    Segment,
    Truncate,
    Welcome,
)
from kvrep.replication.progress import Progress, State
from kvrep.replication.sender import Dead, Sender, SendHeartbeat, SendSegment, Wait
from kvrep.testing.simulate.degrading import Degrading
from kvrep.testing.simulate.node import StorageError

if TYPE_CHECKING:
    from kvrep.replication.election import WhyGone
    from kvrep.testing.simulate.network import Stream
    from kvrep.testing.simulate.node import Node

__all__ = ["Feeding", "NotBegun", "Session"]

ENCODER = RecordEncoder()
COMMIT_LINGER_S = 0.001
TIMER_S_MIN = 0.0001


class NotBegun(Exception):
    """The epoch could not begin."""


class Feeding:
    """One epoch of one node as primary."""

    def __init__(self, node: Node, epoch: int, *, fenced: bool) -> None:
        self.node = node
        self.epoch = epoch
        self.fenced = fenced
        """Whether the epoch was made by a full fence (else, with acks=0, without one)."""
        self.tracker: CommitTracker | None = None
        """``None`` once a higher epoch is known: what is logged now waits for the new primary's word."""
        self.start = 0
        self.sessions: dict[bytes, Session] = {}
        self.joined: dict[bytes, Session] = {}
        """Those whose join is verified: only their acks count, and only from that join on."""
        self._open = False
        self._syncing = False
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether this role is over."""
        return self._stopped

    @property
    def leading(self) -> bool:
        return self._open and self.tracker is not None

    # -- beginning ---------------------------------------------------------------------------------

    def begin(
        self,
        fenced_by: tuple[bytes, ...],
        founding: Configuration | None,
        done: Callable[[], None],
    ) -> None:
        """Append the epoch start and sync it; then ``done``. Raises :class:`NotBegun`, or ``StorageError``."""
        node, disk = self.node, self.node.disk
        if not node.give(self.epoch, node.store_id):
            raise NotBegun(f"epoch {disk.promised} has been promised, above {self.epoch}")
        if disk.last.epoch >= self.epoch:
            raise NotBegun(f"the log ends in epoch {disk.last.epoch}, not below {self.epoch}")
        effective, pending = (founding, ()) if founding is not None else node.rules
        newest = pending[-1] if pending else effective
        self.start = disk.end + 1
        self.tracker = CommitTracker(
            effective,
            node.store_id,
            epoch_start=self.start,
            committed=node.committed,
            proposed=(disk.configurations[-1][0], newest) if pending else None,
        )
        payload = {
            "lineage": disk.lineage,
            "branch": disk.lineage,
            "configuration": newest.to_wire(),
            "promoter": node.store_id,
            "name": node.name,
            "address": node.address,
            "fenced": list(fenced_by),
            "unfenced": not self.fenced,
            "forced": False,
        }
        node.append(self._encode(Kind.EPOCH, payload))
        node.world.say(node, "begins epoch %d at %d", self.epoch, self.start)
        node.world.check.begins(node, self.epoch, self.start)
        node.world.begun.append((node.world.time.now, node.name, self.epoch))
        node.take_lead()
        node.after(node.sync_s(), lambda: self._begun(done))

    def _begun(self, done: Callable[[], None]) -> None:
        node = self.node
        try:
            node.sync()
        except StorageError:
            node.leave_lead()
            done()
            return
        self._open = True
        if node.world.settings.degrade_after_s:
            Degrading(self).tick()
        self._durable(node.disk.end)
        done()
        node.leave_lead()

    def stop(self, *, broken: bool) -> None:
        """This role is over: nothing is committed by it any more."""
        self._stopped = True
        self.tracker = None
        for session in list(self.sessions.values()):
            session.end(broken=broken)

    def promised_away(self, epoch: int) -> None:
        """This node itself has promised a higher epoch: nothing is acknowledged any more."""
        if epoch > self.epoch and self.tracker is not None:
            self.node.world.say(self.node, "is fenced by epoch %d", epoch)
            self.tracker = None

    def superseded(self, store_id: bytes, epoch: int) -> None:
        """A follower has promised a higher epoch. Strangers cannot fence a primary."""
        if any(c.voter(store_id) is not None for _, c in self.node.disk.configurations[-8:]):
            self.promised_away(epoch)

    # -- writing -----------------------------------------------------------------------------------

    def write(self, key: bytes, value: bytes) -> bool:
        """A user's write; whether it was logged. Its outcome shows when it is committed."""
        tracker, node = self.tracker, self.node
        if tracker is None or not self._open or tracker.missing(self.joined):
            return False
        if node.electing is not None and not node.world.synchronous and node.electing.unconfirmed:
            return False
        if tracker.bounded and tracker.too_far(self.joined, node.disk.end + 1):
            return False
        return self._log(Kind.WRITE, write_payload([(DEFAULT_KEYSPACE, key, value)]))

    def configure(self, change: Callable[[Configuration], Configuration | None]) -> bool:
        """Log a changed configuration; whether it was."""
        tracker, node = self.tracker, self.node
        if tracker is None or not self._open or not tracker.may_propose:
            return False
        try:
            new = change(node.disk.configurations[-1][1])
        except ValueError:
            return False
        if new is None or not self.log_configuration(new):
            return False
        node.world.check.changes_rules(node, self.epoch, self.start)
        return True

    def log_configuration(self, new: Configuration) -> bool:
        """Whether it was logged; the caller has seen that it may be."""
        node = self.node
        if not self._log(Kind.CONFIGURATION, new.to_wire()):
            return False
        if not new.away:  # one that goes on without voters may stand behind another
            node.world.check.configures(node, node.disk.end)
        names = " ".join(f"({v.name})" if v.away else v.name for v in new.voters)
        node.world.say(node, "changes the configuration at %d: acks=%s, voters %s",
                       node.disk.end, new.acks, names)  # fmt: skip
        return True

    def reconfigure(self, acks: Acks, voters: tuple[bytes, ...]) -> bool:
        """Another rule, and those voters that stay."""

        def change(now: Configuration) -> Configuration | None:
            new = replace(now, acks=acks)
            for voter in now.voters:
                if voter.store_id not in voters:
                    new = new.without_voter(voter.store_id)
            return None if new == now else new

        return self.configure(change)

    def _encode(self, kind: Kind, payload: Any) -> bytes:
        node, disk = self.node, self.node.disk
        time_us = node.clock.wall_us
        return ENCODER.encode(disk.end + 1, self.epoch, time_us, kind, payload, disk.running)[0]

    def _log(self, kind: Kind, payload: Any) -> bool:
        """Write, ship before it is flushed here, and flush."""
        node, tracker = self.node, self.tracker
        assert tracker is not None
        try:
            added = node.append(self._encode(kind, payload))
        except StorageError as error:
            node.world.say(node, "cannot write: %s", error)
            return False
        if kind == Kind.CONFIGURATION:
            tracker.propose(added[-1].record.offset, node.disk.configurations[-1][1])
        for session in list(self.joined.values()):
            session.pump()
        self.sync()
        return True

    def sync(self) -> None:
        """One flush at a time, for all that was written meanwhile."""
        if not self._syncing:
            self._syncing = True
            end = self.node.disk.end
            self.node.after(self.node.sync_s(), lambda: self._synced(end))

    def _synced(self, end: int) -> None:
        self._syncing = False
        if self._stopped:
            return
        try:
            self.node.sync(end)
        except StorageError:
            return
        self._durable(end)
        if self.node.disk.end > end:
            self.sync()

    def _durable(self, end: int) -> None:
        tracker = self.tracker
        if tracker is None:
            return
        electing = self.node.electing
        if electing is not None and not self.node.world.synchronous and electing.unconfirmed:
            return  # cut off from most voters, another node may be primary: acknowledge nothing more
        self._commit(tracker.local_durable(end))

    def effect(self) -> None:
        """Most voters know that what was proposed is enough: it is in force."""
        if self.tracker is not None:
            self._commit(self.tracker.effect())

    def _commit(self, committed: int) -> None:
        node, tracker = self.node, self.tracker
        if tracker is None or committed <= node.committed:
            return
        node.world.check.commits(node, self.epoch, self.start, tracker.configuration, committed)
        node.world.say(node, "commits %d in epoch %d", committed, self.epoch)
        node.commit_through(committed)
        for session in list(self.joined.values()):
            session.pump()

    # -- followers ---------------------------------------------------------------------------------

    def open(self, stream: Stream, hello: Hello) -> None:
        """A follower has called; an older stream of the same store ends."""
        session = Session(self, stream, hello)
        refused = refusal(hello, self.view())
        if refused is not None:
            session.refuse(refused)
            return
        old = self.sessions.get(hello.store_id)
        self.sessions[hello.store_id] = session
        self.joined.pop(hello.store_id, None)
        if self.tracker is not None:
            self.tracker.left(hello.store_id)
        if old is not None:
            old.end(broken=False)
        session.join()

    def view(self) -> LogView:
        node, disk = self.node, self.node.disk
        return LogView(
            store_id=node.store_id,
            name=node.name,
            lineage=disk.lineage,
            branch=disk.lineage,
            epoch=self.epoch,
            fenced=self.fenced or not node.world.synchronous,
            first=disk.first,
            last=disk.end,
            epochs=disk.epochs,
            primary_address=node.address,
        )

    def on_ack(self, session: Session, ack: Ack) -> None:
        """A follower progressed: count it, unless its stream was replaced or has ended."""
        tracker, store_id = self.tracker, session.hello.store_id
        if tracker is None or self.joined.get(store_id) is not session:
            return
        self._commit(tracker.acked(store_id, ack.synced, ack.written, ack.visible))
        newest = self.node.disk.configurations[-1][1]
        if session.settled_in is not newest:
            self._settle(session, newest)

    def _settle(self, session: Session, newest: Configuration) -> None:
        """Make a follower that has caught up a voter, if it wants to be one; or count its copy again."""
        try:
            change = voter_change(session.hello, newest)
        except ValueError:  # its name is another voter's
            change = None
        if change is None:
            session.settled_in = newest
        elif self.configure(lambda now: voter_change(session.hello, now)):
            session.settled_in = self.node.disk.configurations[-1][1]

    def left(self, session: Session) -> None:
        """A stream ended."""
        store_id = session.hello.store_id
        if self.sessions.get(store_id) is session:
            del self.sessions[store_id]
            self.joined.pop(store_id, None)
            if self.tracker is not None:
                self.tracker.left(store_id)


class Session:
    """One follower's stream on the primary."""

    def __init__(self, feeding: Feeding, stream: Stream, hello: Hello) -> None:
        self.hello = hello
        self.progress = Progress(store_id=hello.store_id, name=hello.name, voter=hello.voter)
        self.settled_in: Configuration | None = None
        """The configuration in which this follower is what it can be."""
        self._feeding = feeding
        self._node = feeding.node
        self._stream = stream
        self._sender: Sender | None = None
        self._open = True
        self._due = float("inf")
        stream.accept(self)

    def refuse(self, refused: Refused) -> None:
        self._stream.to_follower(refused)
        self.end(broken=False)

    def end(self, *, broken: bool) -> None:
        if not self._open:
            return
        self._open = False
        if self.progress.state is not State.GONE:
            self.progress.enter(State.GONE)
        self._stream.end_by_primary(broken=broken)
        self._feeding.left(self)

    def on_end(self, _: WhyGone) -> None:
        self.end(broken=True)

    # -- joining -----------------------------------------------------------------------------------

    def join(self) -> None:
        """Answer the Hello as things stand."""
        feeding, hello, disk = self._feeding, self.hello, self._node.disk
        view = feeding.view()
        plan = plan_join(hello, view)
        if isinstance(plan, Continue):
            running = disk.running_at(plan.at.offset)
            if running is None:
                plan = NeedBootstrap(first=view.first, reason="trimmed")
            else:
                plan = check_running(plan, hello, running, view)
        elif isinstance(plan, Truncate | NeedBootstrap) and self._node.world.synchronous:
            plan = check_loss(hello, view) or plan
        if isinstance(plan, Superseded):
            feeding.superseded(hello.store_id, plan.epoch)
            text = f"epoch {plan.epoch} is newer"
            self.refuse(Refused(reason="superseded", message=text, epoch=plan.epoch))
        elif isinstance(plan, Continue):
            self._welcome(plan)
        else:
            if feeding.tracker is not None:
                feeding.tracker.forget(hello.store_id)
            self._stream.to_follower(plan)
            self.end(broken=False)

    def _welcome(self, plan: Continue) -> None:
        node, settings = self._node, self._node.world.settings
        epoch, now = self._feeding.epoch, node.now
        self.progress.join(plan.at, self.hello.credit_bytes, epoch, now)
        self._sender = Sender(
            self.progress,
            epoch=epoch,
            segment_bytes_max=settings.segment_bytes_max,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            heartbeat_timeout_s=settings.heartbeat_timeout_s,
            commit_linger_s=COMMIT_LINGER_S,
            now=now,
        )
        welcome = Welcome(
            lineage=node.disk.lineage,
            branch=node.disk.lineage,
            store_id=node.store_id,
            name=node.name,
            epoch=epoch,
            protocol=plan.protocol,
            last=plan.at,
        )
        self._stream.to_follower(welcome)
        self._feeding.joined[self.hello.store_id] = self
        if self._feeding.tracker is not None:
            self._feeding.tracker.forget(self.hello.store_id, above=plan.at.offset)
        self.pump()

    # -- hearing -----------------------------------------------------------------------------------

    def on_message(self, message: FromFollower) -> None:
        sender = self._sender
        if sender is None or not self._open:
            return
        try:
            if type(message) is Ack:
                if sender.on_ack(message, self._node.now):
                    self._feeding.on_ack(self, message)
            elif type(message) is Credit:
                sender.on_credit(message.bytes_granted, self._node.now)
            else:
                raise ProtocolError(f"{type(message).__name__} is not expected here")
        except Fenced as error:
            self._feeding.superseded(self.hello.store_id, error.epoch)
            self.end(broken=True)
        except ProtocolError as error:
            self._node.world.say(self._node, "ends the stream of %s: %s", self.hello.name, error)
            self.end(broken=True)
        self.pump()

    # -- sending -----------------------------------------------------------------------------------

    def pump(self) -> None:
        """Do what the sender wants until it waits."""
        sender, node = self._sender, self._node
        while sender is not None and self._open:
            step = sender.next(node.now, node.disk.end, node.committed)
            match step:
                case SendSegment():
                    self._segment(sender, step)
                case SendHeartbeat():
                    self._heartbeat(sender)
                case Dead(reason):
                    node.world.say(node, "ends the stream of %s: %s", self.hello.name, reason)
                    self.end(broken=True)
                case Wait(until):
                    self._wake_at(until)
                    return

    def _wake_at(self, until: float) -> None:
        now = self._node.now
        if now < self._due <= until:
            return
        self._due = max(until, now + TIMER_S_MIN)
        self._node.after(self._due - now, self._timer)

    def _timer(self) -> None:
        if self._node.now + TIMER_S_MIN / 10 >= self._due:
            self._due = float("inf")
            self.pump()

    def _heartbeat(self, sender: Sender) -> None:
        node = self._node
        stamp, committed = sender.stamp_us, node.committed
        sender.sent_heartbeat(node.now, committed)
        self._stream.to_follower(
            Heartbeat(epoch=sender.epoch, last=node.disk.end, committed=committed, stamp_us=stamp)
        )

    def _segment(self, sender: Sender, step: SendSegment) -> None:
        node, disk = self._node, self._node.disk
        first = step.after + 1
        if first < disk.first:
            self._stream.to_follower(NeedBootstrap(first=disk.first, reason="trimmed"))
            self.end(broken=False)
            return
        data, last = self._read(first, step.bytes_max)
        committed = node.committed
        sender.sent_segment(first, last, len(data), node.now, committed)
        size = node.world.settings.segment_bytes_max if first == last else len(data)
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        for part, piece in enumerate(pieces):
            self._stream.to_follower(
                Segment(
                    epoch=sender.epoch,
                    first=first,
                    last=last,
                    data=piece,
                    committed=committed,
                    part=part,
                    parts=len(pieces),
                    more=last < disk.end or part < len(pieces) - 1,
                )
            )

    def _read(self, first: int, bytes_max: int) -> tuple[bytes, int]:
        """Whole records from ``first`` on, at least one, and the last offset of them."""
        disk = self._node.disk
        entry = disk.entry(first)
        assert entry is not None
        found, size = [entry.data], len(entry.data)
        while (entry := disk.entry(first + len(found))) is not None and size + len(entry.data) <= bytes_max:
            found.append(entry.data)
            size += len(entry.data)
        return b"".join(found), first + len(found) - 1
