"""Giving a follower a whole copy, as the follower sees it.

The copy is received into the next generation's directory, which is nobody's business until it is whole,
checked and on the disk; then it takes the place of the old one at once. What has arrived survives a cut
connection and a restart: a small file beside it (``COPY``) says which copy it is, and has a checksum for
every piece that is safely on the disk.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgpack

from kvrep.errors import (
    ClosedError,
    CorruptionError,
    Error,
    Fenced,
    LineageMismatch,
    ProtocolError,
    StorageFailed,
    StorageFull,
)
from kvrep.runtime.spooling import META_VERSION
from kvrep.storage.copying import free_bytes, open_received
from kvrep.storage.home import COPY, write_atomically
from kvrep.storage.log import Tail
from kvrep.storage.rescue import save_records
from kvrep.transport.interface import SnapshotChunk, SnapshotInfo, SnapshotItem, SnapshotRequest

if TYPE_CHECKING:
    from kvrep.replication.messages import NeedBootstrap
    from kvrep.runtime.replaying import Replaying
    from kvrep.storage.engine import Engine
    from kvrep.storage.tree import Tree
    from kvrep.transport.interface import ClosableIterator, Connection

__all__ = ["Verification", "bootstrap"]

log = logging.getLogger("kvrep.replication")

TRANSFER_TIMEOUT_S = 3600.0
"""Of one request; a longer transfer goes on with another."""
SYNC_BYTES = 64 << 20
"""How much may arrive before it is synced and noted; what a restart fetches again at the most."""
VERIFY_BREATH_S = 0.0005
_PIECE = struct.Struct(">II")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def bootstrap(replaying: Replaying, connection: Connection, need: NeedBootstrap) -> None:
    """Fetch a copy over ``connection`` and make it live. Called on the replay thread.

    Raises what ends the connection (the rest is fetched next time), :class:`StorageFull` (what had arrived is
    given up, to leave the room to the live copy), :class:`StorageFailed`, or what the primary answers. Unless
    it returns, the old copy is live.
    """
    _Bootstrap(replaying, connection, need).run()


@dataclass(slots=True)
class _Arrived:
    """Which copy is being received, and what of it is on the disk: the content of ``COPY``."""

    snapshot_id: str = ""
    bytes_total: int = 0
    pieces: bytearray = field(default_factory=bytearray)
    """(length, CRC-32) of each piece, in order."""
    length: int = 0

    def add(self, data: bytes, check: int) -> None:
        self.pieces += _PIECE.pack(len(data), check)
        self.length += len(data)

    def encode(self) -> bytes:
        body: bytes = msgpack.packb([self.snapshot_id, self.bytes_total, bytes(self.pieces)])
        return crc32(body).to_bytes(4, "big") + body

    @classmethod
    def load(cls, path: Path, data: Path) -> _Arrived:
        """What ``path`` says, as far as the bytes in ``data`` bear it out."""
        arrived = cls()
        try:
            raw = path.read_bytes()
            if crc32(raw[4:]) != int.from_bytes(raw[:4], "big"):
                return arrived
            snapshot_id, total, pieces = msgpack.unpackb(raw[4:])
            arrived.snapshot_id, arrived.bytes_total = str(snapshot_id), int(total)
            with open(data, "rb") as file:
                for length, check in _PIECE.iter_unpack(pieces):
                    piece = file.read(length)
                    if len(piece) != length or crc32(piece) != check:
                        break
                    arrived.add(piece, check)
        except (OSError, ValueError, struct.error, msgpack.exceptions.UnpackException):
            pass
        return arrived


class _Syncer:
    """Syncs what arrives and notes it, on a thread of its own, while more arrives."""

    def __init__(
        self, fd: int, note: Path, arrived: _Arrived, name: str, items: ClosableIterator[SnapshotItem]
    ) -> None:
        """``items`` may have ``stored(length)``, which hears what is noted, and a ``sync_bytes`` of its own."""
        self._fd = fd
        self._stored: Callable[[int], None] = getattr(items, "stored", lambda _: None)
        self._sync_bytes: int = getattr(items, "sync_bytes", SYNC_BYTES)
        self._note = note
        # Protects the five below.
        self._changed = threading.Condition()
        self._arrived = arrived
        self._synced = arrived.length
        self._ending = False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, data: bytes, check: int) -> None:
        """``data`` has been written at the end; raises what failed meanwhile."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._arrived.add(data, check)
            if self._arrived.length - self._synced >= self._sync_bytes:
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ending and self._arrived.length - self._synced < self._sync_bytes:
                    self._changed.wait()
                if self._ending and self._arrived.length == self._synced:
                    return
                through, note = self._arrived.length, self._arrived.encode()
            try:
                os.fdatasync(self._fd)
                write_atomically(self._note, note)
            except OSError as error:
                with self._changed:
                    self._error = error
                return
            with self._changed:
                self._synced = through
            self._stored(through)

    def end(self) -> None:
        """Sync and note the rest, end the thread; raises ``OSError`` when that failed."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error


class _Bootstrap:
    def __init__(self, replaying: Replaying, connection: Connection, need: NeedBootstrap) -> None:
        self._replaying = replaying
        self._connection = connection
        self._need = need
        self._engine: Engine = replaying.engine
        self._home = replaying.engine.home
        self._generation = self._home.next_generation()
        self._data = self._generation / "data" / "data.mdb"
        self._note = self._generation / COPY
        self._meta: dict[str, Any] = {}

    def run(self) -> None:
        try:
            self._receive()
            self._take_over()
        except OSError as error:
            self._discard()
            if error.errno in _FULL:
                raise self._full() from error
            raise StorageFailed(f"the copy could not be stored: {error}") from error
        except (StorageFull, CorruptionError):
            self._discard()
            raise

    def _discard(self) -> None:
        shutil.rmtree(self._generation, ignore_errors=True)

    def _full(self) -> StorageFull:
        return StorageFull(
            f"there is no room for the copy of {self._replaying.bootstrap_bytes_total >> 20} MiB",
            hint=f"make room on the disk of {self._home.path}; it is tried again",
        )

    # -- receiving ---------------------------------------------------------------------------------

    def _receive(self) -> None:
        arrived = _Arrived.load(self._note, self._data)
        request = SnapshotRequest(
            store_id=self._home.store_id,
            name=self._home.name,
            snapshot_id=arrived.snapshot_id,
            offset=arrived.length,
            lineage=self._home.lineage,
        )
        items = self._connection.snapshot(request, TRANSFER_TIMEOUT_S)
        try:
            info = next(items)
            if not isinstance(info, SnapshotInfo):
                raise ProtocolError("a snapshot begins without its description")
            self._check_info(info)
            if info.start(request) == 0:
                arrived = _Arrived(info.snapshot_id, info.bytes_total)
            self._store_rest(info, items, arrived)
        finally:
            items.close()

    def _check_info(self, info: SnapshotInfo) -> None:
        """Whether this copy may take the place of ours at all, before much is sent."""
        try:
            self._meta = meta = msgpack.unpackb(info.meta)
            version, lineage, epoch = int(meta["version"]), bytes(meta["lineage"]), int(meta["epoch"])
            Tail(*map(int, meta["applied"]))
            int(meta["last"])
        except (ValueError, KeyError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolError(f"the snapshot's description is not readable: {error!r}") from error
        if version != META_VERSION:
            raise ProtocolError(
                f"snapshots of version {version} are not known here", hint="upgrade this node"
            )
        if len(lineage) != 16 or (self._home.lineage and lineage != self._home.lineage):
            raise LineageMismatch("the snapshot is of another store")
        if epoch < self._home.promised_epoch:
            raise Fenced(f"epoch {epoch} is over: {self._home.promised_epoch} is promised", epoch=epoch)

    def _store_rest(
        self, info: SnapshotInfo, items: ClosableIterator[SnapshotItem], arrived: _Arrived
    ) -> None:
        replaying = self._replaying
        replaying.bootstrap_bytes, replaying.bootstrap_bytes_total = arrived.length, info.bytes_total
        directory = self._data.parent
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        fd = os.open(self._data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, arrived.length)
            left = info.bytes_total - arrived.length
            if free_bytes(directory) < left + self._engine.options.log_file_bytes:
                raise self._full()
            write_atomically(self._note, arrived.encode())
            syncer = _Syncer(fd, self._note, arrived, f"kvrep-sync-{replaying.node.label}", items)
            try:
                self._store(fd, items, syncer)
            finally:
                syncer.end()
            os.fsync(fd)
        finally:
            os.close(fd)

    def _store(self, fd: int, items: ClosableIterator[SnapshotItem], syncer: _Syncer) -> None:
        replaying = self._replaying
        for chunk in items:
            assert isinstance(chunk, SnapshotChunk)  # the connection has seen to it
            data, at = chunk.data, chunk.offset
            written = os.pwrite(fd, data, at)
            while written < len(data):
                written += os.pwrite(fd, data[written:], at + written)
            syncer.add(data, chunk.crc32)
            replaying.bootstrap_bytes = at + len(data)

    # -- taking over -------------------------------------------------------------------------------

    def _take_over(self) -> None:
        engine, options = self._engine, self._engine.options
        lineage = bytes(self._meta["lineage"])
        tree = open_received(
            self._data.parent,
            lineage,
            map_bytes=options.map_bytes,
            keyspaces_max=options.keyspaces_max,
            readers_max=options.readers_max,
        )
        try:
            self._check_state(tree)
            if self._replaying.stopping:
                raise ClosedError("the store is closed")
            self._save_dropped(tree)
            self._keep_vote_back(tree)
            engine.replace_copy(self._generation, tree, lineage)
        except BaseException:
            if engine.tree is not tree:
                tree.close(1.0)
            raise
        log.info("%s: a copy at record %d took over", self._replaying.node.label, tree.state.applied.offset)
        self._replaying.node.verify_copy()

    def _check_state(self, tree: Tree) -> None:
        """Whether the copy says of itself what the primary said of it."""
        stated = Tail(*self._meta["applied"])
        if tree.state.applied != stated:
            raise CorruptionError(f"the copy is of {tree.state.applied}, the primary announced {stated}")
        if (
            tree.state.branch != self._meta["branch"]
            or tree.state.epochs.epoch_at(stated.offset) != stated.epoch
        ):
            raise CorruptionError("the copy's state record contradicts itself")

    def _save_dropped(self, tree: Tree) -> None:
        """Save the records of ours that are not a part of the copy's history, as far as the log has them."""
        engine, state = self._engine, tree.state
        tail, own_log = engine.tail, engine.committer.log
        shared = state.epochs.common(state.applied.offset, engine.epochs, tail.offset)
        # With a wrong checksum and the right epochs, nothing tells where the damage began.
        first = own_log.first if self._need.reason == "checksum" else max(shared + 1, own_log.first)
        if first > tail.offset:
            return
        path = save_records(
            self._home.rescue,
            own_log,
            first,
            tail.offset,
            lineage=self._home.lineage,
            reason=f"replaced by a copy ({self._need.reason})",
        )
        engine.rescued.append(path)
        engine.on_rollback(first, tail.offset, path, f"replaced by a copy ({self._need.reason})")
        log.warning("%s: records %d to %d are replaced by a copy (%s) and were saved to %s",
                    self._home.path, first, tail.offset, self._need.reason, path)  # fmt: skip

    def _keep_vote_back(self, tree: Tree) -> None:
        """If the copy ends before what this node has confirmed: no vote until the log has it again."""
        engine, home = self._engine, self._home
        confirmed = engine.tail if self._need.reason == "checksum" else engine.tree.state.applied
        floor = max(home.vote_floor, min(confirmed.offset, int(self._meta["last"])))
        if floor > max(tree.state.applied.offset, home.vote_floor):
            home.set_vote_floor(floor)


class Verification:
    """Compares a copy that was received, or that the disk failed under, with its digests, on a thread of its own
    (``kvrep-verify-NAME``)."""

    def __init__(self, engine: Engine, label: str) -> None:
        self._engine = engine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kvrep-verify-{label}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            pinned = self._engine.pinned()
        except Error:
            return  # closing; the next open verifies
        try:
            self._engine.verified(pinned, pinned.differing(self._breathe))
        except ClosedError:
            pass
        except Exception:
            log.exception("a copy could not be verified")
        finally:
            pinned.close()

    def _breathe(self) -> None:
        """Reading must not keep the interpreter from those who serve."""
        if self._stop.wait(VERIFY_BREATH_S):
            raise ClosedError("the verification was ended")

    def stop(self, timeout_s: float) -> None:
        self._stop.set()
        self._thread.join(timeout_s)
