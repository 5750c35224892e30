"""The server's thread pool."""

import threading
import time
from collections.abc import Iterator

import pytest

from kvrep.transport.workers import Workers

WAIT_S = 10.0


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers("pool", 3)
    yield workers
    assert workers.stop(time.monotonic() + WAIT_S) == []


def test_results_and_errors(workers: Workers) -> None:
    """A future gets what the function returns or raises, and the thread goes on."""
    assert workers.submit(lambda a, b: a + b, 1, b=2).result(WAIT_S) == 3
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 / 0).result(WAIT_S)
    name = workers.submit(lambda: threading.current_thread().name).result(WAIT_S)
    assert name.startswith("pool-")


def test_threads_are_reused_and_bounded(workers: Workers) -> None:
    """No more threads than allowed are started, and all of them work at once."""
    for _ in range(50):
        workers.submit(int).result(WAIT_S)
    meeting = threading.Barrier(4)
    futures = [workers.submit(meeting.wait, WAIT_S) for _ in range(3)]
    meeting.wait(WAIT_S)
    assert sorted(future.result(WAIT_S) for future in futures) != []
    assert len(workers._threads) == 3


def test_after_stop(workers: Workers) -> None:
    """Work that comes after the end is cancelled, not raised about."""
    workers.stop(time.monotonic() + WAIT_S)
    assert workers.submit(int).cancelled()


def test_stop_names_the_busy() -> None:
    """A thread that does not end by the deadline is returned."""
    workers = Workers("busy", 1)
    gate = threading.Event()
    future = workers.submit(gate.wait, WAIT_S)
    left = workers.stop(time.monotonic())
    assert [thread.name for thread in left] == ["busy-1"]
    gate.set()
    assert future.result(WAIT_S)
    assert workers.stop(time.monotonic() + WAIT_S) == []
