"""Makes the golden files of the present formats: ``python tests/golden/make_golden.py``. Old ones are never changed.

``log-1.log``     one log file, with every kind of record, a transaction over keyspaces and a mark
``log-1-forwarded.log``  the same with forwarded writes, and a rule that went on with fewer copies
``store-1.tar.gz``  the directory of a closed store: data in LMDB, in the log alone, and in several keyspaces
"""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import kvrep
from kvrep.codecs import MSGPACK
from kvrep.model.codec import RecordEncoder
from kvrep.model.configuration import Configuration
from kvrep.model.record import Kind, write_payload
from kvrep.model.sessions import Origin
from kvrep.storage.log_file import FileHeader, LogFile

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
LOGS: dict[str, tuple[list[tuple[int, Any]], dict[int, Origin]]] = {
    "log-1": (RECORDS, {}),
    "log-1-forwarded": (FORWARDED, ORIGINS),
}


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


def main() -> None:
    store = HERE / "store-1.tar.gz"
    for name in LOGS:
        if not (HERE / f"{name}.log").exists():
            write_log(HERE / f"{name}.log", name)
    if not store.exists():
        with tempfile.TemporaryDirectory() as folder:
            make_store(Path(folder) / "store")
            raw = io.BytesIO()
            with tarfile.open(fileobj=raw, mode="w") as tar:
                tar.add(
                    Path(folder) / "store", "store",
                    filter=lambda info: None if info.name.endswith(("LOCK", "lock.mdb")) else _plain(info),
                )  # fmt: skip
            store.write_bytes(gzip.compress(raw.getvalue(), mtime=0))


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    main()
