"""Writes on a follower: they go to the primary, once, with their conditions, and return when they can be read."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_quorum import free_address

import kvrep
from kvrep import Outcome, Role
from kvrep.runtime.executing import Forwarded
from tests.cli_kit import Served
from tests.forward_kit import forwarded_records, group
from tests.replication_kit import WAIT_S, processes, proxy, same, until


def test_every_write_of_a_follower_is_readable_there_when_it_returns(tmp_path: Path) -> None:
    """All ways to write: the primary logs them, with the follower as their origin, and the follower shows them."""
    with group(tmp_path) as (_, (a, b, c)):
        users = b.keyspace("users")
        position = b.put(b"k", b"1")
        assert b[b"k"] == b"1"
        assert position.epoch == a.status().epoch
        assert a.resolve(position) is Outcome.COMMITTED
        b[b"m"] = b"2"
        with b.batch() as batch:
            batch.put(b"x", b"3")
            batch.put(b"u", b"4", keyspace=users)
            batch.delete(b"m")
        assert batch.position is not None
        assert (b.get(b"m"), b[b"x"], users[b"u"]) == (None, b"3", b"4")
        with b.transaction() as txn:
            txn[b"sum"] = txn[b"k"] + txn[b"x"]
            assert list(txn.scan(prefix=b"s")) == [(b"sum", b"13")]
        assert b[b"sum"] == b"13"
        assert b.compare_and_set(b"k", expected=b"1", value=b"9") is not None
        assert b.compare_and_set(b"k", expected=b"1", value=b"8") is None
        assert b.put_if_absent(b"k", b"7") is None
        assert b.setdefault(b"k", b"6") == b"9"
        assert b.setdefault(b"new", b"5") == b"5"
        assert b.pop(b"new") == b"5"
        with pytest.raises(KeyError):
            b.pop(b"new")
        with pytest.raises(KeyError):
            del b[b"new"]
        del b[b"x"]
        assert b.popitem() == (b"k", b"9")
        b.update({b"p": b"1", b"q": b"2"})
        b.delete(b"p")
        futures = [b.submit_put(b"f%d" % i, b"%d" % i) for i in range(100)]
        assert [f.result() for f in futures] == sorted(f.result() for f in futures)
        assert b[b"f99"] == b"99"
        b.put(b"z", b"z", acks="all", level="visible")
        assert (a[b"z"], c[b"z"]) == (b"z", b"z")
        b.clear()
        same(a, b, c)
        assert len(a) == 0
        sequences = [s for _, s, _ in forwarded_records(a)]
        assert len(set(sequences)) == len(sequences) > 100


def test_without_the_option_a_follower_refuses_and_names_the_primary(tmp_path: Path) -> None:
    """The default stays NotPrimary with the primary's address, in this process and over the wire."""
    with group(tmp_path, forward_writes=False) as (_, (a, b, _c)):
        with pytest.raises(kvrep.NotPrimary) as caught:
            b.put(b"k", b"v")
        assert caught.value.primary_address == a.address
        assert b.status().primary_address == a.address
        with pytest.raises(kvrep.NotPrimary) as over_the_wire:
            b._node.link.call(_target(b, b), "write", {"ops": [["default", b"k", b"v"]]}, 5.0)
        assert over_the_wire.value.primary_address == a.address


def _target(asker: kvrep.Store, store: kvrep.Store) -> Any:
    from kvrep.runtime.finding import Target

    return Target(store.address, store.status().epoch)


