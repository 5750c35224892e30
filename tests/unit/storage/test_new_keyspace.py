"""A keyspace that LMDB did not have when a read began."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvrep


def test_a_snapshot_older_than_a_keyspace_reads_nothing_of_it(store_path: Path) -> None:
    """A point read of an old snapshot finds no key in a keyspace that a later flush made."""
    with kvrep.open(store_path) as db:
        db.put(b"k", b"old")
        with db.snapshot() as view:
            db.put(b"l", b"new")
            db.flush()
            assert view.get(b"k") == b"old"
            assert view.get(b"l") is None


def test_a_point_read_while_a_flush_makes_its_keyspace(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read transaction from before the flush is never used with the database that the flush made."""
    with kvrep.open(store_path) as db:
        db.put(b"k", b"v")
        db.flush()
        fresh = db.keyspace("fresh")
        tree = db._node.engine.tree
        assert db.get(b"k") == b"v"  # leaves an idle read transaction
        refresh, seen = tree.refresh, []

        def read_first() -> None:
            seen.append((fresh.get(b"missing"), fresh.get(b"k"), db.get(b"k")))
            refresh()

        monkeypatch.setattr(tree, "refresh", read_first)
        fresh.put(b"k", b"w")
        db.flush()
        monkeypatch.undo()
        assert seen[0] == (None, b"w", b"v")
        assert fresh.get(b"k") == b"w"
