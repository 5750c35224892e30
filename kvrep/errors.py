"""Every error kvrep raises, in one tree. Catch :class:`Error` to catch them all.

::

    Error
    ├── ClosedError                  the store (or snapshot, feed …) is closed
    │   └── ForkedError              … because this process is a fork of the one that opened it
    ├── OpenError                    open() failed; nothing was changed
    │   ├── StoreInUse               another process, or this one, has it open
    │   ├── ConfigurationMismatch    an option contradicts the store, or is not understood
    │   ├── UpgradeRequired          written (or sent) by a newer kvrep
    │   └── NotAStore                a directory that is something else, or lost a file
    ├── RefusedError                 the write was refused; nothing was logged, a retry is safe
    │   ├── NotPrimary               this node does not take writes; primary_address says who does
    │   ├── NotEnoughFollowers       the ack rule cannot be met now
    │   ├── Fenced                   a newer epoch exists; this node may not write any more
    │   ├── StorageFull              no room on disk, in the map or in the log; heals by itself
    │   ├── Overloaded               a bound on unfinished work is reached
    │   ├── UnsafePromotion          too few voters answered to promote without risk
    │   ├── TransactionExpired       the transaction outlived its maximum age
    │   ├── TransactionConflict      what a forwarded transaction has read is not so any more at the primary
    │   └── InvalidInput (ValueError)
    │       ├── InvalidKey           empty key
    │       ├── KeyTooLong           key above 511 bytes
    │       ├── ValueTooLarge        value or transaction above its limit
    │       └── InvalidKeyspace      keyspace name out of its alphabet, or too many keyspaces
    ├── UnknownOutcome               the write may or may not survive; ask Store.resolve()
    │   ├── AckTimeout               logged or forwarded, not confirmed in time
    │   └── LogFailed (StorageFailed)  the disk failed while the write was being logged
    ├── StorageFailed                the disk failed (EIO, fdatasync); read-only until reopened. Raised for a write,
    │                                and not as LogFailed: nothing of it was logged
    ├── CorruptionError
    │   ├── LogCorrupt               damage inside the proven part of the log
    │   └── DigestMismatch           this copy's state differs from the primary's
    ├── ReadError
    │   ├── StaleRead                the asked freshness was not reached in time
    │   ├── SnapshotExpired          the snapshot outlived its maximum age
    │   ├── RolledBack               the position is not part of this history any more
    │   ├── Truncated                a feed's place is not; the history it read is the same up to `to`
    │   ├── TooOld                   the position is below what this node still knows
    │   ├── NoSuchFeed (KeyError)    no feed has that name
    │   └── InvalidToken (ValueError)  a feed's token is damaged, or another store's
    └── ReplicationError
        ├── LogTrimmed               the asked records are gone; bootstrap from a snapshot
        ├── RejectedChange           a secondary system cannot hold this change
        ├── LineageMismatch          the other node holds another store altogether
        ├── ProtocolError            a peer sent what the protocol does not allow
        ├── PeerUnavailable          no answer from an address
        ├── AuthenticationFailed     the peer could not prove who it is
        └── PermissionDenied         the peer may not do that

A missing key raises plain :class:`KeyError`; a wrong type plain :class:`TypeError`.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "AckTimeout",
    "AuthenticationFailed",
    "ClosedError",
    "ConfigurationMismatch",
    "CorruptionError",
    "DigestMismatch",
    "Error",
    "Fenced",
    "ForkedError",
    "InvalidInput",
    "InvalidKey",
    "InvalidKeyspace",
    "InvalidToken",
    "KeyTooLong",
    "LineageMismatch",
    "LogCorrupt",
    "LogFailed",
    "LogTrimmed",
    "NoSuchFeed",
    "NotAStore",
    "NotEnoughFollowers",
    "NotPrimary",
    "OpenError",
    "Overloaded",
    "PeerUnavailable",
    "PermissionDenied",
    "ProtocolError",
    "ReadError",
    "RefusedError",
    "RejectedChange",
    "ReplicationError",
    "RolledBack",
    "SnapshotExpired",
    "StaleRead",
    "StorageFailed",
    "StorageFull",
    "StoreInUse",
    "TooOld",
    "TransactionConflict",
    "TransactionExpired",
    "Truncated",
    "UnknownOutcome",
    "UnsafePromotion",
    "UpgradeRequired",
    "ValueTooLarge",
]


class Error(Exception):
    """Root of all kvrep errors.

    ``fields`` holds what is known about the case by name; every field is an attribute too.
    ``hint`` says what to do next and is part of the text.
    """

    hint: str = ""
    _names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str = "", *, hint: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        if hint is not None:
            self.hint = hint
        self.fields = fields
        for name in self._names:
            setattr(self, name, fields.get(name))
        for name, value in fields.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        text = self.message or (type(self).__doc__ or "").partition("\n")[0]
        return f"{text} [{self.hint}]" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.fields)


def _rebuild(kind: type[Error], message: str, hint: str, fields: dict[str, Any]) -> Error:
    return kind(message, hint=hint, **fields)


def again(error: Error) -> Error:
    """A copy of ``error`` to raise, so that threads do not add their tracebacks to one object."""
    copy = _rebuild(type(error), error.message, error.hint, error.fields)
    copy.__cause__ = error.__cause__
    return copy


class ClosedError(Error):
    """The object is closed."""


class ForkedError(ClosedError):
    """This process is a fork of the one that opened the store."""

    hint = "open the store in the child itself, after the fork, at another path or as a follower"


class OpenError(Error):
    """The store could not be opened; nothing was changed."""


class StoreInUse(OpenError):
    """The store is already open."""

    hint = "one process opens a store at a time; share the Store object, or follow it from another path"
    _names: ClassVar[tuple[str, ...]] = ("path", "pid", "host")
    path: str
    pid: int | None
    host: str | None


class ConfigurationMismatch(OpenError):
    """An option contradicts what the store says of itself, or is not understood."""

    hint = "give the stored value, or leave the option out; some can be changed with reconfigure()"
    _names: ClassVar[tuple[str, ...]] = ("option", "given", "stored")
    option: str
    given: Any
    stored: Any


class UpgradeRequired(OpenError):
    """This was written or sent by a newer kvrep."""

    hint = "upgrade this node first"
    _names: ClassVar[tuple[str, ...]] = ("found", "supported")
    found: Any
    supported: Any


class NotAStore(OpenError):
    """The directory is not a kvrep store, or a part of the store is missing."""

    hint = "check the path; kvrep makes a store only in a folder that is empty or missing"
    _names: ClassVar[tuple[str, ...]] = ("path",)
    path: str


class RefusedError(Error):
    """The write was refused before anything was logged."""


class NotPrimary(RefusedError):
    """This node does not take writes."""

    hint = "write to the primary"
    _names: ClassVar[tuple[str, ...]] = ("primary_address", "epoch")
    primary_address: str | None
    epoch: int | None


class NotEnoughFollowers(RefusedError):
    """Fewer voters are connected than the ack rule needs."""

    hint = "start the missing followers, or change the rule with reconfigure(acks=…)"
    _names: ClassVar[tuple[str, ...]] = ("needed", "connected")
    needed: int
    connected: int


class Fenced(RefusedError):
    """A newer epoch exists; this node may not write any more."""

    hint = "write to the new primary"
    _names: ClassVar[tuple[str, ...]] = ("epoch", "primary_address")
    epoch: int
    primary_address: str | None


class StorageFull(RefusedError):
    """There is no room for this write; reads go on, and writing resumes by itself when there is room."""

    hint = "free disk space, or raise the limit that the message names"


class Overloaded(RefusedError):
    """A bound on unfinished work is reached."""

    hint = "wait for earlier writes before sending more"


class UnsafePromotion(RefusedError):
    """Too few voters answered to promote without risking acknowledged writes."""

    hint = "start or reach the voters that it names, then try again"
    _names: ClassVar[tuple[str, ...]] = ("missing", "needed", "answered")
    missing: tuple[str, ...]
    needed: int
    answered: int


class TransactionExpired(RefusedError):
    """The transaction was open longer than transaction_age_max_s."""

    hint = "keep transactions short; nothing of it was written"


class TransactionConflict(RefusedError):
    """What a transaction on a follower has read is not so any more at the primary."""

    hint = "nothing of it was written; run it again"
    _names: ClassVar[tuple[str, ...]] = ("position",)
    position: Any


class InvalidInput(RefusedError, ValueError):
    """A key, value or name is outside its limits."""


class InvalidKey(InvalidInput):
    """A key must have at least one byte."""

    hint = "give every key a name of its own; an empty prefix is fine for scans"


class KeyTooLong(InvalidInput):
    """A key is longer than 511 bytes."""

    hint = "put a hash of it, such as hashlib.blake2b(key).digest(), in its place, and the whole key into the value"


class ValueTooLarge(InvalidInput):
    """A value, or a transaction, is larger than its limit."""

    hint = "split it over several keys or transactions, or raise the limit that the message names"


class InvalidKeyspace(InvalidInput):
    """A keyspace name is not allowed, or there are too many keyspaces."""

    hint = "names have 1 to 64 of a-z 0-9 _ -; for many small sets use one keyspace and prefixes of keys"


class UnknownOutcome(Error):
    """The write may or may not survive."""

    hint = "Store.resolve(position) tells later whether it was committed or rolled back"
    _names: ClassVar[tuple[str, ...]] = ("position",)
    position: Any


class AckTimeout(UnknownOutcome):
    """The write was logged or forwarded, and was not confirmed in time."""

    _names: ClassVar[tuple[str, ...]] = ("position", "reached", "needed", "request")
    reached: int
    needed: int
    request: Any
    """Of a forwarded write whose position is not known: its :class:`RequestId`."""


class StorageFailed(Error):
    """The disk failed; the store is read-only until it is opened anew."""

    hint = "check the disk and the kernel log, then close and open the store again"


class LogFailed(UnknownOutcome, StorageFailed):
    """The disk failed while the write was being logged; what was written of it may survive, here or on followers."""

    hint = "check the disk; Store.resolve(position), here after a new open or on the new primary, tells the outcome"


class CorruptionError(Error):
    """Stored data is damaged."""


class LogCorrupt(CorruptionError):
    """The log is damaged where it was proven to be whole; nothing was cut."""

    hint = "restore this node from another one: move the directory away and let it bootstrap"
    _names: ClassVar[tuple[str, ...]] = ("path", "at")
    path: str
    at: int


class DigestMismatch(CorruptionError):
    """This copy's state differs from what its log adds up to, so it may not be promoted."""

    hint = "promote another node; move this one's directory away and let it bootstrap from a healthy one"
    _names: ClassVar[tuple[str, ...]] = ("at",)
    at: int
    """The offset of the first record that showed it."""


