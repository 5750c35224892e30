"""A secondary in PostgreSQL: ``postgresql://user@host:5432/database?schema=kvrep`` (needs ``kvrep[postgres]``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from typing import Any, ClassVar
from urllib.parse import unquote

from kvrep.brokers.url import BrokerUrl
from kvrep.errors import (
    AuthenticationFailed,
    ClosedError,
    ConfigurationMismatch,
    Error,
    OpenError,
    PeerUnavailable,
    PermissionDenied,
    StorageFull,
)
from kvrep.model.record import Op
from kvrep.options import KEY_BYTES_MAX
from kvrep.sinks.interface import Place
from kvrep.sinks.sql import LETTERS, PLACE, STAGED, TABLES, SqlSink, identifier
from kvrep.sinks.tables import Table, table_name

try:
    import psycopg
    from psycopg.conninfo import make_conninfo
except ImportError as missing:
    raise OpenError(
        "postgresql:// needs the package psycopg", hint='pip install "kvrep[postgres]"'
    ) from missing

__all__ = ["PostgresSink"]

log = logging.getLogger("kvrep.agent")

_KEYSPACE_OF, _VALUE_OF = itemgetter(0), itemgetter(2)

CONNECT_S = 10
SILENCE_MS = 30_000
"""How long sent bytes may stay unanswered before the connection counts as dead."""
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_END = b"\xff\xff"
_LENGTHS = [n.to_bytes(4, "big") for n in range(4096)]
_HEADS = [b"\0\2" + length for length in _LENGTHS[: KEY_BYTES_MAX + 1]]
"""Of a row with two columns: their number, and the length of the key."""


class PostgresSink(SqlSink):
    """Tables in one schema of a database. Snapshots go in by COPY, changes as one upsert for each batch."""

    rejecting = (
        psycopg.DataError,
        psycopg.IntegrityError,
        psycopg.errors.ProgramLimitExceeded,
        psycopg.errors.RaiseException,  # of a trigger: a rule of the user's, like a constraint
    )
    mark: ClassVar[str] = "%s"
    snapshot_batches, snapshot_bytes = 64, 8 << 20  # every commit waits for the server to come to its end

    def __init__(self, url: str, *, tables: Mapping[str, Table] | None = None) -> None:
        super().__init__(tables)
        self._conninfo, self._schema, self.url = _parsed(url)
        self._connection: psycopg.Connection[Any] | None = None
        self._copying: _Copying | None = None

    def open(self) -> Place:
        with self._connecting():
            self._make_tables()
            place = self._load_place()
            self._need().commit()
        return place

    def look(self) -> Place:
        with self._connecting():
            place = self._find_place()
            if place is None:
                raise self._nothing_there(f"in schema {self._schema!r} of {self.url}", self._other_schemas())
            self._need().commit()
        return place

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        """Connect anew; closed again if what is done first fails."""
        self.close()
        try:
            self._connection = psycopg.connect(
                self._conninfo,
                connect_timeout=CONNECT_S,
                application_name="kvrep agent",
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=SILENCE_MS,
            )
        except psycopg.OperationalError as error:
            raise _refused(error, self.url) from error
        try:
            with self._whole():
                yield
        except BaseException:
            self.close()
            raise

    def _other_schemas(self) -> str:
        """Where agents have been in this database, as a hint."""
        rows = self._run(
            "SELECT schemaname FROM pg_tables WHERE tablename = %s ORDER BY 1 LIMIT 10", (PLACE,)
        ).fetchall()
        names = ", ".join(name for (name,) in rows)
        return f"check ?schema= in the address: {names or 'no schema'} of that database has one"

    def _make_tables(self) -> None:
        found = self._run(
            "SELECT count(*) FROM pg_tables WHERE schemaname = %s AND tablename IN (%s, %s, %s)",
            (self._schema, PLACE, LETTERS, TABLES),
        ).fetchone()
        if found is not None and found[0] == 3:
            return
        self._run(f"CREATE SCHEMA IF NOT EXISTS {identifier(self._schema)}")
        self._run(
            f"CREATE TABLE IF NOT EXISTS {self._name(PLACE)} (id int PRIMARY KEY, version bigint NOT NULL,"
            ' lineage text NOT NULL, epoch bigint NOT NULL, "offset" bigint NOT NULL, "index" bigint NOT NULL,'
            " time_us bigint NOT NULL, token text NOT NULL, staging boolean NOT NULL, whole boolean NOT NULL)"
        )
        self._run(
            f"CREATE TABLE IF NOT EXISTS {self._name(LETTERS)} (number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
            " position text NOT NULL, keyspace text NOT NULL, key bytea NOT NULL, value bytea, raw bytea NOT NULL,"
            " reason text NOT NULL, time_us bigint NOT NULL)"
        )
        self._run(
            f"CREATE TABLE IF NOT EXISTS {self._name(TABLES)} (name text PRIMARY KEY, mapping text NOT NULL)"
        )

    def commit(self, place: Place) -> None:
        with self._whole():
            self._store_place(place)  # which ends a COPY first, as every statement does
            self._need().commit()
        self._version += 1

    def hold(self) -> Place:
        with self._errors():
            connection = self._need()
            connection.rollback()
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            return self._read_place() or Place()

    def rollback(self) -> None:
        self._known.clear()
        self._give_up_copy()
        connection = self._connection
        if connection is not None and not connection.broken:
            with self._errors():
                connection.rollback()

    def scan(self, keyspace: str) -> Iterator[tuple[object, object]]:
        with self._errors(), self._reading(), self._need().cursor(name="kvrep_scan", binary=True) as cursor:
            cursor.itersize = 1000
            cursor.execute(f"SELECT * FROM {self._name(table_name(keyspace))} ORDER BY key")
            for key, *rest in cursor:
                yield key, rest[0] if len(rest) == 1 else tuple(rest)

    def close(self) -> None:
        self._give_up_copy()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._known.clear()

    # -- for the base ------------------------------------------------------------------------------

    def _need(self) -> psycopg.Connection[Any]:
        if self._connection is None:
            raise ClosedError("the sink is not open")
        return self._connection

    def _begin(self) -> None:
        """psycopg begins by itself."""
        self._need()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        connection = self._need()
        before = connection.info.transaction_status
        try:
            yield
        finally:
            if before == psycopg.pq.TransactionStatus.IDLE and not connection.broken:
                connection.rollback()

    def _run(self, statement: str, parameters: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        if self._copying is not None:
            self._finish_copy()
        return self._need().execute(statement.encode(), parameters or None)

    def _name(self, table: str) -> str:
        return f"{identifier(self._schema)}.{identifier(table)}"

    def _exists(self, name: str) -> bool:
        found = self._run("SELECT to_regclass(%s)", (self._name(name),)).fetchone()
        return found is not None and found[0] is not None

    def _create(self, name: str, table: Table) -> None:
        if self._exists(name):
            return
        columns = ", ".join(
            f"{identifier(column)} {kind}{' PRIMARY KEY' if column == 'key' else ''}"
            for column, kind in table.types.items()
        )
        self._run(f"CREATE TABLE {self._name(name)} ({columns})")

    def _put(self, name: str, table: Table, rows: list[tuple[Any, ...]], *, fresh: bool) -> None:
        if fresh and not table.plain:
            self._copy(name, table, rows)
        else:
            self._upsert(name, table, rows)

    # -- snapshots: rows stream into one COPY while the next ones are read ---------------------------

    def stage(self, ops: Sequence[Op]) -> None:
        """Plain rows go straight into a COPY that stays open until something else is done."""
        spaces = set(map(_KEYSPACE_OF, ops))
        with self._errors():
            plain = all(self._table(keyspace).plain for keyspace in spaces)
        if not plain or None in map(_VALUE_OF, ops):
            super().stage(ops)
            return
        with self._errors():
            for keyspace in sorted(spaces):
                self._stream(keyspace, ops if len(spaces) == 1 else [op for op in ops if op[0] == keyspace])

    def _stream(self, keyspace: str, ops: Sequence[Op]) -> None:
        copying = self._copying
        if copying is None or copying.keyspace != keyspace:
            self._make(keyspace, STAGED)
            self._run("SAVEPOINT kvrep")
            name = self._name(table_name(keyspace) + STAGED)
            copying = self._copying = _Copying(self._need(), keyspace, name)
        try:
            copying.write(ops)
        except self.rejecting as error:
            self._copying = None
            self._go_the_long_way(copying, error)

    def _finish_copy(self) -> None:
        """End the COPY that is open, if one is. A key that was there already makes upserts of its rows."""
        copying, self._copying = self._copying, None
        if copying is None:
            return
        try:
            copying.finish()
        except self.rejecting as error:
            self._go_the_long_way(copying, error)
            return
        self._run("RELEASE SAVEPOINT kvrep")

    def _go_the_long_way(self, copying: _Copying, error: BaseException) -> None:
        copying.give_up(error)
        self._run("ROLLBACK TO SAVEPOINT kvrep")
        super().stage(copying.ops())

    def _give_up_copy(self) -> None:
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.give_up(ClosedError("rolled back"))

    # -- statements --------------------------------------------------------------------------------

    def _copy(self, name: str, table: Table, rows: list[tuple[Any, ...]]) -> None:
        columns = ", ".join(map(identifier, table.types))
        with self._need().cursor() as cursor:
            with cursor.copy(f"COPY {self._name(name)} ({columns}) FROM STDIN".encode()) as copy:
                for row in rows:
                    copy.write_row(row)

    def _upsert(self, name: str, table: Table, rows: list[tuple[Any, ...]]) -> None:
        """All rows in one statement, as one array for each column."""
        types = table.types
        arrays = ", ".join("%b::bytea[]" if kind == "bytea" else "%s::text[]" for kind in types.values())
        values = ", ".join(f"c{i}::{kind}" for i, kind in enumerate(types.values()))
        names = ", ".join(f"c{i}" for i in range(len(types)))
        updates = ", ".join(f"{identifier(c)} = excluded.{identifier(c)}" for c in types if c != "key")
        self._run(
            f"INSERT INTO {self._name(name)} ({', '.join(map(identifier, types))})"
            f" SELECT {values} FROM unnest({arrays}) AS rows ({names})"
            f" ON CONFLICT (key) DO UPDATE SET {updates}",
            [list(column) for column in zip(*rows, strict=True)],
        )

    def _delete(self, name: str, keys: list[Any], table: Table) -> None:
        array = "%s::text[]" if table.text_keys else "%b::bytea[]"
        self._run(f"DELETE FROM {self._name(name)} WHERE key = ANY({array})", [keys])

    def _merge(self, live: str, staged: str, columns: Sequence[str]) -> None:
        names = ", ".join(["key", *map(identifier, columns)])
        updates = ", ".join(f"{identifier(c)} = excluded.{identifier(c)}" for c in columns)
        mine = ", ".join(f"live.{identifier(c)}" for c in columns)
        new = ", ".join(f"excluded.{identifier(c)}" for c in columns)
        self._run(
            f"INSERT INTO {live} AS live ({names}) SELECT {names} FROM {staged}"
            f" ON CONFLICT (key) DO UPDATE SET {updates} WHERE ({mine}) IS DISTINCT FROM ({new})"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self.rejecting:
            raise
        except psycopg.Error as error:
            broken = self._connection is None or self._connection.broken
            raise _mapped(error, self.url, broken=broken) from error


class _Copying:
    """A COPY of plain rows under way, in PostgreSQL's binary format."""

    def __init__(self, connection: psycopg.Connection[Any], keyspace: str, table: str) -> None:
        self.keyspace = keyspace
        self._blocks: list[bytes] = []
        """All that was written, in case it has to be written in another way."""
        self._context = connection.cursor().copy(
            f"COPY {table} (key, value) FROM STDIN (FORMAT BINARY)".encode()
        )
        self._copy = self._context.__enter__()
        self._copy.write(COPY_HEADER)

    def write(self, ops: Sequence[Op]) -> None:
        """Puts of this keyspace, a few megabytes at the most."""
        block = _block_of(ops)
        self._blocks.append(block)
        self._copy.write(block)

    def ops(self) -> list[Op]:
        """All that was written."""
        return [op for block in self._blocks for op in _ops_of(block, self.keyspace)]

    def finish(self) -> None:
        """Return when the server has taken all of it."""
        self._copy.write(COPY_END)
        self._context.__exit__(None, None, None)

    def give_up(self, error: BaseException) -> None:
        """End it without effect."""
        try:
            self._context.__exit__(type(error), error, None)
        except Exception as problem:  # also what the server says to it: it is over either way
            log.debug("ending a COPY: %s", problem)


