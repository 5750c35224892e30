"""The limits at the door: what keys, values and names may be."""

from __future__ import annotations

from typing import Any

from kvrep.errors import InvalidInput, InvalidKey, InvalidKeyspace, KeyTooLong, ValueTooLarge
from kvrep.model.record import FEEDS_KEYSPACE
from kvrep.options import KEY_BYTES_MAX, check_keyspace_name

__all__ = [
    "check_forwarded_name",
    "check_headers",
    "check_key",
    "check_name",
    "check_topic",
    "check_value",
    "prefix_stop",
]

TOPIC_CHARS_MAX = 255
HEADERS_MAX, HEADER_CHARS_MAX = 64, 16_384


def check_key(key: Any) -> bytes:
    """``key`` as bytes of a length LMDB takes; ``TypeError``, ``InvalidKey`` or ``KeyTooLong``."""
    if not isinstance(key, (bytes, bytearray, memoryview)):
        raise TypeError(f"keys must be bytes, not {type(key).__name__}")
    data = bytes(key)
    if not data:
        raise InvalidKey("a key must have at least one byte")
    if len(data) > KEY_BYTES_MAX:
        raise KeyTooLong(f"the key has {len(data)} bytes, at most {KEY_BYTES_MAX} are possible")
    return data


def check_value(value: Any, bytes_max: int) -> bytes:
    """``value`` as bytes; ``TypeError`` or ``ValueTooLarge``."""
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(
            f"values must be bytes, not {type(value).__name__} (open the keyspace with a codec for objects)"
        )
    data = bytes(value)
    if len(data) > bytes_max:
        raise ValueTooLarge(
            f"the value has {len(data)} bytes, value_bytes_max allows {bytes_max}",
            hint="split it over several keys, or open the store with a larger value_bytes_max",
        )
    return data


def check_name(name: Any) -> str:
    """A keyspace name; ``TypeError`` or ``InvalidKeyspace``."""
    if not isinstance(name, str):
        raise TypeError(f"keyspace names must be str, not {type(name).__name__}")
    if not check_keyspace_name(name):
        raise InvalidKeyspace(f"{name!r} cannot name a keyspace: 1 to 64 of a-z 0-9 _ -")
    return name


def check_forwarded_name(name: Any) -> str:
    """As :func:`check_name`; another node may also write the places of feeds."""
    return FEEDS_KEYSPACE if name == FEEDS_KEYSPACE else check_name(name)


def check_topic(topic: Any) -> str:
    """The topic of a message; ``TypeError`` or ``InvalidInput``."""
    if not isinstance(topic, str):
        raise TypeError(f"a topic is text, not {type(topic).__name__}")
    if not 0 < len(topic) <= TOPIC_CHARS_MAX:
        raise InvalidInput(f"a topic has 1 to {TOPIC_CHARS_MAX} characters, not {len(topic)}")
    _check_text(topic)
    return topic


def check_headers(headers: Any) -> dict[str, str] | None:
    """The headers of a message, copied; ``TypeError`` or ``InvalidInput``."""
    if headers is None:
        return None
    found = dict(headers)
    if any(not isinstance(part, str) for item in found.items() for part in item):
        raise TypeError("headers map text to text")
    if len(found) > HEADERS_MAX or sum(len(n) + len(t) for n, t in found.items()) > HEADER_CHARS_MAX:
        raise InvalidInput(f"more than {HEADERS_MAX} headers, or {HEADER_CHARS_MAX} characters in them")
    for item in found.items():
        for part in item:
            _check_text(part)
    return found


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput("half of a surrogate pair is no text") from None


def prefix_stop(prefix: bytes) -> bytes | None:
    """The smallest key behind all keys that start with ``prefix``; ``None`` when there is none."""
    stripped = prefix.rstrip(b"\xff")
    if not stripped:
        return None
    return stripped[:-1] + bytes([stripped[-1] + 1])
