"""Promotions over a network in memory, where every call can be seen, cut and used to strike."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import Role
from kvrep.errors import PeerUnavailable
from kvrep.model.configuration import Configuration, Voter
from kvrep.options import Options
from kvrep.runtime.configuring import reconfigure
from kvrep.runtime.node import Node
from kvrep.runtime.promoting import answer_promise, answer_standing, ask_all
from kvrep.runtime.roles import PEERS_THREADS_MAX
from kvrep.storage.home import Home
from kvrep.store import Store
from kvrep.transport.memory import MemoryTransport
from tests.replication_kit import FAST, WAIT_S, same, until, voters

Strike = Callable[[str, str, str, bool], None]


class Network:
    """Nodes that know each other by address; ``cut`` holds (name, address) pairs that do not connect."""

    def __init__(self) -> None:
        self.inner = MemoryTransport()
        self.cut: set[tuple[str, str]] = set()
        self.strike: Strike = lambda name, address, method, after: None
        """Called before and after every unary call: (who asks, whom, method, whether after)."""

    def side(self, name: str) -> Any:
        return _Side(self, name)


class _Side:
    def __init__(self, network: Network, name: str) -> None:
        self._network = network
        self._name = name

    def serve(self, *args: Any, **kwargs: Any) -> Any:
        return self._network.inner.serve(*args, **kwargs)

    def connect(self, address: str, *, name: str) -> Any:
        if (self._name, address) in self._network.cut:
            raise PeerUnavailable(f"{address} is cut off", address=address)
        connection = self._network.inner.connect(address, name=name)
        call, network = connection.call, self._network

        def watched(method: str, request: Any, timeout_s: float) -> Any:
            network.strike(self._name, address, method, False)
            answer = call(method, request, timeout_s)
            network.strike(self._name, address, method, True)
            return answer

        connection.call = watched  # type: ignore[method-assign]
        return connection


class Group:
    """Stores ``a``, ``b``, … in one network in memory, ``a`` the primary; all are voters."""

    def __init__(self, folder: Path, count: int, acks: Any) -> None:
        self.folder = folder
        self.network = Network()
        self.stores: list[Store] = []
        self._opened: list[Store] = []
        names = "abcde"[:count]
        for name in names:
            follow = self.stores[0].address if self.stores else None
            self.stores.append(self.open(name, follow=follow, acks=None if follow else acks))
        voters(self.stores[0], *names)
        here = {s.address for s in self.stores}
        for store in self.stores:  # every configuration must have reached everybody
            until(lambda store=store: {v.address for v in store._node.engine.configuration.voters} == here)

    def open(self, name: str, **options: Any) -> Store:
        port = 7000 + ord(name)
        given = Options(name=name, listen=f"127.0.0.1:{port}", **{**FAST, **options})
        store = Store(Node.open(self.folder / name, given, self.network.side(name)))
        self._opened.append(store)
        return store

    def isolate(self, store: Store, *, keep: int = 0) -> list[str]:
        """Cut ``store`` off from all but its first ``keep`` peers; returns the names it cannot reach."""
        peers = [s for s in self.stores if s is not store]
        for other in peers[keep:]:
            self.network.cut |= {(name(store), other.address), (name(other), store.address)}
        return [name(s) for s in peers[keep:]]

    def close(self) -> None:
        self.network.cut.clear()
        self.network.strike = lambda name, address, method, after: None
        for store in self._opened:
            store.close()


def name(store: Store) -> str:
    return store._node.engine.home.name


@contextmanager
def group(folder: Path, count: int, acks: Any) -> Iterator[Group]:
    made = Group(folder, count, acks)
    try:
        yield made
    finally:
        made.close()


def accepted(store: Store, key: bytes, value: bytes) -> kvrep.Position:
    """Write; a promise that nobody uses any more may fence the primary for a moment."""

    def attempt() -> kvrep.Position | None:
        try:
            return store.put(key, value)
        except kvrep.RefusedError:
            return None

    found: kvrep.Position = until(attempt, what="a write to be taken")
    return found


def settled(store: Store) -> bool:
    """Whether a follower follows again, and no promise or epoch of a failed promotion is left in its log."""
    status = store.status()
    return status.role is Role.FOLLOWER and status.source is not None and status.source.connected


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "acks", "fence"),
    [(2, 0, 2), (2, 1, 1), (3, 0, 3), (3, 1, 2), (3, "majority", 2), (3, "all", 1), (4, 2, 2),
     (4, "majority", 2), (5, "majority", 3)],
)  # fmt: skip
def test_so_many_promises_are_needed_and_enough(tmp_path: Path, count: int, acks: Any, fence: int) -> None:
    """F = d - W + 1 data voters: one less, and the promotion refuses and names the rest; F are enough."""
    with group(tmp_path, count, acks) as g:
        candidate = g.stores[-1]
        candidate.wait_for(g.stores[0].put(b"k", b"v"), WAIT_S)
        if fence > 1:
            missing = g.isolate(candidate, keep=fence - 2)
            with pytest.raises(kvrep.UnsafePromotion) as caught:
                candidate.promote(timeout_s=3.0)
            assert set(caught.value.missing) >= set(missing)
            assert (caught.value.needed, caught.value.answered) == (fence, fence - 1)
            assert candidate.status().role is Role.FOLLOWER
        g.network.cut.clear()
        g.isolate(candidate, keep=fence - 1)
        candidate.promote(timeout_s=3.0)
        assert candidate.status().role is Role.PRIMARY


def test_a_witness_is_asked_and_counts_for_no_fence(tmp_path: Path) -> None:
    """With a witness among the voters the fence is counted over data voters only."""
    with group(tmp_path, 3, "majority") as g:
        a, b, c = g.stores
        witness = Voter(store_id=b"w" * 16, name="w", member=900, address="127.0.0.1:7999", witness=True)

        def change(now: Configuration) -> Configuration:
            return replace(now, voters=(*now.voters, witness), next_member=901)

        reconfigure(a._node, change, 5.0)
        rule = a._node.engine.configuration
        assert (rule.data_voters, rule.copies, rule.fence) == (3, 3, 1)
        for store in (b, c):
            store.wait_for(a.put(b"k", b"v"), WAIT_S)
        asked: list[str] = []
        g.network.strike = lambda who, address, method, after: asked.append(address) if who == "c" else None
        g.network.cut |= {("c", a.address), ("c", b.address)}
        c.promote(timeout_s=3.0)
        assert witness.address in asked
        assert c.status().role is Role.PRIMARY


# -- promises --------------------------------------------------------------------------------------


def test_promises_made_at_once_never_go_back(tmp_path: Path) -> None:
    """Many threads promise; the highest one is in force, in memory and in the file."""
    home = Home.open(tmp_path / "h", create=True, name="h", lineage=b"l" * 16)
    try:
        epochs = list(range(1, 200))
        random.Random(3).shuffle(epochs)
        start = threading.Barrier(8)

        def promise(mine: list[int]) -> None:
            start.wait()
            for epoch in mine:
                home.promise(epoch, bytes([epoch % 250]) * 16)

        threads = [threading.Thread(target=promise, args=(epochs[i::8],)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert home.promised_epoch == 199
        home._identity.load()
        assert (home.promised_epoch, home.promised_to) == (199, bytes([199]) * 16)
        assert home.promise(199, bytes([199]) * 16)
        assert not home.promise(199, b"x" * 16)
        assert not home.promise(198, b"x" * 16)
    finally:
        home.close()


def request(g: Group, asker: Store, epoch: int) -> dict[str, Any]:
    home = asker._node.engine.home
    return {"epoch": epoch, "store_id": home.store_id, "address": asker.address, "lineage": home.lineage}


def test_strangers_get_no_promise(tmp_path: Path) -> None:
    """Another lineage, or a store that is no voter, binds nobody."""
    with group(tmp_path, 2, 1) as g:
        a, b = g.stores
        before = b._node.engine.home.promised_epoch
        for change in ({"lineage": b"x" * 16}, {"store_id": b"x" * 16}):
            with pytest.raises(kvrep.NotPrimary):
                answer_promise(b._node, {**request(g, a, 90_001), **change})
        with pytest.raises(kvrep.ProtocolError):
            answer_promise(b._node, {"epoch": "soon"})
        assert b._node.engine.home.promised_epoch == before


def test_one_epoch_is_promised_to_one_store(tmp_path: Path) -> None:
    """The same epoch asked for by another store is answered as a higher one, which ends that attempt."""
    with group(tmp_path, 3, 1) as g:
        a, b, c = g.stores
        assert answer_promise(c._node, request(g, b, 90_001))["promised"] == 90_001
        assert answer_promise(c._node, request(g, b, 90_001))["promised"] == 90_001
        assert answer_promise(c._node, request(g, a, 90_001))["promised"] > 90_001


def test_after_its_promise_a_follower_takes_and_acks_nothing_of_the_old_epoch(tmp_path: Path) -> None:
    """The primary's write is neither stored by who promised away, nor acknowledged."""
    with group(tmp_path, 3, "all") as g:
        a, b, c = g.stores
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        a.reconfigure(ack_timeout_s=0.3)
        until(lambda: b.status().ack_timeout_s == 0.3 and not a.status().uncommitted_bytes)
        promised = answer_promise(b._node, request(g, c, 90_003))
        assert promised["promised"] == 90_003
        with pytest.raises((kvrep.RefusedError, kvrep.UnknownOutcome)):
            a.put(b"k", b"2")
        assert b.status().last_offset == promised["last"][1]
        run = a._node.engine.committer.log.read(1, 1 << 20)
        assert run is not None
        tail = b._node.engine.tail.offset
        with pytest.raises(kvrep.Error):
            b._node.engine.append(tail + 1, run.data, sync=True, epoch=1001)
        assert b._node.engine.tail.offset == tail


