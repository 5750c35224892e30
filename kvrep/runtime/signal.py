"""The smallest way to wake one waiting thread."""

from __future__ import annotations

import threading

__all__ = ["Signal"]


class Signal:
    """A flag that one thread waits for and any thread sets. Setting a set flag costs next to nothing."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the waiting thread, or let its next wait return at once."""
        if self._lock.locked():
            try:
                self._lock.release()
            except RuntimeError:
                pass  # another thread set it in between

    def wait(self, timeout_s: float) -> bool:
        """Wait until set, and clear it; False after ``timeout_s``."""
        return self._lock.acquire(timeout=max(0.0, timeout_s))
