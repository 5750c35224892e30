"""Changes of the configuration: asked for by people, or brought about by followers that come and go.

Every change is a record in the log. One is under way at a time, and none before the start of the epoch is
committed; only going on without voters (``runtime/degrading.py``) need not wait for what may never commit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrep.errors import Error, Overloaded
from kvrep.model.configuration import Configuration
from kvrep.model.position import Position
from kvrep.replication.join import voter_change
from kvrep.storage.write import Write

if TYPE_CHECKING:
    from kvrep.runtime.followers import Followers
    from kvrep.runtime.leadership import Leadership
    from kvrep.runtime.node import Node
    from kvrep.runtime.session import FollowerSession

__all__ = ["Configuring", "add_voter", "add_witness", "reconfigure"]

log = logging.getLogger("kvrep.replication")

ADMIT_LAG_RECORDS = 1000
"""How far behind a follower may be to count as caught up: it is made a voter then."""

Change = Callable[[Configuration], Configuration]


# -- asked for by people -------------------------------------------------------------------------------


def reconfigure(node: Node, change: Change, timeout_s: float) -> Position:
    """Log a changed configuration and wait until it is committed under the old and the new rule."""
    deadline_s = time.monotonic() + timeout_s
    if node.shipping is not None:
        write = node.shipping.configuring.propose(change, deadline_s)
    else:
        with node.lock:
            node.engine.writable_as_primary()
            write = node.engine.configure(change(node.engine.configuration))
    position = node.writes.finish(write, deadline_s - time.monotonic())
    node.ack_timeout_s = node.engine.configuration.ack_timeout_s
    return position


def add_witness(node: Node, name: str, address: str, timeout_s: float) -> Position:
    """Make the node at ``address``, which was opened as a witness, a voter without data."""
    if node.shipping is None:
        node.engine.writable_as_primary()
        raise ValueError("this store serves no other nodes; open it with listen=")
    answer = node.roles.call(address, "standing", {}, timeout_s)
    store_id, lineage = bytes(answer["store_id"]), bytes(answer["lineage"])
    if str(answer["name"]) != name or not answer.get("witness"):
        raise ValueError(f"the node at {address} is not a witness named {name!r}")
    if lineage and lineage != node.engine.home.lineage:
        raise ValueError(f"the witness at {address} belongs to another group")

    def change(now: Configuration) -> Configuration:
        if now.voter(store_id) is not None:
            return now
        return now.with_voter(store_id, name, address, witness=True)

    return reconfigure(node, change, timeout_s)


def add_voter(node: Node, name: str, timeout_s: float) -> Position:
    """Make a known follower a voter, even one that was removed before; ``ValueError`` when it cannot be one."""
    shipping = node.shipping
    if shipping is None:
        node.engine.writable_as_primary()
        raise ValueError(f"no follower named {name!r} is known here")
    slots = shipping.slots

    def change(now: Configuration) -> Configuration:
        store_id, slot = next(((i, s) for i, s in slots.all() if s.name == name), (b"", None))
        if slot is None:
            raise ValueError(f"no follower named {name!r} is known here")
        if now.voter(store_id) is not None:
            return now
        if not slot.voter:
            raise ValueError(f"{name!r} was opened with voter=False")
        return now.with_voter(store_id, name, slot.address)

    return reconfigure(node, change, timeout_s)


# -- brought about by followers ------------------------------------------------------------------------


class Configuring:
    """Orders the changes of one role as primary. Any thread."""

    def __init__(self, node: Node, followers: Followers, leadership: Leadership) -> None:
        self._node = node
        self._engine = node.engine
        self._followers = followers
        self._leadership = leadership
        self._ordered: Write | None = None
        """The newest change. Guarded by the lock of the followers, which is held from the look at what is
        under way to the order: no epoch ends in between."""

    def _order(self, choose: Callable[[Configuration], Configuration | None]) -> Write | None:
        """Order what ``choose`` makes of the present configuration; ``None`` when it makes nothing of it, or
        another change, or the epoch itself, is not committed yet."""
        with self._followers.lock:
            tracker, before = self._followers.tracker, self._ordered
            busy = before is not None and not before.done
            if not self._leadership.open or tracker is None or not tracker.may_propose or busy:
                return None
            new = choose(self._engine.configuration)
            if new is None:
                return None
            write = self._ordered = self._engine.configure(new)
        self._engine.committer.kick()
        return write

    def propose(self, change: Change, deadline_s: float) -> Write:
        """Order a changed configuration, as soon as that may be. Raises what ``change`` raises, what refuses
        it, and ``Overloaded`` at the deadline."""
        while (write := self._order(change)) is None:
            self._leadership.check()
            if time.monotonic() >= deadline_s:
                raise Overloaded("another configuration change, or the epoch itself, is not committed yet")
            self._followers.await_ack(0.02)
        return write

    def on_configuration(self, offset: int, configuration: Configuration) -> None:
        """A configuration record is in the log, and not committed yet: the engine's hook."""
        with self._followers.lock:
            tracker = self._followers.tracker
            if tracker is None or offset <= tracker.committed:
                return
            if tracker.proposed is None or configuration.away:
                tracker.propose(offset, configuration)

    def consider(self, stream: FollowerSession, synced: int) -> None:
        """A follower confirmed through ``synced``: once it has caught up it is a voter whose copy counts, noted
        at its present address."""
        configuration = self._engine.configuration
        if stream.settled_in is configuration:
            return
        if self._change_for(stream, configuration) is None:
            stream.settled_in = configuration
        elif self._engine.tail.offset - synced <= ADMIT_LAG_RECORDS:
            self._admit(stream, configuration)

    def _change_for(self, stream: FollowerSession, configuration: Configuration) -> Configuration | None:
        """The configuration with this follower as it is now; ``None`` if it is that already, or cannot be."""
        hello = stream.hello
        assert hello is not None
        if stream.vote_refused and configuration.voter(hello.store_id) is None:
            return None
        try:
            return voter_change(hello, configuration)
        except ValueError as error:
            stream.vote_refused = True
            log.warning("%s: %s cannot become a voter: %s", self._node.label, hello.name, error)
            return None

    def _admit(self, stream: FollowerSession, configuration: Configuration) -> None:
        hello = stream.hello
        assert hello is not None
        joined = self._followers.joined
        try:
            ordered = self._order(
                lambda now: self._change_for(stream, now) if joined.get(hello.store_id) is stream else None
            )
        except Error as error:
            log.warning("%s: %s cannot become a voter: %s", self._node.label, hello.name, error)
            return
        if ordered is not None:
            voter = configuration.voter(hello.store_id)
            what = "becomes a voter" if voter is None else "counts again" if voter.away else "has moved"
            log.info("%s: %s %s", self._node.label, hello.name, what)

    def count_myself(self) -> None:
        """A primary without whose copies the rule went on before, or was about to, has fetched all since."""
        store_id = self._engine.home.store_id

        def change(now: Configuration) -> Configuration | None:
            me = now.voter(store_id)
            return now.with_copy_of(store_id) if me is not None and me.away else None

        self._order(change)

    def go_on_without(self) -> bool:
        """Order a configuration without the voters whose copies are missing; see ``runtime/degrading.py``.

        False when nobody is missing any more; ``Overloaded`` while another change is under way.
        """
        with self._followers.lock:
            tracker, joined = self._followers.tracker, self._followers.joined
            if tracker is None or not self._leadership.leading or not tracker.missing(joined):
                return False
            proposed, old, me = tracker.proposed, self._engine.configuration, self._engine.home.store_id
            ordered = self._ordered
            if ordered is not None and not ordered.done and not ordered.offset:
                raise Overloaded("another configuration change is not logged yet")
            here = {me, *joined}
            lost = [v.store_id for v in old.voters if v.counts and v.store_id not in here]
            if proposed is not None and proposed[1].away and not lost:
                return True  # of an attempt before, or of the primary before
            if proposed is not None and not _same_voters(tracker.configuration, old):
                raise Overloaded("another configuration change is not committed yet")
            first = self._engine.committer.committed + 1
            self._ordered = self._engine.configure(old.without(lost, first).changed(me, away=False))
        self._engine.committer.kick()
        return True


def _same_voters(one: Configuration, other: Configuration) -> bool:
    return [v.store_id for v in one.voters] == [v.store_id for v in other.voters]
