"""What the wait for a write takes along when it is interrupted: by Ctrl-C, or because its task is cancelled."""

from __future__ import annotations

from kvrep.errors import Error
from kvrep.model.position import Position
from kvrep.model.sessions import RequestId
from kvrep.storage.write import Write

__all__ = ["carry", "logged_at"]


def logged_at(write: Write) -> Position | None:
    """Where a write is in the log; ``None`` before it is on the disk."""
    return write.position if write.offset else None


def carry(error: BaseException, place: Position | RequestId | None) -> None:
    """Have ``error`` say by what the outcome of the write can be asked for, if that is known: its attribute
    ``position`` or ``request``. Errors of kvrep say for themselves what became of the write."""
    if place is None or isinstance(error, Error):
        return
    name, ask = ("position", "resolve") if isinstance(place, Position) else ("request", "settle")
    setattr(error, name, place)
    error.add_note(f"the write goes on; Store.{ask}(error.{name}) tells its outcome")
