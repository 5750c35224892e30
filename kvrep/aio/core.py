"""What all objects of one asyncio store share: its node, its loops, its few threads."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

from kvrep.aio.waiting import LOOK_UP_S, LoopWaits
from kvrep.errors import ClosedError, Error, Overloaded, StaleRead, again
from kvrep.model.configuration import Acks
from kvrep.model.position import Position
from kvrep.runtime.forwarding import GRACE_S, Forward, is_elsewhere
from kvrep.runtime.interrupts import carry, logged_at
from kvrep.runtime.node import Node
from kvrep.runtime.writing import check_asked
from kvrep.storage.write import Write, complete_all

__all__ = ["Core", "Threads"]

R = TypeVar("R")
PROBED_S = 0.005
"""How often a read that waits for a fresher copy looks again."""
SLOWED_S = 0.004
"""How much a task is slowed per share of the memtables' bound beyond the half: 0 to 2 ms."""
ROOM_S, ROOM_MAX_S = 0.005, 0.25
"""How often a task that waits for the flush looks again: alone, and at the most."""


def _nothing() -> None:
    """Nobody waits yet."""


class Threads:
    """The threads of one store, made when first needed: one reads, two make calls that take longer."""

    def __init__(self, label: str) -> None:
        self.reads = ThreadPoolExecutor(1, f"kvrep-aio-read-{label}")
        self.calls = ThreadPoolExecutor(2, f"kvrep-aio-call-{label}")

    def end(self, *, wait: bool = True) -> None:
        """Take no more work; with ``wait`` return when the threads are gone."""
        for pool in (self.reads, self.calls):
            pool.shutdown(wait=wait)


class _Questions:
    """Of one loop: whether its reads are confirmed just now, and who waits for the next time."""

    def __init__(self) -> None:
        self.asking = False
        self.waiting: list[tuple[asyncio.Future[None], float]] = []


