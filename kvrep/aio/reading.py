"""Reads that take several steps: scans and snapshots. The steps run on the store's reading thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from kvrep import keyspace as sync
from kvrep.aio.core import Core
from kvrep.errors import ClosedError
from kvrep.model.position import Position
from kvrep.snapshot import Snapshot as PlainSnapshot

if TYPE_CHECKING:
    from kvrep.aio.keyspace import Keyspace

__all__ = ["Snapshot", "paced"]

T = TypeVar("T")
STEP_MIN, STEP_MAX = 64, 1024
_MISSING: Any = object()


async def paced(core: Core, start: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
    """The items of ``start()``, which runs with all that follows on the reading thread, a step at a time.

    The loop is free during each step. What the iterator holds is let go when this one ends, is dropped, or
    its task is cancelled.
    """
    steps = _Steps(start)
    size = STEP_MIN
    try:
        while True:
            items = await core.read(steps.take, size)
            for item in items:
                yield item
            if len(items) < size:
                return
            size = min(4 * size, STEP_MAX)
    finally:
        steps.end()


class _Steps(Generic[T]):
    """An iterator that one thread steps through and another one may end, without waiting for a step."""

    def __init__(self, start: Callable[[], Iterator[T]]) -> None:
        self._start = start
        self._items: Iterator[T] | None = None
        self._over = False
        # Held during a step; whoever comes last, the step or the end, lets the iterator go.
        self._stepping = threading.Lock()

    def take(self, size: int) -> list[T]:
        """The next items, fewer than ``size`` at the end. On the reading thread."""
        try:
            with self._stepping:
                if self._over:
                    return []
                if self._items is None:
                    self._items = self._start()
                return list(islice(self._items, size))
        finally:
            if self._over:
                self._let_go()

    def end(self) -> None:
        """Take no more steps. Never blocks."""
        self._over = True
        self._let_go()

    def _let_go(self) -> None:
        if self._stepping.acquire(blocking=False):
            try:
                self._items = None  # nothing else refers to it: this ends it, and with it what it holds
            finally:
                self._stepping.release()


class Snapshot:
    """A store at one position: ``async with db.snapshot() as view: …``, or ``view = await db.snapshot()``.

    The position is the one that reads show when it is entered or awaited.
    """

    __iter__: ClassVar[None] = None

    def __init__(
        self, core: Core, take: Callable[[], PlainSnapshot], linearizable: tuple[float | None] | None = None
    ) -> None:
        """``linearizable``: the time that the primary has to confirm the position."""
        self._core = core
        self._take = take
        self._linearizable = linearizable
        self._held: PlainSnapshot | None = None

    @property
    def _view(self) -> PlainSnapshot:
        if self._held is None:
            raise ClosedError("the snapshot is not open", hint='use "async with", or await it')
        return self._held

    @property
    def position(self) -> Position:
        """The position that every read of this snapshot shows."""
        return self._view.position

    async def get(self, key: bytes, default: Any = None, *, keyspace: Keyspace[Any] | None = None) -> Any:
        """The value of ``key`` at this position."""
        return await self._soon(lambda: self._view.get(key, default, keyspace=_plain(keyspace)))

    def __getitem__(self, key: bytes) -> Awaitable[Any]:
        """``await view[key]``; ``KeyError`` if it is missing."""
        return self._item(key)

    async def _item(self, key: bytes) -> Any:
        value = await self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        return value

    __contains__: ClassVar[None] = None

    async def count(self) -> int:
        """How many keys the default keyspace has here."""
        return await self._core.read(lambda: len(self._view))

    def scan(
        self,
        *,
        prefix: bytes = b"",
        start: bytes | None = None,
        stop: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        keyspace: Keyspace[Any] | None = None,
    ) -> AsyncIterator[tuple[bytes, Any]]:
        """Pairs in key order at this position; see :meth:`Keyspace.scan`."""
        return paced(
            self._core,
            lambda: self._view.scan(
                prefix=prefix, start=start, stop=stop, reverse=reverse, limit=limit, keyspace=_plain(keyspace)
            ),
        )

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for key, _ in self.scan():
            yield key

    async def _soon(self, read: Callable[[], T]) -> T:
        """A short read, here; on the reading thread while a scan of this snapshot is in a step."""
        return await self._core.read(read) if self._view.busy else read()

    async def close(self) -> None:
        """Let go of the position. Idempotent."""
        held = self._held
        if held is None or held.closed:
            return
        if held.busy:
            await asyncio.shield(self._core.read(held.close))
        else:
            held.close()

    async def _open(self) -> Snapshot:
        if self._held is None:
            if self._linearizable is not None:
                await self._core.linearize(*self._linearizable)
            self._held = await self._core.acquire(self._take, PlainSnapshot.close)
        return self

    def __await__(self) -> Generator[Any, None, Snapshot]:
        return self._open().__await__()

    async def __aenter__(self) -> Snapshot:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _plain(keyspace: Keyspace[Any] | None) -> sync.Keyspace[Any] | None:
    return None if keyspace is None else keyspace._plain
