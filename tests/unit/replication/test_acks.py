"""Which offset is committed, as scripts.

A script has one event per line; ``= n`` says what is committed after it. Stores are a (this node), b, c …
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.model.configuration import Acks, Configuration, Voter
from kvrep.replication.acks import CommitTracker


def group(names: str, acks: Acks = "majority", lag: int = 0) -> Configuration:
    """Voters by letter; a capital letter is a witness."""
    voters = tuple(
        Voter(store_id=n.lower().encode(), name=n, member=ord(n.lower()) - 96, witness=n.isupper())
        for n in names
    )
    return Configuration(acks=acks, voters=voters, next_member=27, lag_records_max=lag)


def play(tracker: CommitTracker, script: str) -> None:
    """``a 5``: a is durable through 5; ``-b``: b left; ``~b``: b gets another copy; ``~b 5``: b comes back with so
    much; ``propose 7 abc 1`` (or
    ``abc 0 3``, with a bound of 3); each with ``= committed``."""
    for line in script.strip().splitlines():
        event, _, expected = line.partition("=")
        words = event.split()
        if words[0] == "propose":
            rule: Acks = int(words[3]) if words[3].isdecimal() else words[3]  # type: ignore[assignment]
            tracker.propose(int(words[1]), group(words[2], rule, int(words[4]) if len(words) > 4 else 0))
        elif words[0].startswith("~"):
            tracker.forget(words[0][1:].encode(), *map(int, words[1:]))
        elif words[0].startswith("-"):
            tracker.left(words[0][1:].encode())
        elif words[0] == "a":
            assert tracker.local_durable(int(words[1])) == tracker.committed
        else:
            assert tracker.acked(words[0].encode(), int(words[1])) == tracker.committed
        assert tracker.committed == int(expected), line


@pytest.mark.parametrize(
    ("names", "acks", "script"),
    [
        ("a", 0, "a 5 = 5"),
        ("abc", 0, "a 5 = 5\n b 9 = 5\n a 7 = 7"),
        ("", 0, "a 5 = 5"),
        ("bc", 0, "a 5 = 0\n b 3 = 3\n b 9 = 5"),
        ("ab", 1, "a 5 = 0\n b 3 = 3\n b 5 = 5\n b 9 = 5\n a 9 = 9"),
        ("a", 1, "a 5 = 5"),
        ("abc", 1, "b 3 = 0\n c 4 = 0\n a 2 = 2\n a 9 = 4"),
        ("abc", "majority", "a 5 = 0\n c 5 = 5\n b 9 = 5\n a 8 = 8"),
        ("abc", "all", "a 5 = 0\n c 5 = 0\n b 4 = 4\n b 5 = 5"),
        ("abc", 2, "a 5 = 0\n c 5 = 0\n b 4 = 4"),
        ("abcde", "majority", "a 9 = 0\n b 7 = 0\n c 5 = 5\n d 8 = 7"),
        ("abC", "majority", "a 9 = 0\n c 9 = 0\n b 4 = 4"),
        ("ab", "majority", "a 9 = 0\n x 9 = 0\n y 9 = 0\n b 4 = 4"),
        ("abc", "majority", "a 9 = 0\n b 4 = 4\n -b = 4\n c 3 = 4\n b 2 = 4\n c 6 = 6"),
        ("abc", "majority", "a 9 = 0\n b 9 = 9\n a 3 = 9\n b 3 = 9"),
    ],
)
def test_the_rule(names: str, acks: Acks, script: str) -> None:
    """W synced copies on data voters, ours always among those that must be durable; never back."""
    play(CommitTracker(group(names, acks), b"a", epoch_start=1, committed=0), script)


@pytest.mark.parametrize(
    ("names", "lag", "script"),
    [
        # The furthest other voter and so many more; never beyond what is durable here.
        ("ab", 3, "a 9 = 3\n b 2 = 5\n b 4 = 7\n b 9 = 9\n a 20 = 12"),
        ("abc", 3, "a 9 = 3\n b 2 = 5\n c 1 = 5\n c 4 = 7\n b 3 = 7"),
        ("ab", 3, "b 9 = 0\n a 5 = 5\n a 13 = 12"),
        ("ab", 10**15, "a 9 = 9"),
        # Who has left keeps its copy; back with less (a disk put back, a new copy), that is what it has.
        ("abc", 3, "a 9 = 3\n b 4 = 7\n -b = 7\n a 20 = 7\n c 2 = 7\n c 6 = 9\n b 5 = 9\n b 8 = 11"),
        ("ab", 3, "a 20 = 3\n b 9 = 12\n -b = 12\n b 2 = 12\n -b = 12\n b 8 = 12\n b 11 = 14"),
        ("abc", 3, "b 9 = 0\n a 5 = 5\n -b = 5\n a 8 = 8\n ~b = 8\n a 20 = 8\n c 6 = 9\n b 7 = 10"),
        # It counts from the moment in which it is known, before the first ack, and whether or not one comes.
        ("ab", 3, "b 9 = 0\n a 9 = 9\n -b = 9\n ~b 5 = 9\n a 20 = 9\n -b = 9\n ~b 7 = 9\n b 7 = 10"),
        # Neither a witness nor a stranger could be promoted with it.
        ("abC", 3, "a 9 = 3\n c 9 = 3\n x 9 = 3\n b 1 = 4"),
        # Nobody else has data: nothing is bounded, as nothing could be saved.
        ("a", 3, "a 9 = 9"),
        ("aB", 3, "a 9 = 9"),
        # This node does not vote: a voter's own copy is needed anyway.
        ("bc", 3, "a 9 = 0\n b 4 = 4\n c 6 = 6"),
    ],
)
def test_the_bound_on_the_lag(names: str, lag: int, script: str) -> None:
    """With acks=0, what is committed is at most so many records ahead of the furthest other data voter."""
    play(CommitTracker(group(names, 0, lag), b"a", epoch_start=1, committed=0), script)


def test_a_restarted_primary_knows_nobody_s_copy() -> None:
    """Nothing commits before another voter has told of its copy in this epoch, however little that is ahead."""
    tracker = CommitTracker(group("ab", 0, 3), b"a", epoch_start=8, committed=6)
    play(tracker, "a 8 = 6\n b 4 = 6\n b 5 = 8")


@pytest.mark.parametrize(
    ("before", "script"),
    [
        # No bound any more: by a record that is still bounded.
        ("ab 3", "a 3 = 3\n propose 4 ab 0 = 3\n a 9 = 3\n b 1 = 9"),
        # A wider one, a narrower one, another rule; and a first voter to be bounded by.
        ("ab 3", "propose 4 ab 0 5 = 0\n a 9 = 3\n b 1 = 6"),
        ("ab 5", "a 3 = 3\n propose 4 ab 0 1 = 3\n a 9 = 3\n b 2 = 3\n b 3 = 4\n b 5 = 6"),
        ("ab 3", "a 3 = 3\n propose 4 ab 1 = 3\n a 9 = 3\n b 2 = 3\n b 5 = 5"),
        ("ab 0", "a 3 = 3\n b 3 = 3\n -b = 3\n propose 4 ab 0 2 = 3\n a 9 = 5"),
        ("a 3", "a 3 = 3\n propose 4 ab 0 3 = 3\n a 9 = 3\n b 2 = 5"),
        # The only other voter is taken off: by a record that still needs it.
        ("ab 3", "a 3 = 3\n propose 4 a 0 3 = 3\n a 9 = 3\n b 1 = 9"),
    ],
)
def test_a_changed_bound_needs_both_rules(before: str, script: str) -> None:
    """From its record on the old bound and the new one hold, until it is committed; then only the new one."""
    names, lag = before.split()
    tracker = CommitTracker(group(names, 0, int(lag)), b"a", epoch_start=1, committed=0)
    play(tracker, script)
    assert tracker.proposed is None


def test_the_door_of_the_bound() -> None:
    """A record too far ahead is refused while nobody is there to catch up, and waits while somebody is."""
    tracker = CommitTracker(group("abC", 0, 3), b"a", epoch_start=1, committed=0)
    assert tracker.bounded
    assert tracker.too_far(set(), 3) is None
    assert tracker.too_far({b"c", b"x"}, 4) == (0, 3)
    assert tracker.too_far({b"b"}, 100) is None
    play(tracker, "a 5 = 3\n b 4 = 5\n -b = 5")
    assert tracker.too_far(set(), 7) is None
    assert tracker.too_far(set(), 8) == (4, 3)
    assert tracker.missing(set()) == 0
    tracker.propose(6, group("abC", 0))
    assert tracker.too_far(set(), 8) == (4, 3), "both rules"
    play(tracker, "a 6 = 6")
    assert not tracker.bounded
    assert tracker.too_far(set(), 8) is None


def test_older_records_commit_through_one_of_this_epoch() -> None:
    """Nothing commits until the epoch start has its copies (Raft, section 5.4.2)."""
    tracker = CommitTracker(group("abc"), b"a", epoch_start=8, committed=3)
    play(tracker, "a 8 = 3\n b 7 = 3\n c 7 = 3\n c 8 = 8\n a 9 = 8\n b 9 = 9")


def test_figure_8_of_the_raft_paper() -> None:
    """A record of an older epoch on a majority is not committed: a rival with a newer epoch may erase it."""
    # S1 is primary again in epoch 4 and has brought its record 2 of epoch 2 to S3. S5 holds epoch 3.
    s1 = CommitTracker(group("abcde"), b"a", epoch_start=3, committed=1)
    play(s1, "a 3 = 1\n b 2 = 1\n c 2 = 1")
    # Only with its own record on a majority can S5 no longer win, and 2 is committed with it.
    play(s1, "b 3 = 1\n c 3 = 3")


@pytest.mark.parametrize(
    ("before", "acks", "script"),
    [
        # One more voter: until 5 is committed under both, b alone is not enough, c alone neither.
        ("ab", "all", "propose 5 abc all = 0\n a 9 = 0\n b 9 = 4\n c 4 = 4\n c 5 = 5\n c 7 = 7"),
        # One voter less: c is needed for what came before, and for the change itself.
        ("abc", "all", "propose 5 ab all = 0\n a 9 = 0\n b 9 = 0\n c 3 = 3\n c 5 = 9"),
        # A weaker rule takes effect only once the stronger one has accepted it.
        ("ab", 1, "propose 5 ab 0 = 0\n a 9 = 0\n b 4 = 4\n b 5 = 9"),
        # A stronger rule counts from its own record on.
        ("ab", 0, "a 4 = 4\n propose 5 ab 1 = 4\n a 9 = 4\n b 7 = 7"),
        # Other voters altogether.
        ("ab", 1, "propose 5 cd 1 = 0\n a 9 = 0\n c 9 = 0\n d 9 = 0\n b 6 = 9"),
    ],
)
def test_a_new_configuration_needs_both_rules(before: str, acks: Acks, script: str) -> None:
    """From its offset on both rules hold until it is committed; then only the new one."""
    tracker = CommitTracker(group(before, acks), b"a", epoch_start=1, committed=0)
    play(tracker, script)
    assert tracker.proposed is None


def test_configurations_come_one_at_a_time() -> None:
    """A second proposal, or one at a committed offset, is refused; the effective one is told throughout."""
    old, new = group("ab", 1), group("abc", 1)
    tracker = CommitTracker(old, b"a", epoch_start=1, committed=0)
    play(tracker, "a 4 = 0\n b 4 = 4")
    with pytest.raises(ValueError, match="committed already"):
        tracker.propose(4, new)
    tracker.propose(5, new)
    with pytest.raises(ValueError, match="not committed yet"):
        tracker.propose(6, new)
    assert (tracker.configuration, tracker.proposed) == (old, (5, new))
    play(tracker, "a 5 = 4\n c 5 = 4\n b 5 = 5")
    assert (tracker.configuration, tracker.proposed) == (new, None)
    tracker.propose(6, old)


def test_a_new_primary_goes_on_with_a_proposal_it_found() -> None:
    """A configuration that the log holds but nobody is known to have committed needs both rules still."""
    tracker = CommitTracker(
        group("ab", 1), b"a", epoch_start=8, committed=3, proposed=(5, group("abc", "all"))
    )
    play(tracker, "a 8 = 3\n b 8 = 3\n c 7 = 3\n c 8 = 8")
    assert tracker.configuration.acks == "all"


@pytest.mark.parametrize(
    ("names", "acks", "connected", "reachable", "missing"),
    [
        ("a", 0, "", 1, 0),
        ("abc", 0, "", 1, 0),
        ("", 0, "", 1, 0),
        ("", 1, "b", 1, 1),
        ("a", 1, "", 1, 1),
        ("a", 1, "b", 1, 1),
        ("ab", 1, "", 1, 1),
        ("ab", 1, "b", 2, 0),
        ("abc", "majority", "bc", 3, 0),
        ("abc", "majority", "x", 1, 1),
        ("abcde", "all", "bc", 3, 2),
        ("abC", "majority", "c", 1, 1),
        ("bc", 1, "b", 1, 1),
    ],
)
def test_the_door(names: str, acks: Acks, connected: str, reachable: int, missing: int) -> None:
    """A user's write is refused before it is logged when the copies it wants cannot be made."""
    tracker = CommitTracker(group(names, acks), b"a", epoch_start=1, committed=0)
    stores = {c.encode() for c in connected}
    assert (tracker.reachable(stores), tracker.missing(stores)) == (reachable, missing)


