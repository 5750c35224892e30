"""Followers that the log cannot serve get a whole copy, and nobody who holds them notices more than that."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.replication.messages import NeedBootstrap
from kvrep.runtime import bootstrapping, session, spooling
from kvrep.runtime import node as node_module
from kvrep.storage.copying import open_received
from kvrep.storage.rescue import load_rescue
from tests.bootstrap_kit import (
    OPTIONS,
    alike,
    all_of,
    follower,
    gate,
    generations,
    open_files,
    primary,
    receiving,
    spooled,
    streaming,
    trimmed,
    write,
)
from tests.replication_kit import WAIT_S, until

HALF = 2 << 20
"""Bytes after which a gate stops: well inside of a copy of 5000 pairs."""


@contextmanager
def writing(store: kvrep.Store) -> Iterator[None]:
    """Write to a store all the while: new keys, overwritten and deleted ones."""
    stop = threading.Event()

    def run() -> None:
        for i in itertools.count():
            if stop.is_set():
                return
            store.put(b"new-%06d" % i, b"v" * 200)
            store.put(b"same", b"%d" % i)
            if i % 3 == 0:
                store.pop(b"new-%06d" % (i // 2), None)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(WAIT_S)


def test_new_follower_of_a_trimmed_log(tmp_path: Path) -> None:
    """A new follower gets a copy and the log behind it, while writes go on, and nothing is missing."""
    with primary(tmp_path / "a") as a:
        a.keyspace("users").put(b"u", b"1")
        trimmed(a)
        with gate(a.address, HALF) as g, follower(tmp_path / "b", g.address) as b:
            with writing(a):
                receiving(b)
                assert b.status().source.state == "bootstrapping"
                assert b.status().source.bootstrap_bytes_total > HALF
                assert [f.state for f in a.status().followers] == ["bootstrapping"]
                at = a.status().last_offset
                until(lambda: a.status().last_offset > at + 100)
                g.release()
                streaming(b)
            alike(a, b)
            assert b.keyspace("users")[b"u"] == b"1"
            assert b.status().lineage == a.status().lineage
            until(lambda: b.status().verified_through > 0, what="the copy's digest")
            assert b.status().diverged_at == 0
            assert b.status().rescued == ()
            until(lambda: not spooled(tmp_path / "a"), what="the end of the spooled copy")
            assert generations(tmp_path / "b") == ["gen-000002"]
            assert not (tmp_path / "b" / "gen-000002" / "COPY").exists()
        with follower(tmp_path / "b", a.address) as b:
            assert streaming(b).status().source.bootstrap_bytes_total == 0
            a.put(b"after", b"1")
            alike(a, b)


def test_copy_while_nothing_else_is_in_the_log(tmp_path: Path) -> None:
    """A copy after whose position nothing was written is joined at its end, and again after a restart."""
    with primary(tmp_path / "a") as a:
        for _ in range(2):
            with follower(tmp_path / "b", a.address, voter=False) as b:
                streaming(b)
                alike(a, b)
        a.put(b"one", b"1")
        with follower(tmp_path / "b", a.address, voter=False) as b:
            alike(a, b)
            assert b.status().source.bootstrap_bytes_total == 0


@contextmanager
def left_behind(tmp_path: Path, a: kvrep.Store) -> Iterator[None]:
    """Make follower b know an old state of ``a``, then let the log go on without it."""
    a.keyspace("first").put(b"k", b"old")
    with follower(tmp_path / "b", a.address) as b:
        alike(a, streaming(b))
    old = a.status().last_offset
    a.keyspace("between").put(b"k", b"between")
    a.keyspace("first").put(b"k", b"new")
    a.put(b"seen", b"new")
    write(a, 5000, seed=2)
    trimmed(a, old + 1)
    yield


def test_too_far_behind(tmp_path: Path) -> None:
    """A follower that the log has left behind serves its old state until the copy takes over, in place."""
    with primary(tmp_path / "a", 0, retention_bytes_max=512 << 10) as a:
        a.put(b"seen", b"old")
        write(a, 300)
        with left_behind(tmp_path, a), gate(a.address, HALF) as g:
            with follower(tmp_path / "b", g.address) as b:
                first, late = b.keyspace("first"), b.keyspace("late")
                receiving(b)
                before = dict(b.items())
                snapshot, scan = b.snapshot(), b.scan()
                some = list(itertools.islice(scan, 10))
                assert (b[b"seen"], first[b"k"], len(before)) == (b"old", b"old", 301)
                g.release()
                streaming(b)
                alike(a, b)
                assert (b[b"seen"], first[b"k"], b.keyspace("between")[b"k"]) == (b"new", b"new", b"between")
                a.keyspace("late").put(b"k", b"late")
                alike(a, b)
                assert late[b"k"] == b"late"
                assert dict(snapshot.scan()) == before
                assert snapshot[b"seen"] == b"old"
                assert some + list(scan) == sorted(before.items())
                assert open_files("/b/gen-000001")
                snapshot.close()
                until(lambda: not open_files("/b/gen-000001"), what="the end of the old copy")
                assert generations(tmp_path / "b") == ["gen-000002"]


def test_a_feed_of_a_follower_that_is_copied_anew(tmp_path: Path) -> None:
    """A reader whose records the new copy jumps over is told so (LogTrimmed); one that begins anew has all."""
    with primary(tmp_path / "a", 0, retention_bytes_max=512 << 10) as a:
        a.put(b"seen", b"old")
        write(a, 300)
        with left_behind(tmp_path, a), gate(a.address, HALF) as g:
            with follower(tmp_path / "b", g.address) as b:
                receiving(b)
                eager = b.changes(snapshot=True, committed=True)  # nobody has told yet what the voters hold
                with b.changes(committed=True) as changes, eager as rows:
                    assert changes.poll()
                    assert [c.kind for c in rows.poll()] == ["begin"]
                    g.release()
                    streaming(b)
                    alike(a, b)
                    for stream in (changes, rows):
                        with pytest.raises(kvrep.LogTrimmed):
                            for _ in stream:
                                pass
                with b.changes(snapshot=True, committed=True) as rows:
                    found = list(itertools.takewhile(lambda c: c.kind != "end", rows))
                    copy = {(c.keyspace, c.key): c.value for c in found if c.kind == "put"}
                    assert copy == {(n, k): v for n in b.keyspaces() for k, v in b.keyspace(n).items()}
                    position = a.put(b"later", b"1")
                    until(lambda: any(c.position == position for c in rows.poll(0.05)), what="the stream")


def test_snapshot_of_the_old_copy_expires(tmp_path: Path) -> None:
    """A snapshot held across the take-over expires like any other, and frees the old copy."""
    with primary(tmp_path / "a", 0, retention_bytes_max=512 << 10) as a:
        write(a, 300)
        with left_behind(tmp_path, a), gate(a.address, HALF) as g:
            with follower(tmp_path / "b", g.address, snapshot_age_max_s=1.5) as b:
                receiving(b)
                snapshot = b.snapshot()
                g.release()
                streaming(b)
                until(lambda: not open_files("/b/gen-000001"), what="the end of the old copy")
                with pytest.raises(kvrep.SnapshotExpired):
                    snapshot.get(b"seen")
                snapshot.close()


def test_reads_never_fail_during_the_take_over(tmp_path: Path) -> None:
    """Point reads, snapshots and scans of many threads go on through a take-over, each of one state."""
    with primary(tmp_path / "a", 0, retention_bytes_max=512 << 10) as a:
        a.put(b"one", b"old")
        a.put(b"two", b"old")
        with left_behind(tmp_path, a):
            with a.batch() as batch:
                batch.put(b"one", b"new")
                batch.put(b"two", b"new")
            a.flush()
            with gate(a.address, HALF) as g, follower(tmp_path / "b", g.address) as b:
                receiving(b)
                stop, failures = threading.Event(), []

                def read() -> None:
                    try:
                        seen = b"old"
                        while not stop.is_set():
                            now = b[b"one"]
                            assert not (seen == b"new" and now == b"old")
                            seen = now
                            with b.snapshot() as view:
                                assert view[b"one"] == view[b"two"]
                            assert sum(1 for _ in b.scan(prefix=b"t")) == 1
                    except BaseException as error:
                        failures.append(error)

                threads = [threading.Thread(target=read) for _ in range(4)]
                for thread in threads:
                    thread.start()
                g.release()
                streaming(b)
                until(lambda: b[b"one"] == b"new")
                stop.set()
                for thread in threads:
                    thread.join(WAIT_S)
                assert failures == []


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What primaries are asked for from now on: (snapshot id, offset)."""
    requests: list[tuple[str, int]] = []
    take = spooling.Spools.take

    def note(self: spooling.Spools, request: spooling.SnapshotRequest) -> spooling.Spool:
        spool = take(self, request)
        requests.append(
            (spool.snapshot_id, request.offset if spool.snapshot_id == request.snapshot_id else 0)
        )
        return spool

    monkeypatch.setattr(spooling.Spools, "take", note)
    return requests


