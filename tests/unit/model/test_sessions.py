"""The table of forwarded writes: what it answers, what it forgets, and that it says so."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.errors import ProtocolError
from kvrep.model.position import Position
from kvrep.model.sessions import OUTCOMES_MAX, OUTCOMES_TOTAL_MAX, SESSIONS_MAX, Origin, RequestId, Sessions

STORE = b"s" * 16


def test_a_write_is_found_until_its_sender_knows_its_outcome() -> None:
    """note() keeps the position; a later record with a higher floor lets it go."""
    table = Sessions()
    assert table.find(STORE, 1, 1) is None
    assert table.knows(STORE, 1, 1, 0)
    table.note(Origin(STORE, 1, 1, 1), Position(1001, 5))
    table.note(Origin(STORE, 1, 2, 1), Position(1001, 6))
    assert table.find(STORE, 1, 1) == Position(1001, 5)
    assert table.find(STORE, 2, 1) is None, "another session"
    table.note(Origin(STORE, 1, 4, 2), Position(1001, 7))
    assert table.find(STORE, 1, 1) is None
    assert not table.knows(STORE, 1, 1, 0), "below the floor: it was known, and is not any more"
    assert table.knows(STORE, 1, 3, 0)
    assert table.find(STORE, 1, 3) is None, "not executed"


def test_a_forgotten_session_is_not_taken_for_one_that_never_was() -> None:
    """Beyond its bound the table forgets the session that wrote longest ago, and remembers up to where."""
    table = Sessions()
    for number in range(SESSIONS_MAX + 10):
        table.note(Origin(STORE, number, 1, 1), Position(1001, number + 1))
    assert len(table) == SESSIONS_MAX
    assert table.forgotten == 10
    for number in range(10):
        assert table.find(STORE, number, 1) is None
        assert not table.knows(STORE, number, 1, number)
    assert table.knows(STORE, 99_999, 1, 10), "what begins above that cannot have been forgotten"
    table.note(Origin(STORE, 3, 2, 1), Position(1001, 5000))
    assert not table.knows(STORE, 3, 1, 3), "the session is back, what it wrote before is not"
    assert table.knows(STORE, 3, 3, 5000)


def test_all_outcomes_together_are_bounded() -> None:
    """Sessions that keep very many outcomes each: the oldest are forgotten, whole, and the count stays right."""
    table = Sessions()
    sessions = OUTCOMES_TOTAL_MAX // OUTCOMES_MAX + 2
    for number in range(sessions):
        for i in range(OUTCOMES_MAX):
            table.note(Origin(STORE, number, 1 + i, 1), Position(1001, number * OUTCOMES_MAX + i + 1))
    assert len(table) == sessions - 2
    assert table.forgotten == 2 * OUTCOMES_MAX
    assert table.find(STORE, 1, 1) is None
    assert table.find(STORE, 2, 1) == Position(1001, 2 * OUTCOMES_MAX + 1)
    last = sessions * OUTCOMES_MAX
    table.note(Origin(STORE, 2, OUTCOMES_MAX + 1, OUTCOMES_MAX + 1), Position(1001, last + 1))
    for i in range(OUTCOMES_MAX - 1):  # the room that this floor made
        table.note(Origin(STORE, 999, 1 + i, 1), Position(1001, last + 2 + i))
    assert table.forgotten == 2 * OUTCOMES_MAX
    assert len(table.copy()) == len(Sessions.from_wire(table.to_wire())) == sessions - 1


def test_the_bytes_of_the_table() -> None:
    """What is kept in LMDB beside the data: the same in every release."""
    table = Sessions()
    table.note(Origin(STORE, 5, 2, 1), Position(1001, 7))
    assert msgpack.packb(table.to_wire()).hex() == (
        "82a9666f72676f7474656e00a873657373696f6e73919600".replace("9196", "9196c410" + "73" * 16 + "05")
        + "0107919302cd03e907"
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60))
def test_against_a_table_that_forgets_nothing(steps: list[tuple[int, int, int]]) -> None:
    """Whatever it answers is right; through bytes and back it is the same table."""
    table, everything = Sessions(), {}
    for offset, (session, ahead, behind) in enumerate(steps, 1):
        floor = 1 + offset // 2
        origin = Origin(STORE, session, floor + ahead, max(1, floor - behind))
        table.note(origin, Position(1001, offset))
        everything[session, origin.sequence] = offset
    again = Sessions.from_wire(msgpack.unpackb(msgpack.packb(table.to_wire()), strict_map_key=False))
    for found in (table, again, table.copy()):
        for session in range(4):
            for sequence in range(1, 45):
                position = found.find(STORE, session, sequence)
                if position is not None:
                    assert position.offset == everything[session, sequence]
                elif found.knows(STORE, session, sequence, 0):
                    assert (session, sequence) not in everything
        assert found.to_wire() == table.to_wire()


def test_an_older_state_record_has_no_table() -> None:
    """What a version without forwarded writes left behind is an empty table."""
    assert len(Sessions.from_wire(None)) == 0


@pytest.mark.parametrize(
    "value",
    [
        None,
        [STORE, 1, 1],
        [STORE, 1, 1, 0],
        [STORE, 1, 1, 2],
        [STORE, 1, OUTCOMES_MAX + 1, 1],
        [STORE, -1, 1, 1],
        [STORE, 2**63, 1, 1],
        [STORE, True, 1, 1],
        [b"short", 1, 1, 1],
        ["s" * 16, 1, 1, 1],
        (STORE, 1, 1, 1),
    ],
)
def test_what_is_no_origin_is_refused(value: object) -> None:
    """Origins come from peers and disks: everything is checked."""
    with pytest.raises(ProtocolError):
        Origin.of(value)
    assert Origin.of([STORE, 1, OUTCOMES_MAX, 1]) == Origin(STORE, 1, OUTCOMES_MAX, 1)


def test_request_ids_are_text_and_back() -> None:
    """str() and parse() undo each other; other text is refused."""
    request = RequestId(STORE, 2**56 - 1, 17, 123)
    assert RequestId.parse(str(request)) == request
    for text in ("", "1-2-3", "zz-1-1-1", f"{request}-1"):
        with pytest.raises(ValueError, match="request id"):
            RequestId.parse(text)
