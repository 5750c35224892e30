"""Clients of a cluster whose calls go into the history that is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvrep.errors import PeerUnavailable, RefusedError
from kvrep.model.position import Position
from kvrep.testing.embedded import EmbeddedNode
from kvrep.testing.history import Action, Call, History
from kvrep.testing.nodes import ClusterNode, LocalNode

__all__ = ["RecordedClient"]


class RecordedClient:
    """One client, one call at a time, whose calls and outcomes are recorded. Raises what the node raises."""

    def __init__(
        self, name: str, history: History, primary: Callable[[], ClusterNode], node: ClusterNode | None
    ) -> None:
        """Asks ``node`` or else ``primary()``, which raises ``PeerUnavailable`` when there is none."""
        self.name = name
        self._history = history
        self._primary = primary
        self._node = node

    def put(self, key: bytes, value: bytes, **options: Any) -> Position:
        """As of :meth:`kvrep.Store.put`."""
        node = self._asked()
        with self._recorded("put", key, value, node) as call:
            position: Position = node.put(key, value, **options)
            call.done(position=position)
        return position

    def delete(self, key: bytes, **options: Any) -> Position:
        """As of :meth:`kvrep.Store.delete`."""
        node = self._asked()
        with self._recorded("delete", key, None, node) as call:
            position: Position = node.delete(key, **options)
            call.done(position=position)
        return position

    def get(self, key: bytes, **options: Any) -> bytes | None:
        """As of :meth:`kvrep.Store.get`. From a follower it is recorded as a read that may lag."""
        node = self._asked()
        value: bytes | None
        with self._recorded("get", key, None, node, lagging=self._lags(node)) as call:
            value = node.get(key, **options)
            call.done(value=value)
        return value

    def compare_and_set(self, key: bytes, *, expected: bytes | None, value: bytes | None) -> Position | None:
        """As of :meth:`kvrep.Store.compare_and_set`; of nodes in this process and embedded ones."""
        node = self._asked()
        if not isinstance(node, LocalNode | EmbeddedNode):
            raise TypeError("compare_and_set is for nodes in this process and for embedded=True")
        position: Position | None
        with self._recorded("cas", key, value, node, expected=expected) as call:
            position = node.compare_and_set(key, expected=expected, value=value)
            call.done(succeeded=position is not None, position=position)
        return position

    def _asked(self) -> ClusterNode:
        return self._node if self._node is not None else self._primary()

    def _lags(self, node: ClusterNode) -> bool:
        """Whether a read from ``node`` may lag."""
        try:
            return self._node is not None and node is not self._primary()
        except PeerUnavailable:
            return True

    @contextmanager
    def _recorded(
        self,
        action: Action,
        key: bytes,
        value: bytes | None,
        node: ClusterNode,
        *,
        expected: bytes | None = None,
        lagging: bool = False,
    ) -> Iterator[Call]:
        call = self._history.begin(
            self.name, action, key, value, expected=expected, node=node.name, lagging=lagging
        )
        try:
            yield call
        except RefusedError:
            call.refused()
            raise
        except Exception as error:
            if action == "get":
                call.refused()
            else:
                call.unknown(getattr(error, "position", None))
            raise