def test_refusals_of_the_primary_arrive_as_they_are(tmp_path: Path) -> None:
    """Limits, missing followers and requests that cannot be met are refused at once, and nothing is logged."""
    with group(tmp_path, acks=2) as (_, (a, b, c)):
        last = a.status().last_offset
        with pytest.raises(kvrep.NotEnoughFollowers):
            b.put(b"k", b"v", acks=5)
        with pytest.raises(ValueError, match="level"):
            b.put(b"k", b"v", level="sent")  # type: ignore[arg-type]
        with pytest.raises(kvrep.KeyTooLong):
            b.put(b"k" * 600, b"v")
        assert a.status().last_offset == last
        c.close()
        until(lambda: not next(f.connected for f in a.status().followers if f.name == "c"))
        began = time.monotonic()
        with pytest.raises(kvrep.NotEnoughFollowers):
            b.put(b"k", b"v")
        assert time.monotonic() - began < 4.0
        assert a.get(b"k") is None


# -- transactions ----------------------------------------------------------------------------------


def test_a_transaction_whose_reads_changed_is_refused(tmp_path: Path) -> None:
    """The primary compares every value that was read; a change of one of them refuses it, and it can be run again."""
    with group(tmp_path) as (_, (a, b, _c)):
        b.wait_for(a.put(b"k", b"old"))
        large = bytes(100_000)
        b.wait_for(a.put(b"large", large))

        def run(change: Any) -> None:
            with b.transaction() as txn:
                txn.put(b"out", txn.get(b"k") + txn.get(b"large")[:1])
                txn.get(b"missing")
                change()

        for change in (
            lambda: a.put(b"k", b"new"),
            lambda: a.put(b"large", large[:-1] + b"x"),
            lambda: a.put(b"missing", b""),
        ):
            with pytest.raises(kvrep.TransactionConflict) as caught:
                run(change)
            assert a.get(b"out") is None
            b.wait_for(caught.value.position)
        run(lambda: a.put(b"other", b"1"))
        assert b[b"out"] == b"new\0"


def test_scanned_ranges_are_compared(tmp_path: Path) -> None:
    """A key that appears in, or vanishes from, what was scanned refuses the transaction; one behind it does not."""
    with group(tmp_path) as (_, (a, b, _c)):
        for i in range(20):
            a.put(b"k%02d" % i, b"v")
        b.wait_for(a.position)

        def run(change: Any, **bounds: Any) -> None:
            with b.transaction() as txn:
                txn.put(b"count", b"%d" % len(list(txn.scan(**bounds))))
                change()

        run(lambda: a.put(b"k055", b"new"), prefix=b"k", limit=5)
        assert b[b"count"] == b"5"
        run(lambda: a.put(b"k00", b"new"), prefix=b"k1")
        assert b[b"count"] == b"10"
        for bounds, change in (
            ({"prefix": b"k", "limit": 5}, lambda: a.put(b"k000", b"new")),
            ({"prefix": b"k1"}, lambda: a.delete(b"k15")),
            ({"prefix": b"k1"}, lambda: a.put(b"k195", b"behind the last one")),
            ({"prefix": b"k", "reverse": True, "limit": 2}, lambda: a.put(b"k199", b"new")),
            ({"start": b"q", "stop": b"r"}, lambda: a.put(b"q5", b"in an empty range")),
        ):
            before = b[b"count"]
            with pytest.raises(kvrep.TransactionConflict) as caught:
                run(change, **bounds)
            b.wait_for(caught.value.position)
            assert b[b"count"] == before
        with b.transaction() as txn:  # its own writes are no change
            txn.put(b"k05", b"mine")
            found = dict(txn.scan(prefix=b"k0"))
            txn.put(b"k051", b"mine, too")
        assert found[b"k05"] == b"mine"


