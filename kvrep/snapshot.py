"""A store at one position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvrep.codecs import BYTES, Codec
from kvrep.model.position import Position
from kvrep.pairs import bounds, decoded
from kvrep.runtime.checks import check_key
from kvrep.runtime.node import Node
from kvrep.storage.view import Snapshot as PinnedView

if TYPE_CHECKING:
    from kvrep.keyspace import Keyspace

__all__ = ["Snapshot"]

_MISSING: Any = object()


class Snapshot:
    """A store at one position, until closed. ``with store.snapshot() as view: …``"""

    def __init__(self, node: Node, codec: Codec[Any], keyspace: str, pinned: PinnedView) -> None:
        self._node = node
        self._pinned = pinned
        self._name = keyspace
        self._codec = codec

    @property
    def position(self) -> Position:
        """The position that every read of this snapshot shows."""
        return self._pinned.position

    def get(self, key: bytes, default: Any = None, *, keyspace: Keyspace[Any] | None = None) -> Any:
        """The value of ``key`` at this position."""
        name, decode = self._space(keyspace)
        value = self._pinned.get(name, check_key(key))
        if value is None:
            return default
        return decode(value)

    def __getitem__(self, key: bytes) -> Any:
        value = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        return value

    def __contains__(self, key: bytes) -> bool:
        return self.get(key, _MISSING) is not _MISSING

    def __len__(self) -> int:
        return self._pinned.count(self._name)

    def scan(
        self,
        *,
        prefix: bytes = b"",
        start: bytes | None = None,
        stop: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        keyspace: Keyspace[Any] | None = None,
    ) -> Iterator[tuple[bytes, Any]]:
        """Pairs in key order at this position; see :meth:`Keyspace.scan`."""
        name, decode = self._space(keyspace)
        low, high = bounds(prefix, start, stop)
        if high is not None and low >= high:
            return iter(())
        pairs = self._pinned.scan(name, low, high, reverse=reverse)
        plain = decode is BYTES.decode
        return decoded(islice(pairs, limit), None if plain else decode)

    def __iter__(self) -> Iterator[bytes]:
        return (key for key, _ in self.scan())

    def _space(self, keyspace: Keyspace[Any] | None) -> tuple[str, Callable[[bytes], Any]]:
        if keyspace is None:
            return self._name, self._codec.decode
        return keyspace._keyspace, keyspace._codec.decode

    @property
    def closed(self) -> bool:
        return self._pinned.released

    @property
    def busy(self) -> bool:
        """Whether a step of a read is under way, for which the next read would wait."""
        return self._pinned.busy

    def close(self) -> None:
        """Let go of the position. Idempotent."""
        self._pinned.release()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
