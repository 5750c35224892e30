"""``kvrep drill``: measures what would be lost, finds what is wrong, and touches nothing."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import brokers
from kvrep.brokers.memory import MemoryBrokers, MemoryServer
from kvrep.runtime.service import NodeService
from kvrep.sinks import drilling
from kvrep.sinks.agent import Agent
from kvrep.sinks.drilling import drill
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.sqlite import SqliteSink
from kvrep.sinks.upstream import Local
from tests.agent_kit import agent_of, content, wait_current, wait_until
from tests.cli_kit import run_here, run_process
from tests.postgres_kit import PostgresServer
from tests.rabbit_kit import RabbitServer
from tests.relay_kit import publishing
from tests.replication_kit import FAST
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
        assert done.code == 3
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


# -- a follower: what it holds itself -------------------------------------------------------------------


@contextmanager
def behind_a_broker(folder: Path, url: str) -> Iterator[tuple[kvrep.Store, kvrep.Store]]:
    """A primary, and a far store that has 200 of its keys through a broker."""
    with kvrep.open(folder / "near", name="near", listen="127.0.0.1:0", **FAST) as near:
        with (
            publishing(near, url),
            kvrep.open(folder / "far", name="far", listen="127.0.0.1:0", follow=url, **FAST) as far,
        ):
            for i in range(200):
                position = near.put(b"%d" % i, b"v%d" % i)
            far.wait_for(position, 30)
            yield near, far


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> MemoryServer:
    """A broker in memory that every store and relay of the test finds."""
    made = MemoryBrokers(seed=7)
    monkeypatch.setattr(brokers, "connect", made.connect)
    return made["site"]


def known_to(store: kvrep.Store) -> list[tuple[str, str]]:
    """Whom a primary feeds, or keeps log for."""
    return [(f.name, f.store_id) for f in store.status().followers]


def test_a_follower_behind_a_broker(tmp_path: Path, server: MemoryServer) -> None:
    """Its own copy is drilled: what had arrived there, and not what the primary has besides; nobody is touched."""
    with behind_a_broker(tmp_path, "memory://site/orders") as (near, far):
        before, arrived, held = near.status(), far.status().position, content(far)
        server.stop()
        for i in range(3):
            last = near.put(b"late-%d" % i, b"x")
        report = drill(near.address, far.address, sample=50, folder=str(tmp_path))
        assert report.ok, report.checks
        assert report.position == report.copied == arrived
        assert report.source_position == last
        assert (report.missing_records, report.keys, report.sampled) == (3, 200, 50)
        assert report.rpo_s is not None
        assert 0 < report.rpo_s < 60
        assert 0 < report.rto_s < 60
        assert content(far) == held
        assert (far.status().role, far.status().epoch) == ("follower", before.epoch)
        assert known_to(near) == [(f.name, f.store_id) for f in before.followers]
        server.start()
        far.wait_for(near.put(b"goes", b"on"), 30)
        assert content(near) == content(far)
    assert not list(tmp_path.glob("kvrep-drill-*"))
    assert not (tmp_path / "far" / "spool").exists()


def test_a_follower_behind_rabbitmq_on_the_command_line(
    tmp_path: Path,
    shared_rabbitmq: RabbitServer,
    capfdbinary: Any,
) -> None:
    """The same through a real broker, by the command: passed, nothing lost, RPO and RTO in JSON and in words."""
    with behind_a_broker(tmp_path, shared_rabbitmq.url("drilled")) as (near, far):
        flags = ["drill", "--from", near.address, "--to", far.address, "--rpo-max-s", 60, "--rto-max-s", 60]
        done = run_process(*flags, "--json")
        assert done.code == 0, done.text + done.err
        assert done.err == ""
        assert done.json["position"] == done.json["source_position"]
        assert (done.json["rpo_s"], done.json["missing_records"]) == (0.0, 0)
        text = run_here(capfdbinary, *flags).text
        assert "drill passed" in text
        assert "would be lost: nothing" in text
        assert far.status().role == "follower"


def test_the_source_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch copy of an ordinary follower is no follower of the primary: no stream, no slot, no log kept."""
    streams: list[str] = []
    with sites(tmp_path) as (near, far):
        before, open_session = known_to(near), NodeService.open_session
        monkeypatch.setattr(
            NodeService,
            "open_session",
            lambda self, peer: (streams.append(peer), open_session(self, peer))[1],
        )
        assert drill(near.address, far.address).ok
        assert known_to(near) == before
        assert streams == []
    assert "drill" not in (tmp_path / "near" / "SLOTS").read_text()


def test_a_follower_that_differs_is_found(tmp_path: Path) -> None:
    """A value that rotted on the follower's disk fails the drill, though the primary's copy is whole."""
    with sites(tmp_path) as (near, far):
        far.flush()
        env = far._node.engine.tree.env
        with env.begin(write=True) as txn:
            assert txn.replace(b"77", b"rotten", db=far._node.engine.tree.handle("default")) == b"v77"
        report = drill(near.address, far.address, sample=1)
    assert not report.ok
    assert [check.name for check in report.checks if not check.ok] == ["digests"]


