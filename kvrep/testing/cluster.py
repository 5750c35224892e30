"""A cluster for tests: real stores, real gRPC on the loopback through a proxy, and faults on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from kvrep.coordinators import Quorum
from kvrep.errors import Error, PeerUnavailable
from kvrep.model.position import Position
from kvrep.testing.checkers import Violation, assert_none
from kvrep.testing.clients import RecordedClient
from kvrep.testing.clustercheck import acknowledged, check_calls, check_offline, lost, need_equal
from kvrep.testing.embedded import EmbeddedNode
from kvrep.testing.history import History
from kvrep.testing.namespaces import NotPrivileged
from kvrep.testing.networks import Fault, Network, PacketNetwork, ProxyNetwork
from kvrep.testing.nodes import ClusterNode, LocalNode, ProcessNode
from kvrep.testing.proxy import Link
from kvrep.testing.smalldisks import SmallDisks
from kvrep.testing.timeline import Timeline

__all__ = ["Cluster", "NotPrivileged", "RecordedClient"]

TIMEOUT_S = 15.0
LOOK_S = 0.01
QUICK: dict[str, Any] = {
    "heartbeat_interval_s": 0.2,
    "heartbeat_timeout_s": 1.0,
    "reconnect_backoff_max_s": 0.2,
    "log_file_bytes": 1 << 20,
    "map_bytes": 1 << 30,
    "close_timeout_s": 10.0,
}
"""Options of test nodes, unless others are given: small files, and failures noticed soon."""

Node = ClusterNode | str
Coordinator = Callable[[dict[str, str]], Any] | Literal["auto", "quorum"] | None


def _quorum(peers: dict[str, str]) -> Quorum:
    return Quorum(peers=peers, heartbeat_interval_s=0.1, timeout_s=0.6, step_down_s=0.6)


def _chosen(coordinator: Coordinator, nodes: int, acks: int | str) -> Callable[[dict[str, str]], Any] | None:
    if coordinator == "auto":
        return _quorum if nodes >= 3 and acks == "majority" else None
    if coordinator == "quorum":
        return _quorum
    if coordinator is not None and not callable(coordinator):
        raise ValueError(f'coordinator must be "auto", "quorum", None or a function, not {coordinator!r}')
    return coordinator


class Cluster:
    """Nodes ``a``, ``b``, ``c`` …, started empty. Use it in a ``with`` block.

    ``acks`` and all further ``options`` are those of :func:`kvrep.open`. With ``processes`` every node is a
    process, which SIGKILL and SIGSTOP can hit: ``kvrep serve``, or with ``embedded`` an application with a
    store inside, of which clients can ask transactions and scans as well. ``disk_bytes`` gives every node a
    disk of its own of that size (a tmpfs: needs root), which :meth:`fill_disk` can fill.

    With ``namespaces`` (needs root, and ``processes``) every process lives in a network namespace of its own.
    Then there is no proxy: partitions lose, reject or throttle packets in the kernel, and faults that only a
    proxy knows (delay, corrupt, disconnect, link) raise ``ValueError``.

    ``coordinator`` says who becomes primary. ``"quorum"``: the nodes elect among themselves. ``None``: ``a``
    is primary and stays it, until a test promotes another. A function gets the addresses of all nodes by
    name and makes what is passed to each as ``coordinator=``. The default is ``"quorum"`` for three or more
    nodes with ``acks="majority"``, as in the example on top of :mod:`kvrep.testing.plugin`, else ``None``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 3,
        acks: int | str = "majority",
        processes: bool = False,
        embedded: bool = False,
        namespaces: bool = False,
        coordinator: Coordinator = "auto",
        disk_bytes: int | None = None,
        seed: int = 0,
        timeout_s: float = TIMEOUT_S,
        **options: Any,
    ) -> None:
        if not 1 <= nodes <= 26:
            raise ValueError("a cluster has 1 to 26 nodes")
        if (embedded or namespaces) and not processes:
            raise ValueError("embedded= and namespaces= are for processes=True")
        chosen = _chosen(coordinator, nodes, acks)
        self.folder = folder
        self.seed = seed
        self.timeout_s = timeout_s
        self.history = History()
        """What the recorded clients did."""
        self.timeline = Timeline()
        self._options = {**QUICK, **options}
        self._acks = acks
        self._processes = processes
        self._coordinator = chosen
        self._embedded = embedded
        self._disks = SmallDisks(disk_bytes)
        self._network: Network = (
            PacketNetwork() if namespaces else ProxyNetwork(seed, self._pids if processes else None)
        )
        self._nodes: dict[str, ClusterNode] = {}
        self._disturbed: set[str] = set()
        """Nodes that were ended at least once: what they show may go back."""
        self._frozen: set[str] = set()
        """Nodes that are paused."""
        self._closed = False
        self.timeline.listen()
        self.timeline.add("cluster", f"seed {seed}, {nodes} nodes, acks={acks!r}, processes={processes}")
        try:
            for number in range(nodes):
                self._new_node("abcdefghijklmnopqrstuvwxyz"[number])
            first = 0 if self._coordinator is not None else 1
            for node in self.nodes[:first]:
                self._start(node)
            with ThreadPoolExecutor(thread_name_prefix="kvrep-test-start") as pool:
                list(pool.map(self._start, self.nodes[first:]))
            self.wait_until_ready()
        except BaseException as error:
            self.close()
            error.add_note(f"seed {seed}, timeline of the cluster that did not start:\n{self.timeline}")
            raise

    # -- who is there ------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[ClusterNode]:
        """All nodes, running or not, by name."""
        return [self._nodes[name] for name in sorted(self._nodes)]

    def __getitem__(self, name: str) -> ClusterNode:
        return self._nodes[name]

    @property
    def primary(self) -> ClusterNode:
        """The running primary, that of the highest epoch; ``PeerUnavailable`` when there is none."""
        found = self._primary()
        if found is None:
            raise PeerUnavailable("no node is a running primary", address="", hint="wait_for_primary()")
        return found

    @property
    def followers(self) -> list[ClusterNode]:
        """The running nodes that are not the primary."""
        primary = self._primary()
        return [n for n in self.nodes if n.running and n is not primary]

    def _primary(self, *, writable: bool = False) -> ClusterNode | None:
        found: ClusterNode | None = None
        highest = -1
        for node in self.nodes:
            status = self._status(node)
            if status is None or status.role != "primary" or (writable and status.not_writable):
                continue
            if status.epoch > highest:
                found, highest = node, status.epoch
        return found

    def _status(self, node: ClusterNode) -> Any:
        """A node's status; ``None`` when it does not answer."""
        if not node.running or self._paused(node):
            return None
        try:
            return node.status()
        except Error:
            return None

    def _name(self, node: Node) -> str:
        name = node if isinstance(node, str) else node.name
        if name not in self._nodes:
            raise KeyError(f"there is no node {name!r}")
        return name

    # -- starting ----------------------------------------------------------------------------------

    def _new_node(self, name: str) -> ClusterNode:
        path = self.folder / name
        self._disks.mount(path)
        place = self._network.add(name)
        options = {**self._options, "name": name, **place.options}
        node: ClusterNode
        if self._processes:
            kind = EmbeddedNode if self._embedded else ProcessNode
            node = kind(name, path / "store", options, self.timeline, place.prefix)
        else:
            node = LocalNode(
                name, path / "store", options, self.timeline, lambda a: self._network.route(name, a)
            )
        self._nodes[name] = node
        return node

    def _pids(self) -> dict[str, int]:
        """Of the nodes that are running processes."""
        return {
            name: node.pid for name, node in self._nodes.items() if isinstance(node, ProcessNode) and node.pid
        }

    def _start(self, node: ClusterNode) -> None:
        options = node.options
        for name in ("follow", "acks", "coordinator"):
            options.pop(name, None)
        primary = self._primary()
        if self._coordinator is not None:
            options["coordinator"] = self._coordinator(dict(self._network.advertised))
        elif primary is not None:
            options["follow"] = self._network.advertised[primary.name]
        elif node is not self.nodes[0]:
            options["follow"] = self._network.advertised[self.nodes[0].name]
        if "follow" not in options and not (node.path / "STORE").exists():
            options["acks"] = self._acks
        self.timeline.add(node.name, "starts")
        self._network.started(node.name, node.start())

    def add_node(self, name: str | None = None, **options: Any) -> ClusterNode:
        """Start one more node; it gets everything, and a vote once it has caught up."""
        name = name or next(n for n in "abcdefghijklmnopqrstuvwxyz" if n not in self._nodes)
        if name in self._nodes:
            raise ValueError(f"there is a node {name!r} already")
        node = self._new_node(name)
        node.options.update(options)
        self._start(node)
        return node

    # -- waiting -----------------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], Any], what: str, timeout_s: float | None = None) -> Any:
        """Ask until ``condition()`` is true, and return what it gave; ``TimeoutError`` names ``what``."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        pause = threading.Event()
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited in vain: {what}")
            pause.wait(LOOK_S)

    def wait_for_primary(self, timeout_s: float | None = None) -> ClusterNode:
        """Wait until some node is a primary that takes writes; return it."""
        node: ClusterNode = self.wait_until(
            lambda: self._primary(writable=True), "until some node is a writable primary", timeout_s
        )
        self.timeline.add(node.name, "is a writable primary")
        return node

    def wait_until_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the primary takes writes and all other running nodes follow, as voters if they may.

        Their votes are committed then: what is written from now on needs them and no others.
        """
        voted_at = 0

        def ready() -> bool:
            primary = self._primary(writable=True)
            if primary is None:
                return False
            status = self._status(primary)
            if status is None:
                return False
            streaming = {f.name: f for f in status.followers if f.state == "streaming"}
            there = all(
                f.name in streaming and (f.name in status.voters or not f.options.get("voter", True))
                for f in self.followers
                if not self._paused(f)
            )
            nonlocal voted_at
            if there and not voted_at:
                voted_at = int(status.last_offset)
            return there and status.committed_offset >= voted_at

        self.wait_until(ready, "until all nodes follow a writable primary", timeout_s)

    # -- faults of nodes ---------------------------------------------------------------------------

    def kill(self, node: Node) -> None:
        """End a node as kill -9 does. What it had written stays; nothing is flushed, nobody is told."""
        name = self._name(node)
        self.timeline.add(name, "is killed")
        self._end(name, self._nodes[name].kill)

    def stop(self, node: Node) -> None:
        """Close a node in order."""
        name = self._name(node)
        self.timeline.add(name, "is stopped")
        self._end(name, self._nodes[name].stop)

    def _end(self, name: str, end: Callable[[], None]) -> None:
        self._disturbed.add(name)
        self._network.ended(name)
        end()

    def _stop_all(self) -> None:
        """Close all nodes in order, at the same time: none is given the time to miss another."""
        with ThreadPoolExecutor(thread_name_prefix="kvrep-test-stop") as pool:
            list(pool.map(lambda node: self._end(node.name, node.stop), self.nodes))

    def restart(self, node: Node) -> ClusterNode:
        """Start a node again that was killed or stopped (a running one is stopped first)."""
        name = self._name(node)
        if self._nodes[name].running:
            self.stop(name)
        self._start(self._nodes[name])
        return self._nodes[name]

    def pause(self, node: Node) -> None:
        """Freeze a node: SIGSTOP for a process; in-process its links and its log stand still."""
        name = self._name(node)
        self.timeline.add(name, "is paused")
        self._frozen.add(name)
        if isinstance(self._nodes[name], LocalNode):
            self._network.freeze(name)
        self._nodes[name].pause()

    def resume(self, node: Node) -> None:
        """Let a paused node go on."""
        name = self._name(node)
        self.timeline.add(name, "goes on")
        self._frozen.discard(name)
        self._nodes[name].resume()
        if isinstance(self._nodes[name], LocalNode):
            self._network.thaw(name)

    def _paused(self, node: ClusterNode) -> bool:
        return node.name in self._frozen

    # -- faults of the network ---------------------------------------------------------------------

    def link(self, start: Node, end: Node) -> Link:
        """The link over which ``start`` connects to ``end``, for faults that have no method here."""
        return self._network.link(self._name(start), self._name(end))

    def _pairs(self, start: Node | None, end: Node | None, one_way: bool) -> list[tuple[str, str]]:
        starts = [self._name(start)] if start is not None else sorted(self._nodes)
        ends = [self._name(end)] if end is not None else sorted(self._nodes)
        pairs = [(s, e) for s in starts for e in ends if s != e]
        return pairs if one_way else sorted({*pairs, *((e, s) for s, e in pairs)})

    def _degrade(self, what: str, start: Node | None, end: Node | None, one_way: bool, fault: Fault) -> None:
        pairs = self._pairs(start, end, one_way)
        self.timeline.add("network", f"{what}: {', '.join(f'{s}->{e}' for s, e in pairs)}")
        for pair in pairs:
            fault(*pair)

    def partition(
        self,
        start: Node | Iterable[Node],
        end: Node | Iterable[Node] | None = None,
        *,
        one_way: bool = False,
        reject: bool = False,
    ) -> None:
        """Lose everything between ``start`` and ``end`` (nodes or groups; all others if not given), silently.

        With ``one_way`` only what ``start`` sends. With ``reject`` (needs namespaces) it is answered by RST, as
        firewalls do: connections break at once, and new ones are refused.
        """
        what, fault = ("rejected", self._network.reject()) if reject else ("lost", self._network.lose())
        starts = self._group(start)
        ends = set(self._nodes) - starts if end is None else self._group(end)
        for one in sorted(starts):
            for other in sorted(ends - {one}):
                self._degrade(what, one, other, one_way, fault)

    def _group(self, nodes: Node | Iterable[Node]) -> set[str]:
        if isinstance(nodes, (str, ClusterNode)):
            return {self._name(nodes)}
        return {self._name(n) for n in nodes}

    def drop(self, start: Node, end: Node) -> None:
        """Lose what ``start`` sends to ``end``: a one-way partition."""
        self.partition(start, end, one_way=True)

    def delay(
        self,
        seconds: float,
        start: Node | None = None,
        end: Node | None = None,
        *,
        jitter_s: float = 0.0,
        one_way: bool = False,
    ) -> None:
        """Deliver everything between two nodes (or of one, or all) later."""
        fault = self._network.delay(seconds, jitter_s)
        self._degrade(f"delayed by {seconds:g} s", start, end, one_way, fault)

    def throttle(
        self, bytes_per_s: float, start: Node | None = None, end: Node | None = None, *, one_way: bool = False
    ) -> None:
        """Let so many bytes a second pass between two nodes (or of one, or all)."""
        fault = self._network.throttle(bytes_per_s)
        self._degrade(f"throttled to {bytes_per_s:g} B/s", start, end, one_way, fault)

    def corrupt(
        self, bits: int, start: Node | None = None, end: Node | None = None, *, one_way: bool = False
    ) -> None:
        """Flip one bit in each of the next ``bits`` chunks between two nodes (or of one, or all)."""
        self._degrade(f"{bits} bits flipped", start, end, one_way, self._network.corrupt(bits))

    def disconnect(self, start: Node, end: Node | None = None) -> None:
        """Reset all connections between two nodes (or of one); they may connect again at once."""
        for pair in self._pairs(start, end, one_way=False):
            self._network.link(*pair).reset()

    def heal(self, start: Node | None = None, end: Node | None = None) -> None:
        """End every fault of the network, between two nodes, of one, or everywhere."""
        self.timeline.add("network", "healed")
        for pair in self._pairs(start, end, one_way=False):
            self._network.heal(*pair)
        for node in self.nodes:  # a paused node in this process stands still through its links
            if self._paused(node) and isinstance(node, LocalNode):
                self._network.freeze(node.name)

    # -- faults of disks ---------------------------------------------------------------------------

    def fill_disk(self, node: Node, *, leave_bytes: int = 0) -> None:
        """Fill the node's own disk but for ``leave_bytes``. Needs a cluster made with ``disk_bytes=``."""
        name = self._name(node)
        self.timeline.add(name, "the disk fills up")
        self._disks.fill(self.folder / name, leave_bytes)

    def free_disk(self, node: Node) -> None:
        """Give back what :meth:`fill_disk` took."""
        name = self._name(node)
        self.timeline.add(name, "the disk has room again")
        self._disks.free(self.folder / name)

    def slow_disk(self, node: Node, seconds: float) -> None:
        """Make every sync of the node's log take ``seconds`` longer; 0: no longer."""
        name = self._name(node)
        self.timeline.add(name, f"the disk is {seconds:g} s slower")
        self._nodes[name].slow_disk(seconds)

    # -- clients and checks ------------------------------------------------------------------------

    def client(self, name: str, node: Node | None = None) -> RecordedClient:
        """A client whose calls go into the history: to ``node``, or to whoever is primary.

        Keys that recorded clients use belong to them: writes by other means would look like faults.
        """
        asked = None if node is None else self._nodes[self._name(node)]
        return RecordedClient(name, self.history, lambda: self.primary, asked)

    def assert_converged(self, timeout_s: float | None = None) -> None:
        """Wait until all running nodes show what the primary shows, and compare every key."""
        primary = self.wait_for_primary(timeout_s)
        others = [n for n in self.followers if not self._paused(n)]

        def same_position() -> bool:
            wanted = primary.position
            return all(self._position(n) == wanted for n in others) and primary.position == wanted

        self.wait_until(
            same_position, f"until {[n.name for n in others]} show what {primary.name} shows", timeout_s
        )
        need_equal(primary, others)

    def _position(self, node: ClusterNode) -> Position | None:
        try:
            return node.position
        except Error:
            return None

    def assert_no_acknowledged_loss(self) -> None:
        """Every write that returned is in the primary's history.

        Of recorded clients, of ``put`` and ``delete`` of nodes, and of everything that nodes in this process
        committed as primaries: batches, transactions and pipelined writes too.
        """
        primary = self.wait_for_primary()
        assert_none(lost(primary, acknowledged(self.nodes, self.history), self.history))

    def check(self) -> list[Violation]:
        """End all nodes and check everything: every store, and the history of the recorded clients."""
        forwarded = bool(self._options.get("forward_writes"))
        violations = check_calls(self.history, forwarded=forwarded, disturbed=self._disturbed)
        primary = self._primary(writable=True)
        positions = set(acknowledged(self.nodes, self.history))
        if primary is not None:
            violations += lost(primary, positions, self.history)
            positions.clear()
        self._stop_all()
        for node in self.nodes:
            violations += check_offline(node, positions)
        return violations + [
            Violation("acknowledged loss", f"the write at {p} returned, and no node has it")
            for p in sorted(positions)
        ]

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """End all nodes, the proxy, and what was mounted. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as steps:  # each is tried whatever the others do, the last one first
            steps.callback(self._disks.close)
            steps.callback(self.timeline.close)
            steps.callback(self._network.close)
            steps.callback(self._stop_all)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
