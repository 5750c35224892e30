"""changes() on one store: order, tokens, selection, waiting, and every way it can end."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvrep
from kvrep import Change, Position
from kvrep.testing.checkers import assert_none, check_feed

WAIT_S = 20.0


@pytest.fixture
def db(memory_store: Path) -> Iterator[kvrep.Store]:
    with kvrep.open(memory_store) as store:
        yield store


def all_of(db: kvrep.Store, **more: object) -> list[Change]:
    """Everything that there is now."""
    with db.changes(stop=db.position, **more) as changes:  # type: ignore[arg-type]
        return list(changes)


def brief(changes: list[Change]) -> list[tuple[object, ...]]:
    return [(c.kind, c.keyspace or c.topic, c.key, c.value) for c in changes]


def assert_units(changes: list[Change]) -> None:
    """The last change of each position, and only that one, says so."""
    for i, change in enumerate(changes):
        ends = i + 1 == len(changes) or changes[i + 1].position != change.position
        assert change.last == ends


def mixed(db: kvrep.Store) -> None:
    """Single writes, batches, transactions over keyspaces, messages, deletes, configurations."""
    users = db.keyspace("users")
    for i in range(5):
        db.put(b"k%d" % i, b"v%d" % i)
    with db.batch() as batch:
        for i in range(7):
            batch.put(b"b%d" % i, b"x", keyspace=users if i % 2 else None)
    db.delete(b"k0")
    with db.transaction() as txn:
        txn.put(b"t", b"1")
        txn.delete(b"k1")
        txn.put(b"t", b"2", keyspace=users)
        txn.emit("orders", b"one", headers={"a": "b"})
        txn.emit("mails", b"two")
    db.reconfigure(ack_timeout_s=3)
    with db.transaction() as txn:
        txn.emit("orders", b"alone")
    db.flush()
    users.put(b"last", b"")


def test_changes_come_in_log_order_and_transactions_as_units(db: kvrep.Store) -> None:
    """Every operation comes once, in order; what belongs together has one position and ends with ``last``."""
    mixed(db)

    changes = all_of(db)

    assert brief(changes)[:5] == [("put", "default", b"k%d" % i, b"v%d" % i) for i in range(5)]
    assert len(changes) == 5 + 7 + 1 + 5 + 1 + 1
    assert [c.sequence for c in changes] == sorted({c.sequence for c in changes})
    assert [c.previous for c in changes] == [None, *(c.sequence for c in changes[:-1])]
    assert_units(changes)
    one = next(c for c in changes if c.value == b"one")
    assert (one.kind, one.topic, one.headers, one.keyspace, one.key) == (
        "emit",
        "orders",
        {"a": "b"},
        "",
        b"",
    )
    assert abs(one.time - time.time()) < 3600
    assert changes[-1].position == db.position


def test_messages_leave_no_trace_in_the_state(db: kvrep.Store) -> None:
    """What was emitted is in the log alone; the state, its keyspaces and digests know nothing of it."""
    with db.transaction() as txn:
        txn.emit("orders", b"payload")
    with db.batch() as batch:
        batch.emit("orders", b"payload", headers={"x": "y"})
    db.flush()

    assert list(db.scan()) == []
    assert db.keyspaces() == ["default"]
    assert not any(db._node.engine.recompute_digests()["counts"].values())
    assert [c.topic for c in all_of(db)] == ["orders", "orders"]


def test_a_failed_transaction_emits_nothing(db: kvrep.Store) -> None:
    """A message is told only when its transaction commits."""
    db.put(b"a", b"1")
    with pytest.raises(RuntimeError), db.transaction() as txn:
        txn.put(b"a", b"2")
        txn.emit("orders", b"no")
        raise RuntimeError

    assert brief(all_of(db)) == [("put", "default", b"a", b"1")]


@pytest.mark.parametrize(
    ("topic", "payload", "headers", "error"),
    [
        ("", b"", None, kvrep.InvalidInput),
        ("x" * 256, b"", None, kvrep.InvalidInput),
        ("\ud800", b"", None, kvrep.InvalidInput),
        (b"t", b"", None, TypeError),
        ("t", "text", None, TypeError),
        ("t", b"", {"a": 1}, TypeError),
        ("t", b"", {"a": "x" * 20_000}, kvrep.InvalidInput),
        ("t", b"x" * 2000, None, kvrep.ValueTooLarge),
    ],
)
def test_messages_are_checked_at_the_door(
    memory_store: Path, topic: str, payload: bytes, headers: dict[str, str] | None, error: type[Exception]
) -> None:
    """What cannot be a message is refused before anything is logged."""
    with kvrep.open(memory_store, value_bytes_max=1000) as db:
        with pytest.raises(error), db.transaction() as txn:
            txn.emit(topic, payload, headers=headers)
        assert db.status().last_offset == 0


def test_every_token_goes_on_exactly_behind_its_change(db: kvrep.Store) -> None:
    """With the token of any change, also inside of a transaction, exactly the rest comes."""
    mixed(db)
    changes = all_of(db)

    for i, change in enumerate(changes):
        rest = all_of(db, resume=change.resume)
        assert rest == [c._replace(origin=r.origin) for c, r in zip(changes[i + 1 :], rest, strict=True)]


def test_after_begins_behind_a_position(db: kvrep.Store) -> None:
    """``after`` leaves out what was written through there; the present position waits for what is new."""
    mixed(db)
    changes = all_of(db)
    for change in changes:
        expected = [c for c in changes if c.position > change.position]
        assert brief(all_of(db, after=change.position)) == brief(expected)
    with db.changes(after=db.position) as news:
        assert news.poll(0.01) == []
        db.put(b"new", b"1")
        assert brief(news.poll(WAIT_S)) == [("put", "default", b"new", b"1")]


def test_selection_by_keyspace_prefix_and_topic(db: kvrep.Store) -> None:
    """Only what was asked for comes; ``last`` and ``previous`` speak of that alone."""
    mixed(db)
    changes = all_of(db)

    def chosen(**more: object) -> list[Change]:
        found = all_of(db, **more)
        assert [c.previous for c in found] == [None, *(c.sequence for c in found[:-1])][: len(found)]
        assert_units(found)
        return found

    assert brief(chosen(keyspace="users")) == brief([c for c in changes if c.keyspace == "users"])
    assert brief(chosen(keyspace=["users", "default"])) == brief([c for c in changes if c.keyspace])
    assert brief(chosen(prefix=b"b")) == brief([c for c in changes if c.key[:1] == b"b" or c.topic])
    assert brief(chosen(topic="orders")) == brief([c for c in changes if c.topic == "orders"])
    wanted = [c for c in changes if c.topic == "mails" or c.keyspace == "users"]
    assert brief(chosen(topic="mails", keyspace="users")) == brief(wanted)
    assert chosen(keyspace="nobody") == []


def test_a_function_drops_redacts_and_rewrites(db: kvrep.Store) -> None:
    """What it gives back is shown at the change's own place; units stay units without what it drops."""
    mixed(db)

    def redact(change: Change) -> Change | None:
        if change.kind == "emit":
            return None
        if change.kind == "delete":
            return change
        return change._replace(value=b"***", position=Position(1, 1), index=99, last=False)

    found = all_of(db, transform=redact)

    plain = [c for c in all_of(db) if c.kind != "emit"]
    assert [c.sequence for c in found] == [c.sequence for c in plain]
    assert {c.value for c in found} == {b"***", None}
    assert_units(found)
    for i, change in enumerate(found):
        assert len(all_of(db, transform=redact, resume=change.resume)) == len(found) - i - 1


