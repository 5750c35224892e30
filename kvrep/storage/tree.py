"""LMDB: the state that the log adds up to. Written by the flush alone, read by everybody.

Each keyspace is a named database with the user's plain keys and values, so ordinary LMDB tools read them.
A database of our own (its name cannot be a keyspace's) keeps what belongs to the state: how much of the log
is in it, the epoch table, the configuration, the digests. All of it changes in the flush's one transaction.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from kvrep.errors import (
    ClosedError,
    ConfigurationMismatch,
    CorruptionError,
    NotAStore,
    OpenError,
    StorageFailed,
    StorageFull,
)
from kvrep.model.configuration import Configuration
from kvrep.model.position import EpochTable
from kvrep.model.sessions import Sessions
from kvrep.storage.digest import DIGEST_MODULUS, Hasher
from kvrep.storage.log import START, Tail

__all__ = ["Change", "State", "Tree", "digests_in", "digests_out", "lmdb_errors"]

META = b"kvrep:meta"
STATE_KEY = b"state"
PAGE_BYTES = 4096
MAP_SHARE_MAX = 0.95
"""The rest of the map is kept for deletes."""
BOATS = 8

Change = tuple[str, list[tuple[bytes, bytes]], list[bytes]]
"""(keyspace, puts in key order, deleted keys in order)."""


@dataclass(slots=True)
class State:
    """What LMDB says of itself, stored in the same transaction as the data it describes."""

    applied: Tail = START
    epochs: EpochTable = field(default_factory=EpochTable)
    configuration: Configuration = field(default_factory=Configuration)
    configured_at: int = 0
    """The offset of the record that made the configuration."""
    branches: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset of the epoch start that began it, id) of every branch of this history; the last one is ours."""
    digests: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    mark: int = 0
    """The last digest mark contained."""
    mark_digests: dict[str, int] = field(default_factory=dict)
    """The digests at that mark, as computed here."""
    verified: int = 0
    """The last mark at which our digests were compared with the primary's, and equal."""
    diverged: int = 0
    """The first mark at which they were not."""
    sessions: Sessions = field(default_factory=Sessions)
    """The forwarded writes among what is contained."""
    logged_in: str = ""
    """The copy (store id and generation) whose own log holds record ``applied``: it must be found there."""

    def pack(self) -> bytes:
        data: bytes = msgpack.packb(
            {
                "applied": tuple(self.applied),
                "epochs": list(self.epochs),
                "configuration": self.configuration.to_wire(),
                "configured_at": self.configured_at,
                "branches": self.branches,
                "digests": digests_out(self.digests),
                "counts": self.counts,
                "mark": self.mark,
                "mark_digests": digests_out(self.mark_digests),
                "verified": self.verified,
                "diverged": self.diverged,
                "logged_in": self.logged_in,
                "sessions": self.sessions.to_wire(),
            }
        )
        return data

    @classmethod
    def unpack(cls, data: bytes) -> State:
        raw: dict[str, Any] = msgpack.unpackb(data, strict_map_key=False)
        return cls(
            applied=Tail(*raw["applied"]),
            epochs=EpochTable((e, f) for e, f in raw["epochs"]),
            configuration=Configuration.from_wire(raw["configuration"]),
            configured_at=raw["configured_at"],
            branches=[(o, b) for o, b in raw.get("branches", [(0, raw.get("branch", b""))])],
            digests=digests_in(raw["digests"]),
            counts=raw["counts"],
            mark=raw["mark"],
            mark_digests=digests_in(raw["mark_digests"]),
            verified=raw["verified"],
            diverged=raw["diverged"],
            logged_in=raw.get("logged_in", ""),
            sessions=Sessions.from_wire(raw.get("sessions")),
        )

    @property
    def branch(self) -> bytes:
        return self.branches[-1][1] if self.branches else b""

    def copy(self) -> State:
        return State.unpack(self.pack())


def digests_out(digests: dict[str, int]) -> dict[str, bytes]:
    """Digests as they are packed in records and in LMDB."""
    return {name: value.to_bytes(16, "big") for name, value in digests.items()}


def digests_in(digests: dict[str, bytes]) -> dict[str, int]:
    """The same back as numbers."""
    return {name: int.from_bytes(value, "big") for name, value in digests.items()}


