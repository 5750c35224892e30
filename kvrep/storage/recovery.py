"""Opening a log after whatever ended its last use.

What is damaged at or below something proven (contained in LMDB, a commit mark, the synced mark of a later
valid group) is corruption: nothing is cut and the open fails. What is damaged above is a write that never
finished: it is saved to a rescue file, reported and cut. Recovered bytes are not durable bytes: what lies
above the proven point is written again and synced before anybody may rely on it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvrep.errors import LogCorrupt
from kvrep.model.codec import FRAME, FRAME_BYTES, walk
from kvrep.storage.log import SPARE, START, Log, Run, Tail, file_path, log_paths
from kvrep.storage.log_file import HEADER_BYTES, Group, LogFile, fsync_directory
from kvrep.storage.rescue import saving

__all__ = ["Recovered", "recover"]


@dataclass(slots=True)
class Recovered:
    """What :func:`recover` found."""

    log: Log
    committed: int
    """The highest commit mark in what was read."""
    unfinished_bytes: int = 0
    rescue_path: Path | None = None
    records: int = 0


@dataclass(slots=True)
class _Scan:
    applied: Tail
    replay: Callable[[Run], None]
    next: int
    """The offset of the next record expected."""
    running: int | None
    epoch: int
    committed: int = 0
    synced: int = 0
    records: int = 0
    unproven_at: int = HEADER_BYTES
    """Where, in the file being scanned, the first group above ``synced`` starts."""
    pending: list[tuple[int, int]] = field(default_factory=list)


def recover(
    directory: Path,
    lineage: bytes,
    applied: Tail,
    *,
    file_bytes: int,
    rescue: Path,
    replay: Callable[[Run], None],
    epoch_of: Callable[[Run], int],
    expected: bool = False,
) -> Recovered:
    """Open the log in ``directory``; feed ``replay`` every run of records above ``applied``, in order.

    ``expected``: record ``applied`` must be in the log (it is not in that of a copy that was received).
    ``epoch_of`` tells the epoch of the last record of a run. Raises :class:`LogCorrupt`, and then has
    changed nothing.
    """
    (directory / SPARE).unlink(missing_ok=True)
    files, unfinished = _open_files(directory, lineage)
    try:
        if expected and (not files or files[0].header.first > applied.offset):
            raise LogCorrupt(f"record {applied.offset} is not in the log any more", path=str(directory), at=0)
        result = _recover(directory, lineage, applied, files, file_bytes, rescue, replay, epoch_of)
        if unfinished is not None:
            _drop_headless(unfinished, result, rescue)
        return result
    except BaseException:
        for file in files:
            file.close()
        raise


def _recover(
    directory: Path,
    lineage: bytes,
    applied: Tail,
    files: list[LogFile],
    file_bytes: int,
    rescue: Path,
    replay: Callable[[Run], None],
    epoch_of: Callable[[Run], int],
) -> Recovered:
    start = _start_file(files, applied)
    tail = applied

    def feed(run: Run) -> None:
        nonlocal tail
        replay(run)
        tail = Tail(run.last, epoch_of(run), scan.running or 0)

    scan = _Scan(applied, feed, next=0, running=None, epoch=0)
    for i in range(start, len(files)):
        file = files[i]
        if i > start and (file.header.first != scan.next or file.header.running_before != scan.running):
            raise files[i - 1].corrupt(
                files[i - 1].end, f"record {scan.next} is damaged or missing, and later files exist"
            )
        scan.next, scan.running = file.header.first, file.header.running_before
        scan.unproven_at = HEADER_BYTES
        _scan_file(file, scan)
    result = Recovered(
        Log(directory, lineage, files, tail, file_bytes=file_bytes),
        committed=scan.committed,
        records=scan.records,
    )
    if files:
        if scan.next <= applied.offset:
            raise files[-1].corrupt(
                files[-1].end, f"record {scan.next} is damaged, and LMDB holds records to {applied.offset}"
            )
        _finish_last(files[-1], scan, result, rescue)
    for file in files[:start]:
        file.end = file.size()
    return result


def _open_files(directory: Path, lineage: bytes) -> tuple[list[LogFile], Path | None]:
    """The files with a header, oldest first, and the newest one if it never got a header."""
    files: list[LogFile] = []
    unfinished: Path | None = None
    paths = log_paths(directory)
    try:
        for i, path in enumerate(paths):
            file = LogFile.open(path, writable=True)
            if file is None:
                # The header is written with the first group, into the same sector: so a header that is
                # neither whole nor wholly missing is damage.
                if i < len(paths) - 1 or not LogFile.headless(path):
                    raise LogCorrupt(f"{path.name} has no valid header", path=str(path), at=0)
                unfinished = path
                break
            files.append(file)
            if file.header.lineage != lineage:
                raise file.corrupt(0, "the file belongs to another store")
            if len(files) > 1 and file.header.sequence != files[-2].header.sequence + 1:
                missing = file_path(directory, files[-2].header.sequence + 1)
                raise LogCorrupt(f"{missing.name} is missing", path=str(missing), at=0)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files, unfinished


def _start_file(files: list[LogFile], applied: Tail) -> int:
    """The index of the file to scan from: the last one that starts at or before the first record wanted."""
    start = 0
    for i, file in enumerate(files):
        if file.header.first <= applied.offset + 1:
            start = i
    if files and files[start].header.first > applied.offset + 1:
        raise files[start].corrupt(
            0, f"the log starts at record {files[start].header.first}, LMDB ends at {applied.offset}"
        )
    return start


def _scan_file(file: LogFile, scan: _Scan) -> None:
    """Check one file from the header on; leaves ``file.end`` behind its last whole record."""
    file.end = HEADER_BYTES
    behind: Group | None = None
    for group in file.groups():
        if behind is not None and not _scan_group(file, behind, scan, next_first=group.first):
            return
        behind = group
    if behind is not None:
        _scan_group(file, behind, scan, next_first=None)


def _scan_group(file: LogFile, group: Group, scan: _Scan, next_first: int | None) -> bool:
    """Check one group and feed what is above ``applied``; False when the scan must stop here."""
    if group.first != scan.next:
        return False
    scan.committed = max(scan.committed, group.committed)
    if group.synced > scan.synced:
        scan.synced = group.synced
        scan.unproven_at = group.at
    applied = scan.applied
    if next_first is not None and next_first <= applied.offset + 1:
        # Wholly contained in LMDB: the checksum behind it is taken up where reading starts.
        scan.next, scan.running, file.end = next_first, None, group.end
        return True
    data = file.read(group.start, group.length)
    running, skip = scan.running, 0
    if running is None or group.first <= applied.offset:
        skip, running = _skip_applied(data, group.first, applied, scan.running)
        if running is None:
            return False
    starts, end, running = walk(data, running, skip)
    first = max(group.first, applied.offset + 1)
    scan.running = running
    scan.next = first + len(starts)
    scan.records += len(starts)
    file.end = group.start + end
    if starts:
        scan.replay(Run(first, scan.next - 1, data[skip:end]))
    return end == len(data)


def _skip_applied(data: bytes, first: int, applied: Tail, running: int | None) -> tuple[int, int | None]:
    """(position behind the records that LMDB has, running checksum there); ``None`` when they do not fit."""
    if first == applied.offset + 1:
        return 0, applied.running
    at, offset, seen = 0, first, running
    while offset <= applied.offset and at + FRAME_BYTES <= len(data):
        _, seen, _, length = FRAME.unpack_from(data, at)
        at += FRAME_BYTES + length
        offset += 1
    if offset != applied.offset + 1 or seen != applied.running or at > len(data):
        return 0, None
    return at, seen


def _finish_last(file: LogFile, scan: _Scan, result: Recovered, rescue: Path) -> None:
    """Judge what lies behind the last whole record, write the unproven part again, and cut the rest."""
    later = [g for g in file.search_groups(file.end) if g.first >= scan.next or g.synced >= scan.next]
    proven = max([scan.committed, scan.synced, *(max(g.synced, g.committed) for g in later)])
    if proven >= scan.next:
        raise file.corrupt(file.end, f"record {scan.next} is damaged, and records to {proven} were durable")
    rest = file.read(file.end, file.size() - file.end).rstrip(b"\0")
    if rest:
        result.unfinished_bytes = len(rest)
        result.rescue_path = _save_unfinished(rescue, file.path, file.end, rest)
    if file.end > scan.unproven_at:
        again = memoryview(file.read(scan.unproven_at, file.end - scan.unproven_at))
        done = 0
        while done < len(again):
            done += os.pwrite(file.fd, again[done:], scan.unproven_at + done)
    os.truncate(file.fd, file.end)
    os.fsync(file.fd)


def _drop_headless(path: Path, result: Recovered, rescue: Path) -> None:
    """Remove a file that was made and perhaps written to, but never got its header."""
    rest = path.read_bytes().rstrip(b"\0")
    if rest:
        result.unfinished_bytes += len(rest)
        result.rescue_path = _save_unfinished(rescue, path, 0, rest)
    path.unlink()
    fsync_directory(path.parent)


def _save_unfinished(rescue: Path, source: Path, at: int, rest: bytes) -> Path:
    path = rescue / f"unfinished-{time.time_ns()}-{source.stem}-{at}.bin"
    with saving(path) as file:
        file.write(rest)
    return path


def fresh(directory: Path, lineage: bytes, *, file_bytes: int, tail: Tail = START) -> Log:
    """A log without files that goes on behind ``tail``: of a new store, or one that got a snapshot."""
    directory.mkdir(parents=True, exist_ok=True)
    return Log(directory, lineage, [], tail, file_bytes=file_bytes)
