"""CloudEvents: both modes come back whole, and nothing mangled is taken for one."""

from __future__ import annotations

import base64
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvrep
from kvrep.model.change import BEGIN, DELETE, EMIT, END, PUT, ROW_INDEX, Change
from kvrep.model.event import STRUCTURED, Event
from kvrep.model.position import Position

LINEAGE = "ab" * 16
PREFIXES = ["ce_", "ce-", "cloudEvents:", "cloudEvents_"]
numbers = st.integers(0, 2**62)
sequences = st.tuples(numbers, numbers, st.integers(0, 2**34))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    kind = draw(st.sampled_from([PUT, DELETE, EMIT, BEGIN, END]))
    row = kind in {BEGIN, END} or (kind == PUT and draw(st.booleans()))
    of_key = kind in {PUT, DELETE}
    return Change(
        Position(draw(numbers), draw(numbers)),
        draw(st.integers(0, 2**31)) + (ROW_INDEX if row else 0),
        kind,
        draw(st.sampled_from(["default", "users", "a-b_c"])) if of_key else "",
        draw(st.binary(min_size=1, max_size=40)) if of_key else b"",
        draw(st.binary(max_size=40)) if kind in {PUT, EMIT} else None,
        draw(st.integers(0, 4 * 10**15)),
        draw(st.booleans()),
        draw(st.none() | sequences),
        row,
        draw(st.none() | st.binary(max_size=20)) if of_key else None,
        draw(st.none() | st.booleans()) if of_key else None,
        draw(texts.filter(bool)) if kind == EMIT else "",
        draw(st.none() | st.dictionaries(texts, texts, max_size=3)) if kind == EMIT else None,
    )


@given(changes())
def test_events_come_back_whole(change: Change) -> None:
    """An event read back from binary or structured mode equals what was written."""
    event = Event.from_change(LINEAGE, change, content_type="application/json")
    if change.value is None:
        event = Event.from_change(LINEAGE, change)

    assert Event.from_json(event.to_json()) == event
    for prefix in PREFIXES:
        headers, body = event.to_binary(prefix)
        assert Event.from_binary(headers, body) == event
        assert Event.from_binary({k: v.encode() for k, v in headers.items()}, body) == event


def put(**more: object) -> Change:
    given = {"position": Position(1001, 5), "index": 0, "kind": PUT, "keyspace": "users", "key": b"a/\xff",
             "value": b"v", "time_us": 1_700_000_000_123_456}  # fmt: skip
    return Change(**{**given, **more})  # type: ignore[arg-type]


def test_the_attributes_are_those_of_cloudevents() -> None:
    """Id, source, type, subject and time have the form that the specification asks for."""
    headers, body = Event.from_change(LINEAGE, put(previous=(1001, 4, 2))).to_binary("ce-")

    assert body == b"v"
    assert headers == {
        "ce-specversion": "1.0",
        "ce-id": f"{LINEAGE}/1001/5/0",
        "ce-source": f"/kvrep/{LINEAGE}",
        "ce-type": "kvrep.put",
        "ce-subject": "users/a%2F%FF",
        "ce-time": "2023-11-14T22:13:20.123456Z",
        "ce-sequence": "00000000000003e9-0000000000000005-0000000000",
        "ce-previous": "00000000000003e9-0000000000000004-0000000002",
        "ce-last": "true",
        "ce-lineage": LINEAGE,
        "content-type": "application/octet-stream",
    }
    assert STRUCTURED == "application/cloudevents+json"


def test_attribute_names_are_allowed_ones() -> None:
    """Extensions have lower-case letters and digits only, at most 20 of them, as the specification wants."""
    change = put(before=b"", created=False, previous=(1, 1, 1), snapshot=True)
    event = Event.from_change(LINEAGE, change)
    for name in event.attributes():
        assert name.isascii()
        assert name.isalnum()
        assert name == name.lower()
        assert len(name) <= 20


def test_sequences_sort_as_text() -> None:
    """The text of a later sequence is greater."""
    places = sorted([(1, 2, 3), (1, 2, 2**33), (1, 10, 0), (2, 1, 0), (1000, 1, 0), (10, 9, 0)])
    made = [
        Event.from_change(LINEAGE, put(position=Position(e, o), index=i, kind=DELETE, value=None))
        for e, o, i in places
    ]

    ordered = [event.attributes()["sequence"] for event in made]

    assert ordered == sorted(ordered)


