"""Many puts at once: several writers, each with a connection of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, Full, Queue
from types import TracebackType
from zlib import crc32

from kvrep.cli.target import Op, Writer
from kvrep.errors import (
    ClosedError,
    Error,
    InvalidInput,
    NotPrimary,
    PeerUnavailable,
    RefusedError,
    UnknownOutcome,
)

__all__ = ["BulkWriter"]

RETRY_PAUSE_S = 0.2
QUEUED_BATCHES_MAX = 2

Batch = list[Op]


class BulkWriter:
    """Takes puts one by one and writes them in batches. Use it in a ``with`` block, from one thread.

    A key always goes to the same writer, so the last of several puts of one key wins, as it does when they
    are written one by one. What was refused or has an unknown outcome is written again for up to ``retry_s``:
    putting the same pair twice is the same as once. The first error that lasts ends everything.
    """

    def __init__(
        self,
        open_writer: Callable[[str | None], Writer],
        *,
        writers: int,
        batch_pairs: int,
        batch_bytes: int,
        retry_s: float,
        close_writers: bool = True,
    ) -> None:
        """``open_writer`` makes a writer's target: of the given address, or of the first one (``None``)."""
        self._open_writer = open_writer
        self._batch_pairs = max(1, batch_pairs)
        self._batch_bytes = batch_bytes
        self._retry_s = retry_s
        self._close_writers = close_writers
        self._batches: list[Batch] = [[] for _ in range(max(1, writers))]
        self._sizes = [0 for _ in self._batches]
        self._queues: list[Queue[Batch | None]] = [Queue(QUEUED_BATCHES_MAX) for _ in self._batches]
        self._failed = threading.Event()
        self._error: Exception | None = None
        # Protects the two counters, which the writers add to and take_done takes away.
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._done_pairs = 0
        self._threads = [
            threading.Thread(target=self._write_all, args=(queue,), name=f"kvrep-load-{i}", daemon=True)
            for i, queue in enumerate(self._queues)
        ]

    def __enter__(self) -> BulkWriter:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Without an error: write what is left and wait for it. With one: end soon."""
        if error is not None:
            self._failed.set()
        try:
            for i in range(len(self._batches)):
                self._hand_over(i)
                self._enqueue(i, None)
        finally:
            for thread in self._threads:
                thread.join()
        if error is None and self._error is not None:
            raise self._error

    def put(self, keyspace: str, key: bytes, value: bytes) -> None:
        """Queue a pair; waits while the writers are behind. Raises what ended the writers."""
        i = crc32(key) % len(self._batches)
        size = len(key) + len(value)
        if self._batches[i] and self._sizes[i] + size > self._batch_bytes:
            self._hand_over(i)
        self._batches[i].append((keyspace, key, value))
        self._sizes[i] += size
        if len(self._batches[i]) >= self._batch_pairs or self._sizes[i] >= self._batch_bytes:
            self._hand_over(i)

    def take_done(self) -> tuple[int, int]:
        """(bytes, pairs) that were acknowledged since the last call."""
        with self._lock:
            done = self._done_bytes, self._done_pairs
            self._done_bytes = self._done_pairs = 0
        return done

    def _hand_over(self, i: int) -> None:
        if self._batches[i]:
            batch, self._batches[i], self._sizes[i] = self._batches[i], [], 0
            self._enqueue(i, batch)

    def _enqueue(self, i: int, batch: Batch | None) -> None:
        """Every wait ends when a writer failed."""
        while not self._failed.is_set():
            try:
                self._queues[i].put(batch, timeout=0.1)
                return
            except Full:
                continue
        if batch is not None and self._error is not None:
            raise self._error

    # -- the writers' threads ----------------------------------------------------------------------

    def _write_all(self, queue: Queue[Batch | None]) -> None:
        target: Writer | None = None
        try:
            target = self._open_writer(None)
            while not self._failed.is_set():
                try:
                    batch = queue.get(timeout=0.1)
                except Empty:
                    continue
                if batch is None:
                    return
                target = self._write(target, batch)
        except Exception as error:  # it is raised on the thread that puts
            self._error = self._error or error
            self._failed.set()
        finally:
            if target is not None and self._close_writers:
                target.close()

    def _write(self, target: Writer, batch: Batch) -> Writer:
        """Write until it is acknowledged; returns the target to go on with."""
        give_up_s = time.monotonic() + self._retry_s
        while True:
            try:
                target.write(batch)
                break
            except (RefusedError, UnknownOutcome, PeerUnavailable, ClosedError) as error:
                if not self._worth_trying(error, give_up_s):
                    raise
                address = error.primary_address if isinstance(error, NotPrimary) else None
                self._failed.wait(RETRY_PAUSE_S)
                target = self._again(target, address)
        with self._lock:
            self._done_bytes += sum(len(key) + len(value or b"") for _, key, value in batch)
            self._done_pairs += len(batch)
        return target

    def _worth_trying(self, error: Error, give_up_s: float) -> bool:
        if isinstance(error, InvalidInput) or self._failed.is_set() or time.monotonic() >= give_up_s:
            return False
        return not (isinstance(error, NotPrimary) and not error.primary_address and not self._close_writers)

    def _again(self, target: Writer, address: str | None) -> Writer:
        """A fresh connection: gRPC would wait up to 5 s before it tries a broken one again."""
        if not self._close_writers:
            return target
        target.close()
        return self._open_writer(address)
