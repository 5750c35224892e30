"""The asyncio face: a twin of the other one, what each method does, how its tasks are told."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import kvrep
import kvrep.aio
from kvrep.aio.waiting import LoopWaits
from kvrep.storage.write import Write, complete_all

WAIT_S = 20.0


def use(path: Path, body: Callable[[kvrep.aio.Store], Awaitable[None]], **options: Any) -> None:
    """Run ``body`` with an open store."""

    async def main() -> None:
        async with kvrep.aio.open(path, **options) as db, asyncio.timeout(WAIT_S):
            await body(db)

    asyncio.run(main())


# -- the twins -----------------------------------------------------------------------------------------

INTERNAL = {"Transaction": {"end", "placed"}, "Snapshot": {"busy", "closed"}}
"""Public by name only: what the asyncio face itself calls on the other one."""
ADDED = {"Keyspace": {"count"}, "Store": {"count"}, "Snapshot": {"count"}}
"""``len()`` cannot be awaited."""


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize("name", ["Store", "Keyspace", "Batch", "Transaction", "Snapshot", "WriteFuture"])
def test_both_faces_have_the_same_names(name: str) -> None:
    """Each public class has the same public names in both faces, but for the few listed above."""
    ours = public(getattr(kvrep.aio, name)) - ADDED.get(name, set())
    theirs = public(getattr(kvrep, name)) - INTERNAL.get(name, set())
    assert ours == theirs


@pytest.mark.parametrize("name", ["Store", "Keyspace", "Batch", "Transaction", "Snapshot", "WriteFuture"])
def test_both_faces_take_the_same_parameters(name: str) -> None:
    """Each method takes the same parameters, in the same order, with the same defaults."""
    here, there = getattr(kvrep.aio, name), getattr(kvrep, name)
    compared = 0
    for method in sorted(public(here) & public(there)):
        ours, theirs = inspect.getattr_static(here, method), inspect.getattr_static(there, method)
        assert isinstance(ours, property) == isinstance(theirs, property), method
        if isinstance(ours, property) or not callable(ours):
            continue
        compared += 1
        assert shape(ours) == shape(theirs), method
    assert compared >= 2


def shape(function: Any) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter; private sentinels all look alike."""

    def plain(default: Any) -> Any:
        return "sentinel" if type(default) is object else default

    return [(p.name, p.kind, plain(p.default)) for p in inspect.signature(function).parameters.values()]


def test_open_takes_the_same_options() -> None:
    """``kvrep.aio.open`` has the signature of ``kvrep.open``."""
    assert shape(kvrep.aio.open) == shape(kvrep.open)


# -- opening and closing -------------------------------------------------------------------------------


def test_open_can_be_awaited_and_entered(store_path: Path) -> None:
    """Both ways to open give a store, which keeps its data from one to the other."""

    async def main() -> None:
        db = await kvrep.aio.open(store_path)
        await db.put(b"k", b"v")
        await db.close()
        async with kvrep.aio.open(store_path) as db:
            assert await db.get(b"k") == b"v"
            assert not db.closed
        assert db.closed
        async with await kvrep.aio.open(store_path) as db:
            assert await db[b"k"] == b"v"
        assert db.closed

    asyncio.run(main())


def test_a_refused_open_leaves_no_thread(store_path: Path) -> None:
    """What open raises comes out as it is, and its thread ends."""

    async def main() -> None:
        with pytest.raises(kvrep.NotAStore):
            await kvrep.aio.open(store_path, create=False)
        with pytest.raises(kvrep.ConfigurationMismatch):
            await kvrep.aio.open(store_path, durability="never")  # type: ignore[arg-type]
        async with kvrep.aio.open(store_path):
            with pytest.raises(kvrep.StoreInUse):
                await kvrep.aio.open(store_path)

    asyncio.run(main())


