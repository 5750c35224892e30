"""Going on with fewer copies than the ack rule asks for, as ``runtime/degrading.py`` does it.

The order is what matters: the lowered rule is logged and stored by all copies that are left, most voters
store from which record on it holds, and only then it is in force.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrep.model.configuration import Voter
from kvrep.model.position import Position
from kvrep.replication.promotion import most

if TYPE_CHECKING:
    from kvrep.testing.simulate.feeding import Feeding
    from kvrep.testing.simulate.node import Node

__all__ = ["Degrading"]

TICK_S = 0.1
RETRY_S = 1.0
ASK_TIMEOUT_S = 0.5


class Degrading:
    """For as long as one epoch of one node lasts."""

    def __init__(self, feeding: Feeding) -> None:
        self._feeding = feeding
        self._node = feeding.node
        self._short_since: float | None = None
        self._next = 0.0

    def tick(self) -> None:
        """Copies that have been missing for too long are done without, if most voters agree."""
        feeding, node = self._feeding, self._node
        if feeding.stopped or feeding.tracker is None:
            return
        tracker, now = feeding.tracker, node.now
        after_s = tracker.configuration.degrade_after_s
        if not after_s or not tracker.missing(feeding.joined):
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        elif now - self._short_since >= after_s and now >= self._next:
            self._next = now + RETRY_S
            self._ask(lambda target: True, self._go_on_without)
        node.after(TICK_S, self.tick)

    def _go_on_without(self) -> None:
        """Most voters are there: order the rule without those whose copies are missing."""
        feeding, node = self._feeding, self._node
        tracker = feeding.tracker
        if tracker is None or not tracker.missing(feeding.joined):
            return
        proposed, old = tracker.proposed, node.disk.configurations[-1][1]
        here = {node.store_id, *feeding.joined}
        lost = [v.store_id for v in old.voters if v.counts and v.store_id not in here]
        if proposed is None or not proposed[1].away or lost:
            now = [v.store_id for v in tracker.configuration.voters]
            if proposed is not None and now != [v.store_id for v in old.voters]:
                return  # another change is not committed yet
            lowered = old.without(lost, node.committed + 1).changed(node.store_id, away=False)
            if not feeding.log_configuration(lowered):
                return
        self._next = node.now + RETRY_S
        self._look(node.now + RETRY_S)

    def _look(self, until: float) -> None:
        """Wait until all copies that are left hold it, and the start of the epoch."""
        feeding, node = self._feeding, self._node
        tracker = feeding.tracker
        proposed = tracker.proposed if tracker is not None else None
        if tracker is None or proposed is None or not proposed[1].away or node.now > until:
            return
        offset = max(proposed[0], tracker.epoch_start)
        if tracker.proposed_reached() < offset:
            node.after(TICK_S / 10, lambda: self._look(until))
            return
        position = Position(feeding.epoch, offset)
        if node.lower(position, node):
            self._ask(lambda target: target.lower(position, node), lambda: self._effect(offset))

    def _effect(self, offset: int) -> None:
        tracker = self._feeding.tracker
        proposed = tracker.proposed if tracker is not None else None
        # Else those who were missing have come back meanwhile.
        if tracker is not None and proposed is not None and max(proposed[0], tracker.epoch_start) == offset:
            self._node.world.degraded += 1
            self._node.world.say(self._node, "goes on with fewer copies")
            self._feeding.effect()

    def _ask(self, what: Callable[[Node], bool], then: Callable[[], None]) -> None:
        """Ask every other voter; ``then``, once, when most of them (this node is one) say yes."""
        node, world = self._node, self._node.world
        configuration = node.disk.configurations[-1][1]
        agreed = {node.store_id}
        over = False

        def done(voter: Voter, answer: bool) -> None:
            nonlocal over
            if answer:
                agreed.add(voter.store_id)
            if not over and most(configuration, agreed, outside=False):
                over = True
                then()

        for voter in configuration.voters:
            if voter.store_id != node.store_id:
                target = world.nodes[voter.name]
                world.network.call(
                    node,
                    target,
                    _serve(target, what),
                    lambda answer, v=voter: done(v, answer),  # type: ignore[misc]
                    lambda _: None,
                    ASK_TIMEOUT_S,
                )


def _serve(target: Node, what: Callable[[Node], bool]) -> Callable[[Callable[[bool], None]], None]:
    def serve(give: Callable[[bool], None]) -> None:
        target.with_lead(lambda: decide(give))

    def decide(give: Callable[[bool], None]) -> None:
        answer = what(target)
        target.after(target.sync_s(), lambda: give(answer))

    return serve
