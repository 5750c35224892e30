"""Memory, descriptors, threads, disk and lag of every node over time; and whether something grows."""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvrep.errors import Error
from kvrep.testing.checkers import Violation
from kvrep.testing.cluster import Cluster
from kvrep.testing.embedded import EmbeddedNode

__all__ = ["METRICS", "Growth", "NodeSample", "Sample", "Watch", "growth"]

STATUS_S = 1.0
JUDGED_S = 290.0
"""Shorter runs, below five minutes (the last sample comes a little earlier), say nothing about growth."""
WARM_UP = 0.2
"""This part of the run is not judged."""
SAMPLES_MAX = 20_000
"""Above it every second sample is dropped, and from then on half as many are taken."""


@dataclass(frozen=True, slots=True)
class NodeSample:
    """One node at one moment; sizes are bytes."""

    role: str
    """``primary``, ``follower``, ``paused``, ``down``, or ``silent`` when it did not answer in time."""
    memory: int = 0
    """Anonymous memory: what the process has, without files it has mapped."""
    descriptors: int = 0
    threads: int = 0
    disk: int = 0
    """Of its folder, as allocated; LMDB, log and rescue files."""
    lag_records: int = 0
    """Records that its primary has, and it has not confirmed."""


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    acknowledged: int
    """Writes so far."""
    read: int
    nodes: dict[str, NodeSample]


METRICS: dict[str, tuple[str, float]] = {
    "memory": ("bytes", 64 << 20),
    "descriptors": ("", 64),
    "threads": ("", 32),
    "disk": ("bytes", 64 << 20),
}
"""What must not grow: its unit, and a growth that is no reason to worry."""
FACTOR = 1.5
"""The last part of a run may have so many times what the first had, and what METRICS says besides."""


@dataclass(frozen=True, slots=True)
class Growth:
    """One metric of one node over the run: medians of its first and last third, after warming up."""

    metric: str
    node: str
    first: float
    last: float
    most: float
    judged: bool

    @property
    def grows(self) -> bool:
        return self.judged and self.last > FACTOR * self.first + METRICS[self.metric][1]


def growth(samples: list[Sample]) -> list[Growth]:
    """Every metric of every node. Processes that were restarted begin anew: that can only hide growth."""
    if not samples:
        return []
    end_s = samples[-1].at_s
    settled = [s for s in samples if s.at_s >= WARM_UP * end_s]
    third = max(1, len(settled) // 3)
    found = []
    for metric in METRICS:
        for name in samples[-1].nodes:

            def values(of: list[Sample], name: str = name, metric: str = metric) -> list[float]:
                all_of_them = [getattr(s.nodes[name], metric) for s in of if name in s.nodes]
                return [value for value in all_of_them if value] or [0.0]

            found.append(
                Growth(
                    metric, name, statistics.median(values(settled[:third])),
                    statistics.median(values(settled[-third:])), max(values(samples)), end_s >= JUDGED_S,
                )
            )  # fmt: skip
    return found


def grown(samples: list[Sample]) -> list[Violation]:
    """What grows, as violations."""
    return [
        Violation("growth", f"{g.metric} of {g.node} went from {g.first:,.0f} to {g.last:,.0f}")
        for g in growth(samples)
        if g.grows
    ]


def memory_of(pid: int) -> int:
    """Anonymous memory of a process; 0 when it is gone."""
    return _status_line(pid, "RssAnon:") << 10


def threads_of(pid: int) -> int:
    return _status_line(pid, "Threads:")


def _status_line(pid: int, field: str) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def descriptors_of(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def disk_of(folder: Path) -> int:
    """Bytes that the files in a folder take; they may come and go meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name), follow_symlinks=False).st_blocks * 512
            except OSError:
                pass
    return total


@dataclass(eq=False)
class Watch:
    """A thread (``kvrep-soak-watch``) that looks at every node at intervals, from the outside and the inside."""

    cluster: Cluster
    clock: Callable[[], float]
    counts: Callable[[], tuple[int, int]]
    """(writes acknowledged, reads) so far."""
    down: Callable[[], set[str]]
    """Nodes that are meant not to run."""
    interval_s: float = 1.0
    samples: list[Sample] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._dead: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._run, name="kvrep-soak-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.samples.append(self.look())
            if len(self.samples) > SAMPLES_MAX:
                del self.samples[::2]
                self.interval_s *= 2
            self._stop.wait(self.interval_s)

    def look(self) -> Sample:
        """One sample."""
        at_s = self.clock()
        lags: dict[str, int] = {}
        nodes = {}
        for node in self.cluster.nodes:
            assert isinstance(node, EmbeddedNode)
            nodes[node.name] = self._look_at(node, lags)
        acknowledged, read = self.counts()
        return Sample(
            at_s,
            acknowledged,
            read,
            {
                name: _with_lag(sample, lags.get(name, 0)) if sample.role == "follower" else sample
                for name, sample in nodes.items()
            },
        )

    def _look_at(self, node: EmbeddedNode, lags: dict[str, int]) -> NodeSample:
        pid = node.pid
        if not node.running:
            self._note_death(node, pid)
            return NodeSample("down", disk=disk_of(node.path))
        return NodeSample(
            self._role(node, lags), memory_of(pid), descriptors_of(pid), threads_of(pid), disk_of(node.path)
        )

    def _role(self, node: EmbeddedNode, lags: dict[str, int]) -> str:
        if self.cluster._paused(node):
            return "paused"
        try:
            status = node.status_within(STATUS_S)
        except (Error, OSError):
            return "silent"
        for follower in status.followers if status.role == "primary" else ():
            if follower.synced:  # else it has not said yet where it stands
                lags[follower.name] = max(lags.get(follower.name, 0), follower.lag_records)
        return str(status.role)

    def _note_death(self, node: EmbeddedNode, pid: int) -> None:
        """A process that ended although nobody ended it."""
        if node.name not in self.down() and pid and (node.name, pid) not in self._dead:
            self._dead.add((node.name, pid))
            self.violations.append(Violation("nodes", f"the process of {node.name} ended by itself"))


def _with_lag(sample: NodeSample, lag: int) -> NodeSample:
    return NodeSample(sample.role, sample.memory, sample.descriptors, sample.threads, sample.disk, lag)
