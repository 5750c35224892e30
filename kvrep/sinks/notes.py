"""What the agent of a warehouse keeps in the commits of the history: its place, and what else counts with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from kvrep.errors import UpgradeRequired
from kvrep.sinks.interface import Place

__all__ = ["Notes", "Staged"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Staged:
    """The part of a snapshot that has arrived."""

    batches: tuple[tuple[str, int, int], ...] = ()
    """(writer, first commit, last commit) of what belongs to it."""
    rows: int = 0
    keyspaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Notes:
    """What the agent keeps in the commits of the history."""

    commit: int = 0
    """Counts the agent's commits; two agents cannot make the same one."""
    number: int = 0
    """Of the last row of the history."""
    base: int = 0
    """Of the row from which on the history gives the whole state: where the last snapshot begins."""
    place: Place = field(default_factory=Place)
    keyspaces: Mapping[str, int] = field(default_factory=dict)
    """The number of the last row that concerns each."""
    staged: Staged | None = None
    letters: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The dead letters that stand, by the batch that brought them."""
    lettered: int = 0
    """The number of the last letter."""

    def dump(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, text: str, url: str) -> Notes:
        fields = json.loads(text)
        found = fields.pop("format")
        if found != FORMAT:
            raise UpgradeRequired(f"{url} was written by a newer kvrep", found=found, supported=FORMAT)
        place, staged = fields.pop("place"), fields.pop("staged")
        place["sequence"] = tuple(place["sequence"])
        if staged is not None:
            batches = tuple((writer, first, last) for writer, first, last in staged["batches"])
            staged = Staged(batches, staged["rows"], tuple(staged["keyspaces"]))
        return cls(**fields, place=Place(**place), staged=staged)
