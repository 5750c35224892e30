"""What the tests of forwarded writes and linearizable reads share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvrep
from tests.replication_kit import Open, stores, voters

__all__ = ["forwarded_records", "group", "stores"]


@contextmanager
def group(
    folder: Path, acks: Any = 1, names: str = "abc", **options: Any
) -> Iterator[tuple[Open, list[kvrep.Store]]]:
    """A primary and followers that all forward their writes, with a committed configuration."""
    options.setdefault("forward_writes", True)
    with stores(folder) as start:
        first = start(names[0], acks=acks, **options)
        made = [first, *(start(name, follow=first.address, **options) for name in names[1:])]
        voters(first, *names)
        yield start, made


def forwarded_records(store: kvrep.Store) -> list[tuple[int, int, Any]]:
    """(offset, sequence, payload) of every forwarded record in the log, oldest first."""
    from kvrep.model.codec import decode

    log = store._node.engine.committer.log
    found = []
    offset = log.first
    while (run := log.read(offset, 1 << 20)) is not None:
        records, _ = decode(run.data, run.first, log.running_at(run.first - 1))
        found += [(r.offset, r.origin.sequence, r.payload) for r in records if r.origin is not None]
        offset = run.last + 1
    return found
