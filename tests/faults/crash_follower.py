"""Workloads behind the crash images of what is no write: promises, a follower's cut, a copy that takes over.

    python crash_follower.py ROOT SCRATCH promise|rejoin|copy [FAULT]

Each is run twice: ``prepare_…`` in the test's own process, unrecorded, then the rest under the recorder. The store
that is looked at is ``ROOT/store``; its primary is ``SCRATCH/a``, whose disk never fails.

``promise``  a node stores promises, lowered rules and floors of its vote
``rejoin``   an asynchronous primary was replaced by force: it saves what it had alone, cuts its log, and follows
``copy``     a follower was away until its log was trimmed: it gets a whole copy, which replaces the old one
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvrep
from kvrep.model.position import Position
from kvrep.options import Options
from kvrep.runtime.node import Node
from kvrep.storage import home as storage_home
from kvrep.storage import rescue as storage_rescue
from kvrep.storage.home import Home
from kvrep.storage.rescue import load_rescue
from kvrep.testing.crash import Image, mark, state_hash
from kvrep.testing.storecheck import check_store, content, log_records
from kvrep.transport.memory import MemoryTransport
from tests.replication_kit import until

OPTIONS: dict[str, Any] = {
    "log_file_bytes": 65536, "map_bytes": 16 << 20, "flush_interval_s": 600.0, "readers_max": 16, "keyspaces_max": 4,
    "heartbeat_interval_s": 0.1, "reconnect_backoff_max_s": 0.05,
}  # fmt: skip
A, B, NOWHERE = "127.0.0.1:7001", "127.0.0.1:7002", "127.0.0.1:9"
KEYS = 12
Pairs = dict[bytes, bytes]


def opened(path: Path, network: MemoryTransport, **options: Any) -> kvrep.Store:
    """A store in a network of its own: nobody is at ``NOWHERE``."""
    return kvrep.Store(Node.open(path, Options.of({**OPTIONS, **options}), network))  # type: ignore[typeddict-item]


# -- promises --------------------------------------------------------------------------------------


def promise_steps() -> Iterator[tuple[str, int]]:
    chance = random.Random(7)
    for number in range(1, 16):
        yield chance.choice(("promise", "promise", "lower", "floor")), number


def promised() -> tuple[str, ...]:
    """What ``IDENTITY`` says after 0, 1, 2 … steps."""
    epoch, lowered, floor = 0, Position(0, 0), 0
    found = [str((epoch, lowered, floor))]
    for what, number in promise_steps():
        if what == "promise":
            epoch = number * 1000 + 1
        elif what == "lower":
            lowered = Position(number * 1000 + 1, number)
        else:
            floor = number
        found.append(str((epoch, lowered, floor)))
    return tuple(found)


def prepare_promise(root: Path, scratch: Path) -> None:
    del scratch
    home = Home.open(root / "store", create=True, name="b", lineage=b"l" * 16)
    home.finish_creation()
    home.close()


def run_promise(root: Path, scratch: Path) -> None:
    del scratch
    home = Home.open(root / "store", create=False, name=None, lineage=b"")
    for what, number in promise_steps():
        mark(f"begin {number}")
        if what == "promise":
            assert home.promise(number * 1000 + 1, b"p" * 16)
        elif what == "lower":
            assert home.lower(Position(number * 1000 + 1, number))
        else:
            home.set_vote_floor(number)
        for word in ("done", "safe"):
            mark(f"{word} {number}")
    home.close()


@dataclass(frozen=True, slots=True)
class CheckPromise:
    """A promise that was answered is there, and no other."""

    def __call__(self, folder: Path, image: Image) -> str | None:
        home = Home.open(folder / "store", create=False, name=None, lineage=b"")
        found = str((home.promised_epoch, home.lowered, home.vote_floor))
        home.close()
        low = image.done if image.crash == "kill" else image.safe
        return None if found in promised()[low : image.begun + 1] else f"{found} after step {low}"


# -- a follower's cut ------------------------------------------------------------------------------


def pair(who: bytes, number: int, size: int) -> tuple[bytes, bytes]:
    return b"%02d" % (number % KEYS), who + b"%d" % number * size


def put(store: kvrep.Store, who: bytes, number: int, size: int) -> Position:
    return store.put(*pair(who, number, size))


COMMON, ALONE, NEW = 6, 14, 6
"""Writes that both have; that the old primary had alone (in several log files); that the new one made."""


def rejoin_states() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The old history after 0, 1, 2 … writes, and the new one, from where they part."""

    def states(pairs: Pairs, who: bytes, first: int, count: int, size: int) -> list[Pairs]:
        found = [pairs]
        for number in range(first, first + count):
            found.append(found[-1] | dict([pair(who, number, size)]))
        return found

    common = states({}, b"common", 0, COMMON, 100)
    alone = states(common[-1], b"alone", COMMON, ALONE, 4000)
    new = states(common[-1], b"new", COMMON, NEW, 100)
    old = [*common, *alone[1:]]
    return tuple(map(hashed, old)), tuple(map(hashed, new))


