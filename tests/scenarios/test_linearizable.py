"""Linearizable reads: they show all that had returned before, anywhere, or refuse."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import Role
from kvrep.replication.rounds import Rounds
from kvrep.runtime.confirming import Confirming
from kvrep.runtime.shared import Shared
from kvrep.testing.checkers import assert_none, check_linearizable
from kvrep.testing.cluster import Cluster
from kvrep.testing.history import History
from tests.forward_kit import group, stores
from tests.replication_kit import FAST, WAIT_S, processes, proxy, until


@pytest.mark.parametrize("acks", [1, "majority", "all"])
def test_a_read_shows_what_had_returned_before(tmp_path: Path, acks: Any) -> None:
    """Written on one node, read on another at once: the newest value, by every kind of read."""
    with group(tmp_path, acks) as (_, (a, b, c)):
        for i in range(50):
            value = b"%d" % i
            (a, b, c)[i % 3].put(b"k", value)
            for store in (a, b, c):
                assert store.get(b"k", consistency="linearizable") == value
                assert list(store.scan(consistency="linearizable")) == [(b"k", value)]
                with store.snapshot(consistency="linearizable") as view:
                    assert view[b"k"] == value
        with pytest.raises(ValueError, match="consistency"):
            a.get(b"k", consistency="eventual")  # type: ignore[call-overload]


def test_it_is_refused_with_acks_0(tmp_path: Path) -> None:
    """Where the primary acknowledges alone, nobody can confirm it; the error says so on every node."""
    with group(tmp_path, 0, names="ab") as (_, (a, b)):
        for store in (a, b):
            with pytest.raises(kvrep.StaleRead, match="acks=0"):
                store.get(b"k", consistency="linearizable")


def test_alone_it_is_an_ordinary_read(tmp_path: Path) -> None:
    """A store that is no part of a group has nobody to ask."""
    with kvrep.open(tmp_path / "a") as db:
        db.put(b"k", b"v")
        assert db.get(b"k", consistency="linearizable") == b"v"


def test_without_enough_voters_it_refuses_in_time(tmp_path: Path) -> None:
    """The primary is cut off from both followers: ordinary reads go on, linearizable ones end at their deadline."""
    with Cluster(tmp_path, acks="majority", coordinator=None, heartbeat_timeout_s=60.0) as cluster:
        a = cluster["a"]
        cluster["b"].wait_for(a.put(b"k", b"v"))
        cluster.partition(a, "b")
        assert a.get(b"k", consistency="linearizable") == b"v", "c is enough"
        cluster.partition(a, "c")
        began = time.monotonic()
        with pytest.raises(kvrep.StaleRead):
            a.get(b"k", consistency="linearizable", timeout_s=0.5)
        assert 0.4 < time.monotonic() - began < 3.0
        with pytest.raises(kvrep.StaleRead):
            cluster["b"].get(b"k", consistency="linearizable", timeout_s=0.5)
        assert a.get(b"k") == cluster["b"].get(b"k") == b"v"
        cluster.heal()
        cluster.wait_until_ready()
        assert cluster["b"].get(b"k", consistency="linearizable") == b"v"


def test_a_stale_primary_refuses_when_it_wakes(tmp_path: Path) -> None:
    """Cut off for so long that another node was promoted and wrote: it never answers with its old state."""
    with Cluster(tmp_path, acks="majority", coordinator=None, heartbeat_timeout_s=60.0) as cluster:
        a, b = cluster["a"], cluster["b"]
        a.put(b"k", b"old")
        cluster.partition(a)
        b.promote()
        cluster.wait_until(lambda: not b.status().not_writable, "b to take writes")
        b.put(b"k", b"new")
        assert a.get(b"k") == b"old", "it does not know better"
        assert a.status().role is Role.PRIMARY
        for _ in range(3):
            with pytest.raises((kvrep.StaleRead, kvrep.NotPrimary)):
                a.get(b"k", consistency="linearizable", timeout_s=0.2)
        answers: list[Any] = []

        def read() -> None:
            while not answers or isinstance(answers[-1], Exception):
                try:
                    answers.append(a.get(b"k", consistency="linearizable", timeout_s=0.5))
                except (kvrep.StaleRead, kvrep.NotPrimary) as error:
                    answers.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        cluster.heal()
        reader.join(WAIT_S)
        assert answers[-1] == b"new"


def test_a_frozen_primary_never_shows_its_old_state(tmp_path: Path) -> None:
    """SIGSTOP, another node is promoted and writes, SIGCONT: a read that waited for it refuses, or shows the new."""
    with processes() as start:
        a = start(tmp_path / "a", name="a", listen="127.0.0.1:0", acks="majority", **FAST).ready()
        with stores(tmp_path) as begin:
            b = begin("b", follow=a.address)
            c = begin("c", follow=a.address)
            until(lambda: len(b.status().voters) == 3 and len(c.status().voters) == 3)
            until(lambda: a.run("not db.status().not_writable"))
            a.run("db.put(b'k', b'old') and None")
            assert a.run("db.get(b'k', consistency='linearizable')") == b"old"
            a.pause()
            try:
                b.promote(timeout_s=WAIT_S)
                until(lambda: not b.status().not_writable)
                b.put(b"k", b"new")
                a.send("db.get(b'k', consistency='linearizable', timeout_s=2.0)")
            finally:
                os.kill(a.pid, signal.SIGCONT)
            with suppress(kvrep.StaleRead, kvrep.NotPrimary):
                assert a.receive(WAIT_S) == b"new"
            until(lambda: a.run("db.status().role == 'follower'"))
            assert a.run("db.get(b'k', consistency='linearizable')") == b"new"


def test_readers_share_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen readers that wait at once cost one round on the primary; on a follower, few questions to it."""
    readers = 16
    gate = threading.Event()
    probing = Confirming.probing

    def probing_at_the_gate(confirming: Confirming) -> int:
        assert gate.wait(WAIT_S)
        return probing(confirming)

    monkeypatch.setattr(Confirming, "probing", probing_at_the_gate)
    with group(tmp_path, names="ab") as (_, (a, b)):
        a.put(b"k", b"v")
        rounds, questions = a._node.shipping.followers.rounds, 0
        ask = b._node.freshness._reads._ask

        def counted_ask(deadline_s: float) -> kvrep.Position:
            nonlocal questions
            questions += 1
            return ask(deadline_s)

        monkeypatch.setattr(b._node.freshness._reads, "_ask", counted_ask)
        for store, entered_in, entered_at in ((a, Rounds, "ask"), (b, Shared, "run")):
            entered = threading.Semaphore(0)
            gate.clear()
            before = rounds.wanted
            with monkeypatch.context() as patched:
                patched.setattr(entered_in, entered_at, announced(getattr(entered_in, entered_at), entered))
                with ThreadPoolExecutor(readers) as pool:
                    reads = [pool.submit(store.get, b"k", consistency="linearizable") for _ in range(readers)]
                    try:
                        for _ in range(readers):
                            assert entered.acquire(timeout=WAIT_S)
                    finally:
                        gate.set()
                    assert [read.result(WAIT_S) for read in reads] == [b"v"] * readers
            if store is a:
                assert rounds.wanted - before == 1
            else:
                assert 1 <= questions <= readers // 2


