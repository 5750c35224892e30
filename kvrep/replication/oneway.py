"""Replication through a broker: the primary's half of a stream, played from what arrives.

Nobody can be asked, so the follower answers its own Hello from what the messages say of their history
(:func:`judge`), and puts records that overtook others back in order (:class:`OneWay`). What comes out are the
messages that a primary would have sent; the :class:`~kvrep.replication.receiver.Receiver` does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvrep.model.position import OFFSET_MAX
from kvrep.replication.envelope import Envelope, EnvelopeKind, History, skip_records
from kvrep.replication.join import Continue, LogView, Superseded, plan_join
from kvrep.replication.messages import (
    PROTOCOL,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Refused,
    Segment,
    Truncate,
    Welcome,
)

__all__ = ["OneWay", "Stale", "judge"]


@dataclass(frozen=True, slots=True)
class Stale:
    """This comes from a publisher that was superseded, and counts for nothing."""

    epoch: int


def judge(hello: Hello, history: History) -> Welcome | Truncate | NeedBootstrap | Refused | Stale:
    """What a primary with this history would answer to ``hello``.

    The end of its log is not known: a message that was delivered late is no proof that what followed it does
    not exist. Only a table that gives our records to another epoch proves that the histories differ.
    """
    view = LogView(
        store_id=history.source_id,
        name=history.source or "the publisher",
        lineage=history.lineage,
        branch=history.branch,
        ancestors=history.ancestors,
        epoch=history.epoch,
        fenced=True,  # the publisher is a follower itself: its primary has refused it unless that is so
        first=1,
        last=OFFSET_MAX,
        epochs=history.epochs,
    )
    plan = plan_join(hello, view)
    if isinstance(plan, Superseded):
        return Stale(history.epoch)
    if isinstance(plan, Continue):
        return Welcome(
            lineage=history.lineage,
            branch=history.branch,
            store_id=history.source_id,
            name=history.source,
            epoch=history.epoch,
            protocol=PROTOCOL,
            heartbeat_interval_ms=1000,
            last=hello.last,
        )
    return plan


class OneWay:
    """Records on their way to one stream of a follower, once it was welcomed.

    Invariant: what is parked lies behind a gap, and is bounded in bytes.
    """

    def __init__(self, welcome: Welcome, park_bytes: int) -> None:
        self.epoch = welcome.epoch
        self.next = welcome.last.offset + 1
        """The first record that is still wanted."""
        self.source_last = welcome.last.offset
        self._part = 0
        """The next part of the record ``next``, when it comes in parts."""
        self._park_bytes = park_bytes
        self._parked: dict[tuple[int, int], Envelope] = {}
        """By (first, part)."""
        self.parked_bytes = 0

    @property
    def gap(self) -> tuple[int, int] | None:
        """The records that are missing while others behind them are here."""
        if not self._parked:
            return None
        return self.next, max(self.next, min(self._parked)[0] - 1)

    @property
    def full(self) -> bool:
        """Whether nothing more may be parked."""
        return self.parked_bytes >= self._park_bytes

    def take(self, envelope: Envelope) -> list[Segment]:
        """Records arrived: the segments that can be handed on now, in order. The caller has checked that
        they are of this epoch. ``ProtocolError`` when the records are fewer than announced."""
        self.source_last = max(self.source_last, envelope.source_last, envelope.last)
        if envelope.kind is not EnvelopeKind.RECORDS or self._repeats(envelope):
            return []
        if not self._joins(envelope):
            self._park(envelope)
            return []
        return [self._hand_on(envelope), *self._unpark()]

    def _joins(self, envelope: Envelope) -> bool:
        if envelope.parts > 1:
            return envelope.first == self.next and envelope.part == self._part
        return envelope.first <= self.next and not self._part

    def _repeats(self, envelope: Envelope) -> bool:
        if envelope.last < self.next:
            return True
        return envelope.parts > 1 and envelope.first == self.next and envelope.part < self._part

    def _park(self, envelope: Envelope) -> None:
        place = (envelope.first, envelope.part)
        before = self._parked.get(place)
        if before is not None and before.last >= envelope.last:
            return
        self._parked[place] = envelope
        self.parked_bytes += len(envelope.data) - (len(before.data) if before is not None else 0)

    def _unpark(self) -> Iterator[Segment]:
        while self._parked:
            place = min(self._parked)
            envelope = self._parked[place]
            repeats = self._repeats(envelope)
            if not repeats and not self._joins(envelope):
                return
            del self._parked[place]
            self.parked_bytes -= len(envelope.data)
            if not repeats:
                yield self._hand_on(envelope)

    def forget(self) -> None:
        """Give up what is parked."""
        self._parked.clear()
        self.parked_bytes = 0

    def _hand_on(self, envelope: Envelope) -> Segment:
        first, data = self.next, envelope.data
        if envelope.parts == 1:
            if envelope.first < first:
                data = skip_records(data, first - envelope.first)
            self.next, self._part = envelope.last + 1, 0
        else:
            self._part = envelope.part + 1
            if self._part == envelope.parts:
                self.next, self._part = envelope.last + 1, 0
        return Segment(
            epoch=self.epoch,
            first=first,
            last=envelope.last,
            data=data,
            committed=envelope.last,  # nothing else is published
            part=envelope.part,
            parts=envelope.parts,
            more=self.source_last > envelope.last,
        )

    def heartbeat(self) -> Heartbeat:
        """A sign of life, as the primary would send it."""
        return Heartbeat(epoch=self.epoch, last=self.source_last, committed=self.next - 1)
