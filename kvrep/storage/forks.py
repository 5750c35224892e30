"""A forked child must not touch what its parent has open: every open store is told, in the child, at once."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

from kvrep.storage.write import renew_lock

__all__ = ["Forkable", "guard", "release"]


class Forkable(Protocol):
    def forked(self) -> None:
        """In the child: let go of everything; use nothing of it any more."""


_open: weakref.WeakSet[Forkable] = weakref.WeakSet()
_lock = threading.Lock()
_registered = False


def guard(store: Forkable) -> None:
    """Tell ``store`` of forks from now on. Any thread."""
    global _registered  # noqa: PLW0603 - register_at_fork can be neither undone nor repeated
    with _lock:
        if not _registered:
            os.register_at_fork(after_in_child=_in_child)
            _registered = True
    _open.add(store)


def release(store: Forkable) -> None:
    """It is closed."""
    _open.discard(store)


def _in_child() -> None:
    renew_lock()
    for store in list(_open):
        store.forked()
