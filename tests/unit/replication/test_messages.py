"""What the messages say of themselves."""

from __future__ import annotations

import pytest

from kvrep.replication.messages import PROTOCOL, PROTOCOL_MIN, Refused

FINAL = ("lineage", "protocol", "self", "bad-hello", "auth")
PASSING = ("not-primary", "superseded", "starting", "full", "closing", "unfenced")


@pytest.mark.parametrize("reason", [*FINAL, *PASSING])
def test_some_refusals_are_final(reason: str) -> None:
    """Only what nobody but an operator can change ends the attempts."""
    assert Refused(reason=reason, message="").final == (reason in FINAL)


def test_the_protocol_range_is_one() -> None:
    """The oldest version spoken is not above the newest."""
    assert 1 <= PROTOCOL_MIN <= PROTOCOL
