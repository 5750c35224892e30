"""The data of the demo, and the writers that send it to the primary."""

from __future__ import annotations

import os
import random
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvrep.cli.target import Op, RemoteTarget
from kvrep.errors import Error, RefusedError, UnknownOutcome
from kvrep.model.position import Position

__all__ = ["KEYSPACE", "Batch", "File", "Load", "Unknown", "batches_of", "find_files"]

KEYSPACE = "files"
SKIPPED = {"site-packages", "dist-packages", "__pycache__"}
FILE_BYTES_MAX = 64 << 20
BATCH_BYTES_MAX = 1_000_000
REFUSED_PAUSE_S = 0.05
NO_PROGRESS_S = 20.0


class File(NamedTuple):
    """A file to load: its key is its path below the root."""

    key: bytes
    path: Path
    size: int


class Batch(NamedTuple):
    """Files that are written together: all of them, or none."""

    files: tuple[File, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def ops(self) -> list[Op]:
        return [(KEYSPACE, file.key, file.path.read_bytes()) for file in self.files]


class Unknown(NamedTuple):
    """A write without an answer. The position is known if the primary could still say it."""

    batch: Batch
    position: Position | None


def find_files(root: Path | None, limit: int | None) -> list[File]:
    """The files below ``root`` (default: the standard library), in an order that mixes large and small."""
    top = root or Path(sysconfig.get_path("stdlib"))
    files = sorted(_walk(top))
    random.Random(7400).shuffle(files)  # the same order in every run
    return files if limit is None else files[:limit]


def _walk(top: Path) -> Iterator[File]:
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for name in names:
            path = Path(folder, name)
            key = os.fsencode(path.relative_to(top))
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK) and len(key) <= 511:
                size = path.stat().st_size
                if size <= FILE_BYTES_MAX:
                    yield File(key, path, size)


def batches_of(files: list[File], count: int) -> Iterator[Batch]:
    """``count`` files a batch, fewer where they are large."""
    batch: list[File] = []
    size = 0
    for file in files:
        if batch and (len(batch) >= max(1, count) or size + file.size > BATCH_BYTES_MAX):
            yield Batch(tuple(batch))
            batch, size = [], 0
        batch.append(file)
        size += file.size
    if batch:
        yield Batch(tuple(batch))


class Load:
    """Several writers, each with a connection of its own, that empty one queue of batches.

    They end when the queue is empty, when the primary stops answering, or when they are asked to. Every batch
    is in exactly one of ``waiting``, ``acknowledged`` and ``unknown`` then.
    """

    def __init__(self, batches: deque[Batch], on_acknowledged: Callable[[Load], None] | None = None) -> None:
        self.waiting = batches
        self.acknowledged: list[Batch] = []
        self.unknown: list[Unknown] = []
        self.latencies_s: list[float] = []
        self.files = 0
        """Files in acknowledged batches."""
        self.size = 0
        """Bytes in acknowledged batches."""
        self.problem: Exception | None = None
        """What ended the load early, other than the end of the primary."""
        self._on_acknowledged = on_acknowledged
        self._progress_s = time.monotonic()
        # Protects everything above.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, address: str, connections: int) -> None:
        for number in range(max(1, connections)):
            thread = threading.Thread(target=self._write_all, args=(address,), name=f"writer-{number}")
            self._threads.append(thread)
            thread.start()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def ask_to_end(self) -> None:
        """Take no more batches; writes under way go on to their end."""
        self._stop.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _write_all(self, address: str) -> None:
        try:
            with RemoteTarget(address) as primary:
                while (batch := self._take()) is not None:
                    self._write(primary, batch)
        except Exception as error:  # a writer must never end unnoticed
            self.problem = error
            self._stop.set()

    def _take(self) -> Batch | None:
        with self._lock:
            return self.waiting.popleft() if self.waiting and not self._stop.is_set() else None

    def _give_back(self, batch: Batch) -> None:
        with self._lock:
            self.waiting.appendleft(batch)

    def _write(self, primary: RemoteTarget, batch: Batch) -> None:
        """A write has three outcomes: done, refused, unknown. They are never confused."""
        try:
            ops = batch.ops()
            began_s = time.monotonic()
            primary.write(ops)
        except UnknownOutcome as error:
            self._note_unknown(Unknown(batch, error.position))
        except RefusedError:
            # Nothing was written, for instance because no follower is connected at the moment: try again.
            self._give_back(batch)
            if time.monotonic() - self._progress_s > NO_PROGRESS_S:
                raise
            self._stop.wait(REFUSED_PAUSE_S)
        except (Error, OSError):
            self._give_back(batch)
            raise
        else:
            self._note_acknowledged(batch, began_s, time.monotonic())

    def _note_unknown(self, unknown: Unknown) -> None:
        with self._lock:
            self.unknown.append(unknown)
        if unknown.position is None:
            self._stop.set()  # no answer at all: the primary is gone

    def _note_acknowledged(self, batch: Batch, began_s: float, ended_s: float) -> None:
        with self._lock:
            self.acknowledged.append(batch)
            self.latencies_s.append(ended_s - began_s)
            self.files += len(batch.files)
            self.size += batch.size
            self._progress_s = ended_s
        if self._on_acknowledged is not None:
            self._on_acknowledged(self)
