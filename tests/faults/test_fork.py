"""Forked children and second openers: whoever has the store keeps it, and nobody else touches it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kvrep

CHILD = """
import multiprocessing, os, sys, threading, traceback, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import kvrep

path = sys.argv[1]
db = kvrep.open(path, flush_interval_s=3600.0)
db[b"k"] = b"v"
users = db.keyspace("users")
users[b"u"] = b"1"
view = db.snapshot()
scan = db.scan()
next(scan)
batch = db.batch()
batch.put(b"x", b"y")
txn = db.transaction()
future = db.submit_put(b"f", b"1")
future.result()
stream = db.changes()
stream.poll()
rows = db.changes(snapshot=True)
rows.poll()
feed = db.feed("f")
feed.poll()

def attempts():
    yield "changes", lambda: db.changes()
    yield "stream", lambda: next(stream)
    yield "rows", lambda: list(rows)
    yield "feed", lambda: db.feed("f")
    yield "poll", lambda: feed.poll()
    yield "ack", lambda: feed.ack()
    yield "feeds", lambda: db.feeds()
    for space in (db, users):
        yield "get", lambda s=space: s.get(b"k")
        yield "item", lambda s=space: s[b"k"]
        yield "in", lambda s=space: b"k" in s
        yield "len", lambda s=space: len(s)
        yield "iter", lambda s=space: list(s)
        yield "reversed", lambda s=space: list(reversed(s))
        yield "scan", lambda s=space: list(s.scan())
        yield "items", lambda s=space: list(s.items())
        yield "values", lambda s=space: list(s.values())
        yield "put", lambda s=space: s.put(b"c", b"c")
        yield "set", lambda s=space: s.__setitem__(b"c", b"c")
        yield "delete", lambda s=space: s.delete(b"c")
        yield "del", lambda s=space: s.__delitem__(b"k")
        yield "submit_put", lambda s=space: s.submit_put(b"c", b"c")
        yield "submit_delete", lambda s=space: s.submit_delete(b"c")
        yield "compare_and_set", lambda s=space: s.compare_and_set(b"k", expected=b"v", value=b"w")
        yield "put_if_absent", lambda s=space: s.put_if_absent(b"c", b"c")
        yield "setdefault", lambda s=space: s.setdefault(b"c", b"c")
        yield "pop", lambda s=space: s.pop(b"k")
        yield "popitem", lambda s=space: s.popitem()
        yield "update", lambda s=space: s.update({b"c": b"c"})
        yield "clear", lambda s=space: s.clear()
    yield "keyspace", lambda: db.keyspace("more")
    yield "keyspaces", lambda: db.keyspaces()
    yield "snapshot", lambda: db.snapshot()
    yield "position", lambda: db.position
    yield "wait_for", lambda: db.wait_for(kvrep.Position(1001, 1))
    yield "resolve", lambda: db.resolve(kvrep.Position(1001, 1))
    yield "flush", lambda: db.flush()
    yield "status", lambda: db.status()
    yield "reconfigure", lambda: db.reconfigure(ack_timeout_s=1.0)
    yield "add_voter", lambda: db.add_voter("x")
    yield "remove_voter", lambda: db.remove_voter("x")
    yield "promote", lambda: db.promote()
    yield "force", lambda: db.promote(force=True)
    yield "follow", lambda: db.follow("127.0.0.1:1")
    yield "switchover", lambda: db.switchover("x")
    yield "on_event", lambda: db.on_event(print)
    yield "on_rollback", lambda: db.on_rollback(print)
    yield "settle", lambda: db.settle(kvrep.RequestId(bytes(16), 1, 1, 0))
    yield "view.get", lambda: view.get(b"k")
    yield "view.scan", lambda: list(view.scan())
    yield "view.len", lambda: len(view)
    yield "running scan", lambda: list(scan)
    yield "batch", lambda: batch.__exit__(None, None, None)
    yield "txn.get", lambda: txn.get(b"k")

