"""Figures 19, 23 and 24: opening after a crash, and what long use does to the file."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import kvrep
from benchmarks.measure import Bench, Bound, Outcome, figure
from benchmarks.stores import VALUE, key, keys, store, template, value

PAGE_BYTES = 4096
MILLION = 1_000_000


@figure(19, "open", "open after kill -9 with 10 M keys", "the same with 100 k keys", 1.5, sense="at most")
def open_again(bench: Bench) -> Outcome:
    large, small = bench.size(10 * MILLION, 4000), bench.size(100_000, 1000)
    writes = bench.size(20_000, 100)
    paths = template(bench, large), template(bench, small)
    outcome = bench.alternate(
        lambda: _killed_and_opened(paths[0], large, writes),
        lambda: _killed_and_opened(paths[1], small, writes),
        unit="s",
    )
    outcome.bounds.append(Bound("open with 10 M keys", statistics.median(outcome.measured), 1.0, "s"))
    outcome.notes.append(f"{writes:,} records to replay")
    return outcome


def _killed_and_opened(path: Path, count: int, writes: int) -> float:
    """Seconds that an open takes after a process was killed with ``writes`` records unflushed."""
    _child("_killed", str(path), str(count), str(writes), expect=-9)
    return float(_child("_opened", str(path)))


def _child(name: str, *arguments: str, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.upkeep", name, *arguments],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    if done.returncode != expect:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _killed(path: str, count: str, writes: str) -> None:
    """Write, never flush, die."""
    import os
    import random
    import signal

    db = kvrep.open(path, flush_interval_s=3600, memtable_bytes=1 << 30, memtable_bytes_max=4 << 30)
    drawn = keys(random.Random(8), int(writes), int(count))
    futures = [db.submit_put(k, VALUE) for k in drawn]
    futures[-1].result(60)
    os.kill(os.getpid(), signal.SIGKILL)


def _opened(path: str) -> None:
    began = time.perf_counter()
    db = kvrep.open(path)
    took = time.perf_counter() - began
    sys.stdout.write(f"{took}\n")
    db.close()


class _Load:
    """Durable batches of 100 random keys from one thread, until told to end."""

    def __init__(self, bench: Bench, db: kvrep.Store, count: int) -> None:
        self._drawn = keys(bench.chance(9), 1 << 18, count)
        self._db = db
        self._stop = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Load:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop = True
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        start = 0
        try:
            while not self._stop:
                with self._db.batch() as batch:
                    for k in self._drawn[start : start + 100]:
                        batch.put(k, VALUE)
                start = (start + 100) % ((1 << 18) - 100)
        except BaseException as error:  # raised in the caller's thread
            self.error = error


def _flush_thread_bytes() -> int:
    """What the thread that flushes into LMDB has written so far: pages, all but a few bytes of it."""
    total = 0
    for thread in threading.enumerate():
        if thread.name.startswith("kvrep-flush"):
            fields = dict(
                line.split(": ")
                for line in Path(f"/proc/self/task/{thread.native_id}/io").read_text().splitlines()
            )
            total += int(fields["wchar"])
    return total


@figure(
    23, "growth", "LMDB file growth while a snapshot is held for 60 s under full load",
    "pages dirtied meanwhile", 1.2, sense="at most",
)  # fmt: skip
def growth(bench: Bench) -> Outcome:
    count, seconds = bench.size(MILLION, 2000), bench.seconds(60, 1.0)
    with store(bench, count) as db, _Load(bench, db, count):
        with db.snapshot():
            # The flush under way when the snapshot began is let out: it belongs half to before.
            _next_flush(db)
            before, dirtied = db.status().lmdb_bytes, _flush_thread_bytes()
            _wait(bench, seconds, "snapshot held")
            _next_flush(db)
            after = db.status().lmdb_bytes
            dirtied = _flush_thread_bytes() - dirtied
        grown = after - before
        _wait(bench, seconds / 3, "snapshot closed")
        _next_flush(db)
        later = db.status().lmdb_bytes - after
    outcome = Outcome("MiB", [grown / (1 << 20)], [dirtied / (1 << 20)])
    outcome.bounds.append(
        Bound(f"growth in {seconds / 3:g} s afterwards, as a share", later / max(grown, 1), 0.05, "x")
    )
    return outcome


def _next_flush(db: kvrep.Store) -> None:
    """Return when a flush has ended that ended after this call."""
    before = db.status().flushes
    deadline = time.monotonic() + 60
    while db.status().flushes == before:
        if time.monotonic() > deadline:
            raise TimeoutError("no flush within 60 s")
        time.sleep(0.002)


def _wait(bench: Bench, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        bench.progress(f"{what}: {left:.0f} s left")
        time.sleep(min(1.0, left))


@figure(
    24, "large-values", "overwriting 64 KiB values for 10 minutes: flush rate at the end",
    "flush rate in the first minute", 0.5,
)  # fmt: skip
def large_values(bench: Bench) -> Outcome:
    count, seconds = bench.size(4096, 32), bench.seconds(600, 1.0)
    chance = bench.chance(10)
    contents = [value(chance, 64 << 10) for _ in range(16)]
    with bench.path("large") as path, kvrep.open(path, ack_timeout_s=60.0) as db:
        for number in range(count):
            db.submit_put(key(number), contents[number & 15]).result()
        db.flush()
        rates: list[float] = []
        for part in range(10):
            rates.append(_flushed_per_second(db, count, contents, chance.random, seconds / 10))
            bench.progress(f"{part + 1}/10: {rates[-1]:.0f} MiB/s, file {db.status().lmdb_bytes >> 20} MiB")
        live = count * (64 << 10)
        size = db.status().lmdb_bytes / live
    outcome = Outcome("MiB/s", [statistics.median(rates[-2:])], [rates[0]])
    outcome.bounds.append(Bound("file over live data", size, 2.0, "x"))
    outcome.notes.append("MiB/s each tenth: " + " ".join(f"{rate:.0f}" for rate in rates))
    return outcome


def _flushed_per_second(
    db: kvrep.Store, count: int, contents: list[bytes], draw: Callable[[], float], seconds: float
) -> float:
    """MiB per second over ``seconds`` of random overwrites, the last flush included."""
    began = time.perf_counter()
    written = 0
    while time.perf_counter() - began < seconds:
        with db.batch() as batch:
            for _ in range(4):
                batch.put(key(int(draw() * count)), contents[written & 15])
                written += 1
    db.flush(300)
    return written * (64 << 10) / (1 << 20) / (time.perf_counter() - began)


if __name__ == "__main__":
    if sys.argv[1] == "_killed":
        _killed(*sys.argv[2:])
    else:
        _opened(*sys.argv[2:])
