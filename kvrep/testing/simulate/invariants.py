"""What must hold after every step, whatever happens. Checked against a memory that no fault reaches.

The checks ask disks and logs directly, not the code that decides, so they do not share its mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvrep.model.position import EpochTable, Position
from kvrep.model.record import Kind
from kvrep.testing.simulate.disk import Entry, apply

if TYPE_CHECKING:
    from kvrep.model.configuration import Configuration
    from kvrep.replication.messages import Ack
    from kvrep.testing.simulate.node import Node

__all__ = ["Invariants", "Violation"]


class Violation(AssertionError):
    """A promise is broken."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


class _Begun:
    """An epoch: whose it is, where it starts, and the history before it."""

    __slots__ = ("acked", "acknowledged", "epoch", "epochs", "name", "start")

    def __init__(self, name: str, epoch: int, start: int, epochs: EpochTable) -> None:
        self.name = name
        self.epoch = epoch
        self.start = start
        self.epochs = epochs
        self.acked = 0
        """Through where another voter has ever said, in this epoch, that it holds its history."""
        self.acknowledged = 0
        """Through where it was acknowledged to users."""

    def at(self, offset: int) -> Position:
        """The record at ``offset`` of its history."""
        return Position(self.epoch if offset >= self.start else self.epochs.epoch_at(offset), offset)

    def holds(self, position: Position) -> bool:
        return position.offset < self.start and self.epochs.epoch_at(position.offset) == position.epoch


