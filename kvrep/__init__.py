"""kvrep: a durable, ordered, replicated key-value store that lives inside a Python application.

>>> import kvrep, tempfile
>>> with tempfile.TemporaryDirectory() as folder, kvrep.open(folder + "/orders") as db:
...     position = db.put(b"k", b"v")
...     db[b"k"]
b'v'

The layers, each of which imports only from those below it (a linter holds it)::

    cli | testing            the command; what users' own tests use
    aio                      the asyncio twin of store
    store                    Store, the one object a user holds (keyspace: its maps)
    runtime                  threads, clocks, deadlines; one node
    storage | transport      log files, memtables and LMDB | gRPC
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
from kvrep.codecs import Codec as Codec
from kvrep.errors import *  # noqa: F403 - its __all__ is a part of ours
from kvrep.errors import __all__ as _errors
from kvrep.keyspace import Batch as Batch
from kvrep.keyspace import Keyspace as Keyspace
from kvrep.keyspace import Snapshot as Snapshot
from kvrep.keyspace import Transaction as Transaction
from kvrep.keyspace import WriteFuture as WriteFuture
from kvrep.model.configuration import Configuration as Configuration
from kvrep.model.configuration import Voter as Voter
from kvrep.model.position import Position as Position
from kvrep.options import Options as Options
from kvrep.status import FollowerStatus as FollowerStatus
from kvrep.status import Outcome as Outcome
from kvrep.status import Role as Role
from kvrep.status import SourceStatus as SourceStatus
from kvrep.status import Status as Status
from kvrep.store import Store as Store
from kvrep.store import open as open

if TYPE_CHECKING:
    from kvrep import aio as aio
    from kvrep.transport.security import TLS as TLS

__all__ = sorted(
    [
        *_errors,
        "TLS",
        "Batch",
        "Codec",
        "Configuration",
        "FollowerStatus",
        "Keyspace",
        "Options",
        "Outcome",
        "Position",
        "Role",
        "Snapshot",
        "SourceStatus",
        "Status",
        "Store",
        "Transaction",
        "Voter",
        "WriteFuture",
        "aio",
        "codecs",
        "errors",
        "open",
    ]
)

_LAZY = {"aio": "kvrep.aio", "TLS": "kvrep.transport.security"}


def __getattr__(name: str) -> Any:
    """asyncio and grpc are imported only when they are used."""
    if name in _LAZY:
        import importlib

        module = importlib.import_module(_LAZY[name])
        return module if name == "aio" else getattr(module, name)
    if name == "__version__":
        return _metadata.version("kvrep")
    raise AttributeError(f"module 'kvrep' has no attribute {name!r}")
