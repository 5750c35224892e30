"""What a coordinator is told of the end of a stream: by the kind of the error, never by its words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvrep
from kvrep.coordination.driver import why_gone
from kvrep.errors import ClosedError, Error, PeerUnavailable, ProtocolError
from kvrep.replication.election import WhyGone
from kvrep.runtime.replaying import Replaying
from kvrep.transport.interface import ConnectionRefused, NoAnswer, StreamEnded

KINDS: list[tuple[Error, WhyGone]] = [
    (ConnectionRefused("nobody listens", address="h:1"), WhyGone.REFUSED),
    (NoAnswer("too late", address="h:1"), WhyGone.SILENT),
    (PeerUnavailable("a refused call that came in time", address="h:1"), WhyGone.BROKEN),
    (ProtocolError("the connection was refused"), WhyGone.SILENT),
    (ClosedError("closed"), WhyGone.SILENT),
]


@pytest.mark.parametrize(("error", "why"), KINDS)
def test_what_a_failed_call_says(error: Error, why: WhyGone) -> None:
    """A refused connection proves that the process is gone; other words of other errors prove nothing."""
    assert why_gone(error) is why


@pytest.fixture
def replaying(tmp_path: Path) -> Iterator[tuple[Replaying, list[WhyGone]]]:
    """That of a follower of nobody, and what its coordinator is told."""
    with kvrep.open(tmp_path / "b", follow="127.0.0.1:1") as store:
        node = store._node
        assert node.replaying is not None
        node.replaying.stop(5.0)
        told: list[WhyGone] = []
        stub: Any = SimpleNamespace(connection_lost=told.append)
        found, node.replaying.node = node.replaying, SimpleNamespace(coordinator=stub, label="b")  # type: ignore[assignment]
        found._stop.clear()
        yield found, told
        found._stop.set()


@pytest.mark.parametrize(
    ("epoch", "error", "told"),
    [
        (0, ProtocolError("your Hello was refused"), []),
        (0, ConnectionRefused("nobody listens", address="h:1"), [WhyGone.REFUSED]),
        (0, PeerUnavailable("reset", address="h:1"), []),
        (1001, PeerUnavailable("it refused to go on", address="h:1"), [WhyGone.BROKEN]),
        (1001, ConnectionRefused("nobody listens", address="h:1"), [WhyGone.REFUSED]),
        (1001, None, [WhyGone.BROKEN]),
    ],
)
def test_how_a_stream_ended(
    replaying: tuple[Replaying, list[WhyGone]], epoch: int, error: Error | None, told: list[WhyGone]
) -> None:
    """Before the join only a refused connection is news; after it every end is."""
    found, heard = replaying
    receiver: Any = SimpleNamespace(epoch=epoch, expired=lambda now: False)
    found._after_end(StreamEnded("over", error=error), receiver)
    assert heard == told