class ReadError(Error):
    """A read could not be answered as asked."""


class StaleRead(ReadError):
    """The asked position or freshness was not reached in time."""

    hint = "allow more time or staleness, or read from the primary"
    _names: ClassVar[tuple[str, ...]] = ("position", "wanted", "staleness_s")
    position: Any
    wanted: Any
    staleness_s: float | None


class SnapshotExpired(ReadError):
    """The snapshot was held longer than snapshot_age_max_s."""

    hint = "take a new snapshot; raise snapshot_age_max_s only if disk growth is acceptable"
    _names: ClassVar[tuple[str, ...]] = ("position",)
    position: Any


class RolledBack(ReadError):
    """The position is not part of this store's history."""

    hint = (
        "a failover dropped it and saved it to a rescue file ('kvrep rescue list'), or it is of another store"
    )
    _names: ClassVar[tuple[str, ...]] = ("position",)
    position: Any


class TooOld(ReadError):
    """The position lies below what this node still knows."""

    hint = "read the keys themselves: what they hold now shows whether the write is there"
    _names: ClassVar[tuple[str, ...]] = ("position",)
    position: Any


class Truncated(ReadError):
    """What the feed has read last is not part of this history any more: a forced promotion dropped it."""

    hint = "what was read beyond `to` did not survive; resnapshot() gives what there is now"
    _names: ClassVar[tuple[str, ...]] = ("to", "position")
    to: Any
    """The last position that both histories share."""
    position: Any
    """What the feed has read last."""


