"""TLS and the shared token, on gRPC over loopback."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvrep.errors import AuthenticationFailed, OpenError, PeerUnavailable, ReplicationError
from kvrep.transport.interface import Session, SnapshotItem, SnapshotRequest, StreamEnded
from kvrep.transport.network import TLS, GrpcTransport, Security

FILES = Path(__file__).parent / "certificates"
CA = FILES / "ours-ca.pem"


def tls(name: str, ca: str | None = "ours-ca", **more: Any) -> TLS:
    return TLS(
        FILES / f"{name}.pem", FILES / f"{name}.key", None if ca is None else FILES / f"{ca}.pem", **more
    )


class Echo:
    """Answers calls only."""

    def open_session(self, peer: str) -> Session:
        raise ReplicationError("no streams here")

    def snapshot(self, request: SnapshotRequest) -> Iterator[SnapshotItem]:
        yield from ()

    def scan(self, request: Mapping[str, Any]) -> Iterator[list[tuple[bytes, bytes]]]:
        yield []

    def call(self, method: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        return request


Serve = Callable[[Security | None], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server with the given security; it is stopped after the test."""
    servers = []

    def start(security: Security | None) -> str:
        servers.append(GrpcTransport(security=security).serve(Echo(), "127.0.0.1:0", name="a"))
        return servers[-1].start()

    yield start
    for server in servers:
        server.stop()


def ask(address: str, security: Security | None) -> None:
    """One call that must come back."""
    connection = GrpcTransport(security=security).connect(address, name="b")
    try:
        assert connection.call("echo", {"n": 1}, 5) == {"n": 1}
    finally:
        connection.close()


def test_mutual_tls(serve: Serve) -> None:
    """Two nodes with certificates of one authority talk."""
    address = serve(Security(tls=tls("node-a")))
    ask(address, Security(tls=tls("node-b")))


def test_tls_by_name(serve: Serve) -> None:
    """The certificate is checked against the host that the user wrote."""
    port = serve(Security(tls=tls("node-a"))).rpartition(":")[2]
    ask(f"localhost:{port}", Security(tls=tls("node-b")))


@pytest.mark.parametrize(
    "client",
    [tls("stranger"), TLS(ca=CA)],
    ids=["another authority", "no certificate"],
)
def test_server_refuses_strangers(serve: Serve, client: TLS) -> None:
    """A client whose certificate is missing or not of the authority gets no answer."""
    address = serve(Security(tls=tls("node-a")))
    with pytest.raises((AuthenticationFailed, PeerUnavailable)):
        ask(address, Security(tls=client))


def test_client_refuses_strangers(serve: Serve) -> None:
    """A client does not talk to a server of another authority, and says why."""
    address = serve(Security(tls=tls("stranger", ca=None)))
    with pytest.raises(AuthenticationFailed, match="TLS with"):
        ask(address, Security(tls=tls("node-b")))


def test_client_certificate_is_optional(serve: Serve) -> None:
    """A server that does not require client certificates takes clients without."""
    address = serve(Security(tls=tls("node-a", require_client_certificate=False)))
    ask(address, Security(tls=TLS(ca=CA)))


def test_plaintext_to_tls(serve: Serve) -> None:
    """A plaintext client gets an error, not a hang."""
    address = serve(Security(tls=tls("node-a")))
    with pytest.raises((AuthenticationFailed, PeerUnavailable)):
        ask(address, None)


def test_server_follows_its_files(serve: Serve, tmp_path: Path) -> None:
    """A replaced certificate is used from the next handshake on; unreadable files change nothing."""
    certificate, key = tmp_path / "c.pem", tmp_path / "c.key"

    def install(name: str) -> None:
        for source, target in ((f"{name}.pem", certificate), (f"{name}.key", key)):
            shutil.copyfile(FILES / source, tmp_path / "new")
            os.replace(tmp_path / "new", target)

    install("stranger")
    address = serve(Security(tls=TLS(certificate, key)))
    client = Security(tls=TLS(ca=CA))
    with pytest.raises(AuthenticationFailed):
        ask(address, client)
    install("node-a")
    ask(address, client)
    key.unlink()
    ask(address, client)


def test_token(serve: Serve) -> None:
    """Only who knows the token is answered, on calls, scans and streams."""
    address = serve(Security(token="right"))
    ask(address, Security(token="right"))
    for security in (None, Security(token="wrong"), Security(token="righ")):
        connection = GrpcTransport(security=security).connect(address, name="b")
        with pytest.raises(AuthenticationFailed, match="token"):
            connection.call("echo", {}, 5)
        with pytest.raises(AuthenticationFailed):
            next(connection.scan({}, 5))
        with pytest.raises(StreamEnded) as caught:
            connection.open_stream().receive()
        assert isinstance(caught.value.error, AuthenticationFailed)
        connection.close()


def test_token_over_tls(serve: Serve) -> None:
    """Token and TLS are both required when both are set."""
    address = serve(Security(tls=tls("node-a"), token="right"))
    ask(address, Security(tls=tls("node-b"), token="right"))
    with pytest.raises(AuthenticationFailed, match="token"):
        ask(address, Security(tls=tls("node-b")))


def test_token_stays_on_the_machine_in_plaintext() -> None:
    """A token without TLS is refused for any other address than loopback, on both sides."""
    transport = GrpcTransport(security=Security(token="t"))
    with pytest.raises(ValueError, match="plaintext"):
        transport.connect("10.0.0.1:7400", name="b")
    with pytest.raises(ValueError, match="plaintext"):
        transport.serve(Echo(), "0.0.0.0:0", name="a")


def test_token_is_not_shown() -> None:
    """The token does not get into logs by way of repr."""
    assert "secret" not in repr(Security(token="secret"))


@pytest.mark.parametrize("token", ["", "ä", "a\n", "x" * 1025])
def test_bad_tokens(token: str) -> None:
    """A token that cannot travel is refused when it is set."""
    with pytest.raises(ValueError, match="token"):
        Security(token=token)


def test_half_settings() -> None:
    """Settings that contradict each other are refused when they are made."""
    with pytest.raises(ValueError, match="both"):
        TLS("certificate.pem")
    with pytest.raises(ValueError, match="needs ca"):
        TLS("c", "k", require_client_certificate=True)


@pytest.mark.parametrize("settings", [TLS("missing.pem", "missing.key"), TLS(ca=CA)])
def test_server_without_usable_files(settings: TLS) -> None:
    """A server whose files are missing does not start."""
    server = GrpcTransport(security=Security(tls=settings)).serve(Echo(), "127.0.0.1:0", name="a")
    with pytest.raises(OpenError, match="TLS"):
        server.start()
    server.stop()
