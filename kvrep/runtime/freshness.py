"""What a read may ask for: that this node shows a position, is not too old, or shows all there was anywhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvrep.errors import ClosedError, Error, Fenced, NotPrimary, ProtocolError, RolledBack, StaleRead, again
from kvrep.model.position import Position
from kvrep.runtime.shared import Shared

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.runtime.replaying import Replaying

__all__ = ["Freshness", "is_linearizable"]

LOOK_S = 0.25
"""How often somebody who waits for a position looks at what shows without notice."""


class Freshness:
    """One per node. Any thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._engine = node.engine
        self._reads = Shared(self._ask_read_position)

    def need(
        self,
        at_least: Position | None,
        max_staleness_s: float | None,
        timeout_s: float | None,
        consistency: str | None = None,
    ) -> None:
        """Before a read: wait for a position, check the staleness, or make it linearizable."""
        if consistency is not None and is_linearizable(consistency):
            self.linearize(timeout_s)
        if at_least is not None:
            self.wait_for(at_least, 5.0 if timeout_s is None else timeout_s)
        replaying = self._node.replaying
        if max_staleness_s is not None and replaying is not None:
            self._need_young(replaying, max_staleness_s, 1.0 if timeout_s is None else timeout_s)

    # -- a position --------------------------------------------------------------------------------

    def wait_for(self, position: Position, timeout_s: float) -> None:
        """Return once reads here show ``position``; :class:`StaleRead` after ``timeout_s``.

        :class:`RolledBack` when this history cannot contain it any more. On a follower that has given up, what
        made it give up.
        """
        try:
            epoch, offset = position
        except (TypeError, ValueError):
            raise TypeError(f"expected a Position, not {type(position).__name__}") from None
        wanted = Position(epoch, offset)
        if not self._node.moves.until(lambda: self.arrived(wanted), time.monotonic() + timeout_s, LOOK_S):
            raise ClosedError("the store is closed") if self._node.closing else self.stale(wanted, timeout_s)

    def reached(self, position: Position) -> bool:
        """Whether reads here show ``position``; :class:`RolledBack` when this history cannot contain it.

        It cannot when a newer epoch is committed at or below it. An older one there means that this node
        has not heard of the newer history yet.
        """
        epoch, offset = position
        shown = self._engine.view.last
        here = self._engine.epochs.epoch_at(min(offset, shown))
        if here > epoch:
            raise RolledBack(f"record {offset} of epoch {epoch} is not in this history", position=position)
        return offset <= shown and (here == epoch or not offset)

    def arrived(self, position: Position) -> bool:
        """As :meth:`reached`, for those who wait: raises why it never will on a node that follows nobody any more."""
        if self.reached(position):
            return True
        self.need_following()
        return False

    def need_following(self) -> None:
        """Raise why this node follows nobody any more, if it has given up."""
        replaying = self._node.replaying
        if replaying is not None and replaying.failure is not None:
            raise again(replaying.failure)

    def stale(self, wanted: Position, timeout_s: float) -> StaleRead:
        """The error of a wait that ended without its position."""
        shown = self._engine.committed_position
        return StaleRead(
            f"position {wanted} is not here after {timeout_s:g} s; this node shows {shown}",
            position=shown,
            wanted=wanted,
        )

    # -- an age ------------------------------------------------------------------------------------

    def _need_young(self, replaying: Replaying, max_staleness_s: float, timeout_s: float) -> None:
        """Wait for an answer of the primary if this copy may be too old; ``StaleRead`` without one."""
        if replaying.staleness_s() <= max_staleness_s:
            return
        if replaying.connected:
            deadline_s = time.monotonic() + timeout_s
            replaying.probe()
            self._node.moves.until(
                lambda: replaying.staleness_s() <= max_staleness_s or not replaying.connected, deadline_s
            )
        staleness = replaying.staleness_s()
        if staleness > max_staleness_s:
            self.need_following()
            raise StaleRead(
                f"this copy may be {staleness:.3f} s old, {max_staleness_s:g} s are allowed",
                staleness_s=staleness,
                position=self._engine.committed_position,
            )

    # -- everything --------------------------------------------------------------------------------

    def confirm(self, deadline_s: float) -> None:
        """As primary, make sure that this node still is one; see :meth:`Confirming.confirm`."""
        node = self._node
        if node.shipping is not None:
            node.shipping.confirming.confirm(deadline_s)
        elif node.replaying is not None:
            node.refuse_follower()
        # Else it is alone: there is nobody else.

    def linearize(self, timeout_s: float | None) -> None:
        """Return when reads here show everything that was committed anywhere before the call.

        A primary asks its voters whether it still is one; a follower asks its primary for the committed
        position and waits for it. Calls at the same time share a question. :class:`StaleRead` or
        :class:`NotPrimary` when that cannot be had in ``timeout_s``.
        """
        node = self._node
        deadline_s = node.deadline(timeout_s)
        while True:
            if node.replaying is None:
                self._engine.need_alive()
                try:
                    self.confirm(deadline_s)
                    return
                except NotPrimary:
                    if node.replaying is None:
                        raise
            position: Position = self._reads.run(deadline_s)
            try:
                self.wait_for(position, max(0.0, deadline_s - time.monotonic()))
                return
            except RolledBack:  # only a forced promotion takes back what was confirmed: ask again
                if time.monotonic() >= deadline_s:
                    raise

    def _ask_read_position(self, deadline_s: float) -> Position:
        """What the primary, confirmed, has committed. One attempt after another until ``deadline_s``."""
        node = self._node
        while True:
            target = node.link.find(deadline_s)
            left = deadline_s - time.monotonic()
            try:
                if not target.address:
                    self.confirm(deadline_s)
                    return self._engine.committed_position
                answer = node.link.call(target, "read_position", {"timeout_s": left}, left + 0.05)
                return Position.parse(str(answer.get("position")))
            except (NotPrimary, Fenced) as error:
                node.link.over(target.epoch)
                failed: Error = error
            except StaleRead:
                raise
            except ValueError as error:
                raise ProtocolError(f"the primary did not answer with a position: {error}") from None
            except Error as error:
                failed = error
            if time.monotonic() >= deadline_s or node.closing:
                raise StaleRead(
                    f"the primary did not confirm in time what is committed: {failed}",
                    position=self._engine.committed_position,
                ) from failed
            time.sleep(0.01)


def is_linearizable(consistency: str) -> bool:
    """Whether the read waits for the primary's word; ``ValueError`` for what is no consistency."""
    if consistency not in ("local", "linearizable"):
        raise ValueError(f'consistency must be "local" or "linearizable", not {consistency!r}')
    return consistency == "linearizable"
