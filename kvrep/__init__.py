"""kvrep: a durable, ordered, replicated key-value store that lives inside a Python application.

>>> import kvrep, tempfile
>>> with tempfile.TemporaryDirectory() as folder, kvrep.open(folder + "/orders") as db:
...     position = db.put(b"k", b"v")
...     db[b"k"]
b'v'

The layers, each of which imports only from those below it (a linter holds it)::

    cli | testing            the command; what users' own tests use
    sinks                    what feeds and brokers are applied to: agents and secondary systems
    aio                      the asyncio twin of store
    store                    Store, the one object a user holds
    feeds                    the changes of a store as an ordered, resumable stream
    keyspace                 the maps of a store
    runtime                  threads, clocks, deadlines; one node
    storage | transport | brokers    log files, memtables and LMDB | gRPC | message brokers
    replication              decisions as pure values: no I/O, no clock, no thread
    status, options          public values
    model | _pb, codecs      positions, records, byte forms
    errors
"""

from __future__ import annotations

from importlib import metadata as _metadata
from typing import TYPE_CHECKING, Any

from kvrep import codecs as codecs
from kvrep import errors as errors
from kvrep.batch import Batch as Batch
from kvrep.codecs import Codec as Codec
from kvrep.coordinators import Etcd as Etcd
from kvrep.coordinators import Quorum as Quorum
from kvrep.errors import AckTimeout as AckTimeout
from kvrep.errors import AuthenticationFailed as AuthenticationFailed
from kvrep.errors import ClosedError as ClosedError
from kvrep.errors import ConfigurationMismatch as ConfigurationMismatch
from kvrep.errors import CorruptionError as CorruptionError
from kvrep.errors import DigestMismatch as DigestMismatch
from kvrep.errors import Error as Error
from kvrep.errors import Fenced as Fenced
from kvrep.errors import ForkedError as ForkedError
from kvrep.errors import InvalidInput as InvalidInput
from kvrep.errors import InvalidKey as InvalidKey
from kvrep.errors import InvalidKeyspace as InvalidKeyspace
from kvrep.errors import InvalidToken as InvalidToken
from kvrep.errors import KeyTooLong as KeyTooLong
from kvrep.errors import LineageMismatch as LineageMismatch
from kvrep.errors import LogCorrupt as LogCorrupt
from kvrep.errors import LogFailed as LogFailed
from kvrep.errors import LogTrimmed as LogTrimmed
from kvrep.errors import NoSuchFeed as NoSuchFeed
from kvrep.errors import NotAStore as NotAStore
from kvrep.errors import NotEnoughFollowers as NotEnoughFollowers
from kvrep.errors import NotPrimary as NotPrimary
from kvrep.errors import OpenError as OpenError
from kvrep.errors import Overloaded as Overloaded
from kvrep.errors import PeerUnavailable as PeerUnavailable
from kvrep.errors import PermissionDenied as PermissionDenied
from kvrep.errors import ProtocolError as ProtocolError
from kvrep.errors import ReadError as ReadError
from kvrep.errors import RefusedError as RefusedError
from kvrep.errors import RejectedChange as RejectedChange
from kvrep.errors import ReplicationError as ReplicationError
from kvrep.errors import RolledBack as RolledBack
from kvrep.errors import SnapshotExpired as SnapshotExpired
from kvrep.errors import StaleRead as StaleRead
from kvrep.errors import StorageFailed as StorageFailed
from kvrep.errors import StorageFull as StorageFull
from kvrep.errors import StoreInUse as StoreInUse
from kvrep.errors import TooOld as TooOld
from kvrep.errors import TransactionConflict as TransactionConflict
from kvrep.errors import TransactionExpired as TransactionExpired
from kvrep.errors import Truncated as Truncated
from kvrep.errors import UnknownOutcome as UnknownOutcome
from kvrep.errors import UnsafePromotion as UnsafePromotion
from kvrep.errors import UpgradeRequired as UpgradeRequired
from kvrep.errors import ValueTooLarge as ValueTooLarge
from kvrep.feeds.changes import Changes as Changes
from kvrep.feeds.named import Feed as Feed
from kvrep.feeds.named import FeedInfo as FeedInfo
from kvrep.keyspace import Keyspace as Keyspace
from kvrep.keyspace import WriteFuture as WriteFuture
from kvrep.model.change import Change as Change
from kvrep.model.configuration import Configuration as Configuration
from kvrep.model.configuration import Voter as Voter
from kvrep.model.event import Event as CloudEvent
from kvrep.model.position import Position as Position
from kvrep.model.sessions import RequestId as RequestId
from kvrep.options import Options as Options
from kvrep.snapshot import Snapshot as Snapshot
from kvrep.status import Event as Event
from kvrep.status import EventKind as EventKind
from kvrep.status import FollowerStatus as FollowerStatus
from kvrep.status import Outcome as Outcome
from kvrep.status import Role as Role
from kvrep.status import SourceStatus as SourceStatus
from kvrep.status import Status as Status
from kvrep.store import Store as Store
from kvrep.store import open as open
from kvrep.transaction import Transaction as Transaction

if TYPE_CHECKING:
    from kvrep import aio
    from kvrep.sinks.agent import Agent as Agent
    from kvrep.transport.security import TLS as TLS

__all__ = [
    "TLS",
    "AckTimeout",
    "Agent",
    "AuthenticationFailed",
    "Batch",
    "Change",
    "Changes",
    "ClosedError",
    "CloudEvent",
    "Codec",
    "Configuration",
    "ConfigurationMismatch",
    "CorruptionError",
    "DigestMismatch",
    "Error",
    "Etcd",
    "Event",
    "EventKind",
    "Feed",
    "FeedInfo",
    "Fenced",
    "FollowerStatus",
    "ForkedError",
    "InvalidInput",
    "InvalidKey",
    "InvalidKeyspace",
    "InvalidToken",
    "KeyTooLong",
    "Keyspace",
    "LineageMismatch",
    "LogCorrupt",
    "LogFailed",
    "LogTrimmed",
    "NoSuchFeed",
    "NotAStore",
    "NotEnoughFollowers",
    "NotPrimary",
    "OpenError",
    "Options",
    "Outcome",
    "Overloaded",
    "PeerUnavailable",
    "PermissionDenied",
    "Position",
    "ProtocolError",
    "Quorum",
    "ReadError",
    "RefusedError",
    "RejectedChange",
    "ReplicationError",
    "RequestId",
    "Role",
    "RolledBack",
    "Snapshot",
    "SnapshotExpired",
    "SourceStatus",
    "StaleRead",
    "Status",
    "StorageFailed",
    "StorageFull",
    "Store",
    "StoreInUse",
    "TooOld",
    "Transaction",
    "TransactionConflict",
    "TransactionExpired",
    "Truncated",
    "UnknownOutcome",
    "UnsafePromotion",
    "UpgradeRequired",
    "ValueTooLarge",
    "Voter",
    "WriteFuture",
    "aio",
    "codecs",
    "errors",
    "open",
]

_LAZY = {"Agent": "kvrep.sinks.agent", "aio": "kvrep.aio", "TLS": "kvrep.transport.security"}


def __getattr__(name: str) -> Any:
    """asyncio and grpc are imported only when they are used."""
    if name in _LAZY:
        import importlib

        module = importlib.import_module(_LAZY[name])
        return module if name == "aio" else getattr(module, name)
    if name == "__version__":
        return _metadata.version("kvrep")
    raise AttributeError(f"module 'kvrep' has no attribute {name!r}")
