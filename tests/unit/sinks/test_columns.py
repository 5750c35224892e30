"""What the tables of a warehouse look like, and which values fit into them."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

import kvrep
from kvrep.codecs import JSON, MSGPACK, TEXT
from kvrep.sinks.tables import Table, parse_table, table_of
from tests.warehouse_kit import need_warehouse

need_warehouse()

from kvrep.sinks.columns import HISTORY, Shown, batches_of  # noqa: E402


def shown(kind: str, value: Any) -> Any:
    """What stands in a column of an SQL type for a field of this value."""
    table = Shown("x", Table(MSGPACK, {"c": kind}))
    op = ("x", b"k", MSGPACK.encode({"c": value}))
    table.check(0, op)
    rows = [(1, "put", "x", b"k", op[2], False, 1, 2, 3, None)]
    (batch,) = batches_of(rows, HISTORY)
    return table.rows(batch).column("c").to_pylist()[0]


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        ("text", "x", "x"), ("varchar(20)", 5, "5"), ("TEXT", None, None), ("jsonb", [1], "[1]"),
        ("json", None, "null"), ("int", 5, 5), ("integer", "-5", -5), ("bigint", 1 << 62, 1 << 62),
        ("smallint", -32768, -32768), ("numeric(5,2)", 1.005, Decimal("1.01")), ("numeric(3)", "2.5", Decimal(3)),
        ("numeric(38,0)", "9" * 38, Decimal("9" * 38)), ("real", 0.5, 0.5), ("double precision", "1e300", 1e300),
        ("boolean", True, True), ("bool", "false", False), ("date", "2026-02-28", date(2026, 2, 28)),
        ("timestamp", "2026-02-28 01:02:03", datetime(2026, 2, 28, 1, 2, 3, tzinfo=UTC)),
        ("timestamp with time zone", "2026-02-28T01:02:03-01:00", datetime(2026, 2, 28, 2, 2, 3, tzinfo=UTC)),
        ("bytea", b"\0", b"\0"),
    ],
)  # fmt: skip
def test_values_that_fit(kind: str, value: Any, found: Any) -> None:
    """A field of a value stands in its column as what the SQL type means."""
    assert shown(kind, value) == found


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("integer", 1 << 31), ("integer", 1.5),
        ("integer", True), ("bigint", "-9223372036854775809"), ("smallint", "x"),
        ("numeric(5,2)", 1000), ("numeric(5,2)", 999.999), ("numeric(5,2)", "nan"), ("numeric(5,2)", "1e999999"),
        ("boolean", "yes"), ("date", "28.2.2026"), ("timestamp", "x"), ("real", "x"), ("bytea", "x"),
        ("text", b"x"), ("text", "a\0b"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(kind: str, value: Any) -> None:
    """A value that has no place in its column is rejected by name, not cut or changed."""
    with pytest.raises(kvrep.RejectedChange, match="x: "):
        shown(kind, value)


@pytest.mark.parametrize("kind", ["numeric", "numeric(39,0)", "numeric(3,5)", "interval", "point"])
def test_types_that_a_warehouse_does_not_have(kind: str) -> None:
    """A type that cannot be stored is refused at once, with those that can."""
    with pytest.raises(kvrep.ConfigurationMismatch, match="known are text"):
        Shown("x", Table(JSON, {"c": kind}))


@pytest.mark.parametrize("columns", [{"Key": "text"}, {"a": "text", "A": "text"}, {"kvrep_time": "text"}])
def test_columns_with_one_name(columns: dict[str, str]) -> None:
    """Names that readers cannot tell apart, and those that are taken, are refused at once."""
    with pytest.raises(kvrep.ConfigurationMismatch, match="same name"):
        Shown("x", Table(JSON, columns))


@pytest.mark.parametrize(
    "text", ["a=bytes", "a=text", "a=json(key text)", "a=msgpack(key text, n numeric(10, 2), t jsonb)"]
)
def test_a_mapping_is_read_back(text: str) -> None:
    """What a table says of itself leads to the same table; a codec of the user's own has to be given again."""
    table = parse_table(text)[1]
    assert table_of(table.describe()) == table
    with pytest.raises(kvrep.ConfigurationMismatch, match="'own'"):
        table_of({**Table(TEXT).describe(), "codec": "own"})


def test_batches_have_a_bounded_size() -> None:
    """Many rows, and rows with large values, come in several batches, with all of them in order."""
    large = [(i, "put", "x", b"k", b"v" * (1 << 20), False, 1, 2, 3, None) for i in range(5)]
    batches = list(batches_of(large, HISTORY))
    assert len(batches) == 5
    assert [n for batch in batches for n in batch.column("number").to_pylist()] == list(range(5))
    rows = [(i, "put", "x", b"k", b"v", False, 1, 2, 3, None) for i in range(10_000)]
    batches = list(batches_of(rows, HISTORY))
    assert [batch.num_rows for batch in batches] == [4096, 4096, 1808]
    assert [n for batch in batches for n in batch.column("number").to_pylist()] == list(range(10_000))
    assert list(batches_of([], HISTORY)) == []
