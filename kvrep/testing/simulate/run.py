"""One seed, one run, one outcome."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvrep.testing.simulate.faults import planted
from kvrep.testing.simulate.invariants import Violation
from kvrep.testing.simulate.plan import draw_settings, live
from kvrep.testing.simulate.world import Settings, World

__all__ = ["Outcome", "run_seed"]

Note = Callable[[float, str, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to."""

    seed: int
    settings: Settings
    rule: str = ""
    """What was broken; empty when nothing was."""
    problem: str = ""
    at: float = 0.0
    """Virtual seconds since the start."""
    steps: int = 0
    acknowledged: int = 0
    """Writes."""
    epochs: int = 0


def run_seed(seed: int, *, plant: str = "", note: Note | None = None) -> Outcome:
    """Run one seed; the same seed (and planted fault) always does the same."""
    settings = draw_settings(Random(f"settings of {seed}"))
    world = World(seed, settings, note)
    rule = problem = ""
    with planted(plant):
        try:
            live(world)
        except Violation as violation:
            rule, problem = violation.rule, str(violation)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            rule = "nothing unexpected is raised"
            problem = f"{rule}: {type(error).__name__} in {where.name}, line {where.lineno}: {error}"
    return Outcome(
        seed=seed,
        settings=settings,
        rule=rule,
        problem=problem,
        at=world.time.now - 100.0,
        steps=world.time.steps,
        acknowledged=len(world.check.acknowledged),
        epochs=len(world.begun),
    )
