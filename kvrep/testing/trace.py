"""The trace of a workload: what a process did to the files below one folder, in order."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

__all__ = ["Event", "Kind", "Trace", "TraceError", "parse", "read_folder"]

_HEAD = struct.Struct("<BiqqII")


class TraceError(Exception):
    """The trace is not whole, or holds a call that the model does not know: it would prove nothing."""


class Kind(IntEnum):
    """As in record_io.c."""

    OPEN = 1
    CLOSE = 2
    WRITE = 3
    SYNC = 4
    RESIZE = 5
    RENAME = 6
    UNLINK = 7
    MKDIR = 8
    RMDIR = 9
    ALLOCATE = 10
    MARK = 11
    UNKNOWN = 12


class Event(NamedTuple):
    kind: int
    fd: int
    a: int
    b: int
    data: bytes
    second: bytes


@dataclass(frozen=True, slots=True)
class Trace:
    """What a workload did to the files below ``root``, in order, and what was there before."""

    root: Path
    before: dict[str, bytes]
    folders_before: tuple[str, ...]
    events: tuple[Event, ...]

    @property
    def marks(self) -> list[str]:
        return [e.data.decode() for e in self.events if e.kind == Kind.MARK]


def parse(raw: bytes) -> Iterator[Event]:
    at = 0
    while at < len(raw):
        kind, fd, a, b, first, second = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        yield Event(kind, fd, a, b, raw[at : at + first], raw[at + first : at + first + second])
        at += first + second
    if at != len(raw):
        raise TraceError("the trace ends in the middle of an event")


def read_folder(root: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    files: dict[str, bytes] = {}
    folders = []
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            folders.append(name)
        else:
            files[name] = path.read_bytes()
    return files, tuple(folders)