def test_a_proposal_counts_at_the_door() -> None:
    """Writes behind a proposed configuration need both rules."""
    tracker = CommitTracker(group("ab", 0), b"a", epoch_start=1, committed=0)
    tracker.propose(2, group("ab", 1))
    assert tracker.missing(set()) == 1
    assert tracker.missing({b"b"}) == 0


def test_copies_at_each_level() -> None:
    """Writes that ask for more count data voters at written, synced or visible, this node included."""
    tracker = CommitTracker(group("abcD", 1), b"a", epoch_start=1, committed=0)
    tracker.local_durable(9)
    tracker.acked(b"b", synced=6, written=8, visible=3)
    tracker.acked(b"x", synced=9, written=9, visible=9)
    tracker.acked(b"d", synced=9, written=9, visible=9)
    counts = {
        level: [tracker.copies_at(o, level) for o in (3, 6, 8, 9, 10)]
        for level in ("written", "synced", "visible")
    }
    assert counts == {"written": [2, 2, 2, 1, 0], "synced": [2, 2, 1, 1, 0], "visible": [2, 1, 0, 0, 0]}
    tracker.left(b"b")
    assert tracker.copies_at(3, "written") == 1


events = st.lists(st.tuples(st.sampled_from("abcdex"), st.integers(0, 30)), max_size=40)


