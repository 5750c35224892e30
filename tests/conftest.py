"""What every test gets: a place for a store, and a check that nothing is left over."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LEFT_OVER_S = 5.0


class _Shared:
    """What fixtures of a wider scope have started, a server that many tests share above all: such a fixture may be
    asked for in the middle of a test. (Hooks of a conftest are not called for those of a whole session.)"""

    def __init__(self) -> None:
        self.found: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before = None if fixturedef.scope == "function" else _what_is_there()
        made = yield
        if before is not None:
            self.found |= _what_is_there() - before
        return made


_shared = _Shared()


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts jobs in the background with Ctrl-C ignored, and the processes of the tests would inherit that."""
    config.pluginmanager.register(_shared)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _threads() -> set[str]:
    return {f"thread {t.name}" for t in threading.enumerate() if t.is_alive()}


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
    """The processes that this one has started and that have not been waited for, by name and counted: a shared
    server that a test has started again is no other one."""
    names: Counter[str] = Counter()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            for pid in file.read().split():
                with contextlib.suppress(OSError):
                    names[Path(f"/proc/{pid}/comm").read_text().strip()] += 1
    return {f"process {name} {i}" for name, count in names.items() for i in range(1, count + 1)}


def _what_is_there() -> set[str]:
    return _threads() | _files() | _children()


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """After the test: no thread, no child process and no file that it opened may be left."""
    before = _what_is_there()
    yield
    deadline = time.monotonic() + LEFT_OVER_S
    while (extra := _what_is_there() - before - _shared.found) and time.monotonic() < deadline:
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
