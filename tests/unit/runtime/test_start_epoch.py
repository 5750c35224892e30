"""The begin of an epoch when the one before never came into the log."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvrep
from kvrep.errors import Fenced


def test_an_epoch_begins_after_one_that_was_refused(tmp_path: Path) -> None:
    """An epoch start that was ordered and refused leaves nothing behind that would stop the next one."""
    with kvrep.open(tmp_path / "a") as store:
        first = store.put(b"k", b"1")
        node = store._node
        engine, committer = node.engine, node.engine.committer
        take, committer._take = committer._take, lambda: None  # type: ignore[method-assign]
        refused = node.begin_epoch(node.next_epoch(), fenced=())
        committer.refuse(Fenced("a newer epoch"))
        committer._take = take  # type: ignore[method-assign]
        assert isinstance(refused.error, Fenced)
        begun = node.begin_epoch(node.next_epoch(), fenced=())
        assert node.writes.finish(begun, 5.0).offset == first.offset + 1
        assert [e for e, _ in engine.epochs] == [first.epoch, begun.epoch]
        assert store.put(b"k", b"2") == kvrep.Position(begun.epoch, first.offset + 2)
    with kvrep.open(tmp_path / "a") as store:
        assert store[b"k"] == b"2"


@pytest.mark.parametrize("times", [3])
def test_epochs_grow_with_every_life(tmp_path: Path, times: int) -> None:
    """Every open that writes begins an epoch above all earlier ones."""
    epochs = []
    for _ in range(times):
        with kvrep.open(tmp_path / "a") as store:
            epochs.append(store.put(b"k", b"v").epoch)
    assert epochs == sorted(set(epochs))
