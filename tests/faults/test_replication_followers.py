"""Followers that die at any step, streams that break at any byte, strangers on the port."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.errors import ProtocolError, ReplicationError
from kvrep.model.position import EpochTable, Position
from kvrep.replication.messages import Ack, Credit, Hello, Promise, Refused, Segment, Welcome
from kvrep.transport.interface import StreamEnded
from kvrep.transport.network import GrpcTransport
from tests.ports import free_address
from tests.replication_kit import FAST, WAIT_S, opened, processes, proxy, same, until, voters, writable

STRACE = shutil.which("strace")


def traced(*what: str) -> tuple[str, ...]:
    """The prefix of a command that injects a fault."""
    assert STRACE is not None
    return (STRACE, "-f", "-qq", "-o", "/dev/null", *what)


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize(
    "point",
    [f"{call}:when={n}" for call in ("pwritev2", "sendmsg") for n in (2, 3, 5, 8)]
    + ["fdatasync:when=1", "fdatasync:when=3"],
)
def test_kill_9_of_a_follower(tmp_path: Path, point: str) -> None:
    """Killed at one of ten writes, syncs and sends, a follower resumes: nothing acked is missing or applied twice."""
    call, _, when = point.partition(":")
    with kvrep.open(
        tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, ack_timeout_s=0.2, **FAST
    ) as p, processes() as start:  # fmt: skip
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
        f = start(
            tmp_path / "b", name="b", follow=p.address, flush_interval_s=0.05, **FAST,
            prefix=traced("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:{when}"),
        )  # fmt: skip
        deadline = time.monotonic() + WAIT_S
        count = 0
        while f.process.poll() is None and time.monotonic() < deadline:
            try:
                with p.transaction() as txn:
                    txn[b"count"] = b"%d" % (int(txn.get(b"count", b"0")) + 1)
                count += 1
            except kvrep.UnknownOutcome:
                count += 1
            except kvrep.RefusedError:
                threading.Event().wait(0.005)
        assert f.process.poll() is not None, "the kill point was never reached"
        confirmed = max((s.synced for s in p.status().followers), default=0)
        with opened(tmp_path / "b", name="b", follow=p.address, **FAST) as again:
            assert again.status().last_offset >= confirmed
            writable(p)
            until(lambda: p.status().committed_offset == p.status().last_offset)
            same(p, again)
            assert int(again.get(b"count", b"0")) == count


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize(("error", "durability"), [("EIO", "sync"), ("ENOSPC", "sync"), ("EIO", "os")])
def test_no_ack_precedes_durable_storage(tmp_path: Path, error: str, durability: str) -> None:
    """A follower whose disk fails acks nothing, whatever its durability: the write stays unknown, then commits from a
    healthy one."""
    calls = "pwritev2,fdatasync"
    with kvrep.open(
        tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, ack_timeout_s=0.3, **FAST
    ) as p, processes() as start:  # fmt: skip
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
            before = p.put(b"k", b"0")
        f = start(
            tmp_path / "b", name="b", follow=p.address, durability=durability, sync_interval_s=3600.0, **FAST,
            prefix=traced("-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when=4+"),
        ).ready()  # fmt: skip
        unknown: list[kvrep.Position] = []

        def fail() -> bool:
            try:
                p.put(b"k", b"%d" % len(unknown))
            except kvrep.AckTimeout as caught:
                unknown.append(caught.position)
            except kvrep.RefusedError:
                pass
            return bool(unknown)

        until(fail)
        assert unknown[0] > before
        assert p.resolve(unknown[0]) is kvrep.Outcome.PENDING
        assert max(s.synced for s in p.status().followers) < unknown[0].offset
        f.kill()
        with opened(tmp_path / "b", name="b", follow=p.address, **FAST) as again:
            until(lambda: p.resolve(unknown[0]) is kvrep.Outcome.COMMITTED)
            same(p, again)


def test_kill_9_of_followers_again_and_again_under_load(tmp_path: Path) -> None:
    """A follower killed at random moments under load always comes back to the same state."""
    chance = random.Random(7)
    with (
        kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as p,
        processes() as start,
    ):
        stop = threading.Event()

        def load() -> None:
            number = 0
            while not stop.is_set():
                for _ in range(50):
                    p.submit_put(b"%06d" % (number % 5000), b"%d" % number * 20)
                    number += 1
                stop.wait(0.005)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for _ in range(6):
                f = start(tmp_path / "b", name="b", follow=p.address, flush_interval_s=0.2, **FAST).ready()
                target = p.status().last_offset + chance.randrange(3000)
                while f.run("db.position").offset <= target:
                    stop.wait(0.002)
                f.kill()
        finally:
            stop.set()
            thread.join()
        with opened(tmp_path / "b", name="b", follow=p.address, **FAST) as again:
            p.put(b"last", b"1")
            same(p, again)


def test_connections_reset_at_random_moments(tmp_path: Path) -> None:
    """However often the connection breaks, both sides agree in the end and every write got its outcome."""
    chance = random.Random(11)
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:
        with proxy(p.address) as between:
            with kvrep.open(tmp_path / "b", name="b", follow=between.address, **FAST) as f:
                voters(p, "a", "b")
                done = 0
                ended = threading.Event()

                def write() -> None:
                    nonlocal done
                    while done < 150:
                        try:
                            p.put(b"k%d" % done, b"x" * 3000)
                            done += 1
                        except kvrep.RefusedError:
                            ended.wait(0.002)
                    ended.set()

                thread = threading.Thread(target=write)
                thread.start()
                while not ended.wait(chance.random() * 0.15):
                    between.cut()
                thread.join()
                same(p, f)


# -- strangers ----------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    """A primary with acks=1 and its follower; afterwards both must still work."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST) as f:
            voters(p, "a", "b")
            yield p, f
            position = p.put(b"after", b"all")
            f.wait_for(position, WAIT_S)
            assert p.status().not_writable == ""


