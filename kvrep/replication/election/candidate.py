"""Standing for primary: a round of questions that bind nobody, then the promises that do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from kvrep.model.configuration import Configuration, Voter
from kvrep.model.position import epoch_after
from kvrep.replication.ballots import Answer, PromiseReply, PromiseRequest
from kvrep.replication.election.founding import found_alone, found_together
from kvrep.replication.election.group import Group
from kvrep.replication.election.interface import (
    Action,
    Ask,
    BecomePrimary,
    ElectionSettings,
    GivePromise,
    Peer,
    Phase,
    RequestPromises,
    Standing,
)
from kvrep.replication.election.leading import Leading
from kvrep.replication.election.watch import Watch
from kvrep.replication.messages import Promise
from kvrep.replication.promotion import Promotion, most

__all__ = ["Candidate"]


def _sufficient(rules: Iterable[Configuration], stores: set[bytes], *, permit: bool) -> bool:
    """Whether ``stores`` are most voters and, where acks are waited for, F data voters, under every rule.

    A permit counts as one voter more.
    """
    return all(
        most(rule, stores, outside=permit)
        and (not rule.synchronous or sum(v.store_id in stores for v in rule.voters if v.counts) >= rule.fence)
        for rule in rules
    )


class Round:
    """One round of questions, and what was answered."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.answers: dict[str, Answer] = {}
        self.silent: set[str] = set()

    @property
    def waiting(self) -> set[str]:
        """Who has not answered, and still may."""
        return {p.name for p in self.ask.to} - self.answers.keys() - self.silent

    def supporters(self, own: Standing) -> set[bytes]:
        """Who would promise, this node included."""
        return {own.store_id} | {a.store_id for a in self.answers.values() if a.would}

    def someone_better(self, own: Standing) -> bool:
        """Whether one who answered should stand in this node's place."""
        voter = own.voter
        assert voter is not None
        rank = own.last, voter.priority, -voter.member
        return any(
            a.able and a.lineage == own.lineage and (a.last, a.priority, -a.member) > rank
            for a in self.answers.values()
        )

    def why_not_enough(self, voters: Iterable[str]) -> str:
        told = [f"{name}: {a.why}" for name, a in sorted(self.answers.items()) if not a.would and a.why]
        mute = sorted(set(voters) - self.answers.keys())
        if mute:
            told.append("no answer from " + ", ".join(mute))
        return "too few voters would promise (" + "; ".join(told)[:600] + ")"


class Candidacy:
    """One attempt at one epoch: who has promised it."""

    def __init__(self, epoch: int, founding: tuple[Voter, ...], now: float) -> None:
        """``founding`` is not empty for the first epoch of a new group: these are its voters."""
        self.epoch = epoch
        self.founding = founding
        self.began_at = now
        self.promotion: Promotion | None = None
        """There once our own promise is durable."""
        self.promised: set[bytes] = set()
        self.failed: set[str] = set()

    def _rules(self, own: Standing) -> tuple[Configuration, ...]:
        if not self.founding:
            return own.rules
        return (Configuration(acks=0, voters=self.founding, next_member=len(self.founding) + 1),)

    def voters(self, own: Standing) -> tuple[Voter, ...]:
        """Of every rule, each once."""
        return tuple({v.store_id: v for rule in self._rules(own) for v in rule.voters}.values())

    def begin(self, own: Standing, promise: Promise) -> None:
        """Our own promise is durable."""
        rules = self._rules(own)
        self.promotion = Promotion(rules[0], own.store_id, self.epoch, promise, proposed=rules[1:])
        self.promised, self.failed = {own.store_id}, set()

    def complete(self, own: Standing, *, permit: bool) -> bool:
        """Whether all promises are there that are needed: of a new group those of all its voters."""
        if self.founding:
            return all(v.store_id in self.promised for v in self.founding)
        return _sufficient(own.rules, self.promised, permit=permit)

    def hopeless(self, own: Standing, asked: Collection[str]) -> bool:
        """Whether all who were ``asked`` have answered or cannot any more."""
        answered = {v.name for v in self.voters(own) if v.store_id in self.promised}
        return self.failed | answered >= set(asked)

    def missing(self, own: Standing) -> str:
        """Who has not promised, for people."""
        return ", ".join(v.name for v in self.voters(own) if v.store_id not in self.promised)


