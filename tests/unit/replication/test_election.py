"""Who tries to be primary: each rule of the election alone, with one node and made-up answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from kvrep.errors import ProtocolError
from kvrep.model.configuration import Acks, Configuration, Voter
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.replication.ballots import Answer, PrimarySeen, PromiseReply, PromiseRequest, Question
from kvrep.replication.election import (
    Action,
    Adopt,
    Ask,
    BecomePrimary,
    Election,
    ElectionSettings,
    FollowPrimary,
    GivePromise,
    Phase,
    RequestPromises,
    Standing,
    StepDown,
    WhyGone,
)
from kvrep.replication.messages import Promise

LINEAGE = b"lineage"
LAST = Position(1001, 10)
T = TypeVar("T")
S = ElectionSettings()


def store(name: str) -> bytes:
    return b"id-" + name.encode()


def group(names: str = "abc", acks: Acks = "majority", **priorities: int) -> Configuration:
    """Voters by letter; a capital letter is a witness."""
    voters = tuple(
        Voter(
            store_id=store(n),
            name=n,
            member=i,
            address=f"{n}:1",
            priority=priorities.get(n, 0),
            witness=n.isupper(),
        )
        for i, n in enumerate(names, 1)
    )
    return Configuration(acks=acks, voters=voters, next_member=len(names) + 1)


def seen(name: str, epoch: int) -> PrimarySeen:
    return PrimarySeen(store_id=store(name), name=name, address=f"{name}:1", epoch=epoch)


class One:
    """A node under test, with a clock of its own. ``do`` keeps the actions of the last event."""

    def __init__(self, name: str = "b", rule: Configuration | None = None, **more: Any) -> None:
        rule = group() if rule is None else rule
        options = {k: more.pop(k) for k in ("peers", "needs_permit", "priority") if k in more}
        self.now = 100.0
        standing: dict[str, Any] = {
            "store_id": store(name),
            "name": name,
            "address": f"{name}:1",
            "lineage": LINEAGE,
            "rules": (rule,),
            "promised_epoch": 1001,
            "last": LAST,
            "witness": name.isupper(),
        }
        self.own = Standing(**{**standing, **more})
        self.election = Election(
            S, self.own, peers=options.pop("peers", {}), chance=lambda: 0.5, now=self.now, **options
        )

    def do(self, actions: list[Action]) -> list[Action]:
        self.actions = actions
        return actions

    def is_now(self, **changes: Any) -> list[Action]:
        self.own = replace(self.own, **changes)
        return self.do(self.election.observe(self.own, self.now))

    def tick(self, seconds: float = 0.0) -> list[Action]:
        """Let time pass in steps that are no pause."""
        actions: list[Action] = []
        end = self.now + seconds
        while True:
            self.now = min(end, self.now + 0.1)
            actions += self.election.tick(self.now)
            if self.now >= end:
                return self.do(actions)

    def ask(self) -> Ask:
        """The round of questions that is under way."""
        assert self.election._candidate.round is not None
        return self.election._candidate.round.ask

    def answer(self, name: str, /, **more: Any) -> list[Action]:
        fields: dict[str, Any] = {
            "store_id": store(name),
            "name": name,
            "address": f"{name}:1",
            "lineage": LINEAGE,
            "promised_epoch": 1001,
            "last": LAST,
            "would": True,
            "able": not name.isupper(),
            "witness": name.isupper(),
            "member": ord(name.lower()) - 96,
        }
        answer = Answer(**{**fields, **more})
        return self.do(self.election.on_answer(self.ask(), name, answer, self.now))

    def silent(self, name: str, why: WhyGone = WhyGone.SILENT) -> list[Action]:
        return self.do(self.election.on_no_answer(self.ask(), name, why, self.now))

    def hear(self, name: str = "a", epoch: int = 1001, **more: Any) -> tuple[Answer, list[Action]]:
        """A primary asks to be confirmed."""
        fields: dict[str, Any] = {"lineage": LINEAGE, "begun": True}
        question = Question(
            purpose="lead",
            store_id=store(name),
            name=name,
            address=f"{name}:1",
            epoch=epoch,
            **{**fields, **more},
        )
        answer, actions = self.election.on_question(question, self.now)
        return answer, self.do(actions)

    def asked(self, name: str = "c", *, last: Position = LAST, gone: bool = False) -> Answer:
        """Somebody wants to stand."""
        question = Question(
            purpose="stand",
            store_id=store(name),
            name=name,
            address=f"{name}:1",
            lineage=LINEAGE,
            last=last,
            gone=gone,
        )
        answer, actions = self.election.on_question(question, self.now)
        self.do(actions)
        return answer

    def promise_to(self, name: str, epoch: int, **more: Any) -> GivePromise | str:
        fields: dict[str, Any] = {"lineage": LINEAGE, **more}
        request = PromiseRequest(epoch=epoch, store_id=store(name), name=name, address="", **fields)
        return self.election.on_promise_request(request, self.now)

    def wanted(self) -> int:
        """The epoch it has just promised itself, durably now."""
        (own,) = only(self.actions, GivePromise)
        assert own.to == self.own.store_id
        self.own = replace(self.own, promised_epoch=own.epoch)
        self.election.observe(self.own, self.now)
        self.do(self.election.on_own_promise(own.epoch, promise(own.epoch, self.own.last), self.now))
        return own.epoch

    def promised(self, name: str, epoch: int, given: Promise | None) -> list[Action]:
        request = PromiseRequest(
            epoch=epoch, store_id=self.own.store_id, name="", address="", lineage=LINEAGE
        )
        reply = PromiseReply(
            store_id=store(name), promised_epoch=given.epoch if given else 9009, promise=given
        )
        return self.do(self.election.on_reply(request, name, reply, self.now))

    def elected(self) -> int:
        """Become primary, with the vote of c."""
        self.tick()
        self.silent("a")
        self.answer("c")
        epoch = self.wanted()
        self.promised("c", epoch, promise(epoch))
        self.is_now(primary_epoch=epoch)
        self.do(self.election.on_started(epoch, "", self.now))
        return epoch


def promise(epoch: int, last: Position = LAST) -> Promise:
    table = EpochTable([(last.epoch, 1)] if last.offset else [])
    return Promise(epoch=epoch, last=last, committed=0, epochs=table)


def only(actions: list[Action], kind: type[T]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


# -- when it asks --------------------------------------------------------------------------------


def test_it_asks_only_after_the_limit_and_a_random_part() -> None:
    """Silence shorter than the limit starts nothing; then it asks everybody, without promising anything."""
    one = One()
    one.hear()
    assert not one.tick(S.timeout_s)
    (ask,) = only(one.tick(S.spread_s), Ask)
    assert ask.question.purpose == "stand"
    assert [peer.name for peer in ask.to] == ["a", "c"]
    assert one.election.phase is Phase.ASKING
    assert not only(one.actions, GivePromise)


def test_a_primary_that_is_heard_ends_a_round() -> None:
    """Whatever had been asked is forgotten when the primary turns out to be alive."""
    one = One()
    one.hear()
    one.tick(2.0)
    ask = one.ask()
    one.hear()
    assert one.election.phase is Phase.FOLLOWING
    late = Answer(store_id=store("c"), name="c", address="", lineage=LINEAGE, promised_epoch=0, would=True)
    assert not one.election.on_answer(ask, "c", late, one.now)
    assert not one.tick(0.5)


def test_refused_is_news() -> None:
    """A refused connection: the others are asked in the same moment, and told why."""
    one = One()
    one.hear()
    (ask,) = only(one.do(one.election.connection_lost(WhyGone.REFUSED, one.now)), Ask)
    assert ask.question.purpose == "stand"
    assert ask.question.gone


@pytest.mark.parametrize("why", [WhyGone.BROKEN, WhyGone.SILENT])
def test_a_broken_connection_is_looked_into(why: WhyGone) -> None:
    """It asks the primary itself; only a refusal there is news for the others."""
    one = One()
    one.hear()
    (look,) = only(one.election.connection_lost(why, one.now), Ask)
    assert [peer.name for peer in look.to] == ["a"]
    assert look.question.purpose == "look"
    assert not one.election.connection_lost(why, one.now)
    (ask,) = only(one.election.on_no_answer(look, "a", WhyGone.REFUSED, one.now), Ask)
    assert ask.question.purpose == "stand"


def test_a_late_message_after_a_refusal_delays_only_a_little() -> None:
    """What arrives of a dead primary after the question was sent makes the node look once more."""
    one = One()
    one.hear()
    (look,) = only(one.election.connection_lost(WhyGone.BROKEN, one.now), Ask)
    one.now += 0.001
    one.hear()
    assert not one.election.on_no_answer(look, "a", WhyGone.REFUSED, one.now)
    (again,) = only(one.tick(0.1), Ask)
    assert again.question.purpose == "look"
    assert only(one.election.on_no_answer(again, "a", WhyGone.REFUSED, one.now), Ask)


def test_who_is_told_that_the_primary_is_gone_looks() -> None:
    """A voter that has just heard it says no, and sees for itself."""
    one = One()
    one.hear()
    answer = one.asked("c", gone=True)
    assert not answer.would
    assert answer.alive == seen("a", 1001)
    (look,) = only(one.actions, Ask)
    assert [peer.name for peer in look.to] == ["a"]


def test_an_own_pause_proves_nothing() -> None:
    """After standing still for long the primary gets time to be heard before anybody is asked."""
    one = One()
    one.hear()
    one.tick(0.1)
    one.now += 30.0
    assert not one.election.tick(one.now)
    assert not one.tick(0.4)
    one.hear()
    assert not one.tick(S.timeout_s)


@pytest.mark.parametrize(
    ("name", "more"),
    [("c", {"able": False}), ("d", {}), ("c", {"rules": (group("abc", c=-1),)})],
)
def test_who_may_not_stand_only_looks(name: str, more: dict[str, Any]) -> None:
    """A copy that is not whole, a non-voter, a negative priority: they find the primary and no more."""
    one = One(name, **more)
    (ask,) = only(one.tick(), Ask)
    assert ask.question.purpose == "look"
    for peer in ask.to:
        one.answer(peer.name)
    assert not only(one.actions, GivePromise)
    assert one.election.problem


def test_who_was_removed_while_it_asked_does_not_stand() -> None:
    """The record that takes it off the voters may arrive between its question and the answers."""
    one = One("b")
    one.tick()
    assert one.ask().question.purpose == "stand"
    one.is_now(rules=(group("ac"),))
    assert not only(one.answer("a"), GivePromise)
    assert "not a voter" in one.election.problem


def test_a_witness_asks_nobody() -> None:
    """It answers, promises, and never tries."""
    one = One("W", group("abW"), last=ZERO)
    one.hear()
    assert not one.tick(30.0)
    assert one.election.wakes_at < one.now + 1.0


# -- what it answers -----------------------------------------------------------------------------


def test_stickiness() -> None:
    """Who has heard of a primary within the limit promises nobody else; planned changes are allowed."""
    one = One()
    one.hear()
    assert not one.asked().would
    assert isinstance(one.promise_to("c", 2003), str)
    assert isinstance(one.promise_to("c", 2003, planned=True), GivePromise)
    assert isinstance(one.promise_to("a", 2001), GivePromise)
    one.tick(S.timeout_s + 0.01)
    assert one.asked().would
    assert isinstance(one.promise_to("c", 2003), GivePromise)


def test_a_candidate_that_is_behind_is_told_no() -> None:
    """The log counts: epoch of the last record first, then its offset."""
    one = One()
    assert one.asked(last=LAST).would
    assert one.asked(last=Position(2002, 1)).would
    assert not one.asked(last=Position(1001, 9)).would
    assert not one.asked(last=Position(1, 99)).would


def test_a_witness_and_a_lesser_copy_judge_no_log() -> None:
    """Only who could be primary itself says no to one that is behind."""
    assert One("W", group("abW"), last=ZERO).asked("b").would
    assert One("c", group("abc", c=-1), last=Position(1001, 99)).asked("b").would


def test_promises() -> None:
    """None below what was promised, none to another group, none while not whole; empty voters may."""
    one = One(promised_epoch=5001)
    assert isinstance(one.promise_to("c", 4003), str)
    assert isinstance(one.promise_to("c", 6003), GivePromise)
    assert isinstance(one.promise_to("c", 6003, lineage=b"other"), str)
    assert isinstance(One(able=False).promise_to("c", 6003), str)
    empty = One(lineage=b"", rules=(), last=ZERO, promised_epoch=0)
    assert isinstance(empty.promise_to("c", 6003), GivePromise)
    assert empty.asked("c").would
    without_group = One(lineage=b"", rules=())
    assert isinstance(without_group.promise_to("c", 6003), str)
    assert not without_group.asked("c").would
    unable = One(lineage=b"", rules=(), last=ZERO, promised_epoch=0, able=False)
    assert isinstance(unable.promise_to("c", 6003), str)
    assert not unable.asked("c").would


def test_who_has_promised_leaves_time() -> None:
    """It does not stand itself until the one it promised had its chance; a message of that prolongs it."""
    one = One()
    one.tick()
    one.is_now(promised_epoch=2003)
    assert not one.election.gave_promise(2003, store("c"), one.now)
    assert one.election.phase is Phase.FOLLOWING
    assert not one.tick(0.9)
    answer, _ = one.hear("c", 2003, begun=False)
    assert answer.would
    assert not one.tick(0.9)
    assert only(one.tick(0.5), Ask)


# -- the round -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "acks", "yes", "stands"),
    [
        ("abc", "majority", "c", True),
        ("abc", "majority", "", False),
        ("abc", "all", "c", True),
        ("abc", "all", "", False),
        ("abc", 1, "c", True),
        ("abc", 0, "c", True),
        ("abcde", "majority", "cd", True),
        ("abcde", "majority", "c", False),
        ("abcde", 1, "cd", False),
        ("abcde", 1, "cde", True),
        ("abC", "majority", "C", True),
        ("ab", 1, "", False),
        ("ab", 1, "a", True),
    ],
)
def test_f_data_voters_and_most_voters(names: str, acks: Acks, yes: str, stands: bool) -> None:
    """Both are needed before anybody is asked for a promise; with acks=0 most voters do."""
    one = One("b", group(names, acks))
    one.tick()
    for name in (n for n in names if n != "b"):
        if name in yes:
            one.answer(name, member=9)
        else:
            one.silent(name)
        if only(one.actions, GivePromise):
            break
    assert bool(only(one.actions, GivePromise)) is stands


def test_the_best_stands_first() -> None:
    """One with the same log and a higher priority has answered: it gets a moment, then this node stands."""
    one = One("b", group("abc", c=5))
    one.tick()
    one.silent("a", WhyGone.REFUSED)
    one.answer("c", priority=5)
    assert one.election.phase is Phase.FOLLOWING
    assert not only(one.actions, GivePromise)
    assert not one.tick(S.patience_s / 2)
    one.tick(S.patience_s)
    one.silent("a", WhyGone.REFUSED)
    one.answer("c", priority=5)
    assert only(one.actions, GivePromise)


@pytest.mark.parametrize(
    "theirs", [{"member": 9}, {"priority": -1, "able": False}, {"lineage": b"x", "would": False}]
)
def test_a_worse_one_is_not_waited_for(theirs: dict[str, Any]) -> None:
    """Equal logs: the lower member number; a strange or unable node is no rival."""
    one = One("b", group("abW"))
    one.tick()
    one.answer("W")
    one.answer("a", **theirs)
    if one.election.phase is Phase.ASKING:
        one.tick(S.settle_s)
    assert only(one.actions, GivePromise)


def test_a_round_without_success_is_repeated_more_and_more_slowly() -> None:
    """It says why, and the pauses grow to half the limit."""
    one = One()
    pauses = []
    for _ in range(8):
        while not only(one.do(one.election.tick(one.now)), Ask):
            one.now += 0.01
        one.silent("a")
        before = one.now
        one.silent("c")
        assert one.election.phase is Phase.FOLLOWING
        assert "no answer from a, c" in one.election.problem
        pauses.append(one.election.wakes_at - before)
    assert pauses[0] < 0.1
    assert one.election._candidate.ask_at - one.now <= S.timeout_s / 2 * 1.5


def test_hearsay_of_a_living_primary_is_followed() -> None:
    """Who is told of a newer primary than it knows follows it at once."""
    one = One()
    one.tick()
    one.silent("a")
    (follow,) = only(one.answer("c", would=False, alive=seen("c", 2003)), FollowPrimary)
    assert follow.primary == seen("c", 2003)
    assert one.election.phase is Phase.FOLLOWING


def test_hearsay_of_an_old_primary_is_not() -> None:
    """A primary below what this node has promised is over."""
    one = One(promised_epoch=5001)
    one.tick()
    assert not only(one.answer("c", would=False, alive=seen("a", 4001)), FollowPrimary)


# -- promises ------------------------------------------------------------------------------------


def test_the_own_promise_comes_first() -> None:
    """Nobody is asked for a promise before the own one is durable; the epoch is above all that was seen."""
    one = One()
    one.tick()
    one.silent("a")
    one.answer("c", promised_epoch=7003)
    (own,) = only(one.actions, GivePromise)
    assert own.epoch == 8002
    assert not only(one.actions, RequestPromises)
    epoch = one.wanted()
    (request,) = only(one.actions, RequestPromises)
    assert request.request.epoch == epoch == 8002
    assert [peer.name for peer in request.to] == ["a", "c"]
    (become,) = only(one.promised("c", epoch, promise(epoch)), BecomePrimary)
    assert become.fenced
    assert become.promotion.ready
    assert become.addresses[store("c")] == "c:1"


def test_a_promise_that_cannot_be_stored_ends_the_attempt() -> None:
    """Then nothing is asked of others."""
    one = One()
    one.tick()
    one.silent("a")
    one.answer("c")
    (own,) = only(one.actions, GivePromise)
    assert not one.election.on_own_promise(own.epoch, None, one.now)
    assert one.election.phase is Phase.FOLLOWING
    assert "own promise" in one.election.problem


def test_of_two_that_stand_at_once_the_higher_epoch_wins() -> None:
    """The lower one is refused with the higher epoch, gives its own promise to it, and rests."""
    one = One()
    one.tick()
    one.silent("a")
    one.answer("c")
    epoch = one.wanted()
    given = one.promise_to("c", epoch + 1)
    assert given == GivePromise(epoch=epoch + 1, to=store("c"))
    one.is_now(promised_epoch=epoch + 1)
    one.election.gave_promise(epoch + 1, store("c"), one.now)
    assert one.election.phase is Phase.FOLLOWING
    assert not only(one.promised("a", epoch, promise(epoch)), BecomePrimary)


def test_a_refusal_with_a_higher_epoch_ends_the_attempt() -> None:
    """It is over at once, not at its deadline."""
    one = One()
    one.tick()
    one.silent("a")
    one.answer("c")
    epoch = one.wanted()
    one.promised("c", epoch, None)
    assert one.election.phase is Phase.FOLLOWING
    assert "9009" in one.election.problem


def test_promises_that_do_not_come_end_the_attempt() -> None:
    """At its deadline it gives up, names who is missing, and asks again later."""
    one = One()
    one.tick()
    one.silent("a")
    one.answer("c")
    one.wanted()
    one.tick(S.answer_timeout_s)
    assert one.election.phase is Phase.FOLLOWING
    assert "a, c" in one.election.problem
    assert only(one.tick(1.0), Ask)


def test_with_acks_0_a_promotion_is_not_fenced() -> None:
    """Most voters suffice, and the order says that it cannot know what was acknowledged."""
    one = One("b", group("abc", 0))
    one.tick()
    one.silent("a")
    one.answer("c")
    epoch = one.wanted()
    (become,) = only(one.promised("c", epoch, promise(epoch)), BecomePrimary)
    assert not become.fenced


def test_an_unfinished_configuration_counts_too() -> None:
    """Both rules must be satisfied: the one in force and the one that is not known to be committed."""
    one = One("b", rules=(group("abc"), group("abcde")))
    one.tick()
    one.silent("a")
    one.answer("c")
    one.silent("d")
    one.silent("e")
    assert not only(one.actions, GivePromise)
    assert "no answer from a, d, e" in one.election.problem


def test_a_begin_that_fails_is_no_primary() -> None:
    """The node could not fetch or append: the attempt is over."""
    one = One()
    one.tick()
    one.silent("a")
    one.answer("c")
    epoch = one.wanted()
    one.promised("c", epoch, promise(epoch))
    assert one.election.phase is Phase.STARTING
    assert not one.election.on_started(epoch, "the disk is full", one.now)
    assert one.election.phase is Phase.FOLLOWING
    assert one.election.problem == "the disk is full"


# -- leading -------------------------------------------------------------------------------------


def test_a_primary_tells_at_once_and_regularly() -> None:
    """The first message makes the others follow; the next come every interval."""
    one = One()
    epoch = one.elected()
    (lead,) = only(one.actions, Ask)
    assert (lead.question.purpose, lead.question.epoch, lead.question.begun) == ("lead", epoch, True)
    assert one.election.alive(one.now) == seen("b", epoch)
    assert len(only(one.tick(0.6), Ask)) == 2


def test_a_primary_without_a_majority_steps_down() -> None:
    """T after the last confirmation by most voters; it tells those who can still hear it."""
    one = One()
    one.elected()
    (lead,) = only(one.actions, Ask)
    one.now += 0.2
    confirmed = Answer(
        store_id=store("c"), name="c", address="", lineage=LINEAGE, promised_epoch=0, would=True
    )
    one.election.on_answer(lead, "c", confirmed, one.now)
    assert one.election.confirmed_until(one.now) == lead.asked_at + S.step_down_s
    assert not only(one.tick(0.7), StepDown)
    (down,) = only(one.tick(0.4), StepDown)
    assert "not confirmed" in down.reason
    assert "resign" in [a.question.purpose for a in only(one.actions, Ask)]
    assert one.election.leading_epoch == 0
    assert one.election.confirmed_until(one.now) == 0.0


def test_after_a_pause_a_primary_asks_before_it_gives_up() -> None:
    """It may not acknowledge (acks=0) before it is confirmed again, and stays primary if it is."""
    one = One()
    one.elected()
    one.now += 30.0
    (lead,) = only(one.election.tick(one.now), Ask)
    assert one.election.confirmed_until(one.now) < one.now
    confirmed = Answer(
        store_id=store("c"), name="c", address="", lineage=LINEAGE, promised_epoch=0, would=True
    )
    one.election.on_answer(lead, "c", confirmed, one.now)
    assert not only(one.tick(0.8), StepDown)


def test_a_newer_primary_ends_it() -> None:
    """Told by anybody, or by the newer one itself: step down and follow."""
    one = One()
    epoch = one.elected()
    _, actions = one.hear("c", epoch + 1001)
    assert only(actions, StepDown)[0].epoch == epoch + 1001
    assert only(actions, FollowPrimary)[0].primary.name == "c"

    two = One()
    epoch = two.elected()
    (lead,) = only(two.actions, Ask)
    told = Answer(
        store_id=store("a"),
        name="a",
        address="",
        lineage=LINEAGE,
        promised_epoch=epoch + 1001,
        alive=seen("c", epoch + 1001),
    )
    actions = two.election.on_answer(lead, "a", told, two.now)
    assert only(actions, StepDown)
    assert only(actions, FollowPrimary)


def test_a_higher_promise_without_a_primary_makes_it_stand_anew() -> None:
    """A promotion elsewhere has failed: after a moment this primary ends its epoch, and asks for another."""
    one = One()
    epoch = one.elected()
    (lead,) = only(one.actions, Ask)
    told = Answer(
        store_id=store("c"), name="c", address="", lineage=LINEAGE, promised_epoch=epoch + 1001, would=False
    )
    assert not one.election.on_answer(lead, "c", told, one.now)
    actions = one.tick(2 * S.patience_s + 0.1)
    assert only(actions, StepDown)[0].epoch == epoch + 1001
    assert only(one.tick(0.1), Ask)[0].question.purpose == "stand"


def test_an_old_primary_is_not_confirmed() -> None:
    """Below the own promise, or below a primary that is known: no, and why."""
    one = One(promised_epoch=5001)
    answer, actions = one.hear("a", 4001)
    assert not answer.would
    assert not actions
    one.hear("c", 6003)
    assert not one.hear("a", 5001)[0].would


def test_a_promise_ends_being_primary() -> None:
    """Once a higher promise is durable this node is no primary any more."""
    one = One()
    epoch = one.elected()
    assert isinstance(one.promise_to("c", epoch + 1001), str)
    assert isinstance(one.promise_to("c", epoch + 1001, planned=True), GivePromise)
    actions = one.is_now(promised_epoch=epoch + 1001, primary_epoch=0)
    assert only(actions, StepDown)[0].epoch == epoch + 1001


def test_a_new_voter_has_time() -> None:
    """A configuration that adds voters does not look like a lost majority."""
    one = One("a", group("a"))
    one.tick()
    epoch = one.wanted()
    one.is_now(primary_epoch=epoch)
    one.do(one.election.on_started(epoch, "", one.now))
    one.tick(5.0)
    one.is_now(rules=(group("abc"),))
    assert not only(one.tick(0.8), StepDown)
    assert only(one.tick(0.5), StepDown)


def test_a_resigned_primary_is_left_at_once() -> None:
    """The others do not wait, and what still arrives of the old epoch counts for nothing."""
    one = One()
    one.hear()
    question = Question(
        purpose="resign", store_id=store("a"), name="a", address="a:1", lineage=LINEAGE, epoch=1001
    )
    _, actions = one.election.on_question(question, one.now)
    assert only(actions, Ask)[0].question.purpose == "stand"
    assert not one.hear()[0].would
    one.election.heard_from_primary(seen("a", 1001), one.now)
    assert one.election.alive(one.now) is None


def test_resigning_at_close() -> None:
    """A primary tells its voters; a follower has nothing to tell."""
    one = One()
    assert not one.election.resign(one.now)
    epoch = one.elected()
    (ask,) = only(one.election.resign(one.now), Ask)
    assert (ask.question.purpose, ask.question.epoch) == ("resign", epoch)


def test_a_witness_adopts_the_lineage() -> None:
    """It learns of what group it keeps the promises; it is not told to follow."""
    one = One("W", group("abW"), lineage=b"", rules=(), last=ZERO, promised_epoch=1001)
    answer, actions = one.hear("a", 1001)
    assert answer.would
    assert actions == [Adopt(lineage=LINEAGE)]


# -- a permit ------------------------------------------------------------------------------------


def test_without_a_permit_nobody_stands() -> None:
    """It looks, and says that it would like to; with the permit it stands."""
    one = One(needs_permit=True)
    one.tick()
    assert one.ask().question.purpose == "look"
    one.silent("a")
    one.answer("c", would=False)
    assert one.election.wants_permit
    one.election.permit(one.now + 3.0, one.now)
    one.tick(0.01)
    assert one.ask().question.purpose == "stand"


def test_a_permit_is_one_vote_more() -> None:
    """Of two data nodes with acks=1 either goes on alone with it, and steps down when it ends."""
    one = One("b", group("ab", 1), needs_permit=True)
    one.election.permit(one.now + 3.0, one.now)
    one.tick()
    one.silent("a", WhyGone.REFUSED)
    epoch = one.wanted()
    (become,) = only(one.actions, BecomePrimary)
    assert become.fenced
    one.is_now(primary_epoch=epoch)
    one.do(one.election.on_started(epoch, "", one.now))
    assert not only(one.tick(2.5), StepDown)
    assert only(one.tick(1.0), StepDown)


def test_a_permit_does_not_replace_the_fence() -> None:
    """Of two data nodes with acks=0 or of three alone: a permit is not enough to stand on."""
    for rule in (group("abc"), group("abc", 1), group("abcde")):
        one = One("b", rule, needs_permit=True)
        one.election.permit(one.now + 3.0, one.now)
        one.tick()
        for peer in one.ask().to:
            one.silent(peer.name)
        assert not only(one.actions, GivePromise)


def test_with_a_permit_no_group_is_formed_by_peers() -> None:
    """The outside service alone says who begins a group."""
    peers = {"a": "a:1", "b": "b:1"}
    one = One("a", lineage=b"", rules=(), last=ZERO, promised_epoch=0, peers=peers, needs_permit=True)
    one.tick()
    one.answer("b", lineage=b"", empty=True, peers=tuple(sorted(peers.items())))
    assert not only(one.actions, GivePromise)
    (own,) = only(one.do(one.election.found(one.now + 9)), GivePromise)
    assert own.epoch == 1001


# -- forming a group -----------------------------------------------------------------------------

PEERS = {n: f"{n}:1" for n in "abc"}
EMPTY: dict[str, Any] = {
    "lineage": b"",
    "last": ZERO,
    "promised_epoch": 0,
    "would": False,
    "able": False,
    "empty": True,
    "peers": tuple(sorted(PEERS.items())),
}


def empty(name: str) -> One:
    return One(name, lineage=b"", rules=(), last=ZERO, promised_epoch=0, peers=PEERS)


def test_the_first_name_begins_the_group_with_all_promises() -> None:
    """All must answer, all must promise; then the order names the voters, in the order of their names."""
    one = empty("a")
    one.tick()
    one.answer("b", **EMPTY)
    one.answer("c", **EMPTY)
    epoch = one.wanted()
    assert epoch == 1001
    request = only(one.actions, RequestPromises)[0].request
    assert request.lineage == b""
    assert not only(one.promised("b", epoch, promise(epoch, ZERO)), BecomePrimary)
    (become,) = only(one.promised("c", epoch, promise(epoch, ZERO)), BecomePrimary)
    assert [(v.name, v.member) for v in become.founding] == [("a", 1), ("b", 2), ("c", 3)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"peers": (("a", "a:1"),)}, "another list"),
        ({"empty": False}, "holds data"),
        ({"name": "x"}, "is named"),
        ({"lineage": LINEAGE}, "belongs to a group"),
        (None, "no answer from c"),
    ],
)
def test_a_group_is_not_formed_by_halves(change: dict[str, Any] | None, problem: str) -> None:
    """Whatever is not as listed keeps it waiting, and it says what."""
    one = empty("a")
    one.tick()
    one.answer("b", **EMPTY)
    if change is None:
        one.silent("c")
    else:
        one.answer("c", **{**EMPTY, **change})
    assert not only(one.actions, GivePromise)
    assert problem in one.election.problem


def test_an_interrupted_founding_is_begun_again() -> None:
    """A lineage without a record is no obstacle to its own node; the same in another's hands is."""
    one = One("a", lineage=LINEAGE, rules=(), last=ZERO, promised_epoch=1001, peers=PEERS)
    one.tick()
    one.answer("b", **EMPTY)
    one.answer("c", **{**EMPTY, "lineage": LINEAGE, "empty": False, "witness": True})
    assert one.wanted() == 2001
    assert only(one.actions, RequestPromises)[0].request.lineage == LINEAGE

    for theirs in ({"lineage": b"other"}, {"lineage": LINEAGE, "empty": False}):
        waiting = One("a", lineage=LINEAGE, rules=(), last=ZERO, promised_epoch=1001, peers=PEERS)
        waiting.tick()
        waiting.answer("b", **EMPTY)
        waiting.answer("c", **{**EMPTY, **theirs})
        assert "c belongs to a group already" in waiting.election.problem

    joining = One("b", lineage=LINEAGE, rules=(), last=ZERO, promised_epoch=1001, peers=PEERS)
    assert isinstance(joining.promise_to("a", 2001, lineage=b"", peers=EMPTY["peers"]), str)
    assert isinstance(joining.promise_to("a", 2001, lineage=b"other"), str)
    assert isinstance(joining.promise_to("a", 2001, lineage=LINEAGE), GivePromise)


