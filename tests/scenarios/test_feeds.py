"""Feeds over the life of a group: on any node, over restarts, failovers, force and trimmed logs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_failover import group, put, role, stores

import kvrep
from kvrep import Change, Position, Role
from kvrep.testing.checkers import assert_none, check_feed
from tests.replication_kit import WAIT_S, opened, processes, until, voters

Copy = dict[tuple[str, bytes], bytes]


def apply(copy: Copy, change: Change) -> None:
    if change.kind == "put":
        assert change.value is not None
        copy[(change.keyspace, change.key)] = change.value
    elif change.kind == "delete":
        copy.pop((change.keyspace, change.key), None)


def state(db: kvrep.Store) -> Copy:
    return {(n, k): v for n in db.keyspaces() for k, v in db.keyspace(n).items()}


def numbers(changes: list[Change]) -> list[int]:
    return [int(c.key) for c in changes if c.kind == "put"]


def through(changes: Any, last: Position) -> list[Change]:
    """Poll until ``last`` was read."""
    found: list[Change] = []

    def there() -> bool:
        found.extend(changes.poll(0.05))
        return bool(changes.position >= last)

    until(there, what=f"the feed to reach {last}")
    return found


class Reader:
    """Reads in a thread, notes what came, and goes on with its last token on another node when told to."""

    def __init__(self, db: kvrep.Store) -> None:
        self.changes: list[Change] = []
        self.errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, args=(db, None))
        self._stream: kvrep.Changes | None = None
        self._thread.start()

    def _run(self, db: kvrep.Store, token: str | None) -> None:
        try:
            with db.changes(resume=token) as self._stream:
                for change in self._stream:
                    self.changes.append(change)
        except kvrep.Error as error:
            self.errors.append(error)

    def move(self, db: kvrep.Store) -> None:
        self.end()
        token = self.changes[-1].resume if self.changes else None
        self._thread = threading.Thread(target=self._run, args=(db, token))
        self._thread.start()

    def end(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def test_every_node_shows_the_same_stream(tmp_path: Path) -> None:
    """Primary and followers yield equal changes, and a token of one goes on at any other."""
    with group(tmp_path, 1) as (_, nodes):
        a = nodes[0]
        for i in range(30):
            a.put(b"%d" % i, b"v")
        with a.transaction() as txn:
            txn.put(b"100", b"x")
            txn.emit("topic", b"m", headers={"a": "b"})
            txn.put(b"101", b"x")
        streams = []
        for node in nodes:
            node.wait_for(a.position, WAIT_S)
            with node.changes() as changes:
                streams.append([c._replace(origin=None) for c in through(changes, a.position)])
        assert streams[0] == streams[1] == streams[2]
        assert len(streams[0]) == 33

        with a.changes(stop=a.position) as changes:
            tokens = [c.resume for c in changes]
        for i, node in zip(range(0, 33, 4), itertools.cycle(nodes)):
            with node.changes(resume=tokens[i]) as changes:
                rest = [c._replace(origin=None) for c in through(changes, a.position)]
            assert rest == streams[0][i + 1 :]


def test_a_stream_goes_through_a_failover(tmp_path: Path) -> None:
    """Readers on the primary that goes (they move with their token) and on a follower that stays miss nothing
    and get nothing twice, though the primary is stopped in the middle of writes."""
    with group(tmp_path, "majority") as (_, (a, b, c)):
        moving, staying = Reader(a), Reader(c)
        count = itertools.count(1)
        written: list[int] = []
        stop = threading.Event()
        target = [a]

        def write() -> None:
            for i in count:
                if stop.is_set():
                    return
                try:
                    put(target[0], b"%d" % i, b"v")
                    written.append(i)
                except (kvrep.UnknownOutcome, kvrep.ClosedError):
                    pass  # perhaps it is there, perhaps not: the streams must agree on it all the same

        writer = threading.Thread(target=write)
        writer.start()
        until(lambda: len(moving.changes) > 100, what="the stream to begin")
        target[0] = b
        a.close()
        until(lambda: moving.errors, what="the end of the reader on the closed primary")
        b.promote()
        moving.move(b)
        before = len(written)
        until(lambda: len(written) > before + 100, what="writes to the new primary")
        stop.set()
        writer.join(WAIT_S)
        last = b.position
        for reader in (moving, staying):
            until(lambda r=reader: r.changes and r.changes[-1].position >= last, what="the end of the stream")
            reader.end()

        assert [c._replace(origin=None) for c in moving.changes] == [
            c._replace(origin=None) for c in staying.changes
        ]
        shown = numbers(staying.changes)
        assert set(written) <= set(shown)
        assert_none(check_feed(shown, expected=sorted(shown)))
        assert state(b) == {("default", b"%d" % i): b"v" for i in shown}
        assert [type(e) for e in moving.errors] == [kvrep.ClosedError]
        assert staying.errors == []


def test_a_forced_promotion_truncates_with_the_exact_place(tmp_path: Path) -> None:
    """What only the lost primary had is told as Truncated(to), by token and by position, and the difference
    afterwards makes the receiver's copy exact."""
    with group(tmp_path, "majority") as (start, (a, b, c)):
        for i in range(20):
            a.put(b"%d" % i, b"v")
        shared = a.position
        b.wait_for(shared, WAIT_S)
        b.close()
        for i in range(20, 30):
            a.put(b"%d" % i, b"lost")
        a.delete(b"3")
        copy: Copy = {}
        with a.changes(stop=a.position) as changes:
            for change in changes:
                apply(copy, change)
        token, position = change.resume, change.position
        a.close()
        c.close()
        b = start("b", follow=a.address)
        b.promote(force=True, voters=["b"], acks=0)
        for i in range(5):
            b.put(b"%d" % (100 + i), b"new")
        for given in ({"resume": token}, {"after": position}):
            with b.changes(**given) as changes, pytest.raises(kvrep.Truncated) as caught:  # type: ignore[arg-type]
                changes.poll()
            assert caught.value.position == position
            assert caught.value.to.offset >= shared.offset
        with b.changes(resume=token) as changes, pytest.raises(kvrep.Truncated) as caught:
            changes.poll()
        to = caught.value.to
        assert b._node.engine.epochs.holds(to, b.status().last_offset)
        with b.changes(after=to, stop=b.position) as changes:  # nothing that both share comes again
            assert numbers(list(changes)) == [100, 101, 102, 103, 104]
        have = [(n, k, v) for (n, k), v in sorted(copy.items())]
        with b.changes(snapshot=True, have=have) as changes:
            found = list(itertools.takewhile(lambda c: c.kind != "end", changes))
        for change in found:
            apply(copy, change)
        assert copy == state(b)
        assert sorted(c.key for c in found if c.kind == "delete") == [b"%d" % i for i in range(20, 30)]
        assert len([c for c in found if c.kind == "put"]) == 6


