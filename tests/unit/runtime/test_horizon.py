"""The log that named feeds hold: also those whose place cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.codecs import BYTES
from kvrep.keyspace import Keyspace
from kvrep.model.record import FEEDS_KEYSPACE

SMALL: dict[str, Any] = {
    "log_file_bytes": 1 << 16, "retention_bytes": 0, "retention_age_s": 0.0, "retention_bytes_max": 1 << 19,
}  # fmt: skip


@pytest.mark.parametrize("state", [b"no state at all", b"\x81\xa7version\x02"], ids=["damaged", "newer"])
def test_a_place_that_cannot_be_read_holds_the_log(
    tmp_path: Path, state: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can tell what the feed needs, so the log is kept for it, up to the cap, and it is said once."""
    with kvrep.open(tmp_path / "s", **SMALL) as db, caplog.at_level(logging.WARNING, "kvrep.feeds"):
        Keyspace(db._node, FEEDS_KEYSPACE, BYTES).put(b"reader", state)
        db.flush()
        for _ in range(3):
            for i in range(100):
                db.put(b"%d" % i, bytes(1000))
            db.flush()
            db._node.engine.trim()
        assert db.status().first_offset == 1, "held"
        for i in range(600):
            db.put(b"%d" % (i % 100), bytes(1000))
        db.flush()
        db._node.engine.trim()
        assert db.status().first_offset > 1, "not beyond the cap"
        log = db._node.engine.committer.log
        assert (1 << 19) - (2 << 16) < log.bytes_after(log.first - 1) <= 1 << 19
    assert len([r for r in caplog.records if "cannot be read" in r.message]) == 1
