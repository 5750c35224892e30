"""Becoming primary: enough promises, the best log, the next epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvrep.model.configuration import Acks, Configuration, Voter
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.replication.messages import Promise
from kvrep.replication.promotion import Fetch, Promotion, why_not_go_on


def group(names: str, acks: Acks = "majority") -> Configuration:
    """Voters by letter; a capital letter is a witness."""
    voters = tuple(
        Voter(store_id=n.lower().encode(), name=n, member=ord(n.lower()) - 96, witness=n.isupper())
        for n in names
    )
    return Configuration(acks=acks, voters=voters, next_member=27)


def promise(last: int, *table: tuple[int, int], epoch: int = 3001) -> Promise:
    epochs = EpochTable(table)
    return Promise(epoch=epoch, last=Position(epochs.last_epoch, last), committed=0, epochs=epochs)


E1, E2 = (1001, 1), (2002, 10)
OWN = promise(12, E1, E2)


@pytest.mark.parametrize(
    ("names", "acks", "answers", "enough", "missing"),
    [
        ("a", 0, "", True, ""),
        ("ab", 0, "", False, "b"),
        ("ab", 0, "b", True, ""),
        ("ab", 1, "", True, "b"),
        ("abc", "majority", "", False, "bc"),
        ("abc", "majority", "c", True, "b"),
        ("abc", "all", "", True, "bc"),
        ("abc", 1, "b", True, "c"),
        ("abc", 0, "b", False, "c"),
        ("abcde", 1, "bc", False, "de"),
        ("abcde", 1, "bcd", True, "e"),
        ("abC", "majority", "", True, "b"),
        ("abC", 0, "c", False, "b"),
        ("bc", "majority", "", False, "bc"),
        ("bc", "majority", "b", True, "c"),
        ("abc", "majority", "xyz", False, "bc"),
    ],
)
def test_the_fence(names: str, acks: Acks, answers: str, enough: bool, missing: str) -> None:
    """F data voters, this one included if it is one; witnesses and strangers never count."""
    promotion = Promotion(group(names, acks), b"a", 3001, OWN)
    for name in answers:
        promotion.on_promise(name.encode(), OWN)
    assert (promotion.enough, promotion.ready) == (enough, enough)
    assert promotion.missing == tuple(missing)
    assert promotion.needed == group(names, acks).fence


def test_asking_beforehand_promises_nothing() -> None:
    """An answer with a lower epoch says that the voter is there, but does not count."""
    promotion = Promotion(group("abc"), b"a", 3001, OWN)
    assert not promotion.would_be_enough
    promotion.on_promise(b"b", replace(OWN, epoch=2002))
    assert promotion.would_be_enough
    assert not promotion.enough
    promotion.on_promise(b"b", OWN)
    assert promotion.enough


def test_a_late_answer_does_not_undo_a_promise() -> None:
    """Promises only grow, so an answer below the last one is an old one."""
    promotion = Promotion(group("abc"), b"a", 3001, OWN)
    promotion.on_promise(b"b", OWN)
    promotion.on_promise(b"b", replace(OWN, epoch=2002))
    assert promotion.enough


def test_a_promise_outlives_the_connection() -> None:
    """A voter that promised stays bound; one that only answered does not count any more."""
    promotion = Promotion(group("abcde"), b"a", 3001, OWN)
    promotion.on_promise(b"b", OWN)
    promotion.on_promise(b"c", replace(OWN, epoch=2002))
    assert promotion.would_be_enough
    for name in (b"b", b"c", b"d"):
        promotion.left(name)
    assert promotion.missing == ("c", "d", "e")
    assert not promotion.would_be_enough


def test_nobody_promises_for_us() -> None:
    """Our own promise is the one we were made with."""
    promotion = Promotion(group("a"), b"a", 3001, OWN)
    promotion.on_promise(b"a", replace(OWN, epoch=9001))
    assert promotion.ready


@pytest.mark.parametrize("answer", [replace(OWN, epoch=4002), promise(20, E1, (4002, 10))])
def test_a_higher_epoch_ends_the_attempt(answer: Promise) -> None:
    """Somebody promised, or wrote in, a higher epoch: the next attempt goes above it."""
    promotion = Promotion(group("abc"), b"a", 3001, OWN)
    promotion.on_promise(b"b", OWN)
    assert promotion.ready
    promotion.on_promise(b"c", answer)
    assert promotion.superseded
    assert not promotion.ready
    assert promotion.highest_seen == 4002
    assert promotion.next_epoch(1) == 5001


def test_the_next_epoch_is_above_our_own() -> None:
    """Another attempt of the same member never repeats an epoch."""
    promotion = Promotion(group("abc"), b"a", 3001, OWN)
    assert promotion.next_epoch(1) == 4001


def test_the_best_log_is_taken_over_first() -> None:
    """Voters ahead are told best first, by epoch and then offset; the fetch starts where both logs part."""
    promotion = Promotion(group("abcde"), b"a", 5001, replace(OWN, epoch=5001))
    promotion.on_promise(b"b", promise(15, E1, E2, epoch=5001))
    promotion.on_promise(b"c", promise(11, E1, (3003, 8), epoch=5001))
    promotion.on_promise(b"d", promise(99, E1, epoch=5001))
    promotion.on_promise(b"e", promise(99, E1, E2, epoch=2002))
    assert [v.name for v in promotion.ahead] == ["c", "b"]
    assert promotion.enough
    assert not promotion.ready
    fetch = promotion.fetch
    assert fetch is not None
    assert (fetch.voter.name, fetch.after, fetch.to) == ("c", Position(1001, 7), Position(3003, 11))
    assert not fetch.below_committed
    promotion.fetched(promise(11, E1, (3003, 8), epoch=5001))
    assert promotion.fetch is None
    assert promotion.ready


def test_an_empty_log_fetches_everything() -> None:
    """Where nothing is shared the fetch starts at zero."""
    promotion = Promotion(group("ab"), b"a", 3001, promise(0))
    promotion.on_promise(b"b", OWN)
    fetch = promotion.fetch
    assert fetch is not None
    assert (fetch.after, fetch.to) == (ZERO, OWN.last)


def test_a_fetch_says_when_it_would_drop_what_is_committed() -> None:
    """A log that parts from ours below our commit offset is not taken over silently."""
    promotion = Promotion(group("ab"), b"a", 3001, replace(OWN, committed=10))
    promotion.on_promise(b"b", promise(20, E1, (2003, 10)))
    fetch = promotion.fetch
    assert fetch is not None
    assert (fetch.after, fetch.below_committed) == (Position(1001, 9), True)


def test_strangers_and_witnesses_are_not_fetched_from() -> None:
    """Only data voters that promised hold what counts."""
    promotion = Promotion(group("abC"), b"a", 3001, OWN)
    for name in (b"c", b"x"):
        promotion.on_promise(name, promise(99, E1, E2))
    assert promotion.ahead == ()
    assert promotion.ready


def test_every_configuration_that_may_be_in_force_is_fenced() -> None:
    """A proposed configuration counts from the start, one that a fetch brought from then on."""
    old, new = group("ab", 1), group("abcde", "majority")
    proposed = Promotion(old, b"a", 3001, OWN, proposed=(new,))
    assert (proposed.needed, proposed.enough, proposed.missing) == (3, False, ("b", "c", "d", "e"))
    promotion = Promotion(old, b"a", 3001, OWN)
    assert promotion.enough
    promotion.learned(new)
    promotion.learned(new)
    assert not promotion.enough
    for name in (b"c", b"d"):
        promotion.on_promise(name, OWN)
    assert promotion.enough


@pytest.mark.parametrize(
    ("names", "answers", "majority"),
    [("a", "", True), ("ab", "", False), ("abC", "c", True), ("abC", "", False), ("abcd", "b", False)],
)
def test_the_majority_counts_witnesses(names: str, answers: str, majority: bool) -> None:
    """Automatic promotions need most of all voters besides the fence."""
    promotion = Promotion(group(names), b"a", 3001, OWN)
    for name in answers:
        promotion.on_promise(name.encode(), OWN)
    assert promotion.majority == majority


def test_where_the_rule_may_be_lowered_most_voters_must_promise() -> None:
    """F data voters are not enough: one of most voters knows whether records were acknowledged without them."""
    rule = replace(group("abC", 1), degrade_after_s=1.0)
    promotion = Promotion(rule, b"a", 3001, OWN)
    assert not promotion.would_be_enough
    assert promotion.missing == ("b", "C")
    promotion.on_promise(b"c", replace(OWN, last=ZERO, epochs=EpochTable()))
    assert promotion.enough
    assert promotion.ready


def test_records_that_were_acknowledged_without_us_must_be_here() -> None:
    """A voter tells from where on: our log, or what we can fetch, must reach there, or into a later epoch."""
    rule = group("abC", 1)
    for lowered, lacks in (
        (Position(2002, 12), False),
        (Position(2002, 13), True),
        (Position(1001, 500), False),
        (Position(2999, 1), True),
    ):
        promotion = Promotion(rule, b"a", 3001, OWN)
        witness = replace(OWN, last=ZERO, epochs=EpochTable(), lowered=lowered)
        promotion.on_promise(b"c", witness)
        assert promotion.enough
        assert promotion.needs_majority
        assert (promotion.lacks, promotion.would_lack, promotion.ready) == (lacks, lacks, not lacks)
    promotion = Promotion(rule, b"a", 3001, OWN)
    promotion.on_promise(b"b", replace(promise(20, E1, E2), lowered=Position(2002, 15)))
    assert promotion.lacks
    assert not promotion.would_lack
    assert promotion.fetch is not None
    promotion.fetched(promise(20, E1, E2))
    assert promotion.ready


def test_a_voter_that_is_away_counts_for_the_majority_only() -> None:
    """Its copy is not asked for, its promise is."""
    rule = replace(group("abC", 1), degrade_after_s=1.0).without([b"b"], 5)
    promotion = Promotion(rule, b"a", 3001, OWN)
    assert not promotion.enough
    promotion.on_promise(b"b", promise(3, E1))
    assert promotion.enough
    other = Promotion(rule, b"b", 3001, OWN)
    other.on_promise(b"c", OWN)
    assert not other.enough, "only a is known to hold what was acknowledged"


def test_what_may_not_be_taken_over() -> None:
    """A history that parts from ours below what LMDB holds, or below what we know to be committed."""
    fetch = Fetch(
        voter=group("ab").voters[1], after=Position(1001, 9), to=Position(2002, 12), below_committed=True
    )
    assert "below what LMDB holds" in fetch.problem(10, may_drop=True)
    assert "below what is committed here" in fetch.problem(9, may_drop=False)
    assert not fetch.problem(9, may_drop=True)
    assert not replace(fetch, below_committed=False).problem(9, may_drop=False)


def test_what_others_know_to_be_committed_counts_for_our_own_records_only() -> None:
    """The most that one of those that promised knows, if our log has the same record there."""
    for known, wanted in (
        (replace(OWN, committed=11), 11),
        (replace(OWN, committed=3), 5),
        (replace(promise(30, E1, E2), committed=13), 5),
        (replace(promise(12, E1, (2003, 9)), committed=11), 5),
        (replace(promise(12, E1, (2003, 9)), committed=8), 8),
        (replace(promise(12, E1, E2, epoch=2900), committed=11), 5),
    ):
        promotion = Promotion(group("abc"), b"a", 3001, replace(OWN, committed=5))
        promotion.on_promise(b"b", known)
        assert promotion.committed == wanted


@pytest.mark.parametrize(
    ("last", "table", "committed", "synchronous", "word"),
    [
        (12, ((1001, 1), (3001, 10)), 12, True, ""),  # no more than ours
        (14, ((1001, 1), (3001, 10)), 12, True, ""),  # what this node never acknowledged
        (14, ((1001, 1), (3001, 10)), 13, True, "lost data"),
        (14, ((1001, 1), (3001, 10)), 13, False, ""),  # asynchronous: the unsynced tail may go
        (13, ((1001, 1), (3001, 10), (4002, 13)), 12, True, "another primary"),
        (13, ((1001, 1), (3001, 10), (4002, 13)), 12, False, "another primary"),
    ],
)
def test_a_restarted_primary_goes_on_only_where_nothing_acknowledged_is_missing(
    last: int, table: tuple[tuple[int, int], ...], committed: int, synchronous: bool, word: str
) -> None:
    """What its own followers have beyond it does not count, unless it is committed; another primary's does."""
    own = promise(12, (1001, 1), (3001, 10))
    b = group("ab").voters[1]
    answer = replace(promise(last, *table), committed=committed)
    problem = why_not_go_on(own, [(b, answer)], 1, synchronous=synchronous)
    assert word in problem
    assert bool(problem) == bool(word)
