"""Rescue files: records that a node had to drop, saved first.

::

    0   8   magic b"kvresc01"
    8   4   length of the header, big-endian
    12  …   header: JSON {lineage, first, last, reason, time, running_before}
    …   …   the records, byte for byte as they stood in the log (model/codec.py)
"""

from __future__ import annotations

import errno
import json
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvrep.errors import CorruptionError, ProtocolError, StorageFull
from kvrep.model.codec import decode
from kvrep.model.record import Record
from kvrep.storage.log import Log
from kvrep.storage.log_file import fsync_directory

__all__ = ["UNFINISHED", "RescueFile", "load_rescue", "save_records", "saving"]

MAGIC = b"kvresc01"
UNFINISHED = ".new"
"""What the name of a file ends with while it is written; one that is left over is worth nothing."""
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


@contextmanager
def saving(path: Path) -> Iterator[BinaryIO]:
    """Write the file ``path``: at the end it is there, whole and durable, or an error left nothing of it.

    ``OSError`` as it comes.
    """
    directory, fresh = path.parent, path.with_name(path.name + UNFINISHED)
    if not directory.exists():
        directory.mkdir()
        fsync_directory(directory.parent)
    try:
        with open(fresh, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    fsync_directory(directory)


def save_records(directory: Path, log: Log, first: int, last: int, *, lineage: bytes, reason: str) -> Path:
    """Save records ``first``…``last`` of ``log``; durable on return.

    :class:`StorageFull` when there is no room for them, ``OSError`` when they cannot be saved otherwise.
    """
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
    try:
        with saving(path) as file:
            file.write(_HEAD.pack(MAGIC, len(header)) + header)
            offset = first
            while offset <= last and (run := log.read(offset, 1 << 20)) is not None:
                file.write(run.data)
                offset = run.last + 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"no disk space to save records {first} to {last} before they are dropped"
            ) from error
        raise
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
    except (ValueError, KeyError, TypeError, ProtocolError) as error:
        raise CorruptionError(f"{path.name} is damaged: {error}") from error
    if not records or records[-1].offset != found.last:
        raise CorruptionError(f"{path.name} ends before record {found.last}")
    return found