def test_close_is_idempotent_and_ends_every_use(store_path: Path) -> None:
    """Closing twice, and at the same time, is one close; afterwards everything raises ClosedError."""

    async def main() -> None:
        db = await kvrep.aio.open(store_path)
        later = kvrep.Position((await db.put(b"k", b"v")).epoch, 10_000)
        await asyncio.gather(db.close(), db.close(), db.close())
        await db.close()
        uses: list[Callable[[], Awaitable[Any]]] = [
            lambda: db.put(b"k", b"w"),
            lambda: db.get(b"k"),
            lambda: db.pop(b"k"),
            db.count,
            db.flush,
            db.clear,
            lambda: db.wait_for(later),
            lambda: anext(aiter(db.scan())),  # type: ignore[arg-type]
            lambda: db.snapshot().__aenter__(),
        ]
        for use_it in uses:
            with pytest.raises(kvrep.ClosedError):
                await use_it()
        with pytest.raises(kvrep.ClosedError):
            db.submit_put(b"k", b"w")

    asyncio.run(main())


def test_close_ends_what_waits(store_path: Path) -> None:
    """Tasks that wait for a position, or for the writer's place, get ClosedError when the store closes."""

    async def main() -> None:
        db = await kvrep.aio.open(store_path)
        await db.put(b"k", b"v")
        holder = db.transaction()
        await holder.get(b"k")
        tasks = [
            asyncio.create_task(db.wait_for(kvrep.Position(db.position.epoch, 999), timeout_s=60)),
            asyncio.create_task(db.compare_and_set(b"k", expected=b"v", value=b"w", timeout_s=60)),
        ]
        await asyncio.sleep(0)
        began = time.monotonic()
        await db.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [kvrep.ClosedError, kvrep.ClosedError]
        assert time.monotonic() - began < 15

    asyncio.run(main())


# -- what the methods do -------------------------------------------------------------------------------


def test_writes_return_growing_positions_and_reads_see_them(store_path: Path) -> None:
    """put, delete, get, item, ``in`` and count agree with each other."""

    async def body(db: kvrep.aio.Store) -> None:
        first = await db.put(b"a", b"1")
        second = await db.put(b"b", b"2")
        assert second > first
        assert db.position == second
        assert await db.get(b"a") == b"1"
        assert await db.get(b"z") is None
        assert await db.get(b"z", b"none") == b"none"
        assert b"b" in db
        assert await db.count() == 2
        await db.delete(b"a")
        assert b"a" not in db
        with pytest.raises(KeyError):
            await db[b"a"]
        assert db.resolve(second) is kvrep.Outcome.COMMITTED
        assert db.status().position == db.position

    use(store_path, body)


def test_conditional_writes(store_path: Path) -> None:
    """compare_and_set, put_if_absent, setdefault, pop and popitem are what they are in the other face."""

    async def body(db: kvrep.aio.Store) -> None:
        assert await db.put_if_absent(b"k", b"1") is not None
        assert await db.put_if_absent(b"k", b"2") is None
        assert await db.compare_and_set(b"k", expected=b"2", value=b"3") is None
        assert await db.compare_and_set(b"k", expected=b"1", value=b"3") is not None
        assert await db.setdefault(b"k", b"9") == b"3"
        assert await db.setdefault(b"l", b"9") == b"9"
        assert await db.pop(b"k") == b"3"
        assert await db.pop(b"k", None) is None
        with pytest.raises(KeyError):
            await db.pop(b"k")
        assert await db.popitem() == (b"l", b"9")
        with pytest.raises(KeyError):
            await db.popitem()
        assert await db.compare_and_set(b"n", expected=None, value=b"1") is not None
        assert await db.compare_and_set(b"n", expected=b"1", value=None) is not None
        assert await db.count() == 0

    use(store_path, body)


