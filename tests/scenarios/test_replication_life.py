"""Reconfiguration, reads on followers, status, sizes, closing: the daily life of a replicated store."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import ConfigurationMismatch, NotEnoughFollowers, RolledBack, StaleRead
from kvrep.runtime import compression
from tests.replication_kit import FAST, WAIT_S, processes, proxy, same, until, voters, writable

LAZY = {**FAST, "heartbeat_timeout_s": 30.0}


# -- reconfiguration ----------------------------------------------------------------------------------


def test_the_rule_changes_live_in_both_directions(tmp_path: Path) -> None:
    """reconfigure(acks=…) holds from its record on, on every node, and survives a restart of all of them."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            voters(p, "a", "b")
            for acks, copies in ((1, 2), ("majority", 2), ("all", 2), (0, 1), (1, 2)):
                position = p.reconfigure(acks=acks)
                assert (p.status().acks, p.status().copies) == (acks, copies)
                assert p.put(b"k", b"v").offset > position.offset
                f.wait_for(position, WAIT_S)
                assert f.status().acks == acks
            p.reconfigure(ack_timeout_s=1.5)
            assert p.status().ack_timeout_s == 1.5
            with pytest.raises(ValueError, match="acks"):
                p.reconfigure(acks=-3)
            with pytest.raises(kvrep.NotPrimary):
                f.reconfigure(acks=0)
    with pytest.raises(ConfigurationMismatch, match="acks=1"):
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0)
    with pytest.raises(ConfigurationMismatch, match="ack_timeout_s"):
        kvrep.open(tmp_path / "b", name="b", follow="127.0.0.1:1", ack_timeout_s=9)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:
        assert (p.status().acks, p.status().ack_timeout_s) == (1, 1.5)
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(writable(p), "a", "b")
            p.put(b"k", b"v2")


def test_a_rule_that_needs_followers_waits_for_them(tmp_path: Path) -> None:
    """With the follower missing, a stronger rule stays pending, binds the door, and commits on its return."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
        until(lambda: not p.status().followers[0].connected)
        with pytest.raises(kvrep.AckTimeout):
            p.reconfigure(acks=1, timeout_s=0.2)
        with pytest.raises(NotEnoughFollowers):
            p.put(b"k", b"v")
        with pytest.raises(kvrep.Overloaded):
            p.reconfigure(acks=0, timeout_s=0.2)
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            until(lambda: p.status().committed_offset == p.status().last_offset)
            p.put(b"k", b"v")
            assert p.status().copies == 2
        until(lambda: not p.status().followers[0].connected)
        with pytest.raises(kvrep.AckTimeout):
            p.reconfigure(acks=0, timeout_s=0.2)  # the old rule must agree, too


def test_joining_voters_and_reconfiguration_do_not_lose_each_other(tmp_path: Path) -> None:
    """Voters that join while the rule is changed all the time are all there in the end."""
    names = [f"f{i}" for i in range(3)]
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        stop = threading.Event()

        def change() -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                p.reconfigure(ack_timeout_s=1.0 + turn % 7)

        thread = threading.Thread(target=change)
        thread.start()
        opened: list[kvrep.Store] = []
        try:
            opened += [kvrep.open(tmp_path / name, name=name, follow=p.address, **FAST) for name in names]
            until(lambda: set(p.status().voters) == {"a", *names})
        finally:
            stop.set()
            thread.join()
            for store in opened:
                store.close()
        assert set(p.status().voters) == {"a", *names}


# -- reads and status ---------------------------------------------------------------------------------


def test_reads_by_position_and_by_age(tmp_path: Path) -> None:
    """at_least= and max_staleness_s= are kept while connected, and refused when cut off."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **LAZY) as p:
        with proxy(p.address) as between:
            with kvrep.open(tmp_path / "b", name="b", follow=between.address, **LAZY) as f:
                for i in range(20):
                    position = p.put(b"k", b"%d" % i)
                    assert f.get(b"k", at_least=position) == b"%d" % i
                    assert p.get(b"k", at_least=position, max_staleness_s=0.0) == b"%d" % i
                assert f.get(b"k", max_staleness_s=1.0) == b"19"
                for _ in range(5):
                    position = p.put(b"k", b"new")
                    began = time.monotonic()
                    assert f.get(b"k", max_staleness_s=0.02, timeout_s=WAIT_S) is not None
                    assert time.monotonic() - began < 5
                # A fresh enough read may still lack the youngest write; what follows needs all of them there.
                assert f.get(b"k", at_least=position) == b"new"
                between.hold()
                position = p.put(b"k", b"unseen")
                with pytest.raises(StaleRead) as caught:
                    f.get(b"k", at_least=position, timeout_s=0.1)
                assert caught.value.wanted == position
                until(lambda: f.status().source.staleness_s > 0.3)
                with pytest.raises(StaleRead) as caught:
                    f.get(b"k", max_staleness_s=0.2, timeout_s=0.1)
                assert caught.value.staleness_s > 0.2
                assert f.get(b"k") == b"new"
                between.release()
                assert f.get(b"k", at_least=position, timeout_s=WAIT_S) == b"unseen"
                assert f.get(b"k", max_staleness_s=0.5, timeout_s=WAIT_S) == b"unseen"


