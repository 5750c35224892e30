"""The in-memory transport: without sockets and grpc, with the behaviour of the real one. For tests, and for stores
that shall reach nobody.

Everything passes through the same bytes as on a network, so limits, checks and errors are the same.
Servers and connections meet when they come from the same :class:`MemoryTransport`.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from threading import Condition, Lock, Semaphore, Thread
from typing import Any, Generic, Protocol, TypeVar

from kvrep.errors import (
    ClosedError,
    Error,
    OpenError,
    Overloaded,
    PeerUnavailable,
    ProtocolError,
    ReplicationError,
    ValueTooLarge,
)
from kvrep.replication.messages import FromFollower, FromPrimary, Refused
from kvrep.transport.address import Address
from kvrep.transport.calls import (
    decode_answer,
    decode_call,
    decode_request,
    decode_scan_chunk,
    encode_answer,
    encode_call,
    encode_request,
    encode_scan_chunk,
)
from kvrep.transport.faults import FaultLog, decode_fault, encode_fault
from kvrep.transport.interface import (
    MESSAGE_BYTES_MAX,
    STREAM_QUEUE_MAX,
    ConnectionRefused,
    NoAnswer,
    Service,
    Session,
    SnapshotItem,
    SnapshotRequest,
    StreamEnded,
)
from kvrep.transport.snapshots import SnapshotCheck
from kvrep.transport.wire import (
    decode_from_follower,
    decode_from_primary,
    decode_snapshot_item,
    decode_snapshot_request,
    encode_from_follower,
    encode_from_primary,
    encode_snapshot_item,
    encode_snapshot_request,
)
from kvrep.transport.workers import Workers, join_all

__all__ = ["MemoryConnection", "MemoryServer", "MemoryTransport"]

_AHEAD = 64
"""How many messages a sender may be ahead; stands for the buffers of a network."""

T = TypeVar("T")


class MemoryTransport:
    """See :class:`kvrep.transport.interface.Transport`. One object is one network."""

    def __init__(self, *, message_bytes_max: int = MESSAGE_BYTES_MAX, max_calls: int = 16) -> None:
        self._message_bytes_max = message_bytes_max
        self._max_calls = max_calls
        self._lock = Lock()  # guards the next two
        self._servers: dict[Address, MemoryServer] = {}
        self._ports = itertools.count(20_000)

    def serve(self, service: Service, listen: str, *, name: str, max_streams: int = 64) -> MemoryServer:
        parsed = Address.parse(listen, listen=True)
        return MemoryServer(self, service, parsed, name, max_streams, self._max_calls)

    def connect(self, address: str, *, name: str) -> MemoryConnection:
        return MemoryConnection(self, Address.parse(address), name)

    def _bind(self, server: MemoryServer, listen: Address) -> Address:
        with self._lock:
            address = listen if listen.port else listen._replace(port=next(self._ports))
            if address in self._servers:
                raise OpenError(
                    f"cannot listen on {address}: Address already in use",
                    hint="choose a free port, or port 0 for any port",
                )
            self._servers[address] = server
            return address

    def _unbind(self, server: MemoryServer) -> None:
        with self._lock:
            self._servers = {a: s for a, s in self._servers.items() if s is not server}

    def _find(self, address: Address) -> MemoryServer:
        with self._lock:
            server = self._servers.get(address)
        if server is None:
            raise ConnectionRefused(f"{address} cannot be reached: Connection refused", address=str(address))
        return server


class _End(Exception):
    """A pipe has ended; ``error`` says why, None in order."""

    def __init__(self, error: Error | None) -> None:
        super().__init__(error)
        self.error = error


class _Pipe:
    """A bounded queue of messages with an end. The first reason to end wins."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._changed = Condition(Lock())  # guards the next three
        self._items: deque[bytes] = deque()
        self._ended = False
        self._error: Error | None = None

    def put(self, item: bytes) -> bool:
        """Wait for room and put; False when the pipe has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._items) < self._count_max)
            return self._put(item)

    def put_now(self, item: bytes) -> bool:
        """Put; False when the pipe has ended, ``Overloaded`` when it is full."""
        with self._changed:
            if not self._ended and len(self._items) >= self._count_max:
                raise Overloaded(f"{self._count_max} messages wait to be sent already")
            return self._put(item)

    def _put(self, item: bytes) -> bool:
        if self._ended:
            return False
        self._items.append(item)
        self._changed.notify_all()
        return True

    def get(self, deadline: float | None = None) -> bytes:
        """Wait for an item; ``_End`` behind the last, ``TimeoutError`` at the deadline."""
        with self._changed:
            timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: self._ended or self._items, timeout_s):
                raise TimeoutError
            if not self._items:
                raise _End(self._error)
            self._changed.notify_all()
            return self._items.popleft()

    def finish(self, error: Error | None) -> None:
        """Nothing more is put; what is in it can still be read."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
            self._changed.notify_all()

    def abort(self, error: Error | None) -> None:
        """End at once; what is in it is lost."""
        with self._changed:
            self._items.clear()
        self.finish(error)


