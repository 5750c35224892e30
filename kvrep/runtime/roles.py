"""Changing roles: promote, follow, hand over, and finding out that somebody else is primary now.

A node keeps its engine through every change; what changes is who may write and where records come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvrep.errors import (
    ClosedError,
    Error,
    Fenced,
    LineageMismatch,
    NotPrimary,
    Overloaded,
    PeerUnavailable,
    ProtocolError,
    UnsafePromotion,
)
from kvrep.model.configuration import Configuration, Voter
from kvrep.runtime.brokered import is_broker_url
from kvrep.runtime.leadership import nothing_commits
from kvrep.runtime.promoting import Force, ask_all, promote
from kvrep.runtime.replaying import Replaying, check_address
from kvrep.runtime.shipping import Shipping
from kvrep.status import EventKind
from kvrep.transport.workers import Workers

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["Roles"]

log = logging.getLogger("kvrep.replication")

SEEK_INTERVAL_S = 0.2
"""How often a node that is no primary any more looks for the new one."""
MISSED_INTERVAL_MAX_S = 2.0
"""How often, at most, a primary asks the voters that are away whether they have another one."""
START_ASK_S = 1.0
"""How long a restarted primary waits for the voters' word on who is primary now."""
SETTLE_S = 3.0
"""How long a stream that arrives during a promotion waits for its end."""
STOP_S = 5.0
PEERS_THREADS_MAX = 64
"""More than the voters of any sensible group times those who ask at once; what is beyond waits."""


