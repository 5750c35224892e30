"""Addresses as users write them."""

import pytest

from kvrep.transport.address import Address


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:7400", "127.0.0.1", 7400, True),
        ("localhost:1", "localhost", 1, True),
        ("[::1]:7400", "::1", 7400, True),
        ("[fe80::2]:65535", "fe80::2", 65535, False),
        ("host-a.example:7400", "host-a.example", 7400, False),
        ("my_service:7400", "my_service", 7400, False),
        ("0.0.0.0:7400", "0.0.0.0", 7400, False),
        ("10.1.2.3:7400", "10.1.2.3", 7400, False),
    ],
)
def test_parse(text: str, host: str, port: int, loopback: bool) -> None:
    """An address is split, printed as it was written, and known to be local or not."""
    address = Address.parse(text)
    assert address == (host, port)
    assert str(address) == text
    assert address.loopback is loopback


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "h", "h:", "h:-1", "h:+1", "h:0", "h:65536", "h:1x", "h:٣", "h:1:2", "::1:7400"),
        *("[]:1", "[h]:1", "[1.2.3.4]:1", "a b:1", "h/x:1", "-h:1", "http://h:1", "h\n:1"),
        "x" * 254 + ":1",
    ],
)
def test_refused(text: str) -> None:
    """What is no address raises ValueError that says what was expected."""
    with pytest.raises(ValueError, match='expected "host:port"'):
        Address.parse(text)


def test_wrong_type() -> None:
    """Something else than text is a TypeError that names the type."""
    with pytest.raises(TypeError, match="bytes"):
        Address.parse(b"h:1")  # type: ignore[arg-type]
