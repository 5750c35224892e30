"""A day of changing primaries by hand: promotions, refusals, force, switchovers, and the way back."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import EventKind, Outcome, Role
from kvrep.storage.rescue import load_rescue
from tests.replication_kit import FAST, WAIT_S, Open, same, stores, until, voters, writable


@contextmanager
def group(folder: Path, acks: Any, names: str = "abc") -> Iterator[tuple[Open, list[kvrep.Store]]]:
    """A primary and its followers, all of them voters with a committed configuration."""
    with stores(folder) as start:
        first = start(names[0], acks=acks)
        made = [first, *(start(name, follow=first.address) for name in names[1:])]
        voters(first, *names)
        yield start, made


def put(store: kvrep.Store, key: bytes, value: bytes) -> kvrep.Position:
    """Write once the node takes it."""
    found: list[kvrep.Position] = []

    def attempt() -> bool:
        try:
            found.append(store.put(key, value))
        except kvrep.RefusedError:
            return False
        return True

    until(attempt, what=f"a write to {store.status().name}")
    return found[0]


def role(store: kvrep.Store, wanted: Role) -> None:
    until(lambda: store.status().role is wanted, what=f"{store} to be {wanted}")


# -- promotions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("acks", [1, "majority", "all"])
def test_a_promoted_follower_has_every_acknowledged_write(tmp_path: Path, acks: Any) -> None:
    """After the primary's end a follower is promoted, the other follows it, the old one comes back by itself."""
    with group(tmp_path, acks) as (start, (a, b, c)):
        positions = [a.put(b"k%d" % i, b"v") for i in range(50)]
        before = a.status().epoch
        a.close()
        b.promote()
        status = b.status()
        assert (status.role, status.primary_address) == (Role.PRIMARY, b.address)
        assert status.epoch > before
        assert all(b._node.engine.epochs.holds(p, b.status().last_offset) for p in positions)
        again = start("a")  # without follow=: it finds the new primary
        role(again, Role.FOLLOWER)
        position = put(b, b"after", b"1")
        for store in (again, c):
            store.wait_for(position, WAIT_S)
        assert all(b.resolve(p) is Outcome.COMMITTED for p in positions)
        voters(b, "a", "b", "c")
        same(b, again, c)
        assert again.status().primary_address == b.address


def test_slots_outlive_the_primary(tmp_path: Path) -> None:
    """What an absent follower needs is kept by the voter that is promoted: it rejoins without a copy."""
    options = {"log_file_bytes": 1 << 16, "retention_bytes": 0, "retention_age_s": 0}
    with stores(tmp_path) as start:
        a = start("a", acks=1, **options)
        b, c = (start(name, follow=a.address, **options) for name in "bc")
        voters(a, "a", "b", "c")
        c.wait_for(a.put(b"k", b"v"), WAIT_S)
        c.close()
        for i in range(40):
            a.put(b"%d" % i, b"x" * 10_000)
        a.flush()
        b.wait_for(a.position, WAIT_S)
        a.close()
        b.promote(force=True, voters=["b"], acks=0)
        for i in range(40):
            put(b, b"%d" % i, b"y" * 10_000)
        b.flush()
        again = start("c", follow=b.address, **options)
        again.wait_for(b.position, WAIT_S)
        assert again.status().source.bootstrap_bytes == 0
        same(b, again)


def test_copies_are_compared_by_digests_after_a_failover(tmp_path: Path) -> None:
    """The new primary's digests go into its log, and the others find theirs equal to them."""
    quick = {"flush_interval_s": 0.05}
    with stores(tmp_path) as start:
        a = start("a", acks=1, **quick)
        b, c = (start(name, follow=a.address, **quick) for name in "bc")
        voters(a, "a", "b", "c")
        c.wait_for(a.put(b"k", b"1"), WAIT_S)
        a.close()
        b.promote()
        began = b.status().last_offset
        for turn in range(3):
            put(b, b"k%d" % turn, b"2")
            b.flush()
        until(lambda: c.status().verified_through > began)
        assert c.status().diverged_at == 0


