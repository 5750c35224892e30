"""The checkers, on histories made by hand, and against an exhaustive search on small ones."""

from __future__ import annotations

import random
import time
from itertools import combinations, permutations
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvrep import Position
from kvrep.testing.checkers import (
    Violation,
    assert_none,
    check_acknowledged_loss,
    check_feed,
    check_linearizable,
    check_monotonic_reads,
    check_one_primary,
    check_read_your_writes,
    check_sessions,
)
from kvrep.testing.history import History, Operation

K = b"k"


def op(
    client: str, action: Any, value: bytes | None, invoked: float, returned: float | None, **more: Any
) -> Operation:
    result = more.pop("result", "done" if returned is not None else "unknown")
    return Operation(
        client=client,
        action=action,
        key=more.pop("key", K),
        value=value,
        invoked=invoked,
        returned=returned,
        result=result,
        **more,
    )


def put(client: str, value: bytes, invoked: float, returned: float | None = None, **more: Any) -> Operation:
    return op(client, "put", value, invoked, returned, **more)


def get(client: str, value: bytes | None, invoked: float, returned: float, **more: Any) -> Operation:
    return op(client, "get", value, invoked, returned, **more)


def delete(client: str, invoked: float, returned: float | None = None, **more: Any) -> Operation:
    return op(client, "delete", None, invoked, returned, **more)


def cas(
    client: str,
    expected: bytes | None,
    value: bytes | None,
    invoked: float,
    returned: float | None = None,
    **more: Any,
) -> Operation:
    return op(client, "cas", value, invoked, returned, expected=expected, **more)


LINEARIZABLE: dict[str, list[Operation]] = {
    "nothing": [],
    "a read of a missing key": [get("a", None, 1, 2)],
    "write then read": [put("a", b"1", 1, 2), get("b", b"1", 3, 4)],
    "a concurrent read sees the old value": [put("a", b"1", 1, 4), get("b", None, 2, 3)],
    "a concurrent read sees the new value": [put("a", b"1", 1, 4), get("b", b"1", 2, 3)],
    "two concurrent writes, either last": [
        put("a", b"1", 1, 5), put("b", b"2", 2, 6), get("c", b"1", 7, 8), get("c", b"1", 9, 10),
    ],
    "readers see concurrent writes one after the other": [
        put("a", b"1", 1, 10), put("b", b"2", 1, 10), get("c", b"2", 2, 3), get("d", b"1", 4, 5),
    ],
    "an unknown write that was seen": [put("a", b"1", 1), get("b", b"1", 5, 6)],
    "an unknown write that was never seen": [put("a", b"1", 1), get("b", None, 5, 6)],
    "an unknown write that takes effect late": [
        put("a", b"1", 1), put("b", b"2", 2, 3), get("b", b"2", 4, 5), get("b", b"1", 6, 7),
    ],
    "an unknown delete": [put("a", b"1", 1, 2), delete("a", 3), get("b", None, 4, 5)],
    "a refused write that nobody saw": [put("a", b"1", 1, 2, result="refused"), get("b", None, 3, 4)],
    "compare and set": [
        put("a", b"1", 1, 2), cas("b", b"1", b"2", 3, 4), get("c", b"2", 5, 6),
        cas("b", b"1", b"3", 7, 8, succeeded=False),
    ],
    "only one of two compare and set": [
        cas("a", None, b"1", 1, 5), cas("b", None, b"2", 1, 5, succeeded=False), get("c", b"1", 6, 7),
    ],
    "a chain of unknown writes": [
        put("a", b"1", 1), cas("b", b"1", b"2", 2), cas("c", b"2", b"3", 3), get("d", b"3", 4, 5),
    ],
    "a cas that failed because of an unknown write": [
        put("a", b"1", 1, 2), put("b", b"2", 3), cas("c", b"1", b"3", 4, 5, succeeded=False),
    ],
    "a read that may lag": [put("a", b"1", 1, 2), get("b", None, 3, 4, lagging=True)],
}  # fmt: skip

