"""What sinks into SQL databases share: one transaction per commit, and the search for a row that does not fit."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from kvrep.errors import ConfigurationMismatch, NotAStore, RejectedChange, StoreInUse
from kvrep.model.record import Op
from kvrep.sinks.interface import NOTHING, DeadLetter, Place, Sink
from kvrep.sinks.tables import Table, by_keyspace, table_name, table_of

__all__ = ["PLACE", "SqlSink", "identifier"]

PLACE, LETTERS, TABLES = "kvrep:place", "kvrep:dead_letters", "kvrep:tables"
"""The tables of the agent itself; no keyspace can have such a name."""
STAGED = "~new"
_PLAIN = Table()

_COLUMNS = 'lineage, epoch, "offset", "index", time_us, token, staging, whole'
_LETTER = "number, position, keyspace, key, value, raw, reason, time_us"


def identifier(name: str) -> str:
    """A name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


class SqlSink(Sink):
    """A table per keyspace, and two for the agent: where it is, and its dead letters.

    Subclasses say how to connect, how to run a statement, and how many rows go in at once.
    """

    rejecting: ClassVar[tuple[type[BaseException], ...]]
    """What the database's module raises when a value does not fit."""
    mark: ClassVar[str]
    """How a parameter is written."""

    def __init__(self, tables: Mapping[str, Table] | None) -> None:
        self._tables = dict(tables or {})
        self._mapped: dict[str, Table] = {}
        """The tables of keyspaces met since the last :meth:`open`."""
        self._looking = False
        """Whether somebody looks after the copy of an agent: the mapping stays the agent's."""
        self._version = 0
        self._known: set[str] = set()
        """Tables that exist, as far as this transaction sees."""

    # -- what a database has of its own ------------------------------------------------------------

    @abstractmethod
    def _errors(self) -> AbstractContextManager[None]:
        """The database's errors as those of kvrep, apart from :attr:`rejecting`."""

    @abstractmethod
    def _begin(self) -> None:
        """Be in a transaction."""

    @abstractmethod
    def _reading(self) -> AbstractContextManager[None]:
        """Read, without leaving a transaction open where none was."""

    @abstractmethod
    def _run(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        """A cursor."""

    @abstractmethod
    def _name(self, table: str) -> str:
        """A table as SQL names it."""

    @abstractmethod
    def _exists(self, name: str) -> bool:
        """Whether there is a table of this name, whoever made it."""

    @abstractmethod
    def _create(self, name: str, table: Table) -> None:
        """Make an empty table with the key as primary key, unless it is there."""

    @abstractmethod
    def _put(self, name: str, table: Table, rows: list[tuple[Any, ...]], *, fresh: bool) -> None:
        """Insert or replace rows of distinct keys; ``fresh``: most likely none of them is there."""

    @abstractmethod
    def _delete(self, name: str, keys: list[Any], table: Table) -> None: ...

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """:meth:`_errors` where a refusal cannot be told to one change: of what takes effect as a whole, and tables."""
        with self._errors():
            try:
                yield
            except self.rejecting as error:
                raise ConfigurationMismatch(
                    f"{self.url}: {' '.join(str(error).split())}", option="to", given=self.url,
                    hint="a constraint or trigger there refuses that: change it, or what the source holds",
                ) from error  # fmt: skip

    # -- writing -----------------------------------------------------------------------------------

    def apply(self, ops: Sequence[Op]) -> None:
        self._write(ops, "")

    def stage(self, ops: Sequence[Op]) -> None:
        self._write(ops, STAGED)

    def _write(self, ops: Sequence[Op], suffix: str) -> None:
        with self._errors():
            self._begin()
            last = [both for space in by_keyspace(ops).values() for both in space.values()]
            try:
                self._try(last, suffix, fresh=bool(suffix))
            except self.rejecting as error:
                raise self._culprit(last, suffix, error) from error

    def _try(self, indexed: Sequence[tuple[int, Op]], suffix: str, *, fresh: bool = False) -> None:
        """All or, with an error, none of these operations; distinct keys. ``fresh``: most likely all are new."""
        prepared = self._prepared(indexed)
        for keyspace, _, _ in prepared:
            self._make(keyspace, suffix)
        self._run("SAVEPOINT kvrep")
        try:
            for keyspace, rows, deletes in prepared:
                name, table = table_name(keyspace) + suffix, self._table(keyspace)
                if rows:
                    self._put(name, table, rows, fresh=fresh)
                if deletes:
                    self._delete(name, deletes, table)
        except BaseException as error:
            if not isinstance(error, self.rejecting):
                raise
            self._run("ROLLBACK TO SAVEPOINT kvrep")
            if not fresh:
                raise
            self._try(indexed, suffix)
            return
        self._run("RELEASE SAVEPOINT kvrep")

    def _prepared(
        self, indexed: Sequence[tuple[int, Op]]
    ) -> list[tuple[str, list[tuple[Any, ...]], list[Any]]]:
        """(keyspace, rows to put, keys to delete) of each keyspace; each of them comes in one run."""
        spaces: dict[str, tuple[str, list[tuple[Any, ...]], list[Any]]] = {}
        table, plain = _PLAIN, True
        for index, op in indexed:
            keyspace, key, value = op
            space = spaces.get(keyspace)
            if space is None:
                space = spaces[keyspace] = (keyspace, [], [])
                table = self._table(keyspace)
                plain = table.plain
            if value is None:
                space[2].append(self._key(index, op, table))
            else:
                space[1].append((key, value) if plain else table.row(index, op))
        return list(spaces.values())

    @staticmethod
    def _key(index: int, op: Op, table: Table) -> Any:
        try:
            return table.key(op[1])
        except UnicodeDecodeError as error:
            raise RejectedChange(
                f"{op[0]}: the key is no text", index=index, keyspace=op[0], key=op[1]
            ) from error

    def _culprit(
        self, indexed: Sequence[tuple[int, Op]], suffix: str, error: BaseException
    ) -> RejectedChange:
        """Which operation cannot be stored behind those before it, by halving; nothing of them is stored afterwards."""
        self._run("SAVEPOINT kvrep_half")
        while len(indexed) > 1:
            half = indexed[: len(indexed) // 2]
            try:
                self._try(half, suffix)  # and stays, since the other half may collide with it
                indexed = indexed[len(indexed) // 2 :]
            except self.rejecting as found:
                indexed, error = half, found
        self._run("ROLLBACK TO SAVEPOINT kvrep_half")
        index, (keyspace, key, _) = indexed[0]
        reason = " ".join(str(error).split())
        return RejectedChange(f"{keyspace}: {reason}", index=index, keyspace=keyspace, key=key)

    def _table(self, keyspace: str) -> Table:
        """As it is mapped by those who opened this, else as its agent mapped it when it wrote last."""
        table = self._mapped.get(keyspace)
        if table is None:
            table = self._tables.get(keyspace) or self._kept_mapping(table_name(keyspace))
            self._mapped[keyspace] = table
        return table

    def _kept_mapping(self, name: str) -> Table:
        own = self._own()
        mapping = own.get(name) or own.get(name + STAGED)
        return table_of(json.loads(mapping)) if mapping else _PLAIN

    def _make(self, keyspace: str, suffix: str) -> None:
        name = table_name(keyspace) + suffix
        if name not in self._known:
            table = self._table(keyspace)
            with self._whole():
                self._create(name, table)
                self._adopt(name, json.dumps(table.describe()))
            self._known.add(name)

    def _adopt(self, name: str, mapping: str) -> None:
        """Note that a table is this sink's (made by it, or by people for it), and how its agent maps it."""
        on_conflict = "NOTHING" if self._looking else "UPDATE SET mapping = excluded.mapping"
        self._run(
            f"INSERT INTO {self._name(TABLES)} (name, mapping) VALUES ({self.mark}, {self.mark})"
            f" ON CONFLICT (name) DO {on_conflict}",
            (name, mapping),
        )

    def _own(self) -> dict[str, str]:
        """The tables that this sink made or took over, with their mappings; it never touches others."""
        return dict(self._run(f"SELECT name, mapping FROM {self._name(TABLES)} ORDER BY name").fetchall())

    def _disown(self, name: str) -> None:
        self._run(f"DELETE FROM {self._name(TABLES)} WHERE name = {self.mark}", (name,))

    # -- snapshots ---------------------------------------------------------------------------------

    def swap(self) -> None:
        with self._whole():
            self._begin()
            own = self._own()
            for name in own:
                if not name.endswith(STAGED) and name + STAGED not in own:
                    self._run(f"DELETE FROM {self._name(name)}")
            for staged in own:
                name = staged.removesuffix(STAGED)
                if name == staged:
                    continue
                if name in own or self._exists(name):
                    self._replace(name, own[staged])
                else:
                    self._rename(staged, name)
            self._known.clear()

    def _rename(self, staged: str, name: str) -> None:
        self._run(f"ALTER TABLE {self._name(staged)} RENAME TO {identifier(name)}")
        self._run(
            f"UPDATE {self._name(TABLES)} SET name = {self.mark} WHERE name = {self.mark}", (name, staged)
        )

    def _replace(self, name: str, mapping: str) -> None:
        """Bring a table that people may have built upon to what was staged, row by row where it differs."""
        live, staged = self._name(name), self._name(name + STAGED)
        self._run(f"DELETE FROM {live} WHERE NOT EXISTS (SELECT 1 FROM {staged} s WHERE s.key = {live}.key)")
        self._merge(live, staged, self._columns(name, mapping))
        self._drop(name + STAGED)
        self._adopt(name, mapping)

    def _drop(self, name: str) -> None:
        self._run(f"DROP TABLE {self._name(name)}")
        self._disown(name)

    def _columns(self, name: str, mapping: str) -> list[str]:
        """The columns of a live table beside its key."""
        given = (table for keyspace, table in self._tables.items() if table_name(keyspace) == name)
        table = next(given, None) or table_of(json.loads(mapping))
        return [column for column in table.types if column != "key"]

    @abstractmethod
    def _merge(self, live: str, staged: str, columns: Sequence[str]) -> None:
        """Insert the rows of ``staged`` into ``live``, and update those that differ."""

    def unstage(self) -> None:
        with self._whole():
            self._begin()
            for name in self._own():
                if name.endswith(STAGED):
                    self._drop(name)
            self._known.clear()

    # -- the agent's own tables --------------------------------------------------------------------

    def _find_place(self) -> Place | None:
        """The place, where an agent has been; the tables need not be there."""
        self._looking = True
        self._mapped.clear()
        return self._read_place() if self._exists(PLACE) else None

    def _nothing_there(self, where: str, hint: str) -> NotAStore:
        return NotAStore(f"there is no secondary {where}", path=self.url, hint=hint)

    def _load_place(self) -> Place:
        """The place; an empty one is made where none is."""
        self._looking = False
        self._mapped.clear()
        place = self._read_place()
        if place is None:
            self._version = 0
            marks = ", ".join([self.mark] * 10)
            self._run(
                f"INSERT INTO {self._name(PLACE)} (id, version, {_COLUMNS}) VALUES ({marks})",
                (1, 0, "", *NOTHING, 0, "", False, False),
            )
            return Place()
        return place

    def _read_place(self) -> Place | None:
        row = self._run(f"SELECT version, {_COLUMNS} FROM {self._name(PLACE)}").fetchone()
        if row is None:
            return None
        self._version, lineage, epoch, offset, index, time_us, token, staging, whole = row
        return Place(
            lineage=lineage, sequence=(epoch, offset, index), time_us=time_us, token=token,
            staging=bool(staging), whole=bool(whole),
        )  # fmt: skip

    def _store_place(self, place: Place) -> None:
        """Only if nobody else did since we read it: two agents must not both apply the same changes."""
        m = self.mark
        moved = self._run(
            f"UPDATE {self._name(PLACE)} SET version = version + 1, lineage = {m}, epoch = {m},"
            f' "offset" = {m}, "index" = {m}, time_us = {m}, token = {m}, staging = {m}, whole = {m}'
            f" WHERE id = 1 AND version = {m}",
            (
                place.lineage, *place.sequence, place.time_us, place.token, place.staging, place.whole,
                self._version,
            ),
        )  # fmt: skip
        if moved.rowcount != 1:
            raise StoreInUse(
                f"another agent has moved the place in {self.url}", path=self.url, pid=None, host=None,
                hint="run one agent for each secondary",
            )  # fmt: skip

    def bury(self, letter: DeadLetter) -> None:
        with self._errors():
            self._begin()
            values = (
                letter.position, letter.keyspace, letter.key, letter.value, letter.raw,
                letter.reason.replace("\0", ""), letter.time_us or time.time_ns() // 1000,
            )  # fmt: skip
            marks = ", ".join([self.mark] * 7)
            self._run(
                f"INSERT INTO {self._name(LETTERS)} ({_LETTER.removeprefix('number, ')}) VALUES ({marks})",
                values,
            )

    def forget(self, numbers: Any) -> None:
        with self._errors():
            self._begin()
            for number in numbers:
                self._run(f"DELETE FROM {self._name(LETTERS)} WHERE number = {self.mark}", (number,))

    def dead_letters(self) -> list[DeadLetter]:
        with self._errors(), self._reading():
            rows = self._run(f"SELECT {_LETTER} FROM {self._name(LETTERS)} ORDER BY number").fetchall()
        return [
            DeadLetter(number=n, position=p, keyspace=s, key=k, value=v, raw=raw, reason=why, time_us=t)
            for n, p, s, k, v, raw, why, t in rows
        ]

    def keyspaces(self) -> list[str]:
        with self._errors(), self._reading():
            return [name for name in self._own() if not name.endswith(STAGED)]
