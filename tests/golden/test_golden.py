"""Files of released formats: every later version reads them, and writes the present ones byte for byte."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any, get_args

import pytest
from make_golden import (
    BOUNDED_RECORDS,
    EPOCH,
    FORWARDED,
    HERE,
    LINEAGE,
    LOGS,
    MESSAGES,
    RECORDS,
    write_log,
    write_rescue,
)

import kvrep
from kvrep.codecs import MSGPACK
from kvrep.model.codec import decode
from kvrep.model.configuration import Configuration
from kvrep.model.record import Kind
from kvrep.model.sessions import RequestId
from kvrep.replication.envelope import Envelope, EnvelopeKind
from kvrep.replication.messages import FromFollower, FromPrimary
from kvrep.storage.log import START, Run
from kvrep.storage.recovery import recover
from kvrep.storage.rescue import load_rescue
from kvrep.testing.storecheck import check_store, log_records

STORED = json.loads((HERE / "messages-1.json").read_text())


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


def test_a_bounded_rule_is_read() -> None:
    """How much acks=0 may lose: in the epoch start, and as it was changed; an older log sets no bound."""
    start, *changes = (payload for kind, payload in BOUNDED_RECORDS if kind != Kind.WRITE)
    read = [Configuration.from_wire(data) for data in (start["configuration"], *changes)]
    assert [c.lag_records_max for c in read] == [1000, 0, 2**40]
    assert Configuration.from_wire(RECORDS[0][1]["configuration"]).lag_records_max == 0


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_still_read_and_written_so(name: str) -> None:
    """The stored bytes of every kind of message mean what they meant, and the present code makes the same."""
    message = MESSAGES[name]
    assert message.decode(bytes.fromhex(STORED[name])) == message.value
    assert message.encode(message.value).hex() == STORED[name]


def test_every_kind_of_message_is_stored() -> None:
    """A new message needs a golden one."""
    assert set(STORED) == set(MESSAGES)
    values = [message.value for message in MESSAGES.values()]
    assert {*get_args(FromFollower), *get_args(FromPrimary)} <= {type(value) for value in values}
    assert {value.kind for value in values if isinstance(value, Envelope)} == set(EnvelopeKind)


def test_the_rescue_file_is_read() -> None:
    """What was dropped years ago can still be looked at."""
    saved = load_rescue(HERE / "rescue-1.kvrescue")
    assert (saved.first, saved.last, saved.reason, saved.lineage) == (3, 5, "a test", LINEAGE.hex())
    assert [r.kind for r in saved.records] == [kind for kind, _ in RECORDS[2:]]
    assert saved.records[0].ops() == [
        ("default", b"\x00\xff", b""), ("default", b"k", None), ("users", b"u" * 511, b"x" * 300)
    ]  # fmt: skip


def test_the_rescue_file_is_still_written_so(tmp_path: Path) -> None:
    """But for the time in it, the present code makes the stored bytes of the same records."""
    parts = []
    for path in (HERE / "rescue-1.kvrescue", write_rescue(tmp_path)):
        raw = path.read_bytes()
        end = 12 + int.from_bytes(raw[8:12], "big")
        header = json.loads(raw[12:end])
        assert header.pop("time") > 1.7e9
        parts.append((raw[:8], header, raw[end:]))
    assert parts[0] == parts[1]


def unpacked(name: str, folder: Path) -> Path:
    """A stored store, in a folder of its own."""
    with tarfile.open(HERE / f"{name}.tar.gz") as tar:
        # The first releases of Python 3.11 have no filters; where they exist, leaving the choice open warns.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)
    return folder / "store"


def test_the_store_with_feeds_is_opened(tmp_path: Path) -> None:
    """A named feed goes on where it stood, with messages and former values; forwarded writes are known."""
    options: dict[str, Any] = {"map_bytes": 1 << 20, "log_file_bytes": 64 << 10}
    with kvrep.open(unpacked("store-2", tmp_path), create=False, **options) as db:
        assert dict(db.scan()) == {b"k": b"2", b"forwarded": b"in the log alone"}
        assert dict(db.keyspace("kept").scan()) == {b"a": b"second"}
        assert db.status().rescued == ()
        with db.feed("reader", before=True) as feed:
            found = [(c.kind, c.keyspace, c.key, c.value, c.before) for c in feed.poll()]
            messages = [(c.topic, c.value, c.headers) for c in feed.poll(0)]
        assert messages == []
        assert found == [
            ("put", "kept", b"a", b"first", None),
            ("put", "default", b"forwarded", b"flushed", None),
            ("put", "kept", b"a", b"second", b"first"),
            ("put", "default", b"k", b"2", None),
            ("emit", "", b"", b"payload", None),
            ("put", "default", b"forwarded", b"in the log alone", None),
        ]
        sent = [record.origin for record in log_records(db) if record.origin is not None]
        assert [origin.sequence for origin in sent] == [1, 2]
        assert len(db._node.engine.tree.state.sessions) == 1
        newest = RequestId(sent[1].store_id, sent[1].session, 2, 0)
        assert db.resolve(newest) is kvrep.Outcome.COMMITTED
        assert check_store(db) == []


@pytest.mark.parametrize("name", ["store-1"])
def test_the_store_is_opened(tmp_path: Path, name: str) -> None:
    """A store of each format opens with all its data, digests and names, and is written on."""
    unpacked(name, tmp_path)
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
