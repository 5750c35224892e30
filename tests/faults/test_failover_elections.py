"""Failovers that the nodes decide themselves, in network namespaces: whatever is cut, nothing acknowledged is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from kvrep.testing.checkers import assert_none
from kvrep.testing.cluster import Cluster
from kvrep.testing.nodes import ClusterNode
from tests.failover_kit import WAIT_S, Clients, clients

Make = Callable[..., Cluster]
FAULTS = ("kill", "pause", "cut", "deaf", "mute", "walled")
KEYS = 8
ROUNDS_PER_KEYS = 10
"""New keys after so many failovers keep every history short enough to be checked exactly."""


def break_primary(cluster: Cluster, fault: str, old: ClusterNode) -> None:
    others = [node for node in cluster.nodes if node is not old]
    if fault == "kill":
        cluster.kill(old)
    elif fault == "pause":
        cluster.pause(old)
    elif fault == "deaf":
        cluster.partition(others, old, one_way=True)
    elif fault == "mute":
        cluster.partition(old, others, one_way=True)
    else:
        cluster.partition(old, reject=fault == "walled")


def mend(cluster: Cluster, fault: str, old: ClusterNode) -> None:
    if fault == "kill":
        cluster.restart(old)
    elif fault == "pause":
        cluster.resume(old)
    else:
        cluster.heal()


def fail_over(cluster: Cluster, load: Clients, fault: str, chance: random.Random) -> None:
    """Break the primary, wait until the others have elected and written, mend it, wait until all is well.

    Now and then it is mended at a random moment instead, in the middle of the election.
    """
    old = cluster.wait_for_primary(WAIT_S)
    break_primary(cluster, fault, old)
    if chance.random() < 0.2:
        moment = time.monotonic() + chance.random()
        cluster.wait_until(lambda: time.monotonic() > moment, "for a moment")
    else:
        cluster.wait_until(
            lambda: (node := cluster._primary(writable=True)) is not None and node is not old,
            f"until another node than {old.name} takes writes ({fault})",
            WAIT_S,
        )
        before = load.acked
        cluster.wait_until(lambda: load.acked > before + 20, f"until there are writes elsewhere ({fault})")
    mend(cluster, fault, old)
    cluster.wait_until_ready(WAIT_S)


def run(make: Make, *, rounds: int, seed: int) -> None:
    """``rounds`` failovers of three voters under load, then every check there is."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    cluster = make(processes=True, embedded=True, namespaces=True, seed=seed, ack_timeout_s=1.0)
    with clients(cluster, keys=KEYS, seed=seed) as load:
        for number in range(rounds):
            if number % ROUNDS_PER_KEYS == 0:
                load.keys = [b"%04d-%d" % (number, i) for i in range(KEYS)]
            before = load.acked
            first = number < len(FAULTS)
            fail_over(cluster, load, FAULTS[number] if first else chance.choice(FAULTS), chance)
            cluster.wait_until(lambda before=before: load.acked > before + 50, "until writes go on")
    cluster.wait_until_ready(WAIT_S)
    cluster.assert_converged(WAIT_S)
    cluster.assert_no_acknowledged_loss()
    epochs = {o.position.epoch for o in cluster.history if o.position is not None}
    assert len(epochs) > rounds // 2
    assert_none(cluster.check())


@pytest.mark.slow
def test_six_elections(kvrep_cluster: Make) -> None:
    """Killed, frozen, cut off, deaf, mute and walled-in primaries are replaced; the history is linearizable."""
    run(kvrep_cluster, rounds=6, seed=3)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_two_hundred_elections(kvrep_cluster: Make, request: pytest.FixtureRequest) -> None:
    """Two hundred failovers under load: no acknowledged loss, one primary in each epoch, linearizable."""
    given = request.config.getoption("--kvrep-seed")
    run(kvrep_cluster, rounds=200, seed=random.randrange(1 << 32) if given is None else given)
