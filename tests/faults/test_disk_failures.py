"""Disks that fail and disks that are full: typed errors, reads that go on, nothing acknowledged lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest

import kvrep
from kvrep.storage.rescue import load_rescue
from tests.replication_kit import opened, stores, until, voters

OPTIONS: dict[str, Any] = {"log_file_bytes": 64 << 10, "map_bytes": 16 << 20, "flush_interval_s": 3600.0}
STRACE = shutil.which("strace")


class Disk:
    """Makes calls of :mod:`os` fail that concern log files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: int | None = None
        self.calls: tuple[str, ...] = ()
        self.seen = 0
        for name in ("pwritev", "fdatasync", "fsync", "posix_fallocate"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *args: Any) -> Any:
            if name == "pwritev" and not any(b"".join(args[0])):
                return real(fd, *args)  # wiping a few bytes needs no room
            if (
                self.error is not None
                and name in self.calls
                and os.readlink(f"/proc/self/fd/{fd}").endswith(".log")
            ):
                self.seen += 1
                raise OSError(self.error, os.strerror(self.error))
            return real(fd, *args)

        return call

    def fail(self, error: int, *calls: str) -> None:
        self.error, self.calls = error, calls

    def heal(self) -> None:
        self.error = None


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_eio_makes_the_store_read_only(store_path: Path, disk: Disk, call: str) -> None:
    """After a failed write or flush of the log every write is StorageFailed, reads go on, and reopening helps."""
    options = {**OPTIONS, "durability": "os" if call == "fdatasync" else "sync", "sync_interval_s": 0.001}
    db = kvrep.open(store_path, **options)
    db.put(b"before", b"1")
    disk.fail(errno.EIO, call)
    if call == "pwritev":
        with pytest.raises(kvrep.LogFailed) as caught:
            db.put(b"failed", b"1")
        position = caught.value.position
        assert position.offset == db.status().last_offset + 1
        assert db.resolve(position) is kvrep.Outcome.PENDING
    else:
        db.put(b"written", b"1")
        wait_for(lambda: db._node.engine.committer.failure is not None)
    disk.heal()
    for attempt in (
        lambda: db.put(b"after", b"1"),
        lambda: db.submit_put(b"after", b"1"),
        lambda: db.pop(b"before"),
    ):
        with pytest.raises(kvrep.StorageFailed) as refused:
            attempt()
        assert not isinstance(refused.value, kvrep.UnknownOutcome)
    with pytest.raises(kvrep.StorageFailed), db.batch() as batch:
        batch.put(b"after", b"1")
    assert db[b"before"] == b"1"
    assert b"after" not in db
    assert (b"before", b"1") in list(db.scan())
    with db.snapshot() as view:
        assert view[b"before"] == b"1"
    assert "could not be written" in db.status().not_writable
    db.close()
    with kvrep.open(store_path, **options) as db:
        assert db[b"before"] == b"1"
        assert b"after" not in db
        db.put(b"again", b"1")
        if call == "pwritev":
            assert db.resolve(position) is kvrep.Outcome.ROLLED_BACK
    with kvrep.open(store_path, **options) as db:
        assert db[b"again"] == b"1"


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    event = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("the condition did not come true in time")


def test_eio_fails_all_that_wait(store_path: Path, disk: Disk) -> None:
    """Writes of a failed group are unknown, each at its position; what stood behind them was not logged."""
    with kvrep.open(store_path, **OPTIONS) as db:
        before = db.put(b"before", b"1")
        committer = db._node.engine.committer
        with pytest.raises(kvrep.StorageFailed), db.transaction() as txn:
            with committer.lead:
                futures = [db.submit_put(b"%d" % i, b"") for i in range(50)]
                txn.get(b"before")  # takes the place: what follows stands behind it
                behind = [db.submit_put(b"%d" % i, b"") for i in range(50, 60)]
                disk.fail(errno.EIO, "pwritev")
            errors = [f.exception(10) for f in futures]
            txn.put(b"no", b"")
        assert {type(e) for e in errors} == {kvrep.LogFailed}
        assert [e.position.offset - before.offset for e in errors] == list(range(1, 51))
        assert {type(f.exception(10)) for f in behind} == {kvrep.StorageFailed}
        disk.heal()
        assert len(db) == 1