def test_increments_from_all_sides_are_all_counted(tmp_path: Path) -> None:
    """Two followers and the primary add to one counter by transactions and compare_and_set; none gets lost."""
    with group(tmp_path) as (_, stores):
        stores[0].put(b"n", b"0")
        for store in stores:
            store.wait_for(stores[0].position)
        conflicts = [0] * 3

        def by_transaction(number: int) -> None:
            store = stores[number]
            for _ in range(25):
                while True:
                    try:
                        with store.transaction() as txn:
                            txn[b"n"] = b"%d" % (int(txn[b"n"]) + 1)
                        break
                    except kvrep.TransactionConflict as conflict:
                        conflicts[number] += 1
                        store.wait_for(conflict.position)

        def by_swap(number: int) -> None:
            store = stores[number]
            done = 0
            while done < 25:
                now = store[b"n"]
                done += store.compare_and_set(b"n", expected=now, value=b"%d" % (int(now) + 1)) is not None

        threads = [
            threading.Thread(target=work, args=(i,)) for work in (by_transaction, by_swap) for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert stores[0][b"n"] == b"150"
        assert conflicts[0] == 0, "the primary's own transactions hold the place"
        same(*stores)


def test_a_failed_comparison_is_the_primarys_word(tmp_path: Path) -> None:
    """compare_and_set on a follower that is behind: neither a stale match nor a stale mismatch decides."""
    with group(tmp_path, names="ab") as (_, (a, b)):
        b.wait_for(a.put(b"k", b"1"))
        replaying = b._node.replaying
        with proxy(a.address) as slow:
            b.follow(slow.address)
            until(lambda: b.status().source.address == slow.address and b.status().source.connected)
            b.wait_for(a.put(b"k", b"2"))
            assert b.compare_and_set(b"k", expected=b"1", value=b"wrong") is None
            assert b.compare_and_set(b"k", expected=b"2", value=b"3") is not None
            assert a[b"k"] == b[b"k"] == b"3"
        assert replaying is b._node.replaying


# -- exactly once ----------------------------------------------------------------------------------


@pytest.fixture
def lost_answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The primary executes forwarded writes, and the first ``[n]`` answers are lost on the way."""
    left = [0]
    answer = Forwarded.answer

    def lossy(self: Forwarded, request: Any) -> Any:
        found = answer(self, request)
        if left[0]:
            left[0] -= 1
            raise kvrep.ReplicationError("the answer was lost")
        return found

    monkeypatch.setattr(Forwarded, "answer", lossy)
    return left


def test_a_repeat_is_answered_with_the_first_outcome(tmp_path: Path, lost_answers: list[int]) -> None:
    """Answers get lost again and again: each write is in the log once, and returns its first position."""
    with group(tmp_path) as (_, (a, b, _c)):
        b.put(b"n", b"")
        for i in range(20):
            lost_answers[0] = 1 + i % 3
            with b.transaction() as txn:
                txn[b"n"] = txn[b"n"] + b"x"
            assert txn.position is not None
            assert a[b"n"] == b"x" * (i + 1)
        lost_answers[0] = 2
        assert b.compare_and_set(b"n", expected=b"x" * 20, value=b"done") is not None
        lost_answers[0] = 2
        assert b.compare_and_set(b"n", expected=b"x" * 20, value=b"again") is None
        records = forwarded_records(a)
        assert len({sequence for _, sequence, _ in records}) == len(records) == 22


def test_a_refusal_stays_one(tmp_path: Path) -> None:
    """An attempt that arrives after its repeat was refused is refused, too, even if it could succeed by now."""
    with group(tmp_path) as (_, (a, b, _c)):
        b.wait_for(a.put(b"k", b"1"))
        forwarded, epoch = a._node.forwarded, a.status().epoch
        request = {
            "epoch": epoch, "store_id": b._node.engine.home.store_id, "session": 7, "floor": 1, "timeout_s": 5.0,
            "items": [[1, b.position.offset, ["default", [b"k", b"3"]], [["default", b"k", b"\x002"]], [], None, None]],
        }  # fmt: skip
        assert forwarded.answer(request)["outcomes"][0][0] == "refused"
        a.put(b"k", b"2")
        assert forwarded.answer(request)["outcomes"][0][0] == "refused"
        assert a[b"k"] == b"2"
        request["items"][0][0] = 2  # the same, as a write of its own
        done = forwarded.answer(request)["outcomes"][0]
        assert done[0] == "done"
        assert forwarded.answer(request)["outcomes"][0] == done
        with pytest.raises(kvrep.NotPrimary):
            forwarded.answer({**request, "epoch": epoch + 1000})
        with pytest.raises(kvrep.ProtocolError):
            forwarded.answer({**request, "items": [[3, 0, ["default"], [], [], None, None]]})
        assert a[b"k"] == b"3"


def test_what_is_forgotten_of_refusals_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals beyond the bound are forgotten, oldest first; a late attempt of one of them is not executed, and
    writes that began after them are."""
    monkeypatch.setattr("kvrep.runtime.executing.REFUSED_MAX", 4)
    with group(tmp_path, names="ab") as (_, (a, b)):
        forwarded, home = a._node.forwarded, b._node.engine.home.store_id

        def attempt(sequence: int, since: int, *, wanted: bytes) -> str:
            reads = [["default", b"k", b"\0" + wanted]]
            item = [sequence, since, ["default", [b"k", b"changed"]], reads, [], None, None]
            request = {
                "epoch": a.status().epoch,
                "store_id": home,
                "session": 5,
                "floor": 1,
                "timeout_s": 5.0,
            }
            kind: str = forwarded.answer({**request, "items": [item]})["outcomes"][0][0]
            return kind

        offsets = []
        for sequence in range(1, 11):
            offsets.append(a.put(b"k", b"v%d" % sequence).offset)
            assert attempt(sequence, offsets[-1], wanted=b"something else") == "refused"
        assert attempt(1, offsets[0], wanted=b"v10") == "forgotten"
        assert attempt(10, offsets[9], wanted=b"v10") == "refused", "this one is still known"
        assert a[b"k"] == b"v10"
        assert attempt(11, offsets[7], wanted=b"v10") == "done"


def test_cut_connections_under_load(tmp_path: Path) -> None:
    """The follower's connections are reset again and again while it counts: every addition is made once."""
    with group(tmp_path) as (_, (a, b, _c)), proxy(a.address) as way:
        b.follow(way.address)
        until(lambda: b._node.replaying.joined[0] == way.address)
        b.put(b"n", b"0")
        stop = threading.Event()

        def cut() -> None:
            while not stop.wait(0.03):
                way.cut()

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            done = 0
            deadline = time.monotonic() + WAIT_S
            while done < 60:
                assert time.monotonic() < deadline
                try:
                    with b.transaction(timeout_s=10.0) as txn:
                        txn[b"n"] = b"%d" % (int(txn[b"n"]) + 1)
                    done += 1
                except kvrep.TransactionConflict as conflict:  # it read before its own write was here
                    b.wait_for(conflict.position)
        finally:
            stop.set()
            cutter.join()
        assert a[b"n"] == b"60"


def test_the_primary_is_killed_between_commit_and_answer(tmp_path: Path) -> None:
    """kill -9 when the write is committed and nobody was told: its repeat finds it in the new primary's table."""
    with processes() as start:
        fast = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 1.0, "reconnect_backoff_max_s": 0.1}
        a = start(tmp_path / "a", name="a", listen="127.0.0.1:0", acks="majority", **fast).ready()
        options = {**fast, "listen": "127.0.0.1:0", "follow": a.address, "forward_writes": True}
        b = kvrep.open(tmp_path / "b", name="b", **options)
        c = kvrep.open(tmp_path / "c", name="c", **options)
        try:
            until(lambda: len(b.status().voters) == 3 and len(c.status().voters) == 3)
            until(lambda: a.run("not db.status().not_writable"))
            assert c.put(b"n", b"x")
            a.run(
                "from kvrep.runtime.executing import Forwarded\n"
                "Forwarded._end_ = Forwarded._end\n"
                "def end(self, *args):\n"
                "    Forwarded._end_(self, *args)\n"
                "    os.kill(os.getpid(), 9)\n"
                "Forwarded._end = end\n"
            )
            result: list[Any] = []

            def append() -> None:
                with c.transaction(timeout_s=WAIT_S) as txn:
                    txn[b"n"] = txn[b"n"] + b"y"
                result.append(txn.position)

            writer = threading.Thread(target=append)
            writer.start()
            a.process.wait(WAIT_S)
            b.promote()
            writer.join(WAIT_S)
            assert len(result) == 1
            assert result[0].epoch < b.status().epoch, "committed by the old primary"
            assert b[b"n"] == c[b"n"] == b"xy"
            records = forwarded_records(b)
            assert len(records) == 2
            with c.transaction() as txn:
                txn[b"n"] = txn[b"n"] + b"z"
            assert b[b"n"] == b"xyz"
        finally:
            c.close()
            b.close()


