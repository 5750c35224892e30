"""One Delta table, as the warehouse needs it: rows added and files replaced in a stream, read in a stream.

A commit of a Delta table is atomic, and the second of two that follow the same version fails
(:class:`OtherWriter`). With each of them goes a number and, where wanted, a note; both are read back with the
table. The rows are written and read by pyarrow, row group by row group, so that memory does not grow with them;
deltalake makes the commits.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction
from pyarrow import fs

from kvrep.errors import ConfigurationMismatch, Error, PeerUnavailable, PermissionDenied, StorageFull

__all__ = ["Delta", "File", "OtherWriter"]

APP = "kvrep"
"""Under which name numbers and notes stand in commits."""
FILE_BYTES = 32 << 20
SMALL_BYTES = FILE_BYTES // 4
"""Below this a file is a small one."""
GROUP_ROWS, GROUP_BYTES = 1 << 14, 2 << 20
"""Of a row group, which stands in memory while it is written."""
READ_ROWS = 4096
NUMBER = "number"
"""The column by which files and row groups are passed over, where there is one."""
NUMBER_MAX = 1 << 62
_PROPERTIES = {"delta.logRetentionDuration": "interval 1 days", "delta.checkpointInterval": "100"}


class OtherWriter(Exception):
    """Somebody else has committed to the table since it was loaded."""


class File(NamedTuple):
    """A part of a table."""

    path: str
    size: int
    first: int
    """The lowest and the highest number in it."""
    last: int

    @property
    def small(self) -> bool:
        """Whether it should be joined with others, once there are many of them."""
        return self.size < SMALL_BYTES


class _New(NamedTuple):
    path: str
    size: int
    stats: str


class Delta:
    """A table at ``uri``: a path, or what else deltalake and pyarrow understand. One thread uses it at a time."""

    def __init__(self, uri: str, schema: pa.Schema, *, append_only: bool = False) -> None:
        self.uri, self.schema = uri, schema
        self._append_only = append_only
        self._table: DeltaTable | None = None
        self.number = 0
        """Of the last commit that had one; else 0."""
        self._folder = None if "://" in uri else Path(uri)

    # -- opening -----------------------------------------------------------------------------------

    @property
    def there(self) -> bool:
        """Whether the table existed when it was loaded."""
        return self._table is not None

    def load(self) -> bool:
        """Take the newest version; ``False``: there is no table."""
        with self.errors():
            table = self._table = DeltaTable(self.uri) if DeltaTable.is_deltatable(self.uri) else None
            self.number = 0 if table is None else table.transaction_version(APP) or 0
        return self.there

    def create(self, description: str) -> None:
        """Make it, unless somebody was faster."""
        properties = {**_PROPERTIES, **({"delta.appendOnly": "true"} if self._append_only else {})}
        with self.errors():
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            DeltaTable.create(
                self.uri,
                self.schema,
                mode="ignore",
                name=APP,
                description=description,
                configuration=properties,
            )
            self._sync_log(0)
        self.load()  # it may be somebody else's, and have rows by now

    def _need(self) -> DeltaTable:
        assert self._table is not None, "the table was not loaded"
        return self._table

    @property
    def description(self) -> str:
        """What its maker said of it."""
        return self._need().metadata().description or ""

    @property
    def columns(self) -> list[str]:
        return [field.name for field in self._need().schema().fields]

    def note(self) -> str | None:
        """Of the last commit that had one. Maintenance by other programs adds commits without."""
        with self.errors():
            for limit in (1, None):
                for commit in self._need().history(limit):
                    found = commit.get(APP)
                    if isinstance(found, str):
                        return found
        return None

    # -- reading and writing -----------------------------------------------------------------------

    def files(self) -> list[File]:
        """Of what the loaded version is made."""
        if not self.there:
            return []
        with self.errors():
            actions = pa.table(self._need().get_add_actions(flatten=True)).to_pylist()
        return [
            File(
                a["path"], a["size_bytes"], _or(a.get(f"min.{NUMBER}"), 0), _or(a.get(f"max.{NUMBER}"), NUMBER_MAX)
            )
            for a in actions
        ]  # fmt: skip

    def read(
        self,
        columns: list[str] | None = None,
        *,
        files: Sequence[File] | None = None,
        above: int = -1,
        through: int = NUMBER_MAX,
    ) -> Iterator[pa.RecordBatch]:
        """The rows of the loaded version, or of some files of it, in batches, in no certain order.

        Files and row groups without a number above ``above`` and through ``through`` are passed over; other rows
        may come along.
        """
        with self.errors():
            for file in self.files() if files is None else files:
                if file.first <= through and file.last > above:
                    yield from self._read(file.path, columns, above)

    def _read(self, path: str, columns: list[str] | None, above: int) -> Iterator[pa.RecordBatch]:
        with self._system().open_input_file(path) as source, pq.ParquetFile(source) as parquet:
            for group in range(parquet.num_row_groups):
                if _last_number(parquet.metadata.row_group(group)) > above:
                    for batch in parquet.iter_batches(
                        READ_ROWS, row_groups=[group], columns=columns, use_threads=False
                    ):
                        yield self._cast(batch)

    def _system(self) -> fs.FileSystem:
        if self._folder is None:
            whole, path = fs.FileSystem.from_uri(self.uri)
            return fs.SubTreeFileSystem(path, whole)
        return fs.SubTreeFileSystem(str(self._folder), fs.LocalFileSystem())

    def _cast(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """With the types that were given: what joins files may choose others that hold the same."""
        fields = [self.schema.field(name) for name in batch.schema.names]
        if [field.type for field in fields] == batch.schema.types:
            return batch
        columns = [column.cast(field.type) for column, field in zip(batch.columns, fields, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))

    def write(
        self,
        batches: Iterable[pa.RecordBatch],
        *,
        number: int,
        note: str | None = None,
        replacing: Sequence[File] = (),
        same_rows: bool = False,
    ) -> None:
        """Add rows, and remove the files ``replacing``, in one commit. It is durable when it returns.

        ``same_rows``: the rows that are added are those that are removed, for whoever follows the table.
        :class:`OtherWriter`: nothing was written.
        """
        table, now_ms = self._need(), time.time_ns() // 1_000_000
        removed = [RemoveAction(file.path, not same_rows, now_ms, file.size, {}) for file in replacing]
        with self.errors():
            files = _Files(self._system(), self.schema, self._folder)
            try:
                for group in _groups(batches, self.schema):
                    files.add(group)
                files.finish()
            except BaseException:
                files.discard()
                raise
            added = [
                AddAction(new.path, new.size, {}, now_ms, not same_rows, new.stats) for new in files.done
            ]
            try:
                table.create_write_transaction(
                    [*added, *removed], "append", table.schema(), commit_properties=_properties(number, note)
                )
            except CommitFailedError:
                files.discard()
                raise
            table.update_incremental()
            self._sync_log(table.version())
            self.number = number

    def _sync_log(self, version: int) -> None:
        """A commit reaches the disk: deltalake leaves that to the system."""
        if self._folder is not None:
            log = self._folder / "_delta_log"
            for path in (log / f"{version:020}.json", log, self._folder):
                _sync(path)

    # -- upkeep ------------------------------------------------------------------------------------

    def compact(self, *, number: int, note: str | None) -> None:
        """Join the small files. :class:`OtherWriter`: nothing was done."""
        small = [file for file in self.files() if file.small]
        self.write(self.read(files=small), number=number, note=note, replacing=small, same_rows=True)

    def vacuum(self, hours: int, *, number: int, note: str | None) -> None:
        """Delete files that are no part of it any more since so many hours."""
        with self.errors():
            self._need().vacuum(
                retention_hours=hours, dry_run=False, enforce_retention_duration=False,
                commit_properties=_properties(number, note),
            )  # fmt: skip

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The errors of deltalake, pyarrow and the system as those of kvrep."""
        try:
            yield
        except CommitFailedError as error:
            raise OtherWriter(str(error)) from error
        except (DeltaError, pa.ArrowException, OSError) as error:
            raise _mapped(error, self.uri) from error


