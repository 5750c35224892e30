"""Figures 1 to 8, 21 and 22: writing on one node."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import lmdb

import kvrep
from benchmarks.measure import Bench, Bound, Outcome, figure, percentile, timed, timed_rate
from benchmarks.stores import VALUE, bare_map, keys, store

MILLION = 1_000_000
BATCH = 100
SAMPLE_S = 6.0
FLUSH_INTERVAL_S = 3.0
"""Not the default of 30 s, so that every sample of kvrep holds a flush: of as many writes, ten times as often."""
REFERENCE_S = 3.0


def _population(bench: Bench) -> int:
    return bench.size(MILLION, 2000)


def durable_puts(bench: Bench, env: lmdb.Environment, population: int) -> Callable[[], float]:
    """The reference of most figures: py-lmdb, one put in each ``sync=True`` transaction."""
    chance = bench.chance(2)

    def sample() -> float:
        drawn = keys(chance, 1 << 14, population)

        def step(i: int) -> None:
            with env.begin(write=True) as txn:
                txn.put(drawn[i & 16383], VALUE)

        return timed_rate(step, bench.seconds(REFERENCE_S, 0.1), 16)

    return sample


def single_puts(
    bench: Bench, db: kvrep.Store, population: int, seconds: float = SAMPLE_S
) -> Callable[[], float]:
    """Durable puts of one thread; what is left in memory is flushed outside the measured time."""
    chance = bench.chance(1)

    def sample() -> float:
        drawn = keys(chance, 1 << 16, population)
        put, flushes = db.put, db.status().flushes
        rate = timed_rate(lambda i: put(drawn[i & 65535], VALUE), bench.seconds(seconds, 0.1), 16)
        _need_flush(bench, db, flushes, seconds)
        db.flush()
        return rate

    return sample


def _need_flush(bench: Bench, db: kvrep.Store, before: int, seconds: float) -> None:
    """A sample at full length that held no flush would show less than a store costs."""
    if seconds >= SAMPLE_S and not bench.shortened and db.status().flushes == before:
        raise AssertionError(f"no flush within a sample of {seconds:g} s")


def put_latencies(bench: Bench, db: kvrep.Store, population: int, seconds: float) -> list[float]:
    """How long each durable put took, in seconds, over ``seconds``."""
    drawn = keys(bench.chance(3), 1 << 16, population)
    clock, put = time.perf_counter, db.put
    took: list[float] = []
    before = clock()
    end = before + seconds
    i = 0
    while before < end:
        put(drawn[i & 65535], VALUE)
        i += 1
        now = clock()
        took.append(now - before)
        before = now
    return took


@figure(1, "put", "durable put, one thread", "py-lmdb, one put in each sync=True transaction", 2.5)
def put(bench: Bench) -> Outcome:
    count = _population(bench)
    with store(bench, count, flush_interval_s=FLUSH_INTERVAL_S) as db, bare_map(bench, count) as env:
        outcome = bench.alternate(single_puts(bench, db, count), durable_puts(bench, env, count))
        seconds = bench.seconds(60)
        bench.progress(f"latencies over {seconds:g} s")
        took = put_latencies(bench, db, count, seconds)
    outcome.bounds.append(Bound(f"p99.9 over {seconds:g} s", percentile(took, 99.9) * 1e3, 50, "ms"))
    outcome.notes.append(
        f"p50 {percentile(took, 50) * 1e6:.0f} µs, p99 {percentile(took, 99) * 1e6:.0f} µs, "
        f"worst {max(took) * 1e3:.1f} ms"
    )
    return outcome


@figure(
    2, "put-raw", "durable put, one thread",
    "bare pwrite + fdatasync of as many bytes into an allocated file", 0.8,
)  # fmt: skip
def put_raw(bench: Bench) -> Outcome:
    count = _population(bench)
    with store(bench, count, flush_interval_s=FLUSH_INTERVAL_S) as db, bench.path("raw") as folder:
        size = log_bytes_per_put(db, count)
        outcome = bench.alternate(single_puts(bench, db, count), raw_writes(bench, folder, size))
    outcome.notes.append(f"{size} bytes of log for each put")
    return outcome


def log_bytes_per_put(db: kvrep.Store, population: int) -> int:
    """What one put adds to the log, in bytes."""
    before = db.status().log_bytes
    for k in keys(random.Random(4), 100, population):
        db.put(k, VALUE)
    return (db.status().log_bytes - before) // 100


def raw_writes(bench: Bench, folder: Path, size: int) -> Callable[[], float]:
    """``size`` bytes at a time behind each other, flushed each time."""
    path, content, room = folder / "file", os.urandom(size), bench.size(64 << 20, 1 << 20)

    def sample() -> float:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.posix_fallocate(fd, 0, room)
            os.fsync(fd)
            places = room // size

            def step(i: int) -> None:
                os.pwrite(fd, content, i % places * size)
                os.fdatasync(fd)

            return timed_rate(step, bench.seconds(REFERENCE_S, 0.1), 16)
        finally:
            os.close(fd)

    return sample


def raw_latencies(folder: Path, size: int, count: int) -> list[float]:
    """Seconds of each of ``count`` bare writes of ``size`` bytes, flushed, into an allocated file."""
    fd = os.open(folder / "latencies", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    content, clock = os.urandom(size), time.perf_counter
    took: list[float] = []
    try:
        os.posix_fallocate(fd, 0, size * count)
        os.fsync(fd)
        for i in range(count):
            began = clock()
            os.pwrite(fd, content, i * size)
            os.fdatasync(fd)
            took.append(clock() - began)
    finally:
        os.close(fd)
    return took


def in_threads(count: int, work: Callable[[int], None]) -> float:
    """Run ``work(number)`` in ``count`` threads; the seconds from the common start to the last end."""
    ready = threading.Barrier(count + 1)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        ready.wait()
        try:
            work(number)
        except BaseException as error:  # raised below, in the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if failures:
        raise failures[0]
    return took


def threaded_puts(
    bench: Bench, db: kvrep.Store, population: int, threads: int, seconds: float = SAMPLE_S
) -> Callable[[], float]:
    """Durable puts of ``threads`` threads, all together, per second."""
    salt = 100

    def sample() -> float:
        nonlocal salt
        salt += threads
        drawn = [keys(bench.chance(salt + n), 4096, population) for n in range(threads)]
        done = [0] * threads
        end = time.perf_counter() + bench.seconds(seconds, 0.1)

        def work(number: int) -> None:
            mine, put, clock, i = drawn[number], db.put, time.perf_counter, 0
            while True:
                for _ in range(8):
                    put(mine[i & 4095], VALUE)
                    i += 1
                if clock() >= end:
                    break
            done[number] = i

        flushes = db.status().flushes
        took = in_threads(threads, work)
        _need_flush(bench, db, flushes, seconds)
        db.flush()
        return sum(done) / took

    return sample


@figure(3, "put-16", "durable put, 16 threads", "py-lmdb as in 1, one thread", 7)
def put_16(bench: Bench) -> Outcome:
    count = _population(bench)
    with store(bench, count, flush_interval_s=FLUSH_INTERVAL_S) as db, bare_map(bench, count) as env:
        return bench.alternate(threaded_puts(bench, db, count, 16), durable_puts(bench, env, count))


def bare_batches(
    bench: Bench, env: lmdb.Environment, population: int, puts: int, size: int = BATCH
) -> Callable[[], float]:
    """py-lmdb, ``size`` puts in each ``sync=True`` transaction; puts per second."""
    chance = bench.chance(5)

    def sample() -> float:
        drawn = keys(chance, puts, population)

        def work() -> None:
            for start in range(0, puts, size):
                with env.begin(write=True) as txn:
                    for k in drawn[start : start + size]:
                        txn.put(k, VALUE)

        return puts / timed(work)

    return sample


def put_batches(db: kvrep.Store, drawn: list[bytes], size: int = BATCH) -> None:
    """Durable, acknowledged batches of ``size``."""
    for start in range(0, len(drawn), size):
        with db.batch() as batch:
            for k in drawn[start : start + size]:
                batch.put(k, VALUE)


@figure(
    4, "batch", "durable batches of 100, acknowledged, 200 k puts",
    "py-lmdb, 100 puts in each sync=True transaction", 6,
)  # fmt: skip
def batch(bench: Bench) -> Outcome:
    count, puts = _population(bench), bench.size(200_000, 1000)
    chance = bench.chance(1)
    with store(bench, count) as db, bare_map(bench, count) as env:

        def sample() -> float:
            drawn = keys(chance, puts, count)
            rate = puts / timed(lambda: put_batches(db, drawn))
            db.flush()
            return rate

        return bench.alternate(sample, bare_batches(bench, env, count, puts // 2))


@figure(
    5, "batch-all", "durable batches of 100, 2 M puts, until all is in LMDB",
    "py-lmdb, 100 puts in each sync=True transaction", 2.5,
)  # fmt: skip
def batch_all(bench: Bench) -> Outcome:
    count, puts = _population(bench), bench.size(2 * MILLION, 1000)
    chance = bench.chance(1)
    with store(bench, count) as db, bare_map(bench, count) as env:

        def sample() -> float:
            drawn = keys(chance, puts, count)

            def work() -> None:
                put_batches(db, drawn)
                db.flush(300)

            return puts / timed(work)

        return bench.alternate(sample, bare_batches(bench, env, count, puts // 8), pairs=min(3, bench.pairs))


@figure(
    6, "put-os", 'put with durability "os", 1 M puts, until all is in LMDB',
    "py-lmdb sync=False, one put in each transaction", 1.6,
)  # fmt: skip
def put_os(bench: Bench) -> Outcome:
    count, puts = _population(bench), bench.size(MILLION, 1000)
    chance = bench.chance(1)
    with store(bench, count, durability="os") as db, bare_map(bench, count, sync=False) as env:

        def sample() -> float:
            drawn = keys(chance, puts, count)

            def work() -> None:
                put = db.put
                for k in drawn:
                    put(k, VALUE)
                db.flush(300)

            return puts / timed(work)

        return bench.alternate(
            sample, bare_batches(bench, env, count, puts // 5, size=1), pairs=min(3, bench.pairs)
        )


@figure(
    8, "submit", "pipelined durable submit_put, one thread, 256 outstanding, 1 M puts",
    "py-lmdb as in 1", 30,
)  # fmt: skip
def submit(bench: Bench) -> Outcome:
    count, puts = _population(bench), bench.size(MILLION, 1000)
    chance = bench.chance(1)
    with store(bench, count) as db, bare_map(bench, count) as env:

        def sample() -> float:
            drawn = keys(chance, puts, count)
            rate = puts / timed(lambda: pipelined(db, drawn, 256))
            db.flush(300)
            return rate

        return bench.alternate(sample, durable_puts(bench, env, count), pairs=min(3, bench.pairs))


def pipelined(db: kvrep.Store, drawn: list[bytes], outstanding: int) -> None:
    """Submit all, never more than ``outstanding`` without an outcome, and see each outcome."""
    window: deque[kvrep.WriteFuture] = deque()
    submit = db.submit_put
    for k in drawn:
        if len(window) >= outstanding:
            window.popleft().result()
        window.append(submit(k, VALUE))
    for future in window:
        future.result()


@figure(21, "put-10m", "durable put, random keys, store of 10 M keys", "the same at 1 M keys", 0.6)
def put_10m(bench: Bench) -> Outcome:
    large, small = bench.size(10 * MILLION, 4000), _population(bench)
    with store(bench, large) as db, store(bench, small) as reference:
        return bench.alternate(
            single_puts(bench, db, large, 60.0),
            single_puts(bench, reference, small, 60.0),
            pairs=min(3, bench.pairs),
        )


@figure(22, "put-busy", "durable put beside a thread that spins in Python")
def put_busy(bench: Bench) -> Outcome:
    count = _population(bench)
    seconds = bench.seconds(60, 0.5)
    stop = False

    def spin() -> None:
        number = 0
        while not stop:
            number += 1

    with store(bench, count) as db:
        thread = threading.Thread(target=spin)
        thread.start()
        refused = 0
        try:
            took = put_latencies(bench, db, count, seconds)
        except kvrep.StorageFull:
            refused, took = 1, [float("inf")]
        finally:
            stop = True
            thread.join()
    return Outcome(
        bounds=[
            Bound("p50", percentile(took, 50) * 1e3, 12, "ms"),
            Bound(f"StorageFull in {seconds:g} s", refused, 0, "times"),
        ],
        notes=[f"p99 {percentile(took, 99) * 1e3:.1f} ms, {len(took)} puts"],
    )
