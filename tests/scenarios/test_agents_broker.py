"""Agents over a broker that misbehaves: the secondary is exactly the source all the same."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.brokers.interface import Message
from kvrep.brokers.memory import Faults, MemoryBrokers
from kvrep.model.event import Event
from kvrep.sinks.agent import Agent
from kvrep.sinks.broker import BrokerSource
from kvrep.sinks.cursor import FileCursor
from kvrep.sinks.interface import Place
from kvrep.sinks.memory import MemorySink
from kvrep.sinks.metrics import exposition
from kvrep.sinks.publication import Publication
from kvrep.sinks.running import AgentState
from kvrep.sinks.stream import Mark, event_of
from kvrep.sinks.upstream import Local
from tests.agent_kit import content, copy_of, wait_until
from tests.scenarios.test_agents import MemoryView

URLS = ["memory://site/orders", "memory://site/orders?kind=queue"]


class Line:
    """A store, its publication, a broker, and an agent into a secondary in memory."""

    def __init__(self, path: Path, url: str, seed: int = 1) -> None:
        self.brokers = MemoryBrokers(seed=seed)
        self.url = url
        self.path = path
        self.db = kvrep.open(path / "store")
        self.sink = MemorySink()
        self.publication: Publication | None = None

    @property
    def server(self) -> Any:
        return self.brokers["site"]

    def publish(self, **options: Any) -> Publication:
        cursor = FileCursor(self.path / "cursor")
        options = {"mark_interval_s": 0.1, **options}
        made = Publication(Local(self.db), self.brokers.connect(self.url), cursor, **options)
        self.publication = made.start()
        return made

    def published(self) -> kvrep.Position:
        """The last record of which the publication has sent something."""
        assert self.publication is not None
        return kvrep.Position(*self.publication.status().sequence[:2])

    def agent(self, **options: Any) -> Agent:
        fast = {"gap_wait_s": 0.05, "ask_interval_s": 0.2}
        source = BrokerSource(self.brokers.connect(self.url), **{**fast, **options})
        return Agent(source, self.sink)

    def arrived(self, agent: Agent) -> None:
        """Wait until the secondary holds what the store does."""
        try:
            wait_until(lambda: copy_of(MemoryView(self.sink)) == content(self.db), "the copy is complete")
            wait_until(lambda: agent.status().consistent, "the agent says so")
        except BaseException:
            print(agent.status(), self.publication and self.publication.status())
            raise

    def close(self) -> None:
        if self.publication is not None:
            self.publication.close()
        self.db.close()


@pytest.fixture(params=URLS, ids=["log", "queue"])
def line(request: Any, tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path, request.param)
    yield made
    made.close()


def test_an_agent_says_that_its_broker_or_publisher_is_away(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it waits, with the problem, and does not claim to know the backlog; as of when the copy is stays said."""
    publication = line.publish()
    with line.agent() as agent:
        line.db.put(b"a", b"1")
        line.arrived(agent)
        written_s = line.db.changes(stop=line.db.position).poll(1)[-1].time
        wait_until(lambda: agent.status().backlog == 0, "it knows that it has all")
        wait_until(lambda: agent.status().as_of_s > written_s, "a mark that was sent after that says so")
        line.server.stop()
        wait_until(lambda: agent.status().state is AgentState.WAITING, "it notices")
        away = agent.status()
        assert "does not answer" in away.problem
        assert (away.backlog, away.catch_up_s, away.consistent) == (None, None, True)
        assert away.as_of_s > written_s
        line.server.start()
        wait_until(lambda: agent.status().state is AgentState.CURRENT, "it is there again")
        assert agent.status().problem == ""
        monkeypatch.setattr("kvrep.sinks.broker.SILENT_S", 0.3)
        publication.close()
        wait_until(lambda: agent.status().state is AgentState.WAITING, "it hears nothing")
        assert "the publisher may be away" in agent.status().problem


