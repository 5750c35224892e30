"""The ordered map that users see: a keyspace, and the writes and reads it offers."""

from __future__ import annotations

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
from typing import Any, Generic, Literal, TypeVar, overload

from kvrep.batch import Batch
from kvrep.codecs import BYTES, Codec
from kvrep.errors import TransactionConflict
from kvrep.model.position import Position
from kvrep.model.record import Kind
from kvrep.pairs import bounds, decoded
from kvrep.runtime.checks import check_key, check_value
from kvrep.runtime.node import Node
from kvrep.storage.write import Write
from kvrep.transaction import Transaction

__all__ = ["Keyspace", "WriteFuture"]

V = TypeVar("V")
D = TypeVar("D")
R = TypeVar("R")
Consistency = Literal["local", "linearizable"]
CLEAR_KEYS = 4096
MISSING: Any = object()
"""Stands for a value that is not there, where a codec may store ``None``."""


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
        return self._node.writes.finish(write, timeout)

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
            self._node.freshness.need(at_least, max_staleness_s, timeout_s, consistency)
        value = self._node.engine.view.get(self._keyspace, self._prefix, key)
        if value is None:
            return default
        return value if self._decode is None else self._decode(value)

    def __getitem__(self, key: bytes) -> V:
        value: Any = self.get(key, MISSING)
        if value is MISSING:
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
            self._node.freshness.need(None, None, None, consistency)
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
        Raises when it was not confirmed, and then one of three things is so:

        - nothing was logged: a :class:`RefusedError`, :class:`ClosedError`, or a :class:`StorageFailed` that is
          no :class:`UnknownOutcome`;
        - it was logged and dropped for good by a failover while this call waited: :class:`RolledBack`;
        - the outcome is not known: an :class:`UnknownOutcome` with the position, to ask :meth:`Store.resolve`
          later. That is :class:`AckTimeout` after ``timeout_s`` (default: the store's ``ack_timeout_s``),
          :class:`LogFailed` when the disk failed under it, or the plain class when the store was closed.

        Ctrl-C ends the wait, not the write: once it is in the log, the ``KeyboardInterrupt`` (or whatever a signal
        handler raises) has its ``position``, or its ``request`` if it was forwarded. Where the outcome must be
        known whenever the interrupt comes, use :meth:`submit_put` and keep its future.
        """
        if self._keeps:
            return self._commit_noted(timeout_s, acks, level, key, value)
        return self._node.writes.commit(self._put(key, value), timeout_s, acks, level)

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
        return self._node.writes.commit(self._delete(key), timeout_s, acks, level)

    def _commit_noted(
        self, timeout_s: float | None, acks: Any, level: Any, key: bytes, *value: V
    ) -> Position:
        """A put (with a value) or a delete, together with what was there."""
        more = acks is not None or level is not None
        if more:
            self._node.writes.check_more(acks, level)
        deadline = self._node.deadline(timeout_s)

        def body(txn: Transaction[V]) -> None:
            if value:
                txn.put(key, value[0])
            else:
                txn.delete(key)

        _, position = self._atomically(body, timeout_s)
        assert position is not None
        if more:
            self._node.writes.await_more(position, acks, level, deadline)
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
        return WriteFuture(self._node, self._node.writes.submit(self._put(key, value)))

    def submit_delete(self, key: bytes) -> WriteFuture:
        """Like :meth:`submit_put`, for :meth:`delete`."""
        if self._keeps:
            return self._submit_noted(key)
        return WriteFuture(self._node, self._node.writes.submit(self._delete(key)))

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
            self._node.writes.commit(self._put(key, value), None)

    def __delitem__(self, key: bytes) -> None:
        """Remove a key that exists; ``KeyError`` if it does not."""
        self.pop(key)

    def compare_and_set(
        self, key: bytes, *, expected: V | None, value: V | None, timeout_s: float | None = None
    ) -> Position | None:
        """Set ``key`` to ``value`` if it is ``expected`` now; ``None`` stands for a missing key, on both
        sides. (A ``None`` that a codec has stored is a value like any other, and not what ``None`` expects.)

        Returns the position, or ``None`` when the key was something else (then nothing was written).
        """

        def swap(txn: Transaction[V]) -> bool:
            if not is_expected(txn.get(key, MISSING), expected):
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

        def add(txn: Transaction[V]) -> bool:
            if key in txn:
                return False
            txn.put(key, value)
            return True

        added, position = self._atomically(add, timeout_s)
        return position if added else None

    def setdefault(self, key: bytes, default: Any = None) -> Any:
        """The value of ``key``; stored as ``default`` first if it was missing. Atomic."""

        def store(txn: Transaction[V]) -> Any:
            value = txn.get(key, MISSING)
            if value is not MISSING:
                return value
            txn.put(key, default)
            return default

        return self._atomically(store)[0]

    def pop(self, key: bytes, default: Any = MISSING) -> Any:
        """Remove ``key`` and return its value. Atomic."""

        def take(txn: Transaction[V]) -> Any:
            value = txn.get(key, MISSING)
            if value is not MISSING:
                txn.delete(key)
            return value

        value = self._atomically(take)[0]
        if value is not MISSING:
            return value
        if default is MISSING:
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


def is_expected(found: Any, expected: Any) -> bool:
    """Whether what a key holds (or ``MISSING``) is what ``compare_and_set`` expects (``None``: nothing)."""
    if expected is None or found is MISSING:
        return expected is None and found is MISSING
    return bool(found == expected)


class _Items(ItemsView[bytes, V]):
    _mapping: Keyspace[V]

    def __iter__(self) -> Iterator[tuple[bytes, V]]:
        return self._mapping.scan()


class _Values(ValuesView[V]):
    _mapping: Keyspace[V]

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping.scan())