def _block_of(ops: Sequence[Op]) -> bytes:
    """Puts as rows of two columns in PostgreSQL's binary format."""
    parts: list[bytes] = []
    for _, key, value in ops:
        assert value is not None
        length = len(value)
        parts += (
            _HEADS[len(key)],
            key,
            _LENGTHS[length] if length < 4096 else length.to_bytes(4, "big"),
            value,
        )
    return b"".join(parts)


def _ops_of(block: bytes, keyspace: str) -> Iterator[Op]:
    """What :func:`_block_of` has made of puts of one keyspace."""
    at = 0
    while at < len(block):
        key, at = _field(block, at + 2)
        value, at = _field(block, at)
        yield keyspace, key, value


def _field(block: bytes, at: int) -> tuple[bytes, int]:
    """A column that begins there, and where the next one does."""
    begin = at + 4
    end = begin + int.from_bytes(block[at:begin], "big")
    return block[begin:end], end


def _parsed(url: str) -> tuple[str, str, str]:
    """What libpq takes, our own option ``schema``, and the address without password and options."""
    try:
        parts = BrokerUrl.parse(url)
    except OpenError as error:
        raise ConfigurationMismatch(
            "not the address of a PostgreSQL database", option="to",
            hint="write postgresql://user@host:5432/database?schema=name",
        ) from error  # fmt: skip
    ports = [port for _, port in parts.hosts]
    options = dict(parts.options)
    schema = options.pop("schema", "kvrep")
    if not schema or len(schema.encode()) > 63 or set(schema) & set("\0%") or schema.startswith("pg_"):
        raise ConfigurationMismatch(f"{schema!r} cannot be the name of a schema", option="to", given=schema)
    shown = str(replace(parts, scheme="postgresql", options={}))
    named = {
        "host": ",".join(unquote(host) for host, _ in parts.hosts),
        "port": ",".join(str(port or "") for port in ports) if any(ports) else "",
        "user": parts.user, "password": parts.password, "dbname": parts.path,
    }  # fmt: skip
    try:
        conninfo = make_conninfo(**{**{k: v for k, v in named.items() if v}, **options})
    except psycopg.ProgrammingError as error:
        raise ConfigurationMismatch(f"{shown}: {_line(error)}", option="to", given=shown) from error
    return conninfo, schema, shown


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _refused(error: psycopg.OperationalError, url: str) -> Error:
    """Why there is no connection. libpq gives no code for it, only words."""
    text = f"{url}: {_line(error)}"
    words = str(error).lower()
    if (
        "authentication failed" in words
        or "no password supplied" in words
        or "role" in words.partition("fatal")[2]
    ):
        return AuthenticationFailed(text, hint="check the user and password in the address, or ~/.pgpass")
    if "pg_hba.conf" in words:
        return PermissionDenied(text, hint="the server's pg_hba.conf has to admit this user from this host")
    if "database" in words and "does not exist" in words:
        return ConfigurationMismatch(
            text, option="to", given=url, hint="create the database, or name another one"
        )
    if "could not translate host name" in words or "name or service not known" in words:
        return PeerUnavailable(text, address=url, hint="check the host name in the address")
    return PeerUnavailable(text, address=url, hint="check host and port, and that the server runs")


def _mapped(error: psycopg.Error, url: str, *, broken: bool) -> Error:
    """An error of an open connection as one of kvrep."""
    text, state = f"{url}: {_line(error)}", error.sqlstate or ""
    if state.startswith("53"):
        return StorageFull(text, hint="the secondary is out of disk, memory or connections")
    if state == "25006":
        return PeerUnavailable(
            text, address=url, hint="that server is a standby: give the address of its primary"
        )
    function = "a function there fails, perhaps that of a trigger on the table: see the context in the text"
    inside = bool(error.diag.context and "function" in error.diag.context)
    if state == "42501":
        hint = "grant CREATE on the database (or schema) to the agent's user"
        return PermissionDenied(text, hint=function if inside else hint)
    if broken or state[:2] in ("08", "57", "40", "55") or isinstance(error, psycopg.OperationalError):
        return PeerUnavailable(text, address=url, hint="the agent tries again by itself")
    hint = "a table there does not have the columns that the keyspace needs"
    return ConfigurationMismatch(text, option="to", given=url, hint=function if inside else hint)
