"""Election, promotion and replication together, in virtual time: how fast it heals, and what changes nothing.

The model is :mod:`kvrep.testing.simulate`; that nothing is lost whatever happens is tested with its seeds, in
``tests/unit/testing/test_simulate.py``. Figures here are virtual: what decisions and timeouts cost, without
disks and processors.
"""

from __future__ import annotations

import statistics

import pytest

from kvrep.model.configuration import Acks
from kvrep.model.record import Kind
from kvrep.testing.simulate.node import Node
from kvrep.testing.simulate.plan import live
from kvrep.testing.simulate.world import Settings, World

HEALED_WITHIN_S = 8.0


def group(seed: int, names: str = "abc", acks: Acks = "majority") -> World:
    """A group that is not started yet."""
    return World(seed, Settings(names=names, acks=acks))


def kill(world: World, name: str) -> None:
    world.nodes[name].crash(power=False)


def followers(world: World) -> list[Node]:
    return [n for n in world.nodes.values() if not n.primary_epoch]


def problem(node: Node) -> str:
    """What keeps this node from knowing or being a primary."""
    assert node.electing is not None
    return node.electing.election.problem


def joined(node: Node) -> bool:
    """Whether it follows somebody."""
    following = node.following
    return following is not None and following.stream is not None and following.stream.receiver.epoch > 0


def written(node: Node) -> set[int]:
    """The users' writes in its log, by value."""
    return {int(e.record.payload[1][1]) for e in node.disk.entries if e.record.kind == Kind.WRITE}


def away(node: Node) -> bool:
    """Whether the newest rule in its log goes on without somebody."""
    return bool(node.disk.configurations[-1][1].away)


def degrading(seed: int) -> World:
    """Two data nodes and a witness, which may go on with fewer copies after half a second."""
    return World(seed, Settings(names="abW", acks=1, degrade_after_s=0.5))


def test_who_was_left_out_is_not_elected() -> None:
    """b is away, a goes on alone with the witness's word, a dies, b returns: it waits for a."""
    world = degrading(1)
    a = world.form()
    b = next(n for n in followers(world) if not n.witness)
    kill(world, b.name)
    assert world.until(lambda: world.degraded, 5.0)
    value = world.write(a)
    assert world.until(lambda: value in world.check.acknowledged, 1.0)
    kill(world, a.name)
    world.start(b.name)
    world.run(20.0)
    assert not world.primaries()
    assert "without the candidate" in problem(b)
    world.start(a.name)
    assert world.until(lambda: value in written(b), 5.0)
    assert world.until(lambda: a.feeding and not away(a) and a.committed == a.disk.end, 5.0)
    world.run(0.5)
    kill(world, a.name)
    assert world.until(lambda: world.leader() is b, 5.0), "it holds all again"


DEGRADING: list[tuple[str, Acks]] = [
    ("abW", 1),
    ("abW", "majority"),
    ("abc", "all"),
    ("abcW", "all"),
    ("abcde", "all"),
]


@pytest.mark.parametrize(("names", "acks"), DEGRADING)
def test_nothing_is_lost_where_the_rule_may_go_on_with_fewer_copies(names: str, acks: Acks) -> None:
    """What was acknowledged without a voter is in every later primary, whoever dies in which order."""
    degraded = 0
    for seed in range(2000, 2012):
        world = World(seed, Settings(names=names, acks=acks, degrade_after_s=0.1))
        live(world)
        degraded += world.degraded
    assert degraded >= 3


@pytest.mark.parametrize("how", ["kill", "isolate"])
@pytest.mark.parametrize("names", ["abc", "abcde", "abW"])
def test_the_founder_fails_before_anybody_has_joined(names: str, how: str) -> None:
    """The only node with data is put back by voters that are empty still: they never had any."""
    world = group(1, names)
    world.start()
    assert world.until(lambda: world.begun, 5.0)
    if how == "kill":
        kill(world, "a")
    else:
        world.isolate("a")
    world.run(5.0)
    assert all(not node.disk.end for node in world.nodes.values() if node.name != "a")
    world.heal()

    assert world.until(world.leader, HEALED_WITHIN_S)
    leader = world.leader()
    assert leader is not None
    assert leader.name == "a"
    assert world.lineages == 1


