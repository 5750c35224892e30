"""Group commit: callers that arrive together share one write and one flush of the log.

A caller puts its write in order under a lock that never covers I/O. Whoever finds no leader leads: it takes
what is in order, writes it as one group, names its *heir*, wakes it and then its own group. As long as an
heir is named, the others leave the lead to it: they would only queue up at the lead lock, in groups of one
or two writes. A background thread leads for those who cannot (pipelined writes, asyncio).

A transaction holds the *place*: from its first read to its append nothing else is put in order; writes that
arrive meanwhile stand behind it.

What an interrupt (Ctrl-C) can leave behind at any bytecode is a group that is taken but not finished; it
stays in ``_group`` and the next leader finishes it, byte for byte. Waiters look up from their sleep twenty
times a second, so that a leader that was interrupted cannot leave them alone.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kvrep.errors import (
    ClosedError,
    Error,
    ForkedError,
    LogFailed,
    NotPrimary,
    Overloaded,
    StorageFailed,
    StorageFull,
    again,
)
from kvrep.model.codec import RecordEncoder
from kvrep.model.position import Position
from kvrep.model.record import Kind, Record
from kvrep.storage.log import Log, Tail
from kvrep.storage.view import View
from kvrep.storage.write import Write, complete_all, tell_again

__all__ = ["Committer"]

GROUP_WRITES_MAX = 4096
GROUP_BYTES_MAX = 4 << 20
LOOK_UP_S = 0.05
_tail = tuple.__new__  # half the price of a named tuple's own constructor
WRITE_OVERHEAD_BYTES = 160
"""What a write that waits costs in memory beside its keys and values."""


def _wall_us() -> int:
    return time.time_ns() // 1000


def _as_durable(durable: int) -> int:
    """The rule of a node without followers: what is durable here is committed."""
    return durable


def _other_epoch(write: Write) -> NotPrimary:
    """A forwarded write is for one epoch: in another one, a repeat of it may have been answered already."""
    return NotPrimary(f"epoch {write.epoch} is over", epoch=write.epoch, primary_address=None)


class _Group:
    """Writes taken together, and how far they have come."""

    __slots__ = ("frames", "length", "queued_bytes", "special", "tail", "writes")

    def __init__(self, writes: list[Write], queued_bytes: int) -> None:
        self.writes = writes
        self.queued_bytes = queued_bytes
        """What of them is counted as queued."""
        self.frames: list[bytes] | None = None
        self.length = 0
        self.tail: Tail | None = None
        self.special = False
        """Whether it holds a record that is not a write."""

    def written(self, log: Log) -> bool:
        """Whether the log holds it: asked of the log itself, whose tail moves by one assignment."""
        return self.tail is not None and log.tail.offset >= self.tail.offset


class Committer:
    """Orders, logs and commits the writes of one store."""

    def __init__(
        self,
        log: Log,
        view: View,
        *,
        committed: int,
        sync: bool,
        uncommitted_bytes_max: int,
        wall_us: Callable[[], int] | None = None,
    ) -> None:
        self.log = log
        self.view = view
        self.sync = sync
        """Durability ``"sync"``: a group counts as durable only when it is flushed."""
        self.committed = committed
        self.epoch = 0
        """The epoch that records get; 0 while this node is not primary."""
        self.closed: Error | None = None
        """Set once: why no write is taken any more."""
        self.failure: StorageFailed | None = None
        self.no_epoch: Error | None = None
        """Why the epoch could not begin, while it has not: nothing else may be logged in it."""
        self.rule: Callable[[int], int] = _as_durable
        """Durable offset here -> committed offset. Replaced by the replication of a primary."""
        self.on_written: Callable[[], None] | None = None
        """Called by the leader when a group is written but not yet flushed: shipping may begin."""
        self.on_special: Callable[[Write, int], None] = lambda write, offset: None
        """Called by the leader for every record that is not a write, once it is in the log at that offset and
        before it counts as durable."""
        self.on_committed: Callable[[int], None] = lambda committed: None
        self.pending: deque[Write | Record] = deque()
        """Logged and not yet committed, in log order."""
        self.pending_bytes = 0
        self.uncommitted_bytes_max = uncommitted_bytes_max
        self._wall_us = wall_us or _wall_us
        self._encode = RecordEncoder().encode
        # Protects _ordered, _behind, _holder, _queue and _queued_bytes. Never held during I/O.
        self._order = threading.Lock()
        self._ordered: list[Write] = []
        self._behind: list[Write] = []
        self._holder: object | None = None
        self._held_since_s = 0.0
        self._taken_back: tuple[object, Error] | None = None
        """Who last lost the place to a refused write, and that refusal."""
        self._queue: deque[tuple[object, Callable[[], None]]] = deque()
        self._queued_bytes = 0
        # Held by whoever writes to the log.
        self.lead = threading.Lock()
        self._group: _Group | None = None
        # The write whose thread was asked to lead next. Set under _order; cleared by whoever leads.
        self._heir: Write | None = None
        # Held while committed records are published; orders them.
        self._publishing = threading.Lock()
        # Writes that are committed and are being told so, by the id of their list.
        self._telling: dict[int, list[Write]] = {}
        self._told_slowly: set[int] = set()
        self._kick = threading.Event()
        self._thread: threading.Thread | None = None

    # -- ordering ----------------------------------------------------------------------------------

    def order(self, write: Write) -> None:
        """Put a write in order. Raises what refuses it; then it was not logged."""
        with self._order:
            if self.closed is not None:
                raise again(self.closed)
            if self.no_epoch is not None and write.kind != Kind.EPOCH:
                raise again(self.no_epoch)
            if write.origin is not None and write.epoch != self.epoch:
                raise _other_epoch(write)
            count = len(self._ordered) + len(self._behind) + len(self.pending)
            size = self._queued_bytes + self.pending_bytes + write.size + count * WRITE_OVERHEAD_BYTES
            if size > self.uncommitted_bytes_max and count:
                raise Overloaded(
                    f"{(self._queued_bytes + self.pending_bytes) >> 10} KiB of writes are not committed yet"
                    " (uncommitted_bytes_max)"
                )
            self._queued_bytes += write.size
            (self._ordered if self._holder is None else self._behind).append(write)

    def withdraw(self, write: Write) -> bool:
        """Take a write out of the order again; False when a leader has it already."""
        with self._order:
            for queue in (self._ordered, self._behind):
                if write in queue:
                    queue.remove(write)
                    self._queued_bytes -= write.size
                    return True
        return False

    def take_place(self, owner: object, grant: Callable[[], None]) -> bool:
        """Ask for the writer's place; True when it is ours now, else ``grant`` is called when it is."""
        with self._order:
            refused = self.closed or self.no_epoch
            if refused is not None:
                raise again(refused)
            if self._holder is None:
                self._holder = owner
                self._held_since_s = time.monotonic()
                return True
            self._queue.append((owner, grant))
            return False

    def leave_place(self, owner: object, write: Write | None) -> bool:
        """Give the place back, with the transaction's write or without. False if it was not held."""
        with self._order:
            if self._holder is not owner:
                self._queue = deque(entry for entry in self._queue if entry[0] is not owner)
                return False
            refused = self.closed or self.no_epoch
            if write is not None and write.origin is not None and write.epoch != self.epoch:
                refused = refused or _other_epoch(write)
            grant = self._pass_place([write] if write is not None and refused is None else [])
            waiting = bool(self._ordered)
        if write is not None and refused is not None:
            write.complete(refused)
        if grant is not None:
            grant()
        if waiting and write is None:
            self.kick()
        return True

    def _pass_place(self, writes: list[Write]) -> Callable[[], None] | None:
        """The holder leaves with ``writes``; returns how to tell the next one. The order lock is held."""
        ordered = [*self._ordered, *writes, *self._behind]
        queued = self._queued_bytes + sum(w.size for w in writes)
        queue, now = deque(self._queue), time.monotonic()
        following, grant = queue.popleft() if queue else (None, None)
        # No call stands between these, so an interrupt finds all of it done or nothing.
        self._ordered, self._behind, self._queued_bytes = ordered, [], queued
        self._holder, self._queue, self._held_since_s = following, queue, now
        return grant

    def expire_place(self, age_max_s: float) -> None:
        """Take the place from a transaction that has held it too long, or was interrupted at its end."""
        holder = self._holder
        if holder is None:
            return
        if time.monotonic() - self._held_since_s > age_max_s or not getattr(holder, "_open", True):
            self.leave_place(holder, None)

    def look_after(self) -> None:
        """Have written what an interrupted thread put in order or began, and left. From time to time."""
        if (self._ordered or self._group is not None) and not self.lead.locked():
            self.kick()
        if self.pending:
            self.commit_through(max(self.committed, self.rule(self.durable)))
        left = self._telling.copy()
        for key, writes in left.items():
            if key in self._told_slowly:  # since the last look: nobody is at it any more
                tell_again(writes)
                self._telling.pop(key, None)
        self._told_slowly = set(left)

    def place_error(self, owner: object) -> Error | None:
        """Why ``owner`` lost the place, if it was for another reason than its age."""
        taken = self._taken_back
        return taken[1] if taken is not None and taken[0] is owner else self.closed

    def holds_place(self, owner: object) -> bool:
        return self._holder is owner

    def unpublished(self) -> list[Any]:
        """Everything ordered or logged that reads cannot see yet, in log order. The place is held."""
        # Taken against the direction in which writes move, so that none is missed; one seen twice is harmless.
        with self._order:
            ordered = list(self._ordered)
        group = self._group
        taken: list[Any] = list(group.writes) if group is not None else []
        while True:
            try:
                pending = list(self.pending)
                break
            except RuntimeError:  # grew or shrank while it was copied
                continue
        # What an interrupted leader left behind although it is published would hide newer writes.
        committed = self.committed
        pending = [w for w in pending if w.offset > committed]
        seen = {id(w) for w in pending}
        taken = [w for w in taken if id(w) not in seen]
        seen.update(id(w) for w in taken)
        return pending + taken + [w for w in ordered if id(w) not in seen]

    # -- leading -----------------------------------------------------------------------------------

    def commit_alone(self, write: Write) -> bool:
        """``order`` and ``finish`` where nobody stands in the way; else False, and nothing happened."""
        if self._ordered or self._heir is not None or self.lead.locked():
            return False
        with self.lead:
            done = self._write_alone(write)
        if done and self._ordered:
            self.hand_over()
        return done

    def commit(self, write: Write, deadline_s: float) -> None:
        """``order`` and ``finish`` in one."""
        write.awaited = True
        self.order(write)
        self.finish(write, deadline_s)

    def finish(self, write: Write, deadline_s: float) -> None:
        """Lead or wait until ``write`` is done or ``time.monotonic()`` passes ``deadline_s``."""
        while not write.done:
            if not write.offset and (write.lead or self._lead_is_free()):
                self._lead(write)
                if write.done:
                    return
            left = deadline_s - time.monotonic()
            if left <= 0:
                break
            # From here on, who hands over finds us; who did before has left the lead free.
            write.attach()
            if not write.offset and self._lead_is_free():
                continue
            if not write.park(min(left, LOOK_UP_S)):
                self._heir = None  # if one was asked, it did not come
            if not write.done and 0 < write.offset <= self.committed:
                write.complete()
        if write.lead:  # asked to lead, but the outcome or the deadline came first
            write.lead = False
            self._heir = None
            self.hand_over()

    def _lead_is_free(self) -> bool:
        return self._heir is None and not self.lead.locked()

    def _lead(self, write: Write) -> None:
        """Write the group that ``write`` is in, name the next leader, and publish what may be published."""
        with self.lead:
            write.lead = False
            self._heir = None
            if not write.offset and not write.done:
                self.write_group()
            heir = self._name_heir() if self._ordered else None
        if heir is not None:
            heir.wake()
        else:
            self.hand_over()
        self.advance()

    def _write_alone(self, write: Write) -> bool:
        """The short way of a single write that nobody stands beside; False when it cannot be taken.

        It does what ``order``, ``write_group`` and ``commit_through`` do, in the same order, without their
        queues. The lead lock is held, nothing is pending and the rule is this node's own: so the write is
        committed as soon as it is durable. An interrupt leaves the group as ``write_group`` does.
        """
        log, epoch = self.log, self.epoch
        with self._order:
            if (
                self._ordered
                or self._holder is not None
                or self._group is not None
                or self.pending
                or self.rule is not _as_durable
                or self.on_written is not None
                or write.kind
                or write.origin is not None
                or not epoch
                or self.closed is not None
            ):
                return False
            self._group = group = _Group([write], 0)
        try:
            before, _, running = log.tail
            offset = before + 1
            frame, running = self._encode(offset, epoch, self._wall_us(), 0, write.payload, running)
            write.epoch = epoch
            group.length = len(frame)
            group.tail = tail = _tail(Tail, (offset, epoch, running))
            group.frames = [frame]
            log.append_frame(frame, tail, self.committed, sync=self.sync)
        except Exception as error:
            self._failed(group, error)
            return True
        write.offset = offset
        # Without ``_publishing``: nothing is pending, so nobody else has anything to publish.
        self.view.publish_write(write)
        self.committed = offset
        self._group = None
        write.done = True
        if write._waiter is not None or write._callbacks is not None:  # a transaction may wait for it
            write.settle()
        self.on_committed(offset)
        return True

    def _name_heir(self) -> Write | None:
        """Choose a write whose thread sleeps; that thread is to lead next."""
        with self._order:
            for write in self._ordered[:16]:
                if write.has_waiter:
                    write.lead = True
                    self._heir = write
                    return write
        return None

    def hand_over(self) -> None:
        """After the lead lock was held: have somebody write what was put in order meanwhile."""
        if not self._ordered or self.lead.locked() or self._heir is not None:
            return
        heir = self._name_heir()
        if heir is not None:
            heir.wake()
        elif not all(write.awaited for write in self._ordered[:16]):
            self.kick()  # the others' threads are on their way and find the lead free

    def _take(self) -> _Group | None:
        group = self._group
        if group is not None:
            return group  # its leader was interrupted
        with self._order:
            ordered = self._ordered
            if not ordered:
                return None
            count = size = 0
            for write in ordered:
                size += write.size
                count += 1
                if count >= GROUP_WRITES_MAX or size >= GROUP_BYTES_MAX:
                    break
            group, rest = _Group(ordered[:count], size), ordered[count:]
            self._group, self._ordered = group, rest  # no call between: an interrupt finds both or neither
        return group

    def write_group(self) -> None:
        """Write the next group. The lead lock is held."""
        group = self._take()
        if group is None:
            return
        early = self.on_written
        log = self.log
        # What an interrupted leader has begun to write may be on the disk: it is written to its end.
        begun = group.frames is not None and self.failure is None
        if self.closed is not None and not begun and not group.written(log):
            self._fail(group, self.closed)
            return
        try:
            if group.frames is None:
                self._encode_group(group)
            assert group.frames is not None
            assert group.tail is not None
            if not group.written(log):
                sync_now = self.sync and early is None
                first = log.tail.offset + 1
                log.append(group.frames, group.length, first, group.tail, self.committed, sync=sync_now)
            if group.special:
                self._note_special(group)
            if early is not None:
                early()
            if self.sync and log.synced < log.tail.offset:
                log.sync()
        except Exception as error:
            self._failed(group, error)
            return
        self._queue_group(group)

    def _encode_group(self, group: _Group) -> None:
        tail, encode, epoch, now = self.log.tail, self._encode, self.epoch, self._wall_us()
        offset, running, length = tail.offset, tail.running, 0
        frames = []
        for write in group.writes:
            offset += 1
            frame, running = encode(offset, epoch, now, write.kind, write.payload, running, write.origin)
            write.epoch = epoch
            if write.kind:
                group.special = True
            frames.append(frame)
            length += len(frame)
        group.length = length
        group.tail = Tail(offset, epoch, running)
        group.frames = frames

    def _note_special(self, group: _Group) -> None:
        assert group.tail is not None
        for offset, write in enumerate(group.writes, group.tail.offset - len(group.writes) + 1):
            if write.kind:
                self.on_special(write, offset)

    def _queue_group(self, group: _Group) -> None:
        """The group is durable: its writes now wait for their commit."""
        assert group.tail is not None
        offset = group.tail.offset - len(group.writes)
        size = 0
        for write in group.writes:
            offset += 1
            write.offset = offset
            size += write.size
        with self._order:
            self.pending.extend(group.writes)
            self.pending_bytes += size
            self._queued_bytes -= group.queued_bytes
            group.queued_bytes = 0  # an interrupt from here on has the group queued once more
        self._group = None

    def _failed(self, group: _Group, error: Exception) -> None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full and not group.written(self.log):
            try:
                self.log.undo_append()
            except OSError as second:
                error, full = second, False
        if full and not group.written(self.log):
            refused = StorageFull("no disk space for the log")
            refused.__cause__ = error
            self._fail(group, refused)
            self._fail_dependents(refused)
            return
        failure = self.fail_storage(error)
        self._fail(group, failure)

    def _fail(self, group: _Group, error: Exception) -> None:
        self._group = None
        with self._order:
            self._queued_bytes -= group.queued_bytes
        if isinstance(error, StorageFailed) and group.tail is not None:
            self._leave_open(group, group.tail, error)
        else:
            complete_all(group.writes, error)

    def _leave_open(self, group: _Group, tail: Tail, error: StorageFailed) -> None:
        """The log failed under a group: how much of it is on the disk, or was shipped, is not known here."""
        for offset, write in enumerate(group.writes, tail.offset - len(group.writes) + 1):
            position = Position(tail.epoch, offset)
            unknown = LogFailed(
                f"the disk failed under the write at {position}: {error.message}", position=position
            )
            unknown.__cause__ = error.__cause__
            write.complete(unknown)

    def _fail_dependents(self, error: Error) -> None:
        """Refuse, too, what stands behind a refused group: transactions among it may have read its writes."""
        with self._order:
            waiting, self._ordered = self._ordered, []
            self._queued_bytes -= sum(w.size for w in waiting)
            self._taken_back = (self._holder, error) if self._holder is not None else None
            grant = self._pass_place([])
        complete_all(waiting, error)
        if grant is not None:
            grant()

    def undo_append(self, error: OSError) -> None:
        """An append failed. On return there was no room for it, and no trace of it is left.

        Raises :class:`StorageFailed` when it is worse.
        """
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise self.fail_storage(error) from error
        try:
            self.log.undo_append()
        except OSError as second:
            raise self.fail_storage(second) from second

    def fail_storage(self, error: BaseException) -> StorageFailed:
        """The disk failed for good: nothing is written any more in this process."""
        if self.failure is None:
            if isinstance(error, StorageFailed):
                failure = StorageFailed(error.message)
            else:
                failure = StorageFailed(f"the log could not be written: {error}")
            failure.__cause__ = error
            self.failure = failure
            self.refuse(failure)
        return self.failure

    def refuse(self, error: Error) -> None:
        """Take no more writes; what is in order but not taken by a leader fails with ``error``."""
        with self._order:
            if self.closed is None or isinstance(error, (StorageFailed, ClosedError)):
                self.closed = error
            waiting = self._ordered + self._behind
            self._ordered, self._behind = [], []
            self._queued_bytes -= sum(w.size for w in waiting)
            grants = [grant for _, grant in self._queue]
            self._queue.clear()
            if self._holder is not None:
                # What a transaction has read may be dropped before writes are taken again.
                self._taken_back, self._holder = (self._holder, error), None
        complete_all(waiting, error)
        for grant in grants:
            grant()

    def end_epoch(self, error: Error) -> None:
        """Write nothing more in this epoch: ``error`` refuses it until the next begins. ``lead`` is held.

        What an interrupted leader has begun to write is written to its end first: later it would not fit.
        """
        with self._order:
            self.no_epoch = error
        if self._group is not None:
            self.write_group()
        self.epoch = 0

    def begin_epoch(self, epoch: int, write: Write) -> None:
        """Take writes in ``epoch``, ``write``, its start, before all others. ``lead`` is held.

        Raises what has ended this committer for good.
        """
        with self._order:
            if isinstance(self.closed, (StorageFailed, ClosedError)):
                raise again(self.closed)
            self.closed = self.no_epoch = None
            self.epoch = epoch
            self._ordered.insert(0, write)
            self._queued_bytes += write.size

    # -- committing --------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether writes are in order or being written."""
        return bool(self._ordered) or self._group is not None

    @property
    def ordered(self) -> int:
        """The offset that the last write in order has, or will have."""
        with self._order:  # or a leader that takes them meanwhile would hide them
            group, last = self._group, self.log.tail.offset
            taken = 0
            if group is not None and (group.tail is None or group.tail.offset > last):
                taken = len(group.writes)
            return last + taken + len(self._ordered) + len(self._behind)

    @property
    def durable(self) -> int:
        """The last offset that counts as durable here under the store's durability."""
        return self.log.synced if self.sync else self.log.tail.offset

    def advance(self) -> None:
        """Commit what the rule allows now."""
        committed = self.rule(self.durable)
        if committed > self.committed:
            self.commit_through(committed)

    def commit_through(self, offset: int) -> None:
        """Publish every record through ``offset`` and tell those who wait. Any thread."""
        done: list[Write | Record] = []
        with self._publishing:
            pending, last = self.pending, self.committed
            if offset <= last and not (pending and pending[0].offset <= last):
                return
            size = 0
            fresh: list[Write | Record] = []
            with self._order:  # held by whoever adds to ``pending``
                for record in pending:
                    if record.offset > offset:
                        break
                    done.append(record)
                    if record.offset > last:  # else an interrupted leader has published or queued it before
                        last = record.offset
                        fresh.append(record)
            if fresh:
                self.view.publish(fresh)
                self.committed = last
            writes = [record for record in done if type(record) is Write]
            key = id(writes)
            if writes:
                self._telling[key] = writes  # before they leave ``pending``, for look_after()
            for record in done:
                pending.popleft()
                if type(record) is Write:
                    size += record.size
            with self._order:
                # What interrupts did to the count ends here.
                self.pending_bytes = self.pending_bytes - size if pending else 0
        complete_all(writes)
        self._telling.pop(key, None)
        self.on_committed(self.committed)

    def append_records(
        self, records: Sequence[Record], data: bytes, tail: Tail, *, sync: bool, check: Callable[[], None]
    ) -> None:
        """A follower's write: ``records`` as received, ``data`` their bytes. ``OSError`` as it comes.

        The caller has seen that they join; ``check`` raises what forbids them, once nothing can change that.
        They wait in ``pending`` until :meth:`commit_through`.
        """
        with self.lead:
            check()
            self.log.append([data], len(data), records[0].offset, tail, self.committed, sync=sync)
            with self._publishing, self._order:
                self.pending.extend(records)

    def drop_pending(self, above: int) -> list[Write | Record]:
        """Forget what waits above ``above``, because the log is cut there; returns it."""
        with self._publishing:
            kept = [r for r in self.pending if r.offset <= above]
            dropped = [r for r in self.pending if r.offset > above]
            self.pending = deque(kept)
            with self._order:
                self.pending_bytes = sum(r.size for r in kept if type(r) is Write)
        return dropped

    def roll_back(self, applied: int, records: Sequence[Record]) -> None:
        """Show ``records`` (all that follow ``applied``, in order) over LMDB, and nothing else."""
        with self._publishing:
            self.view.rebuild(applied, records)
            self.committed = self.view.last

    def replace(self, log: Log, view: View, committed: int) -> list[Write | Record]:
        """Go on with another copy and its log; returns what was pending in the old one. ``lead`` is held."""
        with self._publishing:
            dropped = list(self.pending)
            self.pending = deque()
            with self._order:
                self.pending_bytes = 0
            self.log, self.view, self.committed = log, view, committed
        return dropped

    # -- the background leader ---------------------------------------------------------------------

    def start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def kick(self) -> None:
        """Have the background thread lead if there is anything to write."""
        if not self._kick.is_set():
            self._kick.set()

    def _run(self) -> None:
        while True:
            self._kick.wait()
            self._kick.clear()
            while self._ordered or self._group is not None:
                with self.lead:
                    self.write_group()
                self.advance()
            if isinstance(self.closed, ClosedError):
                return

    def forked(self, error: ForkedError) -> None:
        """In a forked child: refuse everything, and wait for no lock that a thread of the parent holds."""
        self.closed = error
        self._order = threading.Lock()
        self.lead = threading.Lock()

    def stop(self, timeout_s: float) -> None:
        """End the background thread; ``closed`` is set already."""
        self._kick.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
