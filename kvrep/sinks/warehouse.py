"""A secondary in a warehouse: ``delta:folder``, ``delta:///folder`` (needs ``kvrep[warehouse]``).

::

    FOLDER/history/             every change of every keyspace, in order; rows are only ever added
    FOLDER/current/KEYSPACE/    the rows of a keyspace as they are now
    FOLDER/dead_letters/        changes that were put aside; FOLDER/staged/ a snapshot that is not whole yet

All of them are Delta tables. Their commits are atomic for one table only, so one of them decides: **what is in the
history has happened**. Its commits carry the agent's notes with the place (``notes.py``). What has to be there
before (staged rows, dead letters) is written first, under a name that counts once the notes mention it. What
follows from the history, the current state, is brought up to date now and then: each of its tables has the number
of the row of the history through which it is complete, so it goes on from there, whatever happened in between.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from kvrep.errors import (
    ClosedError,
    ConfigurationMismatch,
    NotAStore,
    OpenError,
    PeerUnavailable,
    RejectedChange,
    StoreInUse,
)
from kvrep.model.change import Change
from kvrep.model.event import Event
from kvrep.model.record import Op
from kvrep.options import check_keyspace_name
from kvrep.sinks.interface import DeadLetter, Place, Sink, ops_of
from kvrep.sinks.lastrows import LastRows
from kvrep.sinks.notes import Notes, Staged
from kvrep.sinks.tables import Table, table_name, table_of

try:
    import pyarrow as pa
    import pyarrow.compute as pc

    from kvrep.sinks.columns import CLEAR, DELETE, HISTORY, LETTERS, PUT, STAGED, Shown, batches_of
    from kvrep.sinks.delta import Delta, File, OtherWriter
except ImportError as missing:
    raise OpenError(
        "delta: needs the packages pyarrow and deltalake", hint='pip install "kvrep[warehouse]"'
    ) from missing

__all__ = ["WarehouseSink"]

HISTORY_IS = "kvrep: every change, in the order of number"
COMMIT_S, REFRESH_S, RETENTION_H = 10.0, 60.0, 24
SHARE = 10
"""Refreshing takes no more than one part in so many of the agent's time."""
SMALL_MAX = 32
"""How many small files a table may have before they are joined."""
VACUUM_S = 600.0
TIME_US_MAX = 253_402_300_800_000_000
"""The year 10000: what an event says of itself need not make sense."""

Row = tuple[Any, ...]
"""Of the history, without its number."""


