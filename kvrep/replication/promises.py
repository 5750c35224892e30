"""May this promise be given? The one rule that keeps two primaries from sharing an epoch."""

from __future__ import annotations

from enum import Enum

__all__ = ["Verdict", "judge"]


class Verdict(Enum):
    """What a node answers to a request for a promise."""

    REFUSED = "refused"
    """A higher epoch was promised, or this one to another store."""
    GIVEN_BEFORE = "given before"
    """This very promise is on the disk already: it is answered as if it were new."""
    NEW = "new"
    """To be stored durably before anything is answered."""


def judge(epoch: int, store_id: bytes, *, promised: int, promised_to: bytes) -> Verdict:
    """Whether ``epoch`` may be promised to ``store_id`` by a node that has promised ``promised`` to
    ``promised_to``."""
    if epoch > promised:
        return Verdict.NEW
    if epoch == promised and store_id == promised_to:
        return Verdict.GIVEN_BEFORE
    return Verdict.REFUSED
