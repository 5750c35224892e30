"""The directory of a store: who it is, which copy is live, and that one process has it.

::

    LOCK       flock; says which process and host hold it
    IDENTITY   store id, name and promised epoch, stored twice, never replaced by a bootstrap
    STORE      the marker, written last at creation: a directory with it is a store
    CURRENT    names the live generation and its lineage; replaced atomically
    gen-000001/data   LMDB          gen-000001/log   the log
    rescue/    records that had to be dropped
    spool/     copies under way to a follower
    gen-000002/COPY    what has arrived of a copy that is being received; in a live generation: the copy's
                       digest has not been verified yet
    gen-000001/SUSPECT the disk failed under this copy; its digests have not been recomputed since
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import struct
import threading
from pathlib import Path
from typing import Any
from zlib import crc32

import msgpack

from kvrep.errors import (
    ConfigurationMismatch,
    CorruptionError,
    NotAStore,
    OpenError,
    StoreInUse,
    UpgradeRequired,
)
from kvrep.model.position import ZERO, Position
from kvrep.replication.promises import Verdict, judge
from kvrep.storage.log_file import fsync_directory
from kvrep.storage.rescue import UNFINISHED

__all__ = ["COPY", "Home", "write_atomically"]

FORMAT = 1
COPY = "COPY"
SUSPECT = "SUSPECT"
_PARTS = {"LOCK", "IDENTITY", "STORE", "CURRENT", "rescue", "spool"}


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that any crash leaves the old or the new content, durable on return."""
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(fresh, path)
    fsync_directory(path.parent)


