"""The check that every store gets after a test: silent about healthy ones, and not about the others."""

from __future__ import annotations

from pathlib import Path

import kvrep
from kvrep.testing.storecheck import check_store, content, log_records


def filled(path: Path) -> kvrep.Store:
    store = kvrep.open(path)
    for i in range(20):
        store.put(b"k%d" % i, b"v%d" % i)
    store.delete(b"k3")
    users = store.keyspace("users")
    with store.batch() as batch:
        batch.put(b"k4", b"new")
        batch.put(b"u", b"1", keyspace=users)
    return store


def test_a_healthy_store_passes(store_path: Path) -> None:
    """Before and after a flush, after a reopen, and when it is empty."""
    with kvrep.open(store_path) as store:
        assert check_store(store) == []
    with filled(store_path) as store:
        assert check_store(store) == []
        assert content(store)["users", b"u"] == b"1"
        assert len(content(store)) == 20
    with kvrep.open(store_path) as store:
        store.put(b"more", b"1")
        assert check_store(store) == []
        assert sum(len(r.ops()) for r in log_records(store)) == 24


def test_lmdb_behind_the_digests_back_is_found(store_path: Path) -> None:
    """A value changed in LMDB alone contradicts the digest and the log."""
    with filled(store_path) as store:
        store.flush()
        tree = store._node.engine.tree
        with tree.env.begin(write=True) as txn:
            txn.put(b"k5", b"rotten", db=tree.handle("default"))
        tree.refresh()

        text = "\n".join(map(str, check_store(store)))

    assert "the log says b'v5', reads say b'rotten'" in text
    assert "does not have the digests" in text


def test_a_key_from_nowhere_is_found(store_path: Path) -> None:
    """A key that no record explains is reported."""
    with filled(store_path) as store:
        store.flush()
        tree = store._node.engine.tree
        with tree.env.begin(write=True) as txn:
            txn.put(b"stranger", b"1", db=tree.handle("default"))
        tree.refresh()

        text = "\n".join(map(str, check_store(store)))

    assert "1 keys are not in the log" in text


def test_a_check_that_cannot_run_has_failed(store_path: Path) -> None:
    """On a closed store the check reports that it could not run."""
    store = filled(store_path)
    store.close()

    assert "the check could not run: ClosedError" in str(check_store(store)[0])


def test_a_store_with_a_named_feed_passes(store_path: Path) -> None:
    """What kvrep keeps in a keyspace of its own is in the log and the digests, too, and no damage."""
    with filled(store_path) as store, store.feed("reader", snapshot=True) as feed:
        feed.poll()
        feed.ack()
        assert check_store(store) == []
