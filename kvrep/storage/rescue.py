"""Rescue files: records that a node had to drop, saved first.

::

    0   8   magic b"kvresc01"
    8   4   length of the header, big-endian
    12  …   header: JSON {lineage, first, last, reason, time, running_before}
    …   …   the records, byte for byte as they stood in the log (model/codec.py)
"""

from __future__ import annotations

import json
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from kvrep.errors import CorruptionError, ProtocolError
from kvrep.model.codec import decode
from kvrep.model.record import Record
from kvrep.storage.log import Log
from kvrep.storage.log_file import fsync_directory

__all__ = ["RescueFile", "load_rescue", "save_records"]

MAGIC = b"kvresc01"
_HEAD = struct.Struct(">8sI")


@dataclass(frozen=True, slots=True)
class RescueFile:
    """What a rescue file holds."""

    path: Path
    first: int
    last: int
    reason: str
    time_s: float
    records: tuple[Record, ...]
    lineage: str = ""
    running_before: int = 0
    """The running checksum before ``first``: whose log has the same one there shares the history till then."""


def save_records(directory: Path, log: Log, first: int, last: int, *, lineage: bytes, reason: str) -> Path:
    """Save records ``first``…``last`` of ``log``; durable on return. ``OSError`` when they cannot be saved."""
    directory.mkdir(exist_ok=True)
    path = directory / f"records-{first}-{last}-{time.time_ns()}.kvrescue"
    header = json.dumps(
        {
            "lineage": lineage.hex(),
            "first": first,
            "last": last,
            "reason": reason,
            "time": time.time(),
            "running_before": log.running_at(first - 1),
        }
    ).encode()
    with open(path, "xb") as file:
        file.write(_HEAD.pack(MAGIC, len(header)) + header)
        offset = first
        while offset <= last and (run := log.read(offset, 1 << 20)) is not None:
            file.write(run.data)
            offset = run.last + 1
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(directory)
    fsync_directory(directory.parent)  # the first rescue made the directory
    return path


def load_rescue(path: Path) -> RescueFile:
    """Read a rescue file back; :class:`CorruptionError` when it is not whole."""
    raw = path.read_bytes()
    if len(raw) < _HEAD.size or raw[:8] != MAGIC:
        raise CorruptionError(f"{path.name} is not a rescue file")
    length = _HEAD.unpack_from(raw)[1]
    try:
        header = json.loads(raw[_HEAD.size : _HEAD.size + length])
        records, _ = decode(raw[_HEAD.size + length :], header["first"], header["running_before"])
        found = RescueFile(
            path,
            header["first"],
            header["last"],
            header["reason"],
            header["time"],
            tuple(records),
            header["lineage"],
            header["running_before"],
        )
    except (ValueError, KeyError, TypeError, OverflowError, ProtocolError) as error:
        raise CorruptionError(f"{path.name} is damaged: {error}") from error
    if not records or records[-1].offset != found.last:
        raise CorruptionError(f"{path.name} ends before record {found.last}")
    return found
