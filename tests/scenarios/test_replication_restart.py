"""A primary that dies and comes back: promises, epochs, tails that are cut, and nothing acknowledged lost."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import NotEnoughFollowers, NotPrimary, Outcome
from kvrep.replication.promotion import Promotion
from kvrep.runtime.leadership import Leadership
from tests.ports import free_address
from tests.replication_kit import FAST, WAIT_S, acknowledged, processes, proxy, same, until, voters, writable

QUIET = {**FAST, "heartbeat_timeout_s": 30.0}


@pytest.mark.parametrize("acks", [1, "majority", "all"])
def test_kill_9_of_the_primary_loses_no_acknowledged_write(tmp_path: Path, acks: Any) -> None:
    """Killed under load and restarted, the primary has every acknowledged write, in a higher epoch."""
    listen = free_address()
    options: dict[str, Any] = {"name": "a", "listen": listen, **FAST}
    with processes() as start:
        p = start(tmp_path / "a", acks=acks, **options).ready()
        with (
            kvrep.open(tmp_path / "b", name="b", follow=listen, **FAST) as b,
            kvrep.open(tmp_path / "c", name="c", follow=listen, **FAST) as c,
        ):
            p.run("exec('while len(db.status().voters) < 3 or db.status().not_writable: time.sleep(0.01)')")
            acked_file = tmp_path / "acked"
            p.run(f"load = Load(db, {str(acked_file)!r}, 4, 100, 'w')")
            until(lambda: acked_file.exists() and acked_file.stat().st_size > 20_000)
            epoch = b.status().epoch
            p.kill()
            with kvrep.open(tmp_path / "a", **options) as again:
                writable(again)
                assert again.status().epoch > epoch
                assert again.status().acks == acks
                acked = acknowledged(acked_file)
                assert len(acked) > 500
                for key, position in acked.items():
                    assert again[key].startswith(key)
                    assert again.resolve(position) is Outcome.COMMITTED
                voters(again, "a", "b", "c")
                again.put(b"after", b"1")
                same(again, b, c)


def test_a_tail_that_the_primary_lost_is_cut_from_its_followers(tmp_path: Path) -> None:
    """What a follower got and the primary lost was never acknowledged: it is cut, saved and reported."""
    listen = free_address()
    slow = {**FAST, "flush_interval_s": 600.0}
    with kvrep.open(tmp_path / "a", name="a", listen=listen, acks="all", ack_timeout_s=0.3, **QUIET) as p:
        with proxy(listen) as between, kvrep.open(tmp_path / "b", name="b", follow=listen, **slow) as b:
            with kvrep.open(tmp_path / "c", name="c", follow=between.address, **QUIET):
                voters(p, "a", "b", "c")
                p.put(b"k", b"1")
                p.flush()
                until(lambda: b.get(b"k") == b"1")
                _copy(tmp_path / "a", tmp_path / "older")
                between.hold()
                with pytest.raises(kvrep.AckTimeout) as caught:
                    p.put(b"k", b"2")
                lost = caught.value.position
                until(lambda: b.status().last_offset == lost.offset)
                p.close(2.0)
                between.cut()
                between.release()
            _restore(tmp_path / "a", tmp_path / "older")
            with kvrep.open(tmp_path / "a", name="a", listen=listen, **FAST) as again:
                writable_for_c = kvrep.open(tmp_path / "c", name="c", follow=listen, **FAST)
                with writable_for_c:
                    voters(writable(again), "a", "b", "c")
                    position = again.put(b"n", b"3")
                    b.wait_for(position, WAIT_S)
                    assert again.get(b"k") == b.get(b"k") == b"1"
                    assert again.resolve(lost) is Outcome.ROLLED_BACK
                    assert len(b.status().rescued) == 1
                    assert Path(b.status().rescued[0]).stat().st_size > 0
                    with pytest.raises(kvrep.RolledBack):
                        b.wait_for(lost, 1.0)
                    same(again, b, writable_for_c)


def test_a_primary_that_lost_acknowledged_writes_does_not_begin(tmp_path: Path) -> None:
    """Restored from an older copy, a synchronous primary sees what it lost, says so, and cuts nobody."""
    listen = free_address()
    with kvrep.open(tmp_path / "a", name="a", listen=listen, acks=1, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=listen, **FAST) as f:
            voters(p, "a", "b")
            p.put(b"k", b"1")
            _copy(tmp_path / "a", tmp_path / "older")
            f.wait_for(p.put(b"k", b"2"), WAIT_S)
            p.close()
            _restore(tmp_path / "a", tmp_path / "older")
            with kvrep.open(tmp_path / "a", name="a", listen=listen, **FAST) as again:
                until(lambda: "lost data" in f.status().source.problem)
                with pytest.raises(NotEnoughFollowers):
                    again.put(b"k", b"3")
                assert f.get(b"k") == b"2"
                assert f.status().rescued == ()


def test_a_primary_that_lost_writes_that_its_voters_know_asks_and_stops(tmp_path: Path) -> None:
    """Where promises are needed, the loss shows before the epoch begins."""
    listen = free_address()
    with kvrep.open(tmp_path / "a", name="a", listen=listen, acks=1, **FAST) as p:
        b = kvrep.open(tmp_path / "b", name="b", follow=listen, **FAST)
        c = kvrep.open(tmp_path / "c", name="c", follow=listen, **FAST)
        with b, c:
            voters(p, "a", "b", "c")
            p.put(b"k", b"1")
            _copy(tmp_path / "a", tmp_path / "older")
            last = p.put(b"k", b"2")
            for f in (b, c):
                f.wait_for(last, WAIT_S)
            p.close()
            _restore(tmp_path / "a", tmp_path / "older")
            with kvrep.open(tmp_path / "a", name="a", listen=listen, **FAST) as again:
                until(lambda: "lost data" in again.status().not_writable)
                with pytest.raises(NotPrimary, match="lost data"):
                    again.put(b"k", b"3")
                assert b.get(b"k") == c.get(b"k") == b"2"
                assert b.status().rescued == c.status().rescued == ()


def _copy(path: Path, older: Path) -> None:
    """Copy log and LMDB of a store that may be open and quiet."""
    for part in path.glob("gen-*"):
        shutil.copytree(part, older / part.name)


def _restore(path: Path, older: Path) -> None:
    """Put an older copy of log and LMDB in place; the promise file, which is always synced, stays."""
    for part in path.glob("gen-*"):
        shutil.rmtree(part)
    for part in older.glob("gen-*"):
        shutil.copytree(part, path / part.name)


def test_an_asynchronous_primary_that_lost_its_tail_asks_first(tmp_path: Path) -> None:
    """With acks=0 and durability "os" the visible state of a follower rolls back with the primary's."""
    listen = free_address()
    options: dict[str, Any] = {"name": "a", "listen": listen, "durability": "os", **FAST}
    with kvrep.open(tmp_path / "a", acks=0, **options) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=listen, **FAST) as b:
            voters(p, "a", "b")
            b.wait_for(p.put(b"k", b"1"), WAIT_S)
    shutil.copytree(tmp_path / "a", tmp_path / "older")
    with kvrep.open(tmp_path / "b", name="b", follow=listen, flush_interval_s=600.0, **FAST) as f:
        with kvrep.open(tmp_path / "a", **options) as p:
            lost = p.put(b"k", b"2")
            f.wait_for(lost, WAIT_S)
            assert f.get(b"k") == b"2"
        _restore(tmp_path / "a", tmp_path / "older")
        with kvrep.open(tmp_path / "a", **options) as again:
            assert again.status().not_writable == ""
            position = again.put(b"n", b"3")
            f.wait_for(position, WAIT_S)
            assert (f.get(b"k"), f.get(b"n")) == (b"1", b"3")
            assert len(f.status().rescued) == 1
            assert f.resolve(lost) is Outcome.ROLLED_BACK
            same(again, f)


