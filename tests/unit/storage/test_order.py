"""The order of writes, as others may ask for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvrep

WAIT_S = 20.0


class Moving:
    """A log under which something moves when its end is first looked at."""

    def __init__(self, log: Any, move: Callable[[], object]) -> None:
        self._log, self._move = log, move
        self._threads: list[threading.Thread] = []

    @property
    def tail(self) -> Any:
        if not self._threads:
            thread = threading.Thread(target=self._move)
            self._threads.append(thread)
            thread.start()
            thread.join(0.1)  # it may have to wait until the look is over
        return self._log.tail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def ended(self) -> None:
        for thread in self._threads:
            thread.join(WAIT_S)


def test_a_leader_that_takes_writes_does_not_hide_them(tmp_path: Path) -> None:
    """The last offset in order is exact while a group is being taken: the bound on the lag goes by it."""
    with kvrep.open(tmp_path / "a") as store:
        store.put(b"k", b"v")
        committer = store._node.engine.committer
        log = committer.log
        with committer.lead:
            futures = [store.submit_put(b"%d" % i, b"v") for i in range(3)]
            last = log.tail.offset + len(futures)
            assert committer.ordered == last
            committer.log = moving = Moving(log, committer._take)  # type: ignore[assignment]
            try:
                assert committer.ordered == last
                moving.ended()
            finally:
                committer.log = log
            assert committer.ordered == last, "taken, and not written yet"
        assert [future.result(timeout=WAIT_S).offset for future in futures] == [last - 2, last - 1, last]
        assert committer.ordered == last
