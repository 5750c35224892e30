"""What is visible: the memtables over LMDB, always at one committed position.

Data reaches the next place before it leaves the last: a record is in a table before ``committed`` says so,
and in LMDB (with idle readers renewed) before its table is retired. So a point read that looks in the tables
first and in LMDB second needs no lock. One short lock orders publish, rotation, capture and retirement.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from kvrep.errors import ClosedError, Error, InvalidKeyspace, SnapshotExpired, again
from kvrep.model.position import Position
from kvrep.model.record import Kind, is_system
from kvrep.model.sessions import RequestId, Sessions
from kvrep.storage.memtable import ENTRY_OVERHEAD_BYTES, TABLE_BYTES_MAX, TABLE_ENTRIES_MAX, Table, overlay
from kvrep.storage.tree import Tree

__all__ = ["Snapshot", "View"]

_MISSING: Any = object()
_KEY = itemgetter(0)
PREFIX_BYTES = 2
CHUNK_MIN, CHUNK_MAX = 32, 1024
"""Pairs that one step of a scan takes, growing from the one to the other."""
CHUNK_BYTES = 1 << 20
"""Where a keyspace has large values, a step ends after so many bytes of them."""


class View:
    """The memtables of a store and the reads over them and LMDB."""

    def __init__(
        self,
        tree: Tree,
        *,
        keyspaces_max: int,
        clock: Callable[[], float] = time.monotonic,
        before: View | None = None,
    ) -> None:
        """``before``: the view whose place this one takes; its lock is held, and shared from now on."""
        self.tree = tree
        self.clock = clock
        self.last = tree.state.applied.offset
        """The last published offset."""
        self.tables: tuple[Table, ...] = (Table(clock()),)
        """Newest first; the first one is active, the others never change."""
        self.table_bytes_max: int = TABLE_BYTES_MAX if before is None else before.table_bytes_max
        """Payload at which a table freezes."""
        self.sessions: Sessions = tree.state.sessions.copy()
        """The forwarded writes among what is published. Changed under the lock; see :meth:`forwarded`."""
        self.frozen_bytes = 0
        """Memory of the frozen tables, entry overhead counted in."""
        self.on_rotate: Callable[[], None] = lambda: None
        """Called (under the lock, so it must only signal) when a table froze."""
        self._lock: threading.Lock = threading.Lock() if before is None else before._lock
        self._prefixes: dict[str, bytes] = {} if before is None else before._prefixes
        self._names: list[str] = [] if before is None else before._names
        self._keyspaces_max = keyspaces_max
        self._snapshots: set[Snapshot] = set() if before is None else before._snapshots
        self.successor: View | None = None
        """The view that took this one's place; reads that came too late go on there."""
        self.closed: Error | None = None
        self.withheld: Callable[[], None] | None = None
        """Called before a read while it is not known yet what is committed; returns when it is, or raises."""
        for name in tree.keyspaces:
            self.prefix(name)

    # -- keyspaces ---------------------------------------------------------------------------------

    def prefix(self, keyspace: str) -> bytes:
        """The two bytes that stand for a keyspace in this process."""
        prefix = self._prefixes.get(keyspace)
        if prefix is None:
            number = len(self._names)
            prefix = number.to_bytes(PREFIX_BYTES, "big")
            self._names.append(keyspace)
            self._prefixes[keyspace] = prefix
        return prefix

    def admit(self, keyspace: str) -> bytes:
        """Like :meth:`prefix`, for a name that a user gave: ``InvalidKeyspace`` beyond the limit."""
        with self._lock:
            own = sum(map(is_system, self._names))
            if (
                keyspace not in self._prefixes
                and not is_system(keyspace)
                and len(self._names) - own >= self._keyspaces_max
            ):
                raise InvalidKeyspace(
                    f"there are {len(self._names)} keyspaces already",
                    hint="open the store with a larger keyspaces_max (up to 1024)",
                )
            return self.prefix(keyspace)

    def name_of(self, prefix: bytes) -> str:
        return self._names[int.from_bytes(prefix, "big")]

    @property
    def keyspaces(self) -> list[str]:
        """The users' keyspaces that hold or held data."""
        tables = self.tables
        names = {name for name in list(self._names) if self._in_tables(tables, self._prefixes[name])}
        return sorted(name for name in names.union(self.tree.keyspaces) if not is_system(name))

    @staticmethod
    def _in_tables(tables: Sequence[Table], prefix: bytes) -> bool:
        if any(table.slice(prefix, _after(prefix)) for table in tables[1:]):
            return True
        return any(key.startswith(prefix) for key in list(tables[0].entries))

    # -- publishing --------------------------------------------------------------------------------

    def publish(self, records: Sequence[Any]) -> None:
        """Make committed records (each with ``offset``, ``kind``, ``payload``) visible, in log order.

        Writes between two special records become visible at once, by one ``dict.update``.
        """
        with self._lock:
            table = self.tables[0]
            fresh: dict[bytes, bytes | None] = {}
            size = writes = 0
            prefixes, kind_write, kind_noted = self._prefixes, Kind.WRITE, Kind.NOTED
            for record in records:
                kind = record.kind
                if kind in (kind_write, kind_noted):
                    writes += 1
                    if record.origin is not None:
                        noted = record.origin, Position(record.epoch, record.offset)
                        table.origins.append(noted)
                        self.sessions.note(*noted)
                    payload = record.payload if kind == kind_write else record.payload[0]
                    for i in range(0, len(payload), 2):
                        prefix = prefixes.get(payload[i]) or self.prefix(payload[i])
                        flat = payload[i + 1]
                        if len(flat) == 2:
                            key, value = flat
                            fresh[prefix + key] = value
                            size += len(key) + len(value) if value is not None else len(key)
                        else:  # in C: a record may have very many
                            keys, values = flat[::2], flat[1::2]
                            fresh.update(zip(map(prefix.__add__, keys), values, strict=True))
                            size += sum(map(len, keys)) + sum(map(len, filter(None, values)))
                elif kind == Kind.DIGEST:
                    self._add(table, fresh, size, writes, record.offset)
                    table.mark = record.payload
                    self._rotate()
                    table, fresh, size, writes = self.tables[0], {}, 0, 0
            self._add(table, fresh, size, writes, records[-1].offset)
            entries = max(len(table), len(table.origins))
            if entries >= TABLE_ENTRIES_MAX or table.payload_bytes >= self.table_bytes_max:
                self._rotate()

    def publish_write(self, write: Any) -> None:
        """The same for one record of kind ``WRITE``."""
        payload = write.payload
        if len(payload) != 2 or len(payload[1]) != 2:
            self.publish((write,))
            return
        name, (key, value) = payload
        with self._lock:
            table = self.tables[0]
            entries = table.entries
            if not entries:
                table.born_s = self.clock()
            entries[(self._prefixes.get(name) or self.prefix(name)) + key] = value
            table.payload_bytes += len(key) if value is None else len(key) + len(value)
            table.writes += 1
            table.last = self.last = write.offset
            if len(entries) >= TABLE_ENTRIES_MAX or table.payload_bytes >= self.table_bytes_max:
                self._rotate()

    def _add(self, table: Table, fresh: dict[bytes, bytes | None], size: int, writes: int, last: int) -> None:
        if not table.entries:
            table.born_s = self.clock()
        table.entries.update(fresh)
        table.payload_bytes += size
        table.writes += writes
        table.last = self.last = last

    def _rotate(self) -> None:
        """Freeze the active table. The lock is held."""
        active = self.tables[0]
        if active.last == 0:
            return
        self.frozen_bytes += active.memory_bytes
        self.tables = (Table(self.clock()), *self.tables)
        self.on_rotate()

    def rotate(self) -> None:
        """Freeze the active table if it holds anything."""
        with self._lock:
            self._rotate()

    # -- the flush's side --------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        active = self.tables[0]  # its own memory_bytes, spelt out: every write asks
        return self.frozen_bytes + active.payload_bytes + ENTRY_OVERHEAD_BYTES * len(active.entries)

    @property
    def payload_bytes(self) -> int:
        return sum(t.payload_bytes for t in self.tables)

    def frozen(self) -> tuple[Table, ...]:
        """The tables that a flush may take, newest first: up to and including the oldest digest mark."""
        tables = self.tables[1:]
        for i in range(len(tables) - 1, -1, -1):
            if tables[i].mark is not None:
                return tables[i:]
        return tables

    def retire(self, tables: Sequence[Table]) -> None:
        """Forget tables whose content is in LMDB (committed, idle readers renewed)."""
        gone = set(map(id, tables))
        with self._lock:
            self.tables = tuple(t for t in self.tables if id(t) not in gone)
            # Counted anew: a table may have been joined with its neighbour while it was flushed.
            self.frozen_bytes = sum(t.memory_bytes for t in self.tables[1:])

    def rebuild(self, applied: int, records: Sequence[Any]) -> None:
        """Replace all tables by ``records``, which follow what LMDB holds. Snapshots keep what they have."""
        fresh = View(self.tree, keyspaces_max=self._keyspaces_max, clock=self.clock)
        fresh._names, fresh._prefixes = self._names, self._prefixes
        fresh.last = applied
        if records:
            fresh.publish(records)
        with self._lock:
            self.tables, self.last, self.frozen_bytes = fresh.tables, fresh.last, fresh.frozen_bytes
            self.sessions = fresh.sessions

    # -- reading -----------------------------------------------------------------------------------

    def get(self, keyspace: str, prefix: bytes, key: bytes) -> bytes | None:
        """The newest committed value of ``key``; ``None`` when there is none. Any thread, no lock."""
        if self.closed is not None:
            raise again(self.closed)
        if self.withheld is not None:
            self.withheld()
        for table in self.tables:
            entries = table.entries
            if entries:
                value: bytes | None = entries.get(prefix + key, _MISSING)
                if value is not _MISSING:
                    return value
        try:
            return self.tree.get(keyspace, key)
        except ClosedError:
            if self.successor is None:
                raise
        return self.successor.get(keyspace, prefix, key)

    def succeed(self, tree: Tree) -> View:
        """A view of another copy that takes this one's place: the same keyspace prefixes and snapshots."""
        with self._lock:
            self.successor = View(tree, keyspaces_max=self._keyspaces_max, clock=self.clock, before=self)
        return self.successor

    def capture(self, position: Callable[[int], Position], age_max_s: float) -> Snapshot:
        """One committed position, held."""
        if self.closed is not None:
            raise again(self.closed)
        if self.withheld is not None:
            self.withheld()
        with self._lock:
            successor = self.successor
            if successor is None:
                self._rotate_for_capture()
                tables, last = self.tables[1:], self.last
                txn = self.tree.begin()
                snapshot = Snapshot(self, tables, txn, position(last), self.clock() + age_max_s)
                self._snapshots.add(snapshot)
                return snapshot
        return successor.capture(position, age_max_s)

    def forwarded(self, request: RequestId) -> tuple[Position | None, bool]:
        """(where that forwarded write is committed, whether it would be known here if it were)."""
        store_id, session, sequence, since = request
        with self._lock:
            found = self.sessions.find(store_id, session, sequence)
            return found, found is not None or self.sessions.knows(store_id, session, sequence, since)

    def _rotate_for_capture(self) -> None:
        """Freeze what is active; small neighbours are joined so that frequent scans keep the list short."""
        active = self.tables[0]
        if not active.entries:
            return
        if len(self.tables) > 1:
            older = self.tables[1]
            if older.mark is None and len(older) <= 2 * len(active) and len(older) + len(active) < 16_384:
                joined = Table.joined(older, active)
                self.frozen_bytes += joined.memory_bytes - older.memory_bytes
                self.tables = (Table(self.clock()), joined, *self.tables[2:])
                self.on_rotate()
                return
        self._rotate()

    def expire_snapshots(self) -> None:
        """End the snapshots that are too old, so that they pin no pages any more."""
        now = self.clock()
        for snapshot in list(self._snapshots):
            if snapshot.expires_s <= now:
                snapshot.release(expired=True)

    def oldest_snapshot_age_s(self) -> float:
        now = self.clock()
        return max((now - s.born_s for s in list(self._snapshots)), default=0.0)

    def close(self) -> None:
        for snapshot in list(self._snapshots):
            snapshot.release()

    def forked(self, error: Error) -> None:
        """In a forked child: reads raise ``error``; nothing of the parent's is touched."""
        self.closed = error
        self._lock = threading.Lock()  # another thread of the parent may have held them
        for snapshot in list(self._snapshots):
            snapshot.dead = error
            snapshot._lock = threading.Lock()

    def forget(self, snapshot: Snapshot) -> None:
        self._snapshots.discard(snapshot)


