"""Going on with fewer copies than the ack rule asks for, where that was chosen, after a deadline, loudly.

The new rule, without the voters that are missing, is a configuration record like any other; what is special is
how it comes into force. The rule before it cannot be met, so it is not: instead most voters, witnesses
included, store durably from which record on fewer copies are enough, before anything is acknowledged so. From
then on every promotion meets one of them (``replication/promotion.py``), and a node without these records is
not promoted. If too few voters answer, nothing changes and writes stay refused.

The way back needs nothing special: a voter that has caught up counts again by the next configuration, which
holds once it is committed under both rules.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from kvrep.errors import ClosedError, Error
from kvrep.model.configuration import Configuration
from kvrep.model.position import ZERO, Position
from kvrep.replication.promotion import most
from kvrep.runtime.promoting import Peer, ask_all
from kvrep.status import EventKind

if TYPE_CHECKING:
    from kvrep.runtime.configuring import Configuring
    from kvrep.runtime.followers import Followers
    from kvrep.runtime.leadership import Leadership
    from kvrep.runtime.node import Node

__all__ = ["Degrading"]

log = logging.getLogger("kvrep.replication")

RETRY_S = 1.0
ATTEMPT_S = 3.0
LOOK_S = 0.01


class Degrading:
    """One per role as primary. Its thread (``kvrep-degrade-NAME``) runs only while it has something to do."""

    def __init__(
        self, node: Node, followers: Followers, leadership: Leadership, configuring: Configuring
    ) -> None:
        self._node = node
        self._followers = followers
        self._leadership = leadership
        self._configuring = configuring
        self._short_since: float | None = None
        self._next_s = 0.0
        self._told = ""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def tick(self, now: float) -> None:
        """Begin an attempt when copies have been missing for too long. Quick; one thread, twice a second."""
        tracker = self._followers.tracker
        after_s = tracker.configuration.degrade_after_s if tracker is not None else 0.0
        if not after_s or not self._leadership.leading or not self._followers.missing_copies():
            self._short_since, self._told = None, ""
            return
        if self._short_since is None:
            self._short_since = now
        idle = self._thread is None or not self._thread.is_alive()
        if now - self._short_since >= after_s and now >= self._next_s and idle and not self._stopped.is_set():
            self._next_s = now + RETRY_S
            self._thread = threading.Thread(
                target=self._run, name=f"kvrep-degrade-{self._node.label}", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        try:
            problem = self._attempt(time.monotonic() + ATTEMPT_S)
        except ClosedError:
            return
        except (Error, OSError) as error:
            problem = str(error)
        if problem and problem != self._told and not self._stopped.is_set():
            self._told = problem
            log.error("%s: writes stay refused: %s", self._node.label, problem)
            self._node.tell(EventKind.NOT_DEGRADED, reason=problem)

    def _attempt(self, deadline_s: float) -> str:
        """Why the rule stays as it is; empty when it changed, or nobody is missing any more."""
        roles, home = self._node.roles, self._node.engine.home
        epoch = self._leadership.epoch
        problem = self._too_few(epoch, ask_all(roles, "standing", {}, deadline_s), ZERO)
        if problem or not self._configuring.go_on_without():
            return problem
        while (offset := self._ready()) == 0:
            if time.monotonic() >= deadline_s or self._stopped.wait(LOOK_S):
                return "the copies that are left were not made in time"
        if not home.lower(Position(epoch, offset)):
            return f"epoch {home.promised_epoch} was promised"
        request = {
            "epoch": epoch,
            "offset": offset,
            "store_id": home.store_id,
            "lineage": home.lineage,
            "address": self._node.address,
        }
        wanted = Position(epoch, offset)
        peers = [p for p in ask_all(roles, "lower", request, deadline_s) if p.promise.lowered >= wanted]
        problem = self._too_few(epoch, peers, wanted)
        if not problem:
            self.effect(epoch, offset)
        return problem

    def _ready(self) -> int:
        """The offset through which every copy that is left holds what was ordered, and the start of this epoch;
        0 while they do not."""
        with self._followers.lock:
            tracker = self._followers.tracker
            proposed = tracker.proposed if tracker is not None else None
            if tracker is None or proposed is None or not proposed[1].away:
                return 0
            offset = max(proposed[0], tracker.epoch_start)
            return offset if tracker.proposed_reached() >= offset else 0

    def effect(self, epoch: int, offset: int) -> None:
        """Most voters have stored that what was ordered is enough: it is in force."""
        with self._followers.lock:
            tracker = self._followers.tracker
            if tracker is None or not self._leadership.leading or self._leadership.epoch != epoch:
                return
            proposed = tracker.proposed
            if proposed is None or max(proposed[0], tracker.epoch_start) != offset:
                return  # those who were missing have come back meanwhile
            committed = tracker.effect()
        self._followers.commit(committed)

    def tell(self, before: Configuration, now: Configuration) -> None:
        """Another configuration is in force: tell if the rule goes on without voters, or with all again."""
        if before.away == now.away:
            return
        first, last = now.unprotected[-1] if now.unprotected else (0, 0)
        names = ", ".join(v.name for v in now.away)
        kind = EventKind.DEGRADED if names else EventKind.RESTORED
        log.warning("%s: %s", self._node.label,
                    f"writes from {first} on are acknowledged without copies at {names}" if names
                    else f"all copies count again; {first} to {last} were acknowledged with fewer")  # fmt: skip
        self._node.tell(kind, name=names, first=first, last=last, epoch=self._leadership.epoch)

    def _too_few(self, epoch: int, peers: list[Peer], wanted: Position) -> str:
        """Why those who answered, and this node, are not enough to go by; empty when they are.

        Where they are not, but would be with one vote more, a service outside that votes is asked to note
        ``wanted``, too.
        """
        configuration, coordinator = self._node.engine.configuration, self._node.coordinator
        voters = configuration.voters
        for peer in peers:
            if peer.promise.epoch > epoch:
                return f"{peer.voter.name} has promised epoch {peer.promise.epoch}"
        heard = {peer.voter.store_id for peer in peers} | {self._node.engine.home.store_id}
        if most(configuration, heard, outside=False):
            return ""
        outside = ""
        if coordinator.outside_votes:
            if most(configuration, heard, outside=True) and coordinator.remember(epoch, wanted) is not None:
                return ""
            outside = f", {coordinator.status().kind}"
        names = ", ".join(v.name for v in voters if v.store_id not in heard)
        return f"most voters must agree to go on with fewer copies, and these do not answer: {names}{outside}"

    def stop(self, timeout_s: float) -> None:
        """What is under way has no effect any more."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(min(timeout_s, ATTEMPT_S))