def hashed(pairs: Pairs) -> str:
    return state_hash({("default", key): value for key, value in pairs.items()})


def prepare_rejoin(root: Path, scratch: Path) -> None:
    network = MemoryTransport()
    with opened(root / "store", network, name="b", listen=B, acks=0) as b:
        with opened(scratch / "a", network, name="a", listen=A, follow=B) as a:
            until(lambda: b.status().voters == ("b", "a"), what="the follower to vote")
            for number in range(COMMON):
                last = put(b, b"common", number, 100)
            a.wait_for(last)
            until(lambda: not b.status().followers[0].lag_records, what="the follower")
        for number in range(COMMON, COMMON + ALONE):
            put(b, b"alone", number, 4000)
    with opened(scratch / "a", network, name="a", listen=A, follow=B) as a:
        a.promote(force=True, acks=0)
        for number in range(COMMON, COMMON + NEW):
            put(a, b"new", number, 100)


def run_rejoin(root: Path, scratch: Path) -> None:
    with followed(root, scratch) as (a, b):
        assert len(b.status().rescued) == 1
        caught_up(a, b)


@contextmanager
def followed(root: Path, scratch: Path, **options: Any) -> Iterator[tuple[kvrep.Store, kvrep.Store]]:
    network = MemoryTransport()
    with opened(scratch / "a", network, listen=A, **options) as a:
        with opened(root / "store", network, listen=B, follow=A, voter=False, **options) as b:
            until(lambda: b.status().position == a.status().position, what="the follower to show the same")
            yield a, b


def caught_up(a: kvrep.Store, b: kvrep.Store) -> None:
    """Say so once it is so, and once it is on the disk."""
    mark("begin 1")
    mark("done 1")
    last = a.status().last_offset
    until(lambda: a.status().followers[0].synced >= last, what="the follower to sync")
    mark("safe 1")
    assert content(a) == content(b)


@dataclass(frozen=True, slots=True)
class CheckRejoin:
    """Either nothing is cut yet, or what the old primary had alone is in a rescue file, whole."""

    scratch: str
    again_every: int = 60
    """Every so many images go on to the end."""

    def __call__(self, folder: Path, image: Image) -> str | None:
        old, new = rejoin_states()
        with opened(folder / "store", MemoryTransport(), follow=NOWHERE) as store:
            if violations := check_store(store):
                return str(violations[0])
            logged: Pairs = {}
            for record in log_records(store):
                logged |= {key: value for _, key, value in record.ops() if value is not None}
            shown = state_hash(content(store))
        if shown not in {*old, *new}:
            return "shows what nobody wrote"
        done = image.done if image.crash == "kill" else image.safe
        state = hashed(logged)
        if done and state != new[-1]:
            return "lost what it had acked to its new primary"
        if state not in {*old[COMMON:], *new}:
            return f"the log adds up to what nobody wrote: {sorted(logged)}"
        if state != old[-1] and not rescued(folder / "store"):
            return "the log is cut, and nothing saves what it held"
        return None if image.number % self.again_every else self._again(folder, new[-1])

    def _again(self, folder: Path, wanted: str) -> str | None:
        """The same node goes on where the crash stopped it."""
        shutil.copytree(self.scratch, folder / "scratch", ignore=shutil.ignore_patterns("lock.mdb"))
        with followed(folder, folder / "scratch") as (_, b):
            found = state_hash(content(b))
        if found != wanted:
            return "goes on to something else"
        return None if rescued(folder / "store") else "nothing is saved at the end"


