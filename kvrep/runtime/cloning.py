"""A copy of what another node holds, in a network of its own: to look at, and to promote without anybody noticing.

The node that is copied has any role and goes on as it is. It gives a snapshot and the records behind it, and does
not remember who asked.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvrep.errors import PeerUnavailable
from kvrep.options import Options
from kvrep.replication.messages import NeedBootstrap
from kvrep.runtime.bootstrapping import bootstrap
from kvrep.runtime.node import Node
from kvrep.storage.engine import Engine
from kvrep.transport.memory import MemoryTransport

if TYPE_CHECKING:
    from kvrep.transport.interface import Connection

__all__ = ["clone"]

FETCH_BYTES = 1 << 20
KEYSPACES_MAX = 1024


def clone(path: Path, connection: Connection, *, through: int, name: str, timeout_s: float) -> Node:
    """Make a store at ``path`` of what the node behind ``connection`` holds, at least through record ``through``.

    It comes back open: a follower of nobody whose network is empty, whatever addresses its configuration names.
    What it has behind the snapshot becomes visible when it is promoted by force. Raises what the other node
    answers, :class:`PeerUnavailable` after ``timeout_s``, or what storing the copy raises.
    """
    deadline_s = time.monotonic() + timeout_s
    options = Options(name=name, keyspaces_max=KEYSPACES_MAX)
    engine = Engine.open(path, options, lineage=b"")
    node = Node(engine, options, MemoryTransport())
    try:
        replaying = node.roles.be_follower(())
        need = NeedBootstrap(first=1, reason="trimmed")
        bootstrap(replaying, connection, need, of_follower=True, timeout_s=timeout_s)
        while engine.tail.offset < through:
            _fetch(engine, connection, deadline_s)
        engine.sync()
    except BaseException:
        node.close(5.0)
        raise
    return node


def _fetch(engine: Engine, connection: Connection, deadline_s: float) -> None:
    """Append the next records. Their running checksum shows that they follow what is here."""
    first, left = engine.tail.offset + 1, deadline_s - time.monotonic()
    if left <= 0:
        raise PeerUnavailable(
            f"{connection.address} did not give its records from {first} on in time",
            address=connection.address, hint="allow more time",
        )  # fmt: skip
    answer = connection.call("records", {"first": first, "bytes": FETCH_BYTES}, left)
    if not answer["data"]:
        raise PeerUnavailable(
            f"{connection.address} does not hold record {first} any more", address=connection.address,
            hint="it was cut after a failover, or trimmed: try again",
        )  # fmt: skip
    engine.append(first, bytes(answer["data"]), sync=False)