class Snapshot:
    """One position of a store, pinned until released. Safe for several threads, one step at a time."""

    def __init__(
        self, view: View, tables: tuple[Table, ...], txn: Any, position: Position, expires_s: float
    ) -> None:
        self.position = position
        self.born_s = view.clock()
        self.expires_s = expires_s
        self._view = view
        self._tree = view.tree
        self._tables = tables
        self._txn = txn
        self._expired = False
        self.dead: Error | None = None
        """Set in a forked child, where the pinned read is not ours to end."""
        # Protects the LMDB transaction: one operation at a time, and none after release.
        self._lock = threading.Lock()

    def release(self, *, expired: bool = False) -> None:
        """End the pinned read. Idempotent."""
        if self.dead is not None:
            return
        with self._lock:
            self._end(expired)
        self._view.forget(self)

    def _end(self, expired: bool) -> None:
        txn, self._txn = self._txn, None
        if txn is not None:
            self._expired = expired
            self._tables = ()
            self._tree.end(txn)

    @property
    def released(self) -> bool:
        return self._txn is None

    @property
    def busy(self) -> bool:
        """Whether another thread is in the middle of a step."""
        return self._lock.locked()

    def _need(self) -> Any:
        """The pinned read. The lock is held."""
        if self.dead is not None:
            raise again(self.dead)
        if self._view.clock() >= self.expires_s:  # the flush thread, which looks after this, may be busy
            self._end(expired=True)
        txn = self._txn
        if txn is None:
            if self._expired:
                raise SnapshotExpired(
                    "the snapshot was held longer than snapshot_age_max_s", position=self.position
                )
            raise ClosedError("the snapshot is closed")
        return txn

    def get(self, keyspace: str, key: bytes) -> bytes | None:
        with self._lock:
            txn = self._need()
            prefixed = self._view.prefix(keyspace) + key
            value: bytes | None
            for table in self._tables:
                value = table.entries.get(prefixed, _MISSING)
                if value is not _MISSING:
                    return value
            handle = self._handle(keyspace)
            value = None if handle is None else txn.get(key, None, handle)
            return value

    def count(self, keyspace: str) -> int:
        """How many keys the keyspace has."""
        with self._lock:
            txn = self._need()
            handle = self._handle(keyspace)
            total = self._tree.count(txn, keyspace) if handle is not None else 0
            prefix = self._view.prefix(keyspace)
            for key, value in overlay(self._tables, prefix, _after(prefix)).items():
                there = handle is not None and txn.get(key[PREFIX_BYTES:], None, handle) is not None
                total += (value is not None) - there
            return total

    def _handle(self, keyspace: str) -> Any | None:
        """The database, unless it was made after this snapshot began."""
        handle = self._tree.handle(keyspace)
        if handle is None:
            return None
        try:
            self._txn.stat(handle)
        except Exception:
            return None
        return handle

    def scan(
        self, keyspace: str, start: bytes, stop: bytes | None, *, reverse: bool, release: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs with ``start <= key < stop`` in key order; with ``release`` the snapshot ends with the scan."""
        chunks = self._chunks(keyspace, start, stop, reverse, release)
        next(chunks)  # from here on dropping it releases the snapshot; a generator never begun would not
        return chain.from_iterable(chunks)

    def _chunks(
        self, keyspace: str, start: bytes, stop: bytes | None, reverse: bool, release: bool
    ) -> Iterator[list[tuple[bytes, bytes]]]:
        prefix = self._view.prefix(keyspace)
        low = prefix + start
        high = _after(prefix) if stop is None else prefix + stop
        merge = _Reverse if reverse else _Forward
        try:
            yield []
            with self._lock:
                txn = self._need()
                handle = self._handle(keyspace)
                cursor = None if handle is None else txn.cursor(handle)
                large = handle is not None and txn.stat(handle)["overflow_pages"] > 0
                run = merge(cursor, self._tables, low, high, stop, large)
            size = CHUNK_MIN
            while True:
                with self._lock:
                    self._need()
                    items = run.next(size)
                if items is None:
                    return
                if items:
                    yield items
                size = min(size * 4, CHUNK_MAX)
        finally:
            if release:
                self.release()


class _Forward:
    """Merges LMDB's pairs and the tables' newer ones, chunk by chunk, in ascending order."""

    def __init__(
        self, cursor: Any, tables: Sequence[Table], low: bytes, high: bytes, stop: bytes | None, large: bool
    ) -> None:
        self._take = _take_bytes if large else _take
        self._tables = [t for t in tables if t.slice(low, high)]
        self._low, self._high = low, high
        self._stop = stop
        self._items: list[tuple[bytes, bytes]] = []
        self._pairs: Iterator[tuple[bytes, bytes]] | None = None
        if cursor is not None and cursor.set_range(low[PREFIX_BYTES:]):
            self._pairs = cursor.iternext(keys=True, values=True)

    def next(self, size: int) -> list[tuple[bytes, bytes]] | None:
        """The next pairs (perhaps none, where all were deleted); ``None`` at the end."""
        if not self._items:
            self._fill(size)
        if not self._tables:
            items, self._items = self._items, []
            return items or None
        if self._low >= self._high:
            return None
        prefix = self._low[:PREFIX_BYTES]
        bound = prefix + self._items[-1][0] + b"\0" if self._items else self._high
        for table in self._tables:
            keys = table.sorted_keys()
            i = bisect_left(keys, self._low) + size
            if i < len(keys) and keys[i] < bound:
                bound = keys[i]
        fresh = overlay(self._tables, self._low, bound)
        n = (
            bisect_left(self._items, bound[PREFIX_BYTES:], key=_KEY)
            if bound < self._high
            else len(self._items)
        )
        items, self._items = self._items[:n], self._items[n:]
        self._low = bound
        return _laid_over(items, fresh, reverse=False)

    def _fill(self, size: int) -> None:
        if self._pairs is None:
            return
        self._items, more = self._take(self._pairs, size)
        if not more:
            self._pairs = None
        if self._stop is not None and self._items and self._items[-1][0] >= self._stop:
            del self._items[bisect_left(self._items, self._stop, key=_KEY) :]
            self._pairs = None


class _Reverse:
    """The same in descending order."""

    def __init__(
        self, cursor: Any, tables: Sequence[Table], low: bytes, high: bytes, stop: bytes | None, large: bool
    ) -> None:
        self._take = _take_bytes if large else _take
        self._tables = [t for t in tables if t.slice(low, high)]
        self._low, self._high = low, high
        self._start = low[PREFIX_BYTES:]
        self._items: list[tuple[bytes, bytes]] = []
        self._pairs: Iterator[tuple[bytes, bytes]] | None = None
        if cursor is not None and _seek_before(cursor, stop):
            self._pairs = cursor.iterprev(keys=True, values=True)

    def next(self, size: int) -> list[tuple[bytes, bytes]] | None:
        if not self._items:
            self._fill(size)
        if not self._tables:
            items, self._items = self._items, []
            return items or None
        if self._low >= self._high:
            return None
        prefix = self._low[:PREFIX_BYTES]
        bound = prefix + self._items[-1][0] if self._items else self._low
        for table in self._tables:
            keys = table.sorted_keys()
            i = bisect_left(keys, self._high) - size
            if i >= 0 and keys[i] > bound:
                bound = keys[i]
        fresh = overlay(self._tables, bound, self._high)
        plain = bound[PREFIX_BYTES:]
        n = next((i for i, (key, _) in enumerate(self._items) if key < plain), len(self._items))
        items, self._items = self._items[:n], self._items[n:]
        self._high = bound
        return _laid_over(items, fresh, reverse=True)

    def _fill(self, size: int) -> None:
        if self._pairs is None:
            return
        self._items, more = self._take(self._pairs, size)
        if not more:
            self._pairs = None
        if self._items and self._items[-1][0] < self._start:
            n = next(i for i, (key, _) in enumerate(self._items) if key < self._start)
            del self._items[n:]
            self._pairs = None


def _take(pairs: Iterator[tuple[bytes, bytes]], size: int) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The next ``size`` pairs, and whether there may be more."""
    items = list(islice(pairs, size))
    return items, len(items) == size


def _take_bytes(pairs: Iterator[tuple[bytes, bytes]], size: int) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The same, but not many more than CHUNK_BYTES: values of LMDB's overflow pages can be of any size."""
    items: list[tuple[bytes, bytes]] = []
    room = CHUNK_BYTES
    for item in pairs:
        items.append(item)
        room -= len(item[1])
        if len(items) == size or room <= 0:
            return items, True
    return items, False


def _seek_before(cursor: Any, stop: bytes | None) -> bool:
    """Put the cursor on the last key below ``stop``."""
    if stop is not None and cursor.set_range(stop):
        return bool(cursor.prev())
    return bool(cursor.last())


def _laid_over(
    items: list[tuple[bytes, bytes]], fresh: dict[bytes, bytes | None], *, reverse: bool
) -> list[tuple[bytes, bytes]]:
    if not fresh:
        return items
    merged: dict[bytes, bytes | None] = dict(items)
    merged.update((key[PREFIX_BYTES:], value) for key, value in fresh.items())
    return [(key, value) for key in sorted(merged, reverse=reverse) if (value := merged[key]) is not None]


def _after(prefix: bytes) -> bytes:
    """The smallest composite key behind all keys of a keyspace."""
    return (int.from_bytes(prefix, "big") + 1).to_bytes(PREFIX_BYTES, "big")
