"""The state machine: which phase a node is in, and what each event does there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvrep.replication.ballots import Answer, PrimarySeen, PromiseReply, PromiseRequest, Question
from kvrep.replication.election.candidate import Candidate
from kvrep.replication.election.group import Group
from kvrep.replication.election.interface import (
    Action,
    Adopt,
    Ask,
    ElectionSettings,
    FollowPrimary,
    GivePromise,
    Peer,
    Phase,
    Standing,
    StepDown,
    WhyGone,
)
from kvrep.replication.election.leading import Leading
from kvrep.replication.election.watch import INFINITY, Watch
from kvrep.replication.messages import Promise

__all__ = ["Election"]


class Election:
    """One per node. Not thread-safe: the shell serializes all calls.

    Call :meth:`observe` whenever the node may have changed, and before any other event.
    """

    def __init__(
        self,
        settings: ElectionSettings,
        own: Standing,
        *,
        peers: Mapping[str, str],
        chance: Callable[[], float],
        now: float,
        priority: int = 0,
        needs_permit: bool = False,
        by_hand: bool = False,
    ) -> None:
        """``peers``: addresses by name, this node's own included; ``chance`` returns [0, 1).

        ``needs_permit``: stand only while :meth:`permit` allows it (an outside service decides who tries).
        ``by_hand``: this node never stands, nor does it ask to be confirmed: as primary it is one until it promises
        another node.
        """
        self._settings = settings
        self._group = Group(own, peers, priority)
        self._watch = Watch(settings, chance, now)
        self._leading = Leading(settings)
        self._candidate = Candidate(
            settings,
            self._group,
            self._watch,
            self._leading,
            chance=chance,
            needs_permit=needs_permit,
            now=now,
        )
        self._chance = chance
        self._by_hand = by_hand
        self._leads = False
        self._ticked = now

    # -- what others ask ---------------------------------------------------------------------------

    @property
    def wakes_at(self) -> float:
        """When :meth:`tick` is due at the latest."""
        if self.phase is Phase.LEADING or self.phase is Phase.STARTING:
            return self._leading.asks_at
        due = self._candidate.wakes_at(self._ticked)
        if due is not None:
            return due
        return min(self._due(), self._watch.look_at, self._ticked + self._settings.heartbeat_interval_s)

    @property
    def own(self) -> Standing:
        """The node, as it was observed last."""
        return self._group.own

    @property
    def phase(self) -> Phase:
        return Phase.LEADING if self._leads else self._candidate.phase

    @property
    def problem(self) -> str:
        """What keeps this node from knowing or being a primary, for people; empty when nothing does."""
        return self._candidate.problem

    @property
    def wants_permit(self) -> bool:
        """Whether this node would stand if the outside service let it."""
        return self._candidate.wants_permit

    @property
    def leading_epoch(self) -> int:
        """The epoch this node is primary in, 0 when it is not (or has just stepped down)."""
        epoch = self.own.primary_epoch
        return epoch if epoch > self._leading.resigned else 0

    @property
    def primary(self) -> PrimarySeen | None:
        """The primary that this node believes in, alive or not; ``None`` while it is primary itself."""
        return self._watch.primary

    def confirmed_until(self, now: float) -> float:
        """Until when most voters are known to have confirmed us, plus T; 0 when we are no primary.

        In asynchronous mode nothing may be acknowledged later than that.
        """
        if not self.leading_epoch:
            return 0.0
        return self._leading.confirmed_until(self.own, self._candidate.permit_until, now)

    def alive(self, now: float) -> PrimarySeen | None:
        """The primary that we have heard of within the limit, ourselves included."""
        epoch, own = self.leading_epoch, self.own
        if not epoch:
            return self._watch.alive(now)
        if self._unconfirmed(now):
            return None
        return PrimarySeen(store_id=own.store_id, name=own.name, address=own.address, epoch=epoch)

    def _unconfirmed(self, now: float) -> bool:
        """Whether most voters have not confirmed this primary for too long."""
        return not self._by_hand and now >= max(self.confirmed_until(now), self._leading.pardoned_until)

    # -- the node and its clock --------------------------------------------------------------------

    def observe(self, own: Standing, now: float) -> list[Action]:
        """The node as it is now."""
        if self.own.rules != own.rules and self.phase is Phase.LEADING:
            self._leading.admit(self.own, own, now)
        self._group.own = own
        epoch = self.leading_epoch
        if epoch and self.phase is not Phase.LEADING and self.phase is not Phase.STARTING:
            return self._lead(now)
        if self.phase is Phase.LEADING:
            if not epoch:
                self._follow_nobody(now, "this node is no longer primary")
                return self._fenced_by_promise()
            elif not own.able:
                return self._step_down("this node cannot store any more", now)
        return []

    def _fenced_by_promise(self) -> list[Action]:
        """We lead no more because of a promise: the node is to refuse writes, if it does not yet."""
        promised, led = self.own.promised_epoch, self._leading.epoch
        if promised <= led:
            return []
        self._leading.resigned = led
        return [StepDown(reason=f"epoch {promised} was promised to another node", epoch=promised)]

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        s = self._settings
        if now - self._ticked > max(2 * s.heartbeat_interval_s, s.timeout_s / 2):
            self._after_pause(now)
        self._ticked = now
        match self.phase:
            case Phase.LEADING:
                return self._lead_on(now)
            case Phase.STARTING:
                return self._announce(now)
            case Phase.ASKING | Phase.PROMISING:
                return self._candidate.tick(now)
            case Phase.FOLLOWING:
                if now >= self._due():
                    return self._candidate.ask(now)
                if now >= self._watch.look_at:
                    return self._look_at(self._watch.look_again(now), now)
                return []

    def permit(self, until: float, now: float) -> list[Action]:
        """An outside service lets us try until then (and counts as one more vote); 0 takes it back."""
        self._candidate.permit_until = until
        if until > now and self.phase is Phase.FOLLOWING and self.alive(now) is None:
            self._candidate.ask_at = now
        return []

    def promised_outside(self, epoch: int) -> list[Action]:
        """A service outside is known to have promised ``epoch``."""
        self._candidate.outside_epoch = max(self._candidate.outside_epoch, epoch)
        return []

    def told_addresses(self, peers: Mapping[str, str]) -> None:
        """These are the nodes now, by name."""
        self._group.peers = dict(peers)

    def found(self, now: float) -> list[Action]:
        """An outside service chose this empty node to begin a new group, alone."""
        own = self.own
        if not own.empty or own.witness or self.phase is not Phase.FOLLOWING:
            return []
        return self._candidate.found_alone(now)

    def _due(self) -> float:
        if self.own.witness:
            return INFINITY
        watch = self._watch
        if watch.primary is None or watch.gone:
            return self._candidate.ask_at
        return max(self._candidate.ask_at, watch.silence(watch.heard))

    def _after_pause(self, now: float) -> None:
        """We did not run for a while, so what we did not hear proves nothing."""
        grace = 2 * self._settings.heartbeat_interval_s
        self._watch.after_pause(now, grace)
        self._leading.pardoned_until = now + max(self._settings.answer_timeout_s, grace)

    # -- signs of life -----------------------------------------------------------------------------

    def heard_from_primary(self, primary: PrimarySeen, now: float) -> list[Action]:
        """The replication stream brought something of this primary. Cheap; for every heartbeat."""
        if primary.epoch < self.own.promised_epoch or self.leading_epoch >= primary.epoch:
            return []
        if primary.epoch > self._watch.over:
            self._believe(primary, now)
        return []

    def connection_lost(self, why: WhyGone, now: float) -> list[Action]:
        """The replication stream from the primary ended."""
        if self._watch.primary is None or self.leading_epoch or self.own.witness:
            return []
        if why is WhyGone.REFUSED:
            return self._is_gone(now)
        return self._look(now)

    def resign(self, now: float) -> list[Action]:
        """The node is being closed, in order: tell the others so that they need no timeout."""
        return self._resign("this node has resigned", now) if self.leading_epoch else []

    def _believe(self, primary: PrimarySeen, now: float) -> bool:
        """This primary is alive. Whether it is news."""
        news = self._watch.saw(primary, now)
        self._candidate.settle()
        promising = self.phase is Phase.PROMISING and primary.epoch > self._candidate.wanted
        if self.phase is Phase.ASKING or promising:
            self._rest()
        return news

    def _is_gone(self, now: float) -> list[Action]:
        """The primary's process is known to be gone."""
        self._watch.gone = True
        self._candidate.problem = "the primary is gone"
        if self.own.witness or self._by_hand or self.phase is not Phase.FOLLOWING:
            return []
        return self._candidate.ask(now)

    def _look(self, now: float) -> list[Action]:
        """Look whether the primary that we believe in is still there."""
        return self._look_at(self._watch.look(now), now)

    def _look_at(self, peer: Peer | None, now: float) -> list[Action]:
        return [self._group.question("look", (peer,), now, gone=self._watch.gone)] if peer is not None else []

    def _follow_nobody(self, now: float, problem: str) -> None:
        self._watch.forget()
        self._rest()
        self._candidate.problem = problem
        self._candidate.ask_at = now + self._chance() * self._settings.retry_s

    def _rest(self) -> None:
        """Back to following, whatever was under way."""
        self._leads = False
        self._candidate.rest()

    # -- asking ------------------------------------------------------------------------------------

    def on_answer(self, ask: Ask, name: str, answer: Answer, now: float) -> list[Action]:
        """One of those asked has answered."""
        if answer.store_id == self.own.store_id:
            return self.on_no_answer(ask, name, WhyGone.SILENT, now)
        self._group.known[name] = answer
        if ask.question.purpose == "lead":
            return self._on_confirmation(ask, answer, now)
        return [*self._learn(answer, now), *self._candidate.on_answer(ask, name, answer, now)]

    def on_no_answer(self, ask: Ask, name: str, why: WhyGone, now: float) -> list[Action]:
        """One of those asked cannot be reached, or did not answer in time."""
        gone = self._watch.refused(name, why, ask.asked_at, now)
        actions = self._is_gone(now) if gone else []
        return [*actions, *self._candidate.on_no_answer(ask, name, now)]

    def _learn(self, answer: Answer, now: float) -> list[Action]:
        """Somebody tells of a living primary. What we saw ourselves counts more than hearsay of the same."""
        alive, own = answer.alive, self.own
        if alive is None or alive.epoch < own.promised_epoch or alive.store_id == own.store_id:
            return []
        if alive.epoch <= self._watch.over or (own.lineage and answer.lineage != own.lineage):
            return []
        if self.leading_epoch:
            return self._superseded(alive, now) if alive.epoch > self.leading_epoch else []
        known = self._watch.primary
        if known is None or alive.epoch > known.epoch:
            self._believe(alive, now)
            return [FollowPrimary(primary=alive)]
        if alive.epoch == known.epoch and answer.store_id == alive.store_id:
            self._believe(alive, now)
        return []

    # -- becoming primary --------------------------------------------------------------------------

    def on_own_promise(self, epoch: int, promise: Promise | None, now: float) -> list[Action]:
        """Our own promise of ``epoch`` is durable, or could not be given."""
        return self._candidate.on_own_promise(epoch, promise, now)

    def on_reply(self, request: PromiseRequest, name: str, reply: PromiseReply, now: float) -> list[Action]:
        """A voter promised, or refused."""
        return self._candidate.on_reply(request.epoch, name, reply, now)

    def on_no_reply(self, request: PromiseRequest, name: str, now: float) -> list[Action]:
        """A voter gave no promise and cannot be asked again in this attempt."""
        return self._candidate.on_reply(request.epoch, name, None, now)

    def on_started(self, epoch: int, problem: str, now: float) -> list[Action]:
        """The node has begun the epoch (``problem`` is empty), or could not."""
        if not self._candidate.starting or self._candidate.starting != epoch:
            return []
        if problem or self.leading_epoch < epoch:
            return self._candidate.give_up(now, problem or "the epoch could not be begun")
        return self._lead(now)

    # -- leading -----------------------------------------------------------------------------------

    def _lead(self, now: float) -> list[Action]:
        self._leading.begin(self.leading_epoch, now, prepared=self.phase is Phase.STARTING)
        self._rest()
        self._leads = True
        self._watch.forget()
        self._candidate.settle()
        return self._announce(now)

    def _announce(self, now: float) -> list[Action]:
        """Ask everybody to confirm this primary, or, while its epoch is being begun, to leave it time."""
        if not self._leading.asks(now):
            return []
        to, starting = self._group.others(), self._candidate.starting
        if not to:
            return []
        epoch, gone = starting or self.leading_epoch, self._watch.gone
        return [self._group.question("lead", to, now, gone=gone, epoch=epoch, begun=not starting)]

    def _lead_on(self, now: float) -> list[Action]:
        if self._unconfirmed(now):
            limit = self._settings.step_down_s
            return self._step_down(f"most voters have not confirmed this primary for {limit:g} s", now)
        challenger = self._leading.challenger(now)
        if challenger:
            return self._step_down(f"epoch {challenger} was promised to another node", now, challenger)
        return self._announce(now)

    def _on_confirmation(self, ask: Ask, answer: Answer, now: float) -> list[Action]:
        epoch = self.leading_epoch
        if not epoch or ask.question.epoch != epoch:
            return []
        if answer.alive is not None and answer.alive.epoch > epoch and answer.lineage == self.own.lineage:
            return self._superseded(answer.alive, now)
        self._leading.on_answer(ask, answer, self.own, now)
        return []

    def _superseded(self, newer: PrimarySeen, now: float) -> list[Action]:
        self._leading.resigned = self.leading_epoch
        self._follow_nobody(now, "")
        self._believe(newer, now)
        reason = f"{newer.name} is primary in epoch {newer.epoch}"
        return [StepDown(reason=reason, epoch=newer.epoch), FollowPrimary(primary=newer)]

    def _step_down(self, reason: str, now: float, newer: int = 0) -> list[Action]:
        return [StepDown(reason=reason, epoch=newer), *self._resign(reason, now)]

    def _resign(self, problem: str, now: float) -> list[Action]:
        """Lead no more, and tell the voters."""
        epoch = self._leading.resigned = self.leading_epoch
        self._follow_nobody(now, problem)
        to = self._group.voters()
        return [self._group.question("resign", to, now, gone=False, epoch=epoch)] if to else []

    # -- being asked -------------------------------------------------------------------------------

    def on_question(self, question: Question, now: float) -> tuple[Answer, list[Action]]:
        """Somebody asks. The answer promises nothing."""
        own = self.own
        actions: list[Action] = []
        would, why_not = False, ""
        if question.lineage and own.lineage and question.lineage != own.lineage:
            why_not = "this node belongs to another group"
        elif question.purpose == "lead":
            why_not, actions = self._on_lead(question, now)
            would = not why_not
        elif question.purpose == "stand":
            why_not = self._group.objection(question, self.alive(now))
            would, actions = not why_not, self._look_too(question, now)
        elif question.purpose == "resign":
            actions = self._on_resign(question, now)
        return self._group.answer(self.alive(now), would=would, why=why_not), actions

    def _look_too(self, question: Question, now: float) -> list[Action]:
        """The asker says that the primary is gone. If we believe otherwise, see for ourselves."""
        if not question.gone or self.leading_epoch or self.alive(now) is None:
            return []
        return self._look(now)

    def _on_lead(self, question: Question, now: float) -> tuple[str, list[Action]]:
        """Why the asker is not confirmed (empty: it is), and what follows."""
        own, watch, epoch = self.own, self._watch, question.epoch
        if epoch < own.promised_epoch:
            return f"this node has promised epoch {own.promised_epoch}", []
        if epoch <= watch.over:
            return "its primary has resigned", []
        if self.leading_epoch >= epoch:
            return f"this node is primary in epoch {self.leading_epoch}", []
        if watch.primary is not None and watch.primary.epoch > epoch:
            return f"{watch.primary.name} is primary in epoch {watch.primary.epoch}", []
        if not question.begun:
            # It collected its promises and prepares; whoever promised it leaves it time for that.
            if own.promised_epoch != epoch:
                return "it has not begun", []
            self._candidate.ask_at = max(self._candidate.ask_at, watch.silence(now))
            return "", []
        seen = PrimarySeen(
            store_id=question.store_id, name=question.name, address=question.address, epoch=epoch
        )
        if self.leading_epoch:
            return "", self._superseded(seen, now)
        actions: list[Action] = []
        if own.witness and not own.lineage and question.lineage:
            actions.append(Adopt(lineage=question.lineage))
        if 0 < self._candidate.starting < epoch:
            self._rest()
        if self._believe(seen, now) and not own.witness:
            actions.append(FollowPrimary(primary=seen))
        return "", actions

    def _on_resign(self, question: Question, now: float) -> list[Action]:
        primary = self._watch.primary
        if primary is None or (primary.store_id, primary.epoch) != (question.store_id, question.epoch):
            return []
        self._watch.over = question.epoch
        return self._is_gone(now)

    def on_promise_request(self, request: PromiseRequest, now: float) -> GivePromise | str:
        """What to promise durably, or why not. Tell :meth:`gave_promise` afterwards."""
        why = self._group.refusal(request, self.alive(now))
        return why or GivePromise(epoch=request.epoch, to=request.store_id)

    def gave_promise(self, epoch: int, to: bytes, now: float) -> list[Action]:
        """This node has durably promised ``epoch`` to another store, to which we now leave time."""
        if to == self.own.store_id:
            return []
        actions: list[Action] = []
        if 0 < self.leading_epoch < epoch:
            self._leading.resigned = self.leading_epoch
            actions = [StepDown(reason=f"epoch {epoch} was promised to another node", epoch=epoch)]
        primary = self._watch.primary
        if primary is not None and primary.epoch >= epoch:
            return actions
        if self._candidate.starting <= epoch:
            self._rest()
        until = self._watch.wait_for_another(now)
        self._candidate.wait(until, "waiting for the node that this one has promised to follow")
        return actions

    def reply(self, promise: Promise | None, refused: str, now: float) -> PromiseReply:
        """The reply to a request for a promise; ``promise`` only if it is durable."""
        return PromiseReply(
            store_id=self.own.store_id,
            promised_epoch=max(self.own.promised_epoch, promise.epoch if promise is not None else 0),
            promise=promise,
            refused=refused,
            alive=self.alive(now),
        )
