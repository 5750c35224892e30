"""The node that is an application: everything a store can do, asked for from another process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kvrep
from kvrep.testing.cluster import Cluster
from kvrep.testing.embedded import EmbeddedNode

Make = Callable[..., Cluster]


@pytest.mark.slow
def test_everything_a_client_can_ask(kvrep_cluster: Make) -> None:
    """Puts, batches, conditional writes, reads, scans and outcomes; errors arrive as what they are."""
    cluster = kvrep_cluster(nodes=2, acks=1, processes=True, embedded=True)
    first, second = cluster["a"], cluster["b"]
    assert isinstance(first, EmbeddedNode)
    assert isinstance(second, EmbeddedNode)
    put = first.put(b"k", b"1")
    batch = first.batch([(b"p/1", b"x"), (b"p/2", b"y"), (b"k", None)])
    missed = first.compare_and_set(b"k", expected=b"1", value=b"2")
    swapped = first.compare_and_set(b"k", expected=None, value=b"2")
    deleted = first.delete(b"p/1")

    assert missed is None
    assert swapped is not None
    assert put < batch < swapped < deleted
    assert first.acknowledged == [put, batch, swapped, deleted]
    second.wait_for(deleted)
    assert second.get(b"k", at_least=deleted) == b"2"
    assert second.get(b"none", b"nothing") == b"nothing"
    assert dict(second.scan(prefix=b"p")) == {b"p/2": b"y"}
    assert first.resolve(put) is kvrep.Outcome.COMMITTED
    with pytest.raises(kvrep.NotPrimary) as refused:
        second.put(b"k", b"3")
    assert refused.value.primary_address == first.status().address
    with pytest.raises(kvrep.InvalidKey):
        first.put(b"", b"1")
    with pytest.raises(RuntimeError, match="TypeError"):
        first.put("text", b"1")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="AttributeError"):
        first.ask("nonsense")
    client = cluster.client("one")
    assert client.compare_and_set(b"cas", expected=None, value=b"1") is not None
    assert client.compare_and_set(b"cas", expected=None, value=b"2") is None
    assert client.get(b"cas") == b"1"


@pytest.mark.slow
def test_killed_and_stopped(kvrep_cluster: Make) -> None:
    """A node that is down, or stands still, is unavailable; afterwards the same object works again."""
    cluster = kvrep_cluster(nodes=1, acks=0, processes=True, embedded=True)
    node = cluster["a"]
    assert isinstance(node, EmbeddedNode)
    node.put(b"k", b"1")
    cluster.pause(node)
    with pytest.raises(kvrep.PeerUnavailable):
        node.ask("get", 0.2, key=b"k")
    cluster.resume(node)
    assert node.get(b"k") == b"1"
    cluster.kill(node)
    with pytest.raises(kvrep.PeerUnavailable, match="down"):
        node.get(b"k")
    cluster.restart(node)

    assert node.get(b"k") == b"1"


SCRIPT = """
import sys
from pathlib import Path
from kvrep.testing.cluster import Cluster
cluster = Cluster(Path(sys.argv[1]), nodes=2, acks=0, processes=True, embedded=True)
cluster.pause("a")
print(*(node.pid for node in cluster.nodes), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_nodes_end_with_a_test_that_is_killed(tmp_path: Path) -> None:
    """Those that stand still, too: nobody is left who could wake them."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cluster")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()

    deadline = time.monotonic() + 20.0
    while any(map(alive, pids)) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert len(pids) == 2
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
