"""Feeds and writes that are made on a follower and done at the primary (``forward_writes``)."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

import kvrep
import kvrep.aio
from kvrep import Change
from kvrep.testing.checkers import assert_none, check_feed
from tests.forward_kit import group
from tests.replication_kit import FAST, WAIT_S, until


def all_of(db: kvrep.Store) -> list[Change]:
    with db.changes(stop=db.position, before=True) as changes:
        return [change for change in changes if change.position.offset > 1]


def test_forwarded_writes_show_in_every_feed(tmp_path: Path) -> None:
    """Puts, transactions and batches of a follower, messages and former values included, are in the stream of
    every node, once and as of the primary."""
    with group(tmp_path, 1, "ab") as (_, (a, b)):
        kept = b.keyspace("kept", keep_before=True)
        b.put(b"plain", b"1")
        with b.transaction() as txn:
            txn.put(b"x", b"1")
            txn.emit("orders", b"m1", headers={"a": "b"})
        with b.batch() as batch:
            batch.put(b"y", b"1")
            batch.emit("orders", b"m2")
        with b.transaction() as txn:
            txn.emit("orders", b"m3")
        assert txn.position is not None
        kept.put(b"k", b"1")
        kept.put(b"k", b"2")
        with kept.batch() as batch:
            batch.put(b"k", b"3")
            batch.emit("orders", b"m4")
        kept.delete(b"k")
        kept.submit_put(b"k", b"4").result(WAIT_S)
        b.wait_for(a.position, WAIT_S)
        streams = [[c._replace(origin=None) for c in all_of(db)] for db in (a, b)]
    assert streams[0] == streams[1]
    assert [c.value for c in streams[0] if c.kind == "emit"] == [b"m1", b"m2", b"m3", b"m4"]
    told = [(c.value, c.before, c.created) for c in streams[0] if c.keyspace == "kept"]
    assert told == [
        (b"1", None, True), (b"2", b"1", False), (b"3", b"2", False), (None, b"3", False), (b"4", None, True),
    ]  # fmt: skip


def test_former_values_are_right_when_two_nodes_write_one_key(tmp_path: Path) -> None:
    """Each write tells what the one before it left, whichever node made it."""
    with group(tmp_path, 1, "ab") as (_, nodes):
        problems: list[BaseException] = []

        def write(db: kvrep.Store, name: bytes) -> None:
            kept = db.keyspace("kept", keep_before=True)
            try:
                for i in range(25):
                    kept.put(b"k", b"%s%d" % (name, i), timeout_s=WAIT_S)
            except BaseException as error:
                problems.append(error)

        threads = [
            threading.Thread(target=write, args=(db, n)) for db, n in zip(nodes, (b"a", b"b"), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert problems == []
        told = [(c.value, c.before) for c in all_of(nodes[0])]
    assert len(told) == 50
    assert [before for _, before in told] == [None, *(value for value, _ in told[:-1])]


def test_a_feed_is_read_and_acked_on_a_follower(tmp_path: Path) -> None:
    """Made, read, acked, paused and moved on a follower: all of it is done at the primary."""
    with group(tmp_path, 1, "ab") as (_, (a, b)):
        with b.feed("f", keyspace="default") as feed:
            for i in range(1, 31):
                b.put(b"%d" % i, b"v")
            got: list[int] = []
            while len(got) < 30:
                got += [int(c.key) for c in feed.poll()]
            assert_none(check_feed(got, last=30))
            position = feed.ack()
            assert position is not None
            assert a.feeds()[0].position == feed.position
            feed.pause()
            assert a.feeds()[0].paused
            feed.resume()
            feed.seek("oldest")
            assert len(feed.poll(WAIT_S)) == 30
            assert feed.ack(wait=False) is None
            until(lambda: a.feeds()[0].lag_records < 30, what="the ack without waiting")


def test_the_asyncio_face_forwards_them_too(tmp_path: Path) -> None:
    """Messages and former values of an asyncio follower arrive."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", acks=1, **FAST) as a:

        async def main() -> None:
            async with kvrep.aio.open(
                tmp_path / "b", name="b", follow=a.address, forward_writes=True, **FAST
            ) as b:
                async with asyncio.timeout(WAIT_S):
                    while not await _settled(a):
                        await asyncio.sleep(0.01)
                kept = b.keyspace("kept", keep_before=True)
                async with b.transaction() as txn:
                    txn.put(b"x", b"1")
                    txn.emit("t", b"m")
                await kept.put(b"k", b"1")
                async with kept.transaction() as txn:
                    txn.put(b"k", b"2")
                async with kept.batch() as batch:
                    batch.put(b"k", b"3")
                    batch.emit("t", b"n")
                with pytest.raises(kvrep.NotPrimary):
                    kept.submit_put(b"k", b"4")

        async def _settled(db: kvrep.Store) -> bool:
            status = db.status()
            return len(status.voters) == 2 and not status.not_writable

        asyncio.run(main())
        changes = all_of(a)
    assert [c.value for c in changes if c.kind == "emit"] == [b"m", b"n"]
    assert [(c.value, c.before) for c in changes if c.keyspace == "kept"] == [
        (b"1", None), (b"2", b"1"), (b"3", b"2"),
    ]  # fmt: skip
