"""The store whose changes are read: one that this process has open, or a running node at an address."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from kvrep.errors import (
    ClosedError,
    Error,
    Fenced,
    NotPrimary,
    Overloaded,
    PeerUnavailable,
    RefusedError,
    UnknownOutcome,
)
from kvrep.feeds.changes import Changes
from kvrep.feeds.selection import Transform
from kvrep.feeds.serving import RemoteChanges
from kvrep.model.change import Change
from kvrep.model.position import ZERO, Position
from kvrep.model.token import Token
from kvrep.store import Store

__all__ = ["Local", "Remote", "Selected", "Stream", "Upstream", "Wanted"]

log = logging.getLogger("kvrep.sinks")

CALL_GRACE_S = 5.0
MESSAGE_BYTES_MAX = (1 << 30) + (1 << 20)
"""Whatever a node may hold; its own limits are the tighter ones."""
HEAD_S = 0.5
"""How old the answer to "how far are you?" may be."""


class Wanted(TypedDict, total=False):
    """The fields of :class:`Selected`, as keywords of what reads or publishes changes."""

    keyspaces: list[str] | None
    prefix: bytes
    topics: list[str] | None
    transform: Transform | None
    before: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """What of the changes is wanted."""

    keyspaces: list[str] | None = None
    """``None``: all."""
    prefix: bytes = b""
    """Of keys."""
    topics: list[str] | None = None
    """Of emitted messages."""
    transform: Transform | None = None
    """Rewrites changes or leaves them out; only where the store is open in this process (:class:`Local`)."""
    before: bool = False
    """With former values, where they are kept."""


class Stream(Protocol):
    """Changes behind a token, read by one thread."""

    def poll(self, timeout_s: float = 1.0) -> Sequence[Change]:
        """The next changes; none after ``timeout_s`` without any. Perhaps :class:`~kvrep.feeds.rows.Rows`."""

    def at(self) -> Position:
        """Everything through here was read."""

    def close(self) -> None:
        """End it."""


class Upstream(Protocol):
    """Where changes come from. ``url`` is for people."""

    url: str

    def lineage(self) -> str:
        """Of the store; empty while it has none."""

    def changes(self, token: str, selected: Selected) -> Stream:
        """Behind ``token``; a snapshot and what follows it where that is empty."""

    def head(self) -> int | None:
        """The last offset that is committed there, as far as known."""

    def hold(self, token: str) -> None:
        """The log through ``token`` is not needed any more; what follows it is."""

    def held(self) -> str:
        """The token that :meth:`hold` was given last; empty when there is none, or nothing keeps it."""

    def close(self) -> None: ...


class _LocalStream:
    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self.close = changes.close

    def poll(self, timeout_s: float = 1.0) -> Sequence[Change]:
        return self._changes._poll(timeout_s)

    def at(self) -> Position:
        return self._changes.position


class Local:
    """A store that this process has open. With ``feed``, a named feed of it holds the log for this reader.

    The feed moves only where this node is the primary; elsewhere the log is kept by age and size alone.
    """

    def __init__(self, store: Store, *, feed: str = "", close_store: bool = False) -> None:
        self._store = store
        self._feed_name = feed
        self._close_store = close_store
        self.url = f"kvrep:{store.status().path}"
        self._lineage = ""

    def lineage(self) -> str:
        if not self._lineage:
            self._lineage = self._store.status().lineage
        return self._lineage

    def changes(self, token: str, selected: Selected) -> Stream:
        wanted: dict[str, Any] = {
            "keyspace": selected.keyspaces, "prefix": selected.prefix, "topic": selected.topics,
            "transform": selected.transform, "before": selected.before,
        }  # fmt: skip
        if token:
            return _LocalStream(self._store.changes(resume=token, **wanted))
        return _LocalStream(self._store.changes(snapshot=True, **wanted))

    def head(self) -> int | None:
        return self._store.position.offset

    def hold(self, token: str) -> None:
        if not self._feed_name:
            return
        try:
            with self._store.feed(self._feed_name, snapshot=True) as feed:
                feed.ack(token)
        except (NotPrimary, Fenced):
            pass  # a follower: its log is kept by age and size
        except (RefusedError, UnknownOutcome) as error:  # the next place is told anew
            log.warning("%s: the feed %s stays where it is: %s", self.url, self._feed_name, error)

    def held(self) -> str:
        if not self._feed_name:
            return ""
        try:
            with self._store.feed(self._feed_name, snapshot=True) as feed:
                return feed.token
        except (NotPrimary, Fenced):
            return ""
        except RefusedError as error:  # no place would mean a snapshot
            raise PeerUnavailable(f"the feed {self._feed_name}: {error.message}", address=self.url) from error

    def close(self) -> None:
        if self._close_store:
            self._store.close()


class _RemoteStream:
    def __init__(self, changes: RemoteChanges) -> None:
        self._changes = changes
        self._at = ZERO
        self._token = ""

    def poll(self, timeout_s: float = 1.0) -> list[Change]:
        return self._changes.poll(timeout_s)

    def at(self) -> Position:
        token = self._changes.token
        if token != self._token:
            self._token, self._at = token, Token.parse(token).position
        return self._at

    def close(self) -> None:
        """Every call stands for itself: nothing is left open."""


class Remote:
    """Running nodes of one group, "host:port" or several with commas between, over one connection at a time.

    When the one that is read does not answer, the next one is; tokens are good on all of them. It may be a
    follower; its log is kept by age and size.
    """

    def __init__(
        self, addresses: str, *, tls: Any = None, token: str | None = None, timeout_s: float = 10.0
    ) -> None:
        from kvrep.transport.network import GrpcTransport
        from kvrep.transport.security import Security

        self.url = addresses
        self._addresses = addresses.split(",")
        self._timeout_s = timeout_s
        self._transport = GrpcTransport(
            security=Security(tls=tls, token=token), message_bytes_max=MESSAGE_BYTES_MAX
        )
        # Protects the connection, which is replaced when its node does not answer.
        self._lock = threading.Lock()
        self._asked_s = -HEAD_S
        self._head: int | None = None
        self._lineage = ""
        self._closed = False
        self._connection = self._transport.connect(self._addresses[0], name="agent")
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    def _find(self) -> None:
        """The first node that answers."""
        for left in reversed(range(len(self._addresses))):
            try:
                self._status()
                return
            except PeerUnavailable:
                if not left:
                    raise

    def call(self, method: str, request: Any) -> dict[str, Any]:
        """Any call of the node; errors as of the other side. After :class:`PeerUnavailable` another is asked."""
        timeout_s = float(request.get("timeout_s", self._timeout_s))
        connection = self._connection
        try:
            return connection.call(method, request, timeout_s + CALL_GRACE_S)
        except (PeerUnavailable, ClosedError, Overloaded) as error:
            self._next(connection)
            if not isinstance(error, PeerUnavailable):  # the node is closing, or has no room for another call
                raise PeerUnavailable(error.message, address=connection.address) from error
            raise

    def _next(self, failed: Any) -> None:
        with self._lock:
            if self._connection is not failed or len(self._addresses) == 1 or self._closed:
                return
            self._addresses.append(self._addresses.pop(0))
            self._connection = self._transport.connect(self._addresses[0], name="agent")
        failed.close()

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.call("status", {"timeout_s": self._timeout_s})["status"]
        self._head, self._lineage = status["committed_offset"], status["lineage"] or self._lineage
        return status

    def lineage(self) -> str:
        if not self._lineage:
            self._status()
        return self._lineage

    def changes(self, token: str, selected: Selected) -> Stream:
        if selected.transform is not None:
            raise TypeError("a function that rewrites changes runs where the store is open")
        return _RemoteStream(
            RemoteChanges(
                self.call,
                token=token,
                keyspaces=selected.keyspaces,
                prefix=selected.prefix,
                topics=selected.topics,
                before=selected.before,
            )
        )

    def head(self) -> int | None:
        now_s = time.monotonic()
        if now_s - self._asked_s >= HEAD_S:
            self._asked_s = now_s
            try:
                self._status()
            except Error:
                self._head = None
        return self._head

    def hold(self, token: str) -> None:
        """A client cannot."""

    def held(self) -> str:
        return ""

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connection = self._connection
        connection.close()
