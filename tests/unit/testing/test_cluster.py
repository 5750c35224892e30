"""The cluster for tests: every fault does what it says, and the checks at the end find what is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.testing import nodes
from kvrep.testing.cluster import Cluster, NotPrivileged, RecordedClient
from kvrep.testing.nodes import PYTHON, ClusterNode, LocalNode, ProcessNode
from kvrep.testing.timeline import Timeline

Make = Callable[..., Cluster]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Clusters that are only closed, not checked: for tests that break them."""
    made: list[Cluster] = []

    def new(**options: Any) -> Cluster:
        cluster = Cluster(tmp_path / f"own-{len(made)}", **options)
        made.append(cluster)
        return cluster

    yield new
    for cluster in made:
        cluster.close()


def follower_sees(cluster: Cluster, name: str, key: bytes) -> bool:
    """Whether a follower gets to show a key within a moment; for faults that must keep it from doing so."""
    try:
        cluster.wait_until(lambda: cluster[name].get(key) is not None, "unlikely", 0.3)
    except TimeoutError:
        return False
    return True


def test_three_nodes_are_up_soon(kvrep_cluster: Make) -> None:
    """Three nodes in this process stand within a second (more is allowed here for a busy machine)."""
    fastest = 9.0
    for _ in range(3):
        began = time.perf_counter()
        cluster = kvrep_cluster()
        fastest = min(fastest, time.perf_counter() - began)
        assert [n.name for n in cluster.nodes] == ["a", "b", "c"]
        assert set(cluster.primary.status().voters) == {"a", "b", "c"}
        if fastest < 1.0:
            break
    assert fastest < 1.0


def test_the_example(kvrep_cluster: Make) -> None:
    """Kill the primary, and another one has what was acknowledged; the old one comes back as a follower."""
    cluster = kvrep_cluster(nodes=3, acks="majority")
    first = cluster.primary
    cluster.primary.put(b"k", b"v")
    cluster.kill(cluster.primary)

    cluster.wait_for_primary()

    assert cluster.primary.get(b"k") == b"v"
    assert cluster.primary is not first
    cluster.restart(first)
    cluster.wait_until_ready()
    cluster.assert_no_acknowledged_loss()
    cluster.assert_converged()
    assert first[b"k"] == b"v"
    with pytest.raises(KeyError):
        first[b"none"]


def test_a_fixed_primary(kvrep_cluster: Make) -> None:
    """Without a coordinator nobody takes over: the same node goes on where it was killed."""
    cluster = kvrep_cluster(nodes=3, acks="majority", coordinator=None)
    cluster.primary.put(b"k", b"v")
    cluster.kill("a")
    with pytest.raises(kvrep.PeerUnavailable):
        cluster["a"].put(b"k", b"w")
    with pytest.raises(kvrep.PeerUnavailable):
        cluster.primary.put(b"k", b"w")
    with pytest.raises(TimeoutError, match="writable primary"):
        cluster.wait_for_primary(timeout_s=0.05)

    cluster.restart("a")

    assert cluster.wait_for_primary().get(b"k") == b"v"
    cluster.assert_converged()


def test_promotion_by_hand(kvrep_cluster: Make) -> None:
    """A test may promote a node itself; who is restarted afterwards follows the new primary."""
    cluster = kvrep_cluster(nodes=3, acks="majority", coordinator=None)
    cluster.primary.put(b"k", b"v")
    cluster.assert_converged()
    cluster.kill("a")
    second = cluster["b"]
    assert isinstance(second, LocalNode)
    second.store.promote()
    cluster.restart("c")
    cluster.restart("a")

    assert cluster.wait_for_primary() is second
    cluster.wait_until_ready()
    cluster.assert_converged()
    assert cluster["a"].get(b"k") == b"v"


def test_a_primary_that_is_cut_off_is_replaced(kvrep_cluster: Make) -> None:
    """The majority elects another one; what clients were told holds across both, and after healing."""
    cluster = kvrep_cluster(nodes=3, acks="majority", ack_timeout_s=1.0)
    client = cluster.client("one")
    client.put(b"k", b"1")
    first = cluster.primary
    cluster.partition(first)
    with pytest.raises((kvrep.UnknownOutcome, kvrep.RefusedError)):
        first.put(b"lost", b"x")
    cluster.wait_until(lambda: cluster.primary is not first, "until another one is primary")
    cluster.wait_for_primary()
    client.put(b"k", b"2")
    assert client.get(b"k") == b"2"

    cluster.heal()
    cluster.wait_until_ready()

    cluster.assert_no_acknowledged_loss()
    cluster.assert_converged()
    assert first.get(b"k") == b"2"