NOT_LINEARIZABLE: dict[str, list[Operation]] = {
    "a stale read": [put("a", b"1", 1, 2), get("b", None, 3, 4)],
    "a lost write": [put("a", b"1", 1, 2), put("a", b"2", 3, 4), get("b", b"1", 5, 6)],
    "a value nobody wrote": [get("b", b"1", 1, 2)],
    "a refused write that was seen": [put("a", b"1", 1, 2, result="refused"), get("b", b"1", 3, 4)],
    "a read goes back": [put("a", b"1", 1, 10), get("b", b"1", 2, 3), get("c", None, 4, 5)],
    "readers disagree on the order": [
        put("a", b"1", 1, 10), put("b", b"2", 1, 10),
        get("c", b"1", 2, 3), get("d", b"2", 4, 5), get("c", b"1", 6, 7),
    ],
    "an unknown write comes and goes": [
        put("z", b"0", 0, 1), put("a", b"1", 2), get("b", b"1", 5, 6), get("b", b"0", 7, 8),
    ],
    "an unknown write is seen before it was sent": [get("b", b"1", 1, 2), put("a", b"1", 3)],
    "both compare and set succeed": [cas("a", None, b"1", 1, 5), cas("b", None, b"2", 1, 5)],
    "a cas that failed for no reason": [
        put("a", b"1", 1, 2), cas("c", b"1", b"3", 4, 5, succeeded=False),
    ],
    "an unknown cas whose condition never held": [cas("a", b"9", b"1", 1), get("b", b"1", 2, 3)],
}  # fmt: skip


@pytest.mark.parametrize("name", LINEARIZABLE)
def test_linearizable(name: str) -> None:
    """A history with an explanation passes, and the exhaustive search agrees."""
    assert check_linearizable(LINEARIZABLE[name]) == []
    assert explained(LINEARIZABLE[name])


@pytest.mark.parametrize("name", NOT_LINEARIZABLE)
def test_not_linearizable(name: str) -> None:
    """A history without one is reported with its key, and the exhaustive search agrees."""
    violations = check_linearizable(NOT_LINEARIZABLE[name])

    assert [v.key for v in violations] == [K]
    assert violations[0].check == "linearizability"
    assert not explained(NOT_LINEARIZABLE[name])
    with pytest.raises(AssertionError, match="linearizability: key b'k'"):
        assert_none(violations)


def test_keys_are_independent() -> None:
    """Each key is judged alone: one bad key is reported, the others are not."""
    history = [
        put("a", b"1", 1, 2, key=b"x"),
        get("a", None, 3, 4, key=b"x"),
        *LINEARIZABLE["compare and set"],
    ]

    assert [v.key for v in check_linearizable(history)] == [b"x"]


def test_initial_values() -> None:
    """What was there before the history began counts."""
    history = [get("a", b"0", 1, 2)]

    assert check_linearizable(history, initial={K: b"0"}) == []
    assert len(check_linearizable(history)) == 1


def test_a_search_without_an_answer_has_failed() -> None:
    """What could not be decided within the steps allowed is reported, not passed."""
    history = [put("a", b"1", 1, 2), put("a", b"2", 3, 4), get("b", b"2", 5, 6)]

    violations = check_linearizable(history, steps_max=2)

    assert "no answer within 2 steps" in str(violations[0])


def test_inconsistent_operations_are_refused() -> None:
    """An unknown outcome with a time of return is a mistake of the recorder, not a history."""
    with pytest.raises(ValueError, match="returned exactly when"):
        check_linearizable([op("a", "put", b"1", 1, 2, result="unknown")])


# -- against the definition ------------------------------------------------------------------------


def explained(history: list[Operation]) -> bool:
    """The definition, tried out: is there a set of the unknown calls and an order that explains all?"""
    known = [o for o in history if o.result == "done" and not (o.action == "get" and o.lagging)]
    unknown = [o for o in history if o.result == "unknown" and o.action != "get"]
    return any(
        _in_real_time(order) and _replays(order)
        for count in range(len(unknown) + 1)
        for some in combinations(unknown, count)
        for order in permutations([*known, *some])
    )


