"""Writes of users: put in order here, or forwarded to the primary, and what becomes of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from kvrep.errors import AckTimeout, Error, NotPrimary, Overloaded, ValueTooLarge, again
from kvrep.model.configuration import Acks, check_acks
from kvrep.model.position import Position
from kvrep.model.sessions import RequestId
from kvrep.runtime.forwarding import Forward, Forwarder, is_elsewhere
from kvrep.runtime.interrupts import carry, logged_at
from kvrep.status import Outcome
from kvrep.storage.write import Write

if TYPE_CHECKING:
    from kvrep.runtime.node import Node

__all__ = ["Writing", "check_asked"]

_position = tuple.__new__  # half the price of a named tuple's own constructor


class Writing:
    """One per node. Any thread."""

    def __init__(self, node: Node, forwarder: Forwarder | None) -> None:
        self._node = node
        self._engine = node.engine
        self._forwarder = forwarder

    def commit(
        self,
        write: Write,
        timeout_s: float | None,
        acks: Acks | None = None,
        level: Literal["synced", "visible"] | None = None,
    ) -> Position:
        """Order a write and wait for its outcome; raises what refuses it or :class:`AckTimeout`."""
        if timeout_s is None:
            timeout_s = self._node.ack_timeout_s
        if acks is not None or level is not None:
            return self._commit_more(write, timeout_s, acks, level)
        try:
            self._engine.commit(write, timeout_s)
        except Error as error:
            if self._forwarder is None or not is_elsewhere(error):
                raise
            return self._forward(write, timeout_s)
        except BaseException as interrupt:
            carry(interrupt, logged_at(write))
            raise
        if write.error is not None or not write.done:
            if self._forwarder is not None and is_elsewhere(write.error):
                return self._forward(write, timeout_s)
            self.raise_outcome(write)
        return _position(Position, (write.epoch, write.offset))

    def _commit_more(
        self, write: Write, timeout_s: float, acks: Acks | None, level: Literal["synced", "visible"] | None
    ) -> Position:
        deadline_s = time.monotonic() + timeout_s
        if self._node.forwards_now():
            check_asked(acks, level)
            return self._forward(write, timeout_s, acks, level)
        try:
            self.check_more(acks, level)
            self._engine.commit(write, timeout_s)
        except Error as error:
            if self._forwarder is None or not is_elsewhere(error):
                raise
            return self._forward(write, deadline_s - time.monotonic(), acks, level)
        except BaseException as interrupt:
            carry(interrupt, logged_at(write))
            raise
        if write.error is not None or not write.done:
            if self._forwarder is not None and is_elsewhere(write.error):
                return self._forward(write, deadline_s - time.monotonic(), acks, level)
            self.raise_outcome(write)
        self.await_more(write.position, acks, level, deadline_s)
        return write.position

    def _forward(
        self, write: Write, timeout_s: float, acks: Acks | None = None, level: str | None = None
    ) -> Position:
        """A write that this node did not log, because another one is, or will be, primary."""
        assert self._forwarder is not None
        deadline_s = time.monotonic() + timeout_s
        item = self._forwarder.make(write.payload, write.size, deadline_s, acks, level)
        return self._forwarder.commit(item)

    def submit(self, write: Write) -> Write:
        """Order a write for the background leader, or for the primary; returns what to wait for."""
        forwarder, timeout_s = self._forwarder, self._node.ack_timeout_s
        if forwarder is None:
            self._engine.submit(write, timeout_s)
            return write
        item = forwarder.make(write.payload, write.size, self._node.deadline(None))
        try:
            self._engine.submit(write, timeout_s)
        except Error as error:
            if not is_elsewhere(error):
                raise
            forwarder.order(item)
        else:
            forwarder.follow(item, write)
        return item

    def finish(self, write: Write, timeout_s: float | None) -> Position:
        """Wait for a write that is in order already."""
        if type(write) is Forward:
            assert self._forwarder is not None
            return self._forwarder.finish(write, self._node.deadline(timeout_s))
        try:
            self._engine.committer.finish(write, self._node.deadline(timeout_s))
        except BaseException as interrupt:
            carry(interrupt, logged_at(write))
            raise
        if write.error is not None or not write.done:
            self.raise_outcome(write)
        return Position(write.epoch, write.offset)

    def await_record(self, record: Any, timeout_s: float | None) -> None:
        """Wait until a record that a transaction has read is committed."""
        if type(record) is Write:
            self.finish(record, timeout_s)
            return
        seconds = self._node.ack_timeout_s if timeout_s is None else timeout_s
        self._node.freshness.wait_for(Position(record.epoch, record.offset), seconds)

    # -- more than the commit rule -----------------------------------------------------------------

    def check_more(self, acks: Acks | None, level: str | None) -> None:
        """Refuse a write that asks for more than can be done now."""
        check_asked(acks, level)
        shipping = self._node.shipping
        if shipping is not None:
            shipping.followers.check_more(acks)
        elif acks not in (None, 0):
            raise NotPrimary("this store serves no followers, so none can confirm the write",
                             hint="open the primary with listen=")  # fmt: skip

    def await_more(self, position: Position, acks: Acks | None, level: Any, deadline_s: float) -> None:
        """Wait until a committed write has what it asked for; :class:`AckTimeout` at the deadline."""
        shipping = self._node.shipping
        if shipping is not None:
            try:
                shipping.followers.await_more(position, acks, level or "synced", deadline_s)
            except BaseException as interrupt:
                carry(interrupt, position)
                raise

    def check_record_size(self, size: int) -> None:
        most = self._node.options.record_bytes_max
        if size > most:
            raise ValueTooLarge(
                f"the transaction has {size} bytes, record_bytes_max allows {most}",
                hint="split it, or open the store with a larger record_bytes_max",
            )

    # -- outcomes ----------------------------------------------------------------------------------

    def raise_outcome(self, write: Write) -> None:
        """Raise what became of a write that failed, or is not done in time."""
        if type(write) is Forward and self._forwarder is not None:
            self._forwarder.outcome(write)
            return
        if write.error is not None:
            error = write.error
            raise again(error) if isinstance(error, Error) else error
        if not write.offset and self._engine.committer.withdraw(write):
            raise Overloaded("the log did not get to this write in time; nothing of it was written")
        position = write.position if write.offset else None
        shipping = self._node.shipping
        reached = shipping.followers.copies_at(write.offset) if shipping is not None and position else 1
        needed = self._engine.configuration.copies
        ahead = shipping.followers.too_far(write.offset) if shipping is not None and position else ""
        if ahead:
            needed = max(needed, reached + 1)
        raise AckTimeout(
            f"the write at {position} is logged here;"
            f" {ahead or f'{reached} of {needed} copies confirmed it in time'}",
            position=position,
            reached=reached,
            needed=needed,
        )

    def resolve(self, position: Position | RequestId) -> Outcome:
        """What became of a write; never a guess."""
        engine = self._engine
        if isinstance(position, RequestId):
            found = engine.view.forwarded(position)[0]
            return Outcome.COMMITTED if found is not None else Outcome.PENDING
        epoch, offset = position
        shown = engine.view.last
        here = engine.epochs.epoch_at(min(offset, shown))
        if here > epoch:
            return Outcome.ROLLED_BACK
        # What is logged here and not committed says nothing: it can be cut itself.
        return Outcome.COMMITTED if offset <= shown and here == epoch else Outcome.PENDING

    def settle(self, request: RequestId, timeout_s: float) -> Outcome:
        """What became of a forwarded write; see :meth:`Forwarder.settle`."""
        if self._forwarder is None:
            raise TypeError("only a store that was opened with forward_writes=True has request ids")
        return self._forwarder.settle(request, timeout_s)


def check_asked(acks: Acks | None, level: str | None) -> None:
    """``ValueError`` unless a write may ask for these."""
    if level not in (None, "synced", "visible"):
        raise ValueError(f'level must be "synced" or "visible", not {level!r}')
    if acks is not None:
        check_acks(acks)
