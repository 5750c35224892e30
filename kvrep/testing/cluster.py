"""A cluster for tests: real stores, real gRPC on the loopback through a proxy, and faults on demand.

Every pair of nodes has a link of its own, so that any direction between any two can be cut, delayed or
damaged. Nodes know each other by addresses that stay the same when they are restarted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kvrep.coordinators import Quorum
from kvrep.errors import Error, PeerUnavailable, RefusedError
from kvrep.model.position import Position
from kvrep.status import Outcome
from kvrep.testing.checkers import (
    Violation,
    assert_none,
    check_acknowledged_loss,
    check_linearizable,
    check_monotonic_reads,
    check_one_primary,
    check_read_your_writes,
)
from kvrep.testing.embedded import EmbeddedNode
from kvrep.testing.history import Action, Call, History
from kvrep.testing.namespaces import Namespaces, NotPrivileged
from kvrep.testing.nodes import ClusterNode, LocalNode, ProcessNode, open_offline, sockets_of, tcp_sockets
from kvrep.testing.proxy import Direction, Link, Proxy
from kvrep.testing.storecheck import check_store
from kvrep.testing.timeline import Timeline

__all__ = ["Cluster", "NotPrivileged", "RecordedClient"]

TIMEOUT_S = 15.0
LOOK_S = 0.01
PORT = 7400
"""Of nodes in namespaces, where every port is free."""
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
        self._disk_bytes = disk_bytes
        self._embedded = embedded
        self._wires = Namespaces() if namespaces else None
        self._proxy = Proxy(seed=seed)
        self._nodes: dict[str, ClusterNode] = {}
        self._advertised: dict[str, str] = {}
        """By what address others know each node; it stays the same."""
        self._addresses: dict[str, str] = {}
        """Where each running node really listens."""
        self._fronts: dict[str, Link] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._mounts: list[Path] = []
        self._disturbed: set[str] = set()
        """Nodes that were ended at least once: what they show may go back."""
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
        if self._disk_bytes is not None:
            self._mount(path)
        if self._wires is not None:
            space = self._wires.add(name)
            self._advertised[name] = f"{space.address}:{PORT}"
            options = {**self._options, "name": name, "listen": self._advertised[name]}
            self._nodes[name] = self._process(name, path, options, space.prefix)
            return self._nodes[name]
        front = self._fronts[name] = self._proxy.link(name=name)
        self._advertised[name] = front.address
        for other in self._nodes:
            self._links[name, other] = self._proxy.link(name=f"{name}-{other}")
            self._links[other, name] = self._proxy.link(name=f"{other}-{name}")
            self._links[name, other].target = self._addresses.get(other, "")
        options = {**self._options, "name": name, "listen": "127.0.0.1:0", "advertise": front.address}
        node: ClusterNode
        if self._processes:
            node = self._process(name, path, options)
            self._proxy.classify(front, lambda port: self._link_by_port(name, port))
        else:
            node = LocalNode(name, path / "store", options, self.timeline, lambda a: self._route(name, a))
        self._nodes[name] = node
        return node

    def _process(
        self, name: str, path: Path, options: dict[str, Any], prefix: Sequence[str] = ()
    ) -> ProcessNode:
        kind = EmbeddedNode if self._embedded else ProcessNode
        return kind(name, path / "store", options, self.timeline, prefix)

    def _route(self, name: str, address: str) -> str:
        """The address by which ``name`` reaches who advertises ``address``."""
        for other, front in self._fronts.items():
            if front.address == address and other != name:
                return self._links[name, other].address
        return address

    def _link_by_port(self, target: str, port: int) -> Link | None:
        """The link of the process that connects to ``target`` from this port."""
        inodes = {inode for local, listens, inode in tcp_sockets() if local == port and not listens}
        for name, node in self._nodes.items():
            if name == target or not isinstance(node, ProcessNode) or not node.pid:
                continue
            if inodes & sockets_of(node.pid):
                return self._links[name, target]
        return None

    def _start(self, node: ClusterNode) -> None:
        options = node.options
        for name in ("follow", "acks", "coordinator"):
            options.pop(name, None)
        primary = self._primary()
        if self._coordinator is not None:
            options["coordinator"] = self._coordinator(dict(self._advertised))
        elif primary is not None:
            options["follow"] = self._advertised[primary.name]
        elif node is not self.nodes[0]:
            options["follow"] = self._advertised[self.nodes[0].name]
        if "follow" not in options and not (node.path / "STORE").exists():
            options["acks"] = self._acks
        self.timeline.add(node.name, "starts")
        self._addresses[node.name] = address = node.start()
        if self._wires is None:
            self._fronts[node.name].target = address
        for (_, to), link in self._links.items():
            if to == node.name:
                link.target = address

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
        for link in self._links_of(name):
            link.resume()
        for (_, to), link in self._links.items():
            if to == name:
                link.target = ""
        if self._wires is None:
            self._fronts[name].target = ""
        for link in self._links_of(name):
            link.reset()
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
        self._disturbed.add(f"paused {name}")
        if isinstance(self._nodes[name], LocalNode):
            for link in self._links_of(name):
                link.pause()
        self._nodes[name].pause()

    def resume(self, node: Node) -> None:
        """Let a paused node go on."""
        name = self._name(node)
        self.timeline.add(name, "goes on")
        self._disturbed.discard(f"paused {name}")
        self._nodes[name].resume()
        if isinstance(self._nodes[name], LocalNode):
            for link in self._links_of(name):
                link.resume()

    def _paused(self, node: ClusterNode) -> bool:
        return f"paused {node.name}" in self._disturbed

    # -- faults of the network ---------------------------------------------------------------------

    def link(self, start: Node, end: Node) -> Link:
        """The link over which ``start`` connects to ``end``, for faults that have no method here."""
        self._need_proxy("link")
        return self._links[self._name(start), self._name(end)]

    def _links_of(self, name: str) -> Iterator[Link]:
        for pair, link in self._links.items():
            if name in pair:
                yield link

    def _towards(self, start: str, end: str) -> Iterator[tuple[Link, Direction]]:
        """What carries bytes from ``start`` to ``end``; no links with namespaces."""
        if self._wires is None:
            yield self._links[start, end], "up"
            yield self._links[end, start], "down"

    def _pairs(self, start: Node | None, end: Node | None, one_way: bool) -> list[tuple[str, str]]:
        starts = [self._name(start)] if start is not None else sorted(self._nodes)
        ends = [self._name(end)] if end is not None else sorted(self._nodes)
        pairs = [(s, e) for s in starts for e in ends if s != e]
        return pairs if one_way else sorted({*pairs, *((e, s) for s, e in pairs)})

    def _degrade(
        self,
        what: str,
        start: Node | None,
        end: Node | None,
        one_way: bool,
        rule: Callable[[Link, Direction], None] | None,
        wired: Callable[[Namespaces, str, str], None] | None = None,
    ) -> None:
        """Apply ``rule`` to the links between nodes or, with namespaces, ``wired`` to the packets."""
        if self._wires is None and rule is None:
            raise ValueError(f"{what}: needs a cluster made with namespaces=True")
        if self._wires is not None and wired is None:
            self._need_proxy(what)
        pairs = self._pairs(start, end, one_way)
        self.timeline.add("network", f"{what}: {', '.join(f'{s}->{e}' for s, e in pairs)}")
        for pair in pairs:
            if self._wires is not None and wired is not None:
                wired(self._wires, *pair)
            for link, direction in self._towards(*pair):
                assert rule is not None
                rule(link, direction)

    def _need_proxy(self, what: str) -> None:
        if self._wires is not None:
            raise ValueError(f"{what}: needs the proxy, which a cluster made with namespaces=True has not")

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
        starts = self._group(start)
        ends = set(self._nodes) - starts if end is None else self._group(end)
        for one in sorted(starts):
            for other in sorted(ends - {one}):
                if reject:
                    self._degrade("rejected", one, other, one_way, None, Namespaces.reject)
                else:
                    self._degrade("lost", one, other, one_way, Link.drop, Namespaces.drop)

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
        self._degrade(
            f"delayed by {seconds:g} s", start, end, one_way, lambda k, d: k.delay(seconds, jitter_s, d)
        )

    def throttle(
        self, bytes_per_s: float, start: Node | None = None, end: Node | None = None, *, one_way: bool = False
    ) -> None:
        """Let so many bytes a second pass between two nodes (or of one, or all)."""
        self._degrade(
            f"throttled to {bytes_per_s:g} B/s",
            start,
            end,
            one_way,
            lambda k, d: k.throttle(bytes_per_s, d),
            lambda wires, one, other: wires.throttle(one, other, bytes_per_s),
        )

    def corrupt(
        self, bits: int, start: Node | None = None, end: Node | None = None, *, one_way: bool = False
    ) -> None:
        """Flip one bit in each of the next ``bits`` chunks between two nodes (or of one, or all)."""
        self._degrade(f"{bits} bits flipped", start, end, one_way, lambda k, d: k.corrupt(bits, d))

    def disconnect(self, start: Node, end: Node | None = None) -> None:
        """Reset all connections between two nodes (or of one); they may connect again at once."""
        self._need_proxy("disconnect")
        for one, other in self._pairs(start, end, one_way=False):
            self._links[one, other].reset()

    def heal(self, start: Node | None = None, end: Node | None = None) -> None:
        """End every fault of the network, between two nodes, of one, or everywhere."""
        self.timeline.add("network", "healed")
        for pair in self._pairs(start, end, one_way=False):
            if self._wires is not None:
                self._wires.heal(*pair)
            else:
                self._links[pair].heal()
        for node in self.nodes:  # a paused node in this process stands still through its links
            if self._paused(node) and isinstance(node, LocalNode):
                for link in self._links_of(node.name):
                    link.pause()

    # -- faults of disks ---------------------------------------------------------------------------

    def _mount(self, path: Path) -> None:
        if os.geteuid() != 0:
            raise NotPrivileged("disk_bytes needs root, to mount a tmpfs for every node")
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._disk_bytes}", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotPrivileged(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
        self._mounts.append(path)

    def fill_disk(self, node: Node, *, leave_bytes: int = 0) -> None:
        """Fill the node's own disk but for ``leave_bytes``. Needs a cluster made with ``disk_bytes=``."""
        name = self._name(node)
        ballast = self.folder / name / "ballast"
        if self.folder / name not in self._mounts:
            raise ValueError(
                "fill_disk needs a cluster made with disk_bytes=, which gives nodes their own disks"
            )
        self.timeline.add(name, "the disk fills up")
        free = shutil.disk_usage(ballast.parent).free - leave_bytes
        if free > 0:
            fd = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, os.fstat(fd).st_size, free)
            finally:
                os.close(fd)

    def free_disk(self, node: Node) -> None:
        """Give back what :meth:`fill_disk` took."""
        name = self._name(node)
        self.timeline.add(name, "the disk has room again")
        (self.folder / name / "ballast").unlink(missing_ok=True)

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
        return RecordedClient(self, name, None if node is None else self._nodes[self._name(node)])

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
        expected = primary.content()
        for node in others:
            found = node.content()
            different = {k for k in {*expected, *found} if expected.get(k) != found.get(k)}
            if different:
                raise AssertionError(
                    f"{node.name} differs from {primary.name} in {len(different)} keys,"
                    f" such as {min(different)}"
                )

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
        violations = self._lost(primary)
        assert_none(violations)

    def _lost(self, primary: ClusterNode) -> list[Violation]:
        lost = sorted(p for p in set(self._acknowledged()) if primary.resolve(p) is not Outcome.COMMITTED)
        violations = [
            Violation(
                "acknowledged loss", f"the write at {p} returned and is not in {primary.name}'s history"
            )
            for p in lost
        ]
        operations = self.history.operations
        used = {o.key for o in operations}
        final = {key: value for (name, key), value in primary.content().items() if name == "default"}
        return violations + check_acknowledged_loss(operations, {k: v for k, v in final.items() if k in used})

    def _acknowledged(self) -> Iterator[Position]:
        for node in self.nodes:
            yield from node.all_acknowledged()
        for operation in self.history:
            if operation.result == "done" and operation.position is not None:
                yield operation.position

    def check(self) -> list[Violation]:
        """End all nodes and check everything: every store, and the history of the recorded clients."""
        violations = check_linearizable(self.history)
        if not self._options.get("forward_writes"):  # else nodes acknowledge what others have committed
            violations += check_one_primary(self.history)
        primary = self._primary(writable=True)
        if primary is not None:
            violations += self._lost(primary)
        missing = set() if primary is not None else set(self._acknowledged())
        operations = self.history.operations
        direct = [o for o in operations if not o.lagging]
        violations += check_read_your_writes(direct) + check_monotonic_reads(
            o for o in operations if not o.lagging or o.node not in self._disturbed
        )
        self._stop_all()
        for node in self.nodes:
            violations += self._check_offline(node, missing)
        return violations + [
            Violation("acknowledged loss", f"the write at {p} returned, and no node has it")
            for p in sorted(missing)
        ]

    def _check_offline(self, node: ClusterNode, missing: set[Position]) -> list[Violation]:
        """Check one store, and take what its log holds out of ``missing``."""
        try:
            with open_offline(node.path, node.options) as store:
                engine = store._node.engine
                missing -= {p for p in missing if engine.epochs.holds(p, engine.tail.offset)}
                return check_store(store)
        except (Error, OSError) as error:
            return [Violation("store", f"{node.name} cannot be opened: {type(error).__name__}: {error}")]

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """End all nodes, the proxy, and what was mounted. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with _all_of_it() as attempt:
            attempt(self._stop_all)
            attempt(self._proxy.close)
            if self._wires is not None:
                attempt(self._wires.close)
            attempt(self.timeline.close)
            for path in self._mounts:
                attempt(lambda path=path: subprocess.run(["umount", "-l", str(path)], check=True))  # type: ignore[misc]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def _all_of_it() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Try every step of an ending, whatever the others do; the first failure is raised at the end."""
    failures: list[Exception] = []

    def attempt(step: Callable[[], Any]) -> None:
        try:
            step()
        except Exception as error:
            failures.append(error)

    yield attempt
    if failures:
        raise failures[0]