class NoSuchFeed(ReadError, KeyError):
    """No feed of the store has that name."""

    hint = "'kvrep feed list' shows them"
    _names: ClassVar[tuple[str, ...]] = ("name",)
    name: str


class InvalidToken(ReadError, ValueError):
    """A token of a feed is damaged, or belongs to another store."""

    hint = "use the token that the feed gave, unchanged; without one, begin with a snapshot"


class ReplicationError(Error):
    """Replication cannot go on as it is."""


class LogTrimmed(ReplicationError):
    """The asked records have been trimmed from the log."""

    hint = "begin with a snapshot"
    _names: ClassVar[tuple[str, ...]] = ("first",)
    first: int


class RejectedChange(ReplicationError):
    """A secondary system cannot hold this change, however often it is tried."""

    hint = "'kvrep agent dead-letters' shows what was put aside, 'kvrep agent retry' tries it again"
    _names: ClassVar[tuple[str, ...]] = ("index", "keyspace", "key")
    index: int
    """Its number among the changes that were given together."""
    keyspace: str
    key: bytes


class LineageMismatch(ReplicationError):
    """The other node holds another store."""

    hint = "check the address; to replace this store, move its directory away and start it empty"
    _names: ClassVar[tuple[str, ...]] = ("ours", "theirs")
    ours: str
    theirs: str


class ProtocolError(ReplicationError):
    """A peer sent what the protocol does not allow."""

    hint = "check the address, and that both sides run versions that go together"


class PeerUnavailable(ReplicationError):
    """A node did not answer."""

    hint = "check that it runs, and that the address is right"
    _names: ClassVar[tuple[str, ...]] = ("address",)
    address: str


class AuthenticationFailed(ReplicationError):
    """The peer could not prove who it is."""

    hint = "give both sides the same token, or certificates of the same authority"


class PermissionDenied(ReplicationError):
    """The peer may not do that."""

    hint = "use the token or certificate of a node, or ask who runs the group"
