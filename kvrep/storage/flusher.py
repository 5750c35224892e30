"""Moves frozen memtables into LMDB in the background, in large sorted batches, and keeps the log in bounds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kvrep.errors import Error, StorageFailed, StorageFull
from kvrep.storage.memtable import Table, merged_slices
from kvrep.storage.tree import Change, State, Tree
from kvrep.storage.view import PREFIX_BYTES, View

__all__ = ["Flusher"]

log = logging.getLogger("kvrep.storage")

SLICE = 128
TICK_S = 0.5
RETRY_S = 0.25
HELD_BACK_MAX = 0.25
"""The share of the memory for unflushed writes up to which those that no voter has are kept out of LMDB."""
DELETES_BEHIND_MAX = 1.25
"""Up to this share of the memory deletes are taken while there is no room for a flush."""
BREATH_S, BREATH_BEHIND_S = 0.0002, 0.00002
"""How long to give way after a slice. A thread that is woken on a busy machine needs that long to take its turn; a
flush that has fallen behind cannot afford it."""
CALM_S = 0.25
"""After so long without a new record nobody is taken to wait for the interpreter."""


class Flusher:
    """One thread. Flushes by size, by age, at digest marks and when asked."""

    def __init__(
        self,
        view: View,
        tree: Tree,
        *,
        memtable_bytes: int,
        memtable_bytes_max: int,
        interval_s: float,
        update: Callable[[State, Sequence[Table]], None],
        before: Callable[[], None],
        after: Callable[[], object],
        tick: Callable[[], None],
        failed: Callable[[BaseException], object],
        logged: Callable[[], int],
        flush_limit: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.view = view
        self.tree = tree
        self.memtable_bytes = memtable_bytes
        self.memtable_bytes_max = memtable_bytes_max
        self.interval_s = interval_s
        self.keep_back = False
        """Whether even a flush that was asked for leaves out what no voter has: at the close."""
        self.full: StorageFull | None = None
        """Why flushing stands still, if it does."""
        self.failure: BaseException | None = None
        """Why nothing is flushed any more."""
        self.flushes = 0
        self._update = update
        self._before = before
        self._after = after
        self._tick = tick
        self._failed = failed
        self._logged = logged
        self._seen = -1
        """The last record in the log when the flush last gave way."""
        self._seen_s = 0.0
        self._limit = flush_limit
        self._clock = clock
        # Protects the requests below; also announces every retirement and every change of ``full``.
        self._changed = threading.Condition()
        self._asked = 0
        self._answered = 0
        self._stands = 0
        """How often there was no room for a flush."""
        self._stop = False
        self._poke = threading.Event()
        # Held during every step of the thread: who takes it finds no flush under way.
        self.hold = threading.Lock()
        self._thread: threading.Thread | None = None
        view.on_rotate = self._poke.set
        # Tables are the smallest parts that a flush is made of, and their freezing is what wakes the thread.
        view.table_bytes_max = min(view.table_bytes_max, memtable_bytes // 4)

    def start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the step under way; False if it did not end in time."""
        self._stop = True
        self._poke.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def replace(self, view: View, tree: Tree) -> None:
        """Go on with another copy. ``hold`` is held."""
        self.view, self.tree = view, tree
        view.on_rotate = self._poke.set
        with self._changed:
            self.full = None
            self._changed.notify_all()

    # -- asked by others ---------------------------------------------------------------------------

    def flush(self, deadline_s: float) -> bool:
        """Have everything that is published now put into LMDB; False when ``deadline_s`` passed first."""
        with self._changed:
            self._asked += 1
            mine, stands = self._asked, self._stands
        self._poke.set()
        with self._changed:
            while self._answered < mine:
                if self.full is not None and self._stands > stands:
                    raise StorageFull(self.full.message, hint=self.full.hint) from self.full
                if self.failure is not None:
                    raise StorageFailed(f"the flush failed: {self.failure}") from self.failure
                if self._thread is None or not self._thread.is_alive():
                    return False
                left = deadline_s - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.1))
        return True

    @property
    def behind(self) -> float:
        """Memory of unflushed writes as a share of its bound: 1 and above means writers must wait."""
        return self.view.memory_bytes / self.memtable_bytes_max

    def slow_down(self, deadline_s: float, *, deletes: bool) -> bool:
        """Slow a writer as the flush falls behind, and stop it at the bound; False if it must not go on.

        Raises :class:`StorageFull` while flushing stands still; but deletes help, so they get some room of
        their own.
        """
        if self.full is None:
            if self.behind < 1.0:
                time.sleep(max(0.0, self.behind - 0.5) * 0.004)
                return True
            if self._wait_for_room(deadline_s):
                return True
        elif deletes and self.behind < DELETES_BEHIND_MAX:
            return True
        full = self.full
        if full is not None:
            raise StorageFull(full.message, hint=full.hint) from full
        return False

    def _wait_for_room(self, deadline_s: float) -> bool:
        """Wait until writers may go on; False at the deadline or when flushing stands still."""
        with self._changed:
            while self.behind >= 1.0:
                left = deadline_s - time.monotonic()
                if left <= 0 or self.full is not None or self.failure is not None or self._stop:
                    return False
                self._changed.wait(min(left, 0.1))
        return True

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop:
            self._poke.wait(TICK_S)
            self._poke.clear()
            try:
                with self.hold:
                    self._tick()
                    if self.failure is None:
                        self._step()
            except StorageFull as error:
                self._standstill(error)
            except Error as error:
                log.error("the flush failed: %s", error)
                self._give_up(error)
            except Exception as error:
                log.exception("the flush failed")
                self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """Nothing is flushed any more; the thread goes on to look after snapshots and transactions."""
        self._failed(error)
        with self._changed:
            self.failure = error
            self._changed.notify_all()

    def _standstill(self, error: StorageFull) -> None:
        if self.full is None:
            log.warning("flushing waits for room: %s", error)
        with self._changed:
            self.full = error
            self._stands += 1
            self._changed.notify_all()
        self._poke.wait(RETRY_S)

    def _step(self) -> None:
        asked = self._asked
        wanted = asked > self._answered
        if wanted or self._due():
            if wanted or not self._held_back():
                self._before()
                self.view.rotate()
            target = self.view.last
            # Not "while there are older tables": a scan may join one of them with newer writes meanwhile.
            while self.tree.state.applied.offset < target and not self._stop:
                if not self._flush_some(everything=wanted and not self.keep_back):
                    break
            if wanted:
                with self._changed:
                    self._answered = max(self._answered, asked)
                    self._changed.notify_all()
        elif any(t.mark is not None for t in self.view.tables[1:]):
            self._flush_some()

    def _held_back(self) -> bool:
        """Whether the cut made last still waits for an ack: another one would only add small tables."""
        return self._limit() is not None and any(t.mark is not None for t in self.view.tables[1:])

    def _due(self) -> bool:
        view = self.view
        if view.payload_bytes >= self.memtable_bytes or self.behind >= 0.5:
            return True
        oldest = view.tables[-1]
        return oldest.last > 0 and self._clock() - oldest.born_s >= self.interval_s

    def _flush_some(self, *, everything: bool = False) -> bool:
        """Flush the oldest tables, as many as belong and fit together; False if there was nothing to flush."""
        tables = self._choose(self.view.frozen(), everything)
        if not tables:
            return False
        self.tree.flush(self._changes(tables), lambda state: self._update(state, tables), self._breathe)
        self.view.retire(tables)
        self.flushes += 1
        with self._changed:
            self.full = None
            self._changed.notify_all()
        self._after()
        return True

    def _choose(self, tables: tuple[Table, ...], everything: bool) -> tuple[Table, ...]:
        """The oldest of ``tables`` that may be flushed and for which there is room."""
        limit = None if everything else self._limit()
        if limit is not None and self.behind < HELD_BACK_MAX:
            tables = tuple(t for t in tables if t.last <= limit)
        frozen = tables
        while tables:
            entries, payload = sum(map(len, tables)), sum(t.payload_bytes for t in tables)
            if self.tree.room_for(entries, payload):
                return tables
            tables = tables[(len(tables) + 1) // 2 :]
        if (
            frozen
            and _deleting(self.view.tables[1:])
            and self.tree.may_try(sum(t.payload_bytes for t in frozen))
        ):
            return frozen
        if frozen:
            raise StorageFull("neither the disk nor the LMDB map has room for a flush")
        return ()

    def _changes(self, tables: Sequence[Table]) -> Iterator[Change]:
        """The tables' content as LMDB takes it: keyspace by keyspace, keys in order, a slice at a time."""
        for items in merged_slices(tables, SLICE):
            if not items:
                continue
            first, last = items[0][0][:PREFIX_BYTES], items[-1][0][:PREFIX_BYTES]
            if first == last:
                yield self._change(first, items)
                continue
            for prefix in sorted({key[:PREFIX_BYTES] for key, _ in items}):
                yield self._change(prefix, [item for item in items if item[0][:PREFIX_BYTES] == prefix])

    def _change(self, prefix: bytes, items: list[tuple[bytes, bytes | None]]) -> Change:
        puts = [(key[PREFIX_BYTES:], value) for key, value in items if value is not None]
        deletes = [] if len(puts) == len(items) else [k[PREFIX_BYTES:] for k, v in items if v is None]
        return self.view.name_of(prefix), puts, deletes

    def _breathe(self) -> None:
        """Let threads that wait have the interpreter while records come: each hand-over would otherwise cost 5 ms.

        On the way of one acknowledged write there are several, on a follower no less than on the primary, and
        most of the time no lock tells that somebody waits.
        """
        logged, now = self._logged(), self._clock()
        if logged != self._seen:
            self._seen, self._seen_s = logged, now
        if now - self._seen_s < CALM_S:
            time.sleep(BREATH_S if self.behind < 0.5 else BREATH_BEHIND_S)


def _deleting(tables: Sequence[Table]) -> bool:
    """Whether a good part of the entries are deletes, which give room back."""
    entries = sum(map(len, tables))
    return 4 * sum(value is None for t in tables for value in t.entries.values()) >= entries
