"""The byte form of messages: what is written is read back, and nothing else is believed."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from struct import pack
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep._pb import wire_pb2 as pb
from kvrep.errors import ProtocolError
from kvrep.model.position import OFFSET_MAX, EpochTable, Position
from kvrep.replication.messages import (
    Ack,
    Confirm,
    Credit,
    Fence,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Probe,
    Promise,
    Refused,
    Segment,
    SlotState,
    Truncate,
    Welcome,
)
from kvrep.transport import wire
from kvrep.transport.interface import SnapshotChunk, SnapshotInfo, SnapshotRequest

numbers = st.integers(0, OFFSET_MAX) | st.integers(0, 300)
ids = st.binary(min_size=16, max_size=16)
ids_or_none = ids | st.just(b"")
names = st.text(st.characters(categories=["L", "N", "P"]), max_size=64)
tokens = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=64)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
positions = st.builds(Position, numbers, numbers)


@st.composite
def epoch_tables(draw: st.DrawFn) -> EpochTable:
    epochs = sorted(draw(st.sets(st.integers(1, OFFSET_MAX), max_size=20)))
    size = len(epochs)
    firsts = sorted(draw(st.sets(st.integers(1, OFFSET_MAX), min_size=size, max_size=size)))
    return EpochTable(zip(epochs, firsts, strict=True))


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    first, last = sorted((draw(numbers) or 1, draw(numbers) or 1))
    parts = draw(st.integers(1, 4096))
    return Segment(
        epoch=draw(numbers),
        first=first,
        last=last if parts == 1 else first,
        data=draw(st.binary(min_size=1, max_size=200)),
        committed=draw(numbers),
        part=draw(st.integers(0, parts - 1)),
        parts=parts,
        compressed=draw(st.booleans()),
        more=draw(st.booleans()),
    )


hellos = st.builds(
    Hello,
    store_id=ids,
    name=names,
    lineage=ids_or_none,
    branch=ids_or_none,
    protocol_min=st.integers(1, 5),
    protocol_max=st.integers(5, 9),
    features=st.tuples(names, names),
    voter=st.booleans(),
    address=texts,
    promised_epoch=numbers,
    last=positions,
    running=st.integers(0, 2**32 - 1),
    applied=numbers,
    committed=numbers,
    epochs=epoch_tables(),
    credit_bytes=numbers,
    durability=names,
)
acks = st.builds(
    Ack,
    written=numbers,
    synced=numbers,
    visible=numbers,
    promised_epoch=numbers,
    stamp_us=numbers,
)
from_follower = (
    hellos
    | acks
    | st.builds(Confirm, round=numbers, promised_epoch=numbers)
    | st.builds(Credit, bytes_granted=numbers)
    | st.builds(Promise, epoch=numbers, last=positions, committed=numbers, epochs=epoch_tables())
)
welcomes = st.builds(
    Welcome,
    lineage=ids,
    branch=ids_or_none,
    store_id=ids,
    name=names,
    epoch=numbers,
    protocol=st.integers(1, 9),
    features=st.tuples(names),
    heartbeat_interval_ms=st.integers(1, 3_600_000),
    last=positions,
)
heartbeats = st.builds(
    Heartbeat,
    epoch=numbers,
    last=numbers,
    committed=numbers,
    stamp_us=numbers,
    time_us=numbers,
    slots=st.lists(st.builds(SlotState, store_id=ids, name=names, acked=numbers)).map(tuple),
    path=st.lists(names).map(tuple),
    behind_bytes=numbers,
)
from_primary = (
    segments()
    | heartbeats
    | welcomes
    | st.builds(Truncate, to=positions, epoch=numbers)
    | st.builds(NeedBootstrap, first=numbers, reason=texts)
    | st.builds(Fence, epoch=numbers)
    | st.builds(Probe, epoch=numbers, round=numbers)
    | st.builds(Refused, reason=tokens, message=texts, primary_address=texts, epoch=numbers)
)
chunks = st.builds(
    lambda offset, data: SnapshotChunk(offset=offset, data=data, crc32=zlib.crc32(data)),
    st.integers(0, 2**60),
    st.binary(min_size=1, max_size=200),
)
infos = st.builds(
    SnapshotInfo,
    snapshot_id=tokens,
    bytes_total=numbers,
    position=positions,
    meta=st.binary(max_size=100),
)
requests = st.builds(
    SnapshotRequest,
    store_id=ids,
    name=names,
    snapshot_id=names,
    offset=numbers,
    lineage=ids_or_none,
    of_follower=st.booleans(),
)

FORMS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "from_follower": (from_follower, wire.encode_from_follower, wire.decode_from_follower),
    "from_primary": (from_primary, wire.encode_from_primary, wire.decode_from_primary),
    "snapshot_item": (chunks | infos, wire.encode_snapshot_item, wire.decode_snapshot_item),
    "snapshot_request": (requests, wire.encode_snapshot_request, wire.decode_snapshot_request),
}
forms = pytest.mark.parametrize("form", FORMS)


def sealed(form: str, data: bytes) -> bytes:
    """What a peer that means these bytes would send: with the checksum that messages of a stream carry."""
    return data + pack(">I", crc32(data)) if form.startswith("from_") else data


@forms
@given(data=st.data())
def test_round_trip(form: str, data: st.DataObject) -> None:
    """Every message is equal to itself after its bytes were read back."""
    messages, encode, decode = FORMS[form]
    message = data.draw(messages)
    assert decode(encode(message)) == message


@forms
@given(noise=st.binary(max_size=300))
def test_noise(form: str, noise: bytes) -> None:
    """Arbitrary bytes are either a message that can be sent on or a ProtocolError."""
    _believed_or_refused(form, noise)


@forms
@given(noise=st.binary(max_size=120))
def test_noise_behind_a_right_length(form: str, noise: bytes) -> None:
    """Arbitrary headers get as far as the checks of the fields, and no further."""
    _believed_or_refused(form, sealed(form, pack(">I", len(noise)) + noise))


@forms
@given(data=st.data())
def test_mutations(form: str, data: st.DataObject) -> None:
    """A message with changed, missing or added bytes raises nothing but ProtocolError."""
    messages, encode, _ = FORMS[form]
    encoded = bytearray(encode(data.draw(messages)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(encoded)))
        encoded[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    _believed_or_refused(form, bytes(encoded))
    _believed_or_refused(form, sealed(form, bytes(encoded[:-4])))


@pytest.mark.parametrize("form", ["from_follower", "from_primary"])
@given(data=st.data())
def test_a_flipped_bit_is_found(form: str, data: st.DataObject) -> None:
    """A bit that turned on the way never makes another message: no false ack, no false fence.

    The records of a segment are left out: they carry checksums of their own, to the disk and beyond.
    """
    messages, encode, decode = FORMS[form]
    message = data.draw(messages)
    encoded = bytearray(encode(message))
    size = len(encoded) - len(message.data) if isinstance(message, Segment) else len(encoded)
    bit = data.draw(st.integers(0, 8 * size - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        decode(bytes(encoded))


def _believed_or_refused(form: str, data: bytes) -> None:
    _, encode, decode = FORMS[form]
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert decode(encode(message)) == message


SEGMENT = Segment(epoch=1001, first=5, last=6, data=b"records", committed=4)
HELLO = Hello(store_id=b"i" * 16, name="b")
ACK = Ack(written=3, synced=2, visible=1)
WELCOME = Welcome(lineage=b"l" * 16, branch=b"", store_id=b"s" * 16, name="a", epoch=1001, protocol=1)


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (replace(ACK, synced=2**63), "ack offset"),
        (replace(ACK, promised_epoch=2**63), "ack promised epoch"),
        (replace(ACK, stamp_us=2**63), "ack stamp"),
        (replace(HELLO, store_id=b"short"), "hello store id: 5 bytes"),
        (replace(HELLO, lineage=b"short"), "hello lineage"),
        (replace(HELLO, name="n" * 65), "hello name: 65 characters"),
        (replace(HELLO, name="a\nb"), "cannot be printed"),
        (replace(HELLO, last=Position(2**63, 1)), "hello last epoch"),
        (replace(HELLO, applied=2**63), "hello applied"),
        (replace(HELLO, protocol_min=3, protocol_max=2), "hello oldest protocol"),
        (replace(HELLO, protocol_max=0), "hello newest protocol"),
        (replace(HELLO, features=("f",) * 65), "hello feature: 65"),
        (replace(HELLO, address="a" * 301), "hello address"),
        (replace(HELLO, durability="d" * 65), "hello durability"),
        (
            replace(HELLO, epochs=EpochTable((i, i) for i in range(1, 10_002))),
            "hello epoch table: 10001 epochs",
        ),
        (replace(HELLO, epochs=EpochTable([(1, 2**63)])), "hello epoch table"),
        (Credit(bytes_granted=2**63), "credit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_of_followers(message: Any, what: str) -> None:
    """A follower's message with a field out of its limits is refused with the field's name."""
    with pytest.raises(ProtocolError, match=what):
        wire.decode_from_follower(wire.encode_from_follower(message))


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (replace(SEGMENT, epoch=2**63), "segment epoch"),
        (replace(SEGMENT, last=2**63), "segment last"),
        (replace(SEGMENT, committed=2**63), "segment committed"),
        (replace(SEGMENT, first=0), r"records 0\.\.6"),
        (replace(SEGMENT, first=7), r"records 7\.\.6"),
        (replace(SEGMENT, parts=0), "part 0 of 0"),
        (replace(SEGMENT, last=5, part=2, parts=2), "part 2 of 2"),
        (replace(SEGMENT, last=5, parts=4097), "part 0 of 4097"),
        (replace(SEGMENT, parts=2), "2 records cut into 2 parts"),
        (replace(SEGMENT, data=b""), "no records"),
        (replace(WELCOME, lineage=b""), "welcome lineage"),
        (replace(WELCOME, protocol=0), "welcome protocol"),
        (replace(WELCOME, heartbeat_interval_ms=0), "heartbeat interval"),
        (Refused(reason="", message=""), "refused reason"),
        (Refused(reason="full", message="", primary_address="a" * 301), "primary address"),
        (Heartbeat(epoch=2**63, last=1, committed=1), "heartbeat epoch"),
        (Heartbeat(epoch=1, last=1, committed=1, path=("a",) * 65), "heartbeat path"),
        (
            Heartbeat(
                epoch=1,
                last=1,
                committed=1,
                slots=(SlotState(store_id=b"i" * 16, name="b", acked=1),) * 1001,
            ),
            "1001 slots",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_of_primaries(message: Any, what: str) -> None:
    """A primary's message with a field out of its limits is refused with the field's name."""
    with pytest.raises(ProtocolError, match=what):
        wire.decode_from_primary(wire.encode_from_primary(message))


@forms
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "too short"),
        (b"\0\0\0", "too short"),
        (b"\0\0\0\5abc", "claims a header up to byte 9"),
        (b"\0\0\0\0", "kind this node does not know|store id"),
        (b"\0\0\0\1\xff", "not readable"),
        (pack(">I", 1 << 20) + bytes(1 << 20), "above the limit"),
        (b"\x09\0\0\0", "claims a header"),
    ],
)
def test_frames(form: str, data: bytes, what: str) -> None:
    """A frame that does not hold together is refused with the reason."""
    with pytest.raises(ProtocolError, match=what):
        FORMS[form][2](sealed(form, data))


def test_unknown_kind() -> None:
    """A message kind of a later version is refused, not taken for something else."""
    with pytest.raises(ProtocolError, match="does not know"):
        wire.decode_from_primary(sealed("from_primary", pack(">I", 4) + b"\xa2\x06\x01x"))


def test_bytes_behind_a_message() -> None:
    """Only messages with a payload may have bytes behind their header."""
    with pytest.raises(ProtocolError, match="fence: 1 bytes behind"):
        wire.decode_from_primary(sealed("from_primary", wire.encode_from_primary(Fence(epoch=1))[:-4] + b"x"))
    credit = wire.encode_from_follower(Credit(bytes_granted=1))[:-4]
    with pytest.raises(ProtocolError, match="credit: 1 bytes behind"):
        wire.decode_from_follower(sealed("from_follower", credit + b"x"))


def test_epoch_tables_that_do_not_grow() -> None:
    """A hostile epoch table is refused: columns of different length, or not growing."""
    for epochs, firsts, what in (
        ([1, 2], [1], "2 epochs with 1"),
        ([2, 1], [1, 2], "does not grow"),
        ([1, 2], [2, 2], "does not grow"),
    ):
        table = pb.EpochTable(epochs=epochs, firsts=firsts)
        header = pb.FromFollower(promise=pb.Promise(epochs=table)).SerializeToString()
        with pytest.raises(ProtocolError, match=what):
            wire.decode_from_follower(sealed("from_follower", pack(">I", len(header)) + header))


def test_unknown_segment_flags() -> None:
    """A flag of a later version is refused, since it may change what the records mean."""
    encoded = bytearray(wire.encode_from_primary(SEGMENT))
    encoded[37] = 128
    encoded[38:42] = pack(">I", crc32(encoded[:38]))
    with pytest.raises(ProtocolError, match="flags 128"):
        wire.decode_from_primary(bytes(encoded))


def test_long_texts_are_cut_when_sent() -> None:
    """A reason that is too long loses its end on the way instead of ending the stream."""
    for message in (
        Refused(reason="full", message="m" * 5000),
        NeedBootstrap(first=1, reason="r" * 5000),
    ):
        decoded: Any = wire.decode_from_primary(wire.encode_from_primary(message))
        assert len(getattr(decoded, "message", getattr(decoded, "reason", ""))) in (1000,)