def _in_real_time(order: tuple[Operation, ...]) -> bool:
    return not any(
        later.returned is not None and later.returned < earlier.invoked
        for i, earlier in enumerate(order)
        for later in order[i + 1 :]
    )


def _replays(order: tuple[Operation, ...]) -> bool:
    value: bytes | None = None
    for o in order:
        if o.action == "get":
            if o.value != value:
                return False
        elif o.action == "cas" and o.result == "done":
            if (o.expected == value) != o.succeeded:
                return False
            value = o.value if o.succeeded else value
        elif o.action == "cas":
            value = o.value if o.expected == value else value
        else:
            value = o.value
    return True


values = st.sampled_from([None, b"1", b"2"])


@st.composite
def small_histories(draw: st.DrawFn) -> list[Operation]:
    """Up to six calls with any answers at all, some of them unknown."""
    history = []
    for i in range(draw(st.integers(1, 6))):
        action = draw(st.sampled_from(["get", "put", "put", "delete", "cas"]))
        invoked = draw(st.integers(0, 12))
        returned: int | None = invoked + draw(st.integers(1, 6))
        if action != "get" and draw(st.integers(0, 3)) == 0:
            returned = None
        value = None if action == "delete" else draw(values)
        if action == "put" and value is None:
            value = b"1"
        more = {"expected": draw(values), "succeeded": draw(st.booleans())} if action == "cas" else {}
        history.append(op(f"c{i}", action, value, invoked, returned, **more))
    return history


@settings(max_examples=400, deadline=None, derandomize=True)
@given(small_histories())
def test_agrees_with_exhaustive_search(history: list[Operation]) -> None:
    """On any small history the search gives the answer of the definition."""
    assert (check_linearizable(history) == []) == explained(history)


def run_register(rng: random.Random, calls: int, keys: int, clients: int) -> list[Operation]:
    """What clients of a correct register see: each call takes effect at one moment while it is under way."""
    free_at = [0.0] * clients
    state: dict[bytes, bytes | None] = {}
    plans = []
    for i in range(calls):
        client = rng.randrange(clients)
        invoked = free_at[client] + rng.random()
        effect = invoked + rng.random() * 3
        returned = effect + rng.random() * 3
        free_at[client] = returned
        plans.append((effect, i, client, invoked, returned))
    history = []
    for _, i, client, invoked, returned in sorted(plans):
        key = b"%d" % rng.randrange(keys)
        action = rng.choice(["get", "get", "put", "put", "delete", "cas"])
        value, more = None, {}
        unknown = action != "get" and rng.random() < 0.02
        happens = not unknown or rng.random() < 0.5
        if action == "get":
            value = state.get(key)
        elif action == "cas":
            expected = state.get(key) if rng.random() < 0.7 else b"never"
            value = b"v%d" % i
            succeeded = expected == state.get(key)
            more = {"expected": expected, "succeeded": succeeded or unknown}
            if happens and succeeded:
                state[key] = value
        else:
            value = b"v%d" % i if action == "put" else None
            if happens:
                state[key] = value
        end = None if unknown else returned
        history.append(op(f"c{client}", action, value, invoked, end, key=key, **more))
    return history


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(1, 60), st.integers(1, 3), st.integers(1, 6))
def test_correct_registers_pass_every_check(rng: Any, calls: int, keys: int, clients: int) -> None:
    """What clients of a correct store see breaks none of the promises."""
    history = run_register(rng, calls, keys, clients)

    assert check_linearizable(history) == []
    assert check_sessions(history) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.data())
def test_a_changed_answer_is_found(rng: Any, data: st.DataObject) -> None:
    """A read changed to a value that only one, certainly later or overwritten, write made is reported."""
    history = run_register(rng, 40, 1, 3)
    reads = [i for i, o in enumerate(history) if o.action == "get"]
    assume(reads)
    at = data.draw(st.sampled_from(reads))
    read = history[at]
    future = [o for o in history if o.action == "put" and o.invoked > (read.returned or 0)]
    assume(future)
    history[at] = get(read.client, future[0].value, read.invoked, read.returned or 0, key=read.key)

    assert len(check_linearizable(history)) == 1


