"""Another kvrep store as a secondary: ``kvrep:path`` on this machine, ``kvrep://host:port,…`` a running group.

The copy is an independent store with a history of its own, for reading, or to take over by hand. (A follower
over a broker, ``kvrep.open(follow="amqp://…")``, is the one that has the same positions.)

The agent's own notes are in the keyspace ``kvrep-agent``, in the same record as the changes. One of them, the
*turn*, is a number that every record of the agent counts up, on condition that it is what the record before left.
So of two agents one is told, and what was sent without an answer cannot take effect behind what followed it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import msgpack

from kvrep.errors import (
    ClosedError,
    ConfigurationMismatch,
    Fenced,
    NotAStore,
    NotEnoughFollowers,
    NotPrimary,
    Overloaded,
    PeerUnavailable,
    RejectedChange,
    RolledBack,
    StorageFailed,
    StoreInUse,
    TransactionConflict,
    TransactionExpired,
    UnknownOutcome,
)
from kvrep.model.record import Op, write_payload
from kvrep.options import KEY_BYTES_MAX, check_keyspace_name
from kvrep.runtime.offline import check_alone
from kvrep.runtime.reads import fingerprint
from kvrep.sinks.interface import DeadLetter, Place, Sink
from kvrep.sinks.upstream import MESSAGE_BYTES_MAX
from kvrep.transport.faults import decode_fault

__all__ = ["NOTES", "LocalStore", "RemoteStore", "StoreSink"]

NOTES = "kvrep-agent"
_PLACE, _TURN, _SEEN, _LETTER, _MERGE = b"place", b"turn", b"seen/", b"letter/", b"merge"
WRITE_S = 30.0
ASK_S = 3.0
"""How long a node has to say whether it is primary."""
PIECE_KEYS = 1000
_PASSING = (
    NotPrimary,
    Fenced,
    NotEnoughFollowers,
    Overloaded,
    TransactionExpired,
    ClosedError,
    StorageFailed,
    UnknownOutcome,
    RolledBack,
)
"""Of a group: another node, or the same one a little later, takes what was refused or has no outcome yet."""


class _Target(Protocol):
    """The store that is written, here or elsewhere."""

    value_bytes_max: int
    lineage: str

    def get(self, keyspace: str, key: bytes) -> bytes | None: ...
    def scan(self, keyspace: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]: ...
    def keyspaces(self) -> list[str]: ...
    def write(self, ops: Sequence[Op], turn: bytes | None) -> None:
        """Atomic; :class:`TransactionConflict`, and nothing is written, where the turn is another one."""

    def close(self) -> None: ...


class LocalStore:
    """A store at a path, opened by this process: nobody else can write it meanwhile."""

    def __init__(self, path: str, **options: Any) -> None:
        """One of a group of nodes is refused: a second primary would come of it."""
        import kvrep

        if (Path(path) / "STORE").is_file():
            check_alone(path)
        elif not options.get("create", True):
            raise NotAStore(f"there is no secondary at {path}", path=path, hint="check the path")
        self._store = kvrep.open(path, **options)
        self.lineage = self._store.status().lineage
        self.value_bytes_max = kvrep.Options.of(options).value_bytes_max  # type: ignore[arg-type]

    def get(self, keyspace: str, key: bytes) -> bytes | None:
        return self._store.keyspace(keyspace).get(key)

    def scan(self, keyspace: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        return self._store.keyspace(keyspace).scan(prefix=prefix)

    def keyspaces(self) -> list[str]:
        return self._store.keyspaces()

    def write(self, ops: Sequence[Op], turn: bytes | None) -> None:
        del turn
        spaces = {name: self._store.keyspace(name) for name in {op[0] for op in ops}}
        with self._store.batch(timeout_s=WRITE_S) as batch:
            for name, key, value in ops:
                if value is None:
                    batch.delete(key, keyspace=spaces[name])
                else:
                    batch.put(key, value, keyspace=spaces[name])

    def close(self) -> None:
        self._store.close()


class RemoteStore:
    """The primary of another group, found once through any of its nodes: "host:port", or several with commas between.

    Without a primary another node is read, and nothing can be written. Writes are those of a node that forwards
    (``runtime/executing.py``): for one epoch, so they cannot reach a store that was fenced. What passes by itself,
    a change of roles above all, is :class:`PeerUnavailable`: whoever connects anew finds the primary of then.
    """

    value_bytes_max = 1 << 40

    def __init__(self, addresses: str, *, tls: Any = None, token: str | None = None) -> None:
        from kvrep.transport.network import GrpcTransport
        from kvrep.transport.security import Security

        self._addresses = addresses
        self._transport = GrpcTransport(
            security=Security(tls=tls, token=token), message_bytes_max=MESSAGE_BYTES_MAX
        )
        self._store_id, self._session, self._sequence = os.urandom(16), int.from_bytes(os.urandom(7)), 0
        self._problem = self.lineage = ""
        """Of a node that did not answer; of one that did."""
        address, self._epoch, self._since = self._find()
        self._connection = self._transport.connect(address, name="agent")

    def _find(self) -> tuple[str, int, int]:
        """Address, epoch (0: of a node that is no primary) and last committed offset of the newest primary."""
        left, asked, found = self._addresses.split(","), set[str](), ("", -1, 0)
        while left:
            address = left.pop(0)
            asked.add(address)
            try:
                standing = self._standing(address)
            except (PeerUnavailable, ClosedError, Overloaded) as error:
                self._problem = error.message
                continue
            self.lineage = bytes(standing["lineage"]).hex()
            found = max(
                found, (address, standing["primary_epoch"], standing["committed"]), key=lambda f: f[1]
            )
            elsewhere = standing["primary_address"]
            if elsewhere and elsewhere not in {*asked, *left}:
                left.append(elsewhere)
        if found[1] < 0:
            raise PeerUnavailable(self._problem, address=self._addresses)
        return found

    def _standing(self, address: str) -> dict[str, Any]:
        connection = self._transport.connect(address, name="agent")
        try:
            return connection.call("standing", {}, ASK_S)
        finally:
            connection.close()

    def _call(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        with self._passing():
            return self._connection.call(method, {"timeout_s": WRITE_S, **request}, WRITE_S + 2.0)

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """What another connection may do better."""
        try:
            yield
        except _PASSING as error:
            raise PeerUnavailable(error.message, address=self._connection.address) from error

    def get(self, keyspace: str, key: bytes) -> bytes | None:
        value: bytes | None = self._call("get", {"keyspace": keyspace, "key": key, "at_least": None})["value"]
        return value

    def scan(self, keyspace: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        request = {
            "keyspace": keyspace, "prefix": prefix, "start": None, "stop": None, "reverse": False,
            "limit": None, "at_least": None,
        }  # fmt: skip
        with self._passing():
            chunks = self._connection.scan(request, 3600.0)
            try:
                for chunk in chunks:
                    yield from chunk
            finally:
                chunks.close()

    def keyspaces(self) -> list[str]:
        names: list[str] = self._call("keyspaces", {})["keyspaces"]
        return names

    def write(self, ops: Sequence[Op], turn: bytes | None) -> None:
        if not self._epoch:
            also = f", and {self._problem}" if self._problem else ""
            raise PeerUnavailable(f"no primary answers at {self._addresses}{also}", address=self._addresses)
        self._sequence += 1
        condition = [[NOTES, _TURN, fingerprint(turn)]]
        item = [self._sequence, self._since, write_payload(list(ops)), condition, [], None, None]
        request = {
            "epoch": self._epoch, "store_id": self._store_id, "session": self._session,
            "floor": self._sequence, "items": [item],
        }  # fmt: skip
        [[kind, value]] = self._call("forward", request)["outcomes"]
        if kind == "refused":
            with self._passing():
                raise decode_fault(bytes(value))
        if kind != "done":  # the time was up first, or the session was forgotten there
            raise PeerUnavailable(f"{self._connection.address} cannot tell yet what became of a write",
                                  address=self._connection.address)  # fmt: skip
        self._since = int(value[1])

    def close(self) -> None:
        self._connection.close()


class StoreSink(Sink):
    """Changes, notes and place as one record. A snapshot is laid over the old copy, which is not whole meanwhile."""

    def __init__(self, url: str, connect: Any) -> None:
        """``connect()`` gives a :class:`LocalStore` or :class:`RemoteStore`, anew at each :meth:`open`;
        ``connect(create=False)`` one that is there already."""
        self.url = url
        self._connect = connect
        self._target: _Target | None = None
        self._turn: bytes | None = None
        self._pending: list[Op] = []
        self._merge = False
        self._numbered = 0

    def open(self) -> Place:
        with self._connecting() as target:
            place = self._place()
            if place is None and next(target.scan(NOTES), None) is None:
                self._need_empty(target)
        return place or Place()

    def look(self) -> Place:
        with self._connecting(create=False):
            place = self._place()
            if place is None:
                raise NotAStore(f"there is no secondary at {self.url}", path=self.url,
                                hint="no agent has written into that store: check the address")  # fmt: skip
        return place

    def hold(self) -> Place:
        return self._place() or Place()

    @property
    def own_lineage(self) -> str:
        return self._need().lineage

    @contextmanager
    def _connecting(self, **options: Any) -> Iterator[_Target]:
        """Connect anew; closed again if what is done first fails."""
        self.close()
        target: _Target = self._connect(**options)
        self._target = target
        try:
            # First: whoever writes while the rest is read makes the next record of ours be refused.
            self._turn = target.get(NOTES, _TURN)
            numbers = [int.from_bytes(key[len(_LETTER) :]) for key, _ in target.scan(NOTES, _LETTER)]
            self._numbered = max(numbers, default=0)
            self._merge = target.get(NOTES, _MERGE) is not None
            yield target
        except BaseException:
            self.close()
            raise

    def _need_empty(self, target: _Target) -> None:
        """The first snapshot would replace what others have put there."""
        for space in self.keyspaces():
            if next(target.scan(space), None) is not None:
                raise ConfigurationMismatch(
                    f"{self.url} holds data that no agent put there, in keyspace {space}", option="to",
                    given=self.url, hint="give a new or empty store: an agent replaces what is there",
                )  # fmt: skip

    def _place(self) -> Place | None:
        found = self._need().get(NOTES, _PLACE)
        if found is None:
            return None
        fields = msgpack.unpackb(found)
        return Place(**{**fields, "sequence": tuple(fields["sequence"])})

    def _need(self) -> _Target:
        if self._target is None:
            raise ClosedError("the sink is not open")
        return self._target

    def apply(self, ops: Sequence[Op]) -> None:
        self._check(ops)
        self._pending += ops

    def _check(self, ops: Sequence[Op]) -> None:
        limit = self._need().value_bytes_max
        for index, (keyspace, key, value) in enumerate(ops):
            wrong = ""
            if not check_keyspace_name(keyspace) or keyspace == NOTES:
                wrong = f"{keyspace!r} cannot be a keyspace here"
            elif not 1 <= len(key) <= KEY_BYTES_MAX:
                wrong = f"a key of {len(key)} bytes"
            elif value is not None and len(value) > limit:
                wrong = f"a value of {len(value)} bytes is above value_bytes_max={limit}"
            if wrong:
                raise RejectedChange(wrong, index=index, keyspace=keyspace, key=key)

    def stage(self, ops: Sequence[Op]) -> None:
        self._check(ops)
        self._pending += ops
        if self._merge:
            self._pending += [(NOTES, _seen(space, key), b"") for space, key, _ in ops]

    def unstage(self) -> None:
        self._flush()
        self._remove((NOTES, key) for key, _ in self._need().scan(NOTES, _SEEN))
        self._merge = True
        self._pending.append((NOTES, _MERGE, b""))

    def swap(self) -> None:
        """Piece by piece; the place says that the copy is whole only in the record after the last of them."""
        self._flush()
        target = self._need()
        if self._merge:
            for space in self.keyspaces():
                self._remove(
                    (space, key)
                    for key, _ in target.scan(space)
                    if target.get(NOTES, _seen(space, key)) is None
                )
            self._remove((NOTES, key) for key, _ in target.scan(NOTES, _SEEN))
        self._merge = False
        self._pending.append((NOTES, _MERGE, None))

    def _remove(self, keys: Iterable[tuple[str, bytes]]) -> None:
        piece: list[Op] = []
        for space, key in keys:
            piece.append((space, key, None))
            if len(piece) == PIECE_KEYS:
                self._write(piece)
                piece = []
        if piece:
            self._write(piece)

    def _flush(self) -> None:
        """What was staged since the last commit, before its place: laying it down twice changes nothing."""
        pending, self._pending = self._pending, []
        if pending:
            self._write(pending)

    def _write(self, ops: Sequence[Op]) -> None:
        turn = (int.from_bytes(self._turn or b"") + 1).to_bytes(8)
        try:
            self._need().write([*ops, (NOTES, _TURN, turn)], self._turn)
        except TransactionConflict as error:
            raise StoreInUse(
                f"another agent has moved the place in {self.url}", path=self.url, pid=None, host=None,
                hint="run one agent for each secondary",
            ) from error  # fmt: skip
        except UnknownOutcome as error:
            raise PeerUnavailable(f"{self.url}: {error.message}", address=self.url) from error
        self._turn = turn

    def commit(self, place: Place) -> None:
        self._pending.append((NOTES, _PLACE, msgpack.packb(asdict(place))))
        self._flush()

    def rollback(self) -> None:
        self._pending.clear()

    def bury(self, letter: DeadLetter) -> None:
        self._numbered += 1
        letter = replace(letter, number=self._numbered, time_us=letter.time_us or time.time_ns() // 1000)
        self._pending.append((NOTES, _letter(letter.number), msgpack.packb(asdict(letter))))

    def forget(self, numbers: Iterable[int]) -> None:
        self._pending += [(NOTES, _letter(number), None) for number in numbers]

    def dead_letters(self) -> list[DeadLetter]:
        return [DeadLetter(**msgpack.unpackb(data)) for _, data in self._need().scan(NOTES, _LETTER)]

    def keyspaces(self) -> list[str]:
        return [name for name in self._need().keyspaces() if name != NOTES]

    def scan(self, keyspace: str) -> Iterator[tuple[object, object]]:
        return self._need().scan(keyspace)

    def close(self) -> None:
        target, self._target = self._target, None
        self._pending.clear()
        if target is not None:
            target.close()


def _seen(keyspace: str, key: bytes) -> bytes:
    return _SEEN + blake2b(keyspace.encode() + b"/" + key, digest_size=16).digest()


def _letter(number: int) -> bytes:
    return _LETTER + number.to_bytes(8)
