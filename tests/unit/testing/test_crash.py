"""Recording a process and building crash images, on workloads small enough to know every image."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvrep.testing.crash import (
    Image,
    RecorderUnavailable,
    TraceError,
    build_recorder,
    images,
    mark,
    record,
    state_hash,
)
from kvrep.testing.crashcheck import check_images

PRELUDE = "import os, sys\nfrom kvrep.testing.crash import mark\nos.chdir(sys.argv[1])\n"


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorder, built once."""
    try:
        return build_recorder(tmp_path_factory.mktemp("recorder"))
    except RecorderUnavailable as reason:
        pytest.skip(str(reason))


def made(tmp_path: Path, recorder: Path, script: str, samples: int = 30) -> list[Image]:
    """All images of a script that runs in an empty folder."""
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    trace = record([sys.executable, "-c", PRELUDE + script, str(root)], root, recorder)
    return list(images(trace, seed=1, samples=samples))


def contents(found: list[Image], crash: str, *, after: int = 0) -> set[tuple[tuple[str, bytes], ...]]:
    """The different disks among images of this kind, once ``after`` writes were done."""
    return {tuple(sorted(i.files.items())) for i in found if i.crash == crash and i.done >= after}


def test_a_write_may_be_torn_until_it_is_synced(tmp_path: Path, recorder: Path) -> None:
    """Any sectors of an unsynced write may be there after a power loss; all of them after fdatasync."""
    found = made(
        tmp_path,
        recorder,
        "fd = os.open('f', os.O_RDWR | os.O_CREAT)\n"
        "os.fsync(fd)\n"
        "os.fsync(os.open('.', os.O_RDONLY))\n"
        "os.pwrite(fd, b'a' * 512 + b'b' * 512, 0)\n"
        "os.fdatasync(fd)\n"
        "mark('done 1')\n",
    )

    a, b, hole = b"a" * 512, b"b" * 512, bytes(512)
    power = contents(found, "power")

    assert {(("f", c),) for c in (b"", a, a + b, hole + b)} <= power
    assert contents(found, "power", after=1) == {(("f", a + b),)}


def test_a_synchronous_write_vouches_for_itself_only(tmp_path: Path, recorder: Path) -> None:
    """After a write with RWF_DSYNC an earlier, plain write of the same file may still be lost."""
    found = made(
        tmp_path,
        recorder,
        "fd = os.open('f', os.O_RDWR | os.O_CREAT)\n"
        "os.fsync(fd)\n"
        "os.fsync(os.open('.', os.O_RDONLY))\n"
        "os.pwrite(fd, b'1', 0)\n"
        "os.pwritev(fd, [b'2', b'3'], 1, os.RWF_DSYNC)\n"
        "mark('done 1')\n",
    )

    assert contents(found, "power", after=1) == {(("f", b"123"),), (("f", b"\x0023"),)}
    assert contents(found, "kill", after=1) == {(("f", b"123"),)}


def test_a_descriptor_opened_for_synchronous_writes(tmp_path: Path, recorder: Path) -> None:
    """O_DSYNC is seen as well; writev and write go on where the last one ended."""
    found = made(
        tmp_path,
        recorder,
        "fd = os.open('f', os.O_WRONLY | os.O_CREAT | os.O_DSYNC)\n"
        "os.fsync(os.open('.', os.O_RDONLY))\n"
        "os.write(fd, b'1')\n"
        "os.writev(fd, [b'2', b'3'])\n"
        "mark('done 1')\n",
    )

    assert contents(found, "power", after=1) == {(("f", b"123"),)}


def test_names_last_when_their_directory_is_synced(tmp_path: Path, recorder: Path) -> None:
    """A new file's name may be lost although the file was synced; renames take effect in order."""
    found = made(
        tmp_path,
        recorder,
        "fd = os.open('new', os.O_WRONLY | os.O_CREAT)\n"
        "os.write(fd, b'1')\n"
        "os.fsync(fd)\n"
        "mark('done 1')\n"
        "os.rename('new', 'final')\n"
        "mark('done 2')\n"
        "os.fsync(os.open('.', os.O_RDONLY))\n"
        "mark('done 3')\n",
    )

    assert contents(found, "power", after=1) == {(), (("new", b"1"),), (("final", b"1"),)}
    assert contents(found, "kill", after=2) == {(("final", b"1"),)}
    assert contents(found, "power", after=3) == {(("final", b"1"),)}


