"""Publishing a store's log into a message broker: ``kvrep publish``.

The relay is a follower without a store. It joins the primary as any follower does (so it is told when it is
superseded, has a slot that keeps the log, and finds the new primary after a failover), and what a follower
would write to its disk goes into the broker instead: once the broker has confirmed it, it is acked.

Only what no failover can take back is published. What it stands on is kept in a small file, so that a restart
goes on where it was; without the file it begins anew, and the repeats are dropped where they arrive.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvrep.brokers.interface import Message
from kvrep.errors import (
    AuthenticationFailed,
    ClosedError,
    Error,
    LineageMismatch,
    NotPrimary,
    OpenError,
    Overloaded,
    PermissionDenied,
    ProtocolError,
    UpgradeRequired,
)
from kvrep.model.codec import decode
from kvrep.model.position import Position
from kvrep.model.record import Kind
from kvrep.replication.envelope import Envelope, EnvelopeKind, History, encode_envelope
from kvrep.replication.messages import (
    FromPrimary,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Segment,
    Welcome,
)
from kvrep.replication.receiver import AckNow, Action, Append, Cut, Grant, Join, MakePromise, Receiver, Stop
from kvrep.runtime.description import Description
from kvrep.runtime.relay_place import Place
from kvrep.transport.interface import SnapshotChunk, SnapshotInfo, SnapshotRequest, StreamEnded

if TYPE_CHECKING:
    from kvrep.brokers.interface import Publisher
    from kvrep.transport.interface import Connection, Stream

__all__ = ["Relay", "RelayStatus"]

log = logging.getLogger("kvrep.replication")

CREDIT_BYTES = 8 << 20
DATA_BYTES_MAX = 512 << 10
"""Of one message: brokers take 1 MiB by default."""
RECORD_BYTES_MAX = (1 << 30) + (1 << 20)
HEARTBEAT_TIMEOUT_S = 10.0
MARK_INTERVAL_S = 2.0
SAVE_INTERVAL_S = 1.0
TICK_S = 0.5
HORIZON_POLL_S = 0.05
PUBLISH_WAIT_S = 1.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.05, 2.0
SNAPSHOT_TIMEOUT_S = 3600.0
_FINAL = (AuthenticationFailed, PermissionDenied, LineageMismatch, UpgradeRequired, OpenError)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStatus:
    """How a relay is."""

    state: str
    """``connecting``, ``publishing``, ``snapshot`` or ``closed``."""
    problem: str
    address: str
    published: Position
    """The last position that the broker has confirmed."""
    source_last: int
    lag_records: int
    """Records of the primary that are not confirmed by the broker."""
    messages: int
    bytes: int
    snapshots: int
    broker: str
    """The publisher's own state, such as ``ready`` or ``blocked``."""
    broker_problem: str


class Connect(Protocol):
    def __call__(self, address: str) -> Connection: ...


class _Again(Exception):
    """Open a new stream at once."""


@dataclass(slots=True)
class _Sent:
    """A piece that waits for its confirm: where the log is after it."""

    number: int
    place: Place


