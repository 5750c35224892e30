"""Whom a node believes to be primary, and what it knows of that one's life: its failure detector."""

from __future__ import annotations

from collections.abc import Callable

from kvrep.replication.ballots import PrimarySeen
from kvrep.replication.election.interface import ElectionSettings, Peer, WhyGone

__all__ = ["INFINITY", "Watch"]

INFINITY = float("inf")


class Watch:
    """Times are those of the election's clock; ``chance`` returns [0, 1)."""

    def __init__(self, settings: ElectionSettings, chance: Callable[[], float], now: float) -> None:
        self._settings = settings
        self._chance = chance
        self.primary: PrimarySeen | None = None
        self.gone = False
        """Its process is known to have ended."""
        self.over = 0
        """The newest epoch whose primary has resigned: what still arrives of it is old."""
        self.heard = now
        self.look_at = INFINITY
        """When to look once more: it refused a connection, but something came from it meanwhile."""
        self._looking_until = 0.0
        self._draw()

    def _draw(self) -> None:
        self._extra = self._chance() * self._settings.spread_s

    def silence(self, since: float) -> float:
        """When silence ``since`` then has lasted too long, by this node's own random limit."""
        return since + self._settings.timeout_s + self._extra

    def alive(self, now: float) -> PrimarySeen | None:
        """The primary, if something was heard of it within the limit."""
        if self.primary is None or self.gone or now > self.heard + self._settings.timeout_s:
            return None
        return self.primary

    def saw(self, primary: PrimarySeen, now: float) -> bool:
        """This primary is alive. Whether it is news."""
        news = self.primary is None or self.primary.epoch != primary.epoch
        self.primary, self.heard, self.gone = primary, now, False
        if news:
            self._draw()
        return news

    def forget(self) -> None:
        """Believe in nobody."""
        self.primary, self.gone = None, False

    def wait_for_another(self, now: float) -> float:
        """Believe in nobody; returns until when somebody else gets the time to be heard."""
        self.forget()
        self._draw()
        return self.silence(now)

    def after_pause(self, now: float, grace_s: float) -> None:
        """We did not run for a while, so what we did not hear proves nothing."""
        self.heard = max(self.heard, now - self._settings.timeout_s + grace_s)

    def has_left(self, name: str) -> bool:
        """Whether this node is the primary that is gone."""
        return self.gone and self.primary is not None and name == self.primary.name

    def refused(self, name: str, why: WhyGone, asked_at: float, now: float) -> bool:
        """This node cannot be reached. True if that proves the primary gone.

        What came from the primary after we asked may be a late message: then we look again soon.
        """
        primary = self.primary
        if why is not WhyGone.REFUSED or primary is None or name != primary.name or self.gone:
            return False
        if asked_at < self.heard:
            self.look_at = now + self._settings.retry_s
        return asked_at >= self.heard

    def look(self, now: float) -> Peer | None:
        """Whom to ask whether the primary is still there; ``None`` while that is being done."""
        primary = self.primary
        if primary is None or not primary.address or now < self._looking_until:
            return None
        self._looking_until = now + self._settings.answer_timeout_s
        self.look_at = INFINITY
        return Peer(primary.name, primary.address)

    def look_again(self, now: float) -> Peer | None:
        """:attr:`look_at` has come."""
        self.look_at, self._looking_until = INFINITY, 0.0
        return self.look(now)
