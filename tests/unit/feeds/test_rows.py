"""Rows of a snapshot become changes when somebody looks at them."""

from __future__ import annotations

import pytest

from kvrep.feeds.rows import Rows
from kvrep.model.change import Change
from kvrep.model.position import Position

AT = Position(1001, 7)
OPS = [("a", b"1", b"x"), ("a", b"2", None), ("b", b"1", b""), ("b", b"2", b"y")]


class Named:
    def token(self, change: Change) -> str:
        return f"after {change.index}"


ROWS = Rows(OPS, at=AT, first=5, previous=(1001, 7, 4), time_us=9, origin=Named())


def test_rows_are_the_changes_of_a_snapshot() -> None:
    """Each names its place and the one before it, whether it is met in order, by number or from behind."""
    found = list(ROWS)

    assert [(c.keyspace, c.key, c.value) for c in found] == OPS
    assert [c.kind for c in found] == ["put", "delete", "put", "put"]
    assert [c.sequence for c in found] == [(1001, 7, n) for n in (5, 6, 7, 8)]
    assert [c.previous for c in found] == [(1001, 7, n) for n in (4, 5, 6, 7)]
    assert all(c.snapshot and c.last and c.position == AT and c.time_us == 9 for c in found)
    assert found[2].resume == "after 7"
    assert [ROWS[i] for i in range(4)] == found
    assert [ROWS[i] for i in range(-4, 0)] == found
    with pytest.raises(IndexError):
        ROWS[4]


@pytest.mark.parametrize("first", range(5))
def test_pieces_of_rows_are_rows(first: int) -> None:
    """A piece holds the same changes as the whole does there, its operations included."""
    for end in range(first, 6):
        piece = ROWS[first:end]
        assert list(piece) == list(ROWS)[first:end]
        assert list(piece.ops) == OPS[first:end]
        assert bool(piece) == bool(OPS[first:end])
    with pytest.raises(ValueError, match="follow each other"):
        ROWS[::2]
