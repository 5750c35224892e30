"""The other direction: the changes of a store become events on a broker.

::

    changes.poll() ──> publisher.publish() … ──> confirmed? ──> cursor.save(token)

The place moves only behind what the broker has confirmed, so a publication that is killed sends a few events
again, and never leaves one out; receivers drop repeats. Receivers that miss something ask for it
(:mod:`kvrep.sinks.stream`): the publication then goes back to where they are.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from typing import Any, Unpack, get_args

from kvrep import brokers
from kvrep.brokers.interface import Broker, Publisher, Subscriber
from kvrep.errors import (
    InvalidToken,
    LineageMismatch,
    LogTrimmed,
    Overloaded,
    PeerUnavailable,
    ProtocolError,
    Truncated,
)
from kvrep.model.change import Change, Sequence, sequence_text
from kvrep.model.event import Event
from kvrep.model.token import Token
from kvrep.sinks.cursor import Cursor
from kvrep.sinks.delays import Delays, Rate, catch_up_s, known
from kvrep.sinks.interface import NOTHING
from kvrep.sinks.running import AgentState, Running
from kvrep.sinks.stream import REQUESTS, Format, Mark, Request, message_of, parts_of
from kvrep.sinks.upstream import Local, Selected, Stream, Upstream, Wanted
from kvrep.store import Store

__all__ = ["Publication", "PublicationStatus"]

log = logging.getLogger("kvrep.agent")

SAVE_INTERVAL_S = 0.2
UNCONFIRMED_MAX = 4096
MESSAGE_BYTES = {"kafka": 900_000, "kafkas": 900_000}
MESSAGE_BYTES_ELSE = 4 << 20
"""By the scheme of the broker: what it takes unless it was told otherwise, with room to spare."""
PUBLISH_S = 30.0
IDLE_S = 0.25
MESSAGE_BYTES_MIN = 64 << 10
SNAPSHOT_REST_S = 2.0
"""Requests for a snapshot that come so soon after one began were sent before it: who still lacks it asks again."""


class _Held:
    """The place in the named feed of the store itself."""

    def __init__(self, upstream: Upstream) -> None:
        self.load, self.save = upstream.held, upstream.hold


def _upstream_of(source: Upstream | Store | str, feed: str) -> Upstream:
    if isinstance(source, Store):
        return Local(source, feed=feed)
    if isinstance(source, str):
        from kvrep.sinks.addresses import upstream_at

        return upstream_at(source, feed=feed)
    return source


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicationStatus:
    """A publication at one moment."""

    name: str
    state: AgentState
    problem: str
    source: str
    broker: str
    topic: str
    sequence: Sequence
    """The last event that was sent."""
    published: int
    confirmed: int
    published_per_s: float
    backlog: int | None
    """Records at the source that are not sent yet, and events that are not confirmed yet."""
    catch_up_s: float | None
    delay_p50_s: float | None
    """From commit to the broker's confirm, of the last minutes."""
    delay_p99_s: float | None
    snapshots: int
    replays: int
    """How often receivers asked for something again."""
    reconnects: int

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "state": str(self.state), "sequence": sequence_text(self.sequence)}


