"""Feeds of the asyncio face: the same stream, no thread that waits, nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

import kvrep
import kvrep.aio
from kvrep.testing.checkers import assert_none, check_feed

WAIT_S = 20.0


def test_changes_come_as_they_are_written(memory_store: Path) -> None:
    """Readers and writers on one loop: every change once, in order, several readers at once."""

    async def main() -> None:
        async with kvrep.aio.open(memory_store) as db:

            async def read() -> list[int]:
                got: list[int] = []
                async with db.changes() as changes:
                    async for change in changes:
                        got.append(int(change.key))
                        if got[-1] == 300:
                            break
                return got

            readers = [asyncio.ensure_future(read()) for _ in range(20)]
            for i in range(1, 301):
                await db.put(b"%d" % i, b"")
            waiting = [t.name for t in threading.enumerate() if t.name.startswith("kvrep-aio-read")]
            assert len(waiting) <= 1
            for got in await asyncio.wait_for(asyncio.gather(*readers), WAIT_S):
                assert_none(check_feed(got, last=300))

    asyncio.run(main())


def test_tokens_snapshots_stop_and_errors(memory_store: Path) -> None:
    """Arguments and errors are those of the other face."""

    async def main() -> None:
        async with kvrep.aio.open(memory_store) as db:
            async with db.transaction() as txn:
                txn.put(b"a", b"1")
                txn.emit("t", b"m", headers={"x": "y"})
            async with db.batch() as batch:
                batch.put(b"b", b"2")
                batch.emit("t", b"n")
            changes = [c async for c in db.changes(stop=db.position)]
            assert [c.value for c in changes] == [b"1", b"m", b"2", b"n"]
            rest = [c async for c in db.changes(stop=db.position, resume=changes[0].resume)]
            assert [c.value for c in rest] == [b"m", b"2", b"n"]
            async with db.changes(snapshot=True) as rows:
                kinds = []
                async for change in rows:
                    kinds.append(change.kind)
                    if change.kind == "end":
                        break
                assert kinds == ["begin", "put", "put", "end"]
                assert await rows.poll(0.01) == []
                assert rows.position == db.position
                assert rows.token
            with pytest.raises(ValueError, match="one of"):
                db.changes(after=db.position, snapshot=True)
            with pytest.raises(kvrep.InvalidToken):
                db.changes(resume="k1")
            with pytest.raises(kvrep.Truncated):
                await db.changes(after=kvrep.Position(1, 1)).poll()

    asyncio.run(main())


def test_named_feeds(memory_store: Path) -> None:
    """A feed keeps its place over a restart; pause, seek, resnapshot and drop do what they say."""

    async def write() -> None:
        async with kvrep.aio.open(memory_store) as db, db.feed("f", keyspace="default") as feed:
            for i in range(1, 21):
                await db.put(b"%d" % i, b"")
            got = 0
            async for change in feed:
                got += 1
                if got == 10:
                    assert await feed.ack(change) is not None
                    break
            assert (await feed.info()).position == change.position

    async def read() -> None:
        async with kvrep.aio.open(memory_store) as db:
            feed = await db.feed("f")
            assert [int(c.key) for c in await feed.poll()] == list(range(11, 21))
            await feed.ack()
            await feed.pause()
            await db.put(b"21", b"")
            assert await feed.poll(0.05) == []
            await feed.resume()
            assert [int(c.key) for c in await feed.poll(WAIT_S)] == [21]
            await feed.seek("oldest")
            assert len(await feed.poll(WAIT_S)) == 21
            await feed.resnapshot(have=[("default", b"1", b"")])
            kinds: list[str] = []
            while kinds[-1:] != ["end"]:
                kinds += [c.kind for c in await feed.poll(WAIT_S)]
            assert kinds == ["begin", *["put"] * 20, "end"]
            assert [f.name for f in await db.feeds()] == [feed.name]
            await feed.drop()
            assert await db.feeds() == []
            feed.close()

    asyncio.run(write())
    asyncio.run(read())


def test_values_before(memory_store: Path) -> None:
    """Every way to write a keyspace that keeps them tells what was there before."""

    async def main() -> None:
        async with kvrep.aio.open(memory_store) as db:
            kept = db.keyspace("kept", keep_before=True)
            await kept.put(b"a", b"1")
            await asyncio.gather(*(kept.put(b"a", b"2") for _ in range(3)))
            await kept.submit_put(b"a", b"3")
            async with kept.transaction() as txn:
                txn.put(b"a", b"4")
            async with kept.batch() as batch:
                batch.put(b"a", b"5")
            await kept.delete(b"a", timeout_s=5)
            async with kept.transaction() as txn:
                await txn.get(b"a")
                with pytest.raises(kvrep.Overloaded):
                    kept.submit_put(b"b", b"")
            told = [(c.value, c.before) async for c in db.changes(stop=db.position, before=True)]
            assert [v for v, _ in told] == [b"1", b"2", b"2", b"2", b"3", b"4", b"5", None]
            assert [b for _, b in told] == [None, *(v for v, _ in told[:-1])]

    asyncio.run(main())


def test_closing_and_cancelling(memory_store: Path) -> None:
    """A closed store raises in its readers; a cancelled reader leaves nothing behind."""

    async def main() -> None:
        db = await kvrep.aio.open(memory_store)
        await db.put(b"a", b"1")

        async def read() -> None:
            async for _ in db.changes():
                pass

        first, second = asyncio.ensure_future(read()), asyncio.ensure_future(read())
        while len(db._core._watches) < 2:
            await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await db.close()
        with pytest.raises(kvrep.ClosedError):
            await asyncio.wait_for(second, WAIT_S)
        with pytest.raises(kvrep.ClosedError):
            db.changes()

    asyncio.run(main())


def test_a_reader_that_leaves_nearly_all_out_does_not_dawdle(memory_store: Path) -> None:
    """Pieces without anything that is wanted are read one after the other, without waiting between them."""

    async def main() -> None:
        async with kvrep.aio.open(memory_store, durability="os") as db:
            for _ in range(20):
                async with db.batch() as batch:
                    for i in range(1000):
                        batch.put(b"%d" % i, bytes(1000))
            await db.put(b"wanted", b"")
            steps = 0
            async with db.changes(prefix=b"w") as changes, db.feed("f", prefix=b"w") as feed:
                real = db._core.moved_beyond

                async def counted(shown: int, timeout_s: float) -> None:
                    nonlocal steps
                    steps += 1
                    await real(shown, timeout_s)

                db._core.moved_beyond = counted  # type: ignore[method-assign]
                assert [c.key for c in await changes.poll(WAIT_S)] == [b"wanted"]
                assert [c.key for c in await feed.poll(WAIT_S)] == [b"wanted"]
            assert steps == 0

    asyncio.run(main())


def test_a_cancelled_poll_loses_nothing(memory_store: Path) -> None:
    """What was read for a task that was cancelled is handed out to the next one, and acked only then."""

    async def main() -> None:
        async with kvrep.aio.open(memory_store) as db, db.feed("f") as feed, db.changes() as changes:
            for i in range(1, 11):
                await db.put(b"%d" % i, b"")
            for stream in (feed, changes):
                for _ in range(20):
                    task = asyncio.ensure_future(stream.poll())
                    await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            assert await feed.ack() is None, "nothing was handed out"
            assert [int(c.key) for c in await changes.poll(WAIT_S)] == list(range(1, 11))
            assert [int(c.key) for c in await feed.poll(WAIT_S)] == list(range(1, 11))
            assert await feed.ack() is not None

    asyncio.run(main())
