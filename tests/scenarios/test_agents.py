"""Agents keep secondaries up to date: straight from a feed, through every mishap of either side."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import kvrep
from kvrep.sinks.agent import Agent, retry_dead_letters
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.interface import Place
from kvrep.sinks.memory import MemorySink
from kvrep.sinks.running import AgentState
from kvrep.sinks.sqlite import SqliteSink
from kvrep.sinks.upstream import Local, Remote
from tests.agent_kit import agent_of, content, copy_of, wait_current, wait_until


def test_a_snapshot_and_then_the_changes(store_path: Path) -> None:
    """A new secondary gets all there is, then what changes, keyspaces and deletes included, and says so."""
    sink = MemorySink()
    with kvrep.open(store_path) as db:
        for i in range(3000):
            db.submit_put(b"%05d" % i, b"v%d" % i)
        db.keyspace("users").put(b"u", b"1")
        with agent_of(db, sink) as agent:
            wait_current(agent, db)
            assert copy_of(MemoryView(sink)) == content(db)
            assert agent.status().snapshots == 1
            del db[b"00007"]
            with db.batch() as batch:
                batch.put(b"x", b"1")
                batch.put(b"u", b"2", keyspace=db.keyspace("users"))
            assert batch.position is not None
            agent.wait_for(batch.position)
            status = agent.status()
            assert copy_of(MemoryView(sink)) == content(db)
    assert status.consistent
    assert status.position == batch.position
    assert status.lineage
    assert status.delay_p50_s is not None
    assert status.delay_p99_s is not None
    assert 0 < status.delay_p50_s <= status.delay_p99_s < 30
    assert agent.status().state is AgentState.CLOSED


class MemoryView(MemorySink):
    """Another look at what a memory sink has committed."""

    def __init__(self, sink: MemorySink) -> None:
        super().__init__()
        self._durable = sink._durable


def test_an_agent_goes_on_where_the_last_one_ended(store_path: Path) -> None:
    """A second agent on the same secondary takes no snapshot and applies only what is new."""
    sink = MemorySink()
    with kvrep.open(store_path) as db:
        db.put(b"a", b"1")
        with agent_of(db, sink) as agent:
            wait_current(agent, db)
        db.put(b"b", b"2")
        db.put(b"a", b"3")
        with agent_of(db, sink) as agent:
            wait_current(agent, db)
            status = agent.status()
        assert copy_of(MemoryView(sink)) == content(db)
    assert (status.snapshots, status.applied) == (0, 2)


def test_a_running_node_is_read_by_its_address(tmp_path: Path) -> None:
    """The feed of a node in another process, by its address, gives the same copy; the lineage is told."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as db:
        for i in range(100):
            db.put(b"%d" % i, b"v" * i)
        upstream = Remote(db.address)
        sink = SqliteSink(str(tmp_path / "copy.db"))
        with Agent(FeedSource(upstream), sink) as agent:
            wait_current(agent, db)
            agent.wait_for(db.put(b"more", b"1"))
            assert agent.status().consistent
            assert agent.status().lineage == db.status().lineage
        upstream.close()
        assert copy_of(SqliteSink(str(tmp_path / "copy.db"))) == content(db)


def test_an_idle_secondary_is_as_of_now(store_path: Path) -> None:
    """While nothing changes, "as of" moves on: the secondary is complete as of the last look at the source."""
    with kvrep.open(store_path) as db, agent_of(db, MemorySink()) as agent:
        agent.wait_for(db.put(b"a", b"1"))
        wait_current(agent, db)
        first = agent.status().as_of_s
        wait_until(lambda: agent.status().as_of_s > first, "as_of_s moves on")


def test_transactions_stay_whole(store_path: Path) -> None:
    """Whatever the size of batches, every commit in the secondary ends with a whole transaction."""
    seen: list[set[bytes]] = []

    class Watching(MemorySink):
        def commit(self, place):  # type: ignore[no-untyped-def]
            super().commit(place)
            if place.whole:
                seen.append(set(self._durable.rows.get("default", {}).values()))

    with kvrep.open(store_path) as db, agent_of(db, Watching(), batch_changes=3) as agent:
        for round_ in range(20):
            with db.batch() as batch:
                for key in range(10):
                    batch.put(b"%d" % key, b"%d" % round_)
        assert batch.position is not None
        agent.wait_for(batch.position)
    assert len(seen) > 3
    assert all(len(values) <= 1 for values in seen)


