"""How old the files of a log are: by the monotonic clock while the store is open."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvrep
from kvrep.storage import log_file

YEAR_S = 365 * 86_400.0
AGE_S = 3600.0


class Clock:
    """How far both clocks are ahead of the true ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = self.monotonic_s = 0.0
        clock = SimpleNamespace(
            time=lambda: time.time() + self.wall_s, monotonic=lambda: time.monotonic() + self.monotonic_s
        )
        monkeypatch.setattr(log_file, "time", clock)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def opened(path: Path) -> kvrep.Store:
    """Files are kept by their age alone."""
    return kvrep.open(path, log_file_bytes=1 << 16, retention_bytes=1 << 30, retention_age_s=AGE_S)


def first_kept(db: kvrep.Store) -> int:
    """The first record that a trim leaves."""
    db._node.engine.trim()
    return db.status().first_offset


def filled(db: kvrep.Store) -> kvrep.Store:
    """With several files that are applied."""
    for i in range(300):
        db.put(b"%d" % i, bytes(1000))
    db.flush()
    return db


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S])
def test_a_jump_of_the_wall_clock_trims_nothing_early_or_late(
    memory_store: Path, clock: Clock, jump_s: float
) -> None:
    """Whatever the wall clock does, a file goes when it is as old as it may become."""
    with opened(memory_store) as db:
        filled(db)
        clock.wall_s = jump_s
        assert first_kept(db) == 1
        clock.monotonic_s = AGE_S - 60
        assert first_kept(db) == 1
        clock.monotonic_s = AGE_S + 60
        assert first_kept(db) > 200


def test_files_of_an_earlier_run_are_as_old_as_the_disk_says(memory_store: Path, clock: Clock) -> None:
    """Once, at the open; a wall clock that is behind them makes them new, never younger than that."""
    with opened(memory_store) as db:
        filled(db)
    clock.wall_s = AGE_S / 2
    with opened(memory_store) as db:
        clock.wall_s = 0.0
        clock.monotonic_s = AGE_S / 2 - 60
        assert first_kept(db) == 1
    clock.wall_s, clock.monotonic_s = -YEAR_S, 0.0
    with opened(memory_store) as db:
        clock.monotonic_s = AGE_S - 60
        assert first_kept(db) == 1
    clock.wall_s, clock.monotonic_s = AGE_S + 60, 0.0
    with opened(memory_store) as db:
        assert first_kept(db) > 200


def test_a_file_is_as_old_as_its_last_record(memory_store: Path, clock: Clock) -> None:
    """A file that was written to for long begins to age when it is left."""
    with opened(memory_store) as db:
        db.put(b"first", bytes(1000))
        clock.monotonic_s = 2 * AGE_S
        filled(db)
        assert first_kept(db) == 1
        clock.monotonic_s += AGE_S + 60
        assert first_kept(db) > 200
