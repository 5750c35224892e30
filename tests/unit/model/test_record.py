"""Records and the payload of writes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.errors import ProtocolError
from kvrep.model.position import Position
from kvrep.model.record import Kind, Op, Record, write_payload

ops = st.lists(st.tuples(st.sampled_from("abc"), st.binary(max_size=3), st.none() | st.binary(max_size=3)))


@given(ops)
def test_operations_survive_the_payload(given_ops: list[Op]) -> None:
    """ops() undoes write_payload(), in order."""
    assert Record(1, 1001, 0, Kind.WRITE, write_payload(given_ops)).ops() == given_ops


def test_neighbours_of_one_keyspace_share_its_name() -> None:
    """Consecutive operations of a keyspace are joined; a return to it starts anew."""
    payload = write_payload([("a", b"1", b"x"), ("a", b"2", None), ("b", b"3", b"y"), ("a", b"4", b"z")])
    assert payload == ["a", [b"1", b"x", b"2", None], "b", [b"3", b"y"], "a", [b"4", b"z"]]


def test_other_kinds_have_no_operations() -> None:
    """Only a write changes keys."""
    assert Record(1, 1001, 0, Kind.DIGEST, [0, {}]).ops() == []


@pytest.mark.parametrize("payload", [None, 5, ["a"], ["a", [b"1"]], ["a", None], ["a", [b"1", b"x"], "b"]])
def test_a_malformed_write_is_a_typed_error(payload: Any) -> None:
    """A write whose payload cannot be paired up raises ProtocolError, whatever is wrong with it."""
    with pytest.raises(ProtocolError):
        Record(1, 1001, 0, Kind.WRITE, payload).ops()


def test_a_record_knows_its_position() -> None:
    """The position is epoch and offset."""
    assert Record(7, 1001, 0, Kind.WRITE, []).position == Position(1001, 7)