def test_commits_whose_answer_is_lost_take_effect_once(store_path: Path) -> None:
    """After a commit of unknown outcome the agent looks where the secondary is, and goes on from there."""
    sink = MemorySink()
    with kvrep.open(store_path) as db, agent_of(db, sink, batch_changes=7) as agent:
        sink.lose_answers = 3
        for i in range(100):
            db.submit_put(b"%d" % (i % 13), b"%d" % i)
        agent.wait_for(db.put(b"end", b"1"))
        assert agent.status().reconnects >= 3
        assert copy_of(MemoryView(sink)) == content(db)


def test_a_secondary_that_is_down_for_long(store_path: Path) -> None:
    """While it does not answer the agent says so and waits; afterwards nothing is missing."""
    sink = MemorySink()
    with kvrep.open(store_path) as db, agent_of(db, sink) as agent:
        agent.wait_for(db.put(b"a", b"1"))
        sink.down = True
        for i in range(500):
            db.submit_put(b"%d" % i, b"x")
        wait_until(lambda: agent.status().state is AgentState.WAITING, "it waits")
        assert "down" in agent.status().problem
        sink.down = False
        agent.wait_for(db.put(b"b", b"2"))
        assert agent.status().snapshots == 1, "only the first"
        assert copy_of(MemoryView(sink)) == content(db)


def test_a_secondary_that_was_down_too_long_gets_a_snapshot(store_path: Path) -> None:
    """When the log was trimmed meanwhile, a snapshot replaces the copy; what was deleted is gone."""
    sink = MemorySink()
    options = {
        "log_file_bytes": 1 << 16,
        "retention_bytes": 0,
        "retention_age_s": 0.0,
        "flush_interval_s": 0.05,
    }
    with kvrep.open(store_path, **options) as db:
        db.put(b"gone", b"1")
        with agent_of(db, sink) as agent:
            wait_current(agent, db)
        del db[b"gone"]
        before = db.status().first_offset

        def trimmed() -> bool:
            db.put(b"filler", bytes(40_000))
            db.flush()
            return db.status().first_offset > before + 3

        wait_until(trimmed, "the log is trimmed")
        with agent_of(db, sink) as agent:
            wait_current(agent, db)
            assert agent.status().snapshots == 1
        assert copy_of(MemoryView(sink)) == content(db)


def test_a_feed_of_its_own_holds_the_log(store_path: Path) -> None:
    """With a named feed the log is kept for a secondary that is away, so no snapshot is needed."""
    sink = MemorySink()
    options = {
        "log_file_bytes": 1 << 16,
        "retention_bytes": 0,
        "retention_age_s": 0.0,
        "flush_interval_s": 0.05,
    }
    with kvrep.open(store_path, **options) as db:
        db.put(b"a", b"1")
        with Agent(FeedSource(Local(db, feed="copy")), sink) as agent:
            wait_current(agent, db)
            wait_until(lambda: bool(db.feed("copy").token), "the feed has a place")
        for _ in range(20):
            db.put(b"filler", bytes(40_000))
            db.flush()
        with Agent(FeedSource(Local(db, feed="copy")), sink) as agent:
            wait_current(agent, db)
            assert agent.status().snapshots == 0
        assert copy_of(MemoryView(sink)) == content(db)


def test_a_forced_promotion_is_not_hidden(tmp_path: Path) -> None:
    """What a forced promotion took back leaves the secondary, too, by a new snapshot."""
    sink = MemorySink()
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as a:
        b = kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", follow=a.address, voter=False)
        b.wait_for(a.put(b"both", b"1"), 30)
        b.close()
        a.put(b"lost", b"1")
        with agent_of(a, sink) as agent:
            wait_current(agent, a)
    with kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", follow="127.0.0.1:1", voter=False) as b:
        b.promote(force=True, voters=["b"], acks=0)
        b.put(b"new", b"1")
        with agent_of(b, sink) as agent:
            wait_current(agent, b)
            assert agent.status().snapshots == 1
        assert copy_of(MemoryView(sink)) == content(b) == {"default": {b"both": b"1", b"new": b"1"}}


