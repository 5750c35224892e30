"""The life that all publishers share, with a broker that does what the test says."""

from __future__ import annotations

import threading
import time

import pytest

from kvrep.brokers import BasePublisher, Message, Unconfirmed, Window
from kvrep.errors import ClosedError, Fenced, Overloaded, ValueTooLarge

WAIT_S = 10.0
ONE = Message(b"x" * 44)
SIZE = 300
"""What ``ONE`` counts as."""


class Told(BasePublisher):
    """Confirms and fails when it is told to."""

    def __init__(self, messages: int = 4, size: int = 1 << 20) -> None:
        super().__init__(Window(messages, size))
        self.sizes: list[int] = []
        self.health = ("ready", "")
        self.refusal: Exception | None = None
        self.disconnects = 0

    def _send(self, message: Message, size: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.sizes.append(size)

    def _health(self) -> tuple[str, str]:
        return self.health

    def _disconnect(self, deadline: float) -> None:
        self.disconnects += 1

    def confirm(self, count: int) -> None:
        with self._changed:
            self._confirm(count, sum(self.sizes[:count]))
            del self.sizes[:count]

    def end(self) -> None:
        self._end(Fenced("another one came", hint="", epoch=7))


def test_the_window_in_messages() -> None:
    """So many are taken, no more; the refusal says what the broker says, and a confirm makes room."""
    told = Told(messages=2)
    told.health = ("blocked", "low on memory")
    assert [told.publish(ONE), told.publish(ONE)] == [1, 2]
    with pytest.raises(Overloaded, match="2 messages wait to be confirmed: low on memory"):
        told.publish(ONE, 0)
    told.confirm(1)
    assert told.publish(ONE, 0) == 3


def test_the_window_in_bytes() -> None:
    """A message that does not fit beside the others waits; one that never fits is refused at once."""
    told = Told(size=2 * SIZE)
    told.publish(ONE)
    assert told.status().buffered_bytes == SIZE
    with pytest.raises(Overloaded):
        told.publish(Message(b"x" * 45), 0)
    assert told.publish(ONE, 0) == 2
    with pytest.raises(ValueTooLarge, match="above the bound of 600"):
        told.publish(Message(b"x" * 400))
    told.confirm(2)
    assert (told.status().buffered_bytes, told.confirmed) == (0, 2)


def test_headers_count() -> None:
    """All that a message holds counts."""
    told = Told()
    told.publish(Message(b"12", key=b"345", id="6789", headers={"a": "bc"}))
    assert told.sizes == [SIZE - 44 + 12]


def test_what_is_not_handed_over_is_not_taken() -> None:
    """An error of the broker's client at the handing over leaves nothing behind."""
    told = Told()
    told.refusal = OSError("no")
    with pytest.raises(OSError, match="no"):
        told.publish(ONE)
    assert (told.published, told.status().buffered_bytes) == (0, 0)
    told.refusal = None
    assert told.publish(ONE) == 1


@pytest.mark.parametrize("what", ["room", "a number"])
def test_who_waits_is_woken(what: str) -> None:
    """Room is announced at half of the window, a number as soon as it is confirmed, long before the deadline."""
    told = Told(messages=4)
    for _ in range(4):
        told.publish(ONE)
    found: list[int | bool] = []
    waits = {"room": lambda: told.publish(ONE, WAIT_S), "a number": lambda: told.wait(2, WAIT_S)}[what]
    thread = threading.Thread(target=lambda: found.append(waits()))
    began = time.monotonic()
    thread.start()
    told.confirm(2)
    thread.join(WAIT_S)
    assert found == [5 if what == "room" else True]
    assert time.monotonic() - began < WAIT_S / 2


def test_a_flush_that_fails_says_how_far_it_came() -> None:
    """The error carries both counts; a later flush may do better."""
    told = Told()
    told.publish(ONE)
    told.publish(ONE)
    told.confirm(1)
    told.health = ("connecting", "nobody answers")
    with pytest.raises(Unconfirmed, match="1 messages are not confirmed: nobody answers") as error:
        told.flush(0)
    assert (error.value.confirmed, error.value.published) == (1, 2)
    assert (told.status().state, told.status().problem) == ("connecting", "nobody answers")
    told.confirm(1)
    told.flush(0)


def test_the_end_is_raised_by_everything_that_cannot_go_on() -> None:
    """Who waits and who publishes gets the error, each a copy; what was confirmed before stays so."""
    told = Told()
    told.publish(ONE)
    told.publish(ONE)
    told.confirm(1)
    waiting = threading.Thread(target=told.end)
    waiting.start()
    with pytest.raises(Fenced) as first:
        told.wait(2, WAIT_S)
    waiting.join()
    with pytest.raises(Fenced) as second:
        told.publish(ONE)
    assert first.value is not second.value
    assert second.value.epoch == 7
    assert told.wait(1, 0)
    assert (told.status().state, told.status().problem) == ("failed", "another one came")


def test_closing() -> None:
    """It tries to flush, never raises for what stays, ends all waiting, and may be called again."""
    told = Told(messages=1)
    told.publish(ONE)
    found: list[object] = []

    def wait() -> None:
        found.append(told.wait(1, WAIT_S))
        with pytest.raises(ClosedError):
            told.publish(ONE, WAIT_S)
        found.append("refused")

    thread = threading.Thread(target=wait)
    thread.start()
    told.close(0)
    thread.join(WAIT_S)
    assert found == [False, "refused"]
    told.close()
    assert (told.closed, told.status().state, told.disconnects) == (True, "closed", 2)


def test_closing_after_the_end() -> None:
    """What ended it was said before: closing is silent, and keeps the reason in the status."""
    told = Told()
    told.publish(ONE)
    told.end()
    told.close()
    with pytest.raises(ClosedError):
        told.publish(ONE)
    assert (told.status().state, told.status().problem) == ("closed", "another one came")
