"""What the log is made of: records, their kinds and their operations."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from kvrep.errors import ProtocolError
from kvrep.model.position import Position
from kvrep.model.sessions import Origin

__all__ = [
    "DEFAULT_KEYSPACE",
    "FEEDS_KEYSPACE",
    "KEY_BYTES_MAX",
    "Kind",
    "Op",
    "Record",
    "is_system",
    "messages_in",
    "write_payload",
    "writes_in",
]

DEFAULT_KEYSPACE = "default"
FEEDS_KEYSPACE = "kvrep:feeds"
"""Where named feeds keep their places. No user's keyspace can have a colon in its name."""

KEY_BYTES_MAX = 511
"""What LMDB takes."""

Op = tuple[str, bytes, bytes | None]
"""One operation: (keyspace, key, value); a value of ``None`` deletes the key."""


class Kind(IntEnum):
    """What a record does. A follower stops at a kind it does not know (``UpgradeRequired``)."""

    WRITE = 0
    """Puts and deletes; payload ``[keyspace, [key, value, key, value, …], keyspace, […], …]``."""
    EPOCH = 1
    """The first record of an epoch; payload ``{lineage, branch, configuration, …}``."""
    CONFIGURATION = 2
    """A new configuration; payload as ``Configuration.to_wire()``."""
    DIGEST = 3
    """All nodes cut a flush here; payload ``[offset of the previous mark, {keyspace: digest there}]``."""
    NOTED = 4
    """A write with notes for feeds; payload ``[writes as in WRITE, [[topic, payload, headers], …],
    [operation, value before or None, operation, …]]``. The state takes the writes alone."""


class Record(NamedTuple):
    """One decoded record. ``time_us`` is the primary's wall clock when it was logged, never used to order."""

    offset: int
    epoch: int
    time_us: int
    kind: int
    payload: Any
    origin: Origin | None = None
    """Who forwarded it; ``None`` when the primary itself wrote it."""

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.offset)

    def ops(self) -> list[Op]:
        """The operations of a write, in order; empty for other kinds.

        :class:`ProtocolError` when the payload is not what :func:`write_payload` makes.
        """
        ops: list[Op] = []
        try:
            names = iter(writes_in(self.kind, self.payload))
            for name, flat in zip(names, names, strict=True):
                keys = iter(flat)
                ops += [(name, key, value) for key, value in zip(keys, keys, strict=True)]
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"record {self.offset} is not a write: {error}") from error
        return ops


def writes_in(kind: int, payload: Any) -> Any:
    """The writes of a record, as in the payload of a ``WRITE``; empty for a kind that has none."""
    if kind == Kind.WRITE:
        return payload
    return payload[0] if kind == Kind.NOTED else ()


def messages_in(kind: int, payload: Any) -> Any:
    """The emitted messages of a record: ``[topic, payload, headers or None]`` each."""
    return payload[1] if kind == Kind.NOTED else ()


def is_system(keyspace: str) -> bool:
    """Whether a keyspace is kvrep's own."""
    return ":" in keyspace


def write_payload(ops: list[Op]) -> list[Any]:
    """The payload of a write record: consecutive operations of one keyspace are joined."""
    payload: list[Any] = []
    current: str | None = None
    flat: list[bytes | None] = []
    for name, key, value in ops:
        if name != current:
            flat = []
            payload += (name, flat)
            current = name
        flat += (key, value)
    return payload
