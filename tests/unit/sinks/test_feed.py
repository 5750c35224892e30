"""A feed as a source lets go of the log it does not need, and only then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import kvrep
from kvrep.sinks import feed
from kvrep.sinks.feed import FeedSource
from kvrep.sinks.interface import Place
from kvrep.sinks.upstream import Local


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


class Refusing:
    """A store that refuses whatever is done to its feeds."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def status(self) -> Any:
        return SimpleNamespace(path="x")

    def feed(self, name: str, *, snapshot: bool) -> Any:
        raise self.error


def test_what_refuses_a_place_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A follower cannot hold the log, and that is all right; every other refusal is in the log, none is lost."""
    follower: Any = Refusing(kvrep.NotPrimary("a follower"))
    Local(follower, feed="copy").hold("k1x")
    assert Local(follower, feed="copy").held() == ""
    assert not caplog.records
    full: Any = Refusing(kvrep.StorageFull("no room"))
    Local(full, feed="copy").hold("k1x")
    assert "no room" in caplog.text
    with pytest.raises(kvrep.PeerUnavailable, match="no room"):
        Local(full, feed="copy").held()
