"""Addresses: "host:port" and "[::1]:port"."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import NamedTuple

__all__ = ["Address"]

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_HOST_CHARS_MAX = 253
_PORT_MAX = 65535


class Address(NamedTuple):
    """A host (name or IP, without brackets) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, listen: bool = False) -> Address:
        """Read an address; ``ValueError`` that says what is wrong.

        Port 0 is for ``listen`` only.
        """
        if not isinstance(text, str):
            raise TypeError(f"an address is text, not {type(text).__name__}")
        host, _, port = text.rpartition(":")
        if not (port.isascii() and port.isdecimal() and len(port) <= 5):
            raise _bad(text, "the port is missing or not a number")
        if int(port) > _PORT_MAX or (int(port) == 0 and not listen):
            raise _bad(text, f"the port must be in {0 if listen else 1}..{_PORT_MAX}")
        return cls(_host(text, host), int(port))

    @property
    def loopback(self) -> bool:
        """Whether only this machine can be at the other end."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def _host(text: str, host: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        try:
            if ip_address(host[1:-1]).version == 6:
                return host[1:-1]
        except ValueError:
            pass
        raise _bad(text, "the brackets do not hold an IPv6 address")
    if ":" in host:
        raise _bad(text, "an IPv6 address needs brackets, as in [::1]:7400")
    if len(host) > _HOST_CHARS_MAX or not _HOST.fullmatch(host):
        raise _bad(text, "the host is missing or holds characters that no host name has")
    return host


def _bad(text: str, why: str) -> ValueError:
    return ValueError(f'not an address: {text[:300]!r}: {why} (expected "host:port")')
