"""Marks and requests arrive as they were sent; anything else is refused, never guessed."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvrep
from kvrep.brokers.interface import Delivery, Message
from kvrep.model.event import STRUCTURED, Event
from kvrep.sinks.stream import Mark, Part, Parts, Request, event_of, message_of, parts_of

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


def event_with(value: bytes, **fields: object) -> Event:
    return Event("aa", "/x", kvrep.Position(1, 2), 0, "put", "default", b"k", value, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["binary", "structured"])
@pytest.mark.parametrize("prefix", ["ce_", "cloudEvents:"])
def test_every_form_is_read_back(form: str, prefix: str) -> None:
    """Both modes give an equal event, with the prefix of either binding; the content type of the second is told."""
    event = event_with(b"\0v", before=b"old", created=False)
    message = message_of(event, one_line=True, form=form, prefix=prefix)  # type: ignore[arg-type]
    assert event_of(Delivery(message)) == event
    assert message.id == event.id
    if form == "structured":
        assert dict(message.headers) == {"content-type": STRUCTURED}
    else:
        assert message.headers[prefix + "type"] == "kvrep.put"


def test_attributes_that_are_too_large_for_headers() -> None:
    """A large former value goes in structured mode: brokers bound what is in headers."""
    event = event_with(b"v", before=bytes(100_000))
    message = message_of(event, one_line=True)
    assert sum(map(len, message.headers.values())) < 1000
    assert event_of(Delivery(message)) == event


def test_the_envelope_of_debezium() -> None:
    """Key and value are what to_debezium() gives; the marks of a snapshot have no form in it."""
    event = event_with(b"v")
    message = message_of(event, one_line=False, form="debezium")
    assert (message.key, message.body) == event.to_debezium()
    assert message_of(event, one_line=True, form="debezium").key == b""
    begin = Event("aa", "/x", kvrep.Position(1, 2), 0, "begin")
    assert message_of(begin, one_line=True, form="debezium") is None


@pytest.mark.parametrize("seed", range(5))
def test_parts_there_and_back(seed: int) -> None:
    """In any order, with repeats and two messages at once, parts become the messages that they were."""
    chance = random.Random(seed)
    values = [chance.randbytes(300_000), chance.randbytes(200_001)]
    events = [
        Event("aa", "/x", kvrep.Position(1, 2 + i), 0, "put", "default", b"k", value)
        for i, value in enumerate(values)
    ]
    sent: list[Message] = []
    for event in events:
        pieces = parts_of(message_of(event, one_line=True), event, 64 << 10)
        assert len(pieces) > 5
        assert all(len(piece.body) < 64 << 10 for piece in pieces)
        assert len({piece.id for piece in pieces}) == len(pieces)
        sent += pieces + pieces[:3]
    chance.shuffle(sent)
    parts = Parts()
    found: list[Event] = []
    for message in sent:
        part = Part.parse(message)
        assert part is not None
        whole = parts.add(part)
        if whole is not None:
            found.append(event_of(Delivery(whole)))
    assert sorted(found, key=lambda event: event.sequence) == events


def test_parts_of_two_snapshots_are_not_mixed() -> None:
    """A row has one id in all snapshots of a position, but another place in each: only its own parts make it."""
    whole = []
    parts = Parts()
    for sequence in ((1, 2, 5), (1, 2, 9)):
        event = Event("aa", "/x", kvrep.Position(*sequence[:2]), sequence[2] + (1 << 32), "put", "default", b"k",
                      bytes(100_000), snapshot=True)  # fmt: skip
        pieces = [Part.parse(m) for m in parts_of(message_of(event, one_line=True), event, 64 << 10)]
        whole.append((event, pieces))
    assert whole[0][1][0].id == whole[1][1][0].id
    (_, first), (event, second) = whole
    assert all(parts.add(piece) is None for piece in first[1:])
    found = [parts.add(piece) for piece in second]
    assert found[:-1] == [None] * (len(second) - 1)
    assert event_of(Delivery(found[-1])) == event


def test_what_fits_goes_whole_and_what_never_fits_is_refused() -> None:
    """Only what is too large is cut; more parts than a broker hands out at once would never be put together."""
    event = event_with(b"v")
    message = message_of(event, one_line=True)
    assert parts_of(message, event, 64 << 10) == [message]
    huge = event_with(bytes(20 << 20))
    with pytest.raises(kvrep.ValueTooLarge, match="--message-bytes"):
        parts_of(message_of(huge, one_line=True), huge, 64 << 10)


def test_gathered_parts_are_bounded_and_forgotten() -> None:
    """What belongs to events that took effect goes; too many messages at once are noticed."""
    parts = Parts()
    for number in range(9):
        event = Event("aa", "/x", kvrep.Position(1, number), 0, "put", "default", b"k", bytes(100_000))
        part = Part.parse(parts_of(message_of(event, one_line=True), event, 64 << 10)[0])
        assert parts.full is False
        parts.add(part)
    assert parts.full
    parts.forget((1, 7, 0))
    assert len(parts) == 1
    parts.clear()
    assert len(parts) == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ce_part", "3"), ("ce_part", "4/4"), ("ce_part", "0/9999"), ("ce_part", "-1/4"), ("ce_part", "x/y"),
        ("ce_sequence", "[1]"), ("ce_sequence", "{"), ("ce_headers", "[]"), ("ce_headers", '{"a": 1}'),
        ("ce_lineage", None), ("ce_whole", None),
    ],
)  # fmt: skip
def test_damaged_parts_are_refused(name: str, text: str | None) -> None:
    """A part with a field that is missing or is something else is a ProtocolError."""
    event = event_with(bytes(100_000))
    piece = parts_of(message_of(event, one_line=True), event, 64 << 10)[0]
    headers = {**piece.headers, name: text}
    if text is None:
        del headers[name]
    with pytest.raises(kvrep.ProtocolError):
        Part.parse(Message(piece.body, headers=headers))
