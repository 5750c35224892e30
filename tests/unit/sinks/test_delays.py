"""What an agent says of delays, speeds and the time to catch up is what happened."""

from __future__ import annotations

import random
from math import inf

import pytest

from kvrep.sinks.delays import BUCKETS_S, Delays, Rate, catch_up_s


def test_percentiles_of_known_delays() -> None:
    """p50 and p99 are at most an eighth above the exact ones, for delays from 0.1 ms to hours."""
    chance = random.Random(3)
    delays, exact = Delays(), []
    for _ in range(5000):
        delay = 10 ** chance.uniform(-4, 4)
        exact.append(delay)
        delays.add(delay, 1.0)
    exact.sort()
    for percent in (1, 50, 90, 99, 100):
        true = exact[max(0, -(-5000 * percent // 100) - 1)]
        found = delays.percentile(percent, 1.0)
        assert found is not None
        assert true <= found <= true * 1.126


def test_no_changes_have_no_delay() -> None:
    """Without recent changes there is no percentile, rather than 0."""
    delays = Delays(window_s=10)
    assert delays.percentile(50, 0.0) is None
    delays.add(1.0, 5.0)
    assert delays.percentile(50, 14.0) is not None
    assert delays.percentile(50, 100.0) is None


def test_old_delays_leave_the_percentiles_and_stay_in_the_histogram() -> None:
    """Percentiles speak of the last one to two windows; the histogram of everything."""
    delays = Delays(window_s=10)
    delays.add(100.0, 0.0, count=3)
    delays.add(0.002, 12.0)
    assert delays.percentile(99, 12.0) == pytest.approx(100, rel=0.13)
    delays.add(0.002, 23.0)
    assert delays.percentile(99, 23.0) == pytest.approx(0.002, rel=0.13)
    assert delays.count == 5
    assert delays.sum_s == pytest.approx(300.004)
    assert sum(delays.histogram) == 5
    assert delays.histogram[BUCKETS_S.index(300)] == 3


def test_a_clock_that_runs_behind_gives_no_negative_delay() -> None:
    """A commit time in the future counts as no delay; one of ages ago as the longest."""
    delays = Delays()
    delays.add(-5.0, 0.0)
    assert delays.percentile(100, 0.0) == 1e-4
    delays.add(1e12, 0.0)
    assert delays.percentile(100, 0.0) is not None
    assert delays.histogram[-1] == 1


def test_rate_of_the_last_seconds() -> None:
    """The rate is that of the window, and 0 once nothing was said for one."""
    rate = Rate(window_s=10)
    assert rate.per_s(0.0) == 0.0
    for second in range(31):
        rate.add(second * 50 if second < 20 else 1000 + (second - 20) * 10, float(second))
    assert rate.per_s(30.0) == pytest.approx(10, rel=0.01)
    assert rate.per_s(45.0) == 0.0


def test_time_to_catch_up() -> None:
    """A backlog shrinks by what is applied beyond what arrives; else there is no end to it."""
    assert catch_up_s(0, 0.0, 0.0) == 0.0
    assert catch_up_s(1000, 300.0, 100.0) == 5.0
    assert catch_up_s(1000, 100.0, 100.0) == inf