def test_resumes_after_a_cut_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a cut connection the rest of the same copy is fetched, not all of it again."""
    requests = asked(monkeypatch)
    with primary(tmp_path / "a") as a, gate(a.address, HALF) as g:
        with follower(tmp_path / "b", g.address) as b:
            receiving(b)
            got = b.status().source.bootstrap_bytes
            g.release()
            g.cut()
            streaming(b)
            alike(a, b)
            until(lambda: b.status().verified_through > 0)
    (first, start), (second, rest) = requests
    assert (first, start) == (second, 0)
    assert rest >= got


def test_resumes_after_a_restart_of_the_follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that is closed half-way ends promptly and goes on where it was when it is opened again."""
    requests = asked(monkeypatch)
    with primary(tmp_path / "a") as a:
        with gate(a.address, HALF) as g:
            b = follower(tmp_path / "b", g.address)
            receiving(b)
            got = b.status().source.bootstrap_bytes
            began = time.monotonic()
            b.close()
            assert time.monotonic() - began < 5
        assert generations(tmp_path / "b") == ["gen-000001", "gen-000002"]
        with follower(tmp_path / "b", a.address) as b:
            streaming(b)
            alike(a, b)
    (first, start), (second, rest) = requests
    assert (first, start) == (second, 0)
    assert rest >= got