def test_a_primary_that_promised_commits_nothing_more(tmp_path: Path) -> None:
    """After its own promise an ack that was under way changes nothing, and writers are told where to go."""
    with group(tmp_path, 3, 1) as g:
        a, b, c = g.stores
        a.put(b"k", b"1")
        answer = answer_promise(a._node, request(g, b, 90_002))
        committed = a._node.engine.committer.committed
        with pytest.raises(kvrep.Fenced) as caught:
            a.put(b"k", b"2")
        assert (caught.value.epoch, caught.value.primary_address) == (90_002, b.address)
        assert a.status().primary_address == b.address
        assert a._node.engine.tail.offset == answer["last"][1]
        assert a._node.engine.committer.committed == committed
        until(lambda: not a.status().not_writable, what="the primary to promote itself anew")
        assert a.status().epoch > 90_002
        a.put(b"k", b"3")
        same(a, b, c)


def test_a_voter_that_cannot_store_its_promise_does_not_answer(tmp_path: Path) -> None:
    """Its disk refuses the promise: the promotion counts without it, and fails by name."""
    with group(tmp_path, 3, 1) as g:
        a, b, c = g.stores
        c.wait_for(a.put(b"k", b"1"), WAIT_S)
        a.close()

        def full(*args: Any) -> Any:
            raise OSError(errno.EIO, "the disk is gone")

        home = b._node.engine.home
        home._identity.store = full  # type: ignore[method-assign]
        before = home.promised_epoch
        with pytest.raises(kvrep.UnsafePromotion) as caught:
            c.promote(timeout_s=3.0)
        assert set(caught.value.missing) == {"a", "b"}
        assert home.promised_epoch == before
        del home._identity.store
        c.promote(timeout_s=3.0)
        b.wait_for(c.position, WAIT_S)