def test_a_write_whose_flush_failed_is_unknown_and_known_after_a_failover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The primary's flush fails after the record was shipped: the writer is told its position, not a refusal,
    and the promoted follower answers what became of it."""
    with stores(tmp_path) as start:
        a = start("a", acks=1)
        b = start("b", follow=a.address)
        voters(a, "a", "b")
        real, fails = os.fdatasync, threading.Event()

        def fdatasync(fd: int) -> None:
            if fails.is_set() and f"{tmp_path}/a/" in os.readlink(f"/proc/self/fd/{fd}"):
                until(lambda: b.status().last_offset == a.status().last_offset)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        monkeypatch.setattr(os, "fdatasync", fdatasync)
        fails.set()
        with pytest.raises(kvrep.LogFailed) as caught:
            a.put(b"k", b"v")
        position = caught.value.position
        assert isinstance(caught.value, kvrep.UnknownOutcome)
        assert position.offset == b.status().last_offset
        assert a.resolve(position) is kvrep.Outcome.PENDING
        a.close()
        fails.clear()
        b.promote()
        a = start("a", follow=b.address)  # the second copy, without which nothing is committed
        for node in (b, a):
            until(lambda node=node: node.resolve(position) is kvrep.Outcome.COMMITTED)
            assert node[b"k"] == b"v"


class HeldUp:
    """Writes to log files wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.waits = threading.Event()
        real = os.pwritev

        def pwritev(fd: int, *args: Any) -> Any:
            if not self.go.is_set() and os.readlink(f"/proc/self/fd/{fd}").endswith(".log"):
                self.waits.set()
                assert self.go.wait(30.0)
            return real(fd, *args)

        monkeypatch.setattr(os, "pwritev", pwritev)