class RecordedClient:
    """One client, one call at a time, whose calls and outcomes are recorded. Raises what the node raises."""

    def __init__(self, cluster: Cluster, name: str, node: ClusterNode | None) -> None:
        self.name = name
        self._cluster = cluster
        self._node = node

    def put(self, key: bytes, value: bytes, **options: Any) -> Position:
        """As of :meth:`kvrep.Store.put`."""
        node = self._asked()
        with self._recorded("put", key, value, node) as call:
            position: Position = node.put(key, value, **options)
            call.done(position=position)
        return position

    def delete(self, key: bytes, **options: Any) -> Position:
        """As of :meth:`kvrep.Store.delete`."""
        node = self._asked()
        with self._recorded("delete", key, None, node) as call:
            position: Position = node.delete(key, **options)
            call.done(position=position)
        return position

    def get(self, key: bytes, **options: Any) -> bytes | None:
        """As of :meth:`kvrep.Store.get`. From a follower it is recorded as a read that may lag."""
        node = self._asked()
        lagging = self._node is not None and node is not self._cluster._primary()
        value: bytes | None
        with self._recorded("get", key, None, node, lagging=lagging) as call:
            value = node.get(key, **options)
            call.done(value=value)
        return value

    def compare_and_set(self, key: bytes, *, expected: bytes | None, value: bytes | None) -> Position | None:
        """As of :meth:`kvrep.Store.compare_and_set`; of nodes in this process and embedded ones."""
        node = self._asked()
        if not isinstance(node, LocalNode | EmbeddedNode):
            raise TypeError("compare_and_set is for nodes in this process and for embedded=True")
        position: Position | None
        with self._recorded("cas", key, value, node, expected=expected) as call:
            position = node.compare_and_set(key, expected=expected, value=value)
            call.done(succeeded=position is not None, position=position)
        return position

    def _asked(self) -> ClusterNode:
        return self._node if self._node is not None else self._cluster.primary

    @contextmanager
    def _recorded(
        self,
        action: Action,
        key: bytes,
        value: bytes | None,
        node: ClusterNode,
        *,
        expected: bytes | None = None,
        lagging: bool = False,
    ) -> Iterator[Call]:
        call = self._cluster.history.begin(
            self.name, action, key, value, expected=expected, node=node.name, lagging=lagging
        )
        try:
            yield call
        except RefusedError:
            call.refused()
            raise
        except Exception as error:
            if action == "get":
                call.refused()
            else:
                call.unknown(getattr(error, "position", None))
            raise
