"""Going on with fewer copies than the rule asks for: agreed by most voters, loud, and back by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_quorum import Group

import kvrep
from kvrep import EventKind, Role
from kvrep.runtime.degrading import Degrading
from tests.forward_kit import stores
from tests.replication_kit import WAIT_S, same, until, voters

AFTER_S = 0.5


@contextmanager
def formed(folder: Path, names: str = "abw", **options: Any) -> Iterator[Group]:
    """Two data nodes and a witness that have formed a group; ``a`` is primary."""
    group = Group(folder, names, **{"acks": 1, "degrade_after_s": AFTER_S, **options})
    try:
        for name in names:
            group.start(name, witness=name == "w", priority=1 if name == "a" else 0)
        primary, position = group.write(b"first", b"1")
        for name in names.replace("w", ""):
            group.nodes[name].wait_for(position, timeout_s=WAIT_S)
        if primary != "a":
            group.nodes[primary].switchover("a", timeout_s=WAIT_S)
        until(lambda: not group.nodes["a"].status().not_writable)
        yield group
    finally:
        group.close()


def told(store: kvrep.Store) -> list[kvrep.Event]:
    """What the store tells from now on of its protection."""
    events: list[kvrep.Event] = []
    wanted = {EventKind.DEGRADED, EventKind.RESTORED, EventKind.NOT_DEGRADED}
    store.on_event(lambda event: events.append(event) if event.kind in wanted else None)
    return events


def test_with_the_witness_s_word_writes_go_on_and_protection_comes_back(tmp_path: Path) -> None:
    """Refused up to the deadline, then acknowledged alone, with the span in status and events; b returns."""
    with formed(tmp_path) as group:
        a = group.nodes["a"]
        events = told(a)
        group.stop("b")
        until(lambda: a.status().not_writable)
        with pytest.raises(kvrep.NotEnoughFollowers):
            a.put(b"early", b"v")
        until(lambda: a.status().away)
        alone = a.put(b"alone", b"v")
        status = a.status()
        assert status.away == ("b",)
        assert status.copies == 1
        ((first, last),) = status.unprotected
        assert first <= alone.offset
        assert last == 0, "it goes on"
        assert a.get(b"alone", consistency="linearizable") == b"v"
        with pytest.raises(kvrep.NotEnoughFollowers):
            a.put(b"k", b"v", acks=1)  # who asks for a copy is not given less
        assert group.nodes["w"].status().position == (0, 0), "a witness keeps no data"

        group.start("b")
        until(lambda: not a.status().away)
        b = group.nodes["b"]
        both = a.put(b"both", b"v")
        b.wait_for(both, WAIT_S)
        for store in (a, b):
            until(lambda store=store: store.status().unprotected[-1][1])
            ((first, last),) = store.status().unprotected
            assert first <= alone.offset <= last < both.offset
            assert store.status().copies == 2
        assert b[b"alone"] == b"v"
        until(lambda: len(events) == 2)
        assert [(e.kind, e.name) for e in events] == [(EventKind.DEGRADED, "b"), (EventKind.RESTORED, "")]
        assert (events[1].first, events[1].last) == (first, last)
        group.stop("a")
        name, _ = group.write(b"after", b"v")
        assert name == "b", "protected again, b may take over"


def test_who_lacks_the_span_is_not_promoted(tmp_path: Path) -> None:
    """a went on alone and dies; b comes back: neither election nor hand makes it primary, force does."""
    with formed(tmp_path) as group:
        a = group.nodes["a"]
        group.stop("b")
        until(lambda: a.status().away)
        a.put(b"alone", b"v")
        group.stop("a")
        b = group.start("b")
        until(lambda: "without the candidate" in str(b._node.coordinator.status().problem))
        with pytest.raises(kvrep.UnsafePromotion, match="acknowledged with fewer copies"):
            b.promote(timeout_s=5.0)
        assert b.status().role is Role.FOLLOWER
        again = group.start("a", priority=1)
        name, position = group.write(b"k", b"v")
        assert name == "a", "it needs nobody but the witness"
        b.wait_for(position, WAIT_S)
        assert b[b"alone"] == b"v"
        until(lambda: not again.status().away)


def test_a_restarted_primary_goes_on_alone(tmp_path: Path) -> None:
    """It dies while b is away, and comes back: what it acknowledged is there, and it takes writes soon."""
    with formed(tmp_path) as group:
        group.stop("b")
        until(lambda: group.nodes["a"].status().away)
        group.nodes["a"].put(b"alone", b"v")
        group.stop("a")
        group.start("a")
        name, _ = group.write(b"again", b"v")
        assert name == "a"
        assert group.nodes["a"][b"alone"] == b"v"
        assert group.nodes["a"].status().away == ("b",)


def test_a_new_primary_goes_on_alone(tmp_path: Path) -> None:
    """The primary dies with both nodes up to date: the other is elected, and after the deadline takes writes."""
    with formed(tmp_path) as group:
        group.stop("a")
        name, position = group.write(b"k", b"v")
        assert name == "b"
        b = group.nodes["b"]
        assert b.status().away == ("a",)
        assert b.status().unprotected[-1][0] <= position.offset
        a = group.start("a")
        until(lambda: not b.status().away)
        a.wait_for(b.put(b"both", b"v"), WAIT_S)
        same(b, a)


def test_without_most_voters_it_is_refused(tmp_path: Path) -> None:
    """Neither b nor the witness answers: writes stay refused, and the event says who is missing."""
    with stores(tmp_path) as start:
        a = start("a", acks=1, degrade_after_s=AFTER_S)
        b = start("b", follow=a.address)
        voters(a, "a", "b")
        events = told(a)
        b.close()
        until(lambda: events)
        assert events[0].kind is EventKind.NOT_DEGRADED
        assert "b" in events[0].reason
        for _ in range(3):
            with pytest.raises(kvrep.NotEnoughFollowers):
                a.put(b"k", b"v")
        assert a.status().unprotected == ()
        b = start("b", follow=a.address)
        until(lambda: not a.status().not_writable)
        b.wait_for(a.put(b"k", b"v"), WAIT_S)
        assert a.status().away == ()


def test_three_data_nodes_by_hand(tmp_path: Path) -> None:
    """acks="all": the two that are left agree and write on; whoever is promoted then gets it from one of them."""
    with stores(tmp_path) as start:
        a = start("a", acks="all", degrade_after_s=AFTER_S)
        b = start("b", follow=a.address)
        c = start("c", follow=a.address)
        voters(a, "a", "b", "c")
        # It is to know that it is a voter for certain: else most of the older voters must promise, too.
        c.wait_for(a.position, WAIT_S)
        c.close()
        until(lambda: a.status().away == ("c",))
        position = a.put(b"k", b"v")
        assert a.status().copies == 2
        b.wait_for(position, WAIT_S)
        a.close()
        address = b.address
        b.close()
        c = start("c", follow=address)
        with pytest.raises(kvrep.UnsafePromotion, match="most voters"):
            c.promote(timeout_s=3.0)
        b = start("b", follow=c.address)
        c.promote(timeout_s=WAIT_S)
        assert c[b"k"] == b"v"
        until(lambda: c.status().away == ("a",))
        b.wait_for(c.put(b"k", b"w"), WAIT_S)


def test_never_by_default_and_never_with_acks_0(tmp_path: Path) -> None:
    """It is off unless asked for, and settings that make no sense stop the start, or the change."""
    with stores(tmp_path) as start:
        a = start("a", acks=1)
        assert a.status().degrade_after_s == 0
        with pytest.raises(ValueError, match="acks=0"):
            a.reconfigure(acks=0, degrade_after_s=1.0)
        with pytest.raises(ValueError, match="degrade_after_s"):
            a.reconfigure(degrade_after_s=-1.0)
        b = start("b", follow=a.address)
        voters(a, "a", "b")
        a.reconfigure(degrade_after_s=2.5)
        until(lambda: b.status().degrade_after_s == 2.5)
    for wrong in (
        {"acks": 0, "degrade_after_s": 1.0},
        {"degrade_after_s": 1.0},
        {"acks": 1, "degrade_after_s": -1},
        {"acks": 1, "degrade_after_s": "x"},
        {"acks": 1, "degrade_after_s": 1e9},
    ):
        with pytest.raises(kvrep.ConfigurationMismatch, match="degrade_after_s"):
            kvrep.open(tmp_path / "wrong", **wrong)


def test_a_voter_whose_disk_fails_does_not_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness cannot store it, so it does not answer, and writes stay refused until it can."""
    with formed(tmp_path) as group:
        home = group.nodes["w"]._node.engine.home
        lower = type(home).lower
        broken = threading.Event()

        def fail(self: Any, position: kvrep.Position) -> bool:
            if self is home and not broken.is_set():
                raise OSError(5, "Input/output error")
            return lower(self, position)

        monkeypatch.setattr(type(home), "lower", fail)
        a = group.nodes["a"]
        events = told(a)
        group.stop("b")
        until(lambda: events)
        assert events[0].kind is EventKind.NOT_DEGRADED
        with pytest.raises(kvrep.NotEnoughFollowers):
            a.put(b"k", b"v")
        broken.set()
        until(lambda: a.status().away)
        a.put(b"k", b"v")


