"""Many tasks, several loops, a slow disk and a full memtable, through the asyncio face."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import kvrep
import kvrep.aio
from kvrep.runtime.node import Node
from tests.replication_kit import FAST, Proxy, proxy, voters

WAIT_S = 30.0
BEATS = 50


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.001)


@contextmanager
def held(lock: Any) -> Iterator[threading.Event]:
    """Another thread holds ``lock`` until the event is set, or the block ends."""
    free, taken = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            free.wait(WAIT_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(WAIT_S)
    try:
        yield free
    finally:
        free.set()
        thread.join()


# -- a loop that is never blocked ----------------------------------------------------------------------


async def beats_meanwhile(waiting: Awaitable[Any], free: threading.Event) -> Any:
    """What ``waiting`` gives; it cannot end before ``free`` is set, which the loop does after some beats."""
    task = asyncio.ensure_future(waiting)
    for _ in range(BEATS):
        await asyncio.sleep(0.001)
        assert not task.done()
    assert not free.is_set()
    free.set()
    return await asyncio.wait_for(task, WAIT_S)


def test_writes_do_not_block_the_loop_while_the_disk_stands_still(store_path: Path) -> None:
    """With the log held up, every way to write waits while the loop goes on."""
    ways: list[Callable[[kvrep.aio.Store], Awaitable[Any]]] = [
        lambda db: db.put(b"k", b"v"),
        lambda db: db.delete(b"k"),
        lambda db: db.submit_put(b"k", b"v").result(),
        lambda db: db.update({b"k": b"v", b"l": b"w"}),
        lambda db: db.pop(b"k", None),
        lambda db: db.compare_and_set(b"n", expected=None, value=b"1"),
        lambda db: db.clear(),
        lambda db: db.reconfigure(ack_timeout_s=20.0),
    ]

    async def main() -> None:
        async with kvrep.aio.open(store_path, ack_timeout_s=WAIT_S) as db:
            await db.put(b"k", b"v")
            for way in ways:
                with held(db._core.node.engine.committer.lead) as free:
                    await beats_meanwhile(way(db), free)

    asyncio.run(main())


def test_the_first_write_does_not_block_the_loop(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise that begins an epoch is made on a thread, whichever kind of write comes first."""

    async def first(way: Callable[[kvrep.aio.Store], Awaitable[Any]]) -> None:
        async with kvrep.aio.open(store_path) as db:
            engine = db._core.node.engine
            free, begin = threading.Event(), engine.writable

            def slowly() -> None:
                assert free.wait(WAIT_S)
                begin()

            engine.writable = slowly
            await beats_meanwhile(way(db), free)

    asyncio.run(first(lambda db: db.put(b"k", b"v")))
    asyncio.run(first(lambda db: db.submit_put(b"k", b"v").result()))
    asyncio.run(first(lambda db: db.compare_and_set(b"n", expected=None, value=b"1")))


