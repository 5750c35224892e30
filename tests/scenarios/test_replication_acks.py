"""The commit rule as users meet it: what waits for whom, what is refused, what stays unknown."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

import kvrep
from kvrep import AckTimeout, NotEnoughFollowers, Outcome
from kvrep.cli.status import render
from kvrep.runtime.session import FollowerSession
from kvrep.runtime.shipping import Shipping
from kvrep.transport.network import GrpcTransport
from tests.replication_kit import FAST, WAIT_S, NodeProcess, processes, proxy, until, voters, writable


def test_acks_0_needs_nobody_and_followers_get_everything(tmp_path: Path) -> None:
    """An asynchronous primary writes at once, alone or not, and its follower shows the same."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        p.put(b"before", b"1")
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            last = p.put(b"after", b"2")
            f.wait_for(last, WAIT_S)
            assert dict(f.items()) == {b"before": b"1", b"after": b"2"}
            until(lambda: f.position == p.position)  # it becomes a voter by one more record


@pytest.mark.parametrize(("acks", "followers"), [(1, 1), (1, 2), (2, 2), ("majority", 2), ("all", 2)])
def test_a_write_returns_when_its_copies_are_synced(tmp_path: Path, acks: int | str, followers: int) -> None:
    """Under every rule the copies that the rule names are confirmed when put returns."""
    with kvrep.open(tmp_path / "p", name="p", listen="127.0.0.1:0", acks=acks, **FAST) as p:
        others = [
            kvrep.open(tmp_path / f"f{i}", name=f"f{i}", follow=p.address, **FAST) for i in range(followers)
        ]
        try:
            voters(writable(p), "p", *(f"f{i}" for i in range(followers)))
            copies = {1: 2, 2: 3, "majority": 2, "all": 3}[acks]
            assert p.status().copies == copies
            for i in range(20):
                position = p.put(b"k%d" % i, b"v")
                held = [f for f in p.status().followers if f.synced >= position.offset]
                assert len(held) + 1 >= copies
        finally:
            for other in others:
                other.close()


def test_nothing_is_logged_when_too_few_followers_are_there(tmp_path: Path) -> None:
    """A refusal comes before the log: its end does not move, and the error names the numbers."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=2, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
            before = p.status().last_offset
            with pytest.raises(NotEnoughFollowers) as caught:
                p.put(b"k", b"v")
            assert (caught.value.needed, caught.value.connected) == (3, 2)
            with pytest.raises(NotEnoughFollowers):
                p.submit_put(b"k", b"v")
            with pytest.raises(NotEnoughFollowers):
                with p.transaction() as txn:
                    txn[b"k"] = txn.get(b"k", b"") + b"x"
            assert p.status().last_offset == before
            assert "2 can be made" in p.status().not_writable
            assert p.get(b"k") is None


def test_unnamed_and_unwilling_followers_never_vote(tmp_path: Path) -> None:
    """A follower without a name, and one opened with voter=False, get the data and count for nothing."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        with (
            kvrep.open(tmp_path / "b", follow=p.address, **FAST) as unnamed,
            kvrep.open(tmp_path / "c", name="c", follow=p.address, voter=False, **FAST) as unwilling,
        ):
            position = p.put(b"k", b"v", level="visible")
            unnamed.wait_for(position, WAIT_S)
            unwilling.wait_for(position, WAIT_S)
            until(lambda: all(f.synced >= position.offset for f in p.status().followers))
            with pytest.raises(NotEnoughFollowers) as caught:
                p.put(b"k", b"v2", acks=1)
            assert caught.value.connected == 1
            assert p.status().voters == ("a",)
            assert [f.voter for f in p.status().followers] == [False, False]


