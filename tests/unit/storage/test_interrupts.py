"""Ctrl-C at every point where the interpreter may raise it: the store works on and no other write waits."""

from __future__ import annotations

import dis
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kvrep
from kvrep.model.codec import decode

OPTIONS: dict[str, Any] = {
    "log_file_bytes": 64 << 10,
    "map_bytes": 64 << 20,
    "flush_interval_s": 3600.0,
}


class Interrupter:
    """Raises KeyboardInterrupt in this thread at the n-th point at which CPython looks for signals.

    It looks at the start of a function, at jumps backwards and after calls.
    """

    LOOKS = ("RESUME", "JUMP_BACKWARD", "CALL")

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen = 0
        self.raised_in = ""

    def run(self, action: Callable[[], object]) -> bool:
        """Whether ``action`` was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if "/kvrep/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        code = frame.f_code.co_code
        previous = -1

        def step(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal previous
            if event != "opcode":
                return step
            last, previous = previous, frame.f_lasti
            if last >= 0 and dis.opname[code[last]].startswith(self.LOOKS):
                self.seen += 1
                if self.seen == self.at:
                    self.raised_in = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                    raise KeyboardInterrupt
            return step

        return step


def transaction(db: kvrep.Store, n: int) -> None:
    with db.transaction() as txn:
        txn[b"count"] = b"%d" % (int(txn.get(b"count", b"0")) + 1)
        txn.put(b"txn-%d" % n, b"%d" % n)


ACTIONS: dict[str, Callable[[kvrep.Store, int], object]] = {
    "put": lambda db, n: db.put(b"put-%d" % n, b"%d" % n),
    "big put": lambda db, n: db.put(b"put-%d" % n, b"%d" % n * 4000),
    "submit": lambda db, n: db.submit_put(b"put-%d" % n, b"%d" % n).result(5),
    "transaction": transaction,
    "get": lambda db, n: [db.get(b"other-%d" % i) for i in range(3)],
    "scan": lambda db, n: list(db.scan(limit=3)),
    "snapshot": lambda db, n: db.snapshot().close(),
}


WRITES = ("put", "big put", "submit", "transaction")


@pytest.mark.parametrize(
    ("name", "queued"), [*((name, False) for name in ACTIONS), *((name, True) for name in WRITES)]
)
def test_interrupted_at_every_point(memory_store: Path, name: str, queued: bool) -> None:
    """After each interrupt another thread's write is done at once, and everything acknowledged is there."""
    action = ACTIONS[name]
    acked: dict[bytes, bytes] = {}
    at = 0
    db = kvrep.open(memory_store, **OPTIONS)
    try:
        db.put(b"first", b"1")
        if queued:  # another rule than a lonely node's own: no write takes the short way
            db._node.engine.committer.rule = lambda durable: durable
        while True:
            at += 1
            interrupter = Interrupter(at)
            interrupted = interrupter.run(lambda at=at: action(db, at))
            where = f"interrupted in {interrupter.raised_in}"
            assert other_thread(db, b"other-%d" % at, where) < 3.0, where
            acked[b"other-%d" % at] = b"1"
            if not interrupted:
                break
            if at % 60 == 0:
                db.flush(10.0)
        assert at > 10
        found = dict(db.scan())
        assert {k: found.get(k) for k in acked} == acked
        begun = [int(k.split(b"-")[1]) for k in found if k.startswith(b"txn-")]
        assert int(found.get(b"count", b"0")) == len(begun)
        logged = [key for key in keys_in_log(db) if key.startswith((b"put-", b"txn-", b"other-"))]
        twice = {key for key in logged if logged.count(key) > (2 if key.startswith(b"other-") else 1)}
        assert not twice, "logged more than once"
        committer = db._node.engine.committer
        assert committer._queued_bytes + committer.pending_bytes < 1 << 20
    finally:
        began = threading.Event()
        closing = threading.Timer(20.0, began.set)
        closing.start()
        db.close(15.0)
        closing.cancel()
        closing.join()
        assert not began.is_set(), "close() did not keep to its deadline"
    with kvrep.open(memory_store, **OPTIONS) as db:
        assert dict(db.scan()) == found


def keys_in_log(db: kvrep.Store) -> list[bytes]:
    """The keys of all operations in the log, in order."""
    log, keys = db._node.engine.committer.log, []
    offset, running = 1, 0
    while (run := log.read(offset, 1 << 20)) is not None:
        records, running = decode(run.data, offset, running)
        keys += [key for record in records for _, key, _ in record.ops()]
        offset = run.last + 1
    return keys