@given(st.integers(1, 5), st.sampled_from([0, 1, 2, "majority", "all"]), st.integers(1, 5), events)
def test_the_rule_against_its_words(size: int, acks: Acks, start: int, script: list[tuple[str, int]]) -> None:
    """For any order of events, committed is the largest offset that the words of the rule allow."""
    configuration = group("abcde"[:size], acks)
    tracker = CommitTracker(configuration, b"a", epoch_start=start, committed=0)
    synced: dict[str, int] = {}
    for name, offset in script:
        synced[name] = max(synced.get(name, 0), offset)
        if name == "a":
            tracker.local_durable(synced[name])
        else:
            tracker.acked(name.encode(), synced[name])
        allowed = [
            o
            for o in range(start, 31)
            if synced.get("a", 0) >= o
            and sum(synced.get(v.name, 0) >= o for v in configuration.voters) >= configuration.copies
        ]
        assert tracker.committed == max(allowed, default=0)


@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from("abcdx"), st.integers(-1, 30)), max_size=40),
)
def test_the_bound_against_its_words(size: int, lag: int, start: int, script: list[tuple[str, int]]) -> None:
    """For any order of acks and partings (-1), committed is at any time what the words of the rule allow."""
    tracker = CommitTracker(group("abcd"[:size], 0, lag), b"a", epoch_start=start, committed=0)
    durable = committed = 0
    held: dict[str, int] = {}
    for name, offset in script:
        if name == "a":
            durable = max(durable, offset)
            tracker.local_durable(durable)
        elif offset < 0:
            tracker.left(name.encode())
        else:
            held[name] = offset
            tracker.acked(name.encode(), offset)
        others = "bcd"[: size - 1]
        furthest = max((held.get(other, 0) for other in others), default=1000)
        allowed = min(durable, furthest + lag)
        committed = max(committed, allowed if allowed >= start else 0)
        assert tracker.committed == committed


