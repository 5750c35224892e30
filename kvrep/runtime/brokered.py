"""A follower whose primary is behind a message broker: ``follow="amqp://…"``.

To the replay thread it looks like any connection: it says Hello and gets messages of a primary. They are made
here from what the broker delivers (:mod:`kvrep.replication.oneway` decides), and the follower's acks become
acks of deliveries: a delivery is acked once its records are synced here, so nothing is lost that was not yet
stored, and repeats are skipped.

The link to the broker outlives the streams, because what was delivered can be acked only where it came from.

Options in the address, besides the broker's own::

    group=NAME           under which the broker keeps our position (default: this store's id)
    bootstrap=HOST:PORT  a node (of any role) to fetch a whole copy from; else one of ``kvrep publish --snapshot``
    park_s=SECONDS       how long records may wait for others that they overtook (default 10)
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode
from zlib import crc32

from kvrep import brokers
from kvrep.brokers.interface import EARLIEST, STORED
from kvrep.brokers.url import BrokerUrl, is_broker_url
from kvrep.errors import (
    ClosedError,
    Error,
    OpenError,
    PeerUnavailable,
    ProtocolError,
    ReplicationError,
    UpgradeRequired,
)
from kvrep.replication.envelope import Envelope, EnvelopeKind, decode_envelope
from kvrep.replication.messages import Ack, FromFollower, FromPrimary, Hello, NeedBootstrap, Welcome
from kvrep.replication.oneway import OneWay, Stale, judge
from kvrep.transport.interface import SnapshotChunk, SnapshotInfo, SnapshotRequest, StreamEnded

if TYPE_CHECKING:
    from kvrep.brokers.interface import Broker, Delivery, Subscriber
    from kvrep.transport.interface import ClosableIterator, SnapshotItem, Transport

__all__ = ["BrokerLink", "check_broker_url", "is_broker_url"]

log = logging.getLogger("kvrep.replication")

POLL_S = 0.1
PREFETCH = 128
"""How many messages may wait for their ack; at the size of one, this bounds memory."""
PARK_BYTES = 32 << 20
PARK_S = 10.0
UNJOINED_S = 0.5
"""How long a stream waits for the first message before it says that there is none."""
BEAT_S = 0.25
SILENCE_S = 10.0
"""A publisher is heard at least every few seconds; without that it, or the broker, is away."""
SNAPSHOT_SILENCE_S = 60.0
ASIDE_MAX = 96
SYNC_BYTES = 8 << 20
_OPTIONS = ("group", "bootstrap", "park_s")

Arrived = tuple[Envelope, "Delivery"]


def split_url(url: str) -> tuple[str, dict[str, str]]:
    """The broker's own address, and the options that are ours."""
    place, _, query = url.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    ours = {name: value for name, value in pairs if name in _OPTIONS}
    theirs = [(name, value) for name, value in pairs if name not in _OPTIONS]
    return f"{place}?{urlencode(theirs)}" if theirs else place, ours


def check_broker_url(url: str) -> None:
    """``OpenError`` for an address that cannot be followed, or whose package is missing."""
    from kvrep.transport.address import Address

    theirs, ours = split_url(url)
    BrokerUrl.parse(theirs)
    try:
        if "bootstrap" in ours:
            Address.parse(ours["bootstrap"])
        float(ours.get("park_s", 0))
    except ValueError as error:
        raise OpenError(f"cannot follow {BrokerUrl.parse(theirs)}: {error}") from error
    brokers.connect(theirs).close()


