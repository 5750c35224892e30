"""Answers peers over gRPC.

The threads of one server, all daemons::

    kvrep-NAME-rpc-N     up to streams + calls   calls, scans, snapshots, and the sender of each stream
    kvrep-NAME-reader-N  one per stream          decodes what the follower sends, Session.on_message
    (gRPC's own)         1                       events
"""

from __future__ import annotations

import itertools
import logging
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from threading import Lock, Semaphore, Thread
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc

from kvrep.errors import (
    AuthenticationFailed,
    ClosedError,
    Error,
    InvalidInput,
    OpenError,
    Overloaded,
    PeerUnavailable,
    PermissionDenied,
    RefusedError,
    ReplicationError,
)
from kvrep.replication.messages import Refused
from kvrep.transport.address import Address
from kvrep.transport.calls import decode_call, decode_request, encode_answer, encode_scan_chunk
from kvrep.transport.faults import FaultLog, encode_fault
from kvrep.transport.interface import MESSAGE_BYTES_MAX, Service, Session
from kvrep.transport.security import Security, server_credentials
from kvrep.transport.wire import (
    decode_from_follower,
    decode_snapshot_request,
    encode_from_primary,
    encode_snapshot_item,
)
from kvrep.transport.workers import Workers, join_all

__all__ = ["FAULT_KEY", "SERVICE_NAME", "GrpcServer"]

SERVICE_NAME = "kvrep.v1.Node"
FAULT_KEY = "kvrep-fault-bin"
ANSWERS_S = 0.25
"""How long the answers of calls that have ended may take to leave, at a stop."""
_REFUSALS = 4
"""Threads beyond streams and calls, so that a full server can still say so."""

