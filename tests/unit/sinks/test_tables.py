"""Tables are described in one line, and the description means what it says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvrep
from kvrep.codecs import BYTES, JSON, MSGPACK, TEXT
from kvrep.sinks.tables import Table, by_keyspace, parse_table, table_name, table_of


def test_descriptions() -> None:
    """Codecs, columns with types that hold commas, and text keys are understood."""
    assert parse_table("raw=bytes") == ("raw", Table())
    assert parse_table("notes=text") == ("notes", Table(TEXT))
    assert parse_table("docs=json") == ("docs", Table(JSON))
    name, table = parse_table(
        "o-1_x=msgpack( key text , customer text, total numeric(10, 2),at timestamp with time zone)"
    )
    assert name == "o-1_x"
    assert table.codec is MSGPACK
    assert table.text_keys
    assert table.types == {
        "key": "text", "customer": "text", "total": "numeric(10, 2)", "at": "timestamp with time zone",
    }  # fmt: skip
    assert parse_table("x=bytes(key text)") == ("x", Table(BYTES, text_keys=True))


@pytest.mark.parametrize(
    "table",
    [Table(), Table(TEXT), Table(JSON), Table(BYTES, text_keys=True), Table(MSGPACK, text_keys=True),
     Table(JSON, {"customer": "text", "total": "numeric(10, 2)"}, text_keys=True)],
)  # fmt: skip
def test_a_mapping_can_be_written_down(table: Table) -> None:
    """What is written down of a table makes the same table again."""
    assert table_of(json.loads(json.dumps(table.describe()))) == table


@pytest.mark.parametrize(
    "text",
    ["", "orders", "orders=", "orders=xml", "Orders=json", "o=json(a)", "o=json(a text; drop table x)",
     "o=json(a text", "o=json(key integer)", "o=bytes(a text)", 'o=json("a" text)', "o=json(a text -- b)"],
)  # fmt: skip
def test_what_is_no_description(text: str) -> None:
    """Anything else is refused by an error that shows it."""
    with pytest.raises(kvrep.ConfigurationMismatch):
        parse_table(text)


def test_columns_are_checked_in_the_library_too() -> None:
    """A table made in code cannot smuggle SQL into a statement either."""
    for columns in ({"a b": "text"}, {"a": "text, b text"}, {"key": "text"}, {'a"': "text"}, {"": "text"}):
        with pytest.raises(kvrep.ConfigurationMismatch):
            Table(JSON, columns)


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=64))
def test_names_of_tables_fit_and_differ(keyspace: str) -> None:
    """Every keyspace has a table name of at most 48 bytes that no other one has."""
    name = table_name(keyspace)
    assert len(name) <= 48
    assert name == keyspace or ("~" in name and len(keyspace) > 48)
    if len(keyspace) < 64:
        assert table_name(keyspace + "x") != name


def test_the_last_operation_on_each_key_is_left() -> None:
    """Operations are grouped by keyspace; of each key the last one stays, with its index."""
    ops = [("a", b"1", b"x"), ("b", b"1", b"y"), ("a", b"1", None), ("a", b"2", b"z")]
    assert by_keyspace(ops) == {
        "a": {b"1": (2, ops[2]), b"2": (3, ops[3])},
        "b": {b"1": (1, ops[1])},
    }
    assert by_keyspace([]) == {}


numbers = st.integers(-(2**63), 2**64 - 1)
values = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.floats(),
    st.text(max_size=5),
    st.lists(numbers, max_size=2),
    st.binary(max_size=3),
)


@given(values, values, values)
def test_any_value_becomes_a_row_or_is_rejected(a: object, b: object, c: object) -> None:
    """Whatever was stored, a row of text, bytes and nulls comes out, or a RejectedChange that names the key."""
    table = Table(MSGPACK, {"a": "text", "b": "jsonb", "c": "bytea"})
    data = MSGPACK.encode({"a": a, "b": b, "c": c})
    if c is not None and not isinstance(c, bytes):
        with pytest.raises(kvrep.RejectedChange) as caught:
            table.row(7, ("o", b"k", data))
        assert (caught.value.index, caught.value.keyspace, caught.value.key) == (7, "o", b"k")
        return
    try:
        row = table.row(7, ("o", b"k", data))
    except kvrep.RejectedChange:
        return
    assert row[0] == b"k"
    assert all(field is None or isinstance(field, (str, bytes)) for field in row)