def test_the_table_survives_restarts_and_bootstraps(tmp_path: Path) -> None:
    """What is known of forwarded writes is the same on every node, also on one that got a copy."""
    with group(tmp_path, log_file_bytes=1 << 16, retention_bytes=0) as (start, (a, b, c)):
        for i in range(200):
            b.put(b"k%d" % i, bytes(500))
        request = kvrep.RequestId(
            b._node.engine.home.store_id, b._node.forwarder._session, 200, b.position.offset - 1
        )
        until(lambda: c.position == b.position)
        wanted = a._node.engine.view.forwarded(request)
        assert wanted[0] is not None
        assert c._node.engine.view.forwarded(request) == wanted
        for store in (a, c):
            store.flush()
        c.close()
        again = start("c", follow=a.address, forward_writes=True)
        assert again._node.engine.view.forwarded(request) == wanted
        a._node.engine.trim()
        until(lambda: a.status().first_offset > 100 or a._node.engine.trim() is None, 2.0)
        fresh = start("d", follow=a.address, forward_writes=True)
        until(lambda: fresh.position == a.position)
        assert fresh._node.engine.view.forwarded(request) == wanted
        assert fresh.resolve(request) is Outcome.COMMITTED


# -- outcomes --------------------------------------------------------------------------------------


def test_without_a_primary_a_write_is_refused_not_unknown(tmp_path: Path) -> None:
    """Nobody was asked: nothing can have happened, and the error says so at its deadline."""
    with group(tmp_path, names="ab") as (_, (a, b)):
        a.close()
        until(lambda: not b.status().source.connected)
        began = time.monotonic()
        with pytest.raises(kvrep.NotPrimary):
            b.put(b"k", b"v", timeout_s=0.5)
        assert 0.4 < time.monotonic() - began < 3.0
        with pytest.raises(kvrep.NotPrimary):
            b.submit_put(b"k", b"v").result(timeout=0.3)


