"""A thin client of etcd's version 3 API: KV, Lease and Watch, as much as a coordinator needs.

Every call has a deadline. With several endpoints, each is tried in turn, the last good one first; a repeat
may find that the first attempt was done after all, so callers compare what is there with what they wanted.
Methods may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from kvrep._pb import etcd_pb2 as pb
from kvrep.errors import (
    AuthenticationFailed,
    ClosedError,
    Error,
    PeerUnavailable,
    PermissionDenied,
    ReplicationError,
)
from kvrep.transport.address import Address
from kvrep.transport.security import TLS, channel_credentials

__all__ = ["Compacted", "EtcdClient", "KeyValue", "Lease", "LeaseExpired"]

T = TypeVar("T")
ATTEMPT_MIN_S = 0.25
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 4 << 20),
]


class LeaseExpired(ReplicationError):
    """etcd does not know the lease any more; everything attached to it is gone."""


class Compacted(ReplicationError):
    """The revision to watch from has been compacted away: read the key again."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class Lease:
    id: int
    ttl_s: int


class EtcdClient:
    """See the module. ``close()`` ends what is under way."""

    def __init__(
        self, endpoints: Sequence[str], *, name: str, timeout_s: float = 1.0, tls: TLS | None = None
    ) -> None:
        """``endpoints``: "host:port". ``ValueError`` for a bad one, or none. ``timeout_s``: for one call."""
        if not endpoints:
            raise ValueError("etcd needs at least one endpoint")
        self._endpoints = [str(Address.parse(e)) for e in endpoints]
        self._name = name
        self._timeout_s = timeout_s
        self._tls = tls
        self._lock = threading.Lock()  # guards the next four
        self._closed = False
        self._channel: grpc.Channel | None = None
        self._at = 0
        self._watches: set[Any] = set()

    # -- keys --------------------------------------------------------------------------------------

    def get(self, key: str) -> tuple[KeyValue | None, int]:
        """The key (``None`` if there is none) and the revision of the store at that moment."""
        answer = self._kv("Range", pb.RangeRequest(key=key.encode()), pb.RangeResponse)
        found = [_key_value(kv) for kv in answer.kvs]
        return (found[0] if found else None), answer.header.revision

    def get_prefix(self, prefix: str, limit: int = 1000) -> list[KeyValue]:
        """All keys that start with ``prefix``, sorted; at most ``limit``."""
        start = prefix.encode()
        end = start[:-1] + bytes([start[-1] + 1])
        request = pb.RangeRequest(key=start, range_end=end, limit=limit)
        return [_key_value(kv) for kv in self._kv("Range", request, pb.RangeResponse).kvs]

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Returns the revision."""
        request = pb.PutRequest(key=key.encode(), value=value, lease=lease)
        return int(self._kv("Put", request, pb.PutResponse).header.revision)

    def create(self, key: str, value: bytes, lease: int = 0) -> tuple[bool, KeyValue]:
        """Create the key if it does not exist. Whether we did, and what is there now.

        ``LeaseExpired`` when the lease is gone.
        """
        name = key.encode()
        request = pb.TxnRequest(
            compare=[
                pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.CREATE, key=name, create_revision=0)
            ],
            success=[pb.RequestOp(request_put=pb.PutRequest(key=name, value=value, lease=lease))],
            failure=[pb.RequestOp(request_range=pb.RangeRequest(key=name))],
        )
        answer = self._kv("Txn", request, pb.TxnResponse)
        if answer.succeeded:
            revision = answer.header.revision
            return True, KeyValue(key, value, revision, revision, lease)
        return False, _key_value(answer.responses[0].response_range.kvs[0])

    def replace(self, key: str, value: bytes, old: KeyValue, lease: int = 0) -> bool:
        """Write the key if it is still as in ``old``."""
        name = key.encode()
        request = pb.TxnRequest(
            compare=[_unchanged(name, old)],
            success=[pb.RequestOp(request_put=pb.PutRequest(key=name, value=value, lease=lease))],
        )
        return bool(self._kv("Txn", request, pb.TxnResponse).succeeded)

    def delete(self, key: str, old: KeyValue) -> bool:
        """Delete the key if it is still as in ``old``."""
        name = key.encode()
        request = pb.TxnRequest(
            compare=[_unchanged(name, old)],
            success=[pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=name))],
        )
        return bool(self._kv("Txn", request, pb.TxnResponse).succeeded)

    # -- leases ------------------------------------------------------------------------------------

    def grant(self, ttl_s: int) -> Lease:
        """A new lease; etcd may give it a longer time than asked for."""
        answer = self._call("Lease/LeaseGrant", pb.LeaseGrantRequest(TTL=ttl_s), pb.LeaseGrantResponse)
        if answer.error:
            raise ReplicationError(f"etcd refused a lease: {answer.error[:200]}")
        return Lease(answer.ID, answer.TTL)

    def keep_alive(self, lease: int) -> int:
        """Renew a lease; its time in seconds from now. ``LeaseExpired`` when it is gone."""

        def start(channel: grpc.Channel, timeout_s: float) -> Any:
            path = "/etcdserverpb.Lease/LeaseKeepAlive"
            call: Any = channel.stream_stream(
                path,
                request_serializer=pb.LeaseKeepAliveRequest.SerializeToString,
                response_deserializer=pb.LeaseKeepAliveResponse.FromString,
            )
            answers = call(iter([pb.LeaseKeepAliveRequest(ID=lease)]), timeout=timeout_s)
            try:
                return next(answers, None)
            finally:
                answers.cancel()

        answer = self._try(start)
        if answer is None or answer.TTL <= 0:
            raise LeaseExpired("the lease has expired")
        return int(answer.TTL)

    def revoke(self, lease: int) -> None:
        """Give a lease up with all keys attached to it; none is no error."""
        try:
            self._call("Lease/LeaseRevoke", pb.LeaseRevokeRequest(ID=lease), pb.LeaseRevokeResponse)
        except LeaseExpired:
            pass

    # -- watching ----------------------------------------------------------------------------------

    def wait_for_change(self, key: str, after_revision: int, timeout_s: float) -> bool:
        """Wait until the key changes after a revision; false when nothing happened in time.

        ``Compacted`` when that revision is history already; errors as in any call.
        """
        deadline = time.monotonic() + timeout_s
        create = pb.WatchCreateRequest(key=key.encode(), start_revision=after_revision + 1)
        done = threading.Event()
        channel, endpoint = self._connected()
        call: Any = channel.stream_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.WatchResponse.FromString,
        )
        requests = _open_ended(pb.WatchRequest(create_request=create), done, f"kvrep-{self._name}-watch")
        answers = call(requests, timeout=max(0.001, deadline - time.monotonic()))
        with self._lock:
            self._watches.add(answers)
        try:
            return _first_event(answers)
        except grpc.RpcError as error:
            if self._closed:
                raise ClosedError("the etcd client is closed") from error
            if _in_time(error, deadline):
                return False
            self._drop(channel)
            raise _mapped(error, endpoint) from error
        finally:
            done.set()
            answers.cancel()
            with self._lock:
                self._watches.discard(answers)

    def close(self) -> None:
        """End everything under way (``ClosedError``). Idempotent."""
        with self._lock:
            self._closed = True
            watches, self._watches = list(self._watches), set()
            channel, self._channel = self._channel, None
        for watch in watches:
            watch.cancel()
        if channel is not None:
            channel.close()

    # -- how ---------------------------------------------------------------------------------------

    def _kv(self, method: str, request: Any, answer: Any) -> Any:
        return self._call(f"KV/{method}", request, answer)

    def _call(self, method: str, request: Any, answer: Any) -> Any:
        def start(channel: grpc.Channel, timeout_s: float) -> Any:
            call: Any = channel.unary_unary(
                f"/etcdserverpb.{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
            return call(request, timeout=timeout_s)

        return self._try(start)

    def _try(self, start: Callable[[grpc.Channel, float], T]) -> T:
        """On each endpoint in turn, until one answers or the time is over."""
        deadline = time.monotonic() + self._timeout_s
        share = max(ATTEMPT_MIN_S, self._timeout_s / len(self._endpoints))
        problem: Error = PeerUnavailable("no etcd endpoint answered", address=self._endpoints[0])
        for _ in self._endpoints:
            left = min(share, deadline - time.monotonic())
            if left <= 0:
                break
            channel, endpoint = self._connected()
            try:
                return start(channel, left)
            except grpc.RpcError as error:
                problem = _mapped(error, endpoint)
                if not isinstance(problem, PeerUnavailable):
                    raise problem from error
                self._drop(channel)
            except ValueError as error:  # gRPC's way to say that the channel was closed meanwhile
                problem = PeerUnavailable(f"{endpoint}: {error}", address=endpoint)
        if self._closed:
            raise ClosedError("the etcd client is closed")
        raise problem

    def _connected(self) -> tuple[grpc.Channel, str]:
        with self._lock:
            if self._closed:
                raise ClosedError("the etcd client is closed")
            endpoint = self._endpoints[self._at % len(self._endpoints)]
            if self._channel is None:
                target = f"dns:///{endpoint}"
                if self._tls is None:
                    self._channel = grpc.insecure_channel(target, options=_OPTIONS)
                else:
                    credentials = channel_credentials(self._tls)
                    self._channel = grpc.secure_channel(target, credentials, options=_OPTIONS)
            return self._channel, endpoint

    def _drop(self, channel: grpc.Channel) -> None:
        """This endpoint failed: the next one is next. A new channel starts without gRPC's backoff."""
        with self._lock:
            if self._channel is not channel:
                return
            self._channel = None
            self._at += 1
        channel.close()


