"""Digest marks: at these records every node cuts a flush, so that all compare their digests at one position."""

from __future__ import annotations

from collections.abc import Iterable

from kvrep.model.record import Kind
from kvrep.storage.memtable import Table
from kvrep.storage.tree import State, digests_in, digests_out
from kvrep.storage.write import Write

__all__ = ["compare", "due", "mark"]


def due(tables: Iterable[Table]) -> bool:
    """Whether these memtables, newest first, hold writes since the last mark."""
    for table in tables:
        if table.mark is not None:
            return False
        if table.writes:
            return True
    return False


def mark(state: State) -> Write:
    """A mark for the log, with the digests of a primary in this ``state`` at the mark before."""
    return Write(Kind.DIGEST, [state.mark, digests_out(state.mark_digests)], 64)


def compare(state: State, table: Table) -> bool:
    """Note in ``state``, to which ``table`` has just been added, the mark that the table ends at.

    It says what the primary had at the previous mark. False if that is the first that differs from ours.
    """
    assert table.mark is not None
    theirs_at, theirs = table.mark[0], digests_in(table.mark[1])
    newly_diverged = False
    if theirs_at and theirs_at == state.mark:
        ours = {k: v for k, v in state.mark_digests.items() if v}
        if ours == {k: v for k, v in theirs.items() if v}:
            state.verified = theirs_at
        elif not state.diverged:
            state.diverged = theirs_at
            newly_diverged = True
    state.mark = table.last
    state.mark_digests = dict(state.digests)
    return not newly_diverged
