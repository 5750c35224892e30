"""One node: the engine, the role it plays, and the calls of the public face."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvrep.errors import (
    AckTimeout,
    ClosedError,
    ConfigurationMismatch,
    Error,
    Fenced,
    NotPrimary,
    OpenError,
    Overloaded,
    ProtocolError,
    RolledBack,
    StaleRead,
    StorageFailed,
    ValueTooLarge,
    again,
)
from kvrep.model.configuration import Acks, Configuration, check_acks
from kvrep.model.position import Position, epoch_after
from kvrep.model.sessions import RequestId
from kvrep.options import Options
from kvrep.runtime.compression import need_zstd
from kvrep.runtime.events import Events
from kvrep.runtime.executing import Forwarded
from kvrep.runtime.finding import PrimaryLink
from kvrep.runtime.forwarding import Forward, Forwarder, is_elsewhere
from kvrep.runtime.horizon import HeldByFeeds
from kvrep.runtime.roles import Roles
from kvrep.runtime.shared import Shared
from kvrep.status import Event, EventKind, Outcome, Role, Status
from kvrep.storage.engine import Engine
from kvrep.storage.write import Write

if TYPE_CHECKING:
    from kvrep.runtime.bootstrapping import Verification
    from kvrep.runtime.coordinator import Coordinator
    from kvrep.runtime.replaying import Replaying
    from kvrep.runtime.shipping import Shipping
    from kvrep.transport.interface import Server, Transport

__all__ = ["Node"]

log = logging.getLogger("kvrep")

NO_TIMEOUT_S = 86_400.0
LOOK_UP_S = 0.05
"""How often those who wait for a lock look whether there is still something to wait for."""
CLOSE_GRACE_S = 0.5
"""What a close may take at least."""
CLOSE_MOMENT_S = 0.05
"""What each part of a node gets to end, even when the deadline of the close has passed."""
_position = tuple.__new__  # half the price of a named tuple's own constructor


def _no_coordinator(choice: Any) -> Coordinator:
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
        self._server: Server | None = None
        self._verification: Verification | None = None
        self.roles = Roles(self)
        self.make_coordinator: Callable[[Any], Coordinator] = _no_coordinator
        self.coordinator: Coordinator | None = None
        """Who decides when this node tries to be primary; ``None``: people do."""
        self.events = Events(engine.home.name or engine.home.path.name)
        engine.on_rollback = self._on_rollback
        engine.feeds_from = HeldByFeeds(self)
        self.calls: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {}
        """What layers above answer to clients in other processes, by the name of the call."""
        self.link = PrimaryLink(self)
        self.forwarded = Forwarded(self)
        self.forwarder = Forwarder(self) if options.forward_writes else None
        """Takes writes to the primary while this node is none; ``None`` without ``forward_writes``."""
        self._known_epoch, self._known_s = 0, 0.0
        """The newest epoch in which a primary was heard of, and since when."""
        self._reads = Shared(self._ask_read_position)
        self._pid = os.getpid()
        # Announces every commit to those who wait for a position; notified only while somebody waits.
        self._moved = threading.Condition()
        self._waiting = 0
        self.on_moved: Callable[[], None] = _nothing
        """For those who wait without a thread: called after every commit and at close, on any thread."""
        # Serializes role changes, reconfigurations and close.
        self._role_lock = threading.RLock()
        self._closed = False

    # -- opening and closing -----------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        options: Options,
        transport: Transport | None = None,
        make_coordinator: Callable[[Any], Coordinator] | None = None,
    ) -> Node:
        """Open the store at ``path`` and start its role; ``make_coordinator`` turns the option into one."""
        if options.compression is not None:
            need_zstd()
        follower = bool(options.sources)
        told = follower or options.coordinator is not None  # the lineage is made or adopted later
        engine = Engine.open(Path(path), options, lineage=b"" if told else os.urandom(16))
        node = cls(engine, options, transport)
        if make_coordinator is not None:
            node.make_coordinator = make_coordinator
        try:
            node._check_configuration()
            if options.listen is not None or follower:
                node.transport = transport or _grpc(options)
            node._start(follower)
        except BaseException:
            node.close(5.0)
            raise
        return node

    def _check_configuration(self) -> None:
        """A setting that contradicts the log's configuration stops the start."""
        stored, options = self.engine.configuration, self.options
        if self.engine.tail.offset == 0:
            told = bool(options.sources) or options.coordinator is not None
            if options.degrade_after_s and options.acks is None and not told:
                raise ConfigurationMismatch(
                    "degrade_after_s lowers an ack rule that waits for followers, and a new store has acks=0",
                    option="degrade_after_s",
                    given=options.degrade_after_s,
                    hint='say acks="majority", too',
                )
            return
        for name, given, kept in (
            ("acks", options.acks, stored.acks),
            ("ack_timeout_s", options.ack_timeout_s, stored.ack_timeout_s),
            ("degrade_after_s", options.degrade_after_s, stored.degrade_after_s),
        ):
            if given is not None and given != kept:
                raise ConfigurationMismatch(
                    f"the log's configuration says {name}={kept!r}, open() was given {given!r}",
                    option=name,
                    given=given,
                    stored=kept,
                    hint=f"leave {name} out, and change it with reconfigure() on the primary",
                )

    def _start(self, follower: bool) -> None:
        self.engine.committer.on_committed = self._on_committed
        coordinated = self.options.coordinator is not None
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
        if self.options.coordinator is not None:
            self._coordinate(self.options.coordinator)
        if self.engine.unverified:
            self.verify_copy()

    def _coordinate(self, choice: Any) -> None:
        """Let a coordinator decide from now on when this node tries to be primary, and whom it follows."""
        from kvrep.runtime.coordinated import CoordinatedNode

        coordinator = self.make_coordinator(choice)
        self.coordinator = coordinator
        coordinator.start(CoordinatedNode(self, witness=coordinator.witness))

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
        while not self._role_lock.acquire(timeout=LOOK_UP_S):  # another first write is at it
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
            self.finish(write, None)  # it may find no room: then the next write begins the epoch
            self.engine.writable = _nothing
        finally:
            self._role_lock.release()

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
        return write

    def first_configuration(self) -> Configuration:
        """That of a new store: its own options, itself the only voter."""
        home, options = self.engine.home, self.options
        seed = Configuration(
            acks=options.acks if options.acks is not None else 0,
            ack_timeout_s=options.ack_timeout_s if options.ack_timeout_s is not None else 5.0,
            degrade_after_s=options.degrade_after_s or 0.0,
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

    def tell(self, kind: EventKind, **fields: Any) -> None:
        """Tell the application's listeners, on their own thread."""
        self.events.tell(Event(kind=kind, node=self.label, time_s=time.time(), **fields))

    def _on_rollback(self, first: int, last: int, path: Path, reason: str) -> None:
        self.tell(EventKind.ROLLED_BACK, first=first, last=last, path=str(path), reason=reason)

    @property
    def witness(self) -> bool:
        """Whether this node votes without data."""
        return self.coordinator is not None and self.coordinator.witness

    @property
    def closing(self) -> bool:
        return self._closed

    @property
    def primary_epoch(self) -> int:
        """The epoch in which this node is primary; 0 when it is not."""
        shipping = self.shipping
        return shipping.epoch if shipping is not None and shipping.leading else 0

    @property
    def fenced(self) -> bool:
        """Whether it is primary by a full fence, or by force."""
        shipping = self.shipping
        return shipping is not None and shipping.leading and (shipping.fenced or shipping.forced)

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
        if self._role_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            try:
                self._close(deadline)
            finally:
                self._role_lock.release()
        elif not self._closed:  # else another thread is at it
            self.engine.committer.refuse(ClosedError("the store is closed"))
            threading.Thread(target=self._close_late, name=f"kvrep-close-{self.label}", daemon=True).start()

    def _close_late(self) -> None:
        with self._role_lock:
            self._close(time.monotonic() + self.options.close_timeout_s)

    def _close(self, deadline: float) -> None:
        """The role lock is held. All parts share ``deadline``; beyond it each still gets a moment."""
        if self._closed:
            return

        def left() -> float:
            return max(CLOSE_MOMENT_S, deadline - time.monotonic())

        self._closed = True
        if self.coordinator is not None:
            self.coordinator.stop(left())
        self.engine.committer.refuse(ClosedError("the store is closed"))
        with self._moved:
            self._moved.notify_all()
        self.on_moved()
        self.link.stop()
        if self.forwarder is not None:
            self.forwarder.stop(left())
        self.roles.stop(left())  # no role changes after this
        for part in (self.shipping, self.replaying, self._server, self._verification):
            if part is not None:
                part.stop(left())
        self.engine.close(left())
        self.events.stop(left())

    # -- writing -----------------------------------------------------------------------------------

    def deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self.ack_timeout_s if timeout_s is None else timeout_s)

    def commit(
        self,
        write: Write,
        timeout_s: float | None,
        acks: Acks | None = None,
        level: Literal["synced", "visible"] | None = None,
    ) -> Position:
        """Order a write and wait for its outcome; raises what refuses it or :class:`AckTimeout`."""
        if timeout_s is None:
            timeout_s = self.ack_timeout_s
        if acks is not None or level is not None:
            return self._commit_more(write, timeout_s, acks, level)
        try:
            self.engine.commit(write, timeout_s)
        except Error as error:
            if self.forwarder is None or not is_elsewhere(error):
                raise
            return self._forward(write, timeout_s)
        if write.error is not None or not write.done:
            if self.forwarder is not None and is_elsewhere(write.error):
                return self._forward(write, timeout_s)
            self._raise_outcome(write)
        return _position(Position, (write.epoch, write.offset))

    def _forward(
        self, write: Write, timeout_s: float, acks: Acks | None = None, level: str | None = None
    ) -> Position:
        """A write that this node did not log, because another one is, or will be, primary."""
        assert self.forwarder is not None
        deadline_s = time.monotonic() + timeout_s
        return self.forwarder.commit(self.forwarder.make(write.payload, write.size, deadline_s, acks, level))

    def forwards_now(self) -> bool:
        """Whether writes go to another node: ``forward_writes`` is set, and this node is not primary."""
        return self.forwarder is not None and self.replaying is not None

    def _commit_more(
        self, write: Write, timeout_s: float, acks: Acks | None, level: Literal["synced", "visible"] | None
    ) -> Position:
        deadline = time.monotonic() + timeout_s
        if self.forwards_now():
            self.check_asked(acks, level)
            return self._forward(write, timeout_s, acks, level)
        try:
            self.check_more(acks, level)
            self.engine.commit(write, timeout_s)
        except Error as error:
            if self.forwarder is None or not is_elsewhere(error):
                raise
            return self._forward(write, deadline - time.monotonic(), acks, level)
        if write.error is not None or not write.done:
            if self.forwarder is not None and is_elsewhere(write.error):
                return self._forward(write, deadline - time.monotonic(), acks, level)
            self._raise_outcome(write)
        self.await_more(write.position, acks, level, deadline)
        return write.position

    def finish(self, write: Write, timeout_s: float | None) -> Position:
        """Wait for a write that is in order already."""
        if type(write) is Forward:
            assert self.forwarder is not None
            return self.forwarder.finish(write, self.deadline(timeout_s))
        self.engine.committer.finish(write, self.deadline(timeout_s))
        if write.error is not None or not write.done:
            self._raise_outcome(write)
        return Position(write.epoch, write.offset)

    def submit(self, write: Write) -> Write:
        """Order a write for the background leader, or for the primary; returns what to wait for."""
        forwarder = self.forwarder
        if forwarder is None:
            self.engine.submit(write, self.ack_timeout_s)
            return write
        item = forwarder.make(write.payload, write.size, self.deadline(None))
        try:
            self.engine.submit(write, self.ack_timeout_s)
        except Error as error:
            if not is_elsewhere(error):
                raise
            forwarder.order(item)
        else:
            forwarder.follow(item, write)
        return item

    def _raise_outcome(self, write: Write) -> None:
        if type(write) is Forward and self.forwarder is not None:
            self.forwarder.outcome(write)
            return
        if write.error is not None:
            error = write.error
            raise again(error) if isinstance(error, Error) else error
        if not write.offset and self.engine.committer.withdraw(write):
            raise Overloaded("the log did not get to this write in time; nothing of it was written")
        position = write.position if write.offset else None
        reached = self.shipping.copies_at(write.offset) if self.shipping is not None and position else 1
        needed = self.engine.configuration.copies
        raise AckTimeout(
            f"the write at {position} is logged here; {reached} of {needed} copies confirmed it in time",
            position=position,
            reached=reached,
            needed=needed,
        )

    @staticmethod
    def check_asked(acks: Acks | None, level: str | None) -> None:
        """``ValueError`` unless a write may ask for these."""
        if level not in (None, "synced", "visible"):
            raise ValueError(f'level must be "synced" or "visible", not {level!r}')
        if acks is not None:
            check_acks(acks)

    def check_more(self, acks: Acks | None, level: str | None) -> None:
        """Refuse a write that asks for more than can be done now."""
        self.check_asked(acks, level)
        if self.shipping is None:
            if acks not in (None, 0):
                raise NotPrimary("this store serves no followers, so none can confirm the write",
                                 hint="open the primary with listen=")  # fmt: skip
            return
        self.shipping.check_more(acks)

    def await_more(self, position: Position, acks: Acks | None, level: Any, deadline: float) -> None:
        """Wait until a committed write has what it asked for; :class:`AckTimeout` at the deadline."""
        if self.shipping is not None:
            self.shipping.await_more(position, acks, level or "synced", deadline)

    def await_record(self, record: Any, timeout_s: float | None) -> None:
        """Wait until a record that a transaction has read is committed."""
        if type(record) is Write:
            self.finish(record, timeout_s)
            return
        seconds = self.ack_timeout_s if timeout_s is None else timeout_s
        self.wait_for(Position(record.epoch, record.offset), seconds)

    def check_record_size(self, size: int) -> None:
        if size > self.options.record_bytes_max:
            raise ValueTooLarge(
                f"the transaction has {size} bytes, record_bytes_max allows {self.options.record_bytes_max}",
                hint="split it, or open the store with a larger record_bytes_max",
            )

    def guarded(self, callback: Callable[[Any], None], argument: Any) -> None:
        """Call a user's callback; what it raises is logged and dropped."""
        try:
            callback(argument)
        except Exception:
            log.exception("%s: a callback raised", self.label)

    def refuse_follower(self) -> None:
        replaying = self.replaying
        address = replaying.primary_address if replaying is not None else None
        epoch = self.engine.epochs.last_epoch
        where = f"; the primary is at {address}" if address else ""
        raise NotPrimary(f"this node is a follower{where}", primary_address=address, epoch=epoch)

    # -- waiting and freshness ---------------------------------------------------------------------

    def _on_committed(self, committed: int) -> None:
        if self._waiting:
            with self._moved:
                self._moved.notify_all()
        self.on_moved()
        if self.shipping is not None:
            self.shipping.on_committed(committed)
        if self.forwarder is not None:
            self.forwarder.on_committed()

    def on_acked(self) -> None:
        """A follower confirmed more: with ``acks=0`` that moves the horizon."""
        if self._waiting:
            with self._moved:
                self._moved.notify_all()

    def await_move(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until something is committed, or the node is closed, or ``timeout_s`` have passed; not at all
        if ``ready()``. A part of what is waited for shows without notice: look again every quarter second."""
        with self._moved:
            self._waiting += 1
            try:
                if not ready() and not self._closed:
                    self._moved.wait(timeout_s)
            finally:
                self._waiting -= 1

    def stir(self) -> None:
        """Wake everybody who waits in :meth:`await_move`."""
        with self._moved:
            self._moved.notify_all()

    def wait_for(self, position: Position, timeout_s: float) -> None:
        """Return once reads here show ``position``; :class:`StaleRead` after ``timeout_s``.

        :class:`RolledBack` when this history cannot contain it any more.
        """
        try:
            epoch, offset = position
        except (TypeError, ValueError):
            raise TypeError(f"expected a Position, not {type(position).__name__}") from None
        wanted = Position(epoch, offset)
        deadline = time.monotonic() + timeout_s
        if self.reached(wanted):
            return
        with self._moved:
            self._waiting += 1
            try:
                while not self.reached(wanted):
                    if self._closed:
                        raise ClosedError("the store is closed")
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise self.stale(wanted, timeout_s)
                    self._moved.wait(min(left, 0.25))
            finally:
                self._waiting -= 1

    def until(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        """Wait until something that comes with commits is so; False when it is not by ``deadline_s``."""
        if condition():
            return True
        with self._moved:
            self._waiting += 1
            try:
                while not condition():
                    left = deadline_s - time.monotonic()
                    if left <= 0 or self._closed:
                        return condition()
                    self._moved.wait(min(left, 0.02))
            finally:
                self._waiting -= 1
        return True

    def knows_primary(self, epoch: int) -> None:
        """There is a primary of ``epoch``: this node, one whose stream has joined, or one that said so."""
        if epoch > self._known_epoch:
            self._known_epoch, self._known_s = epoch, time.monotonic()
            self.link.moved(epoch)

    @property
    def settling(self) -> bool:
        """Whether the present primary is so new that its followers may not have found it yet."""
        return time.monotonic() - self._known_s < self.options.heartbeat_timeout_s

    def confirm(self, deadline_s: float) -> None:
        """As primary, make sure that this node still is one; see :meth:`Shipping.confirm`."""
        shipping = self.shipping
        if shipping is None:
            if self.replaying is not None:
                self.refuse_follower()
            return  # alone: there is nobody else
        shipping.confirm(deadline_s)

    def linearize(self, timeout_s: float | None) -> None:
        """Return when reads here show everything that was committed anywhere before the call.

        A primary asks its voters whether it still is one; a follower asks its primary for the committed
        position and waits for it. Calls at the same time share a question. :class:`StaleRead` or
        :class:`NotPrimary` when that cannot be had in ``timeout_s``.
        """
        deadline_s = self.deadline(timeout_s)
        while True:
            if self.replaying is None:
                self.engine.need_alive()
                try:
                    self.confirm(deadline_s)
                    return
                except NotPrimary:
                    if self.replaying is None:
                        raise
            position: Position = self._reads.run(deadline_s)
            try:
                self.wait_for(position, max(0.0, deadline_s - time.monotonic()))
                return
            except RolledBack:  # only a forced promotion takes back what was confirmed: ask again
                if time.monotonic() >= deadline_s:
                    raise

    def _ask_read_position(self, deadline_s: float) -> Position:
        """What the primary, confirmed, has committed. One attempt after another until ``deadline_s``."""
        while True:
            target = self.link.find(deadline_s)
            left = deadline_s - time.monotonic()
            try:
                if not target.address:
                    self.confirm(deadline_s)
                    return self.engine.committed_position
                answer = self.link.call(target, "read_position", {"timeout_s": left}, left + 0.05)
                return Position.parse(str(answer.get("position")))
            except (NotPrimary, Fenced) as error:
                self.link.over(target.epoch)
                failed: Error = error
            except StaleRead:
                raise
            except ValueError as error:
                raise ProtocolError(f"the primary did not answer with a position: {error}") from None
            except Error as error:
                failed = error
            if time.monotonic() >= deadline_s or self._closed:
                raise StaleRead(
                    f"the primary did not confirm in time what is committed: {failed}",
                    position=self.engine.committed_position,
                ) from failed
            time.sleep(0.01)

    def reached(self, position: Position) -> bool:
        """Whether reads here show ``position``; :class:`RolledBack` when this history cannot contain it.

        It cannot when a newer epoch is committed at or below it. An older one there means that this node
        has not heard of the newer history yet.
        """
        epoch, offset = position
        shown = self.engine.view.last
        here = self.engine.epochs.epoch_at(min(offset, shown))
        if here > epoch:
            raise RolledBack(f"record {offset} of epoch {epoch} is not in this history", position=position)
        return offset <= shown and (here == epoch or not offset)

    def stale(self, wanted: Position, timeout_s: float) -> StaleRead:
        """The error of a wait that ended without its position."""
        shown = self.engine.committed_position
        return StaleRead(
            f"position {wanted} is not here after {timeout_s:g} s; this node shows {shown}",
            position=shown,
            wanted=wanted,
        )

    def check_history(self, position: Position) -> None:
        """:class:`RolledBack` or :class:`StaleRead` unless ``position`` is part of what is shown here."""
        if not self.reached(position):
            raise self.stale(position, 0.0)

    def freshen(
        self,
        at_least: Position | None,
        max_staleness_s: float | None,
        timeout_s: float | None,
        consistency: str | None = None,
    ) -> None:
        """Before a read: wait for a position, check the staleness, or make it linearizable."""
        if consistency is not None and self.is_linearizable(consistency):
            self.linearize(timeout_s)
        if at_least is not None:
            self.wait_for(at_least, 5.0 if timeout_s is None else timeout_s)
        if max_staleness_s is not None and self.replaying is not None:
            self._need_fresh(self.replaying, max_staleness_s, 1.0 if timeout_s is None else timeout_s)

    @staticmethod
    def is_linearizable(consistency: str) -> bool:
        """Whether the read waits for the primary's word; ``ValueError`` for what is no consistency."""
        if consistency not in ("local", "linearizable"):
            raise ValueError(f'consistency must be "local" or "linearizable", not {consistency!r}')
        return consistency == "linearizable"

    def _need_fresh(self, replaying: Replaying, max_staleness_s: float, timeout_s: float) -> None:
        """Wait for an answer of the primary if this copy may be too old; ``StaleRead`` without one."""
        staleness = replaying.staleness_s()
        if staleness <= max_staleness_s:
            return
        if replaying.connected:
            deadline = time.monotonic() + timeout_s
            replaying.probe()
            with self._moved:
                self._waiting += 1
                try:
                    while (staleness := replaying.staleness_s()) > max_staleness_s:
                        left = deadline - time.monotonic()
                        if left <= 0 or not replaying.connected:
                            break
                        self._moved.wait(min(left, 0.02))
                finally:
                    self._waiting -= 1
        if staleness > max_staleness_s:
            raise StaleRead(
                f"this copy may be {staleness:.3f} s old, {max_staleness_s:g} s are allowed",
                staleness_s=staleness,
                position=self.engine.committed_position,
            )

    def settle(self, request: RequestId, timeout_s: float) -> Outcome:
        """What became of a forwarded write; see :meth:`Forwarder.settle`."""
        forwarder = self.forwarder
        if forwarder is None:
            raise TypeError("only a store that was opened with forward_writes=True has request ids")
        return forwarder.settle(request, timeout_s)

    def resolve(self, position: Position | RequestId) -> Outcome:
        """What became of a write; never a guess."""
        if isinstance(position, RequestId):
            found = self.engine.view.forwarded(position)[0]
            return Outcome.COMMITTED if found is not None else Outcome.PENDING
        epoch, offset = position
        engine = self.engine
        shown = engine.view.last
        here = engine.epochs.epoch_at(min(offset, shown))
        if here > epoch:
            return Outcome.ROLLED_BACK
        # What is logged here and not committed says nothing: it can be cut itself.
        return Outcome.COMMITTED if offset <= shown and here == epoch else Outcome.PENDING

    # -- configuration -----------------------------------------------------------------------------

    def reconfigure(self, change: Callable[[Configuration], Configuration], timeout_s: float) -> Position:
        """Log a changed configuration and wait until it is committed under the old and the new rule."""
        deadline = time.monotonic() + timeout_s
        if self.shipping is not None:
            write = self.shipping.propose(change, deadline)
        else:
            with self._role_lock:
                self.engine.writable_as_primary()
                write = self.engine.configure(change(self.engine.configuration))
        self.engine.committer.finish(write, deadline)
        if write.error is not None or not write.done:
            self._raise_outcome(write)
        self.ack_timeout_s = self.engine.configuration.ack_timeout_s
        return write.position

    def add_witness(self, name: str, address: str, timeout_s: float) -> Position:
        """Make the node at ``address``, which was opened as a witness, a voter without data."""
        if self.shipping is None:
            self.engine.writable_as_primary()
            raise ValueError("this store serves no other nodes; open it with listen=")
        answer = self.roles.call(address, "standing", {}, timeout_s)
        store_id, lineage = bytes(answer["store_id"]), bytes(answer["lineage"])
        if str(answer["name"]) != name or not answer.get("witness"):
            raise ValueError(f"the node at {address} is not a witness named {name!r}")
        if lineage and lineage != self.engine.home.lineage:
            raise ValueError(f"the witness at {address} belongs to another group")

        def change(now: Configuration) -> Configuration:
            if now.voter(store_id) is not None:
                return now
            return now.with_voter(store_id, name, address, witness=True)

        return self.reconfigure(change, timeout_s)

    def add_voter(self, name: str, timeout_s: float) -> Position:
        """Make a known follower a voter, even one that was removed before."""
        shipping = self.shipping
        if shipping is None:
            self.engine.writable_as_primary()
            raise ValueError(f"no follower named {name!r} is known here")
        return self.reconfigure(lambda now: shipping.with_voter(now, name), timeout_s)

    # -- status ------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Where this node stands; cheap enough to ask once a second."""
        engine = self.engine
        home, state, committer = engine.home, engine.tree.state, engine.committer
        configuration, effective = engine.configuration, engine.configurations_in_force()[0]
        closed = engine.closed
        return Status(
            role=self.role,
            name=home.name,
            store_id=home.store_id.hex(),
            lineage=home.lineage.hex(),
            address=self.address,
            path=str(home.path),
            epoch=committer.epoch or engine.epochs.last_epoch,
            first_offset=committer.log.first,
            last_offset=engine.tail.offset,
            durable_offset=committer.durable,
            committed_offset=committer.committed,
            applied_offset=state.applied.offset,
            position=engine.committed_position,
            acks=configuration.acks,
            ack_timeout_s=configuration.ack_timeout_s,
            durability=self.options.durability,
            voters=tuple(v.name or v.store_id.hex()[:8] for v in configuration.voters),
            copies=effective.copies_wanted,
            away=tuple(v.name or v.store_id.hex()[:8] for v in effective.away),
            unprotected=effective.unprotected,
            degrade_after_s=configuration.degrade_after_s,
            not_writable=self._not_writable(),
            primary_address=self.primary_address,
            followers=self.shipping.followers() if self.shipping is not None else (),
            source=self.replaying.status() if self.replaying is not None else None,
            verified_through=0 if engine.unverified else state.verified,
            diverged_at=state.diverged,
            memtable_bytes=engine.view.memory_bytes,
            log_bytes=committer.log.size,
            lmdb_bytes=0 if closed else engine.tree.file_bytes,
            flushes=engine.flusher.flushes,
            uncommitted_bytes=committer.pending_bytes,
            snapshot_age_s=engine.view.oldest_snapshot_age_s(),
            rescued=tuple(str(p) for p in engine.rescued),
        )

    @property
    def primary_address(self) -> str:
        replaying, shipping = self.replaying, self.shipping
        if replaying is not None:
            return replaying.primary_address or ""
        return shipping.primary_address if shipping is not None else self.address

    def _not_writable(self) -> str:
        committer = self.engine.committer
        if committer.closed is not None:
            return str(committer.closed)
        if self.shipping is None and self.replaying is None:
            return ""
        try:
            self.engine.writable()
        except Error as error:
            return error.message
        return ""


def _grpc(options: Options) -> Transport:
    from kvrep.transport.network import GrpcTransport
    from kvrep.transport.security import Security

    security = Security(tls=options.tls, token=options.token)
    return GrpcTransport(
        security=security,
        message_bytes_max=max(8 << 20, options.value_bytes_max + (1 << 20)),
    )


def _reachable(bound: str) -> str:
    """A bound address as others can use it: a wildcard becomes this host's name."""
    host, _, port = bound.rpartition(":")
    if host in ("0.0.0.0", "[::]"):
        import socket

        return f"{socket.gethostname()}:{port}"
    return bound