def test_fast_enough_for_a_test_run() -> None:
    """10,000 calls on 100 keys by 16 clients, some of unknown outcome, take seconds; so does one hot key."""
    rng = random.Random(7)
    many = run_register(rng, 10_000, 100, 16)
    hot = run_register(rng, 3_000, 1, 8)

    began = time.perf_counter()
    assert check_linearizable(many) == []
    assert check_sessions(many) == []
    assert check_linearizable(hot) == []
    assert time.perf_counter() - began < 20


# -- acknowledged loss -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "final"),
    [
        ([], {}),
        ([put("a", b"1", 1, 2)], {K: b"1"}),
        ([put("a", b"1", 1, 2), put("a", b"2", 3, 4)], {K: b"2"}),
        ([put("a", b"1", 1, 4), put("b", b"2", 2, 3)], {K: b"1"}),
        ([put("a", b"1", 1, 4), put("b", b"2", 2, 3)], {K: b"2"}),
        ([put("a", b"1", 1, 2), delete("a", 3, 4)], {}),
        ([put("a", b"1", 1, 2), put("b", b"2", 3)], {K: b"1"}),
        ([put("a", b"1", 1, 2), put("b", b"2", 3)], {K: b"2"}),
        ([put("b", b"2", 1), put("a", b"1", 3, 4)], {K: b"2"}),
        ([put("a", b"1", 1, 2), put("b", b"2", 3, 4, result="refused")], {K: b"1"}),
        ([put("a", b"1", 1, 2), cas("b", b"0", b"2", 3, 4, succeeded=False)], {K: b"1"}),
        ([put("a", b"1", 1)], {}),
    ],
)
def test_nothing_lost(history: list[Operation], final: dict[bytes, bytes]) -> None:
    """What the calls allow to be there at the end passes."""
    assert check_acknowledged_loss(history, final) == []


@pytest.mark.parametrize(
    ("history", "final", "message"),
    [
        ([put("a", b"1", 1, 2)], {}, "an acknowledged write is missing"),
        ([put("a", b"1", 1, 2), put("a", b"2", 3, 4)], {K: b"1"}, "an acknowledged write is missing"),
        ([put("a", b"1", 1, 2), delete("a", 3, 4)], {K: b"1"}, "an acknowledged write is missing"),
        ([], {K: b"1"}, "which nobody wrote"),
        ([put("a", b"1", 1, 2, result="refused")], {K: b"1"}, "which nobody wrote"),
        ([put("a", b"1", 1)], {K: b"2"}, "which nobody wrote"),
        (
            [
                put("a", b"1", 1, 4, position=Position(1001, 7)),
                put("b", b"2", 2, 3, position=Position(1001, 6)),
            ],
            {K: b"2"},
            "an acknowledged write is missing",
        ),
    ],
)
def test_acknowledged_loss(history: list[Operation], final: dict[bytes, bytes], message: str) -> None:
    """A missing acknowledged write or a value from nowhere is found; positions decide where times cannot."""
    violations = check_acknowledged_loss(history, final)

    assert len(violations) == 1
    assert message in str(violations[0])


def test_loss_knows_what_was_there_before() -> None:
    """A key that nobody touched must still hold what it held."""
    assert check_acknowledged_loss([], {K: b"0"}, initial={K: b"0"}) == []
    assert len(check_acknowledged_loss([], {}, initial={K: b"0"})) == 1


