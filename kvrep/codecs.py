"""How a keyspace turns objects into bytes and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgpack

__all__ = ["BYTES", "JSON", "MSGPACK", "TEXT", "Codec"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Codec(Generic[V]):
    """A pair of functions. ``encode`` gets what the user stores, ``decode`` gives it back."""

    name: str
    encode: Callable[[V], bytes]
    decode: Callable[[bytes], V]


def _same(value: bytes) -> bytes:
    return value


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


BYTES: Codec[bytes] = Codec("bytes", _same, _same)
"""The default: values are bytes already."""
TEXT: Codec[str] = Codec("text", str.encode, bytes.decode)
"""UTF-8 text."""
MSGPACK: Codec[Any] = Codec("msgpack", msgpack.packb, _unpack)
"""Numbers, text, bytes, lists and maps, compactly."""
JSON: Codec[Any] = Codec("json", lambda value: json.dumps(value).encode(), json.loads)
"""The same in readable form, without bytes."""
