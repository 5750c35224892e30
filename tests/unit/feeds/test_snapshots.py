"""changes(snapshot=True): the present state and what follows, whatever is written or cut off meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep import Change
from kvrep.feeds import changes as module
from kvrep.feeds.changes import Changes
from kvrep.model.change import ROW_INDEX

WAIT_S = 20.0
Copy = dict[tuple[str, bytes], bytes]


@pytest.fixture
def db(memory_store: Path) -> Iterator[kvrep.Store]:
    with kvrep.open(memory_store) as store:
        yield store


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time, seven of one position."""
    monkeypatch.setattr(module, "PIECE_ROWS", 3)
    monkeypatch.setattr(module, "PINNED_ROWS", 6)


def state(db: kvrep.Store) -> Copy:
    with db.snapshot() as view:
        return {
            (name, key): value
            for name in db.keyspaces()
            for key, value in view.scan(keyspace=db.keyspace(name))
        }


class Receiver:
    """Applies changes strictly: what a feed may not do is an error."""

    def __init__(self, copy: Copy | None = None) -> None:
        self.copy: Copy = {} if copy is None else copy
        self.messages: list[bytes] = []
        self.last: Change | None = None
        self.marks: list[str] = []
        self.rows = 0

    def take(self, change: Change) -> None:
        if self.last is not None:
            assert change.previous == self.last.sequence
            assert change.sequence > self.last.sequence
        self.last = change
        at = (change.keyspace, change.key)
        if change.kind == "put":
            assert change.value is not None
            assert not change.snapshot or self.marks == ["begin"]
            self.rows += change.snapshot
            self.copy[at] = change.value
        elif change.kind == "delete":
            self.copy.pop(at, None)
        elif change.kind == "emit":
            assert change.value is not None
            self.messages.append(change.value)
        else:
            self.marks.append(change.kind)


def fill(db: kvrep.Store, count: int = 40) -> None:
    users = db.keyspace("users")
    for i in range(count):
        (users if i % 3 == 0 else db).put(b"k%03d" % i, b"old%d" % i)


def test_a_snapshot_is_the_state_between_two_marks(db: kvrep.Store) -> None:
    """begin, every row once in order, end; then what is written afterwards."""
    fill(db)
    receiver = Receiver()
    with db.changes(snapshot=True) as changes:
        assert changes.in_snapshot
        rows = []
        for change in changes:
            receiver.take(change)
            rows.append((change.keyspace, change.key))
            if change.kind == "end":
                break
        assert not changes.in_snapshot
        assert rows[1:-1] == sorted(state(db))
        assert receiver.copy == state(db)
        assert change.position == db.position
        db.put(b"new", b"1")
        following = changes.poll(WAIT_S)
        assert [(c.kind, c.key, c.snapshot) for c in following] == [("put", b"new", False)]
        assert following[0].previous == change.sequence


def test_an_empty_store_has_a_snapshot_too(db: kvrep.Store) -> None:
    """Only the marks come, and then what is written first."""
    with db.changes(snapshot=True) as changes:
        assert [c.kind for c in changes.poll() + changes.poll()] == ["begin", "end"]
        db.put(b"a", b"1")
        assert [c.key for c in changes.poll(WAIT_S)] == [b"a"]
        token = changes.token
    db.put(b"b", b"1")
    with db.changes(resume=token, stop=db.position) as changes:
        assert [c.key for c in changes] == [b"b"]


def scribble(db: kvrep.Store, chance: random.Random, number: int) -> None:
    """A random write: single, deleting, across keyspaces, into a new keyspace, with a message."""

    def key() -> bytes:
        return b"k%03d" % chance.randrange(60)

    others = ["users", "aaa", "zzz", "default"]
    what = chance.randrange(6)
    if what == 0:
        db.delete(key())
    elif what == 1:
        with db.transaction() as txn:
            for name in chance.sample(others, 3):
                txn.put(key(), b"t%d" % number, keyspace=db.keyspace(name))
            txn.emit("t", b"m%d" % number)
    elif what == 2:
        with db.batch() as batch:
            for _ in range(4):
                batch.delete(key(), keyspace=db.keyspace(chance.choice(others)))
                batch.put(key(), b"b%d" % number)
    else:
        db.keyspace(chance.choice(others)).put(key(), b"p%d" % number)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("small_pieces")
