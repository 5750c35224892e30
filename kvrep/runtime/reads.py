"""What a transaction has read, in a form that another node can compare with what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from kvrep.errors import ProtocolError
from kvrep.runtime.checks import check_forwarded_name
from kvrep.storage.engine import Engine
from kvrep.storage.view import Snapshot

__all__ = ["Entries", "ReadSet", "fingerprint", "fresh_in", "merged", "same_reads"]

Pairs = Iterator[tuple[bytes, bytes]]
Entries = Mapping[tuple[str, bytes], bytes | None]
"""(keyspace, key) -> value, or ``None`` where it was deleted: what lies over what a snapshot shows."""
PLAIN_BYTES_MAX = 32
"""Values up to this length stand for themselves; longer ones are told by a hash of this length."""


def fingerprint(value: bytes | None) -> bytes | None:
    """What is compared in place of a value; ``None`` for a missing key."""
    if value is None:
        return None
    if len(value) <= PLAIN_BYTES_MAX:
        return b"\0" + value
    return b"\1" + blake2b(value, digest_size=PLAIN_BYTES_MAX).digest()


class _Range:
    """A scan: its bounds, and the pairs that were taken from it."""

    def __init__(self, name: str, low: bytes, high: bytes | None, reverse: bool) -> None:
        self.head = (name, low, high, reverse)
        self.count = 0
        self.ended = False
        """Whether it was read to its end: then there is nothing behind the pairs."""
        self._hash = blake2b(digest_size=PLAIN_BYTES_MAX)

    def take(self, key: bytes, value: bytes) -> None:
        self.count += 1
        self._hash.update(len(key).to_bytes(2, "big") + key + len(value).to_bytes(8, "big"))
        self._hash.update(value)

    @property
    def digest(self) -> bytes:
        return self._hash.digest()


class ReadSet:
    """Collects the reads of one transaction; ``pinned`` is the snapshot that it reads, if it has one."""

    def __init__(self, pinned: Snapshot | None = None) -> None:
        self.pinned = pinned
        self._values: dict[tuple[str, bytes], bytes | None] = {}
        self._ranges: list[_Range] = []

    def __bool__(self) -> bool:
        return bool(self._values or self._ranges)

    def get(self, name: str, key: bytes) -> bytes | None:
        """The value in the snapshot, noted as read."""
        assert self.pinned is not None
        return self.note(name, key, self.pinned.get(name, key))

    def note(self, name: str, key: bytes, value: bytes | None) -> bytes | None:
        self._values[(name, key)] = fingerprint(value)
        return value

    def watch(self, name: str, low: bytes, high: bytes | None, reverse: bool, pairs: Pairs) -> Pairs:
        """``pairs`` of that range, each noted as it is taken."""
        scan = _Range(name, low, high, reverse)
        self._ranges.append(scan)
        for key, value in pairs:
            scan.take(key, value)
            yield key, value
        scan.ended = True

    def release(self) -> None:
        if self.pinned is not None:
            self.pinned.release()

    def to_wire(self) -> tuple[list[Any], list[Any]]:
        """(values, ranges) for :func:`same_reads` on another node."""
        values = [[name, key, found] for (name, key), found in self._values.items()]
        ranges = [[*r.head, r.count, r.ended, r.digest] for r in self._ranges]
        return values, ranges


def same_reads(engine: Engine, over: Entries, values: Any, ranges: Any) -> bool:
    """Whether the same reads give the same here, where ``over`` lies over what is published.

    The caller holds the writer's place. :class:`ProtocolError` when they are no reads of a :class:`ReadSet`.
    """
    try:
        for name, key, found in values:
            check_forwarded_name(name)
            prefix = engine.view.admit(name)
            value = over[(name, key)] if (name, key) in over else engine.view.get(name, prefix, key)
            if fingerprint(value) != found:
                return False
        for scan in ranges:
            check_forwarded_name(scan[0])
        return all(_same_range(engine, over, *scan) for scan in ranges)
    except (TypeError, ValueError, IndexError) as error:
        raise ProtocolError(f"not what a transaction has read: {error}") from None


def _same_range(
    engine: Engine,
    over: Entries,
    name: str,
    low: bytes,
    high: bytes | None,
    reverse: bool,
    count: int,
    ended: bool,
    digest: bytes,
) -> bool:
    here = _Range(name, low, high, reverse)
    snapshot = engine.snapshot()
    try:
        pairs = snapshot.scan(name, low, high, reverse=reverse)
        for key, value in merged(pairs, fresh_in(over, name, low, high), reverse):
            if here.count == count:
                return not ended and here.digest == digest
            here.take(key, value)
        return here.count == count and here.digest == digest
    finally:
        snapshot.release()


def fresh_in(over: Entries, name: str, low: bytes, high: bytes | None) -> dict[bytes, bytes | None]:
    """What ``over`` says about the keys of one range."""
    return {
        key: value
        for (space, key), value in over.items()
        if space == name and key >= low and (high is None or key < high)
    }


def merged(pairs: Pairs, fresh: dict[bytes, bytes | None], reverse: bool) -> Pairs:
    """``pairs`` with ``fresh`` laid over them, in order."""
    waiting = sorted(fresh, reverse=not reverse)  # the next one last
    for key, value in pairs:
        while waiting and (waiting[-1] > key if reverse else waiting[-1] < key):
            new = waiting.pop()
            if (found := fresh[new]) is not None:
                yield new, found
        if waiting and waiting[-1] == key:
            waiting.pop()
            if (found := fresh[key]) is not None:
                yield key, found
        else:
            yield key, value
    while waiting:
        new = waiting.pop()
        if (found := fresh[new]) is not None:
            yield new, found
