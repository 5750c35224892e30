"""What all coordinators have in common, and the one that a node has where it is given none.

A :class:`Voting` keeps an election's state under a lock and answers peers. Nobody tries here: the actions of the
election are dropped, but for stepping down when another node was promised a higher epoch.
:class:`kvrep.coordination.driver.Driver` does the rest.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvrep.errors import ClosedError, ProtocolError, StorageFailed
from kvrep.model.position import ZERO, Position
from kvrep.replication.ballots import Answer, PrimarySeen, PromiseReply, PromiseRequest, Question
from kvrep.replication.election import Action, Election, ElectionSettings, StepDown, WhyGone
from kvrep.runtime.coordinator import CoordinatorStatus, NodeView

__all__ = ["ManualCoordinator", "Voting"]


class Voting:
    """See :class:`kvrep.runtime.coordinator.Coordinator`."""

    kind = "manual"
    automatic = False
    witness = False
    outside_votes = False

    def __init__(
        self,
        settings: ElectionSettings,
        *,
        peers: Mapping[str, str] | None = None,
        priority: int = 0,
        needs_permit: bool = False,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] | None = None,
    ) -> None:
        self._settings = settings
        self._peers = dict(peers or {})
        self._priority = priority
        self._needs_permit = needs_permit
        self._clock = clock
        self._chance = chance or random.SystemRandom().random
        # Protects the election. node.standing() is called under it; nothing that waits is.
        self._lock = threading.RLock()
        self._node: NodeView | None = None
        self._election: Election | None = None
        self._stopped = False
        self._pending: list[StepDown] = []
        self.confirmed_until = float("inf")

    def start(self, node: NodeView) -> None:
        with self._lock:
            self._node = node
            self._election = Election(
                self._settings,
                node.standing(),
                peers=self._peers,
                chance=self._chance,
                now=self._clock(),
                priority=self._priority,
                needs_permit=self._needs_permit,
                by_hand=not self.automatic,
            )

    def stop(self, timeout_s: float = 5.0) -> None:
        del timeout_s
        self._stopped = True

    # -- peers -------------------------------------------------------------------------------------

    def call(self, method: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if method == "ask":
            return self._on_ask(Question.from_wire(request)).to_wire()
        if method == "vote":
            return self._on_promise(PromiseRequest.from_wire(request)).to_wire()
        raise ProtocolError(f"{method!r} is not a coordinator's call")

    def _on_ask(self, question: Question) -> Answer:
        answers: list[Answer] = []

        def ask(election: Election, now: float) -> list[Action]:
            answer, actions = election.on_question(question, now)
            answers.append(answer)
            return actions

        self._event(ask)
        self._do_pending(self._known()[0])
        return answers[0]

    def _on_promise(self, request: PromiseRequest) -> PromiseReply:
        node, election = self._known()
        with self._lock:
            self._event(lambda _election, _now: [])
            chosen = election.on_promise_request(request, self._clock())
            if isinstance(chosen, str):
                return election.reply(None, chosen, self._clock())
        try:
            promise = node.promise(chosen.epoch, chosen.to)
        except OSError as error:
            raise StorageFailed(f"the promise could not be stored: {error}") from error
        if promise is not None:
            self._event(lambda e, now: e.gave_promise(chosen.epoch, chosen.to, now))
            self._do_pending(node)
        with self._lock:
            refused = "" if promise is not None else "another promise was given meanwhile"
            return election.reply(promise, refused, self._clock())

    def remember(self, epoch: int, lowered: Position = ZERO) -> Position | None:
        del epoch, lowered
        return None

    # -- the node ----------------------------------------------------------------------------------

    def heard_from_primary(self, primary: PrimarySeen) -> None:
        self._event(lambda e, now: e.heard_from_primary(primary, now), quietly=True)

    def connection_lost(self, why: WhyGone) -> None:
        self._event(lambda e, now: e.connection_lost(why, now), quietly=True)

    def changed(self) -> None:
        self._event(lambda _election, _now: [], quietly=True)

    def status(self) -> CoordinatorStatus:
        _, election = self._known()
        with self._lock:
            now = self._clock()
            return CoordinatorStatus(
                kind=self.kind,
                phase=election.phase.value,
                problem=election.problem,
                primary=election.alive(now) or election.primary,
                confirmed_until=self.confirmed_until,
            )

    # -- how ---------------------------------------------------------------------------------------

    def _known(self) -> tuple[NodeView, Election]:
        node, election = self._node, self._election
        if node is None or election is None or self._stopped:
            raise ClosedError("the coordinator does not run")
        return node, election

    def _event(self, do: Callable[[Election, float], list[Action]], *, quietly: bool = False) -> None:
        """One event, with the node as it is now; its actions are begun in order before it returns.

        ``ClosedError`` when the coordinator does not run, unless ``quietly``.
        """
        if quietly and (self._election is None or self._stopped):
            return
        node, election = self._known()
        with self._lock:
            now = self._clock()
            actions = election.observe(node.standing(), now)
            actions += do(election, now)
            self._act(node, actions)
            self._after(election, now)

    def _act(self, node: NodeView, actions: list[Action]) -> None:
        """Begin what the election wants. Under the lock: must not wait."""
        del node
        # The newest is enough: stepping down twice is stepping down once.
        self._pending = [action for action in actions if isinstance(action, StepDown)] or self._pending

    def _do_pending(self, node: NodeView) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for action in pending:
            node.step_down(action.reason, action.epoch)

    def _after(self, election: Election, now: float) -> None:
        """After every event, under the lock."""


class ManualCoordinator(Voting):
    """The default: people, or something outside, decide. Nobody here tries to be primary by itself.

    No thread, no clock of its own. Elections of other nodes are answered all the same: with promises like any
    other, and while this node is primary, or hears of one, with its word that there is one. As it never stands, nobody
    is elected whose log is behind its own: then somebody has to promote it.
    """

    def __init__(self, silence_s: float = 5.0) -> None:
        """``silence_s``: how long a primary counts as alive that is not heard of."""
        seconds = min(max(silence_s, 0.01), 3600.0)
        super().__init__(
            ElectionSettings(heartbeat_interval_s=seconds / 4, timeout_s=seconds, step_down_s=seconds)
        )
