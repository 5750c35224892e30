"""The state digest: a number that two copies of a keyspace share exactly when they hold the same data.

The digest is the sum, modulo 2**128, of a keyed hash of every (key, value). A sum can be brought up to date
by what changed alone, in any order (Bellare and Micciancio, "A new paradigm for collision-free hashing",
1997, their AdHash; the key is the lineage, so it is no secret: it guards against faults and rot, not
against an author of colliding data).
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from struct import Struct

__all__ = ["DIGEST_MODULUS", "Hasher"]

DIGEST_MODULUS = 1 << 128
_LENGTH = Struct("<H").pack


class Hasher:
    """Sums of entry hashes under one lineage."""

    __slots__ = ("_base",)

    def __init__(self, lineage: bytes) -> None:
        self._base = blake2b(digest_size=16, key=lineage)

    def sum(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        """The sum of the hashes of (key, value) pairs; not yet reduced."""
        total = 0
        copy, from_bytes, length = self._base.copy, int.from_bytes, _LENGTH
        for key, value in items:
            h = copy()
            h.update(length(len(key)) + key + value)
            total += from_bytes(h.digest(), "little")
        return total
