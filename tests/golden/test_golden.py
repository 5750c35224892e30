"""Files of released formats: every later version reads them, and writes the present ones byte for byte."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from make_golden import EPOCH, FORWARDED, HERE, LINEAGE, LOGS, write_log

import kvrep
from kvrep.codecs import MSGPACK
from kvrep.model.codec import decode
from kvrep.model.configuration import Configuration
from kvrep.storage.log import START, Run
from kvrep.storage.recovery import recover


@pytest.mark.parametrize("name", LOGS)
def test_the_log_file_is_read(tmp_path: Path, name: str) -> None:
    """Every record of the stored log file is recovered as it was written, and nothing has to be cut."""
    directory = tmp_path / "log"
    directory.mkdir()
    golden = (HERE / f"{name}.log").read_bytes()
    wanted, origins = LOGS[name]
    (directory / f"{1:016d}.log").write_bytes(golden)
    runs: list[Run] = []
    found = recover(
        directory, LINEAGE, START, file_bytes=1 << 16, rescue=tmp_path / "rescue",
        replay=runs.append, epoch_of=lambda run: EPOCH,
    )  # fmt: skip
    try:
        records, running = decode(b"".join(run.data for run in runs), 1, 0)
        assert [(r.kind, r.payload) for r in records] == [
            (kind, list(payload) if isinstance(payload, tuple) else payload) for kind, payload in wanted
        ]
        assert {r.offset: r.origin for r in records if r.origin is not None} == origins
        assert [(r.offset, r.epoch, r.time_us) for r in records] == [
            (n, EPOCH, 1_700_000_000_000_000 + n) for n in range(1, 6)
        ]
        assert found.log.tail == (5, EPOCH, running)
        assert found.committed == 4
        assert found.rescue_path is None
        assert (directory / f"{1:016d}.log").read_bytes() == golden
    finally:
        found.log.close()


@pytest.mark.parametrize("name", LOGS)
def test_the_log_file_is_still_written_so(tmp_path: Path, name: str) -> None:
    """The present code makes the stored bytes of the same records: the format has not changed unnoticed."""
    write_log(tmp_path / "log", name)
    assert (tmp_path / "log").read_bytes() == (HERE / f"{name}.log").read_bytes()


def test_a_lowered_rule_is_read() -> None:
    """Who was away, from where on, and through which record: as the log says it."""
    configurations = [
        Configuration.from_wire(payload).at(n) for n, (_, payload) in enumerate(FORWARDED, 1) if n > 3
    ]
    assert [(c.copies, c.unprotected) for c in configurations] == [(1, ((4, 0),)), (2, ((4, 4),))]
    assert [[v.name for v in c.away] for c in configurations] == [["b"], []]
    assert configurations[0].degrade_after_s == 1.5


@pytest.mark.parametrize("name", ["store-1"])
def test_the_store_is_opened(tmp_path: Path, name: str) -> None:
    """A store of each format opens with all its data, digests and names, and is written on."""
    with tarfile.open(HERE / f"{name}.tar.gz") as tar:
        # The first releases of Python 3.11 have no filters; where they exist, leaving the choice open warns.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(tmp_path)
    wanted = {b"%02d" % i: b"value-%d" % i for i in range(1, 50)}
    wanted |= {b"01": b"changed", b"02": b"in the log alone"}
    with kvrep.open(tmp_path / "store", map_bytes=1 << 20, create=False) as db:
        assert dict(db.scan()) == wanted
        assert db.keyspaces() == ["default", "late", "objects"]
        assert db.keyspace("objects", codec=MSGPACK)[b"o"] == {"a": [1, 2.5, None], "b": b"bytes"}
        assert db.keyspace("late")[b"l"] == b"1"
        status = db.status()
        assert (status.name, status.voters, status.ack_timeout_s) == ("golden", ("golden",), 2.5)
        assert status.rescued == ()
        assert status.applied_offset < status.committed_offset
        assert db.put(b"new", b"1").epoch > status.epoch
        db.flush()
        tree = db._node.engine.tree
        for space in tree.keyspaces:
            assert tree.digest(space) == (tree.state.digests[space], tree.state.counts[space])
    with kvrep.open(tmp_path / "store", map_bytes=1 << 20) as db:
        assert dict(db.scan()) == {**wanted, b"new": b"1"}
        assert db.status().verified_through > 0
