"""One follower as the primary sees it."""

from __future__ import annotations

from collections import deque

import pytest

from kvrep.errors import ProtocolError
from kvrep.model.position import Position
from kvrep.replication.messages import Ack
from kvrep.replication.progress import TRANSITIONS, Progress, State


def streaming(at: int = 10) -> Progress:
    progress = Progress(store_id=b"b", name="b")
    progress.join(Position(1001, at), 100, 1001, now=1.0)
    return progress


def ack(written: int, synced: int | None = None, visible: int = 0) -> Ack:
    return Ack(written=written, synced=written if synced is None else synced, visible=visible)


def test_every_state_is_reached_and_every_stream_can_end() -> None:
    """The table has a row for each state; all are reachable, and only GONE is final."""
    assert set(TRANSITIONS) == set(State)
    reached, ahead = {State.JOINING}, deque([State.JOINING])
    while ahead:
        new = TRANSITIONS[ahead.popleft()] - reached
        reached |= new
        ahead += new
    assert reached == set(State)
    assert [s for s in State if not TRANSITIONS[s]] == [State.GONE]
    assert all(State.GONE in TRANSITIONS[s] for s in State if s is not State.GONE)


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_only_the_table_allows_a_change(before: State, after: State) -> None:
    """A transition that is not in the table raises and changes nothing."""
    progress = Progress(store_id=b"b", name="b", state=before)
    if after in TRANSITIONS[before]:
        progress.enter(after)
        assert progress.state is after
    else:
        with pytest.raises(ValueError, match="no way from"):
            progress.enter(after)
        assert progress.state is before


def test_a_join_counts_nothing_yet() -> None:
    """Records follow where the join is, but only acks say what the follower holds."""
    progress = streaming()
    assert (progress.sent, progress.written, progress.synced, progress.visible) == (10, 0, 0, 0)
    assert (progress.state, progress.credit_bytes) == (State.STREAMING, 100)
    assert progress.confirm(ack(10))


def test_bytes_are_in_flight_until_written() -> None:
    """Each run counts from its sending until an ack covers its last record."""
    progress = streaming()
    progress.send(11, 12, 30)
    progress.send(13, 13, 80)
    assert (progress.in_flight_bytes, progress.credit_bytes) == (110, -10)
    progress.confirm(ack(11))
    assert progress.in_flight_bytes == 110
    progress.confirm(ack(12))
    assert progress.in_flight_bytes == 80
    progress.confirm(ack(13))
    assert (progress.in_flight_bytes, len(progress.unconfirmed)) == (0, 0)


@pytest.mark.parametrize(("first", "last", "size"), [(12, 12, 5), (10, 10, 5), (11, 10, 5), (11, 11, 0)])
def test_runs_are_sent_in_order(first: int, last: int, size: int) -> None:
    """A gap, a repeat or an empty run is our own mistake."""
    with pytest.raises(ValueError, match="sent 10"):
        streaming().send(first, last, size)


@pytest.mark.parametrize(
    "wrong",
    [
        ack(13),
        ack(11, 12),
        ack(12, 11, 12),
        ack(10, 10, 5),
        ack(12, 9, 5),
        ack(12, 11, 4),
        ack(-1),
    ],
)
def test_an_ack_that_cannot_be_is_refused(wrong: Ack) -> None:
    """Beyond what was sent, out of order among the levels, or going back."""
    progress = streaming()
    progress.send(11, 12, 30)
    progress.confirm(ack(11, 10, 5))
    before = (progress.written, progress.synced, progress.visible)
    with pytest.raises(ProtocolError):
        progress.confirm(wrong)
    assert (progress.written, progress.synced, progress.visible) == before


def test_an_ack_tells_whether_it_moved_anything() -> None:
    """Repeating an ack is allowed and moves nothing; each level counts as progress."""
    progress = streaming()
    moved = [progress.confirm(a) for a in (ack(10), ack(10), ack(10, 10, 3), ack(10, 10, 3))]
    assert moved == [True, False, True, False]