class Candidate:
    """Goes from FOLLOWING to STARTING, and back whenever :meth:`rest` says so.

    It reads what ``watch`` knows of the primary, and tells ``leading`` who promised before an epoch is begun.
    """

    def __init__(
        self,
        settings: ElectionSettings,
        group: Group,
        watch: Watch,
        leading: Leading,
        *,
        chance: Callable[[], float],
        needs_permit: bool,
        now: float,
    ) -> None:
        self.phase = Phase.FOLLOWING
        self.problem = "no primary is known yet"
        self.wants_permit = False
        self.permit_until = 0.0
        """Till then a service outside lets this node try, and counts as one more vote."""
        self.outside_epoch = 0
        """The highest epoch that this service is known to have promised."""
        self.ask_at = now
        """Not before then are the others asked, unless something happens."""
        self.round: Round | None = None
        """While ASKING."""
        self.candidacy: Candidacy | None = None
        """While PROMISING and STARTING."""
        self._settings = settings
        self._group = group
        self._watch = watch
        self._leading = leading
        self._chance = chance
        self._needs_permit = needs_permit
        self._failures = 0
        self._deferred = False
        """Whether it has left a better one its time, since it last heard of a primary."""

    # -- whether anything is under way -------------------------------------------------------------

    def wakes_at(self, ticked: float) -> float | None:
        """When :meth:`tick` is due; ``None`` while nothing is under way."""
        s = self._settings
        if self.round is not None:
            due = self.round.ask.asked_at + s.settle_s
            return due if ticked < due else self.round.ask.asked_at + s.answer_timeout_s
        if self.candidacy is not None:
            return self.candidacy.began_at + s.answer_timeout_s
        return None

    @property
    def wanted(self) -> int:
        """The epoch that it stands for, else 0."""
        return self.candidacy.epoch if self.candidacy is not None else 0

    @property
    def starting(self) -> int:
        """The epoch that the node is beginning, else 0."""
        return self.wanted if self.phase is Phase.STARTING else 0

    def tick(self, now: float) -> list[Action]:
        candidacy = self.candidacy
        if self.phase is not Phase.PROMISING or candidacy is None:
            return self._consider(now)
        if now < candidacy.began_at + self._settings.answer_timeout_s:
            return []
        return self.give_up(now, "too few voters promised in time: " + candidacy.missing(self._group.own))

    def rest(self) -> None:
        """Back to following, whatever was under way."""
        self.phase = Phase.FOLLOWING
        self.round = self.candidacy = None

    def wait(self, until: float, problem: str) -> None:
        """Leave others the time until then."""
        self.ask_at, self.problem = until, problem
        self._deferred = False

    def settle(self) -> None:
        """There is a primary, this node or another one: nothing of what went before counts."""
        self.problem = ""
        self._failures, self._deferred, self.wants_permit = 0, False, False

    # -- asking ------------------------------------------------------------------------------------

    def ask(self, now: float) -> list[Action]:
        """Ask everybody: as a candidate, or only to learn of a primary."""
        stands = self._group.own.could and not self._barred(now)
        self.phase = Phase.ASKING
        ask = self._group.question(
            "stand" if stands else "look", self._group.others(), now, gone=self._watch.gone
        )
        self.round = Round(ask)
        return [*([ask] if ask.to else []), *self._consider(now)]

    def _barred(self, now: float) -> bool:
        return self._needs_permit and now >= self.permit_until

    def on_answer(self, ask: Ask, name: str, answer: Answer, now: float) -> list[Action]:
        if self.round is None or ask.number != self.round.ask.number:
            return []
        self.round.answers[name] = answer
        return self._consider(now)

    def on_no_answer(self, ask: Ask, name: str, now: float) -> list[Action]:
        if self.round is None or ask.number != self.round.ask.number:
            return []
        self.round.silent.add(name)
        return self._consider(now)

    def _consider(self, now: float) -> list[Action]:
        """Decide upon the answers so far."""
        asked, own, s = self.round, self._group.own, self._settings
        if asked is None:
            return []
        began, waiting = asked.ask.asked_at, asked.waiting
        over = not waiting or now >= began + s.answer_timeout_s
        if own.empty:
            return self._found_together(asked, now) if over else []
        if asked.ask.question.purpose != "stand":
            if not over or (own.could and self._gives_way(asked, now)):
                return []
            self.wants_permit = own.could
            return self._later(now, self._why_not_standing(now))
        if not own.could:  # it was taken off the voters, or lost its disk, since it asked
            return self._later(now, self._why_not_standing(now))
        if not _sufficient(own.rules, asked.supporters(own), permit=now < self.permit_until):
            voters = (p.name for p in self._group.voters())
            return self._later(now, asked.why_not_enough(voters)) if over else []
        if not over and now < began + s.settle_s and any(self._may_be_better(n) for n in waiting):
            return []
        return [] if self._gives_way(asked, now) else self._stand(asked, now)

    def _gives_way(self, asked: Round, now: float) -> bool:
        """Leave the one who answered and is better a little time, once."""
        if self._deferred or not asked.someone_better(self._group.own):
            return False
        self._deferred = True
        self.rest()
        self.ask_at = now + self._settings.patience_s
        return True

    def _may_be_better(self, name: str) -> bool:
        if self._watch.has_left(name):
            return False
        voter = next((v for rule in self._group.own.rules for v in rule.voters if v.name == name), None)
        return voter is not None and voter.counts and voter.priority >= 0

    def _why_not_standing(self, now: float) -> str:
        own = self._group.own
        if own.witness:
            return "a witness keeps no data"
        if own.voter is None:
            return "this node is not a voter, and knows no primary"
        if not own.able:
            return "this node may not become primary by itself: its copy is not whole"
        if own.voter.away:
            return "the ack rule went on without this node, which may lack acknowledged records"
        if self._barred(now):
            return "another node has the key"
        return "this node's priority is below 0"

    def _later(self, now: float, problem: str) -> list[Action]:
        """Ask again after a pause that grows, with a random part."""
        s = self._settings
        self.rest()
        self.problem = problem
        self._failures += 1
        pause = min(s.retry_s * 2 ** min(self._failures - 1, 10), s.timeout_s / 2)
        self.ask_at = now + pause * (0.5 + self._chance())
        return []

    # -- collecting promises -----------------------------------------------------------------------

    def _stand(self, asked: Round, now: float) -> list[Action]:
        own = self._group.own
        voter = own.voter
        assert voter is not None
        told = (a.promised_epoch for a in asked.answers.values())
        seen = max([own.promised_epoch, own.last.epoch, self.outside_epoch, *told])
        return self._collect(now, epoch_after(seen, voter.member), ())

    def found_alone(self, now: float) -> list[Action]:
        """This node is empty, and chosen to begin a new group alone."""
        epoch = epoch_after(self._group.own.promised_epoch, 1)
        return self._collect(now, epoch, found_alone(self._group))

    def _found_together(self, asked: Round, now: float) -> list[Action]:
        """This node is empty: form the group it was told of, or join the one that exists."""
        own, answers = self._group.own, asked.answers
        voters = found_together(self._group, answers, outside=self._needs_permit)
        if isinstance(voters, str):
            return self._later(now, voters)
        member = next(v.member for v in voters if v.store_id == own.store_id)
        seen = max([own.promised_epoch, *(a.promised_epoch for a in answers.values())])
        return self._collect(now, epoch_after(seen, member), voters)

    def _collect(self, now: float, epoch: int, founding: tuple[Voter, ...]) -> list[Action]:
        self.rest()
        self.phase = Phase.PROMISING
        self.problem = "this node stands for primary"
        self.candidacy = Candidacy(epoch, founding, now)
        return [GivePromise(epoch=epoch, to=self._group.own.store_id)]

    def on_own_promise(self, epoch: int, promise: Promise | None, now: float) -> list[Action]:
        candidacy, own = self.candidacy, self._group.own
        if self.phase is not Phase.PROMISING or candidacy is None or epoch != candidacy.epoch:
            return []
        if promise is None:
            return self.give_up(now, "this node could not store its own promise")
        candidacy.begin(own, promise)
        request = PromiseRequest(
            epoch=epoch,
            store_id=own.store_id,
            name=own.name,
            address=own.address,
            lineage=own.lineage,
            peers=self._group.listed if candidacy.founding else (),
        )
        to = self._electors(candidacy)
        actions: list[Action] = [RequestPromises(to=to, request=request)] if to else []
        return [*actions, *self._decide(candidacy, now)]

    def _electors(self, candidacy: Candidacy) -> tuple[Peer, ...]:
        """Whose promises this attempt asks for."""
        if len(candidacy.founding) == 1:
            return ()
        return self._group.others() if candidacy.founding else self._group.voters()

    def on_reply(self, epoch: int, name: str, reply: PromiseReply | None, now: float) -> list[Action]:
        """A voter that was asked to promise ``epoch`` did, refused, or cannot be asked again (``None``)."""
        candidacy = self.candidacy
        if self.phase is not Phase.PROMISING or candidacy is None or epoch != candidacy.epoch:
            return []
        if candidacy.promotion is None:
            return []
        if reply is not None and reply.promise is not None and reply.promise.epoch == epoch:
            candidacy.promotion.on_promise(reply.store_id, reply.promise)
            candidacy.promised.add(reply.store_id)
            return self._decide(candidacy, now)
        if reply is not None and reply.promised_epoch > epoch:
            return self.give_up(now, f"{name} has promised epoch {reply.promised_epoch}")
        candidacy.failed.add(name)
        if candidacy.hopeless(self._group.own, [p.name for p in self._electors(candidacy)]):
            return self.give_up(now, "too few voters promised: " + candidacy.missing(self._group.own))
        return []

    def _decide(self, candidacy: Candidacy, now: float) -> list[Action]:
        own, promotion = self._group.own, candidacy.promotion
        assert promotion is not None
        if promotion.superseded:
            return self.give_up(now, f"epoch {promotion.highest_seen} exists")
        if not candidacy.complete(own, permit=now < self.permit_until):
            return []
        self.phase = Phase.STARTING
        self._leading.prepare(candidacy.promised, now)
        return [
            BecomePrimary(
                epoch=candidacy.epoch,
                promotion=promotion,
                fenced=promotion.fenced,
                founding=candidacy.founding,
                addresses={v.store_id: self._group.address_of(v) for v in candidacy.voters(own)},
            )
        ]

    def give_up(self, now: float, problem: str) -> list[Action]:
        """This attempt failed; others may stand meanwhile, so the next comes after a random pause."""
        self._later(now, problem)
        self.ask_at += self._chance() * self._settings.patience_s
        return []