_STATUS: tuple[tuple[type[Error], grpc.StatusCode], ...] = (
    (AuthenticationFailed, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (ClosedError, grpc.StatusCode.UNAVAILABLE),
    (RefusedError, grpc.StatusCode.FAILED_PRECONDITION),
    (ReplicationError, grpc.StatusCode.ABORTED),
    (Error, grpc.StatusCode.UNKNOWN),
)


def _options(message_bytes_max: int) -> list[tuple[str, Any]]:
    return [
        # Otherwise a second server shares the port without an error.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.max_metadata_size", 8192),
        ("grpc.max_concurrent_streams", 128),
        # Below the clients' keepalive time, else they are cut off for pinging too often.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A follower that vanished without a word must free its thread.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.ping_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


class GrpcServer:
    """See :class:`kvrep.transport.interface.Server`.

    ``max_streams`` followers can be connected; one more gets Refused "full" at once. ``max_calls``
    calls, scans and snapshots run at once; one more gets ``Overloaded``. Neither takes threads from
    the other. ``message_bytes_max`` limits one call's request or answer and one scan chunk.
    """

    def __init__(
        self,
        service: Service,
        listen: str,
        *,
        name: str,
        max_streams: int = 64,
        max_calls: int = 16,
        security: Security | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> None:
        self._listen = Address.parse(listen, listen=True)
        self._security = security or Security()
        self._security.check(self._listen)
        self._service = service
        self._name = name
        self._max_streams = max_streams
        self._max_calls = max_calls
        self._message_bytes_max = message_bytes_max
        self._faults = FaultLog(name)
        self._stream_slots = Semaphore(max_streams)
        self._call_slots = Semaphore(max_calls)
        self._stream_numbers = itertools.count(1)
        self._lock = Lock()  # guards the next four
        self._address = ""
        self._stopped = False
        self._readers: set[Thread] = set()
        self._endless: set[grpc.ServicerContext] = set()  # what only ends when cancelled
        rpcs_max = max_streams + max_calls + _REFUSALS
        self._workers = Workers(f"kvrep-{name}-rpc", rpcs_max)
        self._grpc = grpc.server(
            self._workers,  # type: ignore[arg-type]  # any Executor does
            handlers=[self._handlers()],
            options=_options(message_bytes_max),
            maximum_concurrent_rpcs=rpcs_max,
        )

    def _handlers(self) -> grpc.GenericRpcHandler:
        """Without (de)serializers: bytes pass through, and our own threads decode them."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Replicate": grpc.stream_stream_rpc_method_handler(self._replicate),
                "Call": grpc.unary_unary_rpc_method_handler(self._call),
                "Scan": grpc.unary_stream_rpc_method_handler(self._scan),
                "Snapshot": grpc.unary_stream_rpc_method_handler(self._snapshot),
            },
        )

    @property
    def address(self) -> str:
        return self._address

    def start(self) -> str:
        """Listen; ``OpenError`` when the address cannot be had or the TLS files cannot be used."""
        port = self._bind()
        self._grpc.start()
        self._address = str(self._listen._replace(port=port))
        # An exit of the interpreter with a running gRPC server can hang.
        self._at_exit = weakref.finalize(self, self._grpc.stop, None)
        return self._address

    def _bind(self) -> int:
        tls = self._security.tls
        try:
            if tls is None:
                return self._grpc.add_insecure_port(str(self._listen))
            return self._grpc.add_secure_port(str(self._listen), server_credentials(tls))
        except RuntimeError as error:
            raise OpenError(
                f"cannot listen on {self._listen}: {_why_not(self._listen)}",
                hint="choose a free port and an address of this machine, or port 0 for any port",
            ) from error
        except (OSError, ValueError) as error:
            raise OpenError(f"the TLS files cannot be used: {error}") from error

    def stop(self, timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            first, self._stopped = not self._stopped, True
            endless = list(self._endless)
            readers = list(self._readers)
        if first and self._address:
            self._at_exit.detach()
            ended = self._grpc.stop(timeout_s / 2)
            for context in endless:
                context.cancel()
            if self._calls_ended(deadline - timeout_s / 2):
                # gRPC would give its whole grace to anybody who is connected and says nothing.
                self._grpc.stop(min(ANSWERS_S, timeout_s / 4))
            ended.wait(timeout_s * 0.75)
        left = join_all(readers, deadline) + self._workers.stop(deadline)
        if left:
            names = ", ".join(thread.name for thread in left)
            logging.getLogger("kvrep.transport").warning(
                "%s: stopped, but still busy after %.1f s: %s", self._name, timeout_s, names
            )

    def _calls_ended(self, deadline: float) -> bool:
        """Take every slot for calls, for good: none is under way then, nor can another begin."""
        for _ in range(self._max_calls):
            if not self._call_slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return False
        return True

    # --- the replication stream ---

    def _replicate(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._admit(context)
        if not self._stream_slots.acquire(blocking=False):
            return iter((encode_from_primary(self._full()),))
        stream = None
        try:
            peer = _peer(context)
            session = self._service.open_session(peer)
            stream = _ServerStream(self, session, requests, context, peer)
            return stream
        except Exception as error:
            self._fail(context, "open_session", error)
        finally:
            if stream is None:
                self._stream_slots.release()

    def _full(self) -> Refused:
        return Refused(reason="full", message=f"all {self._max_streams} streams are in use")

    # --- calls, scans, snapshots ---

    def _call(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        self._admit(context)
        self._take_call_slot(context)
        try:
            method, request = decode_call(data)
            return self._within_limit(encode_answer(self._service.call(method, request)))
        except Exception as error:
            self._fail(context, "call", error)
        finally:
            self._call_slots.release()

    def _scan(self, data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        def chunks() -> Iterator[Any]:
            return self._service.scan(decode_request(data))

        return self._send_items(context, "scan", chunks, encode_scan_chunk)

    def _snapshot(self, data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        def items() -> Iterator[Any]:
            return self._service.snapshot(decode_snapshot_request(data))

        return self._send_items(context, "snapshot", items, encode_snapshot_item)

    def _send_items(
        self,
        context: grpc.ServicerContext,
        place: str,
        start: Callable[[], Iterator[Any]],
        encode: Callable[[Any], bytes],
    ) -> Iterator[bytes]:
        """A generator that gRPC runs in one thread; it is closed when the caller is gone."""
        self._admit(context)
        self._take_call_slot(context)
        items: Iterator[Any] = iter(())
        try:
            self._track(context)
            items = start()
            for item in items:
                yield self._within_limit(encode(item))
        except Exception as error:
            self._fail(context, place, error)
        finally:
            self._call_slots.release()
            self._close_items(place, items)

    def _close_items(self, place: str, items: Iterator[Any]) -> None:
        try:
            getattr(items, "close", _nothing)()
        except Exception as error:
            self._faults.unexpected(f"closing a {place}", error)

    # --- shared by all ---

    def _admit(self, context: grpc.ServicerContext) -> None:
        if not self._security.admits(context.invocation_metadata()):
            self._abort(context, AuthenticationFailed("the token is missing or wrong"))

    def _take_call_slot(self, context: grpc.ServicerContext) -> None:
        if not self._call_slots.acquire(blocking=False):
            if self._stopped:  # stop() took the slots: the caller goes to another node, it does not try again
                self._abort(context, ClosedError("the node is closing"))
            hint = "try again, or raise the number of calls the server may run at once"
            self._abort(context, Overloaded(f"{self._max_calls} calls run already", hint=hint))

    def _within_limit(self, data: bytes) -> bytes:
        if len(data) > self._message_bytes_max:
            raise ReplicationError(
                f"an answer of {len(data)} bytes is above the limit of {self._message_bytes_max}",
                hint="ask for less at once, or raise the message limit on both sides",
            )
        return data

    def _fail(self, context: grpc.ServicerContext, place: str, error: Exception) -> NoReturn:
        self._abort(context, self._faults.known(place, error))

    def _abort(self, context: grpc.ServicerContext, error: Error) -> NoReturn:
        code = next(code for kind, code in _STATUS if isinstance(error, kind))
        context.set_trailing_metadata(((FAULT_KEY, encode_fault(error)),))
        context.abort(code, error.message[:200] or type(error).__name__)

    def _track(self, context: grpc.ServicerContext) -> None:
        """Let ``stop`` cancel this one, which would not end by itself."""
        with self._lock:
            if self._stopped:
                raise ClosedError("the node is closing")
            self._endless.add(context)
        if not context.add_callback(lambda: self._untrack(context)):
            self._untrack(context)

    def _untrack(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._endless.discard(context)


class _ServerStream:
    """One follower's stream: an iterator that gRPC's handler thread drains, and a reader thread."""

    def __init__(
        self,
        server: GrpcServer,
        session: Session,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        peer: str,
    ) -> None:
        self._server = server
        self._session = session
        self._requests = requests
        self._context = context
        self._peer = peer
        self._lock = Lock()  # guards the next one
        self._released = False
        self._error: Exception | None = None  # set once, before the other thread is woken
        self._ended = False  # by this side, with or without an error
        self._gone = False  # the follower went away: there is nobody to tell
        self._start_reader()

    def _start_reader(self) -> None:
        server = self._server
        name = f"kvrep-{server._name}-reader-{next(server._stream_numbers)}"
        self._reader = Thread(target=self._read, name=name, daemon=True)
        try:
            server._track(self._context)
            with server._lock:
                # Started under the lock, because stop() joins what it finds there.
                self._reader.start()
                server._readers.add(self._reader)
        except Exception as error:
            # The promise is one on_closed per session, and no reader will keep it.
            self._closed(error)
            raise
        # For a stream whose end gRPC notices while nobody iterates.
        if not self._context.add_callback(self._release):
            self._release()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            message = self._session.next_message()
            if message is not None:
                return encode_from_primary(message)
        except Exception as error:
            self._error = self._error or error
        self._ended = True
        # Before the status is sent, so that a follower that comes again at once finds room.
        self._release()
        if self._error is not None and not self._gone:
            self._server._fail(self._context, "the stream's sender", self._error)
        raise StopIteration

    def _read(self) -> None:
        on_message = self._session.on_message
        try:
            for data in self._requests:
                on_message(decode_from_follower(data))
        except grpc.RpcError:
            pass
        except Exception as error:
            if not isinstance(error, Error):
                self._server._faults.unexpected("the stream's reader", error)
            self._error = self._error or error
            self._closed(self._error)
            return
        # gRPC ends the iteration or raises, as chance will have it, when the follower is gone. Followers
        # never end their half alone, so if this side did not end the stream, the follower did.
        if self._ended:
            self._closed(self._error)
        else:
            self._gone = True
            self._closed(self._lost())

    def _lost(self) -> Error:
        if self._server._stopped:
            return ClosedError("the server was stopped")
        return PeerUnavailable(f"the follower at {self._peer} is gone", address=self._peer)

    def _closed(self, error: Exception | None) -> None:
        try:
            self._session.on_closed(error)
        except Exception as failed:
            self._server._faults.unexpected("closing a session", failed)
        with self._server._lock:
            self._server._readers.discard(self._reader)

    def _release(self) -> None:
        with self._lock:
            if self._released:
                return
            self._released = True
        self._server._stream_slots.release()


def _peer(context: grpc.ServicerContext) -> str:
    """gRPC says "ipv4:127.0.0.1:1234" or "ipv6:%5B::1%5D:1234"."""
    return unquote(context.peer().partition(":")[2])[:300]


def _why_not(address: Address) -> str:
    """What the system says about binding there; gRPC does not tell."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address.host, address.port))
            probe.listen()
    except OSError as error:
        return error.strerror or str(error)
    return "the system does not say why"


def _nothing() -> None:
    pass
