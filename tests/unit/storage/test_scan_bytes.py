"""Scans over large values take them a few at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvrep
from kvrep.storage import view


@pytest.mark.parametrize("reverse", [False, True])
def test_a_step_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reverse: bool) -> None:
    """However large the values are, one step of a scan holds about CHUNK_BYTES of them, and misses none."""
    taken: list[int] = []
    take = view._take_bytes

    def spy(pairs: object, size: int) -> object:
        items, more = take(pairs, size)  # type: ignore[arg-type]
        taken.append(sum(len(value) for _, value in items))
        return items, more

    monkeypatch.setattr(view, "_take_bytes", spy)
    with kvrep.open(tmp_path / "s") as db:
        expected = {b"%03d" % i: bytes([i]) * 200_000 for i in range(60)}
        db.update(expected)
        db.flush()

        found = list(db.scan(reverse=reverse))

    assert found == sorted(expected.items(), reverse=reverse)
    assert 0 < max(taken) <= view.CHUNK_BYTES + 200_000
