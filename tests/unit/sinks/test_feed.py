"""A feed as a source lets go of the log it does not need, and only then."""

from __future__ import annotations

from typing import Any

import pytest

from kvrep.sinks import feed
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.interface import Place


class Upstream:
    """Remembers what it was told to hold."""

    url = "kvrep:x"

    def __init__(self) -> None:
        self.holds: list[str] = []

    def hold(self, token: str) -> None:
        self.holds.append(token)


def test_an_idle_source_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The place is told once, at most once a second, and not again while it stays where it is."""
    now = 100.0
    monkeypatch.setattr(feed.time, "monotonic", lambda: now)
    upstream: Any = Upstream()
    source = FeedSource(upstream)
    source.settle(Place())
    source.settle(Place(token="a"))
    source.settle(Place(token="b"))
    assert upstream.holds == ["a"], "not twice within a second"
    now = 102.0
    source.settle(Place(token="b"))
    now = 110.0
    source.settle(Place(token="b"))
    assert upstream.holds == ["a", "b"], "not again for the same place"
