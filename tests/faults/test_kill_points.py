"""kill -9 before every system call that changes the disk, in a life of a store from creation to reopening."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvrep

STRACE = shutil.which("strace")
CALLS = (
    "pwrite64", "pwritev", "pwritev2", "fdatasync", "fsync", "rename", "unlink", "ftruncate", "truncate",
    "fallocate", "mkdir",
)  # fmt: skip
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

def put(db, n, size=10):
    say(f"begin {n}")
    with db.batch() as batch:
        for part in range(3):
            batch.put(b"%d-%d" % (n, part), b"%d" % n * size)
    say(f"acked {n}")

say("phase creation")
db = kvrep.open(sys.argv[1], **options)
say("phase first write")
put(db, 1)
say("phase write")
put(db, 2)
say("phase flush")
db.flush()
say("phase roll")
put(db, 3, 12_000)
put(db, 4, 12_000)
say("phase delete")
say("begin -1")
db.delete(b"1-0")
say("acked -1")
say("phase trim")
db.flush()
put(db, 5)
say("phase close")
db.close()
say("phase open")
db = kvrep.open(sys.argv[1], **options)
put(db, 6)
say("phase end")
os._exit(0)
"""


def live(path: Path, *strace: str) -> list[str]:
    """Live the life above under strace; what it said until it ended."""
    assert STRACE is not None
    done = subprocess.run(
        [STRACE, "-f", "-qq", *strace, sys.executable, "-c", LIFE, str(path), repr(OPTIONS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=60,
        check=False,
    )
    return done.stdout.decode().splitlines()


def expected(said: list[str]) -> tuple[dict[bytes, bytes], list[dict[bytes, bytes]]]:
    """What must be there, and what may be there beside it (each wholly or not at all)."""
    sure: dict[bytes, bytes] = {}
    acked = {int(line.split()[1]) for line in said if line.startswith("acked")}
    begun = {int(line.split()[1]) for line in said if line.startswith("begin")}
    for n in sorted(n for n in acked if n > 0):
        size = 12_000 if n in (3, 4) else 10
        sure |= {b"%d-%d" % (n, part): b"%d" % n * size for part in range(3)}
    if -1 in acked:
        del sure[b"1-0"]
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


def points_of(path: Path) -> list[tuple[str, int]]:
    """Each call of an undisturbed life, as strace counts them: by name, for each thread on its own."""
    trace = path.parent / "trace"
    said = live(path, "-o", str(trace), "-e", "trace=" + ",".join(CALLS))
    assert said[-1] == "phase end"
    calls = Counter(re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE))
    most: dict[str, int] = {}
    for (_, name), count in calls.items():
        most[name] = max(count, most.get(name, 0))
    assert {"pwritev2", "fdatasync", "fsync", "rename", "unlink"} <= set(most)
    return [(name, n) for name, count in most.items() for n in range(1, count + 1)]


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("begin", ["nothing", "store"])
def test_killed_before_every_call_that_changes_the_disk(memory_path: Path, begin: str) -> None:
    """Whatever call kill -9 precedes, every acknowledged write is there afterwards and every other is whole."""
    start = memory_path / "start"
    if begin == "store":  # so that the main thread's calls of a creation do not stand before the others'
        kvrep.open(start, **OPTIONS).close()  # type: ignore[arg-type]

    def place(name: str) -> Path:
        path = memory_path / name
        if begin == "store":
            shutil.copytree(start, path, ignore=shutil.ignore_patterns("lock.mdb"))
        return path

    def run(point: tuple[str, int]) -> str:
        name, n = point
        path = place(f"{name}-{n}")
        inject = f"inject={name}:signal=SIGKILL:when={n}"
        said = live(path, "-o", "/dev/null", "-e", f"trace={name}", "-e", inject)
        check_survivor(path, said, f"{name} {n} after {said[-1:]}")
        shutil.rmtree(path)
        return [line for line in said if line.startswith("phase")][-1]

    points = points_of(place("undisturbed"))
    with ThreadPoolExecutor(2) as pool:
        phases = Counter(pool.map(run, points))
    wanted = ["first write", "write", "flush", "roll", "delete", "trim", "close", "open"]
    for phase in wanted if begin == "store" else ["creation", *wanted[:2]]:
        assert phases[f"phase {phase}"], f"nothing was killed in phase {phase}: {phases}"
