"""The nodes of a test cluster: in this process, or as processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvrep.coordination import make_coordinator
from kvrep.coordinators import Etcd, Quorum
from kvrep.errors import Error, PeerUnavailable
from kvrep.model.position import Position
from kvrep.options import Options
from kvrep.runtime.node import Node, _grpc
from kvrep.status import Outcome
from kvrep.storage.engine import Engine
from kvrep.store import Store
from kvrep.testing.namespaces import NotPrivileged
from kvrep.testing.timeline import Timeline
from kvrep.transport.client import GrpcConnection
from kvrep.transport.interface import Connection, Server, Service, Transport

__all__ = ["ClusterNode", "LocalNode", "ProcessNode", "open_offline", "status_of"]

START_S = 20.0
END_S = 20.0
PYTHON = (sys.executable, "-X", "faulthandler")
"""How nodes are run: one that has to be aborted tells where each of its threads stands."""
_ROLE = ("listen", "advertise", "follow", "coordinator")
"""Options that make a store more than one directory."""
CALL_S = 10.0
STOP_S = 5.0


class ClusterNode(ABC):
    """A node by name; the same object before and after it is killed and restarted.

    ``put``, ``get``, ``delete``, ``scan``, ``status``, ``position``, ``wait_for``, ``resolve`` and ``node[key]``
    are those of the store. In-process nodes have all the rest of :class:`kvrep.Store` as well.
    """

    def __init__(self, name: str, path: Path, options: dict[str, Any], timeline: Timeline) -> None:
        self.name = name
        self.path = path
        self.options = options
        self.timeline = timeline
        self.acknowledged: list[Position] = []
        """Positions of writes that returned, made through this object, or of what came after them."""

    def __repr__(self) -> str:
        return f"<node {self.name}, {'running' if self.running else 'down'}>"

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether it is up; a paused node is."""

    @abstractmethod
    def start(self) -> str:
        """Open the store; returns the address that it really listens on."""

    @abstractmethod
    def stop(self) -> None:
        """Close it in order. Idempotent.

        ``TimeoutError`` when it did not come to an end and was killed.
        """

    @abstractmethod
    def kill(self) -> None:
        """End it as kill -9 does: nothing is flushed or said."""

    @abstractmethod
    def pause(self) -> None: ...
    @abstractmethod
    def resume(self) -> None: ...
    @abstractmethod
    def slow_disk(self, seconds: float) -> None:
        """Make every sync of the log take ``seconds`` longer; 0: no longer."""

    @abstractmethod
    def status(self) -> Any: ...
    @abstractmethod
    def put(self, key: bytes, value: bytes, **options: Any) -> Position: ...
    @abstractmethod
    def delete(self, key: bytes, **options: Any) -> Position: ...
    @abstractmethod
    def get(self, key: bytes, default: Any = None, **options: Any) -> Any: ...
    @abstractmethod
    def scan(self, **options: Any) -> Iterator[tuple[bytes, bytes]]: ...
    @abstractmethod
    def content(self) -> dict[tuple[str, bytes], bytes]:
        """Everything in it, by (keyspace, key)."""

    @abstractmethod
    def wait_for(self, position: Position, timeout_s: float = 5.0) -> None: ...
    @abstractmethod
    def resolve(self, position: Position) -> Outcome: ...

    def all_acknowledged(self) -> list[Position]:
        """:attr:`acknowledged`, with what this node has committed as a primary where that can be seen from here."""
        return self.acknowledged

    @property
    def position(self) -> Position:
        """What its reads show now."""
        position = self.status().position
        return position if isinstance(position, Position) else Position.parse(position)

    def __getitem__(self, key: bytes) -> bytes:
        value: bytes | None = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.put(key, value)

    def __delitem__(self, key: bytes) -> None:
        self[key]  # a key that is not there is a KeyError, as of the store
        self.delete(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.get(key) is not None


# -- in this process -------------------------------------------------------------------------------


class _Routed:
    """A transport whose connections take the links of the node that makes them."""

    def __init__(self, inner: Transport, route: Callable[[str], str]) -> None:
        self._inner = inner
        self._route = route

    def serve(self, service: Service, listen: str, *, name: str, max_streams: int = 64) -> Server:
        return self._inner.serve(service, listen, name=name, max_streams=max_streams)

    def connect(self, address: str, *, name: str) -> Connection:
        return self._inner.connect(self._route(address), name=name)


class LocalNode(ClusterNode):
    """A store in this process."""

    def __init__(
        self,
        name: str,
        path: Path,
        options: dict[str, Any],
        timeline: Timeline,
        route: Callable[[str], str],
    ) -> None:
        super().__init__(name, path, options, timeline)
        self._route = route
        self._store: Store | None = None
        self._frozen = False

    @property
    def store(self) -> Store:
        """The store itself; :class:`PeerUnavailable` while the node is down."""
        if self._store is None:
            raise PeerUnavailable(f"node {self.name} is down", address=self.name, hint="restart it")
        return self._store

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.store, name)

    @property
    def running(self) -> bool:
        return self._store is not None

    def start(self) -> str:
        options = Options(**self.options)
        transport = _Routed(_grpc(options), self._route)
        node = Node.open(self.path, options, transport, make_coordinator=make_coordinator)
        self._store = Store(node)
        server: Any = node._server
        return str(server.address)

    def stop(self) -> None:
        self.resume()
        store, self._store = self._store, None
        if store is not None:
            self._note_committed(store)
            store.close()

    def kill(self) -> None:
        """The log takes no more bytes, nothing is flushed, marked or cut; only then are the threads ended."""
        self.resume()
        store, self._store = self._store, None
        if store is None:
            return
        committer = store._node.engine.committer
        committer.fail_storage(OSError("the node was killed by the test"))
        with committer.lead:
            committer.log._current = None  # so that closing leaves the file as it is
        self._note_committed(store)  # only now: nothing can be acknowledged any more
        store.close()

    def all_acknowledged(self) -> list[Position]:
        """All that a primary has committed counts as acknowledged, whichever call it was made by."""
        if self._store is not None:
            self._note_committed(self._store)
        return self.acknowledged

    def _note_committed(self, store: Store) -> None:
        engine = store._node.engine
        position = engine.committed_position
        if store._node.engine.committer.epoch == position.epoch > 0:
            self.acknowledged.append(position)

    def pause(self) -> None:
        """Hold the log: no write of this node gets on. The cluster holds its links."""
        self.store._node.engine.committer.lead.acquire()
        self._frozen = True

    def resume(self) -> None:
        if self._frozen:
            self._frozen = False
            self.store._node.engine.committer.lead.release()

    def slow_disk(self, seconds: float) -> None:
        log: Any = self.store._node.engine.committer.log
        for name in ("append", "sync"):
            real = getattr(type(log), name)

            def slow(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                time.sleep(seconds)
                return real(log, *args, **kwargs)

            if seconds:
                setattr(log, name, slow)
            else:
                log.__dict__.pop(name, None)

    def status(self) -> Any:
        return self.store.status()

    def put(self, key: bytes, value: bytes, **options: Any) -> Position:
        position = self.store.put(key, value, **options)
        self.acknowledged.append(position)
        return position

    def delete(self, key: bytes, **options: Any) -> Position:
        position = self.store.delete(key, **options)
        self.acknowledged.append(position)
        return position

    def get(self, key: bytes, default: Any = None, **options: Any) -> Any:
        return self.store.get(key, default, **options)

    def scan(self, **options: Any) -> Iterator[tuple[bytes, bytes]]:
        return self.store.scan(**options)

    def content(self) -> dict[tuple[str, bytes], bytes]:
        from kvrep.testing.storecheck import content

        return content(self.store)

    def wait_for(self, position: Position, timeout_s: float = 5.0) -> None:
        self.store.wait_for(position, timeout_s)

    def resolve(self, position: Position) -> Outcome:
        return self.store.resolve(position)


def open_offline(path: Path, options: dict[str, Any]) -> Store:
    """The store of a node that is down, opened without a role: nothing is served, followed or written."""
    engine_options = Options(**{k: v for k, v in options.items() if k not in _ROLE})
    engine = Engine.open(path, engine_options, lineage=b"")
    return Store(Node(engine, engine_options, None))


def _stands_still(pid: int) -> bool:
    """Whether no thread of a process can run."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended meanwhile
            continue
        if state not in "TtZX":
            return False
    return True


# -- processes -------------------------------------------------------------------------------------


def _ends(process: subprocess.Popen[str]) -> bool:
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        return False
    return True


class ProcessNode(ClusterNode):
    """A node run by ``python -m kvrep serve``, asked over gRPC past the links.

    ``prefix`` goes before its command: words that have it run elsewhere, in the same process.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        options: dict[str, Any],
        timeline: Timeline,
        prefix: Sequence[str] = (),
    ) -> None:
        super().__init__(name, path, options, timeline)
        self._prefix = list(prefix)
        self._process: subprocess.Popen[str] | None = None
        self._connection: GrpcConnection | None = None
        self._reader: threading.Thread | None = None
        self._slowing: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """0 while it is down."""
        return self._process.pid if self._process is not None else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _program(self) -> list[str]:
        """The command; it says its address in a line of JSON when it is ready."""
        command = [*PYTHON, "-m", "kvrep", "serve", str(self.path), "--json", "--until-stdin-closes"]
        for option, value in self.options.items():
            if option == "voter":
                command += [] if value else ["--no-vote"]
            elif option == "coordinator":
                command += _coordinator_flags(value)
            elif value is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        return command

    def start(self) -> str:
        self._reap()  # what is left of a process that ended by itself
        process = subprocess.Popen(
            [*self._prefix, *self._program()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for the test, which then ends its nodes in order
        )
        self._process = process
        self._reader = threading.Thread(
            target=self._read_log, args=(process,), name=f"kvrep-test-log-{self.name}", daemon=True
        )
        self._reader.start()
        timer = threading.Timer(START_S, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()
        if not line:
            self._reap()
            raise PeerUnavailable(
                f"node {self.name} did not start", address=self.name, hint="see the timeline"
            )
        ready = json.loads(line)
        # What it advertises may be the address of a link.
        address = _listening(process.pid) if self.options.get("advertise") else str(ready["address"])
        self._connection = GrpcConnection(address, name="test")
        return address

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            # "2026-01-02 03:04:05,678 INFO logger: text": the timeline has a time of its own
            self.timeline.add(
                self.name, line.rstrip().split(" ", 2)[-1] if line[0].isdigit() else line.rstrip()
            )

    def _reap(self) -> bool:
        """Wait for the process, which has been told to end, and let go of all that belongs to it. Returns
        whether it ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return True
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._end_slowing()
        ended = _ends(process)
        if not ended:
            process.send_signal(signal.SIGABRT)
            if not _ends(process):
                process.kill()
                process.wait()
        if self._reader is not None:
            self._reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        return ended

    def stop(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        if not self._reap():
            raise TimeoutError(
                f"node {self.name} did not end within {END_S:.0f} s of SIGTERM; see the timeline for its threads"
            )

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._reap()

    def pause(self) -> None:
        """SIGSTOP; returns once every thread stands still, which the signal alone does not say."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_S
        while not _stands_still(self.pid) and time.monotonic() < deadline:
            time.sleep(0.001)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def slow_disk(self, seconds: float) -> None:
        """By ``strace``, which must be installed and allowed to attach."""
        self._end_slowing()
        if not seconds:
            return
        tool = shutil.which("strace")
        if tool is None:
            raise NotPrivileged("slow_disk needs strace for nodes that are processes")
        calls = "fsync,fdatasync,pwritev2"
        command = [tool, "-f", "-o", os.devnull, "-e", f"trace={calls}", "-p", str(self.pid)]
        command += ["-e", f"inject={calls}:delay_enter={int(seconds * 1e6)}"]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._slowing = tracer
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "attached" not in said:
            self._end_slowing()
            raise NotPrivileged(f"strace cannot attach: {said.strip()}")

    def _end_slowing(self) -> None:
        tracer, self._slowing = self._slowing, None
        if tracer is not None:
            tracer.terminate()
            tracer.wait()
            assert tracer.stderr is not None
            tracer.stderr.close()

    # -- the store, from outside -------------------------------------------------------------------

    @property
    def connection(self) -> GrpcConnection:
        """To the node itself, past the links; :class:`PeerUnavailable` while it is down."""
        if self._connection is None:
            raise PeerUnavailable(f"node {self.name} is down", address=self.name, hint="restart it")
        return self._connection

    def _call(self, method: str, timeout_s: float | None = None, **request: Any) -> dict[str, Any]:
        """Ask the node, which gets ``timeout_s`` (if given), and some more time to say so."""
        if timeout_s is not None:
            request["timeout_s"] = timeout_s
        given = {name: value for name, value in request.items() if value is not None}
        return self.connection.call(method, given, CALL_S + (timeout_s or 0.0))

    def status(self) -> Any:
        return status_of(self._call("status")["status"])

    def put(self, key: bytes, value: bytes, **options: Any) -> Position:
        return self._write(key, value, **options)

    def delete(self, key: bytes, **options: Any) -> Position:
        return self._write(key, None, **options)

    def _write(self, key: bytes, value: bytes | None, **options: Any) -> Position:
        position = Position.parse(self._call("write", ops=[["default", key, value]], **options)["position"])
        self.acknowledged.append(position)
        return position

    def get(self, key: bytes, default: Any = None, **options: Any) -> Any:
        if options.get("at_least") is not None:
            options["at_least"] = str(options["at_least"])
        value = self._call("get", key=key, **options)["value"]
        return default if value is None else value

    def scan(self, **options: Any) -> Iterator[tuple[bytes, bytes]]:
        for chunk in self.connection.scan(options, CALL_S):
            yield from chunk

    def content(self) -> dict[tuple[str, bytes], bytes]:
        names = self._call("keyspaces")["keyspaces"]
        return {(name, key): value for name in names for key, value in self.scan(keyspace=name)}

    def wait_for(self, position: Position, timeout_s: float = 5.0) -> None:
        self._call("wait", timeout_s, position=str(position))

    def resolve(self, position: Position) -> Outcome:
        return Outcome(self._call("resolve", position=str(position))["outcome"])


def _coordinator_flags(coordinator: Quorum | Etcd) -> list[str]:
    """As ``kvrep serve`` takes it; the times are those of the command."""
    flags = [f"--priority={coordinator.priority}"]
    if isinstance(coordinator, Etcd):
        flags += [f"--cluster={coordinator.cluster}", *(f"--etcd={e}" for e in coordinator.endpoints)]
    else:
        flags += [f"--peer={name}={address}" for name, address in coordinator.peers.items()]
        flags += ["--witness"] if coordinator.witness else []
    return flags


def status_of(data: Any) -> Any:
    """A status as JSON gives it, with attributes instead of items."""
    if isinstance(data, dict):
        return SimpleNamespace(**{k: status_of(v) for k, v in data.items()})
    if isinstance(data, list):
        return tuple(map(status_of, data))
    return data


def sockets_of(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    found = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        pass
    return found


def tcp_sockets() -> Iterator[tuple[int, bool, str]]:
    """(local port, whether it listens, inode) of this machine's TCP sockets."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            parts = line.split()
            yield int(parts[1].rpartition(":")[2], 16), parts[3] == "0A", parts[9]


def _listening(pid: int) -> str:
    own = sockets_of(pid)
    for port, listens, inode in tcp_sockets():
        if listens and inode in own:
            return f"127.0.0.1:{port}"
    raise Error(f"process {pid} does not listen")
