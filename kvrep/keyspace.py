"""The ordered map that users see: a keyspace, and the writes and reads it offers."""

from __future__ import annotations

import threading
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    ValuesView,
)
from itertools import islice
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, overload

from kvrep.codecs import BYTES, Codec
from kvrep.errors import ClosedError, Error, Overloaded, TransactionConflict, TransactionExpired, again
from kvrep.model.position import Position
from kvrep.model.record import Kind, write_payload, writes_in
from kvrep.runtime.checks import check_headers, check_key, check_topic, check_value, prefix_stop
from kvrep.runtime.forwarding import Forward, is_elsewhere
from kvrep.runtime.node import Node
from kvrep.runtime.reads import ReadSet, fresh_in, merged
from kvrep.storage.view import Snapshot as PinnedView
from kvrep.storage.write import Write

__all__ = ["Batch", "Keyspace", "Snapshot", "Transaction", "WriteFuture"]

V = TypeVar("V")
D = TypeVar("D")
R = TypeVar("R")
Consistency = Literal["local", "linearizable"]
CLEAR_KEYS = 4096
_MISSING: Any = object()


class WriteFuture:
    """The outcome of a pipelined write. Any thread may ask."""

    __slots__ = ("_node", "_write")

    def __init__(self, node: Node, write: Write) -> None:
        self._node = node
        self._write = write

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._write.done

    def result(self, timeout: float | None = None) -> Position:
        """Wait for the outcome (``timeout`` seconds; default: the store's ``ack_timeout_s``).

        Returns the position, or raises what ``put`` would have raised.
        """
        write = self._write
        if write.done and write.error is None:
            return write.position
        return self._node.finish(write, timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Like :meth:`result`, but gives the error instead of raising it."""
        try:
            self.result(timeout)
        except Exception as error:
            return error
        return None

    def add_done_callback(self, callback: Callable[[WriteFuture], None]) -> None:
        """Call ``callback(self)`` when done: on a thread of the store, or at once if it is done already.

        It must be quick: other writes wait behind it. What it raises is logged and dropped.
        """
        self._write.when_done(lambda _: self._node.guarded(callback, self))


class Keyspace(MutableMapping[bytes, V], Generic[V]):
    """A named, ordered map from bytes to values; a ``MutableMapping`` whose every change is durable.

    Writes return the :class:`Position` at which they are committed. All methods may be called on any thread.
    """

    __hash__ = object.__hash__

    def __init__(self, node: Node, name: str, codec: Codec[V], *, keep_before: bool = False) -> None:
        self._node = node
        self._keeps = keep_before
        """Whether what a key held before is logged with every write, for feeds."""
        self._keyspace = name
        self._prefix = node.engine.view.admit(name)
        self._codec = codec
        plain: bool = codec is BYTES
        self._encode: Callable[[V], bytes] | None = None if plain else codec.encode
        self._decode: Callable[[bytes], V] | None = None if plain else codec.decode
        self._value_max = node.options.value_bytes_max

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._keyspace!r}>"

    # -- reading -----------------------------------------------------------------------------------

    @overload
    def get(
        self, key: bytes, default: None = None, *, at_least: Position | None = None,
        max_staleness_s: float | None = None, consistency: Consistency = "local",
        timeout_s: float | None = None,
    ) -> V | None: ...  # fmt: skip
    @overload
    def get(
        self, key: bytes, default: D, *, at_least: Position | None = None,
        max_staleness_s: float | None = None, consistency: Consistency = "local",
        timeout_s: float | None = None,
    ) -> V | D: ...  # fmt: skip
    def get(
        self,
        key: bytes,
        default: Any = None,
        *,
        at_least: Position | None = None,
        max_staleness_s: float | None = None,
        consistency: Consistency = "local",
        timeout_s: float | None = None,
    ) -> Any:
        """The committed value of ``key``, or ``default``.

        ``at_least`` waits (up to ``timeout_s``, default 5) until this node has that position;
        ``max_staleness_s`` raises :class:`StaleRead` when a follower may be further behind than that.

        ``consistency="linearizable"`` shows every write that had returned anywhere before this call: the
        primary makes sure, through enough of its voters, that it still is the primary; a follower asks it and
        waits for its answer's position (``timeout_s``, default the store's ``ack_timeout_s``).
        :class:`StaleRead` or :class:`NotPrimary` when that cannot be had in time, and always with ``acks=0``
        where there are followers.
        """
        if type(key) is not bytes:
            key = check_key(key)
        if at_least is not None or max_staleness_s is not None or consistency != "local":
            self._node.freshen(at_least, max_staleness_s, timeout_s, consistency)
        value = self._node.engine.view.get(self._keyspace, self._prefix, key)
        if value is None:
            return default
        return value if self._decode is None else self._decode(value)

    def __getitem__(self, key: bytes) -> V:
        value: Any = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        found: V = value
        return found

    def __contains__(self, key: object) -> bool:
        if type(key) is not bytes:
            key = check_key(key)
        return self._node.engine.view.get(self._keyspace, self._prefix, key) is not None

    def __len__(self) -> int:
        snapshot = self._node.engine.snapshot()
        try:
            return snapshot.count(self._keyspace)
        finally:
            snapshot.release()

    def __iter__(self) -> Iterator[bytes]:
        return (key for key, _ in self._scan_bytes(b"", None, False))

    def __reversed__(self) -> Iterator[bytes]:
        return (key for key, _ in self._scan_bytes(b"", None, True))

    def scan(
        self,
        *,
        prefix: bytes = b"",
        start: bytes | None = None,
        stop: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        consistency: Consistency = "local",
    ) -> Iterator[tuple[bytes, V]]:
        """Pairs in key order (descending with ``reverse``) as of one position.

        ``start`` is included, ``stop`` is not, whatever the direction; both are whole keys and are
        combined with ``prefix``. The scan holds a snapshot until it ends or is dropped; past
        ``snapshot_age_max_s`` it raises :class:`SnapshotExpired`. ``consistency`` is that of :meth:`get`.
        """
        if consistency != "local":
            self._node.freshen(None, None, None, consistency)
        low, high = bounds(prefix, start, stop)
        if limit is not None and (type(limit) is not int or limit < 0):
            raise ValueError(f"limit must be a number of pairs, not {limit!r}")
        if high is not None and low >= high:
            return iter(())
        pairs = self._scan_bytes(low, high, reverse)
        if limit is not None:
            pairs = islice(pairs, limit)
        return decoded(pairs, self._decode)

    def _scan_bytes(self, low: bytes, high: bytes | None, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        snapshot = self._node.engine.snapshot()
        return snapshot.scan(self._keyspace, low, high, reverse=reverse, release=True)

    def keys(self) -> KeysView[bytes]:
        return KeysView(self)

    def items(self) -> ItemsView[bytes, V]:
        return _Items(self)

    def values(self) -> ValuesView[V]:
        return _Values(self)

    # -- writing -----------------------------------------------------------------------------------

    def put(
        self,
        key: bytes,
        value: V,
        *,
        acks: int | Literal["majority", "all"] | None = None,
        level: Literal["synced", "visible"] | None = None,
        timeout_s: float | None = None,
    ) -> Position:
        """Store ``value`` under ``key`` and return the position once it is committed.

        ``acks`` and ``level`` ask this write to wait for more than the store's rule (never less).
        Raises a :class:`RefusedError` (nothing was logged), or :class:`AckTimeout` with the position when
        the outcome is not known after ``timeout_s`` (default: the store's ``ack_timeout_s``).
        """
        if self._keeps:
            return self._commit_noted(timeout_s, acks, level, key, value)
        return self._node.commit(self._put(key, value), timeout_s, acks, level)

    def delete(
        self,
        key: bytes,
        *,
        acks: int | Literal["majority", "all"] | None = None,
        level: Literal["synced", "visible"] | None = None,
        timeout_s: float | None = None,
    ) -> Position:
        """Remove ``key``, which need not exist; outcomes as of :meth:`put`."""
        if self._keeps:
            return self._commit_noted(timeout_s, acks, level, key)
        return self._node.commit(self._delete(key), timeout_s, acks, level)

    def _commit_noted(
        self, timeout_s: float | None, acks: Any, level: Any, key: bytes, *value: V
    ) -> Position:
        """A put (with a value) or a delete, together with what was there."""
        more = acks is not None or level is not None
        if more:
            self._node.check_more(acks, level)
        deadline = self._node.deadline(timeout_s)

        def body(txn: Transaction[V]) -> None:
            if value:
                txn.put(key, value[0])
            else:
                txn.delete(key)

        _, position = self._atomically(body, timeout_s)
        assert position is not None
        if more:
            self._node.await_more(position, acks, level, deadline)
        return position

    def _order_noted(self, timeout_s: float | None, key: bytes, *value: V, wait: bool = True) -> Write:
        """Put such a write in order. Without ``wait`` it raises ``Overloaded`` when that is not its turn now."""
        txn: Transaction[V] = self.transaction(timeout_s=timeout_s)
        try:
            if value:
                txn.put(key, value[0])
            else:
                txn.delete(key)
            if not wait:
                txn._place_now()
            write = txn.end(commit=True)
        except BaseException:
            txn.end(commit=False)
            raise
        assert write is not None
        return write

    def submit_put(self, key: bytes, value: V) -> WriteFuture:
        """Order the write and return at once; refusals are raised here, outcomes by the future."""
        if self._keeps:
            return self._submit_noted(key, value)
        return WriteFuture(self._node, self._node.submit(self._put(key, value)))

    def submit_delete(self, key: bytes) -> WriteFuture:
        """Like :meth:`submit_put`, for :meth:`delete`."""
        if self._keeps:
            return self._submit_noted(key)
        return WriteFuture(self._node, self._node.submit(self._delete(key)))

    def _submit_noted(self, key: bytes, *value: V) -> WriteFuture:
        write = self._order_noted(None, key, *value)
        self._node.engine.committer.kick()
        return WriteFuture(self._node, write)

    def _put(self, key: bytes, value: V) -> Write:
        data: Any = value if self._encode is None else self._encode(value)
        if type(key) is not bytes or not 0 < len(key) <= 511:
            key = check_key(key)
        if type(data) is not bytes or len(data) > self._value_max:
            data = check_value(data, self._value_max)
        return Write(Kind.WRITE, (self._keyspace, (key, data)), len(key) + len(data))

    def _pair(self, key: bytes, value: V) -> tuple[bytes, bytes]:
        """Checked, as they are stored. (``_put`` spells it out: it is called for every single write.)"""
        data: Any = value if self._encode is None else self._encode(value)
        if type(key) is not bytes or not 0 < len(key) <= 511:
            key = check_key(key)
        if type(data) is not bytes or len(data) > self._value_max:
            data = check_value(data, self._value_max)
        return key, data

    def _delete(self, key: bytes) -> Write:
        key = check_key(key)
        return Write(Kind.WRITE, (self._keyspace, (key, None)), len(key))

    def __setitem__(self, key: bytes, value: V) -> None:
        if self._keeps:
            self._commit_noted(None, None, None, key, value)
        else:
            self._node.commit(self._put(key, value), None)

    def __delitem__(self, key: bytes) -> None:
        """Remove a key that exists; ``KeyError`` if it does not."""
        self.pop(key)

    def compare_and_set(
        self, key: bytes, *, expected: V | None, value: V | None, timeout_s: float | None = None
    ) -> Position | None:
        """Set ``key`` to ``value`` if it is ``expected`` now; ``None`` stands for a missing key, on both
        sides.

        Returns the position, or ``None`` when the key was something else (then nothing was written).
        """

        def swap(txn: Transaction[V]) -> bool:
            if txn.get(key) != expected:
                return False
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)
            return True

        swapped, position = self._atomically(swap, timeout_s)
        return position if swapped else None

    def put_if_absent(self, key: bytes, value: V, *, timeout_s: float | None = None) -> Position | None:
        """Store ``value`` if ``key`` is missing; ``None`` when it was there."""
        return self.compare_and_set(key, expected=None, value=value, timeout_s=timeout_s)

    def setdefault(self, key: bytes, default: Any = None) -> Any:
        """The value of ``key``; stored as ``default`` first if it was missing. Atomic."""

        def store(txn: Transaction[V]) -> Any:
            value = txn.get(key)
            if value is not None:
                return value
            txn.put(key, default)
            return default

        return self._atomically(store)[0]

    def pop(self, key: bytes, default: Any = _MISSING) -> Any:
        """Remove ``key`` and return its value. Atomic."""

        def take(txn: Transaction[V]) -> Any:
            value = txn.get(key)
            if value is not None:
                txn.delete(key)
            return value

        value = self._atomically(take)[0]
        if value is not None:
            return value
        if default is _MISSING:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[bytes, V]:
        """Remove and return the pair with the smallest key. Atomic."""

        def take(txn: Transaction[V]) -> tuple[bytes, V] | None:
            for key, value in txn.scan(limit=1):
                txn.delete(key)
                return key, value
            return None

        pair = self._atomically(take)[0]
        if pair is None:
            raise KeyError("the keyspace is empty")
        return pair

    def _atomically(
        self, body: Callable[[Transaction[V]], R], timeout_s: float | None = None
    ) -> tuple[R, Position | None]:
        """What ``body`` returns in a transaction, and the position if it wrote something.

        On a follower with ``forward_writes`` it is repeated while what it reads here is behind the primary;
        what it read is compared there even if it writes nothing.
        """
        deadline_s = self._node.deadline(timeout_s)
        while True:
            txn: Transaction[V] = self.transaction(timeout_s=timeout_s)
            txn._compares = True
            try:
                with txn:
                    result = body(txn)
            except TransactionConflict as conflict:
                assert self._node.forwarder is not None
                self._node.forwarder.catch_up(conflict, deadline_s)
                timeout_s = max(0.0, deadline_s - time.monotonic())
            else:
                return result, txn.position

    def update(self, other: Any = (), /, **more: Any) -> None:
        """Store many pairs in one atomic batch."""
        if more:
            raise TypeError("keys are bytes, so keyword arguments cannot name them")
        pairs: Iterable[tuple[bytes, V]] = other.items() if isinstance(other, Mapping) else other
        with self.batch() as batch:
            for key, value in pairs:
                batch.put(key, value)

    def clear(self) -> None:
        """Remove every key: a sequence of bounded atomic records, not one."""
        while True:
            keys = [key for key, _ in islice(self._scan_bytes(b"", None, False), CLEAR_KEYS)]
            if not keys:
                return
            with self.batch() as batch:
                for key in keys:
                    batch.delete(key)

    def batch(self, *, timeout_s: float | None = None) -> Batch[V]:
        """``with keyspace.batch() as batch:`` collects writes and commits them as one record at the end."""
        return Batch(self, timeout_s)

    def transaction(self, *, timeout_s: float | None = None) -> Transaction[V]:
        """``with keyspace.transaction() as txn:`` reads and writes serializably, one transaction at a time.

        An exception inside rolls it back. Other writers wait from its first read on, so keep it short;
        past ``transaction_age_max_s`` it raises :class:`TransactionExpired`.

        On a follower with ``forward_writes`` nobody waits for it: it reads a snapshot here, and its end asks
        the primary to commit it if everything that it has read is still so there, scanned ranges included.
        If not, it raises :class:`TransactionConflict`, and the block is to be run again. One that writes
        nothing has read a snapshot of the past, and is not compared.
        """
        return Transaction(self, timeout_s)


def bounds(prefix: bytes, start: bytes | None, stop: bytes | None) -> tuple[bytes, bytes | None]:
    """[low, high) of a scan; ``TypeError`` for anything but bytes."""
    for what, value in (("prefix", prefix), ("start", start), ("stop", stop)):
        if value is not None and not isinstance(value, bytes):
            raise TypeError(f"{what} must be bytes, not {type(value).__name__}")
    low = max(prefix, start or b"")
    high = prefix_stop(prefix)
    if stop is not None and (high is None or stop < high):
        high = stop
    return low, high


def decoded(
    pairs: Iterator[tuple[bytes, bytes]], decode: Callable[[bytes], Any] | None
) -> Iterator[tuple[bytes, Any]]:
    return pairs if decode is None else ((key, decode(value)) for key, value in pairs)


class _Items(ItemsView[bytes, V]):
    _mapping: Keyspace[V]

    def __iter__(self) -> Iterator[tuple[bytes, V]]:
        return self._mapping.scan()


class _Values(ValuesView[V]):
    _mapping: Keyspace[V]

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping.scan())


class Batch(Generic[V]):
    """Writes that become one atomic record when the ``with`` block ends well."""

    def __init__(self, keyspace: Keyspace[V], timeout_s: float | None) -> None:
        self.position: Position | None = None
        """Where it was committed; ``None`` until then, and when it was empty."""
        self._space = keyspace
        self._timeout_s = timeout_s
        self._size_max = keyspace._node.options.record_bytes_max
        self._payload: list[Any] = []
        """As ``write_payload`` makes it: keyspaces, and the flat list of keys and values of each."""
        self._name = ""
        self._flat: list[bytes | None] = []
        self._emits: list[list[Any]] = []
        self._keeping: set[str] = set()
        """Keyspaces whose former values are to be logged."""
        self._size = 0
        self._open = True

    def __enter__(self) -> Batch[V]:
        return self

    def __len__(self) -> int:
        return sum(map(len, self._payload[1::2])) // 2 + len(self._emits)

    def emit(self, topic: str, payload: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Add a message for feeds; see :meth:`Transaction.emit`."""
        message, size = emitted(self._space._node, topic, payload, headers)
        if not self._open:
            raise ClosedError("the batch is over")
        self._size += size
        self._space._node.check_record_size(self._size)
        self._emits.append(message)

    def put(self, key: bytes, value: V, *, keyspace: Keyspace[Any] | None = None) -> None:
        """Add a put, into this keyspace or another one of the same store."""
        space: Keyspace[Any] = self._space if keyspace is None else keyspace
        key, data = space._pair(key, value)
        self._add(space, key, data, len(key) + len(data) + 16)

    def delete(self, key: bytes, *, keyspace: Keyspace[Any] | None = None) -> None:
        """Add a delete."""
        space: Keyspace[Any] = self._space if keyspace is None else keyspace
        key = check_key(key)
        self._add(space, key, None, len(key) + 16)

    def _add(self, space: Keyspace[Any], key: bytes, data: bytes | None, size: int) -> None:
        if not self._open:
            raise ClosedError("the batch is over")
        self._size = size = self._size + size
        if size > self._size_max:
            self._space._node.check_record_size(size)
        if space._keyspace != self._name:
            self._name, self._flat = space._keyspace, []
            self._payload += (self._name, self._flat)
            if space._keeps:
                self._keeping.add(self._name)
        self._flat.extend((key, data))

    def _write(self) -> Write | None:
        """All of it as one write; ``None`` when it is empty."""
        if self._emits:
            return Write(Kind.NOTED, [self._payload, self._emits, []], self._size)
        return Write(Kind.WRITE, self._payload, self._size) if self._payload else None

    def _repeat(self, txn: Transaction[V]) -> None:
        """All of it once more in a transaction, which can tell what stood there before."""
        names = iter(self._payload)
        for name, flat in zip(names, names, strict=True):
            pairs = iter(flat)
            for key, value in zip(pairs, pairs, strict=True):
                txn._writes[(name, key)] = value
                if name in self._keeping:
                    txn._keeping.add((name, key))
        txn._emits, txn._size = self._emits, self._size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._keeping and kind is None:
            _, self.position = self._space._atomically(self._repeat, self._timeout_s)
            return
        write = self._write() if kind is None else None
        if write is not None:
            self.position = self._space._node.commit(write, self._timeout_s)


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
        self._node.check_record_size(self._size)
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
        self._node.check_record_size(self._size)
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
                position = self._node.finish(write, self._timeout_s)
            except Error:
                forward = self._redirected(write)
                if forward is None:
                    raise
                assert self._node.forwarder is not None
                position = self._node.forwarder.commit(forward)
            self.position = position if self._wrote else None
        elif self._barrier is not None:
            self._node.await_record(self._barrier, self._timeout_s)

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
        self._node.check_record_size(self._size)
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


class Snapshot:
    """A store at one position, until closed. ``with store.snapshot() as view: …``"""

    def __init__(self, node: Node, codec: Codec[Any], keyspace: str, pinned: PinnedView) -> None:
        self._node = node
        self._pinned = pinned
        self._name = keyspace
        self._codec = codec

    @property
    def position(self) -> Position:
        """The position that every read of this snapshot shows."""
        return self._pinned.position

    def get(self, key: bytes, default: Any = None, *, keyspace: Keyspace[Any] | None = None) -> Any:
        """The value of ``key`` at this position."""
        name, decode = self._space(keyspace)
        value = self._pinned.get(name, check_key(key))
        if value is None:
            return default
        return decode(value)

    def __getitem__(self, key: bytes) -> Any:
        value = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        return value

    def __contains__(self, key: bytes) -> bool:
        return self.get(key, _MISSING) is not _MISSING

    def __len__(self) -> int:
        return self._pinned.count(self._name)

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
        """Pairs in key order at this position; see :meth:`Keyspace.scan`."""
        name, decode = self._space(keyspace)
        low, high = bounds(prefix, start, stop)
        if high is not None and low >= high:
            return iter(())
        pairs = self._pinned.scan(name, low, high, reverse=reverse)
        plain = decode is BYTES.decode
        return decoded(islice(pairs, limit), None if plain else decode)

    def __iter__(self) -> Iterator[bytes]:
        return (key for key, _ in self.scan())

    def _space(self, keyspace: Keyspace[Any] | None) -> tuple[str, Callable[[bytes], Any]]:
        if keyspace is None:
            return self._name, self._codec.decode
        return keyspace._keyspace, keyspace._codec.decode

    @property
    def closed(self) -> bool:
        return self._pinned.released

    @property
    def busy(self) -> bool:
        """Whether a step of a read is under way, for which the next read would wait."""
        return self._pinned.busy

    def close(self) -> None:
        """Let go of the position. Idempotent."""
        self._pinned.release()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