def test_a_function_that_raises_loses_nothing(db: kvrep.Store) -> None:
    """What came before is handed out, the error is raised, and reading on tries the change again."""
    mixed(db)
    broken = True

    def fragile(change: Change) -> Change:
        if broken and change.key == b"b3":
            raise ZeroDivisionError
        return change

    got: list[Change] = []
    with db.changes(stop=db.position, transform=fragile) as changes:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                got.extend(changes)
        broken = False
        got.extend(changes)

    assert brief(got) == brief(all_of(db))
    with pytest.raises(TypeError, match="transform"):
        all_of(db, transform=lambda change: change.value)


def test_values_before_are_told_where_they_are_kept(db: kvrep.Store) -> None:
    """Every way to write tells what was there before, as of its own transaction."""
    kept = db.keyspace("kept", keep_before=True)
    kept.put(b"a", b"1")
    kept[b"a"] = b"2"
    futures = [kept.submit_put(b"a", b"s%d" % i) for i in range(3)]
    futures.append(kept.submit_delete(b"a"))
    assert [f.result(WAIT_S) for f in futures] == sorted(f.result() for f in futures)
    with kept.transaction() as txn:
        txn.put(b"a", b"x")
        txn.put(b"a", b"3")
        txn.put(b"free", b"0", keyspace=db)
    with db.batch() as batch:
        batch.put(b"a", b"y", keyspace=kept)
        batch.delete(b"a", keyspace=kept)
        batch.put(b"free", b"1")
        batch.emit("t", b"m")
    kept.put_if_absent(b"a", b"4")
    kept.compare_and_set(b"a", expected=b"4", value=b"5")
    kept.delete(b"a")
    kept.delete(b"a")

    told = [(c.value, c.before, c.created) for c in all_of(db, before=True) if c.keyspace == "kept"]

    assert told == [
        (b"1", None, True), (b"2", b"1", False),
        (b"s0", b"2", False), (b"s1", b"s0", False), (b"s2", b"s1", False), (None, b"s2", False),
        (b"3", None, True),
        (None, b"3", False),
        (b"4", None, True), (b"5", b"4", False), (None, b"5", False), (None, None, True),
    ]  # fmt: skip
    others = [c for c in all_of(db, before=True) if c.keyspace == "default"] + all_of(db)
    assert {(c.before, c.created) for c in others} == {(None, None)}
    assert kept.put(b"a", b"acked", acks=0) == db.position


