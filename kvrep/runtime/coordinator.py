"""What a node has, and what a coordinator wants of a node. Times are seconds of the monotonic clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kvrep.model.position import ZERO, Position
from kvrep.replication.ballots import PrimarySeen
from kvrep.replication.election import BecomePrimary, Standing, WhyGone
from kvrep.replication.messages import Promise
from kvrep.transport.interface import Transport

__all__ = ["Coordinator", "CoordinatorStatus", "NodeView"]


class NodeView(Protocol):
    """A node, as its coordinator sees it. Any thread may call.

    ``follow``, ``become_primary``, ``step_down`` and ``adopt`` are called one at a time, in the order of the
    decisions, on a thread of their own; they may take their time.
    """

    @property
    def label(self) -> str:
        """For thread names and messages."""

    @property
    def transport(self) -> Transport:
        """To ask peers through."""

    def standing(self) -> Standing:
        """Where the node stands now. Cheap; must not wait for anything that calls the coordinator."""

    def promise(self, epoch: int, to: bytes) -> Promise | None:
        """Durably promise to obey no epoch below ``epoch``, and ``epoch`` only of the store ``to``.

        From before it returns nothing of a lower epoch is stored, acknowledged or confirmed, and the
        returned :class:`Promise` says what the log durably holds at that moment (nothing, for a witness:
        :meth:`kvrep.replication.messages.Promise.without_data`). ``None`` when a higher epoch, or this one to
        somebody else, was promised before. ``OSError`` or ``StorageFailed`` when it cannot be stored.
        """

    def become_primary(self, order: BecomePrimary) -> None:
        """Fetch what ``order.promotion`` lacks, make the epoch start the log's next record, take writes.

        With ``order.founding`` make the lineage and the first configuration of these voters. Return when
        the epoch start is in the log; ``standing().primary_epoch`` is ``order.epoch`` then. Raise when it
        cannot be done or a higher epoch was promised meanwhile. It must not wait for its commit.
        """

    def follow(self, primary: PrimarySeen) -> None:
        """Follow this primary from now on; ends being primary. Returns without waiting for the join."""

    def step_down(self, reason: str, epoch: int) -> None:
        """Refuse writes from now on (``epoch``: the newer one, 0 if there is none); reads go on."""

    def adopt(self, lineage: bytes) -> None:
        """A witness without a lineage: store this one durably."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorStatus:
    """What a coordinator is doing, for people."""

    kind: str
    phase: str
    problem: str
    primary: PrimarySeen | None
    confirmed_until: float
    """See :attr:`Coordinator.confirmed_until`."""


class Coordinator(Protocol):
    """Decides when a node tries to be primary and whom it follows. Made for one node; any thread may call."""

    @property
    def automatic(self) -> bool:
        """Whether it makes primaries, and finds them, by itself; else the node looks for one where it lost its own."""

    @property
    def witness(self) -> bool:
        """Whether this node is to vote without data."""

    @property
    def outside_votes(self) -> bool:
        """Whether :meth:`remember` has somebody to ask."""

    @property
    def confirmed_until(self) -> float:
        """A primary in asynchronous mode (``acks=0``) acknowledges nothing later than this moment.

        Infinite where nobody can be elected without this node's knowledge. Reading it is cheap.
        """

    def start(self, node: NodeView) -> None:
        """Begin; the node listens already. Returns at once."""

    def stop(self, timeout_s: float = 5.0) -> None:
        """Tell the others that this node resigns if it leads, and end all threads. Idempotent.

        To be called before the node closes anything else.
        """

    def call(self, method: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer a peer's unary call ``"ask"`` or ``"vote"``; :class:`ProtocolError` for a bad one.

        Raises ``StorageFailed`` when a promise could not be stored: then nothing is answered.
        """

    def remember(self, epoch: int, lowered: Position = ZERO) -> Position | None:
        """Have a service outside that counts as a voter promise ``epoch``, durably, and note ``lowered``.

        What it has noted so far, which :attr:`Promise.lowered` describes; ``None`` where there is no such
        service, or it does not answer. :class:`Fenced` when it has promised a higher epoch. Waits for its answer.
        """

    def heard_from_primary(self, primary: PrimarySeen) -> None:
        """The replication stream joined, or brought a heartbeat. Not for every segment."""

    def connection_lost(self, why: WhyGone) -> None:
        """The replication stream from the primary ended, other than in order."""

    def changed(self) -> None:
        """The node's role, configuration or ability changed, by hand or by a fault."""

    def status(self) -> CoordinatorStatus:
        """Cheap enough to ask once a second."""
