"""What a primary remembers of its followers, on its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvrep.runtime.slots import Slots


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


def test_unnamed_followers_are_forgotten_when_they_stay_away(tmp_path: Path) -> None:
    """A slot without a name ends with its absence; named ones, and those that are connected, stay."""
    slots = noted(tmp_path / "SLOTS")
    for i in (b"3", b"4"):
        slots.note(i * 16, name="", address="", voter=False, acked=1)
        slot = slots.get(i * 16)
        assert slot is not None
        slot.seen_s = 0.0
    slots.expire({b"4" * 16})
    assert [i for i, _ in slots.all()] == [b"1" * 16, b"2" * 16, b"4" * 16]


def test_a_save_that_fails_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that is gone is reported; the next save writes what is still unsaved."""
    directory = tmp_path / "there"
    slots = noted(directory / "SLOTS")
    slots.save(now=True)
    assert "cannot be written" in caplog.text
    directory.mkdir()
    slots.save(now=True)
    assert len(Slots(directory / "SLOTS")) == 2
