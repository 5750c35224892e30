"""What is broken, when, and how it is mended."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvrep.testing.checkers import Violation
from kvrep.testing.cluster import Cluster, NotPrivileged
from kvrep.testing.nodes import ClusterNode

__all__ = ["KINDS", "FaultSpan", "Faults", "Kind"]

RECOVERY_S = 30.0
"""After everything is mended there must be acknowledged writes within this time."""
READY_S = 60.0
CALM_S = (0.5, 2.5)
TWO_AT_ONCE = 0.25
PRIMARY = 0.55
"""How often the primary is the victim."""
_LEFT_BYTES = 64 << 10

Apply = Callable[[Cluster, ClusterNode, random.Random], None]


def _others(cluster: Cluster, node: ClusterNode) -> list[ClusterNode]:
    return [other for other in cluster.nodes if other is not node]


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of fault."""

    name: str
    what: str
    """For the help."""
    hold_s: tuple[float, float]
    """How long it lasts, at least and at the most."""
    apply: Apply
    mend: Apply


def _restart(cluster: Cluster, node: ClusterNode, chance: random.Random) -> None:
    del chance
    cluster.restart(node)


def _heal(cluster: Cluster, node: ClusterNode, chance: random.Random) -> None:
    del chance
    cluster.heal(node)


def _delay(cluster: Cluster, node: ClusterNode, chance: random.Random) -> None:
    delay_s = chance.uniform(0.02, 0.3)
    cluster.delay(delay_s, node, jitter_s=delay_s)


def _fast_disk(cluster: Cluster, node: ClusterNode, chance: random.Random) -> None:
    del chance
    cluster.slow_disk(node, 0)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("kill", "SIGKILL, and a restart", (0.0, 3.0), lambda c, n, _: c.kill(n), _restart),
        Kind("stop", "an orderly end, and a restart", (0.0, 1.5), lambda c, n, _: c.stop(n), _restart),
        Kind("pause", "SIGSTOP", (0.1, 4.0), lambda c, n, _: c.pause(n), lambda c, n, _: c.resume(n)),
        Kind("cut", "nothing to or from the others", (0.5, 4.0), lambda c, n, _: c.partition(n), _heal),
        Kind("deaf", "nothing from the others", (0.5, 4.0),
             lambda c, n, _: c.partition(_others(c, n), n, one_way=True), _heal),
        Kind("mute", "nothing to the others", (0.5, 4.0),
             lambda c, n, _: c.partition(n, one_way=True), _heal),
        Kind("wall", "all packets answered by RST (namespaces)", (0.5, 3.0),
             lambda c, n, _: c.partition(n, reject=True), _heal),
        Kind("delay", "20 to 300 ms, and as much jitter (no namespaces)", (1.0, 4.0),
             _delay, _heal),
        Kind("throttle", "20 to 500 KB/s", (1.0, 4.0),
             lambda c, n, r: c.throttle(r.uniform(20e3, 500e3), n), _heal),
        Kind("corrupt", "bits turned on the way (no namespaces)", (0.5, 2.0),
             lambda c, n, r: c.corrupt(r.randint(1, 6), n), _heal),
        Kind("slow-disk", "every sync 20 to 200 ms longer (strace)", (1.0, 4.0),
             lambda c, n, r: c.slow_disk(n, r.uniform(0.02, 0.2)), _fast_disk),
        Kind("full-disk", "no byte left on the disk (root)", (1.0, 4.0),
             lambda c, n, _: c.fill_disk(n, leave_bytes=_LEFT_BYTES), lambda c, n, _: c.free_disk(n)),
    )
}  # fmt: skip
"""Every kind there is, by name."""


def available(names: list[str], *, namespaces: bool, disks: bool) -> tuple[list[Kind], dict[str, str]]:
    """The kinds that are possible here, of those named, and for each of the rest why it is left out."""
    left_out = {}
    if not namespaces:
        left_out["wall"] = "needs --namespaces"
    else:
        left_out["delay"] = left_out["corrupt"] = "needs the proxy, which --namespaces does without"
    if shutil.which("strace") is None:
        left_out["slow-disk"] = "strace is not installed"
    if not disks:
        left_out["full-disk"] = "needs --disk-mib" if os.geteuid() == 0 else "needs root"
    return (
        [KINDS[name] for name in names if name not in left_out],
        {name: reason for name, reason in left_out.items() if name in names},
    )


