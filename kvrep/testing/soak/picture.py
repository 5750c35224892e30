"""The result of a soak as one picture: what was acknowledged, who was primary, what was broken, what it took.

Plain SVG, nothing outside of it is needed: it opens in any browser, light or dark, and tells more where the
mouse rests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from math import ceil, log10

from kvrep.testing.soak.faults import FaultSpan
from kvrep.testing.soak.report import amount, clock
from kvrep.testing.soak.run import Result
from kvrep.testing.soak.watch import METRICS, Sample

__all__ = ["picture"]

WIDTH, LEFT, RIGHT = 1200, 84, 24
POINTS_MAX, SMALL_POINTS_MAX = 700, 120
ROW = 30
LABEL_PX = 44
"""Faults that are drawn wider than this say their name."""

NODES = ("#3b7dd8", "#d9822b", "#2f9e68", "#a35bc9", "#c94f6d", "#5b8c8a", "#8c7b3f", "#6b6fcf", "#b0623c")
WRITES, READS = "#2a6f97", "#8fa3b5"
COLOURS = {
    "kill": "#d64545", "stop": "#e58a8a", "pause": "#8e63ce", "cut": "#e0912f", "deaf": "#e8b04a",
    "mute": "#c9a227", "wall": "#b5651d", "delay": "#4a90b8", "throttle": "#5fb0c9", "corrupt": "#3fa98f",
    "slow-disk": "#8a8f98", "full-disk": "#565b66",
}  # fmt: skip
STYLE = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 12px; }
  text { fill: #24292f; } .soft { fill: #6e7781; } .title { font-size: 22px; font-weight: 600; }
  .head { font-weight: 600; } .on { fill: #ffffff; } .paper { fill: #fcfcfa; } .grid { stroke: #e3e5e8; }
  .follower { fill: #dbe4ec; } .gone { fill: #9aa1a9; } .good { fill: #2f9e68; } .bad { fill: #d64545; }
  .fault { opacity: .9; } .band { opacity: .10; } .band:hover, .fault:hover { opacity: .45; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e8eb; } .soft { fill: #9aa4af; } .on { fill: #ffffff; } .paper { fill: #16191d; }
    .grid { stroke: #2b3138; } .follower { fill: #2b3640; } .gone { fill: #59616a; } .band { opacity: .18; }
  }
"""
"""Colours as plain properties: not every viewer of SVG knows variables."""


