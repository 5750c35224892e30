"""How late changes arrive, how fast, and when a backlog will be gone. Pure: the time is an argument."""

from __future__ import annotations

from collections import deque
from math import inf

__all__ = ["BUCKETS_S", "Delays", "Rate", "catch_up_s", "known"]

STEPS = 8
"""Buckets for each doubling: a percentile is at most 9 % above the truth."""
SMALLEST_S = 1e-4
_COUNT = STEPS * 34
"""Up to 0.1 ms * 2**34: 19 days."""
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
"""Of the histogram in Prometheus form."""


class _Window:
    """Counts of one stretch of time."""

    __slots__ = ("began_s", "counts", "total")

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.counts = [0] * (_COUNT + 1)
        self.total = 0


class Delays:
    """End-to-end delays: percentiles of the last one to two ``window_s``, and a histogram of all."""

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._now = _Window(-inf)
        self._before = _Window(-inf)
        self.histogram = [0] * (len(BUCKETS_S) + 1)
        """How many of all fell into each of BUCKETS_S, and above the last."""
        self.count = 0
        self.sum_s = 0.0

    def add(self, delay_s: float, now_s: float, count: int = 1) -> None:
        """``count`` changes took effect at ``now_s`` (monotonic), ``delay_s`` after their commit.

        Clocks of two machines differ: a delay below 0 counts as 0.
        """
        delay_s = max(0.0, delay_s)
        if now_s - self._now.began_s >= self._window_s:
            self._before = self._now if now_s - self._now.began_s < 2 * self._window_s else _Window(now_s)
            self._now = _Window(now_s)
        self._now.counts[_bucket(delay_s)] += count
        self._now.total += count
        self.histogram[next((i for i, b in enumerate(BUCKETS_S) if delay_s <= b), len(BUCKETS_S))] += count
        self.count += count
        self.sum_s += delay_s * count

    def percentile(self, percent: float, now_s: float) -> float | None:
        """Of the recent delays, in seconds, rounded up; ``None`` when there were none."""
        windows = [w for w in (self._now, self._before) if now_s - w.began_s < 2 * self._window_s]
        total = sum(w.total for w in windows)
        if not total:
            return None
        wanted = max(1, -(-int(total * percent) // 100))
        seen = 0
        for bucket in range(_COUNT + 1):
            seen += sum(w.counts[bucket] for w in windows)
            if seen >= wanted:
                return _upper(bucket)
        raise AssertionError("the counts add up to the total")


def _bucket(delay_s: float) -> int:
    """0: up to SMALLEST_S; then STEPS to each doubling."""
    if delay_s <= SMALLEST_S:
        return 0
    ratio = delay_s / SMALLEST_S
    doublings = int(ratio).bit_length() - 1
    step = int((ratio / (1 << doublings) - 1) * STEPS)
    return min(1 + doublings * STEPS + step, _COUNT)


def _upper(bucket: int) -> float:
    if bucket == 0:
        return SMALLEST_S
    doublings, step = divmod(bucket - 1, STEPS)
    upper: float = SMALLEST_S * (1 << doublings) * (1 + (step + 1) / STEPS)
    return upper


class Rate:
    """Events per second over the last ``window_s``."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._points: deque[tuple[float, int]] = deque(maxlen=4096)

    def add(self, total: int, now_s: float) -> None:
        """``total`` so far, at ``now_s`` (monotonic)."""
        if self._points and now_s - self._points[-1][0] < self._window_s / 1000:
            self._points[-1] = (self._points[-1][0], total)
        else:
            self._points.append((now_s, total))
        while len(self._points) > 2 and now_s - self._points[1][0] >= self._window_s:
            self._points.popleft()

    def per_s(self, now_s: float) -> float:
        if len(self._points) < 2 or now_s - self._points[-1][0] >= self._window_s:
            return 0.0
        (began, first), (_, last) = self._points[0], self._points[-1]
        return (last - first) / max(now_s - began, 1e-3)


def catch_up_s(backlog: int, applied_per_s: float, grown_per_s: float) -> float:
    """Seconds until a backlog is gone; infinite when it does not shrink."""
    if backlog <= 0:
        return 0.0
    return backlog / (applied_per_s - grown_per_s) if applied_per_s > grown_per_s else inf


def known(value: float | None, unit: str = "") -> str:
    """A figure of a status in a line of the log."""
    return "not known" if value is None else f"{value:g}{unit}"
