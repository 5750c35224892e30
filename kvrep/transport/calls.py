"""Unary calls and scans <-> bytes: plain msgpack with strict limits, since it comes from a peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from kvrep.errors import ProtocolError

__all__ = [
    "decode_answer",
    "decode_call",
    "decode_request",
    "decode_scan_chunk",
    "encode_answer",
    "encode_call",
    "encode_request",
    "encode_scan_chunk",
]

METHOD_CHARS_MAX = 64
ITEMS_MAX = 1 << 20
"""How many items one array or map may hold."""


def encode_call(method: str, request: Mapping[str, Any]) -> bytes:
    return _pack([method, dict(request)])


def decode_call(data: bytes) -> tuple[str, dict[str, Any]]:
    """The method and its request; ``ProtocolError`` when it is something else."""
    call = _unpack(data, "a call")
    if not (isinstance(call, list) and len(call) == 2 and isinstance(call[0], str)):
        raise ProtocolError("a call is not a method and a request")
    if len(call[0]) > METHOD_CHARS_MAX:
        raise ProtocolError(f"a method name of {len(call[0])} characters is above the limit")
    return call[0], _named(call[1], "a request")


def encode_request(request: Mapping[str, Any]) -> bytes:
    return _pack(dict(request))


def decode_request(data: bytes) -> dict[str, Any]:
    return _named(_unpack(data, "a request"), "a request")


def encode_answer(answer: Mapping[str, Any]) -> bytes:
    return _pack(dict(answer))


def decode_answer(data: bytes) -> dict[str, Any]:
    return _named(_unpack(data, "an answer"), "an answer")


def encode_scan_chunk(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """``[key, value, key, value, …]``."""
    return _pack([part for pair in pairs for part in pair])


def decode_scan_chunk(data: bytes) -> list[tuple[bytes, bytes]]:
    flat = _unpack(data, "a scan chunk")
    if not isinstance(flat, list) or len(flat) % 2:
        raise ProtocolError("a scan chunk is not a list of pairs")
    # The set of types costs one C loop; asking each part in Python would cost more than decoding
    # it.
    if set(map(type, flat)) - {bytes}:
        raise ProtocolError("a scan chunk holds something else than bytes")
    parts = iter(flat)
    return list(zip(parts, parts, strict=True))


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def _unpack(data: bytes, what: str) -> Any:
    size = len(data)
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=min(size, ITEMS_MAX),
            max_map_len=min(size, ITEMS_MAX),
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"{what} is not readable: {error}") from error


def _named(value: Any, what: str) -> dict[str, Any]:
    """A map with text keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProtocolError(f"{what} is not a map with text keys")
    return value