def test_a_proposal_that_most_voters_know_of_takes_effect_alone() -> None:
    """The rule before it cannot be met; what its own copies hold is committed, from the epoch start on."""
    old = group("abC", 1)
    tracker = CommitTracker(old, b"a", epoch_start=5, committed=3)
    assert tracker.proposed_reached() == 0
    tracker.propose(7, old.without([b"b"], 4))
    assert tracker.local_durable(6) == 3
    assert tracker.proposed_reached() == 6
    assert tracker.local_durable(9) == 3
    assert tracker.proposed_reached() == 9
    assert tracker.effect() == 9
    assert tracker.configuration.away
    assert tracker.proposed is None
    assert tracker.missing([]) == 0
    assert tracker.local_durable(10) == 10
    tracker.propose(12, tracker.configuration.with_copy_of(b"b"))
    assert tracker.local_durable(13) == 11, "from there on both rules"
    assert tracker.acked(b"b", 13) == 13
    assert tracker.missing([]) == 1
    assert tracker.effect() == 13, "nothing is proposed"


def test_a_configuration_may_be_proposed_once_the_epoch_start_is_committed() -> None:
    """Not before it, and not while another one is on its way."""
    tracker = CommitTracker(group("abc"), b"a", epoch_start=5, committed=3)
    tracker.local_durable(6)
    tracker.acked(b"b", 4)
    assert not tracker.may_propose
    tracker.acked(b"b", 5)
    assert tracker.may_propose
    tracker.propose(7, group("ab"))
    assert not tracker.may_propose
    tracker.local_durable(7)
    tracker.acked(b"b", 7)
    assert tracker.may_propose


def test_going_on_without_voters_may_stand_behind_a_proposal() -> None:
    """The one before it can perhaps never commit: then it alone takes effect; or each in its turn does."""
    old = group("abC", 1)
    alone = old.without([b"b"], 1)
    for back in (False, True):
        tracker = CommitTracker(alone, b"a", epoch_start=1, committed=0)
        tracker.propose(5, old)
        with pytest.raises(ValueError, match="not committed"):
            tracker.propose(8, old)
        tracker.propose(8, alone)
        assert tracker.rules == (alone, old, alone)
        assert tracker.proposed == (8, alone)
        assert tracker.local_durable(9) == 4
        assert tracker.missing([]) == 1
        if back:
            assert tracker.acked(b"b", 6) == 6
            assert tracker.rules == (old, alone)
            assert tracker.acked(b"b", 9) == 9
        else:
            assert tracker.effect() == 9
        assert tracker.rules == (alone,)
