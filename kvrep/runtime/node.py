"""One node: its parts, its start and end, the role it plays, and how it begins an epoch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrep.errors import ClosedError, ConfigurationMismatch, NotPrimary, OpenError, Overloaded, StorageFailed
from kvrep.model.configuration import Configuration
from kvrep.model.position import epoch_after
from kvrep.options import Options
from kvrep.runtime.compression import need_zstd
from kvrep.runtime.coordinated import CoordinatedNode
from kvrep.runtime.events import Events
from kvrep.runtime.executing import Forwarded
from kvrep.runtime.finding import PrimaryLink
from kvrep.runtime.forwarding import Forwarder
from kvrep.runtime.freshness import Freshness
from kvrep.runtime.horizon import HeldByFeeds
from kvrep.runtime.roles import Roles
from kvrep.runtime.signal import Moves
from kvrep.runtime.voting import ManualCoordinator
from kvrep.runtime.writing import Writing
from kvrep.status import Event, EventKind, Role
from kvrep.storage.engine import Engine
from kvrep.storage.write import Write

if TYPE_CHECKING:
    from kvrep.runtime.bootstrapping import Verification
    from kvrep.runtime.coordinator import Coordinator
    from kvrep.runtime.leadership import Leadership
    from kvrep.runtime.replaying import Replaying
    from kvrep.runtime.shipping import Shipping
    from kvrep.transport.interface import Server, Transport

__all__ = ["Node"]

log = logging.getLogger("kvrep")

SEEDS = ("acks", "ack_timeout_s", "degrade_after_s", "lag_records_max")
"""Options that make the configuration of a new group. In one that is there, they must be what it says."""
LOOK_UP_S = 0.05
"""How often those who wait for a lock look whether there is still something to wait for."""
CLOSE_GRACE_S = 0.5
"""What a close may take at least."""
CLOSE_MOMENT_S = 0.05
"""What each part of a node gets to end, even when the deadline of the close has passed."""


def _by_hand_only(choice: Any) -> Coordinator:
    raise OpenError(f"{choice!r} cannot be a coordinator here")


def _nothing() -> None:
    """What ``writable`` becomes when nothing can refuse a write at the door."""


class Node:
    """Made by :meth:`open`. One role at a time: primary (``shipping``) or follower (``replaying``)."""

    def __init__(self, engine: Engine, options: Options, transport: Transport | None) -> None:
        self.engine = engine
        self.options = options
        self.transport = transport
        self.address = ""
        """Where others reach this node; empty when it does not listen."""
        self.shipping: Shipping | None = None
        self.replaying: Replaying | None = None
        self.ack_timeout_s = engine.configuration.ack_timeout_s
        self.unchecked = False
        """Whether options that a group's configuration must agree with wait for a group to be compared with."""
        self._server: Server | None = None
        self._verification: Verification | None = None
        self.roles = Roles(self)
        self.coordinator: Coordinator = ManualCoordinator(options.heartbeat_timeout_s)
        """Who decides when this node tries to be primary. It runs while the node is part of a group."""
        self.events = Events(engine.home.name or engine.home.path.name)
        engine.committer.on_committed = self._on_committed
        engine.on_rollback = self._on_rollback
        engine.feeds_from = HeldByFeeds(self)
        self.calls: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {}
        """What layers above answer to clients in other processes, by the name of the call."""
        self.link = PrimaryLink(self)
        self.moves = Moves()
        self.forwarded = Forwarded(self)
        self.forwarder = Forwarder(self) if options.forward_writes else None
        """Takes writes to the primary while this node is none; ``None`` without ``forward_writes``."""
        self.writes = Writing(self, self.forwarder)
        self.freshness = Freshness(self)
        self._pid = os.getpid()
        # Serializes the begin of an epoch and changes of the configuration on a node alone, and close.
        self.lock = threading.RLock()
        self._closed = False

    # -- opening and closing -----------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        options: Options,
        transport: Transport | None = None,
        make_coordinator: Callable[[Any], Coordinator] = _by_hand_only,
    ) -> Node:
        """Open the store at ``path`` and start its role; ``make_coordinator`` turns the option into one."""
        if options.compression is not None:
            need_zstd()
        follower = bool(options.sources)
        told = follower or options.coordinator is not None  # the lineage is made or adopted later
        engine = Engine.open(Path(path), options, lineage=b"" if told else os.urandom(16))
        node = cls(engine, options, transport)
        try:
            node._check_options()
            if options.coordinator is not None:
                node.coordinator = make_coordinator(options.coordinator)
            if options.listen is not None or follower:
                node.transport = transport or _grpc(options)
            node._start(follower)
        except BaseException:
            node.close(5.0)
            raise
        return node

    def _check_options(self) -> None:
        """A setting that contradicts the log's configuration stops the start."""
        options = self.options
        if self.engine.tail.offset == 0:
            told = bool(options.sources) or options.coordinator is not None
            self.unchecked = told and any(getattr(options, name) is not None for name in SEEDS)
            if options.degrade_after_s and options.acks is None and not told:
                raise ConfigurationMismatch(
                    "degrade_after_s lowers an ack rule that waits for followers, and a new store has acks=0",
                    option="degrade_after_s",
                    given=options.degrade_after_s,
                    hint='say acks="majority", too',
                )
            if options.lag_records_max and options.acks is None and options.coordinator is not None:
                raise ConfigurationMismatch(
                    'lag_records_max bounds what acks=0 may lose, and a new group has acks="majority"',
                    option="lag_records_max",
                    given=options.lag_records_max,
                    hint="say acks=0, too, or leave it out: nothing acknowledged is lost",
                )
            return
        self.check_configuration()

    def check_configuration(self) -> None:
        """:class:`ConfigurationMismatch` where an option is not what the configuration in our log says."""
        configuration = self.engine.configuration
        self.check_seeds({name: getattr(configuration, name) for name in SEEDS})

    def check_seeds(self, stored: Mapping[str, Any]) -> None:
        """The same, of what its group says that it goes by."""
        for name in SEEDS:
            given, kept = getattr(self.options, name), stored.get(name)
            if given is None or kept is None:  # an older node does not tell of every one
                continue
            # Times are kept in whole milliseconds.
            if given != kept and not (isinstance(given, float) and round(given * 1000) == round(kept * 1000)):
                raise ConfigurationMismatch(
                    f"the log's configuration says {name}={kept!r}, open() was given {given!r}",
                    option=name,
                    given=given,
                    stored=kept,
                    hint=f"leave {name} out, and change it with reconfigure() on the primary",
                )
        self.unchecked = False

    def _start(self, follower: bool) -> None:
        coordinated = self.coordinator.automatic
        if not follower and not coordinated:
            self.engine.home.drop_unfinished()
        if follower or coordinated:
            self.roles.be_follower(self.options.sources)
        elif self.options.listen is not None or len(self.engine.configuration.voters) > 1:
            from kvrep.runtime.shipping import Shipping

            self.shipping = Shipping(self)
        else:
            self._start_alone()
        if self.options.listen is not None:
            self._listen()
        if self.shipping is not None:
            self.roles.start_primary(self.shipping)
        elif self.replaying is not None:
            self.replaying.start()
        if self.transport is not None:
            self.coordinator.start(CoordinatedNode(self))
        if self.engine.unverified:
            self.verify_copy()

    def verify_copy(self) -> None:
        """Have the copy, received or suspect, compared with its digests in the background."""
        from kvrep.runtime.bootstrapping import Verification

        before = self._verification
        if before is not None:
            before.stop(5.0)
        self._verification = Verification(self.engine, self.label)

    def _start_alone(self) -> None:
        """No follower has ever been: the epoch begins with the first write, and all that is logged holds."""
        engine = self.engine
        engine.committer.advance()
        engine.writable = self._begin_alone

    def _begin_alone(self) -> None:
        deadline, committer = self.deadline(None), self.engine.committer
        while not self.lock.acquire(timeout=LOOK_UP_S):  # another first write is at it
            if committer.closed is not None:
                return  # who puts the write in order says so
            if time.monotonic() >= deadline:
                raise Overloaded("the first write of this store is not on the disk yet")
        try:
            if committer.epoch or self._closed:
                self.engine.writable = _nothing
                return
            try:
                write = self.begin_epoch(self.next_epoch(), fenced=(self.engine.home.store_id,))
            except OSError as error:
                raise StorageFailed(f"the promise of an epoch could not be stored: {error}") from error
            self.writes.finish(write, None)  # it may find no room: then the next write begins the epoch
            self.engine.writable = _nothing
        finally:
            self.lock.release()

    def next_epoch(self, seen: int = 0) -> int:
        """An epoch of ours above all that this node knows of, and above ``seen``."""
        engine = self.engine
        voter = engine.configuration.voter(engine.home.store_id)
        known = max(engine.home.promised_epoch, engine.epochs.last_epoch, seen)
        return epoch_after(known, voter.member if voter is not None else 1)

    def begin_epoch(
        self,
        epoch: int,
        *,
        fenced: tuple[bytes, ...],
        unfenced: bool = False,
        forced: Configuration | None = None,
        founding: Configuration | None = None,
        prepare: Callable[[], None] = _nothing,
    ) -> Write:
        """Promise ``epoch`` to ourselves, durably, and order its first record; see ``Engine.start_epoch``.

        ``forced`` replaces the configuration and begins a new branch: the two histories never join silently.
        """
        engine = self.engine
        configuration = forced or founding or engine.configuration
        if not configuration.voters:
            configuration = self.first_configuration()
        if self.address:
            configuration = configuration.changed(engine.home.store_id, address=self.address)
        payload = {
            "lineage": engine.home.lineage,
            "branch": os.urandom(16) if forced is not None else engine.branch or engine.home.lineage,
            "configuration": configuration.to_wire(),
            "promoter": engine.home.store_id,
            "name": engine.home.name,
            "address": self.address,
            "fenced": list(fenced),
            "unfenced": unfenced,
            "forced": forced is not None,
        }
        write = engine.start_epoch(epoch, payload, prepare)
        self.ack_timeout_s = configuration.ack_timeout_s
        self.unchecked = False  # this node has given its group the configuration
        return write

    def first_configuration(self) -> Configuration:
        """That of a new store: its own options, itself the only voter."""
        home, options = self.engine.home, self.options
        seed = Configuration(
            acks=options.acks if options.acks is not None else 0,
            ack_timeout_s=options.ack_timeout_s if options.ack_timeout_s is not None else 5.0,
            degrade_after_s=options.degrade_after_s or 0.0,
            lag_records_max=options.lag_records_max or 0,
        )
        return seed.with_voter(home.store_id, home.name, self.address)

    def _listen(self) -> None:
        from kvrep.runtime.service import NodeService

        assert self.transport is not None
        assert self.options.listen is not None
        server = self.transport.serve(
            NodeService(self),
            self.options.listen,
            name=self.label,
            max_streams=self.options.followers_max,
        )
        bound = server.start()
        self._server = server
        self.address = self.options.advertise or _reachable(bound)

    @property
    def witness(self) -> bool:
        """Whether this node votes without data."""
        return self.coordinator.witness

    @property
    def closing(self) -> bool:
        return self._closed

    @property
    def primary_epoch(self) -> int:
        """The epoch in which this node is primary; 0 when it is not."""
        leadership = self._leadership
        return leadership.epoch if leadership is not None and leadership.leading else 0

    @property
    def fenced(self) -> bool:
        """Whether it is primary by a full fence, or by force."""
        leadership = self._leadership
        return leadership is not None and leadership.leading and (leadership.fenced or leadership.forced)

    @property
    def _leadership(self) -> Leadership | None:
        shipping = self.shipping
        return shipping.leadership if shipping is not None else None

    @property
    def label(self) -> str:
        """For thread names and messages."""
        return self.engine.home.name or self.engine.home.path.name

    @property
    def role(self) -> Role:
        if self._closed:
            return Role.CLOSED
        return Role.FOLLOWER if self.replaying is not None else Role.PRIMARY

    def close(self, timeout_s: float | None = None) -> None:
        """End everything within ``timeout_s`` (default ``close_timeout_s``). Idempotent, any thread.

        What the disk holds up beyond that, and half a second at least, a thread of its own brings to its end;
        till then the store stays locked.
        """
        seconds = self.options.close_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + max(CLOSE_GRACE_S, seconds)
        if os.getpid() != self._pid:
            return  # a forked child: nothing here is ours, and nobody may ever let go of the locks
        if self.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            try:
                self._close(deadline)
            finally:
                self.lock.release()
        elif not self._closed:  # else another thread is at it
            self.engine.committer.refuse(ClosedError("the store is closed"))
            threading.Thread(target=self._close_late, name=f"kvrep-close-{self.label}", daemon=True).start()

    def _close_late(self) -> None:
        with self.lock:
            self._close(time.monotonic() + self.options.close_timeout_s)

    def _close(self, deadline: float) -> None:
        """The role lock is held. All parts share ``deadline``; beyond it each still gets a moment."""
        if self._closed:
            return

        def left() -> float:
            return max(CLOSE_MOMENT_S, deadline - time.monotonic())

        self._closed = True
        self.coordinator.stop(left())
        self.engine.committer.refuse(ClosedError("the store is closed"))
        self.moves.end()
        self.link.stop()
        if self.forwarder is not None:
            self.forwarder.stop(left())
        self.roles.stop(left())  # no role changes after this
        for part in (self.shipping, self.replaying, self._server, self._verification):
            if part is not None:
                part.stop(left())
        self.engine.close(left())
        self.events.stop(left())

    # -- what others ask ---------------------------------------------------------------------------

    def deadline(self, timeout_s: float | None) -> float:
        """The end of a wait for an ack; default ``ack_timeout_s``."""
        return time.monotonic() + (self.ack_timeout_s if timeout_s is None else timeout_s)

    def forwards_now(self) -> bool:
        """Whether writes go to another node: ``forward_writes`` is set, and this node is not primary."""
        return self.forwarder is not None and self.replaying is not None

    @property
    def primary_address(self) -> str:
        """Where the primary is, as far as this node knows."""
        replaying, leadership = self.replaying, self._leadership
        if replaying is not None:
            return replaying.primary_address or ""
        return leadership.primary_address if leadership is not None else self.address

    def refuse_follower(self) -> None:
        """The engine's ``writable`` of a follower."""
        replaying = self.replaying
        address = replaying.primary_address if replaying is not None else None
        epoch = self.engine.epochs.last_epoch
        where = f"; the primary is at {address}" if address else ""
        raise NotPrimary(f"this node is a follower{where}", primary_address=address, epoch=epoch)

    def guarded(self, callback: Callable[[Any], None], argument: Any) -> None:
        """Call a user's callback; what it raises is logged and dropped."""
        try:
            callback(argument)
        except Exception:
            log.exception("%s: a callback raised", self.label)

    # -- what happens ------------------------------------------------------------------------------

    def _on_committed(self, committed: int) -> None:
        moves = self.moves
        if moves.waiting:
            moves.stir()
        moves.on_move()
        if self.shipping is not None:
            self.shipping.on_committed(committed)
        if self.forwarder is not None:
            self.forwarder.on_committed()

    def on_acked(self) -> None:
        """A follower confirmed more: with ``acks=0`` that moves the horizon."""
        if self.moves.waiting:
            self.moves.stir()

    def tell(self, kind: EventKind, **fields: Any) -> None:
        """Tell the application's listeners, on their own thread."""
        self.events.tell(Event(kind=kind, node=self.label, time_s=time.time(), **fields))

    def _on_rollback(self, first: int, last: int, path: Path, reason: str) -> None:
        self.tell(EventKind.ROLLED_BACK, first=first, last=last, path=str(path), reason=reason)


def _grpc(options: Options) -> Transport:
    from kvrep.transport.network import GrpcTransport
    from kvrep.transport.security import Security

    security = Security(tls=options.tls, token=options.token)
    return GrpcTransport(
        security=security,
        # A call may carry a whole record: a forwarded transaction, or what a promoted node lacks.
        message_bytes_max=max(8 << 20, options.record_bytes_max + (1 << 20)),
    )


def _reachable(bound: str) -> str:
    """A bound address as others can use it: a wildcard becomes this host's name."""
    host, _, port = bound.rpartition(":")
    if host in ("0.0.0.0", "[::]"):
        import socket

        return f"{socket.gethostname()}:{port}"
    return bound
