"""Events take effect in order and once, whatever the transport does to them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kvrep.model.change import BEGIN, END, PUT, ROW_INDEX, ChangeKind, Sequence
from kvrep.sinks.interface import NOTHING
from kvrep.sinks.ordering import Inbox, Verdict


@dataclass(frozen=True)
class Item:
    """As much of an event as the order needs."""

    sequence: Sequence
    previous: Sequence | None
    kind: ChangeKind = PUT
    lineage: str = "aa"
    value: bytes | None = b"v"
    before: bytes | None = None


def chain(*sequences: Sequence, after: Sequence | None = (1001, 1, 0)) -> list[Item]:
    """Events that follow each other."""
    items = []
    for sequence in sequences:
        items.append(Item(sequence, after))
        after = sequence
    return items


def inbox(**options: int) -> Inbox[Item]:
    return Inbox("aa", (1001, 1, 0), **options)


def test_a_contiguous_event_takes_effect_at_once() -> None:
    """Each event that follows what was applied is released alone, whatever offsets lie between."""
    box = inbox()
    for item in chain((1001, 2, 0), (1001, 9, 0), (1001, 9, 1), (2002, 40, 0)):
        assert box.offer(item) == (Verdict.APPLY, (item,))
        assert box.applied == item.sequence


def test_a_gap_parks_and_its_filling_releases_in_order() -> None:
    """Events behind a missing one wait, in whatever order they come, and follow it at once."""
    box = inbox()
    a, b, c, d = chain((1001, 2, 0), (1001, 3, 0), (1001, 4, 0), (1001, 5, 0))
    for early in (d, b, c):
        assert box.offer(early) == (Verdict.PARKED, ())
    assert box.parked == 3
    assert box.parked_bytes == 3

    assert box.offer(a) == (Verdict.APPLY, (a, b, c, d))

    assert (box.parked, box.parked_bytes) == (0, 0)


def test_repeats_are_dropped() -> None:
    """What was applied, or waits already, or lies before what was applied, is a repeat."""
    box = inbox()
    a, b, c = chain((1001, 2, 0), (1001, 3, 0), (1001, 4, 0))
    box.offer(a)
    box.offer(c)
    for item in (a, c, Item((1001, 1, 0), None), Item((1, 99, 0), None)):
        assert box.offer(item).verdict is Verdict.REPEAT
    assert box.offer(b).released == (b, c)


def test_what_overlaps_within_one_epoch_goes_on() -> None:
    """An event whose predecessor was applied long ago joins: another selection, or a publisher that restarted."""
    box = inbox()
    a, b = chain((1001, 2, 0), (1001, 3, 0))
    box.offer(a)
    assert box.offer(Item((1001, 7, 0), (1001, 1, 0))).verdict is Verdict.APPLY
    assert box.offer(b).verdict is Verdict.REPEAT


def test_a_later_epoch_joins_only_exactly() -> None:
    """An epoch may have begun below what was applied: only the very predecessor proves that it did not."""
    box = inbox()
    box.offer(chain((1001, 5, 0))[0])
    assert box.offer(Item((2002, 9, 0), (1001, 3, 0))).verdict is Verdict.PARKED
    assert box.offer(Item((2002, 8, 0), (1001, 5, 0))).verdict is Verdict.APPLY


def test_a_history_that_was_taken_back_is_noticed() -> None:
    """A later epoch that writes at or below what was applied replaced it."""
    box = inbox()
    box.offer(chain((1001, 5, 0))[0])
    for sequence in ((2002, 5, 0), (2002, 3, 0)):
        assert box.offer(Item(sequence, (1001, 2, 0))).verdict is Verdict.TRUNCATED
    assert box.applied == (1001, 5, 0)


def test_a_snapshot_begins_anywhere() -> None:
    """The begin of a snapshot needs nothing before it, on an empty place as after a gap; rows then follow."""
    for box in (Inbox[Item]("", NOTHING), inbox()):
        assert box.offer(Item((1001, 6, ROW_INDEX + 1), (1001, 6, ROW_INDEX))).verdict is Verdict.PARKED
        begin = Item((1001, 6, ROW_INDEX), (1001, 5, 0), BEGIN)
        offer = box.offer(begin)
        assert [item.sequence[2] - ROW_INDEX for item in offer.released] == [0, 1]
        assert box.lineage == "aa"
        assert box.offer(begin).verdict is Verdict.REPEAT
        end = Item((1001, 6, ROW_INDEX + 2), (1001, 6, ROW_INDEX + 1), END)
        assert box.offer(end).verdict is Verdict.APPLY


def test_nothing_is_applied_before_the_first_snapshot() -> None:
    """A copy of nothing does not become one of a part: changes wait for a snapshot to begin."""
    box = Inbox[Item]("", NOTHING)
    assert box.offer(Item((1001, 2, 0), None)).verdict is Verdict.PARKED
    assert box.offer(Item((1001, 3, 0), NOTHING)).verdict is Verdict.PARKED


def test_other_stores_do_not_mix() -> None:
    """An event of another lineage is neither applied nor parked."""
    box = inbox()
    assert box.offer(Item((1001, 2, 0), (1001, 1, 0), lineage="bb")).verdict is Verdict.FOREIGN
    assert box.parked == 0


def test_the_room_is_bounded_in_number_and_bytes() -> None:
    """A full parking place refuses and keeps what it has; clearing it makes room."""
    items = chain(*((1001, n, 0) for n in range(2, 9)))
    box = inbox(parked_max=3)
    verdicts = [box.offer(item).verdict for item in items[1:]]
    assert verdicts == [Verdict.PARKED] * 3 + [Verdict.FULL] * 3
    assert box.offer(items[0]).released == tuple(items[:4])
    assert box.offer(items[5]).verdict is Verdict.PARKED
    box.clear()
    assert (box.parked, box.parked_bytes) == (0, 0)

    box = inbox(parked_bytes_max=10)
    big = Item((1001, 9, 0), (1001, 8, 0), value=b"x" * 100)
    assert box.offer(big).verdict is Verdict.PARKED, "one is always taken"
    assert box.offer(Item((1001, 8, 0), (1001, 7, 0))).verdict is Verdict.FULL

    box = inbox(parked_bytes_max=10)
    former = Item((1001, 9, 0), (1001, 8, 0), before=b"x" * 100)
    assert box.offer(former).verdict is Verdict.PARKED
    assert box.parked_bytes == 101
    assert box.offer(Item((1001, 8, 0), (1001, 7, 0))).verdict is Verdict.FULL, "former values count"


steps = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.booleans()), min_size=1, max_size=40)


@given(steps, st.randoms(use_true_random=False), st.integers(1, 8))
def test_whatever_the_transport_does_every_event_takes_effect_once_in_order(
    steps: list[tuple[int, int, bool]], chance: random.Random, room: int
) -> None:
    """Over a transport that duplicates, reorders and drops, asking again from the place completes the stream."""
    epoch, offset = 1001, 1
    sequences: list[Sequence] = []
    for jump, more, promoted in steps:
        epoch += 1000 * promoted
        offset += jump
        sequences += [(epoch, offset, index) for index in range(more + 1)]
    stream = chain(*sequences)
    box = inbox(parked_max=room)
    applied: list[Sequence] = []
    wire = [item for item in stream for _ in range(chance.choice((0, 1, 1, 2)))]
    for i in range(len(wire) - 1):
        j = min(len(wire) - 1, i + chance.randrange(4))
        wire[i], wire[j] = wire[j], wire[i]
    for _ in range(len(stream) + 2):
        for item in wire:
            before = box.applied
            offer = box.offer(item)
            applied += [one.sequence for one in offer.released]
            assert box.applied >= before
            assert all(waiting > box.applied for waiting in box._order)
            assert box.parked <= room
            assert box.parked == len(box._parked)
            if offer.verdict is Verdict.FULL:
                box.clear()
        # What is missing is asked for: everything behind the place, again through the same transport.
        wire = [item for item in stream if item.sequence > box.applied]
        if chance.random() < 0.3 and len(wire) > 1:
            del wire[chance.randrange(1, len(wire))]

    assert applied == sequences
    assert box.parked == 0 or box.applied == sequences[-1]


def test_half_a_snapshot_does_not_mix_with_a_whole_history() -> None:
    """While a snapshot arrives, a change of another stream waits, and the end of another snapshot does not count."""
    row = ROW_INDEX
    box = Inbox[Item]("aa", (1001, 6, row + 2), staging=True)
    assert box.offer(Item((1001, 8, 0), (1001, 5, 0))).verdict is Verdict.PARKED
    box.clear()
    assert box.offer(Item((1001, 7, row + 9), (1001, 7, row + 8), END)).verdict is Verdict.PARKED
    box.clear()
    assert box.offer(Item((1001, 7, 0), (1001, 6, row + 2))).verdict is Verdict.APPLY
    assert box.offer(Item((1001, 7, row + 3), (1001, 7, 0), END)).verdict is Verdict.APPLY
    assert not box.staging

    box = inbox()
    assert box.offer(Item((1001, 7, row + 9), (1001, 0, 0), END)).verdict is Verdict.PARKED, (
        "it has no begin here"
    )
