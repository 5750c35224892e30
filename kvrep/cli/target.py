"""A running node or a store on disk behind the same few methods."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvrep.cli.arguments import is_address, security
from kvrep.cli.exits import UsageError
from kvrep.errors import Error, NotAStore, NotPrimary, PeerUnavailable, RefusedError, UnknownOutcome
from kvrep.model.position import Position

if TYPE_CHECKING:
    from kvrep.storage.engine import Engine
    from kvrep.transport.security import Security

__all__ = ["LocalTarget", "Op", "Range", "RemoteTarget", "Target", "connect", "open_target"]

Op = tuple[str, bytes, bytes | None]
"""(keyspace, key, value or ``None`` for a delete)."""

CLIENT_MESSAGE_BYTES_MAX = (1 << 30) + (1 << 20)
"""The client takes whatever a node may hold; the node's own limits are the tighter ones."""
GRACE_S = 2.0
"""How much longer than the node itself we wait for its answer."""


class Range(NamedTuple):
    """What to scan."""

    keyspace: str = "default"
    prefix: bytes = b""
    start: bytes | None = None
    stop: bytes | None = None
    reverse: bool = False
    limit: int | None = None


class Target(Protocol):
    """What data commands talk to. Errors are those of ``kvrep.errors``."""

    def get(self, keyspace: str, key: bytes, at_least: Position | None) -> bytes | None: ...
    def write(self, ops: list[Op]) -> Position:
        """Atomic. ``RefusedError``: nothing was written; ``UnknownOutcome``: it may survive or not."""

    def scan(self, wanted: Range, at_least: Position | None) -> Iterator[list[tuple[bytes, bytes]]]: ...
    def keyspaces(self) -> list[str]: ...
    def status(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class RemoteTarget:
    """A running node, over one gRPC connection. Any thread may use it."""

    def __init__(self, address: str, security: Security | None = None, *, timeout_s: float = 10.0) -> None:
        from kvrep.transport.network import GrpcTransport

        transport = GrpcTransport(security=security, message_bytes_max=CLIENT_MESSAGE_BYTES_MAX)
        self.address = address
        self.timeout_s = timeout_s
        self._security = security
        try:
            self._connection = transport.connect(address, name="cli")
        except ValueError as error:
            raise UsageError(str(error)) from None

    def __enter__(self) -> RemoteTarget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(
        self, method: str, request: Mapping[str, Any], *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Any unary method of the node; see ``kvrep/runtime/service.py``."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        return self._connection.call(method, {"timeout_s": limit, **request}, limit + GRACE_S)

    def get(self, keyspace: str, key: bytes, at_least: Position | None = None) -> bytes | None:
        request = {"keyspace": keyspace, "key": key, "at_least": _text(at_least)}
        value: bytes | None = self.call("get", request)["value"]
        return value

    def write(self, ops: list[Op]) -> Position:
        try:
            answer = self.call("write", {"ops": ops})
        except PeerUnavailable as error:
            raise UnknownOutcome(
                f"{self.address} ended without an answer: the write may have been done, or not",
                hint="read the keys once the node answers again; writing the same again is safe",
                position=None,
            ) from error
        return Position.parse(answer["position"])

    def scan(self, wanted: Range, at_least: Position | None = None) -> Iterator[list[tuple[bytes, bytes]]]:
        request = {**wanted._asdict(), "at_least": _text(at_least)}
        chunks = self._connection.scan(request, max(self.timeout_s, 3600.0))
        try:
            yield from chunks
        finally:
            chunks.close()

    def keyspaces(self) -> list[str]:
        names: list[str] = self.call("keyspaces", {})["keyspaces"]
        return names

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.call("status", {})["status"]
        return status

    def wait(self, position: Position) -> None:
        """Return once reads there show ``position``; :class:`StaleRead` after ``timeout_s``."""
        self.call("wait", {"position": str(position)})

    def resolve(self, position: Position) -> str:
        """``committed``, ``pending`` or ``rolled back``."""
        return str(self.call("resolve", {"position": str(position)})["outcome"])

    def digests(self) -> dict[str, Any]:
        """Digests recomputed there from what LMDB holds, and as of which position."""
        return self.call("digests", {})

    def close(self) -> None:
        self._connection.close()


class LocalTarget:
    """A store on disk that no process has open. Reading begins no epoch and so changes no history.

    A store that belongs to a group is read as far as it is known to be committed, and not written:
    its writes need the other nodes.
    """

    def __init__(
        self, path: str, *, write: bool = False, create: bool = False, timeout_s: float = 10.0
    ) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._engine = self._open(create=create and write)
        if write:
            self._become_writer()

    def _open(self, *, create: bool) -> Engine:
        from kvrep.options import Options
        from kvrep.storage.engine import Engine

        if not create and not (Path(self.path) / "STORE").is_file():
            raise NotAStore(f"there is no store at {self.path}", path=self.path, hint="check the path")
        import os

        engine = Engine.open(
            Path(self.path), Options(create=create), lineage=os.urandom(16) if create else b""
        )
        if not self._has_peers(engine):
            engine.committer.advance()
        return engine

    @staticmethod
    def _has_peers(engine: Engine) -> bool:
        """Whether somebody else may have a say in what this store holds."""
        configuration = engine.configuration
        alone = not configuration.voters or (
            len(configuration.voters) == 1 and configuration.voter(engine.home.store_id) is not None
        )
        return not alone or configuration.synchronous or not engine.home.lineage

    def _become_writer(self) -> None:
        """Begin an epoch, as ``kvrep.open`` does, unless the store belongs to a group."""
        from kvrep.options import Options
        from kvrep.runtime.node import Node

        if self._has_peers(self._engine):
            self._engine.close(self.timeout_s)
            raise NotPrimary(
                f"the store at {self.path} belongs to a group of nodes, so it is not written alone",
                hint="start it with 'kvrep serve' and write to the primary's address",
                primary_address=None,
                epoch=None,
            )
        self._node = Node(self._engine, Options(), None)
        self._node._start(follower=False)

    def __enter__(self) -> LocalTarget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, keyspace: str, key: bytes, at_least: Position | None = None) -> bytes | None:
        from kvrep.runtime.checks import check_key, check_name

        self._check_reached(at_least)
        view = self._engine.view
        value: bytes | None = view.get(keyspace, view.admit(check_name(keyspace)), check_key(key))
        return value

    def write(self, ops: list[Op]) -> Position:
        from kvrep.model.record import Kind, write_payload
        from kvrep.runtime.checks import check_key, check_name, check_value
        from kvrep.storage.write import Write

        size = 0
        for name, key, value in ops:
            self._engine.view.admit(check_name(name))
            check_key(key)
            if value is not None:
                check_value(value, self._engine.options.value_bytes_max)
            size += len(key) + len(value or b"") + 16
        self._node.check_record_size(size)
        return self._node.commit(Write(Kind.WRITE, write_payload(ops), size), self.timeout_s)

    def scan(self, wanted: Range, at_least: Position | None = None) -> Iterator[list[tuple[bytes, bytes]]]:
        from kvrep.keyspace import bounds
        from kvrep.runtime.checks import check_name

        self._check_reached(at_least)
        self._engine.view.admit(check_name(wanted.keyspace))
        low, high = bounds(wanted.prefix, wanted.start, wanted.stop)
        if (high is not None and low >= high) or wanted.limit == 0:
            return
        snapshot = self._engine.snapshot()
        try:
            pairs = snapshot.scan(wanted.keyspace, low, high, reverse=wanted.reverse)
            yield from chunked(pairs, wanted.limit)
        finally:
            snapshot.release()

    def _check_reached(self, at_least: Position | None) -> None:
        if at_least is not None:
            from kvrep.options import Options
            from kvrep.runtime.node import Node

            Node(self._engine, Options(), None).wait_for(at_least, 0.0)

    def keyspaces(self) -> list[str]:
        return sorted({"default", *self._engine.view.keyspaces})

    def status(self) -> dict[str, Any]:
        from kvrep.options import Options
        from kvrep.runtime.node import Node

        status = Node(self._engine, Options(), None).status().to_json()
        return {**status, "role": "offline", "not_writable": "no process has it open", "primary_address": ""}

    def close(self) -> None:
        self._engine.close(30.0)


def chunked(pairs: Iterable[tuple[bytes, bytes]], limit: int | None) -> Iterator[list[tuple[bytes, bytes]]]:
    """Lists of up to 256 pairs, ``limit`` pairs in all."""
    chunk: list[tuple[bytes, bytes]] = []
    for number, pair in enumerate(pairs, 1):
        chunk.append(pair)
        if len(chunk) == 256 or number == limit:
            yield chunk
            chunk = []
        if number == limit:
            return
    if chunk:
        yield chunk


def open_target(args: argparse.Namespace, *, write: bool = False, create: bool = False) -> Target:
    """The TARGET argument, opened. A running node is asked once: later failures mean what they say."""
    if is_address(args.target):
        return connect(args, args.target)
    if args.token_file or args.tls_cert or args.tls_ca:
        raise UsageError(f"{args.target} is a path: --token-file and --tls-… are for addresses")
    return LocalTarget(args.target, write=write, create=create, timeout_s=args.timeout_s)


def connect(args: argparse.Namespace, address: str) -> RemoteTarget:
    """A running node that has answered at least once."""
    target = RemoteTarget(address, security(args), timeout_s=args.timeout_s)
    try:
        target.status()
    except BaseException:
        target.close()
        raise
    return target


def is_refusal(error: Error) -> bool:
    """Whether nothing was written and the same may simply be tried again."""
    return isinstance(error, RefusedError)


def _text(position: Position | None) -> str | None:
    return None if position is None else str(position)
