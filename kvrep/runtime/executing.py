"""The primary's side of forwarded writes: each is executed once, and its first outcome answers every repeat.

A committed one is found in the table that is part of the replicated state (``model/sessions.py``); one that
is under way is joined; one that was refused stays refused. An attempt names the epoch that it is for, so that
one that arrives late, at a node that has become primary anew, does nothing.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    TransactionExpired,
    UnknownOutcome,
)
from kvrep.model.position import Position
from kvrep.model.record import Kind, writes_in
from kvrep.model.sessions import SESSIONS_MAX, Origin, RequestId
from kvrep.runtime.checks import check_forwarded_name, check_headers, check_key, check_topic, check_value
from kvrep.runtime.reads import Entries, same_reads
from kvrep.status import Outcome
from kvrep.storage.write import Write
from kvrep.transport.faults import encode_fault

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["Forwarded"]

CALLS_MAX = 8
"""Calls that may wait here at once; the server has more, for promises and the like."""
REFUSED_MAX = 4096
"""Refused writes that are remembered."""
LOOK_UP_S = 0.05
_Key = tuple[bytes, int, int]
_Answer = tuple[str, Any]
# Nothing was logged, and another attempt may do better: not remembered as refused.
_PASSING = (
    NotPrimary,
    Fenced,
    NotEnoughFollowers,
    ClosedError,
    StorageFailed,
    UnknownOutcome,
    RolledBack,
    StaleRead,
)


class _Item:
    """One forwarded write as it arrived."""

    __slots__ = ("acks", "key", "kind", "level", "origin", "payload", "ranges", "request", "size", "values")

    def __init__(self, node: Node, store_id: bytes, session: int, floor: int, fields: Any) -> None:
        try:
            sequence, since, payload, self.values, self.ranges, self.acks, self.level = fields
            self.origin = Origin.of([store_id, session, sequence, floor])
            self.request = RequestId(store_id, session, sequence, int(since))
            # A write with notes for feeds is [writes, messages, notes]; a plain one begins with a name.
            noted = len(payload) == 3 and not isinstance(payload[0], str)
            self.kind = Kind.NOTED if noted else Kind.WRITE
            self.payload, self.size = (_checked_notes if noted else _checked)(node, payload)
        except (TypeError, ValueError) as error:
            if isinstance(error, Error):
                raise
            raise ProtocolError(f"not a forwarded write: {error}") from None
        self.key: _Key = (store_id, session, sequence)

    @property
    def conditional(self) -> bool:
        return bool(self.values or self.ranges)


class Forwarded:
    """One per node; remembers across its roles. Any thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._calls = threading.BoundedSemaphore(CALLS_MAX)
        # Protects everything below. Never held while something is ordered or waited for.
        self._lock = threading.Lock()
        self._under_way: dict[_Key, Write] = {}
        self._refused: OrderedDict[_Key, tuple[Error, int]] = OrderedDict()
        """What was refused, why, and where the log ended then."""
        self._floors: OrderedDict[tuple[bytes, int], tuple[int, int]] = OrderedDict()
        """The highest floor of each session, and where the log ended when it was last heard of."""
        self._forgotten = 0
        """What was forgotten of ``_refused`` or ``_floors`` was asked for when the log ended here at the most."""

    # -- calls -------------------------------------------------------------------------------------

    def answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Execute a batch of forwarded writes, in order, and tell the outcome of each.

        Raises :class:`NotPrimary` and other refusals that hold for all of them: then nothing of this attempt
        takes effect. Outcomes are ``("done", [epoch, offset])``, ``("refused", fault)``,
        ``("pending", None)`` when the time was up first, and ``("forgotten", None)`` when it cannot be told any
        more whether an earlier attempt was executed.
        """
        node = self._node
        deadline_s = time.monotonic() + _seconds(request)
        with self._slot():
            epoch = self._ready(request, deadline_s)
            try:
                store_id, session = bytes(request["store_id"]), int(request["session"])
                floor, fields = int(request["floor"]), list(request["items"])
            except (KeyError, TypeError, ValueError) as error:
                raise ProtocolError(f"not forwarded writes: {error}") from None
            begun: list[tuple[_Item | None, Write | _Answer, bool]] = []
            for entry in fields:
                try:
                    item = _Item(node, store_id, session, floor, entry)
                except RefusedError as error:  # above a limit of this node
                    begun.append((None, ("refused", encode_fault(error)), False))
                else:
                    begun.append((item, *self._begin(item, epoch, deadline_s)))
            outcomes = [list(self._end(*one, deadline_s)) for one in begun]
            shipping = node.shipping
            if shipping is not None:
                shipping.followers.hurry(store_id)  # it waits until it can read them
            return {"outcomes": outcomes}

    def settle(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """What became of one forwarded write. One that is not in the log is refused from now on."""
        deadline_s = time.monotonic() + _seconds(request)
        with self._slot():
            self._ready(request, deadline_s)
            try:
                asked = RequestId(*request["request"])
                key: _Key = (bytes(asked.store_id), int(asked.session), int(asked.sequence))
                int(asked.since)
            except (KeyError, TypeError, ValueError) as error:
                raise ProtocolError(f"not a request id: {error}") from None
            with self._lock:
                position, known = self._node.engine.view.forwarded(asked)
                if position is not None:
                    return {"outcome": Outcome.COMMITTED.value}
                if key in self._under_way:
                    return {"outcome": Outcome.PENDING.value}
                if key not in self._refused:
                    if not known:
                        raise TooOld("the table of forwarded writes does not go back that far")
                    self._note_refused(
                        key, RolledBack("its sender asked for the outcome first", position=None)
                    )
            self._still_primary(deadline_s)
            return {"outcome": Outcome.ROLLED_BACK.value}

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if not self._calls.acquire(blocking=False):
            raise Overloaded("too many nodes wait for forwarded writes here already")
        try:
            yield
        finally:
            self._calls.release()

    def _ready(self, request: Mapping[str, Any], deadline_s: float) -> int:
        """The epoch, once all that came before it is committed here: then the table is complete."""
        node, epoch = self._node, request.get("epoch")
        shipping = node.shipping
        if shipping is None or type(epoch) is not int or not self._leads(epoch):
            raise self._elsewhere()
        followers = shipping.followers
        if not node.moves.until(lambda: followers.started or not self._leads(epoch), deadline_s):
            node.engine.writable()
            raise NotPrimary("the start of this epoch is not committed yet", epoch=epoch,
                             primary_address=None)  # fmt: skip
        if not self._leads(epoch):
            raise self._elsewhere()
        return epoch

    def _leads(self, epoch: int) -> bool:
        return 0 < epoch == self._node.primary_epoch

    def _elsewhere(self) -> NotPrimary:
        node = self._node
        address = node.primary_address
        return NotPrimary(f"{node.label} is not the primary of that epoch", primary_address=address or None,
                          epoch=node.primary_epoch or node.engine.epochs.last_epoch)  # fmt: skip

    def _still_primary(self, deadline_s: float) -> None:
        """Before something negative is said: a primary that was replaced would not know better."""
        if self._node.engine.configuration.synchronous:
            self._node.freshness.confirm(deadline_s)

    # -- one write ---------------------------------------------------------------------------------

    def _begin(self, item: _Item, epoch: int, deadline_s: float) -> tuple[Write | _Answer, bool]:
        """Put it in order, unless it was before: (the write or its answer, whether this call ordered it)."""
        with self._lock:
            under_way = self._under_way.get(item.key)
            if under_way is not None:
                return under_way, False
            answer = self._answered(item)
            if answer is not None:
                return answer, False
            write = Write(item.kind, item.payload, item.size)
            write.epoch, write.origin = epoch, item.origin
            self._under_way[item.key] = write
        try:
            done = self._order(item, write, deadline_s)
        except BaseException as error:
            self._over(item.key, error)
            write.complete(error)
            if not isinstance(error, Error):
                raise
            return ("refused", encode_fault(error)), False
        if done is not None:  # it had nothing to write
            with self._lock:
                del self._under_way[item.key]
            write.epoch, write.offset = done
            write.complete()
            return ("done", list(done)), False
        write.when_done(lambda w: self._over(item.key, w.error))
        return write, True

    def _answered(self, item: _Item) -> _Answer | None:
        """The answer to a repeat; ``None`` for a write that was never executed. The lock is held."""
        position, known = self._node.engine.view.forwarded(item.request)
        if position is not None:
            return "done", list(position)
        refused = self._refused.get(item.key)
        if refused is not None:
            return "refused", encode_fault(refused[0])
        session = item.key[:2]
        floor, _ = self._floors.pop(session, (0, 0))
        self._floors[session] = max(floor, item.origin.floor), self._node.engine.tail.offset
        if len(self._floors) > SESSIONS_MAX:
            _, (_, ended) = self._floors.popitem(last=False)
            self._forgotten = max(self._forgotten, ended)
        if item.origin.sequence < floor or not known or item.request.since < self._forgotten:
            return "forgotten", None
        return None

    def _over(self, key: _Key, error: BaseException | None) -> None:
        """It ended. A refusal is remembered, so that an attempt that comes late does nothing."""
        with self._lock:
            self._under_way.pop(key, None)
            if isinstance(error, Error) and not isinstance(error, _PASSING):
                self._note_refused(key, error)

    def _note_refused(self, key: _Key, error: Error) -> None:
        self._refused[key] = error, self._node.engine.tail.offset
        if len(self._refused) > REFUSED_MAX:
            _, (_, ended) = self._refused.popitem(last=False)
            self._forgotten = max(self._forgotten, ended)

    def _order(self, item: _Item, write: Write, deadline_s: float) -> Position | None:
        """Put ``write`` in order; the position that was read for one that has nothing to write."""
        node = self._node
        if item.acks is not None or item.level is not None:
            node.writes.check_more(item.acks, item.level)
        if item.conditional:
            return self._order_if(item, write, deadline_s)
        if not item.payload:
            raise ProtocolError("a forwarded write without operations")
        node.engine.order(write, deadline_s)
        return None

    def _order_if(self, item: _Item, write: Write, deadline_s: float) -> Position | None:
        """The same for a transaction: if what it has read is still so, in the writer's place."""
        node = self._node
        committer = node.engine.committer
        node.engine.writable()
        if committer.busy:
            committer.kick()  # what this call has ordered need not wait for the place
        with _Place(node, deadline_s) as place:
            ahead = committer.unpublished()
            same = same_reads(node.engine, _over_of(ahead), item.values, item.ranges)
            if same and item.payload:
                place.leave(write)
                return None
        # Nothing is written: what was compared must be committed, and this node the primary still.
        if ahead:
            node.writes.await_record(ahead[-1], max(0.0, deadline_s - time.monotonic()))
        self._still_primary(deadline_s)
        position = node.engine.committed_position
        if same:
            return position
        raise TransactionConflict(
            "what the transaction has read is not so any more at the primary", position=position
        )

    def _end(self, item: _Item | None, write: Write | _Answer, own: bool, deadline_s: float) -> _Answer:
        """Wait for its outcome."""
        if item is None or not isinstance(write, Write):
            assert not isinstance(write, Write)
            if item is not None and write[0] == "done" and item.payload:
                return self._await_more(item, write, deadline_s)
            return write
        self._await(write, own, deadline_s)
        if not write.done:
            return "pending", None
        if write.error is not None:
            error = write.error if isinstance(write.error, Error) else Error(str(write.error))
            return "refused", encode_fault(error)
        return self._await_more(item, ("done", [write.epoch, write.offset]), deadline_s)

    def _await(self, write: Write, own: bool, deadline_s: float) -> None:
        """Wait for the end of a write, but not through a close of this node: its sender goes elsewhere."""
        told = threading.Event()
        if not own:
            write.when_done(lambda _: told.set())
        while not write.done and not self._node.closing:
            now = time.monotonic()
            if own:
                self._node.engine.committer.finish(write, min(deadline_s, now + LOOK_UP_S))
            else:
                told.wait(max(0.0, min(deadline_s - now, LOOK_UP_S)))
            if now >= deadline_s:
                return

    def _await_more(self, item: _Item, answer: _Answer, deadline_s: float) -> _Answer:
        """Where the write asks for more than the commit rule."""
        if item.acks is None and item.level is None:
            return answer
        try:
            self._node.writes.await_more(Position(*answer[1]), item.acks, item.level, deadline_s)
        except AckTimeout as error:
            return "refused", encode_fault(error)
        return answer


