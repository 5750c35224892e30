"""A bound on what acks=0 may lose (``lag_records_max``): held at the door, by waiting, and through a failover."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from replication_kit import WAIT_S, Open, same, stores, until, voters, writable
from test_quorum import Group

import kvrep
from kvrep import Outcome
from kvrep.replication.acks import CommitTracker
from kvrep.replication.join import JoinPlan, LogView
from kvrep.replication.messages import Hello, NeedBootstrap
from kvrep.runtime import session
from kvrep.storage.rescue import load_rescue

LAG = 5
PATIENT: dict[str, Any] = {"heartbeat_timeout_s": 60.0}
"""A follower that stands still for a while stays connected."""


@contextmanager
def group(folder: Path, names: str = "ab", **options: Any) -> Iterator[tuple[Open, list[kvrep.Store]]]:
    """A bounded primary and its followers: all vote, and hold all there is."""
    with stores(folder) as start:
        first = start(names[0], acks=0, lag_records_max=LAG, **options)
        made = [first, *(start(name, follow=first.address, **options) for name in names[1:])]
        voters(first, *names)
        until(lambda: not any(f.lag_records for f in first.status().followers))
        yield start, made


def stop(primary: kvrep.Store, follower: kvrep.Store) -> None:
    """The follower ends, and the primary has noticed."""
    follower.close()
    until(lambda: not any(f.connected for f in primary.status().followers))


def written(store: kvrep.Store) -> set[bytes]:
    return set(store.keys())


@contextmanager
def standing_still(store: kvrep.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The follower takes nothing to its disk meanwhile, but stays connected."""
    engine, go_on = store._node.engine, threading.Event()
    append = engine.append

    def held(*args: Any, **more: Any) -> Any:
        assert go_on.wait(WAIT_S)
        return append(*args, **more)

    monkeypatch.setattr(engine, "append", held)
    try:
        yield
    finally:
        go_on.set()


# -- the door --------------------------------------------------------------------------------------


def test_exactly_so_many_writes_succeed_without_the_follower(tmp_path: Path) -> None:
    """Then they are refused, and not logged; a forced promotion of the follower loses no more; the rest is saved."""
    with group(tmp_path) as (start, (a, b)):
        stop(a, b)
        for i in range(LAG):
            a.put(b"alone%d" % i, b"v")
        last = a.status().last_offset
        for write in (
            lambda: a.put(b"k", b"v"),
            lambda: a.submit_put(b"k", b"v"),
            lambda: a.compare_and_set(b"alone0", expected=b"v", value=b"w"),
        ):
            with pytest.raises(kvrep.NotEnoughFollowers, match="none is connected") as refused:
                write()
            assert "promote(force=True)" in refused.value.hint
        assert "lag_records_max is 5" in a.status().not_writable
        assert a.status().last_offset == last, "nothing is logged"
        assert len(written(a)) == LAG, "reads go on"
        a.close()

        b = start("b", follow=a.address)
        with pytest.raises(kvrep.UnsafePromotion):
            b.promote(timeout_s=3.0)
        b.promote(force=True, timeout_s=WAIT_S)
        lost = {b"alone%d" % i for i in range(LAG)} - written(b)
        assert len(lost) <= LAG
        position = b.put(b"new", b"v")
        assert b.status().lag_records_max == LAG, "it is bounded again once somebody follows"
        a = start("a")
        a.wait_for(position, WAIT_S)
        (path,) = a.status().rescued
        assert sum(r.kind == 0 for r in load_rescue(Path(path)).records) == len(lost) == LAG
        voters(b, "a", "b")
        same(a, b)


def test_the_follower_is_back_and_writes_go_on(tmp_path: Path) -> None:
    """What it fetches makes room, by itself."""
    with group(tmp_path) as (start, (a, b)):
        stop(a, b)
        with pytest.raises(kvrep.NotEnoughFollowers):
            for i in range(LAG + 1):
                a.put(b"%d" % i, b"v")
        b = start("b", follow=a.address)
        writable(a)
        for i in range(4 * LAG):
            position = a.put(b"%d" % i, b"w")
        b.wait_for(position, WAIT_S)
        same(a, b)