def test_damage_to_what_has_arrived_is_found(tmp_path: Path) -> None:
    """What was damaged on the follower's disk before a restart is fetched again."""
    with primary(tmp_path / "a") as a:
        with gate(a.address, HALF) as g:
            with follower(tmp_path / "b", g.address) as b:
                receiving(b)
        data = tmp_path / "b" / "gen-000002" / "data" / "data.mdb"
        with open(data, "r+b") as file:
            file.seek(500_000)
            byte = file.read(1)[0]
            file.seek(500_000)
            file.write(bytes([byte ^ 1]))
        with follower(tmp_path / "b", a.address) as b:
            streaming(b)
            alike(a, b)
            until(lambda: b.status().verified_through > 0)


def test_damage_to_the_spooled_copy_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A copy that the primary's disk has damaged is given up, and another one is made."""
    caplog.set_level(logging.INFO, "kvrep.replication")
    with primary(tmp_path / "a", 20_000) as a, gate(a.address, 100_000) as g:
        with follower(tmp_path / "b", g.address) as b:
            until(lambda: b.status().source.bootstrap_bytes_total > 0)
            total = b.status().source.bootstrap_bytes_total
            until(lambda: spooled(tmp_path / "a"))
            [name] = spooled(tmp_path / "a")
            path = tmp_path / "a" / "spool" / name
            until(lambda: path.stat().st_size == total, what="the whole spool")
            with open(path, "r+b") as file:
                file.seek(total - 5000)
                byte = file.read(1)[0]
                file.seek(total - 5000)
                file.write(bytes([byte ^ 1]))
            g.release()
            streaming(b)
            alike(a, b)
            until(lambda: b.status().verified_through > 0)
    assert len([r for r in caplog.records if "copying the state" in r.message]) == 2
    assert [r for r in caplog.records if "damaged at byte" in r.message]


