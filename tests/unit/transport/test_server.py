"""What only the gRPC transport can get wrong: strangers, exits and leftovers."""

import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import NoReturn

import grpc
import pytest

from kvrep.errors import Error, ProtocolError
from kvrep.transport.client import GrpcConnection
from kvrep.transport.interface import StreamEnded
from kvrep.transport.server import SERVICE_NAME, GrpcServer


class Service:
    """Never reached."""

    def open_session(self, peer: str) -> None:
        raise AssertionError

    def snapshot(self, request: object) -> None:
        raise AssertionError

    def scan(self, request: object) -> None:
        raise AssertionError

    def call(self, method: str, request: object) -> None:
        raise AssertionError


class Aborted(Exception):
    """What gRPC's abort raises."""


class AbortingContext:
    """As much of a call's context as a refusal needs."""

    code: grpc.StatusCode | None = None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self.code = code
        raise Aborted(details)


@pytest.fixture
def server() -> Iterator[GrpcServer]:
    server = GrpcServer(Service(), "127.0.0.1:0", name="a")  # type: ignore[arg-type]
    server.start()
    yield server
    server.stop()


@pytest.fixture
def channel(server: GrpcServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.mark.parametrize("noise", [b"", b"\xc1", b"\x93\xa1m\x80\x01", b"\xff" * 1000])
@pytest.mark.parametrize("method", ["Call", "Scan", "Snapshot"])
def test_noise_is_refused(channel: grpc.Channel, method: str, noise: bytes) -> None:
    """Bytes that are no request get a ProtocolError's status before the service is asked."""
    kind = channel.unary_unary if method == "Call" else channel.unary_stream
    call = kind(f"/{SERVICE_NAME}/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        list(call(noise, timeout=5))
    assert caught.value.code() is grpc.StatusCode.ABORTED


def test_a_call_while_the_server_stops_is_not_told_to_try_again(server: GrpcServer) -> None:
    """stop() takes every slot for calls; who comes then hears that the node is closing, not that it is busy."""
    server.stop()
    context = AbortingContext()
    with pytest.raises(Aborted):
        server._call(b"", context)  # type: ignore[arg-type]
    assert context.code is grpc.StatusCode.UNAVAILABLE


def test_unknown_methods(channel: grpc.Channel) -> None:
    """A method of a later version is unimplemented, not a crash."""
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE_NAME}/Later")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_another_service_at_the_address() -> None:
    """A gRPC server that is no kvrep node is told apart from a node that is down."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        stranger = grpc.server(pool)
        port = stranger.add_insecure_port("127.0.0.1:0")
        stranger.start()
        connection = GrpcConnection(f"127.0.0.1:{port}", name="b")
        with pytest.raises(ProtocolError, match="no kvrep node"):
            connection.call("status", {}, 5)
        connection.close()
        stranger.stop(None)


def test_an_idle_stranger_does_not_delay_the_stop(server: GrpcServer) -> None:
    """Whoever connects and says nothing, such as a port scanner, costs a stop none of its grace."""
    host, _, port = server.address.rpartition(":")
    connection = GrpcConnection(server.address, name="b")
    with socket.create_connection((host, int(port))):
        with pytest.raises(Error):
            connection.call("x", {}, 5.0)  # the connections before it are accepted by now
        began = time.monotonic()
        server.stop(20.0)
        assert time.monotonic() - began < 5.0
    connection.close()


def test_peer_is_a_plain_address(server: GrpcServer) -> None:
    """The service learns the follower's address as host and port."""
    peers = []

    def refuse(peer: str) -> NoReturn:
        peers.append(peer)
        raise ProtocolError("refused")

    server._service.open_session = refuse  # type: ignore[method-assign]
    connection = GrpcConnection(server.address, name="b")
    with pytest.raises(StreamEnded, match="refused"):
        connection.open_stream().receive()
    connection.close()
    assert peers[0].startswith("127.0.0.1:")


EXIT = """
    import threading
    from kvrep.transport.network import GrpcTransport

    class Session:
        def __init__(self):
            self.over = threading.Event()
        def on_message(self, message): pass
        def next_message(self): self.over.wait()
        def on_closed(self, error): self.over.set()

    class Service:
        def open_session(self, peer): return Session()
        def call(self, method, request): return {}

    transport = GrpcTransport()
    server = transport.serve(Service(), "127.0.0.1:0", name="a")
    connection = transport.connect(server.start(), name="b")
    stream = connection.open_stream()
    connection.call("echo", {}, 5)
    def receive():
        try:
            stream.receive()
        except Exception:
            pass
    threading.Thread(target=receive, daemon=True).start()
    print("done")
"""


def test_exit_without_stop() -> None:
    """A process that forgets to stop its server and close its streams still exits, in order."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXIT)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "Traceback" not in done.stderr