def test_writes_of_asyncio_are_refused_as_exactly(tmp_path: Path) -> None:
    """Of many at once without the follower so many are done, and all others refused: none is left unknown."""

    async def writes() -> list[Any]:
        async with await kvrep.aio.open(
            tmp_path / "a", name="a", listen=address, heartbeat_interval_s=0.1
        ) as a:
            async with asyncio.timeout(WAIT_S):
                while not any(f.connected for f in a.status().followers):
                    await asyncio.sleep(0.01)
            for i in range(3 * LAG):  # with the follower there they only wait
                await a.put(b"%d" % i, b"v")
            async with asyncio.timeout(WAIT_S):
                while any(f.lag_records for f in a.status().followers):
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(b.close)
            async with asyncio.timeout(WAIT_S):
                while any(f.connected for f in a.status().followers):
                    await asyncio.sleep(0.01)
            return await asyncio.gather(
                *(a.put(b"many%d" % i, b"v") for i in range(10 * LAG)), return_exceptions=True
            )

    with group(tmp_path) as (_, (a, b)):
        address = a.address
        a.close()
        outcomes = asyncio.run(writes())
        assert sum(isinstance(o, kvrep.Position) for o in outcomes) == LAG
        assert sum(isinstance(o, kvrep.NotEnoughFollowers) for o in outcomes) == 9 * LAG


def test_pipelined_writes_are_refused_as_exactly(tmp_path: Path) -> None:
    """Those that are in order count, before they are logged."""
    with group(tmp_path) as (_, (a, b)):
        stop(a, b)
        taken = []
        with pytest.raises(kvrep.NotEnoughFollowers):
            for i in range(10 * LAG):
                taken.append(a.submit_put(b"%d" % i, b"v"))
        assert len(taken) == LAG
        for future in taken:
            future.result(timeout=WAIT_S)


# -- waiting ---------------------------------------------------------------------------------------


def test_writers_wait_for_a_follower_that_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is connected nothing is refused: a write beyond the bound waits, and its outcome is unknown at first."""
    with group(tmp_path, **PATIENT) as (_, (a, b)):
        with standing_still(b, monkeypatch):
            for i in range(LAG):
                a.put(b"%d" % i, b"v")
            assert not a.status().not_writable
            with pytest.raises(kvrep.AckTimeout, match="lag_records_max is 5") as late:
                a.put(b"late", b"v", timeout_s=0.2)
            assert late.value.reached < late.value.needed
            assert a.get(b"late") is None
            assert a.resolve(late.value.position) is Outcome.PENDING
            waiting = a.submit_put(b"waiting", b"v")
            assert not waiting.done()
        waiting.result(timeout=WAIT_S)
        assert a.resolve(late.value.position) is Outcome.COMMITTED
        b.wait_for(a.position, WAIT_S)
        same(a, b)


def test_the_furthest_of_two_followers_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is slow holds nobody up; once the other is away, everybody waits for it."""
    with group(tmp_path, "abc", **PATIENT) as (_, (a, b, c)):
        with standing_still(b, monkeypatch):
            for i in range(4 * LAG):
                a.put(b"%d" % i, b"v")
            until(lambda: min(f.lag_records for f in a.status().followers) == 0)
            c.close()
            until(lambda: sum(f.connected for f in a.status().followers) == 1)
            for i in range(LAG):
                a.put(b"more%d" % i, b"v")
            with pytest.raises(kvrep.AckTimeout):
                a.put(b"late", b"v", timeout_s=0.2)
        writable(a)
        a.put(b"k", b"v")


# -- restarts, and the way out ---------------------------------------------------------------------


