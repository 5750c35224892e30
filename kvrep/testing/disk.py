"""A model of a disk that keeps no promise but those that POSIX makes.

- What was written is on the disk once ``fsync`` or ``fdatasync`` of that file returned, or, written with
  ``O_DSYNC`` or ``RWF_DSYNC``, once the write returned (that write alone, not those before it).
- Until then any part of it may be there or not, in any combination: later writes without earlier ones, and
  writes torn at 512 bytes.
- Names made, replaced or removed in a directory last once ``fsync`` of the directory returned; until then
  the operations on one directory take effect in their order, as many of them as the crash left time for,
  and different directories know nothing of each other. Syncing a file does not make its name last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kvrep.testing.trace import Event, Kind, Trace, TraceError, read_folder

__all__ = ["EVERYTHING", "NOTHING", "SECTOR", "Change", "Choice", "Disk", "Folder", "check_whole"]

SECTOR = 512
MMAPPED = frozenset(("lock.mdb",))
"""Changed through a memory map, which is not recorded; its content means nothing after a crash."""


@dataclass(slots=True, eq=False)
class Change:
    """One change of a file's content or size that may not be on the disk yet."""

    offset: int
    data: bytes | None
    """``None``: a change of size."""
    size: int = 0
    grow_only: bool = False
    durable: bool = False
    """Certainly on the disk, though others before it may not be."""

    def apply(self, content: bytearray, keep: Callable[[int], bool] | None) -> None:
        """Apply it, or those of its sectors for which ``keep(sector)`` is true."""
        if self.data is None:
            if self.size < len(content) and not self.grow_only:
                del content[self.size :]
            elif self.size > len(content):
                content.extend(bytes(self.size - len(content)))
            return
        at, end = self.offset, self.offset + len(self.data)
        while at < end:
            stop = end if keep is None else min(end, (at // SECTOR + 1) * SECTOR)
            if keep is None or keep(at // SECTOR):
                if stop > len(content):
                    content.extend(bytes(stop - len(content)))
                content[at:stop] = self.data[at - self.offset : stop - self.offset]
            at = stop


@dataclass(slots=True, eq=False)
class File:
    disk: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.pending:
            change.apply(self.disk, None)
        self.pending.clear()


@dataclass(slots=True, eq=False)
class Folder:
    disk: dict[str, File | Folder] = field(default_factory=dict)
    now: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[dict[str, File | Folder | None]] = field(default_factory=list)
    """Operations: names and what they stand for afterwards (``None``: nothing)."""

    def do(self, operation: dict[str, File | Folder | None]) -> None:
        self.pending.append(operation)
        _enter(self.now, operation)

    def sync(self) -> None:
        self.disk = dict(self.now)
        self.pending.clear()

    def after(self, count: int) -> dict[str, File | Folder]:
        entries = dict(self.disk)
        for operation in self.pending[:count]:
            _enter(entries, operation)
        return entries


def _enter(entries: dict[str, File | Folder], operation: dict[str, File | Folder | None]) -> None:
    for name, node in operation.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class Choice(NamedTuple):
    """What of the unsynced is on the disk."""

    folder: Callable[[Folder], int]
    """How many of its pending operations took effect."""
    change: Callable[[Change], Callable[[int], bool] | bool]
    """Whether a change did, or which of its sectors."""


def all_names(folder: Folder) -> int:
    return len(folder.pending)


def no_names(folder: Folder) -> int:
    del folder
    return 0


def all_data(change: Change) -> bool:
    del change
    return True


def no_data(change: Change) -> bool:
    del change
    return False


EVERYTHING = Choice(all_names, all_data)
NOTHING = Choice(no_names, no_data)


class _Open(NamedTuple):
    node: File | Folder
    dsync: bool


class Disk:
    """The model: what is certainly on the disk, and what may be."""

    def __init__(self, trace: Trace) -> None:
        self._root_path = str(trace.root)
        self._root = Folder()
        self._fds: dict[int, _Open] = {}
        for name in trace.folders_before:
            folder, last = self._parent(f"{self._root_path}/{name}")
            folder.do({last: Folder()})
        for name, content in trace.before.items():
            folder, last = self._parent(f"{self._root_path}/{name}")
            folder.do({last: File(bytearray(content))})
        for folder in self._folders(self._root):
            folder.sync()
        self.last_write: Change | None = None
        """The write that :meth:`apply` made last, while it may be under way."""

    def _folders(self, folder: Folder) -> Iterator[Folder]:
        yield folder
        for node in folder.now.values():
            if isinstance(node, Folder):
                yield from self._folders(node)

    def _parent(self, path: str) -> tuple[Folder, str]:
        parts = os.path.normpath(path)[len(self._root_path) :].strip("/").split("/")
        folder = self._root
        for part in parts[:-1]:
            node = folder.now[part]
            if not isinstance(node, Folder):
                raise TraceError(f"{path} leads through a file")
            folder = node
        return folder, parts[-1]

    def _node(self, path: str) -> File | Folder:
        if os.path.normpath(path) == self._root_path:
            return self._root
        folder, name = self._parent(path)
        return folder.now[name]

    def _file(self, event: Event) -> File:
        node = self._fds[event.fd].node if event.fd >= 0 else self._node(event.data.decode())
        if not isinstance(node, File):
            raise TraceError("a folder was written to")
        return node

    # -- events --------------------------------------------------------------------------------

    def apply(self, event: Event) -> bool:
        """What an event does before anything of it is certain; False when it changes nothing."""
        self.last_write = None
        kind, path = event.kind, event.data
        if kind == Kind.OPEN:
            return self._open(event)
        if kind == Kind.CLOSE:
            del self._fds[event.fd]
            return False
        if kind == Kind.WRITE:
            self.last_write = Change(event.a, event.data)
            self._file(event).pending.append(self.last_write)
        elif kind == Kind.RESIZE:
            self._file(event).pending.append(Change(0, None, size=event.a))
        elif kind == Kind.ALLOCATE:
            self._file(event).pending.append(Change(0, None, size=event.a + event.b, grow_only=True))
        elif kind == Kind.MKDIR:
            folder, name = self._parent(path.decode())
            folder.do({name: Folder()})
        elif kind in (Kind.UNLINK, Kind.RMDIR):
            folder, name = self._parent(path.decode())
            folder.do({name: None})
        elif kind == Kind.RENAME:
            self._rename(path.decode(), event.second.decode())
        elif kind == Kind.UNKNOWN:
            raise TraceError(f"a call that the model does not know, on {path!r}")
        return kind != Kind.SYNC

    def settle(self, event: Event) -> bool:
        """What is certain once the event's call has returned; False when that is nothing new."""
        if event.kind == Kind.SYNC:
            self._fds[event.fd].node.sync()
            return True
        if event.kind == Kind.WRITE and (event.b or self._fds[event.fd].dsync):
            assert self.last_write is not None
            self.last_write.durable = True
            return True
        return event.kind == Kind.MARK

    def _open(self, event: Event) -> bool:
        path, flags = event.data.decode(), event.a
        created = bool(event.b)
        if created:
            folder, name = self._parent(path)
            folder.do({name: File()})
        node = self._node(path)
        self._fds[event.fd] = _Open(node, bool(flags & (os.O_DSYNC | os.O_SYNC)))
        if flags & os.O_TRUNC and not created and isinstance(node, File):
            node.pending.append(Change(0, None, size=0))
            return True
        return created

    def _rename(self, old: str, new: str) -> None:
        folder, name = self._parent(old)
        target, new_name = self._parent(new)
        if folder is not target:
            raise TraceError(f"renaming {old} into another folder is not modelled")
        folder.do({name: None, new_name: folder.now[name]})

    # -- what may be there ---------------------------------------------------------------------

    @property
    def uncertain(self) -> list[Change]:
        """Changes that may or may not be on the disk."""
        found = []
        for folder in self._folders(self._root):
            for node in folder.now.values():
                if isinstance(node, File):
                    found += [c for c in node.pending if not c.durable]
        return found

    @property
    def names_pending(self) -> bool:
        return any(folder.pending for folder in self._folders(self._root))

    def build(self, choice: Choice) -> tuple[dict[str, bytes], list[str]]:
        """Files and folders as this choice leaves them."""
        files: dict[str, bytes] = {}
        folders: list[str] = []
        built: dict[int, bytes] = {}

        def visit(folder: Folder, prefix: str) -> None:
            for name, node in folder.after(choice.folder(folder)).items():
                if isinstance(node, Folder):
                    folders.append(prefix + name)
                    visit(node, f"{prefix}{name}/")
                else:
                    if id(node) not in built:
                        built[id(node)] = _build_file(node, choice)
                    files[prefix + name] = built[id(node)]

        visit(self._root, "")
        return files, sorted(folders)


def _build_file(file: File, choice: Choice) -> bytes:
    content = bytearray(file.disk)
    for change in file.pending:
        chosen = True if change.durable else choice.change(change)
        if chosen is True:
            change.apply(content, None)
        elif chosen is not False:
            change.apply(content, chosen)
    return bytes(content)


def check_whole(trace: Trace) -> None:
    """The model, with every call made, must hold what the real folder does: else a call went unrecorded."""
    disk = Disk(trace)
    for event in trace.events:
        disk.apply(event)
        disk.settle(event)
    files, folders = disk.build(EVERYTHING)
    real_files, real_folders = read_folder(trace.root)
    wrong = {
        name
        for name in {*files, *real_files}
        if files.get(name) != real_files.get(name) and Path(name).name not in MMAPPED
    }
    wrong |= set(folders) ^ set(real_folders)
    if wrong:
        raise TraceError(f"the trace does not explain what is in {trace.root}: {sorted(wrong)}")
