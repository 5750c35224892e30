"""The configuration: the record in the log that says who votes and what an acknowledgement needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvrep.errors import ProtocolError
from kvrep.model.position import EPOCH_MEMBERS, OFFSET_MAX

__all__ = ["OPEN", "Acks", "Configuration", "Voter", "in_force"]

OPEN = 0
"""The end of an unprotected span that goes on."""
_HERE = -1
"""The end of a span that the record with this configuration ends; see :meth:`Configuration.at`."""
SPANS_MAX = 16
"""Unprotected spans that are remembered."""

Acks = int | Literal["majority", "all"]
"""``0``: asynchronous; ``N``: N followers beside the primary; ``"majority"`` of the voters; ``"all"``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Voter:
    """A store whose acks and promises count. A witness keeps no data: only its promises count.

    The same holds of one that is ``away``, for as long as the ack rule goes on without it.
    """

    store_id: bytes
    name: str
    member: int
    """1..999, never used again for another store: it makes the voter's epochs its own."""
    address: str = ""
    priority: int = 0
    witness: bool = False
    away: bool = False

    @property
    def counts(self) -> bool:
        """Whether its copy of a record counts."""
        return not self.witness and not self.away


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Immutable; every change is a new record in the log.

    The numbers follow from it alone (d = data voters that are not away, v = all voters, W = copies a commit
    needs, the primary's included):

    ========== ================= =============================
    acks       W                 fence F = d - W + 1
    ========== ================= =============================
    0          1                 d
    N          min(N + 1, d)     d - W + 1
    majority   v // 2 + 1 (<= d) d - W + 1
    all        d                 1
    ========== ================= =============================

    Any F data voters meet every set of W that can have acknowledged a write, since F + W > d.
    """

    acks: Acks = 0
    ack_timeout_s: float = 5.0
    voters: tuple[Voter, ...] = ()
    next_member: int = 1
    removed: tuple[bytes, ...] = ()
    """Stores that were taken off the voters by hand: they are made voters again by hand only."""
    degrade_after_s: float = 0.0
    """How long too few voters may be there before the rule goes on without those that are not; 0: for ever."""
    unprotected: tuple[tuple[int, int], ...] = ()
    """(from, to): what was acknowledged with fewer copies than ``acks`` asks for, the newest span last. ``to``
    is ``OPEN`` while it goes on."""
    lag_records_max: int = 0
    """With ``acks=0``: how many records the newest one that is acknowledged may be ahead of the furthest other
    data voter; 0: there is no bound."""

    def __post_init__(self) -> None:
        check_acks(self.acks)
        if not 0.001 <= self.ack_timeout_s <= 86_400:
            raise ValueError(f"ack_timeout_s must be 0.001 to 86400 (a day), not {self.ack_timeout_s!r}")
        # Whole milliseconds, as the log keeps them.
        object.__setattr__(self, "ack_timeout_s", round(self.ack_timeout_s * 1000) / 1000)
        if not 0 <= self.degrade_after_s <= 86_400:
            raise ValueError(f"degrade_after_s must be 0 to 86400 (a day), not {self.degrade_after_s!r}")
        if self.degrade_after_s and self.acks == 0:
            raise ValueError("degrade_after_s lowers a rule that waits for followers; acks=0 does not")
        object.__setattr__(self, "degrade_after_s", round(self.degrade_after_s * 1000) / 1000)
        if type(self.lag_records_max) is not int or not 0 <= self.lag_records_max <= OFFSET_MAX:
            raise ValueError(
                f"lag_records_max must be a whole number from 0 on, not {self.lag_records_max!r}"
            )
        if self.lag_records_max and self.acks != 0:
            raise ValueError(
                f"lag_records_max bounds what acks=0 may lose, and acks={self.acks!r} loses nothing: make it 0"
            )
        if type(self.next_member) is not int or not 0 < self.next_member <= EPOCH_MEMBERS:
            raise ValueError(f"next_member {self.next_member!r} is not in 1..{EPOCH_MEMBERS}")
        if any(not 0 < v.member < self.next_member for v in self.voters):
            raise ValueError("a voter's member number is out of range")
        for what in ("store_id", "name", "member"):
            if len({getattr(v, what) for v in self.voters}) != len(self.voters):
                raise ValueError(f"two voters have the same {what}")

    @property
    def data_voters(self) -> int:
        return sum(v.counts for v in self.voters)

    @property
    def away(self) -> tuple[Voter, ...]:
        """The voters that the rule goes on without."""
        return tuple(v for v in self.voters if v.away)

    @property
    def copies_wanted(self) -> int:
        """Copies a user's write needs, the primary's included; may exceed the voters there are."""
        wanted = self._copies_by_rule
        return max(1, min(wanted, self.data_voters)) if self.away else wanted

    @property
    def _copies_by_rule(self) -> int:
        if self.acks == "majority":
            return max(1, len(self.voters) // 2 + 1)
        if self.acks == "all":
            return max(1, sum(not v.witness for v in self.voters))
        assert isinstance(self.acks, int)
        return self.acks + 1

    @property
    def copies(self) -> int:
        """W: copies a record needs to be committed; never more than there are data voters."""
        return max(1, min(self.copies_wanted, self.data_voters))

    @property
    def fence(self) -> int:
        """F: data voters, itself included, that a promotion must fence."""
        return max(1, self.data_voters - self.copies + 1)

    @property
    def synchronous(self) -> bool:
        return self.acks != 0

    def voter(self, store_id: bytes) -> Voter | None:
        return next((v for v in self.voters if v.store_id == store_id), None)

    def named(self, name: str) -> Voter | None:
        return next((v for v in self.voters if v.name == name), None)

    def need(self, name: str) -> Voter:
        """The voter of that name; ``ValueError`` when there is none."""
        voter = self.named(name)
        if voter is None:
            raise ValueError(f"{name!r} is not a voter; they are {', '.join(v.name for v in self.voters)}")
        return voter

    def with_voter(
        self, store_id: bytes, name: str, address: str = "", *, witness: bool = False
    ) -> Configuration:
        """This configuration and one more voter, with the next free member number.

        ``ValueError`` when the name is another voter's or all member numbers are used up.
        """
        if self.named(name) is not None:
            raise ValueError(f"there is a voter named {name!r} already")
        if self.next_member >= EPOCH_MEMBERS:
            raise ValueError(f"all {EPOCH_MEMBERS - 1} member numbers are used up")
        voter = Voter(store_id=store_id, name=name, member=self.next_member, address=address, witness=witness)
        removed = tuple(i for i in self.removed if i != store_id)
        return replace(self, voters=(*self.voters, voter), next_member=self.next_member + 1, removed=removed)

    def without_voter(self, store_id: bytes) -> Configuration:
        voters = tuple(v for v in self.voters if v.store_id != store_id)
        removed = (*(i for i in self.removed if i != store_id), store_id)[-EPOCH_MEMBERS:]
        return replace(self, voters=voters, removed=removed)._spanned()

    def without(self, stores: Collection[bytes], first: int) -> Configuration:
        """The rule goes on without the copies of ``stores``: what is logged from ``first`` on needs none."""
        voters = tuple(replace(v, away=v.away or v.store_id in stores) for v in self.voters)
        spans = self.unprotected
        if not spans or spans[-1][1] != OPEN:
            spans = (*spans, (first, OPEN))[-SPANS_MAX:]
        return replace(self, voters=voters, unprotected=spans)

    def with_copy_of(self, store_id: bytes) -> Configuration:
        """The copy of a voter that was away counts again."""
        return self.changed(store_id, away=False)._spanned()

    def with_all_copies(self) -> Configuration:
        """Nobody is away any more."""
        return replace(self, voters=tuple(replace(v, away=False) for v in self.voters))._spanned()

    def _spanned(self) -> Configuration:
        """With nobody away, the unprotected span ends with the record before that of this configuration."""
        if self.away or not self.unprotected or self.unprotected[-1][1] != OPEN:
            return self
        return replace(self, unprotected=(*self.unprotected[:-1], (self.unprotected[-1][0], _HERE)))

    def at(self, offset: int) -> Configuration:
        """As the record at ``offset`` means it: what it could not know before it had its place is filled in."""
        if not self.unprotected or self.unprotected[-1][1] != _HERE:
            return self
        first = self.unprotected[-1][0]
        return replace(self, unprotected=(*self.unprotected[:-1], (first, max(first, offset) - 1)))

    def changed(self, store_id: bytes, **changes: Any) -> Configuration:
        """This configuration with other fields (``address``, ``priority``, …) of one voter."""
        voters = tuple(replace(v, **changes) if v.store_id == store_id else v for v in self.voters)
        return self if voters == self.voters else replace(self, voters=voters)

    def to_wire(self) -> dict[str, Any]:
        seldom: dict[str, Any] = {
            "removed": list(self.removed),
            "degrade_after_ms": round(self.degrade_after_s * 1000),
            "away": [v.store_id for v in self.away],
            "unprotected": [list(span) for span in self.unprotected],
            "lag_records_max": self.lag_records_max,
        }
        return {
            **{name: value for name, value in seldom.items() if value},
            "acks": self.acks,
            "ack_timeout_ms": round(self.ack_timeout_s * 1000),
            "next_member": self.next_member,
            "voters": [[v.store_id, v.name, v.member, v.address, v.priority, v.witness] for v in self.voters],
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Configuration:
        """Read :meth:`to_wire`; :class:`ProtocolError` when it is something else."""
        try:
            voters = tuple(_voter(*fields) for fields in data["voters"])
            away = _stores(data, "away")
            if away:
                voters = tuple(replace(v, away=v.store_id in away) for v in voters)
            return cls(
                acks=data["acks"],
                ack_timeout_s=data["ack_timeout_ms"] / 1000,
                voters=voters,
                next_member=data["next_member"],
                removed=_stores(data, "removed"),
                degrade_after_s=data.get("degrade_after_ms", 0) / 1000,
                unprotected=tuple(_span(*span) for span in data.get("unprotected", ())),
                lag_records_max=data.get("lag_records_max", 0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a configuration: {error}") from error


def in_force(
    logged: Sequence[tuple[int, Configuration]], committed: int
) -> tuple[Configuration, tuple[int, Configuration] | None]:
    """The configuration in effect, and the one (with its offset) that is perhaps not committed yet.

    ``logged``: (offset, configuration) as the log holds them, at least one. The commit mark lags, so what
    lies above ``committed`` is taken for uncommitted. Nobody proposes before the one before is committed:
    only the last one can be uncommitted, and the one before it is in effect. (One that goes on without voters
    may stand behind another; then it alone comes into force, or all do.)
    """
    distinct: list[tuple[int, Configuration]] = []
    for offset, configuration in logged:
        if not distinct or distinct[-1][1] != configuration:
            distinct.append((offset, configuration))
    offset, newest = distinct[-1]
    if len(distinct) == 1 or offset <= committed or not distinct[-2][1].voters:
        return newest, None
    return distinct[-2][1], (offset, newest)


def _voter(store_id: Any, name: Any, member: Any, address: Any, priority: Any, witness: Any) -> Voter:
    """A voter from the wire; ``TypeError`` rather than a conversion when a field is something else."""
    fields = (store_id, name, member, address, priority, witness)
    if tuple(map(type, fields)) != (bytes, str, int, str, int, bool):
        raise TypeError(f"not a voter: {str(fields)[:80]}")
    return Voter(
        store_id=store_id, name=name, member=member, address=address, priority=priority, witness=witness
    )


def _stores(data: Mapping[str, Any], name: str) -> tuple[bytes, ...]:
    """Store ids from the wire, none if the field is missing."""
    stores = tuple(data.get(name, ()))
    if any(type(i) is not bytes for i in stores):
        raise TypeError(f"{name}: not store ids")
    return stores


def _span(first: Any, last: Any) -> tuple[int, int]:
    if type(first) is not int or type(last) is not int or last < _HERE:
        raise TypeError(f"not a span: {str((first, last))[:80]}")
    return first, last


def check_acks(acks: object) -> None:
    """``ValueError`` unless ``acks`` is a count of followers, ``"majority"`` or ``"all"``."""
    if acks in ("majority", "all"):
        return
    if isinstance(acks, bool) or not isinstance(acks, int) or not 0 <= acks < EPOCH_MEMBERS:
        raise ValueError(f'acks must be 0, a number of followers, "majority" or "all", not {acks!r}')