class WarehouseSink(Sink):
    """A folder of Delta tables. ``address`` is ``delta:PATH``, or ``delta+s3://bucket/path`` and the like for what
    deltalake reaches, with the options

    ``commit_s``: how long changes are gathered for a commit of the history, hence how late they are (10);
    ``refresh_s``: how often the current state follows the history (60);
    ``retention_h``: how many whole hours replaced files stay, for queries that still read them (24).
    """

    batch_changes, batch_bytes = 10_000, 4 << 20

    def __init__(self, address: str, *, tables: Mapping[str, Table] | None = None) -> None:
        self._root, options = _parsed(address)
        self.url = f"delta:{self._root}" if "://" not in self._root else f"delta+{self._root}"
        self.linger_s = options["commit_s"]
        self._refresh_s, self._retention_h = options["refresh_s"], int(options["retention_h"])
        self._given = dict(tables or {})
        self._shown = {name: Shown(name, table) for name, table in self._given.items()}
        self._history = Delta(f"{self._root}/history", HISTORY, append_only=True)
        self._staged = Delta(f"{self._root}/staged", STAGED)
        self._letters = Delta(f"{self._root}/dead_letters", LETTERS)
        self._current: dict[str, Delta] = {}
        self._notes: Notes | None = None
        self._refresh_at = self._vacuum_at = 0.0
        self._tidied = 0
        """The commit after which small files were looked for."""
        self._give_up()

    # -- opening -----------------------------------------------------------------------------------

    def open(self) -> Place:
        self.close()
        self._check_path()
        if not self._history.load():
            self._refuse_strangers()
            self._history.create(HISTORY_IS)
        if self._history.columns != HISTORY.names or self._history.description != HISTORY_IS:
            raise NotAStore(
                f"{self.url}/history is a table of something else", path=self.url,
                hint="give the agent an empty folder, or one yet to be made",
            )  # fmt: skip
        self._read()
        return self._need().place

    def look(self) -> Place:
        self._check_path()
        if not self._history.load():
            raise NotAStore(f"there is no secondary at {self._root}", path=self.url, hint="check the path")
        return self.open()

    def _read(self) -> None:
        """Take the newest version of everything: the history last, which is as new as what was made from it."""
        found = self._load_notes()
        self._current = {}
        for keyspace in found.keyspaces:
            self._load_current(keyspace)
        self._history.load()
        self._notes = self._load_notes()
        self._give_up()

    def _load_notes(self) -> Notes:
        text = self._history.note()
        if text is not None:
            return Notes.load(text, self.url)
        if self._history.number:
            raise NotAStore(
                f"{self.url}/history has lost the agent's notes", path=self.url,
                hint="other programs have made so many commits that its own are gone; begin a new folder",
            )  # fmt: skip
        return Notes()

    def _check_path(self) -> None:
        if "://" in self._root:
            return
        folder = Path(self._root)
        if not folder.parent.is_dir():
            raise ConfigurationMismatch(
                f"{self.url}: there is no {folder.parent}", option="to", given=self.url,
                hint="check that the folder exists",
            )  # fmt: skip
        if folder.exists() and not folder.is_dir():
            raise NotAStore(
                f"{self.url} is a file", path=self.url, hint="give a folder, or one yet to be made"
            )

    def _refuse_strangers(self) -> None:
        """Before the history is made: nothing else may be there but the beginning of one."""
        folder = Path(self._root)
        if "://" in self._root or not folder.exists():
            return
        with self._history.errors():
            found = {path.name for path in folder.iterdir()} - {"history"}
            if not found and (folder / "history").exists():
                found = {path.name for path in (folder / "history").iterdir()} - {"_delta_log"}
        if found:
            raise NotAStore(
                f"{self.url} holds something else: {', '.join(sorted(found)[:3])}", path=self.url,
                hint="give the agent an empty folder, or one yet to be made",
            )  # fmt: skip

    def _load_current(self, keyspace: str) -> None:
        """The table of a keyspace, if there is one, shown in the way that it was made for."""
        table = Delta(f"{self._root}/current/{table_name(keyspace)}", HISTORY)
        if not table.load():
            return
        described, given = json.loads(table.description), self._given.get(keyspace)
        if given is not None and given.describe() != described:
            raise ConfigurationMismatch(
                f"{table.uri} was made for other columns", option="table", given=keyspace,
                hint="give the same --table as before; or remove that folder, and it is made anew from the history",
            )  # fmt: skip
        if keyspace not in self._shown:
            self._shown[keyspace] = Shown(keyspace, table_of(described))
        table.schema = self._shown[keyspace].schema
        self._current[keyspace] = table

    def _need(self) -> Notes:
        if self._notes is None:
            raise ClosedError("the sink is not open")
        return self._notes

    def _show(self, keyspace: str) -> Shown:
        found = self._shown.get(keyspace)
        if found is None:
            found = self._shown[keyspace] = Shown(keyspace, Table())
        return found

    # -- what will take effect with the next commit ------------------------------------------------

    def _forget_pending(self) -> None:
        self._work: list[list[Row] | Staged] = []
        """Rows for the history, and snapshots that become part of it, in order."""
        self._staging: Staged | None = None if self._notes is None else self._notes.staged
        self._arrived: list[Row] = []
        """Rows of a snapshot that are not written yet."""
        self._buried: list[DeadLetter] = []
        self._forgotten: set[int] = set()

    def _give_up(self) -> None:
        self._forget_pending()
        self._writer = secrets.token_hex(6)
        """Under this name things are written before they count; a new one each time they are given up."""

    def apply(self, ops: Sequence[Op]) -> None:
        self._add(ops, [_NOWHERE] * len(ops), staging=False)

    def stage(self, ops: Sequence[Op]) -> None:
        self._add(ops, [_NOWHERE] * len(ops), staging=True)

    def apply_changes(self, changes: Sequence[Change | Event]) -> None:
        self._add(ops_of(changes), list(map(_whence, changes)), staging=False)

    def stage_changes(self, changes: Sequence[Change | Event]) -> None:
        self._add(ops_of(changes), list(map(_whence, changes)), staging=True)

    def _add(self, ops: Sequence[Op], whence: Sequence[Row], *, staging: bool) -> None:
        self._need()
        spaces = {op[0] for op in ops}
        if not all(map(self._plain, spaces)):
            for index, op in enumerate(ops):
                self._check(index, op)
        rows: list[Row] = [
            (PUT if value is not None else DELETE, keyspace, key, value, staging, *place)
            for (keyspace, key, value), place in zip(ops, whence, strict=True)
        ]
        if staging:
            self._arrived += rows
        elif self._work and isinstance(last := self._work[-1], list):
            last += rows
        else:
            self._work.append(rows)

    def _plain(self, keyspace: str) -> bool:
        """Whether everything in a keyspace of this name has its place here."""
        return check_keyspace_name(keyspace) and self._show(keyspace).table.plain

    def _check(self, index: int, op: Op) -> None:
        if not check_keyspace_name(op[0]):  # it becomes the name of a folder
            raise RejectedChange(f"{op[0]!r} cannot be a keyspace", index=index, keyspace=op[0], key=op[1])
        self._show(op[0]).check(index, op)

    def unstage(self) -> None:
        self._need()
        self._staging, self._arrived = None, []

    def swap(self) -> None:
        """The rows that were staged before, and those of this transaction, become part of the history."""
        self._need()
        self._work += [self._staging or Staged(), self._arrived]
        self._staging, self._arrived = None, []

    def bury(self, letter: DeadLetter) -> None:
        number = self._need().lettered + len(self._buried) + 1
        time_us = letter.time_us or time.time_ns() // 1000
        reason = letter.reason.encode(errors="replace").decode()
        self._buried.append(replace(letter, number=number, reason=reason, time_us=time_us))

    def forget(self, numbers: Iterable[int]) -> None:
        self._need()
        self._forgotten.update(numbers)

    def rollback(self) -> None:
        self._give_up()

    # -- committing --------------------------------------------------------------------------------

    def commit(self, place: Place) -> None:
        old = self._need()
        # As they are before the history has moved: should somebody write there later, they are left alone.
        if old.staged is not None or self._arrived:
            self._staged.load()
        if old.letters or self._buried:
            self._letters.load()
        try:
            self._write_ahead(old.commit + 1)
            new = self._noted(old, place)
            self._history.write(self._rows(old, place), number=new.commit, note=new.dump())
        except OtherWriter as error:
            raise self._overtaken(error) from error
        self._notes = new
        self._forget_pending()
        self._clean_up(old, new)

    def _write_ahead(self, commit: int) -> None:
        """What the notes will refer to."""
        batch = f"{self._writer}-{commit}"
        if self._arrived:
            before = 0 if self._staging is None else self._staging.rows
            numbered = ((n, *row, batch) for n, row in enumerate(self._arrived, before + 1))
            self._made(self._staged, "a snapshot that is not whole yet").write(
                batches_of(list(numbered), STAGED), number=commit
            )
        if self._buried:
            rows = [
                (batch, x.number, x.position, x.keyspace, x.key, x.value, x.raw, x.reason, x.time_us)
                for x in self._buried
            ]
            self._made(self._letters, "changes that were put aside").write(
                batches_of(rows, LETTERS), number=commit
            )

    @staticmethod
    def _made(table: Delta, what: str) -> Delta:
        if not table.there:
            table.create(f"kvrep: {what}; only the agent knows which rows count")
        return table

    def _noted(self, old: Notes, place: Place) -> Notes:
        """The notes of this commit."""
        number, base, commit = old.number, old.base, old.commit + 1
        keyspaces = dict(old.keyspaces)
        for part in self._work:
            if isinstance(part, Staged):
                base, number = number + 1, number + 1 + part.rows
                keyspaces = dict.fromkeys([*keyspaces, *part.keyspaces], number)
            else:
                keyspaces.update((row[1], at) for at, row in enumerate(part, number + 1))
                number += len(part)
        letters = _without(old.letters, self._forgotten)
        if self._buried:
            letters[f"{self._writer}-{commit}"] = [letter.number for letter in self._buried]
        return Notes(
            commit=commit, number=number, base=base, place=place, keyspaces=keyspaces,
            staged=self._staged_now(commit), letters=letters, lettered=old.lettered + len(self._buried),
        )  # fmt: skip

    def _staged_now(self, commit: int) -> Staged | None:
        staging, arrived = self._staging, self._arrived
        if not arrived:
            return staging
        staging = staging or Staged()
        batches = list(staging.batches)
        if batches and batches[-1][0] == self._writer:
            batches[-1] = (self._writer, batches[-1][1], commit)
        else:
            batches.append((self._writer, commit, commit))
        keyspaces = tuple(sorted({*staging.keyspaces, *(row[1] for row in arrived)}))
        return Staged(tuple(batches), staging.rows + len(arrived), keyspaces)

    def _rows(self, old: Notes, place: Place) -> Iterator[pa.RecordBatch]:
        """What this commit adds to the history."""
        number = old.number
        whence = (place.sequence[0], place.sequence[1], None, place.time_us or time.time_ns() // 1000)
        for part in self._work:
            if isinstance(part, Staged):
                number += 1
                yield from batches_of([(number, CLEAR, None, None, None, True, *whence)], HISTORY)
                yield from self._staged_rows(part, number)
                number += part.rows
            else:
                yield from batches_of([(at, *row) for at, row in enumerate(part, number + 1)], HISTORY)
                number += len(part)

    def _staged_rows(self, staged: Staged, after: int) -> Iterator[pa.RecordBatch]:
        found = 0
        for batch in self._staged.read() if staged.rows else ():
            counts = pa.array([_counts(name, staged) for name in batch.column("batch").to_pylist()])
            batch = batch.filter(counts)
            found += batch.num_rows
            numbers = pa.array([after + n for n in batch.column("number").to_pylist()], pa.int64())
            columns = [numbers, *(batch.column(name) for name in HISTORY.names[1:])]
            yield pa.RecordBatch.from_arrays(columns, schema=HISTORY)
        if found != staged.rows:
            raise NotAStore(
                f"{self.url}/staged holds {found} of {staged.rows} rows of a snapshot", path=self.url,
                hint="somebody else has removed them; begin a new folder",
            )  # fmt: skip

    def _overtaken(self, error: OtherWriter) -> Exception:
        self._history.load()
        if self._load_notes().commit != self._need().commit:
            return StoreInUse(
                f"another agent has moved the place in {self.url}", path=self.url, pid=None, host=None,
                hint="run one agent for each secondary",
            )  # fmt: skip
        return PeerUnavailable(
            f"{self.url}: another program has committed: {error}", address=self.url,
            hint="the agent tries again by itself",
        )  # fmt: skip

    def _clean_up(self, old: Notes, new: Notes) -> None:
        """Remove what no longer counts. Where somebody else writes it just stays."""
        try:
            if old.staged is not None and new.staged is None:
                self._staged.write((), number=new.commit, replacing=self._staged.files())
            if old.letters and not new.letters:
                self._letters.write((), number=new.commit, replacing=self._letters.files())
        except (OtherWriter, PeerUnavailable):
            return

    # -- the current state -------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        return self._notes is not None and bool(self._behind(self._notes))

    def tend(self, give_up: Callable[[], bool] = lambda: False) -> None:
        notes, began_s = self._need(), time.monotonic()
        behind = self._behind(notes)
        if behind and began_s >= self._refresh_at:
            for keyspace in behind:
                if give_up():
                    return
                self._refresh(keyspace, notes, give_up)
            took_s = time.monotonic() - began_s
            self._refresh_at = began_s + (max(self._refresh_s, took_s * SHARE) if self._refresh_s else 0.0)
        if notes.commit != self._tidied:
            self._compact(notes)
            self._tidied = notes.commit
        if began_s >= self._vacuum_at:
            self._vacuum(notes)
            self._vacuum_at = began_s + VACUUM_S

    def _behind(self, notes: Notes) -> list[str]:
        return [name for name, last in notes.keyspaces.items() if self._through(name) < last]

    def _through(self, keyspace: str) -> int:
        table = self._current.get(keyspace)
        return 0 if table is None else table.number

    def _refresh(self, keyspace: str, notes: Notes, give_up: Callable[[], bool]) -> None:
        """Bring the table of a keyspace to what the history says, in one commit."""
        self._load_current(keyspace)
        if keyspace not in self._current:
            shown = self._show(keyspace)
            table = Delta(f"{self._root}/current/{table_name(keyspace)}", shown.schema)
            table.create(json.dumps(shown.table.describe()))
            self._current[keyspace] = table
        table = self._current[keyspace]
        if table.number >= notes.keyspaces[keyspace]:
            return  # another agent was here
        with closing(LastRows()) as last:
            self._find_last(keyspace, notes, last)
            old = self._outdated(keyspace, notes, last)
            rows = chain(self._kept(keyspace, notes, last, old), self._new(keyspace, notes, last))
            try:
                table.write(_until(rows, give_up), number=notes.number, replacing=old)
            except OtherWriter:
                self._load_current(keyspace)
            except _GivenUp:
                return

    def _outdated(self, keyspace: str, notes: Notes, last: LastRows) -> list[File]:
        """The files that have to be written anew: those with rows that change or go, and small ones to be joined."""
        files = self._current[keyspace].files()
        if self._rebuilt(keyspace, notes):
            return files
        join = sum(file.small for file in files) > SMALL_MAX
        return [file for file in files if (join and file.small) or self._changes(keyspace, file, last)]

    def _rebuilt(self, keyspace: str, notes: Notes) -> bool:
        """Whether a snapshot has replaced all that the table holds."""
        return self._through(keyspace) < notes.base

    def _tail(
        self, keyspace: str, notes: Notes, columns: list[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows of the history that the table of a keyspace does not show yet."""
        after = max(self._through(keyspace), notes.base)
        for batch in self._history.read(columns, above=after, through=notes.number):
            number = batch.column("number")
            fits = pc.and_(pc.greater(number, after), pc.less_equal(number, notes.number))
            found = batch.filter(pc.and_kleene(fits, pc.equal(batch.column("keyspace"), keyspace)))
            if found.num_rows:
                yield found

    def _find_last(self, keyspace: str, notes: Notes, last: LastRows) -> None:
        for batch in self._tail(keyspace, notes, ["number", "keyspace", "key"]):
            last.note(batch.column("key").to_pylist(), batch.column("number").to_pylist())

    def _changes(self, keyspace: str, file: File, last: LastRows) -> bool:
        """Whether a row in a file of the table has to change or to go."""
        keys = map(self._show(keyspace).keys, self._current[keyspace].read(["key"], files=[file]))
        return any(map(last.of, chain.from_iterable(keys)))

    def _kept(
        self, keyspace: str, notes: Notes, last: LastRows, files: Sequence[File]
    ) -> Iterator[pa.RecordBatch]:
        """The rows in these files of the table that stay as they are."""
        if self._rebuilt(keyspace, notes):
            return
        for batch in self._current[keyspace].read(files=files) if files else ():
            keys = self._show(keyspace).keys(batch)
            yield batch.filter(pa.array([not last.of(key) for key in keys]))

    def _new(self, keyspace: str, notes: Notes, last: LastRows) -> Iterator[pa.RecordBatch]:
        for batch in self._tail(keyspace, notes):
            rows = zip(*(batch.column(name).to_pylist() for name in ("op", "key", "number")), strict=True)
            puts = batch.filter(pa.array([op == PUT and last.of(key) == number for op, key, number in rows]))
            try:
                yield self._show(keyspace).rows(puts)
            except RejectedChange as error:  # only after the table was removed, and other columns were given
                raise ConfigurationMismatch(
                    f"{error.message} (key {error.key!r})", option="table", given=keyspace,
                    hint="the history holds values that do not fit these columns",
                ) from error  # fmt: skip

    # -- upkeep ------------------------------------------------------------------------------------

    def _compact(self, notes: Notes) -> None:
        if sum(file.small for file in self._history.files()) > SMALL_MAX:
            try:
                self._history.compact(number=notes.commit, note=notes.dump())
            except OtherWriter:
                return

    def _vacuum(self, notes: Notes) -> None:
        try:
            self._history.vacuum(self._retention_h, number=notes.commit, note=notes.dump())
            for table in (self._staged, self._letters, *self._current.values()):
                if table.load():
                    table.vacuum(self._retention_h, number=table.number, note=None)
        except OtherWriter:
            return

    # -- reading -----------------------------------------------------------------------------------

    def hold(self) -> Place:
        self._need()
        self._read()
        return self._need().place

    def keyspaces(self) -> list[str]:
        return sorted(self._need().keyspaces)

    def scan(self, keyspace: str) -> Iterator[tuple[object, object]]:
        """As of the place, whether or not the table of the keyspace has followed; in no certain order."""
        notes, shown = self._need(), self._show(keyspace)
        with closing(LastRows()) as last:
            self._find_last(keyspace, notes, last)
            files = self._current[keyspace].files() if keyspace in self._current else []
            batches = chain(self._kept(keyspace, notes, last, files), self._new(keyspace, notes, last))
            for batch in batches:
                columns = [batch.column(name).to_pylist() for name in shown.columns]
                for key, *rest in zip(*columns, strict=True):
                    yield key, rest[0] if len(rest) == 1 else tuple(rest)

    def dead_letters(self) -> list[DeadLetter]:
        standing = {(batch, n) for batch, numbers in self._need().letters.items() for n in numbers}
        if not standing or not self._letters.load():
            return []
        rows = chain.from_iterable(batch.to_pylist() for batch in self._letters.read())
        found = [_letter(row) for row in rows if (row["batch"], row["number"]) in standing]
        return sorted(found, key=lambda letter: letter.number)

    def close(self) -> None:
        self._notes = None
        self._current = {}
        self._give_up()


class _GivenUp(Exception):
    """The agent is told to end."""


def _until(batches: Iterable[pa.RecordBatch], give_up: Callable[[], bool]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if give_up():
            raise _GivenUp
        yield batch


_NOWHERE: Row = (None, None, None, None)
"""Epoch, offset, index and time of what is applied by hand: a dead letter that was tried again."""
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


def _whence(change: Change | Event) -> Row:
    time_us = change.time_us
    return (*change.sequence, time_us if 0 < time_us < TIME_US_MAX else None)


def _letter(row: dict[str, Any]) -> DeadLetter:
    del row["batch"]
    moment = row.pop("put_aside_at")
    return DeadLetter(**row, time_us=(moment - _BEGINNING) // timedelta(microseconds=1))


def _without(letters: Mapping[str, Sequence[int]], forgotten: set[int]) -> dict[str, Sequence[int]]:
    left = {batch: [n for n in numbers if n not in forgotten] for batch, numbers in letters.items()}
    return {batch: numbers for batch, numbers in left.items() if numbers}


def _counts(batch: str, staged: Staged) -> bool:
    writer, _, commit = batch.rpartition("-")
    return any(writer == ours and first <= int(commit) <= last for ours, first, last in staged.batches)


def _parsed(address: str) -> tuple[str, dict[str, float]]:
    """The path or URI without our own options, and these."""
    scheme, _, rest = address.partition(":")
    path, _, query = rest.partition("?")
    scheme = scheme.lower()
    if scheme == "delta":
        root = path.removeprefix("//") if path.startswith("//") else path
    else:
        root = f"{scheme.removeprefix('delta+')}:{path}"
    root = root.rstrip("/") if root.strip("/") else ""
    if not root:
        raise ConfigurationMismatch("delta: needs the path of a folder", option="to", given=address)
    options = {"commit_s": COMMIT_S, "refresh_s": REFRESH_S, "retention_h": float(RETENTION_H)}
    for name, text in parse_qsl(query, keep_blank_values=True):
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if name not in options or not 0 <= value < 1e6:
            raise ConfigurationMismatch(
                f"delta: does not understand {name}={text}", option="to", given=address,
                hint=f"known are {', '.join(options)}, each a number that is not negative",
            )  # fmt: skip
        options[name] = value
    return root, options
