"""Promotions: fetch what is missing and begin, for an election or by hand.

By hand is what ``store.promote()`` does (``runtime/promoting.py``): ask without binding anybody, then collect
promises, fetch, begin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrep.errors import ProtocolError
from kvrep.model.configuration import Configuration, Voter
from kvrep.model.position import epoch_after
from kvrep.replication.messages import Promise
from kvrep.replication.promotion import Fetch, Promotion
from kvrep.testing.simulate.feeding import Feeding, NotBegun
from kvrep.testing.simulate.node import StorageError

if TYPE_CHECKING:
    from kvrep.testing.simulate.node import Node

__all__ = ["ByHand", "TakingOver", "next_epoch"]

FETCH_TIMEOUT_S = 15.0
"""When a call to a silent node ends: what gRPC's keepalive needs to notice."""
ASK_TIMEOUT_S = 0.5


def next_epoch(node: Node, seen: int) -> int:
    """An epoch of ours above all that this node knows of, and above ``seen``."""
    voter = node.disk.configurations[-1][1].voter(node.store_id)
    known = max(node.disk.promised, node.disk.epochs.last_epoch, seen)
    return epoch_after(known, voter.member if voter is not None else 1)


class TakingOver:
    """The promises are there: make our log the best of them, and begin. Nothing is received meanwhile."""

    def __init__(
        self,
        node: Node,
        promotion: Promotion,
        *,
        fenced: bool,
        founding: Configuration | None = None,
        ended: Callable[[str], None],
        may: Callable[[], bool] = lambda: True,
    ) -> None:
        self._may = may
        """Whether the node still may be promoted, with what it has fetched."""
        self._node = node
        self._promotion = promotion
        self._fenced = fenced
        self._founding = founding
        self._ended = ended
        """Told once: what prevented it, or nothing."""
        self._over = False

    def begin(self) -> None:
        node = self._node
        if node.following is not None:
            node.following.stop()
        if node.feeding is not None:
            node.feeding.stop(broken=False)
        node.following = node.feeding = None
        disk = node.disk
        if (disk.promised, disk.promised_to) != (self._promotion.epoch, node.store_id):
            self._end(f"epoch {disk.promised} was promised")
        else:
            self._fetch()

    def _end(self, problem: str) -> None:
        if not self._over:
            self._over = True
            if problem:
                self._node.feeding = None
                self._node.follow("")
            self._ended(problem)

    # -- fetching ----------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """From the best one among those that promised, until nobody is ahead of us."""
        node = self._node
        fetch = None if self._founding is not None else self._promotion.fetch
        if fetch is None:
            self._found_all()
            return
        problem = fetch.problem(
            node.disk.copy.applied.offset, may_drop=not self._fenced or not node.world.synchronous
        )
        if problem:
            self._end(f"the records of {fetch.voter.name} {problem}")
            return
        node.world.say(node, "fetches %s to %s from %s", fetch.after, fetch.to, fetch.voter.name)
        if fetch.after.offset < node.disk.end:
            node.cut(fetch.after.offset, f"{fetch.voter.name} holds a newer history")
        self._fetch_more(fetch)

    def _fetch_more(self, fetch: Fetch) -> None:
        node, world = self._node, self._node.world
        first = node.disk.end + 1
        if first > fetch.to.offset:
            self._fetched()
            return
        source = world.nodes[fetch.voter.name]

        def serve(give: Callable[[bytes], None]) -> None:
            entry = source.disk.entry(first)
            if entry is not None and source.store_id == fetch.voter.store_id:
                give(entry.data)

        world.network.call(
            node,
            source,
            serve,
            lambda data: self._store(fetch, data),
            lambda why: self._end(f"the records of {fetch.voter.name} could not be fetched"),
            FETCH_TIMEOUT_S,
        )

    def _store(self, fetch: Fetch, data: bytes) -> None:
        node = self._node
        try:
            if node.disk.promised > self._promotion.epoch:
                raise NotBegun(f"epoch {node.disk.promised} has been promised")
            node.append(data)
            node.sync()
        except (NotBegun, StorageError, ProtocolError) as error:
            self._end(str(error))
            return
        self._fetch_more(fetch)

    def _fetched(self) -> None:
        node, promotion = self._node, self._promotion
        promotion.fetched(node.holds_now(promotion.epoch))
        for _, configuration in node.disk.configurations[-2:]:
            if configuration.voters:
                promotion.learned(configuration)
        if self._fenced and not promotion.enough:
            self._end("too few have promised under the configuration that was fetched")
        else:
            self._fetch()

    def _found_all(self) -> None:
        """Nobody that promised is ahead of us: our log holds all that is committed, or we are told otherwise."""
        node, promotion = self._node, self._promotion
        if self._fenced and self._founding is None:
            if not promotion.enough:
                self._end("too few have promised")
                return
            if promotion.lacks:
                self._end(f"records from {promotion.lowered} on were acknowledged without it")
                return
            if node.world.synchronous:
                node.commit_through(promotion.committed)
        self._begin()

    # -- beginning ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        node, promotion = self._node, self._promotion
        if not self._may():
            self._end("it may not be promoted")
            return
        feeding = node.feeding = Feeding(node, promotion.epoch, fenced=self._fenced)

        def begun() -> None:
            self._end("" if feeding.leading else "the epoch start could not be stored")

        try:
            feeding.begin(promotion.promised, self._founding, begun)
        except (NotBegun, StorageError) as error:
            self._end(str(error))