def test_one_write_may_ask_for_more_than_the_rule(tmp_path: Path) -> None:
    """acks= and level= of a single write hold for it alone, and never ask for less than the rule."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            voters(p, "a", "b")
            for acks in (1, "majority", "all"):
                position = p.put(b"k", b"%s" % str(acks).encode(), acks=acks, level="visible")
                assert f.position.offset >= position.offset
                assert f.get(b"k") == str(acks).encode()
            before = p.status().last_offset
            with pytest.raises(NotEnoughFollowers):
                p.put(b"k", b"v", acks=2)
            with pytest.raises(ValueError, match="level"):
                p.put(b"k", b"v", level="sent")  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="acks"):
                p.put(b"k", b"v", acks=-1)
            assert p.status().last_offset == before


def test_a_frozen_follower_makes_the_outcome_unknown_and_later_known(tmp_path: Path) -> None:
    """AckTimeout carries the position; resolve says pending, and committed once the follower goes on."""
    with processes() as start:
        with kvrep.open(
            tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, ack_timeout_s=0.3,
            heartbeat_timeout_s=30.0,
        ) as p:  # fmt: skip
            f = start(tmp_path / "b", name="b", follow=p.address, heartbeat_timeout_s=30.0).ready()
            voters(p, "a", "b")
            p.put(b"k", b"1")
            f.pause()
            with pytest.raises(AckTimeout) as caught:
                p.put(b"k", b"2")
            position = caught.value.position
            assert position.offset == p.status().last_offset
            assert (caught.value.reached, caught.value.needed) == (1, 2)
            assert p.resolve(position) is Outcome.PENDING
            assert p.get(b"k") == b"1"
            os.kill(f.pid, signal.SIGCONT)
            until(lambda: p.resolve(position) is Outcome.COMMITTED)
            assert p.get(b"k") == b"2"
            assert f.run(f"(db.wait_for(kvrep.Position(*{tuple(position)})), db.get(b'k'))[1]") == b"2"


def test_a_frozen_follower_is_noticed_and_then_writes_are_refused(tmp_path: Path) -> None:
    """With the default timings a frozen peer counts as gone within 5 s, even with data stuck on the way."""
    with processes() as start, kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1) as p:
        f = start(tmp_path / "b", name="b", follow=p.address).ready()
        voters(p, "a", "b")
        f.pause()
        began = time.monotonic()
        futures = [p.submit_put(b"k%d" % i, b"x" * 200_000) for i in range(50)]
        until(lambda: not p.status().followers[0].connected, 8.0)
        assert time.monotonic() - began < 5.5
        with pytest.raises(NotEnoughFollowers):
            p.put(b"k", b"v")
        os.kill(f.pid, signal.SIGCONT)
        for future in futures:
            until(future.done)
            assert future.exception() is None


def test_a_frozen_primary_is_noticed_within_5_s(tmp_path: Path) -> None:
    """The follower's side of the same: it says that the primary is silent, and comes back by itself."""
    with processes() as start:
        p = start(tmp_path / "a", name="a", listen="127.0.0.1:0").ready()
        with kvrep.open(tmp_path / "b", name="b", follow=p.address) as f:
            position = p.run("db.put(b'k', b'v')")
            f.wait_for(position, WAIT_S)
            p.pause()
            began = time.monotonic()
            until(lambda: not f.status().source.connected, 8.0)
            assert time.monotonic() - began < 5.5
            assert "silent" in f.status().source.problem or f.status().source.state != "streaming"
            assert f.get(b"k") == b"v"
            os.kill(p.pid, signal.SIGCONT)
            until(lambda: f.status().source.connected)


