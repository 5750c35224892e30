"""The public face as users type it. Never executed: `mypy --strict` reads it (`make types`)."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import kvrep
from kvrep import Position


def alone() -> None:
    with kvrep.open("orders", durability="sync", flush_interval_s=1.0) as db:
        position: Position = db.put(b"k", b"v")
        value: bytes = db[b"k"]
        maybe: bytes | None = db.get(b"k")
        text: bytes | str = db.get(b"k", default="none")
        pairs: Iterator[tuple[bytes, bytes]] = db.scan(prefix=b"user/", reverse=True, limit=3)
        mapping: MutableMapping[bytes, bytes] = db
        with db.transaction() as txn:
            txn[b"a"] = txn.get(b"b", b"") + b"!"
        with db.batch() as batch:
            batch.put(b"a", b"1")
        done: Position | None = db.compare_and_set(b"k", expected=b"v", value=None)
        with db.snapshot() as view:
            at: Position = view.position
        future: kvrep.WriteFuture = db.submit_put(b"k", b"v")
        later: Position = future.result(timeout=1.0)
        users: kvrep.Keyspace[Any] = db.keyspace("users", codec=kvrep.codecs.MSGPACK)
        names: kvrep.Keyspace[str] = db.keyspace("names", codec=kvrep.codecs.TEXT)
        name: str = names[b"ada"]
        outcome: kvrep.Outcome = db.resolve(position)
        status: kvrep.Status = db.status()
    del value, maybe, text, pairs, mapping, done, at, later, users, name, outcome, status


def feeds() -> None:
    with kvrep.open("orders") as db:
        users: kvrep.Keyspace[str] = db.keyspace("users", codec=kvrep.codecs.TEXT, keep_before=True)
        with db.transaction() as txn:
            txn.put(b"k", b"v")
            txn.emit("topic", b"payload", headers={"a": "b"})
        for change in db.changes(Position(1001, 1), keyspace=["users"], prefix=b"u", before=True):
            place: Position = change.position
            value: bytes | None = change.value
            token: str = change.resume
        changes: kvrep.Changes = db.changes(snapshot=True, transform=lambda change: change)
        some: list[kvrep.Change] = changes.poll(timeout_s=0.1)
        with db.feed("billing", after=db.position) as feed:
            acked: Position | None = feed.ack(some[0], wait=False)
            feed.resnapshot(have=[("default", b"k", b"v")])
        known: list[kvrep.FeedInfo] = db.feeds()
        event: kvrep.CloudEvent = kvrep.CloudEvent.from_change(db.status().lineage, some[0])
        headers, body = event.to_binary("ce-")
    del users, place, value, token, acked, known, headers, body


def replicated() -> None:
    primary: kvrep.Store = kvrep.open("p", name="a", listen="127.0.0.1:0", acks="majority", ack_timeout_s=5)
    follower = kvrep.open("f", name="b", follow=primary.address, voter=False)
    position = primary.put(b"k", b"v", acks=1, level="visible", timeout_s=2.0)
    follower.wait_for(position, timeout_s=2)
    value: bytes | None = follower.get(b"k", at_least=position, max_staleness_s=1.0)
    changed: Position = primary.reconfigure(acks="all")
    del value, changed


def publications() -> None:
    with (
        kvrep.open("orders") as db,
        kvrep.Publication(db, "amqp://broker", feed="events", prefix=b"k") as events,
    ):
        events.status()
    kvrep.Publication(
        "10.0.0.1:7400", "kafka://broker/orders", form="debezium", transform=lambda change: None
    )
    kvrep.Publication("10.0.0.1:7400", "kafka://broker/orders", prefixes=b"k")  # type: ignore[call-arg]
    with kvrep.LogPublication(["10.0.0.1:7400"], "amqp://broker", name="far") as log:
        log.wait_for(Position(1001, 1), timeout_s=2.0)
        published: Position = log.published
    del published
