"""Publishing as a library: the log for far stores, and changes as events, by addresses and with functions."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import kvrep
from kvrep import brokers
from kvrep.brokers.memory import MemoryBrokers
from kvrep.sinks.broker import BrokerSource
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.memory import MemorySink
from kvrep.sinks.upstream import Local
from tests.agent_kit import agent_of, content, copy_of, wait_until
from tests.broker_kit import make_site
from tests.kafka_kit import KafkaCluster
from tests.rabbit_kit import RabbitServer
from tests.relay_kit import far
from tests.replication_kit import FAST, same
from tests.scenarios.test_agents import MemoryView

URL = "memory://site/orders"
WAIT_S = 30.0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryBrokers:
    """Brokers in memory that every address of the test leads to."""
    made = MemoryBrokers(seed=7)
    monkeypatch.setattr(brokers, "connect", made.connect)
    return made


def test_the_log_as_a_library(memory: MemoryBrokers, tmp_path: Path) -> None:
    """A far store follows what a LogPublication publishes; with its state file the next one goes on behind it."""
    with kvrep.open(tmp_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        options = {"name": "far", "state": tmp_path / "state"}
        with far(tmp_path / "f", URL, **FAST) as f:
            for number in range(2):
                with kvrep.LogPublication([primary.address], URL, **options) as log:
                    position = primary.put(b"k", b"%d" % number)
                    log.wait_for(position, WAIT_S)
                    assert log.published >= position
                    assert log.status().state == "publishing"
                    f.wait_for(position, WAIT_S)
                log.close()
            same(primary, f)


def test_a_broker_that_confirms_nothing(memory: MemoryBrokers, tmp_path: Path) -> None:
    """Who waits for a confirm that does not come is told so at the deadline, or when the publication is closed."""
    with kvrep.open(tmp_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with kvrep.LogPublication([primary.address], URL) as log:
            log.wait_for(primary.put(b"a", b"1"), WAIT_S)
            memory["site"].block()
            last = primary.put(b"b", b"2")
            with pytest.raises(kvrep.StaleRead, match="not yet"):
                log.wait_for(last, 0.05)
            memory["site"].unblock()
            log.wait_for(last, WAIT_S)
        with pytest.raises(kvrep.ClosedError):
            log.wait_for(primary.put(b"c", b"3"), WAIT_S)
        with pytest.raises(kvrep.ClosedError):
            log.start()
    with pytest.raises(kvrep.ClosedError, match="not started"):
        kvrep.LogPublication(["127.0.0.1:1"], URL).status()


def test_what_ends_the_log_is_raised(memory: MemoryBrokers, tmp_path: Path) -> None:
    """A state file of another store is nothing that passes: the publication ends, and says why."""
    state = tmp_path / "state"
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as a:
        with kvrep.LogPublication([a.address], URL, state=state) as log:
            log.wait_for(a.put(b"a", b"1"), WAIT_S)
    with kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", **FAST) as b:
        with kvrep.LogPublication([b.address], URL, state=state) as log:
            assert log.wait_over(WAIT_S)
            with pytest.raises(kvrep.LineageMismatch):
                log.raise_error()
            with pytest.raises(kvrep.LineageMismatch):
                log.wait_for(kvrep.Position(1 << 40, 1), WAIT_S)


@pytest.mark.parametrize("kind", ["rabbitmq-queue", "rabbitmq-stream", "kafka"])
def test_large_values_over_every_broker(
    kind: str,
    request: pytest.FixtureRequest,
    shared_rabbitmq: RabbitServer,
    shared_kafka: KafkaCluster,
    tmp_path: Path,
) -> None:
    """A value above what a broker takes at once, among small ones, arrives whole and in its place on each of them."""
    site = make_site(kind, request)
    topic, sink = site.topic(), MemorySink()
    with kvrep.open(tmp_path / "p") as db:
        db.put(b"first", b"1")
        options = {"feed": "events", "mark_interval_s": 0.2, "message_bytes_max": 900_000}
        with kvrep.Publication(db, site.connect(topic), **options):
            source = BrokerSource(site.connect(topic), gap_wait_s=0.5, ask_interval_s=1.0)
            with kvrep.Agent(source, sink) as agent:
                for number in range(3):  # librdkafka's mock cluster keeps 5 MB, so one by one
                    db.put(b"large", bytes([number]) * (3 << 20))
                    agent.wait_for(db.put(b"small", b"%d" % number), WAIT_S)
                agent.wait_for(db.put(b"last", b"1"), WAIT_S)
                wait_until(lambda: agent.status().consistent, "it is whole")
                assert agent.status().dead_letters == 0
        assert copy_of(MemoryView(sink)) == content(db)
    site.close()


def hidden(change: kvrep.Change) -> kvrep.Change | None:
    """Leaves out what is secret, and hides the values of users."""
    if change.key.startswith(b"secret/"):
        return None
    return change._replace(value=b"(hidden)") if change.keyspace == "users" else change


def test_a_function_rewrites_what_is_published(memory: MemoryBrokers, tmp_path: Path) -> None:
    """A store and an address are enough for a Publication; with transform= receivers see what the function gives."""
    with kvrep.open(tmp_path / "p") as db:
        users = db.keyspace("users")
        users.put(b"ada", b"1815")
        with kvrep.Publication(db, URL, feed="events", transform=hidden, mark_interval_s=0.1):
            sink = MemorySink()
            source = BrokerSource(memory.connect(URL), gap_wait_s=0.05, ask_interval_s=0.2)
            with kvrep.Agent(source, sink) as agent:
                db.put(b"secret/1", b"x")
                users.put(b"bob", b"1900")
                agent.wait_for(db.put(b"order", b"1"), WAIT_S)
                wait_until(lambda: agent.status().consistent, "it is whole")
        assert db.feed("events").token, "the place is in the feed of the store"
    assert copy_of(MemoryView(sink)) == {
        "default": {b"order": b"1"},
        "users": {b"ada": b"(hidden)", b"bob": b"(hidden)"},
    }


def test_a_function_rewrites_what_an_agent_applies(tmp_path: Path) -> None:
    """The same between a store in this process and a secondary, without a broker."""
    sink = MemorySink()
    with kvrep.open(tmp_path / "p") as db:
        db.keyspace("users").put(b"ada", b"1815")
        with kvrep.Agent(FeedSource(Local(db), transform=hidden), sink) as agent:
            db.put(b"secret/1", b"x")
            agent.wait_for(db.put(b"order", b"1"), WAIT_S)
            wait_until(lambda: agent.status().consistent, "it is whole")
    assert copy_of(MemoryView(sink)) == {"default": {b"order": b"1"}, "users": {b"ada": b"(hidden)"}}


def test_a_running_node_cannot_run_a_function(tmp_path: Path) -> None:
    """Over the network there is nobody to call it: that is said, not passed over."""
    with kvrep.open(tmp_path / "p", listen="127.0.0.1:0") as db:
        from kvrep.sinks.upstream import Remote

        with kvrep.Agent(FeedSource(Remote(db.address), transform=hidden), MemorySink(), wait=True) as agent:
            wait_until(lambda: agent.status().state == "failed", "it has ended")
            with pytest.raises(TypeError, match="runs where the store is open"):
                agent.raise_error()


def test_both_say_in_the_log_how_they_are(
    memory: MemoryBrokers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At every interval a line says where an agent and a publication are, how late, and what is left."""
    caplog.set_level(logging.INFO, "kvrep.agent")

    def line(who: str) -> bool:
        return any(
            text.startswith(who) and "delay p50 0." in text and "p99 0." in text and "backlog 0" in text
            for text in map(logging.LogRecord.getMessage, caplog.records)
        )

    with kvrep.open(tmp_path / "p") as db:
        options = {"feed": "events", "name": "line", "log_interval_s": 0.01}
        with kvrep.Publication(db, URL, **options), agent_of(db, MemorySink(), log_interval_s=0.01) as agent:
            agent.wait_for(db.put(b"a", b"1"), WAIT_S)
            wait_until(lambda: line("agent agent: current at "), "the agent's line")
            wait_until(lambda: line("publication line: current at "), "the publication's line")