def test_flush_scan_snapshot_and_count_do_not_block_the_loop(store_path: Path) -> None:
    """While a flush, or whoever publishes, holds what they need, the loop goes on."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            await db.put(b"k", b"v")
            engine = db._core.node.engine

            async def scan() -> list[tuple[bytes, bytes]]:
                return [pair async for pair in db.scan()]

            async def snapshot() -> bytes | None:
                async with db.snapshot() as view:
                    value: bytes | None = await view.get(b"k")
                    return value

            with held(engine.view._lock) as free:
                assert await beats_meanwhile(scan(), free) == [(b"k", b"v")]
            with held(engine.view._lock) as free:
                assert await beats_meanwhile(snapshot(), free) == b"v"
            with held(engine.view._lock) as free:
                assert await beats_meanwhile(db.count(), free) == 1
            async with db.snapshot() as view:
                pinned = view._view._pinned
                with held(pinned._lock) as free:
                    assert await beats_meanwhile(view.get(b"k"), free) == b"v"
            free = threading.Event()
            before = engine.flusher._before
            engine.flusher._before = lambda: (free.wait(WAIT_S), before())[1]  # type: ignore[func-returns-value]
            await beats_meanwhile(db.flush(), free)

    asyncio.run(main())


def test_open_and_close_do_not_block_the_loop(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and closing, however long they take, leave the loop alone."""
    free = threading.Event()
    really_open, really_close = Node.open, Node.close

    def slow_open(*args: Any) -> Node:
        assert free.wait(WAIT_S)
        return really_open(*args)

    def slow_close(node: Node, timeout_s: float | None = None) -> None:
        assert free.wait(WAIT_S)
        really_close(node, timeout_s)

    async def opened() -> kvrep.aio.Store:
        return await kvrep.aio.open(store_path)

    async def main() -> None:
        monkeypatch.setattr(Node, "open", slow_open)
        db: kvrep.aio.Store = await beats_meanwhile(opened(), free)
        await db.put(b"k", b"v")
        free.clear()
        monkeypatch.setattr(Node, "close", slow_close)
        await beats_meanwhile(db.close(), free)
        assert db.closed

    asyncio.run(main())


