"""Where a reader of a feed stands, as text that any node of the store understands.

``k1`` and URL-safe base64 (without padding) of a CRC-32 and the msgpack list
``[lineage, branch, epoch, offset, index, [[epoch, first offset], …], previous, scan]``: everything through operation
``index`` of record ``offset`` was read (all of the record where ``index`` is -1). ``branch`` is the beginning of the
branch's id. The epochs are the newest
entries of the history's table up to there, so that another node can tell how far its own history agrees.
``previous`` is the sequence of the change delivered last. ``scan`` is there in the middle of a snapshot:
``[keyspace, key, rows so far, epoch and offset at which it began]``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

from kvrep.errors import InvalidToken
from kvrep.model.change import Sequence
from kvrep.model.position import EPOCH_MAX, OFFSET_MAX, ZERO, EpochTable, Position

__all__ = ["BRANCH_BYTES", "WHOLE", "Scan", "Token", "branch_at"]

PREFIX = "k1"
WHOLE = -1
"""The index that stands for all of a record."""
EPOCHS_MAX = 8
BRANCH_BYTES = 8
TOKEN_CHARS_MAX = 4096


class Scan(NamedTuple):
    """How far a snapshot has come: the rows through (``keyspace``, ``key``) are delivered."""

    keyspace: str
    key: bytes
    rows: int
    begun: Position

    @property
    def place(self) -> tuple[str, bytes]:
        return self.keyspace, self.key


class Token(NamedTuple):
    """See the module. ``str()`` makes the text, :meth:`parse` reads it."""

    lineage: bytes
    branch: bytes
    position: Position
    index: int  # type: ignore[assignment] # the method of tuples is no loss
    epochs: EpochTable
    previous: Sequence | None
    scan: Scan | None

    def __str__(self) -> str:
        scan = self.scan
        body = msgpack.packb(
            [
                self.lineage,
                self.branch,
                *self.position,
                self.index,
                [list(entry) for entry in list(self.epochs)[-EPOCHS_MAX:]],
                self.previous,
                None if scan is None else [*scan.place, scan.rows, *scan.begun],
            ]
        )
        data = crc32(body).to_bytes(4, "big") + body
        return PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token; :class:`InvalidToken` when it is something else, whatever it is."""
        if not isinstance(text, str):
            raise TypeError(f"a token is text, not {type(text).__name__}")
        try:
            return cls._parse(text)
        except (
            ValueError,
            TypeError,
            IndexError,
            OverflowError,
            RecursionError,
            binascii.Error,
            msgpack.exceptions.UnpackException,
        ) as error:
            raise InvalidToken(f"not a token of a feed: {text[:40]!r}") from error

    @classmethod
    def _parse(cls, text: str) -> Token:
        if not text.startswith(PREFIX) or len(text) > TOKEN_CHARS_MAX or not text.isascii():
            raise ValueError("not a token")
        body_text = text[len(PREFIX) :]
        data = base64.b64decode(body_text + "=" * (-len(body_text) % 4), altchars=b"-_", validate=True)
        if base64.urlsafe_b64encode(data).rstrip(b"=").decode() != body_text:
            raise ValueError("not the shortest form")
        body = data[4:]
        if len(data) < 5 or crc32(body) != int.from_bytes(data[:4], "big"):
            raise ValueError("damaged")
        lineage, branch, epoch, offset, index, epochs, previous, scan = msgpack.unpackb(body)
        _need(isinstance(lineage, bytes) and len(lineage) in {0, 16})
        _need(isinstance(branch, bytes) and len(branch) in {0, BRANCH_BYTES})
        _need(type(index) is int and -1 <= index < 1 << 32)
        _need(previous is None or (len(previous) == 3 and all(type(n) is int and n >= 0 for n in previous)))
        return cls(
            lineage,
            branch,
            _position(epoch, offset),
            index,
            EpochTable([_position(*entry) for entry in epochs]),
            None if previous is None else (previous[0], previous[1], previous[2]),
            None if scan is None else _scan(*scan),
        )

    @property
    def needs(self) -> int:
        """The first record of the log that going on from here reads."""
        return self.position.offset + (self.index == WHOLE)


def branch_at(branches: Iterable[tuple[int, bytes]], offset: int) -> bytes:
    """What a token says of the branch that ``offset`` belongs to."""
    return next((b[:BRANCH_BYTES] for first, b in reversed(list(branches)) if first <= offset), b"")


def _scan(keyspace: Any, key: Any, rows: Any, epoch: Any, offset: Any) -> Scan:
    _need(isinstance(keyspace, str) and isinstance(key, bytes) and type(rows) is int and rows >= 0)
    return Scan(keyspace, key, rows, _position(epoch, offset))


def _position(epoch: Any, offset: Any) -> Position:
    _need(type(epoch) is int and type(offset) is int)
    _need(0 <= epoch <= EPOCH_MAX and 0 <= offset <= OFFSET_MAX)
    return Position(epoch, offset) if epoch or offset else ZERO


def _need(holds: bool) -> None:
    if not holds:
        raise ValueError("out of range")
