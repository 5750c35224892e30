"""Makes the golden files of the present formats: ``python tests/golden/make_golden.py``. Old ones are never changed.

``log-1.log``     one log file, with every kind of record, a transaction over keyspaces and a mark
``log-1-forwarded.log``  the same with forwarded writes, and a rule that went on with fewer copies
``log-1-bounded.log``  the same with a bound on what acks=0 may lose, and without it again
``store-1.tar.gz``  the directory of a closed store: data in LMDB, in the log alone, and in several keyspaces
``store-2.tar.gz``  the same with a named feed, messages, former values, forwarded writes and a follower's slot
``messages-1.json``  a message of every kind that goes over the wire or into a broker, in hexadecimal
``rescue-1.kvrescue``  records 3 to 5 of ``log-1.log``, as they are saved before a log is cut
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import kvrep
from kvrep.codecs import MSGPACK
from kvrep.errors import LogTrimmed
from kvrep.model.codec import RecordEncoder
from kvrep.model.configuration import Configuration
from kvrep.model.position import EpochTable, Position
from kvrep.model.record import Kind, write_payload
from kvrep.model.sessions import Origin
from kvrep.options import Options
from kvrep.replication.envelope import Envelope, EnvelopeKind, History, decode_envelope, encode_envelope
from kvrep.replication.messages import (
    Ack,
    Confirm,
    Credit,
    Fence,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Probe,
    Promise,
    Refused,
    Segment,
    SlotState,
    Truncate,
    Welcome,
)
from kvrep.runtime.description import Description
from kvrep.runtime.node import Node
from kvrep.storage.log import START, Tail
from kvrep.storage.log_file import FileHeader, LogFile
from kvrep.storage.recovery import recover
from kvrep.storage.rescue import save_records
from kvrep.transport import calls, faults, wire
from kvrep.transport.interface import SnapshotChunk, SnapshotInfo, SnapshotRequest
from kvrep.transport.memory import MemoryTransport

HERE = Path(__file__).parent
LINEAGE, SALT = bytes(range(16)), b"saltsalt"
EPOCH = 1001
CONFIGURATION = Configuration(acks=1, ack_timeout_s=2.5).with_voter(b"s" * 16, "a", "host-a:7400")
RECORDS: list[tuple[int, Any]] = [
    (
        Kind.EPOCH,
        {
            "lineage": LINEAGE, "branch": LINEAGE, "configuration": CONFIGURATION.to_wire(),
            "promoter": b"s" * 16, "name": "a", "address": "host-a:7400", "fenced": [b"s" * 16],
            "unfenced": False,
        },
    ),
    (Kind.WRITE, write_payload([("default", b"k", b"v")])),
    (
        Kind.WRITE,
        write_payload(
            [("default", b"\x00\xff", b""), ("default", b"k", None), ("users", b"u" * 511, b"x" * 300)]
        ),
    ),
    (Kind.CONFIGURATION, Configuration(acks="majority", ack_timeout_s=1.0).to_wire()),
    (Kind.DIGEST, [0, {"default": bytes(16)}]),
]  # fmt: skip
"""Kind and payload of records 1 to 5."""
GROUPS = [[1, 2], [3], [4, 5], []]
"""Which records were written together; the last group is a mark."""


DEGRADED = (
    Configuration(acks=1, ack_timeout_s=2.5, degrade_after_s=1.5)
    .with_voter(b"s" * 16, "a", "host-a:7400")
    .with_voter(b"t" * 16, "b", "host-b:7400")
    .with_voter(b"w" * 16, "w", "host-w:7400", witness=True)
)
FORWARDED: list[tuple[int, Any]] = [
    (Kind.EPOCH, {**RECORDS[0][1], "configuration": DEGRADED.to_wire()}),
    (Kind.WRITE, write_payload([("default", b"k", b"v")])),
    (Kind.WRITE, write_payload([("default", b"k", b"w"), ("users", b"u", None)])),
    (Kind.CONFIGURATION, DEGRADED.without([b"t" * 16], 4).to_wire()),
    (Kind.CONFIGURATION, DEGRADED.without([b"t" * 16], 4).with_copy_of(b"t" * 16).to_wire()),
]
ORIGINS = {2: Origin(b"t" * 16, 0x0123456789ABCD, 7, 5), 3: Origin(b"t" * 16, 0x0123456789ABCD, 8, 8)}
"""Who forwarded records 2 and 3 of ``log-1-forwarded.log``."""
BOUNDED = (
    Configuration(acks=0, lag_records_max=1000)
    .with_voter(b"s" * 16, "a", "host-a:7400")
    .with_voter(b"t" * 16, "b", "host-b:7400")
)
BOUNDED_RECORDS: list[tuple[int, Any]] = [
    (Kind.EPOCH, {**RECORDS[0][1], "configuration": BOUNDED.to_wire()}),
    *RECORDS[1:3],
    (Kind.CONFIGURATION, replace(BOUNDED, lag_records_max=0).to_wire()),
    (Kind.CONFIGURATION, replace(BOUNDED, lag_records_max=2**40).to_wire()),
]
LOGS: dict[str, tuple[list[tuple[int, Any]], dict[int, Origin]]] = {
    "log-1": (RECORDS, {}),
    "log-1-forwarded": (FORWARDED, ORIGINS),
    "log-1-bounded": (BOUNDED_RECORDS, {}),
}


ID, OTHER = b"i" * 16, b"o" * 16
TABLE = EpochTable([(1001, 1), (2002, 50)])
DESCRIPTION = Description(
    lineage=LINEAGE, branch=OTHER, applied=Tail(77, 2002, 0xDEADBEEF), epoch=2002, last=80, store_id=ID,
    name="a", branches=(LINEAGE, OTHER), epochs=TABLE,
)  # fmt: skip
HISTORY = History(
    lineage=LINEAGE, branch=OTHER, ancestors=(LINEAGE,), epoch=2002, epochs=TABLE, source_id=ID, source="a"
)


class Message(NamedTuple):
    """A value, and what makes bytes of it and back."""

    value: Any
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def _up(value: Any) -> Message:
    return Message(value, wire.encode_from_follower, wire.decode_from_follower)


def _down(value: Any) -> Message:
    return Message(value, wire.encode_from_primary, wire.decode_from_primary)


def _broker(kind: EnvelopeKind, **more: Any) -> Message:
    value = Envelope(kind=kind, history=HISTORY, time_us=5, source_last=80, first=77, last=77, **more)
    return Message(value, encode_envelope, decode_envelope)


def _error_fields(data: bytes) -> Any:
    error = faults.decode_fault(data)
    return type(error), error.message, error.hint, error.fields


MESSAGES: dict[str, Message] = {
    "ack": _up(Ack(written=3, synced=2, visible=1, promised_epoch=1001, stamp_us=5)),
    "confirm": _up(Confirm(round=7, promised_epoch=1001)),
    "credit": _up(Credit(bytes_granted=1 << 20)),
    "hello": _up(
        Hello(
            store_id=ID, name="b", lineage=LINEAGE, branch=OTHER, protocol_min=1, protocol_max=2,
            features=("probes", "zstd"), voter=True, address="host-b:7400", promised_epoch=2002,
            last=Position(2002, 77), running=0xDEADBEEF, applied=70, committed=76, epochs=TABLE,
            credit_bytes=8 << 20,
        )
    ),
    "hello with durability": _up(Hello(store_id=ID, name="b", credit_bytes=8 << 20, durability="os")),
    "promise": _up(
        Promise(
            epoch=3001, last=Position(2002, 77), committed=76, epochs=TABLE, lowered=Position(2002, 60)
        )
    ),
    "fence": _down(Fence(epoch=1001)),
    "heartbeat": _down(
        Heartbeat(
            epoch=2002, last=77, committed=76, stamp_us=5, time_us=1_700_000_000_000_000,
            slots=(SlotState(store_id=ID, name="b", acked=70),), path=("a", "b"), behind_bytes=1000,
        )
    ),
    "need bootstrap": _down(NeedBootstrap(first=60, reason="trimmed")),
    "probe": _down(Probe(epoch=1001, round=7)),
    "refused": _down(
        Refused(reason="not-primary", message="ask a", primary_address="host-a:7400", epoch=2002)
    ),
    "segment": _down(Segment(epoch=1001, first=5, last=6, data=b"records", committed=4, compressed=True)),
    "truncate": _down(Truncate(to=Position(1001, 49), epoch=2002)),
    "welcome": _down(
        Welcome(
            lineage=LINEAGE, branch=OTHER, store_id=ID, name="a", epoch=2002, protocol=1,
            features=("probes",), heartbeat_interval_ms=1000, last=Position(2002, 77),
        )
    ),
    "snapshot info": Message(
        SnapshotInfo(
            snapshot_id="s1", bytes_total=9, position=Position(2002, 77), meta=DESCRIPTION.encode()
        ),
        wire.encode_snapshot_item, wire.decode_snapshot_item,
    ),
    "snapshot chunk": Message(
        SnapshotChunk(offset=5, data=b"data", crc32=crc32(b"data")),
        wire.encode_snapshot_item, wire.decode_snapshot_item,
    ),
    "snapshot request": Message(
        SnapshotRequest(store_id=ID, name="b", snapshot_id="s1", offset=5, lineage=LINEAGE),
        wire.encode_snapshot_request, wire.decode_snapshot_request,
    ),
    "description": Message(DESCRIPTION, Description.encode, Description.decode),
    "call": Message(
        ("get", {"key": b"k", "at_least": None}), lambda value: calls.encode_call(*value), calls.decode_call
    ),
    "request": Message({"prefix": b"k", "limit": 5}, calls.encode_request, calls.decode_request),
    "answer": Message({"value": b"v"}, calls.encode_answer, calls.decode_answer),
    "scan chunk": Message([(b"k", b"v"), (b"l", b"")], calls.encode_scan_chunk, calls.decode_scan_chunk),
    "error": Message(
        (LogTrimmed, "too old", "take a snapshot", {"first": 5}),
        lambda value: faults.encode_fault(value[0](value[1], hint=value[2], **value[3])), _error_fields,
    ),
    "broker records": _broker(EnvelopeKind.RECORDS, part=1, parts=3, data=b"a part"),
    "broker mark": _broker(EnvelopeKind.MARK),
    "broker snapshot": _broker(
        EnvelopeKind.SNAPSHOT, snapshot_id="s1", bytes_total=9, snapshot_epoch=2002, meta=b"meta"
    ),
    "broker piece": _broker(EnvelopeKind.PIECE, snapshot_id="s1", at=5, data=b"data"),
}  # fmt: skip
"""By their names in ``messages-1.json``."""


def write_rescue(folder: Path) -> Path:
    """The rescue file that the present code makes of records 3 to 5 of ``log-1.log``; its time is now."""
    directory = folder / "log"
    directory.mkdir()
    (directory / f"{1:016d}.log").write_bytes((HERE / "log-1.log").read_bytes())
    found = recover(
        directory, LINEAGE, START, file_bytes=1 << 16, rescue=folder / "unfinished", replay=lambda run: None,
        epoch_of=lambda run: EPOCH,
    )  # fmt: skip
    try:
        return save_records(folder / "rescue", found.log, 3, 5, lineage=LINEAGE, reason="a test")
    finally:
        found.log.close()


def write_log(path: Path, name: str) -> None:
    """The log file that the present code makes of the above: the same bytes every time."""
    records, origins = LOGS[name]
    path.write_bytes(b"")
    file = LogFile.start(path, FileHeader(LINEAGE, SALT, 1, 1, 0, 0))
    encode, running, synced = RecordEncoder().encode, 0, 0
    try:
        for group in GROUPS:
            frames = []
            for offset in group:
                kind, payload = records[offset - 1]
                frame, running = encode(
                    offset, EPOCH, 1_700_000_000_000_000 + offset, kind, payload, running, origins.get(offset)
                )
                frames.append(frame)
            file.end = file.write_group(
                frames, sum(map(len, frames)), synced + 1, synced, max(0, synced - 1), sync=False
            )
            synced = group[-1] if group else synced
    finally:
        file.close()


def make_store(path: Path) -> None:
    """A store with flushed, overwritten, deleted and unflushed data."""
    options: dict[str, Any] = {"log_file_bytes": 64 << 10, "map_bytes": 1 << 20, "flush_interval_s": 3600.0}
    with kvrep.open(path, name="golden", ack_timeout_s=2.5, **options) as db:
        db.update({b"%02d" % i: b"value-%d" % i for i in range(50)})
        db.keyspace("objects", codec=MSGPACK).put(b"o", {"a": [1, 2.5, None], "b": b"bytes"})
        db.flush()
        db.delete(b"00")
        db.put(b"01", b"changed")
        db.flush()
        db.put(b"02", b"in the log alone")
        db.keyspace("late").put(b"l", b"1")
        assert db._node.engine.flusher.stop(10.0)  # so that close() leaves these to the log


def make_store_2(path: Path) -> None:
    """A store that was a primary: with a named feed, messages, former values and what a follower forwarded."""
    options: dict[str, Any] = {"log_file_bytes": 64 << 10, "map_bytes": 1 << 20, "flush_interval_s": 3600.0}
    network = MemoryTransport()

    def opened(where: Path, **more: Any) -> kvrep.Store:
        return kvrep.Store(Node.open(where, Options.of({**options, **more}), network))  # type: ignore[typeddict-item]

    with (
        opened(path, name="golden", listen="127.0.0.1:7400") as db,
        opened(path.parent / "far", name="far", follow=db.address, voter=False, forward_writes=True) as far,
    ):
        with db.feed("reader", after=db.position, topic="orders", keyspace=["default", "kept"]) as feed:
            db.put(b"k", b"1")
            feed.ack(feed.poll()[-1])
        kept = db.keyspace("kept", keep_before=True)
        kept.put(b"a", b"first")
        far.put(b"forwarded", b"flushed")
        db.flush()
        kept.put(b"a", b"second")
        with db.transaction() as txn:
            txn[b"k"] = b"2"
            txn.emit("orders", b"payload", headers={"source": "golden"})
        far.put(b"forwarded", b"in the log alone")
        far.close()
        assert db._node.engine.flusher.stop(10.0)  # so that close() leaves these to the log


def pack(folder: Path) -> bytes:
    """A store's directory as an archive, without what belongs to the machine."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        tar.add(
            folder, "store",
            filter=lambda info: None if info.name.endswith(("LOCK", "lock.mdb")) else _plain(info),
        )  # fmt: skip
    return gzip.compress(raw.getvalue(), mtime=0)


STORES: dict[str, Callable[[Path], None]] = {"store-1": make_store, "store-2": make_store_2}


def main() -> None:
    for name in LOGS:
        if not (HERE / f"{name}.log").exists():
            write_log(HERE / f"{name}.log", name)
    for name, make in STORES.items():
        archive = HERE / f"{name}.tar.gz"
        if not archive.exists():
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder) / "store")
                archive.write_bytes(pack(Path(folder) / "store"))
    messages = HERE / "messages-1.json"
    if not messages.exists():
        made = {name: m.encode(m.value).hex() for name, m in MESSAGES.items()}
        messages.write_text(json.dumps(made, indent=1) + "\n")
    rescue = HERE / "rescue-1.kvrescue"
    if not rescue.exists():
        with tempfile.TemporaryDirectory() as folder:
            rescue.write_bytes(write_rescue(Path(folder)).read_bytes())


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    main()
