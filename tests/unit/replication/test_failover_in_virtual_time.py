"""Election, promotion and replication together, in virtual time: what is safe, and how fast it heals.

See ``virtual_group.py`` for the model. Figures here are virtual: what decisions and timeouts cost, without
disks and processors.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from virtual_group import Group

from kvrep.model.configuration import Acks

HEALED_WITHIN_S = 8.0


def fault(group: Any) -> None:
    """One random thing goes wrong, or right."""
    chance = group.chance
    names = list(group.nodes)
    one, other = chance.sample(names, 2)
    node = group.nodes[one]
    match chance.choice(("kill", "start", "pause", "resume", "cut", "one-way", "isolate", "mend", "loss")):
        case "kill" if node.up:
            group.kill(one)
        case "start" if not node.up:
            group.start(one)
        case "pause" if node.up:
            group.pause(one)
        case "resume" if node.paused:
            group.resume(one)
        case "cut":
            group.cut(one, other)
        case "one-way":
            group.cut(one, other, both=False)
        case "isolate":
            group.isolate(one)
        case "mend":
            group.blocked.clear()
        case "loss":
            group.loss = chance.choice((0.0, 0.05, 0.3))


def storm(seed: int, names: str, acks: Acks, faults: int, *, born: bool = False, **more: Any) -> Any:
    """Faults, then peace; in the end one primary, equal logs, and no acknowledged write missing.

    With ``born`` the faults begin while the group is being formed.
    """
    group = Group(seed, names, acks, **more)
    if born:
        group.start()
    else:
        group.form()
    group.writing(0.02)
    for _ in range(faults):
        fault(group)
        group.run(group.chance.choice((0.003, 0.01, 0.03, 0.1) if born else (0.01, 0.1, 0.5, 1.5)))
    group.heal()
    healed = group.now
    leader = None

    def well() -> bool:
        nonlocal leader
        leader = group.leader()
        if leader is None or group.acknowledged_after(healed, 0) is None:
            return False
        data = [n for n in group.nodes.values() if not n.witness]
        return all(n.committed > 0 and n.last.epoch == leader.primary_epoch for n in data)

    assert group.until(well, HEALED_WITHIN_S), [
        (n.name, n.election.phase.value, n.election.problem) for n in group.nodes.values()
    ]
    group.run(1.0)
    assert len(group.primaries()) == 1
    written = {e.value for e in leader.log}
    if acks != 0:
        assert group.acknowledged.keys() <= written
        assert len(group.ledger) >= len(group.acknowledged)
    for node in group.nodes.values():
        if not node.witness:
            shared = min(len(node.log), len(leader.log))
            assert [e.value for e in node.log[:shared]] == [e.value for e in leader.log[:shared]]
            assert shared >= len(leader.log) - 5
    assert group.founded == 1
    return group


@pytest.mark.parametrize("names", ["abc", "abcde", "abW"])
@pytest.mark.parametrize("seed", range(12))
def test_nothing_acknowledged_is_lost_and_the_group_heals(seed: int, names: str) -> None:
    """Crashes, pauses, partitions and loss: one history, and a working primary within seconds of peace."""
    storm(seed, names, "majority", 25)


@pytest.mark.parametrize("names", ["abc", "abcde", "abW"])
@pytest.mark.parametrize("seed", range(20))
def test_a_group_that_is_born_in_a_storm(seed: int, names: str) -> None:
    """Whatever happens while it is formed, it is formed once, and works in the end."""
    storm(2000 + seed, names, "majority", 12, born=True)


@pytest.mark.parametrize("how", ["kill", "isolate"])
@pytest.mark.parametrize("names", ["abc", "abcde", "abW"])
def test_the_founder_fails_before_anybody_has_joined(names: str, how: str) -> None:
    """The only node with data is put back by voters that are empty still: they never had any."""
    group = Group(1, names)
    group.start()
    assert group.until(lambda: group.founded, 5.0)
    if how == "kill":
        group.kill("a")
    else:
        group.isolate("a")
    group.run(5.0)
    assert all(not node.log for node in group.nodes.values() if node.name != "a")
    group.heal()

    assert group.until(lambda: group.leader() is not None, HEALED_WITHIN_S)
    assert group.leader().name == "a"
    assert group.founded == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("acks", [0, 1, "all"])
def test_other_ack_rules(seed: int, acks: Acks) -> None:
    """The same under other rules; with acks=0 histories may differ, but the group ends in one."""
    storm(1000 + seed, "abc", acks, 25)


DEGRADING = [("abW", 1), ("abW", "majority"), ("abc", "all"), ("abcW", "all"), ("abcde", "all")]


@pytest.mark.parametrize(("names", "acks"), DEGRADING)
def test_nothing_is_lost_where_the_rule_may_go_on_with_fewer_copies(names: str, acks: Acks) -> None:
    """What was acknowledged without a voter is in every later primary, whoever dies in which order."""
    degraded = restored = 0
    for seed in range(2000, 2008):
        group = storm(seed, names, acks, 30, degrade_after_s=0.5)
        assert not group.leader().rules[-1].away, "protection is back"
        degraded, restored = degraded + group.degraded, restored + group.restored
    assert degraded >= 3
    assert restored >= 3


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("names", "acks"), DEGRADING)
def test_nothing_is_lost_with_fewer_copies_for_long(names: str, acks: Acks) -> None:
    """The same, many times over, with other deadlines."""
    for seed in range(20_000, 20_300):
        storm(seed, names, acks, 60, degrade_after_s=(0.05, 0.5, 2.0)[seed % 3])


def test_who_was_left_out_is_not_elected() -> None:
    """b is away, a goes on alone with the witness's word, a dies, b returns: it waits for a."""
    group = Group(1, "abW", 1, degrade_after_s=0.5)
    a = group.form()
    b = next(n for n in group.followers() if not n.witness)
    group.kill(b.name)
    assert group.until(lambda: group.degraded, 5.0)
    value = group.write(a)
    assert group.until(lambda: value in group.acknowledged, 1.0)
    group.kill(a.name)
    group.start(b.name)
    group.run(20.0)
    assert not group.primaries()
    assert "without the candidate" in b.election.problem
    group.start(a.name)
    assert group.until(lambda: any(e.value == value for e in b.log), 5.0)
    assert group.until(lambda: group.restored, 5.0)
    group.run(0.5)
    group.kill(a.name)
    assert group.until(lambda: group.leader() is b, 5.0), "it holds all again"


