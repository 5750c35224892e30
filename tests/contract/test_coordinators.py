"""What every coordinator promises, and what the automatic ones do, on nodes without storage."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from kvrep.coordination import make_coordinator
from kvrep.coordination.interface import Coordinator
from kvrep.coordination.memory import MemoryDisk, MemoryNode
from kvrep.coordinators import CoordinatorChoice, Etcd, Quorum
from kvrep.errors import ClosedError, ConfigurationMismatch, ProtocolError, StorageFailed
from kvrep.model.configuration import Configuration
from kvrep.model.position import Position
from kvrep.replication.ballots import Answer, PrimarySeen, PromiseReply, PromiseRequest, Question
from kvrep.replication.election import WhyGone
from kvrep.runtime.voting import ManualCoordinator
from kvrep.transport.interface import Transport
from kvrep.transport.memory import MemoryTransport
from kvrep.transport.network import GrpcTransport
from tests.etcd_kit import EtcdServer

WAIT_S = 20.0
LINEAGE = b"L" * 16
KINDS = ["manual", "quorum", "etcd"]


def until(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        threading.Event().wait(0.005)


class Group:
    """Nodes with coordinators of one kind, stopped at the end of the test."""

    def __init__(self, kind: str, transport: Transport, endpoint: str = "") -> None:
        self.kind = kind
        self.transport = transport
        self.endpoint = endpoint
        self.cluster = uuid.uuid4().hex
        self.timeout_s = 1.0
        self.nodes: dict[str, MemoryNode] = {}
        self.peers: dict[str, str] = {}
        self._down: set[str] = set()

    def coordinator(self, witness: bool = False) -> Coordinator:
        """As a node gets it: by hand where nothing was chosen."""
        return ManualCoordinator() if self.kind == "manual" else make_coordinator(self.choice(witness))

    def choice(self, witness: bool = False) -> CoordinatorChoice:
        if self.kind == "etcd":
            return Etcd(endpoints=[self.endpoint], cluster=self.cluster, ttl_s=2)
        return Quorum(peers=self.peers or {"a": "127.0.0.1:1"}, witness=witness, timeout_s=self.timeout_s)

    def reserve(self, names: str) -> None:
        """Ports for nodes, so that all can be given the same list."""
        for name in names:
            server = self.transport.serve(_Nothing(), "127.0.0.1:0", name=name)
            self.peers[name] = server.start()
            server.stop()

    def add(self, name: str, disk: MemoryDisk | None = None, *, witness: bool = False) -> MemoryNode:
        node = MemoryNode(
            name,
            self.transport,
            self.coordinator(witness),
            disk=disk,
            listen=self.peers.get(name, "127.0.0.1:0"),
        )
        self.nodes[name] = node
        self._down.discard(name)
        node.start()
        return node

    def form(self, names: str) -> MemoryNode:
        """A group with all of them as voters; returns its primary."""
        if self.kind == "quorum":
            self.reserve(names)
        for name in names:
            self.add(name, witness=name.isupper())
        until(self.primary)
        primary = self.primary()
        assert primary is not None
        others = [n for n in self.nodes.values() if n is not primary]
        until(lambda: all(n.disk.lineage == primary.disk.lineage for n in others))
        if self.kind == "etcd":
            primary.admit(*others)
        return primary

    def living(self) -> list[MemoryNode]:
        return [n for name, n in self.nodes.items() if name not in self._down]

    def primary(self) -> MemoryNode | None:
        """The primary, once it is confirmed and all others follow it."""
        found = [n for n in self.living() if n.standing().primary_epoch]
        if len(found) != 1 or found[0].coordinator.confirmed_until < time.monotonic():
            return None
        return found[0]

    def kill(self, node: MemoryNode) -> None:
        """As near to SIGKILL as one process allows: first nobody listens, then the rest ends unheard."""
        self._down.add(node.name)
        node.stop_listening()
        node.primary_epoch = 0
        node.coordinator.stop()

    def stop(self) -> None:
        for node in self.living():
            node.coordinator.stop()
        for node in self.living():
            node.stop()


class _Nothing:
    """A service that answers nothing."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(name)


@pytest.fixture(params=KINDS)
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    yield from _group(request, request.param)


@pytest.fixture(params=["quorum", "quorum over gRPC", "etcd"])
def automatic(request: pytest.FixtureRequest) -> Iterator[Group]:
    yield from _group(request, request.param)