def test_with_acks_0_nothing_is_shown_that_a_failover_can_take_back(tmp_path: Path) -> None:
    """The stream stops at what every voter holds; ``committed`` goes on; after the failover both are right."""
    with group(tmp_path, 0, "ab") as (start, (a, b)):
        last = a.put(b"1", b"v")
        with a.changes() as changes, a.changes(committed=True) as eager, b.changes() as beside:
            for stream in (changes, eager, beside):
                assert numbers(through(stream, last)) == [1]
            b.close()
            for i in range(2, 6):
                a.put(b"%d" % i, b"v")
            assert numbers(through(eager, a.position)) == [2, 3, 4, 5]
            assert changes.poll(0.3) == []
            token, taken_back = changes.token, eager.token
            a.close()
        b = start("b")
        last = put(b, b"100", b"v")
        with b.changes(resume=token) as changes:
            assert changes.poll(0.3) == [], "a, which may come back as primary, does not hold it"
            b.remove_voter("a")
            assert numbers(through(changes, last)) == [100]
        with b.changes(resume=taken_back) as changes, pytest.raises(kvrep.Truncated):
            changes.poll()


def test_with_acks_0_a_follower_that_comes_back_moves_the_horizon(tmp_path: Path) -> None:
    """What the voters catch up with is shown at once on the primary, and soon on the follower."""
    with group(tmp_path, 0, "ab") as (start, (a, b)):
        with a.changes() as changes:
            b.close()
            last = a.put(b"1", b"v")
            assert changes.poll(0.1) == []
            b = start("b", follow=a.address)
            assert numbers(through(changes, last)) == [1]
        with b.changes() as changes:
            assert numbers(through(changes, last)) == [1]


