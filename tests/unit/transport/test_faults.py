"""Errors on their way to a peer: the same class there, and nothing a peer could misuse."""

import logging

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep import errors
from kvrep.errors import Error, ProtocolError, ReplicationError, UnsafePromotion
from kvrep.model.codec import ChainBroken
from kvrep.model.position import Position
from kvrep.transport.faults import FAULT_BYTES_MAX, FaultLog, decode_fault, encode_fault


@pytest.mark.parametrize("name", errors.__all__)
def test_every_class_travels(name: str) -> None:
    """Each error class comes back as itself with message, hint and fields."""
    error: Error = getattr(errors, name)("text", hint="hint", position=Position(1001, 2), count=3)
    again = decode_fault(encode_fault(error))
    assert type(again) is type(error)
    assert (again.message, again.hint, again.fields) == ("text", "hint", error.fields)
    assert isinstance(again.fields["position"], Position)


def test_subclasses_arrive_as_their_parent() -> None:
    """A class that the peer may not have arrives as the nearest public one."""
    again = decode_fault(encode_fault(ChainBroken("broken", at=1, offset=2)))
    assert type(again) is ProtocolError
    assert again.fields == {"at": 1, "offset": 2}


def test_sequences_come_back_as_tuples() -> None:
    """Fields that are tuples stay tuples."""
    again = decode_fault(encode_fault(UnsafePromotion("no", missing=("a", "b"), needed=2)))
    assert isinstance(again, UnsafePromotion)
    assert again.missing == ("a", "b")


@pytest.mark.parametrize(
    "value", [2**70, object(), "x" * 9000, {1: 2}, "\ud800", b"y" * 9000, [[[]]], float("nan")]
)
def test_odd_fields_do_not_stop_an_error(value: object) -> None:
    """Whatever a field holds, the error gets through within the size limit."""
    encoded = encode_fault(ProtocolError("text \ud800", odd=value))
    assert len(encoded) <= FAULT_BYTES_MAX
    assert type(decode_fault(encoded)) is ProtocolError


@pytest.mark.parametrize(
    "field", ["args", "__class__", "with_traceback", "fields", "message", "hint", "self", "A b", ""]
)
def test_dangerous_fields_are_dropped(field: str) -> None:
    """A peer cannot replace what an exception is made of."""
    encoded = msgpack.packb(["Fenced", "text", "", {field: "x", "epoch": 5}])
    again = decode_fault(encoded)
    assert again.fields == {"epoch": 5}
    assert again.message == "text"


@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    """Arbitrary bytes are some kvrep error, never another exception."""
    assert isinstance(decode_fault(data), Error)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.lists(values, max_size=5) | values)
def test_well_formed_noise(value: object) -> None:
    """Well-formed msgpack of another shape is some kvrep error, too."""
    try:
        data = msgpack.packb(value)
    except UnicodeEncodeError:
        return
    assert isinstance(decode_fault(data), Error)


def test_log_is_rate_limited(caplog: pytest.LogCaptureFixture) -> None:
    """One traceback per interval and place; the next line says how many were held back."""
    now = [0.0]
    log = FaultLog("node", interval_s=10, clock=lambda: now[0])
    with caplog.at_level(logging.ERROR, "kvrep.transport"):
        for _ in range(3):
            assert type(log.known("call", RuntimeError("boom"))) is ReplicationError
        log.known("scan", RuntimeError("other"))
        now[0] = 11
        log.known("call", RuntimeError("boom"))
    assert len(caplog.records) == 3
    assert caplog.records[2].getMessage() == ("node: call failed (2 more since the last such line)")


def test_own_errors_pass_unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """A kvrep error is an answer, not a bug."""
    error = ProtocolError("no")
    assert FaultLog("node").known("call", error) is error
    assert not caplog.records
