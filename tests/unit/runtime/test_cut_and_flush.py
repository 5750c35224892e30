"""A cut of the log and the flush into LMDB must not meet."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import kvrep


def test_a_cut_waits_for_the_flush_under_way(tmp_path: Path) -> None:
    """A cut during a flush sees what the flush put into LMDB: LMDB never keeps what the log lost."""
    with kvrep.open(tmp_path / "a", flush_interval_s=600.0) as store:
        for i in range(10):
            store.put(b"%d" % i, b"v")
        engine = store._node.engine
        keep = engine.tail.offset - 4
        original, begun, go_on = engine.tree.flush, threading.Event(), threading.Event()

        def slow(*args: Any) -> Any:
            begun.set()
            assert go_on.wait(10)
            return original(*args)

        engine.tree.flush = slow  # type: ignore[method-assign]
        flush = threading.Thread(target=store.flush)
        flush.start()
        assert begun.wait(10)
        failed: list[BaseException] = []

        def cut() -> None:
            try:
                engine.cut(keep, reason="a test")
            except kvrep.LogCorrupt as error:
                failed.append(error)

        cutter = threading.Thread(target=cut)
        cutter.start()
        cutter.join(0.2)
        go_on.set()
        flush.join(10)
        cutter.join(10)
        assert engine.tree.state.applied.offset <= engine.tail.offset
        assert failed
        with pytest.raises(kvrep.LogCorrupt):
            engine.cut(keep, reason="a test")
