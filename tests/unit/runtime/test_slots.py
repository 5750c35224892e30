"""What a primary remembers of its followers, on its own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvrep
from kvrep.runtime import slots as slots_module
from kvrep.runtime.slots import UNNAMED_KEPT_S, Slots
from kvrep.transport.interface import SnapshotRequest


def noted(path: Path) -> Slots:
    """Slots with a slow and a fast follower."""
    slots = Slots(path)
    slots.note(b"1" * 16, name="slow", address="h:1", voter=True, acked=5)
    slots.note(b"2" * 16, name="fast", address="h:2", voter=True, acked=9)
    return slots


def test_the_slowest_decides_what_is_kept(tmp_path: Path) -> None:
    """Log is kept from behind the least acked offset; acks never go back."""
    slots = noted(tmp_path / "SLOTS")
    assert (slots.keep_from(), slots.slowest()) == (6, b"1" * 16)
    slots.acked(b"1" * 16, 20)
    slots.acked(b"1" * 16, 3)
    slots.acked(b"9" * 16, 100)
    assert (slots.keep_from(), slots.slowest(), len(slots)) == (10, b"2" * 16, 2)
    assert slots.drop(b"2" * 16) is not None
    assert slots.drop(b"2" * 16) is None
    assert slots.keep_from() == 21
    slots.drop(b"1" * 16)
    assert (slots.keep_from(), slots.slowest()) == (None, None)


def test_slots_are_kept_in_a_file(tmp_path: Path) -> None:
    """A saved file gives the same slots again; fields that this version does not know are skipped."""
    slots = noted(tmp_path / "SLOTS")
    slots.save(now=True)

    again = Slots(tmp_path / "SLOTS")

    assert again.all() == slots.all()
    raw = json.loads((tmp_path / "SLOTS").read_bytes())
    (tmp_path / "SLOTS").write_text(json.dumps([{**slot, "more": 1} for slot in raw]))
    assert Slots(tmp_path / "SLOTS").all() == slots.all()


def test_a_damaged_file_is_learned_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read is reported and replaced, not fatal: followers introduce themselves again."""
    (tmp_path / "SLOTS").write_bytes(b'[{"store_id": 5}]')
    assert len(Slots(tmp_path / "SLOTS")) == 0
    assert "learned anew" in caplog.text


YEAR_S = 365 * 86_400.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The two clocks that slots read; ``wall_s`` and ``monotonic_s`` set them."""
    now = SimpleNamespace(wall_s=1.6e9, monotonic_s=1000.0)
    fake = SimpleNamespace(time=lambda: now.wall_s, monotonic=lambda: now.monotonic_s)
    monkeypatch.setattr(slots_module, "time", fake)
    return now


def known(slots: Slots) -> list[bytes]:
    return [i[:1] for i, _ in slots.all()]


def test_unnamed_followers_are_forgotten_when_they_stay_away(tmp_path: Path, clock: SimpleNamespace) -> None:
    """A slot without a name ends with its absence; named ones, and those that are connected, stay."""
    slots = noted(tmp_path / "SLOTS")
    for i in (b"3", b"4"):
        slots.note(i * 16, name="", address="", voter=False, acked=1)
    clock.monotonic_s += UNNAMED_KEPT_S + 1
    slots.expire({b"4" * 16})
    assert known(slots) == [b"1", b"2", b"4"]
    clock.monotonic_s += UNNAMED_KEPT_S - 1
    slots.expire(set())
    assert known(slots) == [b"1", b"2", b"4"], "it was there until then"
    clock.monotonic_s += 2
    slots.expire(set())
    assert known(slots) == [b"1", b"2"]


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S])
def test_the_wall_clock_ends_no_slot_and_keeps_none(
    tmp_path: Path, clock: SimpleNamespace, jump_s: float
) -> None:
    """How long a follower is away is counted without it, also for a slot that was read from the file."""
    slots = noted(tmp_path / "SLOTS")
    slots.note(b"3" * 16, name="", address="", voter=False, acked=1)
    slots.save(now=True)
    for these in (slots, Slots(tmp_path / "SLOTS")):
        clock.wall_s += jump_s
        these.expire(set())
        assert known(these) == [b"1", b"2", b"3"]
    again = Slots(tmp_path / "SLOTS")
    clock.monotonic_s += UNNAMED_KEPT_S + 1
    again.expire(set())
    assert known(again) == [b"1", b"2"]


def test_a_save_that_fails_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that is gone is reported; the next save writes what is still unsaved."""
    directory = tmp_path / "there"
    slots = noted(directory / "SLOTS")
    slots.save(now=True)
    assert "cannot be written" in caplog.text
    directory.mkdir()
    slots.save(now=True)
    assert len(Slots(directory / "SLOTS")) == 2


def test_a_copy_that_takes_long_keeps_its_slot(memory_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unnamed follower that has been copied to for longer than such slots live finds the log that it needs."""
    with kvrep.open(memory_store, listen="127.0.0.1:0") as db:
        db.put(b"k", b"v")
        shipping = db._node.shipping
        assert shipping is not None
        follower = b"f" * 16
        spool = shipping.spools.take(SnapshotRequest(store_id=follower, name=""))
        long_after = time.monotonic() + 2 * UNNAMED_KEPT_S
        monkeypatch.setattr(
            slots_module, "time", SimpleNamespace(monotonic=lambda: long_after, time=time.time)
        )

        shipping._tick()
        assert shipping.slots.get(follower) is not None

        shipping.spools.give_back(spool, follower)
        shipping.spools.joined(follower)
        monkeypatch.setattr(
            slots_module, "time", SimpleNamespace(monotonic=lambda: 2 * long_after, time=time.time)
        )
        shipping._tick()
        assert shipping.slots.get(follower) is None
