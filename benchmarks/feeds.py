"""Figures 51 to 53: reading the changes of a store."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

import msgpack

import kvrep
from benchmarks.measure import Bench, Bound, Outcome, figure, timed
from benchmarks.stores import VALUE, keys, store

START = kvrep.Position(0, 0)
FEED_RATE = 150_000
FEED_SHARE = 0.5


def consume(changes: Any) -> int:
    """Go through all of them in C; returns how many there were."""
    last = deque(enumerate(changes, 1), maxlen=1)
    return last[0][0]


def bare_records(count: int, drawn: list[bytes]) -> bytes:
    """The records that these writes log, without frames: what any reader has to decode."""
    packer = msgpack.Packer(autoreset=True)
    epoch, time_us = 1001, 1_795_232_508_702_155
    return b"".join(
        packer.pack((i, epoch, time_us, 0, ("default", (drawn[i % len(drawn)], VALUE)))) for i in range(count)
    )


def iterate(records: bytes) -> None:
    unpacker = msgpack.Unpacker(max_buffer_size=len(records))
    unpacker.feed(records)
    deque(unpacker, maxlen=0)


def judged(outcome: Outcome) -> Outcome:
    """The goal is a rate, or a share of the reference: whichever is less; of the medians."""
    rate, bare = median(outcome.measured), median(outcome.reference)
    outcome.bounds.append(Bound("changes read", rate, min(FEED_RATE, FEED_SHARE * bare), "/s", "at least"))
    return outcome


@figure(51, "feed", "changes() from the log, records of one put, written in groups", "iterating bare msgpack")
def feed(bench: Bench) -> Outcome:
    count = bench.size(200_000, 2000)
    drawn = keys(bench.chance(31), 1 << 14, count)
    records = bare_records(count, drawn)
    with bench.path("feed") as path, kvrep.open(path / "s", durability="os") as db:
        future = None
        for i in range(count):
            future = db.submit_put(drawn[i % len(drawn)], VALUE)
        assert future is not None
        stop = future.result(60)
        db.flush()

        def read() -> float:
            with db.changes(after=START, stop=stop) as changes:
                return count / timed(lambda: _all(changes, count))

        return judged(bench.alternate(read, lambda: count / timed(lambda: iterate(records))))


def _all(changes: kvrep.Changes, count: int) -> None:
    found = consume(changes)
    assert found == count, f"{found} changes instead of {count}"


@figure(52, "feed-single", "the same, every record written alone", "iterating bare msgpack")
def feed_single(bench: Bench) -> Outcome:
    count = bench.size(100_000, 1000)
    drawn = keys(bench.chance(32), 1 << 14, count)
    records = bare_records(count, drawn)
    with bench.path("feed") as path, kvrep.open(path / "s", durability="os") as db:
        for i in range(count):
            stop = db.put(drawn[i % len(drawn)], VALUE)
        db.flush()

        def read() -> float:
            with db.changes(after=START, stop=stop) as changes:
                return count / timed(lambda: _all(changes, count))

        return judged(bench.alternate(read, lambda: count / timed(lambda: iterate(records))))


@figure(53, "feed-snapshot", "changes(snapshot=True), everything flushed", "a full scan of the same store")
def feed_snapshot(bench: Bench) -> Outcome:
    count = bench.size(1_000_000, 2000)
    with store(bench, count) as db:

        def rows() -> float:
            def work() -> None:
                with db.changes(snapshot=True) as changes:
                    for change in changes:
                        if change.kind == "end":
                            return

            return count / timed(work)

        return bench.alternate(rows, lambda: count / timed(lambda: deque(db.scan(), maxlen=0)))
