"""The primary's end of one stream: what wakes the thread that sends."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvrep.model.position import Position
from kvrep.replication.progress import Progress
from kvrep.replication.sender import Sender
from kvrep.runtime.session import FollowerSession


class WritesMeanwhile:
    """Stands for the session's signal: while its thread waits, writes come in and are committed."""

    def __init__(self, session: FollowerSession) -> None:
        self._session = session
        self.waits: list[float] = []
        self.woken = 0

    def set(self) -> None:
        self.woken += 1

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        for _ in range(100):
            self._session.wake_for_write()
            self._session.wake_for_commit()
        return False


@pytest.mark.parametrize("linger_s", [60.0, 0.0])
def test_writes_wake_the_sender_only_when_it_does_not_let_them_gather(linger_s: float) -> None:
    """While a segment gathers, no write and no commit wakes its thread; in synchronous mode each write does."""
    committer = SimpleNamespace(committed=1)
    shipping: Any = SimpleNamespace(
        engine=SimpleNamespace(committer=committer),
        options=None,
        linger_s=linger_s,
        shippable=lambda: 1 + gathered,
    )
    gathered = 1 if linger_s else 0
    session = FollowerSession(shipping, "peer")
    session._signal = signal = WritesMeanwhile(session)  # type: ignore[assignment]
    now = time.monotonic()
    progress = Progress(store_id=b"b", name="b")
    progress.join(Position(1001, 0), 1 << 20, 1001, now=now)
    sender = Sender(progress, epoch=1001, segment_bytes_max=1 << 20, heartbeat_interval_s=600.0,
                    heartbeat_timeout_s=900.0, linger_s=linger_s, now=now)  # fmt: skip
    sender.sent_heartbeat(now, 1)
    sender.sent_segment(1, 1, 10, now, 1)

    assert session._step(sender) is None

    assert len(signal.waits) == 1
    if linger_s:
        assert signal.woken == 0
        assert 50.0 < signal.waits[0] <= 60.0
    else:
        assert signal.woken >= 100
    session.wake_for_write()
    assert signal.woken > 0, "it did not stop to gather"
