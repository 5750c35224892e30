"""A node that is an application with a store inside, in a process of its own, told what to do over a socket.

:class:`EmbeddedNode` is the test's side; ``python -m kvrep.testing.embedded PATH JSON`` the application. What
``kvrep serve`` offers to clients is only a part of what a store can do; here transactions and all the rest can
be asked for. The socket stands in the folder of the node, so it reaches into other network namespaces, too.

A request is a msgpack map, framed by its length: ``{"do": name, ...}``; the answer ``{"is": value}``,
``{"fault": bytes}`` for an error of kvrep, or ``{"raised": text}``. Each connection is served by one thread.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from kvrep.errors import Error, PeerUnavailable
from kvrep.model.position import Position
from kvrep.model.record import DEFAULT_KEYSPACE
from kvrep.status import Outcome
from kvrep.testing.nodes import CALL_S, PYTHON, ProcessNode, status_of
from kvrep.testing.storecheck import content
from kvrep.transport.faults import decode_fault, encode_fault

if TYPE_CHECKING:
    from kvrep.store import Store

__all__ = ["EmbeddedNode"]

SOCKET = "app.sock"
FRAME_BYTES_MAX = 256 << 20
CONTENT_S = 60.0
_LENGTH = struct.Struct("!I")


def _send(sock: socket.socket, message: dict[str, Any]) -> None:
    data = msgpack.packb(message)
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message; ``None`` when the other side has closed."""
    head = _exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > FRAME_BYTES_MAX:
        raise ConnectionError(f"a message of {length} bytes")
    data = _exactly(sock, length)
    if data is None:
        return None
    message: dict[str, Any] = msgpack.unpackb(data)
    return message


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


