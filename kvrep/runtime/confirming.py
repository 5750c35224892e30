"""Making sure, for a linearizable read, that this node still is the primary.

The rule of rounds is in ``replication/rounds.py``; the questions and answers travel in the streams.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kvrep.errors import ProtocolError, StaleRead

if TYPE_CHECKING:
    from kvrep.runtime.followers import Followers
    from kvrep.runtime.leadership import Leadership
    from kvrep.runtime.node import Node
    from kvrep.runtime.session import FollowerSession

__all__ = ["Confirming"]


class Confirming:
    """One per role as primary. Any thread."""

    def __init__(self, node: Node, followers: Followers, leadership: Leadership) -> None:
        self._node = node
        self._followers = followers
        self._leadership = leadership
        # Announces answers to reads that wait for them. Taken before the lock of the followers, which guards
        # the rounds.
        self._answered = threading.Condition()

    def confirm(self, deadline_s: float) -> None:
        """Return once it is certain that this node was the primary at some moment after the call began, and
        that all that was committed before is visible here.

        :class:`StaleRead` when that is not known by ``deadline_s``, or never with ``acks=0``;
        :class:`NotPrimary` when another node is, or may be.
        """
        followers, leadership, engine = self._followers, self._leadership, self._node.engine
        tracker = followers.tracker
        if tracker is None or not leadership.open:
            raise leadership.no_more()
        if not engine.configuration.synchronous or not tracker.configuration.synchronous:
            raise StaleRead(
                "linearizable reads need a commit rule that waits for followers, and this store has acks=0",
                position=engine.committed_position,
                hint='reconfigure(acks="majority"), or read without consistency="linearizable"',
            )

        def over() -> bool:
            return leadership.over or followers.tracker is not tracker

        if not self._node.moves.until(lambda: over() or followers.started, deadline_s):
            raise self._unconfirmed("the start of its epoch is not committed yet")
        with followers.lock:
            rounds = followers.rounds
            number = rounds.ask()
            streams = list(followers.joined.values())
        for stream in streams:
            stream.wake()
        with self._answered:
            while True:
                with followers.lock:
                    if over():
                        break
                    if rounds.confirmed(number, tracker.rules):
                        return
                left = deadline_s - time.monotonic()
                if left <= 0:
                    raise self._unconfirmed("too few voters have confirmed in time that it still is")
                self._answered.wait(min(left, 0.05))
        raise leadership.no_more()

    def _unconfirmed(self, why: str) -> StaleRead:
        return StaleRead(
            f"this node was the primary, and {why}",
            position=self._node.engine.committed_position,
            hint="allow more time, or see whether another node is primary",
        )

    def probing(self) -> int:
        """The newest round that somebody waits for; a follower is about to be asked for it."""
        with self._followers.lock:
            return self._followers.rounds.sending()

    def on_confirm(self, stream: FollowerSession, number: int) -> None:
        """A follower that has joined has promised no higher epoch, as of a moment after that round began."""
        followers = self._followers
        with followers.lock:
            if followers.joined.get(stream.store_id) is not stream:
                return
            try:
                fresh = followers.rounds.answer(stream.store_id, number)
            except ValueError as error:
                raise ProtocolError(str(error)) from None
        if fresh:
            with self._answered:
                self._answered.notify_all()