def test_the_log_is_for_people(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """Places in the log are epoch:offset:index, also the first one; what is not known yet is said so."""
    caplog.set_level("INFO", "kvrep")
    with line.agent() as agent:
        agent._log_interval_s = 0.0
        wait_until(lambda: agent.status().asked > 0, "it asks for the beginning")
        line.publish(log_interval_s=0.0)
        line.db.put(b"a", b"1")
        line.arrived(agent)
        line.server.faults = Faults(drop=1.0)
        line.db.put(b"lost", b"2")
        wait_until(lambda: line.published() == line.db.position, "it is lost")
        line.server.faults = Faults()
        line.db.put(b"b", b"3")
        line.arrived(agent)
    said = [record.getMessage() for record in caplog.records]
    asked = [text for text in said if "something is missing after" in text]
    assert "after 0:0:0;" in asked[0]
    assert re.search(r"after \d+:[1-9]\d*:\d+;", asked[-1])
    assert not [text for text in said if re.search(r"\(\d+, \d+|None", text)]


def test_events_arrive_over_a_broker(line: Line) -> None:
    """A snapshot, changes and transactions; both sides say where they are, and when all has arrived."""
    for i in range(1500):
        line.db.submit_put(b"%d" % i, b"v")
    publication = line.publish()
    with line.agent() as agent:
        line.arrived(agent)
        with line.db.batch() as batch:
            batch.put(b"1", b"new")
            batch.delete(b"2")
        assert batch.position is not None
        agent.wait_for(batch.position)
        line.arrived(agent)
        wait_until(lambda: agent.status().state is AgentState.CURRENT, "it is current")
        wait_until(lambda: agent.status().backlog == 0, "nothing is left")
        status = agent.status()
        assert status.delay_p50_s is not None
        assert status.repeats == 0
    wait_until(lambda: publication.status().backlog == 0, "all is confirmed")
    assert publication.status().snapshots >= 1
    assert publication.status().delay_p99_s is not None
    text = exposition([agent, publication]).decode()
    assert 'kvrep_agent_confirmed_total{name="publisher"}' in text
    assert 'kvrep_agent_delay_seconds_count{name="publisher"}' in text
    assert 'kvrep_agent_state{name="agent",state="closed"} 1.0' in text
    assert json.dumps(publication.status().to_json())


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_reordering_delay_and_loss(line: Line, seed: int) -> None:
    """Over a broker that doubles, shuffles, delays and loses messages nothing is lost or doubled in the copy."""
    line.brokers = MemoryBrokers(seed=seed)
    line.server.faults = Faults(duplicate=0.1, reorder=0.2, delay=0.05, drop=0.02)
    line.publish()
    with line.agent() as agent:
        for i in range(400):
            if i % 7:
                line.db.submit_put(b"%d" % (i % 37), b"%d" % i)
            else:
                with line.db.batch() as batch:
                    batch.put(b"t", b"%d" % i)
                    batch.delete(b"%d" % (i % 5))
        line.arrived(agent)
        status = agent.status()
    assert status.repeats > 0
    assert status.asked > 0


def test_the_last_events_may_be_lost(line: Line) -> None:
    """A loss at the very end is noticed by the marks of the idle stream, and made good."""
    line.publish()
    with line.agent() as agent:
        agent.wait_for(line.db.put(b"a", b"1"))
        line.server.faults = Faults(drop=1.0)
        last = line.db.put(b"b", b"2")
        wait_until(
            lambda: line.publication is not None and line.publication.status().backlog == 0, "sent, and lost"
        )
        line.server.faults = Faults()
        agent.wait_for(last)
        line.arrived(agent)
        assert agent.status().asked > 0


def test_a_full_parking_buffer(line: Line) -> None:
    """More events behind a gap than there is room for are let go and asked for again; memory stays bounded."""
    line.publish()
    with line.agent(parked_max=5, gap_wait_s=30.0) as agent:
        agent.wait_for(line.db.put(b"a", b"1"))
        line.server.faults = Faults(drop=1.0)
        line.db.put(b"lost", b"1")
        wait_until(
            lambda: line.publication is not None and line.publication.status().backlog == 0, "sent, and lost"
        )
        line.server.faults = Faults()
        for i in range(50):
            line.db.submit_put(b"%d" % i, b"2")
        line.arrived(agent)
        assert agent.status().asked > 0
        assert agent.status().parked <= 5


def test_a_mangled_event(line: Line) -> None:
    """A message that is no event goes to the dead letters as it came; the event that it was is asked for."""
    publisher = line.brokers.connect(line.url).publisher()
    line.publish()
    with line.agent() as agent:
        agent.wait_for(line.db.put(b"a", b"1"))
        publisher.publish(Message(b"\0garbage", headers={"ce_specversion": "1.0", "ce_type": "kvrep.put"}))
        publisher.publish(Message(b"{not json"))
        agent.wait_for(line.db.put(b"b", b"2"))
        wait_until(lambda: agent.status().dead_letters == 2, "both are put aside")
        assert copy_of(MemoryView(line.sink)) == content(line.db)
    letters = list(line.sink._durable.letters.values())
    assert b"garbage" in letters[0].raw
    assert not letters[0].readable
    assert all(letter.reason for letter in letters)
    publisher.close()


def test_events_of_another_store_are_put_aside(line: Line) -> None:
    """A second store that publishes on the same topic by mistake does no harm to the copy."""
    line.publish()
    publisher = line.brokers.connect(line.url).publisher()
    with line.agent() as agent:
        agent.wait_for(line.db.put(b"a", b"1"))
        event = Event("ff" * 16, "/x", kvrep.Position(1001, 99), 0, "put", "default", b"a", b"foreign")
        headers, body = event.to_binary()
        publisher.publish(Message(body, headers=headers))
        agent.wait_for(line.db.put(b"b", b"2"))
        wait_until(lambda: agent.status().dead_letters == 1, "it is put aside")
    assert copy_of(MemoryView(line.sink)) == content(line.db)
    assert "another store" in next(iter(line.sink._durable.letters.values())).reason
    publisher.close()


def test_the_broker_goes_away_and_comes_back(line: Line) -> None:
    """An outage of the broker in mid-stream loses and doubles nothing."""
    line.publish()
    with line.agent() as agent:
        agent.wait_for(line.db.put(b"a", b"1"))
        line.server.stop()
        for i in range(100):
            line.db.submit_put(b"%d" % i, b"x")
        line.db.put(b"end", b"1")
        line.server.start()
        line.arrived(agent)


def test_a_broker_that_blocks_publishers(line: Line) -> None:
    """While the broker takes nothing the place does not move; afterwards everything arrives."""
    publication = line.publish()
    with line.agent() as agent:
        agent.wait_for(line.db.put(b"a", b"1"))
        wait_until(lambda: publication.status().backlog == 0, "confirmed")
        confirmed = publication.status().confirmed
        line.server.block()
        last = line.db.put(b"b", b"1")
        wait_until(lambda: publication.status().published > confirmed, "published")
        assert publication.status().confirmed == confirmed
        line.server.unblock()
        agent.wait_for(last)


def test_a_publication_goes_on_behind_what_was_confirmed(line: Line) -> None:
    """A second publication begins where the first one's confirms ended: no snapshot, no gap."""
    with line.agent() as agent:
        line.publish()
        agent.wait_for(line.db.put(b"a", b"1"))
        assert line.publication is not None
        line.publication.close()
        last = line.db.put(b"b", b"2")
        publication = line.publish()
        agent.wait_for(last)
        assert publication.status().snapshots == 0
        line.arrived(agent)


def test_a_late_agent_asks_for_a_snapshot(tmp_path: Path) -> None:
    """An agent that finds only changes in the stream asks for a snapshot, and gets one."""
    line = Line(tmp_path, URLS[0])
    try:
        line.publish()
        with line.agent(group="first") as agent:
            agent.wait_for(line.db.put(b"a", b"1"))
        line.server._topics.clear()
        line.publication.close()  # type: ignore[union-attr]
        line.publish()
        line.db.put(b"b", b"2")
        line.sink = MemorySink()
        with line.agent(group="second") as agent:
            line.arrived(agent)
            assert agent.status().asked > 0
    finally:
        line.close()


def test_a_large_transaction_passes_a_small_window(tmp_path: Path) -> None:
    """A transaction larger than what a broker hands out unacknowledged is applied in parts, and whole at its end."""
    line = Line(tmp_path, URLS[1])
    try:
        line.publish()
        with line.agent() as agent:
            agent.wait_for(line.db.put(b"a", b"1"))
            with line.db.batch() as batch:
                for i in range(3000):
                    batch.put(b"%d" % i, b"x")
            assert batch.position is not None
            agent.wait_for(batch.position, 30)
            line.arrived(agent)
    finally:
        line.close()


def test_only_some_keyspaces(line: Line) -> None:
    """A selection by keyspace and prefix arrives without gaps: what is left out is not missed."""
    line.publish(keyspaces=["default"], prefix=b"k/")
    with line.agent() as agent:
        line.db.put(b"k/1", b"1")
        line.db.put(b"other", b"1")
        line.db.keyspace("users").put(b"k/1", b"1")
        last = line.db.put(b"k/2", b"2")
        agent.wait_for(last)
        assert agent.status().asked <= 1, "only for the first snapshot, if at all"
    assert copy_of(MemoryView(line.sink)) == {"default": {b"k/1": b"1", b"k/2": b"2"}}


@pytest.mark.parametrize("form", ["binary", "structured"])
def test_events_larger_than_a_message(line: Line, form: str) -> None:
    """A value above what one message holds arrives whole, in its place, and the stream goes on behind it."""
    line.publish(message_bytes_max=64 << 10, form=form)
    with line.agent() as agent:
        agent.wait_for(line.db.put(b"small", b"1"))
        line.db.put(b"large", bytes(range(256)) * 8000)
        with line.db.batch() as batch:
            batch.put(b"a", b"1" * 300_000)
            batch.put(b"b", b"2" * 100_000)
        assert batch.position is not None
        agent.wait_for(batch.position)
        agent.wait_for(line.db.put(b"behind", b"1"))
        line.arrived(agent)
        assert agent.status().dead_letters == 0


def test_parts_over_a_broker_that_misbehaves(line: Line) -> None:
    """Parts that come twice, in another order or not at all: what is missing is asked for, the copy is exact."""
    line.server.faults = Faults(duplicate=0.1, reorder=0.2, delay=0.05, drop=0.02)
    line.publish(message_bytes_max=64 << 10)
    with line.agent() as agent:
        for i in range(30):
            line.db.submit_put(b"%d" % (i % 7), b"%d" % i * (100_000 if i % 5 == 0 else 1))
        line.arrived(agent)


def test_former_values_are_published_where_they_are_wanted(line: Line) -> None:
    """With before=True the events of a keyspace that keeps them say what was there, however large it was."""
    line.publish(before=True)
    kept = line.db.keyspace("kept", keep_before=True)
    kept.put(b"k", b"1" * 100_000)
    kept.put(b"k", b"2")
    subscriber = line.brokers.connect(line.url).subscriber(group="look")
    events: list[Event] = []

    def told() -> bool:
        for delivery in subscriber.receive(100, 0.0):
            if Mark.parse(delivery.message) is None:
                events.append(event_of(delivery))
        return any(e.before == b"1" * 100_000 and e.value == b"2" for e in events)

    wait_until(told, "the former value is there")
    subscriber.close()


def test_envelopes_of_debezium(line: Line) -> None:
    """A publication in that form sends its envelopes and nothing else, and its place moves on."""
    line.db.put(b"a", b"1")
    publication = line.publish(form="debezium")
    line.db.put(b"b", b"2")
    wait_until(lambda: publication.status().state is AgentState.CURRENT, "all is confirmed")
    subscriber = line.brokers.connect(line.url).subscriber(group="look")
    found = [json.loads(d.message.body) for d in subscriber.receive(100, 1.0)]
    subscriber.close()
    assert [envelope["after"] for envelope in found] == ["MQ==", "Mg=="]
    assert {envelope["source"]["table"] for envelope in found} == {"default"}
    with pytest.raises(ValueError, match="binary, structured, debezium"):
        Publication(Local(line.db), line.brokers.connect(line.url), form="xml")  # type: ignore[arg-type]


@pytest.mark.parametrize("commits_are_dear", [False, True])
def test_a_secondary_whose_commits_are_dear_gets_more_at_once(line: Line, commits_are_dear: bool) -> None:
    """Where commits are far apart, more events may wait for one; there is a bound on both."""
    if commits_are_dear:
        line.sink.batch_changes = 1_000_000
    agent = line.agent()
    assert agent.source.window == (5000 if commits_are_dear else 500)
    for i in range(900):
        line.db.submit_put(b"%d" % i, b"v")
    line.publish()
    agent.source.open(Place())
    try:
        count = 0

        def received() -> int:
            nonlocal count
            count += len(agent.source.receive(10_000, 0.01))
            return count

        wait_until(lambda: received() >= (900 if commits_are_dear else 490), "they come")
        assert received() <= (1000 if commits_are_dear else 500)
    finally:
        agent.close()


def test_changes_are_gathered_for_a_commit_that_is_dear(line: Line) -> None:
    """Commits are at least ``linger_s`` apart, and everything arrives all the same."""
    line.sink.linger_s = 0.3
    line.sink.batch_changes = 5000
    line.publish()
    with line.agent() as agent:
        agent.wait_for(line.db.put(b"first", b"1"))
        before, began_s = agent.status().commits, time.monotonic()
        for i in range(100):
            line.db.put(b"%d" % i, b"v")
        agent.wait_for(line.db.position)
        assert agent.status().commits - before <= (time.monotonic() - began_s) / 0.3 + 2
        line.arrived(agent)


def test_marks_are_ordered_by_how_far_they_go(line: Line) -> None:
    """What a publisher says last counts though its clock went back a year; what comes again late does not."""
    broker = line.brokers.connect(line.url)
    publisher = broker.publisher("orders")
    source = BrokerSource(line.brokers.connect(line.url))
    source.open(Place(lineage="aa", sequence=(1, 5, 0), token=""))
    year_us = 365 * 86_400 * 1_000_000
    early, late = Mark("aa", (1, 5, 0), 0, 2 * year_us), Mark("aa", (1, 9, 0), 0, year_us)
    try:
        for mark, behind in ((early, 0), (late, 4), (early, 4)):
            publisher.publish(mark.message(), 5.0)
            publisher.flush(5.0)
            source.receive(10, 5.0)
            assert source.state().behind == behind
    finally:
        source.end()
        broker.close()
