"""A TCP proxy that can be told to behave like a bad network. Needs no privileges.

One :class:`Proxy` is one thread (``kvrep-proxy``) that runs an asyncio loop; a :class:`Link` is one address
that leads to one target, with rules of its own in each direction. All methods may be called on any thread;
a rule is in force when the call returns.

Rules, for ``"up"`` (from who connects to the target), ``"down"``, or ``"both"``:

========== =========================================================================================
pause      nothing passes, nothing is lost: what arrives waits until resume
drop       what arrives is lost; heal ends the connections that lost something, as TCP would
delay      everything arrives later, by a time and a random addition, in order
throttle   so many bytes per second
corrupt    so many bits of what passes next are flipped
cut        the connections end after so many more bytes: in order, or by reset
reset      all connections end now, by RST
refuse     new connections are reset at once
========== =========================================================================================
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

__all__ = ["Direction", "Link", "Proxy"]

Direction = Literal["up", "down", "both"]
T = TypeVar("T")

CHUNK_BYTES = 64 << 10
QUEUE_CHUNKS = 64
CALL_S = 10.0
TURNS = 20


@dataclass(slots=True)
class _Rules:
    """What one direction of a link does to what passes. Changed and read on the loop only."""

    flowing: asyncio.Event
    dropping: bool = False
    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    flips: int = 0
    cut_after: int | None = None
    cut_by_reset: bool = False
    passed: int = 0
    """Bytes that arrived at the other side."""
    dropped: int = 0
    flipped: int = 0


@dataclass(slots=True, eq=False)
class _Connection:
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    lost: bool = False
    """Whether a part of it was dropped, so that it cannot go on."""

    def close(self, *, reset: bool) -> None:
        for writer in (self.near, self.far):
            if reset:
                _linger_zero(writer)
                writer.transport.abort()
            else:
                writer.close()


def _linger_zero(writer: asyncio.StreamWriter) -> None:
    """Have the close of a socket send RST."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # it is closed already


