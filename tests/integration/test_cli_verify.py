"""``kvrep verify`` finds every kind of damage and difference, and changes nothing."""

from __future__ import annotations

import hashlib
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.cli import verify_store
from kvrep.cli.exits import Exit
from kvrep.options import Options
from kvrep.storage.home import Home
from kvrep.storage.log import log_paths
from kvrep.storage.tree import State, Tree
from tests.cli_kit import Result, pair, run_here, wait_until

Kvrep = Callable[..., Result]
MARKER = b"a value that is easy to find in the data file"


@pytest.fixture
def run(capfdbinary: Any) -> Kvrep:
    """Run the command in this process."""
    return lambda *arguments: run_here(capfdbinary, *arguments)


@pytest.fixture
def store(memory_path: Path) -> Path:
    """A closed store: two log files, everything flushed, two keyspaces."""
    path = memory_path / "store"
    for part in range(2):
        with kvrep.open(path) as db:
            for i in range(100):
                db.put(b"key%d-%d" % (part, i), b"value%d" % i * 20)
            db.keyspace("other").put(b"k%d" % part, MARKER)
    return path


def log_files(path: Path) -> list[Path]:
    return log_paths(path / "gen-000001" / "log")


def data_file(path: Path) -> Path:
    return path / "gen-000001" / "data" / "data.mdb"


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def failed(result: Result) -> dict[str, str]:
    """The failed checks of a JSON report by name: at least one, and the exit code says so."""
    report = result.json
    assert result.code == Exit.DAMAGED
    assert report["ok"] is False
    found = {check["name"]: check["detail"] for check in report["checks"] if not check["ok"]}
    assert found
    return found


def fingerprint(path: Path) -> dict[str, str]:
    files = [p for p in path.rglob("*") if p.is_file() and p.name not in ("LOCK", "lock.mdb")]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# -- a store on disk -------------------------------------------------------------------------------


def test_a_sound_store_passes_unchanged(run: Kvrep, store: Path) -> None:
    """All checks of a sound store pass, in words and as JSON, and no byte of it is changed."""
    before = fingerprint(store)
    text = run("verify", store)
    assert text.code == 0
    assert "FAILED" not in text.text
    assert "all 6 checks passed" in text.text
    report = run("verify", store, "--json")
    assert report.code == 0
    assert report.json["ok"] is True
    names = {check["name"] for check in report.json["checks"]}
    assert names == {"identity", "LMDB", "digest of default", "digest of other", "log", "log and LMDB meet"}
    assert fingerprint(store) == before


def test_an_empty_store_passes(run: Kvrep, memory_path: Path) -> None:
    """A store without any record is sound."""
    kvrep.open(memory_path / "store").close()
    assert run("verify", memory_path / "store").code == 0


def test_no_store(run: Kvrep, tmp_path: Path) -> None:
    """Where there is no store, there is nothing to verify: wrong usage."""
    assert run("verify", tmp_path / "none").code == Exit.USAGE
    assert run("verify", tmp_path).code == Exit.USAGE


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_in_the_log(run: Kvrep, store: Path, seed: int) -> None:
    """One changed bit anywhere in the records or headers of the log fails the log check."""
    chance = random.Random(seed)
    path = chance.choice(log_files(store))
    with path.open("rb") as file:
        used = len(file.read().rstrip(b"\0"))
    # The last group is the empty one of the close; nothing proves it, so the next open just cuts it.
    flip(path, chance.randrange(0, used - 40))
    assert "log" in failed(run("verify", store, "--json"))


def test_a_missing_log_file(run: Kvrep, store: Path) -> None:
    """A log file that is gone, first or last, is noticed."""
    first, last = log_files(store)
    kept = first.read_bytes()
    first.unlink()
    assert run("verify", store).code == 0, "the first one may have been trimmed: LMDB has it all"
    first.write_bytes(kept)
    last.unlink()
    assert failed(run("verify", store, "--json")).keys() == {"log"}


def test_a_log_cut_short(run: Kvrep, store: Path) -> None:
    """A log that ends before records that LMDB has is damaged."""
    path = log_files(store)[-1]
    path.write_bytes(path.read_bytes()[:500])
    assert "log" in failed(run("verify", store, "--json"))