def waited_for_a_cpu() -> float:
    """Seconds that the threads of this process were ready to run and had no CPU, all added up."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError):
            pass  # the thread has ended, or this kernel does not say
    return total / 1e9


def test_the_loop_beats_during_a_load_with_flushes(store_path: Path) -> None:
    """Under 64 writing tasks, flushes and scans, no beat of the loop is more than 50 ms late.

    Time for which other processes had the CPUs is not counted. Three attempts, because a machine can stall in
    ways that are not counted; a loop that the store blocks would be blocked in each.
    """
    gaps: list[float] = []

    async def beat(stop: asyncio.Event) -> float:
        worst = 0.0
        while not stop.is_set():
            last, starved = time.monotonic(), waited_for_a_cpu()
            await asyncio.sleep(0.005)
            late = time.monotonic() - last - 0.005
            if late > worst:
                worst = max(worst, late - (waited_for_a_cpu() - starved))
        return worst

    async def load(db: kvrep.aio.Store, attempt: int) -> float:
        rng = random.Random(attempt)
        value = rng.randbytes(100)
        stop = asyncio.Event()
        beating = asyncio.create_task(beat(stop))

        async def write() -> None:
            for _ in range(500):
                await db.put(rng.randbytes(16), value)

        async def read() -> None:
            while not stop.is_set():
                keys = [key async for key, _ in db.scan(limit=5000)]
                assert keys == sorted(keys)
                await db.flush()

        reading = asyncio.create_task(read())
        await asyncio.gather(*(write() for _ in range(64)))
        stop.set()
        await reading
        return await beating

    async def main() -> None:
        async with kvrep.aio.open(store_path, memtable_bytes=1 << 20) as db:
            for attempt in range(3):
                gaps.append(await load(db, attempt))
                if gaps[-1] < 0.05:
                    break
            assert db.status().flushes >= 3

    asyncio.run(main())
    assert min(gaps) < 0.05, gaps


# -- several loops, one order --------------------------------------------------------------------------


def test_transactions_of_two_loops_are_serializable(store_path: Path) -> None:
    """Tasks of two loops in two threads increment one counter, and none of the increments is lost."""
    tasks, rounds = 8, 10

    async def increment(db: kvrep.aio.Store) -> None:
        for _ in range(rounds):
            async with db.transaction() as txn:
                number = int(await txn.get(b"n", b"0"))
                await asyncio.sleep(0)
                txn.put(b"n", b"%d" % (number + 1))

    async def many(db: kvrep.aio.Store) -> None:
        await asyncio.wait_for(asyncio.gather(*(increment(db) for _ in range(tasks))), WAIT_S)

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            other = asyncio.create_task(asyncio.to_thread(asyncio.run, many(db)))
            await many(db)
            await other
            assert await db.get(b"n") == b"%d" % (2 * tasks * rounds)

    asyncio.run(main())


def test_two_loops_write_and_wait_for_each_other(store_path: Path) -> None:
    """Each loop reads what the other has written once it has waited for its position."""
    rounds = 200
    positions: dict[bytes, kvrep.Position] = {}

    async def talk(db: kvrep.aio.Store, mine: bytes, theirs: bytes) -> None:
        for i in range(rounds):
            positions[mine] = await db.put(mine, b"%d" % i)
            if theirs in positions:
                value = await db.get(theirs, at_least=positions[theirs])
                assert value is not None

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            other = asyncio.create_task(asyncio.to_thread(asyncio.run, talk(db, b"b", b"a")))
            future = db.submit_put(b"x", b"1")  # awaited on the other loop, too

            async def await_there() -> kvrep.Position:
                return await future

            there = await asyncio.to_thread(asyncio.run, await_there())
            assert there == await future
            await talk(db, b"a", b"b")
            await other
            assert await db.get(b"a") == await db.get(b"b") == b"%d" % (rounds - 1)

    asyncio.run(main())


def test_closing_on_one_loop_ends_the_waits_of_another(store_path: Path) -> None:
    """A task of another loop whose write hangs gets an error when the store is closed."""

    async def main() -> None:
        db = await kvrep.aio.open(store_path, ack_timeout_s=WAIT_S)
        await db.put(b"k", b"v")
        committer = db._core.node.engine.committer
        rule, committer.rule = committer.rule, lambda durable: 0  # nothing is committed any more

        async def hang() -> None:
            await db.put(b"l", b"w")

        other = asyncio.create_task(asyncio.to_thread(asyncio.run, hang()))
        await until(lambda: len(committer.pending) == 1, "it is not logged")
        await db.close(5.0)
        with pytest.raises(kvrep.UnknownOutcome):  # it is logged, and may be committed at the next open
            await other
        committer.rule = rule

    asyncio.run(main())


# -- outcomes ------------------------------------------------------------------------------------------


def test_unknown_is_not_refused(store_path: Path) -> None:
    """A write that is logged and not committed is AckTimeout with its position; resolve tells the rest."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            first = await db.put(b"k", b"v")
            committer = db._core.node.engine.committer
            rule, committer.rule = committer.rule, lambda durable: 0
            results = await asyncio.gather(
                *(db.put(b"k%d" % i, b"w", timeout_s=0.05) for i in range(20)), return_exceptions=True
            )
            assert all(type(result) is kvrep.AckTimeout for result in results), results
            positions = [result.position for result in results if isinstance(result, kvrep.AckTimeout)]
            assert [position.offset for position in positions] == list(range(3, 23))
            assert all(db.resolve(position) is kvrep.Outcome.PENDING for position in positions)
            assert db.position == first
            with pytest.raises(kvrep.AckTimeout):
                await db.submit_put(b"l", b"w").result(0.05)
            with pytest.raises(kvrep.AckTimeout):  # what it has read is not committed
                await db.compare_and_set(b"k0", expected=b"other", value=b"x", timeout_s=0.05)
            committer.rule = rule
            committer.advance()
            assert all(db.resolve(position) is kvrep.Outcome.COMMITTED for position in positions)
            assert await db.get(b"k19") == b"w"
            assert await db.count() == 22

    asyncio.run(main())


def test_refused_is_not_unknown(store_path: Path) -> None:
    """A write that no leader took in time is withdrawn: Overloaded, and never written."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            await db.put(b"k", b"v")
            committer = db._core.node.engine.committer
            with held(committer.lead):
                with pytest.raises(kvrep.Overloaded):
                    await db.put(b"k", b"never", timeout_s=0.05)
            assert await db.put(b"l", b"w") == (db.position.epoch, 3)
            assert await db.get(b"k") == b"v"

    asyncio.run(main())


def test_a_write_that_never_began_is_refused(store_path: Path) -> None:
    """A first write whose node does not begin in time is Overloaded, and never written."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            engine = db._core.node.engine
            free, begin = threading.Event(), engine.writable

            def slowly() -> None:
                assert free.wait(WAIT_S)
                begin()

            engine.writable = slowly
            with pytest.raises(kvrep.Overloaded):
                await db.put(b"k", b"never", timeout_s=0.05)
            free.set()
            await db.put(b"l", b"w")
            assert [key async for key in db] == [b"l"]

    asyncio.run(main())