@dataclass(eq=False)
class Link:
    """One address that leads to one target. Made by :meth:`Proxy.link`; lives as long as its proxy."""

    name: str
    address: str
    """``host:port`` to connect to."""
    _proxy: Proxy
    _target: str
    _up: _Rules
    _down: _Rules
    _refusing: bool = False
    _server: asyncio.Server | None = None
    _connections: set[_Connection] = field(default_factory=set)
    _tasks: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def target(self) -> str:
        """Where new connections go, ``host:port``; empty: they are reset. May be set at any time."""
        return self._target

    @target.setter
    def target(self, address: str) -> None:
        self._target = address

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    @property
    def bytes_up(self) -> int:
        """Bytes that reached the target so far."""
        return self._up.passed

    @property
    def bytes_down(self) -> int:
        """Bytes that came back so far."""
        return self._down.passed

    @property
    def bits_flipped(self) -> int:
        return self._up.flipped + self._down.flipped

    @property
    def bytes_dropped(self) -> int:
        return self._up.dropped + self._down.dropped

    # -- rules -------------------------------------------------------------------------------------

    def pause(self, direction: Direction = "both") -> None:
        """Let nothing pass, and lose nothing, until :meth:`resume`."""
        self._change(direction, lambda rules: rules.flowing.clear())

    def resume(self, direction: Direction = "both") -> None:
        self._change(direction, lambda rules: rules.flowing.set())

    def drop(self, direction: Direction = "both") -> None:
        """Lose what arrives, silently, until :meth:`heal`; connecting still succeeds."""
        self._change(direction, lambda rules: setattr(rules, "dropping", True))

    def delay(self, seconds: float, jitter_s: float = 0.0, direction: Direction = "both") -> None:
        """Deliver everything ``seconds`` later, and up to ``jitter_s`` more at random, in order."""

        def change(rules: _Rules) -> None:
            rules.delay_s, rules.jitter_s = seconds, jitter_s

        self._change(direction, change)

    def throttle(self, bytes_per_s: float, direction: Direction = "both") -> None:
        """Let so much pass in a second; 0: as fast as it comes."""
        self._change(direction, lambda rules: setattr(rules, "bytes_per_s", bytes_per_s))

    def corrupt(self, bits: int = 1, direction: Direction = "both") -> None:
        """Flip a random bit in each of the next ``bits`` chunks that pass (in each direction)."""
        self._change(direction, lambda rules: setattr(rules, "flips", bits))

    def cut(self, after_bytes: int, direction: Direction = "down", *, reset: bool = False) -> None:
        """End the connection in which more than ``after_bytes`` would pass, counted from now over all."""

        def change(rules: _Rules) -> None:
            rules.cut_after, rules.cut_by_reset = after_bytes, reset

        self._change(direction, change)

    def refuse(self) -> None:
        """Reset new connections until :meth:`heal`."""
        self._proxy._on_loop(lambda: setattr(self, "_refusing", True))

    def reset(self) -> None:
        """End all connections now, by RST."""

        def change() -> None:
            for connection in list(self._connections):
                connection.close(reset=True)

        self._proxy._on_loop(change)

    def heal(self) -> None:
        """Forget all rules. Connections that lost something end, by RST."""

        def change() -> None:
            self._refusing = False
            for rules in (self._up, self._down):
                rules.dropping, rules.delay_s, rules.jitter_s = False, 0.0, 0.0
                rules.bytes_per_s, rules.flips, rules.cut_after = 0.0, 0, None
                rules.flowing.set()
            for connection in list(self._connections):
                if connection.lost:
                    connection.close(reset=True)

        self._proxy._on_loop(change)

    def _change(self, direction: Direction, change: Callable[[_Rules], Any]) -> None:
        if direction not in ("up", "down", "both"):
            raise ValueError(f'direction must be "up", "down" or "both", not {direction!r}')
        chosen = [self._up, self._down] if direction == "both" else [getattr(self, f"_{direction}")]
        self._proxy._on_loop(lambda: [change(rules) for rules in chosen])

    # -- on the loop -------------------------------------------------------------------------------

    def _on_connection(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self._proxy._transports.add(near.transport)
        task = asyncio.ensure_future(self._accept(reader, near))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        link = self._proxy._classify(self, near)
        try:
            await link._carry(reader, near, self._target)
        except asyncio.CancelledError:
            near.transport.abort()  # the proxy closes

    async def _carry(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter, target: str) -> None:
        host, _, port = target.rpartition(":")
        try:
            if self._refusing or self._proxy._closing or not host:
                raise ConnectionError("refused")
            far_reader, far = await asyncio.open_connection(host, int(port), limit=CHUNK_BYTES)
        except OSError:
            _linger_zero(near)
            near.transport.abort()
            return
        self._proxy._transports.add(far.transport)
        connection = _Connection(near, far)
        self._connections.add(connection)
        ways = [
            asyncio.ensure_future(self._pump(reader, far, self._up, connection)),
            asyncio.ensure_future(self._pump(far_reader, near, self._down, connection)),
        ]
        try:
            await asyncio.gather(*ways)
        except OSError:
            connection.close(reset=True)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            connection.close(reset=connection.lost)
            self._connections.discard(connection)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        rules: _Rules,
        connection: _Connection,
    ) -> None:
        """Carry one direction: read at once, deliver when the rules say so."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE_CHUNKS)

        async def deliver() -> None:
            while True:
                due, data = await arrived.get()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await rules.flowing.wait()
                if not data:
                    if writer.can_write_eof() and not rules.dropping:
                        writer.write_eof()
                    return
                await self._deliver(data, writer, rules, connection)

        delivering = asyncio.ensure_future(deliver())
        try:
            while True:
                data = await reader.read(CHUNK_BYTES)
                wait_s = rules.delay_s + self._proxy._random.uniform(0, rules.jitter_s)
                putting = asyncio.ensure_future(arrived.put((loop.time() + wait_s, data)))
                await asyncio.wait((putting, delivering), return_when=asyncio.FIRST_COMPLETED)
                if delivering.done():
                    putting.cancel()
                    break
                if not data:
                    break
            await delivering
        finally:
            delivering.cancel()

    async def _deliver(
        self, data: bytes, writer: asyncio.StreamWriter, rules: _Rules, connection: _Connection
    ) -> None:
        if rules.dropping:
            connection.lost = True
            rules.dropped += len(data)
            return
        if rules.flips:
            rules.flips -= 1
            rules.flipped += 1
            bit = self._proxy._random.randrange(8 * len(data))
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            data = bytes(changed)
        ends = rules.cut_after is not None and len(data) > rules.cut_after
        if rules.cut_after is not None:
            data = data[: rules.cut_after]
            rules.cut_after -= len(data)
        if rules.bytes_per_s:
            await asyncio.sleep(len(data) / rules.bytes_per_s)
        writer.write(data)
        await writer.drain()
        rules.passed += len(data)
        if ends:
            rules.cut_after = None
            if rules.cut_by_reset:
                raise ConnectionResetError("cut")
            connection.near.close()
            connection.far.close()


class Proxy:
    """A thread with links. Use it in a ``with`` block, or call :meth:`close`."""

    def __init__(self, *, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._links: list[Link] = []
        self._classifiers: dict[Link, Callable[[int], Link | None]] = {}
        self._loop = asyncio.new_event_loop()
        self._transports: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()
        self._closed = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvrep-proxy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def link(self, target: str = "", *, name: str = "") -> Link:
        """A new address (of this machine) that leads to ``target``."""
        return self._await(self._new_link(target, name))

    async def _new_link(self, target: str, name: str) -> Link:
        up, down = _Rules(asyncio.Event()), _Rules(asyncio.Event())
        up.flowing.set()
        down.flowing.set()
        link = Link(name, "", self, target, up, down)
        link._server = await asyncio.start_server(link._on_connection, "127.0.0.1", 0, limit=CHUNK_BYTES)
        host, port = link._server.sockets[0].getsockname()[:2]
        link.address = f"{host}:{port}"
        self._links.append(link)
        return link

    def classify(self, link: Link, chooser: Callable[[int], Link | None]) -> None:
        """Have ``chooser`` name, by the port that a connection comes from, the link whose rules it obeys.

        It runs on the proxy's thread. ``None``: the link that it came in by.
        """
        self._on_loop(lambda: self._classifiers.__setitem__(link, chooser))

    def _classify(self, link: Link, near: asyncio.StreamWriter) -> Link:
        chooser = self._classifiers.get(link)
        if chooser is None:
            return link
        return chooser(near.get_extra_info("peername")[1]) or link

    def _await(self, what: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            what.close()
            raise RuntimeError("the proxy is closed")
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(CALL_S)

    def _on_loop(self, call: Callable[[], Any]) -> None:
        """Run ``call`` on the loop and wait for it."""

        async def run() -> None:
            call()

        self._await(run())

    def close(self) -> None:
        """End all connections and the thread. Idempotent."""
        if self._closed:
            return
        self._await(self._shut())
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()

    async def _shut(self) -> None:
        self._closing = True
        for link in self._links:
            assert link._server is not None
            link._server.close()
        # Connections that the kernel had accepted need some turns of the loop to show up; they end at once.
        for _ in range(TURNS):
            await asyncio.sleep(0)
        for link in self._links:
            for connection in list(link._connections):
                connection.close(reset=True)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for transport in list(self._transports):
            transport.abort()  # those, too, that nobody carried yet, or that still had something to deliver
        for _ in range(TURNS):  # transports report their end
            await asyncio.sleep(0)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
