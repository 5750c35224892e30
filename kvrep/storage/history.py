"""What the records of a log say of the log itself, committed or not: epochs, branches, configurations."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

from kvrep.errors import UpgradeRequired
from kvrep.model.configuration import Configuration, in_force
from kvrep.model.position import EpochTable, Position
from kvrep.model.record import Kind, Record
from kvrep.storage.tree import State

__all__ = ["ORDINARY", "History", "need_known"]

ORDINARY = frozenset((Kind.WRITE, Kind.DIGEST, Kind.NOTED))
"""Kinds of records that say nothing of the log."""


def need_known(record: Record) -> None:
    """Raise ``UpgradeRequired`` when a record is of a kind that this version does not know."""
    if record.kind not in set(Kind):
        raise UpgradeRequired(
            f"record {record.offset} is of kind {record.kind}, which this version does not know",
            hint="upgrade this node first",
            found=int(record.kind),
            supported=int(max(Kind)),
        )


@dataclass(frozen=True, slots=True)
class History:
    """A value: what changes it makes another one, so that readers on other threads see one or the other."""

    epochs: EpochTable
    """The epochs of all records."""
    branches: tuple[tuple[int, bytes], ...]
    """(first offset, id) of every branch; the last one is in force. A forced promotion begins one."""
    configurations: tuple[tuple[int, Configuration], ...]
    """Configurations by the offset of their record, oldest first, at least one; the last one is in force."""

    @classmethod
    def of(cls, state: State) -> History:
        """The history of what LMDB holds."""
        return cls(state.epochs, tuple(state.branches), ((state.configured_at, state.configuration),))

    @property
    def branch(self) -> bytes:
        """The branch in force; empty before the first epoch."""
        return self.branches[-1][1] if self.branches else b""

    def in_force(self, committed: int) -> tuple[Configuration, tuple[int, Configuration] | None]:
        """The configuration in effect, and the one (with its offset) that is perhaps not committed yet."""
        return in_force(self.configurations, committed)

    def position_at(self, offset: int) -> Position:
        return Position(self.epochs.epoch_at(offset), offset)

    def note(self, record: Record) -> History:
        """The history with this record, too; ``UpgradeRequired`` when it is of an unknown kind."""
        if record.kind in ORDINARY:
            return self
        need_known(record)
        if record.kind == Kind.EPOCH:
            return self.begin(record.epoch, record.offset, record.payload)
        return self.configure(record.offset, record.payload)

    def begin(self, epoch: int, offset: int, payload: Any) -> History:
        """``payload``: of the epoch's first record, at ``offset``."""
        epochs = self.epochs.with_epoch(epoch, offset) if epoch > self.epochs.last_epoch else self.epochs
        branch = payload["branch"]
        branches = (*self.branches, (offset, branch)) if branch != self.branch else self.branches
        return replace(self, epochs=epochs, branches=branches).configure(offset, payload["configuration"])

    def configure(self, offset: int, wire: Any) -> History:
        """``wire``: a configuration as its record at ``offset`` holds it."""
        if offset <= self.configurations[-1][0]:
            return self
        configuration = Configuration.from_wire(wire).at(offset)
        return replace(self, configurations=(*self.configurations, (offset, configuration)))

    def cut(self, last: int) -> History:
        """The history through ``last``, which is at or above what LMDB holds."""
        return History(
            self.epochs.cut(last),
            tuple(b for b in self.branches if b[0] <= last),
            tuple(c for c in self.configurations if c[0] <= last) or self.configurations[:1],
        )

    def describe(self, state: State, last: int) -> None:
        """Say in ``state``, of what LMDB holds, how the history stands at ``last``."""
        i = bisect_right(self.configurations, last, key=lambda entry: entry[0])
        state.epochs = self.epochs.cut(last)
        state.configured_at, state.configuration = self.configurations[max(0, i - 1)]
        state.branches = [b for b in self.branches if b[0] <= last]
