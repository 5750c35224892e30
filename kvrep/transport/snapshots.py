"""Whether a snapshot arrives whole: one info, then its bytes in order up to the last."""

from __future__ import annotations

from kvrep.errors import ProtocolError
from kvrep.transport.interface import SnapshotInfo, SnapshotItem, SnapshotRequest

__all__ = ["SnapshotCheck"]


class SnapshotCheck:
    """Follows one transfer.

    ``ProtocolError`` for a missing info, a gap, an overrun or an early end.
    """

    def __init__(self, request: SnapshotRequest) -> None:
        self._request = request
        self._info: SnapshotInfo | None = None
        self._next = 0

    def item(self, item: SnapshotItem) -> SnapshotItem:
        """``item`` itself, if it may come now."""
        if isinstance(item, SnapshotInfo):
            if self._info is not None:
                raise ProtocolError("a snapshot describes itself twice")
            self._info, self._next = item, item.start(self._request)
            if self._next > item.bytes_total:
                raise ProtocolError(f"a snapshot of {item.bytes_total} bytes has no {self._next}")
            return item
        if self._info is None:
            raise ProtocolError("a snapshot begins without its description")
        if item.offset != self._next:
            raise ProtocolError(f"a snapshot chunk at {item.offset} came in place of {self._next}")
        self._next += len(item.data)
        if self._next > self._info.bytes_total:
            raise ProtocolError(f"a snapshot of {self._info.bytes_total} bytes goes on behind them")
        return item

    def end(self) -> None:
        """The peer has ended the transfer."""
        if self._info is None or self._next != self._info.bytes_total:
            raise ProtocolError(f"a snapshot ended early, at byte {self._next}")
