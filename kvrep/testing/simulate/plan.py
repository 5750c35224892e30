"""What goes wrong in one run: drawn from the seed alone.

Each seed uses only some kinds of faults (all of them at once hide each other), in bursts and with pauses
between, then everything is mended and the cluster must be well again in time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from kvrep.model.configuration import Acks
from kvrep.testing.simulate.invariants import Violation
from kvrep.testing.simulate.promoting import ByHand
from kvrep.testing.simulate.world import Settings, World

if TYPE_CHECKING:
    from kvrep.testing.simulate.node import Node

__all__ = ["HEALS_WITHIN_S", "draw_settings", "live"]

HEALS_WITHIN_S = 20.0
FAULTS = (10, 28)
PAUSES_S = (0.002, 0.01, 0.03, 0.1, 0.3, 1.2)
"""Between two faults: within one message, one sync, one round of an election, or longer than its timeout."""
WRITE_EVERY_S = 0.06


def draw_settings(chance: Random) -> Settings:
    """How large, under which rule, with which limits."""
    elects = chance.random() < 0.6
    names = chance.choice(("abc", "abc", "abc", "abcde", "abcd", "ab", *(("abW", "abcdW") if elects else ())))
    sync: tuple[Acks, ...] = ("majority", "majority", 1, "all", 2 if len(names) > 3 else 1)
    acks = chance.choice(sync) if chance.random() < 0.92 or not elects else 0
    return Settings(
        names=names,
        observers="x" if chance.random() < 0.3 else "",
        acks=acks,
        degrade_after_s=chance.choice((0.1, 0.5)) if acks != 0 and chance.random() < 0.25 else 0.0,
        elects=elects,
        segment_bytes_max=chance.choice((120, 300, 1 << 20)),
        credit_bytes=chance.choice((400, 8 << 20)),
        lag_records_max=chance.choice((0, 1, 3, 10)) if acks == 0 else 0,
    )


def live(world: World) -> None:
    """One whole life: form, write, suffer, heal. Raises :class:`Violation`."""
    faults = Faults(world)
    if world.elects and world.chance.random() < 0.2:
        _form_in_trouble(world, faults)
    else:
        world.form()
    world.writing(WRITE_EVERY_S)
    pauses = PAUSES_S + ((1.2, 1.2) if world.settings.degrade_after_s else ())
    for _ in range(world.chance.randint(*FAULTS)):
        faults.strike()
        world.run(world.chance.choice(pauses))
    faults.heal()
    _get_well(world)


def _form_in_trouble(world: World, faults: Faults) -> None:
    """Nodes come up one after the other, and things go wrong while they form their group."""
    for name in world.nodes:
        world.start(name)
        world.run(world.chance.random() * 0.01)
    for _ in range(6):
        world.run(world.chance.random() * 0.006)
        faults.strike()


def _get_well(world: World) -> None:
    """One primary, a write of its own acknowledged, all follow it, nothing acknowledged missing."""
    healed = world.time.now

    def well() -> bool:
        leader = world.leader()
        if leader is None or leader.feeding is None or leader.committed <= leader.feeding.start:
            return False
        if len(world.primaries()) != 1:
            return False
        moment, epoch = world.check.newest
        if moment <= healed or epoch != leader.primary_epoch:
            return False
        return all(n.disk.last.epoch == leader.primary_epoch and n.committed for n in world.data_nodes())

    settled = world.until(well, HEALS_WITHIN_S)
    if settled:
        world.run(0.3)  # what was still on its way when all was mended
        settled = world.until(well, HEALS_WITHIN_S)
    if not settled:
        told = [
            f"{n.name}: epoch {n.primary_epoch}, log to {n.disk.last}, committed {n.committed}, promised"
            f" {n.disk.promised}" + (f", {n.electing.election.problem}" if n.electing is not None else "")
            for n in world.nodes.values()
        ]
        raise Violation("the cluster heals", f"not well {HEALS_WITHIN_S:g} s after all was mended: {told}")
    if world.synchronous:
        (leader,) = world.primaries()
        world.check.nothing_missing(leader)
        for node in world.data_nodes():
            world.check.content(node)


@dataclass(frozen=True, slots=True)
class _Kind:
    do: Callable[[], None]
    weight: int = 1


class Faults:
    """What can go wrong; ``strike`` does one of the kinds that this seed uses."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.chance = world.chance
        kinds = self._kinds()
        names = self.chance.sample(sorted(kinds), self.chance.randint(4, 9))
        if world.settings.degrade_after_s:
            names += ["kill", "isolate"]
        chosen = [*names, "start", "mend", "flush", *([] if world.elects else ["promote", "promote"])]
        self._chosen = [kinds[name] for name in chosen for _ in range(kinds[name].weight)]
        world.network.twice = self.chance.choice((0.0, 0.1))
        for node in world.nodes.values():
            node.clock.rate = self.chance.choice((1.0, 1.0, 0.9, 1.1))

    def _kinds(self) -> dict[str, _Kind]:
        return {
            "kill": _Kind(self._kill, 2),
            "power": _Kind(self._power, 3),
            "power of all": _Kind(self._power_of_all),
            "start": _Kind(self._start, 4),
            "pause": _Kind(self._pause),
            "resume": _Kind(self._resume),
            "cut": _Kind(self._cut),
            "cut one way": _Kind(self._cut_one_way),
            "isolate": _Kind(self._isolate, 2),
            "mend": _Kind(self.world.mend, 2),
            "loss": _Kind(self._loss),
            "delay": _Kind(self._delay),
            "reset": _Kind(self._reset),
            "full": _Kind(self._full),
            "eio": _Kind(self._eio),
            "slow": _Kind(self._slow, 2),
            "jump": _Kind(self._jump),
            "wall": _Kind(self._wall),
            "flush": _Kind(self._flush),
            "trim": _Kind(self._trim),
            "reconfigure": _Kind(self._reconfigure, 2),
            "rot": _Kind(self._rot),
            "promote": _Kind(self._promote),
            "burst": _Kind(self._burst),
        }

    def strike(self) -> None:
        self.chance.choice(self._chosen).do()

    def heal(self) -> None:
        """Everything works again; where no node elects, somebody looks after the cluster from now on."""
        self.world.heal()
        if not self.world.elects:
            self._operate()

    # -- choosing ----------------------------------------------------------------------------------

    def _one(self, *, up: bool = True) -> Node | None:
        found = [n for n in self.world.nodes.values() if n.up == up]
        return self.chance.choice(found) if found else None

    def _primary_or_one(self) -> Node | None:
        """Primaries are where it hurts."""
        leader = self.world.leader()
        return leader if leader is not None and self.chance.random() < 0.5 else self._one()

    def _two(self) -> tuple[Node, Node]:
        one, other = self.chance.sample(sorted(self.world.nodes), 2)
        return self.world.nodes[one], self.world.nodes[other]

    # -- processes ---------------------------------------------------------------------------------

    def _kill(self) -> None:
        node = self._primary_or_one()
        if node is not None:
            node.crash(power=False)

    def _power(self) -> None:
        node = self._primary_or_one()
        if node is not None:
            node.crash(power=True)
            if self.chance.random() < 0.5:
                node.start()

    def _power_of_all(self) -> None:
        for node in self.world.nodes.values():
            if node.up:
                node.crash(power=True)
        for node in self.world.nodes.values():
            if self.chance.random() < 0.8:
                node.start()

    def _start(self) -> None:
        node = self._one(up=False)
        if node is not None:
            node.start()

    def _pause(self) -> None:
        node = self._primary_or_one()
        if node is not None and not node.paused:
            self.world.say(node, "is stopped (SIGSTOP)")
            node.pause()
            self.world.time.after(self.chance.choice((0.05, 0.5, 2.0)), lambda: self._go_on(node))

    def _resume(self) -> None:
        for node in self.world.nodes.values():
            self._go_on(node)

    def _go_on(self, node: Node) -> None:
        if node.paused:
            self.world.say(node, "goes on (SIGCONT)")
            node.resume()

    # -- network -----------------------------------------------------------------------------------

    def _cut(self) -> None:
        one, other = self._two()
        self.world.say(one, "is cut off from %s", other.name)
        self.world.cut(one.name, other.name)

    def _cut_one_way(self) -> None:
        one, other = self._two()
        self.world.say(one, "does not reach %s any more", other.name)
        self.world.cut(one.name, other.name, both=False)

    def _isolate(self) -> None:
        node = self._primary_or_one()
        if node is not None:
            self.world.say(node, "is cut off from all")
            self.world.isolate(node.name)

    def _loss(self) -> None:
        self.world.network.loss = self.chance.choice((0.02, 0.1, 0.3))

    def _delay(self) -> None:
        self.world.network.delay_s = self.chance.choice((0.02, 0.1, 0.4))

    def _reset(self) -> None:
        """A connection is reset: what was on its way in it is lost."""
        node = self._one()
        if node is not None and node.following is not None:
            node.following.reset()

    # -- disks -------------------------------------------------------------------------------------

    def _full(self) -> None:
        node = self._primary_or_one()
        if node is not None:
            self.world.say(node, "has no disk space")
            node.disk.full = True
            self.world.time.after(self.chance.choice((0.1, 1.0)), lambda: self._free(node))

    @staticmethod
    def _free(node: Node) -> None:
        node.disk.full = False

    def _eio(self) -> None:
        node = self._primary_or_one()
        if node is not None:
            self.world.say(node, "has a failing disk")
            node.disk.eio = True

    def _slow(self) -> None:
        node = self._primary_or_one()
        if node is not None:
            node.disk.slow = self.chance.choice((1.0, 30.0, 300.0))

    def _rot(self) -> None:
        """What an observer holds turns into something else that no local check can tell from the truth."""
        for node in self.world.nodes.values():
            if not node.voter and node.up and node.disk.entries:
                self.world.say(node, "holds something else from now on")
                node.crash(power=False)
                node.disk.rot(self.chance)
                node.rotten = True
                node.start()

    # -- clocks ------------------------------------------------------------------------------------

    def _jump(self) -> None:
        node = self._one()
        if node is not None:
            self.world.say(node, "has a clock that jumps ahead")
            node.clock.jump(self.chance.choice((0.3, 2.0, 3600.0)))

    def _wall(self) -> None:
        node = self._one()
        if node is not None:
            node.clock.jump_wall(self.chance.choice((-3600.0, 3600.0)))

    # -- life --------------------------------------------------------------------------------------

    def _flush(self) -> None:
        for node in self.world.nodes.values():
            if self.chance.random() < 0.5 and node.up and not node.paused:
                node.flush()

    def _trim(self) -> None:
        node = self._primary_or_one()
        if node is not None:
            node.flush()
            node.disk.trim(node.disk.copy.applied.offset)

    def _reconfigure(self) -> None:
        """Another rule, or other voters; enough for every rule stay."""
        leader = self.world.leader()
        if leader is None or leader.feeding is None or not self.world.synchronous:
            return
        now = leader.disk.configurations[-1][1]
        voters = [v.store_id for v in now.voters]
        gone = self.chance.choice(now.voters)
        if now.data_voters > 2 and gone.store_id != leader.store_id and self.chance.random() < 0.5:
            voters.remove(gone.store_id)
        acks: Acks = self.chance.choice((1, "majority", "all"))
        leader.feeding.reconfigure(acks, tuple(voters))

    def _burst(self) -> None:
        """Many writes at once."""
        for node in self.world.primaries():
            for _ in range(8):
                self.world.write(node, large=self.chance.random() < 0.3)

    # -- people ------------------------------------------------------------------------------------

    def _promote(self) -> None:
        """Somebody promotes a node by hand, and sometimes somebody else another one at the same time."""
        for _ in range(self.chance.choice((1, 1, 2))):
            self._promote_one()

    def _promote_one(self) -> None:
        """The others are sent to it when it worked."""
        node = self._one()
        if node is None or node.paused or node.witness or self.world.elects or node.promoting:
            return

        def ended(problem: str) -> None:
            node.promoting = False
            self.world.say(node, "is not promoted: %s" if problem else "is promoted%s", problem)
            if not problem:
                self._send_to(node)

        self.world.say(node, "is told to be primary")
        node.promoting = True
        ByHand(node, ended).begin()

    def _send_to(self, primary: Node) -> None:
        for node in self.world.nodes.values():
            known = node is not primary and node.up and not node.paused and not node.promoting
            if known and node.primary_epoch < primary.primary_epoch:
                node.follow(primary.name)

    def _operate(self) -> None:
        """From now on somebody looks after the cluster: promotes a node where none is primary."""
        leader = self.world.leader()
        if leader is None:
            self._promote_one()
        else:
            self._send_to(leader)
        self.world.time.after(0.5, self._operate)
