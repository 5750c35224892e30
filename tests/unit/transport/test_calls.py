"""Calls and scans as bytes."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrep.errors import ProtocolError
from kvrep.transport import calls

DECODERS = [calls.decode_call, calls.decode_request, calls.decode_answer, calls.decode_scan_chunk]
decoders = pytest.mark.parametrize("decode", DECODERS)


@decoders
@given(data=st.binary(max_size=200))
def test_noise(decode: Any, data: bytes) -> None:
    """Arbitrary bytes raise nothing but ProtocolError."""
    try:
        decode(data)
    except ProtocolError:
        pass


@given(st.lists(st.tuples(st.binary(), st.binary())))
def test_scan_chunk_round_trip(pairs: list[tuple[bytes, bytes]]) -> None:
    """A chunk comes back as the list of pairs it was."""
    assert calls.decode_scan_chunk(calls.encode_scan_chunk(pairs)) == pairs


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["m"],
        ["m", {}, 1],
        [1, {}],
        ["m" * 65, {}],
        ["m", []],
        ["m", {b"k": 1}],
        ["m", {"k": msgpack.ExtType(1, b"x")}],
        ["m", {"k": msgpack.Timestamp(1, 1)}],
    ],
)
def test_bad_calls(value: object) -> None:
    """A call is a short method name and a map with text keys; msgpack extensions are refused."""
    with pytest.raises(ProtocolError):
        calls.decode_call(msgpack.packb(value))


@pytest.mark.parametrize("value", [{}, [b"k"], [b"k", "v"], [b"k", None], [1, b"v"], None])
def test_bad_scan_chunks(value: object) -> None:
    """A chunk holds keys and values in turn, all bytes."""
    with pytest.raises(ProtocolError):
        calls.decode_scan_chunk(msgpack.packb(value))


@decoders
def test_deep_nesting(decode: Any) -> None:
    """Nesting deeper than any stack is refused."""
    with pytest.raises(ProtocolError):
        decode(b"\x91" * 100_000 + b"\xc0")
