"""Figures, how their two sides take turns, and what comes out."""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["FIGURES", "Bench", "Bound", "Figure", "Outcome", "figure", "percentile"]

SEED = 20_261_121


@dataclass(frozen=True, slots=True)
class Bound:
    """A demand on one side alone, in its own unit, beside the ratio."""

    what: str
    value: float
    limit: float
    unit: str
    sense: Literal["at most", "at least"] = "at most"

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.sense == "at most" else self.value >= self.limit


@dataclass(slots=True)
class Outcome:
    """What a figure measured: one entry per pair in each list, and the bounds."""

    unit: str = "/s"
    measured: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [m / r for m, r in zip(self.measured, self.reference, strict=True)]

    @property
    def ratio(self) -> float | None:
        """The median of the ratios of the pairs."""
        return statistics.median(self.ratios) if self.measured else None

    def as_dict(self) -> dict[str, Any]:
        ratios = self.ratios
        return {
            "unit": self.unit,
            "measured": self.measured,
            "reference": self.reference,
            "ratio": self.ratio,
            "ratio_min": min(ratios, default=None),
            "ratio_max": max(ratios, default=None),
            "bounds": [{**asdict(bound), "met": bound.met} for bound in self.bounds],
            "notes": self.notes,
        }


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table of goals."""

    number: int
    name: str
    what: str
    against: str
    """What it is divided by."""
    goal: float | None
    """What the ratio shall be; ``None`` when there are only bounds."""
    sense: Literal["at least", "at most"]
    run: Callable[[Bench], Outcome]

    def met(self, outcome: Outcome) -> bool:
        """Whether the median ratio and every bound are as they shall be."""
        return self._ratio_met(outcome.ratio) and all(bound.met for bound in outcome.bounds)

    def _ratio_met(self, ratio: float | None) -> bool:
        if self.goal is None:
            return True
        if ratio is None:
            return False
        return ratio >= self.goal if self.sense == "at least" else ratio <= self.goal


FIGURES: dict[str, Figure] = {}
"""All figures by name, in the order of their numbers once every module is imported."""


def figure(
    number: int,
    name: str,
    what: str,
    against: str = "",
    goal: float | None = None,
    *,
    sense: Literal["at least", "at most"] = "at least",
) -> Callable[[Callable[[Bench], Outcome]], Callable[[Bench], Outcome]]:
    """Register the decorated function as a figure."""

    def register(run: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        FIGURES[name] = Figure(number, name, what, against, goal, sense, run)
        return run

    return register


@dataclass(slots=True)
class Bench:
    """What a figure works with: sizes, time, a folder, chance, and a place to report progress."""

    folder: Path
    quick: bool
    pairs: int
    seconds_scale: float = 1.0
    """Shortens the long runs (60 s, 10 min); 1 is what the goals speak of."""
    progress: Callable[[str], None] = lambda text: None
    shortened: bool = False
    """Whether the figure that runs asked for a duration and got less than the goal speaks of."""

    def size(self, full: int, quick: int) -> int:
        """A count of keys or operations."""
        return quick if self.quick else full

    def seconds(self, full: float, quick: float = 0.25) -> float:
        """A duration."""
        self.shortened |= self.quick or self.seconds_scale < 1
        return quick if self.quick else full * self.seconds_scale

    def chance(self, salt: int = 0) -> random.Random:
        """Random numbers, the same in every run."""
        return random.Random(SEED + salt)

    @contextmanager
    def path(self, name: str) -> Iterator[Path]:
        """A new folder that is gone afterwards."""
        import shutil

        path = self.folder / name
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def alternate(
        self,
        subject: Callable[[], float],
        reference: Callable[[], float],
        *,
        unit: str = "/s",
        pairs: int | None = None,
    ) -> Outcome:
        """Measure both sides turn about: A B A B …; each call returns a value in ``unit``."""
        outcome = Outcome(unit)
        count = pairs or self.pairs
        for i in range(count):
            gc.collect()
            outcome.measured.append(subject())
            gc.collect()
            outcome.reference.append(reference())
            self.progress(
                f"pair {i + 1}/{count}: {readable(outcome.measured[-1], unit)}"
                f" against {readable(outcome.reference[-1], unit)}, {outcome.ratios[-1]:.2f}x"
            )
        return outcome


def timed_rate(step: Callable[[int], object], seconds: float, burst: int = 64) -> float:
    """Calls of ``step(i)`` per second over ``seconds``; the clock is read every ``burst`` calls."""
    clock = time.perf_counter
    i, began = 0, clock()
    end = began + seconds
    while True:
        for _ in range(burst):
            step(i)
            i += 1
        now = clock()
        if now >= end:
            return i / (now - began)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that ``work()`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that ``percent`` of ``values`` do not exceed."""
    ordered = sorted(values)
    index = -(-len(ordered) * percent // 100) - 1
    return ordered[max(0, min(len(ordered) - 1, int(index)))]


def readable(value: float, unit: str) -> str:
    """A number with three digits and its unit."""
    if unit == "/s":
        for limit, name in ((1e6, "M/s"), (1e3, "k/s")):
            if value >= limit:
                return f"{value / limit:.3g} {name}"
        return f"{value:.3g} /s"
    if unit == "s" and value < 1:
        return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
    return f"{value:,.4g} {unit}" if value < 1e4 else f"{value:,.0f} {unit}"


def on_terminal() -> bool:
    return sys.stderr.isatty()
