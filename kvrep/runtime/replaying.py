"""The follower's side of replication: stay connected, store what comes, tell how far it got."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrep.errors import (
    ConfigurationMismatch,
    Error,
    LineageMismatch,
    NotPrimary,
    OpenError,
    ProtocolError,
    ReplicationError,
    StorageFailed,
    UpgradeRequired,
)
from kvrep.model.position import Position
from kvrep.replication.ballots import PrimarySeen
from kvrep.replication.election import WhyGone
from kvrep.replication.messages import (
    PROBES,
    Confirm,
    Credit,
    FromPrimary,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Promise,
    Segment,
    SlotState,
)
from kvrep.replication.receiver import (
    AckNow,
    Action,
    Answer,
    Append,
    Commit,
    Cut,
    Grant,
    Join,
    MakePromise,
    Receiver,
    Stop,
)
from kvrep.runtime.brokered import BrokerLink, check_broker_url, is_broker_url
from kvrep.runtime.compression import decompressor, have_zstd
from kvrep.runtime.spooling import Spools
from kvrep.status import Role, SourceStatus
from kvrep.transport.address import Address
from kvrep.transport.interface import ConnectionRefused, StreamEnded

if TYPE_CHECKING:
    from kvrep.runtime.node import Node
    from kvrep.transport.interface import Connection, Stream

__all__ = ["Replaying", "check_address"]

log = logging.getLogger("kvrep.replication")

BACKOFF_MIN_S = 0.05
HURRIED_S = 0.01
HURRIED_MAX = 5
"""How often in a row a node that was named as the primary is tried without backing off."""
SYNC_BYTES = 4 << 20
"""A follower that catches up syncs its log at least this often."""
SOURCES_MAX = 16
HEARD_S = 0.02
"""How often the coordinator is told that the primary lives: heartbeats may come with every commit."""


class _Reconnect(Exception):
    """The stream is over and a new one is to be opened at once."""


class _Refused(ProtocolError):
    """The primary refused us for a reason that does not go away by itself."""


class Replaying:
    """Two threads: one that receives and stores, one that watches the clock for it."""

    def __init__(self, node: Node, sources: tuple[str, ...], before: Replaying | None = None) -> None:
        """``before`` is what this node followed with until now, when it goes on after an interruption."""
        self.node = node
        self.engine = node.engine
        self.options = node.options
        self.primary_address: str | None = None
        """Where the primary was last seen; ``None`` before the first join."""
        self.slots: tuple[SlotState, ...] = ()
        """The primary's slots as last heard: should this node become primary, it keeps log for them."""
        self.spools = Spools(self.engine, None, node.label)
        """Copies that others fetch from this node while it is a follower."""
        self.bootstrap_bytes = 0
        self.bootstrap_bytes_total = 0
        self._own_sources = len(sources)
        self._sources = list(sources)
        for source in self._sources:
            check_address(source)
        self._next_source = 0
        self._next = ""
        """Where to go at once, before anything else."""
        self._wake = threading.Event()
        """Ends a pause between two attempts."""
        self.failure: Error | None = None
        """Why this node follows nobody any more, until it is opened anew."""
        self._state = "connecting"
        self._problem = ""
        self._primary_name, self._primary_id = "", b""
        self._behind_bytes = 0
        # Protects the receiver: the receiving thread changes it, the clock and status ask it.
        self._lock = threading.Lock()
        self._receiver: Receiver | None = None
        self._fresh_us = 0
        self._stream: Stream | None = None
        self._connection: Connection | None = None
        self._links: dict[str, BrokerLink] = {}
        """The brokers among the sources: what they delivered is acked where it came from."""
        self._decompress: Callable[[bytes], bytes] | None = None
        self._unsynced_bytes = 0
        self._sync_bytes = min(SYNC_BYTES, node.options.credit_bytes // 2)
        """Unsynced bytes grant no credit: more of them than half of it would stop the primary."""
        self._told_s = 0.0
        """When the coordinator was told last that the primary lives; 0: not in this stream."""
        self._busy = False
        """Whether a message is being dealt with: meanwhile the silence is our own."""
        self._chance = random.SystemRandom()  # whoever seeds Python's own must not put followers in step
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        if before is not None:
            self.primary_address, self.slots = before.primary_address, before.slots
            self._fresh_us = before._fresh_us
            self._next = before._next
            self._own_sources, self._primary_name = before._own_sources, before._primary_name
            self._primary_id = before._primary_id

    def start(self) -> None:
        label = self.node.label
        self._threads = [
            threading.Thread(target=self._run, name=f"kvrep-replay-{label}", daemon=True),
            threading.Thread(target=self._watch, name=f"kvrep-watch-{label}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the stream, both threads, and what others fetch."""
        deadline = time.monotonic() + timeout_s
        self._stop.set()
        self._wake.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()
        connection = self._connection
        if connection is not None:
            connection.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.1, deadline - time.monotonic()))
        for link in list(self._links.values()):
            link.close()
        self.spools.close(max(0.1, deadline - time.monotonic()))

    @property
    def alive(self) -> bool:
        """Whether one of its threads still runs."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    # -- the receiving thread ----------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            if not self._next and not self._sources:
                self._state = "waiting"
                self._wake.wait(0.5)  # until somebody says whom to follow
                self._wake.clear()
                continue
            address = self._choose()
            try:
                joined = self._one_stream(address)
            except (StorageFailed, UpgradeRequired, ConfigurationMismatch) as error:
                self._give_up(error)
                return
            except _Reconnect:
                failures = 0
                self._next = self._next or address
                continue
            except (LineageMismatch, _Refused) as error:
                joined = False
                self._say("refused", str(error))
            except Error as error:
                joined = False
                self._say("waiting", str(error))
            except Exception as error:
                joined = False
                log.exception("%s: replication from %s failed", self.node.label, address)
                self._say("waiting", repr(error))
            if joined:
                failures = 0
            else:
                self._next_source += 1
            failures += 1
            self._pause(failures)

    def _choose(self) -> str:
        """Where to connect to now: where we were sent, else one source after the other, else the voters that
        the configuration names, each of whom says who is primary."""
        named, self._next = self._next, ""
        if named:
            return named
        known = list(self._sources)
        own = self.node.address
        # Who is refused for good is to be told so, not to look elsewhere.
        # And a copy behind a broker is there because the voters' site may not be reached, or burn.
        apart = any(map(is_broker_url, self._sources))
        for voter in self.engine.configuration.voters if self._state != "refused" and not apart else ():
            if voter.address and voter.address not in known and voter.address != own and not voter.witness:
                known.append(voter.address)
        return known[self._next_source % len(known)]

    def _pause(self, failures: int) -> None:
        """Back off with jitter: retry for ever, never in step with others."""
        limit = min(self.options.reconnect_backoff_max_s, BACKOFF_MIN_S * 2 ** min(failures, 10))
        if self._next and failures <= HURRIED_MAX:
            limit = HURRIED_S
        self._wake.wait(self._chance.uniform(limit / 2, limit))
        self._wake.clear()

    def _give_up(self, error: Error) -> None:
        self._say("refused", str(error))
        log.error("%s: replication stops: %s", self.node.label, error)
        self.failure = error
        self.node.moves.stir()

    def _say(self, state: str, problem: str = "") -> None:
        if problem and problem != self._problem:
            log.info("%s: %s", self.node.label, problem)
        self._state, self._problem = state, problem

    def _one_stream(self, address: str) -> bool:
        """Open a stream and follow it to its end; whether the join was verified."""
        assert self.node.transport is not None
        connection = self._connect(address)
        self._connection = connection
        try:
            if self._stop.is_set():
                return False
            if self.node.unchecked and not is_broker_url(address):
                self._check_seeds(connection)
            stream = connection.open_stream()
            self._stream = stream
            return self._follow(connection, stream)
        finally:
            self._stream = None
            self._busy = False
            self._forget_receiver()
            connection.close()
            self._connection = None

    def _check_seeds(self, connection: Connection) -> None:
        """Compare this new node's options with its group's before it joins: it might vote at once."""
        try:
            answer = connection.call("status", {}, self.options.heartbeat_timeout_s)
        except Error as error:  # the peer's own failures do not end us
            raise ReplicationError(f"{connection.address} does not say where it stands: {error}") from error
        try:
            status = answer["status"]
            if status["role"] != Role.PRIMARY:
                return  # it will say so, and who is
            if not status["voters"]:
                raise NotPrimary(f"{connection.address} has not begun", primary_address=None, epoch=None)
            self.node.check_seeds(status)
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"{connection.address} answered what is not a status: {error}") from error

    def _connect(self, address: str) -> Connection:
        assert self.node.transport is not None
        if not is_broker_url(address):
            return self.node.transport.connect(address, name=self.node.label)
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = BrokerLink(
                address, self.node.transport, store_id=self.engine.home.store_id, label=self.node.label
            )
        return link.connection()

    def _forget_receiver(self) -> None:
        with self._lock:
            if self._receiver is not None:
                self._fresh_us = self._receiver.fresh_us(self.engine.view.last)
            self._receiver = None
            self._unsynced_bytes = 0

    def _follow(self, connection: Connection, stream: Stream) -> bool:
        hello = self._hello()
        receiver = Receiver(
            hello,
            heartbeat_timeout_s=self.options.heartbeat_timeout_s,
            record_bytes_max=self.options.record_bytes_max + (1 << 20),
            fresh_us=self._fresh_us,
            now=time.monotonic(),
        )
        with self._lock:
            self._receiver = receiver
        self._say("joining", self._problem)
        try:
            stream.send(hello)
            while True:
                message = stream.receive()
                self._busy = True
                self._on_message(receiver, stream, connection, message)
                with self._lock:
                    receiver.last_heard = time.monotonic()
                self._busy = False
        except StreamEnded as ended:
            self._after_end(ended, receiver)
        return receiver.epoch != 0

    def _tell_lost(self, error: Exception | None, silent: bool) -> None:
        """The coordinator wants to know how the stream ended."""
        coordinator = self.node.coordinator
        if silent:
            coordinator.connection_lost(WhyGone.SILENT)
        else:
            refused = isinstance(error, ConnectionRefused)
            coordinator.connection_lost(WhyGone.REFUSED if refused else WhyGone.BROKEN)

    def _tell_heard(self) -> None:
        receiver, now = self._receiver, time.monotonic()
        if receiver is not None and receiver.epoch and now - self._told_s >= HEARD_S:
            self._told_s = now
            self.node.coordinator.heard_from_primary(
                PrimarySeen(
                    store_id=self._primary_id,
                    name=self._primary_name,
                    address=self._connection_address(),
                    epoch=receiver.epoch,
                )
            )

    @property
    def joined(self) -> tuple[str, int]:
        """(address, epoch) of the primary whose stream has joined; ("", 0) without one."""
        receiver, connection = self._receiver, self._connection
        if receiver is None or connection is None or not receiver.epoch:
            return "", 0
        return connection.address, receiver.epoch

    @property
    def bootstrapping(self) -> bool:
        return self._state == "bootstrapping"

    def _after_end(self, ended: StreamEnded, receiver: Receiver) -> None:
        if self._stop.is_set():
            return
        error = ended.error
        if receiver.epoch or isinstance(error, ConnectionRefused):
            self._tell_lost(error, receiver.expired(time.monotonic()))
        if receiver.expired(time.monotonic()):
            text = f"the primary was silent for {self.options.heartbeat_timeout_s:g} s"
        else:
            text = str(error) if error is not None else "the primary ended the stream"
        self._say("waiting", text)

    def _hello(self) -> Hello:
        """What this node is and holds, all of it synced first: a join counts as an ack of it."""
        engine = self.engine
        engine.sync()
        tail, home = engine.tail, engine.home
        return Hello(
            store_id=home.store_id,
            name=home.name,
            lineage=home.lineage,
            branch=engine.branch,
            features=(PROBES, "zstd") if have_zstd() else (PROBES,),
            voter=self.options.voter,
            address=self.node.address,
            promised_epoch=home.promised_epoch,
            last=Position(tail.epoch, tail.offset),
            running=tail.running,
            applied=engine.tree.state.applied.offset,
            committed=engine.committer.committed,
            epochs=engine.epochs,
            credit_bytes=self.options.credit_bytes,
            durability=self.options.durability,
        )

    def _on_message(
        self, receiver: Receiver, stream: Stream, connection: Connection, message: FromPrimary
    ) -> None:
        more = False
        if type(message) is Segment:
            more = message.more
            if message.compressed:
                message = self._inflate(message)
        elif type(message) is Heartbeat:
            self._behind_bytes = message.behind_bytes
            self._tell_heard()
            if message.slots:
                self.slots = message.slots
            if self.node.unchecked and message.last <= self.engine.tail.offset:
                self.node.check_configuration()  # behind a broker nobody could be asked before
        with self._lock:
            actions = receiver.on_message(message, time.monotonic())
        self._do(receiver, stream, connection, actions, more)
        if self._unsynced_bytes and not more:
            self._sync(receiver, stream, connection)

    def _inflate(self, segment: Segment) -> Segment:
        from dataclasses import replace

        if self._decompress is None:
            self._decompress = decompressor(self.options.record_bytes_max + (1 << 20))
        return replace(segment, data=self._decompress(segment.data), compressed=False)

    def _do(
        self,
        receiver: Receiver,
        stream: Stream,
        connection: Connection,
        actions: list[Action],
        more: bool,
    ) -> None:
        """Carry out what the receiver decided, in order."""
        ack = False
        for action in actions:
            match action:
                case Append():
                    self._append(receiver, stream, connection, action, more)
                case Commit(offset):
                    self.engine.committer.commit_through(offset)
                case AckNow():
                    ack = True
                case Answer(number):
                    promised = self.engine.home.promised_epoch
                    stream.send(Confirm(round=number, promised_epoch=promised))
                case Grant(granted):
                    stream.send(Credit(bytes_granted=granted))
                case Join(welcome):
                    if self.node.unchecked and not is_broker_url(connection.address):
                        # Nothing is acked yet, so it cannot have made us a voter.
                        raise ReplicationError(f"{connection.address} was no primary yet when it was asked")
                    with self._lock:
                        receiver.probe(_now_us())
                    self.engine.adopt_lineage(welcome.lineage)
                    self.primary_address = self._connection_address()
                    self._primary_name, self._primary_id = welcome.name, welcome.store_id
                    self._told_s = 0.0
                    self._tell_heard()
                    self._say("streaming")
                    self.node.link.knows(welcome.epoch)
                case MakePromise(epoch, reply):
                    self._promise(stream, epoch, reply)
                case Cut():
                    self._cut(action)
                case NeedBootstrap():
                    self._bootstrap(connection, action)
                case Stop(refused):
                    self._stop_with(refused.reason, refused.message, refused.primary_address, refused.final)
        if ack:
            self._send_ack(receiver, stream)

    def _send_ack(self, receiver: Receiver, stream: Stream, *, probe: bool = False) -> None:
        # Sent under the lock: acks must leave in the order in which they were made.
        with self._lock:
            if probe:
                receiver.probe(_now_us())
            stream.send(receiver.ack(min(self.engine.view.last, receiver.last.offset)))

    def probe(self) -> None:
        """Ask the primary to tell at once how fresh this copy is; nothing happens without a stream."""
        with self._lock:
            receiver, stream = self._receiver, self._stream
        if receiver is None or stream is None or not receiver.epoch:
            return
        try:
            self._send_ack(receiver, stream, probe=True)
        except Error as error:
            log.debug("%s: no probe: %s", self.node.label, error)

    def _connection_address(self) -> str:
        connection = self._connection
        return connection.address if connection is not None else ""

    def _append(
        self, receiver: Receiver, stream: Stream, connection: Connection, action: Append, more: bool
    ) -> None:
        sync_now = not more and not self._unsynced_bytes
        self.engine.append(action.first, action.data, sync=sync_now, epoch=receiver.epoch)
        self.node.ack_timeout_s = self.engine.configuration.ack_timeout_s
        if sync_now:
            self._appended(receiver, stream, connection)
            return
        self._unsynced_bytes += len(action.data)
        if self._unsynced_bytes >= self._sync_bytes:
            self._sync(receiver, stream, connection)

    def _sync(self, receiver: Receiver, stream: Stream, connection: Connection) -> None:
        self._unsynced_bytes = 0
        self.engine.sync()
        self._appended(receiver, stream, connection)

    def _appended(self, receiver: Receiver, stream: Stream, connection: Connection) -> None:
        tail = self.engine.tail
        with self._lock:
            actions = receiver.appended(Position(tail.epoch, tail.offset))
        self._do(receiver, stream, connection, actions, False)

    def _promise(self, stream: Stream, epoch: int, reply: bool) -> None:
        """Durably promise, then answer with what the log holds at that moment."""
        engine = self.engine
        with engine.committer.lead:
            if not engine.home.promise(epoch, b"") and not reply:
                raise ProtocolError(f"epoch {epoch} is below {engine.home.promised_epoch}, promised before")
            tail = engine.tail
            if reply and tail.offset < engine.home.vote_floor:
                raise ProtocolError(
                    f"this node confirmed records up to {engine.home.vote_floor} and got a copy without them:"
                    " it does not vote before it has them again"
                )
            answer = Promise(
                epoch=engine.home.promised_epoch,
                last=Position(tail.epoch, tail.offset),
                committed=engine.committer.committed,
                epochs=engine.epochs,
                lowered=engine.home.lowered,
            )
        if reply:
            stream.send(answer)

    def _cut(self, action: Cut) -> None:
        reason = f"epoch {action.epoch} does not contain them"
        self.engine.cut(action.to.offset, reason=reason)
        raise _Reconnect

    def _bootstrap(self, connection: Connection, action: NeedBootstrap) -> None:
        from kvrep.runtime.bootstrapping import bootstrap

        self._say("bootstrapping", f"the primary's log starts at {action.first} ({action.reason})")
        bootstrap(self, connection, action)
        self._say("joining")
        raise _Reconnect

    def _stop_with(self, reason: str, message: str, primary_address: str, final: bool) -> None:
        if reason == "not-primary" and primary_address:
            self.go_to(primary_address)
        if reason == "lineage":
            raise LineageMismatch(message)
        if reason == "not-primary":
            raise NotPrimary(message, hint="", primary_address=primary_address or None, epoch=None)
        raise _Refused(message) if final else ProtocolError(message)

    @property
    def primary_id(self) -> bytes:
        """The store id of the primary that was followed last; empty before the first join."""
        return self._primary_id

    @property
    def sources(self) -> tuple[str, ...]:
        """The addresses that are tried, in turn."""
        return tuple(self._sources)

    def promised(self, epoch: int, address: str) -> None:
        """This node has promised ``epoch`` to the node at ``address``: the stream of an older one is over."""
        with self._lock:
            receiver, stream = self._receiver, self._stream
            if receiver is not None:
                receiver.promised(epoch)
        if address:
            self.go_to(address)
            self._wake.set()
        if stream is not None and (receiver is None or receiver.epoch < epoch):
            stream.cancel()

    def follow(self, address: str) -> None:
        """Leave the present source for this one at once."""
        self.go_to(address)
        self._wake.set()
        connection, stream = self._connection, self._stream
        if stream is not None and connection is not None and connection.address != address:
            stream.cancel()

    def keep_from(self) -> int:
        """The first offset that must stay in the log: should this node become primary, the others need it."""
        engine_log, bytes_max = self.engine.committer.log, self.options.retention_bytes_max
        wanted = [slot.acked for slot in self.slots if slot.store_id != self.engine.home.store_id]
        kept = [acked + 1 for acked in wanted if engine_log.bytes_after(acked) <= bytes_max]
        return min([self.engine.tree.state.applied.offset + 1, *kept])

    def go_to(self, address: str) -> None:
        """Try this address next."""
        if address not in self._sources:
            try:
                check_address(address)
            except Error as error:
                log.warning("%s: told of a primary at %r: %s", self.node.label, address, error)
                return
            if len(self._sources) >= SOURCES_MAX:
                del self._sources[self._own_sources]
            self._sources.append(address)
        self._next = address
        self._next_source = self._sources.index(address)

    # -- the clock ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Notice silence; probe how fresh this copy is."""
        interval = min(self.options.heartbeat_timeout_s / 8, self.options.heartbeat_interval_s / 2)
        while not self._stop.wait(interval):
            self.probe()
            stream = self._stream
            with self._lock:
                receiver = self._receiver
                silent = receiver is not None and not self._busy and receiver.expired(time.monotonic())
            if silent and stream is not None and self._state != "bootstrapping":
                stream.cancel()

    # -- what others ask ---------------------------------------------------------------------------

    def staleness_s(self) -> float:
        """How old this copy is at most; infinite when it is not known."""
        with self._lock:
            receiver = self._receiver
            if receiver is not None:
                return receiver.staleness_s(_now_us(), self.engine.view.last)
            return (_now_us() - self._fresh_us) / 1e6 if self._fresh_us else float("inf")

    @property
    def connected(self) -> bool:
        """Whether a stream has joined and has not ended."""
        receiver = self._receiver
        return receiver is not None and receiver.epoch != 0

    def status(self) -> SourceStatus:
        receiver = self._receiver
        visible = self.engine.view.last
        last = receiver.primary_last if receiver is not None else visible
        connection = self._connection
        return SourceStatus(
            address=connection.address if connection is not None else next(iter(self._sources), ""),
            connected=receiver is not None and receiver.epoch != 0,
            name=self._primary_name,
            state=self._state,
            problem=self._problem,
            lag_records=max(0, last - visible),
            lag_bytes=self._behind_bytes if last > visible else 0,
            staleness_s=self.staleness_s(),
            bootstrap_bytes=self.bootstrap_bytes,
            bootstrap_bytes_total=self.bootstrap_bytes_total,
        )


def check_address(address: str) -> None:
    """``OpenError`` unless it is a ``"host:port"`` that one can connect to, or a broker's address."""
    if is_broker_url(address):
        check_broker_url(address)
        return
    try:
        Address.parse(address)
    except ValueError as error:
        raise OpenError(f"cannot follow {address!r}: {error}", hint='give "host:port"') from error


def _now_us() -> int:
    return time.monotonic_ns() // 1000