@pytest.mark.parametrize("executed", [True, False])
def test_an_unknown_outcome_can_be_settled(tmp_path: Path, executed: bool) -> None:
    """The way to the primary breaks off under a write: unknown with a request id, which settle() ends for good."""
    patient = {"heartbeat_timeout_s": 60.0}  # nobody looks for another way while this one is held up
    with group(tmp_path, **patient) as (_, (a, b, _c)), proxy(a.address) as way:
        b.follow(way.address)
        until(lambda: b._node.replaying.joined[0] == way.address)
        b.put(b"k", b"0")
        owner = object()
        if executed:
            assert a._node.engine.committer.take_place(owner, lambda: None)
        caught: list[kvrep.AckTimeout] = []

        def write() -> None:
            try:
                b.put(b"k", b"1", timeout_s=1.0)
            except kvrep.AckTimeout as error:
                caught.append(error)

        if not executed:
            way.hold()
        writer = threading.Thread(target=write)
        writer.start()
        if executed:
            until(lambda: len(a._node.forwarded._under_way) == 1)
            way.hold()
            a._node.engine.committer.leave_place(owner, None)
            until(lambda: a.get(b"k") == b"1")
        writer.join(WAIT_S)
        request = caught[0].request
        assert kvrep.RequestId.parse(str(request)) == request
        assert caught[0].position is None
        assert b.resolve(request) is Outcome.PENDING
        assert b.settle(request, timeout_s=0.2) is Outcome.PENDING
        way.release()
        way.cut()
        outcome = b.settle(request, timeout_s=WAIT_S)
        if executed:
            assert outcome is Outcome.COMMITTED
        else:
            assert outcome in (Outcome.COMMITTED, Outcome.ROLLED_BACK)  # what was on its way may have arrived
        b.put(b"after", b"1")
        assert (a[b"k"] == b"1") is (outcome is Outcome.COMMITTED)
        assert b.settle(request) is outcome