def test_a_voter_that_comes_and_goes_stops_nobody() -> None:
    """b is back, counts again by a proposal, and is gone before that commits: a goes on alone once more."""
    group = Group(1, "abW", 1, degrade_after_s=0.5)
    leader = group.form()
    other = next(n for n in group.followers() if not n.witness)
    group.kill(other.name)
    for turn in range(8):
        lowered = group.degraded
        value = group.write(leader)
        assert group.until(lambda value=value: value in group.acknowledged, 5.0), turn
        assert group.degraded == lowered + 1
        restored = group.restored
        group.start(other.name)
        assert group.until(lambda restored=restored: group.restored > restored, 5.0)
        group.kill(other.name)
    group.start(other.name)
    assert group.until(lambda: len(leader.rules) == 1 and not leader.rules[-1].away, 5.0)
    assert group.leader() is leader


def test_a_minority_does_not_lower_the_rule() -> None:
    """Without the witness and the other data node nobody agrees: writes stay unacknowledged."""
    group = Group(1, "abW", 1, degrade_after_s=0.5)
    leader = group.form()
    for name in group.nodes:
        group.isolate(name)
    value = group.write(leader)
    group.run(10.0)
    assert not group.degraded
    assert value not in group.acknowledged


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("names", ["abc", "abcde", "abW", "abcdW"])
def test_nothing_acknowledged_is_lost_for_long(names: str) -> None:
    """The same, many times over."""
    for seed in range(10_000, 10_400):
        storm(seed, names, "majority", 60)
        storm(seed, names, "majority", 12, born=True)


