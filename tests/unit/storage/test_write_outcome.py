"""How the outcome of a write reaches those who wait for it."""

from __future__ import annotations

from collections.abc import Sequence

from kvrep.errors import StorageFull
from kvrep.storage.write import Write, complete_all


class Late(Write):
    """Somebody asks to be called exactly between "done" and the calls of those who asked before."""

    __slots__ = ("told",)

    def wake(self) -> None:
        self.when_done(lambda _: self.told.append("late"))


class Box:
    """An inbox that keeps its deliveries."""

    def __init__(self) -> None:
        self.deliveries: list[list[Write]] = []

    def deliver(self, writes: Sequence[Write]) -> None:
        self.deliveries.append(list(writes))


def test_a_late_callback_takes_none_from_those_before_it() -> None:
    """A callback registered while the write completes runs once, and so does every earlier one."""
    write = Late(0, (), 1)
    write.told = []
    write.when_done(lambda _: write.told.append("early"))
    write.park(0.0)  # so that completing it wakes somebody
    write.complete()
    assert sorted(write.told) == ["early", "late"]


def test_a_callback_of_a_done_write_runs_at_once() -> None:
    """Asking after the outcome is known calls back before the call returns."""
    write = Write(0, (), 1)
    write.complete()
    told: list[Write] = []
    write.when_done(told.append)
    assert told == [write]


def test_writes_that_end_together_are_one_delivery_per_inbox() -> None:
    """Each inbox hears once of all its writes, in order; a write without one, or done before, is left out."""
    one, two = Box(), Box()
    writes = [Write(0, (), 1) for _ in range(6)]
    for write, box in zip(writes, (one, two, one, None, one, two), strict=True):
        write.inbox = box
    writes[4].complete()
    complete_all(writes)
    assert one.deliveries == [[writes[4]], [writes[0], writes[2]]]
    assert two.deliveries == [[writes[1], writes[5]]]
    assert all(write.done and write.error is None for write in writes)


def test_the_first_outcome_stays() -> None:
    """A second outcome changes nothing and tells nobody again."""
    write, box, told = Write(0, (), 1), Box(), []
    write.inbox = box
    write.when_done(told.append)
    refused = StorageFull("no room")
    write.complete(refused)
    write.complete()
    assert write.error is refused
    assert box.deliveries == [[write]]
    assert told == [write]