class _Sheet:
    """Lines of SVG, and where the next panel begins."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.parts: list[str] = []
        self.y = 0.0
        self.end_s = max([result.settings.seconds, *(s.at_s for s in result.samples[-1:])])

    def x(self, at_s: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, at_s / self.end_s))

    def add(self, line: str) -> None:
        self.parts.append(line)

    def text(self, x: float, y: float, what: str, *, kind: str = "", anchor: str = "start") -> None:
        style = f' class="{kind}"' if kind else ""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(what)}</text>')


def picture(result: Result) -> str:
    """The SVG, ending with a newline."""
    sheet = _Sheet(result)
    _heading(sheet)
    _throughput(sheet, 210)
    _nodes(sheet)
    _lags(sheet, 110)
    _legend(sheet)
    _metrics(sheet, 110)
    height = sheet.y + 16
    label = "kvrep soak: throughput, roles, faults, lag and resources over time"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
            f' aria-label="{label}">',
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{WIDTH}" height="{height:.0f}"/>',
            *sheet.parts,
            "</svg>",
            "",
        ]
    )


# -- panels ----------------------------------------------------------------------------------------


def _heading(sheet: _Sheet) -> None:
    result = sheet.result
    counts, settings = result.counts, result.settings
    sheet.text(LEFT, 40, "kvrep soak", kind="title")
    good = result.ok
    verdict = "every promise was kept" if good else f"{len(result.violations)} violations"
    if result.interrupted:
        verdict += ", interrupted"
    width = 7.2 * len(verdict) + 26
    sheet.add(
        f'<rect x="{LEFT + 156}" y="23" width="{width:.0f}" height="23" rx="11.5"'
        f' class="{"good" if good else "bad"}"/>'
    )
    sheet.add(
        f'<text x="{LEFT + 156 + width / 2:.1f}" y="39" text-anchor="middle" class="on">'
        f"{escape(verdict)}</text>"
    )
    way = "in network namespaces" if settings.namespaces else "joined by a proxy"
    sheet.text(
        LEFT, 64,
        f"{settings.nodes} nodes {way}, {clock(result.took_s)}, seed {settings.seed}"
        f"  ·  {counts['acknowledged']:,} writes acknowledged in {result.epochs} epochs"
        f"  ·  {counts['read']:,} reads  ·  {len(result.spans)} faults"
        f"  ·  {result.checked:,} calls checked",
        kind="soft",
    )  # fmt: skip
    sheet.y = 96


def _throughput(sheet: _Sheet, height: float) -> None:
    """Writes acknowledged a second as an area, reads as a line, faults as bands behind them."""
    samples = sheet.result.samples
    writes = _rates(samples, lambda s: s.acknowledged)
    reads = _rates(samples, lambda s: s.read)
    top = _nice(max([1.0, *(v for _, v in writes), *(v for _, v in reads)]))
    _axes(sheet, height, top, "calls a second", lambda v: f"{v:,.0f}")
    for span in sheet.result.spans:
        x, width = _extent(sheet, span)
        sheet.add(
            f'<rect class="band" x="{x:.1f}" y="{sheet.y:.1f}" width="{width:.1f}" height="{height}"'
            f' fill="{COLOURS[span.kind]}"><title>{escape(_told(span))}</title></rect>'
        )
    base = sheet.y + height
    line = _path(sheet, writes, top, height)
    if writes:
        first, last = sheet.x(writes[0][0]), sheet.x(writes[-1][0])
        sheet.add(
            f'<path d="{line} L{last:.1f},{base:.1f} L{first:.1f},{base:.1f} Z" fill="{WRITES}"'
            ' fill-opacity=".25"/>'
        )
    sheet.add(f'<path d="{line}" fill="none" stroke="{WRITES}" stroke-width="1.6"/>')
    sheet.add(
        f'<path d="{_path(sheet, reads, top, height)}" fill="none" stroke="{READS}" stroke-opacity=".8"/>'
    )
    for x, name, colour in ((RIGHT + 204, "writes acknowledged", WRITES), (RIGHT + 46, "reads", READS)):
        sheet.add(
            f'<rect x="{WIDTH - x}" y="{sheet.y - 18:.1f}" width="10" height="10" rx="2" fill="{colour}"/>'
        )
        sheet.text(WIDTH - x + 16, sheet.y - 9, name, kind="soft")
    sheet.y += height + 14


def _nodes(sheet: _Sheet) -> None:
    """A ribbon for each node: who was primary when, and what was done to it."""
    samples = sheet.result.samples
    for number, name in enumerate(samples[-1].nodes if samples else ()):
        y = sheet.y + number * ROW
        sheet.text(LEFT - 12, y + 17, name, anchor="end", kind="head")
        for began_s, ended_s, role in _stretches(samples, name, sheet.end_s):
            x = sheet.x(began_s)
            how = f'class="{role if role == "follower" else "gone"}"'
            if role == "primary":
                how = f'fill="{NODES[number % len(NODES)]}"'
            width = sheet.x(ended_s) - x
            sheet.add(
                f'<rect x="{x:.1f}" y="{y + 4:.1f}" width="{width:.1f}" height="8" {how}>'
                f"<title>{name}: {role}, {clock(began_s)} to {clock(ended_s)}</title></rect>"
            )
        for span in sheet.result.spans:
            if span.victim == name:
                _mark(sheet, span, y + 13)
    sheet.y += ROW * len(samples[-1].nodes if samples else ()) + 4
    _time_axis(sheet)


def _mark(sheet: _Sheet, span: FaultSpan, y: float) -> None:
    x, width = _extent(sheet, span)
    sheet.add(
        f'<rect class="fault" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="13" rx="2"'
        f' fill="{COLOURS[span.kind]}"><title>{escape(_told(span))}</title></rect>'
    )
    if width > LABEL_PX:
        sheet.add(
            f'<text class="on" x="{x + width / 2:.1f}" y="{y + 10:.1f}" text-anchor="middle"'
            f' font-size="10" pointer-events="none">{span.kind}</text>'
        )


def _lags(sheet: _Sheet, height: float) -> None:
    """How many records each follower was behind; logarithmic, so that one long pause does not hide the rest."""
    samples = sheet.result.samples
    names = list(samples[-1].nodes) if samples else []
    most = max([10.0, *(n.lag_records for s in samples for n in s.nodes.values())])
    top = float(ceil(log10(most)))
    _axes(sheet, height, top, "lag in records", lambda v: f"{10**v:,.0f}" if v else "0", steps=int(top))
    for number, name in enumerate(names):
        lags = [(s.at_s, log10(max(1, s.nodes[name].lag_records))) for s in samples if name in s.nodes]
        line = _path(sheet, _thinned(lags, max), top, height)
        sheet.add(f'<path d="{line}" fill="none" stroke="{NODES[number % len(NODES)]}" stroke-width="1.3"/>')
    sheet.y += height + 6
    _time_axis(sheet)


def _legend(sheet: _Sheet) -> None:
    x = float(LEFT)
    used = {span.kind for span in sheet.result.spans}
    for kind, colour in COLOURS.items():
        if kind in used:
            sheet.add(f'<rect x="{x:.1f}" y="{sheet.y:.1f}" width="12" height="12" rx="2" fill="{colour}"/>')
            sheet.text(x + 17, sheet.y + 10, kind, kind="soft")
            x += 30 + 7.2 * len(kind)
    sheet.y += 34


def _metrics(sheet: _Sheet, height: float) -> None:
    """Small panels side by side: memory, descriptors, threads, disk of each node."""
    samples = sheet.result.samples
    names = list(samples[-1].nodes) if samples else []
    gap = 46
    width = (WIDTH - LEFT - RIGHT - gap * (len(METRICS) - 1)) / len(METRICS)
    for place, (metric, (unit, _)) in enumerate(METRICS.items()):
        x = LEFT + place * (width + gap)
        series = {n: [(s.at_s, float(getattr(s.nodes[n], metric))) for s in samples] for n in names}
        top = max([1.0, *(value for points in series.values() for _, value in points)])
        sheet.text(x, sheet.y + 4, metric, kind="head")
        sheet.text(x + width, sheet.y + 4, f"most {amount(top, unit)}", kind="soft", anchor="end")
        base = sheet.y + 14 + height
        sheet.add(f'<line class="grid" x1="{x:.1f}" y1="{base:.1f}" x2="{x + width:.1f}" y2="{base:.1f}"/>')
        for number, name in enumerate(names):
            points = _thinned([p for p in series[name] if p[1]], max, SMALL_POINTS_MAX)
            steps = " L".join(
                f"{x + width * at / sheet.end_s:.1f},{base - (height - 4) * value / top:.1f}"
                for at, value in points
            )
            if steps:
                sheet.add(
                    f'<path d="M{steps}" fill="none" stroke="{NODES[number % len(NODES)]}" stroke-width="1.2">'
                    f"<title>{name}</title></path>"
                )
    sheet.y += height + 34
    x = float(LEFT)
    for number, name in enumerate(names):
        sheet.add(
            f'<rect x="{x:.1f}" y="{sheet.y - 10:.1f}" width="12" height="12" fill="{NODES[number % 9]}"/>'
        )
        sheet.text(x + 17, sheet.y, name, kind="soft")
        x += 44


# -- parts -----------------------------------------------------------------------------------------


def _axes(
    sheet: _Sheet, height: float, top: float, what: str, told: Callable[[float], str], *, steps: int = 4
) -> None:
    for step in range(steps + 1):
        value = top * step / steps
        y = sheet.y + height - height * step / steps
        sheet.add(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        sheet.text(LEFT - 8, y + 4, told(value), kind="soft", anchor="end")
    middle = sheet.y + height / 2
    sheet.add(
        f'<text class="soft" transform="translate(18 {middle:.1f}) rotate(-90)" text-anchor="middle">{what}</text>'
    )


def _time_axis(sheet: _Sheet) -> None:
    step = _step(sheet.end_s)
    at = 0.0
    while at <= sheet.end_s + 0.01:
        sheet.text(sheet.x(at), sheet.y + 14, clock(at), kind="soft", anchor="middle")
        at += step
    sheet.y += 34


def _step(end_s: float) -> float:
    """Between eight and a dozen marks at round times."""
    for step in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400):
        if end_s / step <= 12:
            return float(step)
    return end_s / 10


def _nice(value: float) -> float:
    """The next round number."""
    scale = 10.0 ** int(log10(value))
    return next(scale * m for m in (1, 1.2, 1.6, 2, 2.4, 4, 6, 8, 10, 12) if scale * m >= value)


def _extent(sheet: _Sheet, span: FaultSpan) -> tuple[float, float]:
    x = sheet.x(span.began_s)
    return x, max(2.0, sheet.x(span.ended_s or sheet.end_s) - x)


def _told(span: FaultSpan) -> str:
    whom = f"{span.victim}, the primary" if span.primary else span.victim
    text = f"{span.kind} of {whom}: {clock(span.began_s)} for {span.ended_s - span.began_s:.1f} s"
    return f"{text}; {span.gap_s:.2f} s without a write"


def _rates(samples: list[Sample], count: Callable[[Sample], int]) -> list[tuple[float, float]]:
    """What was counted in each interval, per second."""
    every = max(1, -(-len(samples) // POINTS_MAX))
    chosen = samples[::every]
    return [(b.at_s, (count(b) - count(a)) / max(b.at_s - a.at_s, 1e-6)) for a, b in pairwise(chosen)]


def _thinned(
    points: list[tuple[float, float]],
    join: Callable[[Sequence[float]], float],
    most: int = POINTS_MAX,
) -> list[tuple[float, float]]:
    """At most so many points that a screen can show; ``join`` makes one value of several."""
    every = max(1, -(-len(points) // most))
    return [
        (points[i][0], join([value for _, value in points[i : i + every]]))
        for i in range(0, len(points), every)
    ]


def _path(sheet: _Sheet, points: list[tuple[float, float]], top: float, height: float) -> str:
    base = sheet.y + height
    steps = " L".join(
        f"{sheet.x(at):.1f},{base - height * min(1.0, value / top):.1f}" for at, value in points
    )
    return f"M{steps}" if steps else "M0,0"


def _stretches(samples: list[Sample], name: str, end_s: float) -> list[tuple[float, float, str]]:
    """(from, to, role) of one node, neighbours with the same role joined."""
    found: list[tuple[float, float, str]] = []
    for sample in samples:
        role = sample.nodes[name].role
        if found and found[-1][2] == role:
            continue
        if found:
            found[-1] = (found[-1][0], sample.at_s, found[-1][2])
        found.append((sample.at_s, end_s, role))
    if found:
        found[-1] = (found[-1][0], samples[-1].at_s, found[-1][2])
    return found