def _group(request: pytest.FixtureRequest, kind: str) -> Iterator[Group]:
    endpoint = request.getfixturevalue("shared_etcd").endpoint if kind == "etcd" else ""
    transport: Transport = GrpcTransport() if "gRPC" in kind else MemoryTransport()
    group = Group(kind.partition(" ")[0], transport, endpoint)
    yield group
    group.stop()


def disk_of_three() -> MemoryDisk:
    """A voter of a group whose others are away."""
    disk = MemoryDisk(store_id=b"a" * 16, lineage=LINEAGE, epochs=(1001,), promised=1001)
    rule = Configuration(acks="majority")
    for letter in b"abc":
        rule = rule.with_voter(bytes([letter]) * 16, chr(letter), "127.0.0.1:1")
    disk.rules = (rule,)
    return disk


def request_of(epoch: int, lineage: bytes = LINEAGE, *, planned: bool = True) -> dict[str, object]:
    return PromiseRequest(
        epoch=epoch, store_id=b"b" * 16, name="b", address="", lineage=lineage, planned=planned
    ).to_wire()


QUESTION = Question(
    purpose="stand", store_id=b"b" * 16, name="b", address="", lineage=LINEAGE, last=Position(1001, 1)
)


# -- every coordinator ---------------------------------------------------------------------------


def test_it_answers_where_the_node_stands(group: Group) -> None:
    """A question is answered with what the node holds, and changes nothing."""
    node = group.add("a", disk_of_three())
    answer = Answer.from_wire(node.coordinator.call("ask", QUESTION.to_wire()))
    assert (answer.store_id, answer.name, answer.lineage) == (b"a" * 16, "a", LINEAGE)
    assert answer.last == Position(1001, 1)
    assert answer.would
    assert answer.alive is None
    assert node.disk.promised == 1001


def test_a_promise_is_stored_before_it_is_answered(group: Group) -> None:
    """It binds to one store and one epoch; a lower one is refused, and a repeat is answered alike."""
    node = group.add("a", disk_of_three())
    call = node.coordinator.call
    first = PromiseReply.from_wire(call("vote", request_of(5002)))
    assert first.promise is not None
    assert first.promise.epoch == node.disk.promised == 5002
    assert first.promise.last == Position(1001, 1)
    assert PromiseReply.from_wire(call("vote", request_of(5002))).promise == first.promise
    lower = PromiseReply.from_wire(call("vote", request_of(4003)))
    assert lower.promise is None
    assert lower.promised_epoch == 5002
    assert "5002" in lower.refused


def test_a_promise_that_cannot_be_stored_is_not_answered(group: Group) -> None:
    """The caller gets an error in place of a reply, and may not count this voter."""
    node = group.add("a", disk_of_three())
    node.disk.broken = True
    with pytest.raises(StorageFailed):
        node.coordinator.call("vote", request_of(5002))
    assert node.disk.promised == 1001


def test_a_copy_that_is_not_whole_promises_nothing(group: Group) -> None:
    """What such a node promised would say nothing about what it had stored."""
    node = group.add("a", disk_of_three())
    node.able = False
    node.coordinator.changed()
    reply = PromiseReply.from_wire(node.coordinator.call("vote", request_of(5002)))
    assert reply.promise is None
    assert "not whole" in reply.refused
    assert not Answer.from_wire(node.coordinator.call("ask", QUESTION.to_wire())).would


def test_other_groups_are_refused(group: Group) -> None:
    """A node of another lineage gets no promise and no vote."""
    node = group.add("a", disk_of_three())
    reply = PromiseReply.from_wire(node.coordinator.call("vote", request_of(5002, b"M" * 16)))
    assert reply.promise is None
    assert "another group" in reply.refused


def test_bad_calls_are_refused_by_name(group: Group) -> None:
    """What a peer sends is checked before it is looked at."""
    node = group.add("a", disk_of_three())
    for method, request in (
        ("ask", {}),
        ("ask", {**QUESTION.to_wire(), "purpose": "obey"}),
        ("vote", {**request_of(5002), "epoch": -1}),
        ("vote", {**request_of(5002), "id": "text"}),
        ("reign", {}),
    ):
        with pytest.raises(ProtocolError):
            node.coordinator.call(method, request)


