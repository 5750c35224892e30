"""What a feed yields: one change of one key, one emitted message, or a mark of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, Protocol

from kvrep.model.position import Position

__all__ = [
    "BEGIN",
    "DELETE",
    "EMIT",
    "END",
    "PUT",
    "ROW_INDEX",
    "Change",
    "ChangeKind",
    "Resume",
    "Sequence",
    "sequence_text",
]

ChangeKind = Literal["put", "delete", "emit", "begin", "end"]
"""``put`` and ``delete`` of a key, ``emit`` of a message; ``begin`` and ``end`` enclose a snapshot."""

PUT: Final = "put"
DELETE: Final = "delete"
EMIT: Final = "emit"
BEGIN: Final = "begin"
"""A snapshot follows: what a receiver has of this stream is replaced by it."""
END: Final = "end"
"""The snapshot is whole: a receiver is a consistent copy now; what it did not get since ``begin`` is gone."""

ROW_INDEX: Final = 1 << 32
"""Where the indices of a snapshot's rows begin: behind those of the operations of any record."""

Sequence = tuple[int, int, int]
"""(epoch, offset, index): where a change stands; they order all changes of one stream."""


def sequence_text(sequence: Sequence) -> str:
    """``epoch:offset:index``, for people."""
    return ":".join(map(str, sequence))


class Resume(Protocol):
    """What makes the token of a change when it is asked for."""

    def token(self, change: Change) -> str:
        """The token after ``change``."""


class Change(NamedTuple):
    """One change in a feed. A plain value, cheap to make; any thread may read it.

    The changes of one transaction follow each other with the same ``position`` and growing ``index``; the one
    with ``last`` is the end of what this stream shows of it.
    """

    position: Position
    """Of the record that holds it; for a row of a snapshot, the position the row was read at."""
    index: int  # type: ignore[assignment] # the method of tuples is no loss
    """Its number in the record (from 0); in a snapshot ``ROW_INDEX`` + its number in the snapshot."""
    kind: ChangeKind
    keyspace: str
    """Empty for ``emit``, ``begin`` and ``end``."""
    key: bytes
    """Empty for ``emit``, ``begin`` and ``end``."""
    value: bytes | None
    """What was put, or the payload of an ``emit``; ``None`` otherwise."""
    time_us: int
    """Microseconds since 1970 at which the primary logged it: for delays, never for order. A row has the
    time of the record at the position it was read at, or 0 where that record is not in the log any more."""
    last: bool = True
    """The last change of its transaction in this stream: what came until here can be applied as one."""
    previous: Sequence | None = None
    """Of the change before it in this stream; ``None`` at its start. A receiver that has another one misses
    something (or was given something twice), whatever was left out by selection."""
    snapshot: bool = False
    """A row of a snapshot, or one of its marks."""
    before: bytes | None = None
    """The value that the key had before, in keyspaces opened with ``keep_before=True``."""
    created: bool | None = None
    """Whether the key was not there before, where it is known: in those keyspaces."""
    topic: str = ""
    """Of an ``emit``."""
    headers: Mapping[str, str] | None = None
    """Of an ``emit``."""
    origin: Resume | None = None
    """Makes :attr:`resume`; no business of a reader."""

    @property
    def time(self) -> float:
        """``time_us`` in seconds."""
        return self.time_us / 1e6

    @property
    def sequence(self) -> Sequence:
        """(epoch, offset, index)."""
        return (self.position[0], self.position[1], self.index)

    @property
    def resume(self) -> str:
        """The token with which ``changes(resume=…)`` goes on after this change, on any node.

        ``ValueError`` for a change that did not come out of a feed.
        """
        if self.origin is None:
            raise ValueError("only a change that a feed yielded has a token")
        return self.origin.token(self)
