"""kill -9 or an error at every step of a bootstrap: the old copy is live, or the new one, and it goes on by itself."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.bootstrap_kit import (
    OPTIONS,
    alike,
    follower,
    gate,
    generations,
    primary,
    receiving,
    streaming,
    trimmed,
    write,
)
from tests.replication_kit import WAIT_S, NodeProcess, processes, until
from tests.strace_kit import DISK_CALLS, STRACE, Point, points_of, run, strike

CHILD = Path(__file__).parent.parent / "bootstrap_child.py"
NOWHERE = "127.0.0.1:9"
OLD, NEW = 301, 3301
"""How many pairs the copies have."""

needs_strace = pytest.mark.skipif(STRACE is None, reason="strace is not installed")

# Of the thread that bootstraps: mkdir 2 makes the next generation, pwrite64 4 is inside of the copy,
# fdatasync 1 precedes the note of what has arrived, fsync 3 is the copy's last, fsync 4 to 6 are its
# directories', fsync 7 to 9 and rename 2 make it live, unlinkat and rmdir remove the old one.
STEPS = [
    ("mkdir", 2), ("pwrite64", 4), ("fdatasync", 1), ("fsync", 3), ("fsync", 7), ("rename", 2), ("fsync", 9),
    ("unlinkat", 2), ("rmdir", 1),
]  # fmt: skip
ERRORS = [("pwrite64", 5), ("fsync", 4), ("rename", 2)]
"""Where the default run has a call fail."""


class Cluster(NamedTuple):
    """A primary in another process, all that it holds, and the closed store of a follower it left behind."""

    node: NodeProcess
    pairs: list[tuple[bytes, bytes]]
    template: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("cluster")
    with primary(base / "a", 0, retention_bytes_max=512 << 10) as a:
        a.put(b"seen", b"old")
        write(a, OLD - 1)
        with follower(base / "b", a.address, voter=False) as b:
            alike(a, streaming(b))
        old = a.status().last_offset
        a.put(b"seen", b"new")
        write(a, NEW - OLD, seed=2)
        trimmed(a, old + 1)
        pairs = list(a.items())
    with processes() as start:
        node = start(base / "a", name="a", listen="127.0.0.1:0", **OPTIONS).ready()
        yield Cluster(node, pairs, base / "b")


def child(path: Path, source: str) -> list[str]:
    """The command of a follower that ends when it has its copy."""
    return [sys.executable, str(CHILD), str(path), source, repr({**OPTIONS, "voter": False})]


def check_strike(cluster: Cluster, path: Path, point: Point, what: str) -> int:
    """Bootstrap, with a fault at one point, and look at what is left; the exit code of the follower."""
    node = cluster.node
    shutil.copytree(cluster.template, path)
    done = run(child(path, node.address), *strike(point, what))
    with follower(path, NOWHERE, voter=False) as b:
        pairs = dict(b.items())
        assert (pairs[b"seen"], len(pairs)) in ((b"old", OLD), (b"new", NEW))
    with follower(path, node.address, voter=False) as b:
        b.wait_for(node.run("db.position"), WAIT_S)
        assert list(b.items()) == cluster.pairs
        until(lambda: b.status().verified_through > 0, what="the copy's digest")
        assert b.status().rescued == ()
    assert generations(path) == ["gen-000002"]
    assert not (path / "gen-000002" / "COPY").exists()
    return done.returncode


@needs_strace
@pytest.mark.parametrize(("call", "number"), STEPS)
def test_follower_killed(cluster: Cluster, tmp_path: Path, call: str, number: int) -> None:
    """After a kill the follower has one whole copy, reads from it without its primary, and catches up."""
    assert check_strike(cluster, tmp_path / "b", (call, number), "signal=SIGKILL") == -signal.SIGKILL


@needs_strace
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("point", ERRORS, ids=str)
def test_a_call_fails(cluster: Cluster, tmp_path: Path, point: Point, error: str) -> None:
    """After an error the follower has one whole copy as well, whether it went on by itself or ended."""
    assert check_strike(cluster, tmp_path / "b", point, f"error={error}") in (0, 1)


@needs_strace
@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["signal=SIGKILL", "error=EIO", "error=ENOSPC"])
def test_a_fault_at_every_call(cluster: Cluster, tmp_path: Path, what: str) -> None:
    """The same at every call that changes the disk, as an undisturbed follower makes them."""
    path, trace = tmp_path / "undisturbed", tmp_path / "trace"
    shutil.copytree(cluster.template, path)
    calls = ("-o", str(trace), "-e", "trace=" + ",".join(DISK_CALLS))
    assert run(child(path, cluster.node.address), *calls).returncode == 0
    points = points_of(trace)
    assert set(STEPS) <= set(points)
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(
            lambda point: check_strike(cluster, tmp_path / "{}-{}".format(*point), point, what), points
        ))  # fmt: skip
    if what == "signal=SIGKILL":
        assert codes.count(-signal.SIGKILL) > len(points) // 2
    else:
        assert set(codes) <= {0, 1}


def test_primary_killed_while_it_sends(tmp_path: Path) -> None:
    """A primary that is killed in the middle leaves no copy behind, and serves another after its start."""
    with primary(tmp_path / "a"):
        pass
    options = {**OPTIONS, "name": "a", "listen": "127.0.0.1:0"}
    with processes() as start:
        node = start(tmp_path / "a", **options).ready()
        with gate(node.address, 2 << 20) as g, follower(tmp_path / "b", g.address) as b:
            receiving(b)
            node.kill()
            assert len(list((tmp_path / "a" / "spool").iterdir())) == 1
            node = start(tmp_path / "a", **options).ready()
            assert not (tmp_path / "a" / "spool").exists()
            g.target = node.address
            g.release()
            g.cut()
            streaming(b)
            b.wait_for(node.run("db.put(b'last', b'1')"), WAIT_S)
            assert node.run("list(db.items())") == list(b.items())
