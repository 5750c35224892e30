"""Reading the log as changes: from a place on, as far as the horizon, a piece at a time.

A piece is checked (the running checksum of the log goes on from the last piece, so a piece that was cut off and
written anew is noticed) and decoded in one call; one loop makes the changes. Nothing is kept between pieces but
the place, so a slow reader costs nothing.
"""

from __future__ import annotations

from typing import Any

from kvrep.errors import ClosedError, LineageMismatch, LogCorrupt, LogTrimmed, StorageFailed, Truncated
from kvrep.feeds.selection import Selection
from kvrep.model.change import DELETE, EMIT, PUT, ROW_INDEX, Change, Sequence
from kvrep.model.codec import ChainBroken, bodies
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.model.record import Kind
from kvrep.model.token import BRANCH_BYTES, WHOLE, Scan, Token, branch_at
from kvrep.runtime.horizon import horizon
from kvrep.runtime.node import Node
from kvrep.storage.engine import Engine

__all__ = ["LogReader", "Origin"]

PIECE_BYTES = 1 << 19
_new = tuple.__new__  # half the price of a named tuple's own constructor


class Origin:
    """Makes the tokens of the changes of one stretch of a stream, when somebody asks for them."""

    __slots__ = ("branches", "epochs", "lineage", "scan")

    def __init__(self, engine: Engine, scan: Scan | None) -> None:
        self.lineage = engine.home.lineage
        self.epochs = engine.epochs
        self.branches = tuple(engine.branches)
        self.scan = scan
        """How far the snapshot had come, if the stretch lies inside of one."""

    def token(self, change: Change) -> str:
        """The token after ``change``."""
        scan, index = self.scan, WHOLE if change.last else change.index
        if change.snapshot:
            index = WHOLE
            if scan is not None:  # else it is the mark at the end
                scan = Scan(change.keyspace, change.key, change.index - ROW_INDEX, scan.begun)
        offset = change.position.offset
        epochs, branch = self.epochs.cut(offset), branch_at(self.branches, offset)
        return str(Token(self.lineage, branch, change.position, index, epochs, change.sequence, scan))