class _Identity:
    """A small map stored in two alternating slots of one preallocated file: a torn write leaves the other."""

    SLOT = 4096
    HEAD = struct.Struct(">8sQII")
    MAGIC = b"kvrepid1"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sequence = 0
        self.data: dict[str, Any] = {}

    def create(self, data: dict[str, Any]) -> None:
        write_atomically(self.path, bytes(2 * self.SLOT))
        self.store(data)

    def load(self) -> None:
        """Take the newer valid slot; ``CorruptionError`` when both are damaged."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            raw = b""
        for slot in (0, 1):
            part = raw[slot * self.SLOT : (slot + 1) * self.SLOT]
            if len(part) < self.HEAD.size:
                continue
            magic, sequence, length, check = self.HEAD.unpack_from(part)
            body = part[self.HEAD.size : self.HEAD.size + length]
            whole = len(body) == length and crc32(body, sequence & 0xFFFFFFFF) == check
            if magic == self.MAGIC and whole and sequence > self.sequence:
                self.sequence = sequence
                self.data = msgpack.unpackb(body)
        if not self.sequence:
            raise CorruptionError(
                f"{self.path.name} is missing or damaged in both its copies",
                hint="restore the file from a backup, or let this node bootstrap under a new directory",
            )

    def store(self, data: dict[str, Any]) -> None:
        """Durable on return; ``OSError`` leaves the former content in force."""
        body = msgpack.packb(data)
        sequence = self.sequence + 1
        head = self.HEAD.pack(self.MAGIC, sequence, len(body), crc32(body, sequence & 0xFFFFFFFF))
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwritev(fd, [head + body], (sequence % 2) * self.SLOT, os.RWF_DSYNC)
        finally:
            os.close(fd)
        self.sequence = sequence
        self.data = data


class Home:
    """An opened, locked store directory. ``close()`` gives the lock back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.created = False
        self._lock_fd = -1
        self._identity = _Identity(path / "IDENTITY")
        self._current: dict[str, Any] = {}
        # Protects what the identity file says: two threads that promise at once must not undo each other.
        self._promising = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, create: bool, name: str | None, lineage: bytes) -> Home:
        """Lock the directory; create the store in it when it is empty and ``create`` is true.

        ``lineage`` is for a new store: 16 random bytes, or empty for a follower that adopts one later.
        """
        home = cls(path)
        if not path.exists():
            if not create:
                raise NotAStore(f"there is no store at {path}", path=str(path), hint="check the path")
            try:
                _make_directory(path)
            except OSError as error:
                raise OpenError(f"cannot create {path}: {error.strerror}") from error
        if not path.is_dir():
            raise NotAStore(f"{path} is not a directory", path=str(path), hint="choose another path")
        home._take_lock()
        try:
            if (path / "STORE").exists():
                home._load(name)
            elif create:
                home._create(name, lineage)
            else:
                raise NotAStore(f"there is no store at {path}", path=str(path), hint="check the path")
        except BaseException:
            home.close()
            raise
        return home

    # -- lock --------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        try:
            fd = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OpenError(f"cannot open the lock file in {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(os.pread(fd, 512, 0))
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise OpenError(f"cannot lock {self.path}: {error.strerror}") from error
            pid, host = holder
            who = "this process" if pid == os.getpid() else f"process {pid} on {host}"
            raise StoreInUse(
                f"{self.path} is already open in {who}", path=str(self.path), pid=pid, host=host
            ) from None
        self._lock_fd = fd
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except OSError as error:
            self.close()
            raise OpenError(f"cannot write the lock file in {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        if self._lock_fd >= 0:
            # Said aloud: a child that another thread is starting just now has the descriptor, too.
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        self.forked()

    def forked(self) -> None:
        """Let go of the descriptor and leave the lock to whoever else has it."""
        if self._lock_fd >= 0:
            fd, self._lock_fd = self._lock_fd, -1
            os.close(fd)

    # -- creation and loading ----------------------------------------------------------------------

    def _create(self, name: str | None, lineage: bytes) -> None:
        strangers = sorted(
            p.name
            for p in self.path.iterdir()
            if p.name not in _PARTS and not p.name.startswith("gen-") and not p.name.endswith(".new")
        )
        if strangers:
            raise NotAStore(
                f"{self.path} holds other files ({', '.join(strangers[:3])}) and no store",
                path=str(self.path),
                hint="choose an empty directory",
            )
        for old in self.path.glob("gen-*"):
            shutil.rmtree(old)  # a creation that was interrupted: the marker is written last
        _fsync_parent(self.path)  # the opener that made the directory may not have lived to do it
        store_id = os.urandom(16)
        self._identity.create({"store_id": store_id, "name": name or "", "promised": 0, "promised_to": b""})
        for part in ("data", "log"):
            (self.path / "gen-000001" / part).mkdir(parents=True, mode=0o700)
        fsync_directory(self.path / "gen-000001")
        self.switch("gen-000001", lineage)
        self.created = True

    def finish_creation(self) -> None:
        """Write the marker of a new store, whose parts are all on the disk now. Durable on return."""
        marker = {"format": FORMAT, "store_id": self.store_id.hex()}
        write_atomically(self.path / "STORE", json.dumps(marker).encode())

    def _load(self, name: str | None) -> None:
        marker = self._json("STORE")
        if marker.get("format") != FORMAT:
            raise UpgradeRequired(
                f"store format {marker.get('format')} is not known here",
                found=marker.get("format"),
                supported=FORMAT,
            )
        self._identity.load()
        if self.store_id.hex() != marker.get("store_id"):
            raise CorruptionError("IDENTITY and STORE name different stores")
        self._current = self._json("CURRENT")
        if not self.generation.is_dir():
            raise NotAStore(f"{self.generation} is missing", path=str(self.generation))
        self._clean()
        if name is not None and name != self.name:
            if self.name:
                raise ConfigurationMismatch(
                    f"the store at {self.path} is named {self.name!r}, not {name!r}",
                    option="name",
                    given=name,
                    stored=self.name,
                    hint="open it under its own name, or leave the name out",
                )
            self._identity.store({**self._identity.data, "name": name})

    def _clean(self) -> None:
        """Remove what nobody goes on with: old generations, spooled copies, rescue files that were not finished.

        A copy half received stays.
        """
        for old in self.path.glob("gen-*"):
            if old != self.generation and not (old == self.next_generation() and (old / COPY).exists()):
                shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.spool, ignore_errors=True)
        for half in self.rescue.glob("*" + UNFINISHED):
            half.unlink(missing_ok=True)

    def drop_old(self) -> None:
        """Remove the generations before the live one. What is open in them stays readable."""
        for old in self.path.glob("gen-*"):
            if old.name < self.generation.name:
                shutil.rmtree(old, ignore_errors=True)

    def drop_unfinished(self) -> None:
        """Remove a copy that is half received: this node does not follow any more."""
        shutil.rmtree(self.next_generation(), ignore_errors=True)

    def _json(self, part: str) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads((self.path / part).read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptionError(f"{self.path / part} cannot be read: {error}") from error
        return data

    # -- what it says ------------------------------------------------------------------------------

    @property
    def store_id(self) -> bytes:
        return bytes(self._identity.data["store_id"])

    @property
    def name(self) -> str:
        return str(self._identity.data["name"])

    @property
    def promised_epoch(self) -> int:
        """No epoch below this one is obeyed."""
        return int(self._identity.data["promised"])

    @property
    def promised_to(self) -> bytes:
        return bytes(self._identity.data["promised_to"])

    def promise(self, epoch: int, store_id: bytes) -> bool:
        """Durably promise to refuse every epoch below ``epoch``.

        False when a higher one, or the same to another store, has been promised. ``OSError`` when it
        could not be stored: then nothing was promised and nothing may be answered.
        """
        with self._promising:
            verdict = judge(epoch, store_id, promised=self.promised_epoch, promised_to=self.promised_to)
            if verdict is Verdict.NEW:
                self._identity.store({**self._identity.data, "promised": epoch, "promised_to": store_id})
            return verdict is not Verdict.REFUSED

    @property
    def lowered(self) -> Position:
        """See :attr:`kvrep.replication.messages.Promise.lowered`."""
        return Position(*self._identity.data.get("lowered", ZERO))

    def lower(self, position: Position) -> bool:
        """Durably note that from ``position`` on fewer copies are enough.

        False when an epoch above the position's has been promised. ``OSError`` when it could not be stored.
        """
        with self._promising:
            if position.epoch < self.promised_epoch:
                return False
            if position > self.lowered:
                self._identity.store({**self._identity.data, "lowered": list(position)})
            return True

    @property
    def lineage(self) -> bytes:
        return bytes.fromhex(self._current["lineage"])

    @property
    def generation(self) -> Path:
        return self.path / str(self._current["generation"])

    @property
    def copy_id(self) -> str:
        """Which copy of the data this is, beside which log."""
        return f"{self.store_id.hex()}/{self.generation.name}"

    @property
    def received(self) -> bool:
        """Whether this is a received copy that has not been compared with its digests yet."""
        return (self.generation / COPY).exists()

    @property
    def suspected(self) -> bool:
        """Whether the disk failed under this copy, and it has not been compared with its digests since."""
        return (self.generation / SUSPECT).exists()

    def suspect(self) -> None:
        """Note durably that the disk failed under the live copy."""
        write_atomically(self.generation / SUSPECT, b"")

    def trust(self) -> None:
        """The live copy was compared with its digests, and equals them."""
        for note in (COPY, SUSPECT):
            (self.generation / note).unlink(missing_ok=True)

    @property
    def rescue(self) -> Path:
        return self.path / "rescue"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def vote_floor(self) -> int:
        """The offset below which this node's log lacks what it once confirmed: till then it may not vote."""
        return int(self._identity.data.get("vote_floor", 0))

    def set_vote_floor(self, offset: int) -> None:
        """Durable on return."""
        with self._promising:
            self._identity.store({**self._identity.data, "vote_floor": offset})

    def next_generation(self) -> Path:
        """Where a bootstrap builds its copy; not live until :meth:`switch`."""
        number = int(self.generation.name.partition("-")[2]) + 1
        return self.path / f"gen-{number:06d}"

    def switch(self, generation: str, lineage: bytes) -> None:
        """Make a generation live, atomically and durably."""
        fsync_directory(self.path)
        current = {"generation": generation, "lineage": lineage.hex()}
        write_atomically(self.path / "CURRENT", json.dumps(current).encode())
        self._current = current

    def switched_to(self, generation: str) -> bool:
        """After a failed :meth:`switch`: whether the next open would find ``generation`` live."""
        return bool(self._json("CURRENT").get("generation") == generation)


def _make_directory(path: Path) -> None:
    """Make a directory and what is missing above it, each durable with its name."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, mode=0o700)
    for made in reversed(missing):
        _fsync_parent(made)


def _fsync_parent(path: Path) -> None:
    """Make the name of ``path`` durable, where its directory may be read at all."""
    try:
        fsync_directory(path.parent)
    except PermissionError:
        pass


def _holder(raw: bytes) -> tuple[int | None, str | None]:
    try:
        data = json.loads(raw)
        return int(data["pid"]), str(data["host"])
    except (ValueError, KeyError, TypeError):
        return None, None