@contextmanager
def lmdb_errors(doing: str) -> Iterator[None]:
    """Map what lmdb raises while ``doing`` something to kvrep's errors, with the cause attached."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise StorageFull(
            f"the LMDB map is full while {doing}", hint="open the store with a larger map_bytes"
        ) from error
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise CorruptionError(f"LMDB is damaged ({error}) while {doing}") from error
    except lmdb.Error as error:
        code = getattr(error, "code", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error):
            raise StorageFull(f"no disk space while {doing}") from error
        raise StorageFailed(f"LMDB failed while {doing}: {error}") from error


class Tree:
    """An open LMDB environment with its keyspaces and a pool of read transactions."""

    def __init__(self, env: lmdb.Environment, path: Path, lineage: bytes) -> None:
        self.env = env
        self.path = path
        self.hasher = Hasher(lineage)
        self.state = State()
        self.generation = 0
        """Grows with every commit."""
        self._meta = env.open_db(META)
        self._handles: dict[str, Any] = {}
        # Protects the count of live read transactions; taken only when one is begun or ended.
        self._count_lock = threading.Condition()
        # Weakly, so that a read that an interrupt took from its thread is not waited for at the end.
        self._reads: weakref.WeakSet[Any] = weakref.WeakSet()
        self._held = 0
        self._boats: list[Any] | None = None
        """Reads to go on with after a commit failed, if one did."""
        self._closing = False
        self._close_at_end = False
        """Whether whoever ends the last read closes the environment, too."""
        self._idle: list[Any] = []

    @classmethod
    def open(
        cls, path: Path, lineage: bytes, *, map_bytes: int, keyspaces_max: int, readers_max: int, create: bool
    ) -> Tree:
        """Open (or create) the environment in directory ``path``.

        ``NotAStore`` when the data file is missing or empty although ``create`` is false.
        """
        data = path / "data.mdb"
        if create:
            path.mkdir(parents=True, exist_ok=True)
        elif not data.exists() or data.stat().st_size == 0:
            raise NotAStore(
                f"{data} is missing or empty, although the store was created earlier",
                path=str(data),
                hint="restore this node from another one: move its directory away and let it bootstrap",
            )
        kwargs: dict[str, Any] = {"lib_version": 0} if create else {}
        try:
            env = lmdb.open(
                str(path),
                map_size=max(map_bytes, data.stat().st_size if data.exists() else 0),
                max_dbs=keyspaces_max + 4,  # and what is kvrep's own
                max_readers=readers_max,
                readahead=True,
                mode=0o600,
                **kwargs,
            )
        except lmdb.Error as error:
            raise OpenError(f"LMDB cannot open {path}: {error}") from error
        try:
            with lmdb_errors("opening"):
                env.reader_check()
                tree = cls(env, path, lineage)
            tree._load()
        except lmdb.DbsFullError:
            env.close()
            raise ConfigurationMismatch(
                f"the store has more keyspaces than keyspaces_max={keyspaces_max} allows",
                option="keyspaces_max",
                given=keyspaces_max,
            ) from None
        except BaseException:
            env.close()
            raise
        return tree

    def _load(self) -> None:
        with lmdb_errors("opening"):
            self._load_state()
        with self.env.begin() as txn:
            names = [bytes(key) for key in txn.cursor().iternext(keys=True, values=False)]
        for name in names:
            if name != META:
                self._handles[name.decode()] = self.env.open_db(name, create=False)

    def _load_state(self) -> None:
        with self.env.begin() as txn:
            raw = txn.get(STATE_KEY, db=self._meta)
            if raw is not None:
                self.state = State.unpack(raw)

    # -- reading -----------------------------------------------------------------------------------

    @property
    def keyspaces(self) -> list[str]:
        return sorted(self._handles)

    def handle(self, keyspace: str) -> Any | None:
        """The LMDB database of a keyspace; ``None`` while nothing of it has been flushed."""
        return self._handles.get(keyspace)

    def get(self, keyspace: str, key: bytes) -> bytes | None:
        """A point read. The caller has looked in the memtables first."""
        handle = self._handles.get(keyspace)
        if handle is None:
            return None
        pool = self._idle
        try:
            txn = pool.pop()
        except IndexError:
            txn = self.begin()
        try:
            value: bytes | None = txn.get(key, None, handle)
            return value
        except lmdb.BadValsizeError:
            return None  # no key can have that length
        finally:
            pool.append(txn)
            if pool is not self._idle:
                self._drain(pool)

    def items(self, keyspace: str) -> list[tuple[bytes, bytes]]:
        """All pairs of a small keyspace, as LMDB holds them."""
        handle = self._handles.get(keyspace)
        if handle is None:
            return []
        txn = self.begin()
        try:
            return [(bytes(key), bytes(value)) for key, value in txn.cursor(handle)]
        finally:
            self.end(txn)

    def begin(self) -> Any:
        """A read transaction of its own; give it back with :meth:`end`."""
        with self._count_lock:
            if self._closing:
                raise ClosedError("the store is closed")
            with lmdb_errors("beginning a read"):
                txn = self._begin()
            self._reads.add(txn)
        return txn

    def _begin(self) -> Any:
        try:
            return self.env.begin()
        except lmdb.ReadersFullError:
            self.env.reader_check()
            return self.env.begin()
        except lmdb.PanicError:  # after a failed commit
            if not self._boats:
                raise
            return self._boats.pop()

    def end(self, txn: Any) -> None:
        with self._count_lock:
            self._reads.discard(txn)
            if self._boats is not None and not self._closing:
                self._boats.append(txn)
            else:
                txn.abort()
            if self._closing:
                self._count_lock.notify_all()
            last = self._close_at_end and self._live == 0
        if last:
            self.env.close()

    @property
    def _live(self) -> int:
        return len(self._reads) + self._held

    def _drain(self, pool: list[Any]) -> None:
        while pool:
            try:
                txn = pool.pop()
            except IndexError:
                return
            self.end(txn)

    def refresh(self) -> None:
        """After a commit: reads begin anew, idle transactions end, so that they pin no old pages."""
        old, self._idle = self._idle, []
        self._drain(old)

    @property
    def meta(self) -> Any:
        """The database of our own, which holds the state record."""
        return self._meta

    def count(self, txn: Any, keyspace: str) -> int:
        handle = self._handles.get(keyspace)
        return 0 if handle is None else int(txn.stat(handle)["entries"])

    # -- writing -----------------------------------------------------------------------------------

    def flush(
        self,
        changes: Iterable[Change],
        update: Callable[[State], None],
        breathe: Callable[[], None],
    ) -> State:
        """Apply ``changes`` in one durable transaction; ``update`` fills in the new state before it commits.

        ``breathe`` is called between steps of at most a few milliseconds. Raises :class:`StorageFull`
        (nothing changed, may be tried again) or :class:`StorageFailed`. On one thread only.
        """
        state = self.state.copy()
        created: dict[str, Any] = {}
        boats: list[Any] = []
        try:
            with lmdb_errors("flushing"):
                # After some failures of a commit LMDB begins no reads any more. These are for that case; they
                # see what the memtables add up to the present with, and pin no page that the flush could use.
                boats = [self.env.begin() for _ in range(BOATS)]
                self._commit(state, created, changes, update, breathe)
        except StorageFailed as error:
            if self._disk_bytes() < 64 * PAGE_BYTES:  # a short write is EIO in LMDB's words
                raise StorageFull("no disk space while flushing") from error
            self._boats, boats = boats, []
            raise
        finally:
            for boat in boats:
                boat.abort()
        self.state = state
        self.generation += 1
        self.refresh()
        self._handles.update(created)  # last: a read transaction from before the commit does not know them
        return state

    def _commit(
        self,
        state: State,
        created: dict[str, Any],
        changes: Iterable[Change],
        update: Callable[[State], None],
        breathe: Callable[[], None],
    ) -> None:
        txn = self.env.begin(write=True)
        try:
            for keyspace, puts, deletes in changes:
                handle = self._handles.get(keyspace) or created.get(keyspace)
                if handle is None:
                    handle = self.env.open_db(keyspace.encode(), txn=txn)
                    created[keyspace] = handle
                self._apply(txn, handle, state, keyspace, puts, deletes)
                breathe()
            update(state)
            txn.put(STATE_KEY, state.pack(), db=self._meta)
            txn.commit()
        except BaseException:
            txn.abort()
            raise

    def _apply(
        self,
        txn: Any,
        handle: Any,
        state: State,
        keyspace: str,
        puts: list[tuple[bytes, bytes]],
        deletes: list[bytes],
    ) -> None:
        cursor = txn.cursor(handle)
        keys = [key for key, _ in puts]
        old = cursor.getmulti(keys + deletes if deletes else keys)
        change = self.hasher.sum(puts) - self.hasher.sum(old)
        if puts:
            cursor.putmulti(puts)
        for key in deletes:
            txn.delete(key, db=handle)
        cursor.close()
        state.digests[keyspace] = (state.digests.get(keyspace, 0) + change) % DIGEST_MODULUS
        state.counts[keyspace] = state.counts.get(keyspace, 0) + len(puts) - len(old)

    def digest(
        self, keyspace: str, breathe: Callable[[], None] = lambda: None, read: Any = None
    ) -> tuple[int, int]:
        """(digest, count) recomputed from what LMDB holds, for ``verify``; as ``read`` sees it, if given."""
        handle = self._handles.get(keyspace)
        total = count = 0
        if handle is None:
            return 0, 0
        txn = self.begin() if read is None else read
        try:
            items: list[tuple[bytes, bytes]] = []
            for item in txn.cursor(handle):
                items.append(item)
                if len(items) == 512:
                    total += self.hasher.sum(items)
                    count += len(items)
                    items.clear()
                    breathe()
            return (total + self.hasher.sum(items)) % DIGEST_MODULUS, count + len(items)
        finally:
            if read is None:
                self.end(txn)

    # -- room --------------------------------------------------------------------------------------

    @property
    def file_bytes(self) -> int:
        """The size of the data file: every page that was ever used."""
        return (int(self.env.info()["last_pgno"]) + 1) * PAGE_BYTES

    @property
    def map_bytes(self) -> int:
        return int(self.env.info()["map_size"])

    def room_for(self, entries: int, payload_bytes: int) -> bool:
        """Whether map and disk can take the worst case of a flush of so much.

        Every entry may touch another leaf (copied whole, with its branch pages), but no page is copied
        twice in one transaction; values above a page's half get pages of their own.
        """
        used = self.file_bytes
        touched = min(entries * PAGE_BYTES, used) * 9 // 8
        worst = touched + payload_bytes * 3 // 2 + 64 * PAGE_BYTES
        need = max(0, worst - self._free_bytes())
        return used + need <= self.map_bytes * MAP_SHARE_MAX and need <= self._disk_bytes()

    def may_try(self, payload_bytes: int) -> bool:
        """Whether a flush that deletes much may be tried although its worst case does not fit into the map.

        LMDB says so cleanly if the map is too small after all; of the disk it must not find out.
        """
        return payload_bytes * 3 // 2 + self.file_bytes // 8 + 64 * PAGE_BYTES <= self._disk_bytes()

    def _disk_bytes(self) -> int:
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize

    def _free_bytes(self) -> int:
        """Pages on the free list that a flush may use again, roughly (readers may still pin some)."""
        try:
            with self.env.begin() as txn:
                handles: list[Any] = [self._meta, *self._handles.values()]
                used = sum(_pages(txn.stat(handle)) for handle in handles)
        except lmdb.Error:
            return 0
        return max(0, self.file_bytes // PAGE_BYTES - used - 16) * PAGE_BYTES // 2

    def close(self, timeout_s: float) -> bool:
        """End idle reads, wait for those under way, close. False if some did not end in time."""
        with self._count_lock:
            self._closing = True
        self.refresh()
        with self._count_lock:
            deadline = time.monotonic() + timeout_s
            while not (home := self._live == 0) and (left := deadline - time.monotonic()) > 0:
                self._count_lock.wait(min(left, 0.05))  # what is collected as garbage tells nobody
            boats, self._boats = self._boats, None
        if home:
            for boat in boats or ():
                boat.abort()
            self.env.close()
        return home

    def retire(self) -> None:
        """Another copy took this one's place: begin no more reads, and close when the last one has ended."""
        with self._count_lock:
            self._closing = True
            self._held += 1
        self.refresh()
        with self._count_lock:
            self._held -= 1
            self._close_at_end = True
            last = self._live == 0
        if last:
            self.env.close()


def _pages(stat: Any) -> int:
    """Pages in use, from what LMDB says of a database."""
    return int(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"])
