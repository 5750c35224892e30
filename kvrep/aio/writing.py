"""Writes of several steps: pipelined writes, batches, transactions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from kvrep.aio.core import Core
from kvrep.aio.reading import _plain, paced
from kvrep.batch import Batch as PlainBatch
from kvrep.errors import Error, TransactionExpired, again
from kvrep.model.position import Position
from kvrep.storage.view import Snapshot as PinnedView
from kvrep.storage.write import Write
from kvrep.transaction import Transaction as PlainTransaction

if TYPE_CHECKING:
    from kvrep.aio.keyspace import Keyspace

__all__ = ["Batch", "Transaction", "WriteFuture"]

V = TypeVar("V")
AHEAD_MAX = 1000
"""A transaction that begins behind more unpublished writes than this looks through them on a thread."""
_MISSING: Any = object()


class _Done:
    """What may be awaited, but need not: it has happened."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


DONE: Awaitable[None] = _Done()


class WriteFuture:
    """The outcome of a pipelined write: ``await future``, as often and in as many tasks as you like.

    Cancelling a task that awaits it changes nothing about the write or about this object.
    """

    __slots__ = ("_core", "_loop", "_write")

    def __init__(self, core: Core, write: Write) -> None:
        self._core = core
        self._write = write
        self._loop = asyncio.get_running_loop()

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._write.done

    def __await__(self) -> Generator[Any, None, Position]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> Position:
        """Wait for the outcome (``timeout`` seconds; default: the store's ``ack_timeout_s``).

        Returns the position, or raises what ``put`` would have raised.
        """
        return await self._core.finish(self._write, self._core.node.deadline(timeout))

    async def exception(self, timeout: float | None = None) -> BaseException | None:
        """Like :meth:`result`, but gives the error instead of raising it."""
        try:
            await self.result(timeout)
        except Exception as error:
            return error
        return None

    def add_done_callback(self, callback: Callable[[WriteFuture], None]) -> None:
        """Call ``callback(self)`` on the loop that submitted the write, once its outcome is known."""

        def call(_: Write) -> None:
            try:
                self._loop.call_soon_threadsafe(callback, self)
            except RuntimeError:
                pass  # the loop is closed

        self._write.when_done(call)


class Batch(Generic[V]):
    """Writes that become one atomic record when the ``async with`` block ends well."""

    def __init__(self, keyspace: Keyspace[V], timeout_s: float | None) -> None:
        self.position: Position | None = None
        """Where it was committed; ``None`` until then, and when it was empty."""
        self._core = keyspace._core
        self._space = keyspace
        self._plain = PlainBatch(keyspace._plain, timeout_s)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Batch[V]:
        return self

    def __len__(self) -> int:
        return len(self._plain)

    def put(self, key: bytes, value: V, *, keyspace: Keyspace[Any] | None = None) -> Awaitable[None]:
        """Add a put, into this keyspace or another one of the same store."""
        self._plain.put(key, value, keyspace=_plain(keyspace))
        return DONE

    def delete(self, key: bytes, *, keyspace: Keyspace[Any] | None = None) -> Awaitable[None]:
        """Add a delete."""
        self._plain.delete(key, keyspace=_plain(keyspace))
        return DONE

    def emit(
        self, topic: str, payload: bytes, *, headers: Mapping[str, str] | None = None
    ) -> Awaitable[None]:
        """Add a message for feeds; see :meth:`kvrep.Transaction.emit`."""
        self._plain.emit(topic, payload, headers=headers)
        return DONE

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        batch = self._plain
        batch._open = False
        if batch._keeping and kind is None:

            async def repeat(txn: Transaction[V]) -> None:
                batch._repeat(txn._plain)

            _, self.position = await self._space._atomically(repeat, self._timeout_s)
            return
        write = batch._write() if kind is None else None
        if write is not None:
            self.position = await self._core.commit(write, self._timeout_s)


