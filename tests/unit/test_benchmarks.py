"""The benchmarks run: every figure in small, the selection, and what they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="tests run against an installed wheel, which has no benchmarks"
)


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done


def listed() -> dict[int, str]:
    """The names of all figures by number."""
    lines = [line.split() for line in run("--list").stdout.splitlines() if line[:2].strip().isdecimal()]
    return {int(number): name for number, name, *_ in lines}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tens", range(6), ids=lambda tens: f"{10 * tens}-{10 * tens + 9}")
def test_every_figure_runs_in_small(tmp_path: Path, tens: int) -> None:
    """With --quick every figure runs through, tells both sides and the ratio, and leaves nothing behind."""
    out = tmp_path / "results.json"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    expected = {name for number, name in listed().items() if number // 10 == tens}
    assert expected

    run("--quick", "--only", f"{10 * tens}-{10 * tens + 9}", "--dir", str(scratch), "--out", str(out))

    figures = json.loads(out.read_text())["figures"]
    assert set(figures) == expected
    for figure in figures.values():
        assert "error" not in figure
        assert len(figure["measured"]) == len(figure["reference"])
        assert figure["measured"] or figure["bounds"]
        assert all(ratio > 0 for ratio in (figure["ratio_min"], figure["ratio_max"]) if ratio is not None)
    assert list(scratch.iterdir()) == []


def test_every_figure_has_its_turn() -> None:
    """No figure has a number that the test above leaves out."""
    assert listed()
    assert max(listed()) < 60


def test_only_names_figures_by_name_number_and_range(tmp_path: Path) -> None:
    """--only takes what it is given, and refuses a name that does not exist."""
    done = run("--quick", "--only", "get,10-10", "--dir", str(tmp_path))
    numbers = [line.split()[0] for line in done.stdout.splitlines() if line[:2].strip().isdecimal()]
    assert numbers == ["9", "10"]

    assert "no figure is called 'nonsense'" in run("--only", "nonsense", code=1).stderr


def test_a_goal_is_judged_in_its_direction() -> None:
    """A ratio counts as met from its side of the goal, and only together with every bound."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.measure import Bound, Figure, Outcome
    finally:
        sys.path.remove(str(ROOT))

    def never(bench: object) -> Outcome:
        raise AssertionError

    least = Figure(1, "a", "a", "b", 2.0, "at least", never)
    most = Figure(2, "b", "b", "c", 2.0, "at most", never)
    good, bad = Bound("x", 1, 2, "s"), Bound("x", 3, 2, "s")
    twice, thrice = Outcome("/s", [4.0, 2.0, 8.0], [2.0, 2.0, 2.0]), Outcome("/s", [3.0], [1.0])

    assert twice.ratio == 2.0
    assert [least.met(twice), least.met(thrice)] == [True, True]
    assert [most.met(twice), most.met(thrice)] == [True, False]
    thrice.bounds.append(good)
    assert least.met(thrice)
    thrice.bounds.append(bad)
    assert not least.met(thrice)


def test_the_chart_is_whole_and_shows_every_ratio() -> None:
    """The SVG is well-formed and has one bar for each result with a ratio."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.chart import chart
    finally:
        sys.path.remove(str(ROOT))
    from xml.etree import ElementTree

    result = {
        "number": 1, "what": "puts & <gets>", "goal": 2.0, "sense": "at least",
        "ratio": 3.0, "ratio_min": 2.5, "ratio_max": 9.0,
    }  # fmt: skip
    bound_only = {**result, "ratio": None}

    root = ElementTree.fromstring(chart([result, {**result, "sense": "at most"}, bound_only]))

    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("fill") != "white"]
    assert [bar.get("fill") for bar in bars] == ["#2f7d4f", "#b5482f"]


@pytest.mark.slow
def test_failovers_are_measured() -> None:
    """One round of two kinds of failover, with a line for each; a name that does not exist is refused."""
    command = [sys.executable, "-m", "benchmarks.failovers"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--only", "kill", "--only", "promote"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=110,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["kill", "promote"]
    assert done.stdout.count("worst of 1") == 2

    refused = subprocess.run(
        [*command, "--only", "luck"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (refused.returncode, "'luck' is none of" in refused.stderr) == (2, True)
