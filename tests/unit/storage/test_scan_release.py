"""A scan lets go of its snapshot however it ends."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

import kvrep


@pytest.mark.parametrize("taken", [None, 0, 1, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_dropped_scan_holds_no_snapshot(store_path: Path, taken: int | None, reverse: bool) -> None:
    """Dropped before its first step, after some pairs or at its end, a scan pins nothing any more."""
    with kvrep.open(store_path) as db:
        for i in range(5):
            db.put(b"%d" % i, b"v")
        scan = db.scan(reverse=reverse)
        if taken is not None:
            assert len(list(islice(scan, taken))) == taken
        del scan
        assert list(db.scan(limit=0)) == []
        assert not db._node.engine.view._snapshots