def test_a_promotion_without_enough_voters_names_them_and_changes_nothing(tmp_path: Path) -> None:
    """acks=1 of three: with one node left nobody may be promoted, nothing is promised, reads go on."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        a.put(b"k", b"v")
        b.wait_for(a.position, WAIT_S)
        a.close()
        c.close()
        promised = b._node.engine.home.promised_epoch
        with pytest.raises(kvrep.UnsafePromotion) as caught:
            b.promote(timeout_s=5.0)
        error = caught.value
        assert (set(error.missing), error.needed, error.answered) == ({"a", "c"}, 2, 1)
        assert "acknowledged would be lost" in str(error)
        assert b._node.engine.home.promised_epoch == promised
        assert b.status().role is Role.FOLLOWER
        assert b[b"k"] == b"v"


def test_an_asynchronous_promotion_says_that_it_cannot_know(tmp_path: Path) -> None:
    """With acks=0 and the primary away, promote() refuses and says why."""
    with group(tmp_path, 0, "ab") as (_, (a, b)):
        b.wait_for(a.put(b"k", b"v"), WAIT_S)
        a.close()
        with pytest.raises(kvrep.UnsafePromotion, match="acks=0 nobody can know"):
            b.promote(timeout_s=5.0)


def test_what_only_another_voter_has_is_fetched(tmp_path: Path) -> None:
    """The promoted node lacks acknowledged records; it takes them from the voter that has them first."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        node = b._node
        node.replaying.stop(5.0)  # it gets nothing any more, and c has everything
        positions = [a.put(b"n%d" % i, bytes(2000)) for i in range(40)]
        c.wait_for(positions[-1], WAIT_S)
        assert b.status().last_offset < positions[0].offset
        a.close()
        b.promote()
        assert all(b._node.engine.epochs.holds(p, b.status().last_offset) for p in positions)
        assert all(b.get(b"n%d" % i) == bytes(2000) for i in range(40)), "reads wait for the epoch start"
        c.wait_for(put(b, b"after", b"1"), WAIT_S)
        assert all(b.resolve(p) is Outcome.COMMITTED for p in positions)
        same(b, c)


def test_a_record_that_is_larger_than_any_value_is_fetched(tmp_path: Path) -> None:
    """The promoted node lacks one transaction of 12 MiB, where values have at most 1 MiB: it gets it whole."""
    sizes = {"value_bytes_max": 1 << 20, "record_bytes_max": 16 << 20}
    with stores(tmp_path) as start:
        a = start("a", acks=1, **sizes)
        b, c = (start(name, follow=a.address, **sizes) for name in "bc")
        voters(a, "a", "b", "c")
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        b._node.replaying.stop(5.0)
        with a.batch() as batch:
            for i in range(12):
                batch.put(b"n%d" % i, bytes(1 << 20))
        c.wait_for(a.position, WAIT_S)
        a.close()
        b.promote()
        assert all(b.get(b"n%d" % i) == bytes(1 << 20) for i in range(12))


def test_a_promotion_of_the_primary_itself_is_nothing(tmp_path: Path) -> None:
    """promote() on the primary returns and leaves its epoch alone; on a lone store it is refused."""
    with group(tmp_path, 1, "ab") as (_, (a, _)):
        epoch = a.status().epoch
        assert a.promote() == a.position
        assert a.status().epoch == epoch
    with kvrep.open(tmp_path / "lone") as lone, pytest.raises(kvrep.NotPrimary):
        lone.promote()