def test_a_failed_disk_reaches_every_task(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the log cannot be written, all waiting tasks are told, each by its own error: refused or unknown."""

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            await db.put(b"k", b"v")
            engine = db._core.node.engine

            def broken(*args: Any, **kwargs: Any) -> None:
                raise OSError(5, "Input/output error")

            monkeypatch.setattr(engine.committer.log, "append", broken)
            writes = [db.put(b"%d" % i, b"w") for i in range(50)]
            results = await asyncio.gather(*writes, db.pop(b"k"), return_exceptions=True)
            assert all(isinstance(result, kvrep.StorageFailed) for result in results)
            open_ones = [result.position for result in results if isinstance(result, kvrep.LogFailed)]
            assert 1 <= len(open_ones) == len(set(open_ones))
            assert len({id(result) for result in results}) == 51
            assert await db.get(b"k") == b"v"

    asyncio.run(main())


def test_a_leader_that_was_interrupted_leaves_no_task_alone(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that was taken and not written is finished by the next leader, whom a waiting task asks for."""

    async def main() -> None:
        async with kvrep.aio.open(store_path, flush_interval_s=60.0, ack_timeout_s=WAIT_S) as db:
            await db.put(b"k", b"v")
            committer = db._core.node.engine.committer
            sleepers = committer._kick._cond._waiters  # type: ignore[attr-defined]
            await until(lambda: len(sleepers) == 1, "the background thread does not rest")
            monkeypatch.setattr(committer, "kick", lambda: None)  # nobody but the test leads now
            task = asyncio.create_task(db.put(b"l", b"w"))
            await asyncio.sleep(0)
            with committer.lead:
                assert committer._take() is not None
            monkeypatch.undo()
            assert (await asyncio.wait_for(task, 10.0)).offset == 3

    asyncio.run(main())


# -- bounds --------------------------------------------------------------------------------------------


@asynccontextmanager
async def without_flushes(path: Path) -> AsyncIterator[tuple[kvrep.aio.Store, Callable[[], None]]]:
    """A store with little memory whose flush stands still until the given function is called."""
    options: Any = {"memtable_bytes": 64 << 10, "memtable_bytes_max": 256 << 10}
    async with kvrep.aio.open(path, **options) as db:
        await db.put(b"k", b"v")
        flusher, free = db._core.node.engine.flusher, threading.Event()
        before = flusher._before

        def stand_still() -> None:
            free.wait(WAIT_S)
            before()

        flusher._before = stand_still
        try:
            yield db, free.set
        finally:
            free.set()


def test_writers_wait_for_the_flush(store_path: Path) -> None:
    """At the memtables' bound, putting tasks wait without thread or loss, and go on after the flush."""

    async def main() -> None:
        async with without_flushes(store_path) as (db, go_on):
            flusher = db._core.node.engine.flusher
            tasks = [asyncio.create_task(db.put(b"%04d" % i, b"v" * 1000)) for i in range(100)]
            await asyncio.wait(tasks, timeout=WAIT_S)  # one wave passes: each looked before all had written
            waves = 1
            while flusher.behind < 1.0:
                tasks = [asyncio.create_task(db.put(b"%04d" % i, b"v" * 1000)) for i in range(100)]
                await asyncio.wait(tasks, timeout=WAIT_S)
                waves += 1
                assert waves < 20
            threads = threading.active_count()
            waiting = [asyncio.create_task(db.put(b"w%04d" % i, b"v" * 1000)) for i in range(300)]
            for _ in range(20):
                await asyncio.sleep(0.005)
            assert not any(task.done() for task in waiting)
            assert threading.active_count() == threads
            with pytest.raises(kvrep.Overloaded):
                await db.put(b"x", b"never", timeout_s=0.05)
            with pytest.raises(kvrep.Overloaded):
                db.submit_put(b"x", b"never")
            with pytest.raises(kvrep.Overloaded):
                async with db.transaction(timeout_s=0.05) as txn:
                    txn.put(b"x", b"never")
            waiting[0].cancel()
            go_on()
            results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), WAIT_S)
            assert isinstance(results[0], asyncio.CancelledError)
            assert all(isinstance(result, kvrep.Position) for result in results[1:])
            assert b"x" not in db
            assert b"w0000" not in db

    asyncio.run(main())