def test_a_voter_that_comes_and_goes_stops_nobody() -> None:
    """b is back, counts again by a proposal, and is gone before that commits: a goes on alone once more."""
    world = degrading(1)
    leader = world.form()
    other = next(n for n in followers(world) if not n.witness)
    kill(world, other.name)
    for turn in range(8):
        lowered = world.degraded
        assert world.until(lambda lowered=lowered: world.degraded > lowered, 8.0), turn
        value = world.write(leader)
        assert world.until(lambda value=value: value in world.check.acknowledged, 5.0), turn
        world.start(other.name)
        assert world.until(lambda: not away(leader), 5.0)
        kill(world, other.name)
    world.start(other.name)
    assert world.until(lambda: not away(leader) and leader.committed == leader.disk.end, 8.0)
    assert world.leader() is leader


def test_a_minority_does_not_lower_the_rule() -> None:
    """Without the witness and the other data node nobody agrees: writes stay unacknowledged."""
    world = degrading(1)
    leader = world.form()
    for name in world.nodes:
        world.isolate(name)
    value = world.write(leader)
    assert value
    world.run(10.0)
    assert not world.degraded
    assert value not in world.check.acknowledged


def measured(how: str, runs: int, names: str = "abc") -> tuple[list[float], list[float]]:
    """Seconds from the fault to the new epoch, and to the first write acknowledged in it."""
    primary: list[float] = []
    acknowledged: list[float] = []
    for seed in range(runs):
        world = group(seed, names)
        world.form()
        world.writing(0.01)
        world.run(0.5 + world.chance.random())
        old = world.leader()
        epoch, moment = old.primary_epoch, world.time.now
        others = [n for n in world.nodes if n != old.name]
        match how:
            case "kill":
                kill(world, old.name)
            case "pause":
                old.pause()
            case "isolate":
                world.isolate(old.name)
            case "out":
                for other in others:
                    world.cut(old.name, other, both=False)
            case "in":
                for other in others:
                    world.cut(other, old.name, both=False)
        assert world.until(lambda: world.acknowledged_after(moment, epoch), 10.0)
        acknowledged.append(world.time.now - moment)
        primary.append(world.begun[-1][0] - moment)
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
    world = group(seed)
    leader = world.form()
    world.writing(0.01)
    world.run(world.chance.random())
    before = len(world.begun)
    for _ in range(5):
        leader.pause()
        world.run(0.7)
        leader.resume()
        world.run(0.5 + world.chance.random())
    assert len(world.begun) == before
    assert world.leader() is leader


@pytest.mark.parametrize("seed", range(5))
def test_a_pause_of_all_changes_nothing(seed: int) -> None:
    """When the whole group stood still, what nobody heard proves nothing about the primary."""
    world = group(seed)
    leader = world.form()
    before = len(world.begun)
    for name in world.nodes:
        world.nodes[name].pause()
    world.run(5.0)
    for name in world.nodes:
        world.nodes[name].resume()
        world.run(0.01)
    world.run(3.0)
    assert len(world.begun) == before
    assert world.leader() is leader


@pytest.mark.parametrize("seed", range(5))
def test_a_primary_that_wakes_late_cannot_acknowledge(seed: int) -> None:
    """Frozen beyond its limit, it finds itself superseded, acknowledges nothing more, and follows."""
    world = group(seed)
    old = world.form()
    world.writing(0.01)
    world.run(0.5)
    epoch = old.primary_epoch
    old.pause()
    assert world.until(lambda: world.acknowledged_after(world.time.now - 5, epoch), 10.0)
    old.resume()
    woken = world.time.now
    world.run(2.0)
    assert old.primary_epoch == 0
    assert joined(old)
    assert not [t for t, e in world.check.acknowledged.values() if t > woken and e == epoch]


def test_a_cut_off_follower_disturbs_nobody() -> None:
    """It asks and asks; when it comes back the primary and its epoch are the same."""
    world = group(7)
    leader = world.form()
    follower = followers(world)[0]
    world.writing(0.01)
    world.isolate(follower.name)
    world.run(20.0)
    before = len(world.begun)
    world.heal()
    world.run(3.0)
    assert world.leader() is leader
    assert len(world.begun) == before == 1
    assert joined(follower)


