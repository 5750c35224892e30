"""One node: a process that comes and goes, its disk that stays, and the role it has.

The shell that the runtime is, in one thread: it carries out what the decisions say, and decides nothing
itself. What a lock protects there happens in one step here; what waits there is scheduled here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrep.model.configuration import Configuration, in_force
from kvrep.model.position import Position
from kvrep.replication.election import Standing
from kvrep.replication.messages import Hello, Promise, Refused
from kvrep.replication.promises import Verdict, judge
from kvrep.testing.simulate.disk import Disk, Entry

if TYPE_CHECKING:
    from kvrep.testing.simulate.clock import Clock
    from kvrep.testing.simulate.electing import Electing
    from kvrep.testing.simulate.feeding import Feeding
    from kvrep.testing.simulate.following import Following
    from kvrep.testing.simulate.network import Stream
    from kvrep.testing.simulate.world import World

__all__ = ["Node", "StorageError"]

Do = Callable[[], None]


class StorageError(Exception):
    """The disk refused; ``final``: this process must not store anything any more."""

    def __init__(self, text: str, *, final: bool) -> None:
        super().__init__(text)
        self.final = final


class Node:
    """``life`` grows at every start: what an earlier life had in mind does not happen."""

    def __init__(
        self, world: World, name: str, clock: Clock, *, witness: bool = False, voter: bool = True
    ) -> None:
        self.world = world
        self.name = name
        self.address = f"{name}:1"
        self.store_id = b"id-" + name.encode()
        self.witness = witness
        self.voter = voter
        """False: it was opened with voter=False, and only follows."""
        self.clock = clock
        self.disk = Disk()
        self.life = 0
        self.up = False
        self.paused = False
        self.held: list[Do] = []
        """What waits until a paused process goes on."""
        self.committed = 0
        """All through it is shown to readers."""
        self.rotten = False
        """What it holds was changed behind its back, until it gets a new copy."""
        self.failed = False
        """The disk failed: nothing is stored until the process is started again."""
        self.feeding: Feeding | None = None
        self.following: Following | None = None
        self.electing: Electing | None = None
        self.bootstrapping = False
        self.promoting = False
        """Somebody promotes it by hand: no other change of role comes between."""
        self._lead: deque[Do] | None = None
        """What waits for the lock that appends, promises and epoch starts take; ``None``: it is free."""
        self._rules: tuple[Configuration, tuple[Configuration, ...]] = (Configuration(), ())
        self._rules_of: object = None

    # -- the process -------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.clock.now

    def after(self, seconds: float, do: Do) -> None:
        """Do something ``seconds`` of our clock from now, in this life."""
        life = self.life

        def due() -> None:
            if self.life == life:
                self.run(due_now)

        def due_now() -> None:
            if self.life == life:
                do()

        self.world.time.after(self.clock.true_s(seconds), due)

    def run(self, do: Do) -> None:
        """Now, or when a paused process goes on."""
        if self.paused:
            self.held.append(do)
        else:
            do()

    def start(self) -> None:
        """Open the store; what was not synced is written again and synced first."""
        assert not self.up
        self.life += 1
        self.up, self.paused, self.held = True, False, []
        self.failed = self.bootstrapping = self.promoting = False
        self._lead = None
        self._rules_of = None
        self.committed = self.disk.recover()
        self.world.say(self, "starts, log to %s, committed %d, promised %d",
                       self.disk.last, self.committed, self.disk.promised)  # fmt: skip
        self.world.check.shows(self, self.committed)
        self.follow("" if self.world.elects or self is self.world.first else self.world.first.name)
        if self.world.elects:
            from kvrep.testing.simulate.electing import Electing

            self.electing = Electing(self)
            self.electing.tick()

    def crash(self, *, power: bool) -> None:
        """SIGKILL, or power loss: then what was not synced may be gone."""
        self.world.say(self, "loses power" if power else "is killed")
        if self.feeding is not None:
            self.feeding.stop(broken=True)
        if self.following is not None:
            self.following.stop()
        self.feeding = self.following = self.electing = None
        self.up = self.paused = False
        self.life += 1
        if power or self.failed or self.disk.eio:
            self.disk.lose_power(self.world.chance)
        self.disk.eio = False
        self.disk.slow = 1.0

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        held, self.held = self.held, []
        for do in held:
            self.after_pause(do)

    def after_pause(self, do: Do) -> None:
        life = self.life

        def again() -> None:
            if self.life == life:
                self.run(do)

        self.world.time.after(self.world.chance.random() * 0.0005, again)

    # -- what it is --------------------------------------------------------------------------------

    @property
    def primary_epoch(self) -> int:
        """The epoch in which this node is primary; 0 when it is not."""
        feeding = self.feeding
        return feeding.epoch if feeding is not None and feeding.leading else 0

    @property
    def rules(self) -> tuple[Configuration, tuple[Configuration, ...]]:
        """The configuration in effect, and those that may be, too."""
        logged = self.disk.configurations
        of = (len(logged), logged[-1], self.committed >= logged[-1][0])
        if of != self._rules_of:
            effective, proposed = in_force(logged, self.committed)
            self._rules = (effective, () if proposed is None else (proposed[1],))
            self._rules_of = of
        return self._rules

    @property
    def able(self) -> bool:
        """Whether it may become primary, and its promise says what it has stored."""
        return not (self.witness or self.bootstrapping or self.failed or self.disk.end < self.disk.vote_floor)

    def standing(self) -> Standing:
        disk = self.disk
        effective, proposed = self.rules
        epoch = self.primary_epoch
        return Standing(
            store_id=self.store_id,
            name=self.name,
            address=self.address,
            lineage=disk.lineage,
            rules=(effective, *proposed) if effective.voters else (),
            promised_epoch=disk.promised,
            last=disk.last,
            lowered=disk.lowered,
            primary_epoch=epoch if epoch >= disk.promised else 0,
            able=self.able,
            witness=self.witness,
        )

    def holds_now(self, epoch: int) -> Promise:
        """What the log holds, under a promise of ``epoch``."""
        disk = self.disk
        if self.witness:
            return Promise.without_data(epoch, disk.lowered)
        return Promise(
            epoch=epoch,
            last=disk.last,
            committed=self.committed,
            epochs=disk.epochs,
            lowered=disk.lowered,
        )

    def hello(self) -> Hello:
        """What it is and holds, all of it synced first: a join counts as an ack of it."""
        self.sync()
        disk = self.disk
        return Hello(
            store_id=self.store_id,
            name=self.name,
            lineage=disk.lineage,
            branch=disk.lineage if disk.end else b"",
            voter=self.voter,
            address=self.address,
            promised_epoch=disk.promised,
            last=disk.last,
            running=disk.running,
            applied=disk.copy.applied.offset,
            committed=self.committed,
            epochs=disk.epochs,
            credit_bytes=self.world.settings.credit_bytes,
        )

    # -- storage -----------------------------------------------------------------------------------

    def sync_s(self) -> float:
        """How long a sync takes now."""
        return (0.0002 + self.world.chance.random() * 0.001) * self.disk.slow

    def sync(self, through: int | None = None) -> None:
        """Raises :class:`StorageError` when the disk failed, now or before: it is never retried."""
        if not self.failed:
            try:
                self.disk.sync(through)
                return
            except OSError as error:
                self.fail(error)
        raise StorageError("the disk failed", final=True)

    def append(self, data: bytes) -> list[Entry]:
        """Whole records, as bytes. Raises :class:`StorageError`, or ``ProtocolError`` when they do not join."""
        if self.failed:
            raise StorageError("the disk failed", final=True)
        try:
            added = self.disk.append(data, self.committed)
        except OSError as error:
            raise StorageError(f"nothing was logged: {error.strerror}", final=False) from error
        self.world.check.wrote(self, added)
        return added

    def cut(self, to: int, reason: str) -> None:
        """Save what is dropped (not modelled) and cut the log; :class:`StorageError` below what LMDB holds."""
        disk = self.disk
        if to < disk.copy.applied.offset:
            raise StorageError(f"cannot cut the log at {to}: LMDB holds {disk.copy.applied}", final=False)
        self.world.say(self, "cuts its log from %s to %d: %s", disk.last, to, reason)
        self.world.check.dropped(self, to, disk.entries)
        disk.cut(to)
        self.committed = min(self.committed, to)
        self._rules_of = None

    def commit_through(self, offset: int) -> None:
        """Show everything through ``offset``, as far as the log goes."""
        offset = min(offset, self.disk.end)
        if offset > self.committed:
            self.committed = offset
            self.world.check.shows(self, offset)

    def flush(self) -> None:
        """Take what is committed over into LMDB."""
        if self.failed or self.witness or not self.up:
            return
        through = self.flush_through()
        if through <= self.disk.copy.applied.offset:
            return
        try:
            self.sync()
            self.disk.flush(through)
        except (OSError, StorageError) as error:
            self.world.say(self, "cannot flush: %s", error)

    def flush_through(self) -> int:
        """Only what is committed; with acks=0, a primary waits for a voter that has it, too."""
        if not self.world.synchronous and self.feeding is not None:
            return min([self.committed, *(s.progress.synced for s in self.feeding.joined.values())])
        return self.committed

    def fail(self, error: OSError) -> None:
        """EIO is final for this process."""
        if not self.failed:
            self.failed = True
            self.world.say(self, "stores nothing any more: %s", error.strerror)

    # -- promises ----------------------------------------------------------------------------------

    def with_lead(self, do: Do) -> None:
        """Now, or when nobody appends an epoch start any more."""
        if self._lead is None:
            do()
        else:
            self._lead.append(do)

    def take_lead(self) -> None:
        self._lead = deque()

    def leave_lead(self) -> None:
        waiting, self._lead = self._lead, None
        for do in waiting or ():
            self.with_lead(do)

    def give(self, epoch: int, to: bytes) -> bool:
        """Promise durably; False when that may not be. ``StorageError``: nothing was promised."""
        disk = self.disk
        verdict = judge(epoch, to, promised=disk.promised, promised_to=disk.promised_to)
        if verdict is Verdict.REFUSED:
            return False
        if verdict is Verdict.NEW:
            try:
                self.store_promise(epoch, to)
            except OSError as error:
                raise StorageError(
                    f"the promise could not be stored: {error.strerror}", final=False
                ) from error
        self.world.check.promises(self, epoch, to)
        return True

    def store_promise(self, epoch: int, to: bytes) -> None:
        self.disk.promise(epoch, to)

    def promise(self, epoch: int, to: bytes) -> Promise | None:
        """As the coordinator asks for it, under the lock; ``None`` when it may not be given."""
        self.sync()
        if not self.give(epoch, to):
            return None
        self.world.say(self, "promises epoch %d", epoch)
        if to != self.store_id:
            self.promised(epoch)
        return self.holds_now(epoch)

    def lower(self, position: Position, asker: Node) -> bool:
        """Agree that from ``position`` on fewer copies are enough: a promise of its epoch, too."""
        disk = self.disk
        try:
            if position.epoch > disk.promised:
                self.give(position.epoch, asker.store_id)
                self.promised(position.epoch, asker.name)
            if position.epoch < disk.promised:
                return False
            disk.lower(position)
        except (OSError, StorageError):
            return False
        self.world.say(self, "agrees that from %s on fewer copies are enough", position)
        return True

    def promised(self, epoch: int, to: str = "") -> None:
        """We have promised ``epoch`` to another node: what we do below it is over."""
        if self.feeding is not None:
            self.feeding.promised_away(epoch)
        if self.following is not None:
            self.following.promised(epoch, to)

    # -- roles -------------------------------------------------------------------------------------

    def follow(self, name: str) -> None:
        """Be a follower: of that node, or of whoever turns out to be primary."""
        if self.witness:
            return
        if self.feeding is not None:
            self.feeding.stop(broken=False)
            self.feeding = None
        if self.following is None:
            from kvrep.testing.simulate.following import Following

            self.following = Following(self)
            self.following.start(name)
        elif name:
            self.following.go_to(name)

    def on_stream(self, stream: Stream, hello: Hello) -> None:
        """Another node has opened a stream to this one."""
        if self.feeding is not None:
            self.feeding.open(stream, hello)
            return
        address = self.following.primary_address if self.following is not None else ""
        stream.accept(_Nobody())
        stream.to_follower(
            Refused(reason="not-primary", message=f"{self.name} is a follower", primary_address=address)
        )
        stream.end_by_primary(broken=False)


class _Nobody:
    def on_message(self, message: object) -> None:
        pass

    def on_end(self, why: object) -> None:
        pass
