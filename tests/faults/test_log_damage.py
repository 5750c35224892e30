"""Damage to the files of a closed or crashed store: never a silent loss of what was proven."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.storage.log_file import GROUP_BYTES, HEADER_BYTES, LogFile

OPTIONS: dict[str, Any] = {"log_file_bytes": 64 << 10, "map_bytes": 16 << 20, "flush_interval_s": 3600.0}


def crash_image(db: kvrep.Store, target: Path) -> Path:
    """Copy the directory of an open store as kill -9 would leave it now."""
    flusher = db._node.engine.flusher
    assert flusher.stop(10.0)
    source = db._node.engine.home.path
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("lock.mdb"))
    return target


def the_log(path: Path) -> Path:
    files = sorted((path / "gen-000001" / "log").glob("0*.log"))
    assert len(files) == 1
    return files[0]


def groups_of(path: Path) -> tuple[list[Any], int]:
    """The groups of a log file and the end of the last one."""
    file = LogFile.open(path)
    assert file is not None
    try:
        groups = list(file.groups())
        return groups, groups[-1].end
    finally:
        file.close()


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, bytes]]:
    """A store that crashed with five writes, none of them flushed into LMDB."""
    folder = tmp_path_factory.mktemp("crashed")
    data = {b"key-%d" % i: b"value-%d" % i * 3 for i in range(5)}
    with kvrep.open(folder / "live", **OPTIONS) as db:
        for key, value in data.items():
            db.put(key, value)
        crash_image(db, folder / "image")
    return folder / "image", data


def reopened(path: Path) -> tuple[dict[bytes, bytes], tuple[str, ...]]:
    with kvrep.open(path, **OPTIONS) as db:
        found, rescued = dict(db.scan()), db.status().rescued
        db.put(b"after", b"1")
    with kvrep.open(path, **OPTIONS) as db:
        assert dict(db.scan()) == {**found, b"after": b"1"}
    return found, rescued


def test_last_group_cut_at_every_byte(crashed: tuple[Path, dict[bytes, bytes]], memory_path: Path) -> None:
    """A log that ends anywhere inside its last group opens, without that group's record and with all others."""
    image, data = crashed
    groups, end = groups_of(the_log(image))
    last = sorted(data)[-1]
    without = {k: v for k, v in data.items() if k != last}
    for cut in range(groups[-1].at, end):
        path = memory_path / f"cut-{cut}"
        shutil.copytree(image, path)
        os.truncate(the_log(path), cut)
        found, rescued = reopened(path)
        assert found == without
        assert bool(rescued) == (cut not in (groups[-1].at, groups[-1].start))
        shutil.rmtree(path)


def test_zeros_from_every_byte_of_the_last_group(
    crashed: tuple[Path, dict[bytes, bytes]], memory_path: Path
) -> None:
    """The same where the file keeps its length and the rest was never written (it reads as zeros)."""
    image, data = crashed
    groups, end = groups_of(the_log(image))
    last = sorted(data)[-1]
    for cut in range(groups[-1].at, end, 3):
        path = memory_path / f"zero-{cut}"
        shutil.copytree(image, path)
        with open(the_log(path), "r+b") as file:
            file.seek(cut)
            file.write(bytes(end - cut))
        found, _ = reopened(path)
        assert found == {k: v for k, v in data.items() if k != last}
        shutil.rmtree(path)


def test_flipped_byte_at_every_position(crashed: tuple[Path, dict[bytes, bytes]], memory_path: Path) -> None:
    """Damage to a proven record stops the open and changes nothing; above the proven point it is cut and saved."""
    image, data = crashed
    groups, end = groups_of(the_log(image))
    last = sorted(data)[-1]
    for at in range(end):
        path = memory_path / f"flip-{at}"
        shutil.copytree(image, path)
        log = the_log(path)
        raw = bytearray(log.read_bytes())
        raw[at] ^= 0x40
        log.write_bytes(raw)
        if at < groups[-1].at:
            with pytest.raises((kvrep.LogCorrupt, kvrep.UpgradeRequired)):
                kvrep.open(path, **OPTIONS)
            assert log.read_bytes() == raw, f"byte {at}: the log was changed"
        else:
            found, rescued = reopened(path)
            assert found == {k: v for k, v in data.items() if k != last}, f"byte {at}"
            assert rescued, f"byte {at}"
        shutil.rmtree(path)


