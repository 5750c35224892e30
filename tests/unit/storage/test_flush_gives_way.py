"""The flush and the threads that wait for the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvrep
from kvrep.storage import flusher


def test_the_flush_gives_way_while_records_come(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every slice while the log grows and a little longer; shortly when it has fallen behind; else not."""
    with kvrep.open(store_path) as db:
        engine = db._node.engine
        made = engine.flusher
        now, slept = [100.0], []
        monkeypatch.setattr(made, "_clock", lambda: now[0])
        monkeypatch.setattr(flusher.time, "sleep", slept.append)

        def breaths(count: int) -> list[float]:
            slept.clear()
            for _ in range(count):
                made._breathe()
            return slept

        db.put(b"k", b"1")
        assert breaths(3) == [flusher.BREATH_S] * 3
        now[0] += flusher.CALM_S
        assert breaths(3) == []
        db.put(b"k", b"2")
        assert breaths(1) == [flusher.BREATH_S]
        monkeypatch.setattr(made, "memtable_bytes_max", 1)
        assert breaths(1) == [flusher.BREATH_BEHIND_S]
        monkeypatch.undo()


def test_followers_take_part(tmp_path: Path) -> None:
    """What counts is the log, whoever writes it: a follower's flush gives way to what it receives."""
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as a,
        kvrep.open(tmp_path / "b", name="b", follow=a.address) as b,
    ):
        made = b._node.engine.flusher
        before = made._logged()
        b.wait_for(a.put(b"k", b"1"))
        assert made._logged() > before