def test_events_and_status_at_any_time(group: Group) -> None:
    """Before the start, while it runs and after the stop, what a node tells its coordinator is harmless."""
    coordinator = group.coordinator()
    seen = PrimarySeen(store_id=b"b" * 16, name="b", address="127.0.0.1:1", epoch=2002)
    coordinator.heard_from_primary(seen)
    node = group.add("a", disk_of_three())
    node.coordinator.heard_from_primary(seen)
    assert node.coordinator.status().primary == seen
    assert node.coordinator.status().kind == group.kind
    node.coordinator.connection_lost(WhyGone.BROKEN)
    node.coordinator.changed()
    node.coordinator.stop()
    node.coordinator.stop()
    node.coordinator.heard_from_primary(seen)
    with pytest.raises(ClosedError):
        node.coordinator.call("ask", QUESTION.to_wire())


def test_a_living_primary_is_not_deposed(group: Group) -> None:
    """Whoever has just heard of the primary promises nobody else, unless it is planned."""
    node = group.add("a", disk_of_three())
    seen = PrimarySeen(store_id=b"c" * 16, name="c", address="127.0.0.1:1", epoch=2003)
    node.coordinator.heard_from_primary(seen)
    answer = Answer.from_wire(node.coordinator.call("ask", QUESTION.to_wire()))
    assert not answer.would
    assert answer.alive == seen
    reply = PromiseReply.from_wire(node.coordinator.call("vote", request_of(5002, planned=False)))
    assert reply.promise is None
    assert PromiseReply.from_wire(node.coordinator.call("vote", request_of(5002))).promise is not None


def test_a_primary_that_promises_steps_down(group: Group) -> None:
    """A planned promise to another node ends being primary, and the node is told."""
    node = group.add("a", disk_of_three())
    node.disk.promised_to, node.primary_epoch = node.disk.store_id, 1001
    node.coordinator.changed()
    assert PromiseReply.from_wire(node.coordinator.call("vote", request_of(5002))).promise is not None
    until(lambda: any(did.startswith("step down") for did in node.history))
    assert node.primary_epoch == 0


def test_manual_does_nothing_by_itself() -> None:
    """No thread, no call, no limit to how long a primary may acknowledge."""
    group = Group("manual", MemoryTransport())
    before = threading.active_count()
    node = group.add("a", disk_of_three())
    assert threading.active_count() == before
    assert node.coordinator.confirmed_until == float("inf")
    assert node.history == []
    group.stop()


# -- the automatic ones ---------------------------------------------------------------------------


def test_a_group_is_formed_and_fails_over(automatic: Group) -> None:
    """Started empty together, one becomes primary; when it dies another does, in a higher epoch."""
    first = automatic.form("abc")
    epoch = first.primary_epoch
    assert all(len(n.disk.rules[-1].voters) == 3 for n in automatic.nodes.values())
    automatic.kill(first)
    until(automatic.primary)
    second = automatic.primary()
    assert second is not None
    assert second is not first
    assert second.primary_epoch > epoch
    again = automatic.add(first.name, first.disk)
    until(lambda: again.following is not None and again.following.epoch == second.primary_epoch)


@pytest.mark.parametrize("transport", [MemoryTransport, GrpcTransport])
def test_a_broken_connection_needs_no_timeout(transport: Callable[[], Transport]) -> None:
    """The stream breaks, the port refuses: another is primary long before the limit."""
    group = Group("quorum", transport())
    group.timeout_s = 30.0
    try:
        first = group.form("abc")
        until(lambda: all(n is first or n.following for n in group.living()))
        group._down.add(first.name)
        first.stop_listening()
        began = time.monotonic()
        for node in group.living():
            node.coordinator.connection_lost(WhyGone.BROKEN)
        until(lambda: any(n.standing().primary_epoch for n in group.living()))
        assert time.monotonic() - began < 15.0
        first.coordinator.stop()
    finally:
        group.stop()


def test_a_primary_that_closes_says_so(automatic: Group) -> None:
    """Nobody waits for a timeout when the primary ends in order."""
    first = automatic.form("abc")
    automatic._down.add(first.name)
    first.stop()
    until(automatic.primary)
    assert automatic.primary() is not first


def test_a_primary_without_its_group_steps_down(automatic: Group) -> None:
    """Alone among three it may not go on, whatever else says so."""
    first = automatic.form("abc")
    for node in [n for n in automatic.living() if n is not first]:
        automatic.kill(node)
    until(lambda: first.primary_epoch == 0)
    assert first.coordinator.confirmed_until < time.monotonic() + 1.0
    assert first.coordinator.status().problem


def test_a_broken_disk_ends_being_primary(automatic: Group) -> None:
    """A primary that cannot store any more leaves its place to another."""
    first = automatic.form("abc")
    first.able = False
    first.coordinator.changed()
    until(lambda: (p := automatic.primary()) is not None and p is not first)