def test_a_named_feed_goes_on_at_the_new_primary(tmp_path: Path) -> None:
    """Its place comes with the promotion: nothing acked comes again, nothing else is left out."""
    with group(tmp_path, "majority") as (start, (a, b, c)):
        feed = a.feed("billing", keyspace=["default"])
        for i in range(1, 51):
            a.put(b"%d" % i, b"v")
        got: list[int] = []
        for change in feed:
            got.append(int(change.key))
            if len(got) == 30:
                feed.ack()
                break
        assert [int(c.key) for c in feed.poll()][:3] == [31, 32, 33]  # handed out, never acked
        a.close()
        with pytest.raises(kvrep.ClosedError):
            feed.poll()
        b.promote()
        put(b, b"51", b"v")
        with b.feed("billing") as feed:
            while len(got) < 51:
                got += numbers(feed.poll())
                feed.ack(wait=False)
            assert_none(check_feed(got, last=51))
            until(lambda: feed.info().lag_records <= 2, what="the acks")
        again = start("a")
        role(again, Role.FOLLOWER)
        again.wait_for(b.position, WAIT_S)
        for node in (again, c):
            node.wait_for(b.position, WAIT_S)
            (info,) = node.feeds()
            assert (info.name, info.position) == ("billing", b.feeds()[0].position)
            with node.feed("billing") as there, pytest.raises(kvrep.NotPrimary):
                there.ack(info.token)
            with pytest.raises(kvrep.NotPrimary):
                node.feed("another")


def test_a_feed_survives_kill_9_of_its_reader(tmp_path: Path) -> None:
    """After a kill the feed goes on behind the last ack: at least once, without a hole."""
    with processes() as start:
        node = start(tmp_path / "s").ready()
        node.run("[db.put(b'%d' % i, b'v') for i in range(1, 101)] and None")
        node.run("feed = db.feed('f')")
        node.run("found = feed.poll()")
        assert node.run("feed.ack(found[39]) is not None")
        assert node.run("feed.ack(found[59], wait=False) is None")
        node.kill()
    got = list(range(1, 41))
    with opened(tmp_path / "s") as db, db.feed("f") as feed:
        db.put(b"101", b"v")
        while got[-1] < 101:
            got += numbers(feed.poll())
    first = got[40]
    assert 1 < first <= 61, "behind an ack that returned, or behind the one that may have been lost"
    assert first >= 41
    assert_none(check_feed(got[40:], after=first - 1, last=101))