def test_a_half_open_connection_ends_on_both_sides(tmp_path: Path) -> None:
    """When the network swallows everything both ends notice, and the follower comes back when it heals."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        with (
            proxy(p.address) as between,
            kvrep.open(tmp_path / "b", name="b", follow=between.address, **FAST) as f,
        ):
            voters(p, "a", "b")
            between.hold()
            position = p.put(b"k", b"v")
            until(lambda: not p.status().followers[0].connected)
            until(lambda: not f.status().source.connected)
            assert f.get(b"k") is None
            between.cut()
            between.release()
            f.wait_for(position, WAIT_S)


def test_ctrl_c_while_waiting_for_an_ack(tmp_path: Path) -> None:
    """Ctrl-C ends the wait at once; the write stays pending and commits later, the store stays usable."""
    with processes() as start:
        p = start(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, ack_timeout_s=60.0).ready()
        f = start(tmp_path / "b", name="b", follow=p.address, heartbeat_timeout_s=60.0).ready()
        p.run("exec('while db.status().not_writable: time.sleep(0.01)')")
        p.run("db.put(b'k', b'1')")
        f.pause()
        p.send("db.put(b'k', b'2')")
        until(lambda: _waits_for_acks(p))
        began = time.monotonic()
        p.signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as stopped:
            p.receive()
        assert time.monotonic() - began < 2
        status = p.run("db.status()")
        position = kvrep.Position(status.epoch, status.last_offset)
        assert getattr(stopped.value, "position", None) == position
        assert p.run(f"db.resolve(kvrep.Position(*{tuple(position)}))") is Outcome.PENDING
        os.kill(f.pid, signal.SIGCONT)
        until(lambda: p.run(f"db.resolve(kvrep.Position(*{tuple(position)}))") is Outcome.COMMITTED)
        p.run("db.put(b'k', b'3')")
        assert p.run("db.get(b'k')") == b"3"
        p.close()
        f.close()


def _waits_for_acks(p: NodeProcess) -> bool:
    """Whether a write of a node that is busy has its place in the log: its bytes alone are in the file before that."""
    connection = GrpcTransport().connect(p.address, name="test")
    try:
        return connection.call("status", {}, WAIT_S)["status"]["uncommitted_bytes"] > 0
    finally:
        connection.close()


def test_only_committed_writes_are_visible_anywhere(tmp_path: Path) -> None:
    """A write that waits for its ack is readable on no node; a transaction sees it and commits after it."""
    with kvrep.open(
        tmp_path / "a", name="a", listen="127.0.0.1:0", acks="all", **{**FAST, "heartbeat_timeout_s": 30.0}
    ) as p:
        with proxy(p.address) as between:
            slow = kvrep.open(
                tmp_path / "b", name="b", follow=between.address, **{**FAST, "heartbeat_timeout_s": 30.0}
            )
            fast = kvrep.open(tmp_path / "c", name="c", follow=p.address, **FAST)
            with slow, fast:
                voters(p, "a", "b", "c")
                fast.wait_for(p.put(b"k", b"1"), WAIT_S)
                between.hold()
                pending = p.submit_put(b"k", b"2")
                until(lambda: next(f for f in p.status().followers if f.name == "c").synced
                      == p.status().last_offset)  # fmt: skip
                for _ in range(3):
                    assert [p.get(b"k"), fast.get(b"k"), dict(p.items()), dict(fast.items())] == [
                        b"1", b"1", {b"k": b"1"}, {b"k": b"1"},
                    ]  # fmt: skip
                assert not pending.done()
                seen: list[bytes] = []
                ended = threading.Event()

                def append() -> None:
                    with p.transaction(timeout_s=WAIT_S) as txn:
                        seen.append(txn[b"k"])
                        txn[b"k"] = txn[b"k"] + b"+"
                    ended.set()

                def look() -> None:
                    with p.transaction(timeout_s=WAIT_S) as txn:
                        seen.append(txn[b"k"])
                    looked.set()

                looked = threading.Event()
                for job, count in ((append, 1), (look, 2)):
                    threading.Thread(target=job, daemon=True).start()
                    until(lambda count=count: len(seen) == count)
                assert seen == [b"2", b"2+"]
                assert not ended.wait(0.1)
                assert not looked.is_set()
                between.release()
                assert ended.wait(WAIT_S)
                assert looked.wait(WAIT_S)
                assert p.get(b"k") == b"2+"


def test_compare_and_set_without_a_write_waits_for_what_it_read(tmp_path: Path) -> None:
    """A condition that fails on pending state is told only when that state is committed."""
    options = {**FAST, "heartbeat_timeout_s": 30.0}
    with kvrep.open(
        tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, ack_timeout_s=0.5, **options
    ) as p:
        with proxy(p.address) as between:
            with kvrep.open(tmp_path / "b", name="b", follow=between.address, **options):
                voters(p, "a", "b")
                between.hold()
                pending = p.submit_put(b"k", b"2")
                with pytest.raises(AckTimeout):
                    p.put_if_absent(b"k", b"3")
                between.release()
                assert pending.result(WAIT_S)
                assert p.put_if_absent(b"k", b"3") is None


def test_the_voter_joins_by_a_record_and_can_be_removed(tmp_path: Path) -> None:
    """Voters are configuration records; a removed voter stays a follower and does not come back by itself."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p:
        before = p.status().last_offset
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            voters(p, "a", "b")
            assert p.status().last_offset > before
            until(lambda: f.status().voters == ("a", "b"))
            with pytest.raises(ValueError, match="not a voter"):
                p.remove_voter("nobody")
            with pytest.raises(ValueError, match="not a voter"):
                p.remove_voter("a")
            p.remove_voter("b")
            assert p.status().voters == ("a",)
            position = p.put(b"k", b"v")
            f.wait_for(position, WAIT_S)
            until(lambda: p.status().followers[0].synced >= position.offset)
            assert p.status().voters == ("a",)
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            position = p.put(b"k", b"w")
            until(lambda: p.status().followers[0].synced >= position.offset)
            assert p.status().voters == ("a",)
            with pytest.raises(ValueError, match="nobody"):
                p.add_voter("nobody")
            p.add_voter("b")
            assert p.status().voters == ("a", "b")
            assert p.put(b"k", b"x", acks=1)