class ByHand:
    """Somebody says ``promote()`` on ``node``; ``ended`` hears what prevented it, or nothing."""

    def __init__(self, node: Node, ended: Callable[[str], None]) -> None:
        self._node = node
        self._ended = ended
        self._epoch = 0
        self._promotion: Promotion | None = None
        self._waiting = 0
        self._decided = False

    def begin(self) -> None:
        """First ask, without binding anybody."""
        node = self._node
        if not _may_be_promoted(node):
            self._ended("it may not be promoted")
            return
        self._ask("standing", next_epoch(node, 0), self._answered)

    def _ask(self, what: str, epoch: int, then: Callable[[Promotion], None]) -> None:
        node, world = self._node, self._node.world
        effective, pending = node.rules
        promotion = Promotion(effective, node.store_id, epoch, node.holds_now(epoch), proposed=pending)
        others = {v.store_id: v for c in (effective, *pending) for v in c.voters}
        others.pop(node.store_id, None)
        self._waiting, self._decided = len(others), False

        def told(voter: Voter, promise: Promise | None) -> None:
            if promise is not None:
                promotion.on_promise(voter.store_id, promise)
            self._waiting -= 1
            if not self._decided and (
                not self._waiting or (what == "promise" and (promotion.enough or promotion.superseded))
            ):
                self._decided = True
                then(promotion)

        for voter in others.values():
            target = world.nodes[voter.name]
            world.network.call(
                node,
                target,
                _serve_standing(target) if what == "standing" else _serve_promise(target, node, epoch),
                lambda p, v=voter: told(v, p),  # type: ignore[misc]
                lambda _, v=voter: told(v, None),  # type: ignore[misc]
                ASK_TIMEOUT_S,
            )
        if not others:
            then(promotion)

    def _answered(self, told: Promotion) -> None:
        if not told.would_be_enough or told.would_lack:
            self._ended("too few voters answer, or they lack acknowledged records")
            return
        node = self._node
        epoch = next_epoch(node, told.highest_seen)
        if node.following is not None:  # nothing is received from now on
            node.following.stop()
            node.following = None
        try:
            if node.promise(epoch, node.store_id) is None:
                self._fail("a higher epoch was promised")
                return
        except StorageError as error:
            self._fail(str(error))
            return
        if node.feeding is not None:
            node.feeding.promised_away(epoch)
        self._ask("promise", epoch, self._promised)

    def _fail(self, problem: str) -> None:
        """Go on as before."""
        if self._node.feeding is None:
            self._node.follow("")
        self._ended(problem)

    def _promised(self, promotion: Promotion) -> None:
        if promotion.superseded or not promotion.enough:
            self._fail("too few voters promised")
            return
        TakingOver(
            self._node, promotion, fenced=True, ended=self._ended, may=lambda: _may_be_promoted(self._node)
        ).begin()


def _may_be_promoted(node: Node) -> bool:
    """Whether it is a data voter that holds all it ever confirmed."""
    effective, pending = node.rules
    voter = (pending[-1] if pending else effective).voter(node.store_id)
    whole = node.disk.end >= node.disk.vote_floor and not node.failed
    return voter is not None and not voter.witness and whole


def _serve_standing(target: Node) -> Callable[[Callable[[Promise], None]], None]:
    return lambda give: give(target.holds_now(target.disk.promised))


def _serve_promise(target: Node, asker: Node, epoch: int) -> Callable[[Callable[[Promise], None]], None]:
    """What ``target`` does when it is asked for a promise by hand."""

    def serve(give: Callable[[Promise], None]) -> None:
        known = any(c.voter(asker.store_id) is not None for _, c in target.disk.configurations[-8:])
        if known and target.disk.lineage == asker.disk.lineage and target.disk.end >= target.disk.vote_floor:
            target.with_lead(lambda: promise(give))

    def promise(give: Callable[[Promise], None]) -> None:
        try:
            target.sync()
            granted = target.give(epoch, asker.store_id)
        except StorageError:
            return  # the call fails
        if granted:
            target.world.say(target, "promises epoch %d to %s", epoch, asker.name)
            target.promised(epoch, asker.name)
        promised = target.disk.promised
        # This very epoch may be another's, as only a member number that was used twice makes it.
        answer = target.holds_now(promised + 1 if promised == epoch and not granted else promised)
        target.after(target.sync_s(), lambda: give(answer))

    return serve
