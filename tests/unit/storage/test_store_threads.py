"""Many threads on one store: what each of them may rely on, and close() in the middle of it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvrep

OPTIONS: dict[str, Any] = {
    "log_file_bytes": 256 << 10,
    "map_bytes": 256 << 20,
    "memtable_bytes": 128 << 10,
    "flush_interval_s": 0.05,
    "retention_bytes": 0,
    "retention_age_s": 0,
}


class Crew:
    """Threads that run until told to stop; the first error of any of them ends them all."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def start(self, job: Callable[..., None], *args: Any) -> None:
        def run() -> None:
            try:
                job(*args)
            except BaseException as error:
                self.errors.append(error)
                self.stop.set()

        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()

    def join(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]


class Work:
    """16 writers, readers, scanners, flushes and snapshots over one store, and what they check."""

    def __init__(self, db: kvrep.Store, crew: Crew, ending: type[BaseException] = AssertionError) -> None:
        self.db, self.crew, self.ending = db, crew, ending
        self.acked: dict[bytes, bytes] = {}
        self.rounds: dict[str, int] = {}

    def start(self) -> None:
        for i in range(16):
            self.crew.start(self.loop, f"writer {i}", self.write, i)
        for i in range(3):
            self.crew.start(self.loop, f"reader {i}", self.read_monotonic, {})
        self.crew.start(self.loop, "batches", self.batch)
        self.crew.start(self.loop, "views", self.view)
        self.crew.start(self.loop, "scans", self.scan)
        self.crew.start(self.loop, "flushes", self.flush)

    def loop(self, name: str, step: Callable[..., None], *args: Any) -> None:
        n = 0
        try:
            while not self.crew.stop.is_set():
                n += 1
                step(n, *args)
                self.rounds[name] = n
        except self.ending:
            pass

    def write(self, n: int, i: int) -> None:
        key, value = b"own-%d-%d" % (i, n % 50), b"%08d" % n
        if n % 5 == 4:
            self.db.submit_put(key, value).result(20)
        else:
            self.db.put(key, value, timeout_s=20)
        self.acked[key] = value
        assert self.db[key] == value
        self.db.put(b"clock-%d" % i, value, timeout_s=20)
        self.acked[b"clock-%d" % i] = value

    def read_monotonic(self, n: int, seen: dict[bytes, bytes]) -> None:
        key = b"clock-%d" % (n % 16)
        value = self.db.get(key, b"")
        assert value >= seen.get(key, b"")
        seen[key] = value

    def batch(self, n: int) -> None:
        with self.db.batch(timeout_s=20) as batch:
            for part in range(5):
                batch.put(b"batch-%d" % part, b"%08d" % n)
        for part in range(5):
            self.acked[b"batch-%d" % part] = b"%08d" % n

    def view(self, n: int) -> None:
        with self.db.snapshot() as view:
            one = [view.get(b"batch-%d" % part) for part in range(5)]
            two = [value for _, value in view.scan(prefix=b"batch-", reverse=bool(n % 2))]
            assert len(set(one)) == 1
            assert set(two) <= set(one)
            assert len(view) == sum(1 for _ in view.scan())

    def scan(self, n: int) -> None:
        keys = [key for key, _ in self.db.scan(reverse=bool(n % 2))]
        assert keys == sorted(set(keys), reverse=bool(n % 2))
        values = {value for _, value in self.db.scan(prefix=b"batch-")}
        assert len(values) <= 1

    def flush(self, n: int) -> None:
        before = self.db.status().committed_offset
        self.db.flush(20.0)
        assert self.db.status().applied_offset >= before
        self.crew.stop.wait(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["sync", "os"])
def test_sixteen_writers_and_everybody_else(memory_store: Path, durability: Any) -> None:
    """Own writes are read, reads never go back, batches are seen whole, and all of it is there afterwards."""
    crew = Crew()
    with kvrep.open(memory_store, durability=durability, **OPTIONS) as db:
        work = Work(db, crew)
        work.start()
        crew.stop.wait(3.0)
        crew.join()
        assert len(work.rounds) == 23
        assert dict(db.scan()) == work.acked
        tree = db._node.engine.tree
        db.flush()
        assert tree.digest("default") == (tree.state.digests["default"], tree.state.counts["default"])
        view = db._node.engine.view
        assert view.frozen_bytes == sum(t.memory_bytes for t in view.tables[1:]), "memory is miscounted"
        committer = db._node.engine.committer
        assert committer.pending_bytes == committer._queued_bytes == 0
        assert not committer.pending
    with kvrep.open(memory_store, **OPTIONS) as db:
        assert dict(db.scan()) == work.acked


