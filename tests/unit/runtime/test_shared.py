"""One question for many: every answer was made after the call that gets it."""

from __future__ import annotations

import threading
import time

import pytest

from kvrep.errors import Error, StaleRead
from kvrep.runtime.shared import Shared

WAIT_S = 20.0


def test_callers_during_a_question_share_the_next_one() -> None:
    """Ten that come while one is asked get one answer together, and it is a newer one."""
    asked: list[int] = []
    go_on = threading.Semaphore(0)

    def ask(deadline_s: float) -> int:
        asked.append(len(asked) + 1)
        number = asked[-1]
        assert go_on.acquire(timeout=WAIT_S)
        return number

    shared = Shared(ask)
    answers: list[int] = []
    first = threading.Thread(target=lambda: answers.append(shared.run(time.monotonic() + WAIT_S)))
    first.start()
    while not asked:
        first.join(0.001)
    others = [
        threading.Thread(target=lambda: answers.append(shared.run(time.monotonic() + WAIT_S)))
        for _ in range(10)
    ]
    for thread in others:
        thread.start()
    # They all wait when nobody but the first has asked and each holds the condition's queue.
    deadline = time.monotonic() + WAIT_S
    while len(shared._changed._waiters) < 10 and time.monotonic() < deadline:  # type: ignore[attr-defined]
        first.join(0.001)
    go_on.release()
    go_on.release()
    for thread in [first, *others]:
        thread.join(WAIT_S)
    assert sorted(answers) == [1] + [2] * 10
    assert asked == [1, 2]


def test_a_failure_is_that_of_who_asked() -> None:
    """The others ask again; nobody gets an old answer instead."""
    results = [Error("no"), 7]

    def ask(deadline_s: float) -> int:
        result = results.pop(0)
        if isinstance(result, Error):
            raise result
        return result

    shared = Shared(ask)
    with pytest.raises(Error, match="no"):
        shared.run(time.monotonic() + WAIT_S)
    assert shared.run(time.monotonic() + WAIT_S) == 7


def test_a_deadline_ends_the_wait() -> None:
    """While another caller's question takes its time, this one gives up at its own deadline."""
    go_on, begun = threading.Event(), threading.Event()

    def ask(deadline_s: float) -> int:
        begun.set()
        assert go_on.wait(WAIT_S)
        return 1

    shared = Shared(ask)
    other = threading.Thread(target=lambda: shared.run(time.monotonic() + WAIT_S))
    other.start()
    assert begun.wait(WAIT_S)
    with pytest.raises(StaleRead):
        shared.run(time.monotonic() + 0.05)
    go_on.set()
    other.join(WAIT_S)