def test_scans_in_both_directions_and_in_bounds(store_path: Path) -> None:
    """scan, keys, items, values and ``async for`` give sorted pairs, over more than one step."""
    expected = [(b"%05d" % i, b"%d" % i) for i in range(3000)]

    async def body(db: kvrep.aio.Store) -> None:
        await db.update(dict(expected[:2000]))
        await db.flush()
        await db.update(expected[2000:])
        assert [pair async for pair in db.scan()] == expected
        assert [pair async for pair in db.scan(reverse=True)] == expected[::-1]
        assert [pair async for pair in db.scan(start=b"00100", stop=b"02100")] == expected[100:2100]
        assert [key async for key in db] == [key for key, _ in expected]
        keys = db.keys()
        assert [key async for key in keys] == [key for key, _ in expected]
        assert [value async for value in db.values()] == [value for _, value in expected]
        assert [pair async for pair in db.items()] == expected
        assert [key async for key, _ in db.scan(prefix=b"0012", limit=3)] == [b"00120", b"00121", b"00122"]
        with pytest.raises(TypeError):
            [pair async for pair in db.scan(prefix="text")]  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="limit"):
            [pair async for pair in db.scan(limit=-1)]
        await db.clear()
        assert await db.count() == 0

    use(store_path, body)


def test_keyspaces_and_codecs(store_path: Path) -> None:
    """A keyspace is a map of its own, and its codec is applied on every way in and out."""

    async def body(db: kvrep.aio.Store) -> None:
        users = db.keyspace("users", codec=kvrep.codecs.MSGPACK)
        await users.put(b"u", {"name": "Ada"})
        assert await users.get(b"u") == {"name": "Ada"}
        assert [pair async for pair in users.scan()] == [(b"u", {"name": "Ada"})]
        assert b"u" not in db
        assert db.keyspaces() == ["default", "users"]
        async with db.transaction() as txn:
            txn.emit("topic", b"only a message")
        assert txn.position is not None
        assert txn.position == db.position
        await users.put(b"none", None)
        assert await users.put_if_absent(b"none", 1) is None
        assert await users.compare_and_set(b"none", expected=None, value=1) is None
        assert await users.setdefault(b"none", 1) is None
        assert b"none" in users
        assert await users.pop(b"none") is None
        assert b"none" not in users
        assert await users.put_if_absent(b"none", None) is not None
        await users.pop(b"none")
        async with db.transaction() as txn:
            txn.put(b"v", {"n": 1}, keyspace=users)
            assert await txn.get(b"v", keyspace=users) == {"n": 1}
        async with db.batch() as batch:
            batch.put(b"w", [2], keyspace=users)
            batch.delete(b"u", keyspace=users)
        async with db.snapshot() as view:
            assert await view.get(b"v", keyspace=users) == {"n": 1}
            assert [key async for key, _ in view.scan(keyspace=users)] == [b"v", b"w"]
        with pytest.raises(kvrep.InvalidKeyspace):
            db.keyspace("Not Allowed")

    use(store_path, body)


def test_a_snapshot_stays_at_its_position(store_path: Path) -> None:
    """What is written after a snapshot was taken is not in it; closed, it raises."""

    async def body(db: kvrep.aio.Store) -> None:
        await db.put(b"k", b"old")
        async with db.snapshot() as view:
            position = view.position
            await db.put(b"k", b"new")
            await db.put(b"l", b"new")
            await db.flush()
            assert await view.get(b"k") == await view[b"k"] == b"old"
            assert [pair async for pair in view.scan()] == [(b"k", b"old")]
            assert [key async for key in view] == [b"k"]
            assert await view.count() == 1
            assert view.position == position < db.position
            with pytest.raises(KeyError):
                await view[b"l"]
        with pytest.raises(kvrep.ClosedError):
            await view.get(b"k")
        again = await db.snapshot()
        assert await again.get(b"k") == b"new"
        await again.close()
        await again.close()
        with pytest.raises(kvrep.ClosedError):
            db.snapshot().position  # noqa: B018 - reading it is the test

    use(store_path, body)


