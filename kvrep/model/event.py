"""The CloudEvents 1.0 form of a change, for brokers and whoever reads from them.

Binary mode is ``(headers, body)``: the attributes as headers with a prefix, the value as the body. Structured
mode is one JSON document. Both are read back into an equal :class:`Event`. A third form, for receivers that
expect it, is the envelope that Debezium writes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, cast
from urllib.parse import quote_from_bytes, unquote_to_bytes

from kvrep.errors import ProtocolError
from kvrep.model.change import BEGIN, DELETE, EMIT, END, PUT, ROW_INDEX, Change, ChangeKind, Sequence
from kvrep.model.position import EPOCH_MAX, OFFSET_MAX, Position
from kvrep.model.record import KEY_BYTES_MAX

__all__ = ["STRUCTURED", "Event"]

STRUCTURED = "application/cloudevents+json"
"""The content type of structured mode."""
OCTETS = "application/octet-stream"
TYPES: dict[ChangeKind, str] = {
    PUT: "kvrep.put",
    DELETE: "kvrep.delete",
    EMIT: "kvrep.emit",
    BEGIN: "kvrep.snapshot.begin",
    END: "kvrep.snapshot.end",
}
_KINDS = {text: kind for kind, text in TYPES.items()}
PREFIXES = ("ce_", "ce-", "cloudEvents:", "cloudEvents_")
"""Of the attributes in binary mode: of the Kafka, the HTTP and (two) the AMQP binding."""
_1970 = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Event:
    """One change as a CloudEvent. A plain value; the fields are those of :class:`Change` and what names it."""

    lineage: str
    """Of the store: random, the same on all nodes."""
    source: str
    """Who speaks: a URI reference, ``/kvrep/<lineage>`` unless told otherwise."""
    position: Position
    index: int
    kind: ChangeKind
    keyspace: str = ""
    key: bytes = b""
    value: bytes | None = None
    time_us: int = 0
    last: bool = True
    previous: Sequence | None = None
    """Of the event before it in this stream; ``None`` at the start of one."""
    snapshot: bool = False
    before: bytes | None = None
    created: bool | None = None
    topic: str = ""
    headers: Mapping[str, str] | None = None
    resume: str = ""
    """The token to go on after it at any node of the source."""
    content_type: str = OCTETS

    @classmethod
    def from_change(
        cls, lineage: str, change: Change, *, source: str = "", content_type: str = OCTETS
    ) -> Event:
        """The event of ``change`` out of a feed of the store ``lineage``."""
        return cls(
            lineage, source or f"/kvrep/{lineage}", change.position, change.index, change.kind, change.keyspace,
            change.key, change.value, change.time_us, change.last, change.previous, change.snapshot,
            change.before, change.created, change.topic, change.headers,
            "" if change.origin is None else change.origin.token(change), content_type,
        )  # fmt: skip

    @property
    def id(self) -> str:
        """``lineage/epoch/offset/index``: the same for the same change, however often it is sent.

        A row of a snapshot has a hash of its key for an index, since two snapshots number it differently.
        """
        index = str(self.index)
        if self.index >= ROW_INDEX and self.kind == PUT:
            name = self.keyspace.encode() + b"/" + self.key
            index = "row-" + blake2b(name, digest_size=12).hexdigest()
        return f"{self.lineage}/{self.position.epoch}/{self.position.offset}/{index}"

    @property
    def sequence(self) -> Sequence:
        """(epoch, offset, index): orders the events of a stream."""
        return (self.position[0], self.position[1], self.index)

    @property
    def type(self) -> str:
        """``kvrep.put``, ``kvrep.delete``, ``kvrep.emit``, ``kvrep.snapshot.begin``, ``kvrep.snapshot.end``."""
        return TYPES[self.kind]

    @property
    def subject(self) -> str:
        """``keyspace/key`` with the key percent-encoded; the percent-encoded topic of an emitted message."""
        if self.kind == EMIT:
            return quote_from_bytes(self.topic.encode(), safe="")
        return f"{self.keyspace}/{quote_from_bytes(self.key, safe='')}" if self.keyspace else ""

    @property
    def time(self) -> str:
        """RFC 3339, UTC, with microseconds; empty when it is not known."""
        if not self.time_us:
            return ""
        return (_1970 + self.time_us * _MICROSECOND).isoformat(timespec="microseconds")[:-6] + "Z"

    # -- binary mode -------------------------------------------------------------------------------

    def attributes(self) -> dict[str, str]:
        """The context attributes: those of CloudEvents, then this project's extensions. No empty ones."""
        found = {
            "specversion": "1.0",
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "subject": self.subject,
            "time": self.time,
            "sequence": _sequence_text(self.sequence),
            "previous": "" if self.previous is None else _sequence_text(self.previous),
            "last": "true" if self.last else "false",
            "snapshot": "true" if self.snapshot else "",
            "lineage": self.lineage,
            "before": "" if self.before is None else "b" + base64.b64encode(self.before).decode(),
            "created": "" if self.created is None else "true" if self.created else "false",
            "messageheaders": "" if self.headers is None else json.dumps(dict(self.headers)),
            "resume": self.resume,
        }
        return {name: text for name, text in found.items() if text}

    def to_binary(self, prefix: str = "ce_") -> tuple[dict[str, str], bytes]:
        """Binary mode: the attributes with ``prefix`` and ``content-type``; the value (empty if none)."""
        headers = {prefix + name: text for name, text in self.attributes().items()}
        if self.value is not None:
            headers["content-type"] = self.content_type
        return headers, self.value or b""

    @classmethod
    def from_binary(cls, headers: Mapping[str, str | bytes], body: bytes) -> Event:
        """Read binary mode with any of the usual prefixes. :class:`ProtocolError` when it is something else."""
        texts = {name: _text(value) for name, value in headers.items()}
        content_type = texts.get("content-type") or texts.get("content_type")
        for prefix in PREFIXES:
            if prefix + "specversion" in texts:
                attributes = {n[len(prefix) :]: t for n, t in texts.items() if n.startswith(prefix)}
                has_value = attributes.get("type") in {TYPES[PUT], TYPES[EMIT]}
                return cls._read(attributes, body if has_value else None, content_type or OCTETS)
        raise ProtocolError("the message has no CloudEvents attributes")

    # -- structured mode ---------------------------------------------------------------------------

    def to_json(self) -> bytes:
        """Structured mode: one JSON document (content type :data:`STRUCTURED`), the value in base64."""
        document: dict[str, Any] = {**self.attributes()}
        if self.value is not None:
            document["datacontenttype"] = self.content_type
            document["data_base64"] = base64.b64encode(self.value).decode()
        return json.dumps(document).encode()

    @classmethod
    def from_json(cls, document: bytes | str) -> Event:
        """Read structured mode. :class:`ProtocolError` when it is something else."""
        try:
            found = json.loads(document)
            if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
                raise ProtocolError("not a CloudEvent of a feed: attributes must be text")
            data = found.pop("data_base64", None)
            value = None if data is None else base64.b64decode(data, validate=True)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"not a CloudEvent: {error}") from error
        return cls._read(found, value, found.pop("datacontenttype", OCTETS))

    @classmethod
    def _read(cls, attributes: Mapping[str, str], value: bytes | None, content_type: str) -> Event:
        try:
            return cls._parse(attributes, value, content_type)
        except (KeyError, ValueError, TypeError, binascii.Error, RecursionError, OverflowError) as error:
            raise ProtocolError(f"not a CloudEvent of a feed: {type(error).__name__} {error}") from error

    @classmethod
    def _parse(cls, attributes: Mapping[str, str], value: bytes | None, content_type: str) -> Event:
        if attributes["specversion"] != "1.0":
            raise ValueError(f"specversion {attributes['specversion']!r}")
        kind = _KINDS[attributes["type"]]
        if (value is None) != (kind not in {PUT, EMIT}):
            raise ValueError("data is there exactly for kvrep.put and kvrep.emit")
        epoch, offset, index = _sequence(attributes["sequence"])
        previous = attributes.get("previous")
        keyspace, key, topic = "", b"", ""
        subject = attributes.get("subject", "")
        if kind in {PUT, DELETE}:
            keyspace, slash, quoted = subject.partition("/")
            key = unquote_to_bytes(quoted)
            if not (keyspace and slash and key):
                raise ValueError(f"subject {subject[:80]!r} is not keyspace/key")
            if len(key) > KEY_BYTES_MAX:
                raise ValueError(f"a key of {len(key)} bytes")
        elif kind == EMIT:
            topic = unquote_to_bytes(subject).decode()
        event = cls(
            lineage=attributes["lineage"],
            source=attributes["source"],
            position=Position(epoch, offset),
            index=index,
            kind=kind,
            keyspace=keyspace,
            key=key,
            value=value,
            time_us=_time_us(attributes.get("time", "")),
            last=_boolean(attributes["last"]),
            previous=None if previous is None else _sequence(previous),
            snapshot=_boolean(attributes.get("snapshot", "false")),
            before=_before(attributes.get("before")),
            created=_boolean(attributes["created"]) if "created" in attributes else None,
            topic=topic,
            headers=_message_headers(attributes.get("messageheaders")),
            resume=attributes.get("resume", ""),
            content_type=content_type,
        )
        if event.id != attributes["id"]:
            raise ValueError(f"id {attributes['id'][:80]!r} does not belong to what it names")
        return event

    # -- the envelope of Debezium ------------------------------------------------------------------

    def to_debezium(self, decode: Callable[[str, bytes], Any] | None = None) -> tuple[bytes, bytes]:
        """Key and value as JSON in the shape that Debezium's connectors write (without schemas).

        ``decode(keyspace, value)`` makes JSON values of bytes; base64 text without it. ``op`` is ``r`` for a
        row of a snapshot, ``c`` or ``u`` for a put (``u`` unless it is known that the key was new), ``d`` for a
        delete, ``m`` for an emitted message. ``ValueError`` for the marks of a snapshot, which it has no form for.
        """
        if self.kind in {BEGIN, END}:
            raise ValueError("the envelope has no form for the marks of a snapshot")

        def form(data: bytes | None) -> Any:
            if data is None:
                return None
            return base64.b64encode(data).decode() if decode is None else decode(self.keyspace, data)

        source = {
            "connector": "kvrep",
            "name": self.source,
            "ts_ms": self.time_us // 1000,
            "snapshot": "true" if self.snapshot else "false",
            "db": self.lineage,
            "table": self.keyspace,
            "epoch": self.position.epoch,
            "offset": self.position.offset,
            "index": self.index,
            "sequence": json.dumps([_sequence_text(self.sequence)]),
        }
        envelope: dict[str, Any] = {"source": source, "ts_ms": self.time_us // 1000}
        key: dict[str, Any] = {"key": base64.b64encode(self.key).decode()}
        if self.kind == EMIT:
            content = "" if self.value is None else base64.b64encode(self.value).decode()
            envelope |= {"op": "m", "message": {"prefix": self.topic, "content": content}}
            key = {"prefix": self.topic}
        else:
            op = "d" if self.kind == DELETE else "r" if self.snapshot else "c" if self.created else "u"
            envelope |= {"op": op, "before": form(self.before), "after": form(self.value)}
        return json.dumps(key).encode(), json.dumps(envelope).encode()


def _text(value: Any) -> str:
    """A header as text; empty for what is none."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return ""
    return value if isinstance(value, str) else ""


def _sequence_text(sequence: Sequence) -> str:
    """Fixed width, so that texts sort as the numbers do."""
    epoch, offset, index = sequence
    return f"{epoch:016x}-{offset:016x}-{index:010x}"


def _sequence(text: str) -> Sequence:
    if len(text) != 44 or text[16] != "-" or text[33] != "-":
        raise ValueError(f"not a sequence: {text[:60]!r}")
    epoch, offset, index = int(text[:16], 16), int(text[17:33], 16), int(text[34:], 16)
    if not (0 <= epoch <= EPOCH_MAX and 0 <= offset <= OFFSET_MAX and index >= 0):
        raise ValueError(f"not a sequence: {text!r}")
    if _sequence_text((epoch, offset, index)) != text:
        raise ValueError(f"not a sequence: {text!r}")
    return epoch, offset, index


def _boolean(text: str) -> bool:
    if text not in {"true", "false"}:
        raise ValueError(f"neither true nor false: {text[:20]!r}")
    return text == "true"


def _time_us(text: str) -> int:
    if not text:
        return 0
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"a time without its zone: {text[:40]!r}")
    return (at - _1970) // _MICROSECOND


def _before(text: str | None) -> bytes | None:
    """``b`` and base64: an empty value is there, an absent one is not."""
    if text is None:
        return None
    if not text.startswith("b"):
        raise ValueError("before is not b and base64")
    return base64.b64decode(text[1:], validate=True)


def _message_headers(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(item, str) for item in found.values()):
        raise ValueError("headers map text to text")
    return cast("dict[str, str]", found)
