"""Forwarded writes and linearizable reads in the asyncio face: the same outcomes, and the loop stays free."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import kvrep
import kvrep.aio
from kvrep import Outcome
from tests.forward_kit import forwarded_records
from tests.replication_kit import FAST, WAIT_S, until, voters


@asynccontextmanager
async def pair(
    folder: Path, **options: Any
) -> AsyncIterator[tuple[kvrep.Store, kvrep.aio.Store, kvrep.Store]]:
    """A primary ``a``, an asyncio follower ``b`` and a third voter ``c``."""
    options = {**FAST, "listen": "127.0.0.1:0", "forward_writes": True, **options}
    a = kvrep.open(folder / "a", name="a", acks=1, **options)
    c = kvrep.open(folder / "c", name="c", follow=a.address, **options)
    try:
        async with kvrep.aio.open(folder / "b", name="b", follow=a.address, **options) as b:
            await asyncio.to_thread(voters, a, "a", "b", "c")
            yield a, b, c
    finally:
        c.close()
        a.close()


def test_every_write(tmp_path: Path) -> None:
    """All ways to write, from one task and from many."""

    async def main() -> None:
        async with pair(tmp_path) as (a, b, _):
            position = await b.put(b"k", b"1")
            assert await b[b"k"] == b"1"
            assert a.resolve(position) is Outcome.COMMITTED
            async with b.batch() as batch:
                batch.put(b"x", b"2")
                batch.delete(b"k")
            async with b.transaction() as txn:
                txn[b"y"] = await txn[b"x"] + b"!"
                assert [pair async for pair in txn.scan()] == [(b"x", b"2"), (b"y", b"2!")]
            assert txn.position is not None
            assert await b[b"y"] == b"2!"
            assert await b.compare_and_set(b"x", expected=b"2", value=b"3") is not None
            assert await b.compare_and_set(b"x", expected=b"2", value=b"4") is None
            assert await b.setdefault(b"x", b"5") == b"3"
            assert await b.pop(b"x") == b"3"
            assert await b.popitem() == (b"y", b"2!")
            with pytest.raises(KeyError):
                await b.pop(b"x")
            futures = [b.submit_put(b"f%d" % i, b"v") for i in range(100)]
            positions = [await future for future in futures]
            assert positions == sorted(positions)
            await asyncio.gather(*(b.put(b"g%d" % i, b"v", acks="all") for i in range(50)))
            assert await b.count() == a.keyspace("default").__len__() == 150
            with pytest.raises(kvrep.TransactionConflict):
                async with b.transaction() as txn:
                    txn[b"n"] = await txn[b"f1"]
                    await asyncio.to_thread(a.put, b"f1", b"changed")
            assert a.get(b"n") is None

    asyncio.run(main())


def test_increments_of_many_tasks(tmp_path: Path) -> None:
    """Tasks on a follower and a thread on the primary count together; compare_and_set settles every race."""

    async def main() -> None:
        async with pair(tmp_path) as (a, b, _):
            await b.put(b"n", b"0")

            async def count() -> None:
                for _ in range(10):
                    while True:
                        now = await b[b"n"]
                        if await b.compare_and_set(b"n", expected=now, value=b"%d" % (int(now) + 1)):
                            break

            def count_here() -> None:
                for _ in range(20):
                    with a.transaction() as txn:
                        txn[b"n"] = b"%d" % (int(txn[b"n"]) + 1)

            await asyncio.gather(*(count() for _ in range(4)), asyncio.to_thread(count_here))
            assert a[b"n"] == b"60"

    asyncio.run(main())


def test_the_loop_is_free_while_a_write_waits(tmp_path: Path) -> None:
    """The primary's place is taken: writes, transactions and reads wait, and the loop turns as before."""

    async def main() -> None:
        async with pair(tmp_path) as (a, b, _):
            await b.put(b"k", b"0")
            owner = object()
            assert a._node.engine.committer.take_place(owner, lambda: None)
            tasks = [asyncio.create_task(b.put(b"k%d" % i, b"v")) for i in range(5)]

            async def transact() -> None:
                async with b.transaction() as txn:
                    txn[b"t"] = await txn[b"k"]

            tasks.append(asyncio.create_task(transact()))  # type: ignore[arg-type]
            longest = 0.0
            for _ in range(100):
                began = time.monotonic()
                await asyncio.sleep(0.005)
                longest = max(longest, time.monotonic() - began)
            assert not any(task.done() for task in tasks)
            a._node.engine.committer.leave_place(owner, None)
            await asyncio.gather(*tasks)
            assert longest < 0.25
            assert (a[b"t"], a[b"k4"]) == (b"0", b"v")

    asyncio.run(main())


