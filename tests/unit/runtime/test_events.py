"""Events: told in order, on a thread of their own, whatever a listener does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from kvrep.runtime.events import WAITING_MAX, Events
from kvrep.status import Event, EventKind

WAIT_S = 10.0


@pytest.fixture
def events() -> Iterator[Events]:
    made = Events("n")
    yield made
    made.stop(WAIT_S)


def event(number: int) -> Event:
    return Event(kind=EventKind.PRIMARY, node="n", time_s=0.0, epoch=number)


def test_events_come_in_order_on_their_own_thread(events: Events) -> None:
    """Every listener gets every event from its registration on, in order, never on the telling thread."""
    seen: list[tuple[str, int, str]] = []
    done = threading.Event()
    events.tell(event(0))
    events.listen(lambda e: seen.append(("first", e.epoch, threading.current_thread().name)))
    events.listen(lambda e: done.set() if e.epoch == 50 else None)
    for number in range(1, 51):
        events.tell(event(number))
    assert done.wait(WAIT_S)
    assert [n for _, n, _ in seen] == list(range(1, 51))
    assert {name for *_, name in seen} == {"kvrep-events-n"}


def test_a_listener_that_raises_does_not_end_the_others(
    events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    """What a listener raises is logged; the next listener and the next event come all the same."""
    done = threading.Event()

    def bad(e: Event) -> None:
        raise RuntimeError("mine")

    events.listen(bad)
    events.listen(lambda e: done.set() if e.epoch == 2 else None)
    with caplog.at_level(logging.ERROR):
        events.tell(event(1))
        events.tell(event(2))
        assert done.wait(WAIT_S)
    assert caplog.text.count("an event listener raised") == 2


def test_a_slow_listener_stalls_nothing_and_loses_the_oldest(
    events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    """While a listener hangs, telling returns at once; beyond the bound the oldest go, and that is said."""
    entered, go_on, done = threading.Event(), threading.Event(), threading.Event()
    seen: list[int] = []

    def slow(e: Event) -> None:
        entered.set()
        assert go_on.wait(WAIT_S)
        seen.append(e.epoch)
        if e.epoch == WAITING_MAX + 100:
            done.set()

    events.listen(slow)
    events.tell(event(0))
    assert entered.wait(WAIT_S)
    for number in range(1, WAITING_MAX + 101):
        events.tell(event(number))
    go_on.set()
    assert done.wait(WAIT_S)
    assert seen == [0, *range(101, WAITING_MAX + 101)]
    assert "100 events were dropped" in caplog.text


def test_a_listener_can_leave_and_the_end_tells_what_waits(events: Events) -> None:
    """After its registration is ended a listener hears nothing more; stop() delivers what was told before."""
    left: list[int] = []
    stayed: list[int] = []
    forget = events.listen(lambda e: left.append(e.epoch))
    forget()
    forget()
    events.listen(lambda e: stayed.append(e.epoch))
    for number in range(5):
        events.tell(event(number))
    events.stop(WAIT_S)
    assert (left, stayed) == ([], [0, 1, 2, 3, 4])
    events.tell(event(9))
    events.listen(lambda e: stayed.append(e.epoch))
    assert stayed == [0, 1, 2, 3, 4]


def test_a_listener_may_register_and_stop_from_within(events: Events) -> None:
    """A listener that adds a listener or stops the events itself does not deadlock."""
    done = threading.Event()

    def listener(e: Event) -> None:
        events.listen(lambda e: None)
        events.stop(0.1)
        done.set()

    events.listen(listener)
    events.tell(event(1))
    assert done.wait(WAIT_S)
