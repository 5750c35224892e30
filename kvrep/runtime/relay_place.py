"""Where a relay is: what it says when it joins, and what it keeps in a small file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvrep.errors import OpenError
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.model.record import Kind, Record
from kvrep.storage.home import write_atomically

__all__ = ["Place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How far a relay is: what it says in a Hello."""

    store_id: bytes
    lineage: bytes = b""
    branches: tuple[bytes, ...] = ()
    """All that the log has had, in order."""
    last: Position = ZERO
    running: int = 0
    epochs: EpochTable = field(default_factory=EpochTable)
    promised: int = 0

    @classmethod
    def load(cls, path: Path | None) -> Place:
        """What the file says, or a beginning; ``OpenError`` when it is not readable."""
        if path is None or not path.exists():
            return cls(store_id=os.urandom(16))
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                store_id=bytes.fromhex(raw["store_id"]),
                lineage=bytes.fromhex(raw["lineage"]),
                branches=tuple(map(bytes.fromhex, raw["branches"])),
                last=Position(*map(int, raw["last"])),
                running=int(raw["running"]),
                epochs=EpochTable(raw["epochs"]),
                promised=int(raw["promised"]),
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise OpenError(
                f"{path} does not say where publishing stopped: {error!r}",
                hint="remove it to begin anew: what was published before is recognised as a repeat",
            ) from error

    def save(self, path: Path | None) -> None:
        """Replace the file, durably; its folder is made if missing."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = {
            "store_id": self.store_id.hex(),
            "lineage": self.lineage.hex(),
            "branches": [branch.hex() for branch in self.branches],
            "last": list(self.last),
            "running": self.running,
            "epochs": list(self.epochs),
            "promised": self.promised,
        }
        write_atomically(path, json.dumps(raw).encode())

    def after(self, record: Record, running: int) -> Place:
        """Behind ``record``, the next one, with the running checksum there."""
        epochs, branches = self.epochs, self.branches
        if record.epoch != epochs.last_epoch:
            epochs = epochs.with_epoch(record.epoch, record.offset)
        if record.kind == Kind.EPOCH:
            branch = bytes(record.payload["branch"])
            if branch not in branches:
                branches = (*branches, branch)
        return replace(self, last=record.position, running=running, epochs=epochs, branches=branches)
