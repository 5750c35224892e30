"""Waiting for what comes with commits."""

from __future__ import annotations

import threading
import time

from kvrep.runtime.signal import Moves

WAIT_S = 20.0


def test_who_waits_is_told() -> None:
    """A wait ends when its condition is so after a move, long before anybody would look by himself."""
    moves, shown = Moves(), threading.Event()
    found: list[bool] = []
    waiter = threading.Thread(
        target=lambda: found.append(moves.until(shown.is_set, time.monotonic() + WAIT_S, WAIT_S))
    )
    began = time.monotonic()
    waiter.start()
    while not moves.waiting:
        waiter.join(0.001)
    shown.set()
    moves.stir()
    waiter.join(WAIT_S)
    assert found == [True]
    assert moves.waiting == 0
    assert time.monotonic() - began < WAIT_S / 2


def test_a_wait_that_ends_without_its_condition() -> None:
    """At the deadline, and at the end of the node, the answer is no; who waits without a thread is told, too."""
    moves = Moves()
    told: list[bool] = []
    moves.on_move = lambda: told.append(True)
    assert not moves.until(lambda: False, time.monotonic() + 0.01)
    moves.end()
    assert told == [True]
    assert not moves.until(lambda: False, time.monotonic() + WAIT_S)
    assert moves.until(lambda: True, time.monotonic())
    began = time.monotonic()
    moves.wait_once(lambda: False, WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2
