"""What a store remembers of a named feed: its place and what it selects. Kept under the feed's name in a
keyspace of kvrep's own, so it is replicated, flushed and bootstrapped like everything else."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from kvrep.errors import InvalidInput, UpgradeRequired

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
        """:class:`UpgradeRequired` for what a newer version has written."""
        raw: dict[str, Any] = msgpack.unpackb(data)
        if raw.pop("version") != VERSION:
            raise UpgradeRequired("the place of this feed was written by a newer kvrep", supported=VERSION)
        for name in ("keyspaces", "topics"):
            raw[name] = None if raw[name] is None else tuple(raw[name])
        return cls(**raw)

    def moved(self, token: str, needs: int, now_us: int) -> FeedState:
        """The same feed after an ack."""
        return replace(self, token=token, needs=needs, acked_us=now_us)


def check_feed_name(name: Any) -> str:
    """``name`` if it may name a feed; ``TypeError`` or :class:`InvalidInput`."""
    if not isinstance(name, str):
        raise TypeError(f"a feed's name is text, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} cannot name a feed: 1 to 128 of A-Z a-z 0-9 _ . -")
    return name
