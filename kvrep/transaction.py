"""Reads and writes that commit together or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvrep.errors import ClosedError, Error, Overloaded, TransactionExpired, again
from kvrep.model.position import Position
from kvrep.model.record import Kind, write_payload, writes_in
from kvrep.pairs import bounds, decoded
from kvrep.runtime.checks import check_headers, check_key, check_topic, check_value
from kvrep.runtime.forwarding import Forward, is_elsewhere
from kvrep.runtime.node import Node
from kvrep.runtime.reads import ReadSet, fresh_in, merged
from kvrep.storage.view import Snapshot as PinnedView
from kvrep.storage.write import Write

if TYPE_CHECKING:
    from kvrep.keyspace import Keyspace

__all__ = ["Transaction", "emitted"]

V = TypeVar("V")
_MISSING: Any = object()


class Transaction(Generic[V]):
    """Reads and writes that commit together or not at all; serializable. Belongs to one thread at a time."""

    def __init__(self, keyspace: Keyspace[V], timeout_s: float | None) -> None:
        self.position: Position | None = None
        """Where it was committed; ``None`` until then, and when it wrote nothing."""
        self._space = keyspace
        self._node = keyspace._node
        self._timeout_s = timeout_s
        self._writes: dict[tuple[str, bytes], bytes | None] = {}
        self._emits: list[list[Any]] = []
        self._keeping: set[tuple[str, bytes]] = set()
        """Keys whose former values are to be logged."""
        self._notes: list[Any] = []
        """Those values, once they are known."""
        self._tail: dict[tuple[str, bytes], bytes | None] = {}
        """What was logged or ordered before this transaction and is not visible yet."""
        self._barrier: Any = None
        self._size = 0
        self._open = True
        self._placed = False
        self._reads: ReadSet | None = None
        """What it has read, where another node may have to compare that; with a snapshot if it reads here and
        commits there."""
        self._compares = False
        """Whether that is compared even if nothing is written."""

    def __enter__(self) -> Transaction[V]:
        return self

    # -- the place ---------------------------------------------------------------------------------

    def _place(self) -> None:
        """Take the writer's place at the first read."""
        if not self._open:
            raise ClosedError("the transaction is over")
        committer = self._node.engine.committer
        if self._placed:
            if not self._remote and not committer.holds_place(self):
                raise self._expired()
            return
        try:
            self._wait_for_place()
        except Error as error:
            if not self._may_go_remote(error):
                raise
            self._go_remote()
            return
        self.placed()

    def _may_go_remote(self, error: Error) -> bool:
        """Whether it can be committed by another node, after ``error`` kept it from the place here."""
        return self._node.forwarder is not None and is_elsewhere(error)

    def _go_remote(self, pinned: PinnedView | None = None) -> None:
        """Read a snapshot from here on; the primary compares it at the end."""
        self._reads = ReadSet(self._node.engine.snapshot() if pinned is None else pinned)
        self._placed = True

    @property
    def _remote(self) -> bool:
        """Whether it reads a snapshot here, and commits at the primary."""
        return self._reads is not None and self._reads.pinned is not None

    @property
    def _busy(self) -> bool:
        """Whether a step of a scan is under way, for which the next read would wait."""
        reads = self._reads
        return reads is not None and reads.pinned is not None and reads.pinned.busy

    def _wait_for_place(self) -> None:
        committer = self._node.engine.committer
        self._node.engine.writable()
        granted = threading.Lock()
        granted.acquire()
        if not committer.take_place(self, granted.release):
            try:
                deadline = self._node.deadline(self._timeout_s)
                while not granted.acquire(timeout=max(0.0, min(0.05, deadline - time.monotonic()))):
                    if committer.holds_place(self):
                        break  # who left the place was interrupted before it could tell us
                    if time.monotonic() >= deadline:
                        raise TransactionExpired("no turn for this transaction before its deadline")
                if not committer.holds_place(self):
                    raise self._expired()
            except BaseException:
                committer.leave_place(self, None)
                raise

    def placed(self) -> None:
        """The place is ours: note what is ahead of us and not visible yet."""
        committer = self._node.engine.committer
        self._placed = True
        if self._node.forwarder is not None:
            self._reads = ReadSet()
        ahead = committer.unpublished()
        for record in ahead:
            if record.kind in (Kind.WRITE, Kind.NOTED):
                payload = writes_in(record.kind, record.payload)
                for i in range(0, len(payload), 2):
                    flat = payload[i + 1]
                    for j in range(0, len(flat), 2):
                        self._tail[(payload[i], flat[j])] = flat[j + 1]
        self._barrier = ahead[-1] if ahead else None

    def _expired(self) -> Error:
        """Why the place is ours no more."""
        error = self._node.engine.committer.place_error(self)
        if error is not None:
            return again(error)
        return TransactionExpired("the transaction was open longer than transaction_age_max_s")

    # -- reading and writing -----------------------------------------------------------------------

    def get(self, key: bytes, default: Any = None, *, keyspace: Keyspace[Any] | None = None) -> Any:
        """The value of ``key`` as of this transaction, its own writes included."""
        space: Keyspace[Any] = self._space if keyspace is None else keyspace
        key = check_key(key)
        self._place()
        value = self._raw(space, key)
        if value is None:
            return default
        return value if space._decode is None else space._decode(value)

    def _raw(self, space: Keyspace[Any], key: bytes) -> bytes | None:
        at = (space._keyspace, key)
        return self._writes[at] if at in self._writes else self._former(*at)

    def _former(self, name: str, key: bytes) -> bytes | None:
        """What ``key`` held before this transaction; noted as read, where another node may have to compare."""
        at, reads = (name, key), self._reads
        if reads is not None and reads.pinned is not None:
            return reads.get(*at)
        if at in self._tail:
            value = self._tail[at]
        else:
            view = self._node.engine.view
            value = view.get(name, view.prefix(name), key)
        if reads is not None:
            reads.note(*at, value)
        return value

    def put(self, key: bytes, value: V, *, keyspace: Keyspace[Any] | None = None) -> None:
        """Set ``key`` when the transaction commits."""
        space: Keyspace[Any] = self._space if keyspace is None else keyspace
        self._add(space, space._put(key, value))

    def delete(self, key: bytes, *, keyspace: Keyspace[Any] | None = None) -> None:
        """Remove ``key`` when the transaction commits; it need not exist."""
        space: Keyspace[Any] = self._space if keyspace is None else keyspace
        self._add(space, space._delete(key))

    def _add(self, space: Keyspace[Any], write: Write) -> None:
        if not self._open:
            raise ClosedError("the transaction is over")
        name, (key, value) = write.payload
        self._size += write.size + 16
        self._node.writes.check_record_size(self._size)
        if space._keeps:
            self._keeping.add((name, key))
        self._writes[(name, key)] = value

    def emit(self, topic: str, payload: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Hand a message to the readers of feeds when the transaction commits, and only then (an outbox).

        It goes with the record into the log and from there to feeds; the state keeps nothing of it. ``topic``
        has 1 to 255 characters, ``headers`` map text to text. Raises :class:`InvalidInput` or ``TypeError``.
        """
        message, size = emitted(self._node, topic, payload, headers)
        if not self._open:
            raise ClosedError("the transaction is over")
        self._size += size
        self._node.writes.check_record_size(self._size)
        self._emits.append(message)

    def __getitem__(self, key: bytes) -> V:
        value = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        found: V = value
        return found

    def __setitem__(self, key: bytes, value: V) -> None:
        self.put(key, value)

    def __delitem__(self, key: bytes) -> None:
        if self.get(key, _MISSING) is _MISSING:
            raise KeyError(key)
        self.delete(key)

    def __contains__(self, key: bytes) -> bool:
        return self.get(key, _MISSING) is not _MISSING

    def scan(
        self,
        *,
        prefix: bytes = b"",
        start: bytes | None = None,
        stop: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        keyspace: Keyspace[Any] | None = None,
    ) -> Iterator[tuple[bytes, Any]]:
        """Pairs in key order as of this transaction; writes made while it runs are not seen by it."""
        space: Keyspace[Any] = self._space if keyspace is None else keyspace
        self._place()
        low, high = bounds(prefix, start, stop)
        if high is not None and low >= high:
            return iter(())
        name, reads = space._keyspace, self._reads
        if reads is not None and reads.pinned is not None:
            pairs: Iterator[tuple[bytes, bytes]] = reads.pinned.scan(name, low, high, reverse=reverse)
        else:
            pairs = space._scan_bytes(low, high, reverse)
            if tail := fresh_in(self._tail, name, low, high):
                pairs = merged(pairs, tail, reverse)
        if reads is not None:
            pairs = reads.watch(name, low, high, reverse, pairs)
        if own := fresh_in(self._writes, name, low, high):
            pairs = merged(pairs, own, reverse)
        return decoded(islice(pairs, limit), space._decode)

    # -- the end -----------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        write = self.end(commit=kind is None)
        if kind is not None:
            return
        if write is not None:
            try:
                position = self._node.writes.finish(write, self._timeout_s)
            except Error:
                forward = self._redirected(write)
                if forward is None:
                    raise
                assert self._node.forwarder is not None
                position = self._node.forwarder.commit(forward)
            self.position = position if self._wrote else None
        elif self._barrier is not None:
            self._node.writes.await_record(self._barrier, self._timeout_s)

    def end(self, *, commit: bool, order: Callable[[Write], None] | None = None) -> Write | None:
        """Give the place back; with ``commit`` and something written, order the record and return it.

        ``order`` puts a record in order that never took the place (default: as a put does, which may wait).
        """
        if not self._open:
            return None
        committer = self._node.engine.committer
        try:
            if commit and self._keeping:
                self._note_former()
        except BaseException:
            self._open = False
            if self._remote and self._reads is not None:
                self._reads.release()
            committer.leave_place(self, None)
            raise
        self._open = False
        if self._remote:
            return self._end_remote(commit=commit)
        if not commit or not self._wrote:
            if self._placed:
                lost = not committer.holds_place(self)
                committer.leave_place(self, None)
                if lost and commit:
                    raise self._expired()
            return None
        kind = Kind.NOTED if self._emits or self._notes else Kind.WRITE
        write = Write(kind, self._payload(), self._size)
        if not self._placed:
            try:
                if order is not None:
                    order(write)
                else:
                    self._node.engine.order(write, self._node.deadline(self._timeout_s))
            except Error as error:
                if not self._may_go_remote(error):
                    raise
                return self._forward(None)
            return write
        if not committer.leave_place(self, write):
            why = self._expired()
            if not self._may_go_remote(why):
                raise why
            return self._forward(self._reads)
        return write

    @property
    def _wrote(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self._writes or self._emits)

    def _note_former(self) -> None:
        """Note what the keys that keep it held before this transaction: [operation, value, …]."""
        self._place()
        notes: list[Any] = []
        for index, at in enumerate(self._writes):
            if at in self._keeping:
                value = self._former(*at)
                notes += (index, value)
                self._size += len(value or b"") + 8
        self._node.writes.check_record_size(self._size)
        self._notes = notes

    def _place_now(self) -> None:
        """Take the writer's place, if it is free this moment; else ``Overloaded``."""
        committer = self._node.engine.committer
        self._node.engine.writable()
        if not committer.take_place(self, lambda: None):
            committer.leave_place(self, None)
            raise Overloaded("a transaction is under way", hint="wait for it before sending more")
        self.placed()

    def _payload(self) -> list[Any]:
        """What is logged: of a write, or of one with notes for feeds."""
        writes = write_payload([(name, key, value) for (name, key), value in self._writes.items()])
        return [writes, self._emits, self._notes] if self._emits or self._notes else writes

    def _end_remote(self, *, commit: bool) -> Write | None:
        """Have the primary compare what was read, and commit."""
        reads = self._reads
        assert reads is not None
        reads.release()
        if not commit or not (self._wrote or (self._compares and reads)):
            return None
        return self._forward(reads)

    def _forward(self, reads: ReadSet | None) -> Write:
        forwarder = self._node.forwarder
        assert forwarder is not None
        deadline_s = self._node.deadline(self._timeout_s)
        item = forwarder.make(self._payload(), self._size, deadline_s, reads=reads)
        forwarder.order(item)
        return item

    def _redirected(self, write: Write) -> Forward | None:
        """What to order in place of a write that was refused here because another node is, or will be,
        primary; ``None`` when it was not. The other node compares what was read."""
        forwarder = self._node.forwarder
        if forwarder is None or type(write) is Forward or not is_elsewhere(write.error):
            return None
        deadline_s = self._node.deadline(self._timeout_s)
        return forwarder.make(write.payload, write.size, deadline_s, reads=self._reads)


def emitted(
    node: Node, topic: str, payload: bytes, headers: Mapping[str, str] | None
) -> tuple[list[Any], int]:
    """A message as it is logged, and its size."""
    topic, checked = check_topic(topic), check_headers(headers)
    data = check_value(payload, node.options.value_bytes_max)
    size = sum(len(name) + len(text) for name, text in (checked or {}).items())
    return [topic, data, checked], size + len(topic) + len(data) + 32
