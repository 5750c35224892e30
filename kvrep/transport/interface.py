"""What the domain implements and uses; ``network`` and ``memory`` provide two transports of the
same behaviour.

One connection carries everything between two nodes: the replication stream, unary calls, scans and
snapshots. All methods may be called from any thread unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from kvrep.errors import PeerUnavailable, ReplicationError
from kvrep.model.position import ZERO, Position
from kvrep.replication.messages import FromFollower, FromPrimary

__all__ = [
    "CHUNK_BYTES_MAX",
    "MESSAGE_BYTES_MAX",
    "STREAM_QUEUE_MAX",
    "ClosableIterator",
    "Connection",
    "ConnectionRefused",
    "NoAnswer",
    "Server",
    "Service",
    "Session",
    "SnapshotChunk",
    "SnapshotInfo",
    "SnapshotItem",
    "SnapshotRequest",
    "Stream",
    "StreamEnded",
    "Transport",
]

MESSAGE_BYTES_MAX = 8 * 1024 * 1024
"""Default limit of one message; what is larger is refused by the sender, with a typed error."""
CHUNK_BYTES_MAX = 1024 * 1024
"""How much snapshot data one chunk holds at most."""
STREAM_QUEUE_MAX = 1024
"""How many messages a follower may queue on its stream before ``send`` raises ``Overloaded``."""

T_co = TypeVar("T_co", covariant=True)


class ConnectionRefused(PeerUnavailable):
    """The host answered that nobody listens there: the process is not there. Does not travel as a fault."""


class NoAnswer(PeerUnavailable):
    """The time was over: the peer is slow, frozen, gone or cut off. Does not travel as a fault."""


class StreamEnded(ReplicationError):
    """The stream is over. ``error`` says why; ``None`` means the primary ended it in order."""

    _names = ("error",)
    error: Exception | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """Asks for a snapshot, or for the rest of one: ``snapshot_id`` and ``offset`` (bytes) say where
    it broke off.

    The answer may be another snapshot than the one asked for; then it starts at byte 0.
    """

    store_id: bytes
    name: str
    snapshot_id: str = ""
    offset: int = 0
    lineage: bytes = b""
    of_follower: bool = False
    """A follower may give it, too, without keeping the log behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """The first item of every snapshot. ``meta`` is msgpack that only the domain understands."""

    snapshot_id: str
    bytes_total: int
    position: Position = ZERO
    meta: bytes = b""

    def start(self, request: SnapshotRequest) -> int:
        """The byte at which the chunks that follow this info begin."""
        return request.offset if request.snapshot_id == self.snapshot_id else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotChunk:
    """``data`` at byte ``offset``; ``crc32`` (of data) was checked when it was received."""

    offset: int
    data: bytes
    crc32: int


SnapshotItem = SnapshotInfo | SnapshotChunk


class Session(Protocol):
    """The primary's end of one follower's stream; the domain makes one per stream.

    Two threads use it: a reader that calls ``on_message`` and finally ``on_closed``, and a sender
    that calls ``next_message``.
    """

    def on_message(self, message: FromFollower) -> None:
        """A message arrived. Raising ends the stream, and the follower gets the error."""

    def next_message(self) -> FromPrimary | None:
        """Block until there is something to send; ``None`` ends the stream.

        Raising ends it with that error.
        """

    def on_closed(self, error: Exception | None) -> None:
        """The stream is over: called exactly once, by the reader, after its last ``on_message``.

        It must wake a blocked ``next_message``, which then returns None. ``error`` is None when
        either side ended the stream in order, ``PeerUnavailable`` when the follower is gone, else
        what went wrong.
        """


class Service(Protocol):
    """What a node answers; the domain implements it. Called by the server's threads, several at
    once.

    Raising any :class:`kvrep.errors.Error` makes the caller raise the same; other exceptions are
    logged here and reach the caller as a bare ``ReplicationError``.
    """

    def open_session(self, peer: str) -> Session:
        """A follower at ``peer`` ("host:port") opened a stream.

        Its Hello comes as the first message.
        """

    def snapshot(self, request: SnapshotRequest) -> Iterator[SnapshotItem]:
        """A SnapshotInfo, then chunks of at most CHUNK_BYTES_MAX without gaps.

        Closed if it has ``close()``.
        """

    def call(self, method: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Anything unary. Requests and answers hold what msgpack holds; maps have text keys."""

    def scan(self, request: Mapping[str, Any]) -> Iterator[list[tuple[bytes, bytes]]]:
        """Chunks of (key, value), each well below the message limit.

        Closed if it has ``close()``.
        """


class Server(Protocol):
    """Answers peers for a Service."""

    @property
    def address(self) -> str:
        """ "host:port" as bound; empty before ``start``."""

    def start(self) -> str:
        """Listen and return ``address``; ``OpenError`` when the address cannot be had."""

    def stop(self, timeout_s: float = 5.0) -> None:
        """Refuse new work, end streams at once, give calls half the time, join all threads.

        Idempotent.
        """


class Stream(Protocol):
    """The follower's end of a replication stream. Receive in one thread; the rest from any."""

    def send(self, message: FromFollower) -> None:
        """Queue a message and return at once.

        ``Overloaded`` when STREAM_QUEUE_MAX messages wait already; ``StreamEnded`` after the end.
        """

    def receive(self) -> FromPrimary:
        """Block until a message arrives; ``StreamEnded`` when there are no more."""

    def cancel(self) -> None:
        """End the stream; a blocked ``receive`` returns at once with StreamEnded(ClosedError).

        Idempotent.
        """


class ClosableIterator(Protocol[T_co]):
    """An iterator over what a peer sends. ``close`` ends it early, from any thread."""

    def __iter__(self) -> ClosableIterator[T_co]: ...
    def __next__(self) -> T_co: ...
    def close(self) -> None: ...


class Connection(Protocol):
    """The way to one peer. Connects when first used and again by itself after failures."""

    @property
    def address(self) -> str:
        """The peer's "host:port"."""

    def open_stream(self) -> Stream:
        """Start a replication stream; failures show at its first ``receive``."""

    def call(self, method: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Ask and wait for the answer. Sequences come back as lists.

        Without an answer ``PeerUnavailable`` (it may have been done all the same), and that is
        ``ConnectionRefused`` or ``NoAnswer`` where the one or the other is known, else a connection that broke;
        ``ClosedError`` after ``close``, ``Overloaded`` when the peer has too much to do, else what
        the peer raised.
        """

    def scan(
        self, request: Mapping[str, Any], timeout_s: float
    ) -> ClosableIterator[list[tuple[bytes, bytes]]]:
        """Chunks of pairs; ``timeout_s`` bounds the whole scan. Errors as in ``call``."""

    def snapshot(self, request: SnapshotRequest, timeout_s: float) -> ClosableIterator[SnapshotItem]:
        """A SnapshotInfo, then chunks in order up to the last byte; checked, else ``ProtocolError``.

        ``timeout_s`` bounds this whole transfer; ask for the rest of a long one anew. Errors as in
        ``call``.
        """

    def close(self) -> None:
        """End everything under way (``ClosedError``) and join the threads. Idempotent."""


class Transport(Protocol):
    """Makes servers and connections."""

    def serve(self, service: Service, listen: str, *, name: str, max_streams: int = 64) -> Server:
        """A server for ``listen`` ("host:port", port 0 picks one), not started; ``ValueError`` for
        a bad address.
        """

    def connect(self, address: str, *, name: str) -> Connection:
        """A connection; does not wait for the peer.

        ``ValueError`` for a bad address. ``name`` is this node's.
        """