def test_two_followers_with_one_name(tmp_path: Path) -> None:
    """The second store of a name is fed, never votes, and the first one is not disturbed."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
            with kvrep.open(tmp_path / "c", name="b", follow=p.address, **FAST) as twin:
                position = p.put(b"k", b"v")
                twin.wait_for(position, WAIT_S)
                assert len(p.status().voters) == 2
                assert sorted(f.voter for f in p.status().followers) == [False, True]


def test_a_voter_with_durability_os_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Status says how each follower stores; a voter that would count its own copy too early is warned of, once."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:

        def told() -> dict[str, tuple[str, bool]]:
            return {f.name: (f.durability, f.voter) for f in p.status().followers}

        for _ in range(2):
            with (
                kvrep.open(tmp_path / "b", name="b", follow=p.address, durability="os", **FAST),
                kvrep.open(tmp_path / "c", name="c", follow=p.address, **FAST),
                kvrep.open(tmp_path / "d", name="d", follow=p.address, durability="os", voter=False, **FAST),
            ):
                voters(p, "a", "b", "c")
                wanted = {"b": ("os", True), "c": ("sync", True), "d": ("os", False)}
                until(lambda wanted=wanted: told() == wanted, what=told)
                shown = "\n".join(render(p.status().to_json()))
                assert re.search(r"\bb .* streaming +yes +os ", shown), shown
            until(lambda: all(durability == "" for durability, _ in told().values()))
    warned = [r.getMessage() for r in caplog.records if 'durability="os"' in r.getMessage()]
    assert len(warned) == 1
    assert "voter b " in warned[0]


def test_what_a_voter_with_durability_os_acks_is_on_its_disk(tmp_path: Path) -> None:
    """Its copies count, because it syncs them before each ack: nothing else would sync for an hour."""
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p,
        kvrep.open(
            tmp_path / "b", name="b", follow=p.address, durability="os", sync_interval_s=3600.0, **FAST
        ) as f,
    ):
        voters(writable(p), "a", "b")
        for i in range(50):
            position = p.put(b"k", b"%d" % i)
            assert f._node.engine.committer.log.synced >= position.offset


def test_a_follower_counts_before_it_is_welcomed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the primary takes to note a join, no ack can arrive before: the first one is not lost."""
    welcomed: list[bool] = []
    real = Shipping.joined

    def slow(shipping: Shipping, session: FollowerSession, at: int) -> None:
        session._signal.set()  # the sender looks at what there is to send
        for _ in range(50):
            welcomed.append(bool(session._outbox) or session._feeding)
            time.sleep(0)
        real(shipping, session, at)

    monkeypatch.setattr(Shipping, "joined", slow)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as a:
        with kvrep.open(tmp_path / "b", name="b", follow=a.address, **FAST) as b:
            writable(a)
            b.wait_for(a.put(b"k", b"v"), WAIT_S)
    assert welcomed
    assert not any(welcomed)
