"""What passes over a broker beside events: marks, which say how far the stream goes, and requests for more.

A **mark** is a message in the stream itself: "the last event sent is ``through``; so many records are behind it".
It lets a receiver notice that the last events are missing, and say of an idle stream as of when it is complete.
A **request** goes the other way, over a topic of its own: "send again what follows ``token``" (empty: a
snapshot). Whoever publishes the stream reads it and goes back to there; receivers drop what they have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvrep.brokers.interface import Delivery, Message
from kvrep.errors import ProtocolError
from kvrep.model.change import Sequence
from kvrep.model.event import Event

__all__ = ["MARK", "REQUESTS", "Mark", "Request", "event_of", "message_of"]

MARK = "kvrep.mark"
REQUESTS = ".requests"
"""What the topic of requests has behind the name of the stream's."""
TOKEN_CHARS_MAX = 8192


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a stream goes."""

    lineage: str
    through: Sequence
    """The last event that was sent."""
    behind: int
    """Records at the source that are not sent yet."""
    time_us: int
    """When this was so, by the publisher's wall clock."""

    def message(self) -> Message:
        headers = {"ce_type": MARK, "ce_specversion": "1.0", "ce_lineage": self.lineage}
        body = {"through": self.through, "behind": self.behind, "time_us": self.time_us}
        return Message(json.dumps(body).encode(), headers=headers)

    @classmethod
    def parse(cls, message: Message) -> Mark | None:
        """The mark that a message is; ``None`` for one that is something else. :class:`ProtocolError`."""
        if message.headers.get("ce_type") != MARK:
            return None
        try:
            body = json.loads(message.body)
            epoch, offset, index = (_whole(n) for n in body["through"])
            return cls(
                str(message.headers["ce_lineage"]), (epoch, offset, index), _whole(body["behind"]),
                _whole(body["time_us"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"not a mark: {error}") from error


@dataclass(frozen=True, slots=True)
class Request:
    """Somebody misses what follows ``token``; empty: everything."""

    lineage: str
    token: str
    sequence: Sequence
    """Of the last change that it has."""

    def message(self) -> Message:
        body = {"lineage": self.lineage, "token": self.token, "sequence": self.sequence}
        return Message(json.dumps(body).encode())

    @classmethod
    def parse(cls, message: Message) -> Request:
        """:class:`ProtocolError` for something else."""
        try:
            body = json.loads(message.body)
            epoch, offset, index = (_whole(n) for n in body["sequence"])
            lineage, token = body["lineage"], body["token"]
            if not isinstance(lineage, str) or not isinstance(token, str) or len(token) > TOKEN_CHARS_MAX:
                raise ValueError("lineage and token are text")
            return cls(lineage, token, (epoch, offset, index))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"not a request: {error}") from error


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def message_of(event: Event, *, one_line: bool) -> Message:
    """An event as a message, in binary mode. ``one_line``: all keep their order; else those of each key do."""
    headers, body = event.to_binary()
    key = b"" if one_line else event.subject.encode()
    return Message(body, key=key, headers=headers, id=event.id)


def event_of(delivery: Delivery) -> Event:
    """The event that a message is, in either mode. :class:`ProtocolError`."""
    message = delivery.message
    if any(name.endswith("specversion") for name in message.headers):
        return Event.from_binary(message.headers, message.body)
    return Event.from_json(message.body)
