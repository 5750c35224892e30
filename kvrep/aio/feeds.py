"""Feeds of the asyncio face: the twins of :class:`kvrep.Changes` and :class:`kvrep.Feed`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Protocol

from kvrep.aio.core import Core
from kvrep.aio.waiting import LOOK_UP_S
from kvrep.errors import ClosedError
from kvrep.feeds.changes import Changes as PlainChanges
from kvrep.feeds.changes import Held
from kvrep.feeds.named import Feed as PlainFeed
from kvrep.feeds.named import FeedInfo
from kvrep.model.change import Change
from kvrep.model.position import Position

__all__ = ["Changes", "Feed"]


class _Source(Protocol):
    """What is polled."""

    def poll(self, timeout_s: float) -> list[Change]: ...
    @property
    def behind(self) -> bool: ...


async def _poll(core: Core, plain: _Source, over: Callable[[], bool], timeout_s: float) -> list[Change]:
    """Have ``poll(0)`` called on the reading thread until it gives something; no thread waits meanwhile."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        shown = core.node.engine.view.last
        changes = await core.read(plain.poll, 0.0)
        left = deadline_s - time.monotonic()
        if changes or over() or left <= 0:
            return changes
        if not plain.behind:
            await core.moved_beyond(shown, min(left, LOOK_UP_S))


class Changes:
    """An ordered stream of changes: ``async for change in db.changes(…)``, or ``await poll()``.

    As :class:`kvrep.Changes`; no thread is held while it waits. One task at a time reads it. A task that is
    cancelled while it reads may lose what was read then: go on with the token of the last change.
    """

    def __init__(self, core: Core, plain: PlainChanges) -> None:
        self._core = core
        self._plain = plain

    async def __aiter__(self) -> AsyncIterator[Change]:
        while not self._plain.over:
            for change in await self.poll(LOOK_UP_S):
                yield change

    async def poll(self, timeout_s: float = 1.0) -> list[Change]:
        """The next changes; none when there are none after ``timeout_s``, or at the end."""
        if self._core.node.closing:
            raise ClosedError("the store is closed")
        return await _poll(self._core, self._plain, lambda: self._plain.over, timeout_s)

    @property
    def over(self) -> bool:
        """Whether it was closed, or all through ``stop`` was delivered."""
        return self._plain.over

    @property
    def position(self) -> Position:
        """Everything through here was read."""
        return self._plain.position

    @property
    def token(self) -> str:
        """Where to go on after all that was handed out by :meth:`poll`."""
        return self._plain.token

    def close(self) -> None:
        """End the iteration. Idempotent, any thread, never waits."""
        self._plain.close()

    async def __aenter__(self) -> Changes:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Feed:
    """The changes for one named reader: ``async with db.feed("billing") as feed:``, or await it.

    As :class:`kvrep.Feed`.
    """

    def __init__(self, core: Core, make: Callable[[], PlainFeed]) -> None:
        self._core = core
        self._make = make
        self._held: PlainFeed | None = None

    @property
    def _plain(self) -> PlainFeed:
        if self._held is None:
            raise ClosedError("the feed is not open", hint='use "async with", or await it')
        return self._held

    async def _open(self) -> Feed:
        if self._held is None:
            self._held = await self._core.call(self._make)
        return self

    def __await__(self) -> Any:
        return self._open().__await__()

    async def __aiter__(self) -> AsyncIterator[Change]:
        plain = self._plain
        while not plain.closed:
            for change in await self.poll(LOOK_UP_S):
                plain.handed_out(change)
                yield change

    async def poll(self, timeout_s: float = 1.0) -> list[Change]:
        """The next changes; none after ``timeout_s`` without any, while paused, and when it is closed."""
        plain = self._plain
        return await _poll(self._core, plain, lambda: plain.closed, timeout_s)

    async def ack(self, through: Change | str | None = None) -> Position | None:
        """All through ``through`` (default: all that was handed out) is done; see :meth:`kvrep.Feed.ack`."""
        return await self._core.call(self._plain.ack, through)

    @property
    def name(self) -> str:
        return self._plain.name

    async def info(self) -> FeedInfo:
        """Where it stands and how far it is behind."""
        return await self._core.call(self._plain.info)

    def pause(self) -> Awaitable[None]:
        """Hand out nothing until :meth:`resume`."""
        return self._core.call(self._plain.pause)

    def resume(self) -> Awaitable[None]:
        """Go on after :meth:`pause`."""
        return self._core.call(self._plain.resume)

    def seek(self, to: str | Position) -> Awaitable[None]:
        """Go on from a position, a token, ``"now"``, ``"oldest"`` or ``"snapshot"``."""
        return self._core.call(self._plain.seek, to)

    def resnapshot(self, have: Held | None = None) -> Awaitable[None]:
        """Begin again with the present state; see :meth:`kvrep.Feed.resnapshot`."""
        return self._core.call(self._plain.resnapshot, have)

    def drop(self) -> Awaitable[None]:
        """Forget the feed altogether."""
        return self._core.call(self._plain.drop)

    def close(self) -> None:
        """End the iteration; the place stays. Idempotent, never waits."""
        if self._held is not None:
            self._held.close()

    async def __aenter__(self) -> Feed:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
