"""What came out: on the terminal, as JSON, and as the parts of docs/performance.md that are generated."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import textwrap
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import FIGURES, Figure, Outcome, readable

__all__ = ["entry", "machine", "markdown", "read", "table", "write", "write_docs"]

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def machine(folder: Path) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "file_system": file_system(folder),
        **{name: version(name) for name in ("kvrep", "lmdb", "grpcio")},
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def file_system(folder: Path) -> str:
    """The kind of file system that ``folder`` is on, such as ext4; empty when it cannot be told."""
    best, kind = "", ""
    path = str(folder.resolve())
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, point, name, *_ = line.split()
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, name
    return kind


def entry(figure: Figure, outcome: Outcome, *, shortened: bool, took_s: float) -> dict[str, Any]:
    """One figure's result as it is kept in JSON."""
    return {
        "number": figure.number,
        "name": figure.name,
        "what": figure.what,
        "against": figure.against,
        "goal": figure.goal,
        "sense": figure.sense,
        **outcome.as_dict(),
        "met": figure.met(outcome),
        "shortened": shortened,
        "took_s": round(took_s, 1),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read(path: Path) -> dict[str, Any]:
    """A results file; an empty one when there is none."""
    if not path.exists():
        return {"figures": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def in_order(results: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(results["figures"].values(), key=lambda result: result["number"])


# -- one result, as words ------------------------------------------------------------------------------


def goal_text(result: dict[str, Any]) -> str:
    parts = []
    if result["goal"] is not None:
        parts.append(f"{'≤ ' if result['sense'] == 'at most' else ''}{result['goal']:g}x")
    parts += [
        f"{b['what']} {'≤' if b['sense'] == 'at most' else '≥'} {b['limit']:g} {b['unit']}"
        for b in result["bounds"]
    ]
    return "; ".join(parts)


def ratio_text(result: dict[str, Any]) -> str:
    if result["ratio"] is None:
        return "-"
    if len(result["measured"]) == 1:
        return f"{result['ratio']:.2f}x"
    return f"{result['ratio']:.2f}x ({result['ratio_min']:.2f}..{result['ratio_max']:.2f})"


def bounds_text(result: dict[str, Any]) -> str:
    return "; ".join(f"{b['what']}: {b['value']:.3g} {b['unit']}" for b in result["bounds"])


def values_text(result: dict[str, Any], side: str) -> str:
    values = result[side]
    return readable(statistics.median(values), result["unit"]) if values else "-"


def verdict(result: dict[str, Any], *, quick: bool = False) -> str:
    if "error" in result:
        return "FAILED"
    if quick:
        return "smoke"
    return ("met" if result["met"] else "NOT MET") + (", short run" if result["shortened"] else "")


# -- the terminal --------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]], *, quick: bool) -> str:
    """The results as a table of at most about 120 columns."""
    head = ("#", "name", "what", "kvrep", "reference", "ratio (min..max)", "goal", "")
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        if "error" in result:
            rows.append((str(result["number"]), result["name"], result["error"], "", "", "", "", "FAILED"))
            continue
        ratio = "; ".join(t for t in (ratio_text(result), bounds_text(result)) if t not in ("", "-"))
        rows.append((
            str(result["number"]), result["name"], result["what"], values_text(result, "measured"),
            values_text(result, "reference"), ratio, goal_text(result), verdict(result, quick=quick),
        ))  # fmt: skip
    return _grid(rows, limits=(2, 14, 34, 10, 10, 24, 16, 7))


def _grid(rows: list[tuple[str, ...]], limits: tuple[int, ...]) -> str:
    lines: list[str] = []
    for number, row in enumerate(rows):
        cells = [textwrap.wrap(cell, limit) or [""] for cell, limit in zip(row, limits, strict=True)]
        for i in range(max(map(len, cells))):
            texts = [
                (cell[i] if i < len(cell) else "").ljust(limit)
                for cell, limit in zip(cells, limits, strict=True)
            ]
            lines.append(" ".join(texts).rstrip())
        if number == 0:
            lines.append(" ".join("-" * limit for limit in limits))
    return "\n".join(lines)


# -- the documents -------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    of = results["machine"]
    lines = [
        f"{of['cores']} cores ({of['processor']}), {of['system']}, {of['file_system']},"
        f" Python {of['python']}, lmdb {of['lmdb']}, grpcio {of['grpcio']}.",
        "",
        "| # | what | reference | kvrep | reference | ratio: median (min..max) | goal | |",
        "|--:|---|---|--:|--:|--:|---|---|",
    ]
    for result in in_order(results):
        ratio = "; ".join(t for t in (ratio_text(result), bounds_text(result)) if t not in ("", "-"))
        lines.append(
            f"| {result['number']} | {result['what']} | {result['against'] or '-'}"
            f" | {values_text(result, 'measured')} | {values_text(result, 'reference')}"
            f" | {ratio} | {goal_text(result)} | {verdict(result)} |"
        )
    missing = [f.number for f in FIGURES.values() if f.name not in results["figures"]]
    if missing:
        lines += ["", f"Not measured in this run: {', '.join(map(str, sorted(missing)))}."]
    notes = [(r["number"], note) for r in in_order(results) for note in r["notes"]]
    if any(result["shortened"] for result in in_order(results)):
        lines += ["", '"short run": the samples were shorter than the goal speaks of (`--seconds-scale`).']
    if notes:
        lines += ["", "Beside the ratios:", ""] + [f"- {number}: {note}" for number, note in notes]
    return "\n".join(lines) + "\n"


def write_docs(results: dict[str, Any], docs: Path) -> list[Path]:
    """Put the results into docs/: the table in performance.md, the chart, and the numbers themselves."""
    from benchmarks.chart import chart

    page = docs / "performance.md"
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{page} has no {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n{markdown(results)}{END}{after}")
    picture, numbers = docs / "performance.svg", docs / "performance.json"
    picture.write_text(chart(in_order(results)))
    write(numbers, results)
    return [page, picture, numbers]