def test_another_store_is_refused_at_once(tmp_path: Path) -> None:
    """An agent pointed at the wrong store does not touch the copy: the error names both."""
    sink = MemorySink()
    with kvrep.open(tmp_path / "a") as db:
        db.put(b"a", b"1")
        with agent_of(db, sink) as agent:
            wait_current(agent, db)
    with kvrep.open(tmp_path / "b") as other:
        other.put(b"b", b"1")
        with pytest.raises(kvrep.LineageMismatch):
            agent_of(other, sink).start()
    assert copy_of(MemoryView(sink)) == {"default": {b"a": b"1"}}


def test_poison_goes_to_dead_letters_and_can_be_retried(store_path: Path) -> None:
    """A change that the secondary cannot hold is put aside with the reason; the rest goes on; a retry heals."""
    sink = MemorySink()
    sink.poison = {b"poison"}
    with kvrep.open(store_path) as db, agent_of(db, sink) as agent:
        with db.batch() as batch:
            batch.put(b"a", b"1")
            batch.put(b"bad", b"poison")
            batch.put(b"b", b"2")
        assert batch.position is not None
        agent.wait_for(batch.position)
        assert copy_of(MemoryView(sink)) == {"default": {b"a": b"1", b"b": b"2"}}
        status = agent.status()
        assert status.dead_letters == 1
        assert not status.consistent, "a copy that lacks a change is not consistent"
        wait_current(agent, db)
    [letter] = sink.dead_letters()
    assert (letter.keyspace, letter.key, letter.value, letter.reason) == (
        "default",
        b"bad",
        b"poison",
        "poison",
    )

    assert [x.reason for x in retry_dead_letters(sink)[1]] == ["poison"]
    sink.poison = set()
    assert retry_dead_letters(sink, [letter.number]) == ([letter.number], [])
    assert sink.dead_letters() == []
    assert copy_of(MemoryView(sink)) == {"default": {b"a": b"1", b"b": b"2", b"bad": b"poison"}}
    with pytest.raises(ValueError, match="no dead letter 77"):
        retry_dead_letters(sink, [77])


def test_a_later_change_of_the_key_settles_a_dead_letter(store_path: Path) -> None:
    """A dead letter whose key has changed since must not come back: it is forgotten, or replaced."""
    sink = MemorySink()
    sink.poison = {b"poison", b"worse"}
    with kvrep.open(store_path) as db, agent_of(db, sink) as agent:
        agent.wait_for(db.put(b"k", b"poison"))
        agent.wait_for(db.put(b"k", b"worse"))
        assert [x.value for x in MemoryView(sink).open() and _letters(sink)] == [b"worse"]
        agent.wait_for(db.put(b"k", b"good"))
        assert _letters(sink) == []
        assert agent.status().consistent
        assert copy_of(MemoryView(sink)) == content(db)


def test_later_changes_of_the_key_in_the_same_commit_settle_it_as_well(store_path: Path) -> None:
    """Of several changes of a key that arrive together the last one decides: it is applied, or put aside alone."""
    sink = MemorySink()
    sink.poison = {b"poison", b"worse"}
    with kvrep.open(store_path) as db:
        with agent_of(db, sink) as agent:
            agent.wait_for(db.put(b"k", b"0"))
        for key, value in [
            (b"k", b"poison"),
            (b"k", b"good"),
            (b"j", b"good"),
            (b"j", b"poison"),
            (b"j", b"worse"),
        ]:
            last = db.put(key, value)
        with agent_of(db, sink) as agent:
            agent.wait_for(last)
            assert agent.status().commits == 1
            assert agent.status().dead_letters == 1
    assert [(x.key, x.value) for x in _letters(sink)] == [(b"j", b"worse")]
    assert copy_of(MemoryView(sink)) == {"default": {b"k": b"good", b"j": b"good"}}


def test_what_a_snapshot_could_not_bring_stays_put_aside(store_path: Path) -> None:
    """A row that did not fit stays a dead letter when the snapshot that had it becomes the copy, commits later."""
    sink = MemorySink()
    sink.poison = {b"poison"}
    with kvrep.open(store_path) as db:
        db.put(b"000", b"poison")
        for i in range(1, 100):
            db.put(b"%03d" % i, b"good")
        with agent_of(db, sink, batch_changes=1) as agent:
            wait_current(agent, db)
            assert agent.status().commits > 2
            assert not agent.status().consistent
    assert [x.key for x in _letters(sink)] == [b"000"]