def test_a_full_disk_refuses_and_heals(store_path: Path) -> None:
    """When flushing has no room, waiting writers get StorageFull; with room, writing goes on."""

    async def main() -> None:
        options: Any = {"memtable_bytes": 64 << 10, "memtable_bytes_max": 128 << 10}
        async with kvrep.aio.open(store_path, **options) as db:
            await db.put(b"k", b"v")
            engine = db._core.node.engine
            engine.tree.room_for = lambda *args: False

            async def fill() -> None:
                for i in range(500):
                    await db.put(b"%04d" % i, b"v" * 1000)

            with pytest.raises(kvrep.StorageFull):
                await fill()
            del engine.tree.room_for
            deadline = time.monotonic() + WAIT_S
            while True:
                try:
                    await db.put(b"healed", b"v")
                    break
                except kvrep.StorageFull:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)
            assert b"healed" in db

    asyncio.run(main())


def test_unfinished_writes_are_bounded(store_path: Path) -> None:
    """Pipelined writes that nobody lets finish are refused at uncommitted_bytes_max; all others are kept."""

    async def main() -> None:
        async with kvrep.aio.open(store_path, uncommitted_bytes_max=64 << 10) as db:
            await db.put(b"k", b"v")
            futures: list[kvrep.aio.WriteFuture] = []

            def pipeline() -> None:
                for i in range(1000):
                    futures.append(db.submit_put(b"%04d" % i, b"v" * 1000))

            with held(db._core.node.engine.committer.lead), pytest.raises(kvrep.Overloaded):
                pipeline()
            assert 40 <= len(futures) <= 66  # what a write counts as includes some overhead
            await asyncio.gather(*futures)
            assert await db.count() == 1 + len(futures)

    asyncio.run(main())


# -- nothing is left -----------------------------------------------------------------------------------


def test_a_store_leaves_no_object_or_thread(store_path: Path) -> None:
    """After close, and once it is dropped, nothing keeps the store, its node or its loops' waits alive."""
    alive: list[weakref.ref[Any]] = []

    async def use() -> None:
        async with kvrep.aio.open(store_path) as db:
            await asyncio.gather(*(db.put(b"%d" % i, b"v") for i in range(100)))
            async for _ in db.scan(limit=1):
                break
            async with db.snapshot() as view:
                await view.get(b"1")
            alive.extend(map(weakref.ref, (db, db._core, db._core.node, db._core.here())))
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvrep")]
        assert names == []
        timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        assert [timer for timer in timers if not timer.cancelled()] == []

    asyncio.run(use())
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_a_forked_child_is_told(store_path: Path) -> None:
    """In the child of a fork every use raises ForkedError, closing does nothing, the parent goes on."""

    async def child(db: kvrep.aio.Store) -> None:
        uses: list[Callable[[], Awaitable[Any]]] = [
            lambda: db.put(b"k", b"w"),
            lambda: db.get(b"k"),
            lambda: db.pop(b"k", None),
            db.count,
            db.flush,
        ]
        for use_it in uses:
            with pytest.raises(kvrep.ForkedError):
                await use_it()
        await db.close()

    async def main() -> None:
        async with kvrep.aio.open(store_path) as db:
            await db.put(b"k", b"v")
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    asyncio.events._set_running_loop(None)
                    asyncio.run(asyncio.wait_for(child(db), 10))
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            await db.put(b"k", b"w")
            assert await db.get(b"k") == b"w"

    asyncio.run(main())


