"""Scans, snapshots, digests, retention and rolling on a real store."""

from __future__ import annotations

import os
import random
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import kvrep

OPTIONS: dict[str, Any] = {"log_file_bytes": 64 << 10, "map_bytes": 256 << 20, "flush_interval_s": 3600.0}


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        Event().wait(0.01)
    raise AssertionError("the condition did not come true in time")


@pytest.mark.slow
def test_long_scans(memory_store: Path) -> None:
    """Over 100 k keys, flushed, unflushed and deleted mixed, scans in both directions equal a sorted dict."""
    rng = random.Random(5)
    model: dict[bytes, bytes] = {}
    options = {**OPTIONS, "log_file_bytes": 16 << 20, "durability": "os"}
    with kvrep.open(memory_store, **options) as db:
        for part in range(3):
            for _ in range(30):
                with db.batch() as batch:
                    for _ in range(1500):
                        key = b"%06d" % rng.randrange(400_000)
                        if rng.random() < 0.2:
                            batch.delete(key)
                            model.pop(key, None)
                        else:
                            value = b"%d" % rng.randrange(10**6)
                            batch.put(key, value)
                            model[key] = value
            if part < 2:
                db.flush()
        items = sorted(model.items())
        assert len(items) > 90_000
        assert list(db.scan()) == items
        assert list(db.scan(reverse=True)) == items[::-1]
        assert len(db) == len(items)
        keys = [key for key, _ in items]
        for _ in range(60):
            start, stop = sorted(b"%06d" % rng.randrange(400_000) for _ in range(2))
            limit, reverse = rng.choice([None, 1, 10, 1000]), rng.random() < 0.5
            found = items[bisect_left(keys, start) : bisect_left(keys, stop)]
            wanted = found[::-1] if reverse else found
            got = list(db.scan(start=start, stop=stop, reverse=reverse, limit=limit))
            assert got == wanted[:limit]


def test_snapshots_expire(memory_store: Path) -> None:
    """Past snapshot_age_max_s snapshots and scans raise SnapshotExpired, even while the flush is busy."""
    with kvrep.open(memory_store, snapshot_age_max_s=0.05, **OPTIONS) as db:
        db.update({b"%03d" % i: b"v" for i in range(500)})
        view, scan = db.snapshot(), db.scan()
        assert view[b"000"] == b"v"
        next(scan)
        with db._node.engine.flusher.hold:  # the thread that looks after snapshots cannot come
            until(lambda: db._node.engine.view.clock() > view._pinned.expires_s + 0.05)
            with pytest.raises(kvrep.SnapshotExpired):
                view[b"000"]
            with pytest.raises(kvrep.SnapshotExpired):
                list(scan)
        view.close()
        kept = db.snapshot()
        until(lambda: db.status().snapshot_age_s == 0.0)
        with pytest.raises(kvrep.SnapshotExpired) as caught:
            kept.get(b"000")
        assert caught.value.position == kept.position


def test_dropped_scans_and_snapshots_keep_nothing(memory_store: Path) -> None:
    """A scan that is never begun, or left in the middle, pins nothing: a thousand of them do no harm."""
    with kvrep.open(memory_store, readers_max=40, **OPTIONS) as db:
        db.update({b"%03d" % i: b"v" for i in range(100)})
        db.flush()
        for i in range(1000):
            db.scan()
            db.scan(limit=0)
            list(db.scan(limit=3))
            next(iter(db))
            if i % 2:
                next(db.scan(reverse=True))
        until(lambda: db.status().snapshot_age_s == 0.0)
        assert len(db) == 100


def test_flush_waits_for_what_a_scan_joined(memory_store: Path) -> None:
    """flush() has LMDB hold all that was committed, also when scans join tables at the same time."""
    stop = Event()
    import threading

    with kvrep.open(memory_store, **OPTIONS) as db:

        def disturb() -> None:
            n = 0
            while not stop.is_set():
                n += 1
                db.put(b"noise-%d" % (n % 100), b"%d" % n)
                list(db.scan(limit=1))

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for i in range(150):
                position = db.put(b"k", b"%d" % i)
                db.flush()
                assert db.status().applied_offset >= position.offset
                view = db._node.engine.view
                assert view.frozen_bytes >= 0
        finally:
            stop.set()
            thread.join()