def test_an_unfinished_write_is_no_damage(run: Kvrep, store: Path) -> None:
    """What follows the last whole record without proof is noted, not failed: the next open cuts it."""
    with log_files(store)[-1].open("ab") as file:
        file.write(b"half a group")
    report = run("verify", store, "--json")
    assert report.code == 0
    assert "12 bytes of a write that never finished" in " ".join(report.json["notes"])


def test_a_flipped_bit_in_a_value(run: Kvrep, store: Path) -> None:
    """One changed bit of a value in LMDB fails the digest of its keyspace, and only that."""
    found = data_file(store).read_bytes().find(MARKER)
    while found >= 0:
        flip(data_file(store), found + 5)
        found = data_file(store).read_bytes().find(MARKER)
    assert failed(run("verify", store, "--json")).keys() == {"digest of other"}


@pytest.mark.parametrize("damage", ["truncated", "emptied", "gone", "noise"])
def test_a_ruined_data_file(run: Kvrep, store: Path, damage: str) -> None:
    """A data file that LMDB cannot read, or crashes on, fails the check instead of the command."""
    path = data_file(store)
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "noise":
        path.write_bytes(data[: 2 * 4096] + random.Random(6).randbytes(len(data) - 2 * 4096))
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    checks = failed(run("verify", store, "--json"))
    assert checks.keys() & {"LMDB", "digest of default", "digest of other"}
    assert "Traceback" not in str(checks)