def test_the_others_wait_for_the_first() -> None:
    """Only one of the listed nodes begins."""
    one = empty("b")
    one.tick()
    one.answer("a", **EMPTY)
    one.answer("c", **EMPTY)
    assert not only(one.actions, GivePromise)
    assert "a is to begin" in one.election.problem


def test_empty_nodes_promise_only_for_their_own_list() -> None:
    """Same list, and still empty: else not."""
    one = empty("b")
    assert isinstance(one.promise_to("a", 1001, lineage=b"", peers=EMPTY["peers"]), GivePromise)
    assert isinstance(one.promise_to("a", 1001, lineage=b"", peers=()), str)
    assert isinstance(One().promise_to("a", 2001, lineage=b"", peers=EMPTY["peers"]), str)


# -- settings and wire ---------------------------------------------------------------------------


def test_settings_are_checked() -> None:
    """Times that contradict each other are refused."""
    with pytest.raises(ValueError, match="three heartbeat"):
        ElectionSettings(timeout_s=0.5)
    with pytest.raises(ValueError, match="step_down_s"):
        ElectionSettings(step_down_s=0.3)
    with pytest.raises(ValueError, match="spread_s"):
        ElectionSettings(spread_s=0)


QUESTION = Question(
    purpose="lead",
    store_id=b"s",
    name="a",
    address="a:1",
    lineage=b"l",
    epoch=1001,
    last=LAST,
    gone=True,
    begun=True,
    peers=(("a", "a:1"),),
)
ANSWER = Answer(
    store_id=b"s",
    name="a",
    address="a:1",
    lineage=b"l",
    promised_epoch=2002,
    last=LAST,
    would=True,
    why="w",
    able=True,
    priority=-3,
    member=2,
    witness=True,
    empty=True,
    alive=seen("c", 3003),
    peers=(("a", "a:1"),),
)
REQUEST = PromiseRequest(
    epoch=3, store_id=b"s", name="a", address="a:1", lineage=b"l", peers=(("a", "b"),), planned=True
)
REPLY = PromiseReply(store_id=b"s", promised_epoch=9, promise=promise(9), refused="no", alive=seen("c", 3003))


@pytest.mark.parametrize("value", [QUESTION, ANSWER, REQUEST, REPLY], ids=lambda v: type(v).__name__)
def test_every_message_survives_the_wire(value: Any) -> None:
    """Written and read again it is the same, and every field is needed and checked."""
    wire = value.to_wire()
    assert type(value).from_wire(wire) == value
    for name in wire:
        with pytest.raises(ProtocolError):
            type(value).from_wire({k: v for k, v in wire.items() if k != name})
        with pytest.raises(ProtocolError):
            type(value).from_wire({**wire, name: 3.5})
    with pytest.raises(ProtocolError):
        type(value).from_wire([])


@pytest.mark.parametrize(
    "change",
    [
        {"last": [2002, 10]},
        {"committed": 11},
        {"epochs": [[1001, 5], [1001, 6]]},
        {"epochs": [["x", 1]]},
        {"last": [-1, 10]},
    ],
)
def test_a_promise_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    """Its epoch table must end at its last record, and no more be committed than is there."""
    wire = REPLY.to_wire()
    wire["promise"] = {**wire["promise"], **change}
    with pytest.raises(ProtocolError):
        PromiseReply.from_wire(wire)
