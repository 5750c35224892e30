"""Where an agent gets changes from: in order, each once, each knowing what it follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvrep.model.change import Change
from kvrep.model.event import Event
from kvrep.sinks.interface import Place

__all__ = ["Incoming", "Source", "SourceState", "Unreadable"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that is no event, or one of another store."""

    raw: bytes
    reason: str


Incoming = Change | Event | Unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """What a source knows of itself."""

    behind: int | None = None
    """Records at the source that were not received yet; ``None`` while not known."""
    as_of_us: int = 0
    """When nothing was behind: the source's wall clock as it said so."""
    parked: int = 0
    """Events that wait for one before them."""
    repeats: int = 0
    """Events that came again and were dropped."""
    asked: int = 0
    """How often missing events were asked for."""
    problem: str = ""
    """Why nothing comes, where that is known; ``behind`` is not known then."""


class Source(ABC):
    """Changes in order. ``url`` names it without secrets. One thread uses it at a time."""

    url: str = ""
    window: int | None = None
    """How many changes may be received and not settled before nothing more comes; ``None``: any number."""

    @property
    @abstractmethod
    def lineage(self) -> str:
        """The history it tells; empty while not known."""

    def widen(self, changes: int) -> None:
        """Settlements may be so many changes apart. Before :meth:`open`."""
        del changes

    @abstractmethod
    def open(self, place: Place) -> None:
        """Go on after ``place``; with an empty one, begin with a snapshot.

        Errors are those of :meth:`Sink.open`, and :class:`LineageMismatch`.
        """

    @abstractmethod
    def receive(self, count: int, timeout_s: float) -> Sequence[Incoming]:
        """Up to ``count`` changes; waits up to ``timeout_s`` for the first one, else nothing."""

    @abstractmethod
    def settle(self, place: Place) -> None:
        """Everything received through ``place`` has taken durable effect, and is not needed again."""

    @abstractmethod
    def state(self) -> SourceState:
        """A look at it; any thread."""

    @abstractmethod
    def close(self) -> None:
        """Let go; :meth:`open` may follow. Idempotent."""

    def end(self) -> None:
        """Close it for good, with what it was made from."""
        self.close()