class _Place:
    """The writer's place, for the comparison of a transaction's reads."""

    def __init__(self, node: Node, deadline_s: float) -> None:
        self._node = node
        self._deadline_s = deadline_s
        self._committer = node.engine.committer
        self._open = True

    def __enter__(self) -> _Place:
        committer, granted = self._committer, threading.Event()
        if committer.take_place(self, granted.set):
            return self
        try:
            while not committer.holds_place(self):
                left = self._deadline_s - time.monotonic()
                if left <= 0:
                    raise TransactionExpired("no turn for this transaction before its deadline")
                if granted.wait(min(left, LOOK_UP_S)) and not committer.holds_place(self):
                    raise self._lost()
        except BaseException:
            self._committer.leave_place(self, None)
            raise
        return self

    def leave(self, write: Write) -> None:
        """Give the place back with the transaction's write."""
        self._open = False
        if not self._committer.leave_place(self, write):
            raise self._lost()

    def __exit__(self, *error: object) -> None:
        if self._open:
            self._open = False
            self._committer.leave_place(self, None)

    def _lost(self) -> Error:
        error = self._committer.place_error(self)
        return error if error is not None else TransactionExpired("the place was taken back")


def _over_of(ahead: list[Any]) -> Entries:
    """What is logged or ordered and not visible yet, by key."""
    over: dict[tuple[str, bytes], bytes | None] = {}
    for record in ahead:
        payload = writes_in(record.kind, record.payload)
        for i in range(0, len(payload), 2):
            flat = payload[i + 1]
            for j in range(0, len(flat), 2):
                over[(payload[i], flat[j])] = flat[j + 1]
    return over