def test_log_is_kept_for_a_feed_up_to_the_cap(tmp_path: Path) -> None:
    """A feed that stands still holds the log back; beyond the cap it gets LogTrimmed, and resnapshot() gives
    the difference to what its reader has."""
    small: dict[str, Any] = {"log_file_bytes": 1 << 16, "retention_bytes": 0, "retention_age_s": 0.0,
                             "retention_bytes_max": 1 << 20}  # fmt: skip
    copy: Copy = {}
    with kvrep.open(tmp_path / "s", **small) as db:
        with db.feed("slow") as feed:
            for i in range(300):
                db.put(b"%03d" % (i % 150), b"%d" % i + bytes(1000))
            db.flush()
            db._node.engine.trim()
            assert db.status().first_offset == 1, "held"
            for change in feed.poll():
                apply(copy, change)
            feed.ack()
        db.flush()
        first = db.status().first_offset
        for i in range(1500):
            db.put(b"%03d" % (i % 120), b"%d" % i + bytes(1000))
        for i in range(100, 140):
            db.delete(b"%03d" % i)
        db.flush()
        until(lambda: db._node.engine.trim() >= 0 and db.status().first_offset > first + 500, what="trimming")
        with db.feed("slow") as feed:
            assert not feed.info().held
            with pytest.raises(kvrep.LogTrimmed) as caught:
                feed.poll()
            assert caught.value.first == db.status().first_offset
            feed.resnapshot(have=[(n, k, v) for (n, k), v in sorted(copy.items())])
            marks = []
            while marks[-1:] != ["end"]:
                for change in feed.poll():
                    apply(copy, change)
                    if change.kind in ("begin", "end"):
                        marks.append(change.kind)
                feed.ack()
            assert copy == state(db)
            assert feed.info().held
            assert not feed.info().in_snapshot


def test_log_is_kept_on_followers_for_feeds(tmp_path: Path) -> None:
    """A promoted follower still has what the feed needs."""
    small: dict[str, Any] = {"log_file_bytes": 1 << 16, "retention_bytes": 0, "retention_age_s": 0.0}
    with stores(tmp_path) as start:
        a = start("a", acks=1, **small)
        b = start("b", follow=a.address, **small)
        voters(a, "a", "b")
        feed = a.feed("slow", after=a.position)
        for i in range(1, 301):
            a.put(b"%d" % i, bytes(1000))
        for node in (a, b):
            node.wait_for(a.position, WAIT_S)
            node.flush()
            node._node.engine.trim()
        feed.close()
        a.close()
        b.promote(force=True, acks=0)
        with b.feed("slow") as feed:
            assert_none(check_feed(numbers(through_feed(feed, 300)), last=300))


def through_feed(feed: kvrep.Feed, count: int) -> list[Change]:
    found: list[Change] = []
    until(lambda: len(found.__iadd__(feed.poll(0.05))) >= count, what="the feed")
    return found


def test_a_feed_that_selects_little_does_not_hold_the_log(tmp_path: Path) -> None:
    """What a feed leaves out moves its place on by itself, so that the log can be trimmed."""
    small: dict[str, Any] = {"log_file_bytes": 1 << 16, "retention_bytes": 0, "retention_age_s": 0.0,
                             "retention_bytes_max": 1 << 20}  # fmt: skip
    with kvrep.open(tmp_path / "s", **small) as db, db.feed("rare", keyspace="rare") as feed:
        first = feed.info().position
        for i in range(1000):
            db.put(b"%d" % i, bytes(1000))
            if i % 100 == 0:
                assert feed.poll(0) == []
        until(lambda: feed.poll(0) == [] and feed.info().position > first, what="the place to move")
        assert feed.info().lag_bytes < 1 << 20
        db.keyspace("rare").put(b"1", b"v")
        assert numbers(feed.poll(WAIT_S)) == [1]


