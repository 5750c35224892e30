"""What a store remembers of a named feed: its place and what it selects. Kept under the feed's name in a
keyspace of kvrep's own, so it is replicated, flushed and bootstrapped like everything else."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from kvrep.errors import CorruptionError, InvalidInput, UpgradeRequired
from kvrep.model.position import OFFSET_MAX

__all__ = ["FeedState", "check_feed_name"]

VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedState:
    """See the module. Everything through ``token`` was acked by whoever reads the feed."""

    token: str
    needs: int
    """The first record of the log that it still has to read."""
    generation: int = 1
    """Grows when somebody else than the reader moves it: what the reader holds then counts no more."""
    paused: bool = False
    keyspaces: tuple[str, ...] | None = None
    prefix: bytes = b""
    topics: tuple[str, ...] | None = None
    created_us: int = 0
    acked_us: int = 0
    """Wall clock of the last ack, for people."""

    def pack(self) -> bytes:
        data: bytes = msgpack.packb(
            {
                "version": VERSION,
                "token": self.token,
                "needs": self.needs,
                "generation": self.generation,
                "paused": self.paused,
                "keyspaces": self.keyspaces,
                "prefix": self.prefix,
                "topics": self.topics,
                "created_us": self.created_us,
                "acked_us": self.acked_us,
            }
        )
        return data

    @classmethod
    def unpack(cls, data: bytes) -> FeedState:
        """:class:`UpgradeRequired` for what a newer version has written, :class:`CorruptionError` for what none has."""
        try:
            raw = msgpack.unpackb(data)
            version = raw.pop("version")
            if version == VERSION:
                raw |= {name: _names(raw[name]) for name in ("keyspaces", "topics")}
                return cls(**raw)._checked()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptionError(f"the place of a feed cannot be read: {error!r}") from error
        raise UpgradeRequired(
            "the place of this feed was written by a newer kvrep", found=version, supported=VERSION
        )

    def _checked(self) -> FeedState:
        """Itself; ``ValueError`` when a field cannot be what it is."""
        numbers = (self.needs, self.generation, self.created_us, self.acked_us)
        if any(type(n) is not int or not 0 <= n <= OFFSET_MAX for n in numbers):
            raise ValueError("a number is out of range")
        if (type(self.token), type(self.paused), type(self.prefix)) != (str, bool, bytes):
            raise ValueError("a field is of another type")
        return self

    def moved(self, token: str, needs: int, now_us: int) -> FeedState:
        """The same feed after an ack."""
        return replace(self, token=token, needs=needs, acked_us=now_us)


def _names(found: Any) -> tuple[str, ...] | None:
    if found is None:
        return None
    if type(found) is not list or any(type(name) is not str for name in found):
        raise ValueError("not a list of names")
    return tuple(found)


def check_feed_name(name: Any) -> str:
    """``name`` if it may name a feed; ``TypeError`` or :class:`InvalidInput`."""
    if not isinstance(name, str):
        raise TypeError(f"a feed's name is text, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} cannot name a feed: 1 to 128 of A-Z a-z 0-9 _ . -")
    return name
