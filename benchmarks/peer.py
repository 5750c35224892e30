"""The other side of a figure: a process of its own, told what to do by lines of JSON.

``python -m benchmarks.peer`` reads one request a line from its input and answers each with one line; it ends
when its input does. :class:`Peer` is the near end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

import kvrep

__all__ = ["GRPC_OPTIONS", "STREAM", "Peer", "peak_mb", "serve_stream"]

STREAM = "/bench/Stream"
ECHO = "/bench/Echo"
CHUNK_BYTES = 1 << 20
GRPC_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]


class Peer:
    """A running peer process; ``with`` ends it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *details: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def ask(self, what: str, **arguments: Any) -> Any:
        """Have ``what`` done and return its answer; ``RuntimeError`` with what it raised there."""
        self.tell(what, **arguments)
        return self.answer()

    def tell(self, what: str, **arguments: Any) -> None:
        """The same without waiting; :meth:`answer` is owed."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer process ended with {self.process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found["answer"]


def peak_mb(field: str, *command: str) -> float:
    """Run ``kvrep COMMAND`` to its end; the largest ``field`` of its status in /proc, in MB, looked at every 20 ms.

    ``VmHWM`` is all that was resident at once, code included; ``RssAnon`` what the process has allocated.
    """
    with subprocess.Popen([sys.executable, "-m", "kvrep", *command], stdout=subprocess.DEVNULL) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _status_bytes(process.pid, field))
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"kvrep {command[0]} ended with {process.returncode}")
    return peak / 1e6


# -- bare gRPC, both ends --------------------------------------------------------------------------------


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, path: str, handler: Any) -> None:
        self._path, self._handler = path, handler

    def service(self, details: Any) -> Any:
        return self._handler if details.method == self._path else None


def _serve(path: str, handler: Any) -> tuple[grpc.Server, int]:
    server = grpc.server(
        futures.ThreadPoolExecutor(4), handlers=[_Handler(path, handler)], options=GRPC_OPTIONS
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


def serve_stream(chunks: Callable[[], Iterator[bytes]]) -> tuple[grpc.Server, int]:
    """A server that streams ``chunks()`` to whoever asks, and its port."""
    return _serve(STREAM, grpc.unary_stream_rpc_method_handler(lambda request, context: chunks()))


def serve_echo() -> tuple[grpc.Server, int]:
    """A server that sends every message of a stream back, and its port."""
    return _serve(ECHO, grpc.stream_stream_rpc_method_handler(lambda requests, context: requests))


def round_trips(port: int, count: int, size: int) -> list[float]:
    """Seconds of ``count`` round trips of ``size`` bytes on one stream."""
    import queue

    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    message = os.urandom(size)
    took: list[float] = []
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS) as channel:
        start: Any = channel.stream_stream(ECHO)
        call = start(iter(outgoing.get, None))
        for _ in range(count):
            began = time.perf_counter()
            outgoing.put(message)
            next(call)
            took.append(time.perf_counter() - began)
        outgoing.put(None)
        for _ in call:
            pass
    return took


# -- what a peer can be asked ----------------------------------------------------------------------------


class _Tasks:
    """The far end: one method for each request."""

    def __init__(self) -> None:
        self._db: kvrep.Store | None = None
        self._echo: grpc.Server | None = None

    @property
    def db(self) -> kvrep.Store:
        assert self._db is not None
        return self._db

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
        if self._echo is not None:
            self._echo.stop(0).wait(5)

    def echo(self) -> int:
        self._echo, port = serve_echo()
        return port

    def open(self, path: str, **options: Any) -> None:
        """Open a store here."""
        self._db = kvrep.open(path, **options)

    def close_store(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def wait_for(self, position: str, timeout_s: float = 600.0) -> float:
        """Wait until ``position`` is visible here; the time of that, on the clock both processes share."""
        self.db.wait_for(kvrep.Position.parse(position), timeout_s)
        return time.monotonic()

    def catch_up(self, path: str, position: str, **options: Any) -> float:
        """Open a store and wait for ``position``: the seconds of both."""
        began = time.perf_counter()
        self.open(path, **options)
        self.db.wait_for(kvrep.Position.parse(position), 600.0)
        return time.perf_counter() - began

    def lags(self, count: int) -> list[float]:
        """Read ``count`` lines "time position"; how long after each time its position was visible."""
        lags: list[float] = []
        for _ in range(count):
            at, position = sys.stdin.readline().split()
            lags.append(self.wait_for(position) - float(at))
        return lags

    def receive(self, port: int, folder: str, copies: int, sync_bytes: int) -> float:
        """Take a stream into ``copies`` files, flushing each after every ``sync_bytes``; the seconds."""
        fds = [
            os.open(f"{folder}/received-{n}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for n in range(copies)
        ]
        try:
            began = time.perf_counter()
            with grpc.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS) as channel:
                unsynced = 0
                start: Any = channel.unary_stream(STREAM)
                for chunk in start(b""):
                    for fd in fds:
                        os.write(fd, chunk)
                    unsynced += len(chunk)
                    if unsynced >= sync_bytes:
                        unsynced = 0
                        for fd in fds:
                            os.fdatasync(fd)
            for fd in fds:
                os.fsync(fd)
            return time.perf_counter() - began
        finally:
            for fd in fds:
                os.close(fd)

    def write_beside_stopped(self, path: str, follower: str, total_bytes: int) -> float:
        """Write ``total_bytes`` while a follower of ours is stopped; the peak of RssAnon, in bytes."""
        import signal

        self.open(path, name="a", listen="127.0.0.1:0")
        with Peer() as peer:
            peer.ask("open", path=follower, name="b", follow=self.db.address)
            peer.ask("wait_for", position=str(self.db.put(b"first", b"write")))
            os.kill(peer.process.pid, signal.SIGSTOP)
            try:
                return _peak_while(lambda: _write_much(self.db, total_bytes))
            finally:
                os.kill(peer.process.pid, signal.SIGCONT)


def _write_much(db: kvrep.Store, total_bytes: int) -> None:
    value = os.urandom(4096)
    number = 0
    while number * 4096 < total_bytes:
        with db.batch(timeout_s=60) as batch:
            for _ in range(25):
                batch.put(b"%016d" % (number % 50_000), value)
                number += 1


def _peak_while(work: Callable[[], None]) -> float:
    """The largest RssAnon of this process while ``work()`` runs, looked at every 20 ms."""
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, _status_bytes(os.getpid(), "RssAnon"))
            over.wait(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()
    return peak


def _status_bytes(pid: int, field: str) -> int:
    """A size out of a process's status; 0 where it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def main() -> None:
    tasks = _Tasks()
    try:
        while line := sys.stdin.readline():
            request = json.loads(line)
            try:
                answer = {"answer": getattr(tasks, request.pop("do"))(**request)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
    finally:
        tasks.close()


if __name__ == "__main__":
    main()
