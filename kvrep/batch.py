"""Writes that become one record."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvrep.errors import ClosedError
from kvrep.model.position import Position
from kvrep.model.record import Kind
from kvrep.runtime.checks import check_key
from kvrep.storage.write import Write
from kvrep.transaction import Transaction, emitted

if TYPE_CHECKING:
    from kvrep.keyspace import Keyspace

__all__ = ["Batch"]

V = TypeVar("V")


class Batch(Generic[V]):
    """Writes that become one atomic record when the ``with`` block ends well."""

    def __init__(self, keyspace: Keyspace[V], timeout_s: float | None) -> None:
        self.position: Position | None = None
        """Where it was committed; ``None`` until then, and when it was empty."""
        self._space = keyspace
        self._timeout_s = timeout_s
        self._size_max = keyspace._node.options.record_bytes_max
        self._payload: list[Any] = []
        """As ``write_payload`` makes it: keyspaces, and the flat list of keys and values of each."""
        self._name = ""
        self._flat: list[bytes | None] = []
        self._emits: list[list[Any]] = []
        self._keeping: set[str] = set()
        """Keyspaces whose former values are to be logged."""
        self._size = 0
        self._open = True

    def __enter__(self) -> Batch[V]:
        return self

    def __len__(self) -> int:
        return sum(map(len, self._payload[1::2])) // 2 + len(self._emits)

    def emit(self, topic: str, payload: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Add a message for feeds; see :meth:`Transaction.emit`."""
        message, size = emitted(self._space._node, topic, payload, headers)
        if not self._open:
            raise ClosedError("the batch is over")
        self._size += size
        self._space._node.writes.check_record_size(self._size)
        self._emits.append(message)

    def put(self, key: bytes, value: V, *, keyspace: Keyspace[Any] | None = None) -> None:
        """Add a put, into this keyspace or another one of the same store."""
        space: Keyspace[Any] = self._space if keyspace is None else keyspace
        key, data = space._pair(key, value)
        self._add(space, key, data, len(key) + len(data) + 16)

    def delete(self, key: bytes, *, keyspace: Keyspace[Any] | None = None) -> None:
        """Add a delete."""
        space: Keyspace[Any] = self._space if keyspace is None else keyspace
        key = check_key(key)
        self._add(space, key, None, len(key) + 16)

    def _add(self, space: Keyspace[Any], key: bytes, data: bytes | None, size: int) -> None:
        if not self._open:
            raise ClosedError("the batch is over")
        self._size = size = self._size + size
        if size > self._size_max:
            self._space._node.writes.check_record_size(size)
        if space._keyspace != self._name:
            self._name, self._flat = space._keyspace, []
            self._payload += (self._name, self._flat)
            if space._keeps:
                self._keeping.add(self._name)
        self._flat.extend((key, data))

    def _write(self) -> Write | None:
        """All of it as one write; ``None`` when it is empty."""
        if self._emits:
            return Write(Kind.NOTED, [self._payload, self._emits, []], self._size)
        return Write(Kind.WRITE, self._payload, self._size) if self._payload else None

    def _repeat(self, txn: Transaction[V]) -> None:
        """All of it once more in a transaction, which can tell what stood there before."""
        names = iter(self._payload)
        for name, flat in zip(names, names, strict=True):
            pairs = iter(flat)
            for key, value in zip(pairs, pairs, strict=True):
                txn._writes[(name, key)] = value
                if name in self._keeping:
                    txn._keeping.add((name, key))
        txn._emits, txn._size = self._emits, self._size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._keeping and kind is None:
            _, self.position = self._space._atomically(self._repeat, self._timeout_s)
            return
        write = self._write() if kind is None else None
        if write is not None:
            self.position = self._space._node.writes.commit(write, self._timeout_s)
