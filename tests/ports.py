"""Free ports for servers that have to be told one, and that start again on it."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

__all__ = ["free_address", "free_port"]

LOWEST = 10_240
_random = random.SystemRandom()


def free_port() -> int:
    """A port on the loopback that nobody listens on.

    It is not one of those that the kernel gives to connections: while its server is down, a client that tries
    again and again would sooner or later get that very port for its own end, and keep the server out.
    """
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    below = max(int(text.split()[0]), LOWEST + 1000)
    while True:
        port = _random.randrange(LOWEST, below)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port


def free_address() -> str:
    """The same with its host: ``"127.0.0.1:port"``."""
    return f"127.0.0.1:{free_port()}"