def test_after_a_restart_another_voter_has_to_join(tmp_path: Path) -> None:
    """The primary cannot know what others hold, so it refuses writes until one has told; reads go on."""
    with group(tmp_path) as (start, (a, b)):
        for _ in range(2 * LAG):  # so many records that even an empty follower would be too far behind
            a.put(b"k", b"v")
        until(lambda: not a.status().followers[0].lag_records)
        stop(a, b)
        a.close()
        a = start("a")
        with pytest.raises(kvrep.NotEnoughFollowers, match="no other voter has joined in this epoch"):
            a.put(b"k", b"w")
        assert a[b"k"] == b"v"
        b = start("b", follow=a.address)
        writable(a)
        b.wait_for(a.put(b"k", b"w"), WAIT_S)


def test_a_primary_goes_on_alone_by_force(tmp_path: Path) -> None:
    """Where the bound is reached and nobody comes: promote(force=True) on the primary itself, which loses nothing."""
    with group(tmp_path) as (start, (a, b)):
        stop(a, b)
        a.promote(force=True)
        assert set(a.status().voters) == {"a", "b"}, "a primary that takes writes stays what it is"
        for i in range(LAG):
            a.put(b"%d" % i, b"v")
        with pytest.raises(kvrep.AckTimeout):
            a.reconfigure(lag_records_max=0, timeout_s=0.2)  # too late: its record is bounded, too
        a.promote(force=True, timeout_s=WAIT_S)
        assert a.status().voters == ("a",)
        for i in range(4 * LAG):
            a.put(b"more%d" % i, b"v")
        assert len(written(a)) == 5 * LAG
        b = start("b", follow=a.address)
        voters(a, "a", "b")
        b.wait_for(a.position, WAIT_S)
        same(a, b)


def test_force_may_say_another_rule(tmp_path: Path) -> None:
    """With acks=1 there is nothing to bound any more; every write waits for b then."""
    with group(tmp_path) as (start, (a, b)):
        stop(a, b)
        for i in range(LAG):
            a.put(b"%d" % i, b"v")
        a.promote(force=True, voters=["a", "b"], acks=1, timeout_s=WAIT_S)
        assert (a.status().acks, a.status().lag_records_max) == (1, 0)
        b = start("b", follow=a.address)
        writable(a)
        a.put(b"k", b"v")
        same(a, b)


