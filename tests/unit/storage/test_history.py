"""What the records of a log say of the log itself: a value that grows, is cut, and is read at any offset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvrep.errors import UpgradeRequired
from kvrep.model.configuration import Configuration, Voter
from kvrep.model.position import Position
from kvrep.model.record import Kind, Record
from kvrep.storage.history import History
from kvrep.storage.tree import State

ALONE = Configuration(acks=0)
BOTH = replace(
    ALONE, voters=(Voter(store_id=b"a" * 16, name="a", member=1), Voter(store_id=b"b" * 16, name="b", member=2)),
    acks=1, next_member=3,
)  # fmt: skip


def record(offset: int, kind: int, payload: Any, epoch: int = 1001) -> Record:
    return Record(offset, epoch, 0, kind, payload)


def begins(offset: int, epoch: int, configuration: Configuration, branch: bytes = b"x") -> Record:
    return record(offset, Kind.EPOCH, {"branch": branch, "configuration": configuration.to_wire()}, epoch)


def grown() -> History:
    """Epoch 1001 from 1 on, a configuration at 5, epoch 2001 on another branch from 8 on."""
    history = History.of(State())
    for one in (
        begins(1, 1001, ALONE),
        record(2, Kind.WRITE, ["default", [b"k", b"v"]]),
        record(5, Kind.CONFIGURATION, BOTH.to_wire()),
        begins(8, 2001, BOTH, b"y"),
    ):
        history = history.note(one)
    return history


def test_it_grows_with_what_is_noted() -> None:
    """Epochs, branches and configurations come from the records that tell of them, and from no others."""
    history = grown()

    assert list(history.epochs) == [(1001, 1), (2001, 8)]
    assert history.branches == ((1, b"x"), (8, b"y"))
    assert [(offset, c.voters) for offset, c in history.configurations] == [
        (0, ()), (1, ()), (5, BOTH.voters), (8, BOTH.voters),
    ]  # fmt: skip
    assert history.branch == b"y"
    assert history.position_at(7) == Position(1001, 7)
    changed = replace(BOTH, acks=0)
    history = history.note(record(9, Kind.CONFIGURATION, changed.to_wire(), 2001))
    assert history.in_force(8) == (BOTH, (9, changed))
    assert history.in_force(9) == (changed, None)


def test_a_record_noted_twice_changes_nothing() -> None:
    """What a follower repeats after a restart is not there twice."""
    history = grown()

    assert history.note(begins(8, 2001, BOTH, b"y")) == history
    assert history.note(record(5, Kind.CONFIGURATION, ALONE.to_wire())) == history


def test_cut() -> None:
    """A cut takes back what lies above it; what LMDB holds keeps at least its configuration."""
    history = grown()

    assert history.cut(8) == history
    assert list(history.cut(7).epochs) == [(1001, 1)]
    assert history.cut(7).branch == b"x"
    assert history.cut(4).configurations == history.configurations[:2]
    assert history.cut(0).configurations == history.configurations[:1]


def test_what_lmdb_is_told() -> None:
    """The state record gets the history as it stood at an offset, and gives it back."""
    state = State()
    grown().describe(state, 7)

    assert state.configured_at == 5
    assert state.branches == [(1, b"x")]
    assert History.of(State.unpack(state.pack())) == replace(
        grown().cut(7), configurations=grown().configurations[2:3]
    )


def test_an_unknown_kind_is_refused() -> None:
    """A record of a later version stops this one instead of being passed over."""
    with pytest.raises(UpgradeRequired, match="record 9 is of kind 99"):
        grown().note(record(9, 99, None))