@pytest.mark.slow
def test_close_in_the_middle(memory_path: Path) -> None:
    """close() while all are at work keeps to its deadline, ends every wait, and loses nothing acknowledged."""
    for turn in range(4):
        path = memory_path / f"store-{turn}"
        crew = Crew()
        db = kvrep.open(path, **OPTIONS)
        work = Work(db, crew, ending=kvrep.Error)
        work.start()
        crew.stop.wait(random.Random(turn).uniform(0.2, 0.8))
        began = time.monotonic()
        closers = Crew()
        for _ in range(3):
            closers.start(db.close, 10.0)
        closers.join()
        assert time.monotonic() - began < 11.0
        crew.join()
        assert db.closed
        db.close()
        for attempt in (lambda: db.get(b"k"), lambda: db.put(b"k", b"v"), db.snapshot, lambda: list(db)):
            with pytest.raises(kvrep.ClosedError):
                attempt()
        with kvrep.open(path, **OPTIONS) as again:
            found = dict(again.scan())
            for key, value in work.acked.items():  # a later one may be there without its ack
                assert found[key] >= value, key
            assert len({found.get(b"batch-%d" % part) for part in range(5)}) == 1


def test_transactions_count_exactly(memory_store: Path) -> None:
    """Increments from eight threads add up, beside writers that do not care for the place."""
    crew, each = Crew(), 150
    with kvrep.open(memory_store, **OPTIONS) as db:

        def count() -> None:
            for _ in range(each):
                with db.transaction(timeout_s=30) as txn:
                    txn[b"n"] = b"%d" % (int(txn.get(b"n", b"0")) + 1)

        def swap() -> None:
            done = 0
            while done < each:
                now = db.get(b"cas")
                new = b"%d" % (int(now or b"0") + 1)
                done += db.compare_and_set(b"cas", expected=now, value=new, timeout_s=30) is not None

        def noise(i: int) -> None:
            for n in range(each):
                db.put(b"noise-%d" % i, b"%d" % n, timeout_s=30)

        for i in range(8):
            crew.start(count)
            crew.start(noise, i)
        for _ in range(2):
            crew.start(swap)
        for thread in crew.threads:
            thread.join(60)
        crew.join()
        assert db[b"n"] == b"%d" % (8 * each)
        assert db[b"cas"] == b"%d" % (2 * each)
    with kvrep.open(memory_store, **OPTIONS) as db:
        assert db[b"n"] == b"%d" % (8 * each)


def test_put_if_absent_has_one_winner(memory_store: Path) -> None:
    """Of many threads that put the same missing key, one wins, each time."""
    crew = Crew()
    wins: list[bytes] = []
    with kvrep.open(memory_store, **OPTIONS) as db:

        def race(i: int) -> None:
            for n in range(40):
                if db.put_if_absent(b"%d" % n, b"%d" % i, timeout_s=30) is not None:
                    wins.append(b"%d" % n)

        for i in range(6):
            crew.start(race, i)
        for thread in crew.threads:
            thread.join(60)
        crew.join()
        assert sorted(wins) == sorted(b"%d" % n for n in range(40))


def test_callbacks_come_exactly_once(memory_store: Path) -> None:
    """Each pipelined write's callback is called once, whether added before or after it is done."""
    calls: list[int] = []
    with kvrep.open(memory_store, **OPTIONS) as db:
        futures = []
        for i in range(2000):
            future = db.submit_put(b"%d" % i, b"")
            future.add_done_callback(lambda _, i=i: calls.append(i))
            futures.append(future)
        for future in futures:
            future.result(20)
        futures[0].add_done_callback(lambda _: calls.append(-1))
        deadline = time.monotonic() + 10
        while len(calls) < 2001 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert sorted(calls) == list(range(-1, 2000))


def test_a_transaction_dropped_or_too_old_gives_the_place_back(memory_store: Path) -> None:
    """Past transaction_age_max_s the place is taken from a transaction; its commit says so."""
    with kvrep.open(memory_store, transaction_age_max_s=0.2, **OPTIONS) as db:
        db.put(b"k", b"1")
        txn = db.transaction()
        assert txn.get(b"k") == b"1"
        txn.put(b"k", b"2")
        db.put(b"k", b"3", timeout_s=10)
        with pytest.raises(kvrep.TransactionExpired):
            txn.__exit__(None, None, None)
        assert db[b"k"] == b"3"


def test_a_write_inside_ones_own_transaction_ends(memory_store: Path) -> None:
    """A put behind the caller's own transaction is refused at its deadline, not a deadlock."""
    with kvrep.open(memory_store, **OPTIONS) as db:
        db.put(b"k", b"1")
        with db.transaction() as txn:
            txn.get(b"k")
            with pytest.raises(kvrep.Overloaded):
                db.put(b"k", b"2", timeout_s=0.2)
            with pytest.raises(kvrep.TransactionExpired), db.transaction(timeout_s=0.2) as inner:
                inner.get(b"k")
            txn.put(b"k", b"3")
        assert db[b"k"] == b"3"