def test_a_transaction_reads_its_own_writes_and_rolls_back(store_path: Path) -> None:
    """Writes of a transaction are seen by it alone until it commits; an exception drops them."""

    async def body(db: kvrep.aio.Store) -> None:
        await db.put(b"a", b"1")
        async with db.transaction() as txn:
            txn[b"b"] = await txn[b"a"] + b"2"
            await txn.put(b"c", b"3")  # may be awaited, need not
            txn.delete(b"a")
            assert await txn.get(b"b") == b"12"
            assert [pair async for pair in txn.scan()] == [(b"b", b"12"), (b"c", b"3")]
            assert b"b" not in db
            assert txn.position is None
        assert txn.position == db.position
        assert [pair async for pair in db.scan()] == [(b"b", b"12"), (b"c", b"3")]
        with pytest.raises(ZeroDivisionError):
            async with db.transaction() as txn:
                txn[b"b"] = b"lost"
                await txn.get(b"c")
                _ = 1 / 0
        assert await db[b"b"] == b"12"
        with pytest.raises(kvrep.ClosedError):
            txn.put(b"x", b"y")
        with pytest.raises(kvrep.ClosedError):
            await txn.get(b"x")

    use(store_path, body)


def test_concurrent_reads_of_one_transaction(store_path: Path) -> None:
    """``gather`` over the first reads of a transaction asks for the place once."""

    async def body(db: kvrep.aio.Store) -> None:
        await db.update({b"%d" % i: b"v" for i in range(20)})
        async with db.transaction() as blocker:
            await blocker.get(b"0")
            async with asyncio.TaskGroup() as group:

                async def many() -> list[bytes]:
                    async with db.transaction() as txn:
                        return await asyncio.gather(*(txn[b"%d" % i] for i in range(20)))

                reading = group.create_task(many())
                for _ in range(10):  # every read has begun
                    await asyncio.sleep(0)
                assert len(db._core.node.engine.committer._queue) == 1
                await blocker.__aexit__(None, None, None)
        assert reading.result() == [b"v"] * 20
        async with db.transaction(timeout_s=5.0) as after:  # asked for once, so it is free again
            assert await after.get(b"0") == b"v"

    use(store_path, body, ack_timeout_s=60.0)  # so that a read that waits in vain is noticed


def test_a_batch_is_one_record(store_path: Path) -> None:
    """All of a batch has one position; an exception drops it; an empty one writes nothing."""

    async def body(db: kvrep.aio.Store) -> None:
        before = await db.put(b"a", b"1")
        async with db.batch() as batch:
            batch.put(b"b", b"2")
            await batch.delete(b"a")
            assert len(batch) == 2
        assert batch.position == kvrep.Position(before.epoch, before.offset + 1)
        with pytest.raises(ZeroDivisionError):
            async with db.batch() as batch:
                batch.put(b"c", b"3")
                _ = 1 / 0
        async with db.batch() as batch:
            pass
        assert batch.position is None
        assert [key async for key in db] == [b"b"]

    use(store_path, body)


def test_pipelined_writes(store_path: Path) -> None:
    """submit keeps the order; its future may be awaited often, in several tasks, and calls back."""

    async def body(db: kvrep.aio.Store) -> None:
        futures = [db.submit_put(b"k", b"%d" % i) for i in range(100)]  # no epoch has begun
        loop = asyncio.get_running_loop()
        called: asyncio.Future[tuple[Any, int]] = loop.create_future()
        futures[50].add_done_callback(lambda f: called.set_result((f, threading.get_ident())))
        positions = await asyncio.gather(*futures)
        assert positions == sorted(positions)
        assert positions == [await future.result() for future in futures]
        assert await asyncio.gather(futures[3], futures[3], futures[3].result(1.0)) == [positions[3]] * 3
        assert await db[b"k"] == b"99"
        assert await called == (futures[50], threading.get_ident())
        gone = db.submit_delete(b"k")
        assert await gone.exception() is None
        assert gone.done()
        assert b"k" not in db

    use(store_path, body)


