"""Whole copies of the state: how one is read out of LMDB, and what is checked in one that was received.

The bytes are those of LMDB's own compacting copy at one read transaction. What a node needs to go on from
there (how much of the log is in it, epochs, configuration, digests) lies inside, in the state record.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvrep.errors import CorruptionError, OpenError, ReplicationError
from kvrep.storage.digest import DIGEST_MODULUS
from kvrep.storage.tree import PAGE_BYTES, STATE_KEY, State, Tree, lmdb_errors

__all__ = ["HEAD_BYTES", "PinnedState", "TreeCopy", "copy_bytes", "free_bytes", "open_received"]

HEAD_BYTES = 2 * PAGE_BYTES
"""The two meta pages, with which every copy begins."""

_PAGE_HEADER_BYTES = 16
_META = struct.Struct("<II8s8s48s48sQQ")
"""Of LMDB's data format 1: magic, version, address, map size, two databases, last page, transaction."""
_META_MAGIC = 0xBEEFC0DE
_META_FORMAT = 1


def copy_bytes(head: bytes) -> int | None:
    """How long the copy is that begins with ``head``; ``None`` when its format does not tell."""
    if len(head) < HEAD_BYTES:
        return None
    magic, version, _, _, _, _, last_page, _ = _META.unpack_from(head, PAGE_BYTES + _PAGE_HEADER_BYTES)
    if (magic, version) != (_META_MAGIC, _META_FORMAT):
        return None
    return (int(last_page) + 1) * PAGE_BYTES


class TreeCopy:
    """One read transaction from which a copy is made. ``close`` it; any thread, one at a time."""

    def __init__(self, tree: Tree) -> None:
        """``ReplicationError`` when there is nothing to copy yet, ``ClosedError`` at the end of the store."""
        self._tree = tree
        self._txn: Any = tree.begin()
        try:
            with lmdb_errors("copying"):
                raw = self._txn.get(STATE_KEY, db=tree.meta)
                if raw is None:
                    raise ReplicationError("nothing has been committed and flushed here yet")
                self.state = State.unpack(raw)
        except BaseException:
            self.close()
            raise

    def write_to(self, fd: int) -> None:
        """Write the copy into ``fd``, which may be a pipe; returns when all of it is written.

        Raises what :func:`lmdb_errors` makes of it when the other end of the pipe is closed.
        """
        with lmdb_errors("copying"):
            self._tree.env.copyfd(fd, compact=True, txn=self._txn)

    def close(self) -> None:
        txn, self._txn = self._txn, None
        if txn is not None:
            self._tree.end(txn)


def open_received(
    directory: Path, lineage: bytes, *, map_bytes: int, keyspaces_max: int, readers_max: int
) -> Tree:
    """Open the copy that was received into ``directory``, if it is one.

    Looks at its size, its state record and its counts; that each page and pair is right is for the digest
    to show. ``CorruptionError`` when it is not a whole copy, ``OpenError`` when it cannot be opened here.
    """
    data = directory / "data.mdb"
    (directory / "lock.mdb").unlink(missing_ok=True)
    with open(data, "rb") as file:
        expected = copy_bytes(file.read(HEAD_BYTES))
    if expected is not None and expected != data.stat().st_size:
        raise CorruptionError(f"the copy has {data.stat().st_size} bytes, its head tells of {expected}")
    try:
        tree = Tree.open(
            directory,
            lineage,
            map_bytes=map_bytes,
            keyspaces_max=keyspaces_max,
            readers_max=readers_max,
            create=False,
        )
    except OpenError as error:
        raise CorruptionError(f"the copy is not a whole LMDB file: {error}") from error
    try:
        _check(tree)
    except BaseException:
        tree.close(1.0)
        raise
    return tree


def _check(tree: Tree) -> None:
    """Whether the databases hold as many pairs as the state record says."""
    txn = tree.begin()
    try:
        with lmdb_errors("checking a copy"):
            if txn.get(STATE_KEY, db=tree.meta) is None:
                raise CorruptionError("the copy has no state record")
            names = {*tree.keyspaces, *(name for name, count in tree.state.counts.items() if count)}
            for name in sorted(names):
                found, stated = tree.count(txn, name), tree.state.counts.get(name, 0)
                if found != stated:
                    raise CorruptionError(f"keyspace {name} of the copy has {found} pairs, not {stated}")
    finally:
        tree.end(txn)


def free_bytes(path: Path) -> int:
    """Room on the disk that holds ``path``."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


class PinnedState:
    """What LMDB holds at one moment, and what its state record says of it: to be compared. ``close`` it."""

    def __init__(self, tree: Tree) -> None:
        """No flush may be under way."""
        self._tree = tree
        self._txn: Any = tree.begin()
        self._names = sorted({*tree.keyspaces, *tree.state.digests})
        self.state = tree.state

    def of(self, tree: Tree) -> bool:
        return self._tree is tree

    def differing(self, breathe: Callable[[], None]) -> dict[str, tuple[int, int]]:
        """How far off the digest and count on record are, for each keyspace where they are.

        Reads everything; ``breathe`` is called every few hundred pairs and may raise to end it.
        """
        state, wrong = self.state, {}
        for name in self._names:
            digest, count = self._tree.digest(name, breathe, self._txn)
            off = (digest - state.digests.get(name, 0), count - state.counts.get(name, 0))
            if off != (0, 0):
                wrong[name] = off
        return wrong

    def correct(self, differing: dict[str, tuple[int, int]], *, received: bool) -> None:
        """Put digests right that are off by so much, in the state that LMDB has now; no flush is under way.

        From now on they tell what is really here, and later marks show the difference, too. The digests of a
        ``received`` copy are the primary's: a copy that equals them is verified.
        """
        state, at = self._tree.state, self.state.applied.offset
        if not differing:
            if received:
                state.verified = max(state.verified, at)
        elif not state.diverged:
            state.diverged = at
        for name, (digest, count) in differing.items():
            for digests in (state.digests, state.mark_digests):
                digests[name] = (digests.get(name, 0) + digest) % DIGEST_MODULUS
            state.counts[name] = state.counts.get(name, 0) + count

    def close(self) -> None:
        txn, self._txn = self._txn, None
        if txn is not None:
            self._tree.end(txn)
