"""Agents over Kafka (librdkafka's mock cluster) into databases: kills, repeats, gaps, a cluster that stands still."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import brokers
from kvrep.sinks.addresses import sink_at
from kvrep.sinks.agent import Agent
from kvrep.sinks.broker import BrokerSource
from kvrep.sinks.cursor import FileCursor
from kvrep.sinks.publication import Publication
from kvrep.sinks.upstream import Local
from tests.agent_kit import content, copy_of, wait_until
from tests.broker_kit import WAIT_S, Site
from tests.faults.test_agents_postgres import Writer, run_until_killed
from tests.kafka_kit import KafkaCluster
from tests.postgres_kit import guarded

SECONDARIES = ["sqlite", "postgres"]


@pytest.fixture(params=SECONDARIES)
def secondary(request: Any, tmp_path: Path) -> str:
    """The address of an empty one; PostgreSQL's refuses values that do not grow."""
    if request.param == "sqlite":
        return f"sqlite:{tmp_path / 'copy.db'}"
    url: str = request.getfixturevalue("shared_postgres").new_url()
    guarded(url)
    return url


def publication_of(db: kvrep.Store, topic: str, cursor: Path, **options: Any) -> Publication:
    return Publication(Local(db), topic, FileCursor(cursor), mark_interval_s=0.2, **options)


def agent_of(topic: str, secondary: str, **options: Any) -> Agent:
    source = BrokerSource(brokers.connect(topic), gap_wait_s=0.2, ask_interval_s=0.5)
    return Agent(source, secondary, **options)


def test_an_agent_killed_at_any_point_applies_everything_once(
    tmp_path: Path,
    shared_kafka: KafkaCluster,
    secondary: str,
) -> None:
    """SIGKILL after so many commits, four times: nothing is missing, and everything takes effect once."""
    chance, topic = random.Random(11), shared_kafka.url(Site.topic())
    with kvrep.open(tmp_path / "a") as db:
        with publication_of(db, topic, tmp_path / "place").start() as publication:
            with Writer(db) as writer:
                for commits in (0, *(chance.randrange(1, 30) for _ in range(3))):
                    run_until_killed(topic, secondary, commits, writer)
            with agent_of(topic, secondary) as agent:
                agent.wait_for(db.put(b"end", b"1"), 60)
                status = agent.status()
            assert publication.status().snapshots == 1
        assert (status.snapshots, status.dead_letters, status.consistent) == (0, 0, True)
        assert copy_of(sink_at(secondary)) == content(db)


@pytest.mark.parametrize("secondary", ["sqlite"], indirect=True)
def test_what_is_published_again_takes_effect_once(
    tmp_path: Path,
    shared_kafka: KafkaCluster,
    secondary: str,
) -> None:
    """A publication that goes on from an older place sends repeats; the agent drops and counts them."""
    topic, cursor, older = shared_kafka.url(Site.topic()), tmp_path / "place", tmp_path / "older"
    with kvrep.open(tmp_path / "a") as db:
        db.put(b"k", b"000")
        with publication_of(db, topic, cursor).start():
            wait_until(cursor.exists, "the place is kept")
        shutil.copy(cursor, older)
        with publication_of(db, topic, cursor).start():
            for i in range(1, 100):
                last = db.put(b"k", b"%03d" % i)
            with agent_of(topic, secondary) as agent:
                agent.wait_for(last, 60)
        with publication_of(db, topic, older).start(), agent_of(topic, secondary) as agent:
            agent.wait_for(db.put(b"k", b"100"), 60)
            status = agent.status()
        assert status.repeats >= 99
        assert (status.applied, status.snapshots, status.asked, status.dead_letters) == (1, 0, 0, 0)
    assert copy_of(sink_at(secondary)) == {"default": {b"k": b"100"}}


def test_what_is_missing_is_asked_for(
    tmp_path: Path,
    shared_kafka: KafkaCluster,
    secondary: str,
) -> None:
    """Events that another reader of the group took are missed, asked for over TOPIC.requests, and applied in order."""
    topic = shared_kafka.url(Site.topic())
    with kvrep.open(tmp_path / "a") as db:
        with publication_of(db, topic, tmp_path / "place").start() as publication:
            with agent_of(topic, secondary) as agent:
                agent.wait_for(db.put(b"k", b"000"), 60)
            for i in range(1, 50):
                db.put(b"k", b"%03d" % i)
            _steal(topic, b"049")
            with agent_of(topic, secondary) as agent:
                agent.wait_for(db.put(b"k", b"050"), 60)
                status = agent.status()
            assert publication.status().replays >= 1
        assert status.asked >= 1
        assert (status.snapshots, status.applied, status.dead_letters) == (0, 50, 0)
        assert copy_of(sink_at(secondary)) == content(db)


def _steal(topic: str, last: bytes) -> None:
    """Read in the place of the agent, through the event with this value."""
    broker = brokers.connect(topic)
    subscriber = broker.subscriber(group="agent")
    seen: list[bytes] = []

    def stolen() -> bool:
        for delivery in subscriber.receive(100, 0.1):
            seen.append(delivery.message.body)
            subscriber.ack(delivery)
        return last in seen

    wait_until(stolen, "all was taken", WAIT_S)
    broker.close()


@pytest.mark.parametrize("secondary", ["postgres"], indirect=True)
def test_a_cluster_that_stands_still(
    tmp_path: Path,
    shared_kafka: KafkaCluster,
    secondary: str,
) -> None:
    """While Kafka says nothing both sides wait; afterwards they go on, without a snapshot and without a gap."""
    topic = shared_kafka.url(Site.topic())
    with kvrep.open(tmp_path / "a") as db:
        with (
            publication_of(db, topic, tmp_path / "place").start(),
            agent_of(topic, secondary, batch_changes=20) as agent,
        ):
            with Writer(db) as writer:
                writer.allow(200)
                wait_until(lambda: agent.status().commits > 2, "it applies")
                shared_kafka.freeze()
                try:
                    writer.allow(200)
                    wait_until(lambda: int(db.get(b"total", b"0")) == 400, "all is written")
                finally:
                    shared_kafka.thaw()
            agent.wait_for(db.put(b"end", b"1"), 60)
            status = agent.status()
        assert (status.snapshots, status.dead_letters, status.consistent) == (1, 0, True)
        assert copy_of(sink_at(secondary)) == content(db)


def test_a_backlog_over_several_partitions(tmp_path: Path, shared_kafka: KafkaCluster) -> None:
    """Where each key has its own order, an agent meets many events of one partition before those of another that
    precede them: they wait, and nothing is asked for again."""
    topic, secondary = shared_kafka.url(Site.topic()) + "?partitions=4", f"sqlite:{tmp_path / 'copy.db'}"
    with kvrep.open(tmp_path / "a") as db:
        db.put(b"k", b"0")
        with publication_of(db, topic, tmp_path / "place", one_line=False).start() as publication:
            with agent_of(topic, secondary) as agent:
                wait_until(lambda: agent.status().consistent, "it has the snapshot")
            for i in range(4000):
                db.submit_put(b"%d" % (i % 500), b"%d" % i)
            last = db.put(b"end", b"1")
            wait_until(lambda: publication.status().backlog == 0, "all is sent", 60)
            with Agent(BrokerSource(brokers.connect(topic), gap_wait_s=60.0), secondary) as agent:
                agent.wait_for(last, 60)
                status = agent.status()
        assert (status.asked, status.snapshots, status.dead_letters) == (0, 0, 0)
        assert copy_of(sink_at(secondary)) == content(db)