class Transaction(Generic[V]):
    """Reads and writes that commit together or not at all; serializable. Belongs to one task at a time.

    Its reads may run concurrently (``asyncio.gather``) within that task.
    """

    __iter__: ClassVar[None] = None
    __contains__: ClassVar[None] = None

    def __init__(self, keyspace: Keyspace[V], timeout_s: float | None) -> None:
        self.position: Position | None = None
        """Where it was committed; ``None`` until then, and when it wrote nothing."""
        self._core = keyspace._core
        self._space = keyspace
        self._plain = PlainTransaction(keyspace._plain, timeout_s)
        self._timeout_s = timeout_s
        # Held while the place is asked for, so that concurrent reads ask once.
        self._placing = asyncio.Lock()

    async def __aenter__(self) -> Transaction[V]:
        return self

    # -- the place ---------------------------------------------------------------------------------

    async def _place(self) -> None:
        """Take the writer's place at the first read."""
        plain = self._plain
        if not plain._placed:
            async with self._placing:
                if plain._open and not self._has_place:
                    await self._take_place()
        plain._place()  # never waits now; raises when the transaction is over or has lost its place

    @property
    def _has_place(self) -> bool:
        return self._plain._placed

    async def _take_place(self) -> None:
        core, plain = self._core, self._plain
        if not core.node.forwards_now():
            try:
                await self._wait_for_place()
                return
            except Error as error:
                if not plain._may_go_remote(error):
                    raise
        pinned = await core.acquire(core.node.engine.snapshot, PinnedView.release)
        if plain._open:
            plain._go_remote(pinned)
        else:
            pinned.release()

    async def _wait_for_place(self) -> None:
        core, plain = self._core, self._plain
        engine = core.node.engine
        if engine.committer.epoch == 0:
            await core.call(engine.writable)
        else:
            engine.writable()
        committer = engine.committer
        waits = core.here()
        granted: asyncio.Future[None] = waits.loop.create_future()
        try:
            if not committer.take_place(plain, lambda: waits.tell(granted)):
                left = core.node.deadline(self._timeout_s) - time.monotonic()
                await asyncio.wait((granted,), timeout=max(0.0, left))
            if not committer.holds_place(plain):
                closed = committer.closed
                if closed is not None:
                    raise again(closed)
                raise TransactionExpired("no turn for this transaction before its deadline")
            if len(committer.pending) > AHEAD_MAX:
                await core.read(plain.placed)
            else:
                plain.placed()
        except BaseException:
            committer.leave_place(plain, None)
            raise

    # -- reading and writing -----------------------------------------------------------------------

    async def get(self, key: bytes, default: Any = None, *, keyspace: Keyspace[Any] | None = None) -> Any:
        """The value of ``key`` as of this transaction, its own writes included."""
        await self._place()
        plain = self._plain
        if plain._busy:
            return await self._core.read(lambda: plain.get(key, default, keyspace=_plain(keyspace)))
        return plain.get(key, default, keyspace=_plain(keyspace))

    def put(self, key: bytes, value: V, *, keyspace: Keyspace[Any] | None = None) -> Awaitable[None]:
        """Set ``key`` when the transaction commits."""
        self._plain.put(key, value, keyspace=_plain(keyspace))
        return DONE

    def delete(self, key: bytes, *, keyspace: Keyspace[Any] | None = None) -> Awaitable[None]:
        """Remove ``key`` when the transaction commits; it need not exist."""
        self._plain.delete(key, keyspace=_plain(keyspace))
        return DONE

    def emit(
        self, topic: str, payload: bytes, *, headers: Mapping[str, str] | None = None
    ) -> Awaitable[None]:
        """Hand a message to the readers of feeds when the transaction commits; see
        :meth:`kvrep.Transaction.emit`."""
        self._plain.emit(topic, payload, headers=headers)
        return DONE

    def __getitem__(self, key: bytes) -> Awaitable[V]:
        """``await txn[key]``; ``KeyError`` if it is missing."""
        return self._item(key)

    async def _item(self, key: bytes) -> V:
        value = await self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        found: V = value
        return found

    def __setitem__(self, key: bytes, value: V) -> None:
        self.put(key, value)

    async def scan(
        self,
        *,
        prefix: bytes = b"",
        start: bytes | None = None,
        stop: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        keyspace: Keyspace[Any] | None = None,
    ) -> AsyncIterator[tuple[bytes, Any]]:
        """Pairs in key order as of this transaction; writes made while it runs are not seen by it."""
        await self._place()
        pairs = paced(
            self._core,
            lambda: self._plain.scan(
                prefix=prefix, start=start, stop=stop, reverse=reverse, limit=limit, keyspace=_plain(keyspace)
            ),
        )
        async for pair in pairs:
            yield pair

    # -- the end -----------------------------------------------------------------------------------

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        core, plain = self._core, self._plain
        if kind is not None:
            plain.end(commit=False)
            return
        deadline_s = core.node.deadline(self._timeout_s)
        if plain._keeping and plain._open:
            try:
                await self._place()
            except BaseException:
                plain.end(commit=False)
                raise
        if plain._wrote and not plain._placed and core.node.engine.flusher.behind >= 0.5:
            try:
                await core.slow_down(deadline_s)
            except BaseException:
                plain.end(commit=False)
                raise
        write = plain.end(commit=True, order=core.order)
        if write is not None:
            core.node.engine.committer.kick()
            try:
                position = await core.finish(write, deadline_s)
            except Error:
                forward = plain._redirected(write)
                if forward is None:
                    raise
                position = await core.forward(forward)
            self.position = position if plain._wrote else None
        elif plain._barrier is not None:
            await core.await_record(plain._barrier, deadline_s)
