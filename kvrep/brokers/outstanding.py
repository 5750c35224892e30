"""Which deliveries are not acked yet, and how far all are."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Outstanding"]


class Outstanding:
    """Ascending numbers of deliveries. Not locked."""

    __slots__ = ("_highest", "_numbers")

    def __init__(self) -> None:
        self._numbers: dict[int, None] = {}  # a dict, because it keeps its order
        self._highest: int | None = None

    def add(self, number: int) -> None:
        """``number`` was delivered; it is higher than all before."""
        self._numbers[number] = None
        self._highest = number

    def ack(self, number: int, *, through: bool) -> list[int]:
        """Which numbers this ack is news for, ascending."""
        if not through:
            return [number] if self._numbers.pop(number, number) is None else []
        done = []
        for one in self._numbers:
            if one > number:
                break
            done.append(one)
        for one in done:
            del self._numbers[one]
        return done

    @property
    def done_through(self) -> int | None:
        """The last number up to which nothing is outstanding; ``None`` before the first delivery."""
        for first in self._numbers:
            return first - 1
        return self._highest

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def clear(self) -> None:
        self._numbers.clear()
        self._highest = None
