"""Feeds of the asyncio face: the twins of :class:`kvrep.Changes` and :class:`kvrep.Feed`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

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


class _Steps:
    """What is read on the reading thread, until a task takes it: no cancelled task takes changes with it."""

    def __init__(self, core: Core, read: Callable[[float], list[Change]], behind: Callable[[], bool]) -> None:
        self._core = core
        self._read = read
        self._behind = behind
        self._found: list[Change] = []
        """Filled on the reading thread, step by step; emptied on the loop."""

    async def poll(self, over: Callable[[], bool], timeout_s: float) -> list[Change]:
        """The next changes; no thread waits for them meanwhile."""
        core = self._core
        deadline_s = time.monotonic() + timeout_s
        while True:
            shown = core.node.engine.view.last
            await core.read(self._step)
            found, self._found = self._found, []
            left = deadline_s - time.monotonic()
            if found or over() or left <= 0:
                return found
            if not self._behind():
                await core.moved_beyond(shown, min(left, LOOK_UP_S))

    def forget(self) -> None:
        """Drop what no task has taken."""
        self._found = []

    def _step(self) -> None:
        if not self._found:
            self._found.extend(self._read(0.0))


class Changes:
    """An ordered stream of changes: ``async for change in db.changes(…)``, or ``await poll()``.

    As :class:`kvrep.Changes`; no thread is held while it waits. One task at a time reads it; what was read for a
    task that was cancelled is given to the next one.
    """

    def __init__(self, core: Core, plain: PlainChanges) -> None:
        self._core = core
        self._plain = plain
        self._steps = _Steps(core, plain.poll, lambda: plain.behind)

    async def __aiter__(self) -> AsyncIterator[Change]:
        while not self._plain.over:
            for change in await self.poll(LOOK_UP_S):
                yield change

    async def poll(self, timeout_s: float = 1.0) -> list[Change]:
        """The next changes; none when there are none after ``timeout_s``, or at the end."""
        if self._core.node.closing:
            raise ClosedError("the store is closed")
        return await self._steps.poll(lambda: self._plain.over, timeout_s)

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
        self._steps: _Steps | None = None

    @property
    def _plain(self) -> PlainFeed:
        if self._held is None:
            raise ClosedError("the feed is not open", hint='use "async with", or await it')
        return self._held

    async def _open(self) -> Feed:
        if self._held is None:
            plain = self._held = await self._core.call(self._make)
            self._steps = _Steps(self._core, plain.read_quietly, lambda: plain.behind)
        return self

    def __await__(self) -> Any:
        return self._open().__await__()

    async def __aiter__(self) -> AsyncIterator[Change]:
        plain = self._plain
        while not plain.closed:
            for change in await self._read(LOOK_UP_S):
                plain.handed_out(change)
                yield change

    async def poll(self, timeout_s: float = 1.0) -> list[Change]:
        """The next changes; none after ``timeout_s`` without any, while paused, and when it is closed."""
        changes = await self._read(timeout_s)
        if changes:
            self._plain.handed_out(changes[-1])
        return changes

    async def _read(self, timeout_s: float) -> list[Change]:
        plain, steps = self._plain, self._steps
        assert steps is not None
        return await steps.poll(lambda: plain.closed, timeout_s)

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

    async def seek(self, to: str | Position) -> None:
        """Go on from a position, a token, ``"now"``, ``"oldest"`` or ``"snapshot"``."""
        await self._core.call(self._plain.seek, to)
        self._forget()

    async def resnapshot(self, have: Held | None = None) -> None:
        """Begin again with the present state; see :meth:`kvrep.Feed.resnapshot`."""
        await self._core.call(self._plain.resnapshot, have)
        self._forget()

    def _forget(self) -> None:
        if self._steps is not None:
            self._steps.forget()

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