def test_digests_and_marks(memory_store: Path) -> None:
    """The digest in LMDB equals a recomputed one after any work and reopening, and marks verify it."""
    rng = random.Random(7)
    verified = 0
    for _ in range(5):
        with kvrep.open(memory_store, **OPTIONS) as db:
            spaces = [db, db.keyspace("users"), db.keyspace("other")]
            for _ in range(3):
                for _ in range(200):
                    space, key = rng.choice(spaces), b"%02d" % rng.randrange(80)
                    if rng.random() < 0.3:
                        space.delete(key)
                    else:
                        space.put(key, b"%d" % rng.randrange(1000))
                db.flush()
            tree = db._node.engine.tree
            for name in tree.keyspaces:
                assert tree.digest(name) == (tree.state.digests[name], tree.state.counts[name])
            status = db.status()
            assert status.diverged_at == 0
            assert status.verified_through > verified
            verified = status.verified_through


def test_retention_trims_and_never_too_much(memory_store: Path) -> None:
    """Files that nobody needs are unlinked, oldest first; unflushed records are never trimmed."""
    with kvrep.open(memory_store, retention_bytes=128 << 10, **OPTIONS) as db:
        directory = memory_store / "gen-000001" / "log"

        def files() -> list[str]:
            return sorted(p.name for p in directory.glob("0*.log"))

        for i in range(40):
            db.put(b"%02d" % i, b"v" * 30_000)
        before = files()
        assert len(before) >= 20
        assert before == [f"{n:016d}.log" for n in range(1, len(before) + 1)]
        db.flush()
        until(lambda: len(files()) < 6)
        assert files() == before[-len(files()) :]
        status = db.status()
        assert 1 < status.first_offset <= status.applied_offset + 1
        with pytest.raises(kvrep.LogTrimmed):
            db._node.engine.committer.log.read(1, 100)
        first = db.status().first_offset
        for i in range(20):
            db.put(b"%02d" % i, b"w" * 30_000)
        assert db.status().first_offset == first
    with kvrep.open(memory_store, **OPTIONS) as db:
        assert {k: v[:1] for k, v in db.scan()} == {b"%02d" % i: b"w" if i < 20 else b"v" for i in range(40)}


def test_rolling_with_records_larger_than_a_file(memory_store: Path) -> None:
    """Records around and above the size of a log file are written, read back and recovered."""
    sizes = [10, 60_000, 64 << 10, 65_600, 300_000, 5, (64 << 10) - 200, 1 << 20, 1]
    with kvrep.open(memory_store, **OPTIONS) as db:
        for turn in range(3):
            for i, size in enumerate(sizes):
                db.put(b"%d-%d" % (turn, i), bytes([turn + 65]) * size)
        log = db._node.engine.committer.log
        offset, seen = log.first, 0
        while (run := log.read(offset, 100_000)) is not None:
            assert run.first == offset
            offset, seen = run.last + 1, seen + run.last - run.first + 1
        assert seen == log.tail.offset
        assert db._node.engine.flusher.stop(10)  # the records stay in the log alone
    with kvrep.open(memory_store, **OPTIONS) as db:
        for turn in range(3):
            for i, size in enumerate(sizes):
                assert db[b"%d-%d" % (turn, i)] == bytes([turn + 65]) * size
        assert db.status().rescued == ()


def test_a_cut_keeps_what_is_below(memory_store: Path) -> None:
    """Engine.cut saves and drops the records above a point, in memory and on disk, for good."""
    with kvrep.open(memory_store, **OPTIONS) as db:
        for i in range(30):
            last = db.put(b"%02d" % i, b"v" * 9_000)
        engine = db._node.engine
        kept = last.offset - 13
        path = engine.cut(kept, reason="test")
        assert path is not None
        from kvrep.storage.rescue import load_rescue

        rescued = load_rescue(path)
        assert (rescued.first, rescued.last) == (kept + 1, last.offset)
        assert sorted(db) == [b"%02d" % i for i in range(17)]
        again = db.put(b"new", b"1")
        assert again.offset == kept + 1
    with kvrep.open(memory_store, **OPTIONS) as db:
        assert sorted(db) == [*(b"%02d" % i for i in range(17)), b"new"]


def test_no_file_descriptor_or_thread_is_left_by_many_openings(memory_store: Path) -> None:
    """A hundred openings and closings leave as many descriptors as before."""

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    kvrep.open(memory_store, **OPTIONS).close()
    before = count()
    for i in range(100):
        with kvrep.open(memory_store, **OPTIONS) as db:
            db.put(b"k", b"%d" % i)
    assert count() <= before + 1
