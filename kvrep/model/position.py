"""Where something is in a history: offsets, epochs, positions, and the table of epochs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

__all__ = [
    "EPOCH_MAX",
    "EPOCH_MEMBERS",
    "OFFSET_MAX",
    "ZERO",
    "EpochTable",
    "Position",
    "epoch_after",
    "member_of",
]

EPOCH_MEMBERS = 1000
"""An epoch is ``round * EPOCH_MEMBERS + member number of its primary``.

Two promoters never share an epoch because their member numbers differ, whatever rounds they pick.
"""

OFFSET_MAX = 2**63 - 1
EPOCH_MAX = 2**63 - 1


class Position(NamedTuple):
    """What a write returns and a reader can wait for. Ordered by epoch, then offset.

    ``str()`` gives ``"epoch:offset"``, which :meth:`parse` reads back.
    """

    epoch: int
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read ``"epoch:offset"``; ``ValueError`` when it is something else."""
        epoch, colon, offset = text.partition(":")
        if not (colon and epoch.isdecimal() and offset.isdecimal()):
            raise ValueError(f"not a position: {text!r} (expected epoch:offset, such as 1001:42)")
        return cls(int(epoch), int(offset))


ZERO = Position(0, 0)


def epoch_after(epoch: int, member: int) -> int:
    """The first epoch of ``member`` in a round after that of ``epoch``."""
    if not 0 < member < EPOCH_MEMBERS:
        raise ValueError(f"member number {member} is not in 1..{EPOCH_MEMBERS - 1}")
    return (epoch // EPOCH_MEMBERS + 1) * EPOCH_MEMBERS + member


def member_of(epoch: int) -> int:
    """The member number of the primary of ``epoch``."""
    return epoch % EPOCH_MEMBERS


class EpochTable:
    """Which epoch wrote which offsets: ``(epoch, first offset)`` pairs, both strictly growing from 1 up.

    Immutable. The point where two histories part follows exactly from two tables (Raft's log matching
    property, section 5.3 of the paper, with whole epochs in place of single entries).
    """

    __slots__ = ("_epochs", "_firsts")

    def __init__(self, entries: Iterable[tuple[int, int]] = ()) -> None:
        pairs = [(epoch, first) for epoch, first in entries]
        if {type(n) for pair in pairs for n in pair} - {int}:
            raise ValueError(f"epoch table of something else than whole numbers: {str(pairs)[:80]}")
        for (e1, f1), (e2, f2) in pairwise([(0, 0), *pairs]):
            if not (e1 < e2 and f1 < f2):
                raise ValueError(f"epoch table does not grow: {pairs}")
        self._epochs = tuple(e for e, _ in pairs)
        self._firsts = tuple(f for _, f in pairs)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._epochs, self._firsts, strict=True)

    def __len__(self) -> int:
        return len(self._epochs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EpochTable) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"EpochTable({list(self)})"

    @property
    def last_epoch(self) -> int:
        return self._epochs[-1] if self._epochs else 0

    def epoch_at(self, offset: int) -> int:
        """The epoch that wrote ``offset``; 0 below the first entry."""
        i = bisect_right(self._firsts, offset)
        return self._epochs[i - 1] if i else 0

    def with_epoch(self, epoch: int, first: int) -> EpochTable:
        """This table with one more entry; ``ValueError`` if it does not grow."""
        return EpochTable([*self, (epoch, first)])

    def cut(self, last: int) -> EpochTable:
        """The table of the history up to and including ``last``."""
        if not self._firsts or self._firsts[-1] <= last:
            return self
        return EpochTable((e, f) for e, f in self if f <= last)

    def holds(self, position: Position, last: int) -> bool:
        """Whether the history with this table that ends at ``last`` contains ``position``."""
        return 0 < position.offset <= last and self.epoch_at(position.offset) == position.epoch

    def common(self, mine_last: int, other: EpochTable, other_last: int) -> int:
        """The last offset that both histories share; 0 when they share nothing."""
        theirs = {(e, f): i for i, (e, f) in enumerate(other)}
        entries = list(self)
        for i in range(len(entries) - 1, -1, -1):
            j = theirs.get(entries[i])
            if j is None:
                continue
            mine_end = self._firsts[i + 1] - 1 if i + 1 < len(self) else mine_last
            their_end = other._firsts[j + 1] - 1 if j + 1 < len(other) else other_last
            return min(mine_end, their_end)
        return 0
