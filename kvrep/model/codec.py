"""The byte form of records: what is logged, shipped, archived and replayed.

A record is a frame of ten bytes and a body. The whole is a valid msgpack stream, so any msgpack tool
can read a log region, and a segment is decoded by one C call::

    0xce  running   u32 big-endian   CRC-32 of the body, seeded with the running checksum before it
    0xce  length    u32 big-endian   bytes in the body
    body  msgpack   [offset, epoch, time_us, kind, payload]
                    or, of a forwarded write, [offset, epoch, time_us, kind, payload, origin]

The running checksum (as in etcd's write-ahead log) does two jobs in one pass: it proves the body whole,
and it proves that the record follows the one before, because that one's checksum seeds it. The first
record of a lineage is seeded with 0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any
from zlib import crc32

import msgpack

from kvrep.errors import ProtocolError
from kvrep.model.position import EPOCH_MAX, OFFSET_MAX
from kvrep.model.record import Record
from kvrep.model.sessions import Origin

__all__ = ["CHECKSUM_CRC32", "FRAME_BYTES", "ChainBroken", "RecordEncoder", "bodies", "decode", "walk"]

CHECKSUM_CRC32 = 1
"""The id of the checksum algorithm, kept in every log file and said in every join."""

FRAME = struct.Struct(">BIBI")
FRAME_BYTES = FRAME.size
_U32 = 0xCE
PACKER_BYTES_MAX = 1 << 20
"""A packer keeps the memory of the largest body it packed; after a larger one than this it is renewed."""


class ChainBroken(ProtocolError):
    """A record is damaged, or does not follow the one before."""

    _names = ("at", "offset")
    at: int
    offset: int


class RecordEncoder:
    """Encodes records one after another. Not thread-safe; one encoder belongs to one writer."""

    __slots__ = ("_pack",)

    def __init__(self) -> None:
        self._pack = _packer()

    def encode(
        self,
        offset: int,
        epoch: int,
        time_us: int,
        kind: int,
        payload: Any,
        running: int,
        origin: Origin | None = None,
    ) -> tuple[bytes, int]:
        """The frame and body of one record, and the running checksum through it."""
        if origin is None:
            body = self._pack((offset, epoch, time_us, kind, payload))
        else:
            body = self._pack((offset, epoch, time_us, kind, payload, origin))
        if len(body) > PACKER_BYTES_MAX:
            self._pack = _packer()
        running = crc32(body, running)
        return FRAME.pack(_U32, running, _U32, len(body)) + body, running


def _packer() -> Callable[[Any], bytes]:
    pack: Callable[[Any], bytes] = msgpack.Packer(autoreset=True, use_bin_type=True).pack
    return pack


def walk(data: bytes | memoryview, running: int, start: int = 0) -> tuple[list[int], int, int]:
    """Check the frames of ``data`` from ``start`` on, without decoding.

    Returns (the byte position of each whole, joining record; the position behind the last of them;
    the running checksum there). Stops at the first record that is cut off or does not join.
    """
    starts: list[int] = []
    view = memoryview(data)
    unpack, end, at = FRAME.unpack_from, len(view), start
    while at + FRAME_BYTES <= end:
        mark, check, mark2, length = unpack(view, at)
        body = at + FRAME_BYTES
        if mark != _U32 or mark2 != _U32 or body + length > end:
            break
        value = crc32(view[body : body + length], running)
        if value != check:
            break
        starts.append(at)
        running = value
        at = body + length
    return starts, at, running


def decode(data: bytes | memoryview, first: int, running: int) -> tuple[list[Record], int]:
    """Decode whole records that must start at offset ``first`` and join ``running``.

    Returns the records and the running checksum through the last. Raises :class:`ChainBroken` when a
    byte is wrong, a record is missing or cut off, or an offset or epoch is out of order.
    """
    starts, end, running_after = walk(data, running)
    if end != len(data):
        raise ChainBroken(
            f"record {first + len(starts)} is damaged or does not follow the one before it",
            at=end,
            offset=first + len(starts),
        )
    bodies = _bodies(data, len(starts))
    records: list[Record] = []
    epoch_before = 0
    for offset, body in enumerate(bodies, first):
        origin = None
        try:
            if type(body) is list and len(body) == 6:
                origin = Origin.of(body.pop())
            found, epoch, time_us, kind, payload = body
            ok = type(body) is list and found == offset and epoch_before <= epoch <= EPOCH_MAX
        except (TypeError, ValueError, ProtocolError):
            ok = False
        if not (ok and type(found) is type(epoch) is type(kind) is int) or offset > OFFSET_MAX:
            raise ChainBroken(f"expected record {offset}, found {str(body)[:80]}", at=0, offset=offset)
        epoch_before = epoch
        records.append(Record(offset, epoch, time_us, kind, payload, origin))
    return records, running_after


def bodies(data: bytes, running: int, most: int) -> tuple[list[Any], int]:
    """Decode the bodies of up to ``most`` whole records that must join ``running``, and nothing more.

    Returns them as ``[offset, epoch, time_us, kind, payload]`` and the running checksum through the last. For
    readers of a log that was checked when it was written. :class:`ChainBroken` when a byte is wrong, with the
    number of the record in ``data`` as its offset.
    """
    view, unpack, at, size = memoryview(data), FRAME.unpack_from, 0, len(data)
    count = 0
    while at < size and count < most:
        _, check, _, length = unpack(data, at) if at + FRAME_BYTES <= size else (0, 0, 0, 0)
        start = at + FRAME_BYTES
        at = start + length
        running = crc32(view[start:at], running)
        if running != check or at > size:
            raise ChainBroken("a record of the log is damaged", at=start, offset=count)
        count += 1
    return _bodies(data if at == size else view[:at], count), running


def _bodies(data: bytes | memoryview, count: int) -> list[Any]:
    """Every third object of the msgpack stream: (running, length, body) repeat, ``count`` times."""
    size = len(data)
    unpacker = msgpack.Unpacker(
        max_buffer_size=size or 1,
        raw=False,
        strict_map_key=False,
        max_str_len=min(size, 1 << 16),
        max_ext_len=0,
    )
    unpacker.feed(data)
    try:
        objects = list(unpacker)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ChainBroken(f"a record body is not msgpack: {error}", at=0, offset=0) from error
    if len(objects) != 3 * count:
        raise ChainBroken("a record body is not one msgpack object", at=0, offset=0)
    return objects[2::3]