def test_a_link_between_two_nodes_breaks() -> None:
    """A follower that alone cannot reach the primary does not become one: the others still hear it."""
    world = group(3)
    leader = world.form()
    follower = followers(world)[0]
    world.cut(leader.name, follower.name)
    world.run(10.0)
    assert world.leader() is leader
    assert len(world.begun) == 1


def test_without_a_majority_there_is_no_primary() -> None:
    """A cut-off primary steps down within T; nobody takes over until most voters are there."""
    world = group(11)
    leader = world.form()
    for other in followers(world):
        kill(world, other.name)
    assert world.until(lambda: not world.primaries(), 1.5)
    world.run(5.0)
    assert not world.primaries()
    assert "no answer from" in problem(leader)
    world.heal()
    assert world.until(world.leader, 3.0)


def test_with_acks_0_the_loss_is_bounded_by_t() -> None:
    """Asynchronous: a primary that is cut off stops acknowledging T seconds after its last confirmation."""
    world = group(5, acks=0)
    leader = world.form()
    world.writing(0.01)
    world.run(0.5)
    cut_at = world.time.now
    world.isolate(leader.name)
    epoch = leader.primary_epoch
    world.run(5.0)
    late = [t for t, e in world.check.acknowledged.values() if e == epoch]
    assert max(late) <= cut_at + world.settings.election.step_down_s + 0.3
    assert world.acknowledged_after(cut_at, epoch) is not None


@pytest.mark.parametrize("names", ["abc", "abW"])
def test_nodes_wiped_empty_never_outvote_the_one_with_the_data(names: str) -> None:
    """Two of three start empty: they form nothing, and the data comes back with the third."""
    world = group(2, names)
    leader = world.form()
    values = [world.write(leader) for _ in range(5)]
    world.run(0.5)
    for name in world.nodes:
        kill(world, name)
    world.run(1.0)
    wiped = [n for n in world.nodes if n != leader.name]
    for name in wiped:
        world.wipe(name)
        world.start(name)
    world.run(20.0)
    assert world.lineages == 1
    assert not world.primaries()
    world.start(leader.name)
    world.run(10.0)
    assert world.lineages == 1
    assert written(leader) >= set(values)
    assert not [n for n in world.primaries() if n.name in wiped]


def test_one_wiped_node_joins_the_group_that_exists() -> None:
    """It comes back empty and follows; it does not count as the voter that it was."""
    world = group(4)
    leader = world.form()
    lost = followers(world)[0]
    kill(world, lost.name)
    world.wipe(lost.name)
    world.start(lost.name)
    assert world.until(lambda: joined(lost), 5.0)
    world.run(1.0)
    assert lost.disk.lineage == leader.disk.lineage
    assert lost.disk.end
    assert all(v.store_id != lost.store_id for v in leader.disk.configurations[-1][1].voters)


def test_a_group_waits_for_its_last_member() -> None:
    """Two of three listed nodes form nothing, however long, and say for whom they wait."""
    world = group(1)
    world.start("a", "b")
    world.run(30.0)
    assert world.lineages == 0
    assert "no answer from c" in problem(world.nodes["a"])
    world.start("c")
    assert world.until(world.leader, 2.0)
    assert world.lineages == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_group_is_formed_once_whatever_happens_meanwhile(seed: int) -> None:
    """Crashes and loss while a group is formed: one lineage in the end, and all are in it."""
    world = group(seed, "abcd")
    world.network.loss = 0.2
    world.start()
    for _ in range(12):
        world.run(world.chance.choice((0.001, 0.003, 0.01, 0.05)))
        name = world.chance.choice("abcd")
        if world.nodes[name].up:
            kill(world, name)
        else:
            world.start(name)
    world.heal()
    assert world.until(world.leader, HEALED_WITHIN_S)
    world.run(3.0)
    assert len({n.disk.lineage for n in world.nodes.values()}) == 1
    assert world.lineages == 1
