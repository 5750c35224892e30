"""Asks a peer over gRPC.

Each open stream costs one thread (``kvrep-NAME-sender``) and each connection in use one of gRPC's
own.
"""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import grpc

from kvrep.errors import (
    AuthenticationFailed,
    ClosedError,
    Error,
    Overloaded,
    PeerUnavailable,
    PermissionDenied,
    ProtocolError,
    ReplicationError,
    ValueTooLarge,
)
from kvrep.replication.messages import FromFollower, FromPrimary
from kvrep.transport.address import Address
from kvrep.transport.calls import decode_answer, decode_scan_chunk, encode_call, encode_request
from kvrep.transport.faults import decode_fault
from kvrep.transport.interface import (
    MESSAGE_BYTES_MAX,
    STREAM_QUEUE_MAX,
    ConnectionRefused,
    NoAnswer,
    SnapshotItem,
    SnapshotRequest,
    StreamEnded,
)
from kvrep.transport.security import Security, channel_credentials
from kvrep.transport.server import FAULT_KEY, SERVICE_NAME
from kvrep.transport.snapshots import SnapshotCheck
from kvrep.transport.wire import (
    decode_from_primary,
    decode_snapshot_item,
    encode_from_follower,
    encode_snapshot_request,
)

__all__ = ["GrpcConnection"]

JOIN_TIMEOUT_S = 2.0
T = TypeVar("T")


def _options(message_bytes_max: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.ping_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # Despite its name the time one attempt to connect may take, TLS included; it delays nothing.
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
        # Connections must not share a socket, nor the backoff of one that failed.
        ("grpc.use_local_subchannel_pool", 1),
        # Nodes talk to each other directly, whatever proxy the environment names for the web.
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
        # A node that moved to another IP address is found again after a second, not after 30.
        ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ]


class _Closable(Protocol):
    def _abandon(self, error: Error) -> None: ...
    def _join(self, timeout_s: float) -> None: ...


class GrpcConnection:
    """See :class:`kvrep.transport.interface.Connection`.

    After failures gRPC waits up to 5 s before it connects again, and calls fail at once meanwhile;
    a new GrpcConnection starts without that wait, with the TLS files as they are then.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str,
        security: Security | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> None:
        parsed = Address.parse(address)
        security = security or Security()
        security.check(parsed)
        self._address = str(parsed)
        self._name = name
        self._message_bytes_max = message_bytes_max
        self._metadata = security.metadata()
        self._lock = Lock()  # guards the next two
        self._closed = False
        self._open: set[_Closable] = set()
        channel = _channel(self._address, security, _options(message_bytes_max))
        self._channel = channel
        self._finalizer = weakref.finalize(self, channel.close)
        path = f"/{SERVICE_NAME}/"
        self._replicate: Any = channel.stream_stream(path + "Replicate")
        self._call: Any = channel.unary_unary(path + "Call")
        self._scan: Any = channel.unary_stream(path + "Scan")
        self._snapshot: Any = channel.unary_stream(path + "Snapshot")

    @property
    def address(self) -> str:
        return self._address

    def open_stream(self) -> _ClientStream:
        return self._add(lambda: _ClientStream(self))

    def call(self, method: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        data = self._within_limit(encode_call(method, request))
        self._check_open()
        with self._errors():
            answer = self._call(data, timeout=timeout_s, metadata=self._metadata)
        return decode_answer(answer)

    def scan(self, request: Mapping[str, Any], timeout_s: float) -> _Items[list[tuple[bytes, bytes]]]:
        data = self._within_limit(encode_request(request))

        def start() -> _Items[list[tuple[bytes, bytes]]]:
            call = self._scan(data, timeout=timeout_s, metadata=self._metadata)
            return _Items(self, call, decode_scan_chunk, _no_check)

        return self._add(start)

    def snapshot(self, request: SnapshotRequest, timeout_s: float) -> _Items[SnapshotItem]:
        data = encode_snapshot_request(request)
        check = SnapshotCheck(request)

        def decode(item: bytes) -> SnapshotItem:
            return check.item(decode_snapshot_item(item))

        def start() -> _Items[SnapshotItem]:
            call = self._snapshot(data, timeout=timeout_s, metadata=self._metadata)
            return _Items(self, call, decode, check.end)

        return self._add(start)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            open_now = list(self._open)
            self._open.clear()
        for one in open_now:
            one._abandon(ClosedError(f"the connection to {self._address} was closed"))
        self._finalizer()
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for one in open_now:
            one._join(max(0.0, deadline - time.monotonic()))

    def _add(self, start: Callable[[], _C]) -> _C:
        """Start something that ``close`` must end.

        The lock covers it, so that close sees it or forbids it.
        """
        with self._lock:
            if self._closed:
                raise self._closed_error()
            started = start()
            self._open.add(started)
        started._watch()
        return started

    def _remove(self, one: _Closable) -> None:
        with self._lock:
            self._open.discard(one)

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the connection to {self._address} is closed")

    def _within_limit(self, data: bytes) -> bytes:
        if len(data) > self._message_bytes_max:
            raise ValueTooLarge(
                f"a request of {len(data)} bytes is above the limit of {self._message_bytes_max}",
                hint="send less at once, or raise the message limit on both sides",
            )
        return data

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._mapped(error) from error
        except ValueError as error:
            # gRPC's way to say that the channel was closed meanwhile.
            if self._closed:
                raise self._closed_error() from error
            raise

    def _mapped(self, error: Any) -> Error:
        """What the domain understands in place of gRPC's error, which is also its call."""
        for key, value in error.trailing_metadata() or ():
            if key == FAULT_KEY and isinstance(value, bytes):
                return decode_fault(value)
        code, details = error.code(), (error.details() or "")[:500]
        if code is grpc.StatusCode.CANCELLED and self._closed:
            return self._closed_error()
        return _plain_error(code, details, self._address)