class BrokerLink:
    """One topic of one broker, for one follower. Used by the replay thread; closed from any."""

    def __init__(self, url: str, transport: Transport, *, store_id: bytes, label: str) -> None:
        """Connects when the first stream is opened."""
        self._url, ours = split_url(url)
        self.address = str(BrokerUrl.parse(self._url))
        self.label = label
        self.bootstrap = ours.get("bootstrap", "")
        self.park_s = float(ours.get("park_s", PARK_S))
        self.transport = transport
        self.lost = ""
        """Why nothing that arrives can be used, until a snapshot does."""
        self.mangled = self.superseded = self.repeated = 0
        """How many messages were not readable, or came from a publisher that was superseded, or again."""
        self.heard_s = 0.0
        self.origin: Welcome | None = None
        self._group = ours.get("group") or f"kvrep-{store_id.hex()}"
        self._broker: Broker | None = None
        self._subscriber: Subscriber | None = None
        self._start = STORED
        self._reread_for = -1
        self._closing = threading.Event()
        self._arrived: deque[Delivery] = deque()
        self._pushed: deque[Arrived] = deque()
        self._held: deque[Arrived] = deque()
        """Records on their way into the log."""
        self._infos: list[tuple[int, Delivery]] = []
        """Descriptions of snapshots: kept until this node stands on one, so that a crash finds it again."""

    def connection(self) -> _Connection:
        """What the replay thread takes for a connection to a primary."""
        return _Connection(self)

    def close(self) -> None:
        """Give back to the broker what is not acked."""
        self._closing.set()
        broker = self._broker
        if broker is not None:
            broker.close()

    # -- what arrives ------------------------------------------------------------------------------

    def next(self, timeout_s: float) -> Arrived | None:
        """The next message that is one of ours."""
        if self._pushed:
            return self._pushed.popleft()
        if not self._arrived:
            self._arrived.extend(self._receive(timeout_s))
        while self._arrived:
            delivery = self._arrived.popleft()
            self.heard_s = time.monotonic()
            try:
                return decode_envelope(delivery.message.body), delivery
            except UpgradeRequired:
                self._arrived.appendleft(delivery)
                raise
            except ProtocolError as error:
                self.mangled += 1
                log.warning("%s: message %r in %s is dropped: %s",
                            self.label, delivery.message.id, self.address, error)  # fmt: skip
                self.drop(delivery)
        return None

    def _receive(self, timeout_s: float) -> list[Delivery]:
        if self._closing.is_set():
            raise ClosedError("the store is closed")
        try:
            if self._subscriber is None:
                if self._broker is None:
                    self._broker = brokers.connect(self._url)
                self._subscriber = self._broker.subscriber(
                    group=self._group, start=self._start, prefetch=PREFETCH
                )
                self._start = STORED
                if self._closing.is_set():
                    self._broker.close()
            return self._subscriber.receive(PREFETCH, timeout_s)
        except Error:
            self._forget()
            raise

    def _forget(self) -> None:
        """Let go of the subscriber: all that is not acked arrives again."""
        subscriber, self._subscriber = self._subscriber, None
        self._arrived.clear()
        self._pushed.clear()
        self._held.clear()
        self._infos.clear()
        if subscriber is not None:
            subscriber.close()

    def push_back(self, arrived: Arrived) -> None:
        """Let the next stream begin with this one."""
        self._pushed.appendleft(arrived)

    def put_aside(self, arrived: list[Arrived]) -> None:
        """Let these come next, in this order."""
        self._pushed.extend(arrived)

    def reread(self, missing: int) -> bool:
        """Read everything again that the broker still has, if that was not tried for this gap before."""
        if self._broker is None or not self._broker.is_log or self._reread_for == missing:
            return False
        self._reread_for = missing
        self._start = EARLIEST
        self._forget()
        return True

    # -- acks --------------------------------------------------------------------------------------

    def drop(self, delivery: Delivery) -> None:
        """Nothing of it is wanted."""
        if self._subscriber is not None:
            self._subscriber.ack(delivery, through=False)

    def hold(self, arrived: Arrived) -> None:
        """To be acked once this node's log holds these records."""
        self._held.append(arrived)

    def begin_again(self) -> None:
        """A new stream: what the one before took and did not bring into the log comes first."""
        self._held.extend(self._pushed)
        self._pushed, self._held = self._held, deque()

    def synced(self, offset: int) -> None:
        """This node's log holds everything through ``offset``, on the disk."""
        for _ in range(len(self._held)):
            arrived = self._held.popleft()
            if arrived[0].last <= offset:
                self.drop(arrived[1])
            else:
                self._held.append(arrived)

    def give_up_held(self) -> None:
        """Behind a gap that will not close."""
        while self._held:
            self.drop(self._held.popleft()[1])

    def hold_info(self, envelope: Envelope, delivery: Delivery) -> None:
        self._infos.append((envelope.last, delivery))

    def stands_on(self, offset: int) -> None:
        """This node's log goes through ``offset``: snapshots up to there have served."""
        for last, delivery in self._infos[:]:
            if last <= offset:
                self.drop(delivery)
                self._infos.remove((last, delivery))