def test_closing_while_the_others_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness takes its time to answer; close() of the primary does not wait for it, and leaves no thread."""
    with formed(tmp_path) as group:
        home = group.nodes["w"]._node.engine.home
        lower, asked, go_on = type(home).lower, threading.Event(), threading.Event()

        def slow(self: Any, position: kvrep.Position) -> bool:
            if self is home:
                asked.set()
                assert go_on.wait(WAIT_S)
            return lower(self, position)

        monkeypatch.setattr(type(home), "lower", slow)
        group.stop("b")
        assert asked.wait(WAIT_S)
        began = time.monotonic()
        group.stop("a")
        assert time.monotonic() - began < 5.0
        assert not [t.name for t in threading.enumerate() if t.name == "kvrep-degrade-a"]
        go_on.set()


def test_the_primary_ends_while_the_others_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness has stored its word, nothing is acknowledged by it yet: only who holds that record goes on."""
    with formed(tmp_path) as group:
        a, w = group.nodes["a"], group.nodes["w"]
        monkeypatch.setattr(Degrading, "effect", lambda self, epoch, offset: None)
        last = a.position
        group.stop("b")
        until(lambda: w._node.engine.home.lowered > last)
        assert not a.status().committed_offset > last.offset
        group.stop("a")
        monkeypatch.undo()
        b = group.start("b")
        until(lambda: "without the candidate" in str(b._node.coordinator.status().problem))
        group.start("a", priority=1)
        name, position = group.write(b"k", b"v")
        assert name == "a"
        b.wait_for(position, WAIT_S)
        until(lambda: not group.nodes["a"].status().away)
        same(group.nodes["a"], b)