def test_settled_as_rolled_back_is_never_executed(tmp_path: Path) -> None:
    """Asked about a write that it does not know, the primary refuses it from then on."""
    with group(tmp_path, names="ab") as (_, (a, b)):
        home, session = b._node.engine.home.store_id, 11
        since = b.position.offset
        request = kvrep.RequestId(home, session, 1, since)
        assert b.settle(request) is Outcome.ROLLED_BACK
        late = {
            "epoch": a.status().epoch, "store_id": home, "session": session, "floor": 1, "timeout_s": 1.0,
            "items": [[1, since, ["default", [b"k", b"v"]], [], [], None, None]],
        }  # fmt: skip
        assert a._node.forwarded.answer(late)["outcomes"][0][0] == "refused"
        assert a.get(b"k") is None


def test_closing_ends_what_waits(tmp_path: Path) -> None:
    """close() of the follower: what was not sent is refused, what was is unknown; no thread is left."""
    with group(tmp_path, names="ab") as (_, (a, b)):
        owner = object()
        assert a._node.engine.committer.take_place(owner, lambda: None)
        errors: list[BaseException] = []

        def write() -> None:
            try:
                b.put(b"k", b"v", timeout_s=WAIT_S)
            except kvrep.Error as error:
                errors.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        until(lambda: len(a._node.forwarded._under_way) == 1)
        b.close()
        writer.join(WAIT_S)
        assert isinstance(errors[0], kvrep.UnknownOutcome)
        with pytest.raises(kvrep.ClosedError):
            b.put(b"k", b"v")
        a._node.engine.committer.leave_place(owner, None)