def test_two_nodes_and_a_witness() -> None:
    """The witness votes, keeps no data and never becomes primary."""
    group = Group("quorum", MemoryTransport())
    try:
        first = group.form("abW")
        witness = group.nodes["W"]
        assert not first.coordinator.witness
        group.kill(first)
        until(group.primary)
        second = group.primary()
        assert second is not None
        assert second.name == ({"a", "b"} - {first.name}).pop()
        assert witness.disk.promised == second.primary_epoch
        assert witness.disk.epochs == ()
        assert not any(did.startswith("primary") for did in witness.history)
    finally:
        group.stop()


def test_options_are_checked() -> None:
    """A setting that is not understood stops the start, and says which."""
    for bad, option in (
        (lambda: Quorum(peers={}), "peers"),
        (lambda: Quorum(peers={"a": 1}), "peers"),  # type: ignore[dict-item]
        (lambda: Quorum(peers={"a": "h:1"}, timeout_s=0.5), "timeout_s"),
        (lambda: Quorum(peers={"a": "h:1"}, priority=10_000), "priority"),
        (lambda: Etcd(endpoints="h:1", cluster="c"), "endpoints"),
        (lambda: Etcd(endpoints=["h:1"], cluster="a/b"), "cluster"),
        (lambda: Etcd(endpoints=["h:1"], cluster="c", ttl_s=0), "ttl_s"),
    ):
        with pytest.raises(ConfigurationMismatch, match=option):
            bad()


# -- etcd ------------------------------------------------------------------------------------------


@pytest.fixture
def own_etcd(etcd_server: EtcdServer) -> Iterator[tuple[Group, EtcdServer]]:
    group = Group("etcd", MemoryTransport(), etcd_server.endpoint)
    yield group, etcd_server
    group.stop()


def test_etcd_is_the_third_vote_of_two(own_etcd: tuple[Group, EtcdServer]) -> None:
    """Of two data nodes with acks=1 either goes on alone, as long as etcd has given it the key."""
    group, _ = own_etcd
    first = group.add("a")
    until(group.primary)
    second = group.add("b")
    until(lambda: second.disk.lineage)
    first.acks = 1
    first.admit(second)
    group.kill(first)
    until(group.primary)
    assert group.primary() is second


def test_a_primary_goes_on_without_etcd(own_etcd: tuple[Group, EtcdServer]) -> None:
    """Confirmed by most voters it stays primary beyond its lease, and takes the key again afterwards."""
    group, server = own_etcd
    first = group.form("abc")
    epoch = first.primary_epoch
    coordinator = first.coordinator
    until(lambda: coordinator._held is not None)  # type: ignore[attr-defined]
    server.stop()
    until(lambda: coordinator._held is None)  # type: ignore[attr-defined]
    assert group.primary() is first
    server.start()
    until(lambda: coordinator._held is not None)  # type: ignore[attr-defined]
    assert group.primary() is first
    assert first.primary_epoch == epoch


def test_nobody_is_elected_without_etcd(own_etcd: tuple[Group, EtcdServer]) -> None:
    """With etcd away and the primary dead there is no primary, until etcd is back."""
    group, server = own_etcd
    first = group.form("abc")
    server.stop()
    group.kill(first)
    until(lambda: all("key" in n.coordinator.status().problem for n in group.living()))
    assert not any(n.primary_epoch for n in group.living())
    server.start()
    until(group.primary)


def test_a_frozen_etcd_changes_nothing(own_etcd: tuple[Group, EtcdServer]) -> None:
    """Frozen for longer than the lease: the primary and its epoch stay."""
    group, server = own_etcd
    first = group.form("abc")
    epoch = first.primary_epoch
    coordinator = first.coordinator
    until(lambda: coordinator._held is not None)  # type: ignore[attr-defined]
    server.freeze()
    until(lambda: coordinator._held is None)  # type: ignore[attr-defined]
    server.thaw()
    until(lambda: coordinator._held is not None)  # type: ignore[attr-defined]
    assert first.primary_epoch == epoch


def test_an_empty_node_waits_for_the_group_that_etcd_knows(own_etcd: tuple[Group, EtcdServer]) -> None:
    """A group begun by a node that is away is not begun again by another."""
    group, _ = own_etcd
    first = group.add("a")
    until(group.primary)
    group.kill(first)
    late = group.add("b")
    until(lambda: "a" in group.nodes["b"].coordinator.status().problem)
    assert not late.primary_epoch
    assert not late.disk.lineage
    again = group.add("a", first.disk)
    until(lambda: late.disk.lineage == again.disk.lineage)
