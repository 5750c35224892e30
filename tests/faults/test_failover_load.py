"""Failovers one after another under load: no acknowledged write is lost, and the history is linearizable."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kvrep.testing.checkers import assert_none
from kvrep.testing.cluster import Cluster
from tests.failover_kit import WAIT_S, clients, promote_one_of

FAULTS = ("kill", "pause", "partition", "deaf", "mute")


def fail_over(cluster: Cluster, fault: str, chance: random.Random) -> None:
    """Break the primary in some way, promote another node, mend the first and wait until all is well."""
    old = cluster.wait_for_primary(WAIT_S)
    others = [node for node in cluster.nodes if node is not old]
    chance.shuffle(others)
    if fault == "kill":
        cluster.kill(old)
    elif fault == "pause":
        cluster.pause(old)
    elif fault == "partition":
        cluster.partition(old)
    elif fault == "deaf":
        cluster.partition(others, old, one_way=True)
    else:
        cluster.partition(old, others, one_way=True)
    promote_one_of(others)
    if fault == "kill":
        cluster.restart(old)
    elif fault == "pause":
        cluster.resume(old)
    else:
        cluster.heal()
    cluster.wait_until_ready(WAIT_S)


def run(folder: Path, *, rounds: int, seed: int, **options: Any) -> None:
    """``rounds`` failovers under load, then every check there is."""
    chance = random.Random(seed)
    with Cluster(folder, seed=seed, ack_timeout_s=1.0, **options) as cluster:
        with clients(cluster, seed=seed) as load:
            for number in range(rounds):
                before = load.acked
                fail_over(
                    cluster, FAULTS[number % len(FAULTS)] if number < 5 else chance.choice(FAULTS), chance
                )
                cluster.wait_until(lambda before=before: load.acked > before + 100, "until writes go on")
        cluster.wait_until_ready(WAIT_S)
        cluster.assert_converged(WAIT_S)
        cluster.assert_no_acknowledged_loss()
        assert load.acked >= 100 * rounds
        assert_none(cluster.check())


@pytest.mark.slow
@pytest.mark.parametrize("acks", [1, "majority"])
def test_failovers_in_process(tmp_path: Path, acks: Any) -> None:
    """Twenty failovers of three nodes: killed, frozen, cut off, deaf and mute primaries."""
    run(tmp_path, rounds=20, seed=11, acks=acks)


@pytest.mark.slow
def test_failovers_of_processes(tmp_path: Path) -> None:
    """The same with a process for every node, real SIGKILL and SIGSTOP."""
    run(tmp_path, rounds=8, seed=5, acks="majority", processes=True)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("acks", [1, "majority"])
def test_two_hundred_failovers(tmp_path: Path, acks: Any) -> None:
    """Two hundred failovers of processes under load, none of which loses an acknowledged write."""
    run(tmp_path, rounds=200, seed=77, acks=acks, processes=True)