def test_refusals_come_before_anything_is_written(store_path: Path) -> None:
    """Wrong keys and values, and a node that may not write, raise what they raise in the other face."""

    async def body(db: kvrep.aio.Store) -> None:
        with pytest.raises(TypeError):
            await db.put("text", b"v")  # type: ignore[arg-type]
        with pytest.raises(kvrep.InvalidKey):
            await db.put(b"", b"v")
        with pytest.raises(kvrep.KeyTooLong):
            db.submit_put(b"k" * 512, b"v")
        with pytest.raises(kvrep.ValueTooLarge):
            await db.put(b"k", b"v" * 2000)
        with pytest.raises(kvrep.NotPrimary):
            await db.put(b"k", b"v", acks=1)
        engine = db._core.node.engine

        def refuse() -> None:
            raise kvrep.NotPrimary("a follower")

        writable, engine.writable = engine.writable, refuse  # asked on a thread: no epoch has begun
        with pytest.raises(kvrep.NotPrimary):
            await db.put(b"k", b"v")
        assert isinstance(await db.submit_put(b"k", b"v").exception(), kvrep.NotPrimary)
        with pytest.raises(kvrep.NotPrimary):
            await db.pop(b"k", None)
        engine.writable = writable
        await db.put(b"k", b"v")
        engine.writable = refuse  # asked at once: an epoch has
        with pytest.raises(kvrep.NotPrimary):
            await db.put(b"k", b"v")
        with pytest.raises(kvrep.NotPrimary):
            db.submit_put(b"k", b"v")
        engine.writable = writable
        assert db.status().last_offset == db.position.offset == 2

    use(store_path, body, value_bytes_max=1000)