def test_every_kind_of_write_counts_as_acknowledged(kvrep_cluster: Make) -> None:
    """What a batch or a pipelined write was told is lost, if the next primary has not got it."""
    cluster = kvrep_cluster(nodes=2, acks=0, coordinator=None)
    first, second = cluster["a"], cluster["b"]
    assert isinstance(first, LocalNode)
    assert isinstance(second, LocalNode)
    first[b"k"] = b"1"
    cluster.assert_converged()
    cluster.assert_no_acknowledged_loss()
    cluster.partition("a", "b")
    with first.store.batch() as batch:
        batch.put(b"k", b"2")
    cluster.kill("a")
    second.store.promote(force=True, voters=["b"], acks=0)

    with pytest.raises(AssertionError, match="acknowledged loss"):
        cluster.assert_no_acknowledged_loss()
    first.acknowledged.clear()


def test_nodes_are_like_dicts(kvrep_cluster: Make) -> None:
    """Keys are set, looked for and deleted as in the store."""
    node = kvrep_cluster(nodes=1, acks=0).primary
    node[b"k"] = b"v"
    assert b"k" in node
    assert node[b"k"] == b"v"
    del node[b"k"]
    assert b"k" not in node
    with pytest.raises(KeyError):
        del node[b"k"]


def test_coordinators_are_checked(tmp_path: Path) -> None:
    """What is no coordinator is refused before anything is started."""
    with pytest.raises(ValueError, match="coordinator"):
        Cluster(tmp_path / "x", coordinator="fate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 to 26"):
        Cluster(tmp_path / "x", nodes=0)

    assert not any(t.name.startswith("kvrep") for t in threading.enumerate())


def test_a_killed_node_has_flushed_nothing(kvrep_cluster: Make) -> None:
    """kill leaves what the system calls left: the log is as it was, LMDB has not got the last writes."""
    cluster = kvrep_cluster(nodes=1, acks=0, flush_interval_s=600.0)
    for i in range(50):
        cluster.primary.put(b"k%d" % i, b"v")
    files = {p: p.stat().st_size for p in (cluster["a"].path / "gen-000001" / "log").iterdir()}
    cluster.kill("a")

    assert files == {
        p: p.stat().st_size for p in (cluster["a"].path / "gen-000001" / "log").iterdir() if p in files
    }
    cluster.restart("a")
    status = cluster.primary.status()
    assert status.applied_offset < status.committed_offset
    assert len(cluster.primary.content()) == 50


def test_partitions(kvrep_cluster: Make) -> None:
    """Both ways and one way: what is cut off does not arrive, and does once healed."""
    cluster = kvrep_cluster(acks=1)
    cluster.partition("a", "b")
    cluster.primary.put(b"cut", b"1")
    assert not follower_sees(cluster, "b", b"cut")
    cluster.wait_until(lambda: cluster["c"].get(b"cut"), "until c has it")
    cluster.heal()
    cluster.wait_until(lambda: cluster["b"].get(b"cut"), "until b has it")

    cluster.drop("a", "c")
    cluster.primary.put(b"one way", b"1")
    assert not follower_sees(cluster, "c", b"one way")
    cluster.heal("a", "c")
    cluster.assert_converged()


def test_a_primary_without_a_majority_takes_no_writes(kvrep_cluster: Make) -> None:
    """Cut off from both followers it refuses or leaves the outcome open, and goes on once healed."""
    cluster = kvrep_cluster(acks="majority", ack_timeout_s=0.5, coordinator=None)
    client = cluster.client("one")
    client.put(b"k", b"1")
    cluster.partition("a")
    with pytest.raises((kvrep.AckTimeout, kvrep.NotEnoughFollowers)):
        client.put(b"k", b"2")
    assert client.get(b"k") == b"1"

    cluster.heal()
    with_retries(cluster, b"healed")
    client.put(b"k", b"3")

    assert client.get(b"k") == b"3"
    assert {o.result for o in cluster.history} <= {"done", "unknown", "refused"}