def _open_ended(request: pb.WatchRequest, done: threading.Event, name: str) -> Iterator[pb.WatchRequest]:
    """etcd ends a watch when the client's side of the stream ends, so it stays open until ``done``."""
    threading.current_thread().name = name
    yield request
    done.wait()


def _first_event(answers: Any) -> bool:
    for answer in answers:
        if answer.compact_revision:
            raise Compacted(f"etcd has compacted through revision {answer.compact_revision}")
        if answer.canceled:
            raise ReplicationError(f"etcd ended the watch: {answer.cancel_reason[:200]}")
        if answer.events:
            return True
    return False


def _in_time(error: Any, deadline: float) -> bool:
    """Whether a watch ended only because its time was over; etcd may notice that before we do."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return True
    return "deadline exceeded" in (error.details() or "") and time.monotonic() >= deadline - 0.1


def _unchanged(name: bytes, old: KeyValue) -> pb.Compare:
    return pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=name, mod_revision=old.mod_revision)


def _key_value(kv: Any) -> KeyValue:
    key = kv.key.decode(errors="replace")
    return KeyValue(key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _mapped(error: Any, endpoint: str) -> Error:
    code, details = error.code(), (error.details() or "")[:300]
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return LeaseExpired(f"etcd at {endpoint}: {details}")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return AuthenticationFailed(f"etcd at {endpoint}: {details}")
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return PermissionDenied(f"etcd at {endpoint}: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerUnavailable(f"no answer from etcd at {endpoint} in time", address=endpoint)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return PeerUnavailable(f"etcd at {endpoint} cannot be reached: {details}", address=endpoint)
    return ReplicationError(f"etcd at {endpoint} failed: {code.name}: {details}")