def test_what_cannot_be_drilled(tmp_path: Path, capfdbinary: Any) -> None:
    """The primary itself, a broker, and a follower to which nothing has come, are named; nothing is measured."""
    with sites(tmp_path) as (near, _):
        done = run_here(capfdbinary, "drill", "--from", near.address, "--to", near.address)
        assert (done.code, "is the primary" in done.err) == (2, True), done.err
        done = run_here(capfdbinary, "drill", "--from", near.address, "--to", "amqp://localhost/?topic=t")
        assert (done.code, "a broker keeps no copy" in done.err) == (2, True), done.err
        with kvrep.open(tmp_path / "new", listen="127.0.0.1:0", follow="127.0.0.1:1", **FAST) as new:
            done = run_here(capfdbinary, "drill", "--from", near.address, "--to", new.address)
            assert (done.code, "holds nothing yet" in done.err) == (5, True), done.err


def test_a_history_that_the_source_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    """A secondary that is ahead of the source has failed the drill, and what would be lost is not known."""
    monkeypatch.setattr(drilling, "CALL_S", 0.2)
    with sites(tmp_path) as (near, _):
        sink = copied(near, tmp_path / "copy.db")
        place = sink.open()
        epoch, offset, index = place.sequence
        sink.commit(replace(place, sequence=(epoch, offset + 1000, index)))
        sink.close()
        flags = ["drill", "--from", near.address, "--to", f"sqlite:{tmp_path / 'copy.db'}", "--rpo-max-s", 60]
        done = run_here(capfdbinary, *flags, "--json")
        assert done.code == 6
        failed = [check["name"] for check in done.json["checks"] if not check["ok"]]
        assert failed == ["history", "RPO"]
        assert done.json["rpo_s"] is None
        assert "would be lost: not known" in run_here(capfdbinary, *flags).text


def test_a_source_whose_log_does_not_reach_back(tmp_path: Path) -> None:
    """Where the source has trimmed what follows the secondary's position, the comparison has failed."""
    small = {"log_file_bytes": 1 << 16, "retention_bytes": 0, "flush_interval_s": 0.1}
    with kvrep.open(tmp_path / "near", name="near", listen="127.0.0.1:0", **small) as near:
        near.put(b"a", b"1")
        copied(near, tmp_path / "copy.db")

        def trimmed() -> bool:
            near.put(b"b", b"x" * 30_000)
            near.flush()
            return near.status().first_offset > 10

        wait_until(trimmed, "the log is trimmed")
        report = drill(near.address, f"sqlite:{tmp_path / 'copy.db'}")
    assert [check.name for check in report.checks if not check.ok] == ["history"]


def looked_at(to: str, words: str, folder: Path, capfdbinary: Any) -> None:
    """Every command that looks after a secondary names what is wrong with the address."""
    with kvrep.open(folder / "a", listen="127.0.0.1:0") as db:
        for command in (
            ["agent", "status"], ["agent", "dead-letters"], ["agent", "retry", "all"], ["agent", "discard", 1],
            ["drill", "--from", db.address],
        ):  # fmt: skip
            done = run_here(capfdbinary, *command, "--to", to)
            assert (done.code, words in done.err) == (2, True), done.err


def test_a_schema_of_nobody(
    tmp_path: Path,
    shared_postgres: PostgresServer,
    capfdbinary: Any,
) -> None:
    """A mistyped schema is named, with those that hold a copy, and is not made."""
    import psycopg

    with Agent(f"{used_store(tmp_path / 'used')}", shared_postgres.url("a_used")) as agent:
        wait_until(lambda: agent.status().consistent, "a copy")
    looked_at(shared_postgres.url("typo"), "in schema 'typo'", tmp_path, capfdbinary)
    looked_at(shared_postgres.url("typo"), "a_used", tmp_path, capfdbinary)
    with psycopg.connect(shared_postgres.url().partition("?")[0]) as connection:
        assert connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'typo'").fetchone() is None


def used_store(path: Path) -> Path:
    """A store with one key that nobody has open."""
    with kvrep.open(path) as db:
        db.put(b"a", b"1")
    return path


def test_a_database_of_others(tmp_path: Path, capfdbinary: Any) -> None:
    """A SQLite file of another program is named as such, and stays as it is, its mode included."""
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE t (x)")
    looked_at(f"sqlite:{tmp_path / 'other.db'}", "there is no secondary at", tmp_path, capfdbinary)
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("t",)]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_store_of_others(tmp_path: Path, capfdbinary: Any) -> None:
    """A store that no agent fills is named as such, and stays as it is."""
    used_store(tmp_path / "other")
    looked_at(f"kvrep:{tmp_path / 'other'}", "there is no secondary at", tmp_path, capfdbinary)
    with kvrep.open(tmp_path / "other") as other:
        assert content(other) == {"default": {b"a": b"1"}}