@contextmanager
def _short(folder: Path) -> Iterator[str]:
    """The path of the socket in a folder, however deep: the kernel takes no more than 107 bytes."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)


# -- the test's side -------------------------------------------------------------------------------


class EmbeddedNode(ProcessNode):
    """See :class:`ProcessNode`; the calls of its clients go to the application. Any thread.

    A call that gets no answer in time, or whose process dies, raises :class:`PeerUnavailable`: a write may
    take effect nevertheless.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        # Protects the next: connections that nobody uses at the moment.
        self._idle_lock = threading.Lock()
        self._idle: list[socket.socket] = []

    def _program(self) -> list[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        options = {k: _plain(v) for k, v in self.options.items() if v is not None}
        return [*PYTHON, "-m", "kvrep.testing.embedded", str(self.path), json.dumps(options)]

    def _reap(self) -> bool:
        ended = super()._reap()
        with self._idle_lock:
            idle, self._idle = self._idle, []
        for sock in idle:
            sock.close()
        return ended

    def ask(self, do: str, within_s: float = CALL_S, **arguments: Any) -> Any:
        """Have the application do something, and return or raise what came of it."""
        try:
            sock = self._connected()
            sock.settimeout(within_s)
            try:
                _send(sock, {"do": do, **arguments})
                answer = _receive(sock)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise PeerUnavailable(f"node {self.name}: {error}", address=self.name) from error
        if answer is None:
            sock.close()
            raise PeerUnavailable(f"node {self.name} has closed the connection", address=self.name)
        self._give_back(sock)
        if "fault" in answer:
            raise decode_fault(answer["fault"])
        if "raised" in answer:
            raise RuntimeError(f"node {self.name}: {answer['raised']}")
        return answer["is"]

    def _connected(self) -> socket.socket:
        if not self.running:
            raise ConnectionRefusedError("it is down")
        with self._idle_lock:
            if self._idle:
                return self._idle.pop()
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(CALL_S)
            with _short(self.path.parent) as path:
                sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return sock

    def _give_back(self, sock: socket.socket) -> None:
        with self._idle_lock:
            if self.running:
                self._idle.append(sock)
                return
        sock.close()

    # -- the store ---------------------------------------------------------------------------------

    def _written(self, do: str, within_s: float = CALL_S, **arguments: Any) -> Position | None:
        answer = self.ask(do, within_s, **arguments)
        if answer is None:
            return None
        position = Position(*answer)
        self.acknowledged.append(position)
        return position

    def put(self, key: bytes, value: bytes, **options: Any) -> Position:
        position = self._written("put", key=key, value=value, **options)
        assert position is not None
        return position

    def delete(self, key: bytes, **options: Any) -> Position:
        position = self._written("delete", key=key, **options)
        assert position is not None
        return position

    def batch(self, pairs: Sequence[tuple[bytes, bytes | None]], **options: Any) -> Position:
        """Puts, and deletes for ``None``, in one atomic write."""
        position = self._written("batch", pairs=list(pairs), **options)
        assert position is not None
        return position

    def compare_and_set(
        self, key: bytes, *, expected: bytes | None, value: bytes | None, **options: Any
    ) -> Position | None:
        """As of :meth:`kvrep.Store.compare_and_set`."""
        return self._written("compare_and_set", key=key, expected=expected, value=value, **options)

    def get(self, key: bytes, default: Any = None, **options: Any) -> Any:
        if options.get("at_least") is not None:
            options["at_least"] = list(options["at_least"])
        value = self.ask("get", key=key, **options)
        return default if value is None else value

    def scan(self, **options: Any) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self.ask("scan", **options):
            yield bytes(key), bytes(value)

    def content(self) -> dict[tuple[str, bytes], bytes]:
        return {(name, key): value for name, key, value in self.ask("content", CONTENT_S)}

    def status(self) -> Any:
        return self.status_within(CALL_S)

    def status_within(self, seconds: float) -> Any:
        """The status; :class:`PeerUnavailable` if it takes longer."""
        return status_of(self.ask("status", seconds))

    def wait_for(self, position: Position, timeout_s: float = 5.0) -> None:
        self.ask("wait_for", CALL_S + timeout_s, position=list(position), timeout_s=timeout_s)

    def resolve(self, position: Position) -> Outcome:
        return Outcome(self.ask("resolve", position=list(position)))


def _plain(value: Any) -> Any:
    """An option as JSON takes it."""
    if is_dataclass(value) and not isinstance(value, type):
        fields = {f: getattr(value, f) for f in value.__dataclass_fields__}
        return {type(value).__name__: {k: _plain(v) for k, v in fields.items()}}
    if isinstance(value, dict) or hasattr(value, "items"):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


# -- the application -------------------------------------------------------------------------------


class _Application:
    """What a node can be asked to do: one method for each request."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            do: Callable[..., Any] = getattr(self, f"do_{request.pop('do')}")
            return {"is": do(**request)}
        except Error as error:
            return {"fault": encode_fault(error)}
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}"}

    def do_put(self, key: bytes, value: bytes, **options: Any) -> Any:
        return self._store.put(key, value, **options)

    def do_delete(self, key: bytes, **options: Any) -> Any:
        return self._store.delete(key, **options)

    def do_batch(self, pairs: list[Any], **options: Any) -> Any:
        with self._store.batch(**options) as batch:
            for key, value in pairs:
                if value is None:
                    batch.delete(key)
                else:
                    batch.put(key, value)
        return batch.position

    def do_compare_and_set(self, **options: Any) -> Any:
        return self._store.compare_and_set(**options)

    def do_get(self, key: bytes, at_least: Any = None, **options: Any) -> Any:
        if at_least is not None:
            options["at_least"] = Position(*at_least)
        return self._store.get(key, **options)

    def do_scan(self, keyspace: str = DEFAULT_KEYSPACE, **options: Any) -> Any:
        return list(self._store.keyspace(keyspace).scan(**options))

    def do_content(self) -> Any:
        return [(name, key, value) for (name, key), value in content(self._store).items()]

    def do_status(self) -> Any:
        return self._store.status().to_json()

    def do_wait_for(self, position: Any, timeout_s: float) -> None:
        self._store.wait_for(Position(*position), timeout_s)

    def do_resolve(self, position: Any) -> str:
        return self._store.resolve(Position(*position)).value

    def do_promote(self, **options: Any) -> Any:
        self._store.promote(**options)

    def do_switchover(self, to: str, **options: Any) -> Any:
        return list(self._store.switchover(to, **options))

    def do_load(self, seconds: float, threads: int) -> int:
        """Put from so many threads as fast as they can; the count of acknowledged puts."""
        store, value = self._store, os.urandom(100)
        end = time.monotonic() + seconds
        done = [0] * threads

        def put(number: int) -> None:
            count = 0
            while time.monotonic() < end:
                store.put(b"load-%d-%08d" % (number, count % 100_000), value)
                count += 1
            done[number] = count

        running = [threading.Thread(target=put, args=(n,), name=f"app-load-{n}") for n in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return sum(done)


def _serve(application: _Application, sock: socket.socket) -> None:
    with sock:
        try:
            while (request := _receive(sock)) is not None:
                _send(sock, application.answer(request))
        except OSError:
            pass  # the other side went away


def _accept(application: _Application, listener: socket.socket) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return  # closed
        threading.Thread(target=_serve, args=(application, sock), name="app-client", daemon=True).start()


def _options(text: str) -> dict[str, Any]:
    import kvrep

    options: dict[str, Any] = json.loads(text)
    for name, value in options.items():
        if isinstance(value, dict):
            ((kind, fields),) = value.items()
            options[name] = getattr(kvrep, kind)(**fields)
        elif isinstance(value, list):
            options[name] = tuple(value)
    return options


def main() -> None:
    import kvrep

    logging.basicConfig(
        stream=sys.stderr, level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    over, told = threading.Event(), list[int]()
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    path = Path(sys.argv[1])
    with kvrep.open(path, **_options(sys.argv[2])) as store, socket.socket(socket.AF_UNIX) as listener:
        (path.parent / SOCKET).unlink(missing_ok=True)
        with _short(path.parent) as short:
            listener.bind(short)
        listener.listen(64)
        application = _Application(store)
        threading.Thread(target=_accept, args=(application, listener), name="app-accept", daemon=True).start()
        print(json.dumps({"address": store.address}), flush=True)
        threading.Thread(target=_watch_stdin, args=(over,), name="app-stdin", daemon=True).start()
        # A signal that the kernel gives to another thread interrupts no wait of this one, where handlers run.
        while not told and not over.wait(0.1):
            pass


def _watch_stdin(over: threading.Event) -> None:
    """Whoever started this process holds its standard input open; the end of that is the end of this."""
    while os.read(0, 4096):
        pass
    over.set()


if __name__ == "__main__":
    main()