def test_the_same_row_of_two_snapshots_at_one_position_has_one_id() -> None:
    """Rows are named by their key: their number in a snapshot depends on what else it selects."""
    one = Event.from_change(LINEAGE, put(index=ROW_INDEX + 1, snapshot=True))
    two = Event.from_change(LINEAGE, put(index=ROW_INDEX + 9, snapshot=True))
    other = Event.from_change(LINEAGE, put(index=ROW_INDEX + 1, snapshot=True, key=b"b"))

    assert one.id == two.id
    assert one.id != other.id


def test_mangled_events_raise_one_error() -> None:
    """Whatever a header, the body or the document becomes, ProtocolError or an event comes out."""
    chance = random.Random(11)
    event = Event.from_change(LINEAGE, put(previous=(1001, 4, 2), before=b"x", created=False))
    headers, body = event.to_binary()
    document = json.loads(event.to_json())
    odd = ["", "x", "9" * 400, "-", "é", "true", "null", "[" * 2000, "2023-11-14T22:13:20", "\x00", "b!"]
    wrong = 0
    for _ in range(4000):
        changed, values = dict(headers), dict(document)
        name = chance.choice(sorted(changed))
        changed[name] = chance.choice(odd)
        values[chance.choice(sorted(values))] = chance.choice([*odd, 5, None, [], {}])
        if chance.random() < 0.3:
            del changed[chance.choice(sorted(changed))]
        for read, parts in ((Event.from_binary, (changed, body)), (Event.from_json, (json.dumps(values),))):
            try:
                read(*parts)  # type: ignore[operator]
            except kvrep.ProtocolError:
                wrong += 1
    assert wrong > 4000
    text = event.to_json()
    for i in range(len(text)):
        try:
            Event.from_json(text[:i])
        except kvrep.ProtocolError:
            continue
        raise AssertionError(f"the first {i} bytes of a document were taken for an event")
    for made in (b"", b"[]", b"5", b"\xff", b"[" * 100_000):
        with pytest.raises(kvrep.ProtocolError):
            Event.from_json(made)


def test_keys_that_no_store_has_are_no_events() -> None:
    """A key of 511 bytes comes back, and one above, which only a forged event has, is refused."""
    longest = Event.from_change(LINEAGE, put(key=b"k" * 511))
    assert Event.from_binary(*longest.to_binary()) == longest
    with pytest.raises(kvrep.ProtocolError, match="a key of 512 bytes"):
        Event.from_json(Event.from_change(LINEAGE, put(key=b"k" * 512)).to_json())


def test_the_envelope_of_debezium() -> None:
    """Rows are r, new keys c, others u, deletes d; values in base64 or as the caller decodes them."""

    def envelope(change: Change) -> dict[str, object]:
        _, value = Event.from_change(LINEAGE, change).to_debezium()
        made: dict[str, object] = json.loads(value)
        return made

    assert envelope(put())["op"] == "u"
    assert envelope(put(created=True))["op"] == "c"
    assert envelope(put(snapshot=True, index=ROW_INDEX + 1))["op"] == "r"
    deleted = envelope(put(kind=DELETE, value=None, before=b"old"))
    assert (deleted["op"], deleted["after"]) == ("d", None)
    assert deleted["before"] == base64.b64encode(b"old").decode()
    message = envelope(put(kind=EMIT, keyspace="", key=b"", topic="t"))
    assert (message["op"], message["message"]) == ("m", {"prefix": "t", "content": "dg=="})
    key, value = Event.from_change(LINEAGE, put(value=b'{"a": 1}')).to_debezium(
        lambda _, data: json.loads(data)
    )
    assert json.loads(value)["after"] == {"a": 1}
    assert json.loads(key) == {"key": base64.b64encode(b"a/\xff").decode()}
    with pytest.raises(ValueError, match="marks"):
        Event.from_change(LINEAGE, put(kind=END, value=None, keyspace="", key=b"")).to_debezium()
