"""A secondary system in memory: the twin of the real ones, for tests and for trying things out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

from kvrep.errors import PeerUnavailable, RejectedChange
from kvrep.model.record import Op
from kvrep.sinks.interface import DeadLetter, Place, Sink

__all__ = ["MemorySink"]


@dataclass(slots=True)
class _State:
    place: Place = field(default_factory=Place)
    rows: dict[str, dict[bytes, bytes]] = field(default_factory=dict)
    staged: dict[str, dict[bytes, bytes]] = field(default_factory=dict)
    letters: dict[int, DeadLetter] = field(default_factory=dict)
    numbered: int = 0


class MemorySink(Sink):
    """Keeps what was committed when it is closed and opened again, as a database would.

    ``poison`` holds values that it cannot store; while ``down`` is set it does not answer, and
    ``lose_answers`` makes so many commits take effect and then fail.
    """

    def __init__(self) -> None:
        self.url = "memory:"
        self.poison: set[bytes] = set()
        self.down = False
        self.lose_answers = 0
        self.commits = 0
        self._durable = _State()
        self._working = _State()

    def open(self) -> Place:
        self._answer()
        self.rollback()
        return self._working.place

    def apply(self, ops: Sequence[Op]) -> None:
        self._write(self._working.rows, ops)

    def stage(self, ops: Sequence[Op]) -> None:
        self._write(self._working.staged, ops)

    def _write(self, spaces: dict[str, dict[bytes, bytes]], ops: Sequence[Op]) -> None:
        self._answer()
        for index, (keyspace, key, value) in enumerate(ops):
            if value in self.poison:
                raise RejectedChange("poison", index=index, keyspace=keyspace, key=key)
        for keyspace, key, value in ops:
            rows = spaces.setdefault(keyspace, {})
            if value is None:
                rows.pop(key, None)
            else:
                rows[key] = value

    def swap(self) -> None:
        self._working.rows, self._working.staged = self._working.staged, {}

    def unstage(self) -> None:
        self._working.staged = {}

    def commit(self, place: Place) -> None:
        self._answer()
        self._working.place = place
        self._durable = deepcopy(self._working)
        self.commits += 1
        if self.lose_answers:
            self.lose_answers -= 1
            raise PeerUnavailable("the answer got lost", address=self.url)

    def rollback(self) -> None:
        self._working = deepcopy(self._durable)

    def bury(self, letter: DeadLetter) -> None:
        self._answer()
        state = self._working
        state.numbered += 1
        state.letters[state.numbered] = replace(letter, number=state.numbered)

    def forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._working.letters.pop(number, None)

    def dead_letters(self) -> list[DeadLetter]:
        return list(self._working.letters.values())

    def keyspaces(self) -> list[str]:
        return sorted(self._working.rows)

    def scan(self, keyspace: str) -> Iterator[tuple[object, object]]:
        return iter(sorted(self._working.rows.get(keyspace, {}).items()))

    def close(self) -> None:
        self.rollback()

    def _answer(self) -> None:
        if self.down:
            raise PeerUnavailable("the secondary is down", address=self.url)