def announced(function: Any, calls: threading.Semaphore) -> Any:
    """``function``, which says so when it is called."""

    def call(*arguments: Any) -> Any:
        calls.release()
        return function(*arguments)

    return call


def test_a_restarted_primary_waits_for_its_epoch(tmp_path: Path) -> None:
    """Before the start of its epoch is committed it does not know what is; then it shows everything."""
    with stores(tmp_path) as start:
        a = start("a", acks=1)
        b = start("b", follow=a.address)
        until(lambda: "b" in a.status().voters and not a.status().not_writable)
        a.put(b"k", b"v")
        b.close()
        a.close()
        a = start("a")
        with pytest.raises((kvrep.StaleRead, kvrep.NotPrimary)):
            a.get(b"k", consistency="linearizable", timeout_s=0.3)
        start("b", follow=a.address)
        until(lambda: not a.status().not_writable)
        assert a.get(b"k", consistency="linearizable") == b"v"


def test_a_follower_held_up_refuses(tmp_path: Path) -> None:
    """It gets the primary's word, but not the records, in time: StaleRead with the position that it lacks."""
    with group(tmp_path, heartbeat_timeout_s=60.0) as (_, (a, b, _c)), proxy(a.address) as way:
        b.follow(way.address)
        until(lambda: b._node.replaying.joined[0] == way.address)
        assert b.get(b"k", consistency="linearizable") is None
        way.hold()
        position = a.put(b"k", b"v")
        b._node.freshness._reads._ask = lambda deadline_s: position  # its question takes another way
        with pytest.raises(kvrep.StaleRead) as caught:
            b.get(b"k", consistency="linearizable", timeout_s=0.3)
        assert caught.value.wanted == position
        way.release()
        assert b.get(b"k", consistency="linearizable") == b"v"


# -- histories -------------------------------------------------------------------------------------