def in_child():
    bad = []
    for name, attempt in attempts():
        try:
            result = attempt()
        except kvrep.ForkedError:
            continue
        except BaseException as error:
            bad.append(f"{name}: {error!r}")
        else:
            bad.append(f"{name}: gave {result!r}")
    db.close()
    for line in bad:
        print("BAD", line, flush=True)
    return bad

how = sys.argv[2]
stop = threading.Event()
def write():
    n = 0
    while not stop.is_set():
        n += 1
        db.put(b"n", b"%d" % n)
writer = threading.Thread(target=write)
writer.start()
for _ in range(5 if how == "fork" else 2):
    if how == "fork":
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = bool(in_child())
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    else:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=lambda: sys.exit(bool(in_child())))
        process.start()
        process.join(20)
        assert process.exitcode == 0
stop.set()
writer.join()
# The parent is unharmed and still holds the lock.
assert db[b"k"] == b"v" and view.get(b"k") == b"v"
db.put(b"after", b"1")
try:
    kvrep.open(path)
except kvrep.StoreInUse as error:
    assert error.pid == os.getpid()
else:
    raise SystemExit("the lock is gone")
last = db[b"n"]
view.close()
del scan
db.close()
with kvrep.open(path) as db:
    assert db[b"after"] == b"1" and db[b"n"] == last and b"c" not in db
print("DONE")
"""

HOLDER = """
import sys, kvrep
db = kvrep.open(sys.argv[1])
db[b"k"] = b"v"
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
def test_every_handle_is_dead_in_a_forked_child(store_path: Path, how: str) -> None:
    """Every public method raises ForkedError in the child; the parent goes on and keeps the lock."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(store_path), how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "BAD" not in done.stdout
    assert done.stdout.endswith("DONE\n"), done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def test_second_opener_in_this_process_is_refused(store_path: Path) -> None:
    """The same process cannot open a store twice; the error names the process; the first handle works on."""
    with kvrep.open(store_path) as db:
        for path in (store_path, store_path / ".." / store_path.name):
            with pytest.raises(kvrep.StoreInUse) as caught:
                kvrep.open(path)
            assert caught.value.pid == os.getpid()
        link = store_path.parent / "link"
        link.symlink_to(store_path)
        with pytest.raises(kvrep.StoreInUse):
            kvrep.open(link)
        db[b"k"] = b"v"
    with kvrep.open(store_path) as db:
        assert db[b"k"] == b"v"


def test_other_process_holds_until_it_is_killed(store_path: Path) -> None:
    """Another process's store is refused with its pid, and opens as soon as that process is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(store_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(kvrep.StoreInUse) as caught:
            kvrep.open(store_path)
        assert caught.value.pid == holder.pid
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    with kvrep.open(store_path) as db:
        assert db[b"k"] == b"v"


IN_CHILD = """
import os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import kvrep
from kvrep.storage import write

parent = kvrep.open(sys.argv[1])
held, go = threading.Event(), threading.Event()
def hold():
    with write._callbacks_lock:
        held.set()
        go.wait(20)
holder = threading.Thread(target=hold)
holder.start()
held.wait(20)
pid = os.fork()
if pid == 0:
    told = threading.Event()
    with kvrep.open(sys.argv[1] + "-child") as db:
        db.submit_put(b"k", b"v").add_done_callback(lambda future: told.set())
        os._exit(0 if told.wait(20) else 1)
status = os.waitpid(pid, 0)[1]
go.set()
holder.join()
parent.close()
print("DONE", status)
"""


def test_a_child_that_opens_its_own_store_finds_every_lock_free(tmp_path: Path) -> None:
    """A fork at a moment when a thread of the parent holds the lock of callbacks does not stop the child."""
    done = subprocess.run(
        [sys.executable, "-c", IN_CHILD, str(tmp_path / "s")],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.stdout == "DONE 0\n", done.stderr
