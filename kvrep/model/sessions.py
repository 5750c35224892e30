"""Forwarded writes: who sent a record, and the table that answers a repeat with the first outcome.

The table is part of the state that the log adds up to: every node makes the same one from the same records,
so it survives restarts, failovers and bootstraps. It is bounded; what was forgotten is known by its offset,
so that "never happened" and "cannot be told any more" are never confused.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

from kvrep.errors import ProtocolError
from kvrep.model.position import OFFSET_MAX, Position

__all__ = ["OUTCOMES_MAX", "OUTCOMES_TOTAL_MAX", "SESSIONS_MAX", "Origin", "RequestId", "Sessions"]

SESSIONS_MAX = 1024
"""Sessions that the table knows; the one that wrote longest ago (in log order) is forgotten first."""
OUTCOMES_MAX = 1024
"""Writes of one session that may be without a known outcome at once, and that the table keeps."""
OUTCOMES_TOTAL_MAX = 65_536
"""Outcomes that the table keeps in all; it is written with every flush."""
STORE_ID_BYTES = 16


class Origin(NamedTuple):
    """Who forwarded a record; logged with it."""

    store_id: bytes
    session: int
    """Random, one per opening of that store."""
    sequence: int
    """1, 2, 3 … in its session. A repeat has the same one."""
    floor: int
    """The sender knows the outcome of everything below: the table need not keep it."""

    @classmethod
    def of(cls, value: Any) -> Origin:
        """From msgpack; :class:`ProtocolError` when it is something else."""
        if type(value) is list and len(value) == 4 and tuple(map(type, value)) == (bytes, int, int, int):
            store_id, *numbers = value
            session, sequence, floor = numbers
            small = all(0 <= n <= OFFSET_MAX for n in numbers)
            if len(store_id) == STORE_ID_BYTES and small and 0 < floor <= sequence < floor + OUTCOMES_MAX:
                return cls(store_id, session, sequence, floor)
        raise ProtocolError(f"not the origin of a forwarded write: {str(value)[:80]}")


class RequestId(NamedTuple):
    """Names a forwarded write whose position is not known; ``Store.resolve`` takes it."""

    store_id: bytes
    session: int
    sequence: int
    since: int
    """What the sender knew as committed before it sent anything: the write can only be above."""

    def __str__(self) -> str:
        return f"{self.store_id.hex()}-{self.session:x}-{self.sequence}-{self.since}"

    @classmethod
    def parse(cls, text: str) -> RequestId:
        """Read ``str()`` of one; ``ValueError`` when it is something else."""
        try:
            store_id, session, sequence, since = text.split("-")
            return cls(bytes.fromhex(store_id), int(session, 16), int(sequence), int(since))
        except ValueError:
            raise ValueError(f"not a request id: {text!r}") from None


class _Session:
    """What is kept of one session."""

    __slots__ = ("blind", "floor", "last", "outcomes")

    def __init__(self, blind: int, floor: int, last: int, outcomes: dict[int, Position]) -> None:
        self.blind = blind
        """At or below this offset it may have records that were forgotten."""
        self.floor = floor
        self.last = last
        """The offset of its newest record."""
        self.outcomes = outcomes


class Sessions:
    """Where forwarded writes were committed. Not thread-safe: it belongs to whoever publishes records."""

    __slots__ = ("_sessions", "_total", "forgotten")

    def __init__(self) -> None:
        self._sessions: dict[tuple[bytes, int], _Session] = {}
        """In the order of their newest record."""
        self._total = 0
        """Outcomes in all of them."""
        self.forgotten = 0
        """Of a session that is not in the table, nothing above this offset is in the log."""

    def __len__(self) -> int:
        return len(self._sessions)

    def note(self, origin: Origin, position: Position) -> None:
        """The record of ``origin`` is committed at ``position``. In log order."""
        key = (origin.store_id, origin.session)
        session = self._sessions.pop(key, None)
        if session is None:
            session = _Session(self.forgotten, origin.floor, 0, {})
        self._total -= len(session.outcomes)
        if origin.floor > session.floor:
            session.floor = origin.floor
            session.outcomes = {n: p for n, p in session.outcomes.items() if n >= origin.floor}
        session.last = position.offset
        if origin.sequence >= session.floor:
            session.outcomes[origin.sequence] = position
        self._total += len(session.outcomes)
        self._sessions[key] = session
        while len(self._sessions) > SESSIONS_MAX or self._total > OUTCOMES_TOTAL_MAX:
            oldest = self._sessions.pop(next(iter(self._sessions)))
            self._total -= len(oldest.outcomes)
            self.forgotten = max(self.forgotten, oldest.last)

    def note_all(self, records: Iterable[tuple[Origin, Position]]) -> None:
        for origin, position in records:
            self.note(origin, position)

    def find(self, store_id: bytes, session: int, sequence: int) -> Position | None:
        """Where that write is; ``None`` when it is not in the table."""
        found = self._sessions.get((store_id, session))
        return found.outcomes.get(sequence) if found is not None else None

    def knows(self, store_id: bytes, session: int, sequence: int, since: int) -> bool:
        """Whether a write that can only be above ``since`` would be in the table if it were in the log."""
        found = self._sessions.get((store_id, session))
        if found is None:
            return since >= self.forgotten
        return sequence >= found.floor and since >= found.blind

    # -- bytes -------------------------------------------------------------------------------------

    def to_wire(self) -> dict[str, Any]:
        return {
            "forgotten": self.forgotten,
            "sessions": [
                [
                    store_id,
                    session,
                    kept.blind,
                    kept.floor,
                    kept.last,
                    [[n, *position] for n, position in kept.outcomes.items()],
                ]
                for (store_id, session), kept in self._sessions.items()
            ],
        }

    @classmethod
    def from_wire(cls, data: Any) -> Sessions:
        """Read :meth:`to_wire`; an empty table for ``None``, as older versions left it.

        :class:`ProtocolError` when it is something else.
        """
        table = cls()
        if data is None:
            return table
        try:
            table.forgotten = data["forgotten"]
            _need_numbers(table.forgotten)
            for store_id, session, blind, floor, last, outcomes in data["sessions"]:
                if type(store_id) is not bytes or len(store_id) != STORE_ID_BYTES:
                    raise ValueError("not a store id")
                _need_numbers(session, blind, floor, last, *chain.from_iterable(outcomes))
                kept = {sequence: Position(epoch, offset) for sequence, epoch, offset in outcomes}
                table._sessions[(store_id, session)] = _Session(blind, floor, last, kept)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a table of forwarded writes: {error!r}") from error
        table._total = sum(len(kept.outcomes) for kept in table._sessions.values())
        return table

    def copy(self) -> Sessions:
        table = Sessions()
        table.forgotten, table._total = self.forgotten, self._total
        table._sessions = {
            key: _Session(kept.blind, kept.floor, kept.last, dict(kept.outcomes))
            for key, kept in self._sessions.items()
        }
        return table


def _need_numbers(*values: Any) -> None:
    """In C loops: there may be very many."""
    if {*map(type, values)} != {int} or min(values) < 0 or max(values) > OFFSET_MAX:
        raise ValueError("a number is out of range")