class LogReader:
    """One per stream; used by one thread at a time."""

    def __init__(self, node: Node, selection: Selection, *, committed: bool) -> None:
        self.node = node
        self.selection = selection
        self.at = ZERO
        """Everything through here was read."""
        self.index = WHOLE
        """Of the record at ``at``, all through this operation was read."""
        self.previous: Sequence | None = None
        self.scan: Scan | None = None
        """Inside of a snapshot: only what lies at or before its place is shown."""
        self._committed = committed
        self._epochs = EpochTable()
        """Those of the history that was read last."""
        self._branch = b""
        """That of the place; empty when only a position is known."""
        self._running: int | None = None
        self._known: dict[str, bool] = {}
        """Which keyspaces are shown."""
        self.failure: Exception | None = None
        """What the user's function raised, once what came before it is handed out."""

    # -- where it stands ---------------------------------------------------------------------------

    def start(self, token: Token) -> None:
        """Go on where ``token`` was made. :class:`LineageMismatch` for another store's."""
        home = self.node.engine.home
        if token.lineage != home.lineage and home.lineage and token.lineage:
            raise LineageMismatch(
                "the token is of another store",
                hint="read that store, or begin anew with a snapshot",
                ours=home.lineage.hex(),
                theirs=token.lineage.hex(),
            )
        self.at, self.index, self.previous, self.scan = (
            token.position, token.index, token.previous, token.scan,
        )  # fmt: skip
        self._epochs, self._branch, self._running = token.epochs, token.branch, None

    def move(self, position: Position) -> None:
        """Stand behind all of ``position``, which is shown here."""
        self.at, self.index, self._running = position, WHOLE, None
        engine = self.node.engine
        self._epochs, self._branch = engine.epochs, branch_at(engine.branches, position.offset)

    def token(self) -> Token:
        """Where it stands: nothing that was read until here comes again."""
        epochs = self._epochs.cut(self.at.offset)
        lineage = self.node.engine.home.lineage
        return Token(lineage, self._branch, self.at, self.index, epochs, self.previous, self.scan)

    def through(self, offset: int) -> bool:
        """Whether everything through record ``offset`` was read and handed out."""
        return self.failure is None and (
            self.at.offset > offset or (self.at.offset == offset and self.index == WHOLE)
        )

    def limit(self) -> int:
        """The last offset that may be shown now."""
        return self.node.engine.view.last if self._committed else horizon(self.node)

    def here(self, place: Position | None = None) -> bool:
        """Whether ``place`` (default: where it stands) is part of what is shown here; False when it may come
        yet. :class:`Truncated` when it cannot: the history went on without it."""
        engine = self.node.engine
        at = self.at if place is None else place
        if at.offset == 0:
            return True
        shown, epochs = engine.view.last, engine.epochs
        epoch = epochs.epoch_at(min(at.offset, shown))
        if epoch > at.epoch:
            raise self._truncated(at)
        if at.offset <= shown and epoch == at.epoch:
            return True
        if self._gone(at, shown):
            raise self._truncated(at)
        return False

    def _gone(self, at: Position, shown: int) -> bool:
        """Whether ``at``, of an epoch above what is shown there, cannot come any more: a primary knows; a
        follower that may have been left behind itself does only if its branch is the newer one."""
        node, engine = self.node, self.node.engine
        replaying = node.replaying
        if replaying is None:
            sure = node.shipping is None or node.shipping.leadership.leading
            newer = at.epoch > engine.epochs.last_epoch or at.offset > engine.tail.offset
            return sure and (at.offset <= shown or newer)
        if self._branch:
            return self._branch in [branch[:BRANCH_BYTES] for _, branch in engine.branches[:-1]]
        return replaying.connected and at.offset <= shown and engine.configuration.synchronous

    def _truncated(self, at: Position) -> Truncated:
        engine = self.node.engine
        epochs, last = engine.epochs, engine.tail.offset
        if len(self._epochs):
            shared = epochs.common(last, self._epochs, at.offset)
        else:  # only a position: at most through the end of its epoch, or of the one before it
            behind = [first for epoch, first in epochs if epoch > at.epoch]
            shared = min([at.offset, last, *(first - 1 for first in behind)])
        to = Position(epochs.epoch_at(shared), shared)
        return Truncated(f"{at} is not part of this history, which shares what is through {to}",
                         to=to, position=at)  # fmt: skip

    # -- reading -----------------------------------------------------------------------------------

    def read(self, through: int) -> list[Change] | None:
        """The next changes at or below ``through``; ``None`` when nothing is there yet.

        Perhaps none, where all of a piece was left out. Raises :class:`Truncated`, :class:`LogTrimmed`,
        :class:`LogCorrupt`, :class:`ClosedError`, and what the user's function raised.
        """
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if not self.here():
            return None
        engine = self.node.engine
        whole = self.index == WHOLE
        first = self.at.offset + whole
        most = min(through, self.limit()) - first + 1
        if most <= 0:
            return None
        for attempt in range(3):
            log = engine.committer.log
            try:
                if self._running is None or attempt:
                    self._running = log.running_at(first - 1)
                run = log.read(first, PIECE_BYTES)
                if run is None:
                    return None
                found, running = bodies(run.data, self._running, most)
            except LogTrimmed as error:
                if engine.closed:
                    raise ClosedError("the store is closed") from None
                if log is engine.committer.log:
                    raise self._trimmed(error) from None
                continue
            except ChainBroken as error:
                if not self.here():
                    return None
                if attempt == 2:
                    raise LogCorrupt(
                        f"the log is damaged at record {first + error.offset}",
                        path=str(engine.home.path), at=first + error.offset,
                    ) from error  # fmt: skip
                continue
            except OSError as error:
                if engine.closed:
                    raise ClosedError("the store is closed") from None
                raise StorageFailed(f"the log could not be read: {error}") from error
            return self._take(found, running, first)
        return None

    def _trimmed(self, error: LogTrimmed) -> LogTrimmed:
        return LogTrimmed(
            f"record {self.at.offset + 1} is not in the log any more, which starts at {error.first}",
            first=error.first,
            hint="changes(snapshot=True), or resnapshot() of a named feed, gives what there is now",
        )

    def _take(self, found: list[Any], running: int, first: int) -> list[Change] | None:
        engine, last = self.node.engine, found[-1]
        epochs = engine.epochs
        if found[0][0] != first or last[0] != first + len(found) - 1 or epochs.epoch_at(last[0]) != last[1]:
            self._running = None  # the log was cut and went on meanwhile
            return None
        changes = self._changes(found, Origin(engine, self.scan))
        if self.failure is None:
            self.at, self.index = _new(Position, (last[1], last[0])), WHOLE
            self._running = running
        self._epochs, self._branch = epochs, branch_at(engine.branches, self.at.offset)
        return changes

    def _changes(self, found: list[Any], origin: Origin) -> list[Change]:
        """The changes that records show. The loop is spelt out for records of one operation: most are."""
        plain = self.selection.transform is None and self.scan is None
        known, prefix = self._known, self.selection.prefix
        previous = self.previous
        changes: list[Change] = []
        add, new = changes.append, _new
        skip = self.index
        for offset, epoch, time_us, kind, payload, *_ in found:
            if kind == 0 and plain and len(payload) == 2 and len(payload[1]) == 2:
                if skip >= 0:
                    skip = WHOLE
                    continue
                name, (key, value) = payload
                try:
                    shown = known[name]
                except KeyError:
                    shown = known[name] = self.selection.takes(name)
                if shown and (not prefix or key.startswith(prefix)):
                    add(
                        new(
                            Change,
                            (
                                new(Position, (epoch, offset)), 0, DELETE if value is None else PUT, name, key,
                                value, time_us, True, previous, False, None, None, "", None, origin,
                            ),
                        )
                    )  # fmt: skip
                    previous = (epoch, offset, 0)
            elif kind in (Kind.WRITE, Kind.NOTED):
                try:
                    several = self._several(Position(epoch, offset), time_us, kind, payload, skip, origin)
                except Exception as error:  # the user's function: what came before it is handed out first
                    self._stop_before(offset, error, found[0])
                    break
                for change in several:
                    add(change._replace(previous=previous, last=change is several[-1]))
                    previous = (epoch, offset, change.index)
                skip = WHOLE
            else:
                skip = WHOLE
        self.previous = previous
        return changes

    def _stop_before(self, offset: int, error: Exception, first: Any) -> None:
        """Stand before record ``offset``, so that it is tried again after ``error`` was raised."""
        self.failure = error
        if offset > first[0]:
            before = offset - 1
            self.at, self.index = Position(self.node.engine.epochs.epoch_at(before), before), WHOLE
        self._running = None

    def _several(
        self, position: Position, time_us: int, kind: int, payload: Any, skip: int, origin: Origin
    ) -> list[Change]:
        """What is shown of one record, its operations above ``skip``; without ``previous`` and ``last``."""
        selection = self.selection
        writes, emits, notes = (payload, (), ()) if kind == Kind.WRITE else payload
        before = dict(zip(notes[::2], notes[1::2], strict=True)) if selection.before else {}
        place = None if self.scan is None else self.scan.place
        changes: list[Change] = []
        index = -1
        names = iter(writes)
        for name, flat in zip(names, names, strict=True):
            taken = selection.takes(name)
            pairs = iter(flat)
            for key, value in zip(pairs, pairs, strict=True):
                index += 1
                if not taken or index <= skip or not key.startswith(selection.prefix):
                    continue
                if place is not None and (name, key) > place:
                    continue
                changes.append(
                    Change(
                        position, index, DELETE if value is None else PUT, name, key, value, time_us,
                        before=before.get(index),
                        created=before[index] is None if index in before else None,
                        origin=origin,
                    )
                )  # fmt: skip
        for topic, message, headers in emits:
            index += 1
            if index > skip and selection.takes_topic(topic):
                changes.append(
                    Change(position, index, EMIT, "", b"", message, time_us,
                           topic=topic, headers=headers, origin=origin)
                )  # fmt: skip
        if selection.transform is None:
            return changes
        return [made for change in changes if (made := selection.shown(change)) is not None]
