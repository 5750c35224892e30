"""Crash images: everything that a disk may hold after a power loss, at every point of a workload.

A workload runs once, in a process of its own, with every write, flush and directory operation below one
folder recorded (by ``record_io.c``, preloaded). The trace is then played back on a model of a disk that
promises little (:mod:`kvrep.testing.disk`).

At every event :func:`images` builds what may be there: after ``kill -9`` (all that was called, the last write
perhaps in part), after a power loss (nothing unsynced; everything but one write; any of it, drawn from a
seed). :func:`check_images` gives each image to a check of yours, in worker processes; :class:`Promises`
is the one for a kvrep store.

The workload says how far it has come with :func:`mark`: ``begin 7`` before its seventh atomic write,
``done 7`` when that was acknowledged, ``safe 7`` when it was acknowledged as safe from power loss.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvrep.testing.disk import (
    EVERYTHING,
    NOTHING,
    SECTOR,
    Change,
    Choice,
    Disk,
    Folder,
    all_data,
    all_names,
    check_whole,
    no_data,
    no_names,
)
from kvrep.testing.trace import Event, Kind, Trace, TraceError, parse, read_folder

__all__ = [
    "Image",
    "Promises",
    "RecorderUnavailable",
    "Trace",
    "TraceError",
    "build_recorder",
    "images",
    "mark",
    "record",
    "state_hash",
]

Content = Mapping[tuple[str, bytes], bytes]


class RecorderUnavailable(Exception):
    """This machine has no C compiler to build the recorder with."""


def mark(text: str) -> None:
    """To be called by the workload: put ``text`` into the trace. Without a recorder it does nothing."""
    try:
        function = ctypes.CDLL(None).kvrep_trace_mark
    except AttributeError:
        return
    function(text.encode())


def build_recorder(folder: Path) -> Path:
    """Compile the recorder into ``folder``; :class:`RecorderUnavailable` where that is not possible."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        raise RecorderUnavailable("recording file operations needs Linux and a C compiler")
    target = folder / "record_io.so"
    source = Path(__file__).with_name("record_io.c")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl", "-lpthread"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RecorderUnavailable(f"{compiler} cannot build the recorder: {result.stderr.strip()}")
    return target