@dataclass(slots=True)
class FaultSpan:
    """One fault, on the clock of the soak."""

    kind: str
    victim: str
    primary: bool
    """Whether the victim was the primary."""
    began_s: float
    ended_s: float = 0.0
    back_s: float = 0.0
    """When writes were acknowledged after it had been mended; 0: not within the limit."""
    gap_s: float = 0.0
    """The longest time without an acknowledgement while it lasted; as far as it began before it was mended."""


@dataclass(slots=True)
class Faults:
    """Breaks and mends, one round after the other, in the thread that calls :meth:`round`."""

    cluster: Cluster
    kinds: list[Kind]
    chance: random.Random
    clock: Callable[[], float]
    """Seconds since the soak began."""
    acknowledged: Callable[[], int]
    """How many writes have been acknowledged so far."""
    wait: Callable[[float], bool]
    """Wait so many seconds; true when the soak shall end."""
    spans: list[FaultSpan] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    down: set[str] = field(default_factory=set)
    """Nodes that are meant not to run."""

    def round(self) -> None:
        """Calm, then one fault or two at once, then mend, and see that writes go on."""
        if self.wait(self.chance.uniform(*CALM_S)) or not self.kinds:
            return
        active = [self._break(self._victim(set()))]
        if self.chance.random() < TWO_AT_ONCE and not self.wait(self.chance.uniform(0.0, 1.0)):
            active.append(self._break(self._victim({active[0][1].name})))
        hold_s = self.chance.uniform(*active[-1][0].hold_s)
        self.wait(hold_s)
        for kind, node, span in reversed(active):
            self._mend(kind, node)
            span.ended_s = self.clock()
        self._recover([span for _, _, span in active])

    def _victim(self, taken: set[str]) -> ClusterNode:
        primary = self.cluster._primary()
        free = [node for node in self.cluster.nodes if node.name not in taken]
        if primary is not None and primary in free and self.chance.random() < PRIMARY:
            return primary
        return self.chance.choice(free)

    def _break(self, node: ClusterNode) -> tuple[Kind, ClusterNode, FaultSpan]:
        kind = self.chance.choice(self.kinds)
        is_primary = self.cluster._primary() is node
        span = FaultSpan(kind.name, node.name, is_primary, self.clock())
        self.spans.append(span)
        self.down.add(node.name)  # before it is: who watches must not take it for an accident
        try:
            kind.apply(self.cluster, node, self.chance)
        except OSError as reason:  # such as a disk that was filled by somebody else at the same time
            self.cluster.timeline.add(node.name, f"{kind.name} failed: {reason}")
        except NotPrivileged as reason:  # slow-disk: strace may not attach
            self.cluster.timeline.add(node.name, f"{kind.name} is not possible: {reason}")
            self.kinds.remove(kind)
        if kind.mend is not _restart:
            self.down.discard(node.name)
        return kind, node, span

    def _mend(self, kind: Kind, node: ClusterNode) -> None:
        try:
            kind.mend(self.cluster, node, self.chance)
        except Exception as error:
            self.violations.append(
                Violation(
                    "nodes", f"{node.name} did not get over {kind.name!r}: {type(error).__name__}: {error}"
                )
            )
        finally:
            self.down.discard(node.name)

    def _recover(self, spans: list[FaultSpan]) -> None:
        before, deadline = self.acknowledged(), time.monotonic() + RECOVERY_S
        while self.acknowledged() <= before:
            if time.monotonic() > deadline:
                what = " and ".join(f"{s.kind} of {s.victim}" for s in spans)
                self.violations.append(
                    Violation("availability", f"no write acknowledged within {RECOVERY_S:g} s after {what}")
                )
                return
            if self.wait(0.02):
                return
        for span in spans:
            span.back_s = self.clock()
