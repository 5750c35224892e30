"""Servers that end with the tests, however those end."""

from __future__ import annotations

import subprocess
from typing import ClassVar

_WAIT_THEN_KILL = 'read -r _; for group in "$@"; do kill -s KILL -- "-$group"; done'


class Lifeline:
    """Kills process groups with SIGKILL once this process is gone, also when that was killed itself.

    A shell waits for the end of its standard input, which only this process holds open. It is in a session
    of its own, so that Ctrl-C in a terminal does not end it first.
    """

    held: ClassVar[set[int]] = set()
    """Processes that may outlive a test: those that have a lifeline, and the shells."""

    def __init__(self, *groups: int) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _WAIT_THEN_KILL, "lifeline", *map(str, groups)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._mine = {self._shell.pid, *groups}
        self.held.update(self._mine)

    def close(self) -> None:
        """The groups end in another way: call it before they do, while nobody else can have their numbers."""
        self._shell.kill()
        self._shell.wait(10)
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self.held.difference_update(self._mine)
