"""One soak from beginning to end."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from kvrep.errors import Error
from kvrep.testing.checkers import Violation
from kvrep.testing.cluster import Cluster
from kvrep.testing.soak.faults import KINDS, READY_S, Faults, FaultSpan, Kind, available
from kvrep.testing.soak.load import Load, token_of, valued
from kvrep.testing.soak.watch import Sample, Watch, grown

__all__ = ["Result", "Settings", "soak"]

BASE_BYTES = 200
BASE_BATCH = 200
CHECK_S = 120.0
OPTIONS = {
    "ack_timeout_s": 2.0,
    "retention_bytes": 4 << 20,
    "memtable_bytes": 4 << 20,
    "flush_interval_s": 2.0,
}
"""Small, so that log files are trimmed, flushes happen and followers fall behind what is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a soak is asked for."""

    seconds: float
    seed: int
    nodes: int = 3
    clients: int = 4
    calls_per_s: float = 300.0
    base_keys: int = 20_000
    """Written at the beginning and never again: they must be there, unchanged, at the end."""
    namespaces: bool = False
    disk_bytes: int | None = None
    faults: tuple[str, ...] = tuple(KINDS)
    sample_s: float = 1.0


@dataclass(slots=True, kw_only=True)
class Result:
    """What came of it."""

    settings: Settings
    took_s: float = 0.0
    interrupted: bool = False
    samples: list[Sample] = field(default_factory=list)
    spans: list[FaultSpan] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    """Calls whose history was checked."""
    epochs: int = 0
    """In how many writes were acknowledged: one more than the primary changed."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Kinds of faults that were not possible, and why."""
    timeline: str = ""

    @property
    def ok(self) -> bool:
        return not self.violations


