"""One file of the log: its bytes, how they are written, and how they are read back after a crash.

Layout (all integers big-endian)::

    file header, 72 bytes
        0   8   magic  b"kvreplog"
        8   2   format version (1)
        10  2   checksum algorithm of the records (1 = CRC-32, chained)
        12  16  lineage
        28  8   salt, random
        36  8   sequence number of the file, 1, 2, 3 …
        44  8   first offset: that of the first record in the file
        52  8   epoch of the record before it
        60  4   running checksum before it
        64  4   0
        68  4   CRC-32 of bytes 0..67
    group, repeated
        0   4   magic  0x4b565247 ("KVRG")
        4   4   length of the records that follow
        8   8   first offset in the group
        16  8   synced: the offset known to be durable when the group was written
        24  8   committed: the commit mark at that time
        32  4   CRC-32 of bytes 0..31, seeded with CRC-32(salt, position of the header in the file)
        36  …   whole records (see model/codec.py)

Groups belong to this node and are never shipped; records are shipped byte for byte. A group header is
believed only if its checksum fits, which the salt makes impossible to forge from inside a value: so only
headers are searched for behind damage. A group without records is a mark: it proves what came before.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from kvrep.errors import LogCorrupt, UpgradeRequired
from kvrep.model.codec import CHECKSUM_CRC32

__all__ = ["FileHeader", "Group", "LogFile", "fsync_directory"]

MAGIC = b"kvreplog"
FORMAT = 1
HEADER = struct.Struct(">8sHH16s8sQQQIII")
HEADER_BYTES = HEADER.size
GROUP_MAGIC = 0x4B565247
GROUP_MAGIC_BYTES = b"KVRG"
GROUP = struct.Struct(">IIQQQI")
GROUP_BYTES = GROUP.size
_PLACED_BODY = struct.Struct(">QIIQQQ")
RWF_DSYNC = os.RWF_DSYNC
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What a file says of itself: which history it continues, and where."""

    lineage: bytes
    salt: bytes
    sequence: int
    first: int
    epoch_before: int
    running_before: int

    def encode(self) -> bytes:
        body = HEADER.pack(
            MAGIC, FORMAT, CHECKSUM_CRC32, self.lineage, self.salt, self.sequence,
            self.first, self.epoch_before, self.running_before, 0, 0,
        )[:-4]  # fmt: skip
        return body + _U32.pack(crc32(body))

    @classmethod
    def decode(cls, data: bytes) -> FileHeader | None:
        """``None`` when the bytes are not a whole header; ``UpgradeRequired`` when it is a newer one."""
        if len(data) < HEADER_BYTES or data[:8] != MAGIC:
            return None
        if _U32.unpack(data[68:72])[0] != crc32(data[:68]):
            return None
        _, version, algorithm, lineage, salt, sequence, first, epoch, running, _, _ = HEADER.unpack(
            data[:HEADER_BYTES]
        )
        if version != FORMAT or algorithm != CHECKSUM_CRC32:
            raise UpgradeRequired(
                f"log format {version} with checksum {algorithm} is not known here",
                found=(version, algorithm),
                supported=(FORMAT, CHECKSUM_CRC32),
            )
        return cls(lineage, salt, sequence, first, epoch, running)


class Group(NamedTuple):
    """One group header as found: its place, its records' place, and its marks."""

    at: int
    length: int
    first: int
    synced: int
    committed: int

    @property
    def start(self) -> int:
        return self.at + GROUP_BYTES

    @property
    def end(self) -> int:
        return self.at + GROUP_BYTES + self.length


