"""A broker as the source of an agent: parsed, put in order, and completed where something is missing."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from dataclasses import replace
from typing import NamedTuple

from kvrep.brokers.interface import Broker, Delivery, Message, Publisher, Subscriber
from kvrep.errors import Error, ProtocolError
from kvrep.model.change import Sequence, sequence_text
from kvrep.model.event import Event
from kvrep.sinks.interface import NOTHING, Place
from kvrep.sinks.ordering import Inbox, Verdict
from kvrep.sinks.source import Incoming, Source, SourceState, Unreadable
from kvrep.sinks.stream import REQUESTS, Mark, Part, Parts, Request, event_of

__all__ = ["BrokerSource"]

log = logging.getLogger("kvrep.agent")

RAW_BYTES_MAX = 1 << 20
"""How much of a message that cannot be read is kept."""
RECEIVE_MESSAGES = 64
"""Taken from the broker at once: between two pieces the agent looks how many bytes it holds."""
_NOTHING_OF_IT = Message(b"")
ASK_TIMEOUT_S = 5.0
WINDOW = 500
WINDOW_MAX = 5000
"""Deliveries that are received and not acknowledged, which stand in memory."""
PARKED_MAX, PARKED_OF_PARTITIONS_MAX = 300, 8000
"""Events that wait for one before them. Of a topic with partitions megabytes come from one, then from another."""
ASK_INTERVAL_MAX_S = 60.0
SILENT_S = 60.0
"""A publisher that sends marks does so every few seconds; without any for so long it is away."""


class _Received(NamedTuple):
    """A delivery that is not acknowledged yet, and the event that has to take effect first."""

    delivery: Delivery
    sequence: Sequence
    """NOTHING: it may go with the next settlement."""


class BrokerSource(Source):
    """Events of one topic. What is missing for longer than ``gap_wait_s`` is asked for from the publisher.

    ``parked_max`` events wait for one before them at the most (300; where topics have partitions 8000); when there are
    more, all of them are let go, since what is asked for comes with everything behind it. A message is acknowledged
    once its event has taken effect.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        topic: str = "",
        group: str = "agent",
        parked_max: int | None = None,
        parked_bytes_max: int = 16 << 20,
        gap_wait_s: float = 1.0,
        ask_interval_s: float = 5.0,
    ) -> None:
        self.url = broker.url
        self._broker = broker
        self._topic = topic or broker.topic
        self._group = group
        self._partitions: bool = getattr(broker, "has_partitions", False)  # brokers of others need not tell
        self._parked_max = parked_max or (PARKED_OF_PARTITIONS_MAX if self._partitions else PARKED_MAX)
        self._parked_bytes_max = parked_bytes_max
        self._gap_wait_s, self._ask_interval_s = gap_wait_s, ask_interval_s
        self.window: int = WINDOW
        self._subscriber: Subscriber | None = None
        self._requests: Publisher | None = None
        self._repeats = self._asked = 0
        self._start(Place())

    def _start(self, place: Place) -> None:
        self._place = place
        self._inbox: Inbox[Event] = Inbox(
            place.lineage,
            place.sequence,
            parked_max=self._parked_max,
            parked_bytes_max=self._parked_bytes_max,
            staging=place.staging,
        )
        self._parts = Parts()
        self._received: deque[_Received] = deque()
        self._mark: Mark | None = None
        self._heard_s = time.monotonic()
        self._dropped = False
        """Whether something arrived and was not kept: it has to come again."""
        self._gap_since_s: float | None = None
        self._gap_after: Sequence = NOTHING
        self._ask_at_s = 0.0
        self._pause_s = self._ask_interval_s

    @property
    def lineage(self) -> str:
        return self._inbox.lineage

    def widen(self, changes: int) -> None:
        self.window = max(self.window, min(changes, WINDOW_MAX))

    def open(self, place: Place) -> None:
        self.close()
        self._start(place)
        prefetch = self.window + (self._parked_max if self._partitions else 0)
        self._subscriber = self._broker.subscriber(self._topic, group=self._group, prefetch=prefetch)

    def receive(self, count: int, timeout_s: float) -> list[Incoming]:
        assert self._subscriber is not None
        deliveries = self._subscriber.receive(min(count, RECEIVE_MESSAGES), timeout_s)
        if deliveries:
            self._heard_s = time.monotonic()
        found: list[Incoming] = []
        for delivery in deliveries:
            self._sort(delivery, found)
        self._watch_gap()
        return found

    def _sort(self, delivery: Delivery, found: list[Incoming]) -> None:
        message = delivery.message
        try:
            mark = Mark.parse(message)
            if mark is not None:
                self._take_mark(mark)
                self._received.append(_Received(delivery, NOTHING))
                return
            part = Part.parse(message)
            if part is not None:
                whole = self._gather(part, delivery, found)
                if whole is None:
                    return
                event = event_of(replace(delivery, message=whole))
            else:
                event = event_of(delivery)
        except ProtocolError as error:
            found.append(Unreadable(_raw(delivery), str(error)))
            self._received.append(_Received(delivery, NOTHING))
            return
        offer = self._inbox.offer(event)
        if offer.verdict is Verdict.FOREIGN:
            found.append(Unreadable(_raw(delivery), f"it belongs to another store, {event.lineage}"))
        elif offer.verdict is Verdict.REPEAT:
            self._repeats += 1
        elif offer.verdict in (Verdict.FULL, Verdict.TRUNCATED):
            self._let_go()
        found += offer.released
        keep = offer.verdict in (Verdict.APPLY, Verdict.PARKED)
        self._received.append(_Received(delivery, event.sequence if keep else NOTHING))

    def _gather(self, part: Part, delivery: Delivery, found: list[Incoming]) -> Message | None:
        """A piece of a message; the whole one with the last of them. Till it takes effect, no part is done with."""
        inbox, keep, whole = self._inbox, False, None
        if inbox.lineage and part.lineage != inbox.lineage:
            if not part.index:
                found.append(Unreadable(_raw(delivery), f"it belongs to another store, {part.lineage}"))
        elif part.sequence <= inbox.applied:
            self._repeats += 1
        else:
            keep, whole = True, self._parts.add(part)
            if self._parts.full:
                self._let_go()
                keep = False
        if whole is None:
            bare = replace(delivery, message=_NOTHING_OF_IT)  # the piece is held once
            self._received.append(_Received(bare, part.sequence if keep else NOTHING))
        return whole

    def _take_mark(self, mark: Mark) -> None:
        """Keep the one that knows of most. A mark may come again late; its time says nothing of order."""
        ours = not self._inbox.lineage or mark.lineage == self._inbox.lineage
        if ours and (self._mark is None or mark.through >= self._mark.through):
            self._mark = mark

    def _let_go(self) -> None:
        """No room to wait, or no use: what is asked for comes with all that follows it."""
        self._inbox.clear()
        self._parts.clear()
        self._dropped = True
        self._received = deque(
            r if r.sequence <= self._inbox.applied else _Received(r.delivery, NOTHING) for r in self._received
        )

    # -- what is missing ---------------------------------------------------------------------------

    def _missing(self) -> bool:
        inbox = self._inbox
        marked = self._mark is not None and self._mark.through > inbox.applied
        return bool(inbox.parked) or self._dropped or marked or inbox.applied == NOTHING

    def _watch_gap(self) -> None:
        now_s, applied = time.monotonic(), self._inbox.applied
        if not self._missing():
            self._gap_since_s, self._pause_s = None, self._ask_interval_s
            return
        if self._gap_since_s is None or self._gap_after != applied:
            self._gap_since_s, self._gap_after, self._pause_s = now_s, applied, self._ask_interval_s
        waited = self._dropped or now_s - self._gap_since_s >= self._gap_wait_s
        if waited and now_s >= self._ask_at_s:
            self._ask()
            self._ask_at_s = now_s + self._pause_s
            self._pause_s = min(self._pause_s * 2, ASK_INTERVAL_MAX_S)

    def _ask(self) -> None:
        """Ask the publisher to go back to what has taken effect; it may be away, so it is asked again later."""
        place = self._place
        request = Request(place.lineage, place.token, place.sequence)
        after = sequence_text(place.sequence)
        try:
            if self._requests is None:
                self._requests = self._broker.publisher(self._topic + REQUESTS)
            self._requests.publish(request.message(), ASK_TIMEOUT_S)
            self._requests.flush(ASK_TIMEOUT_S)
        except Error as error:
            log.warning("%s: asking for what is missing after %s failed: %s", self.url, after, error)
            return
        log.warning("%s: something is missing after %s; asked for it", self.url, after)
        self._asked += 1
        self._dropped = False

    # -- what is done with -------------------------------------------------------------------------

    def settle(self, place: Place) -> None:
        """Acknowledge what has taken effect: all through the first that has not, and those behind it singly."""
        self._place = place
        self._parts.forget(place.sequence)
        subscriber, received = self._subscriber, self._received
        assert subscriber is not None
        last: Delivery | None = None
        while received and received[0].sequence <= place.sequence:
            last = received.popleft().delivery
        if last is not None:
            subscriber.ack(last)
        if received and any(r.sequence <= place.sequence for r in received):
            for one in received:
                if one.sequence <= place.sequence:
                    subscriber.ack(one.delivery, through=False)
            self._received = deque(r for r in received if r.sequence > place.sequence)

    def state(self) -> SourceState:
        mark, applied, problem = self._mark, self._inbox.applied, self._problem()
        behind, as_of_us = None, 0
        if mark is not None:
            behind = mark.behind + max(0, mark.through[1] - applied[1])
            as_of_us = 0 if behind or mark.through > applied else mark.time_us
            behind += mark.through > applied and not behind
        return SourceState(
            behind=None if problem else behind,
            as_of_us=as_of_us,
            parked=self._inbox.parked,
            repeats=self._repeats,
            asked=self._asked,
            problem=problem,
        )

    def _problem(self) -> str:
        problem: str = getattr(self._subscriber, "problem", "")  # brokers of others need not tell
        silent_s = time.monotonic() - self._heard_s
        if not problem and self._mark is not None and silent_s > SILENT_S:
            problem = f"{self.url}: no event and no mark for {silent_s:.0f} s: the publisher may be away"
        return problem

    def close(self) -> None:
        subscriber, self._subscriber = self._subscriber, None
        requests, self._requests = self._requests, None
        if subscriber is not None:
            subscriber.close()
        if requests is not None:
            requests.close(0.0)

    def end(self) -> None:
        self.close()
        self._broker.close()


def _raw(delivery: Delivery) -> bytes:
    """A message that cannot be used, whole enough to be looked at."""
    headers = json.dumps(dict(delivery.message.headers), default=str).encode()
    return (headers + b"\n" + delivery.message.body)[:RAW_BYTES_MAX]