def measured(how: str, runs: int, names: str = "abc") -> tuple[list[float], list[float]]:
    """Seconds from the fault to the new epoch, and to the first write acknowledged in it."""
    primary: list[float] = []
    acknowledged: list[float] = []
    for seed in range(runs):
        group = Group(seed, names)
        group.form()
        group.writing(0.01)
        group.run(0.5 + group.chance.random())
        old = group.leader()
        epoch, moment = old.primary_epoch, group.now
        others = [n for n in group.nodes if n != old.name]
        match how:
            case "kill":
                group.kill(old.name)
            case "pause":
                group.pause(old.name)
            case "isolate":
                group.isolate(old.name)
            case "out":
                for other in others:
                    group.cut(old.name, other, both=False)
            case "in":
                for other in others:
                    group.cut(other, old.name, both=False)
        assert group.until(lambda: group.acknowledged_after(moment, epoch), 10.0)
        acknowledged.append(group.now - moment)
        primary.append(group.begun[-1][0] - moment)
    return primary, acknowledged


def test_a_killed_primary_is_replaced_at_once() -> None:
    """A refused connection is news: nobody waits for a timeout."""
    _, acknowledged = measured("kill", 30)
    assert statistics.median(acknowledged) <= 0.06
    assert max(acknowledged) <= 0.5


@pytest.mark.parametrize("how", ["pause", "isolate", "out", "in"])
def test_a_silent_primary_is_replaced_after_its_limit(how: str) -> None:
    """Frozen, or cut off in one direction or both: median at most 1.4 s, worst of 30 below 3 s."""
    _, acknowledged = measured(how, 30)
    assert statistics.median(acknowledged) <= 1.4
    assert max(acknowledged) <= 3.0


@pytest.mark.parametrize("seed", range(10))
def test_a_short_pause_changes_nothing(seed: int) -> None:
    """A primary that comes back within its heartbeat limit stays primary, and nobody stands."""
    group = Group(seed)
    leader = group.form()
    group.writing(0.01)
    group.run(group.chance.random())
    before = group.elections
    for _ in range(5):
        group.pause(leader.name)
        group.run(0.7)
        group.resume(leader.name)
        group.run(0.5 + group.chance.random())
    assert group.elections == before
    assert group.leader() is leader


@pytest.mark.parametrize("seed", range(5))
def test_a_pause_of_all_changes_nothing(seed: int) -> None:
    """When the whole group stood still, what nobody heard proves nothing about the primary."""
    group = Group(seed)
    leader = group.form()
    before = group.elections
    for name in group.nodes:
        group.pause(name)
    group.run(5.0)
    for name in group.nodes:
        group.resume(name)
        group.run(0.01)
    group.run(3.0)
    assert group.elections == before
    assert group.leader() is leader


@pytest.mark.parametrize("seed", range(5))
def test_a_primary_that_wakes_late_cannot_acknowledge(seed: int) -> None:
    """Frozen beyond its limit, it finds itself superseded, acknowledges nothing more, and follows."""
    group = Group(seed)
    old = group.form()
    group.writing(0.01)
    group.run(0.5)
    epoch = old.primary_epoch
    group.pause(old.name)
    assert group.until(lambda: group.acknowledged_after(group.now - 5, epoch), 10.0)
    group.resume(old.name)
    woken = group.now
    group.run(2.0)
    assert old.primary_epoch == 0
    assert old.stream
    assert not [t for t, e in group.acknowledged.values() if t > woken and e == epoch]


def test_a_cut_off_follower_disturbs_nobody() -> None:
    """It asks and asks; when it comes back the primary and its epoch are the same."""
    group = Group(7)
    leader = group.form()
    follower = next(group.followers())
    group.writing(0.01)
    group.isolate(follower.name)
    group.run(20.0)
    before = group.elections
    group.heal()
    group.run(3.0)
    assert group.leader() is leader
    assert group.elections == before == 1
    assert follower.stream