class Roles:
    """One per node. Its thread (``kvrep-seek-NAME``) looks for the new primary when this one was fenced, or
    lost voters; others (``kvrep-peers-NAME-N``) ask voters. All start when they are first needed."""

    def __init__(self, node: Node) -> None:
        self.node = node
        # Serializes promotions, switchovers and changes of the source; close() takes it and keeps it.
        self.lock = threading.RLock()
        self._seek = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # Protects the thread, the calls under way and ``_promoting``; announces its end.
        self._changed = threading.Condition()
        self._calls: set[Any] = set()
        self._askers = Workers(f"kvrep-peers-{node.label}", PEERS_THREADS_MAX)
        self._promoting = False

    # -- roles -------------------------------------------------------------------------------------

    def promote(self, timeout_s: float, force: Force | None = None, *, asked: bool = False) -> int:
        """Become primary; see :func:`kvrep.runtime.promoting.promote`. Returns the epoch.

        ``asked``: the primary itself wants it and has seen that the voters are there.
        """
        node = self.node
        deadline = time.monotonic() + timeout_s
        self._need_transport()
        with self.changing(timeout_s):
            shipping = node.shipping
            leadership = shipping.leadership if shipping is not None else None
            if leadership is not None and leadership.leading:
                if force is None or not leadership.short_of_copies:
                    return leadership.epoch
                log.warning("%s: goes on by force without the copies that are missing", node.label)
            if shipping is None and node.replaying is None:
                raise NotPrimary("this store is not part of a group; it takes writes as it is",
                                 primary_address=None, epoch=None)  # fmt: skip
            return promote(self, deadline, force, asked=asked)

    @contextmanager
    def changing(self, timeout_s: float) -> Iterator[None]:
        """Nobody else changes roles meanwhile. ``Overloaded`` when somebody does for too long."""
        if not self.lock.acquire(timeout=timeout_s):
            raise Overloaded("another change of roles is under way on this node")
        try:
            self.need_open()
            yield
        finally:
            self.lock.release()

    def need_open(self) -> None:
        """``ClosedError`` once the node is closing: a change of roles goes no further."""
        if self._stop.is_set() or self.node.closing:
            raise ClosedError("the store is closed")

    def pause(self, seconds: float) -> None:
        """Sleep, but not through a close."""
        self._stop.wait(seconds)
        self.need_open()

    def follow(self, address: str) -> None:
        """Become, or stay, a follower: of the node at ``address`` from now on.

        Raises :class:`LineageMismatch` when the node there is known to hold another store, ``OpenError`` for
        an address that is none, and on a follower that has given up what made it give up; then nothing has
        changed.
        """
        check_address(address)
        self._need_transport()
        self._check_source(address)
        with self.changing(SETTLE_S):
            self.node.freshness.need_following()
            self.go_after(address)

    def go_after(self, address: str) -> None:
        """As :meth:`follow`, of a node that is known to be ours. The lock is held."""
        replaying = self.node.replaying
        if replaying is not None:
            replaying.follow(address)
            return
        error = NotPrimary(f"this node follows {address}", primary_address=address, epoch=None)
        self.end_primary(error, address)

    def end_primary(self, error: Error, address: str = "") -> None:
        """Be primary no more; follow the node at ``address``, or nobody until told whom. The lock is held."""
        node = self.node
        shipping = node.shipping
        assert shipping is not None
        shipping.retire(error, STOP_S)
        replaying = self.be_follower((address,) if address else ())
        replaying.primary_address = address or None
        node.shipping = None
        replaying.start()
        node.tell(EventKind.FOLLOWER, address=address)

    def _check_source(self, address: str) -> None:
        """Refuse an address where another store answers, or this one."""
        if is_broker_url(address):
            return  # nobody answers there; the messages will tell
        home = self.node.engine.home
        try:
            answer = self.call(address, "standing", {}, 2.0)
            lineage, store_id = bytes(answer["lineage"]), bytes(answer["store_id"])
        except (Error, KeyError, TypeError):
            return  # nobody there yet, or an older version: the stream will tell
        if store_id == home.store_id:
            raise ProtocolError(f"{address} is this node itself", hint="give the address of the primary")
        if home.lineage and lineage and lineage != home.lineage:
            raise LineageMismatch(
                f"the node at {address} holds another store than {self.node.label}",
                ours=home.lineage.hex(),
                theirs=lineage.hex(),
            )

    def be_follower(self, sources: tuple[str, ...], before: Replaying | None = None) -> Replaying:
        """Set this node up as a follower that is not started yet; ``before``: what it was until now."""
        node, engine = self.node, self.node.engine
        error = NotPrimary("this node is a follower", primary_address=None, epoch=None)
        with engine.committer.lead:  # a promise that is given meanwhile tells one of the two where to go
            engine.committer.end_epoch(error)
            engine.committer.rule = nothing_commits
            replaying = Replaying(node, sources if before is None else before.sources, before)
            node.replaying = replaying
        engine.reset_hooks()
        engine.writable = node.refuse_follower
        engine.keep_from = replaying.keep_from
        return replaying

    def start_primary(self, shipping: Shipping) -> None:
        """Begin as the primary that this node was before, unless the voters know a newer one.

        They are asked first, as far as they answer soon: a node that was replaced meanwhile, or lost what it
        had acknowledged, does not even ask to be primary.
        """
        peers = ask_all(self, "standing", {}, time.monotonic() + START_ASK_S)
        engine = self.node.engine
        newest = max(peers, key=lambda peer: peer.primary_epoch, default=None)
        if newest is not None and newest.primary_epoch > engine.epochs.last_epoch:
            log.warning("%s: %s is primary in epoch %d; following it",
                        self.node.label, newest.voter.name, newest.primary_epoch)  # fmt: skip
            with self.lock:
                self.go_after(newest.voter.address)
            return
        shipping.attach()
        problem = shipping.leadership.lost(peers)
        if problem:
            log.error("%s: %s", self.node.label, problem)
            shipping.leadership.hold(problem)
        else:
            shipping.leadership.start()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Nothing is appended or shipped meanwhile. If nobody took over inside, the former role goes on."""
        node = self.node
        replaying, shipping = node.replaying, node.shipping
        with self._changed:
            self._promoting = True
        try:
            if replaying is not None:
                replaying.stop(STOP_S)
                if replaying.alive:
                    raise Overloaded("this node is still busy with what its primary sent")
            elif shipping is not None:
                shipping.leadership.suspend("this node is being promoted")
            yield
        finally:
            if node.closing:
                pass
            elif replaying is not None and node.replaying is replaying:
                self.be_follower(replaying.sources, replaying).start()
            elif shipping is not None and node.shipping is shipping:
                shipping.leadership.resume()
                self.seek()
            with self._changed:
                self._promoting = False
                self._changed.notify_all()

    def await_settled(self) -> None:
        """Wait, not for long, for the end of a promotion that is under way here."""
        with self._changed:
            self._changed.wait_for(lambda: not self._promoting or self._stop.is_set(), SETTLE_S)

    def take_over(
        self,
        epoch: int,
        fenced: tuple[bytes, ...],
        forced: Configuration | None = None,
        *,
        founding: Configuration | None = None,
        unfenced: bool = False,
    ) -> None:
        """The promotion succeeded: be primary in ``epoch``. Raises what prevents it; then nothing changed."""
        node = self.node
        self.need_open()
        replaying, old = node.replaying, node.shipping
        if old is not None:
            old.retire(Fenced(f"epoch {epoch} begins", epoch=epoch), STOP_S)
        shipping = Shipping(node, replaying.slots if replaying is not None else ())
        node.shipping, node.replaying = shipping, None
        try:
            shipping.attach()
            shipping.leadership.take_over(epoch, fenced, forced, founding=founding, unfenced=unfenced)
        except BaseException as error:
            shipping.retire(Fenced(f"epoch {epoch} did not begin: {error}", epoch=epoch), STOP_S)
            if old is not None and replaying is None:
                node.shipping = Shipping(node)
                node.shipping.attach()
                node.shipping.leadership.resume()
            else:
                node.shipping, node.replaying = None, replaying
            raise
        node.engine.home.drop_unfinished()
        log.info("%s: promoted, epoch %d", node.label, epoch)
        self.seek()

    # -- what a promise means here -----------------------------------------------------------------

    def promised(self, epoch: int, address: str) -> None:
        """This node has just promised ``epoch`` to the node at ``address``."""
        node = self.node
        shipping, replaying = node.shipping, node.replaying
        if shipping is not None:
            shipping.leadership.promised_away(epoch, address)
            self.seek()
        if replaying is not None:
            replaying.promised(epoch, address)

    # -- finding another primary -------------------------------------------------------------------

    def seek(self) -> None:
        """Look for another primary until one is found, or this node needs none."""
        with self._changed:
            if self._stop.is_set():
                return
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"kvrep-seek-{self.node.label}", daemon=True
                )
                self._thread.start()
        self._seek.set()

    def _run(self) -> None:
        missed = 0
        while not self._stop.is_set():
            self._seek.wait()
            while not self._stop.is_set() and self._unsettled():
                self._seek.clear()
                try:
                    self._look()
                    self._renew()
                except Error as error:
                    log.info("%s: looking for the primary: %s", self.node.label, error)
                except Exception:
                    log.exception("%s: looking for the primary", self.node.label)
                missed = missed + 1 if self.node.primary_epoch else 0
                pause = min(SEEK_INTERVAL_S * 2 ** min(missed, 8), MISSED_INTERVAL_MAX_S)
                if self._seek.wait(pause):
                    missed = 0
                    self._stop.wait(SEEK_INTERVAL_S / 4)  # voters that come and go must not keep us busy
            missed = 0
            if not self._unsettled():
                self._seek.clear()
                if self._unsettled():
                    self._seek.set()

    def _unsettled(self) -> bool:
        """Whether another primary may be about: this one is none, was fenced, went on without promises, or
        lacks voters, who may have found another."""
        shipping = self.node.shipping
        if shipping is None or self.node.coordinator.automatic:
            return False
        if not self.node.fenced:
            return True
        missing = shipping.followers.missing_voters()
        return bool(missing) and any(v.address for v in self.other_voters() if v.store_id in missing)

    def _look(self) -> None:
        """Ask the voters we know; follow one that is primary in a newer epoch than ours."""
        node = self.node
        peers = ask_all(self, "standing", {}, time.monotonic() + 2.0)
        with self.lock:
            if self._stop.is_set() or not self._unsettled():
                return
            newest = max(node.engine.epochs.last_epoch, node.primary_epoch)
            unfenced = node.primary_epoch and not node.fenced
            found = [p for p in peers if p.primary_epoch > newest or (unfenced and p.fenced)]
            if found:
                peer = max(found, key=lambda p: p.primary_epoch)
                log.warning("%s: %s is primary in epoch %d; following it",
                            node.label, peer.voter.name, peer.primary_epoch)  # fmt: skip
                self.go_after(peer.voter.address)

    def _renew(self) -> None:
        """A primary that was fenced for an epoch which began and came to nothing promotes itself anew.

        Only a whole promotion will do where a record of that epoch was seen. Where none was, the primary asks
        for promises by its streams.
        """
        shipping, options = self.node.shipping, self.node.options
        if shipping is None:
            return
        leadership = shipping.leadership
        if not leadership.replaced:
            leadership.renew(time.monotonic())
            return
        if leadership.superseded_s(time.monotonic()) < options.heartbeat_timeout_s:
            return
        log.warning("%s: no primary of the newer epoch shows itself; trying again above it", self.node.label)
        self.promote(2 * options.heartbeat_timeout_s)

    # -- handing over ------------------------------------------------------------------------------

    def obstacles(self, to: str) -> list[str]:
        """What would block a switchover to the voter named ``to``; empty when nothing would."""
        node = self.node
        shipping = node.shipping
        if shipping is None or not shipping.leadership.leading:
            return ["this node is not the primary"]
        voter = node.engine.configuration.named(to)
        if voter is None:
            return [f"{to!r} is not a voter"]
        if voter.store_id == node.engine.home.store_id:
            return [f"{to!r} is the primary already"]
        found: list[str] = []
        if voter.witness:
            found.append(f"{to} is a witness: it keeps no data")
        if voter.away:
            found.append(f"the ack rule goes on without {to}, which may lack acknowledged records")
        if not voter.address:
            found.append(f"{to} does not listen, so nobody could follow it")
        if not shipping.streams_to(voter.store_id):
            found.append(f"{to} is not connected")
        rule = node.engine.configuration
        away = set(shipping.followers.missing_voters())
        there = rule.data_voters - len(away)
        if there < rule.fence:
            names = ", ".join(v.name for v in rule.voters if v.store_id in away)
            found.append(f"{rule.fence} data voters must promise, {there} are there; missing: {names}")
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
        with self.changing(timeout_s):
            voter = node.engine.configuration.named(to)
            assert voter is not None
            self._hand_over(voter, deadline)
            self.go_after(voter.address)
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
            self.need_open()
            left = max(0.5, deadline - time.monotonic())
            self._have_promoted(voter, left)
        finally:
            committer.leave_place(owner, None)

    def _have_promoted(self, voter: Voter, timeout_s: float) -> None:
        """Tell ``voter`` to promote itself. If it does not, see to it that somebody is primary."""
        node = self.node
        try:
            self.call(voter.address, "promote", {"timeout_s": timeout_s, "asked": True}, timeout_s + 1.0)
            return
        except Error as error:
            log.warning("%s: the switchover to %s failed: %s", node.label, voter.name, error)
            failure = error
        peers = ask_all(self, "standing", {}, time.monotonic() + 2.0)
        shipping = node.shipping
        epoch = shipping.leadership.epoch if shipping is not None else 0
        if any(p.voter.store_id == voter.store_id and p.primary_epoch > epoch for p in peers):
            return  # it succeeded, and only the answer was lost
        if shipping is not None and not shipping.leadership.leading:
            try:
                promote(self, time.monotonic() + 5.0)
                log.warning("%s: goes on as primary in epoch %d", node.label, node.primary_epoch)
            except Error as error:
                log.error("%s: could not promote itself anew: %s", node.label, error)
        if isinstance(failure, UnsafePromotion):
            raise failure
        raise UnsafePromotion(
            f"{voter.name} did not become primary: {failure}", missing=(voter.name,), needed=1, answered=0
        ) from failure

    def _await_caught_up(self, voter: Voter, deadline: float) -> None:
        node = self.node
        while True:
            shipping = node.shipping
            if shipping is None:
                raise Fenced("this node was fenced meanwhile", epoch=0)
            if (
                not node.engine.committer.busy
                and shipping.followers.synced_by(voter.store_id) >= node.engine.tail.offset
            ):
                return
            if time.monotonic() >= deadline:
                raise UnsafePromotion(
                    f"{voter.name} did not catch up in time", missing=(voter.name,), needed=1, answered=0
                )
            shipping.followers.await_ack(0.05)

    # -- the others --------------------------------------------------------------------------------

    def other_voters(self) -> list[Voter]:
        """Every voter of the configurations in the log, but ourselves; the newest word on each."""
        engine, shipping = self.node.engine, self.node.shipping
        effective, proposed = engine.configurations_in_force()
        rules = (effective,) if proposed is None else (effective, proposed[1])
        found = {v.store_id: v for c in rules for v in c.voters}
        for store_id, slot in shipping.slots.all() if shipping is not None else ():
            voter = found.get(store_id)
            if voter is not None and slot.address:
                found[store_id] = replace(voter, address=slot.address)
        found.pop(engine.home.store_id, None)
        return list(found.values())

    def call(self, address: str, method: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Ask another node; ``PeerUnavailable`` without an answer in time, ``ClosedError`` at close."""
        transport = self._need_transport()
        if not address:
            raise PeerUnavailable("no address is known", address="")
        connection = transport.connect(address, name=self.node.label)
        with self._changed:
            self.need_open()
            self._calls.add(connection)
        try:
            answer: dict[str, Any] = connection.call(method, request, max(0.05, timeout_s))
            return answer
        finally:
            with self._changed:
                self._calls.discard(connection)
            connection.close()

    def ask(self, question: Callable[..., None], *arguments: Any) -> None:
        """Run a question to one peer on a thread of its own, beside others; ``ClosedError`` at close."""
        if self._askers.submit(question, *arguments).cancelled():
            raise ClosedError("the store is closed")

    def _need_transport(self) -> Any:
        transport = self.node.transport
        if transport is None:
            raise NotPrimary("this store is not part of a group", hint="open it with listen=",
                             primary_address=None, epoch=None)  # fmt: skip
        return transport

    def stop(self, timeout_s: float) -> None:
        """End the threads and whatever change of roles is under way; there is none after this."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._stop.set()
            calls = list(self._calls)
            self._changed.notify_all()
        self._seek.set()
        for connection in calls:
            connection.close()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.1, deadline - time.monotonic()))
        self._askers.stop(max(deadline, time.monotonic() + 0.1))
        if self.lock.acquire(timeout=max(0.1, deadline - time.monotonic())):
            self.lock.release()