def test_several_followers_share_one_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three followers at once are served from one spooled file, which goes when the last one has joined."""
    caplog.set_level(logging.INFO, "kvrep.replication")
    with primary(tmp_path / "a") as a, gate(a.address, 1 << 20) as g:
        stores = [follower(tmp_path / name, g.address, name, voter=False) for name in "bcd"]
        with all_of(*stores):
            for store in stores:
                until(lambda store=store: store.status().source.bootstrap_bytes_total > 0)
            assert len(spooled(tmp_path / "a")) == 1
            with writing(a):
                g.release()
                for store in stores:
                    streaming(store)
            alike(a, *stores)
            until(lambda: not spooled(tmp_path / "a"), what="the end of the spooled copy")
    assert len([r for r in caplog.records if "copying the state" in r.message]) == 1


def test_log_is_kept_for_an_unnamed_follower(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While a copy is under way, the log behind it is kept even for a follower without a name."""
    caplog.set_level(logging.INFO, "kvrep.replication")
    with primary(tmp_path / "a") as a, gate(a.address, HALF) as g:
        copied = a.status().applied_offset
        with follower(tmp_path / "b", g.address, None) as b:
            receiving(b)
            write(a, 3000, seed=3)
            a.flush()
            assert a.status().log_bytes > 4 * OPTIONS["retention_bytes"]
            assert a.status().first_offset <= copied + 1
            g.release()
            streaming(b)
            alike(a, b)
    assert len([r for r in caplog.records if "took over" in r.message]) == 1


def test_cap_of_the_log_ends_the_wait_for_a_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the retention cap the log goes on without a follower, which then gets another copy."""
    caplog.set_level(logging.INFO, "kvrep.replication")
    with primary(tmp_path / "a", retention_bytes_max=512 << 10) as a, gate(a.address, HALF) as g:
        copied = a.status().applied_offset
        with follower(tmp_path / "b", g.address) as b:
            receiving(b)
            write(a, 3000, seed=3)
            trimmed(a, copied + 1)
            g.release()
            streaming(b)
            alike(a, b)
    assert len([r for r in caplog.records if "copying the state" in r.message]) == 2


def slow_spool(monkeypatch: pytest.MonkeyPatch, chunks: int) -> threading.Event:
    """Let a copy be spooled up to a chunk only, until the event is set."""
    go, store = threading.Event(), spooling.Spool._store

    def held(self: spooling.Spool, data: memoryview) -> None:
        while len(self._crcs) >= chunks and not go.is_set() and not self._cancelled:
            go.wait(0.01)
        store(self, data)

    monkeypatch.setattr(spooling.Spool, "_store", held)
    return go


def test_copy_is_sent_while_it_is_spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been spooled is on its way to the follower before LMDB's copy has ended."""
    go = slow_spool(monkeypatch, 2)
    with primary(tmp_path / "a") as a, follower(tmp_path / "b", a.address) as b:
        until(lambda: b.status().source.bootstrap_bytes == 2 << 20)
        assert b.status().source.bootstrap_bytes_total > 2 << 20
        go.set()
        streaming(b)
        alike(a, b)


