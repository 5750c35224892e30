"""The command line: ``python -m kvrep.testing.simulate``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Sequence

from kvrep.testing.simulate.faults import PLANTS
from kvrep.testing.simulate.run import Outcome, run_seed
from kvrep.testing.simulate.world import Settings

__all__ = ["main", "repeat"]

PROGRAM = "python -m kvrep.testing.simulate"
TELL_EVERY_S = 2.0
LAST_EVENTS = 25

CLEAN, BROKEN, INTERRUPTED = 0, 1, 130

DESCRIPTION = """\
Runs whole clusters in virtual time: the real code that decides about replication, promotion and
election, over a network that loses, delays and cuts, on disks that forget what was not synced and
fail, with clocks that lie. One seed decides everything, so what fails once fails every time.
After every step the promises of docs/guarantees.md are checked against a memory of what was ever
written, promised, acknowledged and committed."""

EPILOG = f"""\
examples:
  {PROGRAM} --seeds 1000               a thousand clusters, each different
  {PROGRAM} --seed 42 --trace          one of them, told event by event
  {PROGRAM} --list-plants              faults to plant in the code under test
  {PROGRAM} --plant no-fetch           does the simulation find that one?

exit code: 0 no promise was broken, 1 one was (also with --plant: then that is the aim), 2 wrong usage,
130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        code = _main(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except (
        BrokenPipeError
    ):  # nobody reads on, such as `head`; nor shall the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.list_plants:
        width = max(map(len, PLANTS))
        for name, plant in PLANTS.items():
            print(f"{name:{width}}  {plant.line}")
        return CLEAN
    if chosen.plant and chosen.plant not in PLANTS:
        parser.error(f"no fault is named {chosen.plant!r}; --list-plants shows them")
    if chosen.seed is not None:
        return _one(chosen.seed, chosen.plant, trace=chosen.trace)
    if chosen.trace:
        parser.error("--trace tells of one seed: name it with --seed")
    return _many(range(chosen.start, chosen.start + chosen.seeds), chosen.plant, keep_going=chosen.keep_going)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=_positive, default=1000, metavar="N", help="how many (default 1000)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="the first of them (default 0)")
    parser.add_argument("--seed", type=int, metavar="N", help="only this one")
    parser.add_argument("--trace", action="store_true", help="print a timeline of all nodes (with --seed)")
    parser.add_argument("--keep-going", action="store_true", help="go on after a seed that fails")
    parser.add_argument("--plant", default="", metavar="NAME", help="plant this fault in the code first")
    parser.add_argument("--list-plants", action="store_true", help="print the faults that can be planted")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of seeds")
    return number


def repeat(seed: int, plant: str = "") -> str:
    """The command that does this seed again, told event by event."""
    return f"{PROGRAM} --seed {seed}" + (f" --plant {plant}" if plant else "") + " --trace"


def _tell(at: float, name: str, text: str) -> str:
    return f"{at - 100.0:9.4f} s  {name}  {text}"


def _described(settings: Settings) -> str:
    who = f"nodes {' '.join(settings.names + settings.observers)}"
    how = "elected" if settings.elects else "promoted by hand"
    lag = f", lag_records_max={settings.lag_records_max}" if settings.lag_records_max else ""
    return f"{who}, acks={settings.acks}{lag}, primaries {how}, segments up to {settings.segment_bytes_max} bytes"


def _one(seed: int, plant: str, *, trace: bool) -> int:
    last: deque[str] = deque(maxlen=LAST_EVENTS)

    def note(at: float, name: str, text: str) -> None:
        line = _tell(at, name, text)
        if trace:
            print(line)
        else:
            last.append(line)

    outcome = run_seed(seed, plant=plant, note=note)
    if outcome.problem and not trace:
        print(*last, sep="\n")
    print(
        f"seed {seed}: {_described(outcome.settings)}; {outcome.epochs} epochs,"
        f" {outcome.acknowledged} writes acknowledged, {outcome.steps} steps in {outcome.at:.3f} s"
    )
    return _verdict(outcome, plant)


def _verdict(outcome: Outcome, plant: str) -> int:
    if not outcome.problem:
        print("no promise was broken")
        return CLEAN
    print(f"after {outcome.at:.4f} s: {outcome.problem}")
    print(f"repeat it: {repeat(outcome.seed, plant)}")
    return BROKEN


def _rate(done: int, began: float) -> str:
    """Of processor time, since others may use the machine, too."""
    return f"{done / max(time.process_time() - began, 1e-9) * 60:,.0f} a minute of one core"


def _many(seeds: range, plant: str, *, keep_going: bool) -> int:
    told = time.monotonic()
    began = time.process_time()
    failed: list[Outcome] = []
    done = steps = acknowledged = epochs = 0
    try:
        for seed in seeds:
            outcome = run_seed(seed, plant=plant)
            done += 1
            steps += outcome.steps
            acknowledged += outcome.acknowledged
            epochs += outcome.epochs
            if outcome.problem:
                failed.append(outcome)
                if not keep_going:
                    break
                print(f"seed {seed}: {outcome.problem}")
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                print(f"{done} of {len(seeds)} seeds, {_rate(done, began)}, {len(failed)} failed",
                      file=sys.stderr, flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    print(
        f"{done} seeds, {_rate(done, began)}: {epochs} epochs, {acknowledged} writes acknowledged,"
        f" {steps} steps; {len(failed)} failed"
    )
    if not failed:
        print("no promise was broken")
        return CLEAN if done == len(seeds) else INTERRUPTED
    return _one(failed[0].seed, plant, trace=False)
