"""Promises above the primary's epoch: who may fence it, and how it comes back."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.errors import UpgradeRequired
from kvrep.model.record import Kind
from kvrep.runtime.leadership import Leadership
from kvrep.storage.write import Write
from tests.replication_kit import FAST, WAIT_S, same, until, voters, writable


@pytest.mark.parametrize("acks", [0, 1])
def test_a_promise_that_nobody_used_is_overcome(
    tmp_path: Path, acks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A voter that promised a higher epoch fences the primary, which then begins again above that epoch."""
    seen = threading.Event()
    renew = Leadership.renew

    def renew_once_seen(leadership: Leadership, now: float) -> None:
        if seen.is_set():
            renew(leadership, now)

    monkeypatch.setattr(Leadership, "renew", renew_once_seen)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=acks, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as b:
            voters(p, "a", "b")
            before = p.put(b"k", b"1")
            assert b._node.engine.home.promise(before.epoch + 5000, b"x" * 16)
        refused: list[kvrep.Error] = []

        def fenced() -> bool:
            try:
                p.put(b"k", b"2", timeout_s=0.2)
            except kvrep.UnknownOutcome:
                pass  # it was logged just before
            except kvrep.RefusedError as error:
                refused.append(error)
            return any(isinstance(error, kvrep.Fenced) for error in refused)

        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as b:
            until(fenced)
            seen.set()
            assert "newer" in p.status().not_writable or p.status().epoch > before.epoch
            writable(p)
            voters(p, "a", "b")
            after = p.put(b"k", b"3")
            assert after.epoch > before.epoch + 5000
            assert p.resolve(before) is kvrep.Outcome.COMMITTED
            b.wait_for(after, WAIT_S)
            same(p, b)


def test_a_higher_promise_met_at_the_start_is_asked_again_above(tmp_path: Path) -> None:
    """A restarted primary that collects promises and meets a higher one asks for an epoch above it."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:
        with (
            kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as b,
            kvrep.open(tmp_path / "c", name="c", follow=p.address, **FAST),
        ):
            voters(p, "a", "b", "c")
            epoch = p.put(b"k", b"1").epoch
            assert b._node.engine.home.promise(epoch + 70_000, b"x" * 16)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as p:
        with (
            kvrep.open(tmp_path / "c", name="c", follow=p.address, **FAST) as c,
            kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as b,
        ):
            writable(p)
            until(lambda: p.status().epoch > epoch + 70_000)
            voters(writable(p), "a", "b", "c")
            p.put(b"k", b"2")
            same(p, b, c)


def test_an_unknown_kind_of_record_stops_a_follower_and_an_open(tmp_path: Path) -> None:
    """What a newer primary logs and this version does not know is never skipped: a follower stops, an open fails."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as b:
            b.wait_for(p.put(b"k", b"1"), WAIT_S)
            committer = p._node.engine.committer
            committer.order(Write(9, {"new": 1}, 10))
            committer.kick()
            p.put(b"k", b"2")
            until(lambda: "upgrade" in b.status().source.problem)
            assert b.status().source.state == "refused"
            assert b.get(b"k") == b"1"
            assert p.get(b"k") == b"2"
            shutil.copytree(tmp_path / "a", tmp_path / "crashed")  # as kill -9 would have left it
    with pytest.raises(UpgradeRequired, match="kind 9") as caught:
        kvrep.open(tmp_path / "crashed", name="a").close()
    assert (caught.value.found, caught.value.supported) == (9, max(Kind))


def test_the_epoch_table_and_promise_survive_on_every_node(tmp_path: Path) -> None:
    """After several restarts of both, epochs only grow and both tables agree."""
    epochs = []
    for _ in range(4):
        with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as p:
            with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as b:
                b.wait_for(p.put(b"k", b"v"), WAIT_S)
                epochs.append(p.status().epoch)
                assert list(p._node.engine.epochs) == list(b._node.engine.epochs)
                assert b._node.engine.home.promised_epoch == p.status().epoch
    assert epochs == sorted(set(epochs))