class Core:
    """One per open store. Its coroutines may run on any loop of any thread."""

    def __init__(self, node: Node, threads: Threads) -> None:
        self.node = node
        self.threads = threads
        # Protects everything below. Held for a few instructions, never during I/O.
        self._lock = threading.Lock()
        self._loops: dict[asyncio.AbstractEventLoop, LoopWaits] = {}
        self._watches: dict[asyncio.Future[None], tuple[int, LoopWaits]] = {}
        self._early: list[Write] = []
        self._early_bytes = 0
        self._beginning = False
        self._closing: Future[None] | None = None
        self._closer: threading.Thread | None = None
        self._crowd = 0
        self._questions: dict[asyncio.AbstractEventLoop, _Questions] = {}
        """Each belongs to its loop."""
        node.moves.on_move = self._on_moved

    def here(self) -> LoopWaits:
        """The waits of the running loop."""
        loop = asyncio.get_running_loop()
        waits = self._loops.get(loop)
        return waits if waits is not None else self._meet(loop)

    def _meet(self, loop: asyncio.AbstractEventLoop) -> LoopWaits:
        committer = self.node.engine.committer
        waits = LoopWaits(loop, lambda: committer.committed, committer.kick)
        with self._lock:
            for old in [known for known in self._loops if known.is_closed()]:
                del self._loops[old]
                self._questions.pop(old, None)
            self._loops[loop] = waits
        return waits

    # -- writing -----------------------------------------------------------------------------------

    async def commit(
        self,
        write: Write,
        timeout_s: float | None,
        acks: Acks | None = None,
        level: Literal["synced", "visible"] | None = None,
    ) -> Position:
        """Order a write and wait for its outcome, as :meth:`Writing.commit` does for threads."""
        node = self.node
        deadline_s = time.monotonic() + (node.ack_timeout_s if timeout_s is None else timeout_s)
        more = acks is not None or level is not None
        if node.forwards_now():
            if more:
                check_asked(acks, level)
            return await self._forward(write, deadline_s, acks, level)
        try:
            await self._order_and_wait(write, deadline_s, acks, level)
        except Error as error:
            if node.forwarder is None or not is_elsewhere(error):
                raise
            return await self._forward(write, deadline_s, acks, level)
        if write.error is not None or not write.done:
            if node.forwarder is not None and is_elsewhere(write.error):
                return await self._forward(write, deadline_s, acks, level)
            self._raise_outcome(write)
        if more:
            await self.await_more(write.position, acks, level, deadline_s)
        return Position(write.epoch, write.offset)

    async def await_more(
        self,
        position: Position,
        acks: Acks | None,
        level: Literal["synced", "visible"] | None,
        deadline_s: float,
    ) -> None:
        """As :meth:`Writing.await_more`, told by the acks instead of holding a thread."""
        shipping, waits = self.node.shipping, self.here()
        if shipping is None:
            return
        followers = shipping.followers
        with followers.wanting(position, acks, level or "synced", _nothing) as wanted:
            while True:
                told: asyncio.Future[None] = waits.loop.create_future()
                wanted.tell = partial(waits.tell, told)
                if followers.met(wanted):
                    return
                left = deadline_s - time.monotonic()
                if left <= 0 or followers.closed:
                    raise followers.too_few(wanted)
                try:
                    await asyncio.wait((told,), timeout=left)
                except asyncio.CancelledError as cancelled:
                    carry(cancelled, position)
                    raise

    async def _order_and_wait(
        self, write: Write, deadline_s: float, acks: Acks | None, level: Literal["synced", "visible"] | None
    ) -> None:
        node = self.node
        if acks is not None or level is not None:
            node.writes.check_more(acks, level)
        if node.engine.flusher.behind >= 0.5:
            await self.slow_down(deadline_s)
        waits = self._loops.get(asyncio.get_running_loop()) or self.here()
        write.inbox = waits
        self.order(write)
        try:
            await waits.wait(write, deadline_s)
        except asyncio.CancelledError as cancelled:
            carry(cancelled, logged_at(write))
            raise

    async def _forward(
        self, write: Write, deadline_s: float, acks: Acks | None, level: Literal["synced", "visible"] | None
    ) -> Position:
        """A write that this node did not log, because another one is, or will be, primary."""
        forwarder = self.node.forwarder
        assert forwarder is not None
        return await self.forward(forwarder.make(write.payload, write.size, deadline_s, acks, level))

    async def forward(self, item: Forward) -> Position:
        """Have the primary execute it, and wait until reads here show it."""
        forwarder = self.node.forwarder
        assert forwarder is not None
        waits = self.here()
        item.inbox = waits
        forwarder.order(item)
        try:
            await waits.wait(item, item.deadline_s + GRACE_S)
        except asyncio.CancelledError as cancelled:
            carry(cancelled, forwarder.leave(item))
            raise
        return forwarder.outcome(item)

    def submit(self, write: Write) -> Write:
        """Order a write whose outcome somebody may ask for later; returns what to ask.

        Raises refusals; waits for nothing.
        """
        forwarder = self.node.forwarder
        if forwarder is None:
            self._check_room()
            write.inbox = self.here()
            self.order(write)
            return write
        item = forwarder.make(write.payload, write.size, self.node.deadline(None))
        item.inbox = self.here()
        if not self.node.forwards_now():
            try:
                self._check_room()
                self.order(write)
            except Error as error:
                if not is_elsewhere(error):
                    raise
            else:
                forwarder.follow(item, write)
                return item
        forwarder.order(item)
        return item

    def _check_room(self) -> None:
        if self.node.engine.flusher.behind >= 1.0:
            raise self._no_room()

    def order(self, write: Write) -> None:
        """Put a write in order and have it written. Never blocks; raises what refuses it."""
        engine = self.node.engine
        committer = engine.committer
        if self._beginning or committer.epoch == 0:
            self._order_early(write)
            return
        engine.writable()
        committer.order(write)
        committer.kick()

    def _order_early(self, write: Write) -> None:
        """Before this node has begun to write, asking whether it may can take a promise on the disk."""
        with self._lock:
            if self._closing is not None:
                raise self.closed_error()
            if self._early_bytes + write.size > self.node.options.uncommitted_bytes_max and self._early:
                raise Overloaded("more is waiting for the first write than uncommitted_bytes_max allows")
            self._early.append(write)
            self._early_bytes += write.size
            if self._beginning:
                return
            self._beginning = True
            self.threads.calls.submit(self._begin)

    def _begin(self) -> None:
        """On a thread: ask whether this node may write, and order what came first."""
        engine = self.node.engine
        error: Error | None = None
        try:
            engine.writable()
        except Error as refused:
            error = refused
        except Exception as failed:
            error = Error(f"this node could not begin to write: {failed}")
            error.__cause__ = failed
        refusals: list[tuple[Write, Error]] = []  # told once the lock is free
        with self._lock:  # until it is let go, nobody can come between
            early, self._early, self._early_bytes = self._early, [], 0
            for write in early if error is None else ():
                try:
                    engine.committer.order(write)
                except Error as refusal:
                    refusals.append((write, refusal))
            self._beginning = False
        engine.committer.kick()
        if error is not None:
            complete_all(early, error)
        for write, reason in refusals:
            write.complete(reason)

    async def finish(self, write: Write, deadline_s: float) -> Position:
        """Wait for a write that is in order already."""
        if not write.done:
            try:
                await self._until_done(write, deadline_s)
            except asyncio.CancelledError as cancelled:
                carry(cancelled, logged_at(write))
                raise
        if type(write) is Forward and self.node.forwarder is not None:
            return self.node.forwarder.outcome(write)
        if write.error is not None or not write.done:
            self._raise_outcome(write)
        return Position(write.epoch, write.offset)

    async def await_record(self, record: Any, deadline_s: float) -> None:
        """Wait until a record that a transaction has read is committed."""
        if type(record) is Write:
            await self.finish(record, deadline_s)
        else:
            left = max(0.0, deadline_s - time.monotonic())
            await self.wait_for(Position(record.epoch, record.offset), left)

    async def _until_done(self, write: Write, deadline_s: float) -> None:
        waits = self.here()
        if write.inbox is None:
            write.inbox = waits
        if write.inbox is waits and write not in waits:
            future = waits.wait(write, deadline_s)
            if write.done:  # looked at last: whoever completes a write looks at its inbox last
                waits.forget(write)
            else:
                await future
            return
        # Somebody else waits for it, too.
        told: asyncio.Future[None] = waits.loop.create_future()
        write.when_done(lambda _: waits.tell(told))
        await asyncio.wait((told,), timeout=max(0.0, deadline_s - time.monotonic()))

    def _raise_outcome(self, write: Write) -> None:
        if not write.done and not write.offset:
            with self._lock:
                early = write in self._early
                if early:
                    self._early.remove(write)
                    self._early_bytes -= write.size
            if early:
                raise Overloaded("this node did not begin to write in time; nothing of it was written")
        self.node.writes.raise_outcome(write)

    async def slow_down(self, deadline_s: float) -> None:
        """Tasks that write are slowed as the flush falls behind, and stopped at the bound."""
        flusher = self.node.engine.flusher
        if flusher.behind < 1.0:
            await asyncio.sleep((flusher.behind - 0.5) * SLOWED_S)
            return
        self._crowd += 1
        try:
            while flusher.behind >= 1.0:
                left = deadline_s - time.monotonic()
                if left <= 0 or flusher.full is not None:
                    raise self._no_room()
                # The more there are, the more seldom each looks: a thousand tasks would keep the loop busy.
                await asyncio.sleep(min(left, ROOM_MAX_S, max(ROOM_S, self._crowd * 0.0002)))
        finally:
            self._crowd -= 1

    def _no_room(self) -> Error:
        full = self.node.engine.flusher.full
        if full is not None:
            return again(full)
        return Overloaded("writing is faster than the flush into LMDB (memtable_bytes_max)")

    # -- waiting for positions ---------------------------------------------------------------------

    async def wait_for(self, position: Position, timeout_s: float) -> None:
        """As :meth:`Freshness.wait_for`, told by every commit instead of holding a thread."""
        try:
            epoch, offset = position
        except (TypeError, ValueError):
            raise TypeError(f"expected a Position, not {type(position).__name__}") from None
        wanted = Position(epoch, offset)
        deadline_s = time.monotonic() + timeout_s
        node = self.node
        while not node.freshness.arrived(wanted):
            if node.engine.closed or self._closing is not None:
                raise self.closed_error()
            left = deadline_s - time.monotonic()
            if left <= 0:
                raise node.freshness.stale(wanted, timeout_s)
            # A position of an epoch that is not here yet may need records at or below its offset.
            await self._until_moved(max(offset, node.engine.view.last + 1), min(left, LOOK_UP_S))

    @property
    def withheld(self) -> bool:
        """Whether reads wait, because this primary has restarted and cannot tell yet what is committed."""
        return self.node.engine.view.withheld is not None

    async def revealed(self) -> None:
        """Wait for the end of that beside the loop. ``StaleRead`` after ``ack_timeout_s``."""
        wait = self.node.engine.view.withheld
        if wait is not None:
            await self.read(wait)

    async def freshen(self, max_staleness_s: float, timeout_s: float) -> None:
        """Before a read on a follower: have it ask its primary if this copy may be too old."""
        replaying = self.node.replaying
        if replaying is None or replaying.staleness_s() <= max_staleness_s:
            return
        deadline_s = time.monotonic() + timeout_s
        if replaying.connected:
            await self.call(replaying.probe)
        while (staleness_s := replaying.staleness_s()) > max_staleness_s:
            left = deadline_s - time.monotonic()
            if left <= 0 or not replaying.connected:
                self.node.freshness.need_following()
                raise StaleRead(
                    f"this copy may be {staleness_s:.3f} s old, {max_staleness_s:g} s are allowed",
                    staleness_s=staleness_s,
                    position=self.node.engine.committed_position,
                )
            await asyncio.sleep(min(left, PROBED_S))

    async def moved_beyond(self, shown: int, timeout_s: float) -> None:
        """Wait until more is visible than ``shown``, at most so long; :class:`ClosedError` at the end."""
        if self.node.engine.closed or self._closing is not None:
            raise self.closed_error()
        await self._until_moved(shown + 1, timeout_s)

    async def linearize(self, timeout_s: float | None) -> None:
        """As :meth:`Freshness.linearize`: those who ask while a question is under way share the next one."""
        waits = self.here()
        seconds = self.node.ack_timeout_s if timeout_s is None else timeout_s
        question = self._questions.get(waits.loop)
        if question is None:
            question = self._questions[waits.loop] = _Questions()
        future: asyncio.Future[None] = waits.loop.create_future()
        question.waiting.append((future, seconds))
        if not question.asking:
            self._ask(waits, question)
        try:
            await asyncio.wait_for(future, seconds + GRACE_S)
        except TimeoutError:
            raise StaleRead(
                "the primary did not confirm in time what is committed",
                position=self.node.engine.committed_position,
            ) from None

    def _ask(self, waits: LoopWaits, question: _Questions) -> None:
        """Ask once for all who wait now. On the loop."""
        asked, question.waiting = question.waiting, []
        question.asking = True
        longest = max(seconds for _, seconds in asked)

        def ended(error: BaseException | None) -> None:
            question.asking = False
            for future, _ in asked:
                if not future.done():
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(again(error) if isinstance(error, Error) else error)
            if question.waiting:
                self._ask(waits, question)

        def work() -> None:
            error: BaseException | None = None
            try:
                self.node.freshness.linearize(longest)
            except BaseException as failed:
                error = failed
            waits.call(ended, error)

        try:
            self._start(self.threads.calls, work)
        except Error as error:
            ended(error)

    async def _until_moved(self, offset: int, timeout_s: float) -> None:
        waits = self.here()
        future: asyncio.Future[None] = waits.loop.create_future()
        with self._lock:
            self._watches[future] = (offset, waits)
        try:
            if self.node.engine.view.last < offset:
                await asyncio.wait((future,), timeout=timeout_s)
        finally:
            with self._lock:
                self._watches.pop(future, None)

    def _on_moved(self) -> None:
        """Something was committed, or the node closes. Any thread."""
        if not self._watches:
            return
        last, closed = self.node.engine.view.last, self.node.engine.committer.closed is not None
        with self._lock:
            ready = [(f, waits) for f, (offset, waits) in self._watches.items() if offset <= last or closed]
            for future, _ in ready:
                del self._watches[future]
        for future, waits in ready:
            waits.tell(future)

    # -- threads -----------------------------------------------------------------------------------

    async def call(self, function: Callable[..., R], *args: object) -> R:
        """Run what may take long on a thread. Cancelling does not stop it."""
        return await self._run(self.threads.calls, function, *args)

    async def read(self, function: Callable[..., R], *args: object) -> R:
        """Run a step of a read on a thread."""
        return await self._run(self.threads.reads, function, *args)

    async def _run(self, pool: ThreadPoolExecutor, function: Callable[..., R], *args: object) -> R:
        waits = self.here()
        future: asyncio.Future[R] = waits.loop.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = function(*args)
            except BaseException as error:
                waits.settle(future, None, error)
            else:
                waits.settle(future, result, None)

        # Not asyncio.wrap_future: its two futures refer to each other, which keeps results alive.
        self._start(pool, work)
        return await future

    def _start(self, pool: ThreadPoolExecutor, function: Callable[..., R], *args: object) -> Future[R]:
        if self.node.engine.closed or self._closing is not None:
            raise self.closed_error()
        try:
            return pool.submit(function, *args)
        except RuntimeError:
            raise self.closed_error() from None

    async def acquire(self, take: Callable[[], R], give_back: Callable[[R], object]) -> R:
        """As :meth:`read`; what ``take`` returns after the task was cancelled is given back."""
        job = self._start(self.threads.reads, take)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if not job.cancel():
                job.add_done_callback(lambda done: done.exception() or give_back(done.result()))
            raise

    # -- the end -----------------------------------------------------------------------------------

    def closed_error(self) -> Error:
        closed = self.node.engine.committer.closed
        return again(closed) if isinstance(closed, ClosedError) else ClosedError("the store is closed")

    async def close(self, timeout_s: float | None) -> None:
        """Close the node on a thread of its own, end the others, return when all are gone."""
        if os.getpid() != self.node._pid:
            self.node.close(timeout_s)  # a forked child: there are no threads here, and nothing is ours
            return
        with self._lock:
            if self._closing is None:
                self._closing = Future()
                self._closer = threading.Thread(
                    target=self._close,
                    args=(self._closing, timeout_s),
                    name=f"kvrep-aio-close-{self.node.label}",
                )
                self._closer.start()
        closing, closer = self._closing, self._closer
        await asyncio.shield(asyncio.wrap_future(closing))
        assert closer is not None
        closer.join()  # it has nothing left to do

    def _close(self, closing: Future[None], timeout_s: float | None) -> None:
        try:
            self.node.close(timeout_s)
            self.threads.end()
            for waits in list(self._loops.values()):
                waits.stop()
        except BaseException as error:
            closing.set_exception(error)
        else:
            closing.set_result(None)
