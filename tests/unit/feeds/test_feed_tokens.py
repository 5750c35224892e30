"""Tokens: what they say comes back whole, and nothing else is taken for one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvrep
from kvrep.model.position import ZERO, EpochTable, Position
from kvrep.model.token import WHOLE, Scan, Token

EPOCHS = EpochTable([(1001, 1), (2002, 50), (3001, 70)])
TOKENS = [
    Token(b"l" * 16, b"b" * 8, Position(3001, 77), WHOLE, EPOCHS, (3001, 77, 0), None),
    Token(b"l" * 16, b"", Position(1001, 7), 3, EpochTable([(1001, 1)]), None, None),
    Token(b"", b"", ZERO, WHOLE, EpochTable(), None, None),
    Token(b"l" * 16, b"b" * 8, Position(3001, 77), WHOLE, EPOCHS, (1, 2, 3),
          Scan("users", b"\xff\x00k", 12345, Position(3001, 70))),
]  # fmt: skip

TOKEN_1 = "k1w0lAgpjEEGxsbGxsbGxsbGxsbGxsbGzECGJiYmJiYmJizQfSTf-Sks0D6QGSzQfSMpPNB9JNAZWldXNlcnPEAWsFzQfSRg"
STATE_1 = (
    "8aa776657273696f6e01a5746f6b656ed9606b3177306c4167706a454547787362477873624778736247787362477873"
    "62477a4543474a69596d4a69596d4a697a51665354662d536b733044365147537a5166534d70504e42394a4e415a576c"
    "64584e6c636e5045415773467a5166535267a56e656564734eaa67656e65726174696f6e03a6706175736564c3a96b65"
    "7973706163657391a57573657273a6707265666978c400a6746f70696373c0aa637265617465645f7573cf000660c123"
    "f86dcba861636b65645f757300"
)
RECORD_1 = (
    "cedda96ea2ce000000399501cd03e9cf000660c123f86dcb049392a764656661756c7494c4016bc40176c40178c09193"
    "a174c4016d81a161a1629400c001c4036f6c64"
)


@pytest.mark.parametrize("token", TOKENS)
def test_what_a_token_says_comes_back(token: Token) -> None:
    """Reading a token's text gives an equal token."""
    assert Token.parse(str(token)) == token


@pytest.mark.parametrize("token", TOKENS)
def test_every_changed_character_is_noticed(token: Token) -> None:
    """A token with one character changed, left out or added raises InvalidToken and nothing else."""
    text = str(token)
    others = "A_-z9=é"
    for i in range(len(text)):
        for made in (
            text[:i] + text[i + 1 :],
            *(text[:i] + c + text[i + 1 :] for c in others if c != text[i]),
        ):
            with pytest.raises(kvrep.InvalidToken):
                Token.parse(made)
        for c in others:
            with pytest.raises(kvrep.InvalidToken):
                Token.parse(text[:i] + c + text[i:])


@given(st.text(max_size=300))
def test_no_other_text_is_a_token(text: str) -> None:
    """Whatever text is given, only InvalidToken comes out."""
    for made in (text, "k1" + text):
        with pytest.raises(kvrep.InvalidToken):
            Token.parse(made)


def test_a_body_with_a_right_checksum_and_wrong_contents_is_no_token() -> None:
    """Even what carries a fitting checksum is looked at item by item."""
    import base64
    from zlib import crc32

    import msgpack

    chance = random.Random(5)
    good = [b"l" * 16, b"b" * 8, 3001, 77, -1, [[1001, 1]], None, None]
    bad = [None, -2, 2**64 - 1, "x", b"", [], [[1]], {}, 1.5, [[2, 2], [1, 1]], [1, 2], ["a", b"", 1, 2]]
    for _ in range(3000):
        body = list(good)
        body[chance.randrange(len(body))] = chance.choice(bad)
        if chance.random() < 0.1:
            del body[chance.randrange(len(body))]
        packed = msgpack.packb(body)
        data = crc32(packed).to_bytes(4, "big") + packed
        text = "k1" + base64.urlsafe_b64encode(data).rstrip(b"=").decode()
        try:
            token = Token.parse(text)
        except kvrep.InvalidToken:
            continue
        assert str(Token.parse(str(token))) == str(token)


def test_a_wrong_type_is_a_type_error() -> None:
    """Bytes or numbers are not quietly taken for text."""
    with pytest.raises(TypeError):
        Token.parse(b"k1")  # type: ignore[arg-type]


def test_what_is_stored_can_be_read_for_ever() -> None:
    """A token, a feed's state and a noted record as this version writes them: later ones must read them."""
    from kvrep.model.codec import decode
    from kvrep.model.feed_state import FeedState
    from kvrep.model.record import Kind, messages_in

    token = Token(
        b"l" * 16, b"b" * 8, Position(2002, 77), WHOLE, EpochTable([(1001, 1), (2002, 50)]), (2002, 77, 1),
        Scan("users", b"k", 5, Position(2002, 70)),
    )  # fmt: skip
    assert Token.parse(TOKEN_1) == token
    assert str(token) == TOKEN_1
    state = FeedState.unpack(bytes.fromhex(STATE_1))
    assert (state.token, state.needs, state.keyspaces, state.paused) == (TOKEN_1, 78, ("users",), True)
    assert state.pack().hex() == STATE_1
    (record,), _ = decode(bytes.fromhex(RECORD_1), 1, 0)
    assert record.kind == Kind.NOTED
    assert record.ops() == [("default", b"k", b"v"), ("default", b"x", None)]
    assert messages_in(record.kind, record.payload) == [["t", b"m", {"a": "b"}]]
