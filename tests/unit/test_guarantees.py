"""The tests that docs/guarantees.md names exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_named_test_exists() -> None:
    """Each promise names tests; every one of them is there under that name."""
    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`([a-z_/]+/test_\w+\.py)(?:::(\w+))?`", text)

    assert len(named) > 30
    for path, function in named:
        source = (ROOT / "tests" / path).read_text()
        assert not function or re.search(rf"^\s*(async )?def {function}\(", source, re.MULTILINE), function
