"""A running node or a store on disk behind the same few methods."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvrep.cli.arguments import is_address, security
from kvrep.cli.exits import UsageError
from kvrep.errors import ClosedError, NotAStore, NotPrimary, PeerUnavailable, StoreInUse, UnknownOutcome
from kvrep.model.position import Position

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.storage.engine import Engine
    from kvrep.store import Store
    from kvrep.transport.security import Security

__all__ = [
    "LocalReader",
    "LocalWriter",
    "Op",
    "Range",
    "Reader",
    "RemoteTarget",
    "Writer",
    "check_alone",
    "connect",
    "open_reader",
    "open_writer",
]

Op = tuple[str, bytes, bytes | None]
"""(keyspace, key, value or ``None`` for a delete)."""

CLIENT_MESSAGE_BYTES_MAX = (1 << 30) + (1 << 20)
"""The client takes whatever a node may hold; the node's own limits are the tighter ones."""
CLOSE_S = 30.0
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


class Reader(Protocol):
    """What reading commands talk to. Errors are those of ``kvrep.errors``."""

    def get(self, keyspace: str, key: bytes, at_least: Position | None) -> bytes | None: ...
    def scan(self, wanted: Range, at_least: Position | None) -> Iterator[list[tuple[bytes, bytes]]]: ...
    def keyspaces(self) -> list[str]: ...
    def status(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Writer(Protocol):
    """What writing commands talk to."""

    def write(self, ops: list[Op]) -> Position:
        """Atomic. ``RefusedError``: nothing was written; ``UnknownOutcome``: it may survive or not."""

    def close(self) -> None: ...


class RemoteTarget:
    """A running node, over one gRPC connection. Any thread may use it."""

    def __init__(self, address: str, security: Security | None = None, *, timeout_s: float = 10.0) -> None:
        from kvrep.transport.network import GrpcTransport

        transport = GrpcTransport(security=security, message_bytes_max=CLIENT_MESSAGE_BYTES_MAX)
        self.address = address
        self.timeout_s = timeout_s
        self.consistency = "local"
        """How fresh what is read must be, as of ``Store.get``."""
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
        request = {
            "keyspace": keyspace,
            "key": key,
            "at_least": _text(at_least),
            "consistency": self.consistency,
        }
        value: bytes | None = self.call("get", request)["value"]
        return value

    def write(self, ops: list[Op]) -> Position:
        try:
            answer = self.call("write", {"ops": ops})
        except (PeerUnavailable, ClosedError) as error:
            # A node that closes may have logged the write already, and another one may commit it.
            raise UnknownOutcome(
                f"{self.address} ended without an answer: the write may have been done, or not",
                hint="read the keys once the node answers again; writing the same again is safe",
                position=None,
            ) from error
        return Position.parse(answer["position"])

    def scan(self, wanted: Range, at_least: Position | None = None) -> Iterator[list[tuple[bytes, bytes]]]:
        request = {
            **wanted._asdict(),
            "at_least": _text(at_least),
            "consistency": self.consistency,
            "timeout_s": self.timeout_s,
        }
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


class LocalReader:
    """A store on disk that no process has open. Reading begins no epoch, so it changes no history.

    Of a store that belongs to a group, what is known to be committed is shown.
    """

    def __init__(self, path: str) -> None:
        self._engine = _open_engine(path)
        if not _has_peers(self._engine):
            self._engine.committer.advance()

    def get(self, keyspace: str, key: bytes, at_least: Position | None = None) -> bytes | None:
        from kvrep.runtime.checks import check_key, check_name

        self._check_reached(at_least)
        view = self._engine.view
        value: bytes | None = view.get(keyspace, view.admit(check_name(keyspace)), check_key(key))
        return value

    def scan(self, wanted: Range, at_least: Position | None = None) -> Iterator[list[tuple[bytes, bytes]]]:
        from kvrep.pairs import bounds
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

    def keyspaces(self) -> list[str]:
        return sorted({"default", *self._engine.view.keyspaces})

    def status(self) -> dict[str, Any]:
        from kvrep.runtime.reporting import status_of

        status = status_of(self.node()).to_json()
        return {**status, "role": "offline", "not_writable": "no process has it open", "primary_address": ""}

    def close(self) -> None:
        self._engine.close(CLOSE_S)

    def _check_reached(self, at_least: Position | None) -> None:
        if at_least is not None:
            self.node().freshness.wait_for(at_least, 0.0)

    def node(self) -> Node:
        """A node without a role: it answers questions, and starts nothing."""
        from kvrep.options import Options
        from kvrep.runtime.node import Node

        return Node(self._engine, Options(), None)


class LocalWriter:
    """A store on disk, opened as an application opens it. Any thread may use it.

    A store that belongs to a group is refused: its writes need the other nodes.
    """

    def __init__(self, path: str, *, create: bool, timeout_s: float) -> None:
        import kvrep

        if not create or (Path(path) / "STORE").is_file():
            check_alone(path)
        self._store = kvrep.open(path, create=create)
        self._timeout_s = timeout_s

    def write(self, ops: list[Op]) -> Position:
        with self._store.batch(timeout_s=self._timeout_s) as batch:
            for name, key, value in ops:
                space = self._store.keyspace(name)
                if value is None:
                    batch.delete(key, keyspace=space)
                else:
                    batch.put(key, value, keyspace=space)
        assert batch.position is not None
        return batch.position

    @property
    def store(self) -> Store:
        return self._store

    def close(self) -> None:
        self._store.close(CLOSE_S)


def _open_engine(path: str) -> Engine:
    """The store at ``path`` without a role; ``NotAStore`` or ``StoreInUse`` with a hint for the command."""
    from kvrep.options import Options
    from kvrep.storage.engine import Engine

    if not (Path(path) / "STORE").is_file():
        raise NotAStore(f"there is no store at {path}", path=path, hint="check the path")
    try:
        return Engine.open(Path(path), Options(create=False), lineage=b"")
    except StoreInUse as error:
        error.hint = "ask the node that has it open, by its address"
        raise


def check_alone(path: str) -> None:
    """Refuse to write a store that belongs to a group."""
    engine = _open_engine(path)
    try:
        if _has_peers(engine):
            raise NotPrimary(
                f"the store at {path} belongs to a group of nodes, so it is not written alone",
                hint="start it with 'kvrep serve' and write to the primary's address",
                primary_address=None,
                epoch=None,
            )
    finally:
        engine.close(CLOSE_S)


def _has_peers(engine: Engine) -> bool:
    """Whether somebody else may have a say in what this store holds."""
    configuration = engine.configuration
    if not configuration.voters:
        return not engine.home.lineage  # empty: either new, or a follower that has not joined yet
    others = [voter for voter in configuration.voters if voter.store_id != engine.home.store_id]
    return bool(others) or configuration.synchronous


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


def open_reader(args: argparse.Namespace) -> Reader:
    """The TARGET argument, opened for reading."""
    linearizable = getattr(args, "linearizable", False)
    if is_address(args.target):
        target = connect(args, args.target)
        target.consistency = "linearizable" if linearizable else "local"
        return target
    _check_path_flags(args)
    if linearizable:
        raise UsageError(f"{args.target} is a path: --linearizable asks a running node")
    return LocalReader(args.target)


def open_writer(args: argparse.Namespace) -> Writer:
    """The TARGET argument, opened for writing; ``--create`` makes a store at a path."""
    if is_address(args.target):
        if args.create:
            raise UsageError("--create is for a path; a running node has its store")
        return connect(args, args.target)
    _check_path_flags(args)
    return LocalWriter(args.target, create=args.create, timeout_s=args.timeout_s)


def _check_path_flags(args: argparse.Namespace) -> None:
    if args.token_file or args.tls_cert or args.tls_key or args.tls_ca:
        raise UsageError(f"{args.target} is a path: --token-file and --tls-… are for addresses")


def connect(args: argparse.Namespace, address: str) -> RemoteTarget:
    """A running node that has answered once, so that later failures mean what they say."""
    target = RemoteTarget(address, security(args), timeout_s=args.timeout_s)
    try:
        target.status()
    except BaseException:
        target.close()
        raise
    return target


def _text(position: Position | None) -> str | None:
    return None if position is None else str(position)