def test_an_asynchronous_primary_goes_on_without_its_followers(tmp_path: Path) -> None:
    """With acks=0 and nobody there, a restart takes a bounded time and then writes."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as again:
        again.put(b"k", b"v")
        with kvrep.open(tmp_path / "b", name="b", follow=again.address, **FAST) as b:
            b.wait_for(again.position, WAIT_S)


def test_opening_waits_for_an_epoch_that_another_thread_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's clock may go on without promises just before the thread that opens it, which then waits."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
    begin_unfenced, begin_with = Leadership._begin_unfenced, Leadership._begin_with
    opener, late, opened = threading.current_thread(), threading.Event(), threading.Event()

    def only_second(leadership: Leadership) -> None:
        if threading.current_thread() is opener:
            until(lambda: leadership._promotion is None)
        begin_unfenced(leadership)
        if threading.current_thread() is opener:
            late.set()

    def slowly(leadership: Leadership, promotion: Promotion, *, unfenced: bool) -> None:
        assert late.wait(WAIT_S)
        assert not opened.wait(0.3), "opened before the epoch"
        begin_with(leadership, promotion, unfenced=unfenced)

    monkeypatch.setattr(Leadership, "_begin_unfenced", only_second)
    monkeypatch.setattr(Leadership, "_begin_with", slowly)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as again:
        opened.set()
        again.put(b"k", b"v")


def test_a_restart_without_enough_voters_is_not_writable_until_they_join(tmp_path: Path) -> None:
    """acks=1 of three voters needs two promises: alone it says whom it waits for, with one more it writes."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")  # so that b is the first to be named
            with kvrep.open(tmp_path / "c", name="c", follow=p.address, **FAST):
                voters(p, "a", "b", "c")
                p.put(b"k", b"1")
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as again:
        with pytest.raises(NotPrimary, match=r"promises of 1 .*missing: b, c"):
            again.put(b"k", b"2")
        assert "missing: b, c" in again.status().not_writable
        assert again.get(b"k") == b"1"
        before = again.status().last_offset
        with kvrep.open(tmp_path / "c", name="c", follow=again.address, **FAST) as c:
            writable(again)
            position = again.put(b"k", b"2")
            c.wait_for(position, WAIT_S)
            assert again.status().last_offset > before
            with kvrep.open(tmp_path / "b", name="b", follow=again.address, **FAST) as b:
                voters(again, "a", "b", "c")
                same(again, b, c)