def test_directories_sizes_and_removals(tmp_path: Path, recorder: Path) -> None:
    """mkdir, allocation, truncation and unlink are all played back, and undone where not synced."""
    found = made(
        tmp_path,
        recorder,
        "os.mkdir('d')\n"
        "fd = os.open('d/f', os.O_RDWR | os.O_CREAT)\n"
        "os.posix_fallocate(fd, 0, 4)\n"
        "os.fsync(fd)\n"
        "for name in ('d', '.'): os.fsync(os.open(name, os.O_RDONLY))\n"
        "mark('done 1')\n"
        "os.ftruncate(fd, 2)\n"
        "mark('done 2')\n"
        "os.unlink('d/f')\n"
        "mark('done 3')\n"
        "os.rmdir('d')\n",
    )

    assert contents(found, "power", after=1) == {(("d/f", bytes(4)),), (("d/f", bytes(2)),), ()}
    assert contents(found, "kill", after=3) == {()}
    assert {i.folders for i in found if i.crash == "kill" and i.done == 3} == {("d",), ()}


def test_images_are_different_and_repeatable(tmp_path: Path, recorder: Path) -> None:
    """The same seed gives the same images; no two of them are alike; another seed draws others."""
    root = tmp_path / "root"
    root.mkdir()
    script = PRELUDE + "with open('f', 'wb', 0) as f:\n    for i in range(20): f.write(b'%d' % i * 300)\n"
    trace = record([sys.executable, "-c", script, str(root)], root, recorder)

    first, again, other = (
        [str(i) + repr(i.files) for i in images(trace, seed=s, samples=2)] for s in (1, 1, 2)
    )

    assert first == again
    assert first != other
    assert len({(repr(i.files), i.crash) for i in images(trace, seed=1)}) == len(list(images(trace, seed=1)))


def test_what_was_there_before_is_the_start(tmp_path: Path, recorder: Path) -> None:
    """Files that the workload found are on the disk, whole."""
    (tmp_path / "root" / "d").mkdir(parents=True)
    (tmp_path / "root" / "d" / "old").write_bytes(b"old")

    found = made(tmp_path, recorder, "os.unlink('d/old')\n")

    assert contents(found, "power") == {(), (("d/old", b"old"),)}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("os.link('f', 'g')\n", "does not know"),
        ("os.mkdir('d')\nos.rename('f', 'd/f')\n", "not modelled"),
        ("import mmap\nmmap.mmap(fd, 1)[0] = 0x7a\n", "does not explain"),
        ("sys.exit(3)\n", "ended with 3"),
    ],
)
def test_a_trace_that_would_prove_nothing_is_refused(
    script: str, message: str, tmp_path: Path, recorder: Path
) -> None:
    """A call that the model does not know, or does not see, and a workload that fails, are errors."""
    with pytest.raises(TraceError, match=message):
        made(tmp_path, recorder, "fd = os.open('f', os.O_RDWR | os.O_CREAT)\nos.write(fd, b'1')\n" + script)


def test_mark_without_a_recorder_does_nothing() -> None:
    """A workload runs as well when nobody records it."""
    mark("begin 1")


def test_state_hash_tells_states_apart() -> None:
    """Other keys, values or keyspaces give another text; the order of making them does not."""
    one = {("default", b"a"): b"1", ("users", b"b"): b""}

    assert state_hash(one) == state_hash(dict(reversed(one.items())))
    others: list[dict[tuple[str, bytes], bytes]] = [
        {}, {("default", b"a"): b"1"}, {("default", b"a"): b"1", ("default", b"b"): b""},
        {("default", b"a"): b"1b", ("users", b""): b""},
    ]  # fmt: skip
    assert state_hash(one) not in {state_hash(o) for o in others}


# -- workers ---------------------------------------------------------------------------------------


def wants_even(folder: Path, image: Image) -> str | None:
    """Content with the image's number, even numbers only; 5 kills its process, 7 raises, 9 hangs."""
    assert (folder / "f").read_bytes() == b"%d" % image.number
    if image.number == 5:
        os.kill(os.getpid(), 9)
    if image.number == 7:
        raise ValueError("seven")
    if image.number == 9:
        os.read(os.pipe()[0], 1)
    return "odd" if image.number % 2 else None


def numbered(count: int) -> list[Image]:
    return [Image(n, n, "kill", "x", {"f": b"%d" % n}, ("d",), begun=0, done=0, safe=0) for n in range(count)]


def test_check_images_reports_whatever_goes_wrong(tmp_path: Path) -> None:
    """Answers, exceptions, dead and hanging processes are problems of their images; the others go on."""
    count, problems = check_images(numbered(12), wants_even, folder=tmp_path / "w", timeout_s=3.0)

    assert count == 12
    assert [p.image.number for p in problems] == [1, 3, 5, 7, 9, 11]
    texts = [p.message for p in problems]
    assert texts[0] == texts[1] == texts[5] == "odd"
    assert "ended with -9" in texts[2]
    assert texts[3] == "ValueError: seven"
    assert "ended with -9" in texts[4]
    assert not list((tmp_path / "w").glob("worker-*/*"))


def test_check_images_stops_early(tmp_path: Path) -> None:
    """Enough problems end the run: nobody reads thousands of them."""
    count, problems = check_images(
        numbered(400), wants_even, folder=tmp_path / "w", workers=1, problems_max=1
    )

    assert len(problems) == 1
    assert count < 10
