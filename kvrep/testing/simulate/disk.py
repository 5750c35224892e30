"""The disk of a node: its log, its promise, its copy of the state (LMDB), and how it fails.

What is written is lost by a crash until it is synced: any prefix of it may survive, its last record torn.
Records are kept as their real bytes; what is whole after a crash is decided by the real codec.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvrep.model.codec import RecordEncoder, decode, walk
from kvrep.model.configuration import Configuration
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.model.record import Kind, Record

__all__ = ["Copy", "Disk", "Entry"]


NO_CONFIGURATION = (0, Configuration())
"""What an empty log says."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record in a log."""

    record: Record
    data: bytes
    running: int
    mark: int
    """The commit mark that was written with it: what was known to be committed then."""


@dataclass(slots=True)
class Copy:
    """What LMDB holds, and what its transaction says about the log: the state through ``applied``."""

    applied: Position = ZERO
    running: int = 0
    epochs: EpochTable = field(default_factory=EpochTable)
    configurations: list[tuple[int, Configuration]] = field(default_factory=lambda: [NO_CONFIGURATION])
    data: dict[bytes, int] = field(default_factory=dict)

    def clone(self) -> Copy:
        return Copy(self.applied, self.running, self.epochs, list(self.configurations), dict(self.data))


class Disk:
    """Survives its node. ``OSError`` (ENOSPC, EIO) is what it answers when it is told to fail."""

    __slots__ = (
        "_base",
        "_before",
        "configurations",
        "copy",
        "eio",
        "entries",
        "epochs",
        "full",
        "lineage",
        "lowered",
        "promised",
        "promised_to",
        "slow",
        "synced",
        "vote_floor",
    )

    def __init__(self) -> None:
        self.lineage = b""
        self.promised = 0
        self.promised_to = b""
        self.vote_floor = 0
        self.lowered = ZERO
        """From which record on fewer copies may have been enough, as this node was told."""
        self.copy = Copy()
        self.entries: list[Entry] = []
        self.synced = 0
        """The last offset that a crash cannot take."""
        self.epochs = EpochTable()
        self.configurations = [NO_CONFIGURATION]
        self.full = False
        self.eio = False
        self.slow = 1.0
        self._base = ZERO
        """The record before the first entry."""
        self._before = 0
        """The running checksum through it."""

    # -- the log -----------------------------------------------------------------------------------

    @property
    def first(self) -> int:
        return self._base.offset + 1

    @property
    def end(self) -> int:
        return self._base.offset + len(self.entries)

    @property
    def last(self) -> Position:
        return self.entries[-1].record.position if self.entries else self._base

    @property
    def running(self) -> int:
        return self.entries[-1].running if self.entries else self._before

    def entry(self, offset: int) -> Entry | None:
        """``None`` where the log does not hold it (any more, or yet)."""
        i = offset - self._base.offset - 1
        return self.entries[i] if 0 <= i < len(self.entries) else None

    def running_at(self, offset: int) -> int | None:
        """``None`` where it is trimmed or not written."""
        if offset == self._base.offset:
            return self._before
        entry = self.entry(offset)
        return entry.running if entry is not None else None

    def append(self, data: bytes, mark: int) -> list[Entry]:
        """Check and write whole records; ``ChainBroken`` when they do not join, ENOSPC when full."""
        records, _ = decode(data, self.end + 1, self.running)
        if self.full:
            raise OSError(errno.ENOSPC, "no space")
        starts, end, _ = walk(data, self.running)
        added = []
        running = self.running
        for record, start, stop in zip(records, starts, [*starts[1:], end], strict=True):
            piece = data[start:stop]
            running = int.from_bytes(piece[1:5], "big")
            added.append(Entry(record, piece, running, mark))
        self.entries += added
        self._note(added)
        return added

    def sync(self, through: int | None = None) -> None:
        """What was written (through an offset) is durable; EIO says nothing about what was written."""
        if self.eio:
            raise OSError(errno.EIO, "input/output error")
        self.synced = max(self.synced, self.end if through is None else min(through, self.end))

    def cut(self, to: int) -> None:
        """Drop the log above ``to``, durably."""
        del self.entries[max(0, to - self._base.offset) :]
        self.synced = min(self.synced, self.end)
        self._renew()

    def trim(self, to: int) -> None:
        """Unlink what LMDB holds: the records through ``to``."""
        assert to <= self.copy.applied.offset
        entry = self.entry(to)
        if entry is not None:
            del self.entries[: to - self._base.offset]
            self._base, self._before = entry.record.position, entry.running

    def _note(self, added: Iterable[Entry]) -> None:
        for entry in added:
            record = entry.record
            if record.kind == Kind.EPOCH:
                self.epochs = self.epochs.with_epoch(record.epoch, record.offset)
                payload: Any = record.payload["configuration"]
            elif record.kind == Kind.CONFIGURATION:
                payload = record.payload
            else:
                continue
            self.configurations.append((record.offset, Configuration.from_wire(payload).at(record.offset)))

    def _renew(self) -> None:
        """What the log says about itself, after its end has moved back."""
        end = self.end
        self.epochs = self.epochs.cut(end)
        self.configurations = [c for c in self.configurations if c[0] <= end] or [NO_CONFIGURATION]

    # -- the promise -------------------------------------------------------------------------------

    def promise(self, epoch: int, to: bytes) -> None:
        """Durable on return; EIO: nothing was promised."""
        if self.eio:
            raise OSError(errno.EIO, "input/output error")
        self.promised, self.promised_to = epoch, to

    def lower(self, position: Position) -> None:
        """Note durably that from there on fewer copies may be enough."""
        if self.eio:
            raise OSError(errno.EIO, "input/output error")
        self.lowered = max(self.lowered, position)

    # -- LMDB --------------------------------------------------------------------------------------

    def flush(self, through: int) -> None:
        """Take the records through ``through`` over into LMDB; they are synced first."""
        if through > self.synced:
            self.sync()
        if self.eio or self.full:
            raise OSError(errno.EIO if self.eio else errno.ENOSPC, "the flush failed")
        copy = self.copy
        for offset in range(copy.applied.offset + 1, through + 1):
            entry = self.entry(offset)
            assert entry is not None
            apply(copy.data, entry.record)
            copy.applied, copy.running = entry.record.position, entry.running
        copy.epochs = self.epochs.cut(through)
        copy.configurations = [c for c in self.configurations if c[0] <= through]

    def replace(self, copy: Copy) -> None:
        """A received copy becomes the live one, with an empty log behind it."""
        if self.eio or self.full:
            raise OSError(errno.EIO if self.eio else errno.ENOSPC, "the copy could not be stored")
        self.copy = copy
        self.entries = []
        self._base, self._before, self.synced = copy.applied, copy.running, copy.applied.offset
        self.epochs, self.configurations = copy.epochs, list(copy.configurations)

    # -- crashes -----------------------------------------------------------------------------------

    def lose_power(self, chance: Random) -> None:
        """Some of what was not synced stays, the last of it perhaps torn. (SIGKILL alone takes nothing.)"""
        keep = max(0, self.synced - self._base.offset)
        tail = b"".join(entry.data for entry in self.entries[keep:])
        if not tail:
            return
        torn = bytearray(tail if chance.random() < 0.2 else tail[: chance.randint(0, len(tail))])
        if torn and chance.random() < 0.3:
            torn[chance.randrange(len(torn))] ^= 0x40
        del self.entries[keep + self._whole(bytes(torn), keep) :]
        self._renew()

    def rot(self, chance: Random) -> None:
        """Records change into others, each whole and joining the next, so that no local check can tell."""
        at = chance.randrange(len(self.entries))
        running = self.entries[at - 1].running if at else self._before
        encoder = RecordEncoder()
        for i in range(at, len(self.entries)):
            r = self.entries[i].record
            time_us = r.time_us + (i == at)
            data, running = encoder.encode(r.offset, r.epoch, time_us, r.kind, r.payload, running)
            record = Record(r.offset, r.epoch, time_us, r.kind, r.payload)
            self.entries[i] = Entry(record, data, running, self.entries[i].mark)

    def _whole(self, data: bytes, keep: int) -> int:
        """How many records of ``data``, which follows entry ``keep``, are whole: the real recovery's rule."""
        before = self.entries[keep - 1].running if keep else self._before
        return len(walk(data, before)[0])

    def recover(self) -> int:
        """Open again: what was recovered is written again and synced; returns the commit mark."""
        self.synced = self.end
        marks = [entry.mark for entry in self.entries]
        return max([self.copy.applied.offset, *(m for m in marks if m <= self.end)])


def apply(data: dict[bytes, int], record: Record) -> None:
    """Change ``data`` as the record says."""
    for _, key, value in record.ops():
        if value is None:
            data.pop(key, None)
        else:
            data[key] = int(value)
