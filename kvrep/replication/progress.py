"""One follower as the primary sees it, for as long as one stream lasts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from kvrep.errors import ProtocolError
from kvrep.model.position import Position
from kvrep.replication.messages import Ack

__all__ = ["TRANSITIONS", "Progress", "State"]


class State(Enum):
    """Where a stream is::

                  Hello
                    │        promises wanted
                    v ──────────────────────────> FENCING
                 JOINING <───── promise stored ──────┘
                  │   │ ^
         verified │   │ └──── snapshot is live ─── BOOTSTRAPPING
                  │   └─────── records trimmed ───────> ┘
                  v
              STREAMING

    From every state a stream can end (GONE), which is final: a follower that returns gets a new Progress.
    What the primary remembers beyond that is the slot.
    """

    JOINING = "joining"
    FENCING = "fencing"
    BOOTSTRAPPING = "bootstrapping"
    STREAMING = "streaming"
    GONE = "gone"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.JOINING: frozenset({State.FENCING, State.BOOTSTRAPPING, State.STREAMING, State.GONE}),
    State.FENCING: frozenset({State.JOINING, State.GONE}),
    State.BOOTSTRAPPING: frozenset({State.JOINING, State.GONE}),
    State.STREAMING: frozenset({State.GONE}),
    State.GONE: frozenset(),
}
"""The only place that says which state may follow which."""


@dataclass(slots=True, kw_only=True, eq=False)
class Progress:
    """Invariants: visible <= synced <= written <= sent <= the end of our log; none of them goes back."""

    store_id: bytes
    name: str
    address: str = ""
    voter: bool = True
    """Whether it is willing to vote; whether it does is the configuration's to say."""
    state: State = State.JOINING
    sent: int = 0
    """The last offset handed to the stream. What follows it is sent next."""
    written: int = 0
    synced: int = 0
    """The last offset the follower confirmed to be durable. The commit rule counts this one."""
    visible: int = 0
    credit_bytes: int = 0
    """How much more the follower has room for. Below zero when one record was larger than the rest of it."""
    in_flight_bytes: int = 0
    """Sent and not yet confirmed as written. Invariant: the sum over ``unconfirmed``."""
    unconfirmed: deque[tuple[int, int]] = field(default_factory=deque)
    """(last offset, size) of each run in flight, oldest first."""
    last_heard: float = 0.0
    promised_epoch: int = 0

    def enter(self, state: State) -> None:
        """Change the state; ``ValueError`` when the table does not have it."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"{self.name}: no way from {self.state.value} to {state.value}")
        self.state = state

    def join(self, at: Position, credit_bytes: int, epoch: int, now: float) -> None:
        """The join is verified at ``at``, so records follow there. What counts is only what it acks now."""
        self.enter(State.STREAMING)
        self.sent = at.offset
        self.credit_bytes = credit_bytes
        self.promised_epoch = epoch
        self.last_heard = now

    def send(self, first: int, last: int, size: int) -> None:
        """A run of records leaves. ``size`` is that of the uncompressed records, all parts together."""
        if first != self.sent + 1 or last < first or size <= 0:
            raise ValueError(f"{self.name}: sent {self.sent}, then {first}..{last} ({size} bytes)")
        self.sent = last
        self.credit_bytes -= size
        self.in_flight_bytes += size
        self.unconfirmed.append((last, size))

    def confirm(self, ack: Ack) -> bool:
        """Take an ack over; whether anything moved. ``ProtocolError`` when it breaks the invariants."""
        written, synced, visible = ack.written, ack.synced, ack.visible
        if not (
            self.visible <= visible <= synced <= written <= self.sent
            and self.synced <= synced
            and self.written <= written
        ):
            raise ProtocolError(f"{self.name} sent {ack} after {self}")
        if written == self.written and synced == self.synced and visible == self.visible:
            return False
        self.written, self.synced, self.visible = written, synced, visible
        unconfirmed = self.unconfirmed
        while unconfirmed and unconfirmed[0][0] <= written:
            self.in_flight_bytes -= unconfirmed.popleft()[1]
        return True
