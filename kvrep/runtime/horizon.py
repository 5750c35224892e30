"""Two things that feeds need to know of a node: what no failover can take back, and the log they hold."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvrep.errors import Error
from kvrep.model.feed_state import FeedState
from kvrep.model.position import OFFSET_MAX
from kvrep.model.record import FEEDS_KEYSPACE

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["HeldByFeeds", "all_committed", "horizon"]

log = logging.getLogger("kvrep.feeds")


def horizon(node: Node) -> int:
    """The last offset that is visible here and that no failover without force can take back.

    Where commits need the copies of a quorum, that is all that is committed: a promotion meets every such
    quorum. With ``acks=0`` it is what every data voter holds, because anyone of them may be the next primary.
    """
    engine = node.engine
    shown = engine.view.last
    if all_committed(node):
        return shown
    effective, proposed = engine.configurations_in_force()
    rules = [effective] if proposed is None else [effective, proposed[1]]
    voters = {v.store_id for rule in rules for v in rule.voters if not v.witness} - {engine.home.store_id}
    shipping, replaying = node.shipping, node.replaying
    if shipping is not None:
        acked = {i: slot.acked for i, slot in shipping.slots.all()}
    elif replaying is not None:
        acked = {slot.store_id: slot.acked for slot in replaying.slots}
        voters.discard(replaying.primary_id)  # what it told to be committed, it holds
    else:
        acked = {}
    return min([shown, *(acked.get(voter, 0) for voter in voters)])


def all_committed(node: Node) -> bool:
    """Whether, under the rules in force, nothing that is committed can be taken back."""
    effective, proposed = node.engine.configurations_in_force()
    rules = [effective] if proposed is None else [effective, proposed[1]]
    return all(rule.synchronous or rule.data_voters < 2 for rule in rules)


class HeldByFeeds:
    """Which part of the log the named feeds of a store hold back. Called on the flush thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._released: set[str] = set()
        self._unreadable: set[str] = set()

    def __call__(self) -> int:
        """The first offset that some feed still needs, those left out that need more than the cap.

        It looks at what is flushed: a place that is older than the present one holds back a little more.
        """
        engine = self._node.engine
        bytes_max = engine.options.retention_bytes_max
        needed = OFFSET_MAX
        try:
            rows = engine.tree.items(FEEDS_KEYSPACE)
        except Error:
            return 0  # it cannot be told now: all is kept
        for key, value in rows:
            name = key.decode(errors="replace")
            needs = self._needs(name, value)
            if needs is None:  # it cannot be told either: all that a feed can hold is kept
                needed = min(needed, engine.committer.log.first_within(bytes_max))
            elif engine.committer.log.bytes_after(needs - 1) <= bytes_max:
                self._released.discard(name)
                needed = min(needed, needs)
            elif name not in self._released:
                self._released.add(name)
                log.warning("%s: the log is no longer kept for the feed %s: it needs more than"
                            " retention_bytes_max", self._node.label, name)  # fmt: skip
        return needed

    def _needs(self, name: str, value: bytes) -> int | None:
        """The first record that a feed needs; ``None`` when its state cannot be read, which is told once."""
        try:
            needs = FeedState.unpack(value).needs
        except Error as error:
            if name not in self._unreadable:
                self._unreadable.add(name)
                log.warning("%s: the place of the feed %s cannot be read, so the log is kept up to"
                            " retention_bytes_max: %s", self._node.label, name, error)  # fmt: skip
            return None
        self._unreadable.discard(name)
        return needs
