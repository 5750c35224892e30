"""Tasks of the asyncio face are cancelled at every point where they wait."""

from __future__ import annotations

import asyncio
import threading
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest

import kvrep
import kvrep.aio
from kvrep.runtime.node import Node

WAIT_S = 20.0
STEPS_MAX = 60


@types.coroutine
def cancelled_at(step: int, inner: Coroutine[Any, Any, None]) -> Generator[Any, Any, bool]:
    """Run ``inner``; its task is cancelled where it waits for the ``step``-th time. False if it never did."""
    reached, error = 0, None
    while True:
        try:
            waited_for = inner.send(None) if error is None else inner.throw(error)
        except StopIteration:
            return reached > step
        if reached == step:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        reached += 1
        try:
            error = None
            yield waited_for
        except BaseException as thrown:  # it belongs to the inner coroutine
            error = thrown


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.001)


async def check_whole(db: kvrep.aio.Store) -> None:
    """The writer's place is free, nothing is pinned or waited for, and the store writes and reads."""
    engine = db._core.node.engine
    async with asyncio.timeout(WAIT_S):
        async with db.transaction() as txn:
            txn[b"probe"] = await txn.get(b"probe", b"") + b"."
        await db.put(b"other", b"1")
    committer = engine.committer
    assert committer._holder is None
    assert not committer._queue
    assert not db._core._watches
    waits = db._core.here()
    await until(lambda: not waits._waits, "a wait is left")
    await until(lambda: not engine.view._snapshots, "a snapshot is left")
    assert await db.count() >= 2


async def fill(db: kvrep.aio.Store) -> None:
    await db.update({b"%03d" % i: b"old" for i in range(200)})


async def transaction(db: kvrep.aio.Store) -> None:
    async with db.transaction() as txn:
        assert await txn.get(b"000") is not None
        txn.put(b"000", b"new")
        txn.put(b"001", b"new")
        _ = [pair async for pair in txn.scan()]
        await asyncio.sleep(0)


async def batch(db: kvrep.aio.Store) -> None:
    async with db.batch() as collected:
        collected.put(b"000", b"new")
        collected.put(b"001", b"new")
        await asyncio.sleep(0)


async def snapshot(db: kvrep.aio.Store) -> None:
    async with db.snapshot() as view:
        _ = [pair async for pair in view.scan()]
        await view.count()


async def submit(db: kvrep.aio.Store) -> None:
    future = db.submit_put(b"000", b"new")
    await future


async def scan(db: kvrep.aio.Store) -> None:
    assert len([pair async for pair in db.scan()]) >= 200


async def wait_for(db: kvrep.aio.Store) -> None:
    position = await db.put(b"first", b"v")
    db.submit_put(b"second", b"v")
    await db.wait_for(kvrep.Position(position.epoch, position.offset + 1))


async def both(db: kvrep.aio.Store) -> None:
    await db.update({b"000": b"new", b"001": b"new"})


def done(value: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, None]:
    async def run() -> None:
        await value

    return run()


OPERATIONS: dict[str, Callable[[kvrep.aio.Store], Coroutine[Any, Any, None]]] = {
    "put": lambda db: done(db.put(b"000", b"new")),
    "delete": lambda db: done(db.delete(b"000")),
    "submit": submit,
    "update": both,
    "batch": batch,
    "transaction": transaction,
    "compare_and_set": lambda db: done(db.compare_and_set(b"000", expected=b"old", value=b"new")),
    "pop": lambda db: done(db.pop(b"000", None)),
    "setdefault": lambda db: done(db.setdefault(b"new", b"new")),
    "popitem": lambda db: done(db.popitem()),
    "clear": lambda db: done(db.clear()),
    "scan": scan,
    "snapshot": snapshot,
    "count": lambda db: done(db.count()),
    "flush": lambda db: done(db.flush()),
    "reconfigure": lambda db: done(db.reconfigure(ack_timeout_s=4.0)),
    "wait_for": wait_for,
}


@pytest.mark.parametrize("fresh", [False, True], ids=["begun", "first"])
@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_cancelled_at_every_await(store_path: Path, operation: str, fresh: bool) -> None:
    """Cancelled at its 1st, 2nd, … wait, an operation raises CancelledError and leaves the store whole.

    ``fresh``: each time in a store in which nothing was written since it was opened.
    """

    async def attempt(db: kvrep.aio.Store, step: int) -> bool:
        task = asyncio.create_task(cancelled_at(step, OPERATIONS[operation](db)))
        was_cancelled = False
        try:
            await asyncio.wait_for(task, WAIT_S)
        except asyncio.CancelledError:
            was_cancelled = True
        pairs = {await db.get(b"000"), await db.get(b"001")} if operation in ATOMIC else set()
        assert len(pairs) <= 1 or was_cancelled
        await check_whole(db)
        if operation in ATOMIC:
            assert await db.get(b"000") == await db.get(b"001")
        return was_cancelled

    async def main() -> None:
        steps = 0
        db = await kvrep.aio.open(store_path, memtable_bytes=64 << 10)
        await fill(db)
        while True:
            if fresh:
                await db.close()
                db = await kvrep.aio.open(store_path, memtable_bytes=64 << 10)
            else:
                await fill(db)
            if not await attempt(db, steps):
                break
            steps += 1
            assert steps < STEPS_MAX
        await db.close()
        assert steps >= 1

    asyncio.run(main())


