"""The ordered map of the asyncio face: the twin of :mod:`kvrep.keyspace`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, ClassVar, Generic, Literal, TypeVar, overload

from kvrep import keyspace as sync
from kvrep.aio.core import Core
from kvrep.aio.reading import paced
from kvrep.aio.writing import Batch, Transaction, WriteFuture
from kvrep.errors import RolledBack, StaleRead, TransactionConflict
from kvrep.keyspace import MISSING, is_expected
from kvrep.model.position import Position
from kvrep.runtime.freshness import is_linearizable

__all__ = ["Keyspace"]

V = TypeVar("V")
D = TypeVar("D")
R = TypeVar("R")


class Keyspace(Generic[V]):
    """A named, ordered map from bytes to values, every change of which is durable.

    Writes return the :class:`kvrep.Position` at which they are committed. It may be used on several loops.
    """

    __iter__: ClassVar[None] = None

    def __init__(self, core: Core, plain: sync.Keyspace[V]) -> None:
        self._core = core
        self._plain = plain

    def __repr__(self) -> str:
        return f"<kvrep.aio.{type(self).__name__} {self._plain._keyspace!r}>"

    # -- reading -----------------------------------------------------------------------------------

    @overload
    async def get(
        self, key: bytes, default: None = None, *, at_least: Position | None = None,
        max_staleness_s: float | None = None, consistency: sync.Consistency = "local",
        timeout_s: float | None = None,
    ) -> V | None: ...  # fmt: skip
    @overload
    async def get(
        self, key: bytes, default: D, *, at_least: Position | None = None,
        max_staleness_s: float | None = None, consistency: sync.Consistency = "local",
        timeout_s: float | None = None,
    ) -> V | D: ...  # fmt: skip
    async def get(
        self,
        key: bytes,
        default: Any = None,
        *,
        at_least: Position | None = None,
        max_staleness_s: float | None = None,
        consistency: sync.Consistency = "local",
        timeout_s: float | None = None,
    ) -> Any:
        """The committed value of ``key``, or ``default``. Read on the loop: it takes microseconds.

        ``at_least`` waits (up to ``timeout_s``, default 5) until this node has that position;
        ``max_staleness_s`` raises :class:`StaleRead` when a follower may be further behind than that;
        ``consistency="linearizable"`` shows every write that had returned anywhere before this call, as
        :meth:`kvrep.Keyspace.get` describes.
        """
        if consistency != "local":
            await self._linearize(consistency, timeout_s)
        if at_least is not None:
            await self._core.wait_for(at_least, 5.0 if timeout_s is None else timeout_s)
        if max_staleness_s is not None:
            await self._core.freshen(max_staleness_s, 1.0 if timeout_s is None else timeout_s)
        if self._core.withheld:
            await self._core.revealed()
        return self._plain.get(key, default)

    async def _linearize(self, consistency: sync.Consistency, timeout_s: float | None = None) -> None:
        if is_linearizable(consistency):
            await self._core.linearize(timeout_s)

    def __getitem__(self, key: bytes) -> Awaitable[V]:
        """``await keyspace[key]``; ``KeyError`` if it is missing."""
        return self._item(key)

    async def _item(self, key: bytes) -> V:
        if self._core.withheld:
            await self._core.revealed()
        return self._plain[key]

    def __contains__(self, key: object) -> bool:
        """``key in keyspace``, without await: a point read.

        On a primary that has just restarted it holds the loop until the start of its epoch is committed;
        ``await get`` does not.
        """
        return key in self._plain

    async def count(self) -> int:
        """How many keys there are; ``len`` of the other face."""
        return await self._core.read(len, self._plain)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for key, _ in self.scan():
            yield key

    def scan(
        self,
        *,
        prefix: bytes = b"",
        start: bytes | None = None,
        stop: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        consistency: sync.Consistency = "local",
    ) -> AsyncIterator[tuple[bytes, V]]:
        """Pairs in key order (descending with ``reverse``) as of one position: ``async for key, value in …``.

        ``start`` is included, ``stop`` is not, whatever the direction; both are whole keys and are
        combined with ``prefix``. The position is taken at the first step and held until the scan ends or is
        dropped; past ``snapshot_age_max_s`` it raises :class:`SnapshotExpired`. ``consistency`` is that of
        :meth:`get`.
        """
        pairs = paced(
            self._core,
            lambda: self._plain.scan(prefix=prefix, start=start, stop=stop, reverse=reverse, limit=limit),
        )
        return pairs if consistency == "local" else self._confirmed(consistency, pairs)

    async def _confirmed(
        self, consistency: sync.Consistency, pairs: AsyncIterator[tuple[bytes, V]]
    ) -> AsyncIterator[tuple[bytes, V]]:
        await self._linearize(consistency)
        async for pair in pairs:
            yield pair

    def keys(self) -> AsyncIterator[bytes]:
        """All keys in order."""
        return self.__aiter__()

    def items(self) -> AsyncIterator[tuple[bytes, V]]:
        """All pairs in key order."""
        return self.scan()

    async def values(self) -> AsyncIterator[V]:
        """All values in the order of their keys."""
        async for _, value in self.scan():
            yield value

    # -- writing -----------------------------------------------------------------------------------

    async def put(
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
        Raises as :meth:`kvrep.Keyspace.put` describes: nothing was logged, it was rolled back, or the outcome
        is unknown. When the task is cancelled here, the outcome is not known either.
        """
        if self._plain._keeps:
            return await self._commit_noted(timeout_s, acks, level, key, value)
        return await self._core.commit(self._plain._put(key, value), timeout_s, acks, level)

    async def delete(
        self,
        key: bytes,
        *,
        acks: int | Literal["majority", "all"] | None = None,
        level: Literal["synced", "visible"] | None = None,
        timeout_s: float | None = None,
    ) -> Position:
        """Remove ``key``, which need not exist; outcomes as of :meth:`put`."""
        if self._plain._keeps:
            return await self._commit_noted(timeout_s, acks, level, key)
        return await self._core.commit(self._plain._delete(key), timeout_s, acks, level)

    async def _commit_noted(
        self, timeout_s: float | None, acks: Any, level: Any, key: bytes, *value: V
    ) -> Position:
        """A put (with a value) or a delete, together with what was there."""
        core = self._core
        more = acks is not None or level is not None
        if more:
            core.node.writes.check_more(acks, level)
        deadline_s = core.node.deadline(timeout_s)

        async def body(txn: Transaction[V]) -> None:
            if value:
                txn.put(key, value[0])
            else:
                txn.delete(key)

        _, position = await self._atomically(body, timeout_s)
        assert position is not None
        if more:
            await core.await_more(position, acks, level, deadline_s)
        return position

    def submit_put(self, key: bytes, value: V) -> WriteFuture:
        """Order the write and return its future at once, without await.

        Refusals are raised here, outcomes by the future. It cannot wait: at a bound on unfinished work it
        raises :class:`Overloaded`; await earlier futures then.
        """
        if self._plain._keeps:
            return self._submit_noted(key, value)
        return self._submit(self._plain._put(key, value))

    def submit_delete(self, key: bytes) -> WriteFuture:
        """Like :meth:`submit_put`, for :meth:`delete`."""
        if self._plain._keeps:
            return self._submit_noted(key)
        return self._submit(self._plain._delete(key))

    def _submit_noted(self, key: bytes, *value: V) -> WriteFuture:
        write = self._plain._order_noted(None, key, *value, wait=False)
        self._core.node.engine.committer.kick()
        return WriteFuture(self._core, write)

    def _submit(self, write: Any) -> WriteFuture:
        return WriteFuture(self._core, self._core.submit(write))

    async def compare_and_set(
        self, key: bytes, *, expected: V | None, value: V | None, timeout_s: float | None = None
    ) -> Position | None:
        """Set ``key`` to ``value`` if it is ``expected`` now; ``None`` stands for a missing key in both, and
        not for a ``None`` that a codec has stored.

        Returns the position, or ``None`` when the key was something else (then nothing was written).
        """

        async def swap(txn: Transaction[V]) -> bool:
            if not is_expected(await txn.get(key, MISSING), expected):
                return False
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)
            return True

        swapped, position = await self._atomically(swap, timeout_s)
        return position if swapped else None

    async def put_if_absent(self, key: bytes, value: V, *, timeout_s: float | None = None) -> Position | None:
        """Store ``value`` if ``key`` is missing; ``None`` when it was there."""

        async def add(txn: Transaction[V]) -> bool:
            if await txn.get(key, MISSING) is not MISSING:
                return False
            txn.put(key, value)
            return True

        added, position = await self._atomically(add, timeout_s)
        return position if added else None

    async def setdefault(self, key: bytes, default: Any = None) -> Any:
        """The value of ``key``; stored as ``default`` first if it was missing. Atomic."""

        async def store(txn: Transaction[V]) -> Any:
            value = await txn.get(key, MISSING)
            if value is not MISSING:
                return value
            txn.put(key, default)
            return default

        return (await self._atomically(store))[0]

    async def pop(self, key: bytes, default: Any = MISSING) -> Any:
        """Remove ``key`` and return its value. Atomic."""

        async def take(txn: Transaction[V]) -> Any:
            value = await txn.get(key, MISSING)
            if value is not MISSING:
                txn.delete(key)
            return value

        value = (await self._atomically(take))[0]
        if value is not MISSING:
            return value
        if default is MISSING:
            raise KeyError(key)
        return default

    async def popitem(self) -> tuple[bytes, V]:
        """Remove and return the pair with the smallest key. Atomic."""

        async def take(txn: Transaction[V]) -> tuple[bytes, V] | None:
            async for key, value in txn.scan(limit=1):
                txn.delete(key)
                return key, value
            return None

        pair = (await self._atomically(take))[0]
        if pair is None:
            raise KeyError("the keyspace is empty")
        return pair

    async def _atomically(
        self, body: Callable[[Transaction[V]], Awaitable[R]], timeout_s: float | None = None
    ) -> tuple[R, Position | None]:
        """As in :class:`kvrep.Keyspace`: what ``body`` returns in a transaction, and its position."""
        node = self._core.node
        deadline_s = node.deadline(timeout_s)
        while True:
            txn: Transaction[V] = self.transaction(timeout_s=timeout_s)
            txn._plain._compares = True
            try:
                async with txn:
                    result = await body(txn)
            except TransactionConflict as conflict:
                timeout_s = deadline_s - time.monotonic()
                if timeout_s <= 0:
                    raise
                with suppress(StaleRead, RolledBack):
                    await self._core.wait_for(conflict.position, timeout_s)
            else:
                return result, txn.position

    async def update(self, other: Any = (), /, **more: Any) -> None:
        """Store many pairs in one atomic batch."""
        if more:
            raise TypeError("keys are bytes, so keyword arguments cannot name them")
        pairs: Iterable[tuple[bytes, V]] = other.items() if isinstance(other, Mapping) else other
        async with self.batch() as batch:
            for key, value in pairs:
                batch.put(key, value)

    async def clear(self) -> None:
        """Remove every key: a sequence of bounded atomic records, not one."""
        while keys := await self._core.read(self._first_keys):
            async with self.batch() as batch:
                for key in keys:
                    batch.delete(key)

    def _first_keys(self) -> list[bytes]:
        return list(islice(iter(self._plain), sync.CLEAR_KEYS))

    def batch(self, *, timeout_s: float | None = None) -> Batch[V]:
        """``async with keyspace.batch() as batch:`` collects writes; its end commits them as one record."""
        return Batch(self, timeout_s)

    def transaction(self, *, timeout_s: float | None = None) -> Transaction[V]:
        """``async with keyspace.transaction() as txn:`` reads and writes serializably, one at a time.

        An exception inside, cancellation included, rolls it back. Other writers wait from its first read on,
        so keep it short; past ``transaction_age_max_s`` it raises :class:`TransactionExpired`. On a follower
        with ``forward_writes`` it reads a snapshot here and may end with :class:`TransactionConflict`, as
        :meth:`kvrep.Keyspace.transaction` describes.
        """
        return Transaction(self, timeout_s)
