"""What happened on all nodes, in one order: printed when a test fails."""

from __future__ import annotations

import logging
import threading
import time
from typing import NamedTuple

__all__ = ["Event", "Timeline"]

EVENTS_MAX = 5000


class Event(NamedTuple):
    """``at_s`` counts from the beginning of the timeline."""

    at_s: float
    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.at_s:9.3f} s  {self.node:<10} {self.text}"


class Timeline(logging.Handler):
    """Collects events from any thread; as a logging handler, also what kvrep logs in this process.

    Keeps the last 5,000.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._began_s = time.monotonic()
        self._events: list[Event] = []
        # Protects the list, and makes its order that of the times.
        self._order = threading.Lock()
        self._level_before: int | None = None

    def add(self, node: str, text: str) -> None:
        """Something happened now on ``node`` (or to it)."""
        with self._order:
            self._events.append(Event(time.monotonic() - self._began_s, node, text))
            if len(self._events) > EVENTS_MAX:
                del self._events[: EVENTS_MAX // 2]

    def emit(self, record: logging.LogRecord) -> None:
        node, separator, text = record.getMessage().partition(": ")
        known = bool(separator) and " " not in node
        name = node.rpartition("/")[2] if known else "-"
        self.add(name, f"{record.levelname.lower()}: {text if known else record.getMessage()}")

    def listen(self) -> None:
        """Collect what kvrep logs, from level INFO on, until :meth:`close`."""
        logger = logging.getLogger("kvrep")
        self._level_before = logger.level
        logger.addHandler(self)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)

    def close(self) -> None:
        logger = logging.getLogger("kvrep")
        logger.removeHandler(self)
        if self._level_before is not None:
            logger.setLevel(self._level_before)
            self._level_before = None
        super().close()

    @property
    def events(self) -> list[Event]:
        with self._order:
            return list(self._events)

    def __str__(self) -> str:
        return "\n".join(map(str, self.events))