# -- what comes between ----------------------------------------------------------------------------


def test_a_higher_promise_in_the_last_moment_stops_the_begin(tmp_path: Path) -> None:
    """The candidate promises a higher epoch after it has collected everything: nothing is begun below it."""
    with group(tmp_path, 3, 1) as g:
        a, b, c = g.stores
        c.wait_for(a.put(b"k", b"1"), WAIT_S)
        b.wait_for(a.position, WAIT_S)
        a.close()
        once: list[int] = []

        def strike(who: str, address: str, method: str, after: bool) -> None:
            if who == "c" and method == "promise" and after and address == b.address and not once:
                once.append(answer_promise(c._node, request(g, b, 90_002))["promised"])

        g.network.strike = strike
        last = c.status().last_offset
        with pytest.raises(kvrep.Fenced):
            c.promote(timeout_s=5.0)
        assert once == [90_002]
        assert c.status().role is Role.FOLLOWER
        assert c.status().last_offset == last
        c.promote(timeout_s=5.0)
        assert c.status().epoch > 90_002
        until(lambda: not c.status().not_writable)
        b.wait_for(c.put(b"k", b"2"), WAIT_S)


def test_a_full_disk_at_the_epoch_start_leaves_a_follower(tmp_path: Path) -> None:
    """ENOSPC in the last step: the promotion raises, the node follows on, and a later one succeeds."""
    with group(tmp_path, 3, 1) as g:
        a, b, c = g.stores
        c.wait_for(a.put(b"k", b"1"), WAIT_S)
        log = c._node.engine.committer.log
        append = log.append

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        log.append = full  # type: ignore[method-assign]
        with pytest.raises(kvrep.StorageFull):
            c.promote(timeout_s=5.0)
        log.append = append  # type: ignore[method-assign]
        assert c.status().role is Role.FOLLOWER
        until(lambda: not a.status().not_writable, what="the old primary to go on")
        a.put(b"k", b"2")
        until(lambda: settled(c))
        c.promote(timeout_s=5.0)
        until(lambda: not c.status().not_writable)
        c.put(b"k", b"3")
        same(c, a, b)


def test_a_promotion_that_began_nothing_is_overcome_by_the_primary(tmp_path: Path) -> None:
    """A record of a higher epoch whose primary vanished: the old primary fetches it and goes on above it."""
    with group(tmp_path, 3, 1) as g:
        a, b, c = g.stores
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        c.wait_for(a.position, WAIT_S)
        g.isolate(c, keep=0)
        g.network.cut -= {("c", b.address), ("b", c.address)}
        c.promote(timeout_s=5.0)
        epoch = c.status().epoch
        until(lambda: b.status().last_offset == c.status().last_offset)
        c.close()  # its epoch start is on b; a was never asked
        g.network.cut.clear()
        until(lambda: not a.status().not_writable, what="the old primary to go on")
        assert a.status().epoch > epoch
        assert a._node.engine.epochs.epoch_at(b.status().last_offset) >= epoch
        b.wait_for(a.put(b"k", b"2"), WAIT_S)
        same(a, b)


