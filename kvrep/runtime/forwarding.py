"""The follower's side of ``forward_writes``: its writes go to the primary, wherever that is at the moment.

One thread per node sends; while a call is under way, writes that arrive gather for the next one and keep
their order. A write is done when reads here show it. Each has a number of its own, so that a repeat after a
broken connection or a failover is executed once; what the primary does with it is in ``runtime/executing.py``.

Outcomes stay true. *Refused* is only said when no attempt can take effect any more: when every attempt was
answered, or the primary has noted the refusal, so that an attempt that arrives late is refused, too. An
attempt is for one epoch; in another epoch it cannot take effect. Otherwise the outcome is *unknown*, and
``settle`` ends that.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvrep.errors import (
    AckTimeout,
    ClosedError,
    Error,
    Fenced,
    NotEnoughFollowers,
    NotPrimary,
    Overloaded,
    ProtocolError,
    RefusedError,
    RolledBack,
    StaleRead,
    StorageFailed,
    TooOld,
    TransactionConflict,
    UnknownOutcome,
    ValueTooLarge,
    again,
)
from kvrep.model.configuration import Acks
from kvrep.model.position import Position
from kvrep.model.record import Kind
from kvrep.model.sessions import OUTCOMES_MAX, RequestId
from kvrep.runtime.finding import Target
from kvrep.runtime.interrupts import carry
from kvrep.runtime.reads import ReadSet
from kvrep.status import Outcome
from kvrep.storage.write import Write, complete_all
from kvrep.transport.faults import decode_fault

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["Forward", "Forwarder", "is_elsewhere"]

log = logging.getLogger("kvrep.replication")

BATCH_WRITES_MAX = 512
BATCH_BYTES_MAX = 2 << 20
ANSWERED_MAX = 10_000
"""Writes that are committed at the primary and not visible here yet."""
UNRESOLVED_MAX = 256
"""Writes of unknown outcome that ``resolve`` can still be asked for."""
PAUSE_S = 0.02
LOOK_UP_S = 0.05
GRACE_S = 0.25
"""How much longer than the primary's own deadline an answer is waited for."""
_MOVED = (NotPrimary, Fenced)


def is_elsewhere(error: BaseException | None) -> bool:
    """Whether a write was refused because another node is, or will be, primary."""
    return isinstance(error, _MOVED)


class Forward(Write):
    """A write on its way to the primary. Done when reads here show it."""

    __slots__ = (
        "abandoned", "acks", "ambiguous", "deadline_s", "flying", "level", "local", "moved", "ranges",
        "sequence", "since", "values",
    )  # fmt: skip

    def __init__(self, payload: Any, size: int, deadline_s: float) -> None:
        super().__init__(Kind.WRITE, payload, size)
        self.deadline_s = deadline_s
        self.acks: Acks | None = None
        self.level: str | None = None
        self.values: list[Any] = []
        self.ranges: list[Any] = []
        """What the transaction has read; see :meth:`ReadSet.to_wire`."""
        self.sequence = 0
        self.since = 0
        self.flying = False
        """An attempt is under way."""
        self.ambiguous = False
        """An attempt ended without an answer: it may have taken effect, or still may."""
        self.moved = False
        """A change of roles was met on the way."""
        self.abandoned = False
        """Nobody waits any more: no attempt follows."""
        self.local: Write | None = None
        """The same write in this node's own order, while this node is primary."""