@pytest.mark.parametrize("first", [False, True], ids=["write", "first write"])
def test_close_keeps_to_its_deadline_while_a_write_hangs(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """A disk that does not answer holds up no close, the first or the second; the lock stays until it answers,
    and then the write under way is in the log or was refused. (The first write has the lock of the roles.)"""
    db = kvrep.open(store_path, **OPTIONS)
    if not first:
        db.put(b"before", b"1")
    held = HeldUp(monkeypatch)
    outcome: list[Any] = []

    def write() -> None:
        try:
            outcome.append(db.put(b"k", b"v", timeout_s=20.0))
        except kvrep.Error as error:
            outcome.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    assert held.waits.wait(10.0)
    closer = threading.Thread(target=db.close, args=(1.0,))
    closer.start()
    began = time.monotonic()
    db.close(0.0)
    assert time.monotonic() - began < 1.5
    closer.join(5.0)
    assert not closer.is_alive()
    with pytest.raises(kvrep.ClosedError):
        db.put(b"no", b"1")
    with pytest.raises(kvrep.StoreInUse):
        kvrep.open(store_path, **OPTIONS)
    assert not outcome
    held.go.set()
    writer.join(10.0)
    [told] = outcome
    with opened(store_path, **OPTIONS) as db:
        assert isinstance(told, kvrep.ClosedError if first else kvrep.Position)
        assert (b"k" in db) != first


def test_the_parts_of_a_node_share_the_deadline_of_its_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts use up all the time they are given: together they get half a second of a close(0)."""
    with stores(tmp_path) as start:
        a = start("a", acks=0)
        node = a._node
        late, given = [0.0], []
        real = time.monotonic

        def slow(stop: Callable[[float], Any]) -> Callable[[float], None]:
            def stopped(timeout_s: float) -> None:
                given.append(timeout_s)
                late[0] += timeout_s
                stop(5.0)

            return stopped

        parts = (node.roles, node.shipping, node._server, node.events)
        for part in parts:
            monkeypatch.setattr(part, "stop", slow(part.stop))
        monkeypatch.setattr(node.engine, "close", slow(node.engine.close))
        monkeypatch.setattr("kvrep.runtime.node.time", SimpleNamespace(monotonic=lambda: real() + late[0]))
        a.close(0.0)
        assert len(given) == len(parts) + 1
        assert sum(given) < 1.0


def test_enospc_is_refused_and_heals(store_path: Path, disk: Disk) -> None:
    """No space for the log: StorageFull, nothing of it logged; as soon as there is space, writing goes on."""
    with kvrep.open(store_path, **OPTIONS) as db:
        db.put(b"a", b"1")
        offset = db.status().last_offset
        for calls in (("pwritev",), ("posix_fallocate", "pwritev")):
            disk.fail(errno.ENOSPC, *calls)
            with pytest.raises(kvrep.StorageFull):
                db.put(b"b", b"2")
            disk.heal()
        assert db.status().last_offset == offset
        db.put(b"c", b"3")
    with kvrep.open(store_path, **OPTIONS) as db:
        assert dict(db.scan()) == {b"a": b"1", b"c": b"3"}


def test_first_write_of_an_epoch_without_space(store_path: Path, disk: Disk) -> None:
    """If the record that begins the epoch finds no room, the epoch begins with the next write instead."""
    with kvrep.open(store_path, ack_timeout_s=1.25, **OPTIONS) as db:
        disk.fail(errno.ENOSPC, "posix_fallocate")
        for _ in range(3):
            with pytest.raises(kvrep.StorageFull):
                db.put(b"a", b"1")
        disk.heal()
        first = db.put(b"a", b"1")
        assert first.offset >= 1
        assert db.status().epoch == first.epoch
        with db.transaction() as txn:
            txn[b"b"] = txn[b"a"]
    with kvrep.open(store_path, **OPTIONS) as db:
        assert dict(db.scan()) == {b"a": b"1", b"b": b"1"}
        assert db.status().ack_timeout_s == 1.25
        assert db.status().voters
        assert db.put(b"c", b"1").epoch > first.epoch


def test_a_refused_write_takes_what_was_built_on_it_along(store_path: Path, disk: Disk) -> None:
    """A transaction that has read a write which then finds no room must not be committed."""
    with kvrep.open(store_path, **OPTIONS) as db:
        db.put(b"n", b"0")
        committer = db._node.engine.committer
        committer.lead.acquire()
        try:
            first = db.submit_put(b"n", b"1" * 1000)
            txn = db.transaction(timeout_s=5.0).__enter__()
            txn.put(b"copy", txn[b"n"])
            disk.fail(errno.ENOSPC, "pwritev", "posix_fallocate")
        finally:
            committer.lead.release()
        committer.kick()
        assert isinstance(first.exception(5), kvrep.StorageFull)
        disk.heal()
        with pytest.raises(kvrep.RefusedError):
            txn.__exit__(None, None, None)
        db.put(b"later", b"1")
        assert dict(db.scan()) == {b"n": b"0", b"later": b"1"}


def test_lmdb_failure_is_final_but_loses_nothing(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A flush that LMDB fails makes the store read-only; the log still has everything."""
    db = kvrep.open(store_path, **OPTIONS)
    request.addfinalizer(db.close)
    db.put(b"a", b"1")
    tree = db._node.engine.tree

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise kvrep.StorageFailed("LMDB failed while flushing: Input/output error")

    monkeypatch.setattr(tree, "flush", failing)
    with pytest.raises(kvrep.StorageFailed):
        db.flush(5.0)
    with pytest.raises(kvrep.StorageFailed):
        db.put(b"b", b"2")
    assert db[b"a"] == b"1"
    view = db.snapshot()
    assert view[b"a"] == b"1"
    view.close()
    with pytest.raises(kvrep.StorageFailed):
        db.flush(5.0)
    db.close()
    with kvrep.open(store_path, **OPTIONS) as db:
        assert dict(db.scan()) == {b"a": b"1"}


FAILS_TO_FLUSH = """
import sys, kvrep
db = kvrep.open(sys.argv[1], log_file_bytes=65536, map_bytes=16 << 20, flush_interval_s=3600.0)
db.put(b"a", b"1")
try:
    db.flush(20)
except kvrep.StorageFailed as error:
    print(error)
db.close()
"""


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("rotten", [False, True], ids=["whole", "rotten"])
def test_a_copy_whose_commit_failed_is_compared_with_its_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotten: bool
) -> None:
    """After LMDB's commit failed, the next open reads the file from the disk and recomputes its digests: what
    differs is reported at every open, and what does not is trusted again."""
    assert STRACE is not None
    with kvrep.open(tmp_path, **OPTIONS) as db:
        db.put(b"before", b"1")
        db.flush()
    data = tmp_path / "gen-000001" / "data"
    note = data.parent / "SUSPECT"
    assert not note.exists()
    done = subprocess.run(
        [
            STRACE, "-f", "-qq", "-o", "/dev/null", "-P", str(data / "data.mdb"), "-e", "trace=fdatasync",
            "-e", "inject=fdatasync:error=EIO", sys.executable, "-c", FAILS_TO_FLUSH, str(tmp_path),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "LMDB failed while flushing" in done.stdout
    assert note.exists()
    if rotten:
        with lmdb.open(str(data), max_dbs=8) as env, env.begin(write=True) as txn:
            txn.put(b"before", b"2", db=env.open_db(b"default", txn=txn))
    dropped: list[str] = []

    def fadvise(fd: int, *args: int) -> None:
        dropped.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd, *args)

    real = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    with kvrep.open(tmp_path, **OPTIONS) as db:
        assert dropped == [str(data / "data.mdb")]
        until(lambda: not db._node.engine.unverified)
        assert bool(db.status().diverged_at) == rotten
        assert note.exists() == rotten
        assert db[b"a"] == b"1"
    if not rotten:
        with kvrep.open(tmp_path, **OPTIONS) as db:
            assert not db._node.engine.unverified
            assert len(dropped) == 1


INJECTED = """
import sys, kvrep
db = kvrep.open(sys.argv[1], log_file_bytes=65536, map_bytes=16 << 20, flush_interval_s=3600.0)
acked = 0
print("open", flush=True)
try:
    for i in range(40):
        db.put(b"%d" % i, b"v" * 5000)
        acked = i + 1
        if i % 10 == 9:
            db.flush(20)
except kvrep.StorageFailed:
    pass
try:
    db.put(b"no", b"1")
except kvrep.StorageFailed:
    assert all(db[b"%d" % i] == b"v" * 5000 for i in range(acked))
    print("failed", acked)
else:
    print("unharmed", acked)
db.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("call", ["pwritev2", "fdatasync", "pwrite64"])
def test_injected_eio(tmp_path: Path, call: str) -> None:
    """EIO from the kernel at several places: StorageFailed, reads go on, the reopened store has every ack."""
    assert STRACE is not None
    failed = 0
    for n in (2, 4, 6, 9, 12):
        path = tmp_path / f"{call}-{n}"
        done = subprocess.run(
            [
                STRACE, "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
                "-e", f"inject={call}:error=EIO:when={n}", sys.executable, "-c", INJECTED, str(path),
            ],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if not done.stdout:  # the error came before the store was open: that is said, too
            assert "kvrep.errors.OpenError" in done.stderr or "kvrep.errors.StorageFailed" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        _, outcome, acked = done.stdout.split()
        failed += outcome == "failed"
        with kvrep.open(path, **OPTIONS) as db:
            assert all(db[b"%d" % i] == b"v" * 5000 for i in range(int(acked)))
            assert (b"no" in db) == (outcome == "unharmed")
            assert len(db) - (b"no" in db) in (int(acked), int(acked) + 1)
            db.put(b"again", b"1")
    assert failed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_full_disk(small_disk: Path, request: pytest.FixtureRequest) -> None:
    """A disk that fills up refuses writes with StorageFull, goes on reading, and heals when there is room."""
    options = {**OPTIONS, "retention_bytes": 0, "retention_age_s": 0, "memtable_bytes": 256 << 10}
    ballast = small_disk / "ballast"
    acked: dict[bytes, bytes] = {}
    db = kvrep.open(small_disk / "store", **options)
    request.addfinalizer(db.close)
    db.put(b"first", b"1")
    ballast.write_bytes(bytes(4 << 20))
    with pytest.raises(kvrep.StorageFull):
        for i in range(2000):
            value = b"%04d" % i * 1000
            db.put(b"%d" % i, value, timeout_s=2.0)
            acked[b"%d" % i] = value
    assert len(acked) > 100
    assert all(db[k] == v for k, v in acked.items())
    assert dict(db.scan()) == {**acked, b"first": b"1"}
    with pytest.raises(kvrep.StorageFull):
        db.put(b"no", b"v" * 60_000)
    ballast.unlink()
    wait_for(lambda: accepted(db, b"healed"))
    db.flush()
    db.close()
    with kvrep.open(small_disk / "store", **options) as db:
        assert dict(db.scan()) == {**acked, b"first": b"1", b"healed": b"1"}


def accepted(db: kvrep.Store, key: bytes) -> bool:
    try:
        db.put(key, b"1")
    except kvrep.StorageFull:
        return False
    return True


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as ballast:
        while True:
            try:
                written = ballast.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                return
            assert written


def test_full_disk_at_open_and_close(small_disk: Path) -> None:
    """A store on a full disk closes, opens for reading, refuses to write, and heals."""
    path = small_disk / "store"
    with kvrep.open(path, **OPTIONS) as db:
        db.put(b"a", b"1")
        db.flush()
        db.put(b"b", b"2")
        fill(small_disk / "ballast")
    with kvrep.open(path, **OPTIONS) as db:
        assert dict(db.scan()) == {b"a": b"1", b"b": b"2"}
        with pytest.raises(kvrep.StorageFull):
            db.put(b"c", b"3")
        os.unlink(small_disk / "ballast")
        db.put(b"c", b"3")
    with kvrep.open(path, **OPTIONS) as db:
        assert dict(db.scan()) == {b"a": b"1", b"b": b"2", b"c": b"3"}
    fill(small_disk / "ballast")
    with pytest.raises(kvrep.Error):
        kvrep.open(small_disk / "another", **OPTIONS)


def test_full_map(store_path: Path) -> None:
    """A full LMDB map refuses puts with StorageFull, takes deletes, and heals by them."""
    options = {**OPTIONS, "map_bytes": 2 << 20, "memtable_bytes": 64 << 10, "memtable_bytes_max": 256 << 10}
    acked: set[bytes] = set()
    with kvrep.open(store_path, **options) as db:
        with pytest.raises(kvrep.StorageFull):
            for i in range(10_000):
                key = b"%05d" % i
                db.put(key, b"v" * 2000, timeout_s=2.0)
                acked.add(key)
        assert len(acked) > 200
        assert set(db) == acked
        for key in sorted(acked)[: len(acked) // 2]:
            db.delete(key, timeout_s=5.0)
            acked.discard(key)
        wait_for(lambda: accepted(db, b"healed"))
        db.flush(10.0)
        assert set(db) == {*acked, b"healed"}
    with kvrep.open(store_path, **options) as db:
        assert set(db) == {*acked, b"healed"}


def test_nothing_is_cut_while_there_is_no_room_to_save_it(
    small_disk: Path, request: pytest.FixtureRequest
) -> None:
    """A cut on a full disk is refused with StorageFull, leaves no half file however often it is tried, and succeeds
    when there is room; what a crash left half-written is gone after the next open."""
    ballast = small_disk / "ballast"
    path = small_disk / "store"
    db = kvrep.open(path, **OPTIONS)
    request.addfinalizer(db.close)
    kept = db.put(b"kept", b"1")
    for i in range(100):
        db.put(b"%d" % i, b"v" * 10_000)
    engine = db._node.engine
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(64 << 10))
    for _ in range(3):
        with pytest.raises(kvrep.StorageFull, match="save records 3 to 102"):
            engine.cut(kept.offset, reason="a test")
        assert list(engine.home.rescue.glob("*")) == []
    assert len(db) == 101
    assert db.status().rescued == ()
    ballast.unlink()
    saved = engine.cut(kept.offset, reason="a test")
    assert saved is not None
    assert list(engine.home.rescue.iterdir()) == [saved]
    assert len(load_rescue(saved).records) == 100
    assert dict(db.scan()) == {b"kept": b"1"}
    db.close()
    (path / "rescue" / "records-9-9-9.kvrescue.new").write_bytes(b"half")
    with kvrep.open(path, **OPTIONS) as db:
        assert list((path / "rescue").iterdir()) == [saved]
        assert dict(db.scan()) == {b"kept": b"1"}