class _Files:
    """New files, which are no part of the table before they are committed."""

    def __init__(self, system: fs.FileSystem, schema: pa.Schema, folder: Path | None) -> None:
        self.done: list[_New] = []
        self._system, self._schema, self._folder = system, schema, folder
        self._stream: Any = None
        self._parquet: pq.ParquetWriter | None = None
        self._name = ""
        self._rows, self._first, self._last = 0, NUMBER_MAX, 0

    def add(self, group: pa.Table) -> None:
        """One row group."""
        if self._parquet is None:
            self._name = f"{uuid4().hex}.parquet"
            self._stream = self._system.open_output_stream(self._name)
            self._parquet = pq.ParquetWriter(self._stream, self._schema, compression="zstd")
            self._rows, self._first, self._last = 0, NUMBER_MAX, 0
        self._parquet.write_table(group)
        self._rows += group.num_rows
        if NUMBER in self._schema.names:
            found = pc.min_max(group.column(NUMBER)).as_py()
            self._first, self._last = min(self._first, found["min"]), max(self._last, found["max"])
        if self._stream.tell() >= FILE_BYTES:
            self.finish()

    def finish(self) -> None:
        """End the file that is open, if one is; it is on the disk then."""
        if self._parquet is None:
            return
        self._close()
        if self._folder is not None:
            _sync(self._folder / self._name)
        stats: dict[str, Any] = {"numRecords": self._rows}
        if NUMBER in self._schema.names:
            stats |= {"minValues": {NUMBER: self._first}, "maxValues": {NUMBER: self._last}}
        size = self._system.get_file_info(self._name).size
        self.done.append(_New(self._name, size, json.dumps(stats)))

    def _close(self) -> None:
        parquet, self._parquet = self._parquet, None
        if parquet is not None:
            parquet.close()
            self._stream.close()

    def discard(self) -> None:
        """Remove them all: they were not committed."""
        unfinished = [self._name] if self._parquet is not None else []
        self._close()
        for name in [*unfinished, *(new.path for new in self.done)]:
            self._system.delete_file(name)


