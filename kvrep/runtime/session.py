"""One follower's stream on the primary: messages in, messages out, decisions by the replication core."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrep.errors import Fenced, LogTrimmed, ProtocolError
from kvrep.model.configuration import Configuration
from kvrep.replication.join import (
    Continue,
    LogView,
    Superseded,
    check_loss,
    check_running,
    plan_join,
    refusal,
)
from kvrep.replication.messages import (
    PROBES,
    Ack,
    Confirm,
    Credit,
    Fence,
    FromFollower,
    FromPrimary,
    Heartbeat,
    Hello,
    NeedBootstrap,
    Probe,
    Promise,
    Refused,
    Segment,
    SlotState,
    Truncate,
    Welcome,
)
from kvrep.replication.progress import Progress, State
from kvrep.replication.sender import Dead, Sender, SendHeartbeat, SendSegment, Wait
from kvrep.runtime.compression import compressor
from kvrep.runtime.signal import Signal
from kvrep.storage.log import Run

if TYPE_CHECKING:
    from kvrep.runtime.shipping import Shipping

__all__ = ["FollowerSession"]

COMPRESS_BYTES_MIN = 512
COMMIT_LINGER_S = 0.001
"""How long after a segment its commit may wait to ride in the next one."""
PARTS_MAX = 4096
"""Parts that a follower takes of one record."""


class FollowerSession:
    """See :class:`kvrep.transport.interface.Session` for the threads.

    The reader thread takes Hello, Promise, Ack and Credit; the sender thread asks the :class:`Sender` what
    to ship. ``_lock`` protects what both touch.
    """

    def __init__(self, shipping: Shipping, peer: str) -> None:
        self.peer = peer
        self.hello: Hello | None = None
        self.progress: Progress | None = None
        self._shipping = shipping
        self._engine = shipping.engine
        self._options = shipping.options
        self._sender: Sender | None = None
        self._compress: Callable[[bytes], bytes] | None = None
        self._outbox: deque[FromPrimary] = deque()
        self._signal = Signal()
        # Protects progress and sender: the reader reports, the sender thread asks.
        self._lock = threading.Lock()
        # Held while it is decided how the Hello is answered, and at the end: the reader does that, and any
        # thread that begins an epoch. Taken before the locks of leadership and followers, never after them.
        self._joining = threading.Lock()
        self._feeding = False
        """Set when the Welcome is in the outbox: records may follow it."""
        self._heeds_commits = True
        self._gathering = False
        """Whether the sender sleeps until it sends all that has moved meanwhile."""
        self._hurry = False
        self._probes = False
        """Whether this follower answers a Probe."""
        self._probed = 0
        """The newest round that it was asked for."""
        self._asked_epoch = 0
        self.settled_in: Configuration | None = None
        """The configuration in which this follower is what it can be."""
        self.vote_refused = False
        """It cannot become a voter (its name is another voter's); said once."""
        self._ended = False
        self._last_message = False
        self._slots_told_s = 0.0
        self._opened_s = time.monotonic()

    # -- what others ask ---------------------------------------------------------------------------

    @property
    def feeding(self) -> bool:
        """Whether records are sent, or may be."""
        return self._feeding and not self._ended

    def silent_s(self, now: float) -> float:
        """For how long a follower that is being fed has not been heard of."""
        progress = self.progress
        return now - progress.last_heard if progress is not None and self.feeding else 0.0

    @property
    def store_id(self) -> bytes:
        return self.hello.store_id if self.hello is not None else b""

    def wake(self) -> None:
        """An ack moved, or the role."""
        self._signal.set()

    def wake_for_write(self) -> None:
        """The log has grown: wake the sender, unless it lets records gather."""
        if not self._gathering:
            self._signal.set()

    def wake_for_commit(self) -> None:
        """The commit moved: wake the sender, unless it looks by itself soon."""
        if self._heeds_commits and not self._gathering:
            self._signal.set()

    def hurry(self) -> None:
        """Somebody waits until this follower shows what is committed."""
        self._hurry = True
        self._signal.set()

    def end(self, refused: Refused | None = None) -> None:
        """End the stream, with a last word. Any thread."""
        if refused is not None and not self._last_message:
            self._outbox.append(refused)
        self._last_message = True
        self._signal.set()

    def proceed(self) -> None:
        """Answer the Hello as things stand now: ask for a promise, or join. Any thread, repeatedly."""
        with self._joining:
            hello, progress = self.hello, self.progress
            if hello is None or progress is None or self._sender is not None:
                return
            if self._last_message or self._ended:
                return
            asking, epoch = self._shipping.leadership.stage()
            if asking:
                self._fence(progress, asking)
            elif epoch:
                if progress.state is State.FENCING:
                    progress.enter(State.JOINING)
                self._join(hello)

    def _fence(self, progress: Progress, epoch: int) -> None:
        if progress.state is State.JOINING:
            progress.enter(State.FENCING)
        if self._asked_epoch != epoch:
            self._asked_epoch = epoch
            self._outbox.append(Fence(epoch=epoch))
            self._signal.set()

    # -- the reader --------------------------------------------------------------------------------

    def on_message(self, message: FromFollower) -> None:
        if type(message) is Ack:
            self._on_ack(message)
        elif type(message) is Credit:
            self._on_credit(message)
        elif type(message) is Hello:
            self._on_hello(message)
        elif type(message) is Confirm:
            self._on_confirm(message)
        elif type(message) is Promise:
            if self.progress is None:
                raise ProtocolError("a promise before the Hello")
            self.progress.last_heard = time.monotonic()
            self._shipping.leadership.on_promise(self.store_id, message)
            self.proceed()
        else:
            raise ProtocolError(f"{type(message).__name__} is not for a primary")

    def _on_ack(self, ack: Ack) -> None:
        sender = self._sender
        if sender is None:
            raise ProtocolError("an ack before the join")
        try:
            with self._lock:
                moved = sender.on_ack(ack, time.monotonic())
        except Fenced as error:
            self._shipping.leadership.superseded(self.store_id, error.epoch, written=0)
            raise
        if moved:
            self._shipping.on_ack(self, ack)
        if self._heeds_commits or sender.wants_heartbeat:
            self._signal.set()

    def _on_confirm(self, message: Confirm) -> None:
        sender, progress = self._sender, self.progress
        if sender is None or progress is None:
            raise ProtocolError("an answer before the join")
        if message.promised_epoch > sender.epoch:
            self._shipping.leadership.superseded(self.store_id, message.promised_epoch, written=0)
            return
        progress.last_heard = time.monotonic()
        self._shipping.confirming.on_confirm(self, message.round)

    def _on_credit(self, credit: Credit) -> None:
        if self._sender is None:
            raise ProtocolError("credit before the join")
        with self._lock:
            self._sender.on_credit(credit.bytes_granted, time.monotonic())
        self._signal.set()

    def _on_hello(self, hello: Hello) -> None:
        if self.hello is not None:
            raise ProtocolError("a second Hello in one stream")
        self.progress = Progress(
            store_id=hello.store_id,
            name=hello.name,
            address=hello.address,
            voter=hello.voter,
            last_heard=time.monotonic(),
        )
        self.hello = hello
        refused = refusal(hello, self._view()) or self._shipping.followers.admit(self)
        if refused is not None:
            self.end(refused)
            return
        self._shipping.leadership.heard(hello.store_id, max(hello.promised_epoch, hello.last.epoch))
        self.proceed()

    def _view(self) -> LogView:
        engine, leadership = self._engine, self._shipping.leadership
        log = engine.committer.log
        return LogView(
            store_id=engine.home.store_id,
            name=engine.home.name,
            lineage=engine.home.lineage,
            branch=engine.branch,
            ancestors=tuple(branch for _, branch in engine.branches[:-1]),
            epoch=leadership.epoch,
            fenced=leadership.fenced or leadership.forced,
            first=log.first,
            last=log.tail.offset,
            epochs=engine.epochs,
            primary_address=self._shipping.node.primary_address,
        )

    def _join(self, hello: Hello) -> None:
        view = self._view()
        plan = plan_join(hello, view)
        if isinstance(plan, Continue):
            plan = self._check_running(plan, hello, view)
        elif isinstance(plan, Truncate | NeedBootstrap):
            plan = self._check_loss(hello, view) or plan
        if isinstance(plan, Superseded):
            self._shipping.leadership.superseded(
                hello.store_id, plan.epoch, written=hello.last.epoch, follows=True
            )
            self.end(Refused(reason="superseded", message=f"epoch {plan.epoch} is newer", epoch=plan.epoch))
        elif isinstance(plan, Continue):
            self._welcome(plan, hello)
        else:
            if isinstance(plan, NeedBootstrap):
                self._shipping.reserve(self)
            self._shipping.followers.replace_copy(self)
            self._outbox.append(plan)
            self._last_message = True  # after a Truncate or a bootstrap the follower opens a new stream
            self._signal.set()

    def _check_loss(self, hello: Hello, view: LogView) -> Refused | None:
        if self._shipping.leadership.forced or not self._engine.configuration.synchronous:
            return None
        refused = check_loss(hello, view)
        if refused is not None:
            self._shipping.complain(refused.message)
        return refused

    def _check_running(self, plan: Continue, hello: Hello, view: LogView) -> Continue | NeedBootstrap:
        try:
            running = self._engine.committer.log.running_at(plan.at.offset)
        except LogTrimmed:
            return NeedBootstrap(first=view.first, reason="trimmed")
        return check_running(plan, hello, running, view)

    def _welcome(self, plan: Continue, hello: Hello) -> None:
        engine, options = self._engine, self._options
        assert self.progress is not None
        features: tuple[str, ...] = ()
        if PROBES in hello.features:
            features, self._probes = (PROBES,), True
        if options.compression == "zstd" and "zstd" in hello.features:
            features, self._compress = (*features, "zstd"), compressor()
        now = time.monotonic()
        epoch = self._shipping.leadership.epoch
        self.progress.join(plan.at, hello.credit_bytes, epoch, now)
        welcome = Welcome(
            lineage=engine.home.lineage,
            branch=engine.branch,
            store_id=engine.home.store_id,
            name=engine.home.name,
            epoch=epoch,
            protocol=plan.protocol,
            features=features,
            heartbeat_interval_ms=round(options.heartbeat_interval_s * 1000),
            last=plan.at,
        )
        self._sender = Sender(
            self.progress,
            epoch=epoch,
            segment_bytes_max=options.segment_bytes_max,
            heartbeat_interval_s=options.heartbeat_interval_s,
            heartbeat_timeout_s=options.heartbeat_timeout_s,
            linger_s=self._shipping.linger_s,
            commit_linger_s=COMMIT_LINGER_S,
            now=now,
        )
        # Once the Welcome is in the outbox, the reader may get an ack, which must find this stream among those that
        # count, and the sender may ship.
        self._shipping.joined(self, plan.at.offset)
        self._outbox.append(welcome)
        self._feeding = True
        self._signal.set()

    def on_closed(self, error: Exception | None) -> None:
        with self._joining:
            self._ended = True
            if self.progress is not None and self.progress.state is not State.GONE:
                self.progress.enter(State.GONE)
        self._shipping.left(self, error)
        self._signal.set()

    # -- the sender --------------------------------------------------------------------------------

    def next_message(self) -> FromPrimary | None:
        while not self._ended:
            if self._outbox:
                return self._outbox.popleft()
            if self._last_message:
                return None
            if not self._feeding or self._sender is None:
                if not self._await_join():
                    return None
                continue
            if self._probes and self._shipping.followers.rounds.wanted > self._probed:
                self._probed = self._shipping.confirming.probing()
                return Probe(epoch=self._sender.epoch, round=self._probed)
            message = self._step(self._sender)
            if message is not None:
                return message
        return None

    def _await_join(self) -> bool:
        """Wait for the Hello, or for the epoch; False when the follower says nothing."""
        now, timeout = time.monotonic(), self._options.heartbeat_timeout_s
        progress = self.progress
        heard = self._opened_s if progress is None else progress.last_heard
        if now - heard >= timeout:
            return False
        if progress is None:
            self._signal.wait(heard + timeout - now)
        elif not self._signal.wait(self._options.heartbeat_interval_s) and self._asked_epoch:
            # Asked again now and then: both sides see that the other one lives.
            self._outbox.append(Fence(epoch=self._asked_epoch))
        return True

    def _step(self, sender: Sender) -> FromPrimary | None:
        """What the sender wants next; ``None`` after a wait."""
        engine = self._engine
        now = time.monotonic()
        with self._lock:
            # Before ``committed`` is read: a commit after that wakes us.
            self._heeds_commits = now >= sender.tell_at
            hurry, self._hurry = self._hurry, False
            sender.linger_s = self._shipping.linger_s
            stamp = sender.stamp_us
            committed = engine.committer.committed
            last = self._shipping.shippable()
            step = sender.next(now, last, committed, hurry=hurry)
            if hurry and sender.progress.in_flight_bytes:
                self._hurry = True  # until it has confirmed what is on its way
                self._heeds_commits = True
        match step:
            case SendSegment():
                return self._segment(sender, step, committed)
            case SendHeartbeat():
                return self._heartbeat(sender, now, last, committed, stamp)
            case Dead(reason):
                raise ProtocolError(reason)
            case Wait(until, gathering):
                self._gathering = gathering  # what moved since we looked goes with what is sent at ``until``
                self._signal.wait(until - now)
                self._gathering = False
        return None

    def _segment(self, sender: Sender, step: SendSegment, committed: int) -> FromPrimary:
        try:
            run = self._engine.committer.log.read(step.after + 1, step.bytes_max)
        except LogTrimmed as error:
            self._shipping.reserve(self)
            self._last_message = True
            return NeedBootstrap(first=error.first, reason="trimmed")
        assert run is not None
        with self._lock:
            sender.sent_segment(run.first, run.last, len(run.data), time.monotonic(), committed)
        bytes_max = max(self._options.segment_bytes_max, -(-len(run.data) // PARTS_MAX))
        if run.first == run.last and len(run.data) > bytes_max:
            self._outbox.extend(self._parts(run, sender.epoch, committed, bytes_max))
            return self._outbox.popleft()
        return self._pack(run, run.data, sender.epoch, committed, 0, 1, run.last < self._engine.tail.offset)

    def _parts(self, run: Run, epoch: int, committed: int, size: int) -> list[Segment]:
        pieces = [run.data[i : i + size] for i in range(0, len(run.data), size)]
        more = run.last < self._engine.tail.offset
        return [
            self._pack(run, piece, epoch, committed, i, len(pieces), more or i < len(pieces) - 1)
            for i, piece in enumerate(pieces)
        ]

    def _pack(
        self, run: Run, data: bytes, epoch: int, committed: int, part: int, parts: int, more: bool
    ) -> Segment:
        compressed = False
        if self._compress is not None and len(data) >= COMPRESS_BYTES_MIN:
            smaller = self._compress(data)
            if len(smaller) < len(data):
                data, compressed = smaller, True
        return Segment(
            epoch=epoch,
            first=run.first,
            last=run.last,
            data=data,
            committed=committed,
            part=part,
            parts=parts,
            compressed=compressed,
            more=more,
        )

    def _heartbeat(self, sender: Sender, now: float, last: int, committed: int, stamp: int) -> Heartbeat:
        progress = self.progress
        assert progress is not None
        with self._lock:
            sender.sent_heartbeat(now, committed)
        slots: tuple[SlotState, ...] = ()
        if now - self._slots_told_s >= self._options.heartbeat_interval_s / 2:
            self._slots_told_s = now
            slots = self._shipping.slot_states()
        return Heartbeat(
            epoch=sender.epoch,
            last=last,
            committed=committed,
            stamp_us=stamp,
            time_us=time.time_ns() // 1000,
            slots=slots,
            path=(self._engine.home.name,) if self._engine.home.name else (),
            behind_bytes=self._engine.committer.log.bytes_after(progress.sent) + progress.in_flight_bytes,
        )
