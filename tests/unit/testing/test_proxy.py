"""The proxy, between plain sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvrep.testing.proxy import Link, Proxy

PATIENCE_S = 10.0


class Echo:
    """Answers every byte with the same byte, on a thread of its own."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = 0
        self._threads = [threading.Thread(target=self._accept, name="kvrep-test-echo")]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), name="kvrep-test-echo")
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received += len(data)
                    connection.sendall(data)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(seed=1) as proxy:
        yield proxy


@pytest.fixture
def link(proxy: Proxy, echo: Echo) -> Link:
    return proxy.link(echo.address, name="test")


@pytest.fixture
def connect(proxy: Proxy, link: Link) -> Iterator[object]:
    made: list[socket.socket] = []

    def make(address: str = "") -> socket.socket:
        host, _, port = (address or link.address).rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        made.append(connection)
        return connection

    yield make
    for connection in made:
        connection.close()


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            break
        data += more
    return data


def nothing_comes(connection: socket.socket) -> bool:
    """Whether nothing arrives for a short while; used only to see a rule at work, never to wait for one."""
    connection.settimeout(0.1)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE_S)


def is_reset(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1) and False
    except ConnectionResetError:
        return True


def refuses(connect: Callable[[], socket.socket]) -> bool:
    """Whether a new connection is reset, at once or at the first read."""
    try:
        return is_reset(connect())
    except ConnectionResetError:
        return True


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        threading.Event().wait(0.002)


def test_carries_both_ways(connect, link: Link, echo: Echo) -> None:
    """Without rules everything passes, large and small, and the end of one side reaches the other."""
    connection = connect()
    data = bytes(range(256)) * 4096
    sender = threading.Thread(target=connection.sendall, args=(data,), name="kvrep-test-send")
    sender.start()

    assert receive(connection, len(data)) == data
    sender.join()
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""
    wait_until(lambda: link.connections == 0)
    assert link.bytes_up == link.bytes_down == len(data)


def test_pause_keeps_and_resume_delivers(connect, link: Link, echo: Echo) -> None:
    """A paused direction delivers nothing and loses nothing; the other goes on."""
    connection = connect()
    link.pause("down")
    connection.sendall(b"one")
    wait_until(lambda: echo.received == 3)
    assert nothing_comes(connection)

    link.resume()

    assert receive(connection, 3) == b"one"


def test_drop_is_one_way_and_silent(connect, link: Link, echo: Echo) -> None:
    """Dropped bytes are gone; connecting goes on; healing ends the connections that lost something."""
    connection, whole = connect(), connect()
    whole.sendall(b"x")
    assert receive(whole, 1) == b"x"
    link.drop("down")
    connection.sendall(b"lost")
    wait_until(lambda: link.bytes_dropped == 4)
    assert echo.received == 5
    assert nothing_comes(connect())

    link.heal()

    assert is_reset(connection)
    whole.sendall(b"y")
    assert receive(whole, 1) == b"y"


def test_delay_is_a_lower_bound(connect, link: Link) -> None:
    """What is delayed arrives in order, and not before its time."""
    connection = connect()
    link.delay(0.15, jitter_s=0.05, direction="up")
    began = time.monotonic()
    for i in range(20):
        connection.sendall(b"%02d" % i)

    assert receive(connection, 40) == b"".join(b"%02d" % i for i in range(20))
    assert time.monotonic() - began >= 0.15


def test_throttle_is_an_upper_bound(connect, link: Link) -> None:
    """So many bytes take at least so long."""
    connection = connect()
    link.throttle(100_000, "down")
    began = time.monotonic()
    connection.sendall(bytes(20_000))

    assert len(receive(connection, 20_000)) == 20_000
    assert time.monotonic() - began >= 0.2


def test_corrupt_flips_one_bit(connect, link: Link) -> None:
    """Exactly one bit of what passes is another; later bytes are left alone."""
    connection = connect()
    link.corrupt(1, "up")
    connection.sendall(bytes(1000))
    answer = receive(connection, 1000)

    assert sum(b.bit_count() for b in answer) == 1
    assert link.bits_flipped == 1
    connection.sendall(bytes(1000))
    assert receive(connection, 1000) == bytes(1000)


@pytest.mark.parametrize("reset", [False, True])
def test_cut_after_bytes(reset: bool, connect, link: Link) -> None:
    """Exactly so many bytes pass before the connection ends; the next connection is whole."""
    connection = connect()
    link.cut(700, "down", reset=reset)
    connection.sendall(bytes(1000))

    if not reset:
        assert receive(connection, 1000) == bytes(700)
        assert connection.recv(1) == b""
    else:
        with pytest.raises(ConnectionResetError):
            receive(connection, 1000)
        assert link.bytes_down == 700
    again = connect()
    again.sendall(b"x" * 1000)
    assert receive(again, 1000) == b"x" * 1000


def test_reset_and_refuse(connect, link: Link) -> None:
    """Reset ends what is open; refuse resets what comes."""
    connection = connect()
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    link.refuse()
    link.reset()

    assert is_reset(connection)
    assert refuses(connect)
    link.heal()
    healed = connect()
    healed.sendall(b"x")
    assert receive(healed, 1) == b"x"


def test_targets_can_change(connect, link: Link, echo: Echo) -> None:
    """Without a target connections are reset; a target that is gone does the same; a new one is used."""
    link.target = ""
    assert refuses(connect)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        link.target = f"127.0.0.1:{gone.getsockname()[1]}"
    assert refuses(connect)
    link.target = echo.address
    connection = connect()
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"


def test_rules_by_who_connects(connect, proxy: Proxy, link: Link, echo: Echo) -> None:
    """A shared address can obey the rules of another link, by the port that a connection comes from."""
    other = proxy.link(name="other")
    ports: set[int] = set()
    proxy.classify(link, lambda port: other if port in ports else None)
    host, _, port = link.address.rpartition(":")
    chosen = socket.socket()
    with chosen:
        chosen.settimeout(PATIENCE_S)
        chosen.bind(("127.0.0.1", 0))
        ports.add(chosen.getsockname()[1])
        other.drop("down")
        chosen.connect((host, int(port)))
        chosen.sendall(b"lost")
        wait_until(lambda: other.bytes_dropped == 4)
        connection = connect()
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"


def test_closing_ends_everything(echo: Echo) -> None:
    """close() ends open connections and the thread; it may be called twice; later calls say so."""
    proxy = Proxy()
    link = proxy.link(echo.address)
    host, _, port = link.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"
        proxy.close()
        proxy.close()
        assert is_reset(connection)
    assert not any(t.name == "kvrep-proxy" for t in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        link.pause()


def test_directions_are_checked(link: Link) -> None:
    """A direction that does not exist is an error, not a rule that never matches."""
    with pytest.raises(ValueError, match="direction"):
        link.pause("sideways")  # type: ignore[arg-type]
