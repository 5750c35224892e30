"""How a keyspace becomes a table: names, columns, and rows out of values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvrep import codecs
from kvrep.codecs import BYTES, Codec
from kvrep.errors import ConfigurationMismatch, RejectedChange
from kvrep.model.record import Op

__all__ = ["Table", "by_keyspace", "parse_table", "table_name", "table_of"]

NAME_BYTES_MAX = 48
"""Leaves room for the suffix of a staged table below PostgreSQL's 63."""

_CODECS: dict[str, Codec[Any]] = {
    codec.name: codec for codec in (codecs.BYTES, codecs.TEXT, codecs.JSON, codecs.MSGPACK)
}
_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,62}"
_TYPE = r"[A-Za-z][A-Za-z0-9_ ]*(?:\(\s*\d+(?:\s*,\s*\d+)?\s*\))?"
_COLUMN = re.compile(rf"({_NAME})\s+({_TYPE})")
_TABLE = re.compile(r"([a-z0-9_-]{1,64})=(\w+)\s*(?:\((.*)\))?", re.DOTALL)
_WHOLE = {"bytes": "bytea", "text": "text", "json": "jsonb", "msgpack": "jsonb"}


def table_name(keyspace: str) -> str:
    """The table of a keyspace: its name, shortened with a checksum where a database would cut it."""
    if len(keyspace) <= NAME_BYTES_MAX:
        return keyspace
    return f"{keyspace[:36]}~{hashlib.blake2b(keyspace.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Table:
    """How one keyspace is shown as a table; the default keeps keys and values as bytes.

    ``Table(JSON)`` keeps the decoded value in one column; ``Table(JSON, {"customer": "text", "total":
    "numeric"})`` takes fields of the value into columns of these SQL types (a missing field is null).
    ``text_keys`` shows keys as text. A value that does not fit is a :class:`RejectedChange`.
    """

    codec: Codec[Any] = BYTES
    columns: Mapping[str, str] = field(default_factory=dict)
    text_keys: bool = False

    def __post_init__(self) -> None:
        for name, kind in self.columns.items():
            if not re.fullmatch(_NAME, name) or not re.fullmatch(_TYPE, kind) or name == "key":
                raise ConfigurationMismatch(
                    f"{name} {kind!r} is not a column: a name other than key, and an SQL type",
                    option="table", given=name,
                )  # fmt: skip

    @property
    def plain(self) -> bool:
        """Whether keys and values stand there as the bytes they are."""
        return self.codec is BYTES and not self.columns and not self.text_keys

    @property
    def types(self) -> dict[str, str]:
        """Every column with its PostgreSQL type, the key first."""
        key = {"key": "text" if self.text_keys else "bytea"}
        return {**key, **(self.columns or {"value": _WHOLE.get(self.codec.name, "bytea")})}

    def describe(self) -> dict[str, Any]:
        """As JSON takes it; :func:`table_of` reads it."""
        return {"codec": self.codec.name, "columns": dict(self.columns), "text_keys": self.text_keys}

    def row(self, index: int, op: Op) -> tuple[Any, ...]:
        """The columns of one put; bytes for ``bytea``, else text as SQL reads it."""
        keyspace, key, data = op
        assert data is not None
        try:
            value = self.codec.decode(data)
            if self.columns:
                if not isinstance(value, Mapping):
                    raise TypeError(f"the value is {type(value).__name__}, and columns need a map")
                fields = [_sql(value.get(name), kind) for name, kind in self.columns.items()]
            else:
                fields = [_sql(value, self.types["value"])]
            return (self.key(key), *fields)
        except Exception as error:  # a codec is the user's and may raise what it likes
            raise RejectedChange(
                f"{keyspace}: {type(error).__name__}: {error}", index=index, keyspace=keyspace, key=key
            ) from error

    def key(self, key: bytes) -> Any:
        """The key as its column takes it; ``UnicodeDecodeError`` for one that is no text."""
        return key.decode() if self.text_keys else key


def _sql(value: Any, kind: str) -> Any:
    """A value as a column of this type reads it."""
    kind = kind.lower()
    if kind in ("json", "jsonb"):
        return json.dumps(value, allow_nan=False)
    if value is None:
        return None
    if kind == "bytea":
        if not isinstance(value, bytes):
            raise TypeError(f"{type(value).__name__} does not fit a column of bytes")
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        raise TypeError(f"bytes do not fit a column of type {kind}")
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, allow_nan=False)
    text = str(value)
    if "\0" in text:
        raise ValueError("text with a NUL character fits no column")
    return text


def parse_table(text: str) -> tuple[str, Table]:
    """``orders=json(customer text, total numeric(10,2))``, ``notes=text``, ``raw=bytes``.

    A column ``key text`` shows keys as text. ``ConfigurationMismatch`` for anything else.
    """
    found = _TABLE.fullmatch(text.strip())
    codec = _CODECS.get(found[2]) if found else None
    if found is None or codec is None:
        raise _wrong(text, f"KEYSPACE=CODEC(COLUMN TYPE, …), the codec one of {', '.join(sorted(_CODECS))}")
    columns: dict[str, str] = {}
    for part in re.split(r",(?![^()]*\))", found[3] or ""):
        if not part.strip():
            continue
        column = _COLUMN.fullmatch(part.strip())
        if column is None:
            raise _wrong(text, f"{part.strip()!r} is not a column name and an SQL type")
        columns[column[1]] = column[2].strip()
    key = columns.pop("key", "bytea")
    if key not in ("bytea", "text"):
        raise _wrong(text, "the key is bytea or text")
    if columns and codec is BYTES:
        raise _wrong(text, "values of bytes have no fields to make columns of")
    return found[1], Table(codec, columns, text_keys=key == "text")


def table_of(described: Mapping[str, Any]) -> Table:
    """The table that :meth:`Table.describe` was asked of; ``ConfigurationMismatch`` for a codec of the user's own."""
    codec = _CODECS.get(described["codec"])
    if codec is None:
        raise ConfigurationMismatch(
            f"a table was made with the codec {described['codec']!r}, which is not known here", option="table",
            given=described, hint="give the same tables as before",
        )  # fmt: skip
    return Table(codec, described["columns"], text_keys=described["text_keys"])


def _wrong(text: str, wanted: str) -> ConfigurationMismatch:
    return ConfigurationMismatch(f"table {text!r} is not understood: {wanted}", option="table", given=text)


def by_keyspace(ops: Iterable[Op]) -> dict[str, dict[bytes, tuple[int, Op]]]:
    """The last operation on each key, with its index, by keyspace: what is left after all of ``ops``."""
    spaces: dict[str, dict[bytes, tuple[int, Op]]] = {}
    for index, op in enumerate(ops):
        space = spaces.get(op[0])
        if space is None:
            space = spaces[op[0]] = {}
        space[op[1]] = (index, op)
    return spaces
