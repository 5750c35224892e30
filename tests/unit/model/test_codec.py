"""The byte form of records: round trips, and every kind of damage."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.model.codec import FRAME, FRAME_BYTES, ChainBroken, RecordEncoder, decode, walk
from kvrep.model.record import Kind, Record, write_payload
from kvrep.model.sessions import Origin

keyspaces = st.sampled_from(["default", "users", "ä"])
ops = st.lists(st.tuples(keyspaces, st.binary(max_size=20), st.none() | st.binary(max_size=40)), max_size=5)


@st.composite
def runs(draw: st.DrawFn) -> list[Record]:
    """Records that follow one another, from any offset on."""
    first = draw(st.integers(1, 2**62))
    epoch = draw(st.integers(0, 2**62))
    records = []
    for offset, (step, payload) in enumerate(draw(st.lists(st.tuples(st.integers(0, 3), ops), max_size=5))):
        epoch += step
        origin = draw(
            st.none() | st.builds(Origin, st.just(b"s" * 16), st.integers(0, 2**56), st.just(9), st.just(3))
        )
        records.append(
            Record(first + offset, epoch, 1_700_000_000, Kind.WRITE, write_payload(payload), origin)
        )
    return records


def encode(records: list[Record], running: int = 0) -> tuple[bytes, int]:
    encoder, data = RecordEncoder(), b""
    for record in records:
        one, running = encoder.encode(*record[:5], running, record.origin)
        data += one
    return data, running


def frame(body: bytes, running: int = 0) -> bytes:
    """A body of our own choice, correctly framed."""
    return FRAME.pack(0xCE, crc32(body, running), 0xCE, len(body)) + body


@given(runs(), st.integers(0, 2**32 - 1))
def test_records_survive_the_round_trip(records: list[Record], running: int) -> None:
    """decode() undoes encode(), and both agree on the running checksum."""
    data, after = encode(records, running)
    first = records[0].offset if records else 1
    assert decode(data, first, running) == (records, after)
    assert decode(memoryview(data), first, running) == (records, after)


@given(runs())
def test_the_bytes_are_a_msgpack_stream(records: list[Record]) -> None:
    """Any msgpack tool reads running checksum, length and body, one record after another."""
    data, _ = encode(records)
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    bodies = [tuple(body) for body in list(unpacker)[2::3]]
    plain = [tuple(r._replace(kind=int(r.kind))) for r in records]
    assert bodies == [(*r[:5], list(r[5])) if r[5] is not None else r[:5] for r in plain]


def test_a_record_without_an_origin_has_the_bytes_it_always_had() -> None:
    """Forwarded writes have a sixth element; all other records are as before, and old ones are read."""
    data, running = RecordEncoder().encode(7, 1001, 5, Kind.WRITE, ["default", [b"k", b"v"]], 99)
    body = msgpack.packb([7, 1001, 5, 0, ["default", [b"k", b"v"]]])
    assert data == frame(body, 99)
    assert decode(data, 7, 99) == ([Record(7, 1001, 5, 0, ["default", [b"k", b"v"]])], running)


@pytest.mark.parametrize("origin", [None, 1, [b"s" * 16, 1, 1], [b"s" * 16, 1, 1, 2], [b"s", 1, 1, 1]])
def test_a_wrong_origin_is_damage(origin: Any) -> None:
    """A sixth element is an origin or the record is refused; a seventh does not exist."""
    body = [1, 1001, 5, 0, ["default", [b"k", b"v"]], origin]
    for wrong in (body, [*body[:5], [b"s" * 16, 1, 1, 1], 0]):
        with pytest.raises(ChainBroken):
            decode(frame(msgpack.packb(wrong)), 1, 0)


@given(runs(), st.data())
def test_every_changed_byte_is_noticed(records: list[Record], data: st.DataObject) -> None:
    """No byte of a run can change without decode() raising."""
    encoded, _ = encode(records)
    first = records[0].offset if records else 1
    flip = data.draw(st.integers(1, 255))
    for at in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[at] ^= flip
        with pytest.raises(ChainBroken):
            decode(bytes(damaged), first, 0)


@given(runs())
def test_every_truncation_is_noticed(records: list[Record]) -> None:
    """A run cut anywhere is either refused, or cut between records, which yields the records before."""
    encoded, _ = encode(records)
    first = records[0].offset if records else 1
    starts, end, _ = walk(encoded, 0)
    whole = {at: i for i, at in enumerate([*starts, end])}
    for at in range(len(encoded) + 1):
        if at in whole:
            assert decode(encoded[:at], first, 0)[0] == records[: whole[at]]
        else:
            with pytest.raises(ChainBroken) as caught:
                decode(encoded[:at], first, 0)
            assert caught.value.at == max(s for s in whole if s < at)


@given(runs(), st.integers(1, 2**32 - 1))
def test_a_run_joins_only_where_it_belongs(records: list[Record], wrong: int) -> None:
    """Another checksum before, or another first offset, is refused."""
    data, _ = encode(records)
    if not records:
        return
    with pytest.raises(ChainBroken):
        decode(data, records[0].offset, wrong)
    with pytest.raises(ChainBroken):
        decode(data, records[0].offset + 1, 0)


@given(runs(), st.integers(0, 4), st.binary(max_size=30))
def test_walk_finds_the_whole_records(records: list[Record], skip: int, junk: bytes) -> None:
    """walk() returns where each record starts, stops at the first that does not join, and can start later."""
    data, after = encode(records)
    starts, end, running = walk(data, 0)
    assert (len(starts), end, running) == (len(records), len(data), after)
    damaged = data + b"\x00" + junk
    assert walk(damaged, 0) == (starts, end, running)
    if skip < len(starts):
        before = walk(data[: starts[skip]], 0)[2]
        assert walk(data, before, starts[skip]) == (starts[skip:], end, after)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x95\x01\x01\x00\x00",
        msgpack.packb(7),
        msgpack.packb("12345"),
        msgpack.packb(b"\x01\x01\x00\x00\x00"),
        msgpack.packb([1, 1, 0, 0]),
        msgpack.packb([1, 1, 0, 0, [], 0]),
        msgpack.packb([2, 1, 0, 0, []]),
        msgpack.packb([True, 1, 0, 0, []]),
        msgpack.packb([1.0, 1, 0, 0, []]),
        msgpack.packb([1, 1.5, 0, 0, []]),
        msgpack.packb([1, -1, 0, 0, []]),
        msgpack.packb([1, 2**63, 0, 0, []]),
        msgpack.packb([1, None, 0, 0, []]),
        msgpack.packb([1, 1, 0, "write", []]),
        msgpack.packb({1: 1, 2: 1, 3: 0, 4: 0, 5: 0}),
        msgpack.packb([1, 1, 0, 0, []]) + b"\x00",
        msgpack.packb([1, 1, 0, 0, []]) + b"\x00\x00",
        msgpack.packb([1, 1, 0, 0, msgpack.ExtType(5, b"x")]),
        msgpack.packb([1, 1, 0, 0, {(): 1}]),
        b"\x95\x01\x01\x00\x00" + b"\x91" * 2000,
        b"\x95\x01\x01\x00\x00\xa2\xff\xff",
    ],
)
def test_a_body_that_is_no_record_is_refused(body: bytes) -> None:
    """A correct checksum does not make a record: the body must be exactly one."""
    with pytest.raises(ChainBroken):
        decode(frame(body), 1, 0)


def test_epochs_never_fall_within_a_run() -> None:
    """A record of an older epoch behind a newer one is refused."""
    data, _ = encode([Record(1, 2001, 0, 0, []), Record(2, 1001, 0, 0, [])])
    with pytest.raises(ChainBroken) as caught:
        decode(data, 1, 0)
    assert caught.value.offset == 2


def test_frames_and_bodies_must_agree() -> None:
    """Bodies that only add up across frames are refused."""
    two = msgpack.packb([1, 1, 0, 0, []]) + msgpack.packb(0)
    data = frame(two)
    data += frame(b"", crc32(two))
    with pytest.raises(ChainBroken):
        decode(data, 1, 0)


def test_a_large_record_does_not_keep_its_memory() -> None:
    """The encoder renews its packer after a record above a mebibyte, and goes on as before."""
    encoder = RecordEncoder()
    before: Any = encoder._pack
    small, _ = encoder.encode(1, 1, 0, 0, [], 0)
    assert encoder._pack is before
    large, _ = encoder.encode(1, 1, 0, 0, ["d", [b"k", bytes(1 << 21)]], 0)
    assert encoder._pack is not before
    assert len(large) > 1 << 21
    assert encoder.encode(1, 1, 0, 0, [], 0)[0] == small
    assert len(small) > FRAME_BYTES
