"""What the log looks like in a message broker: one message per piece of the log, or of a snapshot.

Nobody answers in a broker, so every message says all that a follower must know to judge it by itself: which
history it belongs to, with the whole epoch table, so that what a superseded publisher sends is recognised.

::

    magic     4 bytes   "kvr" and the version, 1
    length    u32       bytes in the header, big-endian
    header    msgpack   a list, in the order of the fields below; see ``_pack``
    data                records, or a piece of a snapshot, or nothing
    checksum  u32       CRC-32 of all bytes before it

Magic, version and checksum stand where they stand in every version to come: what was damaged on its way is so
told from what a newer kvrep has sent.

Kinds::

    RECORDS   whole records, or a part of one that is too large for a message
    MARK      no data: how far the publisher is, so that an idle stream is told from a dead one
    SNAPSHOT  describes a snapshot, whose pieces follow as
    PIECE     bytes of it
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any
from zlib import crc32

import msgpack

from kvrep.errors import ProtocolError, UpgradeRequired
from kvrep.model.codec import FRAME, FRAME_BYTES
from kvrep.model.position import EPOCH_MAX, OFFSET_MAX, EpochTable, Position

__all__ = ["Envelope", "EnvelopeKind", "History", "decode_envelope", "encode_envelope", "skip_records"]

MAGIC = b"kvr"
VERSION = 1
FIELDS = 19
ID_BYTES = 16
NAME_CHARS_MAX = 64
EPOCHS_MAX = 10_000
BRANCHES_MAX = 1000
PARTS_MAX = 1 << 16
META_BYTES_MAX = 1 << 20
_U32 = struct.Struct(">I")
_HEAD_BYTES = 8


class EnvelopeKind(IntEnum):
    RECORDS = 1
    MARK = 2
    SNAPSHOT = 3
    PIECE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Where records come from."""

    lineage: bytes
    branch: bytes
    ancestors: tuple[bytes, ...] = ()
    """The branches that this one was forced out of."""
    epoch: int
    """That of the primary when this was sent: what comes with a lower one than known is superseded."""
    epochs: EpochTable = field(default_factory=EpochTable)
    """Through the last record that this publisher has sent."""
    source_id: bytes
    """The store id of the primary."""
    source: str = ""
    """Its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    kind: EnvelopeKind
    history: History
    time_us: int = 0
    """When it was sent, by the publisher's wall clock."""
    source_last: int = 0
    """The end of the primary's log as the publisher knew it."""
    first: int = 0
    """RECORDS: the first and last record. MARK: the last one sent, twice. SNAPSHOT and PIECE: the last one
    contained."""
    last: int = 0
    part: int = 0
    parts: int = 1
    """RECORDS: of one record that is cut into parts. PIECE: ``part`` is unused."""
    snapshot_id: str = ""
    bytes_total: int = 0
    """SNAPSHOT: its size."""
    at: int = 0
    """PIECE: where it belongs."""
    snapshot_epoch: int = 0
    """SNAPSHOT: the epoch of the last record contained."""
    meta: bytes = b""
    """SNAPSHOT: the description that only a bootstrap understands."""
    data: bytes = field(default=b"", repr=False)

    @property
    def position(self) -> Position:
        """SNAPSHOT: as of when it is."""
        return Position(self.snapshot_epoch, self.last)

    @property
    def name(self) -> str:
        """Unique and the same for repeats: the id of the message."""
        lineage = self.history.lineage.hex()
        if self.kind in (EnvelopeKind.SNAPSHOT, EnvelopeKind.PIECE):
            return f"{lineage}/{self.snapshot_id}/{self.kind.name.lower()}/{self.at}"
        return f"{lineage}/{self.history.epoch}/{self.kind.name.lower()}/{self.first}-{self.last}/{self.part}"


def encode_envelope(envelope: Envelope) -> bytes:
    """The bytes of a message."""
    header: bytes = msgpack.packb(_pack(envelope))
    head = b"%b%c%b%b" % (MAGIC, VERSION, _U32.pack(len(header)), header)
    return b"".join((head, envelope.data, _U32.pack(crc32(envelope.data, crc32(head)))))


