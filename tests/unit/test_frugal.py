"""A frugal process gives back what is free."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
