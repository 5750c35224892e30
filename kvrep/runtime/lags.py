"""How far followers are behind, in bytes and in time: to know it can take reading the files of the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import NamedTuple

from kvrep.storage.engine import Engine

__all__ = ["Lag", "Lags"]

log = logging.getLogger("kvrep.replication")


class Lag(NamedTuple):
    """What a follower lacks."""

    records: int
    bytes: int
    seconds: float
    """Since the first record that it lacks was logged, by wall clocks: ours now, and that in the record, which is ours,
    too, if we logged it. Never below 0; 1 where the record cannot be read."""


class _Seen(NamedTuple):
    synced: int
    bytes: int
    since_us: int
    """When the first record beyond ``synced`` was logged; 0 if that is not known."""


class Lags:
    """One per role as primary."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: dict[bytes, _Seen] = {}

    def look(self, synced: Mapping[bytes, int]) -> None:
        """Measure for those who ask with :meth:`seen`: stores by id, with what they have confirmed. On one thread."""
        tail = self._engine.tail.offset
        self._seen = {i: self._measure(i, offset) for i, offset in synced.items() if offset < tail}

    def measured(self, store_id: bytes, synced: int) -> Lag:
        """As it is now. May read files."""
        return self._lag(synced, self._measure(store_id, synced))

    def seen(self, store_id: bytes, synced: int) -> Lag:
        """The same without reading files: bytes and time of what is not in memory are those of the last look."""
        if self._engine.committer.log.in_memory(synced + 1):
            return self.measured(store_id, synced)
        return self._lag(synced, self._seen.get(store_id, _Seen(synced, 0, 0)))

    def _measure(self, store_id: bytes, synced: int) -> _Seen:
        before = self._seen.get(store_id)
        try:
            size = self._engine.committer.log.bytes_after(synced)
            if before is not None and before.synced == synced and before.since_us:
                return before._replace(bytes=size)
            return _Seen(synced, size, self._engine.time_at(synced + 1))
        except Exception as error:  # of the log under way to be cut or closed; nothing depends on it
            log.debug("how far a follower is behind could not be told: %s", error)
            return before or _Seen(synced, 0, 0)

    def _lag(self, synced: int, seen: _Seen) -> Lag:
        records = max(0, self._engine.tail.offset - synced)
        if not records:
            return Lag(0, 0, 0.0)
        seconds = max(0.0, time.time() - seen.since_us / 1e6) if seen.since_us else 1.0
        return Lag(records, seen.bytes, seconds)