def test_delay_throttle_corrupt_disconnect(kvrep_cluster: Make) -> None:
    """A slow, thin, damaged and interrupted network delays writes, and loses and changes nothing."""
    cluster = kvrep_cluster(acks=2)
    cluster.delay(0.1, "a", "b", one_way=True)
    began = time.perf_counter()
    cluster.primary.put(b"slow", b"1")
    assert time.perf_counter() - began >= 0.1
    cluster.heal()
    cluster.throttle(50_000, "a", "c", one_way=True)
    began = time.perf_counter()
    cluster.primary.put(b"thin", os.urandom(20_000))
    assert time.perf_counter() - began >= 0.3
    cluster.heal()
    cluster.corrupt(2, "a", "b")
    cluster.disconnect("a", "c")
    for i in range(20):
        with_retries(cluster, b"damaged %d" % i)
    flipped = sum(cluster.link(*pair).bits_flipped for pair in (("a", "b"), ("b", "a")))
    assert flipped >= 1
    cluster.heal()
    cluster.assert_converged()


def with_retries(cluster: Cluster, key: bytes) -> None:
    """Put until it is acknowledged: connections may just be broken."""

    def put() -> bool:
        try:
            cluster.primary.put(key, b"1")
        except (kvrep.NotEnoughFollowers, kvrep.AckTimeout):
            return False
        return True

    cluster.wait_until(put, f"until {key!r} can be written")


def test_pause_and_resume(kvrep_cluster: Make) -> None:
    """A paused follower stands still and catches up; a paused primary acknowledges nothing."""
    cluster = kvrep_cluster(acks=1)
    cluster.pause("b")
    cluster.primary.put(b"paused", b"1")
    assert cluster["b"].get(b"paused") is None
    cluster.resume("b")
    cluster.assert_converged()

    primary = cluster.primary
    cluster.pause("a")
    with pytest.raises((kvrep.Overloaded, kvrep.AckTimeout)):
        primary.put(b"frozen", b"1", timeout_s=0.1)
    with pytest.raises(kvrep.PeerUnavailable):
        cluster.primary.get(b"x")
    cluster.resume("a")
    with_retries(cluster, b"thawed")
    cluster.assert_converged()


def test_add_node(kvrep_cluster: Make) -> None:
    """A node that joins gets everything and a vote, unless it was told not to want one."""
    cluster = kvrep_cluster(nodes=2, acks=1)
    cluster.primary.put(b"k", b"v")

    fourth = cluster.add_node()
    reader = cluster.add_node("reader", voter=False)
    cluster.wait_until_ready()
    cluster.assert_converged()

    assert fourth.name == "c"
    assert reader.get(b"k") == b"v"
    assert set(cluster.primary.status().voters) == {"a", "b", "c"}
    with pytest.raises(ValueError, match="already"):
        cluster.add_node("reader")


