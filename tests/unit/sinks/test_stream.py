"""Marks and requests arrive as they were sent; anything else is refused, never guessed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvrep
from kvrep.brokers.interface import Delivery, Message
from kvrep.model.event import Event
from kvrep.sinks.stream import Mark, Request, event_of, message_of

numbers = st.integers(0, 2**63 - 1)
sequences = st.tuples(numbers, numbers, numbers)


@given(st.text("0123456789abcdef"), sequences, numbers, numbers)
def test_marks_there_and_back(lineage: str, through: tuple[int, int, int], behind: int, time_us: int) -> None:
    """A mark survives the transport, whatever numbers are in it."""
    mark = Mark(lineage, through, behind, time_us)
    assert Mark.parse(mark.message()) == mark


@given(st.text("0123456789abcdef"), st.text(max_size=20), sequences)
def test_requests_there_and_back(lineage: str, token: str, sequence: tuple[int, int, int]) -> None:
    """A request survives the transport."""
    request = Request(lineage, token, sequence)
    assert Request.parse(request.message()) == request


def test_an_event_is_no_mark() -> None:
    """Only what says that it is a mark is read as one."""
    event = Event("aa", "/x", kvrep.Position(1, 2), 0, "put", "default", b"k", b"v")
    assert Mark.parse(message_of(event, one_line=True)) is None
    assert Mark.parse(Message(b"anything")) is None


def test_keys_of_messages_keep_the_order_that_is_wanted() -> None:
    """In one line all messages share a key; else each key of the store has its own. The id names the change."""
    event = Event("aa", "/x", kvrep.Position(1, 2), 0, "put", "default", b"k", b"v")
    other = Event("aa", "/x", kvrep.Position(1, 3), 0, "put", "default", b"l", b"v")
    assert message_of(event, one_line=True).key == message_of(other, one_line=True).key
    assert message_of(event, one_line=False).key != message_of(other, one_line=False).key
    assert message_of(event, one_line=True).id == event.id
    for read in (
        event_of(Delivery(message_of(event, one_line=True))),
        event_of(Delivery(Message(event.to_json()))),
    ):
        assert read == event


@given(st.binary(max_size=60))
def test_noise_is_refused(body: bytes) -> None:
    """Random bytes are no request, no mark and no event: a ProtocolError, nothing else."""
    with pytest.raises(kvrep.ProtocolError):
        Request.parse(Message(body))
    with pytest.raises(kvrep.ProtocolError):
        Mark.parse(Message(body, headers={"ce_type": "kvrep.mark", "ce_lineage": "aa"}))
    with pytest.raises(kvrep.ProtocolError):
        event_of(Delivery(Message(body)))


@pytest.mark.parametrize(
    "sequence", [[1, 2], [1, 2, -1], [1, 2, 2**63], [1, 2, 1.5], [1, 2, True], "123", None]
)
def test_numbers_out_of_range_are_refused(sequence: object) -> None:
    """Negative, huge, broken and missing numbers do not pass."""
    body = json.dumps(
        {"lineage": "aa", "token": "", "sequence": sequence, "through": sequence, "behind": 0}
    ).encode()
    with pytest.raises(kvrep.ProtocolError):
        Request.parse(Message(body))
    with pytest.raises(kvrep.ProtocolError):
        Mark.parse(Message(body, headers={"ce_type": "kvrep.mark", "ce_lineage": "aa"}))