def test_a_reader_that_dies_has_failed(run: Kvrep, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When damage kills the process that reads LMDB, that check has failed, and so has what needs it."""

    def die(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess([], -11, b"", b"")

    monkeypatch.setattr(verify_store.subprocess, "run", die)
    checks = failed(run("verify", store, "--json"))
    assert checks.keys() == {"LMDB", "log and LMDB meet"}
    assert "signal 11" in checks["LMDB"]


def test_a_damaged_identity(run: Kvrep, store: Path) -> None:
    """Damage of the small files is reported as such."""
    (store / "IDENTITY").write_bytes(bytes(8192))
    assert failed(run("verify", store, "--json")).keys() == {"identity"}


def test_a_log_of_another_store(run: Kvrep, store: Path, memory_path: Path) -> None:
    """A log that was copied in from another store does not pass."""
    with kvrep.open(memory_path / "second") as db:
        db.put(b"k", b"v")
    log_files(store)[-1].write_bytes(log_files(memory_path / "second")[0].read_bytes())
    assert "another store" in failed(run("verify", store, "--json"))["log"]


def test_a_store_that_was_killed_passes(run: Kvrep, memory_path: Path) -> None:
    """After a crash the log holds more than LMDB; that is how it should be, and the report says how much."""
    with kvrep.open(memory_path / "store", flush_interval_s=3600) as db:
        for i in range(50):
            db.put(b"k%d" % i, b"v")
        crashed = memory_path / "crashed"
        for source in [memory_path / "store", *(memory_path / "store").rglob("*")]:
            target = crashed / source.relative_to(memory_path / "store")
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif source.name not in ("LOCK", "lock.mdb"):
                target.write_bytes(source.read_bytes())
    report = run("verify", crashed, "--json")
    assert report.code == 0
    assert any("replays" in check["detail"] for check in report.json["checks"])


# -- running nodes ---------------------------------------------------------------------------------


@pytest.fixture
def nodes(memory_path: Path) -> Iterator[tuple[kvrep.Store, kvrep.Store]]:
    """A primary with some data, and its follower."""
    with pair(memory_path) as (a, b):
        fill(a)
        yield a, b


def fill(db: kvrep.Store) -> None:
    with db.batch() as batch:
        for i in range(200):
            batch.put(b"key%d" % i, b"value%d" % i)
            batch.put(b"k%d" % i, MARKER, keyspace=db.keyspace("other"))


def test_equal_nodes_pass(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """Equal nodes pass, whichever of them is named."""
    a, b = nodes
    for addresses in ((a.address,), (b.address,), (a.address, b.address), (b.address, a.address)):
        report = run("verify", *addresses, "--json")
        assert report.code == 0, report.text
        names = {check["name"] for check in report.json["checks"]}
        assert names & {"a = b", "b = a"}
        assert {"a itself", "b itself", "one store"} <= names


def change_on_disk(path: Path, *, cover_up: bool) -> None:
    """Change one value of a closed store in LMDB alone; ``cover_up`` brings its digest up to date, too."""
    home = Home.open(path, create=False, name=None, lineage=b"")
    options = Options()
    tree = Tree.open(
        home.generation / "data", home.lineage, map_bytes=options.map_bytes,
        keyspaces_max=options.keyspaces_max, readers_max=10, create=False,
    )  # fmt: skip
    digests = dict(tree.state.digests)

    def update(state: State) -> None:
        if not cover_up:
            state.digests = digests

    tree.flush([("other", [(b"k7", b"changed")], [])], update, lambda: None)
    tree.close(1.0)
    home.close()


@pytest.mark.parametrize("cover_up", [False, True])
def test_a_changed_value_on_a_follower(run: Kvrep, memory_path: Path, cover_up: bool) -> None:
    """A value that was changed on one node is found, its keyspace named, even if its digest was adapted."""
    with pair(memory_path) as (a, b):
        fill(a)
        b.wait_for(a.position)
    change_on_disk(memory_path / "b", cover_up=cover_up)
    with kvrep.open(memory_path / "a", listen="127.0.0.1:0") as a:
        with kvrep.open(memory_path / "b", listen="127.0.0.1:0", follow=a.address) as b:
            wait_until(lambda: not a.status().not_writable, "a is primary again")
            b.wait_for(a.put(b"more", b"data"))
            checks = failed(run("verify", a.address, b.address, "--json"))
            assert checks.keys() == ({"a = b"} if cover_up else {"a = b", "b itself"})
            assert "keyspace other differs" in checks["a = b"]
            assert "default" not in checks["a = b"]


def test_a_node_that_does_not_answer_has_failed(run: Kvrep, nodes: tuple[kvrep.Store, kvrep.Store]) -> None:
    """What could not be checked counts as failed: a silent address, and a follower that is gone."""
    a, b = nodes
    assert "127.0.0.1:1" in failed(run("verify", a.address, b.address, "127.0.0.1:1", "--json"))
    b.close()
    wait_until(lambda: not any(f.connected for f in a.status().followers), "the follower is gone")
    checks = failed(run("verify", a.address, "--json", "--timeout", "2"))
    assert "not connected" in checks["b"]
    assert "comparison" in checks


def test_one_node_alone_is_no_comparison(run: Kvrep, memory_path: Path) -> None:
    """A node without followers can be checked in itself, but verify does not call that a pass."""
    with kvrep.open(memory_path / "store", listen="127.0.0.1:0") as db:
        db.put(b"k", b"v")
        assert failed(run("verify", db.address, "--json")).keys() == {"comparison"}


def test_different_stores(run: Kvrep, memory_path: Path) -> None:
    """Nodes of different histories are told apart before anything is compared."""
    with (
        kvrep.open(memory_path / "one", listen="127.0.0.1:0") as one,
        kvrep.open(memory_path / "two", listen="127.0.0.1:0") as two,
    ):
        one.put(b"k", b"v")
        two.put(b"k", b"v")
        assert failed(run("verify", one.address, two.address, "--json")).keys() == {"one store"}


def test_verify_while_writes_go_on(run: Kvrep, memory_path: Path) -> None:
    """Nodes that are written to all the time are compared at a common position, too."""
    with pair(memory_path, flush_interval_s=0.3) as (a, b):
        fill(a)
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                a.put(b"busy%d" % (number % 100), b"%d" % number)
                number += 1

        writer = threading.Thread(target=write)
        writer.start()
        try:
            report = run("verify", a.address, b.address, "--json")
        finally:
            stop.set()
            writer.join()
        assert report.code == 0, report.text
        assert "a = b" in {check["name"] for check in report.json["checks"]}
