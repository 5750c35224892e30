"""Positions and epoch tables, the latter against explicit histories."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.model.position import EPOCH_MEMBERS, EpochTable, Position, epoch_after, member_of

positions = st.builds(Position, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))


@given(positions)
def test_a_position_reads_back_from_its_text(position: Position) -> None:
    """parse() undoes str()."""
    assert Position.parse(str(position)) == position


@pytest.mark.parametrize("text", ["", ":", "1", "1:", ":1", "1:2:3", "a:1", "-1:2", "1: 2", "1.0:2", "²:1"])
def test_anything_else_is_no_position(text: str) -> None:
    """Texts that are not epoch:offset raise ValueError."""
    with pytest.raises(ValueError, match="not a position"):
        Position.parse(text)


@given(st.integers(0, 2**40), st.integers(1, EPOCH_MEMBERS - 1), st.integers(1, EPOCH_MEMBERS - 1))
def test_epochs_grow_and_name_their_member(epoch: int, member: int, other: int) -> None:
    """The next epoch is above, tells its member, and two members never make the same one."""
    after = epoch_after(epoch, member)
    assert after > epoch
    assert member_of(after) == member
    assert (epoch_after(epoch, other) == after) == (member == other)


@pytest.mark.parametrize("member", [-1, 0, EPOCH_MEMBERS])
def test_member_numbers_have_a_range(member: int) -> None:
    """A member number that would spill into the round is refused."""
    with pytest.raises(ValueError, match="member number"):
        epoch_after(0, member)


@pytest.mark.parametrize(
    "entries", [[(0, 1)], [(1, 0)], [(2, 1), (1, 2)], [(1, 1), (1, 2)], [(1, 1), (2, 1)], [(1, 2), (2, 1)]]
)
def test_a_table_that_does_not_grow_is_refused(entries: list[tuple[int, int]]) -> None:
    """Epochs and first offsets both start above zero and grow strictly."""
    with pytest.raises(ValueError, match="does not grow"):
        EpochTable(entries)


# A history is a list of epochs, one per record. The model of a table is the list itself.
History = list[int]


def table_of(history: History) -> EpochTable:
    firsts = {epoch: offset for offset, epoch in reversed(list(enumerate(history, 1)))}
    return EpochTable(sorted(firsts.items()))


def append(history: History, epochs: list[int]) -> History:
    """The history, and records of the given epochs that do not fall below its end."""
    for epoch in epochs:
        history = [*history, max(epoch, history[-1] if history else 1)]
    return history


@st.composite
def forks(draw: st.DrawFn) -> tuple[History, History]:
    """Two histories that were one, and then were continued by different primaries, whose epochs differ."""
    even = st.lists(st.sampled_from(range(2, 20, 2)), max_size=12)
    odd = st.lists(st.sampled_from(range(3, 21, 2)), max_size=12)
    shared = append([], draw(st.lists(st.integers(1, 8), max_size=12)))
    one, two = append(shared, draw(even)), append(shared, draw(odd))
    # A fork that goes on in the shared epoch would be two primaries in one epoch: only one side may.
    if shared and len(two) > len(shared) and two[len(shared)] == shared[-1]:
        one = shared
    return one, two


@given(forks())
def test_common_is_the_longest_shared_prefix(fork: tuple[History, History]) -> None:
    """common() finds what comparing the histories record by record finds, from either side."""
    one, two = fork
    expected = 0
    while expected < min(len(one), len(two)) and one[expected] == two[expected]:
        expected += 1
    a, b = table_of(one), table_of(two)
    assert a.common(len(one), b, len(two)) == expected
    assert b.common(len(two), a, len(one)) == expected


@given(forks(), st.integers(0, 24))
def test_a_table_answers_like_its_history(fork: tuple[History, History], at: int) -> None:
    """epoch_at, holds, cut and last_epoch agree with the list of epochs."""
    history = fork[0]
    table = table_of(history)
    at = min(at, len(history))
    assert table.epoch_at(at) == (history[at - 1] if at else 0)
    assert table.last_epoch == (history[-1] if history else 0)
    assert table.cut(at) == table_of(history[:at])
    for epoch in range(22):
        held = at > 0 and history[at - 1] == epoch
        assert table.holds(Position(epoch, at), len(history)) == held
    assert not table.holds(Position(table.last_epoch, len(history) + 1), len(history))


def test_tables_are_values() -> None:
    """Equal tables are equal and hash alike; with_epoch leaves the original alone."""
    table = EpochTable([(1001, 1)])
    longer = table.with_epoch(2001, 5)
    assert longer == EpochTable([(1001, 1), (2001, 5)])
    assert hash(longer) == hash(EpochTable(longer))
    assert len(table) == 1
    assert table != [(1001, 1)]
    assert repr(longer) == "EpochTable([(1001, 1), (2001, 5)])"