def test_pipelined_writes_that_this_node_does_not_get_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The primary answers, the records do not come: writers are refused at a bound, and go on when they do."""
    monkeypatch.setattr("kvrep.runtime.forwarding.ANSWERED_MAX", 50)
    patient = {"heartbeat_timeout_s": 60.0}
    with group(tmp_path, 0, names="ab", **patient) as (_, (a, b)), proxy(a.address) as way:
        b.follow(way.address)
        until(lambda: b._node.replaying.joined[0] == way.address)
        b.put(b"k", b"v")
        find = b._node.link.find
        b._node.link.find = lambda deadline_s: find(deadline_s)._replace(address=a.address)
        way.hold()
        futures = []
        with pytest.raises(kvrep.Overloaded):
            for i in range(1000):
                futures.append(b.submit_put(b"k%d" % i, bytes(100)))
                if len(futures) % 10 == 0:
                    until(lambda: not b._node.forwarder._open)
        assert 40 <= len(futures) <= 70
        assert all(item.payload is None for item in b._node.forwarder._answered)
        way.release()
        positions = [future.result(WAIT_S) for future in futures]
        assert positions == sorted(positions)
        assert b.put(b"after", b"v") > positions[-1]


def test_a_forked_child_may_not_forward(tmp_path: Path) -> None:
    """The child of a fork has no thread that would send: ForkedError at once, not a wait."""
    with group(tmp_path, names="ab") as (_, (_a, b)):
        b.put(b"k", b"v")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            told = b"nothing"
            try:
                b.put(b"k", b"w", timeout_s=20.0)
            except BaseException as error:
                told = type(error).__name__.encode()
            os.write(write, told)
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            assert pipe.read() == b"ForkedError"
        b.put(b"k", b"x")


# -- changes of roles ------------------------------------------------------------------------------


class Writers:
    """Threads that write through one store in every way, and note what goes wrong and how long a write took."""

    def __init__(self, store: kvrep.Store) -> None:
        self._store = store
        self._stop = threading.Event()
        self.errors: list[BaseException] = []
        self.slowest_s = 0.0
        self.done = [0, 0, 0, 0]
        ways = (self._put, self._add, self._swap, self._pipelined)
        self._threads = [threading.Thread(target=self._run, args=(i, way)) for i, way in enumerate(ways)]
        store.put(b"sum", b"0")
        store.put(b"swapped", b"0")
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, way: Any) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                way(self.done[number])
            except BaseException as error:
                self.errors.append(error)
                return
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.done[number] += 1

    def _put(self, i: int) -> None:
        self._store.put(b"put%d" % i, b"v")

    def _add(self, _: int) -> None:
        while True:
            try:
                with self._store.transaction() as txn:
                    txn[b"sum"] = b"%d" % (int(txn[b"sum"]) + 1)
                return
            except kvrep.TransactionConflict as conflict:
                self._store.wait_for(conflict.position)

    def _swap(self, i: int) -> None:
        found = self._store.compare_and_set(b"swapped", expected=b"%d" % i, value=b"%d" % (i + 1))
        assert found is not None

    def _pipelined(self, i: int) -> None:
        futures = [self._store.submit_put(b"p%d-%d" % (i, j), b"v") for j in range(5)]
        for future in futures:
            future.result()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)

    def check(self, store: kvrep.Store) -> None:
        """Everything that was done is there, once."""
        assert not self.errors, self.errors
        assert int(store[b"sum"]) == self.done[1]
        assert int(store[b"swapped"]) == self.done[2]
        assert all(store.get(b"put%d" % i) == b"v" for i in range(self.done[0]))
        assert all(store.get(b"p%d-%d" % (i, j)) for i in range(self.done[3]) for j in range(5))


def test_a_switchover_is_a_pause_for_everybody(tmp_path: Path) -> None:
    """Writers on the old primary, on the new one and on a third node see no error through six switchovers."""
    with group(tmp_path, "majority") as (_, (a, b, c)):
        # Each store has its own keys.
        loads = []
        for store in (a, b, c):
            loads.append(Writers(_Prefixed(store, store.status().name)))  # type: ignore[arg-type]
        nodes = {"a": a, "b": b, "c": c}
        primary = "a"
        for to in ("b", "c", "a", "b", "a", "c"):
            before = [sum(load.done) for load in loads]
            nodes[primary].switchover(to, timeout_s=WAIT_S)
            primary = to
            until(
                lambda before=before: all(
                    sum(load.done) > n + 20 or load.errors for load, n in zip(loads, before, strict=True)
                ),
                what="writes to go on everywhere",
            )
            assert nodes[to].status().role is Role.PRIMARY
        for load in loads:
            load.stop()
        for load in loads:
            load.check(_Prefixed(nodes[primary], load._store._name))  # type: ignore[attr-defined, arg-type]
            assert load.slowest_s < 5.0
        same(nodes[primary], *(s for n, s in nodes.items() if n != primary))


class _Prefixed:
    """A keyspace of a store, with the store's own methods for waiting."""

    def __init__(self, store: kvrep.Store, name: str) -> None:
        self._store = store
        self._name = name
        self._space = store.keyspace(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name) if hasattr(self._space, name) else getattr(self._store, name)

    def __getitem__(self, key: bytes) -> bytes:
        return self._space[key]


