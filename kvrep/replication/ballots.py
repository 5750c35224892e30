"""What nodes ask each other to find and to elect a primary, as values and as maps for unary calls.

Questions bind nobody; only a promise does. Everything that comes from a peer is checked when it is read.

========== ====================================================================================
purpose    meaning
========== ====================================================================================
``look``   who is primary, and where do you stand?
``stand``  would you promise an epoch to me? (pre-vote)
``lead``   I am primary in ``epoch`` (or, with ``begun`` false, about to be); ``would`` confirms
``resign`` I am no longer primary in ``epoch``: do not wait for a timeout
========== ====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from kvrep.errors import ProtocolError
from kvrep.model.position import EPOCH_MAX, OFFSET_MAX, ZERO, EpochTable, Position
from kvrep.replication.messages import Promise

__all__ = ["Answer", "PrimarySeen", "PromiseReply", "PromiseRequest", "Purpose", "Question"]

Purpose = Literal["look", "stand", "lead", "resign"]
Peers = tuple[tuple[str, str], ...]
"""(name, address), sorted."""

_PURPOSES = ("look", "stand", "lead", "resign")
_TEXT_MAX = 1024
_PEERS_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimarySeen:
    """A primary somebody knows of."""

    store_id: bytes
    name: str
    address: str
    epoch: int

    def to_wire(self) -> dict[str, Any]:
        return {"id": self.store_id, "name": self.name, "address": self.address, "epoch": self.epoch}

    @classmethod
    def from_wire(cls, data: object) -> PrimarySeen:
        """Read :meth:`to_wire`; :class:`ProtocolError` when it is something else."""
        m = _Map(data, "a primary")
        return cls(
            store_id=m.blob("id"), name=m.text("name"), address=m.text("address"), epoch=m.epoch("epoch")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Who asks, why, and what it holds. ``lineage`` is empty while it belongs to no group."""

    purpose: Purpose
    store_id: bytes
    name: str
    address: str
    lineage: bytes
    epoch: int = 0
    """With ``lead`` and ``resign`` the asker's own epoch."""
    last: Position = ZERO
    gone: bool = False
    """The asker has evidence that the primary's process is gone, not only silent."""
    begun: bool = False
    """With ``lead``: the epoch's first record is in the log, so it can be followed."""
    peers: Peers = ()
    """While the asker is empty: the group it was told to form."""

    def to_wire(self) -> dict[str, Any]:
        return {
            "purpose": self.purpose,
            "id": self.store_id,
            "name": self.name,
            "address": self.address,
            "lineage": self.lineage,
            "epoch": self.epoch,
            "last": list(self.last),
            "gone": self.gone,
            "begun": self.begun,
            "peers": [list(pair) for pair in self.peers],
        }

    @classmethod
    def from_wire(cls, data: object) -> Question:
        """Read :meth:`to_wire`; :class:`ProtocolError` when it is something else."""
        m = _Map(data, "a question")
        purpose = m.text("purpose")
        if purpose not in _PURPOSES:
            raise ProtocolError(f"a question of unknown purpose {purpose[:40]!r}")
        return cls(
            purpose=cast(Purpose, purpose),
            store_id=m.blob("id"),
            name=m.text("name"),
            address=m.text("address"),
            lineage=m.blob("lineage"),
            epoch=m.epoch("epoch"),
            last=m.position("last"),
            gone=m.flag("gone"),
            begun=m.flag("begun"),
            peers=m.peers("peers"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Where a node stands. It binds nobody."""

    store_id: bytes
    name: str
    address: str
    lineage: bytes
    promised_epoch: int
    last: Position = ZERO
    would: bool = False
    """``stand``: it would promise; ``lead``: it confirms the asker as its primary."""
    why: str = ""
    """Why not, for people."""
    able: bool = False
    """Whether it could become primary itself: a data voter whose copy is whole."""
    priority: int = 0
    member: int = 0
    witness: bool = False
    empty: bool = False
    """It holds nothing and belongs to no group."""
    alive: PrimarySeen | None = None
    """The primary that it has heard from within the limit, itself included."""
    peers: Peers = ()

    def to_wire(self) -> dict[str, Any]:
        return {
            "id": self.store_id,
            "name": self.name,
            "address": self.address,
            "lineage": self.lineage,
            "promised": self.promised_epoch,
            "last": list(self.last),
            "would": self.would,
            "why": self.why,
            "able": self.able,
            "priority": self.priority,
            "member": self.member,
            "witness": self.witness,
            "empty": self.empty,
            "alive": None if self.alive is None else self.alive.to_wire(),
            "peers": [list(pair) for pair in self.peers],
        }

    @classmethod
    def from_wire(cls, data: object) -> Answer:
        """Read :meth:`to_wire`; :class:`ProtocolError` when it is something else."""
        m = _Map(data, "an answer")
        alive = m.get("alive")
        return cls(
            store_id=m.blob("id"),
            name=m.text("name"),
            address=m.text("address"),
            lineage=m.blob("lineage"),
            promised_epoch=m.epoch("promised"),
            last=m.position("last"),
            would=m.flag("would"),
            why=m.text("why"),
            able=m.flag("able"),
            priority=m.number("priority", -(2**31), 2**31),
            member=m.number("member", 0, 1000),
            witness=m.flag("witness"),
            empty=m.flag("empty"),
            alive=None if alive is None else PrimarySeen.from_wire(alive),
            peers=m.peers("peers"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromiseRequest:
    """Asks for a durable promise to refuse every epoch below ``epoch``."""

    epoch: int
    store_id: bytes
    name: str
    address: str
    lineage: bytes
    peers: Peers = ()
    """While a group is formed (``lineage`` is empty): the list that both must have been given."""
    planned: bool = False
    """A switchover or a promotion by hand: to be granted although a primary is alive."""

    def to_wire(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "id": self.store_id,
            "name": self.name,
            "address": self.address,
            "lineage": self.lineage,
            "peers": [list(pair) for pair in self.peers],
            "planned": self.planned,
        }

    @classmethod
    def from_wire(cls, data: object) -> PromiseRequest:
        """Read :meth:`to_wire`; :class:`ProtocolError` when it is something else."""
        m = _Map(data, "a request for a promise")
        return cls(
            epoch=m.epoch("epoch"),
            store_id=m.blob("id"),
            name=m.text("name"),
            address=m.text("address"),
            lineage=m.blob("lineage"),
            peers=m.peers("peers"),
            planned=m.flag("planned"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromiseReply:
    """``promise`` is set when it was given, durably; else ``refused`` says why."""

    store_id: bytes
    promised_epoch: int
    promise: Promise | None = None
    refused: str = ""
    alive: PrimarySeen | None = None

    def to_wire(self) -> dict[str, Any]:
        promise = self.promise
        return {
            "id": self.store_id,
            "promised": self.promised_epoch,
            "promise": None
            if promise is None
            else {
                "epoch": promise.epoch,
                "last": list(promise.last),
                "committed": promise.committed,
                "epochs": [list(pair) for pair in promise.epochs],
                "lowered": list(promise.lowered),
            },
            "refused": self.refused,
            "alive": None if self.alive is None else self.alive.to_wire(),
        }

    @classmethod
    def from_wire(cls, data: object) -> PromiseReply:
        """Read :meth:`to_wire`; :class:`ProtocolError` when it is something else."""
        m = _Map(data, "a reply to a request for a promise")
        promise, alive = m.get("promise"), m.get("alive")
        return cls(
            store_id=m.blob("id"),
            promised_epoch=m.epoch("promised"),
            promise=None if promise is None else _promise(promise),
            refused=m.text("refused"),
            alive=None if alive is None else PrimarySeen.from_wire(alive),
        )


def _promise(data: object) -> Promise:
    m = _Map(data, "a promise")
    last, committed = m.position("last"), m.number("committed", 0, OFFSET_MAX)
    try:
        epochs = EpochTable(m.get("epochs"))
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"a promise with a bad epoch table: {error}") from error
    if epochs.last_epoch != last.epoch or epochs.epoch_at(last.offset) != last.epoch:
        raise ProtocolError(f"a promise whose epoch table does not end at {last}")
    if committed > last.offset:
        raise ProtocolError(f"a promise with {committed} committed of {last.offset}")
    return Promise(
        epoch=m.epoch("epoch"), last=last, committed=committed, epochs=epochs, lowered=m.position("lowered")
    )


class _Map:
    """A map from a peer, read field by field; every complaint is a :class:`ProtocolError`."""

    def __init__(self, data: object, what: str) -> None:
        if not isinstance(data, Mapping):
            raise ProtocolError(f"{what} is not a map")
        self._data = data
        self._what = what

    def get(self, name: str) -> Any:
        if name not in self._data:
            raise self._bad(name, "is missing")
        return self._data[name]

    def text(self, name: str) -> str:
        value = self.get(name)
        if type(value) is not str or len(value) > _TEXT_MAX:
            raise self._bad(name, "is not a short text")
        return value

    def blob(self, name: str) -> bytes:
        value = self.get(name)
        if type(value) is not bytes or len(value) > 64:
            raise self._bad(name, "is not a short byte string")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if type(value) is not bool:
            raise self._bad(name, "is not a truth value")
        return value

    def number(self, name: str, low: int, high: int) -> int:
        value = self.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self._bad(name, f"is not in {low}..{high}")
        return value

    def epoch(self, name: str) -> int:
        return self.number(name, 0, EPOCH_MAX)

    def position(self, name: str) -> Position:
        value = self.get(name)
        try:
            epoch, offset = value
        except (TypeError, ValueError):
            raise self._bad(name, "is not a position") from None
        if not (type(epoch) is int is type(offset) and 0 <= epoch <= EPOCH_MAX and 0 <= offset <= OFFSET_MAX):
            raise self._bad(name, "is not a position")
        return Position(epoch, offset)

    def peers(self, name: str) -> Peers:
        value = self.get(name)
        if not isinstance(value, list | tuple) or len(value) > _PEERS_MAX:
            raise self._bad(name, "is not a short list")
        found: list[tuple[str, str]] = []
        for pair in value:
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and {*map(type, pair)} == {str}):
                raise self._bad(name, "is not a list of names and addresses")
            found.append((pair[0], pair[1]))
        return tuple(found)

    def _bad(self, name: str, why: str) -> ProtocolError:
        return ProtocolError(f"{self._what} whose {name} {why}")