@pytest.mark.parametrize("step", range(8))
def test_close_at_any_moment_of_a_promotion(tmp_path: Path, step: int) -> None:
    """close() while the promotion asks, collects or fetches: it ends soon, nothing is left over."""
    with group(tmp_path, 3, 1) as g:
        a, b, c = g.stores
        assert c._node.replaying is not None
        c._node.replaying.stop(5.0)
        position = a.put(b"k", b"1")  # c must fetch it
        b.wait_for(position, WAIT_S)
        count = 0
        closers: list[threading.Thread] = []
        # Protects the two.
        lock = threading.Lock()

        def strike(who: str, address: str, method: str, after: bool) -> None:
            nonlocal count
            if who != "c":
                return
            with lock:
                count += 1
                if count - 1 != step or closers:
                    return
                closers.append(threading.Thread(target=c.close, args=(5.0,)))
                closers[0].start()
            until(lambda: c._node.closing)

        g.network.strike = strike
        try:
            c.promote(timeout_s=5.0)
        except (kvrep.ClosedError, kvrep.RefusedError):
            assert closers
        for closer in closers:
            closer.join(WAIT_S)
            assert not closer.is_alive()
        assert closers
        assert c.closed
        g.network.strike = lambda who, address, method, after: None
        again = g.open("c", follow=a.address)
        again.wait_for(accepted(a, b"k", b"2"), WAIT_S)
        same(a, b, again)


def test_standing_tells_and_binds_nobody(tmp_path: Path) -> None:
    """Being asked changes nothing; the answer has the log's end and who is primary."""
    with group(tmp_path, 2, 1) as g:
        a, b = g.stores
        before = b._node.engine.home.promised_epoch
        answer = answer_standing(b._node, {})
        assert answer["primary_epoch"] == 0
        assert answer["primary_address"] == a.address
        assert answer["last"][1] == b.status().last_offset
        leader = answer_standing(a._node, {})
        assert (leader["primary_epoch"], leader["fenced"]) == (a.status().epoch, True)
        assert b._node.engine.home.promised_epoch == before


def test_a_failed_promotion_whose_record_a_follower_got_is_overcome(tmp_path: Path) -> None:
    """The primary was asked for its promise, then the candidate began, fed one voter, and vanished."""
    with group(tmp_path, 3, 1) as g:
        a, b, c = g.stores
        b.wait_for(a.put(b"k", b"1"), WAIT_S)
        c.wait_for(a.position, WAIT_S)
        c.promote(timeout_s=5.0)
        # a finds c and follows it, but not before it has been held up: its word reaches c, none comes back
        epoch = c.status().epoch
        until(lambda: b.status().last_offset == c.status().last_offset)
        g.isolate(c, keep=0)
        c.close()
        until(lambda: a.status().role is Role.PRIMARY or a.status().source is not None)
        if a.status().role is Role.FOLLOWER:
            a.promote(timeout_s=5.0)
        until(lambda: not a.status().not_writable, what="the old primary to go on")
        assert a.status().epoch > epoch
        b.wait_for(a.put(b"k", b"2"), WAIT_S)
        same(a, b)


def test_questions_have_bounded_threads_with_an_owner(tmp_path: Path) -> None:
    """However many voters hang, a node asks on so many threads at the most; what had to wait for one too long is
    not asked any more, and a close joins them all."""
    with group(tmp_path, 2, 1) as made:
        a, b = made.stores
        node, asked, release = a._node, [], threading.Event()

        def hang(asker: str, address: str, method: str, after: bool) -> None:
            if method == "promise" and not after:
                asked.append(address)
                assert release.wait(WAIT_S)

        made.network.strike = hang
        voter = node.engine.configuration.named("b")
        assert voter is not None
        node.roles.other_voters = lambda: [voter] * 200  # type: ignore[method-assign]
        before = set(threading.enumerate())
        try:
            peers = ask_all(node.roles, "promise", {}, time.monotonic() + 0.3)
            started = set(threading.enumerate()) - before
        finally:
            release.set()
        assert peers == []
        assert len(started) == len(asked) == PEERS_THREADS_MAX
        a.close()
        assert not any(thread.is_alive() for thread in started)
        assert len(asked) == PEERS_THREADS_MAX
        with pytest.raises(kvrep.ClosedError):
            ask_all(node.roles, "promise", {}, time.monotonic() + 0.3)
        assert b.status().role is Role.FOLLOWER
