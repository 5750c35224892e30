"""The rule of promises, as a table."""

from __future__ import annotations

import pytest

from kvrep.replication.promises import Verdict, judge


@pytest.mark.parametrize(
    ("epoch", "to", "verdict"),
    [
        (3001, b"a", Verdict.NEW),
        (2003, b"b", Verdict.NEW),
        (2002, b"b", Verdict.GIVEN_BEFORE),
        (2002, b"c", Verdict.REFUSED),
        (2002, b"", Verdict.REFUSED),
        (2001, b"b", Verdict.REFUSED),
        (0, b"b", Verdict.REFUSED),
    ],
)
def test_what_may_be_promised(epoch: int, to: bytes, verdict: Verdict) -> None:
    """Only a higher epoch is new; the same one goes to the same store only."""
    assert judge(epoch, to, promised=2002, promised_to=b"b") is verdict


def test_the_first_promise() -> None:
    """A node that has promised nothing may promise any epoch."""
    assert judge(1, b"a", promised=0, promised_to=b"") is Verdict.NEW
