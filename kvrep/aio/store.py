"""Store: the one object a user of the asyncio face holds; the twin of :mod:`kvrep.store`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar, Unpack, overload

from kvrep import store as sync
from kvrep.aio.core import Core, Threads
from kvrep.aio.feeds import Changes, Feed
from kvrep.aio.keyspace import Keyspace
from kvrep.aio.reading import Snapshot
from kvrep.codecs import BYTES, Codec
from kvrep.coordination import make_coordinator
from kvrep.feeds.changes import Held
from kvrep.feeds.named import FeedInfo
from kvrep.feeds.selection import Transform
from kvrep.keyspace import Consistency
from kvrep.model.configuration import Acks
from kvrep.model.position import Position
from kvrep.model.sessions import RequestId
from kvrep.options import OpenOptions, Options
from kvrep.runtime.freshness import is_linearizable
from kvrep.runtime.node import Node
from kvrep.runtime.reporting import status_of
from kvrep.status import Event, EventKind, Outcome, Status

__all__ = ["Store", "open"]

V = TypeVar("V")


def open(path: str | os.PathLike[str], **options: Unpack[OpenOptions]) -> Opening:
    """``db = await kvrep.aio.open(path)``, or ``async with kvrep.aio.open(path) as db:``.

    Options and errors are those of :func:`kvrep.open`.

    A task that is cancelled while it opens a store leaves it to be closed again in the background; until then
    another open gets :class:`StoreInUse`.
    """
    return Opening(path, options)


class Opening:
    """A store about to be opened: await it, or use it in an ``async with`` block, which closes the store."""

    def __init__(self, path: str | os.PathLike[str], options: OpenOptions) -> None:
        self._path = path
        self._options = options
        self._store: Store | None = None

    def __await__(self) -> Generator[Any, None, Store]:
        return self._open().__await__()

    async def __aenter__(self) -> Store:
        self._store = await self._open()
        return self._store

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._store is not None
        await self._store.close()

    async def _open(self) -> Store:
        options = Options.of(self._options)
        threads = Threads(options.name or os.path.basename(os.path.abspath(self._path)))
        job = threads.calls.submit(Node.open, self._path, options, None, make_coordinator)
        try:
            node = await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if not job.cancel():
                threads.calls.submit(_close_again, job)
            threads.end(wait=False)
            raise
        except BaseException:
            threads.end()
            raise
        return Store(Core(node, threads))


def _close_again(job: Future[Node]) -> None:
    """Nobody waits for the store any more. On a thread."""
    if job.exception() is None:
        job.result().close()


class Store(Keyspace[bytes]):
    """An open store; itself the default keyspace. Close it with :meth:`close` or an ``async with`` block.

    One object for life: role changes and network failures never invalidate it. Its coroutines may run on any
    loop of any thread, not in a forked child (:class:`ForkedError`).
    """

    def __init__(self, core: Core) -> None:
        plain = sync.Store(core.node)
        super().__init__(core, plain)
        self._sync = plain

    def __repr__(self) -> str:
        return repr(self._sync).replace("kvrep.Store", "kvrep.aio.Store")

    # -- more maps ---------------------------------------------------------------------------------

    @overload
    def keyspace(self, name: str, *, keep_before: bool = False) -> Keyspace[bytes]: ...
    @overload
    def keyspace(self, name: str, *, codec: Codec[V], keep_before: bool = False) -> Keyspace[V]: ...
    def keyspace(self, name: str, *, codec: Codec[Any] = BYTES, keep_before: bool = False) -> Keyspace[Any]:
        """The keyspace ``name`` (1 to 64 of ``a-z 0-9 _ -``); it exists once something is put into it.

        ``codec`` (see :mod:`kvrep.codecs`) turns values into bytes and back. With ``keep_before``, every write
        through the returned object logs what the key held before, for feeds. Raises ``InvalidKeyspace``.
        """
        return Keyspace(self._core, self._sync.keyspace(name, codec=codec, keep_before=keep_before))

    def keyspaces(self) -> list[str]:
        """The names of the keyspaces that hold or held data, sorted."""
        return self._sync.keyspaces()

    def snapshot(self, *, consistency: Consistency = "local", timeout_s: float | None = None) -> Snapshot:
        """The whole store at one position: ``async with db.snapshot() as view:``, or await it and close it.

        It keeps old pages of LMDB alive; past ``snapshot_age_max_s`` it raises :class:`SnapshotExpired`.
        """
        linearizable = is_linearizable(consistency)
        return Snapshot(self._core, self._sync.snapshot, (timeout_s,) if linearizable else None)

    # -- positions ---------------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """What reads show now."""
        return self._sync.position

    async def wait_for(self, position: Position, timeout_s: float = 5.0) -> None:
        """Return once reads here show ``position``: read your writes, on any node.

        :class:`StaleRead` after ``timeout_s``; :class:`RolledBack` when the position is not part of this
        history any more.
        """
        await self._core.wait_for(position, timeout_s)

    def resolve(self, position: Position | RequestId) -> Outcome:
        """What became of a write whose outcome was unknown, as far as this node knows."""
        return self._sync.resolve(position)

    async def settle(self, request: RequestId, *, timeout_s: float = 5.0) -> Outcome:
        """What became of a forwarded write, asked of the primary; see :meth:`kvrep.Store.settle`."""
        return await self._core.call(lambda: self._sync.settle(request, timeout_s=timeout_s))

    # -- feeds -------------------------------------------------------------------------------------

    def changes(
        self,
        after: Position | None = None,
        *,
        keyspace: str | Iterable[str] | None = None,
        prefix: bytes = b"",
        topic: str | Iterable[str] | None = None,
        transform: Transform | None = None,
        snapshot: bool = False,
        have: Held | None = None,
        stop: Position | None = None,
        resume: str | None = None,
        committed: bool = False,
        before: bool = False,
    ) -> Changes:
        """What is written, in order: ``async for change in db.changes(…)``; see :meth:`kvrep.Store.changes`."""
        plain = self._sync.changes(
            after=after, keyspace=keyspace, prefix=prefix, topic=topic, transform=transform,
            snapshot=snapshot, have=have, stop=stop, resume=resume, committed=committed, before=before,
        )  # fmt: skip
        return Changes(self._core, plain)

    def feed(
        self,
        name: str,
        *,
        after: Position | None = None,
        keyspace: str | Iterable[str] | None = None,
        prefix: bytes = b"",
        topic: str | Iterable[str] | None = None,
        transform: Transform | None = None,
        snapshot: bool = False,
        committed: bool = False,
        before: bool = False,
    ) -> Feed:
        """``async with db.feed("billing") as feed:``, or ``feed = await db.feed("billing")``; see
        :meth:`kvrep.Store.feed`."""
        return Feed(
            self._core,
            lambda: self._sync.feed(
                name, after=after, keyspace=keyspace, prefix=prefix, topic=topic, transform=transform,
                snapshot=snapshot, committed=committed, before=before,
            ),
        )  # fmt: skip

    async def feeds(self) -> list[FeedInfo]:
        """All named feeds, by name: where each stands and how far it is behind."""
        return await self._core.read(self._sync.feeds)

    # -- the life of the store ---------------------------------------------------------------------

    async def flush(self, timeout_s: float = 60.0) -> None:
        """Return once LMDB holds everything that is committed now. ``TimeoutError`` after ``timeout_s``."""
        await self._core.call(self._sync.flush, timeout_s)

    async def close(self, timeout_s: float | None = None) -> None:
        """Flush, end all threads, give the directory back. Idempotent, keeps to its deadline.

        Nothing acknowledged is lost, whether or not the deadline suffices for the flush. Cancelling a task
        that waits for it does not stop it.
        """
        await self._core.close(timeout_s)

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        return self._sync.closed

    # -- the cluster -------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """``"host:port"`` where this node can be reached; empty when it does not listen."""
        return self._sync.address

    def status(self) -> Status:
        """Where this node and its followers stand, as one frozen value.

        It reads no files: of a follower that is far behind, bytes and time are those of the last second.
        """
        node = self._sync._node
        node.engine.need_unforked()
        return status_of(node, reading=False)

    def on_event(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener(event)`` when roles change, records are dropped, followers come and go.

        See :class:`EventKind`. It runs on a thread of the store, one event at a time; a slow listener stalls
        nothing but later events (of more than 1000 waiting ones the oldest are dropped). Returns a function
        that ends it.
        """
        return self._sync._node.events.listen(listener)

    def on_rollback(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Like :meth:`on_event`, for records that had to be dropped: ``event.path`` is their rescue file."""
        return self.on_event(lambda event: listener(event) if event.kind is EventKind.ROLLED_BACK else None)

    async def reconfigure(
        self,
        *,
        acks: Acks | None = None,
        ack_timeout_s: float | None = None,
        degrade_after_s: float | None = None,
        lag_records_max: int | None = None,
        priorities: Mapping[str, int] | None = None,
        addresses: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
    ) -> Position:
        """Change the configuration, on the primary; see :meth:`kvrep.Store.reconfigure`."""
        return await self._core.call(
            lambda: self._sync.reconfigure(
                acks=acks,
                ack_timeout_s=ack_timeout_s,
                degrade_after_s=degrade_after_s,
                lag_records_max=lag_records_max,
                priorities=priorities,
                addresses=addresses,
                timeout_s=timeout_s,
            )
        )

    async def add_voter(
        self, name: str, *, witness: bool = False, address: str | None = None, timeout_s: float = 10.0
    ) -> Position:
        """As :meth:`kvrep.Store.add_voter`."""
        return await self._core.call(
            lambda: self._sync.add_voter(name, witness=witness, address=address, timeout_s=timeout_s)
        )

    async def remove_voter(self, name: str, *, timeout_s: float = 10.0) -> Position:
        """Take a store off the list of voters, on the primary. ``ValueError`` when it is not on it."""
        return await self._core.call(lambda: self._sync.remove_voter(name, timeout_s=timeout_s))

    async def promote(
        self,
        *,
        force: bool = False,
        voters: Sequence[str] = (),
        acks: Acks | None = None,
        timeout_s: float = 10.0,
    ) -> Position:
        """Make this node the primary of its group; see :meth:`kvrep.Store.promote`."""
        return await self._core.call(
            lambda: self._sync.promote(force=force, voters=voters, acks=acks, timeout_s=timeout_s)
        )

    async def follow(self, address: str) -> None:
        """Get records from the node at ``address`` from now on; see :meth:`kvrep.Store.follow`."""
        await self._core.call(self._sync.follow, address)

    async def switchover(self, to: str, *, timeout_s: float = 10.0, dry_run: bool = False) -> tuple[str, ...]:
        """Hand over to the voter named ``to``; see :meth:`kvrep.Store.switchover`."""
        return await self._core.call(lambda: self._sync.switchover(to, timeout_s=timeout_s, dry_run=dry_run))
