"""A full disk during a bootstrap, on either side: said plainly, nothing lost, going on when there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path

import pytest

import kvrep
from tests.bootstrap_kit import (
    alike,
    follower,
    gate,
    generations,
    primary,
    receiving,
    spooled,
    streaming,
    trimmed,
    write,
)
from tests.replication_kit import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="not root: no small disk can be mounted")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a small disk of so many MiB, or gives the mounted one that size."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted: list[Path] = []

    def resize(mib: int) -> Path:
        options = f"size={mib}m" if not mounted else f"remount,size={mib}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
        mounted[:] = [path]
        return path

    yield resize
    if mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(file: RawIOBase) -> None:
    """Write until the disk is full."""
    while file.write(bytes(1 << 16)):
        pass


def problem(store: kvrep.Store, text: str) -> str:
    """Wait until the follower says so."""
    found = until(lambda: text in (said := store.status().source.problem) and said, what=text)
    return str(found)


def test_follower_without_room(tmp_path: Path, disk: Callable[[int], Path]) -> None:
    """A copy that does not fit is not even begun; it comes when there is room."""
    home = disk(6) / "b"
    with primary(tmp_path / "a") as a, follower(home, a.address) as b:
        said = problem(b, "no room for the copy")
        assert "make room" in said
        assert b.status().source.bootstrap_bytes == 0
        assert len(b) == 0
        disk(64)
        streaming(b)
        alike(a, b)


def test_disk_of_the_follower_fills_up(tmp_path: Path, disk: Callable[[int], Path]) -> None:
    """When the disk fills up half-way, the old state is served on, and the room is given back to it."""
    home = disk(24) / "b"
    with primary(tmp_path / "a", 0, retention_bytes_max=512 << 10) as a:
        a.put(b"seen", b"old")
        with follower(home, a.address) as b:
            alike(a, streaming(b))
        old = a.status().last_offset
        a.put(b"seen", b"new")
        write(a, 5000)
        trimmed(a, old + 1)
        with gate(a.address, 2 << 20) as g, follower(home, g.address) as b:
            receiving(b)
            ballast = home.parent / "ballast"
            with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                fill(file)
            g.release()
            problem(b, "no room for the copy")
            assert b[b"seen"] == b"old"
            until(lambda: generations(home) == ["gen-000001"], what="the end of what had arrived")
            ballast.unlink()
            streaming(b)
            alike(a, b)
            assert b[b"seen"] == b"new"


def test_primary_without_room(tmp_path: Path, disk: Callable[[int], Path]) -> None:
    """A primary that cannot spool a copy tells the follower what to do, keeps nothing, and writes on."""
    home = disk(24) / "a"
    with primary(home) as a, follower(tmp_path / "b", a.address) as b:
        said = problem(b, "a has no room")
        assert "make room on its disk" in said
        until(lambda: spooled(home) == [])
        a.put(b"goes", b"on")
        disk(96)
        streaming(b)
        alike(a, b)
