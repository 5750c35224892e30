"""The local engine: log first, memtables over LMDB, one object that owns them and their threads.

It knows nothing of networks. Who may write, and when a record counts as committed, is told from outside:
``start_epoch`` makes this node a writer, ``committer.rule`` says what is committed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from kvrep.errors import (
    ClosedError,
    Error,
    Fenced,
    ForkedError,
    LogCorrupt,
    Overloaded,
    ProtocolError,
    RolledBack,
    StorageFull,
    UnknownOutcome,
    again,
)
from kvrep.model.codec import FRAME_BYTES, decode
from kvrep.model.configuration import Configuration
from kvrep.model.position import EPOCH_MAX, OFFSET_MAX, EpochTable, Position
from kvrep.model.record import Kind, Record
from kvrep.options import Options
from kvrep.storage import forks, marks
from kvrep.storage.committer import Committer
from kvrep.storage.copying import PinnedState
from kvrep.storage.digest import Hasher
from kvrep.storage.flusher import Flusher
from kvrep.storage.history import ORDINARY, History, need_known
from kvrep.storage.log import Tail
from kvrep.storage.log_file import fsync_directory
from kvrep.storage.memtable import Table
from kvrep.storage.opening import Parts, open_parts
from kvrep.storage.recovery import fresh
from kvrep.storage.rescue import save_records
from kvrep.storage.tree import State, Tree, digests_out
from kvrep.storage.upkeep import Upkeep
from kvrep.storage.view import Snapshot, View
from kvrep.storage.write import Write

__all__ = ["Engine"]

log = logging.getLogger("kvrep.storage")

TRIM_S = 2.0
"""How often the log is trimmed where nothing is flushed."""


class Engine:
    """An open store directory. Made by :meth:`open`; every method may be called on any thread."""

    def __init__(self, parts: Parts, options: Options) -> None:
        """Takes what :func:`open_parts` made; the threads are started by :meth:`open`."""
        home = parts.home
        self.home = home
        self.tree = parts.tree
        self.options = options
        self.history = parts.history
        """Of all records in the log, committed or not. Replaced, under ``committer.lead``, by who changes it."""
        self.view = View(self.tree, keyspaces_max=options.keyspaces_max)
        self.committer = Committer(
            parts.log,
            self.view,
            committed=self.tree.state.applied.offset,
            sync=options.durability == "sync",
            uncommitted_bytes_max=options.uncommitted_bytes_max,
        )
        self.committer.on_special = self._on_special
        self.committer.pending.extend(parts.pending)
        self.committer.commit_through(parts.committed)
        self._upkeep = Upkeep(self.committer, options, home.path, self.sync)
        self.flusher = Flusher(
            self.view,
            self.tree,
            memtable_bytes=options.memtable_bytes,
            memtable_bytes_max=options.memtable_bytes_max,
            interval_s=options.flush_interval_s,
            update=self._update_state,
            before=self._before_flush,
            after=self.trim,
            tick=self._tick,
            failed=self._fail,
            logged=lambda: self.committer.log.tail.offset,
            flush_limit=lambda: self.flush_limit(),  # noqa: PLW0108 - it is replaced with the role
        )
        self.keep_from: Callable[[], int]
        """The first offset that some follower still needs. Replaced by the replication of a primary."""
        self.on_rollback: Callable[[int, int, Path, str], None] = lambda first, last, path, reason: None
        """Called when records were dropped: (first, last, rescue file, reason)."""
        self.feeds_from: Callable[[], int] = lambda: OFFSET_MAX
        """The first offset that some named feed still has to read."""
        self.flush_limit: Callable[[], int | None]
        """Through which offset a flush may go that nobody asked for; ``None``: through the last."""
        self.writable: Callable[[], None] = lambda: None
        """Called before a user's write is ordered; raises what refuses it."""
        self.on_configuration: Callable[[int, Configuration], None]
        """Called when a configuration record is in the log, before it can be committed."""
        self.on_tick: Callable[[], None]
        """Called on the flush thread about twice a second."""
        self.reset_hooks()
        self._trimmed_s = time.monotonic()
        self._slow_bytes = options.memtable_bytes_max // 2
        """Memory of unflushed writes from which on writers are slowed."""
        self.unverified = home.received or home.suspected
        """Whether this copy was received, or the disk failed under it, and its digests have not been recomputed
        since."""
        self.rescued = parts.rescued
        self._closed = False
        # Makes close() run once.
        self._close_lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, options: Options, *, lineage: bytes) -> Engine:
        """Open or create the store at ``path``; ``lineage`` is for a new one (empty: adopted later)."""
        parts = open_parts(path, options, lineage=lineage)
        try:
            engine = cls(parts, options)
        except BaseException:
            parts.close()
            raise
        forks.guard(engine)
        label = engine.home.name or engine.home.path.name
        engine.committer.start(f"kvrep-commit-{label}")
        engine.flusher.start(f"kvrep-flush-{label}")
        return engine

    # -- what it is --------------------------------------------------------------------------------

    @property
    def tail(self) -> Tail:
        return self.committer.log.tail

    @property
    def epochs(self) -> EpochTable:
        return self.history.epochs

    @property
    def branches(self) -> tuple[tuple[int, bytes], ...]:
        return self.history.branches

    @property
    def branch(self) -> bytes:
        return self.history.branch

    @property
    def configurations(self) -> tuple[tuple[int, Configuration], ...]:
        return self.history.configurations

    @property
    def configuration(self) -> Configuration:
        """The newest configuration in the log, committed or not."""
        return self.history.configurations[-1][1]

    def configurations_in_force(self) -> tuple[Configuration, tuple[int, Configuration] | None]:
        """The configuration in effect, and the one (with its offset) that is perhaps not committed yet."""
        return self.history.in_force(self.committer.committed)

    def position_at(self, offset: int) -> Position:
        return self.history.position_at(offset)

    @property
    def committed_position(self) -> Position:
        return self.history.position_at(self.view.last)

    def reset_hooks(self) -> None:
        """Forget what the replication of a primary or follower asked for."""
        self.keep_from = lambda: self.tree.state.applied.offset + 1
        self.on_configuration = lambda offset, configuration: None
        self.on_tick = lambda: None
        self.flush_limit = lambda: None
        self.view.withheld = None

    # -- writing -----------------------------------------------------------------------------------

    def start_epoch(
        self, epoch: int, payload: Mapping[str, Any], prepare: Callable[[], None] = lambda: None
    ) -> Write:
        """Begin to write in ``epoch``: its first record is ordered before anything else.

        The caller has made sure that nobody else can commit in it (see replication/promotion.py). ``prepare``
        is called when nothing but itself can prevent the epoch any more, with the end of the log fixed.
        On return it is logged. Raises :class:`Fenced` when a higher epoch was promised meanwhile, ``OSError``
        when the promise cannot be stored, what ``prepare`` raises, or :class:`StorageFull`; then the epoch has
        not begun.
        """
        committer = self.committer
        write = Write(Kind.EPOCH, dict(payload), 256)

        def began(done: Write) -> None:  # on the leader's thread, so that no group is encoded meanwhile
            if isinstance(done.error, StorageFull):
                committer.no_epoch = done.error
                committer.epoch = 0
                self.history = before

        write.when_done(began)
        with committer.lead:  # no group is being encoded meanwhile, nothing is promised, nothing appended
            if not self.home.promise(epoch, self.home.store_id):
                promised = self.home.promised_epoch
                raise Fenced(f"epoch {promised} has been promised, above {epoch}", epoch=promised)
            if self.tail.epoch >= epoch:
                raise Fenced(
                    f"the log ends in epoch {self.tail.epoch}, not below {epoch}", epoch=self.tail.epoch
                )
            before = self.history
            prepare()
            committer.begin_epoch(epoch, write)
            last = self.tail.offset
            # Cut first: the start of an epoch before may have been refused after it was ordered.
            self.history = self.history.cut(last).begin(epoch, last + 1, payload)
            committer.write_group()
        if write.error is not None:
            raise again(write.error) if isinstance(write.error, Error) else write.error
        committer.advance()
        committer.hand_over()
        return write

    def configure(self, configuration: Configuration) -> Write:
        """Order a configuration record. One at a time is the caller's business."""
        write = Write(Kind.CONFIGURATION, configuration.to_wire(), 256)
        self.committer.order(write)
        return write

    def _on_special(self, write: Write, offset: int) -> None:
        """A configuration is in the log: it is in force from here on, if not yet committed."""
        if write.kind == Kind.CONFIGURATION and offset > self.configurations[-1][0]:
            self.history = self.history.configure(offset, write.payload)
            self.on_configuration(offset, self.configuration)

    def order(self, write: Write, deadline_s: float) -> None:
        """Put a user's write in order; waits for memory, not for the disk. Raises what refuses it."""
        self.writable()
        if self.view.memory_bytes >= self._slow_bytes:
            self._slow_down(write, deadline_s)
        self.committer.order(write)

    def submit(self, write: Write, timeout_s: float) -> None:
        """Order a user's write for the background leader; waits for memory up to ``timeout_s``."""
        self.writable()
        if self.view.memory_bytes >= self._slow_bytes:
            self._slow_down(write, time.monotonic() + timeout_s)
        self.committer.order(write)
        self.committer.kick()  # always: who holds the lead lock need not look for new writes

    def commit(self, write: Write, timeout_s: float) -> None:
        """Order a user's write and wait until its outcome is known or ``timeout_s`` have passed."""
        self.writable()
        if self.view.memory_bytes < self._slow_bytes and self.committer.commit_alone(write):
            return
        deadline_s = time.monotonic() + timeout_s
        if self.view.memory_bytes >= self._slow_bytes:
            self._slow_down(write, deadline_s)
        self.committer.commit(write, deadline_s)

    def _slow_down(self, write: Write, deadline_s: float) -> None:
        if not self.flusher.slow_down(deadline_s, deletes=write.deletes_only):
            if self.committer.closed is not None:
                raise again(self.committer.closed)
            raise Overloaded("writing is faster than the flush into LMDB (memtable_bytes_max)")

    # -- a follower's writing ----------------------------------------------------------------------

    def append(self, first: int, data: bytes, *, sync: bool, epoch: int = EPOCH_MAX) -> list[Record]:
        """Check and log records as a primary sent them, ``first`` the next offset. They wait for commit.

        ``epoch`` is that of the primary: nothing is taken from it once a higher one is promised.
        Raises ``ProtocolError`` (``ChainBroken``) when they do not join, ``UpgradeRequired`` for a
        record of an unknown kind, :class:`StorageFull` (nothing logged) or :class:`StorageFailed`.
        """
        tail = self.tail
        if first != tail.offset + 1:
            raise ProtocolError(f"expected record {tail.offset + 1}, got {first}")
        records, running = decode(data, first, tail.running)
        if records[0].epoch < tail.epoch:
            raise ProtocolError(f"record {first} is of epoch {records[0].epoch}, below {tail.epoch}")
        telling = [record for record in records if record.kind not in ORDINARY]
        for record in telling:
            need_known(record)
        end = Tail(records[-1].offset, records[-1].epoch, running)

        def check() -> None:
            if self.home.promised_epoch > epoch or self.tail is not tail:
                promised = self.home.promised_epoch
                raise Fenced(f"epoch {promised} has been promised, above {epoch}", epoch=promised)

        try:
            self.committer.append_records(records, data, end, sync=sync, check=check)
        except OSError as error:
            self.committer.undo_append(error)
            raise StorageFull("no disk space for the log") from error
        if telling:
            with self.committer.lead:
                for record in telling:
                    self.history = self.history.note(record)
        return records

    def sync(self) -> None:
        """Make everything logged durable."""
        try:
            if not self.committer.log.sync_beside():
                with self.committer.lead:
                    self.committer.log.sync()
        except OSError as error:
            raise self.committer.fail_storage(error) from error

    def cut(self, to: int, *, reason: str) -> Path | None:
        """Drop the log above ``to``, which is at or above what LMDB holds.

        What is dropped is first saved, synced, to a rescue file, whose path is returned. If some of it was
        visible here (asynchronous mode), reads go back to ``to``. :class:`StorageFull` when there is no room
        for that file: then nothing is cut, and it may be tried again.
        """
        committer = self.committer
        with self.flusher.hold, committer.lead:
            applied = self.tree.state.applied.offset
            if to < applied:
                raise LogCorrupt(
                    f"cannot cut the log at {to}: LMDB holds {applied}", path=str(self.home.path), at=to
                )
            tail = self.tail
            if to >= tail.offset:
                return None
            path = save_records(
                self.home.rescue, committer.log, to + 1, tail.offset, lineage=self.home.lineage, reason=reason
            )
            running = committer.log.running_at(to)
            committer.log.cut(Tail(to, self.epochs.epoch_at(to), running))
            dropped = committer.drop_pending(to)
            if self.view.last > to:
                self._rebuild_view(applied, to)
            self.history = self.history.cut(to)
        for record in dropped:
            if type(record) is Write:
                record.complete(
                    RolledBack(
                        f"the write at {record.position} did not survive: {reason}", position=record.position
                    )
                )
        self.rescued.append(path)
        self.on_rollback(to + 1, tail.offset, path, reason)
        log.warning("%s: records %d to %d were dropped (%s) and saved to %s",
                    self.home.path, to + 1, tail.offset, reason, path)  # fmt: skip
        return path

    def _rebuild_view(self, applied: int, to: int) -> None:
        """Make the memtables again from the log, without what was cut."""
        records: list[Record] = []
        offset = applied + 1
        running = self.committer.log.running_at(applied)
        while offset <= to and (run := self.committer.log.read(offset, 1 << 20)) is not None:
            some, running = decode(run.data, run.first, running)
            records += some
            offset = run.last + 1
        self.committer.roll_back(applied, [r for r in records if r.offset <= to])

    def adopt_lineage(self, lineage: bytes) -> None:
        """A store without history joins one. Nothing has been logged yet."""
        if self.home.lineage == lineage:
            return
        if self.home.lineage or self.tail.offset:
            raise ProtocolError("only an empty store can adopt a lineage")
        self.home.switch(self.home.generation.name, lineage)
        self.tree.hasher = Hasher(lineage)
        self.committer.log.lineage = lineage

    def pinned(self) -> PinnedState:
        """What LMDB holds now beside what its state record says of it."""
        with self.flusher.hold:
            return PinnedState(self.tree)

    def verified(self, pinned: PinnedState, differing: dict[str, tuple[int, int]]) -> None:
        """A copy, received or suspect, was compared with its digests, and these are off by so much: they are put
        right."""
        with self.flusher.hold:
            if not pinned.of(self.tree):
                return  # the next copy is live already
            pinned.correct(differing, received=self.home.received)
            if not differing:
                self.home.trust()
            self.unverified = False
        if differing:
            log.error("%s: keyspaces %s of the copy at record %d differ from their digests",
                      self.home.path, ", ".join(differing), pinned.state.applied.offset)  # fmt: skip

    def replace_copy(self, generation: Path, tree: Tree, lineage: bytes) -> None:
        """Make a received copy (``tree``, in ``generation``) the live one, in place: who holds this engine,
        a keyspace or a snapshot goes on. Reads see the old copy until the new one is live.

        Raises ``OSError`` or :class:`ClosedError` and then has changed nothing, or :class:`StorageFailed` when
        it is not known which copy the next open will find.
        """
        directory = generation / "log"
        directory.mkdir(mode=0o700, exist_ok=True)
        for path in (directory, generation / "data", generation):
            fsync_directory(path)
        committer, flusher, state = self.committer, self.flusher, tree.state
        fresh_log = fresh(directory, lineage, file_bytes=self.options.log_file_bytes, tail=state.applied)
        with self._close_lock:
            if self._closed:
                raise ClosedError("the store is closed")
            with flusher.hold, committer.lead:
                self._switch(generation, lineage)
                old_tree, old_log = self.tree, committer.log
                state.verified = state.diverged = 0
                self.unverified = True
                view = self.view.succeed(tree)
                self.tree = tree
                self.history = History.of(state)
                dropped = committer.replace(fresh_log, view, state.applied.offset)
                flusher.replace(view, tree)
                self.view = view
            old_log.abandon()
            old_tree.retire()
            self.home.drop_old()
        for record in dropped:
            if type(record) is Write:
                record.complete(_outcome_in_copy(record, state))
        committer.on_committed(committer.committed)

    def _switch(self, generation: Path, lineage: bytes) -> None:
        try:
            self.home.switch(generation.name, lineage)
        except OSError as error:
            if self.home.switched_to(generation.name):
                raise self.committer.fail_storage(error) from error
            raise

    # -- the flush's hooks -------------------------------------------------------------------------

    def _before_flush(self) -> None:
        """Sync the log through the cut; as primary, have every node cut at the same place."""
        committer = self.committer
        if committer.epoch and committer.closed is None and marks.due(self.view.tables):
            write = marks.mark(self.tree.state)
            try:
                committer.order(write)
            except Error:
                return
            committer.finish(write, time.monotonic() + 0.5)

    def _update_state(self, state: State, tables: Sequence[Table]) -> None:
        """Fill in what LMDB shall say after a flush of ``tables``, newest first."""
        newest = tables[0]
        last = newest.last
        if self.committer.log.synced < last:
            self.sync()
        state.applied = Tail(last, self.epochs.epoch_at(last), self.committer.log.running_at(last))
        state.logged_in = self.home.copy_id
        self.history.describe(state, last)
        for table in reversed(tables):
            state.sessions.note_all(table.origins)
        if newest.mark is not None and not marks.compare(state, newest):
            log.error("%s: the state digest at record %d differs from the primary's",
                      self.home.path, state.diverged)  # fmt: skip

    def trim(self) -> int:
        """Unlink log files that nobody needs; returns how many."""
        # The file with the last applied record stays, to show the next open that the log is not lost.
        return self._upkeep.trim(min(self.tree.state.applied.offset, self.keep_from(), self.feeds_from()))

    def _tick(self) -> None:
        self.on_tick()
        self.view.expire_snapshots()
        self._upkeep.tick()
        now = time.monotonic()
        if now - self._trimmed_s >= TRIM_S and self.committer.failure is None:
            self._trimmed_s = now
            self.trim()  # files grow old, and followers and feeds get on, where nothing is flushed, too

    def _fail(self, error: BaseException) -> None:
        """Nothing is flushed any more. What LMDB's file seems to hold need not have reached the disk."""
        self.committer.fail_storage(error)
        try:
            self.home.suspect()
        except OSError as second:
            log.warning("%s: that the disk failed could not be noted: %s", self.home.path, second)

    # -- reading -----------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return self.view.capture(self.position_at, self.options.snapshot_age_max_s)

    def time_at(self, offset: int) -> int:
        """When record ``offset`` was logged, in microseconds of the primary's wall clock; 0 if not known."""
        try:
            run = self.committer.log.read(offset, 1)
        except (Error, OSError):
            return 0
        if run is None:
            return 0
        body: list[Any] = msgpack.unpackb(memoryview(run.data)[FRAME_BYTES:], strict_map_key=False)
        return int(body[2])

    def recompute_digests(self) -> dict[str, Any]:
        """Digests and counts computed anew from what LMDB holds, and as of which position, for ``verify``.

        The caller has flushed; writes that come meanwhile stay out of it only if there are none.
        """
        while True:
            state = self.tree.state
            digests = {name: self.tree.digest(name) for name in self.tree.keyspaces}
            if self.tree.state is state:
                break
        return {
            "position": str(self.position_at(state.applied.offset)),
            "digests": {name: value.to_bytes(16, "big") for name, (value, _) in digests.items()},
            "counts": {name: count for name, (_, count) in digests.items()},
            "stored": digests_out(state.digests),
            "verified": state.verified,
            "diverged": state.diverged,
        }

    def flush(self, timeout_s: float) -> bool:
        """Have LMDB hold everything that is committed now; False when it took longer."""
        return self.flusher.flush(time.monotonic() + timeout_s)

    def writable_as_primary(self) -> None:
        """Raise unless this node is a primary whose epoch has begun."""
        self.writable()
        if self.committer.closed is not None:
            raise again(self.committer.closed)

    # -- ending ------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def forked(self) -> None:
        """In a forked child: every later use raises, nothing of the parent's is touched."""
        error = ForkedError("this store was opened by the parent process, before the fork")
        self._closed = True
        self.committer.forked(error)
        self.writable = self._refuse_forked
        self.view.forked(error)
        self.home.forked()

    def _refuse_forked(self) -> None:
        raise again(self.committer.closed or ForkedError())

    def need_alive(self) -> None:
        """Raise :class:`ClosedError` or :class:`ForkedError` when this engine is of no use any more."""
        if self._closed:
            self.need_unforked()
            raise ClosedError("the store is closed")

    def need_unforked(self) -> None:
        """Raise :class:`ForkedError` in a forked child."""
        if isinstance(self.committer.closed, ForkedError):
            raise again(self.committer.closed)

    def close(self, timeout_s: float) -> None:
        """Flush, mark the log, end the threads, close the files. Idempotent; keeps to its deadline."""
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            deadline = time.monotonic() + timeout_s
            committer = self.committer
            committer.refuse(ClosedError("the store is closed"))
            committer.stop(max(0.1, deadline - time.monotonic()))
            if committer.lead.acquire(timeout=max(0.1, deadline - time.monotonic())):
                committer.lead.release()  # a group under way in a caller's thread is in the log now
                if committer.epoch:  # without one, nothing here is ours to commit
                    committer.advance()
            self._last_flush(deadline)
            stopped = self.flusher.stop(max(0.1, deadline - time.monotonic()))
            self.view.closed = ClosedError("the store is closed")
            self.view.close()
            for record in list(committer.pending):
                if type(record) is Write:
                    record.complete(_unknown_at_close(record))
            if stopped and self._close_files(deadline):
                return
            # Closing LMDB under a flush would end the interpreter, and a new opener would meet what is written.
            log.warning(
                "%s: a %s is still under way; the store stays locked until it ends",
                self.home.path, "write" if stopped else "flush",
            )  # fmt: skip
            name = f"kvrep-close-{self.home.name or self.home.path.name}"
            threading.Thread(target=self._close_later, name=name, daemon=True).start()

    def _close_later(self) -> None:
        while not (self.flusher.stop(60.0) and self._close_files(time.monotonic() + 60.0)):
            pass

    def _close_files(self, deadline: float) -> bool:
        """False, and nothing is closed, when a write is still under way at ``deadline``. The flush has ended."""
        lead = self.committer.lead
        if not lead.acquire(timeout=max(0.1, deadline - time.monotonic())):
            return False
        try:
            self._close_log()
        finally:
            lead.release()
        if not self.tree.close(max(0.1, deadline - time.monotonic())):
            log.warning("%s: a read was still under way at close; LMDB stays open", self.home.path)
        self.home.close()
        forks.release(self)
        return True

    def _last_flush(self, deadline: float) -> None:
        if self.committer.failure is not None or self.view.tables == ():
            return
        self.flusher.keep_back = True  # the log has it, and can be cut should another node be primary by then
        try:
            self.flusher.flush(min(deadline - 0.2, time.monotonic() + 20))
        except Error as error:
            log.warning("%s: not all could be flushed at close (%s); the log has it", self.home.path, error)

    def _close_log(self) -> None:
        """``lead`` is held."""
        committer = self.committer
        try:
            if committer.failure is None:
                committer.log.mark(committer.committed)
                committer.log.close()
        except OSError as error:
            log.warning("%s: the log could not be closed cleanly: %s", self.home.path, error)
        finally:
            committer.log.abandon()  # after a failure: as it is, nothing is tried again


def _outcome_in_copy(write: Write, state: State) -> Error | None:
    """What became of a write that waited here, now that a copy with ``state`` took the place of its log."""
    position, applied = write.position, state.applied.offset
    if state.epochs.holds(position, applied):
        return None
    if position.offset <= applied or state.epochs.last_epoch > position.epoch:
        return RolledBack(f"the write at {position} is not part of the history that is now here",
                          position=position)  # fmt: skip
    return UnknownOutcome(f"the write at {position} is beyond the copy that is now here", position=position)


def _unknown_at_close(write: Write) -> UnknownOutcome:
    return UnknownOutcome(
        f"the store was closed before the write at {write.position} was committed", position=write.position
    )