# -- sessions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "history",
    [
        [put("a", b"1", 1, 2), get("a", b"1", 3, 4)],
        [put("a", b"1", 1, 2), get("b", None, 3, 4, lagging=True)],
        [put("a", b"1", 1, 2), put("b", b"2", 3, 4), get("a", b"2", 5, 6)],
        [put("a", b"1", 1, 4), put("b", b"2", 2, 5), get("a", b"2", 6, 7)],
        [put("b", b"2", 1), put("a", b"1", 3, 4), get("a", b"2", 5, 6)],
        [put("a", b"1", 1), get("a", None, 3, 4)],
    ],
)
def test_own_writes_read(history: list[Operation]) -> None:
    """A client that reads its own write, or something that may be newer, is content."""
    assert check_read_your_writes(history) == []


@pytest.mark.parametrize(
    "history",
    [
        [put("a", b"1", 1, 2), get("a", None, 3, 4, lagging=True)],
        [put("b", b"0", 1, 2), put("a", b"1", 3, 4), get("a", b"0", 5, 6)],
        [put("a", b"1", 1, 2), delete("a", 3, 4), get("a", b"1", 5, 6)],
        [
            put("b", b"0", 1, 4, position=Position(1001, 1)),
            put("a", b"1", 2, 3, position=Position(1001, 2)),
            get("a", b"0", 5, 6),
        ],
    ],
)
def test_own_writes_not_read(history: list[Operation]) -> None:
    """A client that reads something certainly older than its own write is reported."""
    assert [v.check for v in check_read_your_writes(history)] == ["read your writes"]


@pytest.mark.parametrize(
    "history",
    [
        [put("a", b"1", 1, 2), get("b", None, 3, 4), get("b", b"1", 5, 6)],
        [put("a", b"1", 1, 9), put("c", b"2", 1, 9), get("b", b"1", 2, 3), get("b", b"2", 4, 5)],
        [
            put("a", b"1", 1, 2), get("b", b"1", 3, 4), put("a", b"2", 5, 6), get("b", b"2", 7, 8),
            put("a", b"1", 9, 10), get("b", b"1", 11, 12),
        ],
        [put("a", b"1", 1, 2), get("b", b"1", 3, 4), delete("a", 5, 6), get("b", None, 7, 8)],
    ],
)  # fmt: skip
def test_reads_go_forward(history: list[Operation]) -> None:
    """Reads that may be of growing age pass, repeated values and deletes included."""
    assert check_monotonic_reads(history) == []


@pytest.mark.parametrize(
    "history",
    [
        [put("a", b"1", 1, 2), get("b", b"1", 3, 4), get("b", None, 5, 6)],
        [put("a", b"1", 1, 2), put("a", b"2", 3, 4), get("b", b"2", 5, 6), get("b", b"1", 7, 8)],
        [
            put("a", b"1", 1, 20), put("c", b"2", 1, 20),
            get("b", b"1", 2, 3), get("b", b"2", 4, 5), get("b", b"1", 6, 7),
        ],
        [
            put("a", b"1", 1, 20, position=Position(1001, 2)),
            put("c", b"2", 1, 20, position=Position(1001, 1)),
            get("b", b"1", 2, 3), get("b", b"2", 4, 5),
        ],
    ],
)  # fmt: skip
def test_reads_go_back(history: list[Operation]) -> None:
    """A client that sees something certainly older than before is reported."""
    assert [v.check for v in check_monotonic_reads(history)] == ["monotonic reads"]


# -- feeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("received", "options"),
    [
        ([], {}),
        ([1, 2, 3], {"last": 3}),
        ([5, 6], {"after": 4, "last": 6}),
        ([2, 4, 9], {"expected": [2, 4, 9]}),
        ([1, 2, 3, 2, 3, 4], {"repeats": True, "last": 4}),
    ],
)
def test_complete_feed(received: list[int], options: dict[str, Any]) -> None:
    """Everything once and in order passes; so do repeats where they are allowed."""
    assert check_feed(received, **options) == []


