"""What the failover tests share: recorded clients that look for the primary, and somebody who promotes."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kvrep
from kvrep.testing.cluster import Cluster
from kvrep.testing.embedded import EmbeddedNode
from kvrep.testing.history import Call
from kvrep.testing.nodes import ClusterNode, LocalNode, ProcessNode

WAIT_S = 20.0


LOST = (kvrep.UnknownOutcome, kvrep.PeerUnavailable, kvrep.StorageFailed, kvrep.ClosedError)
"""Errors that leave the outcome open."""


class Clients:
    """Threads that write without end to whoever takes it, and record what became of every call."""

    def __init__(self, cluster: Cluster, *, count: int, keys: int, seed: int) -> None:
        self._cluster = cluster
        self.keys = [b"k%02d" % i for i in range(keys)]
        """What is written to; may be replaced by other keys at any time."""
        self._stop = threading.Event()
        self.acknowledged = itertools.count()
        """Advanced by every acknowledged write; ``acked`` is its value."""
        self.acked = 0
        self.problems: list[BaseException] = []
        self._threads = [
            threading.Thread(
                target=self._run, args=(f"client{i}", random.Random(seed * 100 + i)), daemon=True
            )
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, name: str, chance: random.Random) -> None:
        node = self._cluster.nodes[0]
        known: dict[bytes, bytes] = {}
        try:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                key = chance.choice(self.keys)
                value = b"%s-%d" % (name.encode(), number)
                if chance.random() < 0.2:
                    self._get(name, node, key, known)
                    continue
                if isinstance(node, LocalNode | EmbeddedNode) and chance.random() < 0.25:
                    done = self._swap(name, node, key, known.get(key), value)
                else:
                    done = self._put(name, node, key, value)
                if done:
                    known[key] = value
                    self.acked = next(self.acknowledged) + 1
                else:
                    node = chance.choice(self._cluster.nodes)
                    self._stop.wait(0.002)
        except BaseException as error:
            self.problems.append(error)
            raise

    def _get(self, name: str, node: ClusterNode, key: bytes, known: dict[bytes, bytes]) -> None:
        """A linearizable read; a read that fails has told nothing."""
        call = self._cluster.history.begin(name, "get", key, node=node.name)
        try:
            value = node.get(key, consistency="linearizable", timeout_s=1.0, **_patience(node))
        except kvrep.Error:
            call.refused()
            return
        call.done(value=value)
        if value is not None:
            known[key] = value

    def _put(self, name: str, node: ClusterNode, key: bytes, value: bytes) -> bool:
        call = self._cluster.history.begin(name, "put", key, value, node=node.name)
        try:
            position = node.put(key, value, **_patience(node))
        except Exception as error:
            return _failed(call, error)
        call.done(position=position)
        return True

    def _swap(self, name: str, node: Any, key: bytes, expected: bytes | None, value: bytes) -> bool:
        call = self._cluster.history.begin(name, "cas", key, value, expected=expected, node=node.name)
        try:
            position = node.compare_and_set(key, expected=expected, value=value, **_patience(node))
        except Exception as error:
            return _failed(call, error)
        if position is None:  # on a primary that was replaced just now this says nothing
            call.refused()
            return True
        if isinstance(node, LocalNode):
            node.acknowledged.append(position)
        call.done(position=position)
        return True

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "a client hangs"
        if self.problems:
            raise self.problems[0]


def _patience(node: ClusterNode) -> dict[str, Any]:
    """A node that stands still must not hold up a client for long."""
    return {"within_s": 2.0} if isinstance(node, EmbeddedNode) else {}


def _failed(call: Call, error: Exception) -> bool:
    """Record how a call failed; raises what no client should ever see."""
    if isinstance(error, (kvrep.RefusedError, kvrep.RolledBack)):
        call.refused()
    elif isinstance(
        error, (kvrep.UnknownOutcome, kvrep.PeerUnavailable, kvrep.StorageFailed, kvrep.ClosedError)
    ):
        call.unknown(getattr(error, "position", None))
    else:
        call.unknown()
        raise error
    return False


@contextmanager
def clients(cluster: Cluster, *, count: int = 4, keys: int = 8, seed: int = 1) -> Iterator[Clients]:
    made = Clients(cluster, count=count, keys=keys, seed=seed)
    try:
        yield made
    finally:
        made.stop()


def promote(node: ClusterNode, timeout_s: float = 5.0, **more: Any) -> None:
    """Have a node of a cluster promote itself."""
    if isinstance(node, ProcessNode):
        node._call("promote", timeout_s, **more)
    else:
        assert isinstance(node, LocalNode)
        node.store.promote(timeout_s=timeout_s, **more)


def promote_one_of(candidates: list[ClusterNode], timeout_s: float = WAIT_S) -> ClusterNode:
    """As an operator would: try one after the other until one is primary."""
    deadline = time.monotonic() + timeout_s
    said: list[str] = []
    while time.monotonic() < deadline:
        for node in candidates:
            try:
                promote(node)
                return node
            except (kvrep.RefusedError, kvrep.ReplicationError, kvrep.ClosedError) as error:
                said.append(f"{node.name}: {type(error).__name__}: {error}")
        threading.Event().wait(0.02)
    raise AssertionError(f"nobody could be promoted: {said[-6:]}")
