"""One stream as the follower sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.errors import ProtocolError
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.replication.messages import (
    Fence,
    FromPrimary,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Probe,
    Refused,
    Segment,
    Truncate,
    Welcome,
)
from kvrep.replication.receiver import (
    ECHOES_MAX,
    AckNow,
    Answer,
    Append,
    Commit,
    Cut,
    Grant,
    Join,
    MakePromise,
    Receiver,
    Stop,
)

ACK = AckNow()
HELLO = Hello(
    store_id=b"b",
    name="b",
    lineage=b"L",
    branch=b"B",
    features=("zstd",),
    promised_epoch=1001,
    last=Position(1001, 10),
    applied=4,
    committed=6,
    epochs=EpochTable([(1001, 1)]),
    credit_bytes=100,
)
WELCOME = Welcome(
    lineage=b"L", branch=b"B", store_id=b"a", name="a", epoch=1001, protocol=1, last=Position(1001, 10)
)


def receiver(hello: Hello = HELLO, **options: Any) -> Receiver:
    settings = {"heartbeat_timeout_s": 5.0, "record_bytes_max": 1000, "now": 0.0}
    return Receiver(hello, **{**settings, **options})


def joined(hello: Hello = HELLO, **options: Any) -> Receiver:
    stream = receiver(hello, **options)
    stream.on_message(replace(WELCOME, last=hello.last, epoch=hello.promised_epoch), 0.0)
    return stream


def segment(first: int, last: int, size: int = 10, **changes: Any) -> Segment:
    return replace(Segment(epoch=1001, first=first, last=last, data=b"x" * size, committed=0), **changes)


def part(number: int, of: int, first: int = 11, **changes: Any) -> Segment:
    return segment(first, first, part=number, parts=of, **{"data": b"%d" % number, **changes})


def beat(committed: int = 0, stamp_us: int = 0, epoch: int = 1001) -> Heartbeat:
    return Heartbeat(epoch=epoch, last=committed, committed=committed, stamp_us=stamp_us)


def at(offset: int) -> Position:
    return Position(1001, offset)


# Joining.


def test_a_welcome_is_joined_and_acked() -> None:
    """The first ack tells the primary what counts from now on."""
    stream = receiver()
    assert stream.on_message(WELCOME, 0.0) == [Join(WELCOME), ACK]
    stream.probe(7)
    told = stream.ack(visible=6)
    assert (told.written, told.synced, told.visible, told.promised_epoch, told.stamp_us) == (
        10,
        10,
        6,
        1001,
        7,
    )


def test_a_newer_epoch_is_promised_before_it_is_joined() -> None:
    """Whoever is fed by an epoch can no longer be asked by a lower one."""
    welcome = replace(WELCOME, epoch=2001)
    assert receiver().on_message(welcome, 0.0) == [MakePromise(2001, reply=False), Join(welcome), ACK]


def test_a_new_store_adopts_any_lineage() -> None:
    """Without records there is no lineage to contradict."""
    new = Hello(store_id=b"b", name="b", credit_bytes=100)
    stream = receiver(new)
    welcome = replace(WELCOME, last=ZERO)
    assert stream.on_message(welcome, 0.0) == [MakePromise(1001, reply=False), Join(welcome), ACK]
    assert stream.on_message(segment(1, 2), 0.0) == [Append(1, 2, b"x" * 10, 0)]


@pytest.mark.parametrize(
    "wrong",
    [
        replace(WELCOME, lineage=b"M"),
        replace(WELCOME, last=Position(1001, 9)),
        replace(WELCOME, last=Position(1002, 10)),
        replace(WELCOME, protocol=2),
        replace(WELCOME, features=("lz4",)),
        Truncate(to=at(3), epoch=1001),
        Truncate(to=at(10), epoch=1001),
        Truncate(to=at(11), epoch=1001),
        Truncate(to=Position(1002, 5), epoch=1001),
        Truncate(to=ZERO, epoch=1001),
        segment(11, 11),
        beat(),
    ],
)
def test_an_answer_that_does_not_fit_ends_the_stream(wrong: FromPrimary) -> None:
    """Nothing of it is done, and nothing is accepted afterwards."""
    stream = receiver()
    with pytest.raises(ProtocolError):
        stream.on_message(wrong, 0.0)
    with pytest.raises(ProtocolError, match="after the end"):
        stream.on_message(WELCOME, 0.0)


@pytest.mark.parametrize("message", [replace(WELCOME, epoch=1000), Truncate(to=at(8), epoch=1000)])
def test_a_stale_primary_is_left(message: FromPrimary) -> None:
    """An epoch below the promise is not obeyed; the reason names the promised one."""
    (action,) = receiver().on_message(message, 0.0)
    assert isinstance(action, Stop)
    assert (action.refused.reason, action.refused.epoch) == ("superseded", 1001)


def test_a_truncate_is_promised_and_then_done() -> None:
    """The cut says whether it drops records that were known as committed; the stream is over."""
    stream = receiver()
    assert stream.on_message(Truncate(to=at(6), epoch=2001), 0.0) == [
        MakePromise(2001, reply=False),
        Cut(at(6), 2001, below_committed=False),
    ]
    with pytest.raises(ProtocolError):
        stream.on_message(WELCOME, 0.0)
    assert receiver().on_message(Truncate(to=at(5), epoch=1001), 0.0) == [
        Cut(at(5), 1001, below_committed=True)
    ]


def test_everything_can_be_cut_that_is_not_in_lmdb() -> None:
    """With nothing applied, a cut to the very beginning is possible."""
    stream = receiver(replace(HELLO, applied=0, committed=0))
    assert stream.on_message(Truncate(to=ZERO, epoch=1001), 0.0) == [Cut(ZERO, 1001, below_committed=False)]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_primary_may_send_us_away(streaming: bool) -> None:
    """Refused and NeedBootstrap end the stream, before the join and after it."""
    refused, bootstrap = Refused(reason="full", message=""), NeedBootstrap(first=5, reason="trimmed")
    for message, action in ((refused, Stop(refused)), (bootstrap, bootstrap)):
        stream = joined() if streaming else receiver()
        assert stream.on_message(message, 0.0) == [action]
        with pytest.raises(ProtocolError):
            stream.on_message(beat(), 0.0)


def test_a_fence_is_answered_with_the_highest_promise() -> None:
    """A higher epoch is promised; a lower one is answered with what was promised already."""
    stream = receiver()
    assert stream.on_message(Fence(epoch=2002), 0.0) == [MakePromise(2002, reply=True)]
    assert stream.on_message(Fence(epoch=2001), 0.0) == [MakePromise(2002, reply=True)]
    (action, *_) = stream.on_message(replace(WELCOME, epoch=2002), 0.0)
    assert isinstance(action, Join)


@pytest.mark.parametrize("message", [WELCOME, Fence(epoch=2001), Truncate(to=at(8), epoch=1001)])
def test_a_stream_is_joined_once(message: FromPrimary) -> None:
    """What belongs before the join is refused after it."""
    with pytest.raises(ProtocolError):
        joined().on_message(message, 0.0)


# Records.


def test_records_are_appended_in_order() -> None:
    """The next segment is appended, more than one may be on its way to the disk, and acks follow the disk."""
    stream = joined()
    assert stream.on_message(segment(11, 12, committed=11), 0.0) == [Append(11, 12, b"x" * 10, 11)]
    assert stream.on_message(segment(13, 13, committed=20), 0.0) == [Append(13, 13, b"x" * 10, 13)]
    assert (stream.received, stream.last, stream.committed) == (13, at(10), 6)
    assert stream.appended(at(12)) == [Commit(12), ACK]
    assert stream.appended(at(13)) == [Commit(13), ACK]
    assert stream.ack(visible=13).synced == 13


@pytest.mark.parametrize(
    "wrong",
    [
        segment(12, 12),
        segment(10, 11),
        segment(9, 12),
        segment(11, 10),
        segment(0, 11),
        segment(11, 11, size=0),
        segment(11, 11, epoch=1002),
        segment(11, 11, epoch=1000),
        segment(11, 11, part=1),
        segment(11, 11, part=-1),
        segment(11, 11, parts=0),
        beat(epoch=1002),
        beat(stamp_us=1),
    ],
)
def test_what_does_not_join_exactly_ends_the_stream(wrong: FromPrimary) -> None:
    """Gap, overlap, another epoch, nonsense: a typed error, never a guess."""
    stream = joined()
    with pytest.raises(ProtocolError):
        stream.on_message(wrong, 0.0)
    with pytest.raises(ProtocolError, match="after the end"):
        stream.on_message(segment(11, 11), 0.0)


def test_what_we_have_is_acked_again() -> None:
    """A segment that is wholly old is skipped, its credit is given back, and nothing is appended."""
    stream = joined()
    assert stream.on_message(segment(9, 10), 0.0) == [ACK]
    stream.on_message(segment(11, 12), 0.0)
    assert stream.on_message(segment(11, 12, size=90), 0.0) == [Grant(100), ACK]
    assert stream.received == 12


def test_a_large_record_comes_in_parts() -> None:
    """Parts are joined, with heartbeats between them, and each is acked as a sign of life."""
    stream = joined()
    assert stream.on_message(part(0, 3), 0.0) == [ACK]
    assert stream.on_message(beat(), 0.0) == [ACK]
    assert stream.on_message(part(1, 3), 0.0) == [ACK]
    assert stream.on_message(part(2, 3, committed=11), 0.0) == [Append(11, 11, b"012", 11)]
    assert stream.on_message(segment(12, 12), 0.0) == [Append(12, 12, b"x" * 10, 11)]


@pytest.mark.parametrize(
    "wrong",
    [
        part(0, 3),
        part(2, 3),
        part(1, 4),
        part(1, 3, first=12),
        replace(part(1, 3), last=12),
        segment(11, 11),
        segment(9, 10),
        segment(12, 12),
        part(1, 3, data=b"x" * 1000),
    ],
)
def test_parts_that_do_not_fit_end_the_stream(wrong: Segment) -> None:
    """A part out of order or missing, something else in between, or a record above the limit."""
    stream = joined()
    stream.on_message(part(0, 3), 0.0)
    with pytest.raises(ProtocolError):
        stream.on_message(wrong, 0.0)


def test_a_first_part_must_be_of_one_record() -> None:
    """A run of several records is never cut into parts, and part 0 comes first."""
    for wrong in (segment(11, 12, parts=2), part(1, 2)):
        with pytest.raises(ProtocolError):
            joined().on_message(wrong, 0.0)


# Commits.


def test_committed_is_what_was_heard_and_is_held() -> None:
    """A heartbeat commits what is stored; what is not stored yet is committed once it is."""
    stream = joined()
    assert stream.on_message(beat(committed=8), 0.0) == [Commit(8), ACK]
    assert stream.on_message(beat(committed=12), 0.0) == [Commit(10), ACK]
    assert stream.on_message(beat(committed=11), 0.0) == [ACK]
    stream.on_message(segment(11, 13), 0.0)
    assert stream.appended(at(13)) == [Commit(12), ACK]


def test_a_new_primary_may_know_less() -> None:
    """A commit offset below ours changes nothing."""
    stream = joined()
    assert stream.on_message(beat(committed=3), 0.0) == [ACK]
    assert stream.committed == 6


# Promises made elsewhere.


def test_a_higher_promise_ends_the_stream() -> None:
    """After it nothing is appended or committed, and the ack that follows says why."""
    stream = joined()
    stream.on_message(segment(11, 11, committed=11), 0.0)
    stream.promised(2002)
    (action,) = stream.appended(at(11))
    assert isinstance(action, Stop)
    assert stream.committed == 6
    told = stream.ack(visible=6)
    assert (told.synced, told.promised_epoch) == (10, 2002)


@pytest.mark.parametrize("message", [segment(11, 11), beat(committed=10)])
def test_a_stale_stream_says_so_at_its_next_message(message: FromPrimary) -> None:
    """What arrives after a higher promise is not obeyed."""
    stream = joined()
    stream.promised(2002)
    (action,) = stream.on_message(message, 0.0)
    assert isinstance(action, Stop)
    assert (action.refused.reason, action.refused.epoch) == ("superseded", 2002)


def test_a_lower_promise_changes_nothing() -> None:
    """Promises never go back."""
    stream = joined()
    stream.promised(1000)
    assert stream.promised_epoch == 1001
    assert stream.on_message(segment(11, 11), 0.0) == [Append(11, 11, b"x" * 10, 0)]


# Credit.


@given(st.integers(1, 200), st.lists(st.integers(1, 60), max_size=40))
def test_credit_returns_in_halves_and_never_runs_dry(credit: int, sizes: list[int]) -> None:
    """Granted never exceeds received; with everything stored, more than half of the credit is out there."""
    stream = joined(replace(HELLO, credit_bytes=credit))
    out = credit
    for offset, size in enumerate(sizes, 11):
        stream.on_message(segment(offset, offset, size=size), 0.0)
        actions = stream.appended(at(offset))
        out += sum(a.bytes_granted for a in actions if isinstance(a, Grant)) - size
        assert credit // 2 < out <= credit


def test_a_small_segment_is_not_granted_alone() -> None:
    """A grant waits until half of the credit is used."""
    stream = joined()
    stream.on_message(segment(11, 11, size=49), 0.0)
    assert stream.appended(at(11)) == [ACK]
    stream.on_message(segment(12, 12, size=1), 0.0)
    assert stream.appended(at(12)) == [Grant(50), ACK]


# Time.


def test_silence_is_noticed() -> None:
    """Every message counts as a sign of life."""
    stream = joined()
    assert not stream.expired(4.9)
    assert stream.expired(5.0)
    stream.on_message(beat(), 4.9)
    assert not stream.expired(9.8)
    assert stream.expired(9.9)


def test_staleness_counts_from_the_stamp_that_is_caught_up_with() -> None:
    """A heartbeat counts once its commit offset is visible here, from when its stamp was sent."""
    stream = joined()
    assert stream.staleness_s(1_000_000, visible=6) == float("inf")
    stream.probe(2_000_000)
    stream.ack(visible=6)
    stream.on_message(beat(committed=8, stamp_us=2_000_000), 0.0)
    assert stream.staleness_s(3_000_000, visible=7) == float("inf")
    assert stream.staleness_s(3_000_000, visible=8) == 1.0
    stream.probe(4_000_000)
    stream.ack(visible=8)
    stream.on_message(beat(committed=9, stamp_us=4_000_000), 0.0)
    assert stream.staleness_s(5_000_000, visible=8) == 3.0
    assert stream.staleness_s(5_000_000, visible=9) == 1.0


def test_a_heartbeat_without_a_stamp_proves_nothing() -> None:
    """Before the primary heard an ack it has nothing to echo."""
    stream = joined()
    stream.on_message(beat(committed=8), 0.0)
    assert stream.staleness_s(1, visible=8) == float("inf")


def test_a_reconnect_remembers_how_fresh_the_copy_is() -> None:
    """What was visible at a moment stays visible, whoever is asked next."""
    assert joined(fresh_us=1_000_000).staleness_s(3_000_000, visible=0) == 2.0


def test_heartbeats_that_wait_are_bounded() -> None:
    """When visibility falls behind, the oldest heartbeats are kept, and the newest."""
    stream = joined()
    for i in range(1, 10 * ECHOES_MAX):
        stream.probe(i)
        stream.ack(visible=6)
        stream.on_message(beat(committed=10 + i, stamp_us=i), 0.0)
    assert stream.fresh_us(visible=11) == 1
    assert stream.fresh_us(visible=10**6) == 10 * ECHOES_MAX - 1


ticks = st.lists(st.tuples(st.sampled_from(["ack", "hear", "commit", "beat", "see"]), st.integers(1, 5)))


@given(ticks, st.integers(-(10**6), 10**6))
def test_staleness_is_a_true_bound(script: list[tuple[str, int]], skew: int) -> None:
    """However messages are delayed and clocks differ, nothing older than the bound is missing here."""
    stream = joined(replace(HELLO, applied=0, committed=0, last=at(10)))
    true_us, committed, visible, heard_stamp = 10**9, 0, 0, 0
    acks: list[int] = []
    beats: list[Heartbeat] = []
    history = [(0, 0)]
    for name, n in script:
        true_us += n * 1000
        if name == "ack":
            stream.probe(true_us + skew)
            acks.append(stream.ack(visible).stamp_us)
        elif name == "hear" and acks:
            heard_stamp = max(heard_stamp, acks.pop(0))
        elif name == "commit":
            committed = min(10, committed + n)
            history.append((true_us, committed))
        elif name == "beat":
            beats.append(beat(committed=committed, stamp_us=heard_stamp))
        elif name == "see" and beats:
            stream.on_message(beats.pop(0), 0.0)
            visible = stream.committed
        staleness_us = stream.staleness_s(true_us + skew, visible) * 1e6
        if staleness_us != float("inf"):
            since = true_us - staleness_us
            assert visible >= max(c for moment, c in history if moment <= since + 0.5)


def test_a_probe_is_answered_unless_a_higher_epoch_is_promised() -> None:
    """A confirmation holds for the stream's own epoch, and never after a promise of another one."""
    stream = joined()
    assert stream.on_message(Probe(epoch=1001, round=3), 1.0) == [Answer(3)]
    stream.promised(2002)
    actions = stream.on_message(Probe(epoch=1001, round=4), 2.0)
    assert isinstance(actions[0], Stop)
    assert actions[0].refused.reason == "superseded"


def test_a_probe_where_it_cannot_be_ends_the_stream() -> None:
    """Before the join, and for another epoch."""
    with pytest.raises(ProtocolError):
        receiver().on_message(Probe(epoch=1001, round=1), 0.0)
    with pytest.raises(ProtocolError):
        joined().on_message(Probe(epoch=2002, round=1), 0.0)