def test_rows_that_do_not_fit_are_told_apart_in_every_piece(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a snapshot in small pieces exactly the rows that do not fit are put aside, wherever they stand."""
    monkeypatch.setattr("kvrep.feeds.changes.PIECE_ROWS", 7)
    sink = MemorySink()
    sink.poison = {b"poison"}
    bad = {b"%03d" % i for i in (0, 6, 7, 8, 20, 48, 49)}
    with kvrep.open(store_path) as db:
        for i in range(50):
            db.put(b"%03d" % i, b"poison" if b"%03d" % i in bad else b"good")
        with agent_of(db, sink, batch_changes=1) as agent:
            wait_current(agent, db)
            assert agent.status().applied == 43
        assert copy_of(MemoryView(sink)) == {"default": {k: v for k, v in db.scan() if k not in bad}}
    assert {x.key for x in _letters(sink)} == bad


def test_of_two_rows_that_collide_the_later_one_is_put_aside(tmp_path: Path) -> None:
    """Rows of one batch that a constraint allows only one of: the later is the dead letter, and no other row is."""
    path = tmp_path / "copy.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute('CREATE TABLE "default" (key BLOB PRIMARY KEY, value BLOB UNIQUE) WITHOUT ROWID')
    with kvrep.open(tmp_path / "a") as db, agent_of(db, SqliteSink(str(path))) as agent:
        wait_current(agent, db)
        with db.batch() as batch:
            for i in range(40):
                batch.put(b"%02d" % i, b"same" if i in (3, 30) else b"%d" % i)
        assert batch.position is not None
        agent.wait_for(batch.position)
        expected = {key: value for key, value in db.scan() if key != b"30"}
    assert copy_of(SqliteSink(str(path))) == {"default": expected}
    with SqliteSink(str(path)) as sink:
        sink.open()
        assert [letter.key for letter in sink.dead_letters()] == [b"30"]


class Ending(MemorySink):
    """Its commits fail for good after so many."""

    left = 1 << 30

    def commit(self, place: Place) -> None:
        if not self.left:
            raise RuntimeError("no more commits")
        self.left -= 1
        super().commit(place)


def test_a_snapshot_settles_the_dead_letters_before_it_though_its_agent_ends(store_path: Path) -> None:
    """A dead letter of a key that is gone must not come back by a retry: the snapshot settles it, whoever ends it."""
    sink = Ending()
    sink.poison = {b"poison"}
    with kvrep.open(store_path) as db:
        for i in range(100):
            db.put(b"%03d" % i, b"good")
        with agent_of(db, sink) as agent:
            agent.wait_for(db.put(b"gone", b"poison"))
        assert [x.key for x in _letters(sink)] == [b"gone"]
        del db[b"gone"]
        sink._durable.place = replace(sink._durable.place, token="")
        sink.left = 2
        with agent_of(db, sink, batch_changes=1) as agent:
            wait_until(lambda: agent.status().state is AgentState.FAILED, "it ends")
        assert sink._durable.place.staging
        sink.left = 1 << 30
        with agent_of(db, sink, batch_changes=1) as agent:
            wait_current(agent, db)
            assert agent.status().consistent
        assert copy_of(MemoryView(sink)) == content(db)
    assert _letters(sink) == []


def _letters(sink: MemorySink) -> list:  # type: ignore[type-arg]
    return list(sink._durable.letters.values())


def test_a_snapshot_settles_dead_letters_too(store_path: Path) -> None:
    """What a snapshot brought is whole: letters from before it are of no use any more."""
    sink = MemorySink()
    sink.poison = {b"poison"}
    with kvrep.open(store_path) as db:
        with agent_of(db, sink) as agent:
            agent.wait_for(db.put(b"k", b"poison"))
        del db[b"k"]
        place = sink.open()
        sink.commit(type(place)(lineage=place.lineage))
        with agent_of(db, sink) as agent:
            wait_current(agent, db)
            assert agent.status().consistent
    assert _letters(sink) == []


def test_too_many_dead_letters_end_the_agent(store_path: Path) -> None:
    """There is a bound on what is put aside; at it the agent ends with an error that says what to do."""
    sink = MemorySink()
    sink.poison = {b"poison"}
    with kvrep.open(store_path) as db, agent_of(db, sink, dead_letters_max=3) as agent:
        for i in range(5):
            db.put(b"%d" % i, b"poison")
        wait_until(lambda: agent.status().state is AgentState.FAILED, "it has ended")
        assert "dead-letters" in agent.status().problem
        with pytest.raises(kvrep.Overloaded):
            agent.wait_for(db.put(b"more", b"1"))


def test_a_secondary_that_is_down_at_the_start_is_an_error_unless_waited_for(store_path: Path) -> None:
    """start() raises what is wrong at once; with wait=True it tries until the secondary is there."""
    sink = MemorySink()
    sink.down = True
    with kvrep.open(store_path) as db:
        with pytest.raises(kvrep.PeerUnavailable):
            agent_of(db, sink).start()
        with agent_of(db, sink, wait=True) as agent:
            wait_until(lambda: agent.status().state is AgentState.WAITING, "it waits")
            sink.down = False
            agent.wait_for(db.put(b"a", b"1"))


def test_a_store_that_closes_ends_nothing_for_ever(store_path: Path) -> None:
    """When the store under an agent is closed the agent ends, and says why."""
    with kvrep.open(store_path) as db:
        agent = agent_of(db, MemorySink()).start()
        wait_current(agent, db)
    wait_until(lambda: agent.status().state is AgentState.FAILED, "it has ended")
    assert "closed" in agent.status().problem
    agent.close()


def test_a_failover_in_mid_stream(tmp_path: Path) -> None:
    """An agent that reads a follower goes on when that follower becomes the primary; nothing is missing."""
    sink = MemorySink()
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1) as a:
        with kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", follow=a.address) as b:
            wait_until(lambda: a.status().voters == ("a", "b"), "b votes")
            wait_until(lambda: not a.status().not_writable, "a takes writes")
            with agent_of(b, sink, batch_changes=10) as agent:
                for i in range(200):
                    a.submit_put(b"%d" % i, b"a")
                a.put(b"last", b"a")
                b.promote()
                assert len(b) == 201
                b.wait_for(b.position)
                wait_until(lambda: not b.status().not_writable, "b takes writes")
                agent.wait_for(b.put(b"first", b"b"), 30)
                assert agent.status().snapshots == 1
                assert copy_of(MemoryView(sink)) == content(b)


def test_an_agent_finds_the_next_node_when_the_primary_is_lost(tmp_path: Path) -> None:
    """Given both nodes, an agent whose node ends goes on at the other one, which is promoted: no snapshot, no gap."""
    sink = MemorySink()
    a = kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1)
    with kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", follow=a.address) as b:
        wait_until(lambda: a.status().voters == ("a", "b"), "b votes")
        wait_until(lambda: not a.status().not_writable, "a takes writes")
        remote = Remote(f"127.0.0.1:1,{a.address},{b.address}")
        with Agent(FeedSource(remote), sink, batch_changes=10) as agent:
            for i in range(100):
                a.submit_put(b"%d" % i, b"a")
            agent.wait_for(a.put(b"last", b"a"), 30)
            a.close()
            b.promote(force=True, voters=["b"], acks=0)
            agent.wait_for(b.put(b"first", b"b"), 30)
            assert remote.call("status", {})["status"]["name"] == "b"
            status = agent.status()
        assert copy_of(MemoryView(sink)) == content(b)
    assert status.snapshots <= 1
    assert status.consistent


class BusyConnection:
    """To a node that has no room for another call."""

    address = "busy:1"

    def call(self, method: str, request: object, timeout_s: float) -> dict[str, object]:
        raise kvrep.Overloaded("16 calls run already")

    def close(self) -> None:
        pass


def test_a_node_without_room_for_another_call_is_left_for_the_next_one(tmp_path: Path) -> None:
    """A busy node is something that passes: the next node is asked, and an agent would go on."""
    with kvrep.open(tmp_path / "a", listen="127.0.0.1:0") as a:
        remote = Remote(f"{a.address},{a.address}")
        try:
            remote._connection.close()
            remote._connection = BusyConnection()  # type: ignore[assignment]
            with pytest.raises(kvrep.PeerUnavailable, match="already"):
                remote.call("status", {})
            assert remote.lineage() == a.status().lineage
        finally:
            remote.close()
