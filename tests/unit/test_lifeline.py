"""What tests start ends with them, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.agent_kit import wait_until

_CHILD = """
import subprocess, sys
from tests.lifeline import Lifeline

server = subprocess.Popen(["sh", "-c", "sleep 600 & wait"], start_new_session=True)
lifeline = Lifeline(server.pid)
print(server.pid, flush=True)
sys.stdin.read()
"""


def _members(group: int) -> list[int]:
    """The processes of a group that are not zombies."""
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/stat") as stat:
                fields = stat.read().rpartition(") ")[2].split()
        except (OSError, NotADirectoryError):
            continue
        if name.isdecimal() and int(fields[2]) == group and fields[0] != "Z":
            found.append(int(name))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_server_ends_with_who_started_it(number: int) -> None:
    """Neither SIGKILL nor Ctrl-C leaves the server, or a child of it, behind."""
    tests = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert tests.stdin is not None
    assert tests.stdout is not None
    group = int(tests.stdout.readline())
    try:
        wait_until(lambda: len(_members(group)) == 2, "the server and its child run")
        os.killpg(tests.pid, number)
        wait_until(lambda: not _members(group), "the server is gone")
    finally:
        tests.kill()
        tests.wait(20)
        tests.stdin.close()
        tests.stdout.close()
        if _members(group):
            os.killpg(group, signal.SIGKILL)
