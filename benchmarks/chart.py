"""A bar chart as SVG: each figure's ratio as a share of its goal."""

from __future__ import annotations

from html import escape
from typing import Any

__all__ = ["chart"]

WIDTH, LEFT, RIGHT = 900, 400, 90
ROW, TOP, BOTTOM = 26, 46, 30
SHARE_MAX = 2.0
MET, MISSED, SPREAD, INK, GRID = "#2f7d4f", "#b5482f", "#1a1a1a", "#333333", "#cccccc"


def chart(results: list[dict[str, Any]]) -> str:
    """One bar for each result that has a ratio; 1 is the goal, more is better, whiskers are min and max."""
    rows = [result for result in results if result["ratio"] is not None and result["goal"]]
    height = TOP + ROW * len(rows) + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / SHARE_MAX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="12" role="img" aria-label="kvrep: each ratio as a share of its goal">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-size="15" fill="{INK}">',
        "Ratio to the reference, as a share of the goal</text>",
    ]
    for share in (0.5, 1.0, 1.5, 2.0):
        x = LEFT + share * scale
        dash = "" if share == 1 else ' stroke-dasharray="2 3"'
        parts.append(
            f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - BOTTOM}"'
            f' stroke="{INK if share == 1 else GRID}"{dash}/>'
            f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle" fill="{INK}">'
            f"{'goal' if share == 1 else f'{share:g} x goal'}</text>"
        )
    for i, result in enumerate(rows):
        parts += _row(result, TOP + i * ROW, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def share(result: dict[str, Any], ratio: float) -> float:
    """``ratio`` as a share of the goal, such that more is better."""
    goal: float = result["goal"]
    return ratio / goal if result["sense"] == "at least" else goal / max(ratio, 1e-9)


def _row(result: dict[str, Any], y: int, scale: float) -> list[str]:
    middle = share(result, result["ratio"])
    ends = sorted(share(result, result[name]) for name in ("ratio_min", "ratio_max"))
    low, high = (LEFT + min(end, SHARE_MAX) * scale for end in ends)
    width = min(middle, SHARE_MAX) * scale
    label = f"{result['number']}  {result['what']}"
    if len(label) > 62:
        label = label[:60] + "…"
    centre = y + ROW / 2 - 2
    text_x = max(LEFT + width, high) + 6
    return [
        f'<text x="{LEFT - 8}" y="{centre + 4:.1f}" text-anchor="end" fill="{INK}">{escape(label)}</text>',
        f'<rect x="{LEFT}" y="{y + 3}" width="{width:.1f}" height="{ROW - 10}"'
        f' fill="{MET if middle >= 1 else MISSED}"/>',
        f'<line x1="{low:.1f}" y1="{centre:.1f}" x2="{high:.1f}" y2="{centre:.1f}" stroke="{SPREAD}"/>',
        f'<text x="{text_x:.1f}" y="{centre + 4:.1f}" fill="{INK}">{result["ratio"]:.2f}x</text>',
    ]
