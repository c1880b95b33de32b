"""Curves over steps as inline SVG.

Enters: points of one or more runs.  Leaves: an <svg> element that needs nothing outside it; its axes
take the colour of the text around it, so that it is readable in light and dark.
Promises: every point lies inside the frame; every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 12.0, 10.0, 24.0
MOST_POINTS = 600
"""Points of a curve; more cannot be told apart on a screen."""
COLOURS = 6
"""Runs that have a colour of their own (page.py's style sheet)."""
_TICKS = 4


@dataclass(frozen=True)
class Curve:
    """A line of one run."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


def plot(title: str, curves: Sequence[Curve], marks: Sequence[tuple[float, str, int]] = ()) -> str:
    """The figure; empty where no curve has a point.  `marks`: step, words, colour."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    steps = [step for curve in curves for step, _ in curve.points]
    values = [value for curve in curves for _, value in curve.points]
    across = _Axis(min(0.0, *steps), max(steps), _LEFT, WIDTH - _RIGHT)
    up = _Axis(min(values), max(values), HEIGHT - _BOTTOM, _TOP)
    lines = [_grid(across, up)]
    for step, words, colour in marks:
        if step <= across.high:
            x = across.at(step)
            lines.append(
                f'<line class="mark c{colour % COLOURS}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP:.0f}" '
                f'y2="{HEIGHT - _BOTTOM:.0f}"><title>{escape(words)}</title></line>'
            )
    for curve in curves:
        points = " ".join(f"{across.at(step):.1f},{up.at(value):.1f}" for step, value in _thinned(curve.points))
        style = " dashed" if curve.dashed else ""
        last = f"{escape(curve.name)}: {curve.points[-1][1]:.4g} at step {curve.points[-1][0]:.0f}"
        shape, place = "polyline", f'points="{points}"'
        if len(curve.points) == 1:
            left, _, top = points.partition(",")
            shape, place = "circle", f'cx="{left}" cy="{top}" r="3"'
        lines.append(f'<{shape} class="c{curve.colour % COLOURS}{style}" {place}><title>{last}</title></{shape}>')
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(lines)}</svg></figure>"
    )


class _Axis:
    """A linear scale from values to places."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + (abs(low) or 1.0)
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        return self._begin + (value - self.low) / (self.high - self.low) * (self._end - self._begin)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / _TICKS))
        step = next(size * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (size * factor) <= _TICKS + 1)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(across: _Axis, up: _Axis) -> str:
    lines = []
    for value in up.ticks():
        y = up.at(value)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in across.ticks():
        lines.append(f'<text x="{across.at(value):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{value:,.0f}</text>')
    return "".join(lines)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS; of each stretch the lowest and the highest, so that a spike stays in sight."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretch = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept
