"""A secondary in a SQLite file: ``sqlite:///absolute/path`` or ``sqlite:relative/path``."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from kvrep.errors import (
    ClosedError,
    ConfigurationMismatch,
    NotAStore,
    PeerUnavailable,
    PermissionDenied,
    StorageFull,
)
from kvrep.sinks.interface import Place
from kvrep.sinks.sql import LETTERS, PLACE, TABLES, SqlSink, identifier
from kvrep.sinks.tables import Table, table_name

__all__ = ["SqliteSink"]

_SCHEMA = (
    f'CREATE TABLE IF NOT EXISTS "{PLACE}" (id INTEGER PRIMARY KEY, version INTEGER NOT NULL, lineage TEXT NOT NULL,'
    ' epoch INTEGER NOT NULL, "offset" INTEGER NOT NULL, "index" INTEGER NOT NULL, time_us INTEGER NOT NULL,'
    " token TEXT NOT NULL, staging INTEGER NOT NULL, whole INTEGER NOT NULL)",
    f'CREATE TABLE IF NOT EXISTS "{LETTERS}" (number INTEGER PRIMARY KEY AUTOINCREMENT, position TEXT NOT NULL,'
    " keyspace TEXT NOT NULL, key BLOB NOT NULL, value BLOB, raw BLOB NOT NULL, reason TEXT NOT NULL,"
    " time_us INTEGER NOT NULL)",
    f'CREATE TABLE IF NOT EXISTS "{TABLES}" (name TEXT PRIMARY KEY, mapping TEXT NOT NULL)',
)
_KINDS = {"bytea": "BLOB", "jsonb": "TEXT", "json": "TEXT"}


class SqliteSink(SqlSink):
    """Tables in a SQLite database, in WAL mode with full synchronisation: a commit survives a power loss."""

    rejecting = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, OverflowError)
    mark: ClassVar[str] = "?"

    def __init__(
        self, path: str, *, tables: Mapping[str, Table] | None = None, busy_timeout_s: float = 5.0
    ) -> None:
        super().__init__(tables)
        if not path:
            raise ConfigurationMismatch("sqlite: needs a path", option="to", given="sqlite:")
        self.url = f"sqlite:{path}"
        self._path = str(path)
        self._busy_timeout_s = busy_timeout_s
        self._connection: sqlite3.Connection | None = None

    def open(self) -> Place:
        with self._connecting(self._path):
            self._run("PRAGMA journal_mode=WAL")
            self._run("PRAGMA synchronous=FULL")
            self._begin()
            for statement in _SCHEMA:
                self._run(statement)
            place = self._load_place()
            self._run("COMMIT")
        return place

    def look(self) -> Place:
        path = Path(self._path)
        if not path.exists():
            raise self._nothing_there(f"at {path}", "check the path, and that its folder exists")
        with self._connecting(f"{path.absolute().as_uri()}?mode=rw", uri=True):
            self._run("PRAGMA synchronous=FULL")
            place = self._find_place()
            if place is None:
                raise self._nothing_there(
                    f"at {path}", "no agent has written into that database: check the path"
                )
        return place

    @contextmanager
    def _connecting(self, where: str, *, uri: bool = False) -> Iterator[None]:
        """Connect anew; closed again if what is done first fails."""
        self.close()
        with self._errors():
            self._connection = sqlite3.connect(
                where, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False, uri=uri
            )
            try:
                yield
            except BaseException:
                self.close()
                raise

    def commit(self, place: Place) -> None:
        with self._whole():
            self._begin()
            self._store_place(place)
            self._run("COMMIT")
        self._version += 1

    def hold(self) -> Place:
        self.rollback()
        with self._errors():
            self._run("BEGIN")
            return self._read_place() or Place()

    def rollback(self) -> None:
        self._known.clear()
        connection = self._connection
        if connection is not None and connection.in_transaction:
            with self._errors():
                self._run("ROLLBACK")

    def scan(self, keyspace: str) -> Iterator[tuple[object, object]]:
        with self._errors():
            cursor = self._run(f"SELECT * FROM {self._name(table_name(keyspace))} ORDER BY key")
            for key, *rest in cursor:
                yield key, rest[0] if len(rest) == 1 else tuple(rest)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._known.clear()

    # -- for the base ------------------------------------------------------------------------------

    def _need(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ClosedError("the sink is not open")
        return self._connection

    def _begin(self) -> None:
        if not self._need().in_transaction:
            self._run("BEGIN IMMEDIATE")

    def _reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _run(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._need().execute(statement, parameters)

    def _name(self, table: str) -> str:
        return identifier(table)

    def _exists(self, name: str) -> bool:
        found = self._run("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,))
        return found.fetchone() is not None

    def _create(self, name: str, table: Table) -> None:
        columns = ", ".join(
            f"{identifier(column)} {_KINDS.get(kind.lower(), kind)}{' PRIMARY KEY' if column == 'key' else ''}"
            for column, kind in table.types.items()
        )
        self._run(f"CREATE TABLE IF NOT EXISTS {self._name(name)} ({columns}) WITHOUT ROWID")

    def _put(self, name: str, table: Table, rows: list[tuple[Any, ...]], *, fresh: bool) -> None:
        del fresh
        columns = ", ".join(map(identifier, table.types))
        marks = ", ".join("?" * len(table.types))
        updates = _updates(column for column in table.types if column != "key")
        self._need().executemany(
            f"INSERT INTO {self._name(name)} ({columns}) VALUES ({marks}) ON CONFLICT (key) DO UPDATE SET {updates}",
            rows,
        )

    def _delete(self, name: str, keys: list[Any], table: Table) -> None:
        del table
        self._need().executemany(f"DELETE FROM {self._name(name)} WHERE key = ?", [(key,) for key in keys])

    def _merge(self, live: str, staged: str, columns: Sequence[str]) -> None:
        names = ", ".join(["key", *map(identifier, columns)])
        differs = " OR ".join(f"{live}.{identifier(c)} IS NOT excluded.{identifier(c)}" for c in columns)
        self._run(
            f"INSERT INTO {live} ({names}) SELECT {names} FROM {staged} WHERE true"
            f" ON CONFLICT (key) DO UPDATE SET {_updates(columns)} WHERE {differs}"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self.rejecting:
            raise
        except sqlite3.Error as error:
            raise _mapped(error, self.url) from error


def _updates(columns: Any) -> str:
    return ", ".join(f"{identifier(column)} = excluded.{identifier(column)}" for column in columns)


def _mapped(error: sqlite3.Error, url: str) -> Exception:
    """A SQLite error as one of kvrep."""
    text = f"{url}: {error}"
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return PeerUnavailable(text, address=url, hint="another process holds a transaction open there")
    if name.startswith("SQLITE_FULL"):
        return StorageFull(text)
    if name.startswith("SQLITE_IOERR"):
        return PeerUnavailable(text, address=url, hint="check the disk and the kernel log")
    if name.startswith("SQLITE_CANTOPEN"):
        return ConfigurationMismatch(text, option="to", given=url, hint="check that the folder exists")
    if name.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH")):
        return PermissionDenied(text, hint="the agent must be allowed to write the file and its folder")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return NotAStore(
            text, path=url, hint="give the path of a SQLite database, or of a file yet to be made"
        )
    return ConfigurationMismatch(
        text, option="to", given=url, hint="a table there does not have the columns that the keyspace needs"
    )
