"""A frugal process gives back what is free."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvrep.cli.frugal import _SETTINGS, be_frugal

PROGRAM = """
import sys
from pathlib import Path
from kvrep.cli.frugal import be_frugal
if sys.argv[1] == "frugal":
    be_frugal()
large, small = [], []
for _ in range(1000):  # blocks of 100 KB, each with a small one behind it that stays
    large.append(bytearray(100_000))
    small.append(bytearray(1000))
large.clear()
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10)
"""


def mib_left(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


def test_free_blocks_go_back_to_the_system() -> None:
    """Of 100 MB in values that are free again, with small ones between them, next to nothing stays."""
    usual = mib_left("usual")
    if usual < 100:
        pytest.skip("this C library gives such blocks back by itself")
    assert mib_left("frugal") < usual - 80


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold that somebody has set is left alone, each for itself."""
    said: list[int] = []
    monkeypatch.setattr(
        "ctypes.CDLL", lambda _: SimpleNamespace(mallopt=lambda number, _: said.append(number))
    )
    for name in _SETTINGS:
        monkeypatch.setenv(name, "x")
    trim, mmap = -1, -3
    for name, left in (("MALLOC_TRIM_THRESHOLD_", [mmap]), ("MALLOC_MMAP_THRESHOLD_", [trim])):
        with monkeypatch.context() as environment:
            environment.setenv(name, "1000000")
            be_frugal()
        assert said == left
        said.clear()
