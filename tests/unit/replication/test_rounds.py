"""Rounds of questions: which answers count for a read."""

from __future__ import annotations

from itertools import combinations

import pytest

from kvrep.model.configuration import Acks, Configuration
from kvrep.replication.rounds import Rounds

NAMES = "abcde"


def group(size: int, acks: Acks) -> Configuration:
    configuration = Configuration(acks=acks)
    for name in NAMES[:size]:
        configuration = configuration.with_voter(name.encode() * 16, name)
    return configuration


def ids(names: str) -> list[bytes]:
    return [name.encode() * 16 for name in names]


@pytest.mark.parametrize("acks", [1, 2, "majority", "all"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_whoever_confirms_meets_every_fence(size: int, acks: Acks) -> None:
    """Any set that confirms a read shares a voter with any set that a promotion must fence."""
    rule = group(size, acks)
    voters = ids(NAMES[:size])
    for count in range(size):
        for answered in combinations(voters[1:], count):
            rounds = Rounds(voters[0])
            number = rounds.ask()
            rounds.sending()
            for store_id in answered:
                rounds.answer(store_id, number)
            confirmed = rounds.confirmed(number, [rule])
            assert confirmed == (count + 1 >= rule.data_voters - rule.fence + 1)
            if confirmed:
                for fenced in combinations(voters, rule.fence):
                    assert set(fenced) & {voters[0], *answered}


def test_only_answers_to_rounds_that_began_after_the_read_count() -> None:
    """Readers share a round until it is sent; later ones need the next."""
    a, b, c = ids("abc")
    rule = group(3, "majority")
    rounds = Rounds(a)
    first = rounds.ask()
    assert rounds.ask() == first, "nobody has been asked yet"
    assert rounds.sending() == first
    second = rounds.ask()
    assert second == first + 1
    assert rounds.answer(b, first)
    assert rounds.confirmed(first, [rule])
    assert not rounds.confirmed(second, [rule])
    assert not rounds.answer(b, first), "nothing new"
    with pytest.raises(ValueError, match="not begun"):
        rounds.answer(c, second)
    assert rounds.sending() == second
    assert rounds.answer(c, second)
    assert rounds.confirmed(second, [rule])


def test_a_stranger_and_a_witness_do_not_count() -> None:
    """Only data voters confirm, because only they hold what a commit needs."""
    from dataclasses import replace

    a, b, c = ids("abc")
    rule = group(3, "majority")
    rule = replace(rule, voters=(*rule.voters[:2], replace(rule.voters[2], witness=True)))
    rounds = Rounds(a)
    number = rounds.ask()
    rounds.sending()
    rounds.answer(c, number)
    rounds.answer(b"x" * 16, number)
    assert not rounds.confirmed(number, [rule])
    rounds.answer(b, number)
    assert rounds.confirmed(number, [rule])


def test_while_a_configuration_changes_both_rules_count() -> None:
    """A proposed configuration may be what a promotion goes by; so may the one before."""
    a, b, c = ids("abc")
    rounds = Rounds(a)
    number = rounds.ask()
    rounds.sending()
    rounds.answer(b, number)
    assert rounds.confirmed(number, [group(3, "majority")])
    assert not rounds.confirmed(number, [group(3, "majority"), group(3, "all")])
    rounds.answer(c, number)
    assert rounds.confirmed(number, [group(3, "majority"), group(3, "all")])
