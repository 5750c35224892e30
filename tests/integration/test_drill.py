"""``kvrep drill``: measures what would be lost, finds what is wrong, and touches nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.sinks.agent import Agent
from kvrep.sinks.drilling import drill
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.sqlite import SqliteSink
from kvrep.sinks.upstream import Local
from tests.agent_kit import agent_of, content, wait_current, wait_until
from tests.cli_kit import run_here
from tests.warehouse_kit import current, need_warehouse


@contextmanager
def sites(folder: Path) -> Iterator[tuple[kvrep.Store, kvrep.Store]]:
    """A primary, and a far follower without a vote, with the same 500 keys in two keyspaces."""
    with kvrep.open(folder / "near", name="near", listen="127.0.0.1:0") as near:
        with kvrep.open(
            folder / "far", name="far", listen="127.0.0.1:0", follow=near.address, voter=False
        ) as far:
            for i in range(500):
                near.submit_put(b"%d" % i, b"v%d" % i)
            far.wait_for(near.keyspace("users").put(b"ada", b"1"), 30)
            yield near, far


def copied(db: kvrep.Store, path: Path) -> SqliteSink:
    """A SQLite copy of a store, brought up to date by an agent that has ended."""
    with Agent(FeedSource(Local(db)), SqliteSink(str(path))) as agent:
        agent.wait_for(db.position, 30)
    return SqliteSink(str(path))


def test_a_follower_that_has_everything(tmp_path: Path, capfdbinary: Any) -> None:
    """Nothing would be lost; every key is verified by digests; the cluster goes on as if nothing had been."""
    with sites(tmp_path) as (near, far):
        before = near.status(), far.status()
        done = run_here(capfdbinary, "drill", "--from", near.address, "--to", far.address, "--json",
                        "--rpo-max-s", 1, "--rto-max-s", 60, "--sample", 50, "--dir", tmp_path)  # fmt: skip
        assert done.code == 0, done.text
        report = done.json
        assert report["ok"] is True
        assert report["position"] == report["source_position"] == str(before[0].position)
        assert (report["missing_records"], report["rpo_s"]) == (0, 0.0)
        assert 0 < report["rto_s"] < 60
        assert (report["keys"], report["sampled"]) == (501, 50)
        assert {check["name"] for check in report["checks"]} >= {
            "digests",
            "sample",
            "it answers",
            "RPO",
            "RTO",
        }
        after = near.status(), far.status()
        assert [s.epoch for s in before] == [s.epoch for s in after]
        assert near.status().voters == ("near",)
        assert content(near) == content(far)
        text = run_here(capfdbinary, "drill", "--from", near.address, "--to", far.address).text
        assert "drill passed" in text
        assert "would be lost: nothing" in text
    assert not list(tmp_path.glob("kvrep-drill-*"))


def test_what_would_be_lost_is_measured(tmp_path: Path, capfdbinary: Any) -> None:
    """With a database that is behind, RPO is the age of the oldest change that it lacks; limits fail the drill."""
    with sites(tmp_path) as (near, _):
        copied(near, tmp_path / "copy.db")
        at = near.position
        near.put(b"5", b"newer")
        near.put(b"new", b"1")
        report = drill(near.address, f"sqlite:{tmp_path / 'copy.db'}")
        assert report.ok, report.checks
        assert report.position == at
        assert report.missing_records == 2
        assert 0 < report.rpo_s < 60
        assert report.newest_missing_s > 0
        assert report.keys == 501
        wait_until(lambda: drill(near.address, f"sqlite:{tmp_path / 'copy.db'}").rpo_s > 0.2, "it ages")
        done = run_here(capfdbinary, "drill", "--from", near.address, "--to", f"sqlite:{tmp_path / 'copy.db'}",
                        "--rpo-max-s", 0.1)  # fmt: skip
        assert done.code == 6
        assert "drill FAILED" in done.text
        assert "at most 0.1 s wanted" in done.text


@pytest.mark.parametrize("refreshed", [True, False])
def test_of_a_warehouse(tmp_path: Path, refreshed: bool) -> None:
    """The rows of a warehouse are verified as of its place, whether or not the current state has followed."""
    need_warehouse()
    from kvrep.sinks.warehouse import WarehouseSink

    address = f"delta:{tmp_path / 'lake'}?commit_s=0&refresh_s={0 if refreshed else 3600}"
    with sites(tmp_path) as (near, _):
        with agent_of(near, WarehouseSink(address)) as agent:
            agent.wait_for(near.position)
            wait_until(lambda: len(current(tmp_path / "lake")) == 2, "the first refresh")
            near.put(b"5", b"newer")
            near.delete(b"6")
            agent.wait_for(near.position)
            if refreshed:
                wait_current(agent, near)
        report = drill(near.address, address, sample=600)
    assert report.ok, report.checks
    assert (report.keys, report.missing_records) == (500, 0)


@pytest.mark.parametrize("harm", ["changed", "removed", "added"])
def test_a_copy_that_differs_is_found(tmp_path: Path, harm: str) -> None:
    """A row changed, removed or added behind the agent's back fails the drill, also outside the sample."""
    with sites(tmp_path) as (near, _):
        sink = copied(near, tmp_path / "copy.db")
        place = sink.open()
        op = {"changed": (b"77", b"other"), "removed": (b"77", None), "added": (b"extra", b"1")}[harm]
        sink.apply([("default", *op)])
        sink.commit(place)
        sink.close()
        report = drill(near.address, f"sqlite:{tmp_path / 'copy.db'}", sample=1)
    failed = [check for check in report.checks if not check.ok]
    assert "digests" in [check.name for check in failed]
    assert "default" in failed[0].detail


def test_while_writes_go_on(tmp_path: Path) -> None:
    """Under load the keys that changed since are left out, and all others still verified."""
    with sites(tmp_path) as (near, far):
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.wait(0.002):
                number += 1
                near.put(b"%d" % (number % 40), b"w%d" % number)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            report = drill(near.address, far.address, sample=2000)
        finally:
            stop.set()
            writer.join()
    assert report.ok, report.checks
    assert 400 <= report.sampled <= 501


def test_another_store_is_refused(tmp_path: Path, capfdbinary: Any) -> None:
    """A secondary of another store is an error that names both, not a failed comparison."""
    with sites(tmp_path) as (near, _), kvrep.open(tmp_path / "x", name="x", listen="127.0.0.1:0") as other:
        other.put(b"a", b"1")
        done = run_here(capfdbinary, "drill", "--from", near.address, "--to", other.address)
        assert done.code == 7
        assert "another store" in done.err
        assert run_here(capfdbinary, "drill", "--from", "127.0.0.1:1", "--to", other.address).code == 5


@pytest.mark.parametrize("scheme", ["sqlite", "kvrep", "delta"])
def test_a_secondary_that_is_not_there(scheme: str, tmp_path: Path, capfdbinary: Any) -> None:
    """A mistyped path is refused and not made; so is a source that is no address."""
    with kvrep.open(tmp_path / "a", listen="127.0.0.1:0") as db:
        to = f"{scheme}:{tmp_path / 'typo'}"
        done = run_here(capfdbinary, "drill", "--from", db.address, "--to", to)
    assert (done.code, "there is no secondary at" in done.err) == (2, True), done.err
    assert not (tmp_path / "typo").exists()
    done = run_here(capfdbinary, "drill", "--from", "nowhere", "--to", to)
    assert (done.code, "--from takes HOST:PORT" in done.err) == (2, True), done.err