def test_wait_for_what_cannot_come(tmp_path: Path) -> None:
    """A position of an epoch that ended before it raises RolledBack at once, one of the future StaleRead."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as p:
        old = p.put(b"k", b"1")
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            f.wait_for(p.put(b"k", b"2"), WAIT_S)
            for store in (p, f):
                with pytest.raises(RolledBack):
                    store.wait_for(kvrep.Position(old.epoch, old.offset + 2), 5.0)
                with pytest.raises(StaleRead):
                    store.wait_for(kvrep.Position(p.status().epoch, 10**6), 0.05)
                with pytest.raises(TypeError):
                    store.wait_for("1:2:3")  # type: ignore[arg-type]


def test_status_tells_the_truth_about_the_lag(tmp_path: Path) -> None:
    """Records, bytes and seconds behind, on both sides, agree with what was held back."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **LAZY) as p:
        with proxy(p.address) as between:
            with kvrep.open(tmp_path / "b", name="b", follow=between.address, **LAZY) as f:
                voters(p, "a", "b")
                f.wait_for(p.put(b"k", b"v"), WAIT_S)
                until(lambda: f.status().source.lag_records == 0)
                until(lambda: p.status().followers[0].lag_records == 0)
                assert p.status().followers[0].lag_s == 0.0
                between.hold()
                for i in range(100):
                    p.put(b"%d" % i, b"x" * 1000)
                until(lambda: p.status().followers[0].lag_s > 0.3)
                (seen,) = p.status().followers
                assert seen.lag_records == 100
                assert 100_000 < seen.lag_bytes < 120_000
                assert 0.29 < seen.lag_s < 10
                assert f.status().source.staleness_s > 0.25
                between.release()
                f.wait_for(p.position, WAIT_S)
                until(lambda: p.status().followers[0].lag_bytes == 0)
                for store in (p, f):
                    data = json.loads(json.dumps(store.status().to_json()))
                    assert data["position"] == str(store.position)
            data = p.status().to_json()
            json.dumps(data)
            assert data["followers"][0]["state"] in ("gone", "streaming")
    with kvrep.open(tmp_path / "c", name="c", follow="127.0.0.1:1", **FAST) as alone:
        assert json.loads(json.dumps(alone.status().to_json()))["source"]["staleness_s"] is None


def test_copies_are_compared_by_digests(tmp_path: Path) -> None:
    """verified_through moves on followers; rot shows at the next mark, and such a copy is not promoted."""
    import lmdb

    fast = {**FAST, "flush_interval_s": 0.05}
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **fast) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **fast) as f:
            seen = 0
            for turn in range(3):
                for i in range(20):
                    p.put(b"%d" % i, b"%d" % turn)
                p.flush()
                p.put(b"more", b"%d" % turn)
                p.flush()
                until(lambda seen=seen: f.status().verified_through > seen)
                seen = f.status().verified_through
                assert f.status().diverged_at == 0
        data = next((tmp_path / "b").glob("gen-*")) / "data"
        with lmdb.open(str(data), max_dbs=16) as env:
            with env.begin(write=True) as txn:
                name = next(k for k, _ in txn.cursor() if b"default" in k)
                db = env.open_db(name, txn=txn)
                txn.put(b"3", b"rot", db=db)
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **fast) as f:
            f.wait_for(p.put(b"3", b"over the rot"), WAIT_S)
            p.flush()
            p.put(b"more", b"x")
            p.flush()
            p.put(b"more", b"y")
            p.flush()
            until(lambda: f.status().diverged_at > 0)
            assert f.status().to_json()["diverged_at"] > 0
            voters(p, "a", "b")
            p.close()
            with pytest.raises(kvrep.DigestMismatch) as caught:
                f.promote()
            assert caught.value.at == f.status().diverged_at


