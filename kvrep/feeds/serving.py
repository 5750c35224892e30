"""Feeds for clients in other processes: what a node answers, and the reader at the other end.

Every answer stands for itself: the client says where to go on by a token, so nothing is kept for it here, and
it may ask another node at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from kvrep.errors import ProtocolError
from kvrep.feeds.changes import Changes
from kvrep.feeds.named import Feeds
from kvrep.feeds.selection import Selection
from kvrep.model.change import Change, ChangeKind, Sequence
from kvrep.model.position import Position
from kvrep.model.token import Token
from kvrep.runtime.checks import check_name
from kvrep.runtime.node import Node

__all__ = ["RemoteChanges", "calls_of"]

ANSWER_BYTES = 4 << 20
WAIT_S_MAX = 10.0
_PLACES = ("now", "oldest")
_FIELDS = {"token", "timeout_s", "keyspaces", "prefix", "topics", "committed", "before"}
"""Of a request for changes. Whatever else is asked for is refused: passed over, it would look as if it were there."""
_NONE = type(None)
_KINDS = frozenset(get_args(ChangeKind))
Call = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


def calls_of(node: Node, feeds: Feeds) -> dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]]:
    """What a node with these feeds answers, by the name of the call."""
    return {
        "feed-read": lambda request: _read(node, feeds, request),
        "feed-list": lambda request: {"feeds": [i.to_json() for i in feeds.infos()]},
        "feed-change": lambda request: _change(feeds, request),
    }


def _read(node: Node, feeds: Feeds, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The changes behind ``token`` (``""``: a snapshot; or a place as ``Feeds.place`` takes it)."""
    if unknown := request.keys() - _FIELDS:
        raise ProtocolError(
            f"a request for changes with {', '.join(sorted(map(str, unknown)))}", hint="upgrade this node"
        )
    try:
        selection = Selection.of(
            request.get("keyspaces"), request.get("prefix") or b"", request.get("topics"),
            before=bool(request.get("before")),
        )  # fmt: skip
        place, timeout_s = str(request["token"]), min(max(0.0, float(request["timeout_s"])), WAIT_S_MAX)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not a request for changes: {error}") from error
    if place in _PLACES or ":" in place:
        place = feeds.place(Position.parse(place) if ":" in place else place)[0]
    token = Token.parse(place) if place else None
    committed = bool(request.get("committed"))
    with Changes(node, selection, token=token, snapshot=token is None, committed=committed) as changes:
        found = changes.poll(timeout_s)
        sent: list[list[Any]] = []
        size = 0
        for change in found:
            size += len(change.key) + len(change.value or b"") + len(change.before or b"") + 512
            if sent and size > ANSWER_BYTES:
                return {"changes": sent, "token": sent[-1][-1], "position": str(changes.position)}
            sent.append(_packed(change))
        return {"changes": sent, "token": changes.token if found or token else "",
                "position": str(changes.position)}  # fmt: skip


def _change(feeds: Feeds, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Pause, resume, seek or drop a feed; returns what it is then (nothing after a drop)."""
    name, action = request.get("name"), request.get("action")
    if not isinstance(name, str):
        raise ProtocolError("which feed?")
    feeds.need(name)
    if action in ("pause", "resume"):
        feeds.pause(name, paused=action == "pause")
    elif action == "seek":
        to = str(request.get("to"))
        feeds.seek(name, Position.parse(to) if ":" in to else to)
    elif action == "drop":
        feeds.drop(name)
        return {"feed": None}
    else:
        raise ProtocolError(f"{action!r} is nothing that can be done to a feed")
    return {"feed": feeds.info(name).to_json()}


def _packed(change: Change) -> list[Any]:
    headers = None if change.headers is None else dict(change.headers)
    return [
        *change.position, change.index, change.kind, change.keyspace, change.key, change.value, change.time_us,
        change.last, change.previous, change.snapshot, change.before, change.created, change.topic, headers,
        change.resume,
    ]  # fmt: skip


class _Given:
    """The token that came with a change."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def token(self, change: Change) -> str:
        del change
        return self._text


_TYPES: tuple[tuple[type, ...], ...] = (
    (int,), (int,), (int,), (str,), (str,), (bytes,), (bytes, _NONE), (int,), (bool,), (list, tuple, _NONE),
    (bool,), (bytes, _NONE), (bool, _NONE), (str,), (dict, _NONE), (str,),
)  # fmt: skip
"""Of the fields of a packed change."""


def _unpacked(raw: Any) -> Change:
    """Read :func:`_packed`; :class:`ProtocolError` when it is something else."""
    try:
        wrong = [f for f, types in zip(raw, _TYPES, strict=True) if type(f) not in types]
        epoch, offset, index, kind, keyspace, key, value, time_us, last, previous, *rest = raw
        snapshot, before, created, topic, headers, token = rest
        came: Sequence | None = None if previous is None else tuple(previous)
        wrong += [n for n in came or () if type(n) is not int]
        wrong += [text for pair in (headers or {}).items() for text in pair if type(text) is not str]
    except (TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"not a change: {error}") from error
    if wrong or kind not in _KINDS or len(came or (0, 0, 0)) != 3:
        raise ProtocolError(f"not a change: {str(wrong or raw)[:80]}")
    return Change(
        Position(epoch, offset), index, kind, keyspace, key, value, time_us, last, came, snapshot, before,
        created, topic, headers, _Given(token),
    )  # fmt: skip


class RemoteChanges:
    """The changes of a store that another process has open. One thread at a time.

    ``call(method, request)`` asks a node. ``token`` is where to begin: a token, ``""`` for a snapshot and what
    follows it, ``"now"`` or ``"oldest"``. ``InvalidKeyspace`` for a name that can be none.
    """

    def __init__(
        self,
        call: Call,
        *,
        token: str = "now",
        keyspaces: list[str] | None = None,
        prefix: bytes = b"",
        topics: list[str] | None = None,
        committed: bool = False,
        before: bool = False,
    ) -> None:
        for name in keyspaces or ():
            check_name(name)
        self._call = call
        self.token = token
        """Where to go on after all that was handed out."""
        self._request = {
            "keyspaces": keyspaces, "prefix": prefix, "topics": topics, "committed": committed, "before": before,
        }  # fmt: skip

    @property
    def in_snapshot(self) -> bool:
        """Whether the snapshot is not delivered yet."""
        return not self.token or (self.token not in _PLACES and Token.parse(self.token).scan is not None)

    def poll(self, timeout_s: float = 1.0) -> list[Change]:
        """The next changes; none after ``timeout_s`` (at most 10) without any. Errors as of the other side."""
        answer = self._call("feed-read", {**self._request, "token": self.token, "timeout_s": timeout_s})
        try:
            packed, token = list(answer["changes"]), answer["token"]
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"not an answer with changes: {error!r}") from error
        changes = [_unpacked(raw) for raw in packed]
        self.token = token
        return changes

    def __iter__(self) -> Iterator[Change]:
        while True:
            yield from self.poll(WAIT_S_MAX / 2)