def test_flipped_byte_after_a_clean_close(memory_path: Path) -> None:
    """The mark of a clean close proves the last record: nothing is lost silently anywhere in the file."""
    source = memory_path / "source"
    data = {b"key-%d" % i: b"value" for i in range(3)}
    with kvrep.open(source, **OPTIONS) as db:
        db.update({b"old": b"1"})
        db.flush()
        for key, value in data.items():
            db.put(key, value)
        engine = db._node.engine
        assert engine.flusher.stop(10.0)  # so that close() leaves the last records to the log
    log = the_log(source)
    groups, end = groups_of(log)
    assert groups[-1].length == 0, "no mark"
    for at in range(HEADER_BYTES, end):
        path = memory_path / f"flip-{at}"
        shutil.copytree(source, path)
        raw = bytearray(the_log(path).read_bytes())
        raw[at] ^= 0x01
        the_log(path).write_bytes(raw)
        try:
            found, _ = reopened(path)
        except kvrep.LogCorrupt:
            assert at < groups[-1].at
        else:
            assert found == {**data, b"old": b"1"}, f"byte {at}"
        shutil.rmtree(path)


def test_an_idle_store_proves_its_last_write(memory_store: Path, memory_path: Path) -> None:
    """Some moments after the last write a mark stands behind it: damage to it is no unfinished write any more."""
    with kvrep.open(memory_store, **OPTIONS) as db:
        db.put(b"k", b"v" * 100)
        engine = db._node.engine
        log = the_log(memory_store)
        for _ in range(500):
            if groups_of(log)[0][-1].length == 0:
                break
            engine.flusher._poke.wait(0.02)
        groups, _ = groups_of(log)
        assert groups[-1].length == 0
        assert groups[-1].synced == engine.tail.offset
        image = crash_image(db, memory_path / "image")
    with open(the_log(image), "r+b") as file:
        file.seek(groups[-2].start + 20)
        file.write(b"\xff\xff")
    with pytest.raises(kvrep.LogCorrupt):
        kvrep.open(image, **OPTIONS)


def test_log_bytes_as_values_fool_nobody(memory_store: Path, memory_path: Path) -> None:
    """Whole groups and file headers stored as values are never taken for the log's own."""
    with kvrep.open(memory_store, **OPTIONS) as db:
        db.put(b"a", b"1")
        db.put(b"b", b"2")
        raw = the_log(memory_store).read_bytes().rstrip(b"\0")
        groups, _ = groups_of(the_log(memory_store))
        forged = b"".join(
            groups_of_file.group_header(at, 0, 999, 999, 999)
            for groups_of_file in [_file_like(the_log(memory_store))]
            for at in range(0, 2000, 200)
        )
        db.put(b"c", raw + forged)
        db.put(b"d", raw[groups[0].at :])
        image = crash_image(db, memory_path / "image")
        data = dict(db.scan())
    groups, end = groups_of(the_log(image))
    os.truncate(the_log(image), end - 1)
    found, rescued = reopened(image)
    assert found == {k: v for k, v in data.items() if k != b"d"}
    assert rescued


def _file_like(path: Path) -> LogFile:
    file = LogFile.open(path)
    assert file is not None
    file.close()
    return file


def test_rescue_file_holds_what_was_cut(crashed: tuple[Path, dict[bytes, bytes]], memory_path: Path) -> None:
    """What is cut off is saved byte for byte, and status names the file."""
    image, _ = crashed
    path = memory_path / "store"
    shutil.copytree(image, path)
    groups, end = groups_of(the_log(path))
    tail = the_log(path).read_bytes()[groups[-1].at : end - 2]
    os.truncate(the_log(path), end - 2)
    _, rescued = reopened(path)
    assert len(rescued) == 1
    assert tail.endswith(Path(rescued[0]).read_bytes())
    assert len(tail) - GROUP_BYTES <= len(Path(rescued[0]).read_bytes())


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_lost_lmdb_file_is_no_new_store(memory_store: Path, damage: str) -> None:
    """Without its data file a store does not open, and above all not as an empty one."""
    with kvrep.open(memory_store, **OPTIONS) as db:
        db.put(b"k", b"v")
    data = memory_store / "gen-000001" / "data" / "data.mdb"
    if damage == "missing":
        data.unlink()
    else:
        os.truncate(data, 0)
    with pytest.raises(kvrep.NotAStore):
        kvrep.open(memory_store, **OPTIONS)


