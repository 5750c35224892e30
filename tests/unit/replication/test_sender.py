"""What is sent next, and when."""

from __future__ import annotations

from typing import Any

import pytest

from kvrep.errors import Fenced, ProtocolError
from kvrep.model.position import Position
from kvrep.replication.messages import Ack
from kvrep.replication.progress import Progress
from kvrep.replication.sender import Dead, Sender, SendHeartbeat, SendSegment, Wait

BEAT = SendHeartbeat()


def joined(at: int = 0, credit: int = 1000, told: int | None = 0, **options: Any) -> Sender:
    """A sender that joined at time 0 and, unless ``told`` is None, told so much as committed."""
    progress = Progress(store_id=b"b", name="b")
    progress.join(Position(1001, at), credit, 1001, now=0.0)
    settings = {"segment_bytes_max": 100, "heartbeat_interval_s": 1.0, "heartbeat_timeout_s": 5.0}
    sender = Sender(progress, epoch=1001, **{**settings, **options}, now=0.0)
    if told is not None:
        sender.sent_heartbeat(0.0, told)
    return sender


def ack(synced: int, **changes: int) -> Ack:
    return Ack(**{"written": synced, "synced": synced, "visible": 0, "promised_epoch": 1001, **changes})


def test_what_is_committed_is_told_at_once() -> None:
    """The first step of a stream, and every move of the commit with nothing else to send, is a heartbeat."""
    sender = joined(told=None)
    assert sender.next(0.0, last=0, committed=0) == BEAT
    sender.sent_heartbeat(0.0, 0)
    assert sender.next(0.0, last=0, committed=0) == Wait(1.0)
    assert sender.next(0.1, last=0, committed=1) == BEAT


def test_records_go_as_far_as_credit_and_segment_allow() -> None:
    """A segment asks for what follows the last one, bounded by the smaller of both limits."""
    sender = joined(credit=150)
    assert sender.next(0.0, last=9, committed=0) == SendSegment(0, 100)
    sender.sent_segment(1, 4, 90, 0.0, 0)
    assert sender.next(0.0, last=9, committed=0) == SendSegment(4, 60)
    sender.sent_segment(5, 5, 60, 0.0, 0)
    assert sender.next(0.0, last=9, committed=0) == Wait(1.0)
    sender.on_credit(1, 0.0)
    assert sender.next(0.0, last=9, committed=0) == SendSegment(5, 1)


def test_a_record_larger_than_all_credit_still_goes() -> None:
    """One record may overdraw the credit; then the follower has to grant it all back."""
    sender = joined(credit=10)
    assert sender.next(0.0, last=2, committed=0) == SendSegment(0, 10)
    sender.sent_segment(1, 1, 5000, 0.0, 0)
    assert sender.progress.in_flight_bytes == 5000
    sender.on_ack(ack(1), 0.0)
    assert sender.next(0.0, last=2, committed=0) == Wait(1.0)
    sender.on_credit(5000, 0.0)
    assert sender.next(0.0, last=2, committed=0) == SendSegment(1, 10)


def test_a_commit_waits_for_what_is_in_flight() -> None:
    """While an ack is still to come, a segment will tell the commit, or the ack will make it tell."""
    sender = joined()
    sender.sent_segment(1, 1, 10, 0.0, 0)
    assert sender.next(0.1, last=1, committed=1) == Wait(1.0)
    sender.on_ack(ack(1), 0.2)
    assert sender.next(0.2, last=1, committed=1) == BEAT
    sender.sent_heartbeat(0.2, 1)
    assert sender.next(0.2, last=1, committed=1) == Wait(1.2)


def test_a_segment_tells_the_commit_too() -> None:
    """What a segment carried is not told again."""
    sender = joined()
    sender.sent_segment(1, 1, 10, 0.0, 7)
    sender.on_ack(ack(1), 0.0)
    assert sender.next(0.0, last=1, committed=7) == Wait(1.0)


def test_heartbeats_go_while_segments_do() -> None:
    """Only a heartbeat echoes the stamp, so a busy stream sends it every interval, too."""
    sender = joined()
    sender.sent_segment(1, 1, 10, 0.9, 0)
    assert sender.next(1.0, last=9, committed=0) == BEAT
    sender.sent_heartbeat(1.0, 0)
    assert sender.next(1.0, last=9, committed=0) == SendSegment(1, 100)


