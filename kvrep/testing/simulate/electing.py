"""A node's election with its clock, its calls and the changes of role that it wants.

As in ``coordination/driver.py``: calls go out at once and in parallel; changes of role happen one after the
other, in the order of the decisions, and some of them take long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrep.model.configuration import Configuration
from kvrep.replication.ballots import Answer, PrimarySeen, PromiseReply, PromiseRequest
from kvrep.replication.election import (
    Action,
    Adopt,
    Ask,
    BecomePrimary,
    Election,
    FollowPrimary,
    GivePromise,
    Peer,
    RequestPromises,
    StepDown,
    WhyGone,
)
from kvrep.replication.messages import Promise
from kvrep.testing.simulate.node import StorageError
from kvrep.testing.simulate.promoting import TakingOver

if TYPE_CHECKING:
    from kvrep.testing.simulate.node import Node

__all__ = ["Electing"]

SLEEP_S_MIN = 0.001
SLEEP_S_MAX = 0.25

Do = Callable[[], None]
Role = Callable[[Do], None]
"""A change of role; it calls its argument when it is over."""


class Electing:
    def __init__(self, node: Node) -> None:
        self.node = node
        world = node.world
        self.election = Election(
            world.settings.election,
            node.standing(),
            peers={n.name: n.address for n in world.nodes.values() if n.voter},
            chance=world.chance.random,
            now=node.now,
        )
        self._tick = 0
        self._leads_open: set[str] = set()
        self._roles: deque[Role] = deque()
        self._changing = False

    # -- events ------------------------------------------------------------------------------------

    def tick(self) -> None:
        self.event(lambda e: e.tick(self.node.now))

    def event(self, do: Callable[[Election], list[Action]]) -> None:
        """One event, with the node as it is now."""
        election, node = self.election, self.node
        self._act(election.observe(node.standing(), node.now))
        self._act(do(election))
        self._tick += 1
        number = self._tick
        pause = min(max(election.wakes_at - node.now, SLEEP_S_MIN), SLEEP_S_MAX)
        node.after(pause, lambda: self.tick() if number == self._tick else None)

    def heard(self, primary: PrimarySeen) -> None:
        self.event(lambda e: e.heard_from_primary(primary, self.node.now))

    def connection_lost(self, why: WhyGone) -> None:
        self.event(lambda e: e.connection_lost(why, self.node.now))

    @property
    def unconfirmed(self) -> bool:
        """Whether most voters have not confirmed this primary for too long."""
        return self.node.now > self.election.confirmed_until(self.node.now)

    # -- actions -----------------------------------------------------------------------------------

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Ask():
                    self._ask(action)
                case GivePromise():
                    self._own_promise(action)
                case RequestPromises():
                    for peer in action.to:
                        self._request(peer, action.request)
                case BecomePrimary():
                    self._role(lambda done, a=action: self._become(a, done))  # type: ignore[misc]
                case FollowPrimary(primary=primary):
                    self._role(lambda done, p=primary: self._follow(p, done))  # type: ignore[misc]
                case StepDown(reason=reason):
                    self._role(lambda done, r=reason: self._step_down(r, done))  # type: ignore[misc]
                case Adopt(lineage=lineage):
                    self.node.disk.lineage = lineage

    def _ask(self, ask: Ask) -> None:
        lead = ask.question.purpose == "lead"
        for peer in ask.to:
            if lead:
                if peer.name in self._leads_open:
                    continue
                self._leads_open.add(peer.name)
            self._ask_one(peer, ask)

    def _ask_one(self, peer: Peer, ask: Ask) -> None:
        node, world = self.node, self.node.world
        target = world.nodes[peer.name]

        def serve(give: Callable[[Answer], None]) -> None:
            if target.electing is not None:
                give(target.electing.answer(ask))

        def done(answer: Answer) -> None:
            self._leads_open.discard(peer.name)
            self.event(lambda e: e.on_answer(ask, peer.name, answer, node.now))

        def failed(why: WhyGone) -> None:
            self._leads_open.discard(peer.name)
            self.event(lambda e: e.on_no_answer(ask, peer.name, why, node.now))

        world.network.call(node, target, serve, done, failed, world.settings.election.answer_timeout_s)

    def answer(self, ask: Ask) -> Answer:
        """Another node asks."""
        answers: list[Answer] = []

        def handle(election: Election) -> list[Action]:
            answer, actions = election.on_question(ask.question, self.node.now)
            answers.append(answer)
            return actions

        self.event(handle)
        return answers[0]

    # -- promises ----------------------------------------------------------------------------------

    def _own_promise(self, action: GivePromise) -> None:
        node = self.node

        def give() -> None:
            promise = self._promise(action)
            node.after(
                node.sync_s(),
                lambda: self.event(lambda e: e.on_own_promise(action.epoch, promise, node.now)),
            )

        node.with_lead(give)

    def _promise(self, action: GivePromise) -> Promise | None:
        try:
            return self.node.promise(action.epoch, action.to)
        except StorageError as error:
            self.node.world.say(self.node, "gives no promise: %s", error)
            return None

    def _request(self, peer: Peer, request: PromiseRequest) -> None:
        node, world = self.node, self.node.world
        target = world.nodes[peer.name]

        def serve(give: Callable[[PromiseReply], None]) -> None:
            if target.electing is not None:
                target.electing.asked_for_promise(request, give)

        def done(reply: PromiseReply) -> None:
            self.event(lambda e: e.on_reply(request, peer.name, reply, node.now))

        def failed(_: WhyGone) -> None:
            self.event(lambda e: e.on_no_reply(request, peer.name, node.now))

        world.network.call(node, target, serve, done, failed, world.settings.election.answer_timeout_s)

    def asked_for_promise(self, request: PromiseRequest, give: Callable[[PromiseReply], None]) -> None:
        """Decide, store, answer: in this order, and nothing is answered that is not stored."""
        node = self.node
        self.event(lambda e: [])
        chosen = self.election.on_promise_request(request, node.now)
        if isinstance(chosen, str):
            give(self.election.reply(None, chosen, node.now))
            return
        node.with_lead(lambda: self._promise_to(chosen, give))

    def _promise_to(self, chosen: GivePromise, give: Callable[[PromiseReply], None]) -> None:
        node = self.node
        try:
            promise = node.promise(chosen.epoch, chosen.to)
        except StorageError:
            return  # the call fails
        if promise is not None:
            self.event(lambda e: e.gave_promise(chosen.epoch, chosen.to, node.now))
        refused = "" if promise is not None else "another promise was given meanwhile"
        reply = self.election.reply(promise, refused, node.now)
        node.after(node.sync_s(), lambda: give(reply))

    # -- changes of role, one after the other ------------------------------------------------------

    def _role(self, change: Role) -> None:
        self._roles.append(change)
        self.node.after(0.0, self._next_role)

    def _next_role(self) -> None:
        if self._roles and not self._changing:
            self._changing = True
            self._roles.popleft()(self._changed)

    def _changed(self) -> None:
        self._changing = False
        self.event(lambda e: [])
        self._next_role()

    def _follow(self, primary: PrimarySeen, done: Do) -> None:
        self.node.follow(primary.name)
        done()

    def _step_down(self, reason: str, done: Do) -> None:
        if self.node.feeding is not None:
            self.node.world.say(self.node, "steps down: %s", reason)
            self.node.follow("")
        done()

    def _become(self, action: BecomePrimary, done: Do) -> None:
        node = self.node

        def ended(problem: str) -> None:
            if problem:
                node.world.say(node, "does not begin epoch %d: %s", action.epoch, problem)
            self.event(lambda e: e.on_started(action.epoch, problem, node.now))
            done()

        founding = self._founding(action) if action.founding else None
        TakingOver(node, action.promotion, fenced=action.fenced, founding=founding, ended=ended).begin()

    def _founding(self, action: BecomePrimary) -> Configuration:
        node = self.node
        if not node.disk.lineage:
            node.disk.lineage = node.world.new_lineage()
        return Configuration(
            acks=node.world.settings.acks,
            degrade_after_s=node.world.settings.degrade_after_s,
            lag_records_max=node.world.settings.lag_records_max,
            voters=action.founding,
            next_member=max(v.member for v in action.founding) + 1,
        )