def test_primary_closes_while_it_spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() on the primary ends LMDB's copy and the transfers of it promptly, and leaves no file."""
    slow_spool(monkeypatch, 2)
    with primary(tmp_path / "a") as a, follower(tmp_path / "b", a.address) as b:
        until(lambda: b.status().source.bootstrap_bytes == 2 << 20)
        began = time.monotonic()
        a.close()
        assert time.monotonic() - began < 5
        assert spooled(tmp_path / "a") == []
        until(lambda: b.status().source.problem)
        assert generations(tmp_path / "b") == ["gen-000001", "gen-000002"]


def slow_disk(monkeypatch: pytest.MonkeyPatch, arrived: int) -> threading.Event:
    """Let a follower take so many bytes of a copy only, until the event is set."""
    go, add = threading.Event(), bootstrapping._Syncer.add

    def held(self: Any, data: bytes, check: int) -> None:
        add(self, data, check)
        if self._arrived.length >= arrived:
            go.wait(WAIT_S)

    monkeypatch.setattr(bootstrapping._Syncer, "add", held)
    return go


def test_primary_closes_while_it_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a close() and a new start of the primary in the middle, the follower gets a new copy."""
    go = slow_disk(monkeypatch, 2 << 20)
    with primary(tmp_path / "a", 15_000) as a, gate(a.address, 1 << 30) as g:
        with follower(tmp_path / "b", g.address) as b:
            until(lambda: b.status().source.bootstrap_bytes > 0)
            began = time.monotonic()
            a.close()
            assert time.monotonic() - began < 5
            assert spooled(tmp_path / "a") == []
            with primary(tmp_path / "a", 0) as again:
                g.target = again.address
                go.set()
                streaming(b)
                alike(again, b)


def need(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Have the primary refuse the next join that would work, as if for ``reason``."""
    check = session.check_running
    left = [1]

    def refuse(plan: Any, hello: Any, running: int, view: Any) -> Any:
        if left:
            left.pop()
            return NeedBootstrap(first=view.first, reason=reason)
        return check(plan, hello, running, view)

    monkeypatch.setattr(session, "check_running", refuse)


def test_wrong_checksum_saves_the_whole_log_and_keeps_the_vote_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower whose records differ saves its log first, and does not vote before it has all again."""
    with kvrep.open(tmp_path / "a", name="a", listen="127.0.0.1:0", heartbeat_interval_s=0.1) as a:
        a.put(b"k", b"1")
        a.flush()
        with follower(tmp_path / "b", a.address, voter=False) as b:
            a.put(b"k", b"2")
            alike(a, streaming(b))
        last = a.status().last_offset
        assert a.status().applied_offset < last
        need(monkeypatch, "checksum")
        floors: list[tuple[int, int]] = []
        replace = bootstrapping._Bootstrap._keep_vote_back

        def note(self: Any, tree: Any) -> None:
            replace(self, tree)
            floors.append((self._home.vote_floor, tree.state.applied.offset))

        monkeypatch.setattr(bootstrapping._Bootstrap, "_keep_vote_back", note)
        with follower(tmp_path / "b", a.address, voter=False) as b:
            until(lambda: b.status().rescued)
            streaming(b)
            alike(a, b)
            [path] = b.status().rescued
        rescued = load_rescue(Path(path))
        assert (rescued.first, rescued.last) == (1, last)
        assert "checksum" in rescued.reason
        assert floors == [(last, floors[0][1])]
        assert floors[0][1] < last


def test_vote_is_kept_back_below_the_floor(tmp_path: Path) -> None:
    """A node whose log ends below what it has confirmed does not answer a promoter."""
    with primary(tmp_path / "a", 0) as a, follower(tmp_path / "b", a.address, voter=False) as b:
        a.put(b"k", b"1")
        alike(a, streaming(b))
        replaying, engine = b._node.replaying, b._node.engine
        sent: list[Any] = []

        class Stream:
            def send(self, message: Any) -> None:
                sent.append(message)

        engine.home.set_vote_floor(engine.tail.offset + 1)
        with pytest.raises(kvrep.ProtocolError, match="does not vote"):
            replaying._promise(Stream(), engine.home.promised_epoch, True)
        assert sent == []
        engine.home.set_vote_floor(engine.tail.offset)
        replaying._promise(Stream(), engine.home.promised_epoch, True)
        assert [m.last.offset for m in sent] == [engine.tail.offset]


def test_diverged_follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that went its own way saves what only it has, and gets the primary's state."""
    with primary(tmp_path / "a", 0) as a:
        a.put(b"common", b"1")
        with follower(tmp_path / "b", a.address, voter=False) as b:
            alike(a, streaming(b))
    shared = b._node.engine.tail.offset
    epoch_after = node_module.epoch_after
    with monkeypatch.context() as patch:
        patch.setattr(node_module, "epoch_after", lambda known, member: epoch_after(known, 2))
        with kvrep.open(tmp_path / "b") as b:
            b.put(b"own", b"1")
            b.put(b"common", b"2")
            b.flush()
            own = b.status().last_offset
    for _ in range(3):
        with primary(tmp_path / "a", 0) as a:
            a.put(b"more", b"1")
    with primary(tmp_path / "a", 0) as a:
        a.put(b"other", b"1")
        a.flush()
        with follower(tmp_path / "b", a.address, voter=False) as b:
            streaming(b)
            alike(a, b)
            assert dict(b.items()) == {b"common": b"1", b"more": b"1", b"other": b"1"}
            [path] = b.status().rescued
        rescued = load_rescue(Path(path))
        assert (rescued.first, rescued.last) == (shared + 1, own)
        assert "diverged" in rescued.reason


