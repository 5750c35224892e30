"""The limits at the door: refused before anything is logged, with a type and a text that say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvrep


@pytest.fixture
def db(store_path: Path) -> Any:
    with kvrep.open(store_path, value_bytes_max=1000, record_bytes_max=4000, keyspaces_max=4) as db:
        yield db


def unchanged(db: kvrep.Store, before: int) -> None:
    assert db.status().last_offset == before


@pytest.mark.parametrize("key", ["text", 5, None, 1.5, [b"k"], object()])
def test_wrong_key_types_name_the_type(db: kvrep.Store, key: Any) -> None:
    """A key that is not bytes is a TypeError that names its type, from every method that takes one."""
    db.put(b"k", b"v")
    before = db.status().last_offset
    calls = [
        lambda: db.get(key), lambda: db[key], lambda: key in db, lambda: db.put(key, b"v"),
        lambda: db.delete(key), lambda: db.__setitem__(key, b"v"), lambda: db.__delitem__(key),
        lambda: db.submit_put(key, b"v"), lambda: db.compare_and_set(key, expected=None, value=b"v"),
        lambda: db.put_if_absent(key, b"v"), lambda: db.setdefault(key, b"v"), lambda: db.pop(key),
        lambda: db.update([(key, b"v")]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(TypeError, match=type(key).__name__):
            call()
    with db.snapshot() as view, pytest.raises(TypeError, match=type(key).__name__):
        view.get(key)
    unchanged(db, before)


@pytest.mark.parametrize("value", ["text", 5, None, [b"v"]])
def test_wrong_value_types_name_the_type(db: kvrep.Store, value: Any) -> None:
    """A value that is not bytes is a TypeError that names its type."""
    db.put(b"there", b"1")
    before = db.status().last_offset
    for call in (
        lambda: db.put(b"k", value), lambda: db.__setitem__(b"k", value), lambda: db.submit_put(b"k", value),
        lambda: db.update({b"k": value}), lambda: db.setdefault(b"k", value),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=type(value).__name__):
            call()
    unchanged(db, before)


@pytest.mark.parametrize("what", ["prefix", "start", "stop"])
def test_wrong_scan_bounds_are_type_errors(db: kvrep.Store, what: str) -> None:
    """Bounds are bytes; a limit is a number that is not negative."""
    with pytest.raises(TypeError, match=what):
        db.scan(**{what: "text"})  # type: ignore[arg-type]
    for limit in (-1, 1.5, "3", True):
        with pytest.raises(ValueError, match="limit"):
            db.scan(limit=limit)  # type: ignore[arg-type]


def test_key_lengths(db: kvrep.Store) -> None:
    """One to 511 bytes."""
    db.put(b"k", b"v")
    before = db.status().last_offset
    for key, error in (
        (b"", kvrep.InvalidKey),
        (b"k" * 512, kvrep.KeyTooLong),
        (b"k" * 9999, kvrep.KeyTooLong),
    ):
        for call in (
            lambda k=key: db.put(k, b"v"), lambda k=key: db.delete(k), lambda k=key: db.submit_put(k, b"v"),
            lambda k=key: db.pop(k), lambda k=key: db.update({k: b"v"}),
        ):  # fmt: skip
            with pytest.raises(error) as caught:
                call()
            assert isinstance(caught.value, ValueError)
            assert isinstance(caught.value, kvrep.RefusedError)
        assert db.get(key, b"none") == b"none"
        assert key not in db
    unchanged(db, before)
    for key in (b"k" * 511, b"\x00", b"\xff" * 511):
        db[key] = b"v"
        db.flush()
        assert db[key] == b"v"
        assert key in list(db)
    for key in (b"", b"k" * 512):  # now that LMDB is asked, too
        assert db.get(key) is None
        assert key not in db


def test_value_and_transaction_sizes(db: kvrep.Store) -> None:
    """Values up to value_bytes_max, transactions and batches up to record_bytes_max."""
    db.put(b"k", b"v" * 1000)
    before = db.status().last_offset
    with pytest.raises(kvrep.ValueTooLarge):
        db.put(b"k", b"v" * 1001)
    with pytest.raises(kvrep.ValueTooLarge), db.batch() as batch:
        for i in range(5):
            batch.put(b"k%d" % i, b"v" * 1000)
    with pytest.raises(kvrep.ValueTooLarge), db.transaction() as txn:
        for i in range(5):
            txn.put(b"k%d" % i, b"v" * 1000)
    unchanged(db, before)
    with db.batch() as batch:
        for i in range(3):
            batch.put(b"k%d" % i, b"v" * 1000)
    assert len(db) == 4


@pytest.mark.parametrize(
    "name", ["", "Upper", "with space", "a/b", "x" * 65, "ümlaut", "a\0", "kvrep:meta", "a\n"]
)
def test_keyspace_names_that_are_refused(db: kvrep.Store, name: str) -> None:
    """1 to 64 of a-z 0-9 _ -."""
    with pytest.raises(kvrep.InvalidKeyspace):
        db.keyspace(name)


def test_keyspace_names_that_are_not_text(db: kvrep.Store) -> None:
    """A name that is not a str is a TypeError."""
    for name in (b"bytes", None, 7):
        with pytest.raises(TypeError, match=type(name).__name__):
            db.keyspace(name)  # type: ignore[call-overload]


def test_codecs_that_are_none(db: kvrep.Store) -> None:
    """What is no codec is a TypeError that says where codecs are, also where only its name was given."""
    for codec in ("json", None, kvrep.Codec):
        with pytest.raises(TypeError, match=r"one of kvrep\.codecs"):
            db.keyspace("docs", codec=codec)  # type: ignore[call-overload]


def test_keyspace_count(db: kvrep.Store, store_path: Path) -> None:
    """No more than keyspaces_max; they are all kept, flushed and found again."""
    names = ["default", "a-1", "b_2", "x" * 64]
    for name in names[1:]:
        db.keyspace(name)[b"k"] = name.encode()
    with pytest.raises(kvrep.InvalidKeyspace):
        db.keyspace("one-more")
    db.flush()
    assert db.keyspaces() == sorted(names)
    db.close()
    with kvrep.open(store_path, keyspaces_max=4) as again:
        assert again.keyspaces() == sorted(names)
        assert all(again.keyspace(n)[b"k"] == n.encode() for n in names[1:])


def test_keyspace_exists_once_something_is_put(db: kvrep.Store) -> None:
    """Asking for a keyspace does not make one."""
    space = db.keyspace("maybe")
    assert list(space) == []
    assert db.keyspaces() == ["default"]
    space[b"k"] = b"v"
    assert db.keyspaces() == ["default", "maybe"]


@pytest.mark.parametrize("flushed", [True, False])
def test_fewer_keyspaces_than_there_are(store_path: Path, flushed: bool) -> None:
    """A keyspaces_max below what the store holds stops the start with a word on which option."""
    with kvrep.open(store_path, flush_interval_s=3600.0) as db:
        for i in range(8):
            db.keyspace(f"space-{i}")[b"k"] = b"v"
        if not flushed:
            assert db._node.engine.flusher.stop(10.0)
    with pytest.raises(kvrep.ConfigurationMismatch) as caught:
        kvrep.open(store_path, keyspaces_max=4)
    assert caught.value.option == "keyspaces_max"
    with kvrep.open(store_path) as db:
        assert len(db.keyspaces()) == 9


@pytest.mark.parametrize(
    "options",
    [
        {"no_such_option": 1}, {"durability": "maybe"}, {"durability": None}, {"keyspaces_max": 0},
        {"keyspaces_max": 1025}, {"keyspaces_max": 2.5}, {"value_bytes_max": 0}, {"value_bytes_max": "1"},
        {"log_file_bytes": 1}, {"log_file_bytes": 1e6}, {"log_file_bytes": True}, {"map_bytes": 1000},
        {"memtable_bytes": -1}, {"flush_interval_s": 0}, {"flush_interval_s": float("nan")},
        {"flush_interval_s": None}, {"acks": -1}, {"acks": "most"}, {"acks": True}, {"ack_timeout_s": 0},
        {"ack_timeout_s": float("nan")}, {"ack_timeout_s": float("inf")}, {"name": ""}, {"name": "a b"},
        {"name": 5}, {"create": "no"}, {"record_bytes_max": 2 << 30}, {"value_bytes_max": 1 << 29},
        {"retention_bytes": 20 << 30}, {"heartbeat_timeout_s": 0.5}, {"compression": "lz4"},
        {"listen": 7400}, {"token": b"x"},
        {"snapshot_age_max_s": "600"}, {"readers_max": 0}, {"voter": 1},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_not_understood_stop_the_start(store_path: Path, options: Any) -> None:
    """A setting outside its range, or unknown, is refused by name before anything is touched."""
    with pytest.raises(kvrep.ConfigurationMismatch) as caught:
        kvrep.open(store_path, **options)
    assert caught.value.option in options
    assert not store_path.exists()


def test_options_that_contradict_the_store(store_path: Path) -> None:
    """What the log's configuration says cannot be changed by opening differently; the name neither."""
    with kvrep.open(store_path, name="a", ack_timeout_s=2.0) as db:
        db.put(b"k", b"v")
    for options in ({"ack_timeout_s": 3.0}, {"acks": 1}, {"name": "b"}):
        with pytest.raises(kvrep.ConfigurationMismatch) as caught:
            kvrep.open(store_path, **options)
        assert caught.value.option in options
    with kvrep.open(store_path, name="a", ack_timeout_s=2.0, acks=0) as db:
        assert db[b"k"] == b"v"


def test_no_creation_without_leave(store_path: Path, tmp_path: Path) -> None:
    """create=False refuses a missing store, and a directory of strangers is never made one."""
    with pytest.raises(kvrep.NotAStore):
        kvrep.open(store_path, create=False)
    assert not store_path.exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(kvrep.NotAStore):
        kvrep.open(tmp_path)
    with pytest.raises(kvrep.NotAStore):
        kvrep.open(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_uncommitted_bytes_are_bounded(store_path: Path) -> None:
    """Pipelined writes beyond uncommitted_bytes_max are refused before they are logged; the rest is kept."""
    with kvrep.open(store_path, uncommitted_bytes_max=64 << 10) as db:
        db.put(b"k", b"v")
        futures = []
        with db._node.engine.committer.lead:  # nobody can write the log now
            with pytest.raises(kvrep.Overloaded):
                for i in range(100_000):
                    futures.append(db.submit_put(b"%d" % i, b""))
        assert len(futures) < 2000
        assert all(f.result(10).offset for f in futures)
        assert len(db) == len(futures) + 1
        db.put(b"k", b"w")
