"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import agents, brokers, feeds, reads, replicas, report, upkeep, writes
from benchmarks.measure import FIGURES, Bench, Figure, on_terminal

ROOT = Path(__file__).parent.parent
LATEST = ROOT / "benchmarks" / "results" / "latest.json"
MODULES = (writes, reads, upkeep, replicas, feeds, brokers, agents)
"""Imported so that they register their figures."""

HELP = """\
Measure kvrep against the bare ground it stands on.

Each figure is a ratio to a reference measured in the same run, turn about (A B A B …); the table shows the
median of the pairs' ratios, the smallest and the largest, and whether the goal is met. Keys have 16 bytes,
values 100, writes update random existing keys of a store with 1 M keys, state digests are on, and one flush
has been made before anything is timed, unless a figure says otherwise.
"""

EXAMPLES = """\
examples:
  python -m benchmarks --list                    the figures, their references and their goals
  python -m benchmarks                           all of them: about an hour, 10 GB of disk
  python -m benchmarks --only put --only batch   two of them; --only 1-6,9 goes by number
  python -m benchmarks --seconds-scale 0.2       the 60 s and 10 min runs shortened; the result says so
  python -m benchmarks --quick                   every figure, tiny: does it run? Not a measurement
  python -m benchmarks --docs                    put the latest results into docs/performance.*

Results go to benchmarks/results/latest.json, figure by figure; those that were not run again stay in it.
The exit status is 0 when all that ran did run, whether or not the goals are met, unless --strict is given.
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=HELP, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--list", action="store_true", help="list the figures and end")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a figure's name, number or range of numbers; may be repeated or joined by commas",
    )
    add("--quick", action="store_true", help="tiny sizes: a smoke test, not a measurement")
    add(
        "--pairs",
        type=int,
        metavar="N",
        help="how often the two sides take turns (default 5; 2 with --quick)",
    )
    add(
        "--seconds-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply every duration by X (default 1)",
    )
    add(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where the stores are made: on the disk to be measured (default: the temporary folder)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"where the results go (default {LATEST.relative_to(ROOT)}; nowhere with --quick)",
    )
    add("--docs", action="store_true", help="write the latest results into docs/ and end")
    add("--strict", action="store_true", help="exit with 1 when a goal is not met")
    return parser.parse_args(argv)


def chosen(only: list[str]) -> list[Figure]:
    """The figures that ``--only`` names, by number; ``SystemExit`` for one that does not exist."""
    figures = sorted(FIGURES.values(), key=lambda figure: figure.number)
    wanted: set[int] = set()
    for word in (word for text in only for word in text.split(",")):
        first, dash, last = word.partition("-")
        if word in FIGURES:
            wanted.add(FIGURES[word].number)
        elif first.isdecimal() and (last.isdecimal() or not dash):
            wanted.update(range(int(first), int(last or first) + 1))
        else:
            raise SystemExit(f"no figure is called {word!r}; --list shows them")
    return [figure for figure in figures if not only or figure.number in wanted]


def listing() -> str:
    lines = []
    for figure in sorted(FIGURES.values(), key=lambda figure: figure.number):
        goal = "" if figure.goal is None else f"{figure.sense} {figure.goal:g}x"
        lines.append(f"{figure.number:2}  {figure.name:14} {figure.what}")
        if figure.against:
            lines.append(f"{'':19}against {figure.against}: {goal}")
    return "\n".join(lines)


class Progress:
    """One line on the terminal that is written over; plain lines when it is not a terminal."""

    def __init__(self) -> None:
        self._terminal = on_terminal()
        self._prefix = ""

    def begin(self, text: str) -> None:
        self._prefix = text
        if not self._terminal:
            print(text, file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{self._prefix}: {text}"[: width + 4], end="", file=sys.stderr, flush=True)
        else:
            print(f"    {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def run_one(figure: Figure, bench: Bench) -> dict[str, Any]:
    """A figure's entry; one that raised has ``error`` in it."""
    began = time.monotonic()
    bench.shortened = False
    try:
        outcome = figure.run(bench)
    except Exception as error:  # one figure that cannot run must not lose the others
        traceback.print_exc()
        return {"number": figure.number, "name": figure.name, "error": f"{type(error).__name__}: {error}"}
    return report.entry(figure, outcome, shortened=bench.shortened, took_s=time.monotonic() - began)


def run_all(figures: list[Figure], options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    out = options.out or (None if options.quick else LATEST)
    progress = Progress()
    bench = Bench(
        folder,
        options.quick,
        options.pairs or (2 if options.quick else 5),
        seconds_scale=options.seconds_scale,
        progress=progress,
    )
    of = report.machine(folder)
    if of["file_system"] in ("tmpfs", "ramfs"):
        print(f"{folder} is in memory: flushes cost nothing there, the ratios mean nothing", file=sys.stderr)
    done: list[dict[str, Any]] = []
    for i, figure in enumerate(figures):
        progress.begin(f"[{i + 1}/{len(figures)}] {figure.number} {figure.name}")
        result = run_one(figure, bench)
        progress.end()
        done.append(result)
        print(report.table([result], quick=options.quick).splitlines()[2:][0], file=sys.stderr, flush=True)
        if out is not None and "error" not in result:
            results = report.read(out)
            results["machine"] = of
            results["figures"][figure.name] = result
            report.write(out, results)
    return done


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.list:
        print(listing())
        return 0
    if options.docs:
        for path in report.write_docs(report.read(options.out or LATEST), ROOT / "docs"):
            print(path.relative_to(ROOT))
        return 0
    figures = chosen(options.only)
    folder = Path(tempfile.mkdtemp(prefix="kvrep-bench-", dir=options.dir))
    try:
        done = run_all(figures, options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(report.table(done, quick=options.quick))
    failed = any("error" in result for result in done)
    missed = any(not result.get("met", True) for result in done)
    return 1 if failed or (options.strict and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
