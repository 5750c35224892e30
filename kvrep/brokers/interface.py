"""What every message broker offers to kvrep, on the level of bytes; nothing of stores is known here.

::

    broker = kvrep.brokers.connect("amqp://user:password@host:5672/vhost?topic=orders")
    publisher = broker.publisher()
    number = publisher.publish(Message(b"body", key=b"k", id="17"))    # buffered: 1, 2, 3 …
    publisher.flush(timeout_s=10)                                      # confirmed by the broker
    subscriber = broker.subscriber(group="billing")
    for delivery in subscriber.receive(100, timeout_s=1.0): ...
    subscriber.ack(delivery)                                           # this one and all before it

What holds for all of them:

* A message counts as confirmed when the broker says that it is safe by the broker's own rules (durable and,
  in a cluster, replicated). ``Publisher.confirmed`` counts without gaps: it is the watermark to store.
* Delivery is at least once. After a lost connection, what was not confirmed is sent again by the publisher
  itself, and what was not acked arrives again. Messages of one key arrive in the order of publishing, apart
  from repeats.
* Broken connections are mended in the background, with backoff. What does not mend itself (credentials,
  permissions, an unknown host at the first attempt) raises at once and names what to fix.
* Every buffer is bounded in messages and bytes, every wait has a deadline.

Errors are those of :mod:`kvrep.errors`: ``OpenError`` (URL, missing package), ``PeerUnavailable`` (nobody
answers), ``AuthenticationFailed``, ``PermissionDenied``, ``Overloaded`` (no room before the deadline; nothing
was taken), ``ValueTooLarge``, ``ClosedError`` and, here, :class:`Unconfirmed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from kvrep.errors import UnknownOutcome

__all__ = [
    "BUFFER_BYTES",
    "BUFFER_MESSAGES",
    "EARLIEST",
    "LATEST",
    "STORED",
    "Broker",
    "Delivery",
    "Message",
    "Publisher",
    "PublisherStatus",
    "Subscriber",
    "Unconfirmed",
    "headers_chars",
]

BUFFER_BYTES = 16 << 20
BUFFER_MESSAGES = 10_000
"""Bounds of what a publisher holds until it is confirmed."""

STORED = "stored"
"""Start behind what this group has acked; at the beginning when it has acked nothing."""
EARLIEST = "earliest"
"""Start at the oldest message that the broker has (a queue: always)."""
LATEST = "latest"
"""Start with what arrives from now on (a log broker only)."""

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Unconfirmed(UnknownOutcome):
    """The broker did not confirm all messages in time; they may arrive all the same."""

    hint = "the publisher keeps trying until it is closed; flush() again, or publish again after a restart"
    _names: ClassVar[tuple[str, ...]] = ("confirmed", "published")
    confirmed: int
    published: int


@dataclass(frozen=True, slots=True)
class Message:
    """``key`` decides which messages stay in order; ``id`` names this one, for those who drop repeats."""

    body: bytes
    key: bytes = b""
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS)
    id: str = ""


def headers_chars(headers: Mapping[str, str]) -> int:
    """How long headers are."""
    return sum(map(len, headers)) + sum(map(len, headers.values()))


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as it arrived. ``tag`` belongs to the subscriber that made it."""

    message: Message
    position: str = ""
    """Where it stands in the broker's log: ``start=`` takes it, to go on behind it; empty in a queue."""
    redelivered: bool = False
    """The broker says that it was delivered before; False proves nothing."""
    tag: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherStatus:
    """How a publisher is."""

    state: str
    """``connecting``, ``ready``, ``blocked`` (the broker takes nothing now), ``failed`` or ``closed``."""
    problem: str = ""
    published: int = 0
    confirmed: int = 0
    buffered_bytes: int = 0
    reconnects: int = 0


class Publisher(Protocol):
    """Sends messages to one topic. Any thread."""

    @property
    def published(self) -> int:
        """How many messages were taken."""

    @property
    def confirmed(self) -> int:
        """How many are confirmed, counted from the first without a gap."""

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""

    def publish(self, message: Message, timeout_s: float = 30.0) -> int:
        """Take a message into the buffer; its number, from 1 on.

        ``Overloaded`` when the buffer has no room within ``timeout_s`` (nothing was taken; the text says when
        the broker blocks publishers), ``ValueTooLarge`` when it can never be sent, ``ClosedError``, or the
        error that ended this publisher.
        """

    def flush(self, timeout_s: float) -> None:
        """Return once everything published before is confirmed; ``Unconfirmed`` after ``timeout_s``."""

    def wait(self, number: int, timeout_s: float) -> bool:
        """Wait until ``confirmed >= number``; whether it is. Raises the error that ended this publisher."""

    def status(self) -> PublisherStatus:
        """A look at it, at any time."""

    def close(self, timeout_s: float = 5.0) -> None:
        """Try to flush for ``timeout_s``, then end; never raises for what stays unconfirmed. Idempotent."""


class Subscriber(Protocol):
    """Reads one topic. Receive and ack from one thread at a time; close from any."""

    @property
    def problem(self) -> str:
        """Why nothing can come now; empty while there is a connection, as far as is known. Any thread."""

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""

    def receive(self, max_messages: int, timeout_s: float) -> list[Delivery]:
        """Up to so many messages; waits for the first one for ``timeout_s`` at most, else an empty list.

        ``ClosedError`` once closed, or the error that ended it.
        """

    def ack(self, delivery: Delivery, *, through: bool = True) -> None:
        """This delivery, and with ``through`` everything received before it, is done with.

        Without ``through`` only this one; a log broker stores its position once all before it are acked.
        Returns at once; a delivery of a lost connection is ignored, as it will arrive again.
        """

    def close(self) -> None:
        """End it; what is acked is stored first, the rest arrives again for the group. Idempotent."""


class Broker(Protocol):
    """One broker, or cluster of them. Any thread."""

    @property
    def url(self) -> str:
        """Where it is, without the password."""

    @property
    def topic(self) -> str:
        """The topic that the URL names, used where none is given."""

    @property
    def is_log(self) -> bool:
        """Whether messages stay after they were read, so that a subscriber can start anywhere."""

    def publisher(
        self,
        topic: str = "",
        *,
        buffer_messages: int = BUFFER_MESSAGES,
        buffer_bytes: int = BUFFER_BYTES,
        transactional_id: str = "",
    ) -> Publisher:
        """A publisher, connected once; makes the topic where the broker lets it.

        ``transactional_id``: messages become visible in transactions, one per flush or sooner, and an older
        publisher of that id is shut out; ``OpenError`` where the broker has no transactions.
        """

    def subscriber(
        self, topic: str = "", *, group: str = "kvrep", start: str = STORED, prefetch: int = 500
    ) -> Subscriber:
        """A subscriber, connected once. ``start``: STORED, EARLIEST, LATEST or a ``Delivery.position``, behind
        which it begins. At most ``prefetch`` deliveries wait for their ack; then nothing more arrives.

        A queue delivers each message to one subscriber, whatever its group, and knows only STORED and
        EARLIEST, which mean the same there.
        """

    def close(self) -> None:
        """Close all its publishers and subscribers. Idempotent."""