class LogFile:
    """An open log file. Writing belongs to one thread at a time; reading needs no lock.

    Invariant: everything below ``end`` is whole groups; ``end`` moves by one assignment, after the write.
    """

    __slots__ = ("_closed", "_seed", "_written_s", "end", "fd", "header", "path")

    def __init__(self, path: Path, fd: int, header: FileHeader, end: int, *, age_s: float = 0.0) -> None:
        self.path = path
        self.fd = fd
        self.header = header
        self.end = end
        self._seed = crc32(header.salt)
        self._closed = False
        self._written_s = time.monotonic() - age_s
        """When it was written last, as far as known."""

    @staticmethod
    def preallocate(path: Path, size: int) -> None:
        """Make a file of ``size`` allocated bytes, durable with its directory entry. ``OSError`` when full."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.truncate(fd, size)  # a file system that cannot allocate ahead: sparse is next best
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        os.close(fd)
        fsync_directory(path.parent)

    @classmethod
    def start(cls, path: Path, header: FileHeader) -> LogFile:
        """Take a preallocated file into use. Its header is written with the first group."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return cls(path, fd, header, 0)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> LogFile | None:
        """Open a file that has been in use; ``None`` when it never got a whole header."""
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            header = FileHeader.decode(os.pread(fd, HEADER_BYTES, 0))
            if header is None:
                os.close(fd)
                return None
            # The one look at the wall clock: from here on the age is counted without it.
            age_s = max(0.0, time.time() - os.fstat(fd).st_mtime)
            return cls(path, fd, header, HEADER_BYTES, age_s=age_s)
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def headless(path: Path) -> bool:
        """Whether nothing was ever written where the header stands."""
        with open(path, "rb") as file:
            return not file.read(HEADER_BYTES).strip(b"\0")

    @property
    def age_s(self) -> float:
        """Seconds since the last write to it; meant for files that were left."""
        return time.monotonic() - self._written_s

    def left(self) -> None:
        """Nothing more is written to it: its age counts from now."""
        self._written_s = time.monotonic()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self.fd)

    def group_header(self, at: int, length: int, first: int, synced: int, committed: int) -> bytes:
        # The checksum runs over the position and the header, as if they stood behind each other.
        body = _PLACED_BODY.pack(at, GROUP_MAGIC, length, first, synced, committed)
        return body[8:] + _U32.pack(crc32(body, self._seed))

    def write_group(
        self, records: Sequence[bytes], length: int, first: int, synced: int, committed: int, *, sync: bool
    ) -> int:
        """Write one group at the end and return the end after it; ``self.end`` stays for the caller to move.

        With ``sync`` the bytes are durable on return. ``OSError`` leaves ``end`` where it was.
        """
        at = self.end
        prefix = b""
        if at == 0:
            prefix = self.header.encode()
            at = HEADER_BYTES
        head = self.group_header(at, length, first, synced, committed)
        position = at - len(prefix)
        total = len(prefix) + GROUP_BYTES + length
        flags = RWF_DSYNC if sync else 0
        if len(records) == 1 and length < 4096:
            buffers = [prefix + head + records[0]]
        elif len(records) < 64:
            buffers = [prefix + head, *records]
        else:
            buffers = [b"".join((prefix, head, *records))]
        written = os.pwritev(self.fd, buffers, position, flags)
        if written != total:
            self._write_rest(b"".join(buffers), position, written, flags)
        return position + total

    def write_frame(self, frame: bytes, first: int, synced: int, committed: int, *, sync: bool) -> int:
        """Like :meth:`write_group`, for one small record that is not the first of its file."""
        at, length = self.end, len(frame)
        body = _PLACED_BODY.pack(at, GROUP_MAGIC, length, first, synced, committed)
        data = body[8:] + _U32.pack(crc32(body, self._seed)) + frame
        written = os.pwritev(self.fd, (data,), at, RWF_DSYNC if sync else 0)
        if written != GROUP_BYTES + length:
            self._write_rest(data, at, written, RWF_DSYNC if sync else 0)
        return at + GROUP_BYTES + length

    def _write_rest(self, data: bytes, position: int, written: int, flags: int) -> None:
        view = memoryview(data)
        while written < len(data):
            count = os.pwritev(self.fd, [view[written:]], position + written, flags)
            if count == 0:
                raise OSError(errno.ENOSPC, "no space left for the log")
            written += count

    def undo(self) -> None:
        """Wipe the header of a group that failed half-way, so that no later open can find it."""
        length = min(HEADER_BYTES + GROUP_BYTES, self.size() - self.end)
        if length > 0:  # writing beyond the end of the file would need the room that there is not
            os.pwritev(self.fd, [bytes(length)], self.end, os.RWF_DSYNC)

    def sync(self) -> None:
        os.fdatasync(self.fd)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def read(self, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes, or fewer at the end of the file."""
        data = os.pread(self.fd, length, start)
        while 0 < len(data) < length:
            more = os.pread(self.fd, length - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def group_at(self, at: int, data: bytes | None = None) -> Group | None:
        """The group whose header is at ``at``, if a valid header is there."""
        raw = self.read(at, GROUP_BYTES) if data is None else data
        if len(raw) < GROUP_BYTES:
            return None
        magic, length, first, synced, committed, check = GROUP.unpack(raw)
        if magic != GROUP_MAGIC or check != crc32(raw[:32], crc32(_U64.pack(at), self._seed)):
            return None
        return Group(at, length, first, synced, committed)

    def group_in(self, window: bytes, place: int, at: int) -> tuple[int, int]:
        """(length, first offset) of the group whose header is at ``place`` of ``window`` and at ``at`` of the
        file; a length of -1 when no valid header is there. What :meth:`group_at` does, for readers of much."""
        if place + GROUP_BYTES > len(window):
            return -1, 0
        magic, length, first, _, _, check = GROUP.unpack_from(window, place)
        if magic != GROUP_MAGIC or check != crc32(
            window[place : place + 32], crc32(_U64.pack(at), self._seed)
        ):
            return -1, 0
        return length, first

    def groups(self, start: int = HEADER_BYTES) -> Iterator[Group]:
        """Valid group headers one behind the other, from ``start`` on, until there is none."""
        at = start
        window, base = b"", 0
        while True:
            if not (base <= at and at + GROUP_BYTES <= base + len(window)):
                window, base = self.read(at, 1 << 18), at
            group = self.group_at(at, window[at - base : at - base + GROUP_BYTES])
            if group is None:
                return
            yield group
            at = group.end

    def search_groups(self, start: int) -> Iterator[Group]:
        """Valid group headers anywhere from ``start`` to the end of the file: only used behind damage."""
        size = self.size()
        base = start
        while base < size:
            window = self.read(base, (1 << 20) + GROUP_BYTES)
            found = window.find(GROUP_MAGIC_BYTES)
            while found >= 0:
                group = self.group_at(base + found)
                if group is not None:
                    yield group
                found = window.find(GROUP_MAGIC_BYTES, found + 1)
            base += 1 << 20

    def corrupt(self, at: int, message: str) -> LogCorrupt:
        return LogCorrupt(f"{self.path.name} at byte {at}: {message}", path=str(self.path), at=at)


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