def _pack(e: Envelope) -> list[Any]:
    h = e.history
    return [
        int(e.kind), h.lineage, h.branch, list(h.ancestors), h.epoch, [x for pair in h.epochs for x in pair],
        h.source_id, h.source, e.time_us, e.source_last, e.first, e.last, e.part, e.parts,
        e.snapshot_id, e.bytes_total, e.at, e.snapshot_epoch, e.meta,
    ]  # fmt: skip


def decode_envelope(body: bytes) -> Envelope:
    """A message within all limits; ``ProtocolError`` when it is none, ``UpgradeRequired`` for a newer form."""
    if len(body) < _HEAD_BYTES + 4 or body[:3] != MAGIC:
        raise ProtocolError("not a message of kvrep publish")
    view = memoryview(body)
    if crc32(view[:-4]) != _U32.unpack_from(body, len(body) - 4)[0]:
        raise ProtocolError("a message is damaged: its checksum is wrong")
    if body[3] != VERSION:
        raise UpgradeRequired("a message of a newer kvrep publish", found=body[3], supported=VERSION)
    start = _HEAD_BYTES + _U32.unpack_from(body, 4)[0]
    if start > len(body) - 4:
        raise ProtocolError("a message's header is longer than the message")
    try:
        header = msgpack.unpackb(view[_HEAD_BYTES:start], strict_map_key=False, max_ext_len=0)
        return _checked(_unpack(header, body[start:-4]))
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"a message's header is not readable: {error}") from error


def _unpack(h: Any, data: bytes) -> Envelope:
    if type(h) is not list or len(h) != FIELDS or type(h[3]) is not list or type(h[5]) is not list:
        raise ValueError("not a list of the right fields")
    numbers = iter(h[5])
    history = History(
        lineage=h[1],
        branch=h[2],
        ancestors=tuple(h[3]),
        epoch=h[4],
        epochs=EpochTable(zip(numbers, numbers, strict=True)),
        source_id=h[6],
        source=h[7],
    )
    return Envelope(
        kind=EnvelopeKind(h[0]), history=history, time_us=h[8], source_last=h[9], first=h[10], last=h[11],
        part=h[12], parts=h[13], snapshot_id=h[14], bytes_total=h[15], at=h[16], snapshot_epoch=h[17],
        meta=h[18], data=data,
    )  # fmt: skip


def _checked(e: Envelope) -> Envelope:
    h = e.history
    ids = (h.lineage, h.branch, h.source_id, *h.ancestors)
    if not all(type(one) is bytes and len(one) == ID_BYTES for one in ids) or len(h.ancestors) > BRANCHES_MAX:
        raise ValueError("an id is not one")
    if len(h.epochs) > EPOCHS_MAX or any(not 0 < x <= EPOCH_MAX for pair in h.epochs for x in pair):
        raise ValueError("the epoch table is not one")
    if type(h.source) is not str or len(h.source) > NAME_CHARS_MAX or type(e.snapshot_id) is not str:
        raise ValueError("a name is not text")
    numbers = (h.epoch, e.time_us, e.source_last, e.first, e.last, e.bytes_total, e.at, e.snapshot_epoch)
    if any(type(n) is not int or not 0 <= n <= OFFSET_MAX for n in numbers) or not h.epoch:
        raise ValueError("a number is out of range")
    if type(e.meta) is not bytes or len(e.meta) > META_BYTES_MAX or len(e.snapshot_id) > NAME_CHARS_MAX:
        raise ValueError("a description is too long")
    if type(e.part) is not int or type(e.parts) is not int or not 0 <= e.part < e.parts <= PARTS_MAX:
        raise ValueError("a part that cannot be")
    if e.kind is EnvelopeKind.RECORDS and not (
        0 < e.first <= e.last and e.data and (e.parts == 1 or e.first == e.last)
    ):
        raise ValueError(f"records {e.first}..{e.last} that cannot be")
    if h.epochs.last_epoch > h.epoch:
        raise ValueError("the epoch table is ahead of the epoch")
    return e


def skip_records(data: bytes, count: int) -> bytes:
    """What is left of whole records without the first ``count``; ``ProtocolError`` if there are not so many."""
    at = 0
    for _ in range(count):
        if at + FRAME_BYTES > len(data):
            raise ProtocolError("fewer records than announced")
        at += FRAME_BYTES + FRAME.unpack_from(data, at)[3]
    return data[at:]
