"""What the primary remembers of its followers, over their absences and its own restarts."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from kvrep.storage.home import write_atomically

__all__ = ["Slot", "Slots"]

log = logging.getLogger("kvrep.replication")

SAVE_INTERVAL_S = 5.0
UNNAMED_KEPT_S = 600.0
"""A follower without a name is forgotten when it has not been heard of for so long: its slot only serves
its bootstrap."""


@dataclass(slots=True)
class Slot:
    """One follower: how far it has confirmed, so that the log it still needs is kept."""

    store_id: str
    name: str
    address: str
    voter: bool
    """Whether it was willing to vote when it last joined."""
    acked: int
    seen_s: float
    """Wall clock of the last sign of life, for people: nothing is decided by it."""
    heard_s: float = field(compare=False)
    """The same by the monotonic clock, as far as this process knows: of a slot from the file, when it was read."""


_FIELDS = tuple(one.name for one in fields(Slot) if one.name != "heard_s")
"""What is in the file."""


class Slots:
    """The slots of one store, kept in a small file that is renewed every few seconds at the most.

    Losing the newest few seconds of it only keeps more log than needed: ``acked`` never goes back there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Protects the map; never held during I/O, because every ack takes it.
        self._lock = threading.Lock()
        # Held while the file is written.
        self._saving = threading.Lock()
        self._slots: dict[bytes, Slot] = {}
        self._saved_s = 0.0
        self._dirty = False
        try:
            for raw in json.loads(path.read_bytes()):
                slot = Slot(**{name: raw[name] for name in _FIELDS}, heard_s=time.monotonic())
                if type(slot.acked) is not int or not isinstance(slot.seen_s, int | float):
                    raise ValueError(f"no place and time: {slot.acked!r}, {slot.seen_s!r}")
                self._slots[bytes.fromhex(slot.store_id)] = slot
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read (%s); followers are learned anew", path, error)

    def __len__(self) -> int:
        return len(self._slots)

    def get(self, store_id: bytes) -> Slot | None:
        return self._slots.get(store_id)

    def all(self) -> list[tuple[bytes, Slot]]:
        """Copies, by store id."""
        with self._lock:
            return [(i, replace(slot)) for i, slot in sorted(self._slots.items())]

    def note(self, store_id: bytes, *, name: str, address: str, voter: bool, acked: int) -> None:
        """Remember a follower that has joined."""
        with self._lock:
            self._slots[store_id] = Slot(
                store_id.hex(), name, address, voter, acked, seen_s=time.time(), heard_s=time.monotonic()
            )
            self._dirty = True

    def acked(self, store_id: bytes, offset: int) -> None:
        """A follower confirmed through ``offset``."""
        slot = self._slots.get(store_id)
        if slot is None or offset <= slot.acked:
            return
        with self._lock:
            slot.acked = max(slot.acked, offset)
            slot.seen_s, slot.heard_s = time.time(), time.monotonic()
            self._dirty = True

    def drop(self, store_id: bytes) -> Slot | None:
        """Forget a follower; its log is no longer kept."""
        with self._lock:
            self._dirty = True
            return self._slots.pop(store_id, None)

    def expire(self, connected: set[bytes]) -> None:
        """Forget unnamed followers that have been away for long."""
        now = time.monotonic()
        with self._lock:
            for store_id, slot in list(self._slots.items()):
                if store_id in connected:
                    slot.heard_s = now
                elif not slot.name and now - slot.heard_s > UNNAMED_KEPT_S:
                    del self._slots[store_id]
                    self._dirty = True

    def keep_from(self) -> int | None:
        """The first offset that some follower still needs; ``None`` without followers."""
        with self._lock:
            return min((slot.acked + 1 for slot in self._slots.values()), default=None)

    def slowest(self) -> bytes | None:
        with self._lock:
            return min(self._slots, key=lambda i: self._slots[i].acked, default=None)

    def save(self, *, now: bool = False) -> None:
        """Write the file if something changed and the last time is some seconds ago, or ``now``."""
        with self._saving:
            with self._lock:
                if not self._dirty or (not now and time.monotonic() - self._saved_s < SAVE_INTERVAL_S):
                    return
                self._dirty = False
                self._saved_s = time.monotonic()
                slots = [{name: getattr(slot, name) for name in _FIELDS} for slot in self._slots.values()]
                data = json.dumps(slots).encode()
            try:
                write_atomically(self._path, data)
            except OSError as error:
                self._dirty = True
                log.warning("%s cannot be written: %s", self._path, error)