def test_waiting_for_a_position(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wait_for and at_least end with the commit, or as StaleRead or RolledBack; no thread is involved."""
    monkeypatch.setattr("kvrep.aio.core.LOOK_UP_S", 2 * WAIT_S)  # the commit tells them, nothing else

    async def body(db: kvrep.aio.Store) -> None:
        position = await db.put(b"a", b"1")
        await db.wait_for(position)
        later = kvrep.Position(position.epoch, position.offset + 2)
        names = {t.name for t in threading.enumerate()}
        waiting = [asyncio.create_task(db.wait_for(later, timeout_s=60)) for _ in range(50)]
        reading = asyncio.create_task(db.get(b"c", at_least=later, timeout_s=60))
        await asyncio.sleep(0)
        assert {t.name for t in threading.enumerate()} == names
        await db.put(b"b", b"2")
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await db.put(b"c", b"3")
        await asyncio.gather(*waiting)
        assert await reading == b"3"
        with pytest.raises(kvrep.StaleRead) as stale:
            await db.wait_for(kvrep.Position(position.epoch, 999), timeout_s=0.01)
        assert stale.value.wanted == (position.epoch, 999)
        with pytest.raises(kvrep.StaleRead):
            await db.get(b"a", at_least=kvrep.Position(position.epoch, 999), timeout_s=0.01)
        with pytest.raises(kvrep.RolledBack):
            await db.wait_for(kvrep.Position(position.epoch - 1000, 2))
        with pytest.raises(kvrep.StaleRead):  # of an epoch that this node may still hear of
            await db.wait_for(kvrep.Position(position.epoch + 1000, 1), timeout_s=0.01)
        with pytest.raises(TypeError):
            await db.wait_for(None)  # type: ignore[arg-type]
        assert not db._core._watches

    use(store_path, body)


def test_reconfigure(store_path: Path) -> None:
    """A changed configuration is a record, and its ack timeout is in force afterwards."""

    async def body(db: kvrep.aio.Store) -> None:
        await db.put(b"k", b"v")
        position = await db.reconfigure(ack_timeout_s=7.5)
        assert position.offset == 3
        assert db.status().ack_timeout_s == 7.5
        with pytest.raises(ValueError, match="ghost"):
            await db.remove_voter("ghost")
        with pytest.raises(ValueError, match="acks"):
            await db.reconfigure(acks=-1)

    use(store_path, body)


def test_the_wrong_words_say_so(store_path: Path) -> None:
    """``for``, ``len``, ``in`` where they would have to wait are TypeErrors, not silence."""

    async def body(db: kvrep.aio.Store) -> None:
        things: list[Any] = [db, db.transaction(), db.snapshot()]
        for thing in things:
            with pytest.raises(TypeError):
                iter(thing)
            with pytest.raises(TypeError):
                len(thing)
        for thing in things[1:]:
            with pytest.raises(TypeError):
                b"k" in thing  # noqa: B015 - that it raises is the test
        with pytest.raises(TypeError):
            things[0][b"k"] = b"v"

    use(store_path, body)


# -- how tasks are told --------------------------------------------------------------------------------


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often other threads wake it."""

    woken = 0

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        self.woken += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def run_counting(main: Callable[[CountingLoop], Coroutine[Any, Any, None]]) -> None:
    loop = CountingLoop()
    try:
        loop.run_until_complete(main(loop))
    finally:
        loop.close()


def test_one_wake_up_per_group() -> None:
    """Writes that end together wake the loop once, from whatever thread."""

    async def main(loop: CountingLoop) -> None:
        waits = LoopWaits(loop, lambda: 0, lambda: None)
        writes = [Write(0, (), 1) for _ in range(500)]
        for write in writes:
            write.inbox = waits
        futures = [waits.wait(write, time.monotonic() + WAIT_S) for write in writes]
        thread = threading.Thread(target=complete_all, args=(writes,))
        thread.start()
        await asyncio.gather(*futures)
        thread.join()
        assert loop.woken == 1
        waits.stop()
        await asyncio.sleep(0)

    run_counting(main)


def test_one_timer_for_all_deadlines() -> None:
    """A thousand waits share a timer; each ends at its own deadline, the earliest first."""

    async def main(loop: CountingLoop) -> None:
        waits = LoopWaits(loop, lambda: 0, lambda: None)
        now = time.monotonic()
        late = [waits.wait(Write(0, (), 1), now + WAIT_S) for _ in range(1000)]
        soon = waits.wait(Write(0, (), 1), now + 0.02)
        live = [handle for handle in loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
        assert len(live) == 1
        await asyncio.wait_for(soon, WAIT_S)
        assert time.monotonic() - now >= 0.02
        assert not any(future.done() for future in late)
        waits.stop()
        await asyncio.gather(*late)

    run_counting(main)


def test_a_cancelled_wait_is_forgotten() -> None:
    """The entry of a cancelled task goes away, whether its write ends or not."""

    async def main(loop: CountingLoop) -> None:
        waits = LoopWaits(loop, lambda: 0, lambda: None)
        ending, hanging = Write(0, (), 1), Write(0, (), 1)
        for write in (ending, hanging):
            write.inbox = waits
            waits.wait(write, time.monotonic() + WAIT_S).cancel()
        ending.complete()
        deadline = time.monotonic() + WAIT_S
        while ending in waits or hanging in waits:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    run_counting(main)


def test_a_closed_loop_troubles_nobody() -> None:
    """A write that ends after its loop was closed is complete all the same."""
    loop = asyncio.new_event_loop()
    waits = LoopWaits(loop, lambda: 0, lambda: None)
    loop.close()
    write = Write(0, (), 1)
    write.inbox = waits
    write.complete()
    waits.stop()
    assert write.done


def test_closed_loops_are_forgotten(store_path: Path) -> None:
    """A store used by one short-lived loop after another keeps no trace of those that are gone."""
    db = asyncio.run(opened(store_path))

    async def put() -> None:
        await db.put(b"k", b"v")

    for _ in range(5):
        asyncio.run(put())
    assert len(db._core._loops) == 1
    asyncio.run(db.close())


async def opened(path: Path) -> kvrep.aio.Store:
    return await kvrep.aio.open(path)