class Invariants:
    """``synchronous``: the ack rule is not 0, so nothing committed may ever be lost. Else ``lag_records_max``
    bounds what may be; 0: it does not."""

    def __init__(self, *, synchronous: bool, lag_records_max: int = 0) -> None:
        self.synchronous = synchronous
        self._lag_records_max = lag_records_max
        self.ledger: dict[int, Entry] = {}
        """What any primary ever took for committed, by offset."""
        self.acknowledged: dict[int, tuple[float, int]] = {}
        """(when, epoch) of every write that returned, by its value."""
        self.newest = (0.0, 0)
        """The last of them."""
        self._end = 0
        self._committed_in: dict[int, int] = {}
        """The epoch in which a record was committed first, by its offset."""
        self._written: dict[Position, int] = {}
        self._begun: dict[int, _Begun] = {}
        self._promised: dict[bytes, int] = {}
        self._given: dict[tuple[bytes, int], bytes] = {}

    # -- one primary per epoch ---------------------------------------------------------------------

    def begins(self, node: Node, epoch: int, start: int) -> None:
        """``node`` has just become primary; its epoch start is at ``start``."""
        rival = self._begun.get(epoch)
        if rival is not None:
            raise Violation("one primary per epoch", f"{node.name} and {rival.name} in epoch {epoch}")
        begun = self._begun[epoch] = _Begun(node.name, epoch, start, node.disk.epochs.cut(start - 1))
        for older in self._begun.values():
            self._bounded(older, begun)
        # Raft's leader completeness (Ongaro, section 3.6.3): what was committed in epochs below. A primary that
        # was frozen after it got its promises may begin late, and lack what a newer epoch has committed.
        end = self._end
        while end and self._committed_in[end] >= epoch:
            end -= 1
        if not self.synchronous or not end:
            return
        lost = self._first_lost(node, end)
        if lost:
            entry = self.ledger[lost]
            raise Violation(
                "no committed record is lost",
                f"{node.name} becomes primary in epoch {epoch} without record {entry.record.position},"
                f" which was committed (its log ends at {start - 1})",
            )

    def _first_lost(self, node: Node, end: int) -> int:
        disk = node.disk
        if disk.running_at(end) == self.ledger[end].running or end < disk.first:
            return 0
        return next(
            (o for o in range(disk.first, end + 1) if disk.running_at(o) != self.ledger[o].running), 0
        )

    def _bounded(self, older: _Begun, newer: _Begun) -> None:
        """A failover onto all that the furthest other voter ever said it held loses so many records at most."""
        allowed = self._lag_records_max
        kept = older.acknowledged - allowed
        if not allowed or older.epoch >= newer.epoch or kept <= 0 or not newer.holds(older.at(older.acked)):
            return
        if not newer.holds(older.at(kept)):
            raise Violation(
                "a failover loses no more than its bound",
                f"{newer.name} becomes primary in epoch {newer.epoch} with all that another voter ever had of epoch"
                f" {older.epoch} ({older.acked}), where {older.name} acknowledged through {older.acknowledged}:"
                f" more than {allowed} are lost",
            )

    # -- log matching ------------------------------------------------------------------------------

    def wrote(self, node: Node, entries: Iterable[Entry]) -> None:
        """Two logs that hold a record of one position hold the same record, after the same records."""
        for entry in entries:
            position = entry.record.position
            if self._written.setdefault(position, entry.running) != entry.running:
                raise Violation("log matching", f"{node.name} wrote another record at {position}")

    def dropped(self, node: Node, to: int, entries: Iterable[Entry]) -> None:
        """``node`` is about to cut its log after ``to``."""
        if not self.synchronous:
            return
        for entry in entries:
            offset = entry.record.offset
            kept = self.ledger.get(offset)
            if offset > to and kept is not None and kept.running == entry.running:
                raise Violation(
                    "no committed record is lost",
                    f"{node.name} cuts its log after {to}, and {entry.record.position} was committed",
                )

    def joined(self, follower: Node, primary: Node, at: int) -> None:
        """A join was verified at ``at``: there, both hold the same history."""
        theirs, ours = follower.disk.running_at(at), primary.disk.running_at(at)
        if theirs is not None and ours is not None and theirs != ours:
            raise Violation(
                "log matching",
                f"{follower.name} joins {primary.name} at {at}, and what they hold there differs",
            )

    # -- acks and promises -------------------------------------------------------------------------

    def acks(self, node: Node, ack: Ack, epoch: int) -> None:
        """An ack, of a stream of ``epoch``, never says more than is on the disk."""
        if ack.synced > node.disk.synced:
            raise Violation(
                "an ack tells the truth",
                f"{node.name} acks {ack.synced} as synced; its disk has {node.disk.synced}",
            )

        begun = self._begun.get(epoch)
        if begun is not None and node.voter:
            begun.acked = max(begun.acked, ack.synced)

    def promises(self, node: Node, epoch: int, to: bytes) -> None:
        """``node`` answers that it has promised ``epoch`` to the store ``to``."""
        before = self._promised.get(node.store_id, 0)
        if epoch < before or self._given.setdefault((node.store_id, epoch), to) != to:
            raise Violation(
                "a promise binds", f"{node.name} promises epoch {epoch} again, after {before} or to another"
            )
        self._promised[node.store_id] = epoch

    def obeys(self, node: Node, epoch: int) -> None:
        """``node`` takes records, or a cut, of ``epoch``."""
        promised = self._promised.get(node.store_id, 0)
        if epoch < promised:
            raise Violation("a promise binds", f"{node.name} obeys epoch {epoch} after promising {promised}")

    # -- commits -----------------------------------------------------------------------------------

    def commits(self, node: Node, epoch: int, start: int, rule: Configuration, through: int) -> None:
        """The primary of ``epoch``, which starts at ``start``, takes all through ``through`` for committed."""
        for offset in range(node.committed + 1, through + 1):
            entry = node.disk.entry(offset)
            assert entry is not None
            if entry.record.kind == Kind.WRITE and entry.record.epoch == epoch:
                self.newest = (node.world.time.now, epoch)
                self.acknowledged[int(entry.record.payload[1][1])] = self.newest
            if self.synchronous:
                self._commits(node, epoch, entry)
        if not self.synchronous:
            begun = self._begun[epoch]
            begun.acknowledged = max(begun.acknowledged, through)
            for newer in self._begun.values():
                self._bounded(begun, newer)
            return
        if through < start:
            raise Violation(
                "older records commit with one of the new epoch",
                f"{node.name} commits {through} in epoch {epoch}, which starts at {start}",
            )
        self._copies(node, rule, through)

    def _commits(self, node: Node, epoch: int, entry: Entry) -> None:
        position = entry.record.position
        kept = self.ledger.setdefault(position.offset, entry)
        if kept.running != entry.running:
            raise Violation(
                "no committed record is changed",
                f"{node.name} commits {position}, where {kept.record.position} was committed",
            )
        self._end = max(self._end, position.offset)
        self._committed_in.setdefault(position.offset, epoch)
        for newer, begun in self._begun.items():
            if newer > epoch and not begun.holds(position):
                raise Violation(
                    "no committed record is lost",
                    f"{node.name} commits {position} in epoch {epoch},"
                    f" and {begun.name} is primary in {newer} without it",
                )

    @staticmethod
    def _copies(node: Node, rule: Configuration, through: int) -> None:
        running = node.disk.running_at(through)
        voters = {v.store_id for v in rule.voters if v.counts}
        holders = [
            n.name
            for n in node.world.nodes.values()
            if n.store_id in voters
            and n.disk.synced >= through
            and (through < n.disk.first or n.disk.running_at(through) == running)
        ]
        if len(holders) < rule.copies:
            raise Violation(
                "a commit has its copies",
                f"{node.name} commits {through}, which needs {rule.copies} copies on the disks of voters;"
                f" it is on those of {', '.join(holders) or 'nobody'}",
            )

    def shows(self, node: Node, through: int) -> None:
        """``node`` shows what is committed, through ``through``, to its readers."""
        if not self.synchronous or not through or node.rotten:
            return
        kept, running = self.ledger.get(through), node.disk.running_at(through)
        if kept is None or (running is not None and kept.running != running):
            raise Violation(
                "only committed is visible", f"{node.name} shows {through}, which is not what was committed"
            )

    def configures(self, node: Node, offset: int) -> None:
        """``node`` has logged a changed configuration at ``offset``: the one before must be committed."""
        if not self.synchronous:
            return
        old: Configuration | None = None
        for before, rule in node.disk.configurations:
            new, old = rule != old, rule
            # The first record of all is the founding: no other rule was ever in force before it.
            if new and max(2, node.disk.first) <= before < offset and before not in self.ledger:
                raise Violation(
                    "one configuration change at a time",
                    f"{node.name} logs one at {offset}; that at {before} is not committed",
                )

    def changes_rules(self, node: Node, epoch: int, start: int) -> None:
        """The primary of ``epoch`` has changed the configuration, in a way that needs no hurry."""
        if self.synchronous and start not in self.ledger:
            raise Violation(
                "an epoch begins before it changes rules",
                f"{node.name} changes the configuration, and the start of epoch {epoch} is not committed",
            )

    # -- after every step --------------------------------------------------------------------------

    @staticmethod
    def orders(nodes: Iterable[Node]) -> None:
        for node in nodes:
            disk = node.disk
            if node.up and not disk.copy.applied.offset <= node.committed <= disk.synced:
                raise Violation(
                    "applied <= committed <= durable",
                    f"{node.name}: {disk.copy.applied.offset} <= {node.committed} <= {disk.synced}",
                )

    # -- at the end --------------------------------------------------------------------------------

    def content(self, node: Node) -> None:
        """What ``node`` shows is what the committed writes add up to."""
        expected: dict[bytes, int] = {}
        for offset in range(1, node.committed + 1):
            apply(expected, self.ledger[offset].record)
        shown = dict(node.disk.copy.data)
        for offset in range(node.disk.copy.applied.offset + 1, node.committed + 1):
            entry = node.disk.entry(offset)
            assert entry is not None
            apply(shown, entry.record)
        if shown != expected:
            raise Violation("the state is what was committed", f"{node.name}: {shown} is not {expected}")

    def nothing_missing(self, leader: Node) -> None:
        """Every write that was acknowledged is in the history that goes on."""
        held = {
            int(e.record.payload[1][1])
            for o, e in self.ledger.items()
            if o <= leader.committed and e.record.kind == Kind.WRITE
        }
        missing = sorted(self.acknowledged.keys() - held)
        if missing:
            raise Violation("no acknowledged write is missing", f"{leader.name} lacks {missing[:10]}")
