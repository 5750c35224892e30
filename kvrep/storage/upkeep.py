"""What the log needs from time to time: syncs, marks behind its end, spare room, and to be trimmed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from kvrep.options import Options
from kvrep.storage.committer import Committer

__all__ = ["Upkeep"]

log = logging.getLogger("kvrep.storage")


class Upkeep:
    """Runs on the flush thread."""

    def __init__(self, committer: Committer, options: Options, path: Path, sync: Callable[[], None]) -> None:
        self._committer = committer
        self._options = options
        self._path = path
        self._sync = sync
        self._synced_s = time.monotonic()
        self._seen = -1
        """The end of the log at the last tick."""

    def tick(self) -> None:
        """About twice a second."""
        committer = self._committer
        committer.expire_place(self._options.transaction_age_max_s)
        committer.look_after()
        if committer.failure is not None:
            return
        now = time.monotonic()
        if not committer.sync and now - self._synced_s >= self._options.sync_interval_s:
            self._synced_s = now
            if committer.log.synced < committer.log.tail.offset:
                self._sync()
        self._prove_idle()
        if committer.log.wants_spare:
            try:
                committer.log.prepare_spare()
            except OSError as error:
                log.warning("%s: no room to prepare the next log file: %s", self._path, error)

    def _prove_idle(self) -> None:
        """When nothing was written since the last look, put a mark behind the last records."""
        committer = self._committer
        offset, self._seen = self._seen, committer.log.tail.offset
        if offset != self._seen or committer.log.marked or committer.failure is not None:
            return
        if not committer.lead.acquire(blocking=False):
            return
        try:
            unchanged = committer.log.tail.offset == offset
            if unchanged and (committer.sync or committer.log.synced == offset):
                committer.log.mark(committer.committed)
        except OSError as error:
            committer.undo_append(error)  # a mark is not needed: that there is no room for it harms nobody
        finally:
            committer.lead.release()
            committer.kick()

    def trim(self, needed: int) -> int:
        """Unlink log files that nobody needs: all below record ``needed``. Returns how many."""
        options = self._options
        return self._committer.log.trim(
            needed,
            bytes_kept=options.retention_bytes,
            age_s=options.retention_age_s,
        )
