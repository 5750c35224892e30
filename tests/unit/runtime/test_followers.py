"""The table of a primary's followers: whose copies count, and what that commits."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kvrep.errors import AckTimeout, NotEnoughFollowers
from kvrep.model.configuration import Configuration, Voter
from kvrep.model.position import Position
from kvrep.replication.acks import CommitTracker
from kvrep.replication.messages import Ack, Refused
from kvrep.runtime.followers import Followers

VOTERS = tuple(Voter(store_id=n.encode(), name=n, member=i) for i, n in enumerate("abc", 1))
RULE = Configuration(acks="majority", voters=VOTERS, next_member=4)


class Stream:
    """Stands for the session of one follower."""

    def __init__(self, name: str) -> None:
        self.store_id = name.encode()
        self.ended: list[Refused] = []
        self.writes = self.commits = 0

    def end(self, refused: Refused) -> None:
        self.ended.append(refused)

    def wake_for_write(self) -> None:
        self.writes += 1

    def wake_for_commit(self) -> None:
        self.commits += 1


class Committer:
    """Notes what is committed."""

    def __init__(self) -> None:
        self.committed = 0
        self.on_written: Any = None

    def commit_through(self, offset: int) -> None:
        self.committed = offset


@pytest.fixture
def committer() -> Committer:
    return Committer()


@pytest.fixture
def followers(committer: Committer) -> Followers:
    """Of the primary ``a``, which has written and synced ten records; the first starts its epoch."""
    engine = SimpleNamespace(
        committer=committer,
        configuration=RULE,
        home=SimpleNamespace(store_id=b"a"),
        tail=SimpleNamespace(offset=10),
    )
    by_hand = SimpleNamespace(confirmed_until=float("inf"))
    node: Any = SimpleNamespace(engine=engine, coordinator=by_hand, label="a")
    table = Followers(node)
    table.begin(CommitTracker(RULE, b"a", epoch_start=1, committed=0))
    assert table.rule(10) == 0
    return table


def joined(followers: Followers, name: str, at: int = 0) -> Any:
    stream: Any = Stream(name)
    assert followers.admit(stream) is None
    assert followers.join(stream, at)
    return stream


def ack(synced: int) -> Ack:
    return Ack(written=synced, synced=synced, visible=0)


def test_only_streams_that_have_joined_count(followers: Followers, committer: Committer) -> None:
    """An ack before the join, of a stream that was replaced, or of one that has left, commits nothing."""
    early: Any = Stream("b")
    assert followers.admit(early) is None
    assert not followers.acked(early, ack(5))
    replaced = joined(followers, "b")
    assert [r.reason for r in early.ended] == ["closing"]
    assert not followers.join(early, 0)
    assert not followers.leave(early)
    newest = joined(followers, "b")
    assert not followers.acked(replaced, ack(5))
    assert committer.committed == 0
    assert followers.acked(newest, ack(7))
    assert committer.committed == 7
    assert followers.leave(newest)
    assert not followers.acked(newest, ack(9))
    assert committer.committed == 7


def test_a_voter_that_comes_back_with_less(followers: Followers) -> None:
    """A disk was put back: what it confirmed before does not count for the bound on the lag, before its first ack."""
    rule = replace(RULE, acks=0, lag_records_max=2)
    followers.begin(tracker := CommitTracker(rule, b"a", epoch_start=1, committed=0))
    assert followers.rule(10) == 2
    stream = joined(followers, "b")
    assert followers.acked(stream, ack(6))
    assert tracker.committed == 8
    assert followers.leave(stream)
    assert tracker.too_far((), 8) is None
    assert followers.leave(joined(followers, "b", at=3))
    assert tracker.too_far((), 8) == (3, 2)
    assert followers.leave(joined(followers, "b", at=6))
    assert tracker.too_far((), 8) == (3, 2), "more is believed once it is acked"


def test_nothing_is_committed_without_an_epoch(followers: Followers, committer: Committer) -> None:
    """Once the epoch has ended, neither the node's own copy nor an ack commits anything."""
    stream = joined(followers, "b")
    assert followers.acked(stream, ack(3))
    followers.end()
    assert not followers.acked(stream, ack(9))
    assert followers.rule(10) == 0
    assert committer.committed == 3
    assert not followers.started


def test_the_committer_ships_early_while_somebody_has_joined(
    followers: Followers, committer: Committer
) -> None:
    """Its hook is there from the first join to the last leave; one who joins late is told of the group."""
    first, second = joined(followers, "b"), joined(followers, "c")
    assert committer.on_written is not None
    followers.rule(10)
    assert first.writes == second.writes == 1
    followers.rule(10)
    assert first.writes == 1, "they know of it"
    followers.leave(first)
    assert committer.on_written is not None
    followers.leave(second)
    assert committer.on_written is None


def test_copies_that_can_be_made(followers: Followers) -> None:
    """A write is refused while the rule, or what it asks for itself, needs more copies than can be made."""
    tracker = followers.tracker
    assert tracker is not None
    assert followers.missing_copies() == 1
    assert followers.missing_voters() == [b"b", b"c"]
    with pytest.raises(NotEnoughFollowers) as refused:
        followers.check_enough(tracker)
    assert (refused.value.needed, refused.value.connected) == (2, 1)
    joined(followers, "b")
    followers.check_enough(tracker)
    followers.check_more("majority")
    with pytest.raises(NotEnoughFollowers):
        followers.check_more("all")


def test_waiting_for_more_copies_ends(followers: Followers) -> None:
    """Who waits for more than the rule is told how far it got, at the deadline and when the role ends."""
    stream = joined(followers, "b")
    followers.acked(stream, ack(10))
    position = Position(1001, 10)
    followers.await_more(position, 1, "synced", time.monotonic())
    with pytest.raises(AckTimeout) as late:
        followers.await_more(position, "all", "synced", time.monotonic() + 0.01)
    assert (late.value.reached, late.value.needed) == (2, 3)
    followers.close()
    with pytest.raises(AckTimeout):
        followers.await_more(position, "all", "synced", time.monotonic() + 600.0)
    assert [r.reason for r in stream.ended] == ["closing"]
    assert followers.admit(stream) is not None


def test_another_rule_is_told_of_once(followers: Followers, committer: Committer) -> None:
    """The commit that brings another configuration into force says so, with the one before; the next does not."""
    stream = joined(followers, "b")
    tracker = followers.tracker
    assert tracker is not None
    assert followers.on_committed() is None
    other = Configuration(acks=1, voters=VOTERS, next_member=4)
    tracker.propose(8, other)
    followers.acked(stream, ack(10))
    assert committer.committed == 10
    assert followers.on_committed() == (RULE, other)
    assert followers.on_committed() is None
    assert stream.commits == 3
