"""Wall clocks that jump: they are shown to people, and decide nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.replication_kit import WAIT_S, same, stores, until, voters
from tests.scenarios.test_quorum import Group
from tests.scenarios.test_quorum import group as quorum

__all__ = ["quorum"]

YEAR_S = 365 * 86_400
RETENTION: dict[str, Any] = {"log_file_bytes": 1 << 16, "retention_bytes": 1 << 30, "retention_age_s": 3600.0}

Jump = Callable[[float], None]


class Wall:
    """Python's ``time`` with a wall clock that is ``off_s`` seconds off the true one."""

    def __init__(self) -> None:
        self.off_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        return time.time() + self.off_s

    def time_ns(self) -> int:
        return time.time_ns() + round(self.off_s * 1e9)


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Sets the wall clock of all of kvrep so many seconds off. That of gRPC, whose core reads the kernel's, stays."""
    wall = Wall()

    def to(seconds: float) -> None:
        wall.off_s = seconds
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "kvrep" and getattr(module, "time", None) is time:
                monkeypatch.setattr(module, "time", wall)

    return to


def test_a_year_forth_and_back_changes_nothing(tmp_path: Path, jump: Jump) -> None:
    """Epoch, streams, slots, log, feed and reads of a primary and its follower go on as if nothing had been."""
    stranger = b"s" * 16
    with stores(tmp_path) as node:
        a = node("a", acks=1, **RETENTION)
        b = node("b", follow=a.address, **RETENTION)
        voters(a, "a", "b")
        shipping = a._node.shipping
        assert shipping is not None
        shipping.slots.note(stranger, name="", address="", voter=False, acked=a.position.offset)
        epoch, streams = a.status().epoch, shipping.followers.streams()
        written = 0
        with a.feed("reader") as feed:
            for off_s in (0, YEAR_S, -YEAR_S, YEAR_S, 0):
                jump(off_s)
                for _ in range(100):
                    last = a.put(b"%d" % written, bytes(1000))
                    written += 1
                a.flush()
                shipping._tick()
                a._node.engine.trim()
                assert b.get(b"%d" % (written - 1), at_least=last, max_staleness_s=5.0) == bytes(1000)
                assert b.get(b"0", consistency="linearizable") == bytes(1000)
                assert [int(change.key) for change in feed.poll(WAIT_S)] == list(
                    range(written - 100, written)
                )
                feed.ack()
            status = a.status()
            assert feed.info().held
            assert feed.info().lag_s >= 0.0
        assert status.epoch == epoch
        assert status.first_offset == 1, "trimmed by a clock"
        assert shipping.followers.streams() == streams, "a stream was replaced"
        assert shipping.slots.get(stranger) is not None, "a slot ended by a clock"
        assert all(f.lag_s >= 0.0 for f in status.followers)
        same(a, b)


def test_an_elected_primary_stays(quorum: Callable[..., Group], jump: Jump) -> None:
    """Who is primary depends on no wall clock: neither heartbeats, nor confirmations, nor what is acknowledged."""
    nodes = quorum("abc", acks="majority")
    for name in "abc":
        nodes.start(name)
    primary, _ = nodes.write(b"k", b"v")
    store, other = nodes.nodes[primary], nodes.nodes["abc".replace(primary, "")[0]]
    epoch = store.status().epoch
    for off_s in (YEAR_S, -YEAR_S, 0):
        jump(off_s)
        ends = time.monotonic() + 0.5
        until(lambda ends=ends: store.put(b"k", b"v") and time.monotonic() > ends)
        assert other.get(b"k", consistency="linearizable") == b"v"
    assert store.status().epoch == epoch


def test_lag_in_seconds_is_never_negative(tmp_path: Path, jump: Jump) -> None:
    """It is told by wall clocks: one that was set back shows none, one that was set ahead too much, and that is all."""
    with stores(tmp_path) as node:
        a = node("a", acks=0)
        shipping = a._node.shipping
        assert shipping is not None
        last = a.put(b"k", b"v").offset
        for off_s, shown in ((0, 0), (-YEAR_S, 0), (YEAR_S, YEAR_S)):
            jump(off_s)
            lag = shipping.lags.measured(b"b" * 16, last - 1)
            assert (lag.records, lag.bytes > 0) == (1, True)
            assert shown <= lag.seconds < shown + 60