def test_garbage_and_silence_on_the_port(pair: Any) -> None:
    """Random bytes and idle sockets change nothing for the primary and its follower."""
    p, _ = pair
    host, _, port = p.address.rpartition(":")
    chance = random.Random(3)
    idle = [socket.create_connection((host, int(port))) for _ in range(30)]
    for _ in range(20):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(chance.randbytes(chance.randrange(1, 5000)))
        p.put(b"k", b"v")
    for one in idle:
        one.close()


def hello_of(p: kvrep.Store, **changes: Any) -> Hello:
    """An honest greeting of a new, unnamed store that has nothing."""
    return replace(Hello(store_id=os.urandom(16), name="", credit_bytes=1 << 20), **changes)


def converse(p: kvrep.Store, *messages: Any, until_type: Any = None, wait_s: float = 3.0) -> list[Any]:
    """Open a stream, say these things, and return what comes until the end or a message of ``until_type``."""
    connection = GrpcTransport().connect(p.address, name="stranger")
    got: list[Any] = []
    try:
        stream = connection.open_stream()
        timer = threading.Timer(wait_s, stream.cancel)
        timer.start()
        try:
            for message in messages:
                stream.send(message)
            while True:
                message = stream.receive()
                got.append(message)
                if until_type is not None and type(message) is until_type:
                    return got
        except StreamEnded as ended:
            got.append(ended.error)
        finally:
            timer.cancel()
            timer.join()
    finally:
        connection.close()
    return got


def _lineage(p: kvrep.Store) -> bytes:
    return p._node.engine.home.lineage