def other_thread(db: kvrep.Store, key: bytes, where: str) -> float:
    """Seconds that another thread's put, transaction and pipelined write take."""
    import time

    began = time.monotonic()
    errors: list[BaseException] = []

    def write() -> None:
        try:
            db.put(key, b"0", timeout_s=10.0)
            with db.transaction(timeout_s=10.0) as txn:
                assert txn[key] == b"0"
                txn[key] = b"1"
            assert db[key] == b"1"
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(30.0)
    assert not thread.is_alive(), where
    assert not errors, f"{where}: {errors}"
    return time.monotonic() - began


STORM = """
import os, signal, sys, threading, time, kvrep
db = kvrep.open(sys.argv[1], log_file_bytes=65536, flush_interval_s=0.2, retention_bytes=0)
acked, stop, others, failures, interrupts = {}, threading.Event(), [0, 0, 0], [], 0

def other(i):
    n = 0
    while not stop.is_set():
        try:
            key = b"%d-%d" % (i, n)
            db.put(key, b"x", timeout_s=20)
            assert db[key] == b"x"
            acked[key] = b"x"
        except BaseException as error:
            failures.append(repr(error))
            return
        n += 1
        others[i] = n

def storm():
    while not stop.is_set():
        time.sleep(0.004)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

threads = [threading.Thread(target=other, args=(i,)) for i in range(3)]
for t in threads:
    t.start()
stormer = threading.Thread(target=storm)
began, n = time.monotonic(), 0
stormer.start()
while True:
    try:
        while interrupts < 400 and time.monotonic() - began < 20:
            n += 1
            key = b"main-%d" % n
            if n % 3 == 0:
                with db.batch() as batch:
                    batch.put(key, b"m")
            elif n % 3 == 1:
                db.put(key, b"m")
            else:
                with db.transaction() as txn:
                    txn[key] = txn.get(b"none", b"m")
            acked[key] = b"m"
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        break
    except KeyboardInterrupt:
        interrupts += 1
stop.set()
stormer.join()
for t in threads:
    t.join(30)
    assert not t.is_alive()
assert not failures, failures
assert interrupts >= 100, interrupts
assert all(count > 20 for count in others), others
assert all(db[k] == v for k, v in acked.items())
began = time.monotonic()
db.close(10)
assert time.monotonic() - began < 11
with kvrep.open(sys.argv[1]) as db:
    assert all(db[k] == v for k, v in acked.items())
print("DONE", interrupts, len(acked))
"""


@pytest.mark.slow
def test_a_storm_of_interrupts(store_path: Path) -> None:
    """Hundreds of Ctrl-C in the main thread: no acknowledged write is lost, no other thread waits."""
    done = subprocess.run(
        [sys.executable, "-c", STORM, str(store_path)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("DONE")


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.prove)])
def test_an_interrupted_commit_is_told_to_all(memory_store: Path, step: int) -> None:
    """Who waits by callback learns of a commit whose thread was interrupted, wherever that was."""
    with kvrep.open(memory_store, **OPTIONS) as db:
        db.put(b"first", b"1")
        committer = db._node.engine.committer
        at = 0
        while True:
            at += step
            held = committer.committed
            committer.rule = lambda durable, held=held: held
            told: list[kvrep.WriteFuture] = []
            all_told = threading.Event()

            def tell(future: kvrep.WriteFuture, told: Any = told, all_told: Any = all_told) -> None:
                told.append(future)
                if len(told) == 3:
                    all_told.set()

            for i in range(3):
                db.submit_put(b"%d-%d" % (at, i), b"1").add_done_callback(tell)
            wait_for(lambda held=held: len(committer.pending) == 3 and committer.durable == held + 3)
            committer.rule = lambda durable: durable
            interrupter = Interrupter(at)
            interrupted = interrupter.run(committer.advance)
            # An interrupt between taking one callback and calling it is in that callback's hands.
            if "_call_back" not in interrupter.raised_in and "tell" not in interrupter.raised_in:
                assert all_told.wait(5.0), interrupter.raised_in
            assert db.get(b"%d-2" % at) == b"1", interrupter.raised_in
            if not interrupted:
                break
        assert at > 10
        db.put(b"last", b"1")
        assert not committer.pending
        assert committer.pending_bytes == committer._queued_bytes == 0


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    event = threading.Event()
    for _ in range(int(timeout_s / 0.005)):
        if condition():
            return
        event.wait(0.005)
    raise AssertionError("the condition did not come true in time")
