"""How far the followers are behind, as their primary says."""

from __future__ import annotations

import threading
from typing import Any

from kvrep.cli.console import megabytes, number
from kvrep.cli.target import RemoteTarget
from kvrep.errors import Error

__all__ = ["Lag"]

INTERVAL_S = 0.1


class Lag:
    """Asks ten times a second, on a thread of its own, and remembers the worst."""

    HEADERS = ("node", "state", "synced", "lag", "bytes", "seconds")
    RIGHT = (2, 3, 4, 5)

    def __init__(self) -> None:
        self.worst_records = 0
        self.worst_bytes = 0
        self.worst_s = 0.0
        self._status: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, address: str) -> None:
        """Begin to ask the primary at ``address``."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._ask, args=(address,), name="lag")
        self._thread.start()

    def stop(self) -> None:
        """Ask no more, until the next start."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._status = None

    def _ask(self, address: str) -> None:
        with RemoteTarget(address, timeout_s=2.0) as primary:
            while not self._stop.wait(INTERVAL_S):
                try:
                    self._status = primary.status()
                except Error:
                    self._status = None
                else:
                    self._note(self._status["followers"])

    def _note(self, followers: list[dict[str, Any]]) -> None:
        for follower in followers:
            self.worst_records = max(self.worst_records, follower["lag_records"])
            self.worst_bytes = max(self.worst_bytes, follower["lag_bytes"])
            self.worst_s = max(self.worst_s, follower["lag_s"])

    def rows(self) -> list[tuple[str, ...]]:
        """One row a node, for a table under ``HEADERS``."""
        status = self._status
        if status is None:
            return [
                ("a", "no answer", "", "", "", ""),
                ("b", "-", "", "", "", ""),
                ("c", "-", "", "", "", ""),
            ]
        writable = "primary" if not status["not_writable"] else "not writable"
        rows: list[tuple[str, ...]] = [
            (status["name"], writable, number(status["durable_offset"]), "", "", "")
        ]
        for f in status["followers"]:
            lag = number(f["lag_records"]), megabytes(f["lag_bytes"]), f"{f['lag_s']:.3f}"
            rows.append((f["name"], f["state"], number(f["synced"]), *lag))
        return rows

    def line(self) -> str:
        """The same in a few words."""
        status = self._status
        if status is None:
            return "the primary does not answer"
        return ", ".join(f"{f['name']} {f['lag_records']} records behind" for f in status["followers"])