class _Connection:
    """See :class:`kvrep.transport.interface.Connection`, as far as a follower uses it."""

    def __init__(self, link: BrokerLink) -> None:
        self._link = link
        self._stream: _Stream | None = None
        self._node: Any = None
        self._closed = False

    @property
    def address(self) -> str:
        return self._link.address

    def open_stream(self) -> _Stream:
        self._stream = _Stream(self._link)
        return self._stream

    def call(self, method: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        del request, timeout_s
        raise PeerUnavailable(f"{self.address} is a broker and answers no {method}", address=self.address)

    def scan(
        self, request: Mapping[str, Any], timeout_s: float
    ) -> ClosableIterator[list[tuple[bytes, bytes]]]:
        del request, timeout_s
        raise PeerUnavailable(f"{self.address} is a broker and answers no scan", address=self.address)

    def snapshot(self, request: SnapshotRequest, timeout_s: float) -> ClosableIterator[SnapshotItem]:
        """From the topic, or from the node that the address names."""
        link = self._link
        if link.bootstrap:
            self._node = link.transport.connect(link.bootstrap, name=link.label)
            of_any = replace(request, of_follower=True)
            items: ClosableIterator[SnapshotItem] = self._node.snapshot(of_any, timeout_s)
            return items
        return _Pieces(link, self, request)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End the stream; the link stays."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()
        if self._node is not None:
            self._node.close()


class _Stream:
    """See :class:`kvrep.transport.interface.Stream`."""

    def __init__(self, link: BrokerLink) -> None:
        self._link = link
        link.begin_again()
        self._hello: Hello | None = None
        self._oneway: OneWay | None = None
        self._lineage = b""
        self._out: deque[FromPrimary] = deque()
        self._cancelled = False
        self._opened_s = time.monotonic()
        self._beat_s = 0.0
        self._gap_s = 0.0

    def send(self, message: FromFollower) -> None:
        if type(message) is Ack:
            self._link.synced(message.synced)
        elif type(message) is Hello:
            self._hello = message
            self._link.stands_on(message.last.offset)

    def cancel(self) -> None:
        self._cancelled = True

    def receive(self) -> FromPrimary:
        while not self._out:
            if self._cancelled:
                raise StreamEnded("the stream ended", error=ClosedError("the stream was cancelled"))
            try:
                self._step()
            except StreamEnded:
                raise
            except (UpgradeRequired, OpenError):
                raise
            except Error as error:
                raise StreamEnded(f"the stream ended: {error}", error=error) from error
        return self._out.popleft()

    def _step(self) -> None:
        arrived = self._link.next(POLL_S)
        if self._oneway is None:
            if arrived is None:
                self._wait_to_join()
            else:
                self._join(*arrived)
            return
        if arrived is not None:
            self._take(self._oneway, *arrived)
        if self._oneway.gap is not None:
            self._mind_gap(self._oneway)
        else:
            self._gap_s = 0.0
        now = time.monotonic()
        if not self._out and now - self._beat_s >= BEAT_S and now - self._link.heard_s < SILENCE_S:
            self._beat_s = now
            self._out.append(self._oneway.heartbeat())

    # -- before the join ---------------------------------------------------------------------------

    def _wait_to_join(self) -> None:
        if time.monotonic() - self._opened_s < UNJOINED_S:
            return
        link = self._link
        text = link.lost or f"nothing has come from {link.address} yet"
        raise StreamEnded(text, error=PeerUnavailable(text, address=link.address))

    def _join(self, envelope: Envelope, delivery: Delivery) -> None:
        link, hello = self._link, self._hello
        assert hello is not None
        verdict = judge(hello, envelope.history)
        if isinstance(verdict, Stale):
            link.superseded += 1
            log.warning("%s: a message of epoch %d in %s is dropped: its publisher is superseded",
                        link.label, verdict.epoch, link.address)  # fmt: skip
            link.drop(delivery)
        elif envelope.kind is EnvelopeKind.PIECE:
            link.drop(delivery)
        elif envelope.kind is EnvelopeKind.SNAPSHOT and isinstance(verdict, Welcome | NeedBootstrap):
            self._consider(envelope, delivery, hello.last.offset, isinstance(verdict, NeedBootstrap))
        elif isinstance(verdict, NeedBootstrap) and not link.bootstrap:
            self._cannot_join(envelope, delivery, f"its history parts from ours ({verdict.reason})")
        elif isinstance(verdict, Welcome) and link.lost and envelope.first > hello.last.offset + 1:
            self._cannot_join(envelope, delivery, "")
        else:
            if isinstance(verdict, Welcome):
                link.lost = ""
                self._oneway = OneWay(verdict, PARK_BYTES)
                self._lineage = envelope.history.lineage
            link.push_back((envelope, delivery))
            self._out.append(verdict)

    def _cannot_join(self, envelope: Envelope, delivery: Delivery, why: str) -> None:
        """Drop what only a snapshot can make useful."""
        if why:
            self._lose(f"what {envelope.history.source} publishes cannot be used here: {why}")
        self._link.drop(delivery)
        self._wait_to_join()

    def _consider(self, envelope: Envelope, delivery: Delivery, last: int, needed: bool) -> None:
        """A snapshot is announced: take it if it leads further."""
        if needed or envelope.last > last:
            self._link.push_back((envelope, delivery))
            self._out.append(NeedBootstrap(first=envelope.last + 1, reason="trimmed"))
        else:
            self._link.drop(delivery)

    # -- after it ----------------------------------------------------------------------------------

    def _take(self, oneway: OneWay, envelope: Envelope, delivery: Delivery) -> None:
        link, history = self._link, envelope.history
        if history.lineage != self._lineage or history.epoch > oneway.epoch:
            link.push_back((envelope, delivery))
            raise StreamEnded(f"epoch {history.epoch} begins", error=None)
        if history.epoch < oneway.epoch:
            link.superseded += 1
            link.drop(delivery)
        elif envelope.kind is EnvelopeKind.RECORDS:
            repeated = envelope.last < oneway.next
            link.repeated += repeated
            link.hold((envelope, delivery))
            self._out.extend(oneway.take(envelope))
            if repeated:
                self._out.append(oneway.heartbeat())  # brings an ack, and with it that of the delivery
        elif envelope.kind is EnvelopeKind.SNAPSHOT:
            self._consider(envelope, delivery, oneway.next - 1, needed=False)
        else:
            oneway.take(envelope)
            link.drop(delivery)
            if envelope.kind is EnvelopeKind.MARK:
                self._out.append(oneway.heartbeat())

    def _mind_gap(self, oneway: OneWay) -> None:
        now, link, gap = time.monotonic(), self._link, oneway.gap
        assert gap is not None
        self._gap_s = self._gap_s or now
        if now - self._gap_s < link.park_s and not oneway.full:
            return
        self._gap_s = 0.0
        text = f"records {gap[0]} to {gap[1]} have not come from {link.address}"
        if link.bootstrap:
            log.warning("%s: %s: fetching a copy from %s", link.label, text, link.bootstrap)
            self._out.append(NeedBootstrap(first=gap[1] + 1, reason="trimmed"))
        elif link.reread(gap[0]):
            raise StreamEnded(text, error=ReplicationError(f"{text}: reading it again from its beginning"))
        else:
            oneway.forget()
            link.give_up_held()
            self._lose(text)
            raise StreamEnded(link.lost, error=ReplicationError(link.lost))

    def _lose(self, text: str) -> None:
        hint = "publish a snapshot (kvrep publish --snapshot), or add bootstrap=HOST:PORT to the address"
        self._link.lost = f"{text}; {hint}"


class _Pieces:
    """A snapshot out of the topic, as an iterator over its items."""

    sync_bytes = SYNC_BYTES
    """How often what has arrived is to be made durable: until then its deliveries are not acked."""

    def __init__(self, link: BrokerLink, connection: _Connection, request: SnapshotRequest) -> None:
        self._link, self._connection, self._request = link, connection, request
        self._info: Envelope | None = None
        self._next = 0
        self._early: dict[int, Arrived] = {}
        self._aside: list[Arrived] = []
        self._held: deque[tuple[int, Delivery]] = deque()
        self._heard_s = time.monotonic()

    def __iter__(self) -> _Pieces:
        return self

    def __next__(self) -> SnapshotItem:
        if self._info is None:
            return self._begin()
        if self._next >= self._info.bytes_total:
            raise StopIteration
        while self._next not in self._early:
            self._collect(self._info)
        envelope, delivery = self._early.pop(self._next)
        data = envelope.data
        chunk = SnapshotChunk(offset=self._next, data=data, crc32=crc32(data))
        self._next += len(data)
        self._held.append((self._next, delivery))
        return chunk

    def _begin(self) -> SnapshotInfo:
        """The description: where the stream stopped for it, else the next one that comes."""
        while True:
            envelope, delivery = self._await()
            if envelope.kind is EnvelopeKind.SNAPSHOT:
                break
            self._link.drop(delivery)
        self._info = envelope
        self._link.hold_info(envelope, delivery)
        info = SnapshotInfo(
            snapshot_id=envelope.snapshot_id,
            bytes_total=envelope.bytes_total,
            position=envelope.position,
            meta=envelope.meta,
        )
        self._next = info.start(self._request)
        return info

    def _collect(self, info: Envelope) -> None:
        envelope, delivery = self._await()
        if envelope.kind is EnvelopeKind.PIECE:
            mine = envelope.snapshot_id == info.snapshot_id
            if not mine or envelope.at < self._next or envelope.at in self._early:
                self._link.drop(delivery)
            else:
                self._early[envelope.at] = (envelope, delivery)
        elif envelope.kind is EnvelopeKind.SNAPSHOT:
            if envelope.snapshot_id == info.snapshot_id:
                self._link.hold_info(envelope, delivery)  # a repeat
                return
            self._link.push_back((envelope, delivery))
            raise ProtocolError("the snapshot was given up for another")
        else:
            self._aside.append((envelope, delivery))
        if len(self._early) + len(self._aside) > ASIDE_MAX:
            raise ProtocolError(f"a piece of the snapshot is missing, at byte {self._next}")

    def _await(self) -> Arrived:
        while True:
            if self._connection.closed:
                raise ClosedError("the connection is closed")
            arrived = self._link.next(POLL_S)
            if arrived is not None:
                self._heard_s = time.monotonic()
                return arrived
            if time.monotonic() - self._heard_s > SNAPSHOT_SILENCE_S:
                raise PeerUnavailable(
                    f"no snapshot comes from {self._link.address}, after byte {self._next}",
                    address=self._link.address,
                    hint="publish one again: kvrep publish --snapshot",
                )

    def stored(self, length: int) -> None:
        """So many bytes are on the disk, and a restart knows it. Any thread."""
        while self._held and self._held[0][0] <= length:
            self._link.drop(self._held.popleft()[1])

    def close(self) -> None:
        """What came besides comes next."""
        self._link.put_aside(self._aside)
        self._aside = []
