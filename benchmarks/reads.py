"""Figures 9 to 11: reading on one node."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import lmdb

from benchmarks.measure import Bench, Outcome, figure, timed, timed_rate
from benchmarks.stores import VALUE, bare_map, keys, store

MILLION = 1_000_000


@figure(9, "get", "get, everything flushed", "py-lmdb, a read transaction for each get", 0.7)
def get(bench: Bench) -> Outcome:
    count = bench.size(MILLION, 2000)
    drawn = keys(bench.chance(6), 1 << 16, count)
    with store(bench, count) as db, bare_map(bench, count) as env:

        def mine() -> float:
            get = db.get
            return timed_rate(lambda i: get(drawn[i & 65535]), bench.seconds(1.5, 0.05))

        def bare() -> float:
            def step(i: int) -> None:
                with env.begin() as txn:
                    txn.get(drawn[i & 65535])

            return timed_rate(step, bench.seconds(1.5, 0.05))

        return bench.alternate(mine, bare)


def consume(pairs: Iterable[Any]) -> None:
    """Go through all of them in C."""
    deque(pairs, maxlen=0)


def full_cursor(env: lmdb.Environment, count: int) -> Callable[[], float]:
    """Pairs per second of a cursor over everything."""

    def sample() -> float:
        def work() -> None:
            with env.begin() as txn:
                consume(txn.cursor())

        return count / timed(work)

    return sample


@figure(10, "scan", "full scan, everything flushed", "py-lmdb, a cursor over all", 0.5)
def scan(bench: Bench) -> Outcome:
    count = bench.size(MILLION, 2000)
    with store(bench, count) as db, bare_map(bench, count) as env:
        return bench.alternate(lambda: count / timed(lambda: consume(db.scan())), full_cursor(env, count))


@figure(11, "scan-fresh", "full scan with 100 k keys not yet flushed", "py-lmdb, a cursor over all", 0.15)
def scan_fresh(bench: Bench) -> Outcome:
    count, fresh = bench.size(MILLION, 2000), bench.size(100_000, 200)
    with (
        store(bench, count, flush_interval_s=3600, memtable_bytes=1 << 30, memtable_bytes_max=4 << 30) as db,
        bare_map(bench, count) as env,
    ):
        chance = bench.chance(7)
        written: set[bytes] = set()

        def mine() -> float:
            db.flush()
            written.clear()
            while len(written) < fresh:
                written.update(keys(chance, fresh - len(written), count))
            ordered = list(written)
            chance.shuffle(ordered)
            for start in range(0, fresh, 100):
                with db.batch() as batch:
                    for k in ordered[start : start + 100]:
                        batch.put(k, VALUE)
            return count / timed(lambda: consume(db.scan()))

        return bench.alternate(mine, full_cursor(env, count))