def test_a_link_between_two_nodes_breaks() -> None:
    """A follower that alone cannot reach the primary does not become one: the others still hear it."""
    group = Group(3)
    leader = group.form()
    follower = next(group.followers())
    group.cut(leader.name, follower.name)
    group.run(10.0)
    assert group.leader() is leader
    assert group.elections == 1


def test_without_a_majority_there_is_no_primary() -> None:
    """A cut-off primary steps down within T; nobody takes over until most voters are there."""
    group = Group(11)
    leader = group.form()
    for other in list(group.followers()):
        group.kill(other.name)
    assert group.until(lambda: not group.primaries(), 1.5)
    group.run(5.0)
    assert not group.primaries()
    assert "no answer from" in leader.election.problem
    group.heal()
    assert group.until(group.leader, 3.0)


def test_with_acks_0_the_loss_is_bounded_by_t() -> None:
    """Asynchronous: a primary that is cut off stops acknowledging T seconds after its last confirmation."""
    group = Group(5, acks=0)
    leader = group.form()
    group.writing(0.01)
    group.run(0.5)
    cut_at = group.now
    group.isolate(leader.name)
    epoch = leader.primary_epoch
    group.run(5.0)
    late = [t for t, e in group.acknowledged.values() if e == epoch]
    assert max(late) <= cut_at + group.settings.step_down_s + 0.3
    assert group.acknowledged_after(cut_at, epoch) is not None


@pytest.mark.parametrize("names", ["abc", "abW"])
def test_nodes_wiped_empty_never_outvote_the_one_with_the_data(names: str) -> None:
    """Two of three start empty: they form nothing, and the data comes back with the third."""
    group = Group(2, names)
    leader = group.form()
    values = [group.write(leader) for _ in range(5)]
    group.run(0.5)
    for name in group.nodes:
        group.kill(name)
    group.run(1.0)
    wiped = [n for n in group.nodes if n != leader.name]
    for name in wiped:
        group.wipe(name)
        group.start(name)
    group.run(20.0)
    assert group.founded == 1
    assert not group.primaries()
    group.start(leader.name)
    group.run(10.0)
    assert group.founded == 1
    assert {e.value for e in leader.log} >= set(values)
    assert not [n for n in group.primaries() if n.name in wiped]


def test_one_wiped_node_joins_the_group_that_exists() -> None:
    """It comes back empty and follows; it does not count as the voter that it was."""
    group = Group(4)
    leader = group.form()
    lost = next(group.followers())
    group.kill(lost.name)
    group.wipe(lost.name)
    group.start(lost.name)
    assert group.until(lambda: lost.stream, 5.0)
    group.run(1.0)
    assert lost.lineage == leader.lineage
    assert lost.log
    assert all(v.store_id != lost.store_id for v in leader.rules[-1].voters)


def test_a_group_waits_for_its_last_member() -> None:
    """Two of three listed nodes form nothing, however long, and say for whom they wait."""
    group = Group(1)
    group.start("a", "b")
    group.run(30.0)
    assert group.founded == 0
    assert "no answer from c" in group.nodes["a"].election.problem
    group.start("c")
    assert group.until(group.leader, 2.0)
    assert group.founded == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_group_is_formed_once_whatever_happens_meanwhile(seed: int) -> None:
    """Crashes and loss while a group is formed: one lineage in the end, and all are in it."""
    group = Group(seed, "abcd")
    group.loss = 0.2
    group.start()
    for _ in range(12):
        group.run(group.chance.choice((0.001, 0.003, 0.01, 0.05)))
        name = group.chance.choice("abcd")
        if group.nodes[name].up:
            group.kill(name)
        else:
            group.start(name)
    group.heal()
    assert group.until(group.leader, HEALED_WITHIN_S)
    group.run(3.0)
    assert len({n.lineage for n in group.nodes.values()}) == 1
    assert group.founded == 1