def test_a_restarted_primary_does_not_hold_the_loop(tmp_path: Path) -> None:
    """While it cannot tell yet which of its last writes count, a read waits and the loop goes on."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as p:
        with kvrep.open(tmp_path / "b", name="b", follow=p.address, **FAST):
            voters(p, "a", "b")
            p.reconfigure(ack_timeout_s=0.5)
            p.put(b"k", b"v")
            shutil.copytree(tmp_path / "a", tmp_path / "crashed")  # as kill -9 would have left it

    async def main() -> None:
        async with kvrep.aio.open(tmp_path / "crashed", name="a", listen="127.0.0.1:0", **FAST) as again:
            beats = 0

            async def beat() -> None:
                nonlocal beats
                while True:
                    beats += 1
                    await asyncio.sleep(0.001)

            beating = asyncio.create_task(beat())
            for read in (again.get(b"k"), again[b"k"]):
                before = beats
                with pytest.raises(kvrep.StaleRead, match="cannot tell yet"):
                    await read
                assert beats - before > 20
            reading = asyncio.create_task(again.get(b"k", timeout_s=WAIT_S))
            beating.cancel()
            address = again.address
            opening = asyncio.to_thread(kvrep.open, tmp_path / "b", name="b", follow=address, **FAST)
            with await opening:
                with contextlib.suppress(kvrep.StaleRead):
                    assert await reading == b"v"
                await until(lambda: not again._core.withheld, "the epoch start is not committed")
                assert await again.get(b"k") == b"v"

    asyncio.run(main())


def test_writes_that_wait_for_more_copies_hold_up_nobody(tmp_path: Path) -> None:
    """However many ask for a copy that a silent follower does not make, each ends at its own deadline, calls that
    need a thread go on meanwhile, and once the follower answers such writes return."""

    async def main(db: kvrep.aio.Store, link: Proxy) -> None:
        kept = db.keyspace("kept", keep_before=True)
        more: dict[str, Any] = {"acks": 1, "level": "visible"}
        for space in (db, kept):
            await space.put(b"k", b"v", timeout_s=WAIT_S, **more)
        link.hold()
        began = time.monotonic()

        async def write(i: int) -> tuple[BaseException, float]:
            space = kept if i % 2 else db
            try:
                if i % 5:
                    await space.put(b"%d" % i, b"v", timeout_s=1.0, **more)
                else:
                    await space.delete(b"k", timeout_s=1.0, **more)
            except kvrep.Error as error:
                return error, time.monotonic() - began
            raise AssertionError("the follower is silent")

        writes = [asyncio.create_task(write(i)) for i in range(50)]
        await asyncio.sleep(0)
        await db.flush(WAIT_S)
        flushed_s = time.monotonic() - began
        ends = await asyncio.gather(*writes)
        assert {type(error) for error, _ in ends} == {kvrep.AckTimeout}
        assert {(error.reached, error.needed) for error, _ in ends} == {(1, 2)}
        assert min(at for _, at in ends) >= 0.9
        assert max(flushed_s, *(at for _, at in ends)) < 5.0
        assert not db._core.node.shipping.followers._wanted
        link.release()
        for space in (db, kept):
            await space.put(b"k", b"w", timeout_s=WAIT_S, **more)

    async def serve() -> None:
        slow = {**FAST, "heartbeat_timeout_s": 60.0}
        async with kvrep.aio.open(tmp_path / "a", name="a", listen="127.0.0.1:0", **slow) as db:
            with proxy(db.address) as link:
                b = await asyncio.to_thread(kvrep.open, tmp_path / "b", name="b", follow=link.address, **slow)
                try:
                    await asyncio.to_thread(voters, db._sync, "a", "b")
                    await main(db, link)
                finally:
                    await asyncio.to_thread(b.close)

    asyncio.run(serve())


def test_status_reads_no_files_on_the_loop(tmp_path: Path) -> None:
    """How far a follower is behind that is not served from memory is known without holding the loop."""
    options: dict[str, Any] = {"name": "a", "listen": "127.0.0.1:0", "acks": 0, **FAST}
    with kvrep.open(tmp_path / "a", **options) as a:
        with kvrep.open(tmp_path / "b", name="b", follow=a.address, **FAST):
            voters(a, "a", "b")
        for i in range(40):
            a.put(b"%d" % i, b"x" * 10_000)

    async def main() -> None:
        async with kvrep.aio.open(tmp_path / "a", **options) as db:
            await until(lambda: db.status().followers != (), "the slot is not known")
            engine_log = db._core.node.engine.committer.log
            with held(engine_log._files_lock) as free:
                began = time.monotonic()
                [gone] = db.status().followers
                assert time.monotonic() - began < 5
                assert not free.is_set()
                assert gone.lag_records >= 40
            await until(lambda: db.status().followers[0].lag_bytes > 400_000, "nobody measures")
            [gone] = db._sync.status().followers
            assert gone.lag_bytes > 400_000
            assert gone.lag_s > 0
            assert abs(db.status().followers[0].lag_s - gone.lag_s) < 5

    asyncio.run(main())


def test_a_cancelled_write_says_where_it_is(tmp_path: Path) -> None:
    """However its task waits for an ack, and whether it is cancelled or runs out of time, the write that goes on can
    be asked for by the position that the error has."""
    slow = {**FAST, "heartbeat_timeout_s": 60.0, "listen": "127.0.0.1:0"}

    async def transaction(db: kvrep.aio.Store) -> None:
        async with db.transaction() as txn:
            txn.put(b"t", await txn.get(b"k") or b"")

    async def end_once_logged(db: kvrep.aio.Store, limit: asyncio.Timeout) -> None:
        await until(lambda: len(db._core.node.engine.committer.pending) == 1, "the write is not logged")
        limit.reschedule(asyncio.get_running_loop().time())

    async def main(db: kvrep.aio.Store, link: Proxy) -> None:
        await db.put(b"k", b"v")
        for way in (
            lambda: db.put(b"p", b"v"),
            lambda: db.submit_put(b"f", b"v").result(),
            lambda: transaction(db),
        ):
            link.hold()
            last = db.status().last_offset
            task = asyncio.ensure_future(way())
            await until(lambda: len(db._core.node.engine.committer.pending) == 1, "the write is not logged")
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as cancelled:
                await task
            position = getattr(cancelled.value, "position", None)
            assert position == kvrep.Position(db.status().epoch, last + 1)
            assert db.resolve(position) is kvrep.Outcome.PENDING
            link.release()
            await until(
                lambda position=position: db.resolve(position) is kvrep.Outcome.COMMITTED,
                "it is not committed",
            )
        link.hold()
        with pytest.raises(TimeoutError) as late:
            async with asyncio.timeout(None) as limit:
                ending = asyncio.ensure_future(end_once_logged(db, limit))
                await db.put(b"late", b"v")
        await ending
        assert isinstance(getattr(late.value.__context__, "position", None), kvrep.Position)
        link.release()

    async def serve() -> None:
        async with kvrep.aio.open(tmp_path / "a", name="a", acks=1, ack_timeout_s=WAIT_S, **slow) as db:
            with proxy(db.address) as link:
                b = await asyncio.to_thread(kvrep.open, tmp_path / "b", name="b", follow=link.address, **slow)
                try:
                    await asyncio.to_thread(voters, db._sync, "a", "b")
                    await main(db, link)
                finally:
                    await asyncio.to_thread(b.close)

    asyncio.run(serve())
