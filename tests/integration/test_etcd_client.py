"""The thin etcd client against a real etcd."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvrep.errors import ClosedError, PeerUnavailable, ReplicationError
from kvrep.transport.etcd import Compacted, EtcdClient, LeaseExpired
from tests.etcd_kit import EtcdServer


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        threading.Event().wait(0.005)


@pytest.fixture
def client(shared_etcd: EtcdServer) -> Iterator[EtcdClient]:
    before = set(threading.enumerate())
    client = EtcdClient([shared_etcd.endpoint], name="test", timeout_s=5.0)
    yield client
    client.close()
    until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("kvrep")])


@pytest.fixture
def key() -> str:
    return f"/test/{uuid.uuid4().hex}"


def test_keys(client: EtcdClient, key: str) -> None:
    """What is put is read again, alone and by prefix; revisions grow."""
    nothing, revision = client.get(key)
    assert nothing is None
    assert client.put(key + "/b", b"2") > revision
    client.put(key + "/a", b"\x00\xff")
    found, _ = client.get(key + "/a")
    assert found is not None
    assert (found.key, found.value, found.lease) == (key + "/a", b"\x00\xff", 0)
    found_all = {k.key: k.value for k in client.get_prefix(key)}
    assert found_all == {key + "/a": b"\x00\xff", key + "/b": b"2"}
    assert len(client.get_prefix(key, limit=1)) == 1


def test_one_creates(client: EtcdClient, key: str) -> None:
    """Of several that create a key at once exactly one succeeds, and all see its value."""
    results: list[tuple[bool, bytes]] = []

    def create(value: bytes) -> None:
        taken, there = client.create(key, value)
        results.append((taken, there.value))

    threads = [threading.Thread(target=create, args=(b"%d" % i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sum(taken for taken, _ in results) == 1
    assert len({value for _, value in results}) == 1


def test_compare_and_swap(client: EtcdClient, key: str) -> None:
    """A key is replaced or deleted only if it is still as it was read."""
    _, first = client.create(key, b"1")
    assert client.replace(key, b"2", first)
    assert not client.replace(key, b"3", first)
    assert not client.delete(key, first)
    second, _ = client.get(key)
    assert second is not None
    assert second.value == b"2"
    assert client.delete(key, second)
    assert client.get(key)[0] is None


def test_a_lease_takes_its_keys_with_it(client: EtcdClient, key: str) -> None:
    """Kept alive it stays; revoked, its keys are gone at once, and it cannot be used or kept any more."""
    lease = client.grant(30)
    assert lease.ttl_s >= 30
    taken, there = client.create(key, b"v", lease.id)
    assert taken
    assert there.lease == lease.id
    assert client.keep_alive(lease.id) >= 30
    client.revoke(lease.id)
    assert client.get(key)[0] is None
    with pytest.raises(LeaseExpired):
        client.keep_alive(lease.id)
    with pytest.raises(LeaseExpired):
        client.put(key, b"v", lease.id)
    client.revoke(lease.id)


def test_watch(client: EtcdClient, key: str) -> None:
    """A watch returns when the key changes, also if it had changed before, and else at its deadline."""
    revision = client.put(key, b"1")
    assert not client.wait_for_change(key, revision, 0.1)
    seen: list[float] = []
    watching = threading.Thread(
        target=lambda: seen.append(time.monotonic()) if client.wait_for_change(key, revision, 10) else None
    )
    watching.start()
    until(lambda: client._watches)
    changed = time.monotonic()
    client.put(key, b"2")
    watching.join(10)
    assert len(seen) == 1
    assert seen[0] - changed < 5
    assert client.wait_for_change(key, revision, 10)


def test_a_deleted_key_is_a_change(client: EtcdClient, key: str) -> None:
    """A watch sees the end of a lease."""
    lease = client.grant(30)
    _, there = client.create(key, b"v", lease.id)
    client.revoke(lease.id)
    assert client.wait_for_change(key, there.mod_revision, 10)


def test_closing_ends_a_watch(shared_etcd: EtcdServer, key: str) -> None:
    """A blocked watch raises when the client is closed, and so does every later call."""
    client = EtcdClient([shared_etcd.endpoint], name="test")
    errors: list[Exception] = []

    def watch() -> None:
        try:
            client.wait_for_change(key, 1 << 40, 30)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    until(lambda: client._watches)
    client.close()
    thread.join(10)
    assert [type(e) for e in errors] == [ClosedError]
    with pytest.raises(ClosedError):
        client.get(key)
    client.close()


def test_another_endpoint_takes_over(shared_etcd: EtcdServer, key: str) -> None:
    """A dead endpoint costs a moment once; later calls go to the one that answers."""
    client = EtcdClient(["127.0.0.1:1", shared_etcd.endpoint], name="test", timeout_s=5.0)
    try:
        client.put(key, b"v")
        began = time.monotonic()
        for _ in range(20):
            client.get(key)
        assert time.monotonic() - began < 5.0
    finally:
        client.close()


def test_no_etcd(key: str) -> None:
    """With nobody there a call fails in time and says where it looked."""
    client = EtcdClient(["127.0.0.1:1"], name="test", timeout_s=2.0)
    try:
        with pytest.raises(PeerUnavailable, match=r"127\.0\.0\.1:1"):
            client.get(key)
        with pytest.raises(PeerUnavailable):
            client.keep_alive(1)
        with pytest.raises(PeerUnavailable):
            client.wait_for_change(key, 0, 5.0)
    finally:
        client.close()


def test_bad_endpoints() -> None:
    """Endpoints are checked before anything is connected."""
    for bad in ([], ["nowhere"], ["host:99999"], ["http://host:2379"]):
        with pytest.raises(ValueError, match=r"etcd needs|not an address"):
            EtcdClient(bad, name="test")


def test_a_frozen_etcd_and_its_return(etcd_server: EtcdServer, key: str) -> None:
    """A call to a frozen etcd ends at its deadline; after the thaw, and after a restart, all works again."""
    client = EtcdClient([etcd_server.endpoint], name="test", timeout_s=0.5)
    try:
        client.put(key, b"1")
        etcd_server.freeze()
        began = time.monotonic()
        with pytest.raises(PeerUnavailable, match="in time"):
            client.get(key)
        assert time.monotonic() - began < 5.0
        etcd_server.thaw()
        until(lambda: _value(client, key) == b"1")
        etcd_server.stop()
        with pytest.raises(PeerUnavailable):
            client.get(key)
        etcd_server.start()
        until(lambda: _value(client, key) == b"1")
    finally:
        client.close()


def _value(client: EtcdClient, key: str) -> bytes | None:
    try:
        found, _ = client.get(key)
    except ReplicationError:
        return None
    return found.value if found is not None else None


def test_a_compacted_revision(etcd_server: EtcdServer, key: str) -> None:
    """Watching from a revision that etcd has forgotten says so, so that the caller reads the key again."""
    import grpc

    client = EtcdClient([etcd_server.endpoint], name="test")
    try:
        first = client.put(key, b"1")
        last = client.put(key, b"2")
        with grpc.insecure_channel(etcd_server.endpoint) as channel:
            # CompactionRequest{revision = 1: last}; our own client never compacts.
            compact: Any = channel.unary_unary("/etcdserverpb.KV/Compact")
            compact(b"\x08" + bytes([last]), timeout=5)
        with pytest.raises(Compacted):
            client.wait_for_change(key, first - 1, 5.0)
    finally:
        client.close()