# -- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zstd", [False, True])
def test_large_and_tiny_records_go_through(tmp_path: Path, zstd: bool) -> None:
    """A 5 MiB value, a 40 MiB batch and thousands of tiny records arrive whole, compressed or not."""
    if zstd and not compression.have_zstd():
        pytest.skip("no zstd here")
    more: dict[str, Any] = {"compression": "zstd"} if zstd else {}
    chance = random.Random(5)
    with kvrep.open(
        tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, ack_timeout_s=30, **LAZY, **more
    ) as p:
        with kvrep.open(
            tmp_path / "b",
            name="b",
            follow=p.address,
            credit_bytes=1 << 18,
            segment_bytes_max=1 << 17,
            **LAZY,
        ) as f:
            voters(p, "a", "b")
            p.put(b"big", chance.randbytes(5 << 20))
            with p.batch() as batch:
                for i in range(40):
                    batch.put(b"part%d" % i, b"%d" % i * (1 << 19))
            futures = [p.submit_put(b"tiny%d" % (i % 3000), b"%d" % i) for i in range(20_000)]
            for future in futures:
                future.result(WAIT_S)
            same(p, f)


def test_compression_is_used_only_where_both_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower without zstd is fed plain segments by a primary that would compress."""
    if not compression.have_zstd():
        pytest.skip("no zstd here")
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", compression="zstd", **FAST) as p:
        used: list[bool] = []
        service = p._node.shipping
        original = service.joined
        service.joined = lambda session, at: (
            used.append(session._compress is not None),
            original(session, at),
        )
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            f.wait_for(p.put(b"k", b"x" * 10_000), WAIT_S)
        monkeypatch.setattr("kvrep.runtime.replaying.have_zstd", lambda: False)
        with kvrep.open(tmp_path / "c", name="c", follow=p.address, **FAST) as f:
            f.wait_for(p.put(b"k", b"y" * 10_000), WAIT_S)
        assert used == [True, False]


def test_compression_without_the_package_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compression="zstd" where there is no zstd is an error at open, with the remedy."""
    monkeypatch.setattr(compression, "have_zstd", lambda: False)
    with pytest.raises(kvrep.OpenError, match="zstd"):
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", compression="zstd")


# -- closing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["primary", "follower"])
def test_close_under_load(tmp_path: Path, who: str) -> None:
    """close() of either side amid writes keeps its deadline and loses no acknowledged write."""
    p = kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, ack_timeout_s=1.0, **FAST)
    f = kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST)
    done: dict[bytes, kvrep.Position] = {}
    stop = threading.Event()

    def write(number: int) -> None:
        for i in range(10**6):
            if stop.is_set():
                return
            try:
                done[b"%d-%d" % (number, i)] = p.put(b"%d-%d" % (number, i), b"x" * 100)
            except kvrep.ClosedError:
                return
            except kvrep.UnknownOutcome:
                pass
            except kvrep.RefusedError:
                stop.wait(0.002)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    try:
        voters(p, "a", "b")
        for thread in threads:
            thread.start()
        until(lambda: len(done) > 200)
        victim = p if who == "primary" else f
        closers = [threading.Thread(target=victim.close, args=(5.0,)) for _ in range(2)]
        began = time.monotonic()
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(20)
        assert time.monotonic() - began < 6
        victim.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
        f.close()
        p.close()
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as again:
        with kvrep.open(tmp_path / "b", name="b", follow=again.address, **FAST) as b:
            writable(again)
            for key in done:
                assert again[key] == b"x" * 100
            again.put(b"last", b"1")
            same(again, b)


