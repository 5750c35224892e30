"""A follower that is given a copy which is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvrep.errors import ProtocolError
from kvrep.replication.messages import NeedBootstrap
from kvrep.runtime.bootstrapping import bootstrap
from kvrep.storage.home import Home
from kvrep.transport.interface import SnapshotChunk, SnapshotInfo, SnapshotItem


class Items:
    """What a peer sends as a snapshot."""

    def __init__(self, *items: SnapshotItem) -> None:
        self._items = iter(items)

    def __iter__(self) -> Iterator[SnapshotItem]:
        return self

    def __next__(self) -> SnapshotItem:
        return next(self._items)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ((), "without its description"),
        ((SnapshotChunk(offset=0, data=b"x", crc32=0),), "without its description"),
        ((SnapshotInfo(snapshot_id="s", bytes_total=5, meta=b"\x81\xa7version\x02"),), "version 2"),
        ((SnapshotInfo(snapshot_id="s", bytes_total=5, meta=b""),), "not readable"),
    ],
    ids=["nothing", "a chunk first", "a newer version", "no description"],
)
def test_a_snapshot_that_is_none(tmp_path: Path, items: tuple[SnapshotItem, ...], said: str) -> None:
    """Whatever a peer sends in place of a snapshot is refused by name, and nothing is kept of it."""
    home = Home.open(tmp_path / "store", create=True, name="b", lineage=b"l" * 16)
    try:
        replaying: Any = SimpleNamespace(engine=SimpleNamespace(home=home))
        connection: Any = SimpleNamespace(snapshot=lambda request, timeout_s: Items(*items))
        with pytest.raises(ProtocolError, match=said):
            bootstrap(replaying, connection, NeedBootstrap(first=1, reason="trimmed"))
        assert not home.next_generation().exists()
    finally:
        home.close()
