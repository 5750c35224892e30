"""The configuration and the numbers that follow from it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.errors import ProtocolError
from kvrep.model.configuration import OPEN, Acks, Configuration, Voter, in_force
from kvrep.model.position import EPOCH_MEMBERS


def group(data: int, witnesses: int = 0, acks: Acks = "majority") -> Configuration:
    voters = tuple(
        Voter(store_id=bytes([i]), name=f"n{i}", member=i, witness=i > data)
        for i in range(1, data + witnesses + 1)
    )
    return Configuration(acks=acks, voters=voters, next_member=data + witnesses + 1)


rules = st.sampled_from([0, 1, 2, 3, 5, "majority", "all"])


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    count = draw(st.integers(0, 5))
    members = draw(st.lists(st.integers(1, 99), min_size=count, max_size=count, unique=True))
    names = draw(st.lists(st.text(max_size=5), min_size=count, max_size=count, unique=True))
    voters = tuple(
        Voter(
            store_id=bytes([m]) * 16,
            name=n,
            member=m,
            address=draw(st.text(max_size=5)),
            priority=draw(st.integers(-5, 5)),
            witness=draw(st.booleans()),
        )
        for m, n in zip(members, names, strict=True)
    )
    timeout = draw(st.floats(0.001, 86_400))
    return Configuration(acks=draw(rules), ack_timeout_s=timeout, voters=voters, next_member=100)


@given(configurations())
def test_a_configuration_survives_the_log(configuration: Configuration) -> None:
    """from_wire() undoes to_wire() exactly, through msgpack."""
    packed = msgpack.packb(configuration.to_wire())
    assert Configuration.from_wire(msgpack.unpackb(packed)) == configuration


@given(st.integers(1, 6), st.integers(0, 3), rules)
def test_fences_meet_every_set_that_acknowledged(data: int, witnesses: int, acks: Acks) -> None:
    """Any F data voters and any W data voters share one; both numbers are possible."""
    configuration = group(data, witnesses, acks)
    copies, fence = configuration.copies, configuration.fence
    assert 1 <= copies <= data
    assert 1 <= fence <= data
    for fenced in combinations(range(data), fence):
        for acked in combinations(range(data), copies):
            assert set(fenced) & set(acked)


@pytest.mark.parametrize(
    ("data", "witnesses", "acks", "wanted", "copies", "fence"),
    [
        (0, 0, 0, 1, 1, 1),
        (0, 0, 1, 2, 1, 1),
        (1, 0, 0, 1, 1, 1),
        (1, 0, 1, 2, 1, 1),
        (1, 0, "majority", 1, 1, 1),
        (2, 0, 0, 1, 1, 2),
        (2, 0, 1, 2, 2, 1),
        (2, 0, "majority", 2, 2, 1),
        (2, 1, "majority", 2, 2, 1),
        (1, 2, "majority", 2, 1, 1),
        (3, 0, 0, 1, 1, 3),
        (3, 0, 1, 2, 2, 2),
        (3, 0, "majority", 2, 2, 2),
        (3, 0, "all", 3, 3, 1),
        (5, 0, "majority", 3, 3, 3),
        (5, 0, 1, 2, 2, 4),
        (3, 2, "majority", 3, 3, 1),
        (3, 2, "all", 3, 3, 1),
    ],
)
def test_the_numbers(data: int, witnesses: int, acks: Acks, wanted: int, copies: int, fence: int) -> None:
    """The table of W and F, by example."""
    configuration = group(data, witnesses, acks)
    assert (configuration.copies_wanted, configuration.copies, configuration.fence) == (wanted, copies, fence)


def test_voters_come_and_go_but_numbers_do_not_return() -> None:
    """A member number that was given away is never given again."""
    configuration = group(2).without_voter(b"\x02").with_voter(b"x", "x", "host:1")
    assert [v.member for v in configuration.voters] == [1, 3]
    assert configuration.next_member == 4
    assert configuration.named("x") == configuration.voter(b"x") is not None
    assert configuration.named("y") is configuration.voter(b"y") is None


def test_a_name_or_number_is_given_once() -> None:
    """A second voter of the same name, or one beyond the last member number, is refused."""
    with pytest.raises(ValueError, match="named 'n1'"):
        group(1).with_voter(b"x", "n1")
    with pytest.raises(ValueError, match="used up"):
        Configuration(next_member=EPOCH_MEMBERS).with_voter(b"x", "x")
    full = Configuration(next_member=EPOCH_MEMBERS - 1).with_voter(b"x", "x")
    assert full.next_member == EPOCH_MEMBERS


@pytest.mark.parametrize("what", ["store_id", "name", "member"])
def test_voters_are_told_apart(what: str) -> None:
    """Two voters with the same id, name or member number (hence the same epochs) are refused."""
    first = {"store_id": b"a", "name": "a", "member": 1}
    second = {"store_id": b"b", "name": "b", "member": 2, what: first[what]}
    with pytest.raises(ValueError, match=f"same {what}"):
        Configuration(voters=(Voter(**first), Voter(**second)), next_member=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("acks", [-1, EPOCH_MEMBERS, True, 1.0, None, "most", "", b"all"])
def test_an_ack_rule_that_is_not_understood_is_refused(acks: Any) -> None:
    """Anything but a count, "majority" or "all" stops here."""
    with pytest.raises(ValueError, match="acks must be"):
        Configuration(acks=acks)


@pytest.mark.parametrize("timeout", [0, -1, 0.0001, 86_401, float("nan"), float("inf")])
def test_a_timeout_that_cannot_be_logged_is_refused(timeout: float) -> None:
    """The ack timeout is a millisecond to a day."""
    with pytest.raises(ValueError, match="ack_timeout_s"):
        Configuration(ack_timeout_s=timeout)


def wire(**changes: Any) -> dict[str, Any]:
    return {**group(1).to_wire(), **changes}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        wire(acks="most"),
        wire(ack_timeout_ms="5"),
        wire(ack_timeout_ms=0),
        wire(next_member="2"),
        wire(next_member=0),
        wire(next_member=EPOCH_MEMBERS + 1),
        wire(voters=None),
        wire(voters=[[b"a", "a"]]),
        wire(voters=[[2**40, "a", 1, "", 0, False]]),
        wire(voters=[[b"a", b"a", 1, "", 0, False]]),
        wire(voters=[[b"a", "a", 2, "", 0, False]]),
        wire(voters=[[b"a", "a", True, "", 0, False]]),
        wire(voters=[[b"a", "a", 1, "", 0, 0]]),
    ],
)
def test_anything_else_on_the_wire_is_refused(data: Any) -> None:
    """from_wire() raises ProtocolError and converts nothing."""
    with pytest.raises(ProtocolError):
        Configuration.from_wire(data)


def test_a_rule_goes_on_without_those_who_are_away_and_comes_back() -> None:
    """The numbers follow; the span is kept, ends before the record that ends it, and survives the log."""
    full = replace(group(2, 1, 1), degrade_after_s=2.5)
    assert (full.copies, full.fence, full.away) == (2, 1, ())
    alone = full.without([b"\x02"], 7)
    assert (alone.copies, alone.copies_wanted, alone.fence, alone.data_voters) == (1, 1, 1, 1)
    assert [v.name for v in alone.away] == ["n2"]
    assert alone.unprotected == ((7, OPEN),)
    assert alone.without([b"\x02"], 9).unprotected == ((7, OPEN),), "one span"
    assert alone.at(8) == alone
    for back in (alone.with_copy_of(b"\x02"), alone.with_all_copies()):
        assert (back.copies, back.away) == (2, ())
        assert back.at(20).unprotected == ((7, 19),)
        wire = msgpack.unpackb(msgpack.packb(back.to_wire()))
        assert Configuration.from_wire(wire).at(20).unprotected == ((7, 19),)
    assert alone.without_voter(b"\x02").at(20).unprotected == ((7, 19),)
    assert Configuration.from_wire(alone.to_wire()) == alone
    for i in range(40):
        alone = alone.with_copy_of(b"\x02").at(100 + 2 * i).without([b"\x02"], 101 + 2 * i)
    assert len(alone.unprotected) == 16
    assert alone.unprotected[-1] == (179, OPEN)


def test_what_is_not_used_leaves_no_trace_in_the_log() -> None:
    """A configuration without degradation has the bytes that it always had."""
    assert group(3).to_wire().keys() == {"acks", "ack_timeout_ms", "next_member", "voters"}
    with pytest.raises(ValueError, match="acks=0"):
        Configuration(acks=0, degrade_after_s=1)
    with pytest.raises(ValueError, match="degrade_after_s"):
        Configuration(acks=1, degrade_after_s=-1)
    for wrong in ({"unprotected": [[1]]}, {"degrade_after_ms": "x"}, {"away": 7}):
        with pytest.raises(ProtocolError):
            Configuration.from_wire({**group(3).to_wire(), **wrong})


def test_the_bound_of_the_asynchronous_mode() -> None:
    """It goes through the log, leaves no trace when it is not used, and is for acks=0 alone."""
    bounded = replace(group(2, acks=0), lag_records_max=100)
    assert Configuration.from_wire(msgpack.unpackb(msgpack.packb(bounded.to_wire()))) == bounded
    assert (bounded.copies, bounded.fence) == (1, 2), "copies and promises are those of acks=0"
    assert "lag_records_max" not in group(2, acks=0).to_wire()
    assert Configuration.from_wire(group(2, acks=0).to_wire()).lag_records_max == 0
    for acks in (1, "majority", "all"):
        with pytest.raises(ValueError, match="acks=0"):
            Configuration(acks=acks, lag_records_max=1)  # type: ignore[arg-type]
    for wrong in (-1, 1.0, True, "1", 2**63):
        with pytest.raises(ValueError, match="lag_records_max"):
            Configuration(lag_records_max=wrong)  # type: ignore[arg-type]
        with pytest.raises(ProtocolError):
            Configuration.from_wire({**group(2, acks=0).to_wire(), "lag_records_max": wrong})


def test_which_rule_is_in_force() -> None:
    """The newest, if it is known to be committed; else the one before is, and the newest may be."""
    none, old, new = Configuration(), group(3), group(3, acks="all")
    assert in_force([(0, none)], 0) == (none, None)
    assert in_force([(0, none), (1, old)], 0) == (old, None), "nothing was in force before the first"
    assert in_force([(1, old), (7, new)], 6) == (old, (7, new))
    assert in_force([(1, old), (7, new)], 7) == (new, None)
    assert in_force([(1, old), (5, old), (7, new), (9, new)], 8) == (new, None), "said again is not changed"
    assert in_force([(1, old), (5, old), (7, new), (9, new)], 6) == (old, (7, new))
