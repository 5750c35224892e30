"""The followers of a primary: their streams, how far the copy of each has come, and what that commits.

This is the table that the other parts of a primary read and change. It decides nothing about epochs: whoever
begins one (``runtime/leadership.py``) puts in the tracker that counts for it, and takes it out at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvrep.errors import AckTimeout, NotEnoughFollowers
from kvrep.model.configuration import Acks, Configuration
from kvrep.model.position import Position
from kvrep.replication.acks import CommitTracker, Level
from kvrep.replication.messages import Ack, Refused
from kvrep.replication.rounds import Rounds

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.runtime.session import FollowerSession

__all__ = ["Followers", "Wanted"]

LOOK_UP_S = 0.25
"""How often who waits for copies looks whether it need not any more."""


class Wanted:
    """More copies of a committed write than the commit rule asks for, and who waits for them."""

    __slots__ = ("level", "needed", "position", "tell")

    def __init__(self, position: Position, needed: int, level: Level, tell: Callable[[], None]) -> None:
        self.position = position
        self.needed = needed
        self.level = level
        self.tell = tell
        """Called when there are so many, and when there will be no more. Any thread; quick."""


class Followers:
    """One per role as primary. Any thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._engine = node.engine
        # Protects everything below. Taken inside the committer's ``lead`` and before its ``_order``, never the
        # other way round; no stream is called while it is held.
        self.lock = threading.Lock()
        self.tracker: CommitTracker | None = None
        """Counts the copies in the epoch of this node; ``None`` while nothing may be committed by it. Single
        values may be read without the lock."""
        self.rounds = Rounds(node.engine.home.store_id)
        """The questions of that epoch; see ``runtime/confirming.py``."""
        self.joined: dict[bytes, FollowerSession] = {}
        """The streams whose join is verified, by store id: these stores can make a copy."""
        self._streams: dict[bytes, FollowerSession] = {}
        self._told: Configuration | None = None
        """The configuration in force when :meth:`on_committed` last looked."""
        self._announced = 0
        """The last offset that followers were told to fetch."""
        self._closed = False
        self._wanted: set[Wanted] = set()
        # Announces acks to those who wait for any.
        self._acked = threading.Condition()
        self._waiting = 0

    # -- the epoch that is counted for -------------------------------------------------------------

    def begin(self, tracker: CommitTracker) -> None:
        """Count for a new epoch from here on."""
        with self.lock:
            self.tracker, self._told = tracker, tracker.configuration
            self.rounds = Rounds(self._engine.home.store_id)

    def end(self) -> None:
        """Commit nothing more: what is logged waits for another word."""
        with self.lock:
            self.tracker = None

    @property
    def started(self) -> bool:
        """Whether the start of this epoch is committed, and with it all that came before."""
        tracker = self.tracker
        return tracker is not None and tracker.committed >= tracker.epoch_start

    # -- streams -----------------------------------------------------------------------------------

    def streams(self) -> dict[bytes, FollowerSession]:
        """A copy, by store id; those that have not joined are among them."""
        with self.lock:
            return dict(self._streams)

    def admit(self, stream: FollowerSession) -> Refused | None:
        """Register a stream; an older stream of the same store ends."""
        with self.lock:
            if self._closed:
                return Refused(reason="closing", message=f"{self._node.label} is closing")
            old = self._streams.get(stream.store_id)
            self._streams[stream.store_id] = stream
            self._forget(stream.store_id)
        if old is not None and old is not stream:
            old.end(Refused(reason="closing", message="a newer stream of the same store took over"))
        return None

    def join(self, stream: FollowerSession, at: int) -> bool:
        """What that follower holds, records through ``at`` now, counts from here on; False when its stream is over
        already."""
        with self.lock:
            if self._closed or self._streams.get(stream.store_id) is not stream:
                return False
            if self.tracker is not None:
                self.tracker.forget(stream.store_id, above=at)
            self.joined[stream.store_id] = stream
            self._engine.committer.on_written = self.wake_for_write
            return True

    def leave(self, stream: FollowerSession) -> bool:
        """A stream ended; False when it was none of ours any more."""
        with self.lock:
            if self._streams.get(stream.store_id) is not stream:
                return False
            del self._streams[stream.store_id]
            self._forget(stream.store_id)
            return True

    def replace_copy(self, stream: FollowerSession) -> None:
        """The follower cannot go on from what it holds now."""
        with self.lock:
            if self.tracker is not None and self._streams.get(stream.store_id) is stream:
                self.tracker.forget(stream.store_id)

    def _forget(self, store_id: bytes) -> None:
        """Its copy no longer counts. The lock is held."""
        self.joined.pop(store_id, None)
        if self.tracker is not None:
            self.tracker.left(store_id)
        if not self.joined:
            self._engine.committer.on_written = None

    def proceed(self) -> None:
        """Have every stream answer its Hello as things stand now."""
        for stream in self.streams().values():
            stream.proceed()

    def drop(self, refused: Refused) -> None:
        """End all streams and forget them at once."""
        with self.lock:
            streams = list(self._streams.values())
            self._streams.clear()
            self.joined.clear()
        for stream in streams:
            stream.end(refused)

    def close(self) -> None:
        """End all streams; none is admitted any more, and nobody waits for acks."""
        with self.lock:
            self._closed = True
        with self._acked:
            self._acked.notify_all()
        self._tell_wanted()
        for stream in self.streams().values():
            stream.end(Refused(reason="closing", message=f"{self._node.label} is closing"))
        self._engine.committer.on_written = None

    def wake_for_write(self) -> None:
        """The log has grown: ship before it is flushed here."""
        self._announced = self._engine.tail.offset
        for stream in list(self.joined.values()):
            stream.wake_for_write()

    def hurry(self, store_id: bytes) -> None:
        """Tell that follower at once what is committed."""
        stream = self.joined.get(store_id)
        if stream is not None:
            stream.hurry()

    def on_committed(self) -> tuple[Configuration, Configuration] | None:
        """Tell followers when nothing else is on its way to them. Returns the configurations that were and
        are in force, where another one is since the last call."""
        for stream in list(self.joined.values()):
            stream.wake_for_commit()
        tracker = self.tracker
        if tracker is None or tracker.configuration is self._told:
            return None
        before, self._told = self._told, tracker.configuration
        return (before, tracker.configuration) if before is not None else None

    # -- the commit rule ---------------------------------------------------------------------------

    def rule(self, durable: int) -> int:
        """What is committed once this node holds ``durable``: the committer's rule."""
        tracker = self.tracker
        if tracker is None:
            return 0
        if self._announced < self._engine.tail.offset and self.joined:
            self.wake_for_write()  # a follower joined while the group was written
        if (
            not self._engine.configuration.synchronous
            and time.monotonic() > self._node.coordinator.confirmed_until
        ):
            # Cut off from most voters for too long, another node may be primary: acknowledge nothing more.
            return tracker.committed
        with self.lock:
            return tracker.local_durable(durable)

    def acked(self, stream: FollowerSession, ack: Ack) -> bool:
        """Count an ack, and commit what it allows; False when its stream was replaced or has ended."""
        store_id = stream.store_id
        with self.lock:
            tracker = self.tracker
            if tracker is None or self.joined.get(store_id) is not stream:
                return False
            committed = tracker.acked(store_id, ack.synced, ack.written, ack.visible)
        self.commit(committed)
        if self._wanted:
            self._tell_wanted()
        if self._waiting:
            with self._acked:
                self._acked.notify_all()
        return True

    def commit(self, offset: int) -> None:
        """The tracker says that all through ``offset`` is committed."""
        committer = self._engine.committer
        if offset > committer.committed:
            committer.commit_through(offset)

    # -- what can be asked of it -------------------------------------------------------------------

    def missing_voters(self) -> list[bytes]:
        """The data voters whose join is not verified now."""
        with self.lock:
            here = {self._engine.home.store_id, *self.joined}
        voters = self._engine.configuration.voters
        return [v.store_id for v in voters if not v.witness and v.store_id not in here]

    def missing_copies(self) -> int:
        """How many more copies a user's write needs than can be made now; 0 without an epoch."""
        tracker = self.tracker
        if tracker is None:
            return 0
        with self.lock:
            return tracker.missing(self.joined)

    def check_enough(self, tracker: CommitTracker) -> None:
        """:class:`NotEnoughFollowers` when fewer copies can be made now than a user's write needs, or it would be
        too far ahead of other voters, none of whom is there."""
        ahead = ""
        with self.lock:
            missing = tracker.missing(self.joined)
            if tracker.bounded:
                ahead = _ahead(tracker, self.joined, self._engine.committer.ordered + 1)
        if ahead:
            raise NotEnoughFollowers(
                f"{ahead}; none is connected",
                hint="start one of the other voters, or go on without them with promote(force=True)",
                needed=2,
                connected=1,
            )
        if missing:
            needed = max(rule.copies_wanted for rule in tracker.rules)
            raise NotEnoughFollowers(
                f"the ack rule needs {needed} copies, {needed - missing} can be made now",
                needed=needed,
                connected=needed - missing,
            )

    def too_far(self, offset: int) -> str:
        """How far ahead of the other voters a record at ``offset`` is, where that keeps it back; else empty."""
        tracker = self.tracker
        if tracker is None or not tracker.bounded:
            return ""
        with self.lock:
            return _ahead(tracker, (), offset)

    def _asked(self, acks: Acks | None) -> int:
        """How many copies a write asks for that says ``acks``: never fewer than the rule wants."""
        configuration = self._engine.configuration
        if acks == "majority":
            asked = len(configuration.voters) // 2 + 1
        elif acks == "all":
            asked = configuration.data_voters
        else:
            asked = 0 if acks is None else int(acks) + 1
        return max(asked, configuration.copies_wanted)

    def check_more(self, acks: Acks | None) -> None:
        """Refuse a write that asks for more copies than can be made now."""
        needed = self._asked(acks)
        tracker = self.tracker
        if tracker is None:
            return
        with self.lock:
            possible = tracker.reachable(self.joined)
        if needed > possible:
            raise NotEnoughFollowers(
                f"the write asks for {needed} copies, {possible} can be made now",
                needed=needed,
                connected=possible,
            )

    def await_more(self, position: Position, acks: Acks | None, level: Level, deadline_s: float) -> None:
        """Wait until enough copies of a committed write are at ``level``; :class:`AckTimeout` at the deadline."""
        told = threading.Event()
        with self.wanting(position, acks, level, told.set) as wanted:
            while not self.met(wanted):
                left = deadline_s - time.monotonic()
                if left <= 0 or self._closed:
                    raise self.too_few(wanted)
                told.wait(min(left, LOOK_UP_S))
                told.clear()

    @contextmanager
    def wanting(
        self, position: Position, acks: Acks | None, level: Level, tell: Callable[[], None]
    ) -> Iterator[Wanted]:
        """Have ``tell`` called when enough copies of a committed write are at ``level``; within the block."""
        wanted = Wanted(position, self._asked(acks), level, tell)
        with self.lock:
            self._wanted.add(wanted)
        try:
            if level == "visible":
                for stream in list(self.joined.values()):
                    stream.hurry()
            yield wanted
        finally:
            with self.lock:
                self._wanted.discard(wanted)

    def met(self, wanted: Wanted) -> bool:
        """Whether there are so many copies now."""
        return self.copies_at(wanted.position.offset, wanted.level) >= wanted.needed

    def too_few(self, wanted: Wanted) -> AckTimeout:
        """The error of a wait for copies that did not come."""
        position, needed, level = wanted.position, wanted.needed, wanted.level
        reached = self.copies_at(position.offset, level)
        return AckTimeout(
            f"the write at {position} is committed; {reached} of the {needed} copies asked for are {level}",
            position=position,
            reached=reached,
            needed=needed,
        )

    @property
    def closed(self) -> bool:
        """Whether no more copies will be made by this node as primary."""
        return self._closed

    def _tell_wanted(self) -> None:
        with self.lock:
            waiting = list(self._wanted)
        for wanted in waiting:
            if self._closed or self.met(wanted):
                wanted.tell()

    def await_ack(self, timeout_s: float) -> None:
        """Wait for the next ack of any follower."""
        with self._acked:
            self._waiting += 1
            try:
                self._acked.wait(timeout_s)
            finally:
                self._waiting -= 1

    def copies_at(self, offset: int, level: Level = "synced") -> int:
        """How many copies of a record are at ``level``."""
        tracker = self.tracker
        if tracker is None:
            return 1
        with self.lock:
            return tracker.copies_at(offset, level)

    def synced_by(self, store_id: bytes) -> int:
        """The last offset that a follower has confirmed; 0 when it is not connected."""
        stream = self.joined.get(store_id)
        progress = stream.progress if stream is not None else None
        return progress.synced if progress is not None else 0


def _ahead(tracker: CommitTracker, connected: Collection[bytes], offset: int) -> str:
    """What keeps a record at ``offset`` back for being too far ahead of the other voters, of whom only
    ``connected`` can catch up; empty when nothing does."""
    found = tracker.too_far(connected, offset)
    if found is None:
        return ""
    furthest, allowed = found
    known = (
        f"the furthest other voter holds records through {furthest}"
        if furthest
        else "no other voter has joined in this epoch"
    )
    return f"{known}, and lag_records_max is {allowed}"
