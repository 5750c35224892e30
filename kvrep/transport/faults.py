"""Errors <-> bytes, so that a peer raises the class, text and fields that this node raised.

The form is msgpack ``[class name, message, hint, {field: value}]``, small enough for gRPC metadata.
Only classes of ``kvrep.errors`` travel; a subclass defined elsewhere arrives as its nearest one
from there.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from threading import Lock
from typing import Any

import msgpack

from kvrep import errors
from kvrep.errors import Error, ReplicationError
from kvrep.model.position import EPOCH_MAX, OFFSET_MAX, Position

__all__ = ["FAULT_BYTES_MAX", "FaultLog", "decode_fault", "encode_fault"]

FAULT_BYTES_MAX = 4096
_TEXT_CHARS_MAX = 400
_FIELDS_MAX = 16
_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_POSITION_EXT = 1
_CLASSES: dict[str, type[Error]] = {name: getattr(errors, name) for name in errors.__all__}
# Setting these from a peer's data would change what an exception is, not what it says.
_RESERVED = frozenset(dir(Error)) | {"fields", "message", "self"}


def encode_fault(error: Error) -> bytes:
    """The bytes of an error; fields that do not fit are left out, its class and text are kept."""
    name = next(c.__name__ for c in type(error).__mro__ if _CLASSES.get(c.__name__) is c)
    texts = [name, _text(error.message), _text(error.hint)]
    fields = dict(list(error.fields.items())[:_FIELDS_MAX])
    try:
        packed: bytes = msgpack.packb([*texts, fields], default=_plain, strict_types=True)
        if len(packed) <= FAULT_BYTES_MAX:
            return packed
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    small: bytes = msgpack.packb([*texts, {}])
    return small


def _text(value: object) -> str:
    """Bounded, and without the lone surrogates that have no bytes."""
    return str(value)[:_TEXT_CHARS_MAX].encode(errors="replace").decode()


def _plain(value: Any) -> Any:
    """What msgpack does not know, as something it does."""
    if type(value) is Position:
        return msgpack.ExtType(_POSITION_EXT, msgpack.packb(list(value)))
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    return _text(value)


def decode_fault(data: bytes) -> Error:
    """The error of a peer. What cannot be understood becomes a plain ``ReplicationError``."""
    try:
        name, message, hint, fields = _unpack(data)
        ok = all(isinstance(text, str) for text in (name, message, hint)) and type(fields) is dict
    except (ValueError, TypeError, msgpack.exceptions.UnpackException):
        ok = False
    if not ok:
        return ReplicationError("the peer failed, and its error is not readable")
    kept = {key: value for key, value in fields.items() if _allowed(key)}
    return _CLASSES.get(name, ReplicationError)(message, hint=hint or None, **kept)


def _unpack(data: bytes) -> Any:
    if len(data) > FAULT_BYTES_MAX:
        raise ValueError("too long")
    return msgpack.unpackb(
        data, raw=False, use_list=False, max_ext_len=64, ext_hook=_position, strict_map_key=False
    )


def _position(code: int, data: bytes) -> Position:
    epoch, offset = msgpack.unpackb(data)
    if code != _POSITION_EXT or not (0 <= epoch <= EPOCH_MAX and 0 <= offset <= OFFSET_MAX):
        raise ValueError("not a position")
    return Position(int(epoch), int(offset))


def _allowed(field: object) -> bool:
    return isinstance(field, str) and field not in _RESERVED and bool(_FIELD_NAME.fullmatch(field))


class FaultLog:
    """Logs unexpected exceptions with their traceback, one per ``interval_s`` and place.

    Thread-safe.
    """

    def __init__(
        self, name: str, *, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._interval_s = interval_s
        self._clock = clock
        self._lock = Lock()  # guards the next line
        self._places: dict[str, tuple[float, int]] = {}
        self._logger = logging.getLogger("kvrep.transport")

    def unexpected(self, place: str, error: BaseException) -> None:
        """Log ``error`` from ``place`` (a few fixed names), or count it for the next line."""
        now = self._clock()
        with self._lock:
            logged_at, held_back = self._places.get(place, (-self._interval_s, 0))
            silent = now - logged_at < self._interval_s
            self._places[place] = (logged_at, held_back + 1) if silent else (now, 0)
        if silent:
            return
        more = f" ({held_back} more since the last such line)" if held_back else ""
        self._logger.error("%s: %s failed%s", self._name, place, more, exc_info=error)

    def known(self, place: str, error: Exception) -> Error:
        """``error`` itself if peers may see it; else it is logged, and this is what peers see
        instead.
        """
        if isinstance(error, Error):
            return error
        self.unexpected(place, error)
        return ReplicationError(f"{place} failed on the peer; its log says why")