def test_what_waits_for_acks_when_the_store_closes_is_unknown(tmp_path: Path) -> None:
    """A write that is logged and not committed at close is neither done nor refused: UnknownOutcome."""
    p = kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, ack_timeout_s=60, **LAZY)
    try:
        with (
            proxy(p.address) as between,
            kvrep.open(tmp_path / "b", name="b", follow=between.address, **LAZY),
        ):
            voters(p, "a", "b")
            between.hold()
            last = p.status().last_offset
            future = p.submit_put(b"k", b"v")
            until(lambda: p.status().last_offset > last)
            began = time.monotonic()
            p.close(5.0)
            assert time.monotonic() - began < 5.5
            with pytest.raises(kvrep.UnknownOutcome) as caught:
                future.result(1.0)
            assert caught.value.position.offset == last + 1
    finally:
        p.close()


def test_many_short_lives_of_a_follower_leak_nothing(tmp_path: Path) -> None:
    """Two hundred opens and closes of a follower leave neither files nor threads on either side."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as p:
        p.put(b"k", b"v")

        def life() -> None:
            with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
                f.wait_for(p.position, WAIT_S)

        for _ in range(5):
            life()
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(200):
            life()
        until(lambda: threading.active_count() <= threads + 1)
        until(lambda: len(os.listdir("/proc/self/fd")) <= files + 4)
        assert len(p.status().followers) == 1


# -- everything at once -------------------------------------------------------------------------------


def test_three_followers_under_mixed_load_and_restarts(tmp_path: Path) -> None:
    """Threads, pipelined writes, batches, transactions, deletes, nodes restarted at random: all end equal."""
    chance = random.Random(2024)
    with kvrep.open(
        tmp_path / "a", name="a", listen="127.0.0.1:0", acks="majority", flush_interval_s=0.2, **FAST
    ) as p:
        names = ["f1", "f2", "f3"]

        def start(name: str) -> kvrep.Store:
            return kvrep.open(tmp_path / name, name=name, follow=p.address, flush_interval_s=0.3, **FAST)

        nodes = {name: start(name) for name in names}
        stop = threading.Event()
        errors: list[BaseException] = []

        def loop(step: Any) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    step(number)
                except (kvrep.RefusedError, kvrep.UnknownOutcome):
                    stop.wait(0.005)
                except BaseException as error:
                    errors.append(error)
                    return

        def put(n: int) -> None:
            p.put(b"put%d" % (n % 500), b"%d" % n)

        def submit(n: int) -> None:
            futures = [p.submit_put(b"sub%d" % (n * 40 + i), b"%d" % n * 10) for i in range(40)]
            for future in futures:
                future.exception(WAIT_S)

        def batch(n: int) -> None:
            with p.batch() as many:
                for i in range(30):
                    many.put(b"batch%d" % ((n * 7 + i) % 300), b"x" * (n % 2000))
                many.delete(b"put%d" % (n % 500))

        def transact(n: int) -> None:
            with p.transaction() as txn:
                txn[b"sum"] = b"%d" % (int(txn.get(b"sum", b"0")) + 1)
                for key, _ in txn.scan(prefix=b"batch", limit=3):
                    txn.delete(key)

        threads = [
            threading.Thread(target=loop, args=(step,)) for step in (put, put, submit, batch, transact)
        ]
        try:
            voters(p, "a", *names)
            for thread in threads:
                thread.start()
            for _ in range(8):
                name = chance.choice(names)
                nodes.pop(name).close()
                stop.wait(chance.random() * 0.3)
                nodes[name] = start(name)
                until(lambda name=name: nodes[name].status().source.connected)
                stop.wait(chance.random() * 0.3)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        try:
            assert not errors
            voters(p, "a", *names)
            until(lambda: p.status().committed_offset == p.status().last_offset)
            same(p, *nodes.values())
            assert int(p[b"sum"]) > 10
        finally:
            for node in nodes.values():
                node.close()


def test_a_follower_killed_and_wiped_comes_back_by_a_copy(tmp_path: Path) -> None:
    """A follower whose directory is lost is a new store: it gets everything again under the same name."""
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p,
        processes() as start,
    ):
        f = start(tmp_path / "b", name="b", follow=p.address, **FAST).ready()
        p.put(b"k", b"v")
        until(lambda: f.run("db.get(b'k')") == b"v")
        f.kill()
        shutil.rmtree(tmp_path / "b")
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as again:
            again.wait_for(p.position, WAIT_S)
            same(p, again)