def test_silence_is_death() -> None:
    """Nothing heard for the timeout ends the stream, whatever else is due; any sign of life puts it off."""
    sender = joined()
    for at in (1.0, 2.0, 3.0, 4.0):
        assert sender.next(at, last=0, committed=0) == BEAT
        sender.sent_heartbeat(at, 0)
    assert sender.next(4.5, last=0, committed=0) == Wait(5.0)
    assert isinstance(sender.next(5.0, last=9, committed=9), Dead)
    sender.on_ack(ack(0), 4.9)
    assert sender.next(5.0, last=0, committed=0) == BEAT
    sender.on_credit(1, 9.8)
    assert isinstance(sender.next(14.7, last=0, committed=0), SendHeartbeat)
    assert isinstance(sender.next(14.8, last=0, committed=0), Dead)


def test_asynchronous_segments_keep_a_distance() -> None:
    """With a linger, a segment gathers what came since the last; the first after a pause goes at once."""
    sender = joined(linger_s=0.001)
    assert sender.next(0.1, last=1, committed=1) == SendSegment(0, 100)
    sender.sent_segment(1, 1, 10, 0.1, 1)
    assert sender.next(0.1004, last=2, committed=2) == Wait(0.101, gathering=True)
    assert sender.next(0.1005, last=3, committed=3, hurry=True) == Wait(0.101)
    assert sender.next(0.101, last=5, committed=5) == SendSegment(1, 100)
    sender.sent_segment(2, 5, 10, 0.101, 5)
    assert sender.next(0.2, last=6, committed=6) == SendSegment(5, 100)


def test_a_follower_that_is_behind_is_not_kept_waiting() -> None:
    """While the last segment did not reach the end of the log, the next follows at once."""
    sender = joined(linger_s=0.001)
    assert sender.next(0.1, last=9, committed=9) == SendSegment(0, 100)
    sender.sent_segment(1, 8, 100, 0.1, 9)
    assert sender.next(0.1, last=9, committed=9) == SendSegment(8, 100)
    sender.sent_segment(9, 9, 10, 0.1, 9)
    assert sender.next(0.1, last=10, committed=10) == Wait(0.101, gathering=True)


def test_a_higher_promise_fences() -> None:
    """An ack after a higher promise raises Fenced with that epoch, and does not count."""
    sender = joined()
    sender.sent_segment(1, 1, 10, 0.0, 0)
    with pytest.raises(Fenced) as caught:
        sender.on_ack(ack(1, promised_epoch=2002), 0.0)
    assert caught.value.epoch == 2002
    assert (sender.progress.synced, sender.progress.promised_epoch) == (0, 2002)


def test_an_ack_without_the_promise_is_refused() -> None:
    """A follower that did not promise this epoch could ack to two primaries."""
    with pytest.raises(ProtocolError, match="promised only 0"):
        joined().on_ack(ack(0, promised_epoch=0), 0.0)


@pytest.mark.parametrize("granted", [0, -1])
def test_credit_only_grows(granted: int) -> None:
    """A grant of nothing or less is refused."""
    with pytest.raises(ProtocolError):
        joined().on_credit(granted, 0.0)


def test_the_newest_stamp_is_echoed() -> None:
    """An older stamp does not replace a newer one."""
    sender = joined()
    for stamp in (5, 9, 7):
        sender.on_ack(ack(0, stamp_us=stamp), 0.0)
    assert sender.stamp_us == 9


def test_a_commit_waits_a_moment_for_the_next_segment() -> None:
    """With commit_linger_s a commit is told by the next segment, or alone when none comes in time."""
    sender = joined(commit_linger_s=0.01)
    sender.sent_segment(1, 1, 10, 0.1, 0)
    assert sender.tell_at == pytest.approx(0.11)
    assert sender.next(0.1, last=1, committed=0) == Wait(pytest.approx(0.11))
    assert sender.on_ack(ack(1), 0.102)
    assert sender.next(0.102, last=1, committed=1) == Wait(pytest.approx(0.11))
    assert sender.next(0.105, last=2, committed=1) == SendSegment(1, 100)
    sender.sent_segment(2, 2, 10, 0.105, 1)
    assert sender.on_ack(ack(2), 0.108)
    assert sender.next(0.12, last=2, committed=2) == BEAT


def test_a_commit_that_somebody_waits_for_is_told_at_once() -> None:
    """``hurry`` overrules the linger, but not what is still on its way."""
    sender = joined(commit_linger_s=0.01)
    sender.sent_segment(1, 1, 10, 0.1, 0)
    assert type(sender.next(0.101, last=1, committed=1, hurry=True)) is Wait
    assert sender.on_ack(ack(1), 0.102)
    assert sender.next(0.102, last=1, committed=1, hurry=True) == BEAT
