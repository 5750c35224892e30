"""The asyncio face of kvrep: the same names as :mod:`kvrep`, for coroutines.

>>> import asyncio, kvrep.aio, tempfile
>>> async def main(folder):
...     async with kvrep.aio.open(folder + "/orders") as db:
...         position = await db.put(b"k", b"v")
...         async with db.transaction() as txn:
...             txn.put(b"n", await txn.get(b"k") + b"!")
...         return [pair async for pair in db.scan()]
>>> with tempfile.TemporaryDirectory() as folder:
...     asyncio.run(main(folder))
[(b'k', b'v'), (b'n', b'v!')]

What may wait is awaited. What only collects (``put`` and ``delete`` of a transaction or batch) takes effect
at once and may be awaited or not; what only looks (``status``, ``resolve``, ``position``, ``in``) is a plain
call.

**The loop is not blocked.** Writes are ordered by the caller and written by the store's own thread, which
wakes each loop once per group. Point reads run on the loop: microseconds, except where LMDB must fetch a page
from the disk. Whatever takes longer runs on a few threads of the store that :meth:`Store.close` ends.

**Cancellation.** A cancelled task leaves the store whole, and ``CancelledError`` is never swallowed. If it
waited for a write, the outcome of that write is unknown: it may still be committed. If the write was in the log
already, the error has its ``position``, to be asked of :meth:`Store.resolve`; if it was forwarded, its ``request``, for
:meth:`Store.settle`. (``asyncio.timeout`` keeps that error as the ``__context__`` of its own.) Where the outcome must
be known whenever the cancellation comes, use :meth:`Keyspace.submit_put` and keep its future: cancelling a task that
awaits such a future leaves the future as it is. A cancelled transaction writes nothing, unless it was already
waiting for its commit.

A store may be used by several event loops in several threads; a transaction belongs to one task.
"""

from __future__ import annotations

from kvrep.aio.feeds import Changes as Changes
from kvrep.aio.feeds import Feed as Feed
from kvrep.aio.keyspace import Keyspace as Keyspace
from kvrep.aio.reading import Snapshot as Snapshot
from kvrep.aio.store import Store as Store
from kvrep.aio.store import open as open
from kvrep.aio.writing import Batch as Batch
from kvrep.aio.writing import Transaction as Transaction
from kvrep.aio.writing import WriteFuture as WriteFuture

__all__ = [
    "Batch",
    "Changes",
    "Feed",
    "Keyspace",
    "Snapshot",
    "Store",
    "Transaction",
    "WriteFuture",
    "open",
]