def test_outcomes(tmp_path: Path) -> None:
    """Unknown with a request id that settle() ends; cancelled tasks leave everything whole; refused in time."""

    async def main() -> None:
        async with pair(tmp_path) as (a, b, c):
            owner = object()
            assert a._node.engine.committer.take_place(owner, lambda: None)
            with pytest.raises(kvrep.AckTimeout) as caught:
                await b.put(b"k", b"v", timeout_s=0.3)
            committer = a._node.engine.committer

            def waiting() -> int:
                return len(committer._behind) + len(committer._queue)

            before = waiting()
            task = asyncio.create_task(b.put(b"cancelled", b"v"))
            async with asyncio.timeout(WAIT_S):
                while waiting() == before:  # until it has come to the primary
                    await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            request = caught.value.request
            assert b.resolve(request) is Outcome.PENDING
            a._node.engine.committer.leave_place(owner, None)
            outcome = await b.settle(request, timeout_s=WAIT_S)
            assert outcome is Outcome.COMMITTED
            await b.put(b"after", b"v")
            assert len({s for _, s, _ in forwarded_records(a)}) == len(forwarded_records(a))
            a.close()
            c.close()
            until(lambda: not b.status().source.connected)
            with pytest.raises(kvrep.NotPrimary):
                await b.put(b"k", b"v", timeout_s=0.3)

    asyncio.run(main())


def test_writers_see_no_error_through_switchovers(tmp_path: Path) -> None:
    """Tasks write through the asyncio follower while it, and others, become primary and follower again."""

    async def main() -> None:
        async with pair(tmp_path) as (a, b, c):
            stop = asyncio.Event()
            done = [0, 0, 0]

            async def put() -> None:
                while not stop.is_set():
                    await b.put(b"p%d" % done[0], b"v")
                    done[0] += 1

            async def add() -> None:
                while not stop.is_set():
                    try:
                        async with b.transaction() as txn:
                            txn[b"sum"] = b"%d" % (int(await txn.get(b"sum", b"0")) + 1)
                        done[1] += 1
                    except kvrep.TransactionConflict as conflict:
                        await b.wait_for(conflict.position)

            async def submit() -> None:
                while not stop.is_set():
                    for future in [b.submit_put(b"s%d-%d" % (done[2], j), b"v") for j in range(5)]:
                        await future
                    done[2] += 1

            async def switch() -> None:
                for store, to in ((a, "b"), (b, "c"), (c, "b"), (b, "a")):
                    if isinstance(store, kvrep.aio.Store):
                        await store.switchover(to, timeout_s=WAIT_S)
                    else:
                        await asyncio.to_thread(store.switchover, to, timeout_s=WAIT_S)
                    before = list(done)
                    deadline = time.monotonic() + WAIT_S
                    while any(now <= then + 3 for now, then in zip(done, before, strict=True)):
                        assert time.monotonic() < deadline
                        await asyncio.sleep(0.005)
                stop.set()

            await asyncio.gather(put(), add(), submit(), switch())
            await asyncio.to_thread(a.wait_for, b.position, WAIT_S)
            assert int(a[b"sum"]) == done[1]
            assert all(a.get(b"p%d" % i) == b"v" for i in range(done[0]))
            assert all(a.get(b"s%d-%d" % (i, j)) == b"v" for i in range(done[2]) for j in range(5))

    asyncio.run(main())


def test_linearizable_reads_share_questions(tmp_path: Path) -> None:
    """A hundred tasks read at once; each sees what was written before, for a few questions in all."""

    async def main() -> None:
        async with pair(tmp_path) as (a, b, _):
            for i in range(5):
                await asyncio.to_thread(a.put, b"k", b"%d" % i)
                rounds = a._node.shipping.followers.rounds.wanted
                reads = [b.get(b"k", consistency="linearizable") for _ in range(100)]
                assert set(await asyncio.gather(*reads)) == {b"%d" % i}
                assert a._node.shipping.followers.rounds.wanted - rounds <= 5
            assert [p async for p in b.scan(consistency="linearizable")] == [(b"k", b"4")]
            async with b.snapshot(consistency="linearizable") as view:
                assert await view[b"k"] == b"4"
            with pytest.raises(ValueError, match="consistency"):
                await b.get(b"k", consistency="eventual")  # type: ignore[call-overload]
            a.close()
            began = time.monotonic()
            with pytest.raises((kvrep.StaleRead, kvrep.NotPrimary)):
                await b.get(b"k", consistency="linearizable", timeout_s=0.3)
            assert time.monotonic() - began < 3.0

    asyncio.run(main())
    assert not [t for t in threading.enumerate() if t.name.startswith("kvrep-forward")]


def test_a_cancelled_write_says_what_to_settle(tmp_path: Path) -> None:
    """A task that is cancelled while the primary has its write gets the request id, and by it the outcome."""

    async def main() -> None:
        async with pair(tmp_path) as (a, b, _):
            await b.put(b"k", b"v")
            committer = a._node.engine.committer
            with committer.lead:
                task = asyncio.ensure_future(b.put(b"k", b"w", timeout_s=WAIT_S))
                await asyncio.to_thread(until, lambda: committer.busy)
                task.cancel()
                with pytest.raises(asyncio.CancelledError) as cancelled:
                    await task
            request = getattr(cancelled.value, "request", None)
            assert isinstance(request, kvrep.RequestId)
            assert await b.settle(request, timeout_s=WAIT_S) is Outcome.COMMITTED
            assert a.get(b"k") == b"w"

    asyncio.run(main())
