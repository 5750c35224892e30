"""The threads that answer calls: a bounded pool that never queues behind a busy thread for long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

__all__ = ["Workers", "join_all"]

T = TypeVar("T")
_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Workers(Executor):
    """An executor with up to ``count_max`` named daemon threads, started when they are needed.

    Unlike ThreadPoolExecutor its threads do not keep the interpreter from exiting while a stream is
    open, and stopping it has a deadline. What is submitted beyond ``count_max`` waits; the server
    admits no more calls than that.
    """

    def __init__(self, name: str, count_max: int) -> None:
        self._name = name
        self._count_max = count_max
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = Lock()  # guards the next three
        self._threads: list[Thread] = []
        self._free = 0
        self._stopped = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn`` in a thread.

        After ``stop`` the future is cancelled: raising would end gRPC's own loop.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._stopped:
                future.cancel()
                return future
            self._jobs.put((future, fn, args, kwargs))
            if self._free > 0:
                self._free -= 1
            elif len(self._threads) < self._count_max:
                self._start_thread()
        return future

    def _start_thread(self) -> None:
        number = len(self._threads) + 1
        thread = Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, fn, args, kwargs = job
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)
            # Nothing of the call may live on while this thread waits for the next.
            del job, future, fn, args, kwargs
            with self._lock:
                if self._jobs.empty():
                    self._free += 1

    def stop(self, deadline: float) -> list[Thread]:
        """End the threads and return those still busy at ``deadline`` (monotonic seconds).

        Idempotent.
        """
        with self._lock:
            if not self._stopped:
                self._stopped = True
                for _ in self._threads:
                    self._jobs.put(None)
            threads = list(self._threads)
        return join_all(threads, deadline)


def join_all(threads: Iterable[Thread], deadline: float) -> list[Thread]:
    """Wait for threads to end; return those that had not by ``deadline`` (monotonic seconds)."""
    left = []
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            left.append(thread)
    return left
