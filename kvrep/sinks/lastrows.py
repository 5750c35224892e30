"""Which row of a history is the last one of each key: for more keys than should stand in memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

__all__ = ["LastRows"]

KEYS_MAX = 20_000
"""How many keys are held in memory; more of them go to a temporary file."""


class LastRows:
    """The number of the last row of each key: in memory, and where they are many, in a temporary file."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._file: sqlite3.Connection | None = None

    def note(self, keys: Sequence[bytes], numbers: Sequence[int]) -> None:
        for key, number in zip(keys, numbers, strict=True):
            if number > self._numbers.get(key, 0):
                self._numbers[key] = number
        if len(self._numbers) > KEYS_MAX:
            self._spill()

    def _spill(self) -> None:
        if self._file is None:
            # SQLite keeps a database without a name in a file that is gone when it is closed.
            self._file = sqlite3.connect("", isolation_level=None)
            self._file.execute("PRAGMA cache_size = -8192")
            self._file.execute(
                "CREATE TABLE last (key BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID"
            )
        self._file.execute("BEGIN")
        self._file.executemany(
            "INSERT INTO last VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET number = max(number, excluded.number)",
            sorted(self._numbers.items()),
        )
        self._file.execute("COMMIT")
        self._numbers.clear()

    def of(self, key: bytes) -> int:
        """0: there is none."""
        number = self._numbers.get(key, 0)
        if self._file is None:
            return number
        found = self._file.execute("SELECT number FROM last WHERE key = ?", (key,)).fetchone()
        return max(number, found[0]) if found else number

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