class Relay:
    """One topic. :meth:`run` blocks; everything else may be called from any thread."""

    def __init__(
        self,
        sources: Sequence[str],
        connect: Connect,
        publisher: Publisher,
        *,
        name: str = "",
        state: Path | None = None,
        snapshot: bool = False,
    ) -> None:
        """``connect(address)`` makes a connection to a node. ``name`` gives the relay a slot on the primary,
        which keeps the log while it is away. ``snapshot``: begin with a whole copy."""
        self._sources = list(sources)
        self._connect = connect
        self._publisher = publisher
        self._name, self._state_path = name, state
        self._want_snapshot = snapshot
        self._stop = threading.Event()
        # Protects what follows between the receiving and the confirming thread.
        self._lock = threading.RLock()
        self._place = Place.load(state)
        """Confirmed by the broker."""
        self._ahead = self._place
        """As above, with what is on its way into the broker."""
        self._saved = self._place if state is not None and state.exists() else None
        self._saved_s = 0.0
        self._receiver: Receiver | None = None
        self._stream: Stream | None = None
        self._connection: Connection | None = None
        self._sent: deque[_Sent] = deque()
        self._held: deque[tuple[int, int, bytes]] = deque()
        """Received and not beyond the reach of a failover yet: (first, last, records)."""
        self._committed = 0
        self._horizon = 0
        self._all_committed = False
        self._source_last = 0
        self._source, self._source_id, self._epoch, self._branch = "", b"", 0, b""
        self._acked_s = 0.0
        self._marked_s = 0.0
        self._state, self._problem, self._address = "connecting", "", ""
        self._messages = self._bytes = self._snapshots = 0
        self._next = ""
        self._busy = False

    # -- from other threads ------------------------------------------------------------------------

    @property
    def published(self) -> Position:
        """The last position that the broker has confirmed."""
        return self._place.last

    def status(self) -> RelayStatus:
        """A look at it, at any time."""
        broker = self._publisher.status()
        return RelayStatus(
            state=self._state,
            problem=self._problem,
            address=self._address,
            published=self._place.last,
            source_last=self._source_last,
            lag_records=max(0, self._source_last - self._place.last.offset),
            messages=self._messages,
            bytes=self._bytes,
            snapshots=self._snapshots,
            broker=broker.state,
            broker_problem=broker.problem,
        )

    def stop(self) -> None:
        """Have :meth:`run` return soon."""
        self._stop.set()
        stream, connection = self._stream, self._connection
        if stream is not None:
            stream.cancel()
        if connection is not None:
            connection.close()

    # -- the receiving thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Publish until :meth:`stop`; raises what no new attempt can mend, or what ended the publisher.

        ``OSError`` at once when the file for the place cannot be written.
        """
        self._place.save(self._state_path)
        confirming = threading.Thread(target=self._confirm_loop, name="kvrep-publish-confirm", daemon=True)
        confirming.start()
        failures, source = 0, 0
        try:
            while not self._stop.is_set():
                address, self._next = self._next or self._sources[source % len(self._sources)], ""
                joined = False
                try:
                    joined = self._one_stream(address)
                    failures = 0
                except _Again:
                    self._next = self._next or address
                    continue
                except NotPrimary as error:
                    self._problem, self._next = str(error), error.primary_address or ""
                except _FINAL:
                    raise
                except Error as error:
                    if self._publisher.status().state in ("failed", "closed") and not self._stop.is_set():
                        raise
                    self._problem = str(error)
                    log.info("publishing from %s: %s", address, error)
                if not joined:
                    source += 1
                failures += 1
                limit = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(failures, 10))
                self._state = "connecting"
                self._stop.wait(random.uniform(limit / 2, limit))
        finally:
            self._stop.set()
            confirming.join()
            self._state = "closed"
            self._place.save(self._state_path)

    def _one_stream(self, address: str) -> bool:
        connection = self._connect(address)
        self._connection, self._address = connection, address
        try:
            if self._stop.is_set():
                return False
            if self._want_snapshot:
                self._relay_snapshot(connection)
                self._want_snapshot = False
            stream = connection.open_stream()
            self._settle()
            with self._lock:
                hello = self._hello()
                self._receiver = receiver = Receiver(
                    hello,
                    heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
                    record_bytes_max=RECORD_BYTES_MAX,
                    now=time.monotonic(),
                )
                self._stream = stream
            with suppress(StreamEnded):  # receiving says why
                stream.send(hello)
            return self._follow(receiver, stream, connection)
        finally:
            with self._lock:
                self._receiver = self._stream = None
                self._held.clear()
            self._connection = None
            connection.close()

    def _follow(self, receiver: Receiver, stream: Stream, connection: Connection) -> bool:
        while True:
            try:
                message = stream.receive()
            except StreamEnded as ended:
                if self._stop.is_set():
                    return True
                if isinstance(ended.error, _FINAL):
                    raise ended.error from ended
                self._problem = str(ended.error or "the primary ended the stream")
                return receiver.epoch != 0
            self._busy = True
            self._on_message(receiver, connection, message)
            with self._lock:
                receiver.last_heard = time.monotonic()
            self._busy = False

    def _settle(self) -> None:
        """Stand where the broker has confirmed: a join counts as an ack. What it does not confirm soon is
        published again, which does no harm."""
        self._publisher.wait(self._publisher.published, TICK_S)
        self._confirm()
        with self._lock:
            self._sent.clear()
            self._ahead = self._place

    def _hello(self) -> Hello:
        place = self._place
        return Hello(
            store_id=place.store_id,
            name=self._name,
            lineage=place.lineage,
            branch=place.branches[-1] if place.branches else b"",
            voter=False,
            promised_epoch=place.promised,
            last=place.last,
            running=place.running,
            applied=place.last.offset,
            committed=place.last.offset,
            epochs=place.epochs,
            credit_bytes=CREDIT_BYTES,
        )

    def _on_message(self, receiver: Receiver, connection: Connection, message: FromPrimary) -> None:
        if type(message) is Heartbeat or type(message) is Segment:
            self._committed = max(self._committed, message.committed)
            self._source_last = max(self._source_last, message.last)
        with self._lock:
            actions = receiver.on_message(message, time.monotonic())
        for action in actions:
            self._do(connection, action)
        self._release(connection)

    def _do(self, connection: Connection, action: Action) -> None:
        match action:
            case Append(first, last, data, _):
                self._held.append((first, last, data))
            case Join(welcome):
                self._joined(connection, welcome)
            case AckNow() | Grant():
                self._send(action)
            case MakePromise(epoch, reply):
                self._place = replace(self._place, promised=max(epoch, self._place.promised))
                self._ahead = replace(self._ahead, promised=self._place.promised)
                if reply:
                    raise ProtocolError(
                        "a primary that collects promises has asked a relay, which has no vote"
                    )
            case NeedBootstrap():
                self._relay_snapshot(connection)
                raise _Again
            case Cut(to, _, _):
                self._begin_anew(f"the primary's history parts from what was published, at {to}")
                raise _Again
            case Stop(refused):
                self._refused(refused)

    def _refused(self, refused: Any) -> None:
        if refused.reason == "not-primary":
            raise NotPrimary(
                refused.message, hint="", primary_address=refused.primary_address or None, epoch=None
            )
        if refused.reason == "lineage":
            raise LineageMismatch(refused.message)
        raise ProtocolError(refused.message)

    def _joined(self, connection: Connection, welcome: Welcome) -> None:
        with self._lock:
            self._source, self._source_id, self._epoch = welcome.name, welcome.store_id, welcome.epoch
            self._branch = welcome.branch
            self._ahead = replace(self._ahead, lineage=welcome.lineage)
            self._state, self._problem = "publishing", ""
            self._marked_s = 0.0
        self._ask_horizon(connection)

    def _begin_anew(self, why: str) -> None:
        """Forget how far we are: all is published again, and whoever follows drops what it has."""
        log.warning("publishing begins anew: %s", why)
        self._drain()
        with self._lock:
            self._place = Place(store_id=self._place.store_id, promised=self._place.promised)
            self._ahead = self._place
        self._place.save(self._state_path)

    # -- what may be published ---------------------------------------------------------------------

    def _ask_horizon(self, connection: Connection) -> None:
        """Which of the committed records no failover can take back: under most rules all of them."""
        answer = connection.call("horizon", {}, 5.0)
        try:
            self._horizon = int(answer["horizon"])
            self._all_committed = bool(answer["all_committed"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the primary's horizon is not readable: {answer!r}") from error

    def _reach(self) -> int:
        return self._committed if self._all_committed else min(self._committed, self._horizon)

    def _release(self, connection: Connection) -> None:
        """Publish what is held, as far as it may be."""
        while self._held and not self._stop.is_set():
            first, last, data = self._held[0]
            if first > self._reach():
                if self._all_committed or first > self._committed:
                    return
                self._stop.wait(HORIZON_POLL_S)
                self._ask_horizon(connection)
                if first > self._reach():
                    return
            self._held.popleft()
            self._publish_run(connection, first, last, data)

    def _publish_run(self, connection: Connection, first: int, last: int, data: bytes) -> None:
        """Publish a run of whole records as far as the horizon; the rest is held again."""
        view, starts = memoryview(data), []
        with self._lock:
            place = self._ahead
        records, _ = decode(data, first, place.running)
        at = 0
        piece, piece_first = 0, first
        for record in records:
            size = 10 + int.from_bytes(view[at + 6 : at + 10], "big")
            if record.kind in (Kind.EPOCH, Kind.CONFIGURATION):
                self._all_committed = False  # the rule may be another from here on
            if record.offset > self._reach() and not self._all_committed:
                self._ask_horizon(connection)
            if record.offset > self._reach():
                self._flush_piece(place, piece_first, record.offset - 1, bytes(view[piece:at]))
                self._held.appendleft((record.offset, last, bytes(view[at:])))
                return
            if at > piece and at + size - piece > DATA_BYTES_MAX:
                self._flush_piece(place, piece_first, record.offset - 1, bytes(view[piece:at]))
                piece, piece_first = at, record.offset
            starts.append(at)
            place = place.after(record, int.from_bytes(view[at + 1 : at + 5], "big"))
            at += size
        self._flush_piece(place, piece_first, last, bytes(view[piece:]))

    def _flush_piece(self, place: Place, first: int, last: int, data: bytes) -> None:
        if last < first:
            return
        history = self._history(place)
        parts = -(-len(data) // DATA_BYTES_MAX) if first == last else 1
        size = -(-len(data) // parts)
        for part in range(parts):
            number = self._publish(
                Envelope(
                    kind=EnvelopeKind.RECORDS,
                    history=history,
                    source_last=max(self._source_last, last),
                    first=first,
                    last=last,
                    part=part,
                    parts=parts,
                    data=data[part * size : (part + 1) * size],
                )
            )
        with self._lock:
            self._ahead = place
            self._sent.append(_Sent(number, place))

    def _history(self, place: Place) -> History:
        return History(
            lineage=place.lineage,
            branch=self._branch,
            ancestors=tuple(branch for branch in place.branches if branch != self._branch),
            epoch=self._epoch,
            epochs=place.epochs,
            source_id=self._source_id,
            source=self._source,
        )

    def _publish(self, envelope: Envelope) -> int:
        """Hand a message to the broker, however long it takes; ``ClosedError`` when we are to stop."""
        message = self._message(envelope)
        while not self._stop.is_set():
            try:
                number = self._publisher.publish(message, PUBLISH_WAIT_S)
            except Overloaded as error:
                self._problem = str(error)
                continue
            self._messages += 1
            self._bytes += len(message.body)
            self._marked_s = time.monotonic()
            return number
        raise ClosedError("publishing was stopped")

    @staticmethod
    def _message(envelope: Envelope) -> Message:
        body = encode_envelope(replace(envelope, time_us=time.time_ns() // 1000))
        return Message(body, key=envelope.history.lineage, id=envelope.name)

    # -- a whole copy ------------------------------------------------------------------------------

    def _relay_snapshot(self, connection: Connection) -> None:
        """Publish a whole copy; afterwards we stand at its position."""
        self._state = "snapshot"
        place = self._place
        request = SnapshotRequest(store_id=place.store_id, name=self._name, lineage=place.lineage)
        items = connection.snapshot(request, SNAPSHOT_TIMEOUT_S)
        try:
            info = next(items, None)
            if not isinstance(info, SnapshotInfo):
                raise ProtocolError("a snapshot begins without its description")
            place = self._place_of(info)
            self._publish(
                self._snapshot_envelope(
                    EnvelopeKind.SNAPSHOT,
                    place,
                    info,
                    bytes_total=info.bytes_total,
                    meta=info.meta,
                    snapshot_epoch=info.position.epoch,
                )
            )
            for chunk in items:
                assert isinstance(chunk, SnapshotChunk)  # the connection has seen to it
                for at in range(0, len(chunk.data), DATA_BYTES_MAX):
                    data = chunk.data[at : at + DATA_BYTES_MAX]
                    self._publish(
                        self._snapshot_envelope(
                            EnvelopeKind.PIECE, place, info, at=chunk.offset + at, data=data
                        )
                    )
        finally:
            items.close()
        self._drain()
        with self._lock:
            self._place = self._ahead = place
        self._place.save(self._state_path)
        self._snapshots += 1
        log.info("a snapshot at record %d was published", place.last.offset)

    def _place_of(self, info: SnapshotInfo) -> Place:
        """Where we stand once ``info`` is published."""
        copy = Description.decode(info.meta)
        self._epoch, self._source_id, self._source = copy.epoch, copy.store_id, copy.name
        self._branch = copy.branch
        self._source_last = max(self._source_last, copy.last)
        return Place(
            store_id=self._place.store_id,
            lineage=copy.lineage,
            branches=copy.branches,
            last=Position(copy.applied.epoch, copy.applied.offset),
            running=copy.applied.running,
            epochs=copy.epochs,
            promised=max(self._epoch, self._place.promised),
        )

    def _snapshot_envelope(
        self, kind: EnvelopeKind, place: Place, info: SnapshotInfo, **more: Any
    ) -> Envelope:
        return Envelope(
            kind=kind,
            history=self._history(place),
            source_last=self._source_last,
            first=place.last.offset,
            last=place.last.offset,
            snapshot_id=info.snapshot_id,
            **more,
        )

    def _drain(self) -> None:
        """Wait until the broker has everything."""
        while not self._stop.is_set() and not self._publisher.wait(self._publisher.published, TICK_S):
            pass
        if self._stop.is_set():
            raise ClosedError("publishing was stopped")
        self._confirm()

    # -- the confirming thread ---------------------------------------------------------------------

    def _confirm_loop(self) -> None:
        while not self._stop.is_set():
            try:
                self._tick()
            except Error as error:
                self._problem = str(error)
                stream = self._stream
                if stream is not None:
                    stream.cancel()
                self._stop.wait(TICK_S)
            except OSError as error:  # what is published is noted once there is room
                if str(error) != self._problem:
                    log.error("the place is not noted: %s", error)
                self._problem = str(error)
                self._stop.wait(TICK_S)
            except Exception:
                log.exception("confirms of published records")
                self._stop.wait(TICK_S)

    def _tick(self) -> None:
        with self._lock:
            wanted = self._sent[0].number if self._sent else 0
        if wanted:
            self._publisher.wait(wanted, TICK_S / 5)
        else:
            self._stop.wait(TICK_S / 25)
        self._confirm()
        now = time.monotonic()
        with self._lock:
            receiver, stream = self._receiver, self._stream
            silent = receiver is not None and not self._busy and receiver.expired(now)
        if silent and stream is not None:
            stream.cancel()
        if now - self._saved_s >= SAVE_INTERVAL_S and self._place != self._saved:
            self._place.save(self._state_path)
            self._saved, self._saved_s = self._place, now
        if receiver is not None and receiver.epoch and now - self._acked_s >= TICK_S:
            self._send(AckNow())
        if self._state == "publishing" and not self._sent and now - self._marked_s >= MARK_INTERVAL_S:
            self._mark()

    def _mark(self) -> None:
        """Say that we are here, and how far."""
        with self._lock:
            place = self._ahead
        if not self._branch or not place.last.offset:
            return
        mark = Envelope(
            kind=EnvelopeKind.MARK,
            history=self._history(place),
            source_last=max(self._source_last, place.last.offset),
            first=place.last.offset,
            last=place.last.offset,
        )
        self._marked_s = time.monotonic()
        try:
            self._publisher.publish(self._message(mark), 0)
        except Overloaded:
            pass  # then it is not idle, either

    def _confirm(self) -> None:
        """Ack what the broker has confirmed."""
        confirmed = self._publisher.confirmed
        moved = False
        with self._lock:
            while self._sent and self._sent[0].number <= confirmed:
                self._place = replace(self._sent.popleft().place, promised=self._place.promised)
                moved = True
            receiver = self._receiver
            if not moved or receiver is None or not receiver.epoch:
                return
            last = self._place.last
            if not receiver.last.offset <= last.offset <= receiver.received:
                return
            actions = receiver.appended(last)
        for action in actions:
            self._send(action)

    def _send(self, action: Action) -> None:
        from kvrep.replication.messages import Credit

        with self._lock:
            receiver, stream = self._receiver, self._stream
            if receiver is None or stream is None:
                return
            try:
                if isinstance(action, Grant):
                    stream.send(Credit(bytes_granted=action.bytes_granted))
                elif isinstance(action, AckNow):
                    self._acked_s = time.monotonic()
                    stream.send(receiver.ack(receiver.last.offset))
            except StreamEnded:
                pass  # the receiving thread sees to it