class _Stoppable(Protocol):
    def stop(self, address: str) -> None: ...


class MemoryServer:
    """See :class:`kvrep.transport.interface.Server`."""

    def __init__(
        self,
        network: MemoryTransport,
        service: Service,
        listen: Address,
        name: str,
        max_streams: int,
        max_calls: int,
    ) -> None:
        self._network = network
        self._service = service
        self._listen = listen
        self._name = name
        self._max_streams = max_streams
        self._max_calls = max_calls
        self._faults = FaultLog(name)
        self._stream_slots = Semaphore(max_streams)
        self._call_slots = Semaphore(max_calls)
        self._stream_numbers = itertools.count(1)
        self._lock = Lock()  # guards the next four
        self._address = ""
        self._stopped = False
        self._streams: dict[_MemoryStream, Thread] = {}
        self._replies: set[_Pipe] = set()
        self._workers = Workers(f"kvrep-{name}-rpc", max_streams + max_calls)

    @property
    def address(self) -> str:
        return self._address

    def start(self) -> str:
        self._address = str(self._network._bind(self, self._listen))
        return self._address

    def stop(self, timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        self._network._unbind(self)
        with self._lock:
            self._stopped = True
            streams = dict(self._streams)
        for stream in streams:
            stream.stop(self._address)
        left = join_all(streams.values(), deadline)
        left += self._workers.stop(deadline - timeout_s / 2)
        with self._lock:
            replies = list(self._replies)
        for reply in replies:
            reply.abort(PeerUnavailable(f"{self._address} ended the call", address=self._address))
        self._workers.stop(deadline)

    def _open_stream(self, stream: _MemoryStream, peer: str) -> None:
        """Start the threads of a stream, or end it with the reason."""
        if not self._stream_slots.acquire(blocking=False):
            message = f"all {self._max_streams} streams are in use"
            stream.to_follower.put(encode_from_primary(Refused(reason="full", message=message)))
            stream.to_follower.finish(None)
            return
        try:
            session = self._service.open_session(peer)
        except Exception as error:
            self._stream_slots.release()
            stream.to_follower.finish(self._as_seen("open_session", error))
            return
        name = f"kvrep-{self._name}-reader-{next(self._stream_numbers)}"
        reader = Thread(target=self._read, args=(stream, session), name=name, daemon=True)
        with self._lock:
            # Started under the lock, because stop() joins what it finds there.
            reader.start()
            self._streams[stream] = reader
            stopped = self._stopped
        self._workers.submit(self._send, stream, session)
        if stopped:
            stream.stop(self._address)

    def _send(self, stream: _MemoryStream, session: Session) -> None:
        try:
            while (message := session.next_message()) is not None:
                if not stream.to_follower.put(encode_from_primary(message)):
                    break
        except Exception as error:
            stream.error = stream.error or error
        self._stream_slots.release()
        error_seen = self._as_seen("the stream's sender", stream.error) if stream.error else None
        stream.to_follower.finish(error_seen)
        stream.to_primary.abort(None)

    def _read(self, stream: _MemoryStream, session: Session) -> None:
        error: Exception | None = None
        try:
            while True:
                session.on_message(decode_from_follower(stream.to_primary.get()))
        except _End as end:
            error = stream.error or end.error
        except Exception as failed:
            error = stream.error = stream.error or failed
            stream.to_primary.abort(None)
        try:
            session.on_closed(error)
        except Exception as failed:
            self._faults.unexpected("closing a session", failed)
        with self._lock:
            self._streams.pop(stream, None)

    def _answer(self, reply: _Pipe, method: str, data: bytes) -> None:
        """Start to answer a call, scan or snapshot into ``reply``."""
        if not self._call_slots.acquire(blocking=False):
            reply.finish(Overloaded(f"{self._max_calls} calls run already"))
            return
        with self._lock:
            self._replies.add(reply)
        if self._workers.submit(self._run, reply, method, data).cancelled():
            reply.finish(PeerUnavailable(f"{self._address} is closing", address=self._address))

    def _run(self, reply: _Pipe, method: str, data: bytes) -> None:
        error: Error | None = None
        items: Iterator[bytes] = _METHODS[method](self._service, data)
        try:
            for item in items:
                self._check_size(item)
                if not reply.put(item):
                    break
        except Exception as failed:
            error = self._as_seen(method, failed)
        _close(items)
        self._call_slots.release()
        with self._lock:
            self._replies.discard(reply)
        reply.finish(error)

    def _check_size(self, data: bytes) -> None:
        limit = self._network._message_bytes_max
        if len(data) > limit:
            raise ReplicationError(
                f"an answer of {len(data)} bytes is above the limit of {limit}",
                hint="ask for less at once, or raise the message limit on both sides",
            )

    def _as_seen(self, place: str, error: Exception) -> Error:
        """What of an error gets through to a peer."""
        return decode_fault(encode_fault(self._faults.known(place, error)))


def _run_call(service: Service, data: bytes) -> Iterator[bytes]:
    method, request = decode_call(data)
    yield encode_answer(service.call(method, request))


def _run_scan(service: Service, data: bytes) -> Iterator[bytes]:
    chunks = service.scan(decode_request(data))
    try:
        for chunk in chunks:
            yield encode_scan_chunk(chunk)
    finally:
        _close(chunks)


def _run_snapshot(service: Service, data: bytes) -> Iterator[bytes]:
    items = service.snapshot(decode_snapshot_request(data))
    try:
        for item in items:
            yield encode_snapshot_item(item)
    finally:
        _close(items)


_METHODS: dict[str, Callable[[Service, bytes], Iterator[bytes]]] = {
    "call": _run_call,
    "scan": _run_scan,
    "snapshot": _run_snapshot,
}


class MemoryConnection:
    """See :class:`kvrep.transport.interface.Connection`."""

    def __init__(self, network: MemoryTransport, address: Address, name: str) -> None:
        self._network = network
        self._to = address
        self._name = name
        self._lock = Lock()  # guards the next two
        self._closed = False
        self._open: set[_Pipe | _MemoryStream] = set()

    @property
    def address(self) -> str:
        return str(self._to)

    def open_stream(self) -> _MemoryStream:
        stream = _MemoryStream(self)
        self._add(stream)
        try:
            self._network._find(self._to)._open_stream(stream, f"{self._name}:0")
        except PeerUnavailable as error:
            stream.to_follower.abort(error)
        return stream

    def call(self, method: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        items = self._ask("call", encode_call(method, request), timeout_s, decode_answer, _no_check)
        return next(items)

    def scan(self, request: Mapping[str, Any], timeout_s: float) -> _MemoryItems[list[tuple[bytes, bytes]]]:
        data = encode_request(request)
        return self._ask("scan", data, timeout_s, decode_scan_chunk, _no_check)

    def snapshot(self, request: SnapshotRequest, timeout_s: float) -> _MemoryItems[SnapshotItem]:
        check = SnapshotCheck(request)

        def decode(item: bytes) -> SnapshotItem:
            return check.item(decode_snapshot_item(item))

        data = encode_snapshot_request(request)
        return self._ask("snapshot", data, timeout_s, decode, check.end)

    def _ask(
        self,
        method: str,
        data: bytes,
        timeout_s: float,
        decode: Callable[[bytes], T],
        at_end: Callable[[], None],
    ) -> _MemoryItems[T]:
        deadline = time.monotonic() + timeout_s
        limit = self._network._message_bytes_max
        if len(data) > limit:
            raise ValueTooLarge(
                f"a request of {len(data)} bytes is above the limit of {limit}",
                hint="send less at once, or raise the message limit on both sides",
            )
        reply = _Pipe(_AHEAD)
        self._add(reply)
        try:
            self._network._find(self._to)._answer(reply, method, data)
        except PeerUnavailable as error:
            reply.finish(error)
        return _MemoryItems(self, reply, deadline, decode, at_end)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            open_now = list(self._open)
            self._open.clear()
        for one in open_now:
            one.abort(ClosedError(f"the connection to {self._to} was closed"))

    def _add(self, one: _Pipe | _MemoryStream) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError(f"the connection to {self._to} is closed")
            self._open.add(one)

    def _remove(self, one: _Pipe | _MemoryStream) -> None:
        with self._lock:
            self._open.discard(one)


class _MemoryStream:
    """Both ends of a stream; the follower holds it as :class:`kvrep.transport.interface.Stream`."""

    def __init__(self, connection: MemoryConnection) -> None:
        self._connection = connection
        self.to_primary = _Pipe(STREAM_QUEUE_MAX)
        self.to_follower = _Pipe(_AHEAD)
        self.error: Exception | None = None  # what went wrong at the primary's end

    def send(self, message: FromFollower) -> None:
        if not self.to_primary.put_now(encode_from_follower(message)):
            raise StreamEnded("the stream has ended", error=None)

    def receive(self) -> FromPrimary:
        try:
            return decode_from_primary(self.to_follower.get())
        except _End as end:
            self._connection._remove(self)
            self.to_primary.abort(None)
            if end.error is None:
                raise StreamEnded("the primary ended the stream", error=None) from None
            raise StreamEnded(f"the stream ended: {end.error}", error=end.error) from end.error
        except ProtocolError as error:
            self.abort(error)
            raise StreamEnded(f"the stream ended: {error}", error=error) from error

    def cancel(self) -> None:
        self.abort(ClosedError("the stream was cancelled"))

    def abort(self, error: Error) -> None:
        self._connection._remove(self)
        gone = PeerUnavailable("the follower is gone", address=self._connection._name)
        self.to_primary.abort(gone)
        self.to_follower.abort(error)

    def stop(self, address: str) -> None:
        """The server is stopping."""
        self.to_primary.abort(ClosedError("the server was stopped"))
        self.to_follower.abort(PeerUnavailable(f"{address} ended the call", address=address))


class _MemoryItems(Generic[T]):
    """See :class:`kvrep.transport.interface.ClosableIterator`."""

    def __init__(
        self,
        connection: MemoryConnection,
        reply: _Pipe,
        deadline: float,
        decode: Callable[[bytes], T],
        at_end: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._reply = reply
        self._deadline = deadline
        self._decode = decode
        self._at_end = at_end

    def __iter__(self) -> _MemoryItems[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._decode(self._reply.get(self._deadline))
        except _End as end:
            self._connection._remove(self._reply)
            if end.error is not None:
                raise end.error from None
            self._at_end()
            raise StopIteration from None
        except TimeoutError as error:
            address = self._connection.address
            late = NoAnswer(f"no answer from {address} in time", address=address)
            self._reply.abort(late)
            raise late from error
        except ProtocolError as error:
            self._reply.abort(error)
            raise

    def close(self) -> None:
        self._connection._remove(self._reply)
        self._reply.abort(ClosedError("closed"))


def _close(items: object) -> None:
    getattr(items, "close", _no_check)()


def _no_check() -> None:
    pass
