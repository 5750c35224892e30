"""The replication log on disk: a sequence of files that is appended to, read, trimmed and cut.

One writer at a time (the engine sees to it); any number of readers. File n is synced to its end before
the first byte of file n + 1 is written, so a file that has a successor is wholly durable.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from kvrep.errors import LogTrimmed
from kvrep.model.codec import FRAME, FRAME_BYTES
from kvrep.storage.log_file import GROUP_BYTES, HEADER_BYTES, FileHeader, LogFile, fsync_directory

__all__ = ["START", "Log", "Run", "Tail", "file_path", "log_paths"]

RECENT_BYTES_MAX = 8 << 20
INDEX_STEP_BYTES = 64 << 10
SPARE = "spare.log"


class Tail(NamedTuple):
    """The end of a log: its last record's offset and epoch, and the running checksum through it."""

    offset: int
    epoch: int
    running: int


START = Tail(0, 0, 0)


class Run(NamedTuple):
    """Whole records ``first``…``last``, as they are in the log."""

    first: int
    last: int
    data: bytes


def file_path(directory: Path, sequence: int) -> Path:
    return directory / f"{sequence:016d}.log"


def log_paths(directory: Path) -> list[Path]:
    """The log files in a directory, oldest first, the spare left out."""
    return sorted(p for p in directory.glob("*.log") if p.name != SPARE)


class SparseIndex:
    """Where groups start in one file, about one entry for every 64 KiB. Grows at the end only."""

    __slots__ = ("ats", "complete", "firsts")

    def __init__(self, *, complete: bool) -> None:
        self.firsts: list[int] = []
        self.ats: list[int] = []
        self.complete = complete
        """Whether all groups of the file have been offered to :meth:`add`."""

    def add(self, first: int, at: int) -> None:
        if not self.ats or at - self.ats[-1] >= INDEX_STEP_BYTES:
            self.ats.append(at)
            self.firsts.append(first)

    def place(self, offset: int) -> int:
        """A group position at or before the group that holds ``offset``."""
        i = bisect_right(self.firsts, offset)
        return self.ats[i - 1] if i else HEADER_BYTES


_FIRST = attrgetter("first")


class _Recent:
    """The newest records in memory, so that followers that keep up are served without reading files."""

    __slots__ = ("_bytes", "_lock", "_runs", "_start")

    def __init__(self) -> None:
        # Protects the lists; held for a few list operations, never during I/O.
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self._runs: list[Run] = []
        self._start = 0
        self._bytes = 0

    def add(self, run: Run) -> None:
        with self._lock:
            self._runs.append(run)
            self._bytes += len(run.data)
            while self._bytes > RECENT_BYTES_MAX and self._start < len(self._runs) - 1:
                self._bytes -= len(self._runs[self._start].data)
                self._runs[self._start] = _NOTHING
                self._start += 1
            if self._start > 4096:
                runs = self._runs[self._start :]
                self._runs, self._start = runs, 0  # no call between, so that no interrupt comes between

    def bytes_after(self, offset: int) -> int | None:
        """Bytes of the records above ``offset``; ``None`` when not all of them are here."""
        with self._lock:
            i = bisect_right(self._runs, offset + 1, self._start, key=_FIRST) - 1
            if i < self._start:
                return None
            return sum(len(run.data) for run in self._runs[i:])

    def read(self, first: int, bytes_max: int) -> Run | None:
        """Records from ``first`` on, if they are here: up to ``bytes_max``, but at least one."""
        with self._lock:
            i = bisect_right(self._runs, first, self._start, key=_FIRST) - 1
            if i < self._start or self._runs[i].last < first:
                return None
            run = self._runs[i]
            if run.first != first or len(run.data) > bytes_max:
                return _slice(run, first, bytes_max)
            end, size = i + 1, len(run.data)
            while (
                end < len(self._runs)
                and size + len(self._runs[end].data) <= bytes_max
                and self._runs[end].first == self._runs[end - 1].last + 1
            ):
                size += len(self._runs[end].data)
                end += 1
            if end == i + 1:
                return run
            runs = self._runs[i:end]
        return Run(first, runs[-1].last, b"".join([r.data for r in runs]))