def test_a_failover_is_a_pause_for_the_others(tmp_path: Path) -> None:
    """The primary vanishes under load and another node is promoted: writers on the third see no error."""
    with group(tmp_path, "majority", ack_timeout_s=10.0) as (start, (a, b, c)):
        load = Writers(_Prefixed(c, "c"))  # type: ignore[arg-type]
        old, new = a, b
        for _ in range(2):
            before = sum(load.done)
            until(lambda before=before: sum(load.done) > before + 50 or load.errors)
            name = old.status().name
            old.close()
            new.promote()
            old, new = new, start(name, follow=new.address, forward_writes=True)
        before = sum(load.done)
        until(lambda: sum(load.done) > before + 50 or load.errors)
        load.stop()
        load.check(_Prefixed(old, "c"))  # type: ignore[arg-type]
        assert load.slowest_s < 10.0


def test_kill_9_of_an_elected_primary_is_a_pause(tmp_path: Path) -> None:
    """The primary's process is killed under load and the others elect one of themselves: writers see no error."""
    peers = {name: free_address() for name in "abc"}
    flags = [flag for name, address in peers.items() for flag in ("--peer", f"{name}={address}")]
    flags += ["--name", "a", "--listen", peers["a"], "--acks", "majority", "--ack-timeout-s", "20"]
    nodes: dict[str, kvrep.Store] = {}
    with Served(tmp_path / "a", *flags) as a:
        try:
            for name in "bc":
                nodes[name] = kvrep.open(
                    tmp_path / name,
                    name=name,
                    listen=peers[name],
                    coordinator=kvrep.Quorum(peers=peers),
                    forward_writes=True,
                    ack_timeout_s=20.0,
                )
            for store in nodes.values():
                until(lambda store=store: store.status().primary_address and store.put(b"ready", b"1"))
            for store in nodes.values():
                if store.status().role is Role.PRIMARY:
                    store.switchover("a", timeout_s=WAIT_S)
            loads = [Writers(_Prefixed(store, name)) for name, store in nodes.items()]  # type: ignore[arg-type]

            def all_go_on(more: int) -> None:
                before = [sum(load.done) for load in loads]
                until(
                    lambda: all(
                        sum(load.done) > n + more or load.errors
                        for load, n in zip(loads, before, strict=True)
                    ),
                    what="writes to go on everywhere",
                )

            all_go_on(30)
            a.end(signal.SIGKILL)
            all_go_on(50)
            for load in loads:
                load.stop()
            primary = next(s for s in nodes.values() if s.status().role is Role.PRIMARY)
            for load, name in zip(loads, nodes, strict=True):
                load.check(_Prefixed(primary, name))  # type: ignore[arg-type]
            same(primary, *(s for s in nodes.values() if s is not primary))
        finally:
            for store in nodes.values():
                store.close()


def test_the_forwarding_node_becomes_primary_itself(tmp_path: Path) -> None:
    """A follower with writes under way is promoted: they are committed by itself, without an error."""
    with group(tmp_path, "majority") as (_, (a, b, c)):
        load = Writers(_Prefixed(b, "b"))  # type: ignore[arg-type]
        until(lambda: sum(load.done) > 50)
        a.close()
        b.promote()
        before = sum(load.done)
        until(lambda: sum(load.done) > before + 50 or load.errors)
        load.stop()
        load.check(_Prefixed(b, "b"))  # type: ignore[arg-type]
        c.wait_for(b.position, WAIT_S)
        same(b, c)


def test_a_transaction_larger_than_any_value_is_forwarded(tmp_path: Path) -> None:
    """Up to record_bytes_max, as on the primary: 12 MiB, where values have at most 1 MiB."""
    with group(tmp_path, 1, "ab", value_bytes_max=1 << 20, record_bytes_max=16 << 20) as (_, (a, b)):
        with b.transaction() as txn:
            for i in range(12):
                txn.put(b"%d" % i, bytes(1 << 20))
        assert len(b) == len(a) == 12
        with pytest.raises(kvrep.ValueTooLarge), b.batch() as batch:
            for i in range(17):
                batch.put(b"%d" % i, bytes(1 << 20))
