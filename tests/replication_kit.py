"""What the replication tests share: waiting with a deadline, nodes in their own processes, a TCP proxy."""

from __future__ import annotations

import base64
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import kvrep

WAIT_S = 20.0
FAST: dict[str, Any] = {
    "heartbeat_interval_s": 0.1,
    "heartbeat_timeout_s": 1.0,
    "reconnect_backoff_max_s": 0.1,
}
"""Options for tests that do not measure the defaults."""


def until(condition: Callable[[], Any], timeout_s: float = WAIT_S, what: Any = "") -> Any:
    """Wait until ``condition`` holds and return what it gave; fails at the deadline."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (found := condition()):
        if time.monotonic() >= deadline:
            said = what() if callable(what) else what or condition
            raise AssertionError(f"waited {timeout_s} s in vain for {said}")
        pause.wait(0.005)
    return found


def writable(store: kvrep.Store, timeout_s: float = WAIT_S) -> kvrep.Store:
    """Wait until the primary takes writes."""
    until(lambda: not store.status().not_writable, timeout_s, "a writable primary")
    return store


def voters(store: kvrep.Store, *names: str, timeout_s: float = WAIT_S) -> kvrep.Store:
    """Wait until exactly these vote, by a configuration that is committed, and all of them are there."""

    def there() -> bool:
        status = store.status()
        connected = {f.name for f in status.followers if f.connected}
        return (
            set(status.voters) == set(names)
            and set(names) <= connected | {status.name}
            and status.committed_offset == status.last_offset
        )

    until(there, timeout_s, f"voters {names}")
    return store


def same(*stores: kvrep.Store) -> None:
    """Bring all stores to the first one's position and compare them: pairs and digests."""
    position = stores[0].position
    for store in stores:
        store.wait_for(position, WAIT_S)
        store.flush()
    expected = list(stores[0].scan())
    digests = stores[0]._node.engine.recompute_digests()
    for store in stores[1:]:
        assert list(store.scan()) == expected
        mine = store._node.engine.recompute_digests()
        for what in ("digests", "counts", "stored"):
            found = {k: v for k, v in mine[what].items() if any(v if isinstance(v, bytes) else [v])}
            wanted = {k: v for k, v in digests[what].items() if any(v if isinstance(v, bytes) else [v])}
            assert found == wanted, what


def opened(path: Path, **options: Any) -> kvrep.Store:
    """Open a store whose last owner was killed just now and may still be about to vanish."""

    def attempt() -> list[kvrep.Store]:  # a store without keys counts as false
        try:
            return [kvrep.open(path, **options)]
        except kvrep.StoreInUse:
            return []

    (store,) = until(attempt)
    return store


class NodeProcess:
    """A store in another process (see replication_node.py)."""

    def __init__(self, path: Path, *, prefix: tuple[str, ...] = (), **options: Any) -> None:
        self.path = path
        script = Path(__file__).with_name("replication_node.py")
        self._errors = open(f"{path}.stderr", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(script), str(path), repr(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,
        )
        self._buffer = b""
        self.address = ""

    def ready(self, timeout_s: float = WAIT_S) -> NodeProcess:
        """Wait until it is open."""
        self.address = self.receive(timeout_s)
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(repr(code).encode() + b"\n")

    def receive(self, timeout_s: float = WAIT_S) -> Any:
        """The answer to the oldest unanswered line; raises what the code raised."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            assert left > 0, f"no answer within {timeout_s} s"
            if select.select([self.process.stdout], [], [], left)[0]:
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    raise EOFError(Path(f"{self.path}.stderr").read_text()[-2000:])
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        kind, value = pickle.loads(base64.b64decode(line))
        if kind == "error":
            raise value
        return value

    def run(self, code: str, timeout_s: float = WAIT_S) -> Any:
        """Evaluate (or execute) code in the other process."""
        self.send(code)
        return self.receive(timeout_s)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def pause(self) -> None:
        """SIGSTOP; returns once the process stands still, which the signal alone does not say."""
        self.signal(signal.SIGSTOP)
        until(lambda: os.waitpid(self.pid, os.WUNTRACED | os.WNOHANG)[0], what="the process to stand still")

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._reap()

    def close(self, timeout_s: float = WAIT_S) -> None:
        """Close the store and end the process in order."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout_s)
        finally:
            self.kill()

    def _reap(self) -> None:
        self.process.wait(WAIT_S)
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    @property
    def stderr(self) -> str:
        return Path(f"{self.path}.stderr").read_text()


@contextmanager
def processes() -> Iterator[Callable[..., NodeProcess]]:
    """Start nodes with the given function; all of them are killed at the end."""
    started: list[NodeProcess] = []

    def start(path: Path, **options: Any) -> NodeProcess:
        node = NodeProcess(path, **options)
        started.append(node)
        return node

    try:
        yield start
    finally:
        for node in started:
            with suppress(ProcessLookupError):
                os.kill(node.pid, signal.SIGCONT)
            node.kill()


class Proxy:
    """A TCP proxy that can stop forwarding (a half-open connection) and forget its connections."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = threading.Event()
        self._open.set()
        self._stopped = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="proxy")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self._target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), 5)
            except OSError:
                near.close()
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [near, far]
            self._start(self._pump, near, far)
            self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self._open.wait()
                if self._stopped:
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def target(self, address: str) -> None:
        """Where new connections go from now on."""
        self._target = address

    def hold(self) -> None:
        """Forward nothing any more, and close nothing either."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def cut(self) -> None:
        """Reset all connections there are."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._stopped = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._open.set()
        for thread in self._threads:
            thread.join(WAIT_S)


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    made = Proxy(target)
    try:
        yield made
    finally:
        made.close()


def acknowledged(path: Path) -> dict[bytes, kvrep.Position]:
    """What a Load of another process wrote down as acknowledged."""
    found = {}
    for line in path.read_text().splitlines():
        key, _, position = line.partition(" ")
        if position:
            found[key.encode()] = kvrep.Position.parse(position)
    return found


Open = Callable[..., kvrep.Store]


@contextmanager
def stores(folder: Path) -> Iterator[Open]:
    """Open stores under ``folder`` by name, each again at its address; all are closed at the end."""
    opened: list[kvrep.Store] = []
    addresses: dict[str, str] = {}

    def open_one(name: str, **options: Any) -> kvrep.Store:
        listen = addresses.get(name, "127.0.0.1:0")
        store = kvrep.open(folder / name, name=name, listen=listen, **{**FAST, **options})
        addresses[name] = store.address
        opened.append(store)
        return store

    try:
        yield open_one
    finally:
        for store in opened:
            store.close()