def test_pause_seek_and_drop_reach_a_reader_that_runs(tmp_path: Path) -> None:
    """What an operator does to a feed holds for its reader from the next poll on, and old acks count no more."""
    with kvrep.open(tmp_path / "s") as db:
        feed = db.feed("f")
        for i in range(1, 11):
            db.put(b"%d" % i, b"v")
        first = feed.poll()
        feed.pause()
        assert feed.info().paused
        db.put(b"11", b"v")
        assert feed.poll(0.1) == []
        feed.resume()
        assert numbers(feed.poll(WAIT_S)) == [11]
        db._feeds.seek("f", first[4].position)
        assert feed.ack() is None, "it was handed out before the seek"
        assert numbers(feed.poll(WAIT_S)) == [6, 7, 8, 9, 10, 11]
        assert feed.ack(first[6]) is not None
        db._feeds.seek("f", first[8].resume)
        assert numbers(feed.poll(WAIT_S)) == [10, 11]
        for to, expected in (
            ("oldest", list(range(1, 12))),
            ("now", []),
            ("snapshot", [1, 10, 11, *range(2, 10)]),
        ):
            feed.seek(to)
            found = []
            while some := feed.poll(0.05):
                found += some
            assert numbers(found) == expected
        with pytest.raises(kvrep.InvalidToken):
            feed.seek("nonsense")
        with pytest.raises(kvrep.Truncated):
            feed.seek(Position(5, 500))
        db._feeds.drop("f")
        with pytest.raises(kvrep.NoSuchFeed):
            feed.poll()
        assert db.feeds() == []
        with pytest.raises(kvrep.NoSuchFeed):
            db._feeds.drop("f")


def test_a_feed_keeps_its_selection(tmp_path: Path) -> None:
    """Opened again without a selection it has the one it was made with; another one is refused."""
    with kvrep.open(tmp_path / "s") as db:
        db.feed("f", keyspace=["users"], prefix=b"u", topic="t").close()
        db.keyspace("users").put(b"u1", b"")
        db.keyspace("users").put(b"x1", b"")
        db.put(b"u2", b"")
    with kvrep.open(tmp_path / "s") as db:
        with db.feed("f") as feed:
            assert [c.key for c in feed.poll()] == [b"u1"]
        with pytest.raises(kvrep.ConfigurationMismatch):
            db.feed("f", keyspace="users")
        for bad in ("", "a b", "x" * 200, "-x"):
            with pytest.raises(kvrep.InvalidInput):
                db.feed(bad)
        with pytest.raises(TypeError):
            db.feed(b"f")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="one of"):
            db.feed("g", after=db.position, snapshot=True)


def test_a_feed_with_a_snapshot_cut_off_goes_on_at_another_node(tmp_path: Path, monkeypatch: Any) -> None:
    """A snapshot that was acked half-way on the old primary is finished by the new one, with all that was
    written meanwhile; the copy is exact."""
    from kvrep.feeds import changes as module

    monkeypatch.setattr(module, "PIECE_ROWS", 5)
    with group(tmp_path, "majority") as (_, (a, b, _c)):
        for i in range(50):
            a.put(b"%02d" % i, b"old")
        copy: Copy = {}
        feed = a.feed("copy", snapshot=True)
        for _ in range(5):
            for change in feed.poll():
                apply(copy, change)
            feed.ack()
            a.put(b"03", b"during")
            a.delete(b"45")
        a.close()
        b.promote()
        put(b, b"01", b"after")
        put(b, b"99", b"after")
        last = put(b, b"98", b"after")
        with b.feed("copy") as feed:
            assert feed.info().in_snapshot
            kinds: list[str] = []
            while ("default", b"98") not in copy or "end" not in kinds:
                for change in feed.poll(WAIT_S):
                    apply(copy, change)
                    kinds.append(change.kind)
                feed.ack()
            assert "begin" not in kinds
            assert feed.position >= last
        assert copy == state(b)


def test_a_follower_left_behind_waits_instead_of_guessing(tmp_path: Path) -> None:
    """A token from ahead of a follower waits until the follower has it."""
    with group(tmp_path, 0, "ab") as (start, (a, b)):
        b.wait_for(a.put(b"1", b"v"), WAIT_S)
        b.close()
        last = a.put(b"2", b"v")
        with a.changes(committed=True, stop=last) as changes:
            token = list(changes)[-1].resume
        after = a.put(b"3", b"v")
        a.close()
        b = start("b", follow="127.0.0.1:1")
        with b.changes(resume=token) as changes:
            assert changes.poll(0.1) == []
            a = start("a")
            b.follow(a.address)
            assert numbers(through(changes, after)) == [3]


