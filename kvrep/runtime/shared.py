"""One question for many who ask it at about the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from kvrep.errors import StaleRead

__all__ = ["Shared"]

T = TypeVar("T")


class Shared(Generic[T]):
    """Runs ``ask`` for one caller at a time; whoever called before it began gets its answer, too.

    So every answer was made after the call that gets it. A failed one fails for the caller that asked; the
    others ask again. Any thread.
    """

    def __init__(self, ask: Callable[[float], T]) -> None:
        self._ask = ask
        # Protects everything below, and announces the end of a question.
        self._changed = threading.Condition()
        self._begun = 0
        self._asking = False
        self._answer: tuple[int, T] | None = None
        """The newest answer, with the number of its question."""

    def run(self, deadline_s: float) -> T:
        """The answer to a question that begins after this call; :class:`StaleRead` at ``deadline_s``."""
        with self._changed:
            wanted = self._begun + 1
            while True:
                if self._answer is not None and self._answer[0] >= wanted:
                    return self._answer[1]
                if not self._asking:
                    self._asking = True
                    self._begun = number = self._begun + 1
                    break
                left = deadline_s - time.monotonic()
                if left <= 0:
                    raise StaleRead("the primary did not confirm in time what is committed")
                self._changed.wait(left)
        try:
            answer = self._ask(deadline_s)
        except BaseException:
            self._ended(None)
            raise
        self._ended((number, answer))
        return answer

    def _ended(self, answer: tuple[int, T] | None) -> None:
        with self._changed:
            self._asking = False
            if answer is not None:
                self._answer = answer
            self._changed.notify_all()
