"""Agents into another group of kvrep stores: two of them, changes of roles there, followers that are away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvrep
from kvrep.sinks.addresses import sink_at
from kvrep.sinks.agent import Agent, retry_dead_letters
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.interface import DeadLetter, Place
from kvrep.sinks.running import AgentState
from kvrep.sinks.store import NOTES, RemoteStore, StoreSink
from kvrep.sinks.upstream import Local
from tests.agent_kit import content, copy_of, wait_until

WAIT_S = 30.0
PLACE = Place(lineage="aa", sequence=(1001, 7, 2), time_us=5, token="k1x", whole=True)


class Far:
    """A group of two at another site: ``a`` begins as primary, every write needs both."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self.stack = path, stack
        self.a = self.open("a")
        self.b = self.open("b", follow=self.a.address)
        wait_until(lambda: self.a.status().voters == ("a", "b"), "b votes")
        self.writable(self.a)

    def open(self, name: str, **options: object) -> kvrep.Store:
        store = kvrep.open(self.path / name, name=name, listen="127.0.0.1:0", acks=1, **options)
        return self.stack.enter_context(store)

    def writable(self, store: kvrep.Store) -> None:
        wait_until(lambda: not store.status().not_writable, "it takes writes")

    @property
    def addresses(self) -> str:
        return f"{self.b.address},{self.a.address}"


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    with ExitStack() as stack:
        yield Far(tmp_path / "far", stack)


def copied(store: kvrep.Store) -> dict[str, dict[bytes, bytes]]:
    """What an agent has copied into ``store``, without its notes."""
    return {name: rows for name, rows in content(store).items() if name != NOTES}


def is_waiting(agent: Agent) -> bool:
    status = agent.status()
    return status.state is AgentState.WAITING and bool(status.problem)


def test_a_switchover_at_the_far_group(far: Far, tmp_path: Path) -> None:
    """The agent is given all nodes, finds the primary, and goes on at the next one: nothing missing, no snapshot."""
    with kvrep.open(tmp_path / "db") as db:
        with Agent(FeedSource(Local(db)), sink_at(far.addresses), batch_changes=10) as agent:
            for i in range(100):
                db.submit_put(b"%d" % i, b"1")
            agent.wait_for(db.put(b"before", b"1"), WAIT_S)
            for primary, to in ((far.a, "b"), (far.b, "a")):
                for i in range(50):
                    db.submit_put(b"%d" % i, to.encode())
                primary.switchover(to, timeout_s=WAIT_S)
                agent.wait_for(db.put(b"behind", to.encode()), WAIT_S)
            status = agent.status()
        assert copied(far.a) == content(db)
    assert (status.snapshots, status.consistent) == (1, True)
    assert status.reconnects >= 2


def test_a_primary_that_is_lost_at_the_far_group(far: Far, tmp_path: Path) -> None:
    """While nobody is primary over there the agent waits; the promoted node goes on from what it has."""
    with kvrep.open(tmp_path / "db") as db:
        with Agent(FeedSource(Local(db)), sink_at(far.addresses), batch_changes=10) as agent:
            agent.wait_for(db.put(b"before", b"1"), WAIT_S)
            for i in range(200):
                db.submit_put(b"%d" % i, b"1")
            far.a.close()
            last = db.put(b"behind", b"1")
            wait_until(lambda: is_waiting(agent), "it waits, and says why")
            far.b.promote(force=True, voters=["b"], acks=0)
            agent.wait_for(last, WAIT_S)
            assert agent.status().snapshots == 1
        assert copied(far.b) == content(db)


def test_one_address_leads_to_the_primary(far: Far, tmp_path: Path) -> None:
    """Given a follower alone, the agent is led to the primary by it."""
    with kvrep.open(tmp_path / "db") as db:
        with Agent(FeedSource(Local(db)), sink_at(far.b.address)) as agent:
            agent.wait_for(db.put(b"a", b"1"), WAIT_S)
        assert copied(far.a) == content(db)


def test_a_follower_of_the_far_group_that_is_away(far: Far, tmp_path: Path) -> None:
    """While the ack rule over there cannot be met the agent waits and says why; afterwards it goes on."""
    with kvrep.open(tmp_path / "db") as db:
        with Agent(FeedSource(Local(db)), sink_at(far.a.address)) as agent:
            agent.wait_for(db.put(b"a", b"1"), WAIT_S)
            far.b.close()
            wait_until(lambda: bool(far.a.status().not_writable), "the rule is not met")
            last = db.put(b"b", b"2")
            wait_until(lambda: is_waiting(agent), "it waits, and says why")
            far.open("b", follow=far.a.address)
            agent.wait_for(last, WAIT_S)
            assert agent.status().snapshots == 1
        assert copied(far.a) == content(db)