def test_a_reader_waits_for_what_is_written(db: kvrep.Store) -> None:
    """A reader in another thread gets every write as it comes, in order, once."""
    got: list[int] = []
    done = threading.Event()

    def read() -> None:
        for change in db.changes():
            got.append(int(change.key))
            if len(got) == 500:
                done.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(1, 501):
            db.put(b"%d" % i, b"")
        assert done.wait(WAIT_S)
    finally:
        with pytest.raises(kvrep.ClosedError):
            _close_and_read(db)
        reader.join(WAIT_S)
    assert_none(check_feed(got, last=500))


def _close_and_read(db: kvrep.Store) -> None:
    changes = db.changes()
    threading.excepthook, before = (lambda args: None), threading.excepthook
    try:
        db.close()
        next(changes)
    finally:
        threading.excepthook = before


def test_closing_the_iterator_ends_one_that_waits(db: kvrep.Store) -> None:
    """close() from another thread ends the iteration soon, without an error."""
    changes = db.changes()
    ended: list[float] = []

    def read() -> None:
        list(changes)
        ended.append(time.monotonic())

    reader = threading.Thread(target=read)
    reader.start()
    while not db._node.moves.waiting:
        time.sleep(0)
    began = time.monotonic()
    changes.close()
    reader.join(WAIT_S)
    changes.close()

    assert ended[0] - began < 0.2
    assert changes.over
    assert list(changes) == []


def test_closing_the_store_ends_a_reader_with_an_error(memory_store: Path) -> None:
    """A stream whose store is closed raises ClosedError; it never just ends."""
    db = kvrep.open(memory_store)
    db.put(b"a", b"1")
    changes = db.changes()
    errors: list[Exception] = []

    def read() -> None:
        try:
            list(changes)
        except kvrep.Error as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while not db._node.moves.waiting:
        time.sleep(0)
    db.close()
    reader.join(WAIT_S)

    assert [type(error) for error in errors] == [kvrep.ClosedError]
    for again in (changes.poll, db.changes, lambda: db.feed("x"), db.feeds):
        with pytest.raises(kvrep.ClosedError):
            again()


INTERRUPTED = """
import signal, sys, kvrep
with kvrep.open(sys.argv[1]) as db:
    db.put(b"a", b"1")
    changes = db.changes()
    assert len(changes.poll()) == 1
    try:
        print("waiting", flush=True)
        list(changes)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    db.put(b"b", b"2")
    assert [c.key for c in changes.poll(20)] == [b"b"]
print("done", flush=True)
"""


