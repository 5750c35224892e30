"""A piece of a snapshot: rows that follow each other, and the changes that they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from kvrep.model.change import DELETE, PUT, Change, Resume
from kvrep.model.change import Sequence as Place
from kvrep.model.position import Position
from kvrep.model.record import Op

__all__ = ["Rows"]

_new = tuple.__new__  # half the price of a named tuple's own constructor


class Rows(Sequence[Change]):
    """The changes of ``ops``, numbered from ``first`` on, each made when somebody looks at it.

    Who only moves rows on takes :attr:`ops`: a thousand changes in a list cost more in garbage collection than all
    else that is done with them. An immutable value.
    """

    __slots__ = ("_at", "_first", "_origin", "_previous", "_time_us", "ops")

    def __init__(
        self,
        ops: Sequence[Op],
        *,
        at: Position,
        first: int,
        previous: Place | None,
        time_us: int,
        origin: Resume,
    ) -> None:
        self.ops = ops
        self._at, self._first, self._previous = at, first, previous
        self._time_us, self._origin = time_us, origin

    def __len__(self) -> int:
        return len(self.ops)

    def __iter__(self) -> Iterator[Change]:
        return self._changes(0, len(self.ops))

    @overload
    def __getitem__(self, which: int) -> Change: ...
    @overload
    def __getitem__(self, which: slice) -> Rows: ...
    def __getitem__(self, which: int | slice) -> Change | Rows:
        if isinstance(which, int):
            at = range(len(self.ops))[which]
            return next(self._changes(at, at + 1))
        start, stop, step = which.indices(len(self.ops))
        if step != 1:
            raise ValueError("rows are taken as they follow each other")
        return Rows(
            self.ops[start:stop], at=self._at, first=self._first + start, previous=self._before(start),
            time_us=self._time_us, origin=self._origin,
        )  # fmt: skip

    def _before(self, number: int) -> Place | None:
        """What the row of this number follows."""
        return (*self._at, self._first + number - 1) if number else self._previous

    def _changes(self, start: int, stop: int) -> Iterator[Change]:
        at, time_us, origin, new = self._at, self._time_us, self._origin, _new
        previous = self._before(start)
        for index, (name, key, value) in enumerate(self.ops[start:stop], self._first + start):
            yield new(
                Change,
                (
                    at, index, DELETE if value is None else PUT, name, key, value, time_us, True, previous, True,
                    None, None, "", None, origin,
                ),
            )  # fmt: skip
            previous = (*at, index)
