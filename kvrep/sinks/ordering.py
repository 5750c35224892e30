"""In which order events take effect: a pure value, without clock, thread or I/O.

Every event says which one comes before it in its stream (``previous``). So a receiver knows, without counting
and whatever was left out by selection, whether it may go on, waits for something, or has seen this before::

    offer(event) ──> APPLY      it and what was parked behind it are released, in order
                 ──> REPEAT     it took effect already: drop it
                 ──> PARKED     something before it is missing: it waits
                 ──> FULL       … and there is no room to wait: it was not kept; ask for all after `applied`
                 ──> TRUNCATED  the history that was applied is not the source's any more: ask for a snapshot
                 ──> FOREIGN    it belongs to another store
"""

from __future__ import annotations

from bisect import insort
from enum import Enum
from typing import Generic, NamedTuple, Protocol, TypeVar

from kvrep.model.change import BEGIN, END, ChangeKind, Sequence
from kvrep.sinks.interface import NOTHING

__all__ = ["Inbox", "Offer", "Ordered", "Verdict"]


class Ordered(Protocol):
    """What the order needs of an event."""

    @property
    def lineage(self) -> str: ...
    @property
    def kind(self) -> ChangeKind: ...
    @property
    def sequence(self) -> Sequence: ...
    @property
    def previous(self) -> Sequence | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def before(self) -> bytes | None: ...


E = TypeVar("E", bound=Ordered)


class Verdict(Enum):
    """What becomes of an event that was offered."""

    APPLY = "apply"
    REPEAT = "repeat"
    PARKED = "parked"
    FULL = "full"
    TRUNCATED = "truncated"
    FOREIGN = "foreign"


class Offer(NamedTuple, Generic[E]):
    """The verdict, and the events that take effect now, in order."""

    verdict: Verdict
    released: tuple[E, ...] = ()


class Inbox(Generic[E]):
    """Puts the events of one stream in order. Invariant: every parked event lies behind :attr:`applied`."""

    def __init__(
        self,
        lineage: str,
        applied: Sequence,
        *,
        parked_max: int = 300,
        parked_bytes_max: int = 16 << 20,
        staging: bool = False,
    ) -> None:
        self.lineage = lineage
        """Of the stream; empty until a first snapshot begins."""
        self.applied = applied
        """The last event released."""
        self.staging = staging
        """Whether a snapshot is arriving."""
        self._parked_max = parked_max
        self._bytes_max = parked_bytes_max
        self._order: list[Sequence] = []
        self._parked: dict[Sequence, E] = {}
        self._bytes = 0

    @property
    def parked(self) -> int:
        """How many events wait for one before them."""
        return len(self._order)

    @property
    def parked_bytes(self) -> int:
        return self._bytes

    def offer(self, event: E) -> Offer[E]:
        """Take one event as it arrives."""
        if self.lineage and event.lineage != self.lineage:
            return Offer(Verdict.FOREIGN)
        if event.sequence <= self.applied:
            return Offer(Verdict.REPEAT)
        if event.kind == BEGIN:
            return self._begin(event)
        if event.sequence in self._parked:
            return Offer(Verdict.REPEAT)
        if self._replaced(event):
            return Offer(Verdict.TRUNCATED)
        if not self._joins(event):
            return self._park(event)
        self._apply(event)
        return Offer(Verdict.APPLY, (event, *self._follow()))

    def _apply(self, event: E) -> None:
        self.applied = event.sequence
        if event.kind == END:
            self.staging = False

    def clear(self) -> None:
        """Forget what is parked: it will be sent again."""
        self._order.clear()
        self._parked.clear()
        self._bytes = 0

    def _begin(self, event: E) -> Offer[E]:
        """A snapshot replaces everything, so nothing before it can be missing."""
        self.lineage = event.lineage
        self.applied, self.staging = event.sequence, True
        return Offer(Verdict.APPLY, (event, *self._follow()))

    def _replaced(self, event: E) -> bool:
        """Whether a later epoch wrote at or below what was applied: that part of it was taken back."""
        return event.sequence[0] > self.applied[0] and event.sequence[1:] <= self.applied[1:]

    def _joins(self, event: E) -> bool:
        """Whether nothing lies between what was applied and ``event``.

        Exactly the one before it, or anything up to what was applied, as long as no epoch lies between: the
        history of one epoch has one line, while a later one may have begun below what was applied. Inside of a
        snapshot only exactly: what passes then is no whole history.
        """
        previous = event.previous
        if previous is None or self.applied == NOTHING:
            return False
        if self.staging or event.kind == END:
            return previous == self.applied
        return previous == self.applied or (
            previous < self.applied and previous[0] == event.sequence[0] == self.applied[0]
        )

    def _park(self, event: E) -> Offer[E]:
        size = _size(event)
        if len(self._order) >= self._parked_max or (self._order and self._bytes + size > self._bytes_max):
            return Offer(Verdict.FULL)
        insort(self._order, event.sequence)
        self._parked[event.sequence] = event
        self._bytes += size
        return Offer(Verdict.PARKED)

    def _follow(self) -> list[E]:
        """What was parked and can go on now; what has become a repeat is dropped."""
        released: list[E] = []
        count = 0
        for sequence in self._order:
            event = self._parked[sequence]
            if sequence > self.applied:
                if self._replaced(event) or not self._joins(event):
                    break
                self._apply(event)
                released.append(event)
            count += 1
        for sequence in self._order[:count]:
            self._bytes -= _size(self._parked.pop(sequence))
        del self._order[:count]
        return released


def _size(event: Ordered) -> int:
    return len(event.value or b"") + len(event.before or b"")