def test_a_copy_is_exact_whatever_is_written_meanwhile(db: kvrep.Store, seed: int) -> None:
    """With writes between all steps the copy equals the state at ``end`` and ever after, message by message."""
    chance = random.Random(seed)
    fill(db)
    receiver = Receiver()
    number = 0
    written: list[bytes] = []
    with db.changes(snapshot=True) as changes:
        while "end" not in receiver.marks:
            for change in changes.poll():
                receiver.take(change)
                if change.kind == "begin":
                    begun = change.position
            if number < 100:
                for _ in range(chance.randrange(6)):
                    scribble(db, chance, number)
                    number += 1
            if chance.random() < 0.2:
                db.flush()
        for _ in range(20):
            scribble(db, chance, number)
            number += 1
        last = db.put(b"the end", b"")
        while receiver.last is None or receiver.last.position < last:
            for change in changes.poll(WAIT_S):
                receiver.take(change)
    with db.changes(after=begun, stop=db.position, topic="t") as emitted:
        written = [c.value for c in emitted if c.value is not None]

    assert receiver.copy == state(db)
    assert receiver.messages == written


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("small_pieces")
def test_a_snapshot_that_is_cut_off_anywhere_goes_on(db: kvrep.Store, seed: int) -> None:
    """A receiver that stores its token with its copy, and falls back to it at random, ends up exact."""
    chance = random.Random(100 + seed)
    fill(db)
    stored: tuple[str, Copy, list[str]] | None = None
    for attempt in range(60):
        if stored is None:
            receiver, more = Receiver(), {"snapshot": True}
        else:
            receiver, more = Receiver(dict(stored[1])), {"resume": stored[0]}
            receiver.marks = list(stored[2])
        with db.changes(**more) as changes:  # type: ignore[arg-type]
            for _ in range(chance.randrange(1, 4)):
                found = changes.poll(0.01)
                some = found[: chance.randrange(1, 5)]
                for change in some:
                    receiver.take(change)
                    if chance.random() < 0.7:
                        stored = (change.resume, dict(receiver.copy), list(receiver.marks))
                if len(some) < len(found):
                    break  # cut off
        if attempt < 40:
            scribble(db, chance, attempt)
    assert stored is not None
    receiver = Receiver(stored[1])
    receiver.marks = stored[2]
    last = db.put(b"the end", b"")
    with db.changes(resume=stored[0]) as changes:
        while receiver.last is None or receiver.last.position < last or "end" not in receiver.marks:
            for change in changes.poll(WAIT_S):
                receiver.take(change)

    assert receiver.copy == state(db)
    assert receiver.marks == ["begin", "end"]


def test_a_snapshot_beside_busy_writers(db: kvrep.Store) -> None:
    """Threads that write all the time neither hold a snapshot up for ever nor spoil it."""
    fill(db, 3000)
    stop = threading.Event()

    def write(seed: int) -> None:
        chance = random.Random(seed)
        number = 0
        while not stop.is_set():
            scribble(db, chance, number)
            number += 1

    writers = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    receiver = Receiver()
    with db.changes(snapshot=True) as changes:
        while "end" not in receiver.marks:
            for change in changes.poll(WAIT_S):
                receiver.take(change)
        stop.set()
        for writer in writers:
            writer.join(WAIT_S)
        last = db.put(b"the end", b"")
        while receiver.last is None or receiver.last.position < last:
            for change in changes.poll(WAIT_S):
                receiver.take(change)

    assert receiver.copy == state(db)


def test_selection_and_function_hold_for_rows(db: kvrep.Store) -> None:
    """A snapshot shows what the stream shows: keyspace, prefix, and what the function leaves of it."""
    fill(db)
    with db.changes(snapshot=True, keyspace="users", prefix=b"k01") as changes:
        rows = [c.key for c in [*changes.poll(), *changes.poll()] if c.kind == "put"]
    assert rows == [b"k012", b"k015", b"k018"]

    def odd(change: Change) -> Change | None:
        return change._replace(value=b"-") if change.key[-1] % 2 else None

    with db.changes(snapshot=True, transform=odd) as changes:
        got = [*changes.poll(), *changes.poll()]
    assert [c.kind for c in got if c.kind != "put"] == ["begin", "end"]
    assert {(c.key[-1] % 2, c.value) for c in got if c.kind == "put"} == {(1, b"-")}
    assert [c.previous for c in got] == [None, *(c.sequence for c in got[:-1])]


@pytest.mark.usefixtures("small_pieces")
def test_a_function_that_raises_in_a_snapshot_loses_nothing(db: kvrep.Store) -> None:
    """The rows of the piece come again when reading goes on."""
    fill(db)
    broken = True

    def fragile(change: Change) -> Change:
        if broken and change.key == b"k020":
            raise ZeroDivisionError
        return change

    receiver = Receiver()
    with db.changes(snapshot=True, transform=fragile) as changes:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                for change in changes:
                    receiver.take(change)
        broken = False
        for change in changes:
            receiver.take(change)
            if change.kind == "end":
                break
    assert receiver.copy == state(db)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("small_pieces")