class Clients:
    """Two threads at every node: one puts, swaps and reads linearizably, one only reads. All is recorded."""

    def __init__(self, cluster: Cluster, *, keys: int, seed: int) -> None:
        self.history = History()
        self.unexpected: list[BaseException] = []
        self.finished = dict.fromkeys("abc", 0)
        self._cluster = cluster
        self._keys = [b"key%d" % i for i in range(keys)]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(node, number, random.Random(f"{seed}{node}{number}")))
            for node in "abc"
            for number in range(2)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, node: str, number: int, chance: random.Random) -> None:
        name = f"{node}{number}"
        seen: dict[bytes, bytes | None] = {}
        for i in range(100_000):
            if self._stop.is_set():
                return
            key, value = chance.choice(self._keys), f"{name}-{i}".encode()
            try:
                self._call(node, name, "r" if number else chance.choice("rpc"), key, value, seen)
            except kvrep.Error:
                self._stop.wait(0.01)
            except BaseException as error:
                self.unexpected.append(error)
                return
            else:
                self.finished[node] += 1

    def _call(
        self, node: str, name: str, what: str, key: bytes, value: bytes, seen: dict[bytes, bytes | None]
    ) -> None:
        store = self._cluster[node].store  # raises PeerUnavailable while it is down
        action: Any = {"r": "get", "p": "put", "c": "cas"}[what]
        expected = seen.get(key)
        call = self.history.begin(
            name, action, key, None if what == "r" else value, expected=expected, node=node
        )
        try:
            if what == "r":
                seen[key] = store.get(key, consistency="linearizable", timeout_s=1.0)
                call.done(value=seen[key])
            elif what == "p":
                call.done(position=store.put(key, value, timeout_s=2.0))
            else:
                position = store.compare_and_set(key, expected=expected, value=value, timeout_s=2.0)
                call.done(succeeded=position is not None, position=position)
        except kvrep.RefusedError:
            call.refused()
            raise
        except kvrep.Error as error:
            if what == "r":
                call.refused()
            else:
                call.unknown(getattr(error, "position", None))
            raise

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)


def fail_over(cluster: Cluster, load: Clients, fault: str, chance: random.Random) -> None:
    """Change the primary; before the old one may know of it, the others have gone on for a while."""
    old = cluster.wait_for_primary(WAIT_S)
    others = [node for node in cluster.nodes if node is not old]
    chance.shuffle(others)
    if fault == "kill":
        cluster.kill(old)
    elif fault == "pause":
        cluster.pause(old)
    elif fault == "partition":
        cluster.partition(old)
    else:
        old.store.switchover(others[0].name, timeout_s=WAIT_S)
        return

    def promoted() -> bool:
        for node in others:
            try:
                node.store.promote(timeout_s=5.0)
                return True
            except kvrep.Error:
                continue
        return False

    cluster.wait_until(promoted, "until one of the others is promoted", WAIT_S)
    before = {node.name: load.finished[node.name] for node in others}
    cluster.wait_until(
        lambda: load.unexpected or all(load.finished[n] > before[n] + 20 for n in before),
        "until the others go on",
        WAIT_S,
    )
    if fault == "kill":
        cluster.restart(old)
    elif fault == "pause":
        cluster.resume(old)
    else:
        cluster.heal()


def run(folder: Path, *, rounds: int, seed: int, acks: Any = "majority") -> None:
    chance = random.Random(seed)
    faults = ("switchover", "kill", "partition", "pause")
    with Cluster(folder, seed=seed, acks=acks, forward_writes=True) as cluster:
        load = Clients(cluster, keys=3, seed=seed)
        try:
            for number in range(rounds):
                before = dict(load.finished)
                fault = faults[number] if number < len(faults) else chance.choice(faults)
                fail_over(cluster, load, fault, chance)
                cluster.wait_until_ready(WAIT_S)
                cluster.wait_until(
                    lambda before=before: (
                        load.unexpected or all(load.finished[n] > before[n] + 20 for n in before)
                    ),
                    "until all clients go on",
                    WAIT_S,
                )
        finally:
            load.stop()
        assert not load.unexpected, load.unexpected
        assert_none(check_linearizable(load.history, steps_max=200_000))
        done = [o for o in load.history if o.result == "done"]
        assert sum(o.action == "get" for o in done) > 20 * rounds
        assert sum(o.action == "cas" and o.succeeded for o in done) > rounds


@pytest.mark.slow
def test_the_history_of_forwarded_writes_and_reads_is_linearizable(tmp_path: Path) -> None:
    """Clients at all three nodes, eight changes of the primary: one order explains all answers."""
    run(tmp_path, rounds=8, seed=3)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("acks", [1, "majority"])
def test_a_long_history_is_linearizable(tmp_path: Path, acks: Any) -> None:
    """The same through sixty changes of the primary."""
    run(tmp_path, rounds=60, seed=29, acks=acks)