def test_a_witness_joins_a_group_that_exists(tmp_path: Path) -> None:
    """add_voter(witness=True): two data nodes get their third vote, and fail over with it."""
    with formed(tmp_path, "ab", degrade_after_s=None) as group:
        a, b = group.nodes["a"], group.nodes["b"]
        group.peers["w"] = "127.0.0.1:0"
        w = kvrep.open(
            tmp_path / "w", name="w", listen="127.0.0.1:0",
            coordinator=kvrep.Quorum(peers={**group.peers}, witness=True),
        )  # fmt: skip
        group.nodes["w"] = w
        for arguments in ({"witness": True}, {"address": w.address}):
            with pytest.raises(ValueError, match="address"):
                a.add_voter("w", **arguments)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not a witness"):
            a.add_voter("b", witness=True, address=b.address)
        with pytest.raises((kvrep.NotPrimary, ValueError)):
            b.add_voter("w", witness=True, address=w.address)
        a.add_voter("w", witness=True, address=w.address)
        assert set(a.status().voters) == {"a", "b", "w"}
        until(lambda: w.status().lineage == a.status().lineage)
        b.wait_for(a.put(b"k", b"v"), WAIT_S)
        del group.nodes["w"]
        try:
            group.stop("a")
            until(lambda: b.status().role is Role.PRIMARY)
        finally:
            w.close()


def test_a_voter_without_listen_is_named_in_the_error(tmp_path: Path) -> None:
    """It cannot be asked for its promise, and UnsafePromotion says why."""
    with stores(tmp_path) as start:
        a = start("a", acks="majority")
        mute = kvrep.open(tmp_path / "m", name="m", follow=a.address)
        c = start("c", follow=a.address)
        try:
            voters(a, "a", "m", "c")
            until(lambda: len(c.status().voters) == 3)
            a.close()
            with pytest.raises(
                kvrep.UnsafePromotion, match="m cannot be asked, being opened without listen="
            ):
                c.promote(timeout_s=3.0)
        finally:
            mute.close()