def test_only_the_difference_to_what_a_receiver_has(db: kvrep.Store, seed: int) -> None:
    """With ``have`` a receiver gets puts of what is new or another, deletes of what is gone, and ends up exact."""
    chance = random.Random(200 + seed)
    fill(db)
    copy = state(db)
    for number in range(30):
        scribble(db, chance, number)
    unchanged = {at for at, value in state(db).items() if copy.get(at) == value}
    receiver = Receiver(copy)
    with db.changes(snapshot=True, have=[(n, k, v) for (n, k), v in sorted(copy.items())]) as changes:
        while "end" not in receiver.marks:
            for change in changes.poll(WAIT_S):
                if change.snapshot:
                    assert (change.keyspace, change.key) not in unchanged
                receiver.take(change)
            if seed % 2:
                scribble(db, chance, 1000 + len(receiver.copy))
                unchanged.clear()
        last = db.put(b"the end", b"")
        while receiver.last is None or receiver.last.position < last:
            for change in changes.poll(WAIT_S):
                receiver.take(change)
    assert receiver.copy == state(db)


def test_what_a_receiver_has_must_be_in_order(db: kvrep.Store) -> None:
    """Rows out of order would make a wrong difference: ValueError."""
    fill(db)
    have = [("default", b"b", b""), ("default", b"a", b"")]
    with pytest.raises(ValueError, match="order"):
        for _ in db.changes(snapshot=True, have=have):
            pass


def test_an_expired_pin_is_renewed(memory_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that is slower than snapshot_age_max_s gets its whole snapshot all the same."""
    monkeypatch.setattr(module, "PIECE_ROWS", 10)
    with kvrep.open(memory_store, snapshot_age_max_s=0.05) as db:
        fill(db)
        receiver = Receiver()
        pause = threading.Event()
        waits = {10, 20}
        with db.changes(snapshot=True) as changes:
            for change in changes:
                receiver.take(change)
                if receiver.rows in waits:
                    waits.remove(receiver.rows)
                    pause.wait(0.1)  # the age that ends the pin
                    db.put(b"k%03d" % receiver.rows, b"meanwhile")
                if change.kind == "end":
                    break
        assert receiver.copy == state(db)


def test_a_dropped_snapshot_pins_nothing(db: kvrep.Store) -> None:
    """An iterator that was left in the middle, closed or not, lets go of what it held."""
    fill(db)
    left = db.changes(snapshot=True)
    next(left)
    closed = db.changes(snapshot=True)
    next(closed)
    next(closed)
    assert db.status().snapshot_age_s > 0
    closed.close()
    del left
    assert db.status().snapshot_age_s == 0


@pytest.mark.usefixtures("small_pieces")
def test_a_token_inside_of_a_transaction_inside_of_a_snapshot(db: kvrep.Store) -> None:
    """What is left of a transaction comes first, though nothing was written after it."""
    fill(db, 30)
    receiver = Receiver()
    with db.changes(snapshot=True) as changes:
        while receiver.rows < 6:
            for change in changes.poll():
                receiver.take(change)
        with db.batch() as batch:
            for key in (b"k001", b"k002", b"k004", b"k005"):
                batch.put(key, b"together")
        found = changes.poll()
    assert [c.value for c in found] == [b"together"] * 4
    for i, change in enumerate(found):
        with db.changes(resume=change.resume) as rest:
            assert [c.key for c in [*rest.poll(), *rest.poll()] if not c.snapshot] == [
                c.key for c in found[i + 1 :]
            ]


def _one_by_one(stream: Changes) -> Iterator[Change]:
    yield from stream


def _next(stream: Changes) -> Iterator[Change]:
    while True:
        yield next(stream)


def _polled(stream: Changes) -> Iterator[Change]:
    while True:
        yield from stream.poll()


@pytest.mark.parametrize("read", [_one_by_one, _next, _polled])
def test_an_interrupt_while_a_row_is_made_loses_none(
    memory_store: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Changes], Iterator[Change]]
) -> None:
    """Ctrl-C while a row becomes a change, as it is looked at, is raised, and the next read goes on without a gap."""
    monkeypatch.setattr(module, "PIECE_ROWS", 7)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    interrupts = {ROW_INDEX + number for number in (2, 5, 6, 11, 20)}

    def made(kind: Any, fields: Any) -> Any:
        if fields[1] in interrupts:
            interrupts.remove(fields[1])
            raise KeyboardInterrupt
        return tuple.__new__(kind, fields)

    monkeypatch.setattr("kvrep.feeds.rows._new", made)
    with kvrep.open(memory_store) as db:
        for i in range(25):
            db.put(b"%02d" % i, b"v")
        found: list[Change] = []
        with db.changes(snapshot=True) as stream:
            while not found or found[-1].kind != "end":
                with suppress(KeyboardInterrupt):
                    for change in read(stream):
                        found.append(change)
                        if change.kind == "end":
                            break
        assert [c.key for c in found if c.kind == "put"] == [key for key, _ in db.scan()]
    assert not interrupts