def test_writers_that_try_all_the_time_while_promises_come_in(tmp_path: Path) -> None:
    """No write can slip in before the epoch start: every record of the new epoch comes after it."""
    import threading

    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
            p.put(b"k", b"1")
    for turn in range(4):
        with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as again:
            stop = threading.Event()
            done: list[kvrep.Position] = []

            def write(again: kvrep.Store = again, stop: threading.Event = stop, done: Any = done) -> None:
                while not stop.is_set():
                    try:
                        done.append(again.put(b"k", b"%d" % len(done)))
                    except kvrep.RefusedError:
                        stop.wait(0.0001)

            threads = [threading.Thread(target=write) for _ in range(3)]
            for thread in threads:
                thread.start()
            with kvrep.open(tmp_path / "b", name="b", follow=again.address, **FAST) as b:
                until(lambda done=done: len(done) > 50)
                stop.set()
                for thread in threads:
                    thread.join()
                same(again, b)
                engine = again._node.engine
                first = dict(engine.epochs)[again.status().epoch]
                assert min(p.offset for p in done) > first
                assert dict(b._node.engine.epochs) == dict(engine.epochs), turn


def test_a_restart_at_a_configuration_that_is_not_committed(tmp_path: Path) -> None:
    """Promises are collected under both rules when the newest configuration may be uncommitted."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks="all", **QUIET) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **QUIET):
            voters(p, "a", "b")
            p.put(b"k", b"1")
        until(lambda: not p.status().followers[0].connected)
        with pytest.raises(kvrep.Error):
            p.reconfigure(acks=0, timeout_s=0.3)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **QUIET) as again:
        # acks=0 is the newest rule in the log, and not in force: b never confirmed it.
        with kvrep.open(tmp_path / "b", name="b", follow=again.address, **QUIET) as b:
            writable(again)
            until(lambda: again.status().committed_offset == again.status().last_offset)
            again.put(b"k", b"2")
            same(again, b)


def test_slots_survive_a_restart_and_keep_the_log(tmp_path: Path) -> None:
    """What an absent follower needs is kept over restarts of the primary: no snapshot is needed."""
    options: dict[str, Any] = {
        **FAST, "log_file_bytes": 1 << 16, "retention_bytes": 0, "retention_age_s": 0,
    }  # fmt: skip
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **options) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            voters(p, "a", "b")
            f.wait_for(p.put(b"k", b"v"), WAIT_S)
    first = 0
    for turn in range(2):
        with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **options) as p:
            for i in range(40):
                p.put(b"%d-%d" % (turn, i), b"x" * 10_000)
            p.flush()
            status = p.status()
            first = first or status.first_offset
            assert status.first_offset == first
            gone = next(f for f in status.followers if f.name == "b")
            assert (gone.state, gone.connected) == ("gone", False)
            assert gone.lag_records >= 40 * (turn + 1)
            assert gone.lag_bytes >= 400_000 * (turn + 1)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **options) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            f.wait_for(p.position, WAIT_S)
            assert f.status().source.bootstrap_bytes == 0
            same(p, f)
            until(lambda: p.status().first_offset > first)  # with nothing to flush, too


def test_the_slowest_slot_is_released_at_the_cap(tmp_path: Path) -> None:
    """At retention_bytes_max the follower that needs most loses its slot; the others keep theirs."""
    options: dict[str, Any] = {
        **FAST, "log_file_bytes": 1 << 16, "retention_bytes": 0, "retention_age_s": 0,
        "retention_bytes_max": 1 << 19,
    }  # fmt: skip
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **options) as p:
        with kvrep.open(tmp_path / "c", name="c", follow=p.address, **FAST) as c:
            with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as b:
                voters(p, "a", "b", "c")
                b.wait_for(p.put(b"k", b"v"), WAIT_S)
            for i in range(100):
                last = p.put(b"%d" % i, b"x" * 10_000)
            c.wait_for(last, WAIT_S)
            until(lambda: p.flush() or {f.name for f in p.status().followers} == {"c"})
            until(lambda: p.flush() or p.status().first_offset > 2)
            assert p.status().log_bytes < 1 << 20
            same(p, c)