def three_files(path: Path) -> list[Path]:
    """A store whose log has three files, the first of them flushed."""
    with kvrep.open(path, **OPTIONS) as db:
        db.put(b"first", b"x" * 50_000)
        db.flush()
        db.put(b"second", b"y" * 50_000)
        db.put(b"third", b"z" * 50_000)
        assert db._node.engine.flusher.stop(10.0)
    files = sorted((path / "gen-000001" / "log").glob("0*.log"))
    assert len(files) == 3
    return files


@pytest.mark.parametrize("which", ["middle", "all", "first two"])
def test_missing_log_file_stops_the_open(memory_store: Path, which: str) -> None:
    """A log with a hole, or no log where LMDB says there was one, is corruption."""
    files = three_files(memory_store)
    for file in {"middle": files[1:2], "all": files, "first two": files[:2]}[which]:
        file.unlink()
    with pytest.raises(kvrep.LogCorrupt):
        kvrep.open(memory_store, **OPTIONS)


def test_log_of_another_store_is_refused(memory_path: Path) -> None:
    """A log file with another lineage does not open."""
    for name in ("a", "b"):
        with kvrep.open(memory_path / name, **OPTIONS) as db:
            db.put(b"k", name.encode())
    shutil.copy(the_log(memory_path / "a"), the_log(memory_path / "b"))
    with pytest.raises(kvrep.LogCorrupt, match="another store"):
        kvrep.open(memory_path / "b", **OPTIONS)


def test_newer_log_format_asks_for_an_upgrade(memory_store: Path) -> None:
    """A log file of a format that is not known is refused by name and left alone."""
    import struct
    from zlib import crc32

    with kvrep.open(memory_store, **OPTIONS) as db:
        db.put(b"k", b"v")
    log = the_log(memory_store)
    raw = bytearray(log.read_bytes())
    struct.pack_into(">H", raw, 8, 2)
    struct.pack_into(">I", raw, 68, crc32(raw[:68]))
    log.write_bytes(raw)
    with pytest.raises(kvrep.UpgradeRequired):
        kvrep.open(memory_store, **OPTIONS)
    assert log.read_bytes() == raw


def test_newer_store_format_asks_for_an_upgrade(memory_store: Path) -> None:
    """The same for the marker of the directory."""
    import json

    kvrep.open(memory_store, **OPTIONS).close()
    marker = json.loads((memory_store / "STORE").read_text())
    (memory_store / "STORE").write_text(json.dumps({**marker, "format": 2}))
    with pytest.raises(kvrep.UpgradeRequired):
        kvrep.open(memory_store, **OPTIONS)


def test_os_durability_opens_after_a_power_loss(memory_store: Path, memory_path: Path) -> None:
    """With durability "os" a power loss may take the unsynced tail, whatever part of it; the rest opens."""
    options = {**OPTIONS, "durability": "os", "sync_interval_s": 3600.0}
    with kvrep.open(memory_store, **options) as db:
        for i in range(6):
            db.put(b"key-%d" % i, b"value")
        image = crash_image(db, memory_path / "image")
    groups, _ = groups_of(the_log(image))
    with open(the_log(image), "r+b") as file:  # the third group never reached the disk, later ones did
        file.seek(groups[3].at)
        file.write(bytes(groups[3].end - groups[3].at))
    with kvrep.open(image, **options) as db:
        found = dict(db.scan())
        assert db.status().rescued
    keys = [b"key-%d" % i for i in range(6)]
    assert found == dict.fromkeys(keys[: len(found)], b"value")


def test_damaged_identity_copy_is_survived(memory_store: Path) -> None:
    """The identity is stored twice: one damaged copy changes nothing, two are an error."""
    with kvrep.open(memory_store, **OPTIONS) as db:
        db.put(b"k", b"v")
        store_id = db.status().store_id
    identity = memory_store / "IDENTITY"
    raw = identity.read_bytes()
    for slot in (0, 4096):
        identity.write_bytes(raw[: slot + 30] + b"\xff\xff\xff" + raw[slot + 33 :])
        with kvrep.open(memory_store, **OPTIONS) as db:
            assert db.status().store_id == store_id
            assert db[b"k"] == b"v"
    identity.write_bytes(bytes(8192))
    with pytest.raises(kvrep.CorruptionError):
        kvrep.open(memory_store, **OPTIONS)


def test_group_header_sizes_are_as_documented() -> None:
    """The sizes that the tests above count with are those of the format."""
    assert (HEADER_BYTES, GROUP_BYTES) == (72, 36)
