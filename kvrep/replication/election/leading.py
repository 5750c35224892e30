"""A primary's own standing: whether most voters still confirm it."""

from __future__ import annotations

from collections.abc import Iterable

from kvrep.replication.ballots import Answer
from kvrep.replication.election.interface import Ask, ElectionSettings, Standing
from kvrep.replication.election.watch import INFINITY

__all__ = ["Leading"]


class Leading:
    """From the promises of the voters to the end of an epoch, and again for the next one."""

    def __init__(self, settings: ElectionSettings) -> None:
        self._settings = settings
        self.epoch = 0
        """The newest epoch in which this node was primary."""
        self.resigned = 0
        """The newest epoch in which it steps down: it leads no more in it."""
        self.pardoned_until = 0.0
        """Till then silence proves nothing."""
        self._asked_at = -INFINITY
        self._confirmed: dict[bytes, float] = {}
        self._challenger = 0
        self._challenged_at = 0.0

    @property
    def asks_at(self) -> float:
        """When the voters are to be asked again."""
        return self._asked_at + self._settings.heartbeat_interval_s

    def asks(self, now: float) -> bool:
        """Whether to ask them now; counted as done."""
        if now < self.asks_at:
            return False
        self._asked_at = now
        return True

    def prepare(self, promised: Iterable[bytes], now: float) -> None:
        """Enough voters promised: the epoch is being begun."""
        self._asked_at = now
        self._confirmed = dict.fromkeys(promised, now)

    def begin(self, epoch: int, now: float, *, prepared: bool) -> None:
        """The epoch has begun; without ``prepared`` by a promotion of which the election knew nothing."""
        if not prepared:
            self._confirmed = {}
            self.pardoned_until = now + self._settings.step_down_s
        self.epoch = epoch
        self._challenger, self._challenged_at = 0, 0.0
        self._asked_at = -INFINITY

    def admit(self, before: Standing, own: Standing, now: float) -> None:
        """Voters that are new have not been asked as such yet; that is not silence."""
        for rule in own.rules:
            for voter in rule.voters:
                if not before.votes(voter.store_id):
                    self._confirmed.setdefault(voter.store_id, now)

    def on_answer(self, ask: Ask, answer: Answer, own: Standing, now: float) -> None:
        """A node was asked to confirm the present epoch, and confirms it or does not."""
        if answer.would:
            before = self._confirmed.get(answer.store_id, -INFINITY)
            self._confirmed[answer.store_id] = max(before, ask.asked_at)
        elif (
            answer.promised_epoch > ask.question.epoch
            and not self._challenged_at
            and own.votes(answer.store_id)
        ):
            self._challenged_at, self._challenger = now, answer.promised_epoch

    def confirmed_until(self, own: Standing, permit_until: float, now: float) -> float:
        """The latest moment at which most voters (under every rule) had confirmed us, plus T.

        A permit that is known to hold until ``permit_until`` confirms us as one more voter does.
        """
        worst = INFINITY
        for rule in own.rules:
            times = [
                now if v.store_id == own.store_id else self._confirmed.get(v.store_id, -INFINITY)
                for v in rule.voters
            ]
            best = _held_by_most(times)
            if permit_until:
                best = max(best, _held_by_most([*times, permit_until - self._settings.step_down_s]))
            worst = min(worst, best)
        return worst + self._settings.step_down_s

    def challenger(self, now: float) -> int:
        """The epoch that a voter promised to another node, when that one has had the time to appear; else 0."""
        due = self._challenged_at and now >= self._challenged_at + 2 * self._settings.patience_s
        return self._challenger if due else 0


def _held_by_most(times: list[float]) -> float:
    """The latest moment that more than half of ``times`` have reached."""
    return sorted(times, reverse=True)[len(times) // 2] if times else INFINITY
