"""Which system calls a command makes, so that a test can strike at each of them in turn."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

STRACE = shutil.which("strace")
DISK_CALLS = (
    "pwrite64", "pwritev", "pwritev2", "fdatasync", "fsync", "rename", "unlink", "unlinkat", "rmdir", "ftruncate",
    "truncate", "fallocate", "mkdir",
)  # fmt: skip
"""The calls that change a disk."""
Point = tuple[str, int]
"""The n-th call of a name that one thread makes, as strace counts them."""


def run(command: Sequence[str], *strace: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[bytes]:
    """Run a command and all its threads under strace; its output is captured."""
    assert STRACE is not None
    return subprocess.run(
        [STRACE, "-f", "-qq", *strace, *command], capture_output=True, timeout=timeout_s, check=False
    )


def points_of(trace: Path) -> list[Point]:
    """Every call in a trace (``-o`` of a run with ``trace=`` the calls), by name; for each thread on its own."""
    calls = Counter(re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE))
    most: dict[str, int] = {}
    for (_, name), count in calls.items():
        most[name] = max(count, most.get(name, 0))
    return [(name, n) for name, count in sorted(most.items()) for n in range(1, count + 1)]


def strike(point: Point, what: str) -> tuple[str, ...]:
    """Options of strace that kill (``signal=SIGKILL``) or fail (``error=EIO``) a command at a point."""
    name, n = point
    return ("-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:{what}:when={n}")
