"""Who may talk to a node, and whether others can listen. Plaintext is the default."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import grpc

from kvrep.transport.address import Address

__all__ = ["TLS", "Security"]

TOKEN_KEY = "kvrep-token"
TOKEN_BYTES_MAX = 1024

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class TLS:
    """PEM files for TLS. A server needs ``certificate`` and ``private_key``; with ``ca`` it trusts
    that.

    ``require_client_certificate=None`` means: if ``ca`` is given. A client presents its certificate
    if it has one and trusts ``ca``, or the system's authorities without it. Servers read changed
    files at the next handshake, clients at the next connection.
    """

    certificate: str | os.PathLike[str] = ""
    private_key: str | os.PathLike[str] = ""
    ca: str | os.PathLike[str] | None = None
    require_client_certificate: bool | None = None

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.private_key):
            raise ValueError("TLS needs both certificate and private_key, or neither")
        if self.require_client_certificate and self.ca is None:
            raise ValueError("require_client_certificate needs ca: the authority to trust")

    @property
    def client_certificates(self) -> bool:
        """Whether a server asks clients for a certificate and refuses those without."""
        if self.require_client_certificate is None:
            return self.ca is not None
        return self.require_client_certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """TLS, a token that all nodes share, both or neither.

    The token never leaves the machine in plaintext.
    """

    tls: TLS | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and not self._token_fits():
            raise ValueError(f"token must be 1..{TOKEN_BYTES_MAX} printable ASCII characters")

    def _token_fits(self) -> bool:
        token = self.token or ""
        return token.isascii() and token.isprintable() and 0 < len(token) <= TOKEN_BYTES_MAX

    def check(self, address: Address) -> None:
        """``ValueError`` if the token would cross a network in plaintext."""
        if self.token is not None and self.tls is None and not address.loopback:
            raise ValueError(
                f"a token without TLS would cross the network to {address} in plaintext"
                " (add tls=TLS(...), or use a loopback address)"
            )

    def admits(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether a caller with this metadata knows the token.

        Takes the same time for every wrong one.
        """
        if self.token is None:
            return True
        given = next((value for key, value in metadata if key == TOKEN_KEY), "")
        given = given.encode() if isinstance(given, str) else given
        return hmac.compare_digest(given, self.token.encode())

    def metadata(self) -> Metadata:
        """What a client sends with every call."""
        return () if self.token is None else ((TOKEN_KEY, self.token),)


def server_credentials(tls: TLS) -> grpc.ServerCredentials:
    """Credentials that follow the files. ``ValueError``/``OSError`` if they are missing now."""
    if not tls.certificate:
        raise ValueError("a TLS server needs certificate and private_key")
    files = _Files(tls)
    # The stubs forget that the fetcher may return None, which keeps the configuration.
    fetch: Any = files.if_changed
    return grpc.dynamic_ssl_server_credentials(
        files.first, fetch, require_client_authentication=tls.client_certificates
    )


def channel_credentials(tls: TLS) -> grpc.ChannelCredentials:
    """Credentials from what the files hold now; ``OSError`` if they cannot be read."""
    certificate = Path(tls.certificate).read_bytes() if tls.certificate else None
    private_key = Path(tls.private_key).read_bytes() if tls.private_key else None
    ca = Path(tls.ca).read_bytes() if tls.ca is not None else None
    return grpc.ssl_channel_credentials(ca, private_key, certificate)


class _Files:
    """Reads the files again when one of them was replaced. Called from gRPC's threads."""

    def __init__(self, tls: TLS) -> None:
        self._tls = tls
        self._lock = Lock()  # one reader at a time; guards _stamp
        self._stamp = self._look()
        self.first = self._read()

    def _paths(self) -> list[str | os.PathLike[str]]:
        tls = self._tls
        return [path for path in (tls.certificate, tls.private_key, tls.ca) if path]

    def _look(self) -> list[tuple[int, int, int]]:
        stats = [os.stat(path) for path in self._paths()]
        return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        tls = self._tls
        pair = (Path(tls.private_key).read_bytes(), Path(tls.certificate).read_bytes())
        ca = Path(tls.ca).read_bytes() if tls.ca is not None else None
        return grpc.ssl_server_certificate_configuration([pair], ca)

    def if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, or None to go on with the old one; unreadable files change
        nothing.
        """
        with self._lock:
            try:
                stamp = self._look()
                if stamp == self._stamp:
                    return None
                configuration = self._read()
            except (OSError, ValueError) as error:
                logging.getLogger("kvrep.transport").warning(
                    "the TLS files cannot be read again, the old ones stay in use: %s", error
                )
                return None
            self._stamp = stamp
            return configuration
