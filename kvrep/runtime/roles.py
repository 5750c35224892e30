"""Changing roles: promote, follow, hand over, and finding out that somebody else is primary now.

A node keeps its engine through every change; what changes is who may write and where records come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvrep.errors import (
    ClosedError,
    Error,
    Fenced,
    NotPrimary,
    Overloaded,
    PeerUnavailable,
    UnsafePromotion,
)
from kvrep.model.configuration import Configuration, Voter
from kvrep.replication.messages import SlotState
from kvrep.runtime.promoting import Force, ask_all, promote
from kvrep.runtime.replaying import Replaying
from kvrep.runtime.shipping import Shipping
from kvrep.status import EventKind

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["Roles"]

log = logging.getLogger("kvrep.replication")

SEEK_INTERVAL_S = 0.2


class Roles:
    """One per node that is part of a group. Its thread looks for the new primary when this one was fenced."""

    def __init__(self, node: Node) -> None:
        self.node = node
        # Serializes promotions, switchovers and changes of the source.
        self.lock = threading.RLock()
        self._seek = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- roles -------------------------------------------------------------------------------------

    def promote(self, timeout_s: float, force: Force | None = None) -> int:
        """Become primary; see :func:`kvrep.runtime.promoting.promote`. Returns the epoch."""
        node = self.node
        deadline = time.monotonic() + timeout_s
        self._need_transport()
        if not self.lock.acquire(timeout=timeout_s):
            raise Overloaded("another change of roles is under way on this node")
        try:
            shipping = node.shipping
            if shipping is not None and shipping.leading:
                return shipping.epoch
            if node.shipping is None and node.replaying is None:
                raise NotPrimary("this store is not part of a group; it takes writes as it is",
                                 primary_address=None, epoch=None)  # fmt: skip
            return promote(self, deadline, force)
        finally:
            self.lock.release()

    def follow(self, address: str) -> None:
        """Become, or stay, a follower: of the node at ``address`` from now on."""
        self._need_transport()
        with self.lock:
            node = self.node
            if node.closing:
                raise ClosedError("the store is closed")
            if node.replaying is not None:
                node.replaying.go_to(address)
                return
            self._end_role(NotPrimary(f"this node follows {address}", primary_address=address, epoch=None))
            self._start_following((address,))

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Nothing is appended meanwhile. If nobody took over inside, the former role goes on."""
        node = self.node
        replaying, shipping = node.replaying, node.shipping
        sources = replaying.sources if replaying is not None else ()
        if replaying is not None:
            replaying.stop(5.0)
        try:
            yield
        except BaseException:
            if replaying is not None and node.replaying is replaying and not node.closing:
                self._start_following(sources)
            raise
        if node.shipping is None or (shipping is not None and node.shipping is shipping):
            if replaying is not None and not node.closing:
                self._start_following(sources)

    def take_over(self, epoch: int, fenced: tuple[bytes, ...], forced: Configuration | None = None) -> None:
        """The promotion succeeded: be primary in ``epoch``."""
        node = self.node
        heard: tuple[SlotState, ...] = node.replaying.slots if node.replaying is not None else ()
        old = node.shipping
        if old is not None:
            old.stop(5.0)
        engine = node.engine
        engine.committer.accept()
        shipping = Shipping(node)
        for voter in self.other_voters():
            slot = next((s for s in heard if s.store_id == voter.store_id), None)
            if slot is not None and shipping.slots.get(voter.store_id) is None:
                shipping.slots.note(
                    voter.store_id, name=voter.name, address=voter.address, voter=True, acked=slot.acked
                )
        node.shipping, node.replaying = shipping, None
        shipping.take_over(epoch, fenced, forced)
        log.info("%s: promoted, epoch %d", node.label, epoch)

    def _start_following(self, sources: tuple[str, ...]) -> None:
        node = self.node
        node.engine.writable = node.refuse_follower
        node.replaying = Replaying(node, sources)
        node.shipping = None
        node.replaying.start()
        node.tell(EventKind.FOLLOWER, address=sources[0] if sources else "")

    def _end_role(self, error: Error) -> None:
        """Stop being primary: nothing more is written in our epoch. What is logged waits for its outcome."""
        node = self.node
        engine = node.engine
        committer = engine.committer
        committer.refuse(error)
        with committer.lead:
            committer.epoch = 0
            committer.rule = _nothing_commits
            committer.on_written = None
        if node.shipping is not None:
            node.shipping.stop(5.0)
        engine.reset_hooks()
        node.shipping = None

    # -- what a promise means here -----------------------------------------------------------------

    def promised(self, epoch: int, address: str) -> None:
        """This node has just promised ``epoch`` to the node at ``address``."""
        node = self.node
        shipping, replaying = node.shipping, node.replaying
        if shipping is not None:
            shipping.promised_away(epoch, address)
            self.seek()
        elif replaying is not None:
            replaying.promised(epoch, address)

    def seek(self) -> None:
        """Look for another primary until one is found, or this node is one again."""
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(
                target=self._run, name=f"kvrep-seek-{self.node.label}", daemon=True
            )
            self._thread.start()
        self._seek.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._seek.wait()
            self._seek.clear()
            while not self._stop.is_set() and self._unsettled():
                try:
                    self._look()
                except Error as error:
                    log.info("%s: looking for the primary: %s", self.node.label, error)
                shipping = self.node.shipping
                leading = shipping is not None and shipping.leading
                self._stop.wait(10 * SEEK_INTERVAL_S if leading else SEEK_INTERVAL_S)

    def _unsettled(self) -> bool:
        """Whether another primary may be about: this one is none, was fenced, or went on without promises."""
        shipping = self.node.shipping
        return shipping is not None and not (shipping.leading and (shipping.fenced or shipping.forced))

    def _look(self) -> None:
        """Ask the voters we know; follow one that is primary in a newer epoch than ours."""
        node = self.node
        newest = max(node.engine.epochs.last_epoch, node.primary_epoch)
        peers = ask_all(self, "standing", {}, time.monotonic() + 2.0)
        found = max(peers, key=lambda peer: peer.primary_epoch, default=None)
        if found is not None and found.primary_epoch > newest and self._unsettled():
            log.warning("%s: %s is primary in epoch %d; following it",
                        node.label, found.voter.name, found.primary_epoch)  # fmt: skip
            self.follow(found.voter.address)

    # -- handing over ------------------------------------------------------------------------------

    def obstacles(self, to: str) -> list[str]:
        """What would block a switchover to the voter named ``to``; empty when nothing would."""
        node = self.node
        shipping = node.shipping
        if shipping is None or not shipping.leading:
            return ["this node is not the primary"]
        voter = node.engine.configuration.named(to)
        if voter is None:
            return [f"{to!r} is not a voter"]
        if voter.store_id == node.engine.home.store_id:
            return [f"{to!r} is the primary already"]
        found: list[str] = []
        if voter.witness:
            found.append(f"{to} is a witness: it keeps no data")
        if not voter.address:
            found.append(f"{to} does not listen, so nobody could follow it")
        status = next((f for f in shipping.followers() if f.store_id == voter.store_id.hex()), None)
        if status is None or not status.connected or status.state != "streaming":
            found.append(f"{to} is not connected")
        return found

    def switchover(self, to: str, timeout_s: float, *, dry_run: bool) -> tuple[str, ...]:
        """Hand over to ``to``: stop new writes, let it catch up, let it promote itself, follow it.

        Writers wait meanwhile. Returns what blocks it with ``dry_run``, else raises. If it fails half-way,
        this node goes on, in a new epoch of its own if it has promised another one.
        """
        node = self.node
        blocked = tuple(self.obstacles(to))
        if dry_run:
            return blocked
        if blocked:
            raise UnsafePromotion("; ".join(blocked), missing=(to,), needed=1, answered=0)
        deadline = time.monotonic() + timeout_s
        if not self.lock.acquire(timeout=timeout_s):
            raise Overloaded("another change of roles is under way on this node")
        try:
            voter = node.engine.configuration.named(to)
            assert voter is not None
            self._hand_over(voter, deadline)
            self.follow(voter.address)
        finally:
            self.lock.release()
        return ()

    def _hand_over(self, voter: Voter, deadline: float) -> None:
        committer = self.node.engine.committer
        owner, granted = object(), threading.Event()
        if not committer.take_place(owner, granted.set) and not granted.wait(
            max(0.0, deadline - time.monotonic())
        ):
            committer.leave_place(owner, None)
            raise Overloaded("a transaction held the writer's place for too long")
        try:
            self._await_caught_up(voter, deadline)
            left = max(0.5, deadline - time.monotonic())
            self.call(voter.address, "promote", {"timeout_s": left}, left + 1.0)
        finally:
            committer.leave_place(owner, None)

    def _await_caught_up(self, voter: Voter, deadline: float) -> None:
        node = self.node
        while True:
            shipping = node.shipping
            if shipping is None:
                raise Fenced("this node was fenced meanwhile", epoch=0)
            if (
                not node.engine.committer.busy
                and shipping.synced_by(voter.store_id) >= node.engine.tail.offset
            ):
                return
            if time.monotonic() >= deadline:
                raise UnsafePromotion(
                    f"{voter.name} did not catch up in time", missing=(voter.name,), needed=1, answered=0
                )
            shipping.await_ack(0.05)

    # -- the others --------------------------------------------------------------------------------

    def other_voters(self) -> list[Voter]:
        """Every voter of the configurations in the log, but ourselves; the newest word on each."""
        engine = self.node.engine
        found = {v.store_id: v for _, c in engine.configurations[-2:] for v in c.voters}
        for store_id, slot in self.node.shipping.slots.all() if self.node.shipping is not None else []:
            voter = found.get(store_id)
            if voter is not None and slot.address and slot.address != voter.address:
                from dataclasses import replace

                found[store_id] = replace(voter, address=slot.address)
        found.pop(engine.home.store_id, None)
        return list(found.values())

    def call(self, address: str, method: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Ask another node; ``PeerUnavailable`` without an answer in time."""
        transport = self._need_transport()
        if not address:
            raise PeerUnavailable("no address is known", address="")
        connection = transport.connect(address, name=self.node.label)
        try:
            answer: dict[str, Any] = connection.call(method, request, max(0.05, timeout_s))
            return answer
        finally:
            connection.close()

    def _need_transport(self) -> Any:
        transport = self.node.transport
        if transport is None:
            raise NotPrimary("this store is not part of a group", hint="open it with listen=",
                             primary_address=None, epoch=None)  # fmt: skip
        return transport

    def stop(self, timeout_s: float) -> None:
        self._stop.set()
        self._seek.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.1, timeout_s))


def _nothing_commits(durable: int) -> int:
    """The rule of a follower: only its primary says what is committed."""
    del durable
    return 0
