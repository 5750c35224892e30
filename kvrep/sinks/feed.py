"""A store's own feed as the source of an agent: no broker between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Unpack

from kvrep.errors import LineageMismatch, LogTrimmed, PeerUnavailable, Truncated
from kvrep.model.change import Change
from kvrep.sinks.interface import Place
from kvrep.sinks.source import Incoming, Source, SourceState
from kvrep.sinks.upstream import Selected, Stream, Upstream, Wanted

__all__ = ["FeedSource"]

log = logging.getLogger("kvrep.agent")

HOLD_INTERVAL_S = 1.0


class FeedSource(Source):
    """The changes of a store, whatever its role. ``selection`` is that of :class:`Selected`.

    Where the log does not reach back far enough any more, or the history that was read was taken back by a
    forced promotion, a snapshot replaces the copy; the log says so.
    """

    def __init__(self, upstream: Upstream, **selection: Unpack[Wanted]) -> None:
        self.url = upstream.url
        self._upstream = upstream
        self._selected = Selected(**selection)
        self._stream: Stream | None = None
        self._ready: Sequence[Change] = ()
        self._at = 0
        self._as_of_us = 0
        self._held, self._held_s = "", -HOLD_INTERVAL_S
        self._lineage = ""

    @property
    def lineage(self) -> str:
        return self._lineage

    def open(self, place: Place) -> None:
        self.close()
        self._lineage = self._upstream.lineage()
        if not self._lineage:
            raise PeerUnavailable(
                f"{self.url} has no history yet",
                address=self.url,
                hint="it has not joined its group; wait for it",
            )
        if place.lineage and place.lineage != self._lineage:
            raise LineageMismatch(
                "the secondary holds a copy of another store", ours=place.lineage, theirs=self._lineage,
                hint="check both addresses; for a new copy, give an empty schema or file",
            )  # fmt: skip
        self._stream = self._upstream.changes(place.token, self._selected)

    def receive(self, count: int, timeout_s: float) -> Sequence[Incoming]:
        if not self._ready and not self._fill(timeout_s):
            return ()
        found = self._ready[self._at : self._at + count]
        self._at += len(found)
        if self._at >= len(self._ready):
            self._ready, self._at = (), 0
        return found

    def _fill(self, timeout_s: float) -> bool:
        assert self._stream is not None
        now_us = time.time_ns() // 1000
        try:
            self._ready = self._stream.poll(timeout_s)
        except (LogTrimmed, Truncated) as error:
            log.warning("%s: a new snapshot is needed: %s", self.url, error)
            self._stream.close()
            self._stream = self._upstream.changes("", self._selected)
        if not self._ready:
            self._as_of_us = now_us
        return bool(self._ready)

    def settle(self, place: Place) -> None:
        """Let go of the log that is not needed any more, now and then."""
        now_s = time.monotonic()
        if place.token not in ("", self._held) and now_s - self._held_s >= HOLD_INTERVAL_S:
            self._held, self._held_s = place.token, now_s
            self._upstream.hold(place.token)

    def state(self) -> SourceState:
        stream, head = self._stream, self._upstream.head()
        if stream is None or head is None:
            return SourceState()
        behind = max(0, head - stream.at().offset) + len(self._ready) - self._at
        return SourceState(behind=behind, as_of_us=0 if behind else self._as_of_us)

    def close(self) -> None:
        stream, self._stream = self._stream, None
        self._ready, self._at = (), 0
        if stream is not None:
            stream.close()

    def end(self) -> None:
        self.close()
        self._upstream.close()
