"""Copies of the state for followers that need a whole one.

LMDB's compacting copy goes through a pipe into a file below ``spool/``, from which any number of followers
are served, while it is still being written as well as later. So the read transaction lives only as long as
the copy takes, however slow the followers are, and a follower whose connection broke gets the rest.

For every copy two threads, both gone when it is whole::

    kvrep-copy-NAME    inside LMDB: walks the pages, writes them into the pipe
    kvrep-spool-NAME   reads the pipe: checksums, writes the file, announces what is there
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import select
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from kvrep.errors import (
    ClosedError,
    Error,
    Fenced,
    LineageMismatch,
    NotPrimary,
    Overloaded,
    ReplicationError,
    StorageFull,
    again,
)
from kvrep.model.position import OFFSET_MAX, Position
from kvrep.runtime.description import Description
from kvrep.storage.copying import HEAD_BYTES, TreeCopy, copy_bytes, free_bytes
from kvrep.transport.interface import (
    CHUNK_BYTES_MAX,
    SnapshotChunk,
    SnapshotInfo,
    SnapshotItem,
    SnapshotRequest,
)

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.runtime.slots import Slots
    from kvrep.storage.engine import Engine

__all__ = ["Spools", "serve_snapshot"]

log = logging.getLogger("kvrep.replication")

SPOOLS_MAX = 2
"""Copies on the disk at once."""
KEEP_S = 600.0
"""How long a copy waits for a follower that has not come back for the rest, nor joined."""
STALE_BYTES_MIN = 64 << 20
"""A finished copy with more log behind it than this, and than a quarter of its own size, is made anew."""
FLUSH_TIMEOUT_S = 30.0
PIPE_BYTES = 1 << 20
_LOOK_UP_MS = 50
_F_SETPIPE_SZ = 1031


def serve_snapshot(node: Node, request: SnapshotRequest) -> Iterator[SnapshotItem]:
    """The items of a copy for one node; see :meth:`kvrep.transport.interface.Service.snapshot`.

    A primary keeps the log behind the copy for those who will follow it. A follower promises nothing about its
    log, and gives a copy only to those who ask for that.
    """
    role = node.shipping or (node.replaying if request.of_follower else None)
    if role is None:
        raise NotPrimary("snapshots come from the primary", primary_address=node.primary_address, epoch=None)
    _check(node, request)
    spool = role.spools.take(request)
    try:
        info = _info(node, spool)
        yield info
        yield from spool.chunks(info.start(request))
    finally:
        role.spools.give_back(spool, request.store_id)


def _check(node: Node, request: SnapshotRequest) -> None:
    home, shipping = node.engine.home, node.shipping
    if request.store_id == home.store_id:
        raise ReplicationError("a node cannot bootstrap from itself")
    if request.lineage and request.lineage != home.lineage:
        raise LineageMismatch(f"{request.name} holds another store than {home.name}")
    if shipping is None:
        return
    closed = shipping.engine.committer.closed
    if isinstance(closed, Fenced):
        raise again(closed)
    if not shipping.leadership.epoch:
        raise NotPrimary("this node is not a primary yet", primary_address=None, epoch=None)


def _info(node: Node, spool: Spool) -> SnapshotInfo:
    home, shipping = node.engine.home, node.shipping
    description = Description(
        lineage=home.lineage,
        branch=spool.branch,
        applied=spool.tail,
        epoch=node.engine.epochs.last_epoch if shipping is None else shipping.leadership.epoch,
        # Whoever has confirmed more than this gets no vote until it has all of it again. Only a primary knows
        # that there is nothing more.
        last=OFFSET_MAX if shipping is None else node.engine.tail.offset,
        store_id=home.store_id,
        name=home.name,
        branches=spool.branches,
        epochs=spool.epochs,
    )
    return SnapshotInfo(
        snapshot_id=spool.snapshot_id,
        bytes_total=spool.wait_total(),
        position=Position(spool.tail.epoch, spool.tail.offset),
        meta=description.encode(),
    )


class Spool:
    """One copy: a file that grows until it is whole. Its chunks may be read at the same time, by anybody."""

    def __init__(self, copy: TreeCopy, directory: Path, label: str, *, reserve_bytes: int) -> None:
        """Starts the threads. ``reserve_bytes`` is what the disk must have left beside the copy."""
        self.snapshot_id = secrets.token_hex(16)
        self.tail = copy.state.applied
        self.branch = copy.state.branch
        self.branches = tuple(branch for _, branch in copy.state.branches)
        self.epochs = copy.state.epochs
        self.users: dict[bytes, float] = {}
        """Store ids of the followers it is kept for, and when they were last seen. Guarded by Spools."""
        self.readers = 0
        """Transfers under way. Guarded by Spools, as is the closing of the file."""
        self.path = directory / f"{self.snapshot_id}.copy"
        self._copy = copy
        self._label = label
        self._directory = directory
        self._reserve_bytes = reserve_bytes
        # Protects the five below and announces their changes.
        self._changed = threading.Condition()
        self._crcs: list[int] = []
        self._written = 0
        self._total: int | None = None
        self._whole = False
        self._error: Error | None = None
        self._copy_error: Exception | None = None
        self._cancelled = False
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        source, sink = os.pipe()
        try:
            fcntl.fcntl(sink, _F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # beyond what this user may have: the default size works, too
        self._copier = threading.Thread(
            target=self._run_copy, args=(sink,), name=f"kvrep-copy-{label}", daemon=True
        )
        self._filler = threading.Thread(
            target=self._run_fill, args=(source,), name=f"kvrep-spool-{label}", daemon=True
        )
        self._copier.start()
        self._filler.start()

    # -- the two threads ---------------------------------------------------------------------------

    def _run_copy(self, sink: int) -> None:
        try:
            self._copy.write_to(sink)
        except Exception as error:  # told by the other thread
            self._copy_error = error
        finally:
            os.close(sink)
            self._copy.close()

    def _run_fill(self, source: int) -> None:
        error: Error | None = None
        try:
            self._fill(source)
        except Error as failed:
            error = failed
        except OSError as failed:
            if failed.errno in (errno.ENOSPC, errno.EDQUOT):
                error = self._full()
            else:
                error = ReplicationError(f"the copy could not be spooled: {failed}")
        except Exception as failed:
            log.exception("the copy could not be spooled")
            error = ReplicationError(f"the copy could not be spooled: {failed!r}")
        finally:
            os.close(source)  # ends the copier, if it is still at work
        self._copier.join()
        with self._changed:
            self._error = self._error or error
            self._whole = self._error is None
            self._changed.notify_all()

    def _fill(self, source: int) -> None:
        buffer = bytearray(CHUNK_BYTES_MAX)
        view = memoryview(buffer)
        filled = 0
        poll = select.poll()
        poll.register(source, select.POLLIN)
        while not self._cancelled:
            if not poll.poll(_LOOK_UP_MS):
                if self._copier.is_alive():
                    continue
                if not poll.poll(0):
                    break
            count = os.readv(source, [view[filled:]])
            if count == 0:
                break
            filled += count
            if self._total is None and self._written == 0 and filled >= HEAD_BYTES > filled - count:
                self._learn_total(copy_bytes(bytes(view[:HEAD_BYTES])))
            if filled == CHUNK_BYTES_MAX:
                self._store(view)
                filled = 0
        if self._cancelled:
            raise ClosedError("the copy was ended")
        if filled:
            self._store(view[:filled])
        self._end()

    def _learn_total(self, total: int | None) -> None:
        if total is None:
            return  # told when the copy is whole
        if free_bytes(self._directory) < total + self._reserve_bytes:
            raise self._full(total)
        with self._changed:
            self._total = total
            self._changed.notify_all()

    def _store(self, data: memoryview) -> None:
        at = self._written
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], at + done)
        check = crc32(data)
        with self._changed:
            self._crcs.append(check)
            self._written = at + len(data)
            self._changed.notify_all()

    def _end(self) -> None:
        """The pipe has ended: was that all?"""
        self._copier.join()
        if self._copy_error is not None:
            raise ReplicationError(f"LMDB could not be copied: {self._copy_error}") from self._copy_error
        with self._changed:
            if self._total is None:
                self._total = self._written
            if self._total != self._written:
                raise ReplicationError(f"LMDB's copy ended at byte {self._written} of {self._total}")

    def _full(self, total: int | None = None) -> StorageFull:
        size = "" if total is None else f" of {total >> 20} MiB"
        return StorageFull(
            f"{self._label} has no room to spool a copy{size}",
            hint=f"make room on its disk (spool/ in its directory), {self._reserve_bytes >> 20} MiB"
            " beyond the copy itself",
        )

    # -- readers -----------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        return self._error is not None

    @property
    def whole(self) -> bool:
        return self._whole

    def wait_total(self) -> int:
        """The size of the whole copy, as soon as it is known."""
        with self._changed:
            while self._total is None:
                self._raise_error()
                self._changed.wait(1.0)
            return self._total

    def chunks(self, at: int) -> Iterator[SnapshotChunk]:
        """The copy from byte ``at`` on, each chunk as soon as it is there."""
        total = self.wait_total()
        while at < total:
            index = at // CHUNK_BYTES_MAX
            end = min(total, (index + 1) * CHUNK_BYTES_MAX)
            self._wait_for(end)
            data = os.pread(self._fd, end - at, at)
            check = crc32(data)
            if at % CHUNK_BYTES_MAX == 0 and check != self._crcs[index]:
                self._damaged(at)
            yield SnapshotChunk(offset=at, data=data, crc32=check)
            at += len(data)
        with self._changed:
            while not self._whole:  # the last chunk is there; whether LMDB was content with it, too?
                self._raise_error()
                self._changed.wait(1.0)

    def _damaged(self, at: int) -> None:
        """The file does not hold what LMDB wrote into it: nobody may go on with this copy."""
        error = ReplicationError(f"the spooled copy is damaged at byte {at}")
        log.error("%s: %s", self.path, error.message)
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
            self._raise_error()

    def _wait_for(self, end: int) -> None:
        if self._written >= end and self._error is None:
            return
        with self._changed:
            while self._written < end or self._error is not None:
                self._raise_error()
                self._changed.wait(1.0)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise again(self._error)

    # -- end ---------------------------------------------------------------------------------------

    def cancel(self, error: Error) -> None:
        """End the threads if they are at work, and every transfer; forget the file."""
        with self._changed:
            self._error = self._error or error
            self._cancelled = True
            self._changed.notify_all()
        self.path.unlink(missing_ok=True)

    def join(self, timeout_s: float) -> None:
        self._filler.join(timeout_s)

    def close(self) -> None:
        """Close the file. The threads have ended or end by themselves; nobody reads any more."""
        self._filler.join()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Spools:
    """The copies that one node makes, in its present role. Any thread."""

    def __init__(self, engine: Engine, slots: Slots | None, label: str) -> None:
        """``slots`` are those of a primary. Without them nobody joins where a copy ends, so each is forgotten
        when its last reader has gone."""
        self._engine = engine
        self._slots = slots
        self._label = label
        self._directory = engine.home.spool
        # Protects everything below and the counts of every spool.
        self._lock = threading.Lock()
        self._spools: list[Spool] = []
        self._leaving: list[Spool] = []
        """Not offered any more, but still read from."""
        self._closed = False

    def take(self, request: SnapshotRequest) -> Spool:
        """A copy for this node: the one it asks to go on with, else one that is fit, else a new one.

        From now on a primary keeps the log from the copy's position on. :class:`Overloaded` when too many copies are
        under way, what :class:`TreeCopy` raises, :class:`ClosedError` at the end.
        """
        if self._engine.tree.state.applied.offset == 0:
            self._engine.flush(FLUSH_TIMEOUT_S)
        with self._lock:
            if self._closed:
                raise ClosedError("the node is closing")
            self._forget_failed()
            spool = self._asked_for(request) or self._fit() or self._make(request)
            self._use(spool, request)
            return spool

    def _asked_for(self, request: SnapshotRequest) -> Spool | None:
        for spool in self._spools:
            if spool.snapshot_id == request.snapshot_id and self._covered(spool):
                return spool
        return None

    def _covered(self, spool: Spool) -> bool:
        """Whether the log still goes on where the copy ends."""
        return self._engine.committer.log.first <= spool.tail.offset + 1

    def _fit(self) -> Spool | None:
        """The newest copy that is worth sending; any that is covered when no other can be made."""
        covered = [s for s in reversed(self._spools) if self._covered(s)]
        for spool in covered:
            if not self._stale(spool):
                return spool
        full = len(self._spools) >= SPOOLS_MAX and all(s.readers for s in self._spools)
        return covered[0] if full and covered else None

    def _stale(self, spool: Spool) -> bool:
        if not spool.whole:
            return False
        behind = self._engine.committer.log.bytes_after(spool.tail.offset)
        return behind > max(STALE_BYTES_MIN, spool.wait_total() // 4)

    def _make(self, request: SnapshotRequest) -> Spool:
        self._make_room()
        engine = self._engine
        # The slot first: nothing above it is trimmed between here and the copy.
        self._keep_log(request, engine.tree.state.applied.offset)
        copy = TreeCopy(engine.tree)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            spool = Spool(
                copy,
                self._directory,
                self._label,
                reserve_bytes=engine.options.log_file_bytes + (4 << 20),
            )
        except OSError as error:
            copy.close()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"{self._label} has no room to spool a copy",
                                  hint="make room on its disk") from error  # fmt: skip
            raise ReplicationError(f"{self._label} cannot spool a copy: {error}") from error
        except BaseException:
            copy.close()
            raise
        log.info("%s: copying the state at %d for %s", self._label, spool.tail.offset, request.name)
        self._spools.append(spool)
        return spool

    def _make_room(self) -> None:
        """Forget the oldest copies that nobody reads just now."""
        while len(self._spools) >= SPOOLS_MAX:
            idle = next((s for s in self._spools if not s.readers), None)
            if idle is None:
                raise Overloaded(f"{SPOOLS_MAX} copies are under way already")
            self._remove(idle)

    def _use(self, spool: Spool, request: SnapshotRequest) -> None:
        for other in list(self._spools):
            if other is not spool and other.users.pop(request.store_id, None) is not None:
                self._remove_unused(other)
        spool.users[request.store_id] = time.monotonic()
        spool.readers += 1
        self._keep_log(request, spool.tail.offset)

    def _keep_log(self, request: SnapshotRequest, above: int) -> None:
        """Have the follower's slot keep the log above an offset, be it named or not."""
        slots = self._slots
        if slots is None:
            return
        old = slots.get(request.store_id)
        slots.note(
            request.store_id,
            name=request.name,
            address=old.address if old is not None else "",
            voter=old.voter if old is not None else False,
            acked=above,
        )

    def give_back(self, spool: Spool, store_id: bytes) -> None:
        """A transfer has ended, in whatever way."""
        with self._lock:
            spool.readers -= 1
            if store_id in spool.users:
                spool.users[store_id] = time.monotonic()
            close = spool in self._leaving and not spool.readers
            if close:
                self._leaving.remove(spool)
            elif spool in self._spools and (spool.failed or (self._slots is None and not spool.readers)):
                self._remove(spool)
        if close:
            spool.close()

    # -- what the slots ask ------------------------------------------------------------------------

    def position_for(self, store_id: bytes) -> int | None:
        """The offset of the copy that is kept for a follower."""
        with self._lock:
            return next((s.tail.offset for s in self._spools if store_id in s.users), None)

    def serving(self, store_id: bytes) -> bool:
        """Whether a follower gets, or may come back for, a copy."""
        return any(store_id in s.users for s in list(self._spools))

    def users(self) -> set[bytes]:
        """All followers that get, or may come back for, a copy."""
        return {i for spool in list(self._spools) for i in list(spool.users)}

    def joined(self, store_id: bytes) -> None:
        """A follower joined with its log: its copy has served."""
        with self._lock:
            for spool in list(self._spools):
                if spool.users.pop(store_id, None) is not None:
                    self._remove_unused(spool)

    def tick(self) -> None:
        """Forget followers that did not come back, and copies that nobody wants."""
        now = time.monotonic()
        with self._lock:
            for spool in list(self._spools):
                if not spool.readers:
                    for store_id, seen_s in list(spool.users.items()):
                        if now - seen_s > KEEP_S:
                            del spool.users[store_id]
                self._remove_unused(spool)

    # -- removing (the lock is held) ---------------------------------------------------------------

    def _forget_failed(self) -> None:
        for spool in list(self._spools):
            if spool.failed:
                self._remove(spool)

    def _remove_unused(self, spool: Spool) -> None:
        if not spool.users and not spool.readers:
            self._remove(spool)

    def _remove(self, spool: Spool) -> None:
        self._spools.remove(spool)
        spool.cancel(ReplicationError("the copy was given up"))
        if spool.readers:
            self._leaving.append(spool)
        else:
            spool.close()

    def close(self, timeout_s: float) -> None:
        """End every transfer and thread; remove all copies."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
            spools = self._spools + self._leaving
            idle = [s for s in spools if not s.readers]
            self._leaving = [s for s in spools if s.readers]
            self._spools = []
        for spool in spools:
            spool.cancel(ClosedError("the node is closing"))
        for spool in spools:
            spool.join(max(0.1, deadline - time.monotonic()))
        for spool in idle:
            spool.close()
        shutil.rmtree(self._directory, ignore_errors=True)
