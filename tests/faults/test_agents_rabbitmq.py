"""Agents over a real RabbitMQ into a real PostgreSQL: broker and publisher are killed, and nothing is lost."""

from __future__ import annotations

import random
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import brokers
from kvrep.sinks.agent import Agent
from kvrep.sinks.broker import BrokerSource
from kvrep.sinks.cursor import FileCursor
from kvrep.sinks.memory import MemorySink
from kvrep.sinks.publication import Publication
from kvrep.sinks.upstream import Local
from tests.agent_kit import content, copy_of, wait_until
from tests.cli_kit import command
from tests.faults.test_agents_postgres import Writer, run_until_killed
from tests.postgres_kit import PostgresServer, guarded, need_postgres
from tests.rabbit_kit import RabbitServer, need_rabbitmq
from tests.scenarios.test_agents import MemoryView

need_postgres()
need_rabbitmq()

import pika  # noqa: E402

from kvrep.sinks.postgres import PostgresSink  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    """A RabbitMQ of this module's own, since it is killed."""
    with tempfile.TemporaryDirectory(prefix="kvrep-rabbitmq-") as folder:
        server = RabbitServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def test_a_broker_killed_and_started_again_in_the_middle(
    tmp_path: Path,
    rabbit: RabbitServer,
    shared_postgres: PostgresServer,
) -> None:
    """SIGKILL of RabbitMQ under load: nothing is lost or goes backwards, transactions stay whole in the tables."""
    url = shared_postgres.new_url()
    guarded(url)
    with kvrep.open(tmp_path / "a") as db:
        cursor = FileCursor(tmp_path / "cursor")
        publication = Publication(
            Local(db), brokers.connect(rabbit.url("killed")), cursor, mark_interval_s=0.5
        )
        source = BrokerSource(brokers.connect(rabbit.url("killed")), gap_wait_s=0.5, ask_interval_s=1.0)
        with publication.start(), Agent(source, PostgresSink(url), batch_changes=50) as agent:
            with Writer(db) as writer:
                writer.allow(1000)
                wait_until(lambda: agent.status().commits > 3, "it applies")
                rabbit.kill()
                writer.allow(1000)
                for one in (publication, agent):
                    wait_until(lambda one=one: one.status().state == "waiting", "it notices")  # type: ignore[misc]
                    assert str(rabbit.port) in one.status().problem
                    assert one.status().backlog != 0
                rabbit.start()
                before = agent.status().commits
                wait_until(lambda: agent.status().commits > before + 3, "it goes on", 60)
                wait_until(lambda: int(db.get(b"total", b"0")) == 2000, "all is written")
            agent.wait_for(db.put(b"end", b"1"), 60)
            status = agent.status()
        assert copy_of(PostgresSink(url)) == content(db)
    assert status.dead_letters == 0
    assert status.consistent


def test_an_agent_killed_at_any_point_applies_everything_once(
    tmp_path: Path,
    shared_rabbitmq: RabbitServer,
    shared_postgres: PostgresServer,
) -> None:
    """SIGKILL after so many commits, five times: the queue brings it again, and everything takes effect once."""
    chance = random.Random(9)
    url, queue = shared_postgres.new_url(), shared_rabbitmq.url("agent-killed")
    guarded(url)
    with kvrep.open(tmp_path / "a") as db:
        publication = Publication(Local(db), queue, FileCursor(tmp_path / "place"), mark_interval_s=0.5)
        with publication.start():
            with Writer(db) as writer:
                for commits in (0, *(chance.randrange(1, 60) for _ in range(4))):
                    run_until_killed(queue, url, commits, writer)
            source = BrokerSource(brokers.connect(queue), gap_wait_s=0.5, ask_interval_s=1.0)
            with Agent(source, PostgresSink(url)) as agent:
                agent.wait_for(db.put(b"end", b"1"), 60)
                status = agent.status()
            assert (status.snapshots, publication.status().snapshots) == (0, 1)
            assert status.dead_letters == 0
            assert status.consistent
        assert copy_of(PostgresSink(url)) == content(db)


def test_a_publisher_killed_at_any_point(
    tmp_path: Path,
    shared_rabbitmq: RabbitServer,
) -> None:
    """SIGKILL of the publishing process, three times under load: what it sends again is dropped, nothing is missing."""
    chance = random.Random(7)
    sink = MemorySink()
    url = shared_rabbitmq.url("publisher-killed")
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as db:
        source = BrokerSource(brokers.connect(url), gap_wait_s=0.5, ask_interval_s=1.0)
        with Agent(source, sink, batch_changes=50) as agent:
            with Writer(db) as writer:
                for _ in range(3):
                    writer.allow(500)
                    child = _publish(db.address, url, tmp_path)
                    before = agent.status().applied
                    enough = before + 1 + chance.randrange(50)  # there are 51 keys at the least
                    wait_until(lambda enough=enough: agent.status().applied >= enough, "events arrive")  # type: ignore[misc]
                    child.kill()
                    child.communicate(timeout=10)
            child = _publish(db.address, url, tmp_path)
            try:
                agent.wait_for(db.put(b"end", b"1"), 60)
            finally:
                child.kill()
                child.communicate(timeout=10)
            assert agent.status().consistent
        assert copy_of(MemoryView(sink)) == content(db)


