"""What of a store's changes a feed shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvrep.errors import InvalidInput
from kvrep.model.change import Change
from kvrep.model.record import is_system
from kvrep.runtime.checks import check_name

__all__ = ["Selection", "Transform"]

Transform = Callable[[Change], Change | None]
"""Gives back the change as it shall be shown, or ``None`` to leave it out."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Keyspaces (all where ``None``), a prefix of their keys, topics of emitted messages.

    Messages are shown by their topics; without any named, all are shown where no keyspace is named either.
    """

    keyspaces: frozenset[str] | None = None
    prefix: bytes = b""
    topics: frozenset[str] | None = None
    transform: Transform | None = None
    before: bool = False
    """Whether the former values are shown, where they are kept."""

    @classmethod
    def of(
        cls,
        keyspace: str | Iterable[str] | None = None,
        prefix: bytes = b"",
        topic: str | Iterable[str] | None = None,
        transform: Transform | None = None,
        before: bool = False,
    ) -> Selection:
        """From what users give; ``TypeError`` or :class:`InvalidInput` for what cannot be."""
        if not isinstance(prefix, bytes):
            raise TypeError(f"prefix must be bytes, not {type(prefix).__name__}")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be a function, not {type(transform).__name__}")
        keyspaces, topics = _names(keyspace, "keyspace"), _names(topic, "topic")
        for name in keyspaces or ():
            check_name(name)
        if keyspaces is None and topics is not None:
            keyspaces = frozenset()
        return cls(keyspaces, prefix, topics, transform, bool(before))

    @property
    def emits(self) -> bool:
        """Whether messages are shown, all of them or some."""
        return self.topics is not None or self.keyspaces is None

    def takes(self, keyspace: str) -> bool:
        """Whether changes of ``keyspace`` are shown."""
        return keyspace in self.keyspaces if self.keyspaces is not None else not is_system(keyspace)

    def takes_topic(self, topic: str) -> bool:
        return topic in self.topics if self.topics is not None else self.keyspaces is None

    def shown(self, change: Change) -> Change | None:
        """``change`` as the user's function gives it back; it keeps its place whatever that does."""
        assert self.transform is not None
        made: Any = self.transform(change)
        if made is None or made is change:
            return change if made is change else None
        if not isinstance(made, Change):
            raise TypeError(f"transform must give back a Change or None, not {type(made).__name__}")
        return made._replace(
            position=change.position,
            index=change.index,
            time_us=change.time_us,
            snapshot=change.snapshot,
            origin=change.origin,
        )


def _names(given: str | Iterable[str] | None, what: str) -> frozenset[str] | None:
    if given is None:
        return None
    names = frozenset([given] if isinstance(given, str) else given)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{what} must be text or several of it, not {type(name).__name__}")
    if not names or "" in names:
        raise InvalidInput(f"{what} names nothing; leave it out to have all")
    return names
