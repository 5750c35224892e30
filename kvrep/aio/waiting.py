"""What the tasks of one event loop wait for, and how other threads tell them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kvrep.storage.write import Write

__all__ = ["LoopWaits"]

R = TypeVar("R")
LOOK_UP_S = 0.25
"""How often those who wait are looked after: deadlines, and a leader that a Ctrl-C ended half-way."""


class LoopWaits:
    """One per loop that uses a store; an inbox for the writes of its tasks.

    One timer serves all deadlines, one ``call_soon_threadsafe`` all writes that end together. All methods but
    :meth:`deliver`, :meth:`tell` and :meth:`stop` belong to the loop's thread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, committed: Callable[[], int], kick: Callable[[], None]
    ) -> None:
        self.loop = loop
        self._committed = committed
        self._kick = kick
        self._waits: dict[Write, tuple[asyncio.Future[None], float]] = {}
        # Filled by any thread, emptied on the loop; both by single steps of a deque.
        self._mail: deque[Write] = deque()
        self._expected = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = float("inf")

    def __contains__(self, write: Write) -> bool:
        return write in self._waits

    def wait(self, write: Write, deadline_s: float) -> asyncio.Future[None]:
        """A future that ends when ``write``, whose inbox this is, is done or ``deadline_s`` has passed."""
        future: asyncio.Future[None] = self.loop.create_future()
        self._waits[write] = (future, deadline_s)
        if deadline_s < self._timer_s:
            self._set_timer(deadline_s)
        return future

    def forget(self, write: Write) -> None:
        """Nobody waits for it after all."""
        self._waits.pop(write, None)

    # -- told by other threads ---------------------------------------------------------------------

    def deliver(self, writes: Sequence[Write]) -> None:
        """These writes are done. Any thread."""
        self._mail.extend(writes)
        if not self._expected:  # set back before the mail is opened, so nothing is left lying
            self._expected = True
            self.call(self._open_mail)

    def tell(self, future: asyncio.Future[None]) -> None:
        """End ``future``. Any thread."""
        self.call(_end, future)

    def settle(self, future: asyncio.Future[R], result: R | None, error: BaseException | None) -> None:
        """End ``future`` with a result or an error. Any thread."""
        self.call(_settle, future, result, error)

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Call ``callback`` on the loop. Any thread."""
        try:
            self.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass  # the loop is closed: nobody waits there any more

    def _open_mail(self) -> None:
        self._expected = False
        mail, waits = self._mail, self._waits
        while mail:
            wait = waits.pop(mail.popleft(), None)
            if wait is not None and not wait[0].done():
                wait[0].set_result(None)

    # -- deadlines ---------------------------------------------------------------------------------

    def _set_timer(self, deadline_s: float) -> None:
        now = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = min(deadline_s, now + LOOK_UP_S)
        self._timer = self.loop.call_later(max(0.0, self._timer_s - now), self._look_up)

    def _look_up(self) -> None:
        """End the waits that are over; finish what an interrupted leader left."""
        self._timer, self._timer_s = None, float("inf")
        now, committed = time.monotonic(), self._committed()
        nearest = float("inf")
        for write, (future, deadline_s) in list(self._waits.items()):
            if not write.done and 0 < write.offset <= committed:
                write.complete()
            if write.done:
                continue  # it is in the mail
            if future.done():
                del self._waits[write]  # its task was cancelled; the write goes on
            elif deadline_s <= now:
                del self._waits[write]
                future.set_result(None)
            else:
                nearest = min(nearest, deadline_s)
        if self._waits:
            self._kick()
            self._set_timer(nearest)

    def stop(self) -> None:
        """The store is closed: end every wait and the timer. Any thread."""
        self.call(self._stop)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_s = None, float("inf")
        for future, _ in self._waits.values():
            _end(future)
        self._waits.clear()


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
