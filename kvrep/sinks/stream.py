"""What passes over a broker beside events: marks, which say how far the stream goes, and requests for more.

A **mark** is a message in the stream itself: "the last event sent is ``through``; so many records are behind it".
It lets a receiver notice that the last events are missing, and say of an idle stream as of when it is complete.
A **request** goes the other way, over a topic of its own: "send again what follows ``token``" (empty: a
snapshot). Whoever publishes the stream reads it and goes back to there; receivers drop what they have.
A **part** is a piece of a message that is larger than brokers take: the bodies of all its parts in order are
the body, and each carries the headers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvrep.brokers.interface import Delivery, Message, headers_chars
from kvrep.errors import ProtocolError, ValueTooLarge
from kvrep.model.change import BEGIN, END, Sequence
from kvrep.model.event import STRUCTURED, Event

__all__ = [
    "MARK",
    "REQUESTS",
    "Format",
    "Mark",
    "Part",
    "Parts",
    "Request",
    "event_of",
    "message_of",
    "parts_of",
]

Format = Literal["binary", "structured", "debezium"]
MARK, PART = "kvrep.mark", "kvrep.part"
REQUESTS = ".requests"
"""What the topic of requests has behind the name of the stream's."""
TOKEN_CHARS_MAX = 8192
HEADERS_BYTES_MAX = 32 << 10
"""An event whose attributes are larger (a former value is one) goes in structured mode: headers have to be small."""
PART_OVERHEAD_BYTES = 2048
PARTS_MAX = 256
"""Of one message; fewer than a broker hands out unacknowledged, or the last ones would never come."""
GATHERED_MAX = 8
"""Messages whose parts are gathered at once."""


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


def message_of(
    event: Event, *, one_line: bool, form: Format = "binary", prefix: str = "ce_"
) -> Message | None:
    """An event as a message; ``None`` for what has no form in an envelope of Debezium, the marks of a snapshot.

    ``one_line``: all keep their order; else those of each key do. ``prefix`` is that of attributes in binary mode.
    """
    key = b"" if one_line else event.subject.encode()
    if form == "debezium":
        if event.kind in (BEGIN, END):
            return None
        name, body = event.to_debezium()
        return Message(
            body, key=b"" if one_line else name, headers={"content-type": "application/json"}, id=event.id
        )
    if form == "binary":
        headers, body = event.to_binary(prefix)
        if headers_chars(headers) <= HEADERS_BYTES_MAX:
            return Message(body, key=key, headers=headers, id=headers[prefix + "id"])
    return Message(event.to_json(), key=key, headers={"content-type": STRUCTURED}, id=event.id)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message."""

    lineage: str
    sequence: Sequence
    """Of the event that the whole message is."""
    id: str
    """Of the whole message."""
    index: int
    count: int
    headers: Mapping[str, str]
    """Of the whole message."""
    body: bytes

    def message(self, key: bytes) -> Message:
        headers = {
            "ce_type": PART, "ce_specversion": "1.0", "ce_source": f"/kvrep/{self.lineage}",
            "ce_id": f"{self.id}/part-{self.index}", "ce_lineage": self.lineage, "ce_whole": self.id,
            "ce_sequence": json.dumps(self.sequence), "ce_part": f"{self.index}/{self.count}",
            "ce_headers": json.dumps(dict(self.headers)),
        }  # fmt: skip
        return Message(self.body, key=key, headers=headers, id=headers["ce_id"])

    @classmethod
    def parse(cls, message: Message) -> Part | None:
        """The part that a message is; ``None`` for one that is something else. :class:`ProtocolError`."""
        given = message.headers
        if given.get("ce_type") != PART:
            return None
        try:
            index, count = (_whole(int(n)) for n in given["ce_part"].split("/"))
            epoch, offset, number = (_whole(n) for n in json.loads(given["ce_sequence"]))
            headers = json.loads(given["ce_headers"])
            if not index < count <= PARTS_MAX:
                raise ValueError(f"part {index} of {count}")
            if type(headers) is not dict or not all(isinstance(text, str) for text in headers.values()):
                raise TypeError("headers are text")
            return cls(
                str(given["ce_lineage"]), (epoch, offset, number), str(given["ce_whole"]), index, count, headers,
                message.body,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"not a part of a message: {error}") from error


def parts_of(message: Message, event: Event, bytes_max: int) -> list[Message]:
    """``message``, which is ``event``, in pieces of at most ``bytes_max``; itself alone where it fits.

    :class:`ValueTooLarge` when that would be too many pieces.
    """
    around = headers_chars(message.headers) + PART_OVERHEAD_BYTES
    if len(message.body) + len(message.key) + around <= bytes_max:
        return [message]
    step = bytes_max - HEADERS_BYTES_MAX - PART_OVERHEAD_BYTES - len(message.key)
    count = -(-len(message.body) // step)
    if count > PARTS_MAX:
        raise ValueTooLarge(
            f"an event of {len(message.body)} bytes would be {count} messages, more than {PARTS_MAX}",
            hint="raise the largest message (--message-bytes), and what the broker takes",
        )
    return [
        Part(
            event.lineage, event.sequence, message.id, index, count, message.headers,
            message.body[index * step : (index + 1) * step],
        ).message(message.key)
        for index in range(count)
    ]  # fmt: skip


class Parts:
    """Puts messages together again. Repeats change nothing; in any order. No clock, no thread, no I/O."""

    def __init__(self) -> None:
        self._gathered: dict[tuple[str, Sequence, int], dict[int, Part]] = {}
        """By id, place (a row has another one in each snapshot) and number of parts: who publishes it again may cut
        it otherwise."""

    def __len__(self) -> int:
        return len(self._gathered)

    def add(self, part: Part) -> Message | None:
        """Take a part as it arrives; the whole message once it was the last that was missing."""
        name = part.id, part.sequence, part.count
        found = self._gathered.setdefault(name, {})
        found[part.index] = part
        if len(found) < part.count:
            return None
        del self._gathered[name]
        return Message(b"".join(found[i].body for i in range(part.count)), headers=part.headers, id=part.id)

    @property
    def full(self) -> bool:
        """Whether more messages are gathered at once than there is room for."""
        return len(self._gathered) > GATHERED_MAX

    def forget(self, through: Sequence) -> None:
        """Drop what belongs to events through this one: they took effect."""
        if self._gathered:
            self._gathered = {name: found for name, found in self._gathered.items() if name[1] > through}

    def clear(self) -> None:
        """Drop everything: it will be sent again."""
        self._gathered.clear()


def event_of(delivery: Delivery) -> Event:
    """The event that a message is, in either mode. :class:`ProtocolError`."""
    message = delivery.message
    if any(name.endswith("specversion") for name in message.headers):
        return Event.from_binary(message.headers, message.body)
    return Event.from_json(message.body)
