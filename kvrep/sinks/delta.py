"""One Delta table, as the warehouse needs it: appended to or replaced in a stream, read in a stream, tidied up.

A commit of a Delta table is atomic, and the second of two that follow the same version fails
(:class:`OtherWriter`). With each of them goes a number and, where wanted, a note; both are read back with the
table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError
from pyarrow import fs

from kvrep.errors import ConfigurationMismatch, Error, PeerUnavailable, PermissionDenied, StorageFull

__all__ = ["Delta", "OtherWriter"]

APP = "kvrep"
"""Under which name numbers and notes stand in commits."""
FILE_BYTES = 32 << 20
SMALL_BYTES = FILE_BYTES // 4
"""Below this a file is a small one, which should be joined with others."""
GROUP_ROWS = 1 << 15
"""Rows of a row group, which stands in memory while it is written."""
READ_ROWS = 8192
_WRITER = WriterProperties(compression="ZSTD", max_row_group_size=GROUP_ROWS)
_PROPERTIES = {"delta.logRetentionDuration": "interval 1 days", "delta.checkpointInterval": "100"}


class OtherWriter(Exception):
    """Somebody else has committed to the table since it was loaded."""


class Delta:
    """A table at ``uri``: a path, or what else deltalake understands. One thread uses it at a time."""

    def __init__(self, uri: str, schema: pa.Schema, *, append_only: bool = False) -> None:
        self.uri, self.schema = uri, schema
        self._append_only = append_only
        self._table: DeltaTable | None = None
        self.number = 0
        """Of the last commit that had one; else 0."""
        self._files: Any = None
        """What is read, as pyarrow sees it; ``None`` after every commit."""
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
            self._files = None
        return self.there

    def create(self, description: str) -> None:
        """Make it, unless somebody was faster."""
        properties = {**_PROPERTIES, **({"delta.appendOnly": "true"} if self._append_only else {})}
        with self.errors():
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._table = DeltaTable.create(
                self.uri,
                self.schema,
                mode="ignore",
                name=APP,
                description=description,
                configuration=properties,
            )
            self._sync(0)

    def _need(self) -> DeltaTable:
        assert self._table is not None, "the table was not loaded"
        return self._table

    @property
    def name(self) -> str:
        """What its maker called it."""
        return self._need().metadata().name or ""

    @property
    def description(self) -> str:
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

    def ready(self) -> None:
        """Find the files of the loaded version, so that reading them needs nothing of deltalake any more: it
        cannot be called from where it asks for the rows to write."""
        if not self.there or self._files is not None:
            return
        with self.errors():
            if self._folder is None:
                whole, path = fs.FileSystem.from_uri(self.uri)
            else:
                whole, path = fs.LocalFileSystem(), str(self._folder)
            self._files = self._need().to_pyarrow_dataset(
                filesystem=fs.SubTreeFileSystem(path, whole), schema=self.schema
            )

    def read(self, columns: list[str] | None = None, condition: Any = None) -> Iterator[pa.RecordBatch]:
        """The rows of the loaded version, in batches, in no certain order."""
        if not self.there:
            return
        self.ready()
        with self.errors():
            # One file and one batch at a time: what is read ahead stands in memory.
            scanner = self._files.scanner(
                columns=columns, filter=condition, batch_size=READ_ROWS, batch_readahead=0, fragment_readahead=0,
                use_threads=False,
            )  # fmt: skip
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield batch

    def write(
        self,
        batches: Iterable[pa.RecordBatch],
        *,
        number: int,
        note: str | None = None,
        replace: bool = False,
    ) -> None:
        """Append rows, or put them into the place of all that is there, in one commit. Durable when it returns.

        They are asked for on another thread; what they raise goes through. :class:`OtherWriter`: nothing was
        written.
        """
        source = _Watched(batches)
        table = self._need()
        try:
            with self.errors():
                write_deltalake(
                    table, pa.RecordBatchReader.from_batches(self.schema, source),
                    mode="overwrite" if replace else "append", target_file_size=FILE_BYTES,
                    writer_properties=_WRITER, commit_properties=_properties(number, note),
                )  # fmt: skip
                self._files = None
                self._sync(table.version())
                self.number = number
        except Exception:
            if source.error is not None:
                raise source.error from None
            raise

    def _sync(self, version: int) -> None:
        """The files of a commit reach the disk: deltalake leaves that to the system."""
        if self._folder is None:
            return
        entry = self._folder / "_delta_log" / f"{version:020}.json"
        actions = [json.loads(line) for line in entry.read_bytes().splitlines()]
        files = [self._folder / unquote(action["add"]["path"]) for action in actions if "add" in action]
        for path in [*files, entry, self._folder, entry.parent]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    # -- upkeep ------------------------------------------------------------------------------------

    def small_files(self) -> int:
        """How many files of it are small."""
        with self.errors():
            sizes = pa.table(self._need().get_add_actions()).column("size_bytes").to_pylist()
        return sum(size < SMALL_BYTES for size in sizes)

    def compact(self, *, number: int, note: str | None) -> None:
        """Join small files. :class:`OtherWriter`: nothing was done."""
        table = self._need()
        with self.errors():
            table.optimize.compact(
                target_size=FILE_BYTES, max_concurrent_tasks=1, writer_properties=_WRITER,
                commit_properties=_properties(number, note),
            )  # fmt: skip
            self._files = None
            self._sync(table.version())

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


class _Watched:
    """Hands out batches, and keeps what they raise, which comes back through deltalake as mere text."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = iter(batches)
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self

    def __next__(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


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
