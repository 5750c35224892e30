"""What a primary answers to a Hello, as a table of two logs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvrep.model.configuration import Configuration
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.replication.join import (
    Continue,
    LogView,
    Superseded,
    check_loss,
    check_running,
    plan_join,
    voter_change,
)
from kvrep.replication.messages import PROTOCOL, Hello, NeedBootstrap, Refused, Truncate

# Ours: epoch 1001 wrote 1..9, 2001 wrote 10..20, 3001 (now) from 21 on; the log is kept from 5 on.
VIEW = LogView(
    store_id=b"a",
    name="a",
    lineage=b"L",
    branch=b"B",
    ancestors=(b"A",),
    epoch=3001,
    fenced=True,
    first=5,
    last=25,
    epochs=EpochTable([(1001, 1), (2001, 10), (3001, 21)]),
    primary_address="a:1",
)
WHOLE = replace(VIEW, first=1)


def hello(end: int, *table: tuple[int, int], **changes: Any) -> Hello:
    """A follower whose log ends at ``end``, with what it applied and knows committed far below."""
    epochs = EpochTable(table)
    fields: dict[str, Any] = {
        "store_id": b"b",
        "name": "b",
        "lineage": b"L",
        "branch": b"B",
        "promised_epoch": epochs.last_epoch,
        "last": Position(epochs.epoch_at(end), end),
        "epochs": epochs,
    }
    return Hello(**{**fields, **changes})


def new_store(**changes: Any) -> Hello:
    return hello(0, lineage=b"", branch=b"", **changes)


def told(plan: object) -> str:
    """A plan in a word or two."""
    match plan:
        case Continue(at=at):
            return f"continue {at}"
        case Truncate(to=to, epoch=3001):
            return f"cut {to}"
        case NeedBootstrap(first=first, reason=reason):
            return f"bootstrap {reason} {first}"
        case Refused(reason=reason):
            return f"refused {reason}"
        case Superseded(epoch=epoch):
            return f"superseded {epoch}"
    raise AssertionError(plan)


E1, E2, E3 = (1001, 1), (2001, 10), (3001, 21)


@pytest.mark.parametrize(
    ("their", "answer"),
    [
        # A part of our log.
        (hello(25, E1, E2, E3), "continue 3001:25"),
        (hello(22, E1, E2, E3), "continue 3001:22"),
        (hello(20, E1, E2), "continue 2001:20"),
        (hello(12, E1, E2), "continue 2001:12"),
        (hello(4, E1), "continue 1001:4"),
        # … whose continuation is trimmed.
        (hello(3, E1), "bootstrap trimmed 5"),
        (hello(0), "bootstrap trimmed 5"),
        # It had joined, and lost the stream before the first record: a lineage, and no branch yet.
        (hello(0, branch=b""), "bootstrap trimmed 5"),
        (new_store(), "bootstrap trimmed 5"),
        # A tail that we do not have.
        (hello(12, E1), "cut 1001:9"),
        (hello(23, E1, E2), "cut 2001:20"),
        (hello(30, E1, E2, (2003, 15)), "cut 2001:14"),
        (hello(30, E1, (1003, 7), (2003, 15)), "cut 1001:6"),
        (hello(30, E1, (1003, 4)), "bootstrap trimmed 5"),
        (hello(30, (1003, 1)), "bootstrap trimmed 5"),
        # … part of which is in its LMDB, or is known there as committed.
        (hello(23, E1, E2, committed=21, applied=20), "cut 2001:20"),
        (hello(23, E1, E2, committed=21, applied=21), "bootstrap diverged 5"),
        # Records that only we can have written.
        (hello(26, E1, E2, E3), "refused bad-hello"),
        (hello(25, E1, E2, (3001, 22)), "refused bad-hello"),
        (hello(30, E1, (2001, 9), (2003, 12)), "refused bad-hello"),
        # Above our epoch.
        (hello(20, E1, E2, promised_epoch=3002), "superseded 3002"),
        (hello(30, E1, E2, (4002, 21), promised_epoch=0), "superseded 4002"),
        (new_store(promised_epoch=4002), "superseded 4002"),
        # Other histories.
        (hello(20, E1, E2, lineage=b"M"), "refused lineage"),
        (hello(20, E1, E2, lineage=b"M", promised_epoch=9001), "refused lineage"),
        (hello(20, E1, E2, branch=b"A"), "continue 2001:20"),
        (hello(23, E1, E2, branch=b"A"), "cut 2001:20"),
        (hello(20, E1, E2, branch=b"C"), "refused lineage"),
        (hello(20, E1, E2, branch=b"C", promised_epoch=9001), "superseded 9001"),
        # Not even a Hello.
        (hello(20, E1, E2, store_id=b"a"), "refused self"),
        (hello(20, E1, E2, protocol_min=PROTOCOL + 1, protocol_max=PROTOCOL + 2), "refused protocol"),
        (hello(20, E1, E2, protocol_min=0, protocol_max=0), "refused protocol"),
        (hello(20, E1, E2, committed=21), "refused bad-hello"),
        (hello(20, E1, E2, applied=2, committed=1), "refused bad-hello"),
        (hello(20, E1, E2, applied=-1), "refused bad-hello"),
        (hello(20, E1, E2, last=Position(1001, 20)), "refused bad-hello"),
        (hello(20, E1, E2, last=Position(2001, 9)), "refused bad-hello"),
        (hello(20, E1, E2, E3, last=Position(2001, 20)), "refused bad-hello"),
        (hello(0, last=Position(0, 3)), "refused bad-hello"),
        (hello(20, E1, E2, lineage=b""), "refused bad-hello"),
    ],
)
def test_the_answer(their: Hello, answer: str) -> None:
    """Each pair of logs has exactly one answer."""
    assert told(plan_join(their, VIEW)) == answer


@pytest.mark.parametrize(
    ("their", "answer"),
    [
        (new_store(), "continue 0:0"),
        (hello(0), "continue 0:0"),
        (hello(3, E1), "continue 1001:3"),
        (hello(30, (1003, 1)), "cut 0:0"),
        (hello(30, (1003, 1), applied=1, committed=1), "bootstrap diverged 1"),
    ],
)
def test_a_log_that_is_whole_needs_no_bootstrap(their: Hello, answer: str) -> None:
    """From offset 1 on, a new follower just follows."""
    assert told(plan_join(their, WHOLE)) == answer


@pytest.mark.parametrize(
    ("their", "answer"),
    [
        (hello(23, E1, E2, committed=20), "cut 2001:20"),
        (hello(23, E1, E2, committed=21), "refused unfenced"),
        (hello(23, E1, E2, committed=22, applied=22), "refused unfenced"),
        (hello(20, E1, E2, committed=20, applied=20), "continue 2001:20"),
    ],
)
def test_an_unfenced_epoch_drops_nothing_committed(their: Hello, answer: str) -> None:
    """Without a full fence or force, no follower is told to give up what it knows as committed."""
    assert told(plan_join(their, replace(VIEW, fenced=False))) == answer


def test_an_empty_log_that_was_trimmed_can_be_joined_at_its_end() -> None:
    """With nothing left in the log, whoever holds all of it continues; others bootstrap."""
    view = replace(VIEW, first=26)
    assert told(plan_join(hello(25, E1, E2, E3), view)) == "continue 3001:25"
    assert told(plan_join(hello(24, E1, E2, E3), view)) == "bootstrap trimmed 26"


def test_who_is_no_primary_yet_says_so() -> None:
    """Without an epoch there is no answer but to come again, even to a higher promise."""
    refused = plan_join(hello(20, E1, E2, promised_epoch=9001), replace(VIEW, epoch=0))
    assert isinstance(refused, Refused)
    assert (refused.reason, refused.final, refused.primary_address) == ("starting", False, "a:1")


def test_equal_epochs_need_equal_checksums() -> None:
    """Where the tables agree and the bytes do not, the follower gets a new copy."""
    their = hello(20, E1, E2, running=7)
    plan = plan_join(their, VIEW)
    assert isinstance(plan, Continue)
    assert plan.protocol == PROTOCOL
    assert check_running(plan, their, 7, VIEW) is plan
    assert told(check_running(plan, their, 8, VIEW)) == "bootstrap checksum 5"


def test_a_new_follower_starts_at_zero() -> None:
    """The position before the first record is ZERO."""
    assert plan_join(new_store(), WHOLE) == Continue(at=ZERO, protocol=PROTOCOL)


@pytest.mark.parametrize(
    ("their", "lost"),
    [
        (hello(22, E1, E2, E3, committed=22), False),
        (hello(28, E1, (2002, 24), committed=26), True),
        (hello(28, E1, (2002, 24), committed=9), False),
        (hello(28, E1, (2002, 24), committed=26, branch=b"A"), False),
    ],
)
def test_a_loss_of_our_own_is_not_passed_on(their: Hello, lost: bool) -> None:
    """What a follower knows as committed and we lack, in the same branch, we have lost."""
    refused = check_loss(their, VIEW)
    assert (refused is not None) is lost
    if refused is not None:
        assert refused.reason == "unfenced"
        assert "it lost data" in refused.message


def test_who_becomes_a_voter() -> None:
    """Named, willing, not removed by hand; one that is known may have moved, or count again."""
    rule = Configuration(acks=1).with_voter(b"a", "a", "a:1")
    new = voter_change(hello(0, address="b:1"), rule)
    assert new is not None
    assert [(v.name, v.member, v.address) for v in new.voters] == [("a", 1, "a:1"), ("b", 2, "b:1")]
    assert voter_change(hello(0, address="b:1"), new) is None
    assert voter_change(hello(0), new) is None, "it does not say where it is"
    moved = voter_change(hello(0, address="b:2"), new)
    assert moved is not None
    assert moved.need("b").address == "b:2"
    back = voter_change(hello(0, address="b:1"), new.without([b"b"], 5))
    assert back is not None
    assert not back.away
    for declined in (hello(0, voter=False), hello(0, name="")):
        assert voter_change(declined, rule) is None
    assert voter_change(hello(0), new.without_voter(b"b")) is None
    with pytest.raises(ValueError, match="already"):
        voter_change(hello(0, name="a"), rule)