def _checked(node: Node, payload: Any) -> tuple[list[Any], int]:
    """A payload as ``write_payload`` makes it, within all limits, and its size."""
    size = 0
    value_max = node.options.value_bytes_max
    names = iter(payload)
    for name, flat in zip(names, names, strict=True):
        node.engine.view.admit(check_forwarded_name(name))
        keys = iter(flat)
        for key, value in zip(keys, keys, strict=True):
            check_key(key)
            if value is not None:
                check_value(value, value_max)
            size += len(key) + len(value or b"") + 16
    node.writes.check_record_size(size)
    return payload, size


def _checked_notes(node: Node, payload: Any) -> tuple[list[Any], int]:
    """The same for a write with messages and former values for feeds."""
    writes, emits, notes = payload
    _, size = _checked(node, writes)
    value_max = node.options.value_bytes_max
    for topic, message, headers in emits:
        check_topic(topic)
        check_headers(headers)
        size += len(topic) + len(check_value(message, value_max)) + 32
    parts = iter(notes)
    for index, value in zip(parts, parts, strict=True):
        if type(index) is not int or not (value is None or isinstance(value, bytes)):
            raise ValueError("a note is a number and the value before")
        size += len(value or b"") + 8
    node.writes.check_record_size(size)
    return payload, size


def _seconds(request: Mapping[str, Any]) -> float:
    try:
        return min(max(0.0, float(request.get("timeout_s", 0.0))), 3600.0)
    except (TypeError, ValueError):
        raise ProtocolError("timeout_s is not a number") from None
