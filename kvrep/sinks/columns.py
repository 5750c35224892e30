"""The tables of a warehouse as Arrow sees them: their columns, and rows as record batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any

import pyarrow as pa

from kvrep.errors import ConfigurationMismatch, RejectedChange
from kvrep.model.record import Op
from kvrep.sinks.tables import Table

__all__ = ["CLEAR", "DELETE", "HISTORY", "LETTERS", "PUT", "STAGED", "Shown", "batches_of"]

PUT, DELETE, CLEAR = "put", "delete", "clear"
"""What a row of the history says: put, delete; or that the rows after it replace everything before it."""

_TIME = pa.timestamp("us", tz="UTC")
HISTORY = pa.schema([
    ("number", pa.int64()), ("op", pa.string()), ("keyspace", pa.string()), ("key", pa.binary()),
    ("value", pa.binary()), ("snapshot", pa.bool_()), ("epoch", pa.int64()), ("log_offset", pa.int64()),
    ("log_index", pa.int64()), ("committed_at", _TIME),
])  # fmt: skip
STAGED = HISTORY.append(pa.field("batch", pa.string()))
LETTERS = pa.schema([
    ("batch", pa.string()), ("number", pa.int64()), ("position", pa.string()), ("keyspace", pa.string()),
    ("key", pa.binary()), ("value", pa.binary()), ("raw", pa.binary()), ("reason", pa.string()),
    ("put_aside_at", _TIME),
])  # fmt: skip
_FROM = {
    "kvrep_number": "number",
    "kvrep_epoch": "epoch",
    "kvrep_offset": "log_offset",
    "kvrep_time": "committed_at",
}
"""What a row of the current state tells of the change that made it, by the columns of the history."""

BATCH_ROWS, BATCH_BYTES = 4096, 2 << 20

_KIND = re.compile(r"([a-z][a-z0-9_ ]*?)\s*(?:\(\s*(\d+)(?:\s*,\s*(\d+))?\s*\))?")
_ALIASES = {
    "int": "integer", "int4": "integer", "int8": "bigint", "int2": "smallint", "bool": "boolean",
    "float4": "real", "float8": "double precision", "double": "double precision", "float": "double precision",
    "decimal": "numeric", "varchar": "text", "char": "text", "character": "text", "character varying": "text",
    "string": "text", "json": "text", "jsonb": "text", "blob": "bytea", "timestamptz": "timestamp",
    "timestamp with time zone": "timestamp", "timestamp without time zone": "timestamp",
}  # fmt: skip
Convert = Callable[[Any], Any]


def _whole(bits: int) -> Convert:
    def convert(text: str) -> int:
        number = int(text)
        if not -(1 << bits - 1) <= number < 1 << bits - 1:
            raise ValueError(f"{text} is out of the range of {bits} bits")
        return number

    return convert


def _decimal(precision: int, scale: int) -> Convert:
    step, context = Decimal(1).scaleb(-scale), Context(prec=precision + 40)

    def convert(text: str) -> Decimal:
        number = Decimal(text)
        if not number.is_finite() or number.adjusted() > precision:
            raise ValueError(f"{text} does not fit numeric({precision},{scale})")
        number = number.quantize(step, ROUND_HALF_UP, context)
        if number.copy_abs() >= Decimal(10) ** (precision - scale):
            raise ValueError(f"{text} does not fit numeric({precision},{scale})")
        return number

    return convert


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


def _moment(text: str) -> datetime:
    """Times without a zone are taken as UTC."""
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _same(value: Any) -> Any:
    return value


_KINDS: dict[str, tuple[pa.DataType, Convert]] = {
    "text": (pa.string(), _same),
    "bytea": (pa.binary(), _same),
    "boolean": (pa.bool_(), _boolean),
    "smallint": (pa.int16(), _whole(16)),
    "integer": (pa.int32(), _whole(32)),
    "bigint": (pa.int64(), _whole(64)),
    "real": (pa.float32(), float),
    "double precision": (pa.float64(), float),
    "date": (pa.date32(), date.fromisoformat),
    "timestamp": (_TIME, _moment),
}


def _kind(column: str, sql: str) -> tuple[pa.DataType, Convert]:
    """How a column of an SQL type is stored, and made from what :meth:`Table.row` gives."""
    found = _KIND.fullmatch(" ".join(sql.lower().split()))
    name = "" if found is None else _ALIASES.get(found[1], found[1])
    if found is not None and name == "numeric" and found[2]:
        precision, scale = int(found[2]), int(found[3] or 0)
        if 1 <= precision <= 38 and scale <= precision:
            return pa.decimal128(precision, scale), _decimal(precision, scale)
    if name in _KINDS:
        return _KINDS[name]
    raise ConfigurationMismatch(
        f"column {column}: a warehouse has no type {sql!r}", option="table", given=sql,
        hint=f"known are {', '.join(_KINDS)} and numeric(precision up to 38, scale)",
    )  # fmt: skip


class Shown:
    """How a keyspace is shown in its table of the current state."""

    def __init__(self, keyspace: str, table: Table) -> None:
        self._keyspace, self.table = keyspace, table
        kinds = {column: _kind(column, sql) for column, sql in table.types.items()}
        self._converts = [convert for _, convert in kinds.values()]
        self.columns = list(kinds)
        names = [name.lower() for name in [*self.columns, *_FROM]]
        if len(set(names)) < len(names):
            raise ConfigurationMismatch(
                f"{keyspace}: two columns have the same name", option="table", given=self.columns,
                hint=f"upper and lower case are the same here, and {', '.join(_FROM)} are taken",
            )  # fmt: skip
        fields = [pa.field(column, kind) for column, (kind, _) in kinds.items()]
        self.schema = pa.schema(
            [*fields, *(pa.field(name, HISTORY.field(origin).type) for name, origin in _FROM.items())]
        )

    def check(self, index: int, op: Op) -> None:
        """:class:`RejectedChange` for one that has no place in the table."""
        if self.table.plain:
            return
        keyspace, key, value = op
        if value is not None:
            self._row(index, op)
            return
        try:
            self.table.key(key)
        except UnicodeDecodeError as error:
            raise RejectedChange(
                f"{keyspace}: the key is no text", index=index, keyspace=keyspace, key=key
            ) from error

    def _row(self, index: int, op: Op) -> tuple[Any, ...]:
        fields = self.table.row(index, op)
        try:
            return tuple(
                None if field is None else convert(field)
                for convert, field in zip(self._converts, fields, strict=True)
            )
        except (ArithmeticError, ValueError) as error:
            raise RejectedChange(f"{op[0]}: {error}", index=index, keyspace=op[0], key=op[1]) from error

    def rows(self, puts: pa.RecordBatch) -> pa.RecordBatch:
        """Puts of the history as rows of the table."""
        if self.table.plain:
            columns = [puts.column("key"), puts.column("value")]
        else:
            pairs = zip(puts.column("key").to_pylist(), puts.column("value").to_pylist(), strict=True)
            rows = [self._row(0, (self._keyspace, key, value)) for key, value in pairs]
            columns = [
                pa.array([row[at] for row in rows], self.schema.field(at).type)
                for at in range(len(self.columns))
            ]
        columns += [puts.column(origin) for origin in _FROM.values()]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def keys(self, batch: pa.RecordBatch) -> list[bytes]:
        """The keys of rows of the table, as the store has them."""
        keys: list[Any] = batch.column("key").to_pylist()
        return [key.encode() for key in keys] if self.table.text_keys else keys


def batches_of(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows as batches of a bounded length and size."""
    for start in range(0, len(rows), BATCH_ROWS):
        columns = zip(*rows[start : start + BATCH_ROWS], strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        length = max(1, batch.num_rows * BATCH_BYTES // max(BATCH_BYTES, batch.nbytes))
        for at in range(0, batch.num_rows, length):
            yield batch.slice(at, length)
