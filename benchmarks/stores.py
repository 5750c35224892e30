"""The data that is measured on: keys, values, and filled stores, made once per run."""

from __future__ import annotations

import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

import kvrep
from benchmarks.measure import Bench

__all__ = [
    "LARGE_VALUE",
    "MAP_BYTES",
    "VALUE",
    "bare_map",
    "copied",
    "fill",
    "key",
    "keys",
    "store",
    "template",
]

MAP_BYTES = 64 << 30
FILL_BATCH = 2000
VALUE_BYTES = 100
UNDER_WAY = 256


def key(number: int) -> bytes:
    """The 16-byte key with that number."""
    return b"%016d" % number


def keys(chance: random.Random, count: int, among: int) -> list[bytes]:
    """``count`` keys drawn from the first ``among``, with repeats."""
    draw = chance.random
    return [b"%016d" % int(draw() * among) for _ in range(count)]


def value(chance: random.Random, size: int = VALUE_BYTES) -> bytes:
    """Bytes that no compression shortens."""
    return chance.randbytes(size)


def put_singly(db: kvrep.Store, count: int, value: bytes) -> None:
    """``count`` puts, each a record of its own, some of them under way at once; they are durable when it returns."""
    under_way = deque[kvrep.WriteFuture]()
    for number in range(count):
        under_way.append(db.submit_put(key(number), value))
        if len(under_way) > UNDER_WAY:
            under_way.popleft().result(60)
    for future in under_way:
        future.result(60)


VALUE = value(random.Random(1))
LARGE_VALUE = value(random.Random(2), 100_000)


def fill(db: kvrep.Store, count: int, content: bytes, progress: Callable[[str], None]) -> None:
    """Put the first ``count`` keys and flush."""
    for start in range(0, count, FILL_BATCH):
        with db.batch(timeout_s=60) as batch:
            for number in range(start, min(start + FILL_BATCH, count)):
                batch.put(key(number), content)
        if start % 500_000 == 0:
            progress(f"filling a store: {start:,} of {count:,} keys")
    db.flush(600)


def template(bench: Bench, count: int) -> Path:
    """The path of a closed store with ``count`` keys, made at the first call of a run."""
    path = bench.folder / f"store-{count}"
    if not path.exists():
        with kvrep.open(path) as db:
            fill(db, count, VALUE, bench.progress)
    return path


@contextmanager
def store(bench: Bench, count: int, **options: Any) -> Iterator[kvrep.Store]:
    """The store with ``count`` keys, open and warm: one flush has been made since it was opened."""
    path = template(bench, count)
    with kvrep.open(path, **options) as db:
        warm_up(bench, db, count)
        yield db


def warm_up(bench: Bench, db: kvrep.Store, count: int) -> None:
    """Some writes and one flush, so that files and pages are in place before anything is timed."""
    futures = [db.submit_put(k, VALUE) for k in keys(bench.chance(99), bench.size(2000, 50), count)]
    for future in futures:
        future.result()  # a flush takes what is committed when it is asked for
    db.flush()


@contextmanager
def copied(bench: Bench, count: int, name: str) -> Iterator[Path]:
    """A copy of the store with ``count`` keys, for figures that change more than values. Gone afterwards."""
    path = bench.folder / name
    shutil.copytree(template(bench, count), path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def bare_map(bench: Bench, count: int, *, sync: bool = True) -> Iterator[lmdb.Environment]:
    """py-lmdb with the same keys and values in its main database; ``sync`` as py-lmdb means it."""
    path = bench.folder / f"lmdb-{count}"
    filled = path.exists()
    env = lmdb.open(str(path), map_size=MAP_BYTES, sync=sync, lib_version=0)
    try:
        if not filled:
            for start in range(0, count, 100_000):
                with env.begin(write=True) as txn:
                    for number in range(start, min(start + 100_000, count)):
                        txn.put(key(number), VALUE)
            env.sync(True)
        yield env
        env.sync(True)
    finally:
        env.close()
