"""Committed writes that are not yet in LMDB, and how they are laid over it.

A table is a plain dict under *composite* keys: two bytes that stand for the keyspace in this process, then
the user's key. One dict for all keyspaces makes publishing a whole group of records one ``dict.update``,
which no reader can see half of; and one sort puts the keyspaces behind each other, as the flush wants them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvrep.model.position import Position
from kvrep.model.sessions import Origin

__all__ = [
    "ENTRY_OVERHEAD_BYTES",
    "TABLE_BYTES_MAX",
    "TABLE_ENTRIES_MAX",
    "Entries",
    "Table",
    "merged_slices",
    "overlay",
]

ENTRY_OVERHEAD_BYTES = 160
"""What an entry costs beside its bytes: two bytes objects and a dict slot (measured)."""

TABLE_ENTRIES_MAX = 16_384
"""A table freezes at this size, so that sorting it holds the GIL for 3 to 5 ms at most."""

TABLE_BYTES_MAX = 8 << 20

Entries = dict[bytes, bytes | None]


class Table:
    """One memtable. While it is active only the publisher writes to it; frozen, it never changes again."""

    __slots__ = ("_sorted", "born_s", "entries", "last", "mark", "origins", "payload_bytes", "writes")

    def __init__(self, born_s: float) -> None:
        self.entries: Entries = {}
        self.payload_bytes = 0
        self.last = 0
        """The last offset in it."""
        self.born_s = born_s
        self.writes = 0
        """Write records in it."""
        self.origins: list[tuple[Origin, Position]] = []
        """Of the forwarded ones: by whom, and where they are."""
        self.mark: list[Any] | None = None
        """The payload of the digest mark that it ends at, if any: every node cuts a flush there."""
        self._sorted: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def full(self) -> bool:
        return len(self.entries) >= TABLE_ENTRIES_MAX or self.payload_bytes >= TABLE_BYTES_MAX

    @property
    def memory_bytes(self) -> int:
        return self.payload_bytes + ENTRY_OVERHEAD_BYTES * len(self.entries)

    def sorted_keys(self) -> list[bytes]:
        """The keys in order, computed once. Only of a frozen table."""
        if self._sorted is None:
            self._sorted = sorted(self.entries)
        return self._sorted

    def slice(self, start: bytes, stop: bytes) -> Sequence[bytes]:
        """The sorted keys in ``[start, stop)``."""
        keys = self.sorted_keys()
        return keys[bisect_left(keys, start) : bisect_left(keys, stop)]

    @classmethod
    def joined(cls, older: Table, newer: Table) -> Table:
        """Two neighbours as one frozen table; the newer one's entries win."""
        table = cls(older.born_s)
        table.entries = {**older.entries, **newer.entries}
        table.payload_bytes = older.payload_bytes + newer.payload_bytes
        table.last = newer.last
        table.writes = older.writes + newer.writes
        table.origins = older.origins + newer.origins
        table.mark = newer.mark
        return table


def overlay(tables: Sequence[Table], start: bytes, stop: bytes) -> Entries:
    """What ``tables`` (newest first) say about the keys in ``[start, stop)``: the newest word on each."""
    entries: Entries = {}
    for table in reversed(tables):
        keys = table.slice(start, stop)
        entries.update(zip(keys, map(table.entries.__getitem__, keys), strict=True))
    return entries


def merged_slices(tables: Sequence[Table], size: int) -> Iterator[list[tuple[bytes, bytes | None]]]:
    """All entries of ``tables`` (newest first) in key order, newest word only, about ``size`` at a time.

    Splits the key range at every ``size``-th key of the largest table, so that each step is short.
    """
    if not tables:
        return
    keys = [t.sorted_keys() for t in tables]
    largest = max(keys, key=len)
    step = max(1, size // len(tables))
    cuts: list[bytes] = largest[step::step]
    places = [0] * len(tables)
    for cut in [*cuts, None]:
        piece: Entries = {}
        run: list[bytes] = []
        runs = 0
        for i in range(len(tables) - 1, -1, -1):
            start = places[i]
            end = len(keys[i]) if cut is None else bisect_left(keys[i], cut, start)
            if end > start:
                places[i] = end
                run = keys[i][start:end]
                piece.update(zip(run, map(tables[i].entries.__getitem__, run), strict=True))
                runs += 1
        order = run if runs == 1 else sorted(piece)  # runs are in order already: this merges them
        yield from _parts(list(zip(order, map(piece.__getitem__, order), strict=True)), 4 * size)


def _parts(items: list[tuple[bytes, bytes | None]], size: int) -> Iterable[list[tuple[bytes, bytes | None]]]:
    return (items[i : i + size] for i in range(0, len(items), size)) if len(items) > size else [items]
