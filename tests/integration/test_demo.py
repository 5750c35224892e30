"""``kvrep demo`` in a small form, and that it can fail."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvrep
from kvrep.cli.demo.checking import compare_with_files, equal_digests, resolve
from kvrep.cli.demo.loading import KEYSPACE, Batch, Load, Unknown, batches_of, find_files
from kvrep.cli.exits import Exit
from kvrep.cli.target import RemoteTarget
from tests.cli_kit import WAIT_S, command, pair, run_process, wait_until


def processes_in(folder: Path) -> list[int]:
    """Processes that were started with something in ``folder`` as an argument."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def nodes_in(folder: Path) -> list[int]:
    """The demo's nodes: their stores are in folders below ``folder``."""
    return [pid for pid in processes_in(folder) if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def tick() -> Callable[[], None]:
    """The checks call it while they wait; here it draws nothing."""
    return lambda: None


# -- the demo itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("acks", ["1", "all"])
def test_a_small_demo(memory_path: Path, acks: str) -> None:
    """With 200 files: everything is true, and neither a process nor a file is left."""
    done = run_process(
        "demo", "--files", "200", "--acks", acks, "--folder", memory_path, "--json", timeout_s=90
    )
    assert done.code == 0, done.err + done.text
    result = done.json
    assert result["ok"] is True
    assert result["files"] == 200
    assert all(check["ok"] for check in result["checks"])
    assert {check["name"] for check in result["checks"]} == {
        "killed in mid-load", "acknowledged writes survived", "no write was torn", "all files were written",
        "digests", "node a against the files", "node b against the files", "node c against the files",
    }  # fmt: skip
    unknown = result["unknown_outcomes"]
    assert unknown["writes"] == unknown["committed"] + unknown["absent"]
    assert result["kill_to_first_write_s"] > 0
    assert 0 < result["put_p50_s"] <= result["put_p99_s"]
    assert processes_in(memory_path) == []
    assert list(memory_path.iterdir()) == []


def test_the_demo_in_words(memory_path: Path) -> None:
    """Without a terminal it prints plain lines and the final block; --keep leaves sound stores behind."""
    done = run_process("demo", "--files", "60", "--folder", memory_path, "--keep", timeout_s=90)
    assert done.code == 0, done.err + done.text
    assert "\x1b" not in done.text
    for words in ("primary killed", "primary is back", "put latency", "p99", "everything was true"):
        assert words in done.text
    (folder,) = memory_path.iterdir()
    for name in ("a", "b", "c"):
        assert run_process("verify", folder / name).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_tidies_up(memory_path: Path, number: int) -> None:
    """Ctrl-C and SIGTERM end the demo with 130, its nodes with it, and its folder is gone."""
    with subprocess.Popen(
        command("demo", "--folder", memory_path, "--batch-files", "1", "--connections", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        for line in demo.stdout:
            if "loading" in line:
                break
        assert len(nodes_in(memory_path)) == 3
        demo.send_signal(number)
        assert demo.wait(WAIT_S) == Exit.INTERRUPTED
        demo.stdout.read()
        assert demo.stderr.read() == "interrupted\n"
    assert processes_in(memory_path) == []
    assert list(memory_path.iterdir()) == []


def test_a_killed_demo_leaves_no_nodes(memory_path: Path) -> None:
    """Even SIGKILL of the demo itself ends its nodes: their standard input closes."""
    with subprocess.Popen(
        command("demo", "--folder", memory_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "loading" in line:
                break
        demo.kill()
        demo.communicate()
    wait_until(lambda: nodes_in(memory_path) == [], "the nodes have ended")


def test_a_node_that_cannot_start_fails_the_demo(memory_path: Path) -> None:
    """A demo that cannot go on says why in one line, and its exit code is not 0."""
    (memory_path / "empty").mkdir()
    done = run_process("demo", "--data", memory_path / "empty", "--folder", memory_path)
    assert done.code == Exit.FAILED
    assert done.err == (
        "kvrep demo: there are 0 files to load, it takes 16 at least"
        " (name another directory with --data, or raise --files)\n"
    )
    done = run_process("demo", "--folder", memory_path / "missing")
    assert done.code == Exit.USAGE


# -- its checks can fail ---------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A few files to load."""
    for i in range(12):
        (tmp_path / "data" / f"d{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"d{i % 3}" / f"file{i}").write_text(f"content {i}\n" * (i + 1))
    return tmp_path / "data"


@pytest.fixture
def primary(memory_path: Path) -> Iterator[kvrep.Store]:
    """A primary that needs nobody."""
    with kvrep.open(memory_path / "a", name="a", listen="127.0.0.1:0") as store:
        yield store


def test_what_is_loaded(files: Path) -> None:
    """Every file once, in batches of so many; the order is the same each time."""
    (files / "__pycache__").mkdir()
    (files / "__pycache__" / "no.pyc").write_text("x")
    (files / "link").symlink_to(files / "d0" / "file0")
    found = find_files(files, None)
    assert found == find_files(files, None)
    assert sorted(file.key for file in found) == sorted(b"d%d/file%d" % (i % 3, i) for i in range(12))
    assert [len(batch.files) for batch in batches_of(found, 5)] == [5, 5, 2]
    assert [file for batch in batches_of(found, 5) for file in batch.files] == found
    assert find_files(files, 3) == found[:3]


def load_all(address: str, files: Path) -> Load:
    load = Load(deque(batches_of(find_files(files, None), 2)))
    load.start(address, 3)
    load.join()
    return load


def test_load_tells_the_outcomes_apart(primary: kvrep.Store, files: Path) -> None:
    """All batches are acknowledged while the primary answers, and all accounted for when it does not."""
    load = load_all(primary.address, files)
    assert (len(load.acknowledged), len(load.unknown), len(load.waiting), load.problem) == (6, 0, 0, None)
    assert (load.files, len(load.latencies_s)) == (12, 6)
    address = primary.address
    primary.close()
    load = load_all(address, files)
    assert load.acknowledged == []
    assert load.unknown
    assert len(load.unknown) + len(load.waiting) == 6


def test_differing_files_are_found(primary: kvrep.Store, files: Path, tick: Callable[[], None]) -> None:
    """A changed, a missing and an additional pair are each found by the comparison with the files."""
    load_all(primary.address, files)
    expected = {file.key: file.path for file in find_files(files, None)}
    space = primary.keyspace(KEYSPACE)
    with RemoteTarget(primary.address) as node:
        assert compare_with_files(node, expected, exact=True, tick=tick) == (12, [])
        space.put(b"more", b"x")
        equal, wrong = compare_with_files(node, expected, exact=True, tick=tick)
        assert (equal, wrong) == (12, ["more should not be there"])
        assert compare_with_files(node, expected, exact=False, tick=tick) == (12, [])
        space.put(b"d0/file0", space[b"d0/file0"][:-1] + b"!")
        del space[b"d1/file1"]
        equal, wrong = compare_with_files(node, expected, exact=False, tick=tick)
        assert equal == 10
        assert "d0/file0 differs from its file" in wrong
        assert any("d1/file1 is missing" in line for line in wrong)


def test_unknown_writes_are_settled(primary: kvrep.Store, files: Path, tick: Callable[[], None]) -> None:
    """A write of unknown outcome is found committed, absent, or in part, which must never be."""
    batches = list(batches_of(find_files(files, None), 2))
    whole, absent, torn, placed, rolled_back = batches[:5]
    epoch, _ = primary.put(b"k", b"v")
    with RemoteTarget(primary.address) as node:
        node.write(whole.ops())
        node.write(torn.ops()[:1])
        position = node.write(placed.ops())
        node.write(rolled_back.ops())
        unknown = [Unknown(batch, None) for batch in (whole, absent, torn)]
        unknown += [Unknown(placed, position), Unknown(rolled_back, kvrep.Position(epoch - 1000, 1))]
        resolved = resolve(node, unknown, position, tick)
    assert resolved.committed == [whole, placed]
    assert resolved.absent == [absent, rolled_back]
    assert resolved.torn == [torn]


def test_digests_that_differ(memory_path: Path, tick: Callable[[], None]) -> None:
    """Equal nodes have equal digests at one position; different ones are told apart."""
    with pair(memory_path) as (a, b):
        a.put(b"k", b"v")
        with RemoteTarget(a.address) as first, RemoteTarget(b.address) as second:
            ok, detail = equal_digests({"a": first, "b": second}, tick)
            assert ok, detail
            answers = {"a": first.digests(), "b": second.digests()}
    answers["b"]["digests"] = {**answers["b"]["digests"], "default": bytes(16)}

    class Fake:
        def __init__(self, name: str) -> None:
            self.digests = lambda: answers[name]

    ok, detail = equal_digests({name: Fake(name) for name in answers}, tick)  # type: ignore[misc]
    assert not ok
    assert "b" in detail


def test_batches_are_atomic_units(files: Path) -> None:
    """A batch writes exactly its files, into the demo's keyspace."""
    batch = Batch(tuple(find_files(files, 2)))
    assert batch.ops() == [(KEYSPACE, file.key, file.path.read_bytes()) for file in batch.files]
    assert batch.size == sum(os.path.getsize(file.path) for file in batch.files)
