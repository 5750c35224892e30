"""Which offset is committed.

An offset is committed when this node's own copy is durable through it, W data voters (this node
included) have it synced, and it is not below the first record of this epoch: records of older epochs
commit only through one of this epoch (Raft, section 5.4.2), because a copy count alone does not protect
them from a rival with a newer epoch.

A configuration that is proposed at offset c changes W and the voters: offsets from c on need both the old
rule and the new one, until c is committed; from then on only the new one.

With ``acks=0`` W is 1, so nothing says how far the others may be behind. With ``lag_records_max`` an offset is
committed only when, besides, the furthest other data voter has all but so many of the records through it. A
voter that has left keeps its copy, so what it confirmed in this epoch still counts for that; it counts for
nothing else, and until the epoch's first ack nothing is known of anybody.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from kvrep.model.configuration import Configuration

__all__ = ["CommitTracker", "Level"]

Level = Literal["written", "synced", "visible"]


class _Rule:
    """One configuration, prepared for counting.

    Asynchronous (``acks=0``) is no special case: W is 1, and our own copy is that one. Unless this node is
    no data voter: then the copy of one is waited for, because a promotion fences only voters.
    """

    __slots__ = ("configuration", "index", "others", "slack", "voters", "wanted")

    def __init__(self, configuration: Configuration, store_id: bytes) -> None:
        self.configuration = configuration
        self.voters = tuple(v.store_id for v in configuration.voters if v.counts) or (store_id,)
        """The data voters, the only stores whose copies count; this one where none is listed."""
        self.wanted = configuration.copies_wanted
        self.index = len(self.voters) - configuration.copies
        """Of d synced offsets in ascending order, the one that W of them have reached."""
        self.others = tuple(
            v.store_id for v in configuration.voters if not v.witness and v.store_id != store_id
        )
        """Those of whom one may be the next primary."""
        self.slack = configuration.lag_records_max if self.others else 0
        """How far an offset may be ahead of all of these; 0: there is no bound."""

    def reached(self, synced: dict[bytes, int]) -> int:
        get = synced.get
        return sorted([get(i, 0) for i in self.voters])[self.index]

    def present(self, stores: Collection[bytes]) -> int:
        return sum(i in stores for i in self.voters)

    def missing(self, stores: Collection[bytes]) -> int:
        """How many copies a user's write lacks when only these can store one."""
        return max(0, self.wanted - self.present(stores))


class _BoundedRule(_Rule):
    """The same with ``lag_records_max``; of its own, so that no other rule pays for it."""

    __slots__ = ("_kept",)

    def __init__(self, configuration: Configuration, store_id: bytes, kept: dict[bytes, int]) -> None:
        super().__init__(configuration, store_id)
        self._kept = kept
        """What voters had synced when they left."""

    def reached(self, synced: dict[bytes, int]) -> int:
        return min(super().reached(synced), self.furthest(synced) + self.slack)

    def furthest(self, synced: dict[bytes, int]) -> int:
        """The last offset that some other data voter holds; 0 while that is not known."""
        kept = self._kept
        return max([synced[i] if i in synced else kept.get(i, 0) for i in self.others])


