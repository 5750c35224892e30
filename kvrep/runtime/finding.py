"""Calls to the primary, wherever it is at the moment."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from kvrep.errors import ClosedError, Error, NotPrimary
from kvrep.runtime.promoting import ask_all

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.transport.interface import Connection

__all__ = ["PrimaryLink", "Target"]

log = logging.getLogger("kvrep.replication")

LOOK_S = 0.01
"""How often this node looks at what its own stream says."""
ASK_INTERVAL_S, ASK_INTERVAL_MAX_S = 0.02, 0.2
"""The pause between two questions to the voters; it doubles while nobody is primary."""
ASK_S = 0.4
"""How long the voters have to say who is primary."""


class Target(NamedTuple):
    """A primary: where it is (empty: this node itself), and in which epoch."""

    address: str
    epoch: int


class PrimaryLink:
    """One per node. Holds one connection; starts no thread. All methods may be called on any thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        # Protects the connection and what is known of epochs.
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._target = Target("", 0)
        """Where the connection leads."""
        self._over = 0
        """Up to this epoch nobody is primary any more."""
        self._known_epoch, self._known_s = 0, 0.0
        """The newest epoch in which a primary was heard of, and since when."""
        self._asked_s, self._interval_s = 0.0, ASK_INTERVAL_S
        self._moved = threading.Event()
        self._stopped = False

    def find(self, deadline_s: float) -> Target:
        """The primary. :class:`NotPrimary` when none is known by ``deadline_s``; ``ClosedError``."""
        while True:
            if self._stopped or self._node.closing:
                raise ClosedError("the store is closed")
            target = self._known() or self._ask(deadline_s)
            if target is not None:
                self._interval_s = ASK_INTERVAL_S
                self.knows(target.epoch)
                return target
            left = deadline_s - time.monotonic()
            if left <= 0:
                address = self._node.primary_address
                raise NotPrimary(
                    "no primary was found in time",
                    hint="see status() of the other nodes",
                    primary_address=address or None,
                    epoch=None,
                )
            self._moved.wait(min(left, LOOK_S))
            self._moved.clear()

    def _known(self) -> Target | None:
        node = self._node
        replaying = node.replaying
        if node.shipping is not None:
            epoch = node.primary_epoch
            return Target("", epoch) if epoch else None
        if replaying is not None:
            address, epoch = replaying.joined
            if address and epoch > self._over:
                return Target(address, epoch)
        return None

    def _ask(self, deadline_s: float) -> Target | None:
        """Ask the voters, not too often."""
        with self._lock:
            now = time.monotonic()
            if now - self._asked_s < self._interval_s:
                return None
            self._asked_s = now
            over = self._over
        peers = ask_all(
            self._node.roles,
            "standing",
            {},
            min(deadline_s, now + ASK_S),
            lambda peers: any(peer.primary_epoch > over for peer in peers),
        )
        with self._lock:
            self._asked_s = time.monotonic()
            self._interval_s = min(2 * self._interval_s, ASK_INTERVAL_MAX_S)
        found = max(peers, key=lambda peer: peer.primary_epoch, default=None)
        if found is None or found.primary_epoch <= self._over:
            return None
        return Target(found.voter.address, found.primary_epoch)

    def call(
        self, target: Target, method: str, request: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """Ask the primary; errors as of ``Connection.call``. A newer primary ends the call."""
        connection = self._connect(target)
        try:
            return connection.call(method, request, max(0.05, timeout_s))
        except Error as error:
            if not isinstance(error, NotPrimary):
                self._drop(connection)
            raise

    def _connect(self, target: Target) -> Connection:
        with self._lock:
            if self._stopped:
                raise ClosedError("the store is closed")
            old = self._connection
            if old is not None and self._target == target:
                return old
            transport = self._node.transport
            assert transport is not None
            self._connection = connection = transport.connect(target.address, name=self._node.label)
            self._target = target
        if old is not None:
            old.close()
        return connection

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            if self._connection is connection:
                self._connection = None
        connection.close()

    def over(self, epoch: int) -> None:
        """The primary of ``epoch`` says that it is none any more."""
        with self._lock:
            self._over = max(self._over, epoch)

    def knows(self, epoch: int) -> None:
        """There is a primary of ``epoch``: this node, one whose stream has joined, or one that said so.

        Calls to one of an older epoch are not waited for any more.
        """
        with self._lock:
            if epoch <= self._known_epoch:
                return
            self._known_epoch, self._known_s = epoch, time.monotonic()
            self._over = max(self._over, epoch - 1)
            old = self._connection if self._target.epoch < epoch else None
            if old is not None:
                self._connection = None
        self._moved.set()
        if old is not None:
            old.close()

    @property
    def settling(self) -> bool:
        """Whether the present primary is so new that its followers may not have found it yet."""
        return time.monotonic() - self._known_s < self._node.options.heartbeat_timeout_s

    def stop(self) -> None:
        """End calls under way."""
        with self._lock:
            self._stopped = True
            old, self._connection = self._connection, None
        self._moved.set()
        if old is not None:
            old.close()