def test_a_slower_agent_cannot_take_the_place_back(far: Far) -> None:
    """A second agent that stands at an older place is refused, in a piece of a snapshot, too; the first goes on."""
    one, two = sink_at(far.addresses), sink_at(far.addresses)
    with one, two:
        for sink in (one, two):
            assert sink.open() == Place()
        one.apply([("default", b"a", b"new")])
        one.commit(PLACE)
        two.apply([("default", b"a", b"old")])
        with pytest.raises(kvrep.StoreInUse, match="another agent"):
            two.commit(Place(lineage="aa", sequence=(1001, 6, 0)))
        assert two.open() == PLACE
        one.stage([("default", b"b", b"new")])
        one.unstage()
        two.stage([("default", b"b", b"old")])
        with pytest.raises(kvrep.StoreInUse):
            two.unstage()
        one.commit(PLACE)
        one.apply([("default", b"a", b"newer")])
        one.commit(PLACE)
    assert copied(far.a) == {"default": {b"a": b"newer", b"b": b"new"}}


def test_two_agents_at_once(far: Far, tmp_path: Path) -> None:
    """Two that run against each other by mistake make the exact copy all the same: each change takes effect once."""
    with kvrep.open(tmp_path / "db") as db:
        sides = [Agent(FeedSource(Local(db)), sink_at(far.addresses), batch_changes=5) for _ in range(2)]
        with sides[0] as one, sides[1] as two:
            for i in range(200):
                db.submit_put(b"%d" % (i % 17), b"%d" % i)
                if i % 5 == 0:
                    db.delete(b"%d" % ((i + 3) % 17))
            db.put(b"last", b"1")
            wait_until(lambda: copied(far.a) == content(db), "the copy is exact")
            wait_until(lambda: one.status().reconnects + two.status().reconnects > 0, "one was told")
        assert copied(far.a) == content(db)


def test_a_retry_beside_a_running_agent(far: Far, tmp_path: Path) -> None:
    """Dead letters that are retried meanwhile take effect once; the agent looks again and goes on."""
    with kvrep.open(tmp_path / "db") as db:
        with Agent(FeedSource(Local(db)), sink_at(far.addresses)) as agent:
            agent.wait_for(db.put(b"a", b"1"), WAIT_S)
            with sink_at(far.addresses) as beside:
                place = beside.open()
                beside.bury(DeadLetter(keyspace="default", key=b"late", value=b"1", reason="once"))
                beside.commit(place)
                assert retry_dead_letters(beside) == ([1], [])
            agent.wait_for(db.put(b"b", b"2"), WAIT_S)
            assert agent.status().consistent
            assert agent.status().snapshots == 1
        assert copied(far.a) == {"default": {b"a": b"1", b"b": b"2", b"late": b"1"}}


def test_what_was_sent_without_an_answer_cannot_come_later(far: Far) -> None:
    """An attempt that arrives after the agent has gone on from the same place is refused as a whole."""
    late = RemoteStore(far.addresses)
    try:
        with sink_at(far.addresses) as sink:
            sink.open()
            turn = late.get(NOTES, b"turn")
            sink.apply([("default", b"a", b"1")])
            sink.commit(PLACE)
            with pytest.raises(kvrep.TransactionConflict):
                late.write([("default", b"a", b"0"), (NOTES, b"turn", bytes(8))], turn)
    finally:
        late.close()
    assert copied(far.a) == {"default": {b"a": b"1"}}


def test_a_group_without_a_primary_can_be_looked_at(far: Far) -> None:
    """When its primary is lost, the place of a copy can still be read at a follower; nothing is written there."""
    with sink_at(far.addresses) as sink:
        sink.open()
        sink.apply([("default", b"a", b"1")])
        sink.commit(PLACE)
    far.b.wait_for(far.a.position, WAIT_S)
    far.a.close()
    with sink_at(far.addresses) as sink:
        assert sink.open() == PLACE
        assert copy_of(sink_at(far.b.address)) == {"default": {b"a": b"1"}}
        sink.apply([("default", b"a", b"2")])
        with pytest.raises(kvrep.PeerUnavailable, match="primary"):
            sink.commit(PLACE)
    far.b.close()
    with pytest.raises(kvrep.PeerUnavailable):
        sink_at(far.addresses).open()


def test_a_connection_without_an_answer_passes(far: Far) -> None:
    """A primary that closes while it is asked is something that passes; a new connection finds what there is."""
    sink = StoreSink("far", lambda **_: RemoteStore(far.addresses))
    with sink:
        sink.open()
        far.a.close()
        with pytest.raises(kvrep.PeerUnavailable):
            sink.keyspaces()
        with pytest.raises(kvrep.PeerUnavailable):
            list(sink.scan("default"))
        far.b.promote(force=True, voters=["b"], acks=0)
        assert sink.open() == Place()
        sink.apply([("default", b"a", b"1")])
        sink.commit(PLACE)
    assert copied(far.b) == {"default": {b"a": b"1"}}
