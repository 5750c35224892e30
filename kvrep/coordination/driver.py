"""An election with its clock, its threads and its calls.

::

    kvrep-coordinator-NAME   one: ticks
    kvrep-ask-NAME-N         up to 16, started when needed: one call to a peer each, with a deadline;
                             and this node's own promises
    kvrep-role-NAME-1        one: follow, become_primary, step_down, adopt, in the order of the decisions
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvrep.coordination.interface import NodeView
from kvrep.errors import ClosedError, Error, PeerUnavailable
from kvrep.replication.ballots import Answer, PromiseReply
from kvrep.replication.election import (
    Action,
    Adopt,
    Ask,
    BecomePrimary,
    Election,
    ElectionSettings,
    FollowPrimary,
    GivePromise,
    Peer,
    RequestPromises,
    StepDown,
    WhyGone,
)
from kvrep.replication.messages import Promise
from kvrep.runtime.voting import Voting
from kvrep.transport.interface import Connection, ConnectionRefused, NoAnswer
from kvrep.transport.workers import Workers

__all__ = ["Driver", "why_gone"]

log = logging.getLogger("kvrep.coordination")

ASK_THREADS_MAX = 16
SLEEP_MIN_S = 0.001
SLEEP_MAX_S = 0.25
RESIGN_S = 0.3
"""How long ``stop`` waits for the others to hear that this node resigns."""


def why_gone(error: Exception) -> WhyGone:
    """What a failed call says about the peer."""
    if isinstance(error, ConnectionRefused):
        return WhyGone.REFUSED
    broken = isinstance(error, PeerUnavailable) and not isinstance(error, NoAnswer)
    return WhyGone.BROKEN if broken else WhyGone.SILENT


class Driver(Voting):
    """See :class:`kvrep.coordination.interface.Coordinator`."""

    kind = "quorum"
    automatic = True

    def __init__(
        self,
        settings: ElectionSettings,
        *,
        peers: Mapping[str, str],
        priority: int = 0,
        needs_permit: bool = False,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(
            settings, peers=peers, priority=priority, needs_permit=needs_permit, clock=clock, chance=chance
        )
        self.confirmed_until = 0.0
        self._wake = threading.Event()
        self._wakes_at = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._askers: Workers | None = None
        self._roles: Workers | None = None
        self._leads_open: set[str] = set()
        # Protects the connections, which the askers share.
        self._connections_lock = threading.Lock()
        self._connections: dict[str, Connection] = {}

    def start(self, node: NodeView) -> None:
        super().start(node)
        self._askers = Workers(f"kvrep-ask-{node.label}", ASK_THREADS_MAX)
        self._roles = Workers(f"kvrep-role-{node.label}", 1)
        self._thread = threading.Thread(target=self._run, name=f"kvrep-coordinator-{node.label}", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        thread, askers, roles = self._thread, self._askers, self._roles
        if self._stopping.is_set() or thread is None or askers is None or roles is None:
            return
        self._resign(min(RESIGN_S, timeout_s / 4))
        self._stopping.set()
        self._wake.set()
        self._stopped = True
        thread.join(max(0.1, deadline - time.monotonic()))
        with self._connections_lock:
            connections, self._connections = list(self._connections.values()), {}
        for connection in connections:
            connection.close()
        askers.stop(deadline)
        roles.stop(deadline)

    def _resign(self, timeout_s: float) -> None:
        """Tell the others, and give the calls a moment to arrive."""
        told: list[Action] = []

        def resign(election: Election, now: float) -> list[Action]:
            told.extend(election.resign(now))
            return []

        self._event(resign, quietly=True)
        node = self._node
        if node is None:
            return
        calls = [
            self._submit(self._call, peer, "ask", action.question.to_wire(), timeout_s)
            for action in told
            if isinstance(action, Ask)
            for peer in action.to
        ]
        end = time.monotonic() + timeout_s
        for call in calls:
            try:
                call.result(max(0.0, end - time.monotonic()))
            except (Error, TimeoutError):
                pass

    # -- the clock ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._event(lambda e, now: e.tick(now), quietly=True)
            except Exception:
                log.exception("%s: the coordinator failed, and goes on", self._label())
            pause = min(max(self._wakes_at - self._clock(), SLEEP_MIN_S), SLEEP_MAX_S)
            self._wake.wait(pause)

    def _after(self, election: Election, now: float) -> None:
        self.confirmed_until = election.confirmed_until(now)
        wakes_at = election.wakes_at
        if wakes_at < self._wakes_at:
            self._wake.set()
        self._wakes_at = wakes_at

    def _label(self) -> str:
        return self._node.label if self._node is not None else "?"

    # -- actions -----------------------------------------------------------------------------------

    def _act(self, node: NodeView, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Ask():
                    self._ask_all(action)
                case GivePromise():
                    self._submit(self._promise, node, action)
                case RequestPromises():
                    for peer in action.to:
                        self._submit(self._request, peer, action)
                case BecomePrimary():
                    self._role(self._become, node, action)
                case FollowPrimary(primary=primary):
                    log.info("%s: %s is primary in epoch %d", node.label, primary.name, primary.epoch)
                    self._role(node.follow, primary)
                case StepDown(reason=reason, epoch=epoch):
                    log.warning("%s: no longer primary: %s", node.label, reason)
                    self._role(node.step_down, reason, epoch)
                case Adopt(lineage=lineage):
                    self._role(node.adopt, lineage)

    def _submit(self, do: Callable[..., Any], *arguments: Any) -> Any:
        assert self._askers is not None
        return self._askers.submit(do, *arguments)

    def _role(self, do: Callable[..., None], *arguments: Any) -> None:
        assert self._roles is not None
        self._roles.submit(self._in_role, do, *arguments)

    def _in_role(self, do: Callable[..., None], *arguments: Any) -> None:
        try:
            do(*arguments)
        except ClosedError:
            return
        except Exception:
            log.exception("%s: a change of role failed", self._label())
        self.changed()

    def _become(self, node: NodeView, action: BecomePrimary) -> None:
        problem = ""
        try:
            node.become_primary(action)
        except ClosedError:
            return
        except Error as error:
            problem = str(error) or type(error).__name__
            log.warning("%s: could not begin epoch %d: %s", node.label, action.epoch, problem)
        except Exception as error:
            problem = repr(error)
            log.exception("%s: could not begin epoch %d", node.label, action.epoch)
        self._event(lambda e, now: e.on_started(action.epoch, problem, now), quietly=True)

    def _promise(self, node: NodeView, action: GivePromise) -> None:
        promise: Promise | None = None
        try:
            promise = node.promise(action.epoch, action.to)
        except (Error, OSError) as error:
            log.error("%s: a promise could not be stored: %s", node.label, error)
        self._event(lambda e, now: e.on_own_promise(action.epoch, promise, now), quietly=True)

    # -- calls to peers ----------------------------------------------------------------------------

    def _ask_all(self, ask: Ask) -> None:
        lead = ask.question.purpose == "lead"
        request = ask.question.to_wire()
        for peer in ask.to:
            if lead:
                # A peer that does not answer must not take all threads with heartbeats.
                if peer.name in self._leads_open:
                    continue
                self._leads_open.add(peer.name)
            self._submit(self._ask_one, peer, ask, request)

    def _ask_one(self, peer: Peer, ask: Ask, request: Mapping[str, Any]) -> None:
        try:
            answer = Answer.from_wire(self._call(peer, "ask", request, self._settings.answer_timeout_s))
        except Error as error:
            why = why_gone(error)
            log.debug("%s: no answer from %s: %s", self._label(), peer.name, error)
            self._told(ask, peer, lambda e, now: e.on_no_answer(ask, peer.name, why, now))
            return
        self._told(ask, peer, lambda e, now: e.on_answer(ask, peer.name, answer, now))

    def _told(self, ask: Ask, peer: Peer, do: Callable[[Election, float], list[Action]]) -> None:
        with self._lock:
            if ask.question.purpose == "lead":
                self._leads_open.discard(peer.name)
            self._event(do, quietly=True)

    def _request(self, peer: Peer, action: RequestPromises) -> None:
        request = action.request
        try:
            reply = PromiseReply.from_wire(
                self._call(peer, "vote", request.to_wire(), self._settings.answer_timeout_s)
            )
        except Error as error:
            log.debug("%s: no promise from %s: %s", self._label(), peer.name, error)
            self._event(lambda e, now: e.on_no_reply(request, peer.name, now), quietly=True)
            return
        self._event(lambda e, now: e.on_reply(request, peer.name, reply, now), quietly=True)

    def _call(self, peer: Peer, method: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """One call. A connection that broke is replaced at once: only a fresh one tells if it is refused."""
        deadline = time.monotonic() + timeout_s
        try:
            return self._call_once(peer.address, method, request, timeout_s)
        except (PeerUnavailable, ClosedError) as error:
            # ClosedError: another thread found the connection broken and closed it.
            left = deadline - time.monotonic()
            silent = isinstance(error, PeerUnavailable) and why_gone(error) is WhyGone.SILENT
            if silent or left <= 0 or self._stopping.is_set():
                raise
            return self._call_once(peer.address, method, request, left)

    def _call_once(
        self, address: str, method: str, request: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        connection = self._connection(address)
        try:
            return connection.call(method, request, timeout_s)
        except PeerUnavailable as error:
            # It may be waiting out a backoff: the next call shall see the peer as it is then.
            if why_gone(error) is not WhyGone.SILENT:
                self._drop(address, connection)
            raise

    def _connection(self, address: str) -> Connection:
        with self._connections_lock:
            if self._stopping.is_set() or self._node is None:
                raise ClosedError("the coordinator does not run")
            connection = self._connections.get(address)
            if connection is None:
                try:
                    connection = self._node.transport.connect(address, name=self._node.label)
                except ValueError as error:
                    raise PeerUnavailable(f"{address!r}: {error}", address=address) from error
                self._connections[address] = connection
            return connection

    def _drop(self, address: str, connection: Connection) -> None:
        with self._connections_lock:
            if self._connections.get(address) is connection:
                del self._connections[address]
        connection.close()
