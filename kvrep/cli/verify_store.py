"""The checks of a store on disk. Nothing is changed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrep.cli.checks import Report
from kvrep.cli.console import binary, number
from kvrep.errors import Error, NotAStore, StoreInUse
from kvrep.model.codec import FRAME, decode, walk
from kvrep.model.record import Kind
from kvrep.storage.home import Home
from kvrep.storage.log import log_paths
from kvrep.storage.log_file import HEADER_BYTES, LogFile

__all__ = ["verify_store"]


@dataclass(slots=True)
class Applied:
    """Through which record LMDB has the log, and what it says of it."""

    offset: int
    epoch: int
    running: int


def verify_store(path: Path) -> Report:
    """Check the store at ``path``. Damage is reported; ``StoreInUse`` and ``NotAStore`` are raised."""
    report = Report(f"store {path}")
    try:
        home = Home.open(path, create=False, name=None, lineage=b"")
    except (StoreInUse, NotAStore):
        raise
    except Error as error:
        report.add("identity", False, error.message)
        return report
    try:
        name = home.name or "no name"
        report.add(
            "identity", True, f"{name}, store {home.store_id.hex()}, promised epoch {home.promised_epoch}"
        )
        applied = _check_lmdb(home, report)
        _LogCheck(home, report, applied).run()
        rescued = sorted(p.name for p in home.rescue.iterdir()) if home.rescue.is_dir() else []
        if rescued:
            report.notes.append(
                f"{len(rescued)} rescue files: records that were dropped earlier: {', '.join(rescued)}"
            )
    finally:
        home.close()
    return report


# -- LMDB ------------------------------------------------------------------------------------------


def _check_lmdb(home: Home, report: Report) -> Applied | None:
    """Recompute the digests, in a process of its own: LMDB may crash on pages that are damaged."""
    command = [
        sys.executable,
        "-m",
        "kvrep.cli.verify_lmdb",
        str(home.generation / "data"),
        home.lineage.hex(),
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        why = f"signal {-done.returncode}" if done.returncode < 0 else (words or ["no answer"])[-1]
        report.add("LMDB", False, f"reading it ended with {why}: the file is damaged")
        return None
    if "error" in found:
        report.add("LMDB", False, found["error"])
        return None
    report.add(
        "LMDB", True, f"{binary(found['bytes'])}, holds the log through record {number(found['applied'][0])}"
    )
    for name, space in sorted(found["keyspaces"].items()):
        _check_keyspace(report, name, space)
    if not found["keyspaces"]:
        report.add("digests", True, "no keyspace has been flushed yet")
    if found["diverged"]:
        report.add(
            "against primary", False, f"digests differed from the primary's at record {found['diverged']}"
        )
    elif found["verified"]:
        report.notes.append(f"digests were equal to the primary's through record {number(found['verified'])}")
    return Applied(*found["applied"])


def _check_keyspace(report: Report, name: str, space: dict[str, Any]) -> None:
    digest_ok = space["digest"] == space["stored"]
    count_ok = space["count"] == space["stored_count"]
    detail = f"{number(space['count'])} pairs, digest {space['digest'][:16]}…"
    if not digest_ok:
        detail += f" but {space['stored'][:16]}… is stored: keys or values changed"
    if not count_ok:
        detail += f" but {number(space['stored_count'])} pairs are on record"
    report.add(f"digest of {name}", digest_ok and count_ok, detail)


# -- the log ---------------------------------------------------------------------------------------


class _Damage(Exception):
    """Where the log is damaged, for people."""


class _LogCheck:
    """Reads all log files in order and follows the chain of checksums from the first record to the last."""

    def __init__(self, home: Home, report: Report, applied: Applied | None) -> None:
        self._home = home
        self._report = report
        self._applied = applied
        self._first = 0
        """The first record in the log; 0 before the first file."""
        self._next = 0
        """The offset of the next record expected."""
        self._running = 0
        self._epoch = 0
        self._bytes = 0
        self._proven = applied.offset if applied is not None else 0
        """Records through this one were durable once, so they must be here."""
        self._at_applied: tuple[int, int] | None = None
        """(epoch, running checksum) of the last record that LMDB says it has, as the log has it."""

    def run(self) -> None:
        paths = log_paths(self._home.generation / "log")
        try:
            for path in paths:
                self._check_file(path, last=path == paths[-1])
        except (_Damage, Error, OSError) as error:
            self._report.add("log", False, str(error))
            return
        self._report.add("log", True, self._summary(len(paths)))
        self._check_meets_lmdb()

    def _summary(self, files: int) -> str:
        if self._next == self._first:
            return f"{files} files, no records"
        through = f"records {number(self._first)} to {number(self._next - 1)}"
        return f"{files} files, {through}, {binary(self._bytes)}, chain whole"

    def _check_file(self, path: Path, *, last: bool) -> None:
        file = LogFile.open(path)
        if file is None:
            with path.open("rb") as raw:
                if last and not any(raw.read(HEADER_BYTES)):
                    return  # made, but never written to
            raise _Damage(f"{path.name}: the file header is damaged")
        try:
            self._check_header(file)
            self._check_rest(file, self._check_groups(file), last=last)
        finally:
            file.close()

    def _check_header(self, file: LogFile) -> None:
        header = file.header
        if header.lineage != self._home.lineage:
            raise _Damage(f"{file.path.name} belongs to another store")
        if self._first == 0:
            self._next = self._first = header.first
            self._running, self._epoch = header.running_before, header.epoch_before
            if self._applied is not None and self._applied.offset == header.first - 1:
                self._at_applied = self._epoch, self._running
        elif (header.first, header.running_before) != (self._next, self._running):
            raise _Damage(
                f"{file.path.name} goes on at record {header.first}, record {self._next} is expected there:"
                " records are damaged or missing"
            )

    def _check_groups(self, file: LogFile) -> int:
        """Follow the groups; returns where the whole records end."""
        end = HEADER_BYTES
        for group in file.groups():
            self._proven = max(self._proven, group.synced, group.committed)
            if group.first != self._next:
                raise _Damage(f"{file.path.name} at byte {group.at}: record {self._next} is expected there")
            data = file.read(group.start, group.length)
            starts, stop, running = walk(data, self._running)
            self._take(data[:stop], starts)
            self._running = running
            self._next += len(starts)
            end = group.start + stop
            if stop != group.length:
                break
        return end

    def _take(self, data: bytes, starts: list[int]) -> None:
        """Records whose checksums are right must make sense, too."""
        if not starts:
            return
        self._bytes += len(data)
        records, _ = decode(data, self._next, self._running)
        for record, at in zip(records, starts, strict=True):
            if record.epoch < self._epoch:
                raise _Damage(f"record {record.offset} is of epoch {record.epoch}, below {self._epoch}")
            if record.kind not in tuple(Kind):
                raise _Damage(f"record {record.offset} is of kind {record.kind}, which is not known here")
            self._epoch = record.epoch
            if self._applied is not None and record.offset == self._applied.offset:
                self._at_applied = record.epoch, FRAME.unpack_from(data, at)[1]

    def _check_rest(self, file: LogFile, end: int, *, last: bool) -> None:
        """Behind the whole records is nothing, or a write that never finished; anything else is damage."""
        rest = file.read(end, file.size() - end).rstrip(b"\0")
        place = f"{file.path.name} at byte {end}: record {self._next} is damaged"
        if not last:
            if rest:
                raise _Damage(f"{place}, and later files exist")
            return
        for group in file.search_groups(end):
            self._proven = max(self._proven, group.synced, group.committed)
        if self._proven >= self._next:
            raise _Damage(f"{place} or missing, and records through {self._proven} were durable")
        if rest:
            self._report.notes.append(
                f"the log ends with {number(len(rest))} bytes of a write that never finished;"
                " the next open saves them to a rescue file and cuts them"
            )

    def _check_meets_lmdb(self) -> None:
        """LMDB holds the log through one record, and the log must be able to go on from there."""
        if self._applied is None:
            self._report.add("log and LMDB meet", False, "could not be checked: LMDB is damaged")
            return
        ok, detail = self._meeting(self._applied)
        self._report.add("log and LMDB meet", ok, detail)

    def _meeting(self, applied: Applied) -> tuple[bool, str]:
        last = self._next - 1
        if self._first == 0:
            empty = applied.offset == 0
            return (
                empty,
                "both are empty" if empty else f"the log is gone, LMDB ends at record {applied.offset}",
            )
        if self._at_applied is None and (applied.offset or self._first > 1):
            return False, f"LMDB ends at record {applied.offset}, the log has {self._first} to {last}"
        if applied.offset and self._at_applied != (applied.epoch, applied.running):
            return False, f"record {applied.offset} of the log is not the one that LMDB holds"
        left = last - applied.offset
        more = (
            f"the next open replays {number(left)} more from the log" if left else "LMDB holds all of the log"
        )
        return True, f"at record {number(applied.offset)}; {more}"