def test_followers_come_and_go(kvrep_cluster: Make) -> None:
    """stop, kill and restart of followers, under load of recorded clients; everything is there at the end."""
    cluster = kvrep_cluster(acks=1)
    stop = threading.Event()

    def load(client: RecordedClient, number: int) -> None:
        count = 0
        while not stop.is_set() or count < 20:
            count += 1
            key = b"k%d" % (count % 5)
            try:
                if count % 3:
                    client.put(key, b"%d-%d" % (number, count))
                else:
                    client.get(key)
            except kvrep.Error:
                pass

    threads = [
        threading.Thread(target=load, args=(cluster.client(f"c{n}"), n), name=f"kvrep-test-load-{n}")
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    try:
        cluster.kill("b")
        cluster.restart("b")
        cluster.stop("c")
        cluster.restart("c")
        cluster.wait_until_ready()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    follower = cluster.client("reader", "b")
    follower.get(b"k1")

    cluster.assert_converged()
    cluster.assert_no_acknowledged_loss()
    assert len(cluster.history) > 60
    assert any(o.lagging for o in cluster.history)


def test_compare_and_set_is_recorded(kvrep_cluster: Make) -> None:
    """Both outcomes of a conditional write, and a delete, are in the history."""
    cluster = kvrep_cluster(nodes=1, acks=0)
    client = cluster.client("one")

    assert client.compare_and_set(b"k", expected=None, value=b"1") is not None
    assert client.compare_and_set(b"k", expected=None, value=b"2") is None
    client.delete(b"k")
    with pytest.raises(kvrep.InvalidKey):
        client.put(b"", b"1")

    assert [(o.action, o.succeeded, o.result) for o in cluster.history] == [
        ("cas", True, "done"), ("cas", False, "done"), ("delete", True, "done"), ("put", False, "refused"),
    ]  # fmt: skip


def test_slow_disk(kvrep_cluster: Make) -> None:
    """A slow disk slows the writes that need it, until it is fast again."""
    cluster = kvrep_cluster(nodes=1, acks=0)
    cluster.slow_disk("a", 0.2)
    began = time.perf_counter()
    cluster.primary.put(b"k", b"1")
    assert time.perf_counter() - began >= 0.2
    cluster.slow_disk("a", 0)
    began = time.perf_counter()
    cluster.primary.put(b"k", b"2")
    assert time.perf_counter() - began < 0.2


def test_full_disk(kvrep_cluster: Make) -> None:
    """A full disk refuses writes by name; with room again they go on."""
    cluster = kvrep_cluster(nodes=1, acks=0, disk_bytes=16 << 20)
    primary = cluster.primary
    primary.put(b"before", b"1")
    cluster.fill_disk("a")
    with pytest.raises(kvrep.StorageFull):
        put_many(primary, 200)
    assert primary.get(b"before") == b"1"

    cluster.free_disk("a")
    with_room = cluster.wait_until(lambda: accepted(cluster), "until writes are accepted again")

    assert with_room
    with pytest.raises(ValueError, match="disk_bytes"):
        kvrep_cluster(nodes=1, acks=0).fill_disk("a")


def put_many(node: ClusterNode, count: int) -> None:
    for i in range(count):
        node.put(b"k%d" % i, os.urandom(60_000))


def accepted(cluster: Cluster) -> bool:
    try:
        cluster.primary.put(b"after", b"1")
    except kvrep.StorageFull:
        return False
    return True


def test_faults_that_need_root_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root a cluster with disks of its own is refused by a reason, and leaves nothing behind."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(NotPrivileged, match="root"):
        Cluster(tmp_path / "x", disk_bytes=1 << 20)

    assert not any(t.name.startswith("kvrep") for t in threading.enumerate())


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes(kvrep_cluster: Make) -> None:
    """SIGKILL, SIGSTOP and a one-way partition hit real processes."""
    cluster = kvrep_cluster(nodes=3, acks=1, processes=True)
    client = cluster.client("one")
    first = cluster["a"]
    assert isinstance(first, ProcessNode)
    pid = first.pid
    client.put(b"k", b"1")
    first.put(b"direct", b"1")
    cluster.pause("b")
    client.put(b"k", b"2")
    cluster.resume("b")
    cluster.drop("a", "c")
    client.put(b"k", b"3")
    assert not follower_sees(cluster, "c", b"k") or cluster["c"].get(b"k") != b"3"
    cluster.heal()
    cluster.assert_converged()
    assert client.get(b"k") == b"3"
    cluster.kill("a")
    assert not first.running
    with pytest.raises(kvrep.PeerUnavailable):
        first.get(b"k")

    cluster.restart("a")
    cluster.wait_for_primary()

    assert first.pid not in (0, pid)
    assert client.get(b"k") == b"3"
    assert first.resolve(first.acknowledged[0]) is kvrep.Outcome.COMMITTED
    first.wait_for(first.acknowledged[0])
    assert dict(first.scan(prefix=b"d")) == {b"direct": b"1"}
    client.delete(b"k")
    with pytest.raises(TypeError, match="in this process"):
        client.compare_and_set(b"k", expected=None, value=b"1")
    cluster.assert_no_acknowledged_loss()
    cluster.assert_converged()


@pytest.mark.slow
def test_a_stopped_process_is_replaced(kvrep_cluster: Make) -> None:
    """While the primary's process stands still (SIGSTOP) the others elect; it wakes up as a follower."""
    cluster = kvrep_cluster(nodes=3, acks="majority", processes=True, timeout_s=30.0)
    client = cluster.client("one")
    client.put(b"k", b"1")
    first = cluster.primary
    cluster.pause(first)
    cluster.wait_for_primary()
    client.put(b"k", b"2")

    cluster.resume(first)
    cluster.wait_until(lambda: cluster._status(first).role == "follower", "until the old primary follows")
    cluster.wait_until_ready()

    cluster.assert_no_acknowledged_loss()
    cluster.assert_converged()
    assert client.get(b"k") == b"2"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_slow_disk_of_a_process(kvrep_cluster: Make) -> None:
    """The disk of a process is slowed from outside."""
    cluster = kvrep_cluster(nodes=1, acks=0, processes=True)
    cluster.slow_disk("a", 0.3)
    began = time.perf_counter()
    cluster.primary.put(b"k", b"1")
    assert time.perf_counter() - began >= 0.3
    cluster.slow_disk("a", 0)


def test_a_process_that_does_not_start(make: Make, tmp_path: Path) -> None:
    """What it said is in the timeline, and nothing is left."""
    (tmp_path / "own-0" / "a" / "store").mkdir(parents=True)
    (tmp_path / "own-0" / "a" / "store" / "stranger").touch()
    with pytest.raises(kvrep.PeerUnavailable, match="did not start"):
        make(nodes=1, acks=0, processes=True)


# -- the checks at the end -------------------------------------------------------------------------


def test_check_finds_a_store_that_differs(make: Make) -> None:
    """LMDB changed behind its digests is found after the nodes have ended."""
    cluster = make(acks=1)
    cluster.primary.put(b"k", b"v")
    cluster.assert_converged()
    node = cluster["c"]
    assert isinstance(node, LocalNode)
    node.store.flush()
    tree = node.store._node.engine.tree
    with tree.env.begin(write=True) as txn:
        txn.put(b"k", b"rotten", db=tree.handle("default"))
    tree.refresh()

    with pytest.raises(AssertionError, match="c differs from a in 1 keys"):
        cluster.assert_converged()
    found = "\n".join(map(str, cluster.check()))

    assert "store: c: " in found
    assert "store: a" not in found


def test_check_finds_lost_writes(make: Make) -> None:
    """A write that was reported and is not there is found, with and without a primary to ask."""
    for kill in (False, True):
        cluster = make(nodes=1, acks=0)
        position = cluster.primary.put(b"k", b"v")
        lost = kvrep.Position(position.epoch, position.offset + 5)
        cluster["a"].acknowledged.append(lost)
        call = cluster.history.begin("liar", "put", b"never", b"1")
        call.done()
        if kill:
            cluster.kill("a")
        found = "\n".join(map(str, cluster.check()))
        assert f"the write at {lost} returned" in found
        if not kill:
            assert "b'never': an acknowledged write is missing" in found


def test_check_finds_impossible_histories(make: Make) -> None:
    """What no order of calls explains is reported from the recorded history."""
    cluster = make(nodes=1, acks=0)
    client = cluster.client("one")
    client.put(b"k", b"1")
    call = cluster.history.begin("two", "get", b"k")
    call.done(value=None)

    assert any(v.check == "linearizability" for v in cluster.check())


def test_timeline_has_all_nodes_in_one_order(kvrep_cluster: Make) -> None:
    """Faults, the cluster's own words and what the nodes log stand together, in the order of time."""
    cluster = kvrep_cluster(acks=1, seed=77)
    cluster.kill("b")
    cluster.restart("b")
    cluster.wait_until_ready()

    events = cluster.timeline.events

    assert "seed 77" in events[0].text
    assert [e.at_s for e in events] == sorted(e.at_s for e in events)
    assert {"a", "b", "cluster"} <= {e.node for e in events}
    texts = [e.text for e in events if e.node == "b"]
    assert texts.index("is killed") < len(texts) - 1
    assert any("becomes a voter" in e.text for e in events)
    with pytest.raises(KeyError, match="no node 'z'"):
        cluster.kill("z")


def test_nothing_is_left(tmp_path: Path) -> None:
    """close() ends every thread, process and mount, and may be called twice."""
    cluster = Cluster(tmp_path / "x", nodes=2, acks=1)
    cluster.partition("a", "b")
    cluster.pause("b")
    cluster.close()
    cluster.close()

    left = [t.name for t in threading.enumerate() if t.name.startswith("kvrep")]
    mounts = subprocess.run(["cat", "/proc/mounts"], capture_output=True, text=True, check=True).stdout

    assert left == []
    assert str(tmp_path) not in mounts


class Stubborn(ProcessNode):
    """Is ready, and does not hear SIGTERM."""

    def _program(self) -> list[str]:
        text = (
            "import signal, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            'print(\'{"address": "127.0.0.1:1"}\', flush=True); threading.Event().wait(60)'
        )
        return [*PYTHON, "-c", text]


def test_a_process_that_does_not_end_tells_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stop() of a node that goes on after SIGTERM ends it, raises, and its threads' stacks are in the timeline."""
    monkeypatch.setattr(nodes, "END_S", 0.2)
    timeline = Timeline()
    node = Stubborn("a", tmp_path / "a", {}, timeline)
    node.start()

    with pytest.raises(TimeoutError, match="node a did not end"):
        node.stop()

    assert not node.running
    assert "most recent call first" in str(timeline)
    assert "in wait" in str(timeline)
    node.stop()  # idempotent