def _publish(address: str, url: str, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    state = folder / "place"
    return subprocess.Popen(
        command("agent", "--from", address, "--to", url, "--state", state, "--log-level", "error", *flags),
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("form", ["binary", "structured"])
def test_large_events_and_forms_by_the_command(tmp_path: Path, rabbit: RabbitServer, form: str) -> None:
    """The command publishes in either form, values above its largest message in parts; an agent makes the same copy."""
    url = rabbit.url(form)
    with kvrep.open(tmp_path / "a", listen="127.0.0.1:0") as db:
        kept = db.keyspace("kept", keep_before=True)
        kept.put(b"k", b"old")
        flags = ("--format", form, "--message-bytes", "100000", "--before")
        child = _publish(db.address, url, tmp_path, *flags)
        sink = MemorySink()
        source = BrokerSource(brokers.connect(url), gap_wait_s=0.5, ask_interval_s=1.0)
        try:
            with Agent(source, sink) as agent:
                db.put(b"large", random.Random(5).randbytes(1 << 20))
                agent.wait_for(kept.put(b"k", b"new"), 60)
                assert agent.status().consistent
                assert agent.status().dead_letters == 0
            assert copy_of(MemoryView(sink)) == content(db)
            kept.put(b"k", b"newer")
            properties = _next(rabbit, form)
        finally:
            child.kill()
            child.wait(10)
    if form == "structured":
        assert properties.content_type == "application/cloudevents+json"
    else:
        assert properties.content_type == "application/octet-stream"
        assert properties.headers["cloudEvents:type"] == "kvrep.put"
        assert properties.headers["cloudEvents:before"] == "bbmV3"


def _next(rabbit: RabbitServer, queue: str) -> Any:
    """The properties of the next event in a queue, as any program sees them; marks are passed over."""
    with pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", rabbit.port)) as connection:
        for _, properties, _ in connection.channel().consume(queue, auto_ack=True, inactivity_timeout=30):
            assert properties is not None, "nothing came"
            if properties.headers.get("ce_type") != "kvrep.mark":
                return properties
    return None


@pytest.mark.prove
def test_memory_at_a_backlog_of_large_values(tmp_path: Path, rabbit: RabbitServer) -> None:
    """300 values of 1 MiB wait, and neither process of the way into a database needs 200 MB."""
    url, copy = rabbit.url("large"), tmp_path / "copy.db"
    with kvrep.open(tmp_path / "a", listen="127.0.0.1:0") as db:
        for i in range(300):
            db.put(b"%d" % i, random.Random(i).randbytes(1 << 20))
        db.put(b"end", b"1")
        brokers.connect(url).publisher().close()  # makes the queue
        publishing = _publish(db.address, url, tmp_path)
        try:
            with pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", rabbit.port)) as connection:
                channel = connection.channel()
                wait_until(lambda: _waiting(channel, "large") >= 302, "all is in the queue", 100)
            assert _peak_mb(publishing.pid) < 200
        finally:
            publishing.kill()
            publishing.wait(10)
        applying = subprocess.Popen(
            command("agent", "--from", url, "--to", f"sqlite:{copy}", "--log-level", "error"),
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: len(_rows(copy)) == 301, "all is applied", 100)
            assert _peak_mb(applying.pid) < 200
        finally:
            applying.kill()
            applying.wait(10)
        assert sorted(_rows(copy)) == sorted(key for key, _ in db.scan())


def _waiting(channel: Any, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).method.message_count)


def _peak_mb(pid: int) -> float:
    """The largest resident set of a process so far."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def _rows(copy: Path) -> list[bytes]:
    """The keys in a copy; none while it is not whole."""
    with closing(sqlite3.connect(copy, timeout=10)) as connection:
        try:
            return [key for (key,) in connection.execute('SELECT key FROM "default"')]
        except sqlite3.OperationalError:
            return []


def test_wrong_credentials_and_addresses_of_a_broker_are_named(tmp_path: Path, rabbit: RabbitServer) -> None:
    """Both directions raise at once, and say what to fix."""
    with kvrep.open(tmp_path / "a") as db:
        for address, kind in (
            (rabbit.url("x", user="guest:wrong"), kvrep.AuthenticationFailed),
            (rabbit.url("x").replace(f":{rabbit.port}", ":1"), kvrep.PeerUnavailable),
        ):
            with pytest.raises(kind):
                Publication(Local(db), brokers.connect(address), FileCursor(tmp_path / "c")).start()
            with pytest.raises(kind):
                Agent(BrokerSource(brokers.connect(address)), MemorySink()).start()


@pytest.mark.slow
def test_the_example_loses_nothing_that_was_acknowledged() -> None:
    """examples/disaster_recovery runs in one command, and its count of what is missing is zero."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.disaster_recovery", "--orders", "60"],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"missing_at_the_far_store": 0' in done.stdout
    assert '"missing_in_postgresql": 0' in done.stdout
