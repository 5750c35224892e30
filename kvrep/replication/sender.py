"""What a primary sends next on one stream, from the verified join on.

The shell loops: ask ``next``, do what it says, tell what it did; between times it reports what it hears::

    while True:
        match sender.next(now, last, committed):
            case SendSegment(): read at least one record after `after`; sent_segment(…); write it
            case SendHeartbeat(): sent_heartbeat(…); write Heartbeat(stamp_us=sender.stamp_us, …)
            case Wait(): sleep until then, or until the log, the commit or an ack moves
            case Dead(): end the stream
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from kvrep.errors import Fenced, ProtocolError
from kvrep.replication.messages import Ack
from kvrep.replication.progress import Progress

__all__ = ["Dead", "SendHeartbeat", "SendSegment", "Sender", "Step", "Wait"]


@dataclass(frozen=True, slots=True)
class SendSegment:
    """Send the records that follow ``after``: as many as fit ``bytes_max``, but at least one.

    A record larger than a segment is cut into parts, all of which belong to this step.
    """

    after: int
    bytes_max: int


@dataclass(frozen=True, slots=True)
class SendHeartbeat:
    pass


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before ``until``, unless something moves.

    While ``gathering``, the log and the commit may move as they like: what is sent at ``until`` tells it all.
    """

    until: float
    gathering: bool = False


@dataclass(frozen=True, slots=True)
class Dead:
    """The follower has been silent for too long."""

    reason: str


Step = SendSegment | SendHeartbeat | Wait | Dead

_HEARTBEAT = SendHeartbeat()


class Sender:
    """Paces one stream.

    A segment goes when there are records and credit. The last one may overdraw the credit by less than
    one record, so the follower's memory is bounded by its credit and one record, and a record larger than
    all its credit still goes. With ``linger_s`` (asynchronous mode), segments that reached the log's end
    are at least that far apart, so each gathers what was written meanwhile; the first after a pause and
    those of a follower that is behind go at once.

    A heartbeat goes every interval whatever else is sent, because it alone echoes the follower's stamp;
    and when ``committed`` moved while nothing is to be sent or in flight that would tell it: at once, or
    ``commit_linger_s`` after the last segment, so that the next segment of a busy writer can tell it instead.
    """

    __slots__ = (
        "_commit_linger",
        "_echo",
        "_end",
        "_heartbeat_at",
        "_interval",
        "_segment_at",
        "_segment_bytes_max",
        "_timeout",
        "_told",
        "epoch",
        "linger_s",
        "progress",
        "stamp_us",
    )

    def __init__(
        self,
        progress: Progress,
        *,
        epoch: int,
        segment_bytes_max: int,
        heartbeat_interval_s: float,
        heartbeat_timeout_s: float,
        linger_s: float = 0.0,
        commit_linger_s: float = 0.0,
        now: float,
    ) -> None:
        self.progress = progress
        self.epoch = epoch
        self.stamp_us = 0
        """The newest stamp heard, for the next heartbeat to echo. Read it, then ``committed``."""
        self._segment_bytes_max = segment_bytes_max
        self._interval = heartbeat_interval_s
        self._timeout = heartbeat_timeout_s
        self.linger_s = linger_s
        self._commit_linger = commit_linger_s
        self._heartbeat_at = now
        self._segment_at = float("-inf")
        self._end = 0
        """The end of the log when the last segment was asked for."""
        self._echo = False
        """Whether a stamp is to be echoed: the follower wants to know how old its copy is."""
        self._told = -1
        """The commit offset last told; nothing yet."""

    def on_ack(self, ack: Ack, now: float) -> bool:
        """Whether the follower progressed. Count its ``synced`` only when this returns.

        Raises :class:`Fenced` when the follower promised a newer epoch: the ack does not count, and this
        node has to find out who is primary. Raises :class:`ProtocolError` for an ack that cannot be.
        """
        if ack.promised_epoch != self.epoch:
            self._wrong_promise(ack)
        progress = self.progress
        progress.last_heard = now
        if ack.stamp_us > self.stamp_us:
            self.stamp_us = ack.stamp_us
            self._echo = True
        return progress.confirm(ack)

    def _wrong_promise(self, ack: Ack) -> NoReturn:
        name, promised = self.progress.name, ack.promised_epoch
        if promised > self.epoch:
            self.progress.promised_epoch = promised
            raise Fenced(f"{name} has promised epoch {promised}", epoch=promised)
        raise ProtocolError(f"{name} acks in epoch {self.epoch}, but promised only {promised}")

    def on_credit(self, granted: int, now: float) -> None:
        if granted <= 0:
            raise ProtocolError(f"{self.progress.name} granted {granted} bytes")
        self.progress.last_heard = now
        self.progress.credit_bytes += granted

    @property
    def wants_heartbeat(self) -> bool:
        """Whether a stamp is to be echoed at once."""
        return self._echo

    @property
    def tell_at(self) -> float:
        """From when on a commit is told at once.

        A :class:`Wait` before it ends by then of itself, so a commit or an ack need not wake anybody."""
        return self._segment_at + self._commit_linger

    def next(self, now: float, last: int, committed: int, *, hurry: bool = False) -> Step:
        """The next step, with the log's end at ``last`` (what may be shipped) and so much committed.

        ``hurry``: somebody waits until this follower shows what is committed.
        """
        progress = self.progress
        gathering = False
        dead_at = progress.last_heard + self._timeout
        if now >= dead_at:
            return Dead(f"nothing heard from {progress.name} for {self._timeout:g} s")
        until = self._heartbeat_at + self._interval
        if now >= until or self._echo:
            return _HEARTBEAT
        if last > progress.sent:
            if progress.credit_bytes > 0:
                ready_at = self._ready_at()
                if now >= ready_at:
                    self._end = last
                    room = min(self._segment_bytes_max, progress.credit_bytes)
                    return SendSegment(progress.sent, room)
                gathering = not hurry
                until = min(until, ready_at)
        elif now < self.tell_at and not hurry:
            until = min(until, self.tell_at)
        elif committed > self._told and not progress.in_flight_bytes:
            return _HEARTBEAT
        return Wait(min(until, dead_at), gathering)

    def _ready_at(self) -> float:
        behind = self.progress.sent < self._end
        return float("-inf") if behind else self._segment_at + self.linger_s

    def sent_segment(self, first: int, last: int, size: int, now: float, committed: int) -> None:
        """A run is about to leave; call it once, before its first byte does, with the size of all parts."""
        self.progress.send(first, last, size)
        self._segment_at = now
        self._told = committed

    def sent_heartbeat(self, now: float, committed: int) -> None:
        self._heartbeat_at = now
        self._echo = False
        self._told = committed
