"""Store: the one object a user holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar, Unpack, overload

from kvrep.codecs import BYTES, Codec
from kvrep.coordination import make_coordinator
from kvrep.feeds.changes import Changes, Held
from kvrep.feeds.named import Feed, FeedInfo, Feeds
from kvrep.feeds.selection import Selection, Transform
from kvrep.feeds.serving import calls_of
from kvrep.keyspace import Consistency, Keyspace
from kvrep.model.configuration import Acks, Configuration
from kvrep.model.position import Position
from kvrep.model.record import DEFAULT_KEYSPACE
from kvrep.model.sessions import RequestId
from kvrep.model.token import Token
from kvrep.options import OpenOptions, Options
from kvrep.runtime.checks import check_name
from kvrep.runtime.configuring import add_voter, add_witness, reconfigure
from kvrep.runtime.node import Node
from kvrep.runtime.promoting import Force
from kvrep.runtime.replaying import check_address
from kvrep.runtime.reporting import status_of
from kvrep.snapshot import Snapshot
from kvrep.status import Event, EventKind, Outcome, Status

__all__ = ["Store", "open"]

V = TypeVar("V")


def open(path: str | os.PathLike[str], **options: Unpack[OpenOptions]) -> Store:
    """Open the store at ``path`` (created if missing) and return it.

    The options are the fields of :class:`kvrep.Options`. Raises an :class:`OpenError` with a hint;
    :class:`StoreInUse` when another process has it, :class:`ConfigurationMismatch` for an option that is
    not understood or contradicts the store, :class:`LogCorrupt` when proven data is damaged.
    """
    return Store(Node.open(path, Options.of(options), make_coordinator=make_coordinator))


class Store(Keyspace[bytes]):
    """An open store; itself the default keyspace. Use it in a ``with`` block, or call :meth:`close`.

    One object for life: role changes and network failures never invalidate it. All methods may be called
    on any thread, not in a forked child (:class:`ForkedError`).
    """

    def __init__(self, node: Node) -> None:
        super().__init__(node, DEFAULT_KEYSPACE, BYTES)
        self._spaces: dict[tuple[str, str, bool], Keyspace[Any]] = {}
        self._feeds = Feeds(node)
        node.calls.update(calls_of(node, self._feeds))

    def __repr__(self) -> str:
        home = self._node.engine.home
        return f"<kvrep.Store {str(home.path)!r} {self._node.role.value}>"

    # -- more maps ---------------------------------------------------------------------------------

    @overload
    def keyspace(self, name: str, *, keep_before: bool = False) -> Keyspace[bytes]: ...
    @overload
    def keyspace(self, name: str, *, codec: Codec[V], keep_before: bool = False) -> Keyspace[V]: ...
    def keyspace(self, name: str, *, codec: Codec[Any] = BYTES, keep_before: bool = False) -> Keyspace[Any]:
        """The keyspace ``name`` (1 to 64 of ``a-z 0-9 _ -``); it exists once something is put into it.

        ``codec`` (see :mod:`kvrep.codecs`) turns values into bytes and back. With ``keep_before``, every write
        through the returned object logs what the key held before, for feeds; each is a transaction then, so
        they follow each other. Raises ``InvalidKeyspace``.
        """
        check_name(name)
        if not isinstance(codec, Codec):
            raise TypeError(
                f"codec={codec!r} is no codec: give one of kvrep.codecs (TEXT, JSON, MSGPACK), or a kvrep.Codec"
            )
        self._node.engine.need_alive()
        key = (name, codec.name, keep_before)
        space = self._spaces.get(key)
        if space is None or space._codec is not codec:
            space = self._spaces[key] = Keyspace(self._node, name, codec, keep_before=keep_before)
        return space

    def keyspaces(self) -> list[str]:
        """The names of the keyspaces that hold or held data, sorted."""
        self._node.engine.need_unforked()
        return sorted({DEFAULT_KEYSPACE, *self._node.engine.view.keyspaces})

    def snapshot(self, *, consistency: Consistency = "local", timeout_s: float | None = None) -> Snapshot:
        """The whole store at one position; close it, or use it in a ``with`` block.

        It keeps old pages of LMDB alive; past ``snapshot_age_max_s`` it raises :class:`SnapshotExpired`.
        ``consistency`` is that of :meth:`get`.
        """
        if consistency != "local":
            self._node.freshness.need(None, None, timeout_s, consistency)
        return Snapshot(self._node, BYTES, DEFAULT_KEYSPACE, self._node.engine.snapshot())

    # -- positions ---------------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """What reads show now."""
        self._node.engine.need_unforked()
        return self._node.engine.committed_position

    def wait_for(self, position: Position, timeout_s: float = 5.0) -> None:
        """Return once reads here show ``position``: read your writes, on any node.

        :class:`StaleRead` after ``timeout_s``; :class:`RolledBack` when the position is not part of this
        history any more.
        """
        self._node.engine.need_unforked()
        self._node.freshness.wait_for(position, timeout_s)

    def resolve(self, position: Position | RequestId) -> Outcome:
        """What became of a write whose outcome was unknown: committed, pending or rolled back.

        Says what this node knows, at once. Of a :class:`RequestId` that is committed or pending.
        """
        self._node.engine.need_unforked()
        return self._node.writes.resolve(position)

    def settle(self, request: RequestId, *, timeout_s: float = 5.0) -> Outcome:
        """What became of a forwarded write (``AckTimeout.request``), asked of the primary.

        The primary sees to it that a write that it answers as rolled back never takes effect. ``PENDING``
        when no such answer can be had in ``timeout_s``; :class:`TooOld` when nobody can tell any more.
        """
        self._node.engine.need_alive()
        return self._node.writes.settle(request, timeout_s)

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
        """What is written, in order, as far as no failover can take it back; waits for more until closed.

        It begins behind ``after`` (``None``: with the very first record), behind the change whose ``resume``
        token is given (taken on any node of the store), or with ``snapshot`` at the present state: a mark
        ``begin``, every row as a put, a mark ``end``, and then what follows, with no gap and no repeat. With
        ``have``, the (keyspace, key, value) that the receiver holds, in order, the snapshot is only what is
        different. It ends when all through ``stop`` was delivered, or at ``close()``.

        ``keyspace`` (one or several), ``prefix`` of keys and ``topic`` of emitted messages select;
        ``transform(change)`` may give back a change with other contents, or ``None`` to leave it out. Where a
        keyspace is named, messages are left out unless a topic is named, too. ``committed`` asks for everything
        that reads show: with ``acks=0`` a failover may take some of it back. ``before`` asks for the former values,
        in keyspaces opened with ``keep_before=True``.

        Raises, here or while it is read: :class:`LogTrimmed` when the log does not reach back so far,
        :class:`Truncated` when the place is not part of the history any more, :class:`InvalidToken`,
        :class:`LineageMismatch`, :class:`ClosedError` when the store is closed. ``ValueError`` for arguments that
        contradict each other.
        """
        self._node.engine.need_alive()
        begins = (after is not None) + (resume is not None) + snapshot
        if begins > 1:
            raise ValueError("give one of after, resume and snapshot")
        if have is not None and not snapshot and resume is None:
            raise ValueError("have belongs to a snapshot")
        selection = Selection.of(keyspace, prefix, topic, transform, before)
        return Changes(
            self._node,
            selection,
            token=None if resume is None else Token.parse(resume),
            after=_position(after),
            snapshot=snapshot,
            stop=_position(stop),
            committed=committed,
            have=have,
        )

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
        """The feed ``name``, whose place is kept in the store: it goes on behind its last ack, on any primary.

        The first call makes it, on the primary, with the arguments of :meth:`changes`; later ones take its
        place and selection from the store (:class:`ConfigurationMismatch` if another selection is given; what
        ``transform``, ``committed`` and ``before`` say is not stored). Until it is dropped, the log is kept for
        it, up to ``retention_bytes_max``.
        """
        self._node.engine.need_alive()
        if after is not None and snapshot:
            raise ValueError("give one of after and snapshot")
        selection = Selection.of(keyspace, prefix, topic, transform, before)
        return Feed(
            self._feeds, name, selection, after=_position(after), snapshot=snapshot, committed=committed
        )

    def feeds(self) -> list[FeedInfo]:
        """All named feeds, by name: where each stands and how far it is behind."""
        self._node.engine.need_alive()
        return self._feeds.infos()

    # -- the life of the store ---------------------------------------------------------------------

    def flush(self, timeout_s: float = 60.0) -> None:
        """Return once LMDB holds everything that is committed now. ``TimeoutError`` after ``timeout_s``."""
        self._node.engine.need_alive()
        if not self._node.engine.flush(timeout_s):
            raise TimeoutError(f"the flush was not done within {timeout_s:g} s")

    def close(self, timeout_s: float | None = None) -> None:
        """Flush, end all threads, give the directory back. Idempotent, keeps to its deadline (half a second at
        least).

        Nothing acknowledged is lost, whether or not the deadline suffices for the flush. What a disk that does
        not answer holds up beyond it ends in the background; until then the directory stays locked.
        """
        self._node.close(timeout_s)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._node.engine.closed

    # -- the cluster -------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """``"host:port"`` where this node can be reached; empty when it does not listen."""
        return self._node.address

    def status(self) -> Status:
        """Where this node and its followers stand, as one frozen value."""
        self._node.engine.need_unforked()
        return status_of(self._node)

    def promote(
        self,
        *,
        force: bool = False,
        voters: Sequence[str] = (),
        acks: Acks | None = None,
        timeout_s: float = 10.0,
    ) -> Position:
        """Make this node the primary of its group; safe by itself.

        It asks the other voters, collects the promises of so many that they meet every set that can have
        acknowledged a write, takes over what it lacks, and begins a new epoch. Raises
        :class:`UnsafePromotion` that names who did not answer and what could be lost; nothing changes then.
        Returns the position at which reads stand. On a node that is primary already, nothing happens, unless it
        is forced and refuses writes for want of copies.

        ``force`` goes on without the missing promises: what only they acknowledged is lost (they save it to
        rescue files when they come back). It begins a new branch of the history with a new configuration:
        ``voters`` (names; this node alone if empty) and ``acks``.
        """
        if not force and (voters or acks is not None):
            raise ValueError("voters and acks are for force=True; else use reconfigure()")
        self._node.engine.need_alive()
        self._node.roles.promote(timeout_s, Force(voters=tuple(voters), acks=acks) if force else None)
        return self.position

    def follow(self, address: str) -> None:
        """Get records from the node at ``address`` from now on; a primary stops being one.

        Records that the other history does not contain are saved to a rescue file and dropped; writers that
        still wait get the true outcome of their writes.
        """
        self._node.engine.need_alive()
        self._node.roles.follow(address)

    def switchover(self, to: str, *, timeout_s: float = 10.0, dry_run: bool = False) -> tuple[str, ...]:
        """Hand over to the voter named ``to``, on the primary; no write is lost, writers wait meanwhile.

        With ``dry_run`` only says what would block it. Afterwards this node follows the new primary.
        """
        self._node.engine.need_alive()
        return self._node.roles.switchover(to, timeout_s, dry_run=dry_run)

    def on_event(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener(event)`` when roles change, records are dropped, followers come and go.

        See :class:`EventKind`. It runs on a thread of the store, one event at a time; a slow listener stalls
        nothing but later events (of more than 1000 waiting ones the oldest are dropped). Returns a function
        that ends it.
        """
        self._node.engine.need_unforked()
        return self._node.events.listen(listener)

    def on_rollback(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Like :meth:`on_event`, for records that had to be dropped: ``event.path`` is their rescue file."""
        return self.on_event(lambda event: listener(event) if event.kind is EventKind.ROLLED_BACK else None)

    def reconfigure(
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
        """Change the configuration, on the primary: a record that holds once committed under both rules.

        ``acks``, ``ack_timeout_s``, ``degrade_after_s`` and ``lag_records_max`` are the commit rule; say the last
        two, too, where another ``acks`` does not allow them. ``priorities`` and ``addresses`` are those of
        voters, by name; a voter that joins from another address is noted without being asked. One change at a
        time, never before this epoch's first record is committed: until then it waits.

        Returns its position. ``ValueError`` for a rule that does not exist, or a name that is no voter's;
        refusals as of ``put``.
        """
        self._node.engine.need_alive()
        for address in (addresses or {}).values():
            check_address(address)
        rule = {
            "acks": acks,
            "ack_timeout_s": ack_timeout_s,
            "degrade_after_s": degrade_after_s,
            "lag_records_max": lag_records_max,
        }
        given: dict[str, Any] = {name: value for name, value in rule.items() if value is not None}

        def change(now: Configuration) -> Configuration:
            new = replace(now, **given)  # at once: one alone may make no sense
            for name, priority in (priorities or {}).items():
                new = new.changed(new.need(name).store_id, priority=int(priority))
            for name, address in (addresses or {}).items():
                new = new.changed(new.need(name).store_id, address=address)
            return new

        change(self._node.engine.configuration)  # raises for what no configuration can say
        return reconfigure(self._node, change, timeout_s)

    def add_voter(
        self, name: str, *, witness: bool = False, address: str | None = None, timeout_s: float = 10.0
    ) -> Position:
        """Make a named follower a voter again, on the primary, after :meth:`remove_voter`.

        Others become voters by themselves. ``ValueError`` when no such follower is known, or it declines.

        A witness follows nobody, so it is added with ``witness=True`` and the ``address`` at which it listens;
        it was opened with ``coordinator=kvrep.Quorum(…, witness=True)``.
        """
        self._node.engine.need_alive()
        if witness != (address is not None):
            raise ValueError("a witness has an address, and only a witness is given one")
        if address is not None:
            check_address(address)
            return add_witness(self._node, name, address, timeout_s)
        return add_voter(self._node, name, timeout_s)

    def remove_voter(self, name: str, *, timeout_s: float = 10.0) -> Position:
        """Take a store off the list of voters, on the primary. ``ValueError`` when it is not on it.

        It stays a follower, and does not become a voter again before :meth:`add_voter` says so.
        """
        self._node.engine.need_alive()

        def change(now: Configuration) -> Configuration:
            voter = now.named(name)
            if voter is None or voter.store_id == self._node.engine.home.store_id:
                raise ValueError(f"{name!r} is not a voter that could be removed")
            return now.without_voter(voter.store_id)

        return reconfigure(self._node, change, timeout_s)


def _position(given: Any) -> Position | None:
    """``TypeError`` for what is no position."""
    if given is None or isinstance(given, Position):
        return given
    try:
        epoch, offset = given
        return Position(int(epoch), int(offset))
    except (TypeError, ValueError):
        raise TypeError(f"expected a Position, not {type(given).__name__}") from None