def test_ctrl_c_ends_a_wait_and_reading_goes_on(memory_store: Path) -> None:
    """An interrupt while it waits is raised; the next read gets what comes."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, str(memory_store)], stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"waiting\n"
            for _ in range(50):  # Python itself may lose one, in a destructor
                child.send_signal(signal.SIGINT)
                if select.select([child.stdout], [], [], 0.5)[0]:
                    break
            assert child.stdout.readline() == b"done\n"
            assert child.wait(WAIT_S) == 0
        finally:
            child.kill()


def test_a_stream_interrupted_in_the_middle_of_a_step_says_so(db: kvrep.Store) -> None:
    """After a Ctrl-C that nobody can tell the effect of, the stream refuses to go on with a hole."""
    db.put(b"a", b"1")
    changes = db.changes()
    real = changes._reader.read

    def interrupted(through: int) -> list[Change] | None:
        real(through)
        raise KeyboardInterrupt

    changes._reader.read = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        changes.poll()
    changes._reader.read = real  # type: ignore[method-assign]
    with pytest.raises(kvrep.ClosedError, match="resume"):
        changes.poll()


def test_arguments_that_contradict_each_other(db: kvrep.Store) -> None:
    """Wrong arguments are refused when the stream is made."""
    position = db.put(b"a", b"1")
    token = all_of(db)[0].resume
    for bad in (
        {"after": position, "snapshot": True},
        {"resume": token, "snapshot": True},
        {"resume": token, "after": position},
        {"have": []},
        {"keyspace": ""},
        {"keyspace": []},
        {"keyspace": "NO"},
        {"keyspace": "kvrep:feeds"},
        {"resume": token[:-1]},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            db.changes(**bad)  # type: ignore[arg-type]
    for odd in (
        {"after": "now"},
        {"stop": 5},
        {"prefix": "x"},
        {"keyspace": 5},
        {"transform": 5},
        {"resume": b""},
    ):
        with pytest.raises(TypeError):
            db.changes(**odd)  # type: ignore[arg-type]


def test_a_token_of_another_store_is_refused(db: kvrep.Store, memory_path: Path) -> None:
    """A token names its store: LineageMismatch elsewhere, with both lineages."""
    db.put(b"a", b"1")
    token = all_of(db)[0].resume
    with kvrep.open(memory_path / "other") as other:
        other.put(b"a", b"1")
        with pytest.raises(kvrep.LineageMismatch):
            other.changes(resume=token)
        with other.feed("f") as feed:
            for attempt in (feed.ack, feed.seek):
                with pytest.raises(kvrep.LineageMismatch):
                    attempt(token)
            with pytest.raises(kvrep.InvalidToken):
                feed.ack("k1")
            assert len(feed.poll()) == 1


def test_stop_beyond_the_history(db: kvrep.Store) -> None:
    """A stop that another history holds is an error, not an endless wait."""
    position = db.put(b"a", b"1")
    with db.changes(stop=Position(position.epoch - 1000, position.offset)) as changes:
        with pytest.raises(kvrep.RolledBack):
            list(changes)
    with db.changes(after=Position(position.epoch, position.offset + 5)) as changes:
        with pytest.raises(kvrep.Truncated) as raised:
            changes.poll(0)
    assert raised.value.to == position
    with db.changes(after=Position(position.epoch - 1, 1)) as changes:
        with pytest.raises(kvrep.Truncated) as raised:
            changes.poll(0)
    assert raised.value.to == Position(0, 0)


def test_trimmed_log_is_told_with_what_is_left(memory_store: Path) -> None:
    """Who begins before what the log still holds gets LogTrimmed; from there on all is well."""
    with kvrep.open(memory_store, log_file_bytes=1 << 16, retention_bytes=0, retention_age_s=0) as db:
        for i in range(300):
            db.put(b"%03d" % i, bytes(1000))
        db.flush()
        first = db.status().first_offset
        assert first > 1

        with db.changes() as changes, pytest.raises(kvrep.LogTrimmed) as raised:
            changes.poll()
        assert raised.value.first == first

        epoch = db.position.epoch
        rest = all_of(db, after=Position(epoch, first - 1))
        assert rest[0].position.offset == first
        assert rest[-1].position.offset >= 300


def test_a_restart_changes_nothing(memory_store: Path) -> None:
    """Tokens from before a restart go on after it, whatever was recovered or flushed."""
    with kvrep.open(memory_store, log_file_bytes=1 << 16) as db:
        for i in range(200):
            db.put(b"%03d" % i, bytes(1000))
        before = all_of(db)
    with kvrep.open(memory_store, log_file_bytes=1 << 16) as db:
        db.put(b"new", b"")
        for i in (0, 77, 199):
            rest = all_of(db, resume=before[i].resume)
            assert [c.key for c in rest] == [*(c.key for c in before[i + 1 :]), b"new"]


def test_damage_in_the_log_is_an_error(store_path: Path) -> None:
    """A byte that changed on the disk raises LogCorrupt instead of a changed value."""
    with kvrep.open(store_path, log_file_bytes=1 << 20) as db:
        for i in range(100):
            db.put(b"%03d" % i, b"value%03d" % i)
        file = next((store_path / "gen-000001" / "log").glob("0*1.log"))
        at = file.read_bytes().index(b"value050")
        fd = os.open(file, os.O_RDWR)
        os.pwrite(fd, b"walue", at)
        os.close(fd)

        got: list[bytes] = []
        with db.changes() as changes, pytest.raises(kvrep.LogCorrupt):
            got.extend(c.key for c in changes)


def test_a_slow_reader_costs_next_to_nothing(memory_store: Path) -> None:
    """However far a reader is behind, it holds one piece of the log."""
    with kvrep.open(memory_store, durability="os") as db:
        for _ in range(60):
            with db.batch() as batch:
                for i in range(1000):
                    batch.put(b"%04d" % i, bytes(500))
        db.flush()
        gc.collect()
        changes = db.changes()
        next(changes)
        tracemalloc.start()
        try:
            count = sum(1 for _ in zip(range(50_000), changes, strict=False))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            changes.close()

        assert count == 50_000
        assert peak < 8 << 20, f"{peak >> 20} MiB for 30 MB of log"


def test_many_readers_at_once(db: kvrep.Store) -> None:
    """Readers in several threads do not disturb each other or the writers."""
    results: list[list[int]] = []

    def read() -> None:
        got: list[int] = []
        with db.changes(keyspace="default") as changes:
            for change in changes:
                got.append(int(change.key))
                if got[-1] == 2000:
                    break
        results.append(got)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    last = [db.submit_put(b"%d" % i, b"") for i in range(1, 2001)][-1]
    last.result(WAIT_S)
    for reader in readers:
        reader.join(WAIT_S)

    assert len(results) == 4
    for got in results:
        assert_none(check_feed(got, last=2000))


def test_a_log_that_cannot_be_read(db: kvrep.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO from a read is a typed error; reading again tries again, and nothing is left out."""
    from kvrep.storage.log_file import LogFile

    mixed(db)
    expected = brief(all_of(db))
    db._node.engine.committer.log._recent.clear()
    real = LogFile.read
    broken = [True]

    def failing(file: LogFile, start: int, length: int) -> bytes:
        if broken[0]:
            raise OSError(5, "Input/output error")
        return real(file, start, length)

    monkeypatch.setattr(LogFile, "read", failing)
    with db.changes(stop=db.position) as changes:
        for _ in range(2):
            with pytest.raises(kvrep.StorageFailed):
                changes.poll()
        broken[0] = False
        assert brief(list(changes)) == expected