class CommitTracker:
    """One per epoch of this node as primary. Invariant: ``committed`` never goes back.

    Tell it of acks only from streams of this epoch whose join was verified, and of ``left`` before
    another stream of the same store joins.
    """

    __slots__ = (
        "_durable",
        "_effective",
        "_kept",
        "_others",
        "_proposed",
        "_self",
        "_slack",
        "_synced",
        "committed",
        "epoch_start",
    )

    def __init__(
        self,
        configuration: Configuration,
        store_id: bytes,
        *,
        epoch_start: int,
        committed: int,
        proposed: tuple[int, Configuration] | None = None,
    ) -> None:
        """``proposed`` is a configuration that the log holds, at an offset not known to be committed.

        If the log holds several, the last is the proposed one and the one before it the effective one:
        nobody proposes before the one before is committed.
        """
        self._self = store_id
        self._kept: dict[bytes, int] = {}
        """What voters that left had synced then. They keep it, which only the bound on the lag asks for."""
        self._effective = self._rule(configuration)
        self._proposed: list[tuple[int, _Rule]] = []
        self._slack = self._effective.slack
        """How far what is committed may be ahead of an ack that moves it: the most under any rule."""
        self._durable = 0
        self._synced: dict[bytes, int] = {}
        self._others: dict[bytes, tuple[int, int]] = {}
        """(written, visible) per follower; never part of the commit rule."""
        self.epoch_start = epoch_start
        self.committed = committed
        if proposed is not None:
            self.propose(*proposed)

    # The two events on the path of every write.

    def local_durable(self, offset: int) -> int:
        """Our own copy is durable through ``offset``; returns what is committed now."""
        if offset > self._durable:
            self._durable = self._synced[self._self] = offset
            return self._advance()
        return self.committed

    def acked(self, store_id: bytes, synced: int, written: int = 0, visible: int = 0) -> int:
        """A follower confirmed so much; returns what is committed now."""
        self._others[store_id] = (written, visible)
        self._synced[store_id] = synced
        return self._advance() if synced + self._slack > self.committed else self.committed

    def _advance(self) -> int:
        reached = min(self._durable, self._effective.reached(self._synced))
        for offset, rule in self._proposed:
            if reached < offset:
                break
            reached = max(min(reached, rule.reached(self._synced)), offset - 1)
        if reached <= self.committed or reached < self.epoch_start:
            return self.committed
        self.committed = reached
        if self._proposed and reached >= self._proposed[0][0]:
            self._effective = self._proposed.pop(0)[1]
            self._note_slack()
            return self._advance()
        return reached

    def left(self, store_id: bytes) -> None:
        """A stream ended: its acks no longer count. What was committed stays committed."""
        synced = self._synced.pop(store_id, None)
        self._others.pop(store_id, None)
        if synced is not None and any(store_id in rule.others for rule in self._rules()):
            self._kept[store_id] = synced

    def forget(self, store_id: bytes, above: int = 0) -> None:
        """A voter that had left does not hold any more what it confirmed ``above`` that offset: it is given
        another copy, or comes back with less."""
        if self._kept.get(store_id, 0) > above:
            self._kept[store_id] = above

    # Configurations.

    def _rule(self, configuration: Configuration) -> _Rule:
        rule = _Rule(configuration, self._self)
        return _BoundedRule(configuration, self._self, self._kept) if rule.slack else rule

    def _rules(self) -> list[_Rule]:
        return [self._effective, *(rule for _, rule in self._proposed)]

    def _note_slack(self) -> None:
        self._slack = max(rule.slack for rule in self._rules())

    def propose(self, offset: int, configuration: Configuration) -> None:
        """The log holds a new configuration at ``offset``. Call it before that offset can commit.

        ``ValueError`` when another is not committed yet, or the offset is committed already. One that goes on
        without voters may stand behind others, which perhaps can never commit.
        """
        if self._proposed and not configuration.away:
            raise ValueError(f"the configuration at {self._proposed[-1][0]} is not committed yet")
        if offset <= self.committed:
            raise ValueError(f"offset {offset} is committed already")
        self._proposed.append((offset, self._rule(configuration)))
        self._note_slack()

    def proposed_reached(self) -> int:
        """How far the newest proposed rule by itself would let us commit; 0 without one."""
        if not self._proposed:
            return 0
        return min(self._durable, self._proposed[-1][1].reached(self._synced))

    def effect(self) -> int:
        """The newest proposed configuration takes effect although the rules before it were not met, because
        most voters have stored that it may; returns what is committed now."""
        if self._proposed:
            self._effective = self._proposed[-1][1]
            self._proposed.clear()
            self._note_slack()
            return self._advance()
        return self.committed

    @property
    def may_propose(self) -> bool:
        """Whether a new configuration may be logged: none is on its way, and this epoch's start, hence every
        configuration before it, is committed."""
        return not self._proposed and self.committed >= self.epoch_start

    @property
    def configuration(self) -> Configuration:
        """The one in effect."""
        return self._effective.configuration

    @property
    def proposed(self) -> tuple[int, Configuration] | None:
        """(offset, configuration) of the newest one that is not committed yet."""
        return (self._proposed[-1][0], self._proposed[-1][1].configuration) if self._proposed else None

    @property
    def rules(self) -> tuple[Configuration, ...]:
        """The one in effect, and those that are not committed yet."""
        return tuple(rule.configuration for rule in self._rules())

    # What the door asks before a user's write is logged.

    def missing(self, connected: Collection[bytes]) -> int:
        """How many more copies a user's write needs than this node and ``connected`` can make."""
        stores = {self._self, *connected}
        missing = self._effective.missing(stores)
        for _, rule in self._proposed:
            missing = max(missing, rule.missing(stores))
        return missing

    @property
    def bounded(self) -> bool:
        """Whether some rule says how far a record may be ahead of the other voters."""
        return self._slack > 0

    def too_far(self, connected: Collection[bytes], offset: int) -> tuple[int, int] | None:
        """(the last offset that some other voter is known to hold, how far ahead of it is allowed), where a
        record at ``offset`` is further ahead and nobody who could catch up is ``connected``; else ``None``."""
        for rule in self._rules():
            if isinstance(rule, _BoundedRule) and not any(i in connected for i in rule.others):
                furthest = rule.furthest(self._synced)
                if offset > furthest + rule.slack:
                    return furthest, rule.slack
        return None

    def reachable(self, connected: Collection[bytes]) -> int:
        """How many copies that count this node and ``connected`` can make."""
        return self._effective.present({self._self, *connected})

    # Writes that ask for more than the rule.

    def copies_at(self, offset: int, level: Level) -> int:
        """How many data voters, this node included, hold ``offset`` at ``level``."""
        return sum(self._at(i, level) >= offset for i in self._effective.voters)

    def _at(self, store_id: bytes, level: Level) -> int:
        if store_id == self._self:
            return self.committed if level == "visible" else self._durable
        if level == "synced":
            return self._synced.get(store_id, 0)
        written, visible = self._others.get(store_id, (0, 0))
        return visible if level == "visible" else written