@pytest.mark.parametrize(
    ("received", "options", "message"),
    [
        ([1, 3], {}, "3 came where 2 was due"),
        ([1, 2, 2], {}, "2 came again"),
        ([1, 3, 2], {}, "2 came again, or too late"),
        ([1, 2], {"last": 3}, "the end is missing, from 3 on"),
        ([1, 2, 3], {"last": 2}, "went on beyond 2"),
        ([4, 5], {"after": 4}, "4 was not to be delivered"),
        ([2, 9], {"expected": [2, 4, 9]}, "9 came where 4 was due"),
        ([2, 3], {"expected": [2, 4]}, "3 was not to be delivered"),
        ([2], {"expected": [2, 4]}, "the end is missing, from 4 on"),
        ([1, 2, 3, 2, 4], {"repeats": True}, "4 came where 3 was due"),
        ([1, 2, 3, 1], {"repeats": True, "last": 4}, "the end is missing, from 4 on"),
    ],
)
def test_incomplete_feed(received: list[int], options: dict[str, Any], message: str) -> None:
    """Gaps, repeats, strangers and a missing end are reported."""
    assert any(message in str(v) for v in check_feed(received, **options))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 30), st.data())
def test_any_change_of_a_feed_is_found(count: int, data: st.DataObject) -> None:
    """Drop, repeat or swap anything in a complete feed, and it is complete no longer."""
    feed = list(range(1, count + 1))
    at = data.draw(st.integers(0, count - 2))
    change = data.draw(st.sampled_from(["drop", "repeat", "swap"]))
    if change == "drop":
        del feed[at]
    elif change == "repeat":
        feed.insert(at, feed[at])
    else:
        feed[at], feed[at + 1] = feed[at + 1], feed[at]

    assert check_feed(feed, last=count)


# -- the recorder ----------------------------------------------------------------------------------


def test_history_records_calls() -> None:
    """Invocations and returns get one order; a call that never ended is unknown."""
    history = History()
    first = history.begin("a", "put", K, b"1", node="n1")
    read = history.begin("b", "get", K)
    first.done(position=Position(1001, 2))
    read.done(value=b"1")
    history.begin("a", "cas", K, b"3", expected=b"1")
    refused = history.begin("c", "delete", K)
    refused.refused()

    operations = history.operations

    assert len(history) == 4
    assert [(o.invoked, o.returned, o.result) for o in operations] == [
        (1, 3, "done"), (2, 4, "done"), (5, None, "unknown"), (6, 7, "refused"),
    ]  # fmt: skip
    assert operations[0].position == Position(1001, 2)
    assert operations[1].value == b"1"
    assert check_linearizable(history) == []
    with pytest.raises(RuntimeError, match="recorded already"):
        first.unknown()


def test_operations_and_violations_read_well() -> None:
    """Text forms name client, call, outcome, position and node; long lists are cut."""
    one = put("a", b"1", 1, 2, position=Position(1001, 7), node="n1")
    texts = [str(o) for o in (one, get("b", None, 1, 2), cas("c", None, b"1", 1), delete("d", 3, 4))]

    assert texts == [
        "[1..2] a put(b'k', b'1') at 1001:7 on n1",
        "[1..2] b get(b'k') = None",
        "[1..] c cas(b'k', None -> b'1') unknown",
        "[3..4] d delete(b'k')",
    ]
    assert str(Violation("x", "bad", K, (one,) * 20)).endswith("… and 8 more")


# -- epochs ----------------------------------------------------------------------------------------


def test_one_primary_in_each_epoch() -> None:
    """Two nodes that acknowledge in one epoch are found; failovers, refusals and unknown outcomes are not."""
    fine = [
        put("a", b"1", 1, 2, node="x", position=Position(1, 1)),
        put("a", b"2", 3, 4, node="y", position=Position(2, 2)),
        put("b", b"3", 3, None, node="z", position=Position(2, 3)),
        put("b", b"4", 5, 6, node="z", result="refused"),
        get("b", b"2", 7, 8, node="z"),
    ]
    assert check_one_primary(fine) == []

    found = check_one_primary([*fine, delete("c", 9, 10, node="x", position=Position(2, 4))])

    assert [v.operations for v in found] == [(fine[1], delete("c", 9, 10, node="x", position=Position(2, 4)))]
