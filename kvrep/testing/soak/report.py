"""The result of a soak as text."""

from __future__ import annotations

import statistics
from collections import defaultdict

from kvrep.testing.soak.faults import KINDS
from kvrep.testing.soak.run import Progress, Result
from kvrep.testing.soak.watch import METRICS, growth

__all__ = ["progress_line", "text"]

SHOWN = 20
_BARS = " ▁▂▃▄▅▆▇█"


def clock(seconds: float) -> str:
    """``mm:ss``, or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def bars(values: list[float]) -> str:
    """A line of small bars; 0 is empty."""
    most = max(values, default=0.0)
    top = len(_BARS) - 1
    return "".join(_BARS[min(top, -(-int(v * top) // max(1, int(most))))] for v in values)


def progress_line(progress: Progress) -> str:
    """One line for the terminal."""
    rate = progress.writes_per_s[-1] if progress.writes_per_s else 0.0
    parts = [
        f"{clock(min(progress.at_s, progress.seconds))} / {clock(progress.seconds)}",
        f"{bars(progress.writes_per_s):24}",
        f"{rate:4.0f} writes/s",
        f"primary {progress.primary or '-'}",
        f"{progress.faults} faults",
    ]
    if progress.violations:
        parts.append(f"{progress.violations} VIOLATIONS")
    parts.append(progress.now if progress.doing == "runs" else progress.doing)
    return "  ".join(parts)


def amount(value: float, unit: str) -> str:
    """A number with its unit, short."""
    if unit != "bytes":
        return f"{value:,.0f}"
    return f"{value / (1 << 20):,.1f} MiB"


def text(result: Result) -> str:
    """All of it, for people; ends with a newline."""
    settings = result.settings
    lines = [
        f"kvrep soak: {_verdict(result)}",
        "",
        f"  seed {settings.seed}, {settings.nodes} nodes, {clock(result.took_s)} of {clock(settings.seconds)}"
        + (", network namespaces" if settings.namespaces else ", links through a proxy")
        + (f", disks of {amount(settings.disk_bytes, 'bytes')}" if settings.disk_bytes else ""),
        f"  {result.counts['acknowledged']:,} writes acknowledged, {result.counts['unknown']:,} of unknown"
        f" outcome, {result.counts['refused']:,} calls refused, {result.counts['read']:,} reads",
        f"  {result.checked:,} calls checked against each other; writes in {result.epochs} epochs",
        "",
        *_faults(result),
        "",
        *_growth(result),
        "",
        *_violations(result),
    ]
    return "\n".join(lines) + "\n"


def _verdict(result: Result) -> str:
    if result.violations:
        return f"{len(result.violations)} VIOLATIONS"
    return "interrupted; every promise was kept so far" if result.interrupted else "every promise was kept"


def _faults(result: Result) -> list[str]:
    """What was broken, and for how long nobody took writes meanwhile."""
    gaps: dict[str, list[float]] = defaultdict(list)
    hit: dict[str, int] = defaultdict(int)
    for span in result.spans:
        gaps[span.kind].append(span.gap_s)
        hit[span.kind] += span.primary
    lines = [
        f"  {'fault':10} {'times':>5} {'of the primary':>15}   longest time without a write: median, worst"
    ]
    for kind in sorted(gaps, key=list(KINDS).index):
        times = gaps[kind]
        lines.append(
            f"  {kind:10} {len(times):5} {hit[kind]:15}   {statistics.median(times):6.2f} s  {max(times):6.2f} s"
        )
    lines += [f"  {kind:10}  left out: {reason}" for kind, reason in result.left_out.items()]
    return lines


def _growth(result: Result) -> list[str]:
    lines = [f"  {'':12} {'node':4} {'early':>12} {'late':>12} {'most':>12}"]
    for g in growth(result.samples):
        unit = METRICS[g.metric][0]
        first, last, most = (amount(value, unit) for value in (g.first, g.last, g.most))
        verdict = "GROWS" if g.grows else "steady" if g.judged else "too short to judge"
        lines.append(f"  {g.metric:12} {g.node:4} {first:>12} {last:>12} {most:>12}   {verdict}")
    return lines


def _violations(result: Result) -> list[str]:
    if not result.violations:
        return ["  no violations"]
    shown = [str(violation) for violation in result.violations[:SHOWN]]
    if len(result.violations) > SHOWN:
        shown.append(f"… and {len(result.violations) - SHOWN} more")
    return [
        *("  " + line for entry in shown for line in entry.splitlines()),
        "",
        "timeline:",
        result.timeline,
    ]
