"""A store behind a message broker: replayed exactly, promoted by force, and never fooled."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgpack
import pytest

import kvrep
from kvrep import brokers
from kvrep.brokers.memory import Faults, MemoryBrokers, MemoryServer
from kvrep.model.position import OFFSET_MAX
from kvrep.transport.interface import SnapshotInfo, SnapshotRequest
from kvrep.transport.network import GrpcTransport
from tests.broker_kit import make_site
from tests.relay_kit import far, publishing
from tests.replication_kit import FAST, WAIT_S, same, until, voters, writable


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryBrokers:
    """Brokers in memory that every store and relay of the test finds."""
    made = MemoryBrokers(seed=7)
    monkeypatch.setattr(brokers, "connect", made.connect)
    return made


@pytest.fixture
def server(memory: MemoryBrokers) -> MemoryServer:
    return memory["site"]


KINDS = ("log", "queue")
URL = "memory://site/orders?kind="


@pytest.mark.parametrize("kind", ["rabbitmq-queue", "rabbitmq-stream", "kafka"])
def test_a_far_store_over_a_real_broker(kind: str, request: pytest.FixtureRequest, memory_path: Path) -> None:
    """Records arrive under the same positions, over a restart of both ends, and the far site takes over."""
    site = make_site(kind, request)
    url = site.url()
    state = memory_path / "state"
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with (
            publishing(primary, url, name="far", state=state) as relay,
            far(memory_path / "f", url, **FAST) as f,
        ):
            for i in range(200):
                position = primary.put(b"key-%d" % (i % 50), b"value-%d" % i)
            f.wait_for(position, 20)
            same(primary, f)
            relay.caught_up(primary)
            until(lambda: relay.relay.status().lag_records == 0)
        for i in range(100):
            primary.put(b"later-%d" % i, b"x" * 20_000)
        with publishing(primary, url, name="far", state=state) as relay:
            position = primary.put(b"last", b"one")
            relay.caught_up(primary)
        with far(memory_path / "f", url, **FAST) as f:
            f.wait_for(position, 20)
            assert f.status().position == position
            assert list(f.scan()) == list(primary.scan())
            assert "far" not in primary.status().voters
    with far(memory_path / "f", url, **FAST) as f:
        f.promote(force=True)
        writable(f)
        assert f.get(b"last") == b"one"
        assert f.put(b"written", b"here").offset > position.offset
    site.close()


@pytest.mark.parametrize("kind", KINDS)
def test_faults_of_the_transport(
    kind: str, memory: MemoryBrokers, server: MemoryServer, memory_path: Path
) -> None:
    """Repeated, overtaking and late messages change nothing in what the far store holds."""
    server.faults = Faults(duplicate=0.3, reorder=0.3, delay=0.1)
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with publishing(primary, URL + kind), far(memory_path / "f", URL + kind, **FAST) as f:
            for i in range(300):
                position = primary.put(b"key-%d" % i, b"value-%d" % i)
            f.wait_for(position, 20)
            same(primary, f)


def test_a_lost_message_is_told_and_healed_by_a_snapshot(
    memory: MemoryBrokers, server: MemoryServer, memory_path: Path
) -> None:
    """A record that never comes is named in the status, and a published snapshot bridges the gap."""
    url = URL + "queue&park_s=0.2"
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with publishing(primary, URL + "queue") as relay, far(memory_path / "f", url, **FAST) as f:
            f.wait_for(primary.put(b"a", b"1"), 20)
            server.faults = Faults(drop=1.0)
            primary.put(b"b", b"2")
            relay.caught_up(primary)
            server.faults = Faults()
            missing = primary.status().committed_offset
            position = primary.put(b"c", b"3")
            until(
                lambda: f"records {missing} to {missing} have not come" in (f.status().source.problem or "")
            )
            primary.flush()
            with publishing(primary, URL + "queue", snapshot=True):
                f.wait_for(position, 20)
            same(primary, f)


@pytest.mark.parametrize("role", ["primary", "follower"])
def test_a_lost_message_is_healed_from_a_node(
    role: str, memory: MemoryBrokers, server: MemoryServer, memory_path: Path
) -> None:
    """With the address of a node, whatever its role, the follower fetches a copy by itself when a record never
    comes. A follower that gives one keeps nothing of it."""
    with (
        kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary,
        kvrep.open(
            memory_path / "g", listen="127.0.0.1:0", follow=primary.address, voter=False, **FAST
        ) as other,
    ):
        giver = primary if role == "primary" else other
        url = f"{URL}queue&park_s=0.2&bootstrap={giver.address}"
        with publishing(primary, URL + "queue") as relay, far(memory_path / "f", url, **FAST) as f:
            f.wait_for(primary.put(b"a", b"1"), 20)
            server.faults = Faults(drop=1.0)
            primary.put(b"b", b"2")
            relay.caught_up(primary)
            server.faults = Faults()
            other.wait_for(primary.position, 20)
            giver.flush()
            position = primary.put(b"c", b"3")
            f.wait_for(position, 20)
            same(primary, f)
            if role == "follower":
                until(lambda: not list((memory_path / "g").glob("spool/*")), what="the copy is gone")


def test_a_copy_of_a_follower_is_for_those_who_ask_for_one(memory_path: Path) -> None:
    """Whoever goes on to follow gets its copy from the primary, which keeps the log for it; a copy of a follower
    leaves nobody with a vote for what it may lack."""
    with (
        kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary,
        kvrep.open(memory_path / "g", listen="127.0.0.1:0", follow=primary.address, voter=False, **FAST) as g,
        closing(GrpcTransport().connect(g.address, name="x")) as connection,
    ):
        g.wait_for(primary.put(b"a", b"1"), 20)
        with pytest.raises(kvrep.NotPrimary) as caught:
            next(connection.snapshot(SnapshotRequest(store_id=b"x" * 16, name="x"), 5.0))
        assert caught.value.primary_address == primary.address
        with closing(
            connection.snapshot(SnapshotRequest(store_id=b"x" * 16, name="x", of_follower=True), 5.0)
        ) as items:
            info = next(items)
            assert isinstance(info, SnapshotInfo)
            assert msgpack.unpackb(info.meta)["last"] == OFFSET_MAX
            assert sum(len(item.data) for item in items) == info.bytes_total
        assert "x" not in [f.name for f in primary.status().followers]
        until(lambda: not list((memory_path / "g").glob("spool/*")), what="the copy is gone")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trimmed_log_begins_with_a_snapshot(
    kind: str, memory: MemoryBrokers, server: MemoryServer, memory_path: Path
) -> None:
    """Where the first records are gone, a copy of everything goes through the broker first."""
    options = {"log_file_bytes": 1 << 16, "retention_bytes": 1 << 16, "flush_interval_s": 0.1, **FAST}
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **options) as primary:
        for i in range(400):
            primary.put(b"key-%d" % i, b"v" * 3000)

        def trimmed() -> bool:
            primary.flush()
            primary.put(b"more", b"x")
            return primary.status().first_offset > 1

        until(trimmed)
        with publishing(primary, URL + kind) as relay, far(memory_path / "f", URL + kind, **FAST) as f:
            position = primary.put(b"last", b"one")
            f.wait_for(position, 20)
            same(primary, f)
            assert relay.relay.status().snapshots == 1
        with far(memory_path / "g", URL + kind, name="g", **FAST) as g:
            if kind == "log":  # another follower finds the snapshot there, too
                g.wait_for(position, 20)
                same(primary, g)


def test_large_records_and_transactions(memory: MemoryBrokers, memory_path: Path) -> None:
    """A record above the size of a message travels in parts."""
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with publishing(primary, URL + "log"), far(memory_path / "f", URL + "log", **FAST) as f:
            primary.put(b"large", b"x" * (5 << 20))
            with primary.batch() as batch:
                for i in range(1000):
                    batch.put(b"key-%d" % i, b"y" * 2000)
            position = primary.put(b"small", b"z")
            f.wait_for(position, 20)
            same(primary, f)


def test_a_superseded_publisher_is_recognised(memory: MemoryBrokers, memory_path: Path) -> None:
    """After a failover, what the publisher of the old primary still sends is dropped."""
    url = URL + "log"
    with (
        kvrep.open(memory_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as a,
        kvrep.open(memory_path / "b", name="b", listen="127.0.0.1:0", follow=a.address, **FAST) as b,
    ):
        voters(a, "a", "b")
        with (
            publishing([a.address, b.address], url, name="far") as relay,
            far(memory_path / "f", url, **FAST) as f,
        ):
            f.wait_for(a.put(b"one", b"1"), 20)
            a.switchover(to="b")
            position = writable(b).put(b"two", b"2")
            f.wait_for(position, 20)
            same(b, f)
            link = next(iter(f._node.replaying._links.values()))
            old = memory["site"].topic("orders", queue=False).log[0]
            memory["site"].topic("orders", queue=False).store(old)
            until(lambda: link.superseded == 1, what="a message of the old epoch")
            assert relay.relay.status().source_last >= position.offset
            f.wait_for(b.put(b"three", b"3"), 20)
            same(b, f)


def test_mangled_messages_are_dropped(memory: MemoryBrokers, memory_path: Path) -> None:
    """Messages that are not ours, or damaged, are counted and dropped; the stream goes on."""
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with publishing(primary, URL + "log"), far(memory_path / "f", URL + "log", **FAST) as f:
            f.wait_for(primary.put(b"a", b"1"), 20)
            topic = memory["site"].topic("orders", queue=False)
            damaged = bytearray(topic.log[0].body)
            damaged[len(damaged) // 2] ^= 1
            for body in (b"", b"kvr", b"hello", bytes(damaged), topic.log[0].body[:-1]):
                topic.store(brokers.Message(body))
            link = next(iter(f._node.replaying._links.values()))
            f.wait_for(primary.put(b"b", b"2"), 20)
            until(lambda: link.mangled == 5, what="five dropped messages")
            same(primary, f)


def test_another_stores_messages_are_refused(memory: MemoryBrokers, memory_path: Path) -> None:
    """A follower that holds one store refuses the records of another, by name."""
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with publishing(primary, URL + "log"), far(memory_path / "f", URL + "log", **FAST) as f:
            f.wait_for(primary.put(b"a", b"1"), 20)
    with kvrep.open(memory_path / "q", name="q", listen="127.0.0.1:0", **FAST) as other:
        other.put(b"x", b"y")
        with (
            publishing(other, "memory://site/others"),
            far(memory_path / "f", "memory://site/others", **FAST) as f,
        ):
            until(lambda: "another store" in (f.status().source.problem or ""))
            assert f.get(b"a") == b"1"
            assert b"x" not in f


def test_options_of_another_rule_are_refused(memory: MemoryBrokers, memory_path: Path) -> None:
    """Nobody can be asked behind a broker: the far store stops when it has what its group goes by."""
    with kvrep.open(memory_path / "a", name="a", listen="127.0.0.1:0", acks=0, **FAST) as a:
        with publishing(a, URL + "log"), far(memory_path / "far", URL + "log", acks=1) as store:
            last = a.put(b"k", b"v")
            with pytest.raises(kvrep.ConfigurationMismatch):
                store.wait_for(kvrep.Position(last.epoch, last.offset + 100), WAIT_S)
            source = store.status().source
            assert source is not None
            assert source.state == "refused"


def test_an_outage_of_the_broker(memory: MemoryBrokers, server: MemoryServer, memory_path: Path) -> None:
    """While the broker is away writes go on, and afterwards the far store has all of them."""
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with publishing(primary, URL + "log"), far(memory_path / "f", URL + "log", **FAST) as f:
            f.wait_for(primary.put(b"a", b"1"), 20)
            server.stop()
            for i in range(100):
                position = primary.put(b"key-%d" % i, b"v")
            server.start()
            f.wait_for(position, 20)
            same(primary, f)


def test_a_follower_changes_its_source(memory: MemoryBrokers, memory_path: Path) -> None:
    """A follower of a node goes on behind a broker, and back."""
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with (
            publishing(primary, URL + "log"),
            kvrep.open(memory_path / "f", name="f", follow=primary.address, voter=False, **FAST) as f,
        ):
            f.wait_for(primary.put(b"a", b"1"), 20)
            f.follow(URL + "log")
            until(lambda: (f.status().source.address or "").startswith("memory://"))
            f.wait_for(primary.put(b"b", b"2"), 20)
            f.follow(primary.address)
            until(lambda: f.status().source.address == primary.address)
            f.wait_for(primary.put(b"c", b"3"), 20)
            same(primary, f)


def test_a_relay_whose_broker_is_full(memory: MemoryBrokers, server: MemoryServer, memory_path: Path) -> None:
    """While a broker takes nothing, the relay holds no more than its credit and says so; then all arrives."""
    with kvrep.open(memory_path / "p", name="p", listen="127.0.0.1:0", **FAST) as primary:
        with publishing(primary, URL + "log") as relay, far(memory_path / "f", URL + "log", **FAST) as f:
            f.wait_for(primary.put(b"a", b"1"), 20)
            server.block()
            for i in range(40):
                position = primary.put(b"key-%d" % i, b"x" * 1_000_000)
            until(lambda: relay.publisher.status().buffered_bytes > 6 << 20)
            assert relay.relay.status().broker == "blocked"
            assert relay.publisher.status().buffered_bytes <= 10 << 20
            server.unblock()
            f.wait_for(position, 40)
            same(primary, f)


def test_only_the_horizon_is_published(memory: MemoryBrokers, memory_path: Path) -> None:
    """With ``acks=0`` what a voter does not hold yet could be taken back, and is not published."""
    with kvrep.open(memory_path / "a", name="a", listen="127.0.0.1:0", **FAST) as a:
        b = kvrep.open(memory_path / "b", name="b", listen="127.0.0.1:0", follow=a.address, **FAST)
        voters(a, "a", "b")
        with publishing(a, URL + "log") as relay:
            relay.caught_up(a)
            b.close()
            before = relay.relay.published.offset
            position = a.put(b"not", b"safe")
            until(lambda: relay.relay.status().source_last >= position.offset)
            assert relay.relay.published.offset == before
            with kvrep.open(memory_path / "b", name="b", listen="127.0.0.1:0", follow=a.address, **FAST):
                relay.caught_up(a)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("amqp://127.0.0.1:99999/", "not a host and port"),
        ("carrier-pigeon://loft/", "no broker is known"),
        ("kafka:///topic", "not a Kafka address"),
        ("amqp://127.0.0.1/?colour=red", "no option 'colour'"),
        ("memory://x/?bootstrap=nowhere", "port is missing"),
    ],
)
def test_addresses_that_are_none(url: str, problem: str, store_path: Path) -> None:
    """An address that cannot be followed stops the open, and says why."""
    with pytest.raises(kvrep.OpenError, match=problem):
        kvrep.open(store_path, name="f", follow=url)