def record(
    command: Sequence[str],
    root: Path,
    recorder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> Trace:
    """Run ``command`` to its end and return what it did below ``root``, an existing folder.

    :class:`TraceError` when it fails, or when playing the trace back does not give what is there now.
    """
    root = root.resolve()
    files, folders = read_folder(root)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "trace"
        env = {**os.environ, **(environment or {}), "LD_PRELOAD": str(recorder)}
        env |= {"KVREP_TRACE": str(file), "KVREP_TRACE_ROOT": str(root)}
        result = subprocess.run(
            list(command), env=env, timeout=timeout_s, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise TraceError(f"the workload ended with {result.returncode}: {result.stderr}")
        trace = Trace(root, files, folders, tuple(parse(file.read_bytes())))
    check_whole(trace)
    return trace


@dataclass(frozen=True, slots=True)
class Image:
    """What the disk may hold when the machine stopped at one event."""

    number: int
    event: int
    """How many events of the trace had begun."""
    crash: Literal["kill", "power"]
    what: str
    """What became of the unsynced, for people."""
    files: dict[str, bytes]
    folders: tuple[str, ...]
    begun: int
    """Atomic writes that had begun: none beyond these may be there."""
    done: int
    """That were acknowledged."""
    safe: int
    """That were acknowledged as safe from power loss."""

    def __str__(self) -> str:
        return (
            f"image {self.number}: {self.crash} at event {self.event}, {self.what};"
            f" begun {self.begun}, done {self.done}, safe {self.safe}"
        )

    def write(self, folder: Path) -> None:
        """Make the files in ``folder``, which is empty."""
        for name in self.folders:
            (folder / name).mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


class _Enumeration:
    def __init__(self, trace: Trace, seed: int, samples: int, begun: int) -> None:
        self._trace = trace
        self._disk = Disk(trace)
        self._random = random.Random(seed)
        self._samples = samples
        self._seen: set[bytes] = set()
        self._progress = {"begin": begun, "done": 0, "safe": 0}
        self._number = 0

    def run(self) -> Iterator[Image]:
        yield from self._take(0, "kill", "before anything", EVERYTHING)
        for at, event in enumerate(self._trace.events, 1):
            changed = self._disk.apply(event)
            if event.kind == Kind.MARK:
                word, _, number = event.data.decode().partition(" ")
                if word in self._progress:
                    self._progress[word] = int(number)
            if changed:
                yield from self._during(at)
            if self._disk.settle(event):
                yield from self._after(at, event)

    def _during(self, at: int) -> Iterator[Image]:
        """The call may be under way or just done, and nothing of it is certain."""
        yield from self._take(at, "kill", "all that was called", EVERYTHING)
        write = self._disk.last_write
        if write is not None and write.data is not None and len(write.data) > SECTOR:
            cut = self._random.randrange(write.offset + 1, write.offset + len(write.data)) // SECTOR
            yield from self._take(at, "kill", "the last write in part", _only(write, lambda s: s < cut, True))
        yield from self._power(at)

    def _after(self, at: int, event: Event) -> Iterator[Image]:
        yield from self._take(at, "kill", "all that was called", EVERYTHING)
        yield from self._take(at, "power", "nothing unsynced", NOTHING)
        if event.kind != Kind.MARK:
            yield from self._power(at)

    def _power(self, at: int) -> Iterator[Image]:
        disk, rng = self._disk, self._random
        uncertain = disk.uncertain
        if not uncertain and not disk.names_pending:
            return
        yield from self._take(at, "power", "all the names, none of the data", Choice(all_names, no_data))
        yield from self._take(at, "power", "all the data, none of the names", Choice(no_names, all_data))
        if uncertain:
            one = rng.choice(uncertain)
            yield from self._take(at, "power", "one write missing", _only(one, False, True))
            yield from self._take(at, "power", "only the last write", _only(uncertain[-1], True, False))
        for _ in range(self._samples):
            yield from self._take(at, "power", "a random choice", self._random_choice())

    def _random_choice(self) -> Choice:
        rng = random.Random(self._random.random())
        likely = rng.choice((0.15, 0.5, 0.85))
        torn = rng.choice((0.0, 0.3))
        chosen: dict[Change, Callable[[int], bool] | bool] = {}
        counts: dict[int, int] = {}

        def change(c: Change) -> Callable[[int], bool] | bool:
            if c not in chosen:
                chosen[c] = rng.random() < likely
                if c.data is not None and rng.random() < torn:
                    first, last = c.offset // SECTOR, (c.offset + len(c.data) - 1) // SECTOR
                    kept = {s for s in range(first, last + 1) if rng.random() < 0.5}
                    chosen[c] = kept.__contains__
            return chosen[c]

        def folder(f: Folder) -> int:
            if id(f) not in counts:
                counts[id(f)] = rng.randint(0, len(f.pending))
            return counts[id(f)]

        return Choice(folder, change)

    def _take(self, at: int, crash: Literal["kill", "power"], what: str, choice: Choice) -> Iterator[Image]:
        """One image, unless the same content with the same expectations has been made before."""
        files, folders = self._disk.build(choice)
        progress = self._progress
        expected = (crash, progress["begin"], progress["done"], progress["safe"])
        key = hashlib.blake2b(repr((expected, folders)).encode(), digest_size=16)
        for name in sorted(files):
            key.update(b"%d:%s:%d:" % (len(name), name.encode(), len(files[name])))
            key.update(files[name])
        if key.digest() in self._seen:
            return
        self._seen.add(key.digest())
        self._number += 1
        yield Image(
            self._number, at, crash, what, files, tuple(folders),
            begun=progress["begin"], done=progress["done"], safe=progress["safe"],
        )  # fmt: skip


def _only(change: Change, chosen: Callable[[int], bool] | bool, others: bool) -> Choice:
    """Every name, this for one change, and that for the others."""
    return Choice(all_names, lambda c: chosen if c is change else others)


def images(trace: Trace, *, seed: int, samples: int = 1, begun: int = 0) -> Iterator[Image]:
    """Images of every crash that the trace allows, all different; the same for the same ``seed``.

    Besides the systematic ones, ``samples`` random choices of what the disk kept are made at each event.
    ``begun`` writes may be there from the start, as when the workload recovers what another one left.
    """
    return _Enumeration(trace, seed, samples, begun).run()


def state_hash(content: Content) -> str:
    """A short text that stands for the content of a store."""
    key = hashlib.blake2b(digest_size=16)
    for (name, user_key), value in sorted(content.items()):
        key.update(b"%s\0%d:%s%d:%s" % (name.encode(), len(user_key), user_key, len(value), value))
    return key.hexdigest()


@dataclass(frozen=True, slots=True)
class Promises:
    """The check for a kvrep store at ``path`` (below the root) whose n-th atomic write made ``states[n]``."""

    path: str
    states: tuple[str, ...]
    """:func:`state_hash` of the content after 0, 1, 2 … atomic writes."""
    options: dict[str, Any]
    """For :func:`kvrep.open`."""
    reopen_every: int = 8
    """Every so many images also write, close and open again."""

    def __call__(self, folder: Path, image: Image) -> str | None:
        import kvrep
        from kvrep.testing.storecheck import check_store, content

        with kvrep.open(folder / self.path, **self.options) as store:
            wrong = self._compare(content(store), image)
            if wrong is None and (violations := check_store(store)):
                wrong = str(violations[0])
            if wrong is not None or image.number % self.reopen_every:
                return wrong
            store.put(b"written after the crash", b"1")
            expected = content(store)
        with kvrep.open(folder / self.path, **self.options) as store:
            if content(store) != expected:
                return "what was written after the crash, or before, is not there at the second open"
        return None

    def _compare(self, found: Content, image: Image) -> str | None:
        low = image.done if image.crash == "kill" else image.safe
        if state_hash(found) in self.states[low : image.begun + 1]:
            return None
        elsewhere = [n for n, state in enumerate(self.states) if state == state_hash(found)]
        if elsewhere:
            return f"the store is as after {elsewhere} writes; {low} to {image.begun} are allowed"
        return f"no number of writes leaves these {len(found)} keys; {low} to {image.begun} were made"