ATOMIC = {"update", "batch", "transaction"}


@pytest.mark.parametrize("operation", ["transaction", "compare_and_set", "pop", "popitem", "setdefault"])
def test_cancelled_while_waiting_for_the_place(store_path: Path, operation: str) -> None:
    """A task that is cancelled in the queue for the writer's place leaves it; those behind it go on."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            await fill(db)
            committer = db._core.node.engine.committer
            async with db.transaction() as holder:
                await holder.get(b"000")
                waiting = [asyncio.create_task(OPERATIONS[operation](db)) for _ in range(3)]
                await until(lambda: len(committer._queue) == 3, "they do not queue")
                waiting[1].cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting[1]
                assert len(committer._queue) == 2
            await asyncio.wait_for(asyncio.gather(waiting[0], waiting[2]), WAIT_S)
            await check_whole(db)

    asyncio.run(main())


def test_cancelled_just_as_the_place_is_granted(store_path: Path) -> None:
    """When place and cancellation come in the same step of the loop, the place is given back."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            await fill(db)
            holder = db.transaction()
            await holder.get(b"000")
            waiting = asyncio.create_task(transaction(db))
            committer = db._core.node.engine.committer
            await until(lambda: len(committer._queue) == 1, "it does not queue")
            holder._plain.end(commit=False)  # the grant is on its way to the loop
            assert committer._holder is not None
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await check_whole(db)
            assert await db.get(b"001") == b"old"

    asyncio.run(main())


def test_an_error_in_the_block_gives_the_place_back(store_path: Path) -> None:
    """A TaskGroup whose sibling fails cancels a transaction in its block; nothing of it is written."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            await fill(db)
            inside = asyncio.Event()

            async def held() -> None:
                async with db.transaction() as txn:
                    await txn.get(b"000")
                    txn.put(b"000", b"never")
                    inside.set()
                    await asyncio.Event().wait()

            async def failing() -> None:
                await inside.wait()
                raise LookupError

            with pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(held())
                    group.create_task(failing())
            await check_whole(db)
            assert await db.get(b"000") == b"old"

    asyncio.run(main())


def test_a_submitted_write_survives_its_waiting_tasks(store_path: Path) -> None:
    """Cancelling a task that awaits a submitted write leaves the future, which later tells the outcome."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            await fill(db)
            committer = db._core.node.engine.committer
            free, held = threading.Event(), threading.Event()

            def hold() -> None:
                with committer.lead:
                    held.set()
                    free.wait(WAIT_S)

            thread = threading.Thread(target=hold)
            thread.start()
            assert held.wait(WAIT_S)
            future = db.submit_put(b"000", b"new")

            async def wait() -> kvrep.Position:
                return await future

            tasks = [asyncio.create_task(wait()) for _ in range(3)]
            await asyncio.sleep(0)
            for task in tasks[:2]:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert not future.done()
            free.set()
            assert await tasks[2] == await future == await future.result()
            thread.join()
            assert await db.get(b"000") == b"new"
            await check_whole(db)

    asyncio.run(main())


def test_open_is_cancelled_at_every_await(store_path: Path) -> None:
    """A store whose opening was cancelled is closed again, and can be opened."""

    async def enter() -> None:
        async with kvrep.aio.open(store_path) as db:
            await db.put(b"k", b"v")

    async def main() -> None:
        steps = 0
        while True:
            task = asyncio.create_task(cancelled_at(steps, enter()))
            try:
                await task
                break
            except asyncio.CancelledError:
                steps += 1
            deadline = time.monotonic() + WAIT_S
            while True:  # closing goes on in the background
                try:
                    async with kvrep.aio.open(store_path):
                        break
                except kvrep.StoreInUse:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)
        assert steps >= 2

    asyncio.run(main())


def test_open_cancelled_at_the_last_moment(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled after the store was opened and before its task learns of it, it is closed all the same."""
    opened, really_open = threading.Event(), Node.open

    def open_node(*arguments: Any) -> Node:
        node = really_open(*arguments)
        opened.set()
        return node

    monkeypatch.setattr(Node, "open", open_node)

    async def main() -> None:
        opening: asyncio.Task[kvrep.aio.Store] = asyncio.ensure_future(as_task(kvrep.aio.open(store_path)))
        await asyncio.sleep(0)
        assert opened.wait(WAIT_S)  # the loop stands still here, so it does not learn of the store
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                async with kvrep.aio.open(store_path):
                    return
            except kvrep.StoreInUse:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

    asyncio.run(main())


async def as_task(waited_for: Awaitable[kvrep.aio.Store]) -> kvrep.aio.Store:
    return await waited_for


def test_a_cancelled_close_goes_on(store_path: Path) -> None:
    """Cancelling a task that closes the store does not stop it; another close waits for its end."""

    async def main() -> None:
        db = await kvrep.aio.open(store_path)
        await fill(db)
        closing = asyncio.create_task(db.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await asyncio.wait_for(db.close(), WAIT_S)
        assert db.closed
        async with kvrep.aio.open(store_path) as again:
            assert await again.count() == 200

    asyncio.run(main())