class _Clock:
    def __init__(self) -> None:
        self.began_s = time.monotonic()

    def __call__(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.began_s


@dataclass(frozen=True, slots=True)
class Progress:
    """What somebody who watches wants to know."""

    at_s: float
    seconds: float
    writes_per_s: list[float]
    """Of the last samples, the newest last."""
    primary: str
    faults: int
    now: str
    """The fault that lasts at the moment; empty: none."""
    violations: int
    doing: str


class _Soak:
    def __init__(
        self, settings: Settings, cluster: Cluster, kinds: list[Kind], over: threading.Event
    ) -> None:
        self.settings = settings
        self.cluster = cluster
        self.clock = _Clock()
        self.over = over
        self.doing = "starts"
        self.load = Load(
            cluster, clients=settings.clients, calls_per_s=settings.calls_per_s, seed=settings.seed
        )
        self.faults = Faults(
            cluster, kinds, random.Random(settings.seed), self.clock,
            lambda: self.load.counts["acknowledged"], over.wait,
        )  # fmt: skip
        self.watch = Watch(
            cluster, self.clock, self._counted, lambda: self.faults.down, interval_s=settings.sample_s
        )
        self.base = dict(_base(settings))

    def _counted(self) -> tuple[int, int]:
        counts = self.load.counts
        return counts["acknowledged"], counts["read"]

    @property
    def violations(self) -> list[Violation]:
        return [*self.load.violations, *self.faults.violations, *self.watch.violations]

    def progress(self) -> Progress:
        samples = self.watch.samples[-25:]
        rates = [(b.acknowledged - a.acknowledged) / max(b.at_s - a.at_s, 1e-6) for a, b in pairwise(samples)]
        roles = samples[-1].nodes if samples else {}
        last = self.faults.spans[-2:]
        return Progress(
            self.clock(), self.settings.seconds, rates,
            next((name for name, node in roles.items() if node.role == "primary"), ""),
            len(self.faults.spans), ", ".join(f"{s.kind} {s.victim}" for s in last if not s.ended_s),
            len(self.violations), self.doing,
        )  # fmt: skip

    def fill(self) -> None:
        """Write what must stay."""
        keys = sorted(self.base)
        primary = self.cluster.wait_for_primary()
        for at in range(0, len(keys), BASE_BATCH):
            pairs = [(key, self.base[key]) for key in keys[at : at + BASE_BATCH]]
            primary.batch(pairs)  # type: ignore[attr-defined]

    def run(self) -> None:
        """Let clients and watch run; break and mend until the time is over."""
        self.doing = "runs"
        self.load.start()
        self.watch.start()
        while not self.over.is_set() and self.clock() < self.settings.seconds:
            self.faults.round()

    def end(self) -> None:
        """Mend everything, let the clients come to an end, and compare the nodes."""
        self.doing = "checks"
        cluster = self.cluster
        for node in cluster.nodes:
            if not node.running:  # it ended by itself, or could not be restarted: that was told
                try:
                    cluster.restart(node)
                except Error as error:
                    self.faults.violations.append(Violation("nodes", f"{node.name} does not start: {error}"))
        try:
            cluster.wait_until_ready(READY_S)
        except TimeoutError as error:
            self.faults.violations.append(Violation("availability", f"all is mended, but {error}"))
        self.load.stop(CHECK_S)
        self.watch.stop()
        try:
            cluster.assert_converged(READY_S)
        except (AssertionError, TimeoutError, Error) as error:
            self.faults.violations.append(Violation("convergence", str(error)))
        self._check_base()

    def outages(self) -> None:
        """Tell every fault how long nobody took writes because of it, or of one at the same time."""
        gaps = [(a - self.clock.began_s, b - self.clock.began_s) for a, b in self.load.gaps]
        for span in self.faults.spans:
            during = [b - a for a, b in gaps if b > span.began_s and a < span.ended_s]
            span.gap_s = max(during, default=0.0)

    def abandon(self) -> None:
        """End all threads, whatever is left undone."""
        self.load.abandon()
        self.watch.stop()

    def _check_base(self) -> None:
        """What was written at the beginning is on every node, and nothing else is but what is in use."""
        for node in self.cluster.nodes:
            try:
                found = {key: value for (_, key), value in node.content().items()}
            except (Error, OSError) as error:
                self.faults.violations.append(Violation("content", f"{node.name} cannot be read: {error}"))
                continue
            wrong = [key for key, value in self.base.items() if found.get(key) != value]
            if wrong:
                text = f"{len(wrong)} of {len(self.base)} old keys are missing or changed on {node.name}"
                self.faults.violations.append(Violation("content", f"{text}, such as {min(wrong)!r}"))
            for key in found.keys() - self.base.keys():
                try:
                    token_of(found[key])
                except ValueError:
                    self.faults.violations.append(
                        Violation(
                            "content", f"{node.name} holds {key!r}: {found[key]!r:.80}, which nobody wrote"
                        )
                    )


def _base(settings: Settings) -> list[tuple[bytes, bytes]]:
    return [
        (b"base/%06d" % i, valued(b"base-%d-%d" % (settings.seed, i), BASE_BYTES))
        for i in range(settings.base_keys)
    ]


def soak(
    settings: Settings,
    folder: Path,
    over: threading.Event,
    tell: Callable[[Callable[[], Progress]], None] = lambda progress: None,
) -> Result:
    """Run it in ``folder``; ``over`` ends it early, with all checks.

    ``tell`` is given, once, what makes a :class:`Progress` at any time from any thread. Raises
    :class:`NotPrivileged` or a kvrep error if the cluster cannot be started.
    """
    kinds, left_out = available(
        list(settings.faults), namespaces=settings.namespaces, disks=settings.disk_bytes is not None
    )
    result = Result(settings=settings, left_out=left_out)
    with Cluster(
        folder, nodes=settings.nodes, acks="majority", coordinator="quorum", processes=True, embedded=True,
        namespaces=settings.namespaces, disk_bytes=settings.disk_bytes, seed=settings.seed, timeout_s=60.0,
        **OPTIONS,
    ) as cluster:  # fmt: skip
        one = _Soak(settings, cluster, kinds, over)
        tell(one.progress)
        one.fill()
        try:
            one.run()
            one.end()
        except BaseException:
            one.abandon()
            raise
        result.took_s = one.clock()
        result.interrupted = over.is_set()
        result.epochs = len(one.load.epochs)
        result.violations = one.violations + [
            Violation("soak", f"a thread of the soak failed: {type(p).__name__}: {p}")
            for p in one.load.problems
        ]
        one.doing = "checks the stores"
        result.violations += cluster.check() + grown(one.watch.samples)
        one.outages()
        result.samples, result.spans = one.watch.samples, one.faults.spans
        result.counts, result.checked = one.load.counts, one.load.checked
        result.timeline = str(cluster.timeline)
    return result
