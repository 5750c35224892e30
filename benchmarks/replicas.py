"""Figures 7, 12 to 18 and 20: many coroutines, followers, bootstrap."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

import kvrep
import kvrep.aio
from benchmarks.measure import Bench, Bound, Outcome, figure, percentile, timed
from benchmarks.peer import Peer, round_trips, serve_stream
from benchmarks.stores import MAP_BYTES, VALUE, bare_map, copied, key, keys, store, template, value, warm_up
from benchmarks.writes import (
    FLUSH_INTERVAL_S,
    durable_puts,
    log_bytes_per_put,
    put_latencies,
    raw_latencies,
    single_puts,
    threaded_puts,
)

MILLION = 1_000_000
MIB = 1 << 20
LARGE_BYTES = 64 << 10


@figure(7, "put-aio", "durable put from 64 asyncio tasks", "py-lmdb as in 1, one thread", 12)
def put_aio(bench: Bench) -> Outcome:
    count = bench.size(MILLION, 2000)
    path = template(bench, count)
    with bare_map(bench, count) as env:
        reference = durable_puts(bench, env, count)
        return bench.alternate(lambda: asyncio.run(_many_tasks(bench, path, count)), reference)


async def _many_tasks(bench: Bench, path: Path, count: int) -> float:
    """Durable puts per second of 64 tasks."""
    async with kvrep.aio.open(path, flush_interval_s=FLUSH_INTERVAL_S) as db:
        await asyncio.gather(*(db.put(k, VALUE) for k in keys(bench.chance(99), 64, count)))
        await db.flush()
        done = 0
        began = time.perf_counter()
        end = began + bench.seconds(6.0, 0.1)

        async def task(number: int) -> None:
            nonlocal done
            drawn = keys(bench.chance(200 + number), 1024, count)
            i = 0
            while time.perf_counter() < end:
                await db.put(drawn[i & 1023], VALUE)
                i += 1
            done += i

        await asyncio.gather(*(task(number) for number in range(64)))
        return done / (time.perf_counter() - began)


# -- a primary here, a follower in another process -------------------------------------------------------


@contextmanager
def pair(bench: Bench, count: int, *, acks: int) -> Iterator[tuple[kvrep.Store, Peer]]:
    """A primary with ``count`` keys and a follower that has caught up."""
    with (
        copied(bench, count, "primary") as path,
        bench.path("follower") as other,
        kvrep.open(path, name="a", listen="127.0.0.1:0", flush_interval_s=FLUSH_INTERVAL_S) as db,
        Peer() as peer,
    ):
        peer.ask(
            "open", path=str(other / "store"), name="b", follow=db.address, flush_interval_s=FLUSH_INTERVAL_S
        )
        peer.ask("wait_for", position=str(db.put(key(0), VALUE)))
        if acks:
            _until(lambda: "b" in db.status().voters, "the follower is a voter")
            db.reconfigure(acks=acks)
        warm_up(bench, db, count)
        peer.ask("wait_for", position=str(db.position))
        yield db, peer


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)


@figure(
    12, "put-async", "durable put with one asynchronous follower on the same machine",
    "the same without", 0.7,
)  # fmt: skip
def put_async(bench: Bench) -> Outcome:
    count = bench.size(MILLION, 2000)
    with (
        pair(bench, count, acks=0) as (db, peer),
        store(bench, count, flush_interval_s=FLUSH_INTERVAL_S) as alone,
    ):
        with_follower = single_puts(bench, db, count)

        def sample() -> float:
            rate = with_follower()
            peer.ask("wait_for", position=str(db.position))  # not at the cost of the other side
            return rate

        return bench.alternate(sample, single_puts(bench, alone, count))


@figure(
    13, "put-acked", "put with acks=1, one thread: median latency",
    "median round trip of 150 bytes on a bare gRPC stream + median bare fdatasync", 1.4, sense="at most",
)  # fmt: skip
def put_acked(bench: Bench) -> Outcome:
    count = bench.size(MILLION, 2000)
    with pair(bench, count, acks=1) as (db, _), Peer() as other, bench.path("raw") as folder:
        size, port = log_bytes_per_put(db, count), other.ask("echo")
        trips, writes = bench.size(5000, 200), bench.size(5000, 200)

        def mine() -> float:
            return percentile(put_latencies(bench, db, count, bench.seconds(3.0, 0.1)), 50)

        def bare() -> float:
            # The first round trips open the connection.
            trip = percentile(round_trips(port, trips, 150)[trips // 10 :], 50)
            return trip + percentile(raw_latencies(folder, size, writes), 50)

        return bench.alternate(mine, bare, unit="s")


@figure(14, "put-acked-64", "put with acks=1, 64 threads", "the same with one thread", 10)
def put_acked_64(bench: Bench) -> Outcome:
    count = bench.size(MILLION, 2000)
    with pair(bench, count, acks=1) as (db, _):
        return bench.alternate(threaded_puts(bench, db, count, 64), threaded_puts(bench, db, count, 1))


# -- catching up -----------------------------------------------------------------------------------------


def _caught_up(bench: Bench, path: Path, db: kvrep.Store) -> float:
    """Seconds until a new, empty follower shows everything, its opening included."""
    with bench.path("catching") as folder, Peer() as peer:
        took = peer.ask(
            "catch_up",
            path=str(folder / "store"),
            position=str(db.position),
            name="b",
            voter=False,
            follow=db.address,
        )
    return float(took)


@figure(
    15, "catch-up", "an empty follower catching up on 2 M records, until they are visible",
    "py-lmdb writing the same records, 1000 puts in each sync=True transaction", 1.3,
)  # fmt: skip
def catch_up(bench: Bench) -> Outcome:
    count = bench.size(2 * MILLION, 2000)
    drawn = keys(bench.chance(11), count, count)
    with (
        bench.path("source") as path,
        kvrep.open(path, name="a", listen="127.0.0.1:0", retention_bytes=8 << 30) as db,
    ):
        bench.progress(f"writing {count:,} records")
        window = [db.submit_put(k, VALUE) for k in drawn[:1000]]
        for i in range(1000, count):
            window[i % 1000].result(60)
            window[i % 1000] = db.submit_put(drawn[i], VALUE)
        for future in window:
            future.result(60)
        db.flush(600)

        def bare() -> float:
            with bench.path("bare") as folder:
                env = lmdb.open(str(folder), map_size=MAP_BYTES, lib_version=0)
                try:
                    return count / timed(lambda: _put_all(env, drawn))
                finally:
                    env.close()

        return bench.alternate(lambda: count / _caught_up(bench, path, db), bare, pairs=min(3, bench.pairs))


def _put_all(env: lmdb.Environment, drawn: list[bytes]) -> None:
    for start in range(0, len(drawn), 1000):
        with env.begin(write=True) as txn:
            for k in drawn[start : start + 1000]:
                txn.put(k, VALUE)


@figure(
    16, "catch-up-large", "an empty follower catching up on 1 GB of 64 KiB values",
    "a bare gRPC stream whose receiver writes each MiB to two files, fdatasync every 16 MiB", 0.5,
)  # fmt: skip
def catch_up_large(bench: Bench) -> Outcome:
    count = bench.size(1_000_000_000 // LARGE_BYTES, 32)
    total = count * LARGE_BYTES
    chance = bench.chance(12)
    contents = [value(chance, LARGE_BYTES) for _ in range(16)]
    with (
        bench.path("source") as path,
        kvrep.open(path, name="a", listen="127.0.0.1:0", retention_bytes=8 << 30, ack_timeout_s=60.0) as db,
    ):
        bench.progress(f"writing {count:,} values")
        for number in range(count):
            db.submit_put(key(number), contents[number & 15]).result(60)
        db.flush(600)
        return bench.alternate(
            lambda: total / MIB / _caught_up(bench, path, db),
            lambda: total / MIB / _bare_stream(bench, _random_chunks(total), copies=2, sync_bytes=16 * MIB),
            unit="MiB/s",
            pairs=min(3, bench.pairs),
        )


def _random_chunks(total: int) -> Callable[[], Iterator[bytes]]:
    content = os.urandom(MIB)

    def chunks() -> Iterator[bytes]:
        for start in range(0, total, MIB):
            yield content[: min(MIB, total - start)]

    return chunks


def _bare_stream(
    bench: Bench, chunks: Callable[[], Iterator[bytes]], *, copies: int, sync_bytes: int
) -> float:
    """Seconds that a bare gRPC stream from here to files of another process takes."""
    server, port = serve_stream(chunks)
    try:
        with bench.path("received") as folder, Peer() as peer:
            return float(
                peer.ask("receive", port=port, folder=str(folder), copies=copies, sync_bytes=sync_bytes)
            )
    finally:
        server.stop(0).wait(5)


@figure(
    17, "bootstrap", "bootstrap of a follower from a 1 GB store",
    "compacting copy to a file + a bare gRPC stream of it written to a file and fsynced", 0.6,
)  # fmt: skip
def bootstrap(bench: Bench) -> Outcome:
    count = bench.size(800_000, 500)  # three pairs of 1016 bytes on a page of 4 KiB: 1.07 GB
    content = value(bench.chance(13), 1000)
    with (
        bench.path("source") as path,
        bench.path("bare") as bare_path,
        kvrep.open(
            path, name="a", listen="127.0.0.1:0", retention_bytes=0, retention_age_s=0, log_file_bytes=1 << 20
        ) as db,
    ):
        bench.progress(f"writing {count:,} values")
        env = lmdb.open(str(bare_path), map_size=MAP_BYTES, lib_version=0)
        try:
            for start in range(0, count, 1000):
                with env.begin(write=True) as txn, db.batch(timeout_s=60) as batch:
                    for number in range(start, min(start + 1000, count)):
                        txn.put(key(number), content)
                        batch.put(key(number), content)
            db.flush(600)
            for _ in range(3):  # fill and flush further files, so that the first one is trimmed
                for start in range(0, 2000, 100):
                    with db.batch() as batch:
                        for number in range(start, start + 100):
                            batch.put(key(number % count), content)
                db.flush(600)
            size = db.status().lmdb_bytes
            assert db.status().first_offset > 1, "the log still starts at the beginning: no bootstrap needed"
            return bench.alternate(
                lambda: size / MIB / _caught_up(bench, path, db),
                lambda: size / MIB / _copied_and_sent(bench, env),
                unit="MiB/s",
                pairs=min(3, bench.pairs),
            )
        finally:
            env.close()


def _copied_and_sent(bench: Bench, env: lmdb.Environment) -> float:
    with bench.path("copied") as folder:
        took = timed(lambda: env.copy(str(folder), compact=True))

        def chunks() -> Iterator[bytes]:
            with (folder / "data.mdb").open("rb", buffering=0) as file:
                while chunk := file.read(MIB):
                    yield chunk

        return took + _bare_stream(bench, chunks, copies=1, sync_bytes=1 << 62)


# -- lag and memory --------------------------------------------------------------------------------------


@figure(18, "lag", "lag of an asynchronous follower at half of the primary's full rate")
def lag(bench: Bench) -> Outcome:
    count, seconds = bench.size(MILLION, 2000), bench.seconds(70, 0.5)
    with pair(bench, count, acks=0) as (db, peer):
        full = single_puts(bench, db, count, 3.0)()
        peer.ask("wait_for", position=str(db.position))
        lags = _lags(bench, db, peer, count, full / 2, seconds)
    return Outcome(
        bounds=[
            Bound("p99", percentile(lags, 99) * 1e3, 20, "ms"),
            Bound("worst", max(lags) * 1e3, 200, "ms"),
        ],
        notes=[f"p50 {statistics.median(lags) * 1e3:.2f} ms at {full / 2:,.0f} puts/s over {seconds:g} s"],
    )


def _lags(
    bench: Bench, db: kvrep.Store, peer: Peer, population: int, rate: float, seconds: float
) -> list[float]:
    """Every 20th of puts at ``rate`` per second: how long after its return the follower showed it."""
    every, total = 20, int(rate * seconds)
    drawn = keys(bench.chance(14), 1 << 14, population)
    stdin = peer.process.stdin
    assert stdin is not None
    peer.tell("lags", count=total // every)
    began = time.perf_counter()
    for i in range(total // every * every):
        ahead = began + i / rate - time.perf_counter()
        if ahead > 0.0005:
            time.sleep(ahead)
        position = db.put(drawn[i & 16383], VALUE)
        if i % every == 0:
            stdin.write(f"{time.monotonic()} {position}\n")
            stdin.flush()
    found: list[float] = peer.answer()
    return found


@figure(20, "memory", "RssAnon while 2 GB are written and one follower is stopped with SIGSTOP")
def memory(bench: Bench) -> Outcome:
    total = bench.size(2_000_000_000, 2_000_000)
    with bench.path("memory") as folder, Peer() as primary:
        peak: Any = primary.ask(
            "write_beside_stopped",
            path=str(folder / "a"), follower=str(folder / "b"), total_bytes=total,
        )  # fmt: skip
        primary.ask("close_store")
    return Outcome(bounds=[Bound("peak RssAnon", peak / MIB, 400, "MiB")])