def test_wrong_digest_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy whose pairs do not add up to its digest is reported, and not shown as verified."""

    def tampered(directory: Path, lineage: bytes, **options: Any) -> Any:
        tree = open_received(directory, lineage, **options)
        with tree.env.begin(write=True) as txn:
            key = next(iter(txn.cursor(tree.handle("default"))))[0]
            txn.put(key, b"other", db=tree.handle("default"))
        return tree

    monkeypatch.setattr(bootstrapping, "open_received", tampered)
    with primary(tmp_path / "a") as a, follower(tmp_path / "b", a.address) as b:
        streaming(b)
        until(lambda: b.status().diverged_at > 0, what="the difference")
        until(lambda: [r for r in caplog.records if r.levelno == logging.ERROR and "differ" in r.message])
        for i in range(3):
            a.put(b"later", b"%d" % i)
            a.flush()
            b.wait_for(a.position, WAIT_S)
            b.flush()
        assert b.status().verified_through == 0


def test_verification_goes_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that was not verified before the follower was closed is verified after the next open."""
    with primary(tmp_path / "a") as a:
        with monkeypatch.context() as patch:
            patch.setattr(bootstrapping, "VERIFY_BREATH_S", 3600.0)
            with follower(tmp_path / "b", a.address) as b:
                streaming(b)
                alike(a, b)
                assert b.status().verified_through == 0
        assert (tmp_path / "b" / "gen-000002" / "COPY").exists()
        with follower(tmp_path / "b", a.address) as b:
            until(lambda: b.status().verified_through > 0)
        assert not (tmp_path / "b" / "gen-000002" / "COPY").exists()


def test_copy_of_another_store_is_refused(tmp_path: Path) -> None:
    """A copy that is not of this node's own store is not even begun."""
    with primary(tmp_path / "a", 0) as a, primary(tmp_path / "x", 0) as x:
        a.put(b"k", b"1")
        request = spooling.SnapshotRequest(
            store_id=b"s" * 16, name="b", lineage=bytes.fromhex(x.status().lineage)
        )
        connection = a._node.transport.connect(a.address, name="b")
        try:
            with pytest.raises(kvrep.LineageMismatch):
                next(connection.snapshot(request, 5.0))
        finally:
            connection.close()