def test_large_values_come_whole(memory_store: Path) -> None:
    """Values and transactions that are far larger than a piece of the log."""
    with kvrep.open(memory_store, durability="os") as db:
        with db.batch() as batch:
            for i in range(20):
                batch.put(b"%d" % i, bytes([i]) * (1 << 20))
        db.put(b"one", b"x" * (30 << 20))
        sizes = [len(c.value or b"") for c in all_of(db)]
        assert sizes == [1 << 20] * 20 + [30 << 20]
        middle = all_of(db)[9].resume
        assert len(all_of(db, resume=middle)) == 11
        with db.changes(snapshot=True) as changes:
            rows = 0
            for change in changes:
                rows += change.kind == "put"
                if change.kind == "end":
                    break
        assert rows == 21


def test_a_token_inside_of_the_last_transaction(db: kvrep.Store) -> None:
    """Where the transaction is the end of the log, and of what was asked for, the rest of it comes all the same."""
    with db.batch() as batch:
        for i in range(5):
            batch.put(b"%d" % i, b"v")
    changes = all_of(db)
    for i, change in enumerate(changes):
        assert [c.key for c in all_of(db, resume=change.resume)] == [c.key for c in changes[i + 1 :]]


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_log_that_was_cut_inside_of_a_group(memory_store: Path, left: int) -> None:
    """Where records were dropped, a group is shorter than its header says: what follows is read all the same."""
    with kvrep.open(memory_store, flush_interval_s=3600) as db:
        before = db.put(b"before", b"")
        db._node.engine.committer.lead.acquire()  # so that the next ones are written together
        futures = [db.submit_put(b"%d" % i, b"") for i in range(5)]
        db._node.engine.committer.lead.release()
        db._node.engine.committer.kick()
        assert futures[-1].result(WAIT_S).offset == before.offset + 5
        assert db._node.engine.cut(before.offset + left, reason="a test") is not None
        db.put(b"after", b"")
        wanted = [b"before", *(b"%d" % i for i in range(left)), b"after"]
        assert [c.key for c in all_of(db)] == wanted
        db._node.engine.committer.log._recent.clear()
        assert [c.key for c in all_of(db)] == wanted