def test_a_copy_that_is_replaced_counts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower comes back with a log that differs, so it gets another copy: what it had confirmed is void."""
    plan_join, asked = session.plan_join, threading.Event()

    def differs(hello: Hello, view: LogView) -> JoinPlan:
        if asked.is_set():
            return plan_join(hello, view)
        asked.set()
        return NeedBootstrap(first=view.first, reason="checksum")

    with group(tmp_path) as (start, (a, b)):
        for _ in range(LAG):
            a.put(b"k", b"v")
        until(lambda: not a.status().followers[0].lag_records)
        tracker = a._node.shipping.followers.tracker
        stop(a, b)
        last = a.status().last_offset
        assert tracker.too_far((), last + LAG) is None
        monkeypatch.setattr(session, "plan_join", differs)
        forgotten: list[Any] = []
        forget = CommitTracker.forget

        def spy(self: CommitTracker, store_id: bytes, above: int = 0) -> None:
            forget(self, store_id, above)
            if not above:
                forgotten.append(self.too_far((), last))

        monkeypatch.setattr(CommitTracker, "forget", spy)
        b = start("b", follow=a.address)
        until(lambda: forgotten)
        assert forgotten == [(0, LAG)]
        until(lambda: not a.status().followers[0].lag_records)
        b.wait_for(a.put(b"k", b"v"), WAIT_S)
        same(a, b)


# -- settings --------------------------------------------------------------------------------------


def test_the_bound_is_changed_on_the_primary(tmp_path: Path) -> None:
    """Off, on, wider, and to another rule and back; every node tells; what makes no sense is refused."""
    with group(tmp_path) as (start, (a, b)):
        until(lambda: b.status().lag_records_max == LAG)
        with pytest.raises(ValueError, match="lag_records_max"):
            a.reconfigure(acks=1)
        a.reconfigure(acks=1, lag_records_max=0)
        with pytest.raises(ValueError, match="acks=0"):
            a.reconfigure(lag_records_max=LAG)
        a.reconfigure(acks=0, lag_records_max=2 * LAG)
        until(lambda: b.status().lag_records_max == 2 * LAG)
        with pytest.raises(ValueError, match="lag_records_max"):
            a.reconfigure(lag_records_max=-1)
        until(lambda: not a.status().followers[0].lag_records)
        stop(a, b)
        a.reconfigure(lag_records_max=0)  # while there is room for the record that says so
        for i in range(4 * LAG):
            a.put(b"%d" % i, b"v")
        with pytest.raises(kvrep.AckTimeout):
            a.reconfigure(lag_records_max=LAG, timeout_s=0.2)  # it would be broken at once
        b = start("b", follow=a.address)
        until(lambda: a.status().committed_offset == a.status().last_offset)
        a.put(b"k", b"v")
        address = a.address
        a.close()
        with pytest.raises(kvrep.ConfigurationMismatch, match="lag_records_max"):
            kvrep.open(tmp_path / "a", lag_records_max=LAG + 1, listen=address)


def test_rules_that_exclude_each_other_change_at_once(tmp_path: Path) -> None:
    """reconfigure() checks the rule that comes out, not each step on the way to it."""
    with stores(tmp_path) as start:
        a = start("a", acks="all", degrade_after_s=2.0)
        a.reconfigure(acks=0, degrade_after_s=0.0, lag_records_max=LAG)
        a.reconfigure(acks="all", degrade_after_s=2.0, lag_records_max=0)
        assert (a.status().acks, a.status().degrade_after_s, a.status().lag_records_max) == ("all", 2.0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"acks": 1, "lag_records_max": 5},
        {"acks": "majority", "lag_records_max": 5},
        {"lag_records_max": -1},
        {"lag_records_max": 2.5},
        {"lag_records_max": True},
        {"lag_records_max": "5"},
        {"lag_records_max": 2**63},
        {
            "lag_records_max": 5, "name": "a", "listen": "127.0.0.1:0",
            "coordinator": kvrep.Quorum(peers={"a": "127.0.0.1:1", "b": "127.0.0.1:2"}),
        },
    ],
)  # fmt: skip
def test_a_bound_that_makes_no_sense_stops_the_start(tmp_path: Path, wrong: Any) -> None:
    """It is a whole number, for acks=0; a group with a coordinator would have acks="majority"."""
    with pytest.raises(kvrep.ConfigurationMismatch, match="lag_records_max"):
        kvrep.open(tmp_path / "wrong", **wrong)


def test_a_store_alone_is_not_bounded(tmp_path: Path) -> None:
    """Nobody else has data; a first follower brings the bound with it."""
    with stores(tmp_path) as start:
        a = start("a", lag_records_max=LAG)
        for i in range(10 * LAG):
            a.put(b"%d" % i, b"v")
        b = start("b", follow=a.address)
        voters(a, "a", "b")
        until(lambda: not a.status().followers[0].lag_records)
        stop(a, b)
        with pytest.raises(kvrep.NotEnoughFollowers):
            for i in range(10 * LAG):
                a.put(b"%d" % i, b"w")


# -- with a coordinator ----------------------------------------------------------------------------


def test_a_group_that_elects_is_bounded_too(tmp_path: Path) -> None:
    """The next primary takes writes once another voter has joined it, and has all but so many of the old ones."""
    group = Group(tmp_path, "abc", acks=0, lag_records_max=LAG)
    try:
        for name in "abc":
            group.start(name)
        primary, _ = group.write(b"first", b"1")
        until(lambda: all(n.status().lag_records_max == LAG for n in group.nodes.values()))
        done = 0
        for i in range(100):
            group.nodes[primary].put(b"%03d" % i, b"v")
            done += 1
        group.stop(primary)
        name, _ = group.write(b"second", b"2")
        assert name != primary
        lost = done - len([k for k in written(group.nodes[name]) if k.isdigit()])
        assert 0 <= lost <= LAG
    finally:
        group.close()