def test_a_live_primary_is_replaced_and_follows(tmp_path: Path) -> None:
    """A follower promoted beside a living primary fences it: it tells writers where to go, and follows."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        a.put(b"k", b"v")
        events: list[kvrep.Event] = []
        a.on_event(events.append)
        b.promote()
        with pytest.raises(kvrep.RefusedError) as caught:
            a.put(b"k", b"2")
        assert caught.value.primary_address == b.address
        role(a, Role.FOLLOWER)
        a.wait_for(put(b, b"k", b"3"), WAIT_S)
        c.wait_for(b.position, WAIT_S)
        same(b, a, c)
        until(lambda: {EventKind.FENCED, EventKind.FOLLOWER} <= {e.kind for e in events})
        fenced = next(e for e in events if e.kind is EventKind.FENCED)
        assert (fenced.epoch, fenced.address) == (b.status().epoch, b.address)


@pytest.mark.parametrize("turn", range(4))
def test_two_promotions_at_once_end_with_one_primary(tmp_path: Path, turn: int) -> None:
    """However two promotions meet: afterwards one node is primary, nothing is lost, all agree."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        positions = [a.put(b"k%d" % i, b"v") for i in range(20)]
        a.close()
        both = threading.Barrier(2)
        outcome: dict[str, Any] = {}

        def promote(store: kvrep.Store) -> None:
            both.wait()
            try:
                outcome[store.status().name] = store.promote()
            except kvrep.RefusedError as error:
                outcome[store.status().name] = error

        threads = [threading.Thread(target=promote, args=(s,)) for s in (b, c)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert any(isinstance(o, kvrep.Position) for o in outcome.values()), outcome
        until(lambda: sorted(s.status().role for s in (b, c)) == [Role.FOLLOWER, Role.PRIMARY])
        new, other = (b, c) if b.status().role is Role.PRIMARY else (c, b)
        other.wait_for(put(new, b"after", b"%d" % turn), WAIT_S)
        assert all(new.resolve(p) is Outcome.COMMITTED for p in positions)
        same(new, other)


def test_writers_blocked_in_the_old_primary_learn_the_outcome(tmp_path: Path) -> None:
    """Of two writes that wait when their primary is replaced, one turns out committed, one dropped."""
    with group(tmp_path, "all", "abc") as (_, (a, b, c)):
        a.reconfigure(ack_timeout_s=30.0)
        assert c._node.replaying is not None
        c._node.replaying.stop(5.0)  # no ack of c: nothing commits
        until(lambda: all(f.connected for f in a.status().followers if f.name == "b"))
        outcome: dict[bytes, Any] = {}

        def write(key: bytes) -> None:
            try:
                outcome[key] = a._node.writes.commit(a._put(key, b"v"), 30.0)
            except kvrep.Error as error:
                outcome[key] = error

        engine = a._node.engine
        engine.writable = lambda: None  # c is away, and the door would refuse what we want to be logged
        first = threading.Thread(target=write, args=(b"kept",))
        first.start()
        until(lambda: b.status().last_offset == a.status().last_offset and a.status().uncommitted_bytes)
        kept = a.status().last_offset
        assert b._node.replaying is not None
        b._node.replaying.stop(5.0)
        second = threading.Thread(target=write, args=(b"dropped",))
        second.start()
        until(lambda: a.status().last_offset > kept)
        assert not outcome
        rolled: list[kvrep.Event] = []
        a.on_rollback(rolled.append)
        b._node.roles.other_voters = list  # type: ignore[method-assign, assignment]
        b.promote(timeout_s=10.0)  # with its own promise, which is all that "all" needs; a is not asked
        role(a, Role.FOLLOWER)
        c.follow(b.address)
        c._node.roles.be_follower((b.address,)).start()
        put(b, b"after", b"1")
        for thread in (first, second):
            thread.join(WAIT_S)
        assert isinstance(outcome[b"kept"], kvrep.Position)
        assert isinstance(outcome[b"dropped"], kvrep.RolledBack)
        until(lambda: len(rolled) == 1)
        assert rolled[0].first <= outcome[b"dropped"].position.offset <= rolled[0].last
        assert Path(rolled[0].path).exists()
        assert b.get(b"kept") == b"v"
        assert b.get(b"dropped") is None
        same(b, a, c)


def test_a_write_that_timed_out_is_resolved_after_the_failover(tmp_path: Path) -> None:
    """The position in AckTimeout is answered by the new history: rolled back here, committed there."""
    with group(tmp_path, 1, "abc") as (start, (a, b, c)):
        a.reconfigure(ack_timeout_s=0.2)
        for store in (b, c):
            assert store._node.replaying is not None
            store._node.replaying.stop(5.0)
        until(lambda: not any(f.connected for f in a.status().followers))
        a._node.engine.writable = lambda: None
        with pytest.raises(kvrep.AckTimeout) as caught:
            a.put(b"lost", b"v")
        lost = caught.value.position
        a.close()
        b.promote()
        c._node.roles.be_follower((b.address,)).start()
        put(b, b"after", b"1")
        again = start("a")
        role(again, Role.FOLLOWER)
        again.wait_for(b.position, WAIT_S)
        assert again.resolve(lost) is b.resolve(lost) is c.resolve(lost) is Outcome.ROLLED_BACK
        assert again.get(b"lost") is None
        (path,) = again.status().rescued
        assert [r.position for r in load_rescue(Path(path)).records if r.position == lost]
        same(b, again, c)


# -- force -----------------------------------------------------------------------------------------


def test_force_begins_a_branch_and_the_old_primary_saves_its_tail(tmp_path: Path) -> None:
    """The forced epoch is recorded as such; what the returning primary held alone goes to a rescue file."""
    with group(tmp_path, 0, "ab") as (start, (a, b)):
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        b.close()
        for i in range(20):
            a.put(b"alone%d" % i, b"x")
        a.close()
        b = start("b", follow=a.address)
        branch = b._node.engine.branch
        b.promote(force=True, voters=["b"], acks=0, timeout_s=5.0)
        assert b.status().voters == ("b",)
        assert b._node.engine.branch != branch
        run = b._node.engine.committer.log.read(b.status().last_offset, 1 << 20)
        assert run is not None
        assert b"forced\xc3" in run.data
        position = b.put(b"new", b"1")
        rolled: list[kvrep.Event] = []
        again = start("a", flush_interval_s=600.0)
        again.on_rollback(rolled.append)
        again.wait_for(position, WAIT_S)
        voters(b, "a", "b")
        same(b, again)
        (path,) = again.status().rescued
        saved = load_rescue(Path(path))
        assert sum(r.kind == 0 for r in saved.records) == 20
        assert again.status().source is not None
        assert again.status().source.bootstrap_bytes == 0, "a cut is enough"


def test_force_after_a_lost_majority_in_synchronous_mode(tmp_path: Path) -> None:
    """One of three is left: force makes it a group of its own that takes writes again."""
    with group(tmp_path, "majority") as (start, (a, b, c)):
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        a.close()
        c.close()
        with pytest.raises(ValueError, match="not voters"):
            b.promote(force=True, voters=["b", "nobody"], timeout_s=5.0)
        b.promote(force=True, timeout_s=5.0)
        b.put(b"k", b"2")
        for name in "ac":
            again = start(name, **({"follow": b.address} if name == "c" else {}))
            again.wait_for(b.position, WAIT_S)
            assert again[b"k"] == b"2"
        voters(b, "a", "b", "c")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_primary_that_lost_its_followers_goes_on_by_force(tmp_path: Path, restarted: bool) -> None:
    """It refuses writes for want of copies, so force makes it a group of its own; else it changes nothing."""
    with group(tmp_path, 1, "ab") as (start, (a, b)):
        a.put(b"k", b"1")
        epoch = a.status().epoch
        a.promote(force=True, timeout_s=WAIT_S)
        assert (a.status().epoch, a.status().voters) == (epoch, ("a", "b"))
        b.close()
        until(lambda: a.status().not_writable)
        if restarted:
            a.close()
            a = start("a")
            until(lambda: a.status().epoch > epoch)
        with pytest.raises(kvrep.NotEnoughFollowers):
            a.put(b"k", b"2")
        a.promote(timeout_s=WAIT_S)
        with pytest.raises(kvrep.NotEnoughFollowers):
            a.put(b"k", b"2")
        a.promote(force=True, timeout_s=WAIT_S)
        assert a.status().voters == ("a",)
        position = a.put(b"k", b"2")
        a.promote(force=True, timeout_s=WAIT_S)
        assert a.status().epoch == position.epoch, "once is enough"
        b = start("b", follow=a.address)
        b.wait_for(position, WAIT_S)
        voters(a, "a", "b")
        same(a, b)


def test_two_forced_histories_do_not_join(tmp_path: Path) -> None:
    """Both halves of a group were forced apart: neither may follow the other, and they say so."""
    with group(tmp_path, "all", "ab") as (start, (a, b)):
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        b.close()
        a.close()
        b = start("b", follow=a.address)
        b.promote(force=True, timeout_s=5.0)
        b.put(b"k", b"b")
        b.close()
        a = start("a", follow=b.address)
        a.promote(force=True, timeout_s=5.0)
        a.put(b"k", b"a")
        b = start("b", follow=a.address)
        until(lambda: b.status().source.state == "refused")
        assert "forced apart" in b.status().source.problem
        assert (a[b"k"], b[b"k"]) == (b"a", b"b")


def test_two_nodes_with_one_ack_fail_over_by_hand(tmp_path: Path) -> None:
    """With acks=1 of two no promise of the other is needed; writing alone is a forced act."""
    with group(tmp_path, 1, "ab") as (start, (a, b)):
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        a.close()
        b.promote()
        assert b[b"k"] == b"1"
        with pytest.raises(kvrep.NotEnoughFollowers):
            b.put(b"k", b"2")
        again = start("a")
        role(again, Role.FOLLOWER)
        again.wait_for(put(b, b"k", b"2"), WAIT_S)
        same(b, again)


# -- switchover ------------------------------------------------------------------------------------


@pytest.mark.parametrize("acks", [0, 1, "majority", "all"])
def test_a_switchover_under_load_loses_nothing(tmp_path: Path, acks: Any) -> None:
    """Writers pause or are sent to the new primary; every acknowledged write is there."""
    with group(tmp_path, acks) as (_, (a, b, c)):
        by_name = {"a": a, "b": b, "c": c}
        stop = threading.Event()
        acked: list[tuple[bytes, kvrep.Position]] = []
        unknown: list[BaseException] = []

        def write(number: int) -> None:
            i, store = 0, a
            while not stop.is_set():
                i += 1
                key = b"%d-%d" % (number, i)
                try:
                    acked.append((key, store.put(key, key)))
                except kvrep.RefusedError:
                    store = next((s for s in (a, b, c) if not s.status().not_writable), store)
                    stop.wait(0.001)
                except Exception as error:
                    unknown.append(error)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        primary = a
        for to in "bcab":
            count = len(acked)
            until(lambda count=count: len(acked) > count + 50)
            until(lambda primary=primary, to=to: primary.switchover(to, dry_run=True) == ())
            primary.switchover(to)
            primary = by_name[to]
            assert primary.status().role is Role.PRIMARY
        count = len(acked)
        until(lambda: len(acked) > count + 50)
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
        assert not unknown, unknown[:3]
        for store in (a, b, c):
            store.wait_for(primary.position, WAIT_S)
        for key, position in acked:
            assert primary[key] == key
            assert primary.resolve(position) is Outcome.COMMITTED
        same(primary, *(s for s in (a, b, c) if s is not primary))


def test_what_blocks_a_switchover_is_said_beforehand(tmp_path: Path) -> None:
    """A dry run names the obstacle and changes nothing; the real thing refuses for the same reason."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        assert a.switchover("b", dry_run=True) == ()
        assert "not a voter" in a.switchover("x", dry_run=True)[0]
        assert "already" in a.switchover("a", dry_run=True)[0]
        assert b.switchover("c", dry_run=True) == ("this node is not the primary",)
        c.close()
        until(lambda: "not connected" in "".join(a.switchover("c", dry_run=True)))
        with pytest.raises(kvrep.UnsafePromotion, match="not connected"):
            a.switchover("c")
        assert a.status().role is Role.PRIMARY
        a.put(b"k", b"v")
    with group(tmp_path / "async", 0) as (_, (a, b, c)):
        c.close()
        until(lambda: any("must promise" in o for o in a.switchover("b", dry_run=True)))


def test_a_switchover_that_fails_leaves_the_old_primary_writing(tmp_path: Path) -> None:
    """The target promises itself an epoch and then cannot begin it: the old primary goes on above it."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        a.put(b"k", b"1")
        epoch = a.status().epoch

        def fails(*args: Any, **kwargs: Any) -> Any:
            raise kvrep.StorageFull("the disk of the target is full")

        b._node.roles.take_over = fails  # type: ignore[method-assign]
        with pytest.raises(kvrep.UnsafePromotion, match="did not become primary"):
            a.switchover("b")
        assert a.status().role is Role.PRIMARY
        assert a.status().epoch > epoch
        del b._node.roles.take_over
        position = put(a, b"k", b"2")
        for store in (b, c):
            store.wait_for(position, WAIT_S)
        same(a, b, c)


def test_a_switchover_waits_for_an_open_transaction(tmp_path: Path) -> None:
    """A transaction that holds the writer's place ends first; one that does not end blocks the switchover."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        a.put(b"k", b"1")
        with a.transaction() as txn:
            assert txn[b"k"] == b"1"
            with pytest.raises(kvrep.RefusedError, match="too long"):
                a.switchover("b", timeout_s=0.3)
        assert a.status().role is Role.PRIMARY
        done: list[Any] = []
        with a.transaction() as txn:
            txn[b"k"] = txn[b"k"] + b"+"
            thread = threading.Thread(target=lambda: done.append(a.switchover("b", timeout_s=10.0)))
            thread.start()
            until(lambda: len(a._node.engine.committer._queue) == 1)
        thread.join(WAIT_S)
        assert done == [()]
        assert b[b"k"] == b"1+"
        c.wait_for(b.position, WAIT_S)


def test_a_transaction_does_not_survive_its_primary(tmp_path: Path) -> None:
    """What a transaction has read may be gone when its node is primary again: it is refused."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        a.put(b"k", b"1")
        txn = a.transaction().__enter__()
        assert txn[b"k"] == b"1"
        b.promote()
        role(a, Role.FOLLOWER)
        put(b, b"k", b"2")
        a.wait_for(b.position, WAIT_S)
        a.promote()
        txn[b"k"] = b"stale"
        with pytest.raises(kvrep.RefusedError):
            txn.__exit__(None, None, None)
        assert put(a, b"n", b"1") > b.position
        assert a[b"k"] == b"2"
        for store in (b, c):
            store.wait_for(a.position, WAIT_S)


# -- what users hold -------------------------------------------------------------------------------


def test_handles_survive_role_changes(tmp_path: Path) -> None:
    """Keyspaces, an open scan and a snapshot go on working through promotions and demotions."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        users = a.keyspace("users")
        for i in range(3000):
            users.put(b"%05d" % i, bytes(100), acks=None) if i % 500 == 0 else a.submit_put(b"%05d" % i, b"v")
        a.put(b"k", b"1")
        scan = a.scan()
        first = next(scan)
        with a.snapshot() as view:
            position = view.position
            b.promote()
            role(a, Role.FOLLOWER)
            put(b, b"k", b"2")
            b.keyspace("users").put(b"new", b"1")
            a.wait_for(b.position, WAIT_S)
            assert view.get(b"k") == b"1"
            assert view.position == position
        assert len([first, *scan]) > 2000
        assert users[b"new"] == b"1"
        until(lambda: b.switchover("a", dry_run=True) == ())
        b.switchover("a")
        put(a, b"k", b"3")
        assert users.put(b"again", b"1")
        for store in (b, c):
            store.wait_for(a.position, WAIT_S)
            assert store.keyspace("users")[b"again"] == b"1"


def test_asyncio_handles_survive_role_changes(tmp_path: Path) -> None:
    """The asyncio face promotes, is told where to write when it is replaced, and hands over."""

    async def run(leader: kvrep.aio.Store, b: kvrep.Store) -> None:
        users = leader.keyspace("users")
        await users.put(b"k", b"1")
        await asyncio.to_thread(b.promote)
        with pytest.raises(kvrep.RefusedError) as caught:
            await users.put(b"k", b"2")
        assert caught.value.primary_address == b.address
        await asyncio.to_thread(put, b, b"n", b"1")
        await leader.wait_for(b.position, WAIT_S)
        assert await users.get(b"k") == b"1"
        await leader.promote()
        await asyncio.to_thread(until, lambda: not leader.status().not_writable)
        await users.put(b"k", b"3")
        await asyncio.to_thread(until, lambda: b.status().role is Role.FOLLOWER)
        await asyncio.to_thread(b.wait_for, leader.position, WAIT_S)
        assert b.keyspace("users")[b"k"] == b"3"
        await asyncio.to_thread(until, lambda: leader._sync.switchover("b", dry_run=True) == ())
        await leader.switchover("b")
        assert b.status().role is Role.PRIMARY

    async def main() -> None:
        async with await kvrep.aio.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as a:
            b = await asyncio.to_thread(
                lambda: kvrep.open(tmp_path / "b", name="b", listen="127.0.0.1:0", follow=a.address, **FAST)
            )
            try:
                await asyncio.to_thread(voters, a._sync, "a", "b")
                await run(a, b)
            finally:
                await asyncio.to_thread(b.close)

    asyncio.run(main())


@pytest.mark.slow
def test_a_hundred_role_changes_leave_nothing_behind(tmp_path: Path) -> None:
    """Threads, descriptors and handles of the process are as many after 100 switchovers as after 10."""
    import os

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with group(tmp_path, 1, "ab") as (_, (a, b)):
        nodes = {"a": a, "b": b}
        primary, other = "a", "b"
        counts: list[tuple[int, int]] = []
        for number in range(100):
            now = nodes[primary]
            until(lambda now=now, to=other: now.switchover(to, dry_run=True) == ())
            now.switchover(other)
            primary, other = other, primary
            if number % 10 == 9:
                put(nodes[primary], b"k", b"%d" % number)
                nodes[other].wait_for(nodes[primary].position, WAIT_S)
                counts.append(count())
        until(lambda: count()[0] <= counts[0][0] + 3 and count()[1] <= counts[0][1] + 3)
        assert len(dict(nodes[primary]._node.engine.epochs)) == 101
        same(nodes[primary], nodes[other])


# -- who may not -----------------------------------------------------------------------------------


def test_a_primary_restored_from_an_older_copy_asks_and_does_not_begin(tmp_path: Path) -> None:
    """acks=1 of two needs no promise but its own; still it asks first, sees its loss, and wipes nobody."""
    with group(tmp_path, 1, "ab") as (start, (a, b)):
        a.put(b"k", b"1")
        shutil.copytree(tmp_path / "a", tmp_path / "older")
        b.wait_for(a.put(b"k", b"2"), WAIT_S)
        a.close()
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "older" / "LOCK").unlink()
        shutil.copytree(tmp_path / "older", tmp_path / "a")
        again = start("a")
        assert "lost data" in again.status().not_writable
        with pytest.raises(kvrep.NotPrimary, match="follow b instead"):
            again.put(b"k", b"3")
        assert again._node.primary_epoch == 0
        b.promote()
        role(again, Role.FOLLOWER)
        position = put(b, b"k", b"4")
        again.wait_for(position, WAIT_S)
        assert b.status().rescued == ()
        same(b, again)


def test_an_emptied_primary_wipes_nobody(tmp_path: Path) -> None:
    """Started on an empty directory, the old primary is another store: its followers refuse it and say so."""
    with group(tmp_path, 1, "ab") as (start, (a, b)):
        b.wait_for(a.put(b"k", b"2"), WAIT_S)
        a.close()
        shutil.rmtree(tmp_path / "a")
        again = start("a", acks=1)
        until(lambda: b.status().source.state == "refused")
        assert "another store" in b.status().source.problem
        assert b[b"k"] == b"2"
        with suppress(kvrep.NotEnoughFollowers):
            again.put(b"k", b"mine")
        assert b.status().rescued == ()


def test_follow_refuses_another_lineage_and_itself(tmp_path: Path) -> None:
    """follow() of a node with another store, or of itself, raises what to do; the primary stays primary."""
    with group(tmp_path / "one", 1, "ab") as (_, (a, b)), stores(tmp_path / "two") as start:
        other = start("x", acks=0)
        other.put(b"k", b"theirs")
        for store in (a, b):
            with pytest.raises(kvrep.LineageMismatch, match="another store") as caught:
                store.follow(other.address)
            assert "move its directory away" in str(caught.value)
            assert caught.value.ours != caught.value.theirs
        with pytest.raises(kvrep.ProtocolError, match="itself"):
            a.follow(a.address)
        with pytest.raises(kvrep.OpenError):
            a.follow("nonsense")
        assert a.status().role is Role.PRIMARY
        b.wait_for(a.put(b"k", b"ours"), WAIT_S)


def test_a_primary_told_to_follow_does(tmp_path: Path) -> None:
    """follow() on a primary ends its role at once; another is promoted and it follows on."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        a.put(b"k", b"1")
        a.follow(b.address)
        assert a.status().role is Role.FOLLOWER
        with pytest.raises(kvrep.NotPrimary):
            a.put(b"k", b"2")
        b.promote()
        position = put(b, b"k", b"2")
        for store in (a, c):
            store.wait_for(position, WAIT_S)
        same(b, a, c)


def test_a_follower_changes_its_source_at_once(tmp_path: Path) -> None:
    """follow() on a follower leaves the present source, even one that works."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        c.follow(a.address)
        c.wait_for(a.put(b"k", b"1"), WAIT_S)
        b.promote()
        c.follow(b.address)
        until(lambda: c.status().source.address == b.address and c.status().source.connected)
        c.wait_for(put(b, b"k", b"2"), WAIT_S)


def test_a_follower_that_closes_takes_nothing_for_committed(tmp_path: Path) -> None:
    """Records that wait for their commit when a follower closes are neither shown nor put into LMDB."""
    with group(tmp_path, "all", "abc") as (_, (a, b, c)):
        a.reconfigure(ack_timeout_s=0.2)
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        assert c._node.replaying is not None
        c._node.replaying.stop(5.0)
        a._node.engine.writable = lambda: None
        with pytest.raises(kvrep.AckTimeout):
            a.put(b"k", b"2")
        until(lambda: b.status().last_offset == a.status().last_offset)
        committed = b.status().committed_offset
        b.close()
        assert b._node.engine.committer.committed == committed
        assert b._node.engine.tree.state.applied.offset <= committed


# -- configurations --------------------------------------------------------------------------------


def test_addresses_and_priorities_are_records(tmp_path: Path) -> None:
    """Every voter knows where the others are, also after one has moved, and what priority each has."""
    with group(tmp_path, 1) as (_, (a, b, c)):

        def known(store: kvrep.Store) -> dict[str, str]:
            return {v.name: v.address for v in store._node.engine.configuration.voters}

        here = {"a": a.address, "b": b.address, "c": c.address}
        until(lambda: known(a) == known(b) == known(c) == here)
        c.close()
        moved = kvrep.open(tmp_path / "c", name="c", listen="127.0.0.1:0", follow=a.address, **FAST)
        try:
            until(lambda: known(a)["c"] == known(b)["c"] == moved.address)
            a.reconfigure(priorities={"b": 7})
            until(lambda: b._node.engine.configuration.need("b").priority == 7)
            with pytest.raises(ValueError, match="not a voter"):
                a.reconfigure(priorities={"x": 1})
            with pytest.raises(kvrep.OpenError):
                a.reconfigure(addresses={"b": "nowhere"})
            a.close()
            moved.promote()
            assert moved.status().role is Role.PRIMARY
        finally:
            moved.close()


def test_a_removed_voter_stays_removed_after_a_failover(tmp_path: Path) -> None:
    """It goes on following, does not vote, cannot be promoted; add_voter brings it back."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        a.remove_voter("c")
        assert set(a.status().voters) == {"a", "b"}
        c.wait_for(a.put(b"k", b"1"), WAIT_S)
        with pytest.raises(kvrep.UnsafePromotion, match="not a data voter"):
            c.promote(timeout_s=3.0)
        b.promote()
        role(a, Role.FOLLOWER)
        c.follow(b.address)
        c.wait_for(put(b, b"k", b"2"), WAIT_S)
        voters(b, "a", "b")
        put(b, b"k", b"3")
        assert set(b.status().voters) == {"a", "b"}
        until(lambda: any(f.name == "c" and f.connected for f in b.status().followers))
        b.add_voter("c")
        voters(b, "a", "b", "c")


def test_a_voter_that_does_not_know_of_its_removal_is_not_promoted(tmp_path: Path) -> None:
    """It was away when it was removed: the promises it gets bring the news, and it stays what it is."""
    with group(tmp_path, 1) as (_, (a, b, c)):
        assert c._node.replaying is not None
        c._node.replaying.stop(5.0)
        a.remove_voter("c")
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        with pytest.raises(kvrep.RefusedError):
            c.promote(timeout_s=5.0)
        assert c.status().role is Role.FOLLOWER
        writable(a)
        b.wait_for(put(a, b"k", b"2"), WAIT_S)
        same(a, b)


def test_one_change_at_a_time_after_the_epoch_start(tmp_path: Path) -> None:
    """A change waits while another, or the epoch's first record, is not committed."""
    with group(tmp_path, "all", "ab") as (start, (a, b)):
        a.put(b"k", b"1")
        a.close()
        b.promote()
        with pytest.raises(kvrep.Overloaded, match="not committed yet"):
            b.reconfigure(ack_timeout_s=3.0, timeout_s=0.3)
        again = start("a")
        voters(b, "a", "b")
        b.reconfigure(ack_timeout_s=3.0)
        until(lambda: again.status().ack_timeout_s == 3.0)
