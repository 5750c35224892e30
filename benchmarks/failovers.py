"""How long nobody takes writes, and what coordination costs: ``python -m benchmarks.failovers``."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvrep
from benchmarks.measure import percentile
from kvrep.testing.cluster import Cluster
from kvrep.testing.embedded import EmbeddedNode
from kvrep.testing.namespaces import why_not
from kvrep.testing.nodes import ClusterNode

HELP = """\
Measure failovers of three nodes, each a process (in a network namespace of its own where that is possible),
acks="majority", with the default settings of kvrep.Quorum and of the store, under load.

  kill        SIGKILL to the primary, until the first acknowledged write elsewhere
  frozen      the same with SIGSTOP
  cut         the same with the primary cut off from both others
  blink       SIGSTOP for half a second: does the primary stay the primary?
  switchover  the longest time between two acknowledged writes around a switchover
  forwarding  the same with forward_writes=True, as each node's own writer sees it: the longest of the three
  promote     promote() by hand, the old primary just killed (no coordinator)
  cost        puts per second with and without kvrep.Quorum, in turn, and processor time per put; heartbeats
              come ten times as often as by default, so that their cost stands out: a tenth of it is what counts
"""
ROUNDS = 30
WAIT_S = 30.0
DEFAULTS: dict[str, Any] = {
    "heartbeat_interval_s": 1.0,
    "heartbeat_timeout_s": 4.0,
    "reconnect_backoff_max_s": 2.0,
    "ack_timeout_s": 2.0,
}
"""What kvrep.open() takes by itself; the cluster for tests would be quicker to notice."""


class Writers:
    """A thread for each node that puts without end; when the last acknowledgement of each came."""

    def __init__(self, cluster: Cluster) -> None:
        self._over = threading.Event()
        self.acked: dict[str, list[float]] = {node.name: [] for node in cluster.nodes}
        """When each node acknowledged a write, on the clock of ``time.monotonic``."""
        self._threads = [
            threading.Thread(target=self._run, args=(node,), name=f"writer-{node.name}")
            for node in cluster.nodes
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, node: ClusterNode) -> None:
        assert isinstance(node, EmbeddedNode)
        number = 0
        while not self._over.is_set():
            number += 1
            try:
                node.ask("put", 2.0, key=b"%d" % (number % 1000), value=b"x" * 100, timeout_s=1.0)
            except kvrep.Error:
                self._over.wait(0.002)
            else:
                self.acked[node.name].append(time.monotonic())

    def first_elsewhere(self, old: str, since: float) -> float:
        """Seconds from ``since`` to the first write that another node than ``old`` acknowledged; or 0."""
        later = [next((t for t in list(times) if t > since), 0.0)
                 for name, times in self.acked.items() if name != old]  # fmt: skip
        return min((t - since for t in later if t), default=0.0)

    def gap(self, since: float, until: float) -> float:
        """The longest time without an acknowledgement anywhere between the two moments."""
        return _gap([t for times in self.acked.values() for t in list(times)], since, until)

    def longest_gap(self, since: float, until: float) -> float:
        """The same as the writer of one node sees it who waited longest."""
        return max(_gap(list(times), since, until) for times in self.acked.values())

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT_S)


def _gap(moments: list[float], since: float, until: float) -> float:
    inside = sorted(t for t in moments if since <= t <= until)
    return max(b - a for a, b in zip([since, *inside], [*inside, until], strict=True))


BEATS = 10
"""How many times as often as by default the heartbeats of ``cost`` come."""


@contextmanager
def group(*, elected: bool = True, beats: int = 1, **options: Any) -> Iterator[Cluster]:
    """Three nodes that are up."""

    def quorum(peers: dict[str, str]) -> kvrep.Quorum:
        return kvrep.Quorum(peers=peers, heartbeat_interval_s=0.25 / beats)

    with tempfile.TemporaryDirectory(prefix="kvrep-failovers-") as folder:
        with Cluster(
            Path(folder), processes=True, embedded=True, namespaces=not why_not(), timeout_s=WAIT_S,
            coordinator=quorum if elected else None,
            **{**DEFAULTS, **options},
        ) as cluster:  # fmt: skip
            yield cluster


@contextmanager
def loaded(cluster: Cluster) -> Iterator[Writers]:
    writers = Writers(cluster)
    try:
        yield writers
    finally:
        writers.stop()


@dataclass(frozen=True)
class Times:
    """Seconds, one for each round."""

    name: str
    seconds: list[float]

    def __str__(self) -> str:
        p50, worst = statistics.median(self.seconds), max(self.seconds)
        low, p90 = min(self.seconds), percentile(self.seconds, 90)
        ms = [f"{1000 * s:8.0f} ms" for s in (low, p50, p90, worst)]
        return f"{self.name:11} best {ms[0]}   median {ms[1]}   p90 {ms[2]}   worst of {len(self.seconds)} {ms[3]}"


def failovers(fault: str, rounds: int) -> Times:
    """``kill``, ``frozen`` or ``cut``, mended each time before the next."""
    took: list[float] = []
    with group() as cluster, loaded(cluster) as writers:
        for number in range(rounds):
            old = cluster.primary
            settle(cluster, writers)
            began = time.monotonic()
            if fault == "kill":
                cluster.kill(old)
            elif fault == "frozen":
                cluster.pause(old)
            else:
                cluster.partition(old)
            took.append(
                cluster.wait_until(
                    lambda o=old.name, b=began: writers.first_elsewhere(o, b),
                    "until there are writes elsewhere",
                )
            )
            progress(f"{fault} {number + 1}/{rounds}: {took[-1] * 1000:.0f} ms")
            if fault == "kill":
                cluster.restart(old)
            elif fault == "frozen":
                cluster.resume(old)
            else:
                cluster.heal()
            cluster.wait_until_ready(WAIT_S)
    return Times(fault, took)


def settle(cluster: Cluster, writers: Writers, seconds: float = 1.0) -> None:
    """Let writes go on undisturbed for a while."""
    cluster.wait_until_ready(WAIT_S)
    end = time.monotonic() + seconds
    cluster.wait_until(lambda: time.monotonic() > end, "for a while")
    cluster.wait_until(lambda: writers.gap(end - 0.2, time.monotonic()) < 0.2, "until writes go on")


def blinks(rounds: int) -> str:
    """How many pauses of half a second cost the primary its place."""
    lost = 0
    with group() as cluster, loaded(cluster) as writers:
        for number in range(rounds):
            settle(cluster, writers)
            primary, epoch = cluster.primary, cluster.primary.status().epoch
            cluster.pause(primary)
            end = time.monotonic() + 0.5
            cluster.wait_until(lambda end=end: time.monotonic() > end, "for half a second")
            cluster.resume(primary)
            settle(cluster, writers)
            lost += cluster.primary.status().epoch != epoch
            progress(f"blink {number + 1}/{rounds}: {lost} elections")
    return f"{'blink':11} {lost} elections in {rounds} pauses of 0.5 s"


def switchovers(rounds: int, *, forwarding: bool = False) -> Times:
    took: list[float] = []
    name = "forwarding" if forwarding else "switchover"
    with group(forward_writes=forwarding) as cluster, loaded(cluster) as writers:
        for number in range(rounds):
            settle(cluster, writers)
            old = cluster.primary
            to = [node.name for node in cluster.nodes if node is not old][number % 2]
            began = time.monotonic()
            assert isinstance(old, EmbeddedNode)
            old.ask("switchover", WAIT_S, to=to)
            cluster.wait_until(
                lambda o=old.name, b=began: writers.first_elsewhere(o, b), "until there are writes elsewhere"
            )
            settle(cluster, writers, 0.3)
            gap = writers.longest_gap if forwarding else writers.gap
            took.append(gap(began - 0.1, time.monotonic()))
            progress(f"{name} {number + 1}/{rounds}: {took[-1] * 1000:.0f} ms")
    return Times(name, took)


def promotions(rounds: int) -> Times:
    took: list[float] = []
    with group(elected=False) as cluster, loaded(cluster) as writers:
        for number in range(rounds):
            settle(cluster, writers)
            old = cluster.primary
            new = next(node for node in cluster.nodes if node is not old)
            cluster.kill(old)
            assert isinstance(new, EmbeddedNode)
            began = time.monotonic()
            new.ask("promote", WAIT_S)
            took.append(time.monotonic() - began)
            progress(f"promote {number + 1}/{rounds}: {took[-1] * 1000:.0f} ms")
            cluster.wait_until(lambda: cluster._primary(writable=True), "until it takes writes")
            cluster.restart(old)
            cluster.wait_until_ready(WAIT_S)
    return Times("promote", took)


# -- cost ------------------------------------------------------------------------------------------


def processor_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cost_once(*, elected: bool, seconds: float, threads: int) -> tuple[float, float]:
    """(puts per second, microseconds of processor time of all nodes per put) of a fresh group."""
    with group(elected=elected, beats=BEATS) as cluster:
        primary: Any = cluster.primary
        pids = [node.pid for node in cluster.nodes]  # type: ignore[attr-defined]
        primary.ask("load", seconds + WAIT_S, seconds=1.0, threads=threads)
        before, began = sum(map(processor_s, pids)), time.monotonic()
        count = primary.ask("load", seconds + WAIT_S, seconds=seconds, threads=threads)
        took = time.monotonic() - began
        return count / took, (sum(map(processor_s, pids)) - before) / count * 1e6


def cost(pairs: int, seconds: float, threads: int = 8) -> str:
    rates, times = [], []
    for number in range(pairs):
        order = (True, False) if number % 2 else (False, True)
        found = {elected: cost_once(elected=elected, seconds=seconds, threads=threads) for elected in order}
        rates.append(found[True][0] / found[False][0])
        times.append(found[True][1] / found[False][1])
        progress(f"cost {number + 1}/{pairs}: {found[True][0]:.0f} against {found[False][0]:.0f} puts/s")
    rate, work = statistics.median(rates), statistics.median(times)
    return (
        f"{'cost':11} {BEATS} times the heartbeats: puts/s {rate:.3f} of those without"
        f" ({min(rates):.3f} to {max(rates):.3f}), processor time per put {work:.3f}"
        f" ({min(times):.3f} to {max(times):.3f}); so by default {(1 - rate) / BEATS:.2%} of the puts,"
        f" {(work - 1) / BEATS:.2%} of the work; {pairs} pairs of {seconds:g} s, {threads} threads"
    )


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.failovers", description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"how often each is done (default {ROUNDS})"
    )
    parser.add_argument(
        "--pairs", type=int, default=10, help="how often the two sides of cost take turns (10)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each side of cost runs (5)")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="one of the names above; may be repeated"
    )
    options = parser.parse_args(argv)
    rounds = options.rounds
    known: dict[str, Callable[[], object]] = {
        "kill": lambda: failovers("kill", rounds),
        "frozen": lambda: failovers("frozen", rounds),
        "cut": lambda: failovers("cut", rounds),
        "blink": lambda: blinks(rounds),
        "switchover": lambda: switchovers(rounds),
        "forwarding": lambda: switchovers(rounds, forwarding=True),
        "promote": lambda: promotions(rounds),
        "cost": lambda: cost(options.pairs, options.seconds),
    }
    for name in options.only or known:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    if why_not():
        progress(f"{why_not()}: nodes are joined by a proxy")
    for name in options.only or known:
        print(known[name](), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