class Publication(Running):
    """Publishes the changes of a store, those of ``selection`` (see :class:`Selected`), for ever.

    ``source`` is a :class:`Store`, the address of nodes or the path of a store; ``broker`` may be an address, too.
    Its place is in ``cursor``; without one, in the named feed ``feed`` of a store that this process has open; without
    either, every start begins with a snapshot.

    ``one_line`` gives all messages one key, so that a broker with partitions keeps the order of all of them;
    else each key of the store keeps its own order and receivers restore the rest. ``mark_interval_s`` is how
    often an idle stream says so; 0: never. The life of it is that of an :class:`~kvrep.sinks.agent.Agent`;
    it closes ``broker``, and ``source`` unless that is a store.

    ``form`` is ``"binary"`` or ``"structured"``, the modes of CloudEvents, which agents read both, or
    ``"debezium"``: envelopes for whoever expects those, without marks. What is larger than ``message_bytes_max``
    (900 kB for Kafka, else 4 MiB) goes in parts, which agents put together again.
    """

    kind, retryable = "publication", (PeerUnavailable, Overloaded, TimeoutError)

    def __init__(
        self,
        source: Upstream | Store | str,
        broker: Broker | str,
        cursor: Cursor | None = None,
        *,
        feed: str = "",
        topic: str = "",
        name: str = "publisher",
        one_line: bool = True,
        form: Format = "binary",
        message_bytes_max: int | None = None,
        mark_interval_s: float = 5.0,
        log_interval_s: float = 60.0,
        wait: bool = False,
        **selection: Unpack[Wanted],
    ) -> None:
        if form not in get_args(Format):
            raise ValueError(f"form is one of {', '.join(get_args(Format))}, not {form!r}")
        if message_bytes_max is not None and message_bytes_max < MESSAGE_BYTES_MIN:
            raise ValueError(f"message_bytes_max is at least {MESSAGE_BYTES_MIN}")
        super().__init__(name, wait=wait)
        broker = brokers.connect(broker) if isinstance(broker, str) else broker
        self.topic = topic or broker.topic
        upstream = _upstream_of(source, feed)
        self._upstream, self._broker, self._cursor = upstream, broker, cursor or _Held(upstream)
        self._selected = Selected(**selection)
        self._one_line, self._form = one_line, form
        scheme = broker.url.partition(":")[0]
        self._message_bytes_max = message_bytes_max or MESSAGE_BYTES.get(scheme, MESSAGE_BYTES_ELSE)
        self._prefix = "cloudEvents:" if scheme.startswith("amqp") else "ce_"
        self._mark_interval_s = 0.0 if form == "debezium" else mark_interval_s
        self._log_interval_s = log_interval_s
        self._publisher: Publisher | None = None
        self._requests: Subscriber | None = None
        self._stream: Stream | None = None
        self._sent: Sequence = NOTHING
        self._saved: Sequence = NOTHING
        self._waiting: deque[tuple[int, Change]] = deque()
        """What is not confirmed yet: the publisher's number, and the change."""
        self._last_confirmed: Change | None = None
        self._saved_s = self._marked_s = 0.0
        self._marked = False
        self._snapshotting = False
        self._begun_s = -SNAPSHOT_REST_S
        self._published = self._confirmed = self._snapshots = self._replays = 0
        self.delays = Delays()
        self._speed, self._growth = Rate(), Rate()
        self._logged_s = time.monotonic()

    def _close_sides(self) -> None:
        self._broker.close()
        self._upstream.close()

    def _progress(self) -> int:
        return self._confirmed

    # -- the loop ----------------------------------------------------------------------------------

    def _connect(self) -> None:
        try:
            self._publisher = self._broker.publisher(self.topic)
            self._requests = self._broker.subscriber(self.topic + REQUESTS, group="publisher")
            self._waiting.clear()
            self._go_to(self._cursor.load())
        except BaseException:
            self._disconnect()
            raise
        self._say(AgentState.APPLYING, "")

    def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        publisher, self._publisher = self._publisher, None
        requests, self._requests = self._requests, None
        for close in (
            *([stream.close] if stream else []),
            *([lambda: publisher.close(0.0)] if publisher else []),
            *([requests.close] if requests else []),
        ):
            try:
                close()
            except Exception as error:  # it is being given up: what it says does not matter any more
                log.debug("closing: %s", error)

    def _go_to(self, token: str) -> None:
        """Read on after ``token``; from a snapshot where there is none, or it is no good any more."""
        if self._stream is not None:
            self._stream.close()
        try:
            if token:
                self._stream = self._upstream.changes(token, self._selected)
                return
        except (InvalidToken, LineageMismatch) as error:
            log.warning("publication %s begins anew: %s", self.name, error)
        self._stream = self._upstream.changes("", self._selected)

    def _session(self) -> None:
        assert self._publisher is not None
        while not self._stop.is_set():
            self._answer_requests()
            changes = self._poll(IDLE_S)
            for change in changes:
                self._send(change)
                if self._stop.is_set():
                    break
            self._note_confirmed()
            if not changes:
                self._rest()
            self._log_now_and_then()
        self._publisher.wait(self._publisher.published, 1.0)
        self._note_confirmed(at_once=True)

    def _poll(self, timeout_s: float) -> SequenceOf[Change]:
        assert self._stream is not None
        try:
            return self._stream.poll(timeout_s)
        except (LogTrimmed, Truncated) as error:
            log.warning("publication %s sends a snapshot: %s", self.name, error)
            self._go_to("")
            return ()

    def _send(self, change: Change) -> None:
        publisher = self._publisher
        assert publisher is not None
        event = Event.from_change(self._upstream.lineage(), change)
        while len(self._waiting) >= UNCONFIRMED_MAX and not self._stop.is_set():
            publisher.wait(self._waiting[0][0], IDLE_S)
            self._note_confirmed()
        message = message_of(event, one_line=self._one_line, form=self._form, prefix=self._prefix)
        if message is not None:
            for part in parts_of(message, event, self._message_bytes_max):
                publisher.publish(part, PUBLISH_S)
        self._waiting.append((publisher.published, change))
        self._published += 1
        self._sent, self._marked = change.sequence, False
        if change.kind == "begin":
            self._snapshots += 1
            self._snapshotting, self._begun_s = True, time.monotonic()
        elif change.kind == "end":
            self._snapshotting = False

    def _note_confirmed(self, *, at_once: bool = False) -> None:
        """Move the place behind what is confirmed; never back, where something is sent again."""
        publisher, waiting = self._publisher, self._waiting
        assert publisher is not None
        confirmed, last = publisher.confirmed, None
        now_s, now_us = time.monotonic(), time.time_ns() // 1000
        while waiting and waiting[0][0] <= confirmed:
            last = waiting.popleft()[1]
            self._confirmed += 1
            if last.time_us and not last.snapshot:
                self.delays.add((now_us - last.time_us) / 1e6, now_s)
        self._speed.add(self._confirmed, now_s)
        if last is not None and Token.parse(last.resume).scan is None:
            self._last_confirmed = (
                last  # a snapshot that was cut off begins anew: half a one is of no use to others
            )
        candidate = self._last_confirmed
        due = at_once or now_s - self._saved_s >= SAVE_INTERVAL_S
        if candidate is not None and due and candidate.sequence > self._saved:
            self._cursor.save(candidate.resume)
            self._saved, self._saved_s = candidate.sequence, now_s

    def _rest(self) -> None:
        """Nothing to send: say so in the stream, once at the end of each burst and then now and then."""
        behind = self._behind()
        if self._snapshotting:
            self._say(AgentState.SNAPSHOT, "")
        else:
            self._say(AgentState.CURRENT if not behind and not self._waiting else AgentState.APPLYING, "")
        now_s = time.monotonic()
        head = self._upstream.head()
        if head is not None:
            self._growth.add(head, now_s)
        if (
            behind is None
            or not self._mark_interval_s
            or (self._marked and now_s - self._marked_s < self._mark_interval_s)
        ):
            return
        publisher = self._publisher
        assert publisher is not None
        mark = Mark(self._upstream.lineage(), self._sent_before(), behind, time.time_ns() // 1000)
        publisher.publish(mark.message(), PUBLISH_S)
        self._marked, self._marked_s = True, now_s

    def _sent_before(self) -> Sequence:
        """The last event sent, by this process or the one before it."""
        if self._sent != NOTHING:
            return self._sent
        token = self._cursor.load()
        return (Token.parse(token).previous if token else None) or NOTHING

    def _behind(self) -> int | None:
        """Records that are not read yet; ``None`` while not known."""
        stream, head = self._stream, self._upstream.head()
        return None if stream is None or head is None else max(0, head - stream.at().offset)

    # -- what receivers miss -----------------------------------------------------------------------

    def _answer_requests(self) -> None:
        """Go back to the furthest place that somebody asked for; once for all who asked meanwhile."""
        requests = self._requests
        assert requests is not None
        deliveries = requests.receive(64, 0.0)
        back: Request | None = None
        for delivery in deliveries:
            try:
                request = Request.parse(delivery.message)
            except ProtocolError as error:
                log.warning("publication %s: %s", self.name, error)
                continue
            if request.lineage not in ("", self._upstream.lineage()):
                log.warning("publication %s was asked for another store, %s", self.name, request.lineage)
            elif self._is_behind(request) and (back is None or request.sequence < back.sequence):
                back = request
        if back is not None:
            log.warning(
                "publication %s goes back to %s: it was asked to", self.name, sequence_text(back.sequence)
            )
            self._replays += 1
            whole = back.token and Token.parse(back.token).scan is None
            self._go_to(back.token if whole else "")
        if deliveries:
            requests.ack(deliveries[-1])

    def _is_behind(self, request: Request) -> bool:
        """Whether what is asked for does not come anyway."""
        if request.sequence == NOTHING:
            return not self._snapshotting and time.monotonic() - self._begun_s >= SNAPSHOT_REST_S
        return request.sequence < self._sent or self._sent == NOTHING

    # -- what it says ------------------------------------------------------------------------------

    def _standing(self) -> tuple[AgentState, str]:
        """State and problem. A publisher reconnects by itself, so that its broker is away shows in it alone."""
        state, publisher = self._state, self._publisher
        if publisher is not None and state not in (AgentState.FAILED, AgentState.CLOSED):
            there = publisher.status()
            if there.state in ("connecting", "blocked"):
                return AgentState.WAITING, there.problem or f"{self._broker.url} is {there.state}"
        return state, self._problem

    def status(self) -> PublicationStatus:
        """How far it is, as one frozen value. Any thread."""
        now_s, behind = time.monotonic(), self._behind()
        backlog = None if behind is None else behind + len(self._waiting)
        speed = self._speed.per_s(now_s)
        until = None if backlog is None else catch_up_s(backlog, speed, self._growth.per_s(now_s))
        state, problem = self._standing()
        return PublicationStatus(
            name=self.name,
            state=state,
            problem=problem,
            source=self._upstream.url,
            broker=self._broker.url,
            topic=self.topic,
            sequence=self._sent,
            published=self._published,
            confirmed=self._confirmed,
            published_per_s=round(speed, 1),
            backlog=backlog,
            catch_up_s=None if until is None or until == float("inf") else round(until, 3),
            delay_p50_s=self.delays.percentile(50, now_s),
            delay_p99_s=self.delays.percentile(99, now_s),
            snapshots=self._snapshots,
            replays=self._replays,
            reconnects=self._reconnects,
        )

    def _log_now_and_then(self) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s < self._log_interval_s:
            return
        self._logged_s = now_s
        s = self.status()
        log.info(
            "publication %s: %s at %s, %.0f events/s, backlog %s, delay p50 %s p99 %s, confirmed %d",
            s.name, s.state, sequence_text(s.sequence), s.published_per_s, known(s.backlog),
            known(s.delay_p50_s, " s"), known(s.delay_p99_s, " s"), s.confirmed,
        )  # fmt: skip
