"""The role of a primary: its parts, what the streams of followers tell them, and the log that is kept for those.

The parts, each of which knows only those before it:

* ``followers``: streams, acks, the commit rule (``runtime/followers.py``);
* ``leadership``: the epoch (``runtime/leadership.py``);
* ``configuring``: changes of the configuration (``runtime/configuring.py``);
* ``degrading``: going on with fewer copies (``runtime/degrading.py``);
* ``confirming``: linearizable reads (``runtime/confirming.py``);
* ``slots`` and ``spools``: what followers need when they come back, or come without anything.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from kvrep.errors import Error, ProtocolError
from kvrep.replication.messages import Ack, Hello, SlotState
from kvrep.replication.progress import State
from kvrep.runtime.configuring import Configuring
from kvrep.runtime.confirming import Confirming
from kvrep.runtime.degrading import Degrading
from kvrep.runtime.followers import Followers
from kvrep.runtime.lags import Lags
from kvrep.runtime.leadership import Leadership, nothing_commits
from kvrep.runtime.session import FollowerSession
from kvrep.runtime.slots import Slots
from kvrep.runtime.spooling import Spools
from kvrep.status import EventKind

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["Shipping"]

log = logging.getLogger("kvrep.replication")

ASYNC_LINGER_S = 0.008
GATHER_RECORDS_MIN = 2000
"""A bound on the lag below this does not leave room for segments to gather: writers would wait for them."""


class Shipping:
    """One per node that is, or is becoming, primary. Any thread."""

    def __init__(self, node: Node, heard: tuple[SlotState, ...] = ()) -> None:
        """``heard``: the slots that the former primary told of; what they need of the log is kept."""
        self.node = node
        self.engine = node.engine
        self.options = node.options
        # Until an epoch begins, nothing that is logged here may be taken for committed.
        self.engine.committer.rule = nothing_commits
        self.slots = Slots(self.engine.home.path / "SLOTS")
        self.spools = Spools(self.engine, self.slots, node.label)
        self.followers = Followers(node)
        self.leadership = Leadership(node, self.followers)
        self.configuring = Configuring(node, self.followers, self.leadership)
        self.degrading = Degrading(node, self.followers, self.leadership, self.configuring)
        self.confirming = Confirming(node, self.followers, self.leadership)
        self.lags = Lags(self.engine)
        self._complaints: set[str] = set()
        self._inherit(heard)

    def attach(self) -> None:
        """Have the engine ask this role from now on."""
        self.engine.writable = self.leadership.check_writable
        self.engine.on_configuration = self.configuring.on_configuration
        self.engine.keep_from = self._keep_from
        self.engine.flush_limit = self._flush_limit
        self.engine.on_tick = self._tick

    # -- the streams of followers ------------------------------------------------------------------

    def open_session(self, peer: str) -> FollowerSession:
        return FollowerSession(self, peer)

    def joined(self, session: FollowerSession, at: int) -> None:
        """The join is verified: what the follower holds counts from here on."""
        hello = session.hello
        assert hello is not None
        if not self.followers.join(session, at):
            return
        if hello.name:
            self.slots.note(
                hello.store_id, name=hello.name, address=hello.address, voter=hello.voter, acked=at
            )
        self.spools.joined(hello.store_id)
        self._judge(hello)
        self.node.tell(EventKind.FOLLOWER_JOINED, name=hello.name, address=hello.address)

    def _judge(self, hello: Hello) -> None:
        """Warn of a voter that would, as primary, count its own copy before it is on its disk; once for each."""
        if hello.durability == "os" and hello.voter and hello.name and self.engine.configuration.synchronous:
            self.complain(
                f'{self.node.label}: the voter {hello.name} was opened with durability="os": what it acks is on its'
                " disk, but should it become primary, its own copy counts before it is",
                level=logging.WARNING,
            )

    def on_ack(self, session: FollowerSession, ack: Ack) -> None:
        """A follower progressed: perhaps something is committed now."""
        if self.followers.acked(session, ack):
            self.slots.acked(session.store_id, ack.synced)
            self.node.on_acked()
            self.configuring.consider(session, ack.synced)

    def left(self, session: FollowerSession, error: Exception | None) -> None:
        """A stream ended."""
        if not self.followers.leave(session):
            return
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

    def streams_to(self, store_id: bytes) -> bool:
        """Whether that follower is connected and gets records."""
        stream = self.followers.streams().get(store_id)
        progress = stream.progress if stream is not None else None
        return progress is not None and progress.state is State.STREAMING

    def complain(self, text: str, *, level: int = logging.ERROR) -> None:
        """Log something that only people can mend; once, however often it is met."""
        if text not in self._complaints and len(self._complaints) < 100:
            self._complaints.add(text)
            log.log(level, "%s", text)

    @property
    def linger_s(self) -> float:
        """How far apart segments shall be: an asynchronous primary lets them gather."""
        tracker = self.followers.tracker
        if tracker is None or tracker.configuration.synchronous:
            return 0.0
        return 0.0 if 0 < tracker.configuration.lag_records_max < GATHER_RECORDS_MIN else ASYNC_LINGER_S

    def shippable(self) -> int:
        return self.engine.tail.offset

    # -- what happens on this node -----------------------------------------------------------------

    def on_committed(self, committed: int) -> None:
        """More is committed: show it where reads were withheld, tell followers, tell of another rule."""
        if self.engine.view.withheld is not None:
            tracker = self.followers.tracker
            if tracker is not None and committed >= tracker.epoch_start:
                self.leadership.reveal()
        changed = self.followers.on_committed()
        if changed is not None:
            self.degrading.tell(*changed)

    def _tick(self) -> None:
        """Twice a second: what needs no event to happen."""
        now = time.monotonic()
        for session in list(self.followers.joined.values()):
            # Its own sender would see it, too, unless the network has taken it in and does not let go.
            silent_s = session.silent_s(now)
            if silent_s >= self.options.heartbeat_timeout_s:
                session.end()
                self.left(session, ProtocolError(f"nothing heard from it for {silent_s:.1f} s"))
        self.leadership.tick(now)
        self.degrading.tick(now)
        self.configuring.count_myself()
        self.spools.tick()
        self.slots.expire(self.spools.users() | set(self.followers.streams()))
        self.slots.save()
        self.lags.look(self._confirmed())

    def _confirmed(self) -> dict[bytes, int]:
        """What each follower has confirmed, connected or not, by store id."""
        confirmed = {store_id: slot.acked for store_id, slot in self.slots.all()}
        for store_id, stream in self.followers.streams().items():
            if stream.progress is not None:
                confirmed[store_id] = stream.progress.synced
        return confirmed

    # -- what is kept for followers ----------------------------------------------------------------

    def _inherit(self, heard: tuple[SlotState, ...]) -> None:
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
        """What followers are told of each other, for the one that becomes primary."""
        return tuple(
            SlotState(store_id=i, name=slot.name, acked=slot.acked)
            for i, slot in self.slots.all()
            if slot.name
        )

    def reserve(self, session: FollowerSession) -> None:
        """A follower needs a snapshot: from now on the log is kept for it."""
        hello = session.hello
        if hello is not None:
            kept = self.spools.position_for(hello.store_id)
            applied = self.engine.tree.state.applied.offset if kept is None else kept
            self.slots.note(
                hello.store_id, name=hello.name, address=hello.address, voter=hello.voter, acked=applied
            )

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

    def _flush_limit(self) -> int | None:
        """In asynchronous mode, what no voter has confirmed stays out of LMDB for a while: should another
        node be promoted, this one can cut its log instead of fetching a whole copy. ``None``: no limit."""
        configuration = self.engine.configuration
        if configuration.synchronous or configuration.data_voters < 2:
            return None
        others = (v.store_id for v in configuration.voters if v.store_id != self.engine.home.store_id)
        return max((slot.acked for i in others if (slot := self.slots.get(i)) is not None), default=0)

    # -- the end -----------------------------------------------------------------------------------

    def retire(self, error: Error, timeout_s: float) -> None:
        """The node stops being primary: nothing more is committed by this role. What is logged waits for its
        outcome, and who wants to write gets ``error``."""
        self.leadership.retire(error)
        self.stop(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """End all streams and copies, save the slots."""
        self.leadership.stop()
        self.followers.close()
        self.degrading.stop(timeout_s)
        self.spools.close(timeout_s)
        self.slots.save(now=True)
