"""How commands are told to end: whichever thread a signal meets, and by the end of standard input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kvrep.cli.stopping import stoppable

LONG_S = 30.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_another_thread_gets(number: signal.Signals) -> None:
    """A wait ends at once although the kernel gave the signal to a thread that runs no handlers."""
    before = signal.getsignal(number)
    with stoppable() as stop:
        waiting = threading.Event()

        def tell() -> None:
            waiting.wait(LONG_S)
            signal.pthread_kill(threading.get_ident(), number)

        thread = threading.Thread(target=tell)
        thread.start()
        threading.Timer(0.05, waiting.set).start()  # by then the main thread waits, or sees it before
        began = time.monotonic()
        assert stop.wait(LONG_S)
        assert time.monotonic() - began < LONG_S / 3
        assert stop.signal == number
        assert stop.wait(0.0)
        thread.join()
    assert signal.getsignal(number) is before


def test_nobody_tells() -> None:
    """A wait with a timeout returns False at its end."""
    with stoppable() as stop:
        assert not stop.wait(0.01)
        assert not stop.wait(0.0)
    assert stop.signal == 0


PROGRAM = """
import os, signal, sys, threading
from kvrep.cli.stopping import stoppable
with stoppable(stdin=True) as stop:
    print("ready", flush=True)
    told = stop.wait(30.0)
    print(told, stop.signal, flush=True)
    if stop.signal:
        os.read(0, 1)
"""


def program(**options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_the_end_of_standard_input() -> None:
    """What comes on standard input is ignored, and its end tells."""
    with program(stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("still there\n")
        process.stdin.flush()
        process.stdin.close()
        assert process.stdout.readline() == "True 0\n"


def test_no_standard_input_at_all() -> None:
    """A process that was begun without standard input ends at once, without a traceback."""
    with program(stdin=subprocess.PIPE, preexec_fn=lambda: os.close(0)) as process:
        assert process.stdout.readlines() == ["ready\n", "True 0\n"]
    assert process.returncode == 0


def test_a_signal_after_the_end_of_standard_input_is_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that is gone and had sent SIGTERM does not make its node leave without closing."""
    left: list[int] = []
    monkeypatch.setattr("os._exit", left.append)
    with open(os.devnull) as nothing, stoppable(stdin=True) as stop:
        monkeypatch.setattr(stop, "_stdin", nothing.fileno())
        assert stop.wait(LONG_S)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (left, stop.signal) == ([], signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == [128 + signal.SIGTERM]


def test_the_second_signal_ends_the_process() -> None:
    """After the first one the command ends in order; who cannot wait for that sends another."""
    with program(stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == f"True {int(signal.SIGTERM)}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG_S) == 128 + signal.SIGTERM
