"""What the bootstrap tests share: primaries whose log is trimmed, and a proxy that stops at a given byte."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import kvrep
from tests.replication_kit import WAIT_S, until

OPTIONS: dict[str, Any] = {
    "log_file_bytes": 256 << 10,
    "retention_bytes": 256 << 10,
    "memtable_bytes": 128 << 10,
    "flush_interval_s": 0.1,
    "heartbeat_interval_s": 0.1,
    "heartbeat_timeout_s": 2.0,
    "reconnect_backoff_max_s": 0.1,
}


def write(store: kvrep.Store, pairs: int, *, value_bytes: int = 1000, seed: int = 1) -> None:
    """Put random pairs, a hundred in a batch."""
    source = random.Random(seed)
    for _ in range(0, pairs, 100):
        with store.batch() as batch:
            for _ in range(min(100, pairs)):
                batch.put(b"%012x" % source.getrandbits(48), source.randbytes(value_bytes))


def trimmed(store: kvrep.Store, above: int = 1) -> kvrep.Store:
    """Wait until the store's log starts above a record."""
    store.flush()
    until(lambda: store.status().first_offset > above, what="a trimmed log")
    return store


@contextmanager
def primary(path: Path, pairs: int = 5000, **options: Any) -> Iterator[kvrep.Store]:
    """A primary whose log does not start at 1 any more."""
    with kvrep.open(path, name="a", listen="127.0.0.1:0", **{**OPTIONS, **options}) as store:
        if pairs:
            write(store, pairs)
            trimmed(store)
        yield store


def follower(path: Path, source: str, name: str | None = "b", **options: Any) -> kvrep.Store:
    return kvrep.open(path, name=name, follow=source, **{**OPTIONS, **options})


def streaming(store: kvrep.Store) -> kvrep.Store:
    """Wait until a follower has joined."""
    until(lambda: store.status().source.connected, what=f"a join: {store.status().source}")
    return store


def receiving(store: kvrep.Store) -> None:
    """Wait until some of a copy has arrived."""
    until(lambda: store.status().source.bootstrap_bytes > 0, what="the first bytes of a copy")


def alike(first: kvrep.Store, *others: kvrep.Store) -> None:
    """Bring all to the first one's position and compare every pair of every keyspace."""
    position = first.position
    for store in others:
        store.wait_for(position, WAIT_S)
        for name in {*first.keyspaces(), *store.keyspaces()}:
            assert list(store.keyspace(name).items()) == list(first.keyspace(name).items()), name


def generations(path: Path) -> list[str]:
    return sorted(p.name for p in path.glob("gen-*"))


def spooled(path: Path) -> list[str]:
    return sorted(os.listdir(path / "spool")) if (path / "spool").exists() else []


def open_files(part: str) -> list[str]:
    """What of this process's open files and maps lies below a path with ``part`` in it."""
    maps = Path("/proc/self/maps").read_text()
    found = {line.split(maxsplit=5)[5] for line in maps.splitlines() if part in line}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(f for f in found if part in f)


class Gate:
    """A TCP proxy that stops after so many bytes from the server."""

    def __init__(self, target: str, limit: int) -> None:
        self.target = target
        self.passed = 0
        """Bytes from the server to its clients."""
        self._limit = limit
        self._open = threading.Event()
        self._stopped = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="gate")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self.target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), 5)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._sockets += [near, far]
            self._start(self._pump, near, far, False)
            self._start(self._pump, far, near, True)

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if counted and not self._pass(len(data)):
                    return
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pass(self, count: int) -> bool:
        if self.passed + count > self._limit and not self._open.is_set():
            self._open.wait()
            if self._stopped:
                return False
        with self._lock:
            self.passed += count
        return True

    def release(self) -> None:
        """Let everything pass from now on."""
        self._open.set()

    def cut(self) -> None:
        """End all connections there are."""
        with self._lock:
            sockets = list(self._sockets)
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stopped = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._open.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        for one in self._sockets:
            one.close()


@contextmanager
def gate(target: str, limit: int) -> Iterator[Gate]:
    made = Gate(target, limit)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def all_of(*stores: kvrep.Store) -> Iterator[None]:
    """Close all of them, whatever happens."""
    with ExitStack() as stack:
        for store in stores:
            stack.callback(store.close)
        yield
