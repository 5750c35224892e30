"""The code blocks of the README and of the page on feeds are executed as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README, FEEDS = (
    re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    for page in ("README.md", "docs/feeds.md")
)
BLOCKS = README + FEEDS


def test_there_are_blocks_to_run() -> None:
    """The README shows a store alone, a replicated one, an asynchronous one, a failover and a feed."""
    assert len(README) == 5
    assert len(FEEDS) >= 6


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int, tmp_path: Path) -> None:
    """Every Python block runs to its end, in an empty folder of its own, without a warning."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[number]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 0, result.stderr