HOSTILE = {
    "future protocol": lambda p: {"protocol_min": 50, "protocol_max": 60},
    "own id": lambda p: {"store_id": p._node.engine.home.store_id},
    "other lineage": lambda p: {"lineage": b"x" * 16, "branch": b"x" * 16},
    "records without a lineage": lambda p: {
        "last": Position(1001, 5), "epochs": EpochTable([(1001, 1)])},
    "committed above last": lambda p: {"committed": 7},
    "epochs that end elsewhere": lambda p: {
        "lineage": _lineage(p), "branch": _lineage(p), "last": Position(1001, 5),
        "epochs": EpochTable([(2001, 1)])},
    "far ahead in our epoch": lambda p: {
        "lineage": _lineage(p), "branch": _lineage(p), "last": Position(p.status().epoch, 2**62),
        "epochs": EpochTable([(p.status().epoch, 1)]), "promised_epoch": p.status().epoch},
    "a promise without end": lambda p: {"promised_epoch": 2**63 - 1},
    "records of a future epoch": lambda p: {
        "lineage": _lineage(p), "branch": _lineage(p), "last": Position(2**62, 9),
        "epochs": EpochTable([(2**62, 1)])},
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_greetings_are_refused_and_harm_nobody(pair: Any, what: str) -> None:
    """A greeting that cannot be, or lies, ends its own stream with a reason and nothing else."""
    p, _ = pair
    epoch = p.status().epoch
    got = converse(p, hello_of(p, **HOSTILE[what](p)))
    assert not any(isinstance(m, Segment | Welcome) for m in got), got
    assert isinstance(got[0], Refused | ReplicationError), got
    p.put(b"k", what.encode())
    assert p.status().epoch == epoch


def test_a_voter_of_another_epoch_cannot_be_made_up_by_a_stranger(pair: Any) -> None:
    """Only stores that vote can fence a primary: the word of any other store is not taken."""
    p, _ = pair
    hello = hello_of(p, name="c", promised_epoch=p.status().epoch + 5000)
    got = converse(p, hello)
    assert isinstance(got[0], Refused)
    assert got[0].reason == "superseded"
    assert p.put(b"k", b"v").epoch == p.status().epoch


@pytest.mark.parametrize(
    "message",
    [
        Ack(written=10**6, synced=10**6, visible=10**6, promised_epoch=0),
        Ack(written=0, synced=1, visible=0, promised_epoch=0),
        Credit(bytes_granted=0),
        Promise(epoch=10**9, last=Position(1001, 1), committed=0, epochs=EpochTable([(1001, 1)])),
        Hello(store_id=b"0" * 16, name="again"),
    ],
    ids=lambda m: type(m).__name__ + str(getattr(m, "written", "")),
)
def test_impossible_messages_end_their_stream_only(pair: Any, message: Any) -> None:
    """Acks of the future, backward acks, empty credit, unasked promises and second greetings."""
    p, _ = pair
    committed = p.status().committed_offset
    got = converse(p, hello_of(p), until_type=Welcome)
    assert type(got[-1]) is Welcome
    if type(message) is Ack:
        message = replace(message, promised_epoch=got[-1].epoch)
    got = converse(p, hello_of(p), message, wait_s=1.0)
    if not isinstance(message, Promise):
        assert isinstance(got[-1], ProtocolError), got
    assert p.status().committed_offset <= committed + 5
    assert p.put(b"k", b"v")


def test_a_message_before_the_greeting(pair: Any) -> None:
    """Whoever does not say Hello first is shown out."""
    p, _ = pair
    for message in (Ack(written=0, synced=0, visible=0), Credit(bytes_granted=5)):
        got = converse(p, message)
        assert isinstance(got[-1], ProtocolError), got


def test_a_stream_that_says_nothing_is_ended(pair: Any) -> None:
    """A connected stream without a Hello does not hold its place for ever."""
    p, _ = pair
    began = time.monotonic()
    got = converse(p, wait_s=10.0)
    assert time.monotonic() - began < 5
    assert got == [None]


def test_a_follower_of_another_store_is_told_and_does_not_hurry(tmp_path: Path, pair: Any) -> None:
    """Another lineage: a clear problem, the state says refused, and each retry waits twice as long as the last."""
    p, _ = pair
    with kvrep.open(tmp_path / "q", name="q", listen="127.0.0.1:0", **FAST) as q:
        with kvrep.open(tmp_path / "c", name="c", follow=q.address, **FAST) as c:
            c.wait_for(q.put(b"mine", b"1"), WAIT_S)
    came: list[float] = []
    service = p._node.shipping
    original = service.open_session
    service.open_session = lambda peer: (came.append(time.monotonic()), original(peer))[1]
    options = {**FAST, "reconnect_backoff_max_s": 0.4}
    with kvrep.open(tmp_path / "c", name="c", follow=p.address, **options) as c:
        until(lambda: c.status().source.state == "refused")
        assert "another store" in c.status().source.problem
        assert not c.status().source.connected
        assert c.get(b"mine") == b"1"
        until(lambda: len(came) > 6)
        gaps = [after - before for before, after in itertools.pairwise(came)]
        for gap, limit in zip(gaps, (0.1, 0.2, 0.4, 0.4, 0.4, 0.4), strict=False):
            assert gap >= limit / 2
        until(lambda: c.status().source.state == "refused")  # it may just be about to be told so again


def test_a_token_is_needed_where_one_is_set(tmp_path: Path) -> None:
    """A follower with the wrong token is refused and says so; the right one is fed."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", token="right", **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, token="wrong", **FAST) as f:
            until(lambda: "token" in f.status().source.problem)
        with kvrep.open(tmp_path / "c", name="c", follow=p.address, token="right", **FAST) as f:
            f.wait_for(p.put(b"k", b"v"), WAIT_S)


# -- addresses ----------------------------------------------------------------------------------------


def test_a_wrong_address_first_and_a_bad_one_at_open(tmp_path: Path) -> None:
    """Of several sources the one that answers is used; an address that cannot be is refused at open."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as p:
        closed = free_address()
        with kvrep.open(tmp_path / "b", name="b", follow=(closed, p.address), **FAST) as f:
            f.wait_for(p.put(b"k", b"v"), WAIT_S)
            assert f.status().source.address == p.address
            assert f.status().primary_address == p.address
    for bad in ("nonsense", "host:port", ""):
        with pytest.raises(kvrep.OpenError):
            kvrep.open(tmp_path / "c", name="c", follow=bad)
    assert not (tmp_path / "c" / "LOCK").exists() or kvrep.open(tmp_path / "c2").close() is None


def test_a_follower_asked_to_feed_names_the_primary(tmp_path: Path) -> None:
    """A follower pointed at a follower is sent on to the primary, and goes there."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, listen="127.0.0.1:0", **FAST) as b:
            until(lambda: b.status().source.connected)
            with kvrep.open(tmp_path / "c", name="c", follow=b.address, **FAST) as c:
                c.wait_for(p.put(b"k", b"v"), WAIT_S)
                assert c.status().source.address == p.address
                with pytest.raises(kvrep.NotPrimary) as caught:
                    c.put(b"k", b"v")
                assert caught.value.primary_address == p.address


def test_a_primary_that_is_away_for_a_while(tmp_path: Path) -> None:
    """The follower keeps trying with a bounded backoff, serves reads meanwhile, and resumes."""
    listen = free_address()
    with kvrep.open(tmp_path / "b", name="b", follow=listen, **FAST) as f:
        until(lambda: f.status().source.problem)
        assert f.status().source.state == "waiting"
        for turn in range(2):
            with kvrep.open(tmp_path / "a", name="a", listen=listen, **FAST) as p:
                f.wait_for(p.put(b"k%d" % turn, b"v"), WAIT_S)
                assert f.status().source.problem == ""
            until(lambda: not f.status().source.connected)
            assert f.get(b"k%d" % turn) == b"v"


def test_a_stopped_follower_costs_bounded_memory(tmp_path: Path) -> None:
    """With acks=0 and a stopped follower writes go on, and memory does not grow with the log."""
    with processes() as start:
        p = start(
            tmp_path / "a", name="a", listen="127.0.0.1:0", acks=0, memtable_bytes=1 << 20,
            memtable_bytes_max=1 << 23, heartbeat_timeout_s=60.0,
        ).ready()  # fmt: skip
        f = start(tmp_path / "b", name="b", follow=p.address, heartbeat_timeout_s=60.0).ready()
        p.run("exec('while len(db.status().voters) < 2: time.sleep(0.01)')")
        write = "for i in range({0}): db.put(b'%d' % (i % 64), b'x' * 100_000)"
        p.run("exec(" + repr(write.format(200)) + ")", 60)
        f.pause()
        p.run("exec(" + repr(write.format(100)) + ")", 60)
        before = _rss(p.pid)
        p.run("exec(" + repr(write.format(1000)) + ")", 60)
        assert _rss(p.pid) - before < 40 << 20
        lag = p.run("db.status().followers[0]")
        assert lag.lag_records >= 1000
        assert lag.lag_bytes > 90_000_000
        os.kill(f.pid, signal.SIGCONT)
        position = p.run("db.put(b'end', b'1')")
        f.run(f"db.wait_for(kvrep.Position(*{tuple(position)}), 60)", 70)


def _rss(pid: int) -> int:
    """Resident anonymous memory in bytes (the map of LMDB is not counted)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


# -- one-way partitions -------------------------------------------------------------------------------


def _netns_possible() -> str:
    if os.geteuid() != 0:
        return "not root"
    if not (shutil.which("ip") and shutil.which("nft")):
        return "ip or nft is not installed"
    probe = subprocess.run(
        ["ip", "netns", "add", f"kvrep-probe-{os.getpid()}"], capture_output=True, check=False
    )
    subprocess.run(["ip", "netns", "del", f"kvrep-probe-{os.getpid()}"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "network namespaces cannot be made here"


@pytest.fixture
def wires() -> Any:
    """Two namespaces joined by a cable: (run in one, run in other, addresses)."""
    reason = _netns_possible()
    if reason:
        pytest.skip(reason)
    names = [f"kvrep{os.getpid()}{side}" for side in "ab"]
    ends = [f"kv{os.getpid() % 100000}{side}" for side in "ab"]
    subnet = f"10.{os.getpid() % 200 + 20}.77"

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1],
            "netns", names[1])  # fmt: skip
        for i, name in enumerate(names):
            run("ip", "-n", name, "addr", "add", f"{subnet}.{i + 1}/24", "dev", ends[i])
            run("ip", "-n", name, "link", "set", ends[i], "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield names, [f"{subnet}.1", f"{subnet}.2"]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.parametrize("direction", ["to the follower", "to the primary"])
def test_a_one_way_partition(tmp_path: Path, wires: Any, direction: str) -> None:
    """Packets lost in one direction only: both ends notice within 5 s by default, and heal afterwards."""
    names, addresses = wires
    blocked = names[1] if direction == "to the follower" else names[0]
    with processes() as start:
        prefix = ("ip", "netns", "exec")
        p = start(
            tmp_path / "a", name="a", listen=f"{addresses[0]}:7400", acks=1, ack_timeout_s=1.0,
            prefix=(*prefix, names[0]),
        ).ready()  # fmt: skip
        f = start(
            tmp_path / "b", name="b", follow=f"{addresses[0]}:7400", prefix=(*prefix, names[1])
        ).ready()  # fmt: skip
        p.run("exec('while len(db.status().voters) < 2 or db.status().not_writable: time.sleep(0.01)')")
        p.run("db.put(b'k', b'1')")
        sources = f"{{ {addresses[0]}, {addresses[1]} }}"
        chain = f"type filter hook input priority 0 ; ip saddr {sources} drop ;"
        rules = f"table inet t {{\nchain c {{\n{chain}\n}}\n}}\n"
        subprocess.run(["ip", "netns", "exec", blocked, "nft", "-f", "-"], input=rules.encode(), check=True)
        began = time.monotonic()
        with pytest.raises((kvrep.AckTimeout, kvrep.NotEnoughFollowers)):
            p.run("db.put(b'k', b'2')")
        until(lambda: p.run("db.status().not_writable"), 8)
        until(lambda: not f.run("db.status().source.connected"), 8)
        assert time.monotonic() - began < 6.5
        assert f.run("db.get(b'k')") == p.run("db.get(b'k')") == b"1"
        subprocess.run(["ip", "netns", "exec", blocked, "nft", "flush ruleset"], check=True)
        p.run("exec('while db.status().not_writable: time.sleep(0.01)')", 40)
        position = p.run("db.put(b'k', b'3')")
        f.run(f"db.wait_for(kvrep.Position(*{tuple(position)}), 10)")
        assert f.run("db.get(b'k')") == b"3"