_NOTHING = Run(0, 0, b"")


def _slice(run: Run, first: int, bytes_max: int) -> Run:
    """The part of ``run`` from record ``first`` on, whole records, up to ``bytes_max`` but at least one."""
    view = run.data
    at, offset = 0, run.first
    while offset < first:
        at += FRAME_BYTES + FRAME.unpack_from(view, at)[3]
        offset += 1
    if len(view) - at <= bytes_max:
        return Run(first, run.last, view[at:])
    start = at
    while True:
        end = at + FRAME_BYTES + FRAME.unpack_from(view, at)[3]
        if end - start > bytes_max and at > start:
            break
        at = end
        offset += 1
        if at >= len(view):
            break
    return Run(first, offset - 1, view[start:at])


class Log:
    """The files of one log directory. Made by :func:`kvrep.storage.recovery.recover`.

    Invariants: ``synced <= tail.offset``; ``first <= tail.offset + 1``; ``tail`` moves by one assignment
    after its bytes are written, so an interrupt at any point leaves the log whole.
    """

    def __init__(
        self, directory: Path, lineage: bytes, files: list[LogFile], tail: Tail, *, file_bytes: int
    ) -> None:
        self.directory = directory
        self.lineage = lineage
        self.file_bytes = file_bytes
        self.tail = tail
        self.synced = tail.offset
        """Every record through this offset is on the disk."""
        self._files = files
        self._indexes: dict[int, SparseIndex] = {
            f.header.sequence: SparseIndex(complete=False) for f in files
        }
        self._current: LogFile | None = None
        self._capacity = 0
        self._next_sequence = files[-1].header.sequence + 1 if files else 1
        self._recent = _Recent()
        self._recent_wanted = False
        """Set by the first read: a log that nobody ships from keeps nothing in memory."""
        self._mark_at = -1
        """Where in the present file the newest mark stands, -1 if there is none."""
        self._index_from = 0
        """Where in the present file the next group is to be put into its index."""
        # Readers hold it while they read; trim and cut hold it while they close and unlink files.
        self._files_lock = threading.Lock()
        self._cuts = 0
        # Held while the spare file is made or taken.
        self._spare_lock = threading.Lock()

    # -- writing -----------------------------------------------------------------------------------

    def append(
        self, records: Sequence[bytes], length: int, first: int, tail: Tail, committed: int, *, sync: bool
    ) -> None:
        """Write ``records`` (``first``…``tail.offset``, ``length`` bytes) as one group.

        With ``sync`` they are durable on return; else after :meth:`sync`. ``OSError`` means nothing was
        added. The caller is the only writer.
        """
        file = self._current
        if file is None or file.end + length + 512 > self._capacity:
            file = self._file_for(length)
        at = file.end
        # With durability "os" more may be committed than is synced: a mark must never prove what is not.
        committed = min(committed, self.synced)
        end = file.write_group(records, length, first, self.synced, committed, sync=sync)
        if at >= self._index_from:
            self._indexes[file.header.sequence].add(first, at or HEADER_BYTES)
            self._index_from = at + INDEX_STEP_BYTES
        file.end = end
        self.tail = tail
        if sync:
            self.synced = tail.offset
        if self._recent_wanted:
            data = records[0] if len(records) == 1 else b"".join(records)
            self._recent.add(Run(first, tail.offset, data))

    def append_frame(self, frame: bytes, tail: Tail, committed: int, *, sync: bool) -> None:
        """Like :meth:`append`, for one record."""
        file, length = self._current, len(frame)
        if (
            file is None
            or length > INDEX_STEP_BYTES
            or file.end + length + 512 > self._capacity
            or file.end >= self._index_from
            or self._recent_wanted
        ):
            self.append([frame], length, tail.offset, tail, committed, sync=sync)
            return
        synced = self.synced
        end = file.write_frame(frame, tail[0], synced, committed if committed < synced else synced, sync=sync)
        file.end = end
        self.tail = tail
        if sync:
            self.synced = tail[0]

    def undo_append(self) -> None:
        """After a failed :meth:`append`: make sure that no trace of it can be found. ``OSError`` if that fails."""
        if self._current is not None:
            self._current.undo()

    def _file_for(self, length: int) -> LogFile:
        current = self._current
        if current is not None and current.end + length + 512 <= self._capacity:
            return current
        if current is not None and current.end == 0:
            return current  # one group larger than a whole file: the file grows
        return self._roll()

    def _roll(self) -> LogFile:
        """Go on in a new file: the present one is synced to its end first."""
        self.prepare_spare()
        if self._current is not None:
            self.sync()
            self._current.left()
        tail = self.tail
        header = FileHeader(
            self.lineage, os.urandom(8), self._next_sequence, tail.offset + 1, tail.epoch, tail.running
        )
        path = file_path(self.directory, header.sequence)
        with self._spare_lock:
            os.rename(self.directory / SPARE, path)
            fsync_directory(self.directory)
        file = LogFile.start(path, header)
        self._capacity = file.size()
        with self._files_lock:
            self._indexes[header.sequence] = SparseIndex(complete=True)
            # An interrupt may have ended an earlier try here: that file has the same number, and is empty.
            self._files = [*(f for f in self._files if f.header.sequence != header.sequence), file]
            self._next_sequence = header.sequence + 1
            self._current = file
            self._index_from, self._mark_at = 0, -1
        return file

    def prepare_spare(self) -> None:
        """Have the next file allocated and durable ahead of its use. ``OSError`` when there is no room."""
        with self._spare_lock:
            spare = self.directory / SPARE
            if not spare.exists():
                LogFile.preallocate(spare, self.file_bytes)

    @property
    def wants_spare(self) -> bool:
        current = self._current
        return current is not None and current.end > self._capacity // 2 and not self.has_spare

    @property
    def has_spare(self) -> bool:
        return (self.directory / SPARE).exists()

    def sync(self) -> None:
        """Make everything that has been appended durable."""
        offset, current = self.tail.offset, self._current
        if current is not None and self.synced < offset:
            current.sync()
        self.synced = max(self.synced, offset)

    def sync_beside(self) -> bool:
        """Make durable what has been appended so far, without holding up the writer. Any thread.

        False when the present file is just being left; then :meth:`sync`, as the writer, finds it synced.
        """
        with self._files_lock:  # a file that was left has been synced to its end before the next is here
            offset, cuts, current = self.tail.offset, self._cuts, self._current
            if self.synced >= offset:
                return True
            if current is None:
                return False
            fd = os.open(current.path, os.O_RDWR | os.O_CLOEXEC)  # ours, whatever becomes of the writer's
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)
        # No call stands between look and step, so no other thread does. After a cut the offset may stand
        # for another record.
        if cuts == self._cuts and self.synced < offset:
            self.synced = offset
        return True

    @property
    def marked(self) -> bool:
        """Whether everything in the present file is proven by a mark behind it."""
        current = self._current
        return current is None or current.end == 0 or self._mark_at == current.end - GROUP_BYTES

    def mark(self, committed: int) -> None:
        """Write an empty group that proves the records before it, and sync it."""
        current = self._current
        if current is None or self.marked:
            return
        self.sync()
        at, committed = current.end, min(committed, self.synced)
        current.end = current.write_group((), 0, self.tail.offset + 1, self.synced, committed, sync=True)
        self._mark_at = at

    def seal(self) -> None:
        """Leave the present file for good, cut to what it holds; the next append starts a new one."""
        current, self._current = self._current, None
        if current is None:
            return
        if current.end == 0:
            with self._files_lock:
                self._files = self._files[:-1]
                current.close()
                current.path.unlink(missing_ok=True)
        else:
            os.truncate(current.path, current.end)
            current.sync()
            current.left()
        self.synced = max(self.synced, self.tail.offset)
        fsync_directory(self.directory)

    # -- reading -----------------------------------------------------------------------------------

    @property
    def first(self) -> int:
        """The first offset that is still in the log (``tail.offset + 1`` when it is empty)."""
        files = self._files
        return files[0].header.first if files else self.tail.offset + 1

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(f.end for f in self._files)

    def read(self, first: int, bytes_max: int) -> Run | None:
        """Whole records from ``first`` on: up to ``bytes_max`` bytes, but at least one record.

        ``None`` when ``first`` is beyond the tail; :class:`LogTrimmed` when it is no longer here. Safe on
        any thread.
        """
        if first > self.tail.offset:
            return None
        self._recent_wanted = True
        run = self._recent.read(first, bytes_max)
        return run if run is not None else self._read_files(first, bytes_max)

    def bytes_after(self, offset: int) -> int:
        """About how many bytes of log follow record ``offset`` (to within 64 KiB beyond the newest 8 MiB)."""
        if offset >= self.tail.offset:
            return 0
        recent = self._recent.bytes_after(offset)
        if recent is not None:
            return recent
        total = 0
        for file in reversed(self._files):
            if file.header.first <= offset + 1:
                with self._files_lock:
                    return total + max(0, file.end - self._index(file).place(offset + 1))
            total += file.end
        return total

    def in_memory(self, offset: int) -> bool:
        """Whether record ``offset`` and all that follow are read without touching files."""
        return self._recent.bytes_after(offset - 1) is not None

    def running_at(self, offset: int) -> int:
        """The running checksum through record ``offset``; :class:`LogTrimmed` when it is no longer known."""
        tail = self.tail
        if offset == tail.offset:
            return tail.running
        if offset == 0:
            return 0
        for file in self._files:
            if file.header.first == offset + 1:
                return file.header.running_before
        run = self._recent.read(offset, 1) or self._read_files(offset, 1)
        running: int = FRAME.unpack_from(run.data)[1]
        return running

    def _read_files(self, first: int, bytes_max: int) -> Run:
        with self._files_lock:
            files = self._files
            i = bisect_right([f.header.first for f in files], first) - 1
            if i < 0:
                raise LogTrimmed(
                    f"record {first} has been trimmed; the log starts at {self.first}", first=self.first
                )
            parts: list[bytes] = []
            size, offset = 0, first
            for file in files[i:]:
                offset, size = self._read_file(file, offset, bytes_max, parts, size)
                if size >= bytes_max or offset > self.tail.offset:
                    break
        return Run(first, offset - 1, b"".join(parts))

    def _read_file(
        self, file: LogFile, offset: int, bytes_max: int, parts: list[bytes], size: int
    ) -> tuple[int, int]:
        """Add records of one file from ``offset`` on to ``parts``; returns (next offset, bytes so far)."""
        at = self._index(file).place(offset)
        end, last = file.end, self.tail.offset
        window, base = b"", 0
        while at + HEADER_BYTES // 2 <= end and offset <= last:
            if not (base <= at and at + GROUP_BYTES <= base + len(window)):
                window, base = file.read(at, min(1 << 20, end - at)), at
            start = at - base + GROUP_BYTES
            length, group_first = file.group_in(window, at - base, at)
            if length < 0:
                break
            if start + length > len(window):
                window, base = file.read(at, max(GROUP_BYTES + length, min(1 << 20, end - at))), at
                start = GROUP_BYTES
            at += GROUP_BYTES + length
            body = window[start : start + length]
            # After a cut the last group of a file may hold less than its header says.
            if group_first == offset and 0 < length == len(body) == _first_length(body):
                records = 1  # as a writer alone makes them
            else:
                count = _count_from(body, group_first, offset)
                if count is None:
                    continue
                skip, records = count
                if skip:
                    body = body[skip:]
            room = bytes_max - size
            if len(body) > room:
                if parts and (room <= 0 or _first_length(body) > room):
                    return offset, bytes_max
                run = _slice(Run(offset, offset + records - 1, body), offset, max(room, 1))
                parts.append(run.data)
                return run.last + 1, bytes_max
            parts.append(body)
            size += len(body)
            offset += records
        return offset, size

    def _index(self, file: LogFile) -> SparseIndex:
        index = self._indexes[file.header.sequence]
        if not index.complete:
            for group in file.groups():
                index.add(group.first, group.at)
            index.complete = True
        return index

    # -- forgetting --------------------------------------------------------------------------------

    def first_within(self, bytes_max: int) -> int:
        """The first record of the oldest file from which on the log has at most ``bytes_max`` bytes."""
        files, total = self._files, 0
        first = self.tail.offset + 1
        for file in reversed(files):
            total += file.end
            if total > bytes_max:
                break
            first = file.header.first
        return first

    def trim(self, keep_from: int, *, bytes_kept: int, age_s: float) -> int:
        """Unlink old files, oldest first; returns how many.

        A file goes when all its records are below ``keep_from`` and it is beyond ``bytes_kept`` or older
        than ``age_s`` (see :attr:`LogFile.age_s`).
        """
        gone = 0
        while True:
            with self._files_lock:
                files = self._files
                if len(files) < 2 or files[1].header.first > keep_from:
                    return gone
                oldest = files[0]
                newer = sum(f.end for f in files[1:])
                if newer < bytes_kept and oldest.age_s < age_s:
                    return gone
                self._files = files[1:]
                del self._indexes[oldest.header.sequence]
                oldest.path.unlink(missing_ok=True)
                oldest.close()
            fsync_directory(self.directory)  # one by one, so that a power loss cannot leave a hole
            gone += 1

    def cut(self, tail: Tail) -> None:
        """Drop every record above ``tail``: later files newest first, then the end of the last one.

        The caller has saved what is worth saving and is the only writer. Afterwards the log goes on in a
        new file.
        """
        self.seal()
        with self._files_lock:
            while self._files and self._files[-1].header.first > tail.offset:
                file = self._files.pop()
                self._next_sequence = file.header.sequence
                file.close()
                file.path.unlink()
                fsync_directory(self.directory)
            if self._files:
                self._cut_file(self._files[-1], tail.offset)
            self._recent = _Recent()
        self.tail = tail
        self._cuts += 1
        self.synced = min(self.synced, tail.offset)

    def _cut_file(self, file: LogFile, last: int) -> None:
        for group in file.groups():
            body = file.read(group.start, group.length)
            count = _count_from(body, group.first, last + 1)
            if count is not None or group.end >= file.end:
                end = group.start + (count[0] if count is not None else group.length)
                os.truncate(file.path, end)
                fd = os.open(file.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
                file.end = end
                file.left()
                self._indexes[file.header.sequence] = SparseIndex(complete=False)
                return

    def abandon(self) -> None:
        """Close all files as they are: another log took this one's place. Readers find it empty."""
        with self._files_lock:
            files, self._files, self._current = self._files, [], None
            for file in files:
                file.close()
            self._recent = _Recent()

    def close(self) -> None:
        """Close all files; unlink what was made ahead. Nobody may be writing; readers find it empty."""
        self.seal()
        (self.directory / SPARE).unlink(missing_ok=True)
        self.abandon()


def _first_length(data: bytes) -> int:
    length: int = FRAME.unpack_from(data)[3]
    return FRAME_BYTES + length


def _count_from(body: bytes, group_first: int, offset: int) -> tuple[int, int] | None:
    """(bytes to skip to reach ``offset``, records from there on) in a group; ``None`` if all lie before it."""
    at, current, skip = 0, group_first, 0
    unpack = FRAME.unpack_from
    size = len(body)
    while at + FRAME_BYTES <= size:
        if current == offset:
            skip = at
        length = FRAME_BYTES + unpack(body, at)[3]
        if at + length > size:
            break
        at += length
        current += 1
    return (skip, current - offset) if current > offset else None
