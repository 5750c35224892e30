"""What the description of a snapshot says: of which history the copy is, as of when, and who gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack

from kvrep.errors import ProtocolError
from kvrep.model.position import OFFSET_MAX, EpochTable
from kvrep.storage.log import Tail

__all__ = ["Description"]

VERSION = 1
ID_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Travels as ``SnapshotInfo.meta``: a msgpack map."""

    lineage: bytes
    branch: bytes
    applied: Tail
    """The last record contained."""
    epoch: int
    """The giver's."""
    last: int
    """The end of the giver's log."""
    store_id: bytes
    """The giver's, as its name: for those who pass the copy on."""
    name: str
    branches: tuple[bytes, ...]
    epochs: EpochTable

    def encode(self) -> bytes:
        data: bytes = msgpack.packb(
            {
                "version": VERSION,
                "lineage": self.lineage,
                "branch": self.branch,
                "applied": tuple(self.applied),
                "epoch": self.epoch,
                "last": self.last,
                "store_id": self.store_id,
                "name": self.name,
                "branches": self.branches,
                "epochs": list(self.epochs),
            }
        )
        return data

    @classmethod
    def decode(cls, data: bytes) -> Description:
        """Read :meth:`encode`; :class:`ProtocolError` when it is something else, or of another version."""
        try:
            raw: dict[str, Any] = msgpack.unpackb(data)
            version = raw["version"]
            if version == VERSION:
                return cls._decode(raw)
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"the snapshot's description is not readable: {error!r}") from error
        raise ProtocolError(
            f"snapshots of version {str(version)[:40]} are not known here", hint="upgrade this node"
        )

    @classmethod
    def _decode(cls, raw: dict[str, Any]) -> Description:
        found = cls(
            lineage=raw["lineage"],
            branch=raw["branch"],
            applied=Tail(*raw["applied"]),
            epoch=raw["epoch"],
            last=raw["last"],
            store_id=raw["store_id"],
            name=raw["name"],
            branches=tuple(raw["branches"]),
            epochs=EpochTable(raw["epochs"]),
        )
        ids = (found.lineage, found.store_id, *filter(None, (found.branch, *found.branches)))
        if any(type(one) is not bytes or len(one) != ID_BYTES for one in ids) or type(found.name) is not str:
            raise ValueError("an id is not one")
        numbers = (*found.applied, found.epoch, found.last)
        if any(type(n) is not int or not 0 <= n <= OFFSET_MAX for n in numbers):
            raise ValueError("a number is out of range")
        return found
