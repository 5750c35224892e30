"""What every test gets: a place for a store, and a check that nothing is left over."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Fixtures that tests of several files share: here they are one, so that their servers are started once.
from tests.broker_kit import site
from tests.etcd_kit import etcd_server, shared_etcd
from tests.kafka_kit import shared_kafka
from tests.postgres_kit import postgres_server, shared_postgres
from tests.rabbit_kit import shared_rabbitmq

__all__ = [
    "etcd_server", "postgres_server", "shared_etcd", "shared_kafka", "shared_postgres", "shared_rabbitmq", "site",
]  # fmt: skip

LEFT_OVER_S = 5.0


def pytest_configure() -> None:
    """A shell starts jobs in the background with Ctrl-C ignored, and the processes of the tests would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long one example takes says how busy the machine is.
    hypothesis.settings.register_profile("kvrep", deadline=None)
    hypothesis.settings.load_profile("kvrep")


def _threads() -> set[str]:
    # A dummy stands for a thread of grpc's own that called into Python once; it is never forgotten.
    return {
        f"thread {t.name}"
        for t in threading.enumerate()
        if t.is_alive() and not isinstance(t, threading._DummyThread)
    }


def _files() -> set[str]:
    """The regular files that this process has open, each with its descriptor."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
            found.add(f"{fd} -> {target}")
    return found


def _children() -> set[str]:
    """The processes that this one has started and that have not been waited for; servers that tests share may stay."""
    lifelines = sys.modules.get("tests.lifeline")  # not there where no server's kit was imported
    shared = lifelines.Lifeline.held if lifelines else set()
    found = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            found |= {f"process {pid}" for pid in file.read().split() if int(pid) not in shared}
    return found


def _what_is_there() -> set[str]:
    return _threads() | _files() | _children()


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """After the test: no thread, no child process and no file that it opened may be left.

    Fixtures of a wider scope, such as servers that many tests share, are made before it.
    """
    before = _what_is_there()
    yield
    deadline = time.monotonic() + LEFT_OVER_S
    while (extra := _what_is_there() - before) and time.monotonic() < deadline:
        gc.collect()
        threading.Event().wait(0.02)
    assert not extra, f"left over: {sorted(extra)}"


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Where a test's store may be made; nothing is there yet."""
    return tmp_path / "store"


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder like ``tmp_path``, on a file system in memory if there is one: for tests that sync a lot."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="kvrep-test-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def memory_store(memory_path: Path) -> Path:
    """Where a store may be made in ``memory_path``; nothing is there yet."""
    return memory_path / "store"