def rescued(path: Path) -> bool:
    """Whether one rescue file holds all that the old primary had alone."""
    wanted = {pair(b"alone", number, 4000)[1] for number in range(COMMON, COMMON + ALONE)}
    for file in path.glob("rescue/records-*.kvrescue"):
        try:
            saved = load_rescue(file)
        except kvrep.CorruptionError:
            continue  # the crash came while it was written
        if wanted <= {value for record in saved.records for _, _, value in record.ops()}:
            return True
    return False


# -- a copy takes over -----------------------------------------------------------------------------

TRIMMED: dict[str, Any] = {"retention_bytes": 0, "retention_age_s": 0.0, "retention_bytes_max": 1 << 17}


def copy_states() -> tuple[str, str]:
    """What the old copy holds, and the new one."""
    old = dict(pair(b"old", number, 100) for number in range(KEYS))
    return hashed(old), hashed(dict(pair(b"new", number, 5000) for number in range(3 * KEYS)))


def prepare_copy(root: Path, scratch: Path) -> None:
    network = MemoryTransport()
    with opened(scratch / "a", network, name="a", listen=A, **TRIMMED) as a:
        with opened(root / "store", network, name="b", listen=B, follow=A, voter=False) as b:
            for number in range(KEYS):
                last = put(a, b"old", number, 100)
            b.wait_for(last)
        trimmed_from = a.status().last_offset
        for number in range(3 * KEYS):
            put(a, b"new", number, 5000)
        a.flush()
        until(lambda: a._node.engine.trim() >= 0 and a.status().first_offset > trimmed_from, what="trimming")


def run_copy(root: Path, scratch: Path) -> None:
    with followed(root, scratch, **TRIMMED) as (a, b):
        assert b._node.engine.home.generation.name == "gen-000002"
        caught_up(a, b)
        until(lambda: not (b._node.engine.home.generation / "COPY").exists(), what="the copy to be verified")


@dataclass(frozen=True, slots=True)
class CheckCopy:
    """The old copy is live, whole, or the new one."""

    scratch: str
    again_every: int = 60

    def __call__(self, folder: Path, image: Image) -> str | None:
        old, new = copy_states()
        with opened(folder / "store", MemoryTransport(), follow=NOWHERE) as store:
            if violations := check_store(store):
                return str(violations[0])
            shown = state_hash(content(store))
        done = image.done if image.crash == "kill" else image.safe
        if shown not in ((new,) if done else (old, new)):
            return "lost the copy that took over" if shown == old else "shows what no copy held"
        if image.number % self.again_every:
            return None
        shutil.copytree(self.scratch, folder / "scratch", ignore=shutil.ignore_patterns("lock.mdb"))
        with followed(folder, folder / "scratch", **TRIMMED) as (_, b):
            return None if state_hash(content(b)) == new else "goes on to something else"


# -- deliberate faults -----------------------------------------------------------------------------


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a forgotten call does."""


def _promise_not_synced() -> None:
    os.RWF_DSYNC = 0


def _rescue_not_synced() -> None:
    storage_rescue.os = SimpleNamespace(**{**vars(os), "fsync": _nothing})  # type: ignore[attr-defined]


def _rescue_without_a_name() -> None:
    storage_rescue.fsync_directory = _nothing  # type: ignore[attr-defined]


def _copy_not_synced() -> None:
    os.fsync = _nothing


def _switch_not_synced() -> None:
    storage_home.fsync_directory = _nothing  # type: ignore[attr-defined]


FAULTS: dict[str, tuple[str, Callable[[], None]]] = {
    "a promise is answered before it is synced": ("promise", _promise_not_synced),
    "the rescue file is not synced": ("rejoin", _rescue_not_synced),
    "the rescue file's name is not synced": ("rejoin", _rescue_without_a_name),
    "the copy is not synced": ("copy", _copy_not_synced),
    "the switch is not synced": ("copy", _switch_not_synced),
}
"""Name -> (the workload in which it matters, what makes it)."""
PREPARE = {"promise": prepare_promise, "rejoin": prepare_rejoin, "copy": prepare_copy}
RUN = {"promise": run_promise, "rejoin": run_rejoin, "copy": run_copy}


def main(root: str, scratch: str, what: str, fault: str = "") -> None:
    if fault:
        FAULTS[fault][1]()
    RUN[what](Path(root), Path(scratch))


if __name__ == "__main__":
    main(*sys.argv[1:])
