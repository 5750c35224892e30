"""Every system call that changes the disk, in a life of a store from creation to reopening: kill -9 before it, or an
error in its place."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvrep
from tests.strace_kit import DISK_CALLS, STRACE, Point, points_of, run, strike

OPTIONS = {
    "log_file_bytes": 64 << 10,
    "map_bytes": 16 << 20,
    "flush_interval_s": 3600.0,
    "retention_bytes": 0,
    "retention_age_s": 0,
}

LIFE = """
import os, sys, kvrep
options = eval(sys.argv[2])
say = lambda line: os.write(1, line.encode() + b"\\n")

def phase(name):
    if name in (sys.argv[3], "end"):
        say("phase end")
        os._exit(0)
    say("phase " + name)

def tried(what, call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except kvrep.RefusedError as error:
        say(f"refused {what} {type(error).__name__}")
    except kvrep.Error as error:
        say(f"failed {what} {type(error).__name__}")

def write(n, size):
    with db.batch() as batch:
        for part in range(3):
            batch.put(b"%d-%d" % (n, part), b"%d" % n * size)
    return batch.position

def put(n, size=10):
    say(f"begin {n}")
    if tried(n, write, n, size):
        say(f"acked {n}")
        kept.append((n, size))

def opened():
    db = tried("open", kvrep.open, sys.argv[1], **options)
    if db is None:
        phase("end")
    return db

kept = []
phase("creation")
db = opened()
phase("first write")
put(1)
phase("write")
put(2)
phase("flush")
tried("flush", db.flush, 10.0)
phase("roll")
put(3, 12_000)
put(4, 12_000)
phase("delete")
say("begin -1")
if tried(-1, db.delete, b"1-0"):
    say("acked -1")
phase("trim")
tried("flush", db.flush, 10.0)
put(5)
for n, size in kept:
    if db.get(b"%d-1" % n) != b"%d" % n * size:
        say(f"lost {n}")
phase("close")
db.close()
phase("open")
db = opened()
put(6)
phase("end")
"""


def live(path: Path, *strace: str) -> list[str]:
    """Live the life above under strace; what it said, and, if it did not reach its end, what it complained of.

    A life that begins with nothing ends before the flush: what follows is that of a store that was there.
    """
    last = "end" if path.exists() else "flush"
    done = run([sys.executable, "-B", "-c", LIFE, str(path), repr(OPTIONS), last], *strace)
    said = done.stdout.decode().splitlines()
    return said if said[-1:] == ["phase end"] else [*said, *done.stderr.decode().splitlines()]


def expected(said: list[str]) -> tuple[dict[bytes, bytes], list[dict[bytes, bytes]]]:
    """What must be there, and what may be there beside it (each wholly or not at all)."""
    sure: dict[bytes, bytes] = {}
    acked = {int(line.split()[1]) for line in said if line.startswith("acked")}
    begun = {int(line.split()[1]) for line in said if line.startswith("begin")}
    begun -= {
        int(n) for n in (line.split()[1] for line in said if line.startswith("refused")) if n[-1].isdigit()
    }
    for n in sorted(n for n in acked if n > 0):
        size = 12_000 if n in (3, 4) else 10
        sure |= {b"%d-%d" % (n, part): b"%d" % n * size for part in range(3)}
    if -1 in acked:
        sure.pop(b"1-0", None)
    maybe = [dict(sure)]
    for n in begun - acked:
        if n == -1:
            maybe.append({k: v for k, v in sure.items() if k != b"1-0"})
        else:
            size = 12_000 if n in (3, 4) else 10
            maybe.append({**sure, **{b"%d-%d" % (n, part): b"%d" % n * size for part in range(3)}})
    return sure, maybe


def check_survivor(path: Path, said: list[str], where: str) -> None:
    """The store opens without help, holds every acknowledged write, and works."""
    sure, maybe = expected(said)
    with kvrep.open(path, **OPTIONS) as db:  # type: ignore[arg-type]
        found = dict(db.scan())
        assert found in maybe, f"{where}: {sorted(found)} instead of {sorted(sure)}"
        db.put(b"after", b"1")
        db.flush()
        tree = db._node.engine.tree
        assert tree.digest("default") == (tree.state.digests["default"], tree.state.counts["default"])
    with kvrep.open(path, **OPTIONS) as db:  # type: ignore[arg-type]
        assert dict(db.scan()) == {**found, b"after": b"1"}


def points(path: Path) -> list[Point]:
    """Each call of an undisturbed life."""
    trace = path.parent / "trace"
    said = live(path, "-o", str(trace), "-e", "trace=" + ",".join(DISK_CALLS))
    assert said[-1] == "phase end"
    assert not any(line.startswith(("failed", "refused", "lost")) for line in said)
    found = points_of(trace)
    assert {"pwritev2", "fsync", "rename", "mkdir"} <= {name for name, _ in found}
    return found


def beginning(folder: Path, begin: str) -> Callable[[str], Path]:
    """Where lives begin: with nothing, or with a store, so that the main thread's calls of a creation do not stand
    before the others'."""
    start = folder / "start"
    if begin == "store":
        kvrep.open(start, **OPTIONS).close()  # type: ignore[arg-type]

    def place(name: str) -> Path:
        path = folder / name
        if begin == "store":
            shutil.copytree(start, path, ignore=shutil.ignore_patterns("lock.mdb"))
        return path

    return place


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("begin", ["nothing", "store"])
def test_killed_before_every_call_that_changes_the_disk(memory_path: Path, begin: str) -> None:
    """Whatever call kill -9 precedes, every acknowledged write is there afterwards and every other is whole."""
    place = beginning(memory_path, begin)

    def killed(point: Point) -> str:
        path = place("{}-{}".format(*point))
        said = live(path, *strike(point, "signal=SIGKILL"))
        check_survivor(path, said, f"{point} after {said[-1:]}")
        shutil.rmtree(path)
        return [line for line in said if line.startswith("phase")][-1]

    with ThreadPoolExecutor(2) as pool:
        phases = Counter(pool.map(killed, points(place("undisturbed"))))
    wanted = ["first write", "write", "flush", "roll", "delete", "trim", "close", "open"]
    for phase in wanted if begin == "store" else ["creation", *wanted[:2]]:
        assert phases[f"phase {phase}"], f"nothing was killed in phase {phase}: {phases}"


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("begin", ["nothing", "store"])
@pytest.mark.parametrize("stride", [pytest.param(1, marks=[pytest.mark.prove, pytest.mark.timeout(1200)]), 6])
def test_an_error_at_every_call_that_changes_the_disk(
    memory_path: Path, begin: str, error: str, stride: int
) -> None:
    """Whatever call fails: no other error than a typed one comes out, nothing hangs, reads go on, what was refused is
    absent, and the next open finds every acknowledged write."""
    place = beginning(memory_path, begin)

    def failed(point: Point) -> set[str]:
        path = place("{}-{}".format(*point))
        said = live(path, *strike(point, f"error={error}"))
        assert said[-1] == "phase end", f"{error} at {point}: {said[-30:]}"
        assert not any(line.startswith("lost") for line in said), f"{error} at {point}: {said}"
        check_survivor(path, said, f"{error} at {point}: {said}")
        shutil.rmtree(path)
        return {line.split()[-1] for line in said if line.startswith(("failed", "refused"))}

    with ThreadPoolExecutor(2) as pool:
        found = points(place("undisturbed"))
        chosen = {
            *found[::stride],
            *(p for p in found if p[0] == "pwrite64"),
        }  # among these are LMDB's commits
        outcomes = list(pool.map(failed, sorted(chosen)))
    errors = set().union(*outcomes)
    assert errors & {"StorageFailed", "StorageFull", "OpenError"}, errors
