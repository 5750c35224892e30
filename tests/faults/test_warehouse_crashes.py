"""Agents into a warehouse, killed with SIGKILL at every point of a commit and of what follows from it."""

from __future__ import annotations

import random
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import kvrep
from kvrep.codecs import JSON
from kvrep.sinks.tables import Table
from tests.agent_kit import agent_of, content, wait_current
from tests.warehouse_kit import EAGER, ask, current, need_warehouse, replayed

need_warehouse()

from kvrep.sinks.warehouse import WarehouseSink  # noqa: E402

DOCS = {"docs": Table(JSON)}


def checked(folder: Path, db: kvrep.Store) -> None:
    """History and current state are what the store is, and no change is there twice or missing."""
    expected = content(db)
    expected.get("docs", {}).pop(b"bad", None)
    docs = dict(ask(folder, "SELECT key, value FROM current_docs")) if "docs" in expected else {}
    assert {key: value.encode() for key, value in docs.items()} == expected.get("docs", {})
    found, state = replayed(folder), current(folder)
    for space in expected.keys() - {"docs"}:
        assert found[space] == state[space] == expected[space]
    rows = ask(folder, "SELECT log_offset, log_index FROM history WHERE NOT snapshot")
    assert len(set(rows)) == len(rows), "a change is there twice"
    totals = ask(folder, "SELECT value FROM history WHERE key = 'total'::BLOB ORDER BY number")
    counted = [int(value) for (value,) in totals]
    assert counted == list(range(counted[0], counted[0] + len(counted))), (
        "a change is missing, or out of order"
    )


@pytest.mark.parametrize(
    ("point", "times"),
    [
        ("staged:before", 0), ("staged:within", 0), ("staged:after", 0), ("staged:after", 1),
        ("history:before", 0), ("history:within", 0), ("history:after", 0), ("history:within", 2),
        ("history:after", 3), ("current:before", 0), ("current:within", 1), ("current:after", 0),
        ("dead_letters:before", 0), ("dead_letters:within", 0), ("dead_letters:after", 0),
    ],
)  # fmt: skip
def test_an_agent_killed_at_a_point_leaves_nothing_double_or_missing(
    tmp_path: Path, point: str, times: int
) -> None:
    """The next agent goes on from the place, and repairs what was half done."""
    folder = tmp_path / "lake"
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as db:
        for i in range(300):
            db.submit_put(b"%05d" % i, b"v" * 20)
        db.put(b"total", b"0")
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.warehouse_child", db.address, str(folder), point, str(times)],
            stdout=subprocess.DEVNULL,
        )
        try:
            number = 0
            deadline = time.monotonic() + 30
            while child.poll() is None:
                assert time.monotonic() < deadline, "it did not come to that point"
                number += 1
                with db.batch() as batch:
                    batch.put(b"total", b"%d" % number)
                    batch.put(b"%05d" % (number % 300), b"%d" % number)
                db.keyspace("docs").put(b"d%d" % number, b"%d" % number)
                db.keyspace("docs").put(b"bad", b"no json %d" % number)
                select.select([], [], [], 0.005)
        finally:
            child.kill()
            child.wait(10)
        assert child.returncode == -signal.SIGKILL
        with agent_of(db, WarehouseSink(f"delta:{folder}{EAGER}", tables=DOCS)) as agent:
            wait_current(agent, db)
            assert [x.key for x in agent.sink.dead_letters()] == [b"bad"]
        checked(folder, db)


class Writer(threading.Thread):
    """Counts, in transactions of two keys."""

    def __init__(self, db: kvrep.Store) -> None:
        super().__init__(name="writer")
        self._db = db
        self.stop = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.stop.wait(0.0005):
            number += 1
            with self._db.batch() as batch:
                batch.put(b"%d" % (number % 50), b"%d" % number)
                batch.put(b"total", b"%d" % number)


def test_an_agent_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL at random moments under load: every change is in the history once, and the copies are equal."""
    chance = random.Random(5)
    folder = tmp_path / "lake"
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0") as db:
        writer = Writer(db)
        writer.start()
        try:
            for _ in range(4):
                child = subprocess.Popen(
                    [sys.executable, "-m", "tests.agent_child", db.address, f"delta:{folder}{EAGER}"],
                    stdout=subprocess.PIPE,
                )
                with child:
                    assert child.stdout is not None
                    assert child.stdout.readline() == b"ready\n"
                    writer.join(chance.uniform(0.0, 0.4))
                    child.kill()
                    child.wait(10)
        finally:
            writer.stop.set()
            writer.join(10)
        with agent_of(db, WarehouseSink(f"delta:{folder}{EAGER}")) as agent:
            wait_current(agent, db)
            assert agent.status().consistent
        checked(folder, db)