def _groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Batches gathered into row groups."""
    gathered: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if batch.num_rows:
            gathered.append(batch)
            rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            yield pa.Table.from_batches(gathered, schema)
            gathered, rows, size = [], 0, 0
    if gathered:
        yield pa.Table.from_batches(gathered, schema)


def _last_number(group: Any) -> int:
    """The highest number in a row group, as far as it says."""
    column = group.column(0)
    statistics = column.statistics if column.path_in_schema == NUMBER else None
    if statistics is None or not statistics.has_min_max:
        return NUMBER_MAX
    last: int = statistics.max
    return last


def _or(found: int | None, otherwise: int) -> int:
    return otherwise if found is None else found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _properties(number: int, note: str | None) -> CommitProperties:
    return CommitProperties(
        custom_metadata=None if note is None else {APP: note},
        app_transactions=[Transaction(APP, number)],
        max_commit_retries=0,
    )


def _mapped(error: Exception, uri: str) -> Error:
    text = f"delta:{uri}: {' '.join(str(error).split())}"
    words = text.lower()
    if "permission denied" in words or "read-only file system" in words or isinstance(error, PermissionError):
        return PermissionDenied(text, hint="the agent must be allowed to write the folder and all in it")
    if "no space left" in words or "disk quota" in words:
        return StorageFull(text)
    if "schema" in words and not isinstance(error, OSError):
        return ConfigurationMismatch(
            text, option="to", given=uri, hint="the table there does not have the columns that are needed"
        )
    return PeerUnavailable(text, address=uri, hint="check the disk, or the network and the credentials")