_UNREACHABLE = re.compile(r"failed to connect to all addresses; last error: .*: ([^:]+)$")
"""gRPC's words around the system's."""


def _plain_error(code: grpc.StatusCode, details: str, address: str) -> Error:
    """A failure that gRPC itself reports; what a peer's code raises travels as a fault instead."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return NoAnswer(f"no answer from {address} in time", address=address)
    if code is grpc.StatusCode.CANCELLED:
        return PeerUnavailable(f"{address} ended the call", address=address)
    if code is grpc.StatusCode.UNAVAILABLE:
        if "CERTIFICATE" in details.upper() or "handshake" in details.lower():
            return AuthenticationFailed(f"TLS with {address} failed: {details}")
        why = _UNREACHABLE.sub(r"\1", details)
        # gRPC has no code of its own for this; here its words end.
        kind = ConnectionRefused if "connection refused" in details.lower() else PeerUnavailable
        return kind(f"{address} cannot be reached: {why}", address=address)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "larger than max" in details:
            return ProtocolError(f"{address} sent a message above the limit: {details}")
        return Overloaded(f"{address} has too much to do: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"{address} is no kvrep node, or an older one: {details}")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return AuthenticationFailed(details)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return PermissionDenied(details)
    return ReplicationError(f"{address} failed: {code.name}: {details}")


def _channel(address: str, security: Security, options: list[tuple[str, Any]]) -> grpc.Channel:
    # The scheme keeps gRPC from taking a host name for one.
    target = f"dns:///{address}"
    if security.tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, channel_credentials(security.tls), options=options)


class _Ending:
    """What streams and iterators share: one gRPC call that ends once, for one reason."""

    def __init__(self, connection: GrpcConnection) -> None:
        self._connection = connection
        self._call: Any = None
        self._reason: Error | None = None  # why this side ended it

    def _watch(self) -> None:
        """Forget the call when it ends; for one that has ended, gRPC calls back at once."""
        self._call.add_done_callback(self._done)

    def _done(self, _call: object) -> None:
        self._connection._remove(self)

    def _abandon(self, error: Error) -> None:
        if self._reason is None:
            self._reason = error
        self._call.cancel()

    def _join(self, timeout_s: float) -> None:
        pass

    def _failure(self, error: grpc.RpcError) -> Error:
        return self._reason or self._connection._mapped(error)


_C = TypeVar("_C", bound=_Ending)


class _ClientStream(_Ending):
    """See :class:`kvrep.transport.interface.Stream`."""

    def __init__(self, connection: GrpcConnection) -> None:
        super().__init__(connection)
        # gRPC's consumer thread blocks in its get(); None lets the thread go. A SimpleQueue wakes
        # it fastest, and its bound is kept by send().
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._sender: threading.Thread | None = None
        self._sending = threading.Event()  # _sender is known
        self._over = False
        self._call = connection._replicate(self._requests(), metadata=connection._metadata)

    def _requests(self) -> Iterator[bytes]:
        self._sender = threading.current_thread()
        self._sender.name = f"kvrep-{self._connection._name}-sender"
        self._sending.set()
        yield from iter(self._queue.get, None)

    def send(self, message: FromFollower) -> None:
        if self._over:
            raise StreamEnded("the stream has ended", error=self._reason)
        if self._queue.qsize() >= STREAM_QUEUE_MAX:
            raise Overloaded(f"{STREAM_QUEUE_MAX} messages wait to be sent already")
        self._queue.put(encode_from_follower(message))

    def receive(self) -> FromPrimary:
        try:
            data = next(self._call)
        except StopIteration:
            raise StreamEnded("the primary ended the stream", error=self._reason) from None
        except grpc.RpcError as error:
            reason = self._failure(error)
            raise StreamEnded(f"the stream ended: {reason}", error=reason) from reason
        try:
            return decode_from_primary(data)
        except ProtocolError as error:
            self._abandon(error)
            raise StreamEnded(f"the stream ended: {error}", error=error) from error

    def cancel(self) -> None:
        self._abandon(ClosedError("the stream was cancelled"))

    def _done(self, call: object) -> None:
        self._over = True
        self._queue.put(None)
        super()._done(call)

    def _join(self, timeout_s: float) -> None:
        self._sending.wait(timeout_s)
        if self._sender is not None:
            self._sender.join(timeout_s)


class _Items(_Ending, Generic[T]):
    """An iterator over decoded messages; ``at_end`` may object to where the peer stopped."""

    def __init__(
        self,
        connection: GrpcConnection,
        call: Any,
        decode: Callable[[bytes], T],
        at_end: Callable[[], None],
    ) -> None:
        super().__init__(connection)
        self._call = call
        self._decode = decode
        self._at_end = at_end

    def __iter__(self) -> _Items[T]:
        return self

    def __next__(self) -> T:
        try:
            data = next(self._call)
        except StopIteration:
            self._at_end()
            raise
        except grpc.RpcError as error:
            raise self._failure(error) from error
        try:
            return self._decode(data)
        except ProtocolError as error:
            self._abandon(error)
            raise

    def close(self) -> None:
        self._abandon(ClosedError("closed"))


def _no_check() -> None:
    pass
