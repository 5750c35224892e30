"""Virtual time, and the clocks that nodes read instead of it."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

__all__ = ["Clock", "Time"]

Do = Callable[[], None]


class Time:
    """The queue of everything that is going to happen, in the order in which it does."""

    __slots__ = ("_number", "_queue", "now", "steps")

    def __init__(self, start: float = 100.0) -> None:
        self.now = start
        """Seconds of true time, which no node can read."""
        self.steps = 0
        self._number = 0
        self._queue: list[tuple[float, int, Do]] = []

    def after(self, seconds: float, do: Do) -> None:
        self._number += 1  # what is due at the same moment happens in the order of the calls
        heappush(self._queue, (self.now + seconds, self._number, do))

    def step(self, until: float) -> bool:
        """Let the next thing happen; False (and it is ``until``) when nothing does before."""
        if not self._queue or self._queue[0][0] > until:
            self.now = max(self.now, until)
            return False
        self.now, _, do = heappop(self._queue)
        self.steps += 1
        do()
        return True


class Clock:
    """A node's clocks: a monotonic one that runs too fast or too slow and may jump ahead (a suspended
    machine), and a wall clock that jumps anywhere."""

    __slots__ = ("_ahead", "_at", "_time", "_wall", "rate")

    def __init__(self, time: Time, *, start: float = 0.0, rate: float = 1.0) -> None:
        self._time = time
        self._at = time.now
        self._ahead = start
        self._wall = 0.0
        self.rate = rate
        """Seconds of this clock per second of true time."""

    @property
    def now(self) -> float:
        """The monotonic clock, in seconds of its own."""
        return self._ahead + (self._time.now - self._at) * self.rate

    @property
    def now_us(self) -> int:
        return int(self.now * 1e6)

    @property
    def wall_us(self) -> int:
        return int((1.8e9 + self.now + self._wall) * 1e6)

    def jump(self, seconds: float) -> None:
        """The monotonic clock moves ahead at once; ``seconds`` is not negative."""
        self._ahead += seconds

    def jump_wall(self, seconds: float) -> None:
        self._wall += seconds

    def true_s(self, seconds: float) -> float:
        """How long ``seconds`` of this clock take."""
        return max(0.0, seconds) / self.rate
