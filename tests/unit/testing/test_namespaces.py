"""Namespaces: packets are lost, rejected and let through as told, and nothing is left, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvrep
from kvrep.testing import namespaces
from kvrep.testing.cluster import Cluster
from kvrep.testing.namespaces import Namespace, Namespaces, NotPrivileged
from kvrep.testing.nodes import ClusterNode

Make = Callable[..., Cluster]
CLONE_NEWNET = 0x40000000
WAIT_S = 10.0
MOMENT_S = 0.3
"""How long something must not happen."""


def until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.01)


@pytest.fixture
def net() -> Iterator[Namespaces]:
    """Two namespaces, ``a`` and ``b``."""
    try:
        made = Namespaces()
    except NotPrivileged as reason:
        pytest.skip(str(reason))
    with made:
        made.add("a")
        made.add("b")
        yield made


def socket_in(space: Namespace) -> socket.socket:
    """A socket that lives in a namespace: it stays where the thread was that made it."""
    made: list[socket.socket] = []

    def work() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(space.prefix[1].removeprefix("--net="), os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert libc.setns(fd, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(fd)
        made.append(socket.socket())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    made[0].settimeout(WAIT_S)
    return made[0]


class Line:
    """A connection from ``a`` to ``b``."""

    def __init__(self, net: Namespaces, stack: ExitStack) -> None:
        self.listener = stack.enter_context(socket_in(net._spaces["b"]))
        self.listener.bind((net._spaces["b"].address, 0))
        self.listener.listen()
        self.a = stack.enter_context(socket_in(net._spaces["a"]))
        self.a.connect(self.listener.getsockname())
        self.b, _ = self.listener.accept()
        stack.enter_context(self.b)


@pytest.fixture
def line(net: Namespaces) -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(net, stack)


def arrives(sender: socket.socket, receiver: socket.socket, within_s: float) -> bool:
    sender.sendall(b"x")
    receiver.settimeout(within_s)
    try:
        return receiver.recv(100) != b""
    except TimeoutError:
        return False


def test_both_ways_and_one_way(net: Namespaces, line: Line) -> None:
    """What is dropped in one direction does not arrive, and does after healing; the other is as it was."""
    assert arrives(line.a, line.b, WAIT_S)
    net.drop("a", "b")
    assert not arrives(line.a, line.b, MOMENT_S)
    net.heal("a", "b")
    line.b.settimeout(WAIT_S)
    assert line.b.recv(100) == b"x"

    # What b sends arrives, although a's confirmations of it do not.
    net.drop("a", "b")
    assert arrives(line.b, line.a, WAIT_S)
    net.drop("b", "a")
    assert not arrives(line.b, line.a, MOMENT_S)
    net.heal("a", "b")
    net.heal("b", "a")
    assert arrives(line.a, line.b, WAIT_S)
    assert arrives(line.b, line.a, WAIT_S)


def test_rejected(net: Namespaces, line: Line) -> None:
    """A rejecting network breaks connections and refuses new ones at once, also when both ways reject."""
    net.reject("a", "b")
    net.reject("b", "a")
    with pytest.raises(ConnectionError):
        arrives(line.a, line.a, WAIT_S)
    with socket_in(net._spaces["a"]) as again, pytest.raises(ConnectionRefusedError):
        again.connect(line.listener.getsockname())

    net.heal("a", "b")
    net.heal("b", "a")
    with socket_in(net._spaces["a"]) as again:
        again.connect(line.listener.getsockname())


def test_rejected_one_way(net: Namespaces, line: Line) -> None:
    """With one way rejected the sender knows at once; the receiver of the other way learns nothing."""
    net.reject("a", "b")
    with pytest.raises(ConnectionError):
        arrives(line.a, line.a, WAIT_S)
    line.b.settimeout(MOMENT_S)
    with pytest.raises(TimeoutError):
        line.b.recv(1)


def test_thin_and_lossy_lines(net: Namespaces, line: Line) -> None:
    """A throttled direction takes its time; one that loses some packets delivers everything all the same."""
    data = os.urandom(1_000_000)

    def carry() -> float:
        began = time.monotonic()
        thread = threading.Thread(target=line.a.sendall, args=(data,))
        thread.start()
        got = bytearray()
        line.b.settimeout(WAIT_S)
        while len(got) < len(data):
            got += line.b.recv(1 << 16)
        thread.join()
        assert bytes(got) == data
        return time.monotonic() - began

    free = carry()
    net.throttle("a", "b", 400_000)
    thin = carry()
    net.heal("a", "b")
    net.lose("a", "b", 5)
    carry()

    assert thin > 0.7 > free
    with pytest.raises(ValueError, match="percentage"):
        net.lose("a", "b", 101)


def test_names(net: Namespaces) -> None:
    """A name stands for one namespace; this process reaches all of them, and has no name there."""
    with pytest.raises(ValueError, match="already"):
        net.add("a")
    with pytest.raises(KeyError):
        net.drop("a", "z")
    assert net.address.rsplit(".", 1)[0] == net._spaces["a"].address.rsplit(".", 1)[0]


# -- what is left ----------------------------------------------------------------------------------


def cable_there(name: str) -> bool:
    return Path(f"/sys/class/net/{name}").exists()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_close_leaves_nothing(net: Namespaces) -> None:
    """close() takes back interfaces and processes, and may be called twice."""
    cable, pids = net._cable, [net._hub.pid, *(s._holder.pid for s in net._spaces.values())]
    assert cable_there(cable)
    assert all(map(alive, pids))
    net.close()
    net.close()

    assert not cable_there(cable)
    assert not any(map(alive, pids))


SCRIPT = """
import sys
from kvrep.testing.namespaces import Namespaces
with Namespaces() as net:
    net.add("a"), net.add("b")
    net.drop("a", "b")
    pids = [net._hub.pid, *(s._holder.pid for s in net._spaces.values())]
    print(net._cable, *pids, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_ends_leaves_nothing(net: Namespaces, number: signal.Signals) -> None:
    """After Ctrl-C, and after kill -9, the kernel has taken everything back."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        cable, *pids = process.stdout.readline().split()
        assert cable_there(cable)
        process.send_signal(number)
        process.wait(WAIT_S)

    until(lambda: not cable_there(cable))
    until(lambda: not any(alive(int(pid)) for pid in pids))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root, and without the programs, the reason has the words; nothing is started."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPrivileged, match="root"):
        Namespaces()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces, "_which", lambda name: None if name in ("ip", "nft") else name)
    with pytest.raises(NotPrivileged, match="ip and nft"):
        Namespaces()


# -- clusters --------------------------------------------------------------------------------------


def acknowledged_elsewhere(cluster: Cluster, old: ClusterNode) -> ClusterNode:
    """Wait until another node than ``old`` takes writes, and write there."""
    found: ClusterNode = cluster.wait_until(
        lambda: (node := cluster._primary(writable=True)) is not old and node,
        "until another one takes writes",
    )
    cluster.client("one", found).put(b"k", found.name.encode())
    return found


@pytest.mark.slow
def test_partitions_of_a_cluster(kvrep_cluster: Make) -> None:
    """A primary that is cut off, deaf, mute or behind a rejecting wall is replaced and comes back as a follower."""
    cluster = kvrep_cluster(processes=True, embedded=True, namespaces=True, ack_timeout_s=0.5)
    cluster.client("zero").put(b"k", b"0")
    for how in ("cut off", "deaf", "mute", "walled"):
        old = cluster.primary
        others = [node for node in cluster.nodes if node is not old]
        if how == "deaf":
            cluster.partition(others, old, one_way=True)
        elif how == "mute":
            cluster.partition(old, others, one_way=True)
        else:
            cluster.partition(old, reject=how == "walled")
        new = acknowledged_elsewhere(cluster, old)
        with pytest.raises((kvrep.RefusedError, kvrep.UnknownOutcome)):
            old.put(b"lost", b"x", timeout_s=0.2)
        cluster.heal()
        cluster.wait_until_ready()
        assert cluster.primary is new
    cluster.assert_converged()
    cluster.assert_no_acknowledged_loss()


@pytest.mark.slow
def test_a_cluster_of_servers_in_namespaces(kvrep_cluster: Make) -> None:
    """``kvrep serve`` runs there, too; a thin line delays only; what needs the proxy says so."""
    cluster = kvrep_cluster(nodes=2, acks=1, processes=True, namespaces=True)
    cluster.throttle(100_000, "a", "b", one_way=True)
    cluster.primary.put(b"k", os.urandom(300_000), timeout_s=20.0)
    cluster.heal()
    cluster.kill("b")
    cluster.restart("b")
    cluster.wait_until_ready()
    cluster.assert_converged()

    for call in (
        lambda: cluster.delay(0.1),
        lambda: cluster.corrupt(1),
        lambda: cluster.disconnect("a"),
        lambda: cluster.link("a", "b"),
    ):
        with pytest.raises(ValueError, match="proxy"):
            call()


def test_namespaces_are_for_processes(tmp_path: Path, kvrep_cluster: Make) -> None:
    """Options that do not go together are refused before anything is started."""
    with pytest.raises(ValueError, match="processes=True"):
        Cluster(tmp_path / "x", namespaces=True)
    with pytest.raises(ValueError, match="processes=True"):
        Cluster(tmp_path / "x", embedded=True)
    cluster = kvrep_cluster(nodes=2, acks=0)
    with pytest.raises(ValueError, match="namespaces=True"):
        cluster.partition("a", "b", reject=True)
