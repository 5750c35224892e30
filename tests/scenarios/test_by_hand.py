"""Nodes without ``coordinator=``: they try nothing by themselves, and answer the elections of others."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import Role
from kvrep.model.position import epoch_after
from kvrep.replication.ballots import Answer, PromiseReply, PromiseRequest, Question
from tests.ports import free_address
from tests.replication_kit import FAST, WAIT_S, same, until, voters, writable


def call(store: kvrep.Store, method: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a node as its peers do."""
    return store._node.roles.call(store.address, method, request, WAIT_S)


def question(store: kvrep.Store) -> dict[str, Any]:
    """Whether another voter, which holds nothing, might become primary."""
    lineage = store._node.engine.home.lineage
    asked = Question(purpose="stand", store_id=b"x" * 16, name="x", address="", lineage=lineage, gone=True)
    return asked.to_wire()


def test_a_node_without_a_coordinator_has_the_manual_one(tmp_path: Path) -> None:
    """It answers like the others, has no thread, limits nobody, and ends with its store; a store alone runs none."""
    with kvrep.open(tmp_path / "alone") as alone:
        alone.put(b"k", b"v")
        with pytest.raises(kvrep.ClosedError, match="does not run"):
            alone._node.coordinator.status()
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as a:
        coordinator = a._node.coordinator
        assert coordinator.status().kind == "manual"
        assert coordinator.confirmed_until == float("inf")
        assert not any(t.name.startswith(("kvrep-coordinator", "kvrep-role")) for t in threading.enumerate())
        answer = Answer.from_wire(call(a, "ask", question(a)))
        assert (answer.name, answer.last.offset) == ("a", a.status().last_offset)
        with pytest.raises(kvrep.ProtocolError):
            call(a, "ask", {})
    with pytest.raises(kvrep.ClosedError):
        coordinator.status()


def test_a_primary_by_hand_is_not_deposed_by_an_election(tmp_path: Path) -> None:
    """It is primary until it promises another node, though nobody confirms it; a planned promise fences it, and as no
    primary comes of that one, it begins again above it."""
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as a,
        kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", follow=a.address, **FAST) as b,
    ):
        voters(writable(a), "a", "b")
        home, epoch, coordinator = b._node.engine.home, a.status().epoch, a._node.coordinator
        b.close()
        asked = PromiseRequest(
            epoch=epoch_after(epoch, 2), store_id=home.store_id, name="b", address="", lineage=home.lineage
        )
        for later_s in (0.0, 3600.0):
            coordinator._clock = lambda later_s=later_s: time.monotonic() + later_s  # type: ignore[attr-defined]
            answer = Answer.from_wire(call(a, "ask", question(a)))
            assert not answer.would
            assert answer.alive is not None
            assert (answer.alive.name, answer.alive.epoch) == ("a", epoch)
            reply = PromiseReply.from_wire(call(a, "vote", asked.to_wire()))
            assert reply.promise is None
            assert "alive" in reply.refused
        planned = PromiseRequest(**{**{n: getattr(asked, n) for n in asked.__slots__}, "planned": True})
        reply = PromiseReply.from_wire(call(a, "vote", planned.to_wire()))
        assert reply.promise is not None
        assert reply.promise.last.offset == a.status().last_offset
        assert a.status().role is Role.PRIMARY
        with pytest.raises(kvrep.RefusedError):
            a.put(b"k", b"v")
        with kvrep.open(tmp_path / "b", name="b", follow=a.address, **FAST) as again:
            voters(writable(a), "a", "b")
            assert a.status().epoch > planned.epoch
            again.wait_for(a.put(b"k", b"v"), WAIT_S)


def test_a_primary_by_hand_that_hears_of_a_newer_one_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has promised nothing, so nothing fences it yet: it asks the voters at once, not when it is their turn."""
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as a,
        kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", follow=a.address, **FAST) as b,
    ):
        voters(writable(a), "a", "b")
        home, sought = b._node.engine.home, threading.Event()
        monkeypatch.setattr(a._node.roles, "seek", sought.set)
        newer = Question(
            purpose="lead", store_id=home.store_id, name="b", address=b.address, lineage=home.lineage,
            epoch=epoch_after(a.status().epoch, 2), begun=True,
        )  # fmt: skip
        answer = Answer.from_wire(call(a, "ask", newer.to_wire()))
        assert answer.alive is not None
        assert answer.alive.name == "b"
        assert sought.is_set()


def test_one_node_that_elects_among_nodes_by_hand(tmp_path: Path) -> None:
    """It joins as one of them, leaves the primary in peace while that lives, and replaces it with their promises."""
    peers = {name: free_address() for name in "abc"}

    def opened(name: str, **options: Any) -> kvrep.Store:
        return kvrep.open(tmp_path / name, name=name, listen=peers[name], **FAST, **options)

    with opened("a", acks="majority") as a, opened("c", follow=[peers["a"], peers["b"]]) as c:
        with opened("b", coordinator=kvrep.Quorum(peers=peers)) as b:
            voters(writable(a), "a", "b", "c")
            epoch, replaying = a.status().epoch, b._node.replaying
            assert replaying is not None
            for i in range(20):  # what breaks is the stream, not the primary
                until(lambda: replaying.connected)
                replaying._stream.cancel()  # type: ignore[union-attr]
                last = a.put(b"%d" % i, b"v")
            b.wait_for(last, WAIT_S)
            c.wait_for(last, WAIT_S)
            assert a.status().epoch == epoch
            a.close()
            until(lambda: b.status().role is Role.PRIMARY and not b.status().not_writable)
            c.wait_for(b.put(b"after", b"v"), WAIT_S)
            with opened("a") as again:
                again.wait_for(b.position, WAIT_S)
                assert again.status().role is Role.FOLLOWER
                same(b, c, again)
