"""Envelopes, and playing the primary's half of a stream from them."""

from __future__ import annotations

import random
from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.errors import ProtocolError, UpgradeRequired
from kvrep.model.codec import RecordEncoder, decode
from kvrep.model.position import EpochTable, Position
from kvrep.replication.envelope import (
    Envelope,
    EnvelopeKind,
    History,
    decode_envelope,
    encode_envelope,
    skip_records,
)
from kvrep.replication.messages import Hello, NeedBootstrap, Refused, Truncate, Welcome
from kvrep.replication.oneway import OneWay, Stale, judge

LINEAGE, BRANCH, SOURCE, SELF = (bytes([i]) * 16 for i in range(1, 5))
TABLE = EpochTable([(1001, 1)])


def history(epoch: int = 1001, epochs: EpochTable = TABLE, **changes: object) -> History:
    made = History(
        lineage=LINEAGE, branch=BRANCH, epoch=epoch, epochs=epochs, source_id=SOURCE, source="primary"
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def hello(last: int = 10, epochs: EpochTable = TABLE, **changes: object) -> Hello:
    position = Position(epochs.epoch_at(last), last)
    made = Hello(
        store_id=SELF, name="far", lineage=LINEAGE, branch=BRANCH, last=position, committed=last,
        epochs=epochs, promised_epoch=position.epoch,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def log(count: int) -> list[bytes]:
    """Records 1 to ``count``, each as its bytes."""
    encoder, running, found = RecordEncoder(), 0, []
    for offset in range(1, count + 1):
        data, running = encoder.encode(offset, 1001, 0, 0, ["default", [b"k", b"v%d" % offset]], running)
        found.append(data)
    return found


def run(records: list[bytes], first: int, last: int, **changes: object) -> Envelope:
    made = Envelope(
        kind=EnvelopeKind.RECORDS, history=history(), first=first, last=last, source_last=last,
        data=b"".join(records[first - 1 : last]),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def welcome(last: int = 0) -> Welcome:
    verdict = judge(hello(last) if last else Hello(store_id=SELF, name="far"), history())
    assert isinstance(verdict, Welcome)
    return verdict


def test_envelopes_come_back_as_they_were() -> None:
    """Every kind keeps all of its fields."""
    for kind in EnvelopeKind:
        envelope = Envelope(
            kind=kind,
            history=history(3001, EpochTable([(1001, 1), (2001, 5)]), ancestors=(SELF,)),
            time_us=5, source_last=9, first=7, last=7, part=1, parts=3, snapshot_id="abc", bytes_total=77,
            at=3, snapshot_epoch=2001, meta=b"meta", data=b"data",
        )  # fmt: skip
        assert decode_envelope(encode_envelope(envelope)) == envelope


@given(st.binary(max_size=200))
def test_anything_else_is_refused(body: bytes) -> None:
    """Whatever bytes come, they are refused with the typed error, also behind a right beginning."""
    for made in (body, b"kvr\x01" + body, b"kvr\x02" + body):
        with pytest.raises(ProtocolError):
            decode_envelope(made)


@given(st.data())
def test_a_turned_bit_is_found(data: st.DataObject) -> None:
    """One changed bit anywhere, the version included, is damage: it never asks for an upgrade."""
    body = bytearray(encode_envelope(run(log(3), 1, 3)))
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError):
        decode_envelope(bytes(body))


@pytest.mark.parametrize(
    "changes",
    [
        {"first": 0},
        {"first": 5, "last": 4},
        {"part": 3, "parts": 3},
        {"last": 2**63},
        {"data": b""},
        {"history": history(epoch=0, epochs=EpochTable())},
        {"history": history(lineage=b"short")},
        {"history": history(epoch=900)},
        {"meta": b"x" * ((1 << 20) + 1)},
        {"snapshot_id": "x" * 65},
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, object]) -> None:
    """A well-formed message with values that cannot be is refused."""
    with pytest.raises(ProtocolError):
        decode_envelope(encode_envelope(replace(run(log(3), 1, 3), **changes)))  # type: ignore[arg-type]


def test_a_newer_version_asks_for_an_upgrade() -> None:
    """A message of a later format is not skipped."""
    body = encode_envelope(run(log(1), 1, 1))
    newer = body[:3] + b"\x02" + body[4:-4]
    with pytest.raises(UpgradeRequired) as caught:
        decode_envelope(newer + crc32(newer).to_bytes(4, "big"))
    assert (caught.value.found, caught.value.supported) == (2, 1)


def test_skipping_records() -> None:
    """The rest of a run without its first records; not more than there are."""
    records = log(5)
    assert skip_records(b"".join(records), 3) == b"".join(records[3:])
    with pytest.raises(ProtocolError):
        skip_records(b"".join(records), 6)


def test_a_late_message_proves_nothing() -> None:
    """An old table that ends before our last record is no divergence; one that gives it away is."""
    assert isinstance(judge(hello(10), history()), Welcome)
    newer = EpochTable([(1001, 1), (2002, 6)])
    assert judge(hello(10, applied=3, committed=10), history(2002, newer)) == Truncate(
        to=Position(1001, 5), epoch=2002
    )
    assert isinstance(judge(hello(10, applied=8), history(2002, newer)), NeedBootstrap)
    assert judge(hello(10, newer), history()) == Stale(1001)
    assert judge(hello(10, promised_epoch=5001), history()) == Stale(1001)


def test_other_histories_are_refused() -> None:
    """Another store, or a branch that was forced apart, is refused by name."""
    other = judge(hello(10), history(lineage=SELF))
    assert isinstance(other, Refused)
    assert other.reason == "lineage"
    forced = judge(hello(10), history(branch=SELF))
    assert isinstance(forced, Refused)
    assert isinstance(judge(hello(10), history(branch=SELF, ancestors=(BRANCH,))), Welcome)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_and_repeats_give_the_log(seed: int) -> None:
    """Runs that overlap, repeat and overtake each other come out as the records, once each, in order."""
    chance = random.Random(seed)
    records = log(60)
    envelopes = []
    first = 1
    while first <= 60:
        last = min(60, first + chance.randint(0, 6))
        envelopes.append(run(records, first, last))
        first = last + 1
    for _ in range(10):  # what another publisher would have sent: other bounds
        first = chance.randint(1, 60)
        envelopes.append(run(records, first, min(60, first + chance.randint(0, 9))))
    chance.shuffle(envelopes)
    oneway = OneWay(welcome(), park_bytes=1 << 20)
    out = [segment for envelope in envelopes for segment in oneway.take(envelope)]
    assert b"".join(segment.data for segment in out) == b"".join(records)
    assert [segment.first for segment in out[1:]] == [segment.last + 1 for segment in out[:-1]]
    assert decode(b"".join(segment.data for segment in out), 1, 0)[0][-1].offset == 60
    assert oneway.gap is None
    assert oneway.parked_bytes == 0


@pytest.mark.parametrize("seed", range(10))
def test_parts_come_in_order(seed: int) -> None:
    """Parts of a large record are handed on in order, once each, whatever order they came in."""
    chance = random.Random(seed)
    records = log(3)
    pieces = [records[1][i : i + 10] for i in range(0, len(records[1]), 10)]
    parts = [run(records, 2, 2, part=i, parts=len(pieces), data=piece) for i, piece in enumerate(pieces)]
    envelopes = [run(records, 1, 1), *parts, *parts, run(records, 3, 3)]
    chance.shuffle(envelopes)
    oneway = OneWay(welcome(), park_bytes=1 << 20)
    out = [segment for envelope in envelopes for segment in oneway.take(envelope)]
    assert b"".join(segment.data for segment in out) == b"".join(records)
    assert [segment.part for segment in out if segment.first == 2] == list(range(len(pieces)))


def test_a_gap_is_told_and_bounded() -> None:
    """What is missing is named, and what waits for it is bounded."""
    records = log(20)
    oneway = OneWay(welcome(4), park_bytes=100)
    assert oneway.gap is None
    assert oneway.take(run(records, 9, 20)) == []
    assert oneway.gap == (5, 8)
    assert oneway.full
    (first, second) = oneway.take(run(records, 3, 8))
    assert (first.first, first.last, second.first, second.last) == (5, 8, 9, 20)
    assert not oneway.full
    beat = oneway.heartbeat()
    assert (beat.epoch, beat.last, beat.committed) == (1001, 20, 20)
