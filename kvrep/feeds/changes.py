"""The iterator that users hold: perhaps a snapshot, then the log, without a gap and without a repeat.

A snapshot is delivered in pieces while writes go on. The store is read at a position p; before the rows of a
piece come the changes since the piece before, through p, of keys whose rows have been delivered already. So at
any moment the receiver has exactly the rows through a certain key as of a certain position, and that is all that
a token needs to say: any node can go on from there. Nothing is pinned for longer than a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from types import TracebackType
from typing import Any

from kvrep.errors import ClosedError, RolledBack, SnapshotExpired, Truncated
from kvrep.feeds.reader import LogReader, Origin
from kvrep.feeds.rows import Rows
from kvrep.feeds.selection import Selection
from kvrep.model.change import BEGIN, END, ROW_INDEX, Change, ChangeKind
from kvrep.model.position import OFFSET_MAX, ZERO, Position
from kvrep.model.record import Op
from kvrep.model.token import Scan, Token
from kvrep.runtime.checks import prefix_stop
from kvrep.runtime.node import Node
from kvrep.storage.view import Snapshot as Pinned

__all__ = ["Changes", "Held"]

Held = Iterable[tuple[str, bytes, bytes]]
"""What a receiver holds: (keyspace, key, value) in order."""
Place = tuple[str, bytes]
LOOK_UP_S = 0.25
PIECE_ROWS = 1024
PIECE_BYTES = 1 << 20
ROWS_AT_ONCE = 128
PINNED_S = 1.0
PINNED_ROWS = 1 << 16


class Changes:
    """An ordered stream of :class:`Change`; iterate over it, or :meth:`poll` it. Made by ``Store.changes``.

    It waits for more until it is closed (then the iteration ends) or the store is (:class:`ClosedError`). One
    thread at a time reads it; any may close it. It holds next to nothing between two steps, so a slow reader
    costs nothing, and reading it again after an error tries again.
    """

    def __init__(
        self,
        node: Node,
        selection: Selection,
        *,
        token: Token | None = None,
        after: Position | None = None,
        snapshot: bool = False,
        stop: Position | None = None,
        committed: bool = False,
        have: Held | None = None,
    ) -> None:
        self._node = node
        self._selection = selection
        self._stop = stop
        self._reader = LogReader(node, selection, committed=committed)
        self._scan: _SnapshotScan | None = None
        self._piece: Sequence[Change] = ()
        """What was read last, and is not begun to be handed out."""
        self._ready: Iterator[Change] = iter(())
        """What is handed out one by one: of a list, since an interrupt would end an iterator that runs Python."""
        self._closed = False
        self._waits = False
        self._midway = False
        """Whether a step was interrupted (Ctrl-C), so that nobody knows what it has read."""
        # Held while a step reads; who closes meanwhile leaves the rest to the step.
        self._stepping = threading.Lock()
        if token is not None:
            self._reader.start(token)
        elif after is not None:
            self._reader.at = after
        if snapshot or (token is not None and token.scan is not None):
            self._scan = _SnapshotScan(self._reader, have)

    # -- reading -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Change]:
        while True:
            yield from self._ready
            if not self._fill(None):
                return
            self._begin_piece()

    def __next__(self) -> Change:
        while True:
            for change in self._ready:
                return change
            if not self._fill(None):
                raise StopIteration
            self._begin_piece()

    def _begin_piece(self) -> None:
        """Hand out what was read one by one; rows of a snapshot some at a time, so that few stand in memory."""
        piece, rest = self._piece, self._piece[:0]
        if isinstance(piece, Rows):
            piece, rest = piece[:ROWS_AT_ONCE], piece[ROWS_AT_ONCE:]
        self._ready, self._piece = iter(list(piece)), rest

    def poll(self, timeout_s: float = 1.0) -> list[Change]:
        """The next changes, as many as one piece of the log holds (at least one record's); none when there
        are none after ``timeout_s``, or the end is reached (see :attr:`over`)."""
        changes = list(self._ready)
        if not changes and self._fill(time.monotonic() + timeout_s):
            changes = list(self._piece)
            self._piece = ()
        return changes

    def _poll(self, timeout_s: float) -> Sequence[Change]:
        """:meth:`poll`, with rows of a snapshot as :class:`Rows`."""
        changes = list(self._ready)
        if changes or not self._fill(time.monotonic() + timeout_s):
            return changes
        piece, self._piece = self._piece, ()
        return piece

    @property
    def over(self) -> bool:
        """Whether it was closed, or all through ``stop`` was delivered."""
        return self._closed

    @property
    def behind(self) -> bool:
        """Whether a :meth:`poll` that gave nothing ended in the middle of what is there to be read."""
        return not (self._waits or self._closed)

    @property
    def position(self) -> Position:
        """Everything through here was read; what was selected of it was delivered or is about to be."""
        return self._reader.at

    @property
    def token(self) -> str:
        """Where to go on after all that was delivered, when nothing is left of the last :meth:`poll`.

        It moves on where everything is left out by selection, too, unlike the token of the last change.
        """
        return str(self._reader.token())

    @property
    def in_snapshot(self) -> bool:
        """Whether the snapshot is not delivered yet."""
        return self._scan is not None

    def _fill(self, deadline_s: float | None) -> bool:
        """Have ``_piece`` hold something; False at the end or the deadline. Obeys Ctrl-C at once."""
        if self._piece:
            return True
        node = self._node
        if self._midway:
            raise ClosedError(
                "the stream was interrupted in the middle of a step",
                hint="go on with changes(resume=…) and the token of the last change",
            )
        while not self._closed:
            node.engine.need_unforked()
            if node.closing:
                raise ClosedError("the store is closed")
            seen = node.engine.view.last
            self._midway = True
            try:
                changes = self._step()
            except Exception:
                self._midway = False
                raise
            if changes:
                self._piece = changes
            self._waits = changes is None
            self._midway = False
            if changes:
                return True
            left = LOOK_UP_S if deadline_s is None else min(LOOK_UP_S, deadline_s - time.monotonic())
            if left <= 0 or self._closed:
                return False
            if changes is None:
                node.moves.wait_once(self._stirred(seen), left)
        return False

    def _stirred(self, seen: int) -> Callable[[], bool]:
        view = self._node.engine.view
        return lambda: self._closed or view.last != seen

    def _step(self) -> Sequence[Change] | None:
        """Read a piece; ``None`` when there is nothing now."""
        with self._stepping:
            try:
                if self._scan is not None:
                    changes = self._scan.step()
                    if self._scan.done:
                        self._scan = None
                    return changes
                if self._ended():
                    self._closed = True
                    return None
                return self._reader.read(OFFSET_MAX if self._stop is None else self._stop.offset)
            finally:
                if self._closed:
                    self._let_go()

    def _ended(self) -> bool:
        stop, reader = self._stop, self._reader
        if stop is None or not reader.through(stop.offset) or not reader.here():
            return False
        epoch = self._node.engine.epochs.epoch_at(stop.offset)
        if stop.offset and epoch != stop.epoch:
            raise RolledBack(f"{stop} is not part of this history", position=stop)
        return True

    # -- the end -----------------------------------------------------------------------------------

    def _let_go(self) -> None:
        scan = self._scan
        if scan is not None:
            scan.release()

    def close(self) -> None:
        """End the iteration, also one that waits in another thread. Idempotent."""
        self._closed = True
        self._node.moves.stir()
        if self._stepping.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._stepping.release()

    def __enter__(self) -> Changes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_stepping", None) is not None:
            self._let_go()


class _SnapshotScan:
    """The snapshot part of a stream: one :meth:`step` after the other until :attr:`done`."""

    def __init__(self, reader: LogReader, have: Held | None) -> None:
        self._reader = reader
        self._node = reader.node
        self._selection = reader.selection
        self._difference = None if have is None else _Difference(have, reader.scan)
        self._pinned: Pinned | None = None
        self._pinned_s = 0.0
        self._pinned_rows = 0
        self._rows: Iterator[tuple[str, bytes, bytes]] = iter(())
        self._at = ZERO
        """The position that is pinned."""
        self._time_us = 0
        self._found: tuple[list[Op], Place | None] | None = None
        """Rows that are read and not delivered, and the place behind them (``None``: the end)."""
        self.done = False

    def step(self) -> Sequence[Change] | None:
        """The next changes; ``None`` when it has to wait, an empty list when it is to be called again."""
        reader = self._reader
        begun = reader.scan is not None
        if self._pinned is None:
            if begun and not reader.here():
                return None
            self._pin()
        if not self._pin_holds():
            self.release()  # the history went back; what is delivered is checked at the next step
            return []
        if reader.limit() < self._at.offset:
            return None
        if not begun:
            return self._begin()
        if not reader.through(self._at.offset):
            return reader.read(self._at.offset)
        try:
            return self._piece()
        except SnapshotExpired:
            self.release()
            return []

    def _pin(self) -> None:
        engine = self._node.engine
        if self._found is not None and self._difference is not None:
            raise ClosedError("the comparison was broken off; begin it again")
        self._found = None
        pinned = engine.snapshot()
        self._pinned, self._at = pinned, pinned.position
        self._pinned_s, self._pinned_rows = time.monotonic(), 0
        self._time_us = engine.time_at(self._at.offset) if self._at.offset else 0
        self._rows = self._walk(pinned, [n for n in engine.view.keyspaces if self._selection.takes(n)])

    def _pin_holds(self) -> bool:
        """Whether what is pinned is still what is shown here, and lies behind all that was delivered."""
        if self._at.offset < self._reader.at.offset:
            return False
        try:
            return self._reader.here(self._at)
        except Truncated:
            return False

    def release(self) -> None:
        """Let go of the position that is pinned."""
        pinned, self._pinned = self._pinned, None
        self._rows = iter(())
        if pinned is not None:
            pinned.release()

    def _walk(self, pinned: Pinned, names: list[str]) -> Iterator[tuple[str, bytes, bytes]]:
        """The selected rows behind the place that was reached."""
        scan = self._reader.scan
        after = scan.place if scan is not None else ("", b"")
        prefix = self._selection.prefix
        stop = prefix_stop(prefix)

        def rows_of(name: str) -> Iterator[Any]:
            start = max(prefix, after[1] + b"\0") if name == after[0] else prefix
            if stop is not None and start >= stop:
                return iter(())
            return map((name,).__add__, pinned.scan(name, start, stop, reverse=False))

        return chain.from_iterable(rows_of(name) for name in sorted(names) if name >= after[0])

    def _begin(self) -> list[Change]:
        reader = self._reader
        reader.move(self._at)
        reader.scan = Scan("", b"", 0, self._at)
        return [self._mark(BEGIN, ROW_INDEX)]

    def _mark(self, kind: ChangeKind, index: int) -> Change:
        reader = self._reader
        previous, reader.previous = reader.previous, (*self._at, index)
        origin = Origin(self._node.engine, reader.scan)
        return Change(
            self._at, index, kind, "", b"", None, self._time_us, True, previous, True, origin=origin
        )

    def _piece(self) -> Sequence[Change]:
        """The next rows; the mark of the end behind the last ones."""
        if self._found is None:
            self._found = self._next_rows()
        rows, through = self._found
        changes = self._deliver(rows, through)
        self._found = None
        reader = self._reader
        if through is None:
            assert reader.scan is not None
            rows_before, reader.scan = reader.scan.rows, None
            changes = [*changes, self._mark(END, ROW_INDEX + rows_before + 1)]
            self.done = True
            self.release()
        elif self._pinned_rows >= PINNED_ROWS or time.monotonic() - self._pinned_s >= PINNED_S:
            self.release()
        return changes

    def _next_rows(self) -> tuple[list[Op], Place | None]:
        rows: list[Op] = []
        size = 0
        for row in islice(self._rows, PIECE_ROWS):
            rows.append(row)
            size += len(row[1]) + len(row[2])
            if size >= PIECE_BYTES:
                break
        through = rows[-1][:2] if len(rows) == PIECE_ROWS or size >= PIECE_BYTES else None
        self._pinned_rows += len(rows)
        return (rows if self._difference is None else self._difference.of(rows, through)), through

    def _deliver(self, rows: list[Op], through: Place | None) -> Sequence[Change]:
        """``rows`` as changes, numbered on; the place moves behind them."""
        reader, at = self._reader, self._at
        scan = reader.scan
        assert scan is not None
        first = ROW_INDEX + scan.rows + 1
        changes: Sequence[Change] = Rows(
            rows, at=at, first=first, previous=reader.previous, time_us=self._time_us,
            origin=Origin(self._node.engine, scan),
        )  # fmt: skip
        if self._selection.transform is not None:
            changes = self._shown(changes, first)
        if changes:
            reader.previous = changes[-1].sequence
        count = scan.rows + len(changes)
        reader.scan = scan._replace(rows=count) if through is None else Scan(*through, count, scan.begun)
        return changes

    def _shown(self, rows: Iterable[Change], index: int) -> list[Change]:
        """What the user's function leaves of rows, numbered anew from ``index`` on."""
        changes: list[Change] = []
        previous = self._reader.previous
        for row in rows:
            shown = self._selection.shown(row._replace(index=index, previous=previous))
            if shown is not None:
                changes.append(shown._replace(previous=previous, last=True))
                previous, index = shown.sequence, index + 1
        return changes


class _Difference:
    """Compares rows with what a receiver holds, both in order."""

    def __init__(self, have: Held, scan: Scan | None) -> None:
        self._have = iter(have)
        self._next = next(self._have, None)
        while scan is not None and self._next is not None and self._next[:2] <= scan.place:
            self._step()

    def _step(self) -> None:
        before, self._next = self._next, next(self._have, None)
        if before is not None and self._next is not None and self._next[:2] <= before[:2]:
            raise ValueError(f"what the receiver has is not in order: {before[:2]}, then {self._next[:2]}")

    def of(self, rows: list[Op], through: Place | None) -> list[Op]:
        """What makes of what the receiver holds, through that key (``None``: all), these rows."""
        found: list[Op] = []
        for row in rows:
            self._gone(row[:2], found)
            if self._next is not None and self._next[:2] == row[:2]:
                if self._next[2] != row[2]:
                    found.append(row)
                self._step()
            else:
                found.append(row)
        if through is None:
            self._gone(None, found)
        return found

    def _gone(self, below: Place | None, found: list[Op]) -> None:
        while self._next is not None and (below is None or self._next[:2] < below):
            found.append((self._next[0], self._next[1], None))
            self._step()
