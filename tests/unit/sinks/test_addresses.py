"""An address says which secondary or source is meant; a place in a file survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.sinks.addresses import is_broker, sink_at, source_at, upstream_at
from kvrep.sinks.cursor import FileCursor
from kvrep.sinks.tables import Table
from tests.warehouse_kit import need_warehouse


@pytest.mark.parametrize(
    ("address", "kind", "url"),
    [
        ("sqlite:x.db", "SqliteSink", "sqlite:x.db"),
        ("sqlite:///a/x.db", "SqliteSink", "sqlite:/a/x.db"),
        ("delta:folder/x?commit_s=1", "WarehouseSink", "delta:folder/x"),
        ("delta:///a/x/", "WarehouseSink", "delta:/a/x"),
        ("delta+s3://bucket/x", "WarehouseSink", "delta+s3://bucket/x"),
        ("kvrep:folder/x", "StoreSink", "kvrep:folder/x"),
        ("kvrep://host:7400", "StoreSink", "kvrep://host:7400"),
        ("host:7400", "StoreSink", "kvrep://host:7400"),
        ("kvrep://h1:7400,h2:7400", "StoreSink", "kvrep://h1:7400,h2:7400"),
        ("./folder", "StoreSink", "kvrep:./folder"),
    ],
)
def test_secondaries(address: str, kind: str, url: str) -> None:
    """Each form leads to its kind of secondary, under a name without secrets; nothing is opened yet."""
    if kind == "WarehouseSink":
        need_warehouse()
    sink = sink_at(address)
    assert type(sink).__name__ == kind
    assert sink.url == url


def test_postgres_addresses_hide_the_password() -> None:
    """The name shown is without the password and options, whatever is in them."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    for scheme in ("postgresql", "postgres"):
        sink = sink_at(f"{scheme}://u:p%40ss@h1,h2:5433/db?schema=x&sslmode=require")
        assert sink.url == "postgresql://u@h1,h2:5433/db"


@pytest.mark.parametrize(
    ("address", "url", "wanted"),
    [
        ("u:p%40ss@[::1]:5433,[fe80::1]/db?schema=x&sslmode=require", "u@[::1]:5433,[fe80::1]/db",
         {"host": "::1,fe80::1", "port": "5433,", "user": "u", "password": "p@ss", "dbname": "db",
          "sslmode": "require"}),
        ("h1,h2/db", "h1,h2/db", {"host": "h1,h2", "dbname": "db"}),
        ("/db?host=/run/pg", "/db", {"host": "/run/pg", "dbname": "db"}),
        ("%2Frun%2Fpg/db", "%2Frun%2Fpg/db", {"host": "/run/pg", "dbname": "db"}),
        ("u%40x@h", "u%40x@h", {"host": "h", "user": "u@x"}),
    ],
)  # fmt: skip
def test_postgres_addresses_as_libpq_gets_them(address: str, url: str, wanted: dict[str, str]) -> None:
    """Lists of hosts, IPv6, sockets and encoded names reach libpq; ``schema`` stays with us."""
    conninfo = pytest.importorskip("psycopg.conninfo", reason="psycopg is not installed")
    sink: Any = sink_at(f"postgresql://{address}")
    assert sink.url == f"postgresql://{url}"
    assert conninfo.conninfo_to_dict(sink._conninfo) == wanted


@pytest.mark.parametrize(
    "address", ["postgresql:///db?nonsense=1", "postgresql://h:p:secret/db", "postgresql:/x"]
)
def test_what_is_no_address_of_a_database(address: str) -> None:
    """A mangled address is refused at once, without showing what may be a password."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(kvrep.ConfigurationMismatch) as caught:
        sink_at(address)
    assert "secret" not in str(caught.value)


def test_brokers_are_known_by_their_scheme() -> None:
    """A broker's address is one by its scheme alone; a database's is not."""
    assert is_broker("amqp://h/x")
    assert is_broker("kafka://h:9092/x")
    assert is_broker("amqp+stream://h")
    for address in ("postgresql://h/x", "sqlite:x", "host:7400", "/a/path", "C:x", ""):
        assert not is_broker(address)


def test_what_is_not_understood_is_named() -> None:
    """Unknown schemes, tables where there are none, and selections at the wrong end are errors with a hint."""
    with pytest.raises(kvrep.OpenError, match="no secondary is known for gopher"):
        sink_at("gopher://x")
    with pytest.raises(kvrep.ConfigurationMismatch, match="PostgreSQL and SQLite"):
        sink_at("host:1", tables={"x": Table()})
    with pytest.raises(kvrep.OpenError, match="nothing to read"):
        upstream_at("postgresql://x/y")
    with pytest.raises(kvrep.ConfigurationMismatch, match="where it is published"):
        source_at("amqp://x/y", prefix=b"k")
    with pytest.raises(kvrep.OpenError):
        sink_at("kvrep:")


def test_a_place_in_a_file(tmp_path: Path) -> None:
    """What was saved last is loaded; no file is no place; a damaged one is an error, not a new beginning."""
    cursor = FileCursor(tmp_path / "new" / "place.json")
    assert cursor.load() == ""
    cursor.save("k1abc")
    cursor.save("k1def")
    assert FileCursor(tmp_path / "new" / "place.json").load() == "k1def"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["place.json"]
    for damage in ("", "{", "[]", '{"token": 5}', "{}"):
        (tmp_path / "new" / "place.json").write_text(damage)
        with pytest.raises(kvrep.NotAStore, match="move the file away"):
            cursor.load()
