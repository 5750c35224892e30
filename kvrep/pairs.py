"""Ranges of keys, and pairs as users see them: what everything that scans shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvrep.runtime.checks import prefix_stop

__all__ = ["bounds", "decoded"]


def bounds(prefix: bytes, start: bytes | None, stop: bytes | None) -> tuple[bytes, bytes | None]:
    """[low, high) of a scan; ``TypeError`` for anything but bytes."""
    for what, value in (("prefix", prefix), ("start", start), ("stop", stop)):
        if value is not None and not isinstance(value, bytes):
            raise TypeError(f"{what} must be bytes, not {type(value).__name__}")
    low = max(prefix, start or b"")
    high = prefix_stop(prefix)
    if stop is not None and (high is None or stop < high):
        high = stop
    return low, high


def decoded(
    pairs: Iterator[tuple[bytes, bytes]], decode: Callable[[bytes], Any] | None
) -> Iterator[tuple[bytes, Any]]:
    return pairs if decode is None else ((key, decode(value)) for key, value in pairs)