def test_one_reader_after_the_other_over_many_failovers(tmp_path: Path) -> None:
    """A feed that is read through three switchovers has every write once."""
    got: list[int] = []
    with group(tmp_path, "majority") as (_, nodes):
        primary = nodes[0]
        number = 0
        for turn in range(4):
            with primary.feed("f") as feed:
                for _ in range(20):
                    number += 1
                    put(primary, b"%d" % number, b"v")
                while not got or got[-1] < number:
                    got += numbers(feed.poll())
                feed.ack()
            if turn < 3:
                following = nodes[(turn + 1) % 3]
                primary.switchover(to=following.status().name)
                primary = following
                role(primary, Role.PRIMARY)
    assert_none(check_feed(got, last=number))


def test_remote_readers_see_the_same(tmp_path: Path) -> None:
    """Over a connection, changes, tokens, snapshots and errors are those of the store itself."""
    from kvrep.feeds.serving import RemoteChanges
    from kvrep.transport.network import GrpcTransport

    with group(tmp_path, 1, "ab") as (_, (a, b)):
        for i in range(1, 21):
            a.put(b"%d" % i, b"v")
        with a.transaction() as txn:
            txn.put(b"21", b"big" * 100_000)
            txn.emit("t", b"m", headers={"a": "b"})
        b.wait_for(a.position, WAIT_S)
        transport = GrpcTransport()
        call = connected(transport, b.address)
        with a.changes(stop=a.position) as changes:
            expected = list(changes)
        remote = RemoteChanges(call, token="oldest")
        found = [*remote.poll(WAIT_S)]
        while len(found) < len(expected):
            found += remote.poll(WAIT_S)
        assert [c._replace(origin=None) for c in found] == [c._replace(origin=None) for c in expected]
        assert [c.resume for c in found] == [c.resume for c in expected]
        assert remote.poll(0.05) == []
        a.put(b"22", b"v")
        assert numbers(remote.poll(WAIT_S)) == [22]
        again = RemoteChanges(call, token=found[4].resume, keyspaces=["default"], prefix=b"1")
        assert numbers(again.poll(WAIT_S)) == list(range(10, 20))
        rows = RemoteChanges(call, token="")
        kinds: list[str] = []
        while kinds[-1:] != ["end"]:
            kinds += [c.kind for c in rows.poll(WAIT_S)]
        assert kinds == ["begin", *["put"] * 22, "end"]
        with pytest.raises(kvrep.InvalidToken):
            RemoteChanges(call, token="k1xx").poll()
        with pytest.raises(kvrep.ProtocolError):
            call("feed-read", {"token": ""})


def connected(transport: Any, address: str) -> Callable[..., Any]:
    connection = transport.connect(address, name="test")
    return lambda method, request: connection.call(method, request, timeout_s=WAIT_S)


def test_a_feed_that_was_interrupted_goes_back_to_its_place(tmp_path: Path, monkeypatch: Any) -> None:
    """A Ctrl-C while changes are on their way to the reader: they come again, and are not acked unseen."""
    with kvrep.open(tmp_path / "s") as db, db.feed("f") as feed:
        for i in range(1, 11):
            db.put(b"%d" % i, b"v")
        real = kvrep.Changes.poll

        def interrupted(changes: kvrep.Changes, timeout_s: float) -> list[Change]:
            real(changes, timeout_s)
            raise KeyboardInterrupt

        monkeypatch.setattr(kvrep.Changes, "poll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            feed.poll()
        monkeypatch.undo()
        assert feed.ack() is None
        db.put(b"11", b"v")
        got: list[int] = []
        while len(got) < 11:
            got += numbers(feed.poll(WAIT_S))
        assert got == list(range(1, 12))