class Forwarder:
    """One per node that was opened with ``forward_writes=True``. All methods may be called on any thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._session = int.from_bytes(os.urandom(7), "big")
        # Protects everything below, and announces work for the thread. Never held during a call.
        self._changed = threading.Condition()
        self._queue: deque[Forward] = deque()
        self._bytes = 0
        """Of the payload of what is open."""
        self._open: dict[int, Forward] = {}
        """By sequence: without an answer."""
        self._unresolved: dict[int, Forward] = {}
        self._settled: dict[RequestId, Outcome] = {}
        """What :meth:`settle` has found out: the table need not keep it any more."""
        self._next = 1
        self._answered: list[Forward] = []
        """Committed at the primary, not visible here yet."""
        self._stopped = False
        self._thread: threading.Thread | None = None

    # -- what writers call -------------------------------------------------------------------------

    def make(
        self,
        payload: Any,
        size: int,
        deadline_s: float,
        acks: Acks | None = None,
        level: str | None = None,
        reads: ReadSet | None = None,
    ) -> Forward:
        """A write for :meth:`order`. With ``reads`` it takes effect only if they give the same there."""
        item = Forward(payload, size, deadline_s)
        item.acks, item.level = acks, level
        if reads is not None:
            item.values, item.ranges = reads.to_wire()
        return item

    def order(self, item: Forward) -> None:
        """Queue it and return at once. Raises what refuses it; then it was not sent."""
        self._node.freshness.need_following()  # else it would be done, and never be readable here
        with self._changed:
            if self._stopped:
                raise ClosedError("the store is closed")
            if self._bytes + item.size > self._node.options.uncommitted_bytes_max and self._open:
                raise Overloaded("more is on its way to the primary than uncommitted_bytes_max allows")
            if len(self._answered) >= ANSWERED_MAX:
                raise Overloaded("this node does not get what it has had committed at the primary")
            if self._next - self._floor() >= OUTCOMES_MAX:
                self._make_room()
            item.sequence, self._next = self._next, self._next + 1
            item.since = self._node.engine.committer.committed
            self._open[item.sequence] = item
            self._bytes += item.size
            self._queue.append(item)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"kvrep-forward-{self._node.label}", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def follow(self, item: Forward, local: Write) -> None:
        """``item`` ends as ``local`` does, which is in order here; if another node is primary by then, it
        goes there."""
        item.local = local
        local.when_done(lambda write: self._local_done(item, write))

    def _local_done(self, item: Forward, local: Write) -> None:
        item.local = None
        if is_elsewhere(local.error):
            try:
                self.order(item)
            except Error as error:
                item.complete(error)
            return
        item.epoch, item.offset = local.epoch, local.offset
        item.complete(local.error)

    def _floor(self) -> int:
        """Everything below this sequence has an outcome that we know. The lock is held."""
        oldest = [min(d) for d in (self._open, self._unresolved) if d]
        return min(oldest, default=self._next)

    def _make_room(self) -> None:
        """The window of open sequences is full. The lock is held."""
        while self._unresolved and self._next - self._floor() >= OUTCOMES_MAX:
            del self._unresolved[min(self._unresolved)]
        if self._next - self._floor() >= OUTCOMES_MAX:
            raise Overloaded(f"{OUTCOMES_MAX} writes are on their way to the primary already")

    def commit(self, item: Forward) -> Position:
        """:meth:`order` and :meth:`finish` in one."""
        self.order(item)
        try:
            return self.finish(item, item.deadline_s)
        except BaseException as interrupt:
            carry(interrupt, self.leave(item))
            raise

    def finish(self, item: Forward, deadline_s: float) -> Position:
        """Wait for the outcome until ``time.monotonic()`` passes ``deadline_s``; return or raise it."""
        while not item.done:
            left = deadline_s - time.monotonic()
            if left <= -GRACE_S or (left <= 0 and not item.flying):
                break
            item.park(min(max(left, 0.01), LOOK_UP_S))
        return self.outcome(item)

    def outcome(self, item: Forward) -> Position:
        """The position, or the error that says how it stands now; to be called when nobody waits any more."""
        if not item.done and item.local is not None:
            return self._node.writes.finish(item.local, 0.0)
        if not item.done:
            self._abandon(item)
        if item.done:
            if item.error is None:
                return item.position
            raise again(item.error) if isinstance(item.error, Error) else item.error
        if item.offset:
            raise AckTimeout(
                f"the write is committed at {item.position}, which this node has not got yet",
                position=item.position,
            )
        raise self._unknown(item)

    def _request(self, item: Forward) -> RequestId:
        return RequestId(self._node.engine.home.store_id, self._session, item.sequence, item.since)

    def _unknown(self, item: Forward) -> AckTimeout:
        return AckTimeout(
            "the primary was asked, and has not answered in time",
            hint="Store.settle(error.request) tells later whether it was committed, or sees that it never is",
            position=None,
            request=self._request(item),
        )

    def leave(self, item: Forward) -> Position | RequestId:
        """Nobody waits for it any more: by what its outcome can be asked for."""
        self._abandon(item)
        return item.position if item.offset else self._request(item)

    def _abandon(self, item: Forward) -> None:
        """Nobody waits for it any more."""
        with self._changed:
            if item.done:
                return
            item.abandoned = True
            if item.flying or item.offset:
                return
            if item in self._queue:
                self._queue.remove(item)  # else the thread has it, and looks at it again before it sends
        self._expire(item, None)

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._stopped:
                        return
                    self._changed.wait()
                if self._stopped:
                    left, self._queue = list(self._queue), deque()
                    batch: list[Forward] = []
                else:
                    left, batch = [], self._take()
            for item in left:
                self._expire(item, ClosedError("the store is closed"))
            if batch:
                try:
                    self._send(batch)
                except Exception as error:
                    log.exception("%s: forwarding writes", self._node.label)
                    for item in batch:
                        item.ambiguous = True
                        self._expire(item, Error(f"forwarding failed: {error}"))

    def _take(self) -> list[Forward]:
        """The next batch. The lock is held."""
        batch: list[Forward] = []
        size = 0
        while self._queue and len(batch) < BATCH_WRITES_MAX:
            item = self._queue[0]
            if batch and size + item.size > BATCH_BYTES_MAX:
                break
            size += item.size
            batch.append(self._queue.popleft())
        return batch

    def _send(self, batch: list[Forward]) -> None:
        node, now = self._node, time.monotonic()
        for item in [i for i in batch if i.deadline_s <= now or i.abandoned]:
            batch.remove(item)
            self._expire(item, None)
        if not batch:
            return
        until = min(item.deadline_s for item in batch)
        link = node.link
        try:
            target = link.find(until)
        except Error as error:
            self._again(batch, error, pause_s=0.0)
            return
        with self._changed:
            batch = [i for i in batch if not (i.done or i.abandoned)]
            floor = self._floor()
            for item in batch:
                item.flying = True
        if not batch:
            return
        request = {
            "epoch": target.epoch,
            "store_id": node.engine.home.store_id,
            "session": self._session,
            "floor": floor,
            "timeout_s": max(0.0, until - time.monotonic()),
            "items": [[i.sequence, i.since, i.payload, i.values, i.ranges, i.acks, i.level] for i in batch],
        }
        try:
            if target.address:
                answer = link.call(target, "forward", request, until - time.monotonic() + GRACE_S)
            else:
                answer = dict(node.forwarded.answer(request))
            outcomes = self._outcomes(answer, batch)
        except Error as error:
            self._call_failed(batch, target, error)
            return
        self._settle(batch, outcomes)

    @staticmethod
    def _outcomes(answer: dict[str, Any], batch: list[Forward]) -> list[Any]:
        outcomes = answer.get("outcomes")
        if not isinstance(outcomes, list) or len(outcomes) != len(batch):
            raise ProtocolError("the primary did not answer for every forwarded write")
        return outcomes

    def _call_failed(self, batch: list[Forward], target: Target, error: Error) -> None:
        """No answer about single writes: what do we know about all of them?"""
        if isinstance(error, _MOVED):  # nothing of this attempt took effect, or will
            self._node.link.over(target.epoch)
            for item in batch:
                item.moved = True
            self._again(batch, error, pause_s=0.0 if target.address else PAUSE_S)
        elif isinstance(error, NotEnoughFollowers):
            patient = [i for i in batch if self._patient(i)]
            for item in batch:
                if item not in patient:
                    self._complete(item, error)
            self._again(patient, error)
        elif isinstance(error, Overloaded):
            self._again(batch, error)
        elif isinstance(error, ValueTooLarge):
            self._too_large(batch, error)
        else:
            for item in batch:
                item.ambiguous = True
            self._again(batch, error)

    def _too_large(self, batch: list[Forward], error: Error) -> None:
        """The request was above what one message may hold, and was not sent."""
        if len(batch) == 1:
            self._complete(batch[0], error)
            return
        for item in batch:
            self._send([item])

    def _settle(self, batch: list[Forward], outcomes: list[Any]) -> None:
        """Each write gets its outcome, or another attempt."""
        repeat: list[Forward] = []
        done: list[Forward] = []
        last: Error | None = None
        for item, outcome in zip(batch, outcomes, strict=True):
            kind, value = outcome
            if kind == "done":
                item.epoch, offset = (int(n) for n in value)
                item.offset = offset
                done.append(item)
            elif kind == "pending":
                item.ambiguous = True
                repeat.append(item)
            elif kind == "forgotten" and not item.ambiguous:
                # No attempt can have taken effect yet, so whatever comes is above what is committed now.
                item.since = max(item.since, self._node.engine.committer.committed)
                repeat.append(item)
            elif kind == "forgotten":
                item.abandoned = True
                self._expire(item, None)
            else:
                error = decode_fault(bytes(value))
                if self._is_final(item, error):
                    self._complete(item, error)
                else:
                    last = error
                    repeat.append(item)
        if done:
            self._arrived(done)
        if repeat:
            self._again(repeat, last)

    def _patient(self, item: Forward) -> bool:
        """Whether followers that are missing are waited for: a new primary needs some time to get them."""
        return item.moved or item.ambiguous or self._node.link.settling

    def _is_final(self, item: Forward, error: Error) -> bool:
        if isinstance(error, _MOVED):
            item.moved = True
            return False
        if isinstance(error, NotEnoughFollowers):
            return not self._patient(item)
        if isinstance(error, StaleRead):
            return False  # it could not tell in time whether it is still the primary
        if isinstance(error, (StorageFailed, ClosedError)) or type(error) is UnknownOutcome:
            item.ambiguous = True  # its record may have reached followers
            return False
        return True

    def _arrived(self, items: list[Forward]) -> None:
        """Committed at the primary: done as soon as reads here show them."""
        with self._changed:
            for item in items:
                self._close(item)
                item.payload = None  # it is in the log; many may wait here for a stream that is down
                if item.abandoned:
                    self._keep(item)  # until somebody asks what became of it
                else:
                    self._answered.append(item)
        self.on_committed()

    def on_committed(self) -> None:
        """Reads show more than before. Any thread; quick."""
        if not self._answered:
            return
        shown: list[Forward] = []
        lost: list[tuple[Forward, RolledBack]] = []
        with self._changed:
            for item in self._answered:
                try:
                    if self._node.freshness.reached(item.position):
                        shown.append(item)
                except RolledBack as error:
                    lost.append((item, error))
            gone = {id(i) for i in shown} | {id(i) for i, _ in lost}
            self._answered = [i for i in self._answered if id(i) not in gone and not i.abandoned]
        complete_all(shown)
        for item, rolled_back in lost:
            item.complete(rolled_back)

    def _again(self, items: list[Forward], error: Error | None, pause_s: float = PAUSE_S) -> None:
        """Another attempt for those that have time left."""
        now = time.monotonic()
        over = [i for i in items if i.deadline_s <= now or i.abandoned]
        for item in over:
            self._expire(item, error)
        rest = [i for i in items if not i.done and i not in over]
        if not rest:
            return
        if pause_s:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped, pause_s)
        with self._changed:
            for item in rest:
                item.flying = False
            self._queue.extendleft(reversed(rest))
            self._changed.notify_all()

    def _expire(self, item: Forward, error: Error | None) -> None:
        """No further attempt: refused if none can have taken effect, else unknown."""
        if item.ambiguous:
            with self._changed:
                self._keep(item)
            self._complete(item, self._unknown(item))
            return
        if not isinstance(error, (RefusedError, ClosedError)):
            address = self._node.primary_address
            error = NotPrimary(
                "no primary took the write in time", primary_address=address or None, epoch=None
            )
        self._complete(item, error)

    def _keep(self, item: Forward) -> None:
        """Have the table of the primary keep its outcome. The lock is held."""
        self._unresolved[item.sequence] = item
        if len(self._unresolved) > UNRESOLVED_MAX:
            del self._unresolved[min(self._unresolved)]

    def _complete(self, item: Forward, error: Error) -> None:
        with self._changed:
            self._close(item)
        item.complete(error)

    def _close(self, item: Forward) -> None:
        """An answer is known. The lock is held."""
        if self._open.pop(item.sequence, None) is not None:
            self._bytes -= item.size
        item.flying = False

    # -- afterwards --------------------------------------------------------------------------------

    def settle(self, request: RequestId, timeout_s: float) -> Outcome:
        """What became of a write of unknown outcome; asks the primary if this node's log does not tell.

        The primary sees to it that what it answers as rolled back never takes effect. ``PENDING`` when that
        cannot be had in ``timeout_s``. ``TooOld`` when nobody can tell any more.
        """
        node = self._node
        deadline_s = time.monotonic() + timeout_s
        outcome = self._settled.get(request, Outcome.PENDING)
        while outcome is Outcome.PENDING:
            if node.engine.view.forwarded(request)[0] is not None:
                outcome = Outcome.COMMITTED
                break
            try:
                outcome = self._ask_outcome(request, deadline_s)
            except TooOld:
                raise
            except Error as error:
                log.debug("%s: no word yet about a forwarded write: %s", node.label, error)
            left = deadline_s - time.monotonic()
            if outcome is not Outcome.PENDING or left <= 0:
                break
            with self._changed:
                if self._changed.wait_for(lambda: self._stopped, min(left, PAUSE_S)):
                    raise ClosedError("the store is closed")
        if outcome is not Outcome.PENDING:
            with self._changed:
                self._settled[request] = outcome
                if len(self._settled) > UNRESOLVED_MAX:
                    del self._settled[next(iter(self._settled))]
                if request.session == self._session:
                    self._unresolved.pop(request.sequence, None)
        return outcome

    def _ask_outcome(self, request: RequestId, deadline_s: float) -> Outcome:
        node = self._node
        target = node.link.find(deadline_s)
        left = max(0.0, deadline_s - time.monotonic())
        wire = {"epoch": target.epoch, "request": list(request), "timeout_s": left}
        try:
            if target.address:
                answer = node.link.call(target, "forwarded", wire, left + GRACE_S)
            else:
                answer = dict(node.forwarded.settle(wire))
        except _MOVED:
            node.link.over(target.epoch)
            raise
        try:
            return Outcome(str(answer.get("outcome")))
        except ValueError:
            raise ProtocolError("the primary did not answer with an outcome") from None

    def catch_up(self, conflict: TransactionConflict, deadline_s: float) -> None:
        """Before what was read is read again: get what the primary compared it with. At the deadline the
        conflict is raised."""
        left = deadline_s - time.monotonic()
        if left <= 0:
            raise conflict
        with suppress(StaleRead, RolledBack):
            if conflict.position is not None:
                self._node.freshness.wait_for(conflict.position, left)

    # -- the end -----------------------------------------------------------------------------------

    def stop(self, timeout_s: float) -> None:
        """End the thread. What was sent without an answer is unknown, the rest is refused."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            waiting, self._answered = self._answered, []
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        for item in waiting:
            item.complete(UnknownOutcome(f"the store was closed before it had the write at {item.position}",
                                         position=item.position))  # fmt: skip
        with self._changed:
            left = list(self._open.values())
        for item in left:
            item.ambiguous = item.ambiguous or item.flying
            self._expire(item, ClosedError("the store is closed"))
