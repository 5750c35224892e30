"""The workload behind the crash images: run as a process under the recorder, and known to the test.

    python crash_workload.py FOLDER DURABILITY [FAULT]
    python crash_workload.py FOLDER DURABILITY recover COUNT

One client, one write at a time, so that the n-th atomic write makes the n-th state. ``recover`` opens what is
there, and tells how many of COUNT states it might have held and which one it showed. FAULT is a deliberate
mistake, to see that the images find it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb

import kvrep
from kvrep.storage import home as storage_home
from kvrep.storage import log as storage_log
from kvrep.storage import log_file as storage_log_file
from kvrep.storage import recovery as storage_recovery
from kvrep.storage.engine import Engine
from kvrep.storage.log_file import LogFile
from kvrep.testing.crash import mark, state_hash
from kvrep.testing.storecheck import content

Ops = list[tuple[str, bytes, bytes | None]]

OPTIONS: dict[str, Any] = {
    "name": "a",
    "log_file_bytes": 65536,
    "map_bytes": 64 << 20,
    "retention_bytes": 0,
    "retention_age_s": 0.001,
    "flush_interval_s": 600.0,
    "readers_max": 16,
    "keyspaces_max": 4,
}


def steps() -> Iterator[tuple[str, Ops]]:
    """("write", operations of one atomic record) and what else happens: ("flush", []), ("reopen", [])."""
    rng = random.Random(4)

    def ops(count: int, size: int) -> Ops:
        made: Ops = []
        for _ in range(count):
            name = "default" if rng.random() < 0.8 else "users"
            value = None if rng.random() < 0.15 else rng.randbytes(rng.randrange(size))
            made.append((name, b"key-%d" % rng.randrange(40), value))
        return made

    for _ in range(8):
        yield "write", ops(1, 100)
    yield "write", ops(12, 400)
    yield "flush", []
    for _ in range(5):
        yield "write", ops(1, 3000)
    yield "write", ops(3, 12_000)
    yield "reopen", []
    for _ in range(4):
        yield "write", ops(2, 9000)
    yield "flush", []
    for _ in range(4):  # these need a second, and a third log file; the flush trims
        yield "write", ops(3, 30_000)
    yield "flush", []
    for _ in range(6):
        yield "write", ops(1, 50)
    yield "write", ops(60, 40)
    yield "transaction", ops(4, 1500)
    yield "reopen", []
    yield "reopen", []
    yield "write", ops(1, 2000)


def states() -> tuple[str, ...]:
    """What the store holds after 0, 1, 2 … writes."""
    now: dict[tuple[str, bytes], bytes] = {}
    found = [state_hash(now)]
    for what, ops in steps():
        if what in ("write", "transaction"):
            for name, key, value in ops:
                if value is None:
                    now.pop((name, key), None)
                else:
                    now[name, key] = value
            found.append(state_hash(now))
    return tuple(found)


def write(store: kvrep.Store, ops: Ops, *, in_transaction: bool = False) -> None:
    """One atomic write: a put or a delete where one will do, else a batch or a transaction."""
    if len(ops) == 1:
        name, key, value = ops[0]
        space = store.keyspace(name)
        if value is None:
            space.delete(key)
        else:
            space.put(key, value)
        return
    with store.transaction() if in_transaction else store.batch() as batch:
        for name, key, value in ops:
            if value is None:
                batch.delete(key, keyspace=store.keyspace(name))
            else:
                batch.put(key, value, keyspace=store.keyspace(name))


def run(path: Path, durability: Any) -> None:
    store = kvrep.open(path, durability=durability, **OPTIONS)
    written = 0
    try:
        for what, ops in steps():
            if what in ("write", "transaction"):
                mark(f"begin {written + 1}")
                write(store, ops, in_transaction=what == "transaction")
                written += 1
                mark(f"done {written}")
                if durability == "sync":
                    mark(f"safe {written}")
            elif what == "flush":
                store.flush()
                mark(f"safe {written}")
            else:
                store.close()
                mark(f"safe {written}")
                store = kvrep.open(path, durability=durability, **OPTIONS)
    finally:
        store.close()
    mark(f"safe {written}")


def recover(path: Path, durability: Any, count: int) -> None:
    """Open, write once, close; the states are ``count`` that may be recovered, the one shown, the next."""
    with kvrep.open(path, durability=durability, **OPTIONS) as store:
        shown = content(store)
        for word in ("begin", "done", "safe"):  # what was shown is on the disk, whatever the durability
            mark(f"{word} {count}")
        mark(f"begin {count + 1}")
        store.put(b"after", b"1")
        mark(f"done {count + 1}")
        if durability == "sync":
            mark(f"safe {count + 1}")
        mark(f"states {state_hash(shown)} {state_hash(content(store))}")
    mark(f"safe {count + 1}")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a forgotten call does."""


def _lmdb_without_sync() -> None:
    real = lmdb.open

    def opened(*args: Any, **kwargs: Any) -> Any:
        return real(*args, sync=False, **kwargs)

    lmdb.open = opened


def _acknowledge_before_sync() -> None:
    os.RWF_DSYNC = 0
    LogFile.sync = _nothing


def _names_not_synced() -> None:
    for module in (storage_home, storage_log, storage_log_file, storage_recovery):
        assert module.fsync_directory  # type: ignore[attr-defined]
        module.fsync_directory = _nothing


def _mark_proves_the_unsynced() -> None:
    real = LogFile.write_group

    def write_group(
        self: Any, records: Any, length: int, first: int, synced: int, committed: int, *, sync: bool
    ) -> int:
        return real(self, records, length, first, first - 1, committed, sync=sync)

    LogFile.write_group = write_group


def _flush_ahead_of_the_log() -> None:
    assert Engine.sync
    Engine.sync = _nothing


def _spare_not_synced() -> None:
    os.fsync = _nothing


FAULTS: dict[str, tuple[str, Callable[[], None]]] = {
    "a write is acknowledged before it is synced": ("sync", _acknowledge_before_sync),
    "names of files are not synced": ("sync", _names_not_synced),
    "new files are not synced": ("sync", _spare_not_synced),
    "LMDB does not sync": ("sync", _lmdb_without_sync),
    "the synced mark proves what is not synced": ("os", _mark_proves_the_unsynced),
    "the flush is ahead of the log": ("os", _flush_ahead_of_the_log),
}
"""Name -> (durability under which it matters, what makes it)."""


def main(folder: str, durability: str, what: str = "", count: str = "") -> None:
    if what == "recover":
        recover(Path(folder) / "store", durability, int(count))
        return
    if what:
        FAULTS[what][1]()
    run(Path(folder) / "store", durability)


if __name__ == "__main__":
    main(*sys.argv[1:])
