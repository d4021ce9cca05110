"""Charts as SVG that follows the page: colours are its CSS variables, so light and dark need no second drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from actqkv_cpp.evaluation.summary import percent
from actqkv_cpp.evaluation.views import Chart, Curve, HeatMap, Point, Series
from actqkv_cpp.tables import size

_WIDTH, _HEIGHT = 348, 216  # of a line chart, in CSS pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 40
_INSET = 10  # of the outermost points from the sides
_N_TICKS = 4
_TICK_WIDTH = 34
_WIDEST, _NARROWEST = 4.0, 1.6  # lines, in CSS pixels
_CELL_W, _CELL_H = 46, 22  # of a heat map
_MAP_LEFT, _MAP_TOP = 44, 8
_MARKERS = 5

StyleOf = Callable[[Series], tuple[int, int]]  # numbers of a series' colour and of its dashes


def line_chart(chart: Chart, style: StyleOf, label: Callable[[Series], str]) -> str:
    """Curves with their intervals as bands; every point says its figure when it is pointed at."""
    plot = _Plot(chart, style, label)
    order = sorted(chart.curves, key=lambda curve: not curve.flat)
    parts = [plot.grid(), plot.x_axis(), *map(plot.band, order), *map(plot.line, order)]
    return _svg(_WIDTH, _HEIGHT, f"{chart.title}: {chart.unit} against {chart.x_label}", parts)


def heat_map(found: HeatMap) -> str:
    """Depth downwards, length to the right; a cell is as warm as it fails."""
    width = _MAP_LEFT + _CELL_W * len(found.lengths) + 4
    height = _MAP_TOP + _CELL_H * len(found.depths) + 34
    parts = []
    for i, depth in enumerate(found.depths):
        y = _MAP_TOP + i * _CELL_H
        parts.append(_text(_MAP_LEFT - 6, y + _CELL_H / 2 + 4, f"{depth:.0%}", "end"))
        for j, length in enumerate(found.lengths):
            parts.append(_cell(found, _MAP_LEFT + j * _CELL_W, y, depth, length))
    below = _MAP_TOP + _CELL_H * len(found.depths)
    for j, length in enumerate(found.lengths):
        parts.append(_text(_MAP_LEFT + (j + 0.5) * _CELL_W, below + 15, size(length), "middle"))
    middle = _MAP_LEFT + _CELL_W * len(found.lengths) / 2
    parts.append(_text(middle, below + 30, "length", "middle"))
    return _svg(width, height, f"{found.suite}, {found.series.method}: {found.title}, by depth and length", parts)


def marker(x: float, y: float, kind: int, classes: str = "mark") -> str:
    """One of five marks, so that lines on each other can be told apart."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" class="{classes}"/>',
        f'<rect x="{x - 3.1:.1f}" y="{y - 3.1:.1f}" width="6.2" height="6.2" class="{classes}"/>',
        f'<path d="M{x:.1f} {y - 4.2:.1f}l4 7h-8z" class="{classes}"/>',
        f'<path d="M{x:.1f} {y - 4.4:.1f}l4.4 4.4l-4.4 4.4l-4.4-4.4z" class="{classes}"/>',
        f'<path d="M{x:.1f} {y + 4.2:.1f}l4-7h-8z" class="{classes}"/>',
    )
    return shapes[kind % _MARKERS]


def warmth(score: float) -> str:
    """The CSS colour of a share: `--miss` at 0, `--half` in the middle, `--hit` at 1."""
    end, far = ("--hit", 2 * score - 1) if score >= 0.5 else ("--miss", 1 - 2 * score)
    return f"color-mix(in oklab, var({end}) {100 * far:.0f}%, var(--half))"


def _cell(found: HeatMap, x: float, y: float, depth: float, length: int) -> str:
    box = f'x="{x + 0.75:.2f}" y="{y + 0.75:.2f}" width="{_CELL_W - 1.5}" height="{_CELL_H - 1.5}" rx="3"'
    score = found.cells.get((depth, length))
    if score is None or score.score is None:
        return f'<g><title>{size(length)}, depth {depth:.0%}: n/a</title><rect {box} class="na"/></g>'
    said = f"{size(length)}, depth {depth:.0%}: {percent(score.score)} % of {score.n}"
    text = _text(x + _CELL_W / 2, y + _CELL_H / 2 + 4, f"{100 * score.score:.0f}", "middle", "value")
    return f'<g><title>{said}</title><rect {box} style="fill:{warmth(score.score)}"/>{text}</g>'


class _Plot:
    """One line chart: where x (by its logarithm, for lengths and budgets) and y stand in the drawing."""

    def __init__(self, chart: Chart, style: StyleOf, label: Callable[[Series], str]) -> None:
        points = [point for curve in chart.curves for point in curve.points]
        self.chart, self.style, self.label = chart, style, label
        self.xs = sorted({point.x for point in points})
        self.top = 1.0 if chart.unit == "%" else _round_up(max(point.y for point in points))

    def x(self, value: float) -> float:
        scale = math.log if self.chart.log_x else float
        low, high = scale(self.xs[0]) if self.chart.log_x else 0.0, scale(self.xs[-1])
        share = (scale(value) - low) / (high - low) if high > low else 0.5
        return _LEFT + _INSET + share * (_WIDTH - _LEFT - _RIGHT - 2 * _INSET)

    def y(self, value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / self.top)

    def grid(self) -> str:
        parts = []
        for i in range(_N_TICKS + 1):
            value = self.top * i / _N_TICKS
            y = self.y(value)
            parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            text = f"{100 * value:.0f}" if self.chart.unit == "%" else f"{value:.3g}"
            parts.append(_text(_LEFT - 6, y + 4, text, "end"))
        return "".join(parts)

    def x_axis(self) -> str:
        """A tick for each x, as far as they do not run into each other."""
        parts, last = [], -math.inf
        for x in self.xs:
            if self.x(x) - last >= _TICK_WIDTH:
                last = self.x(x)
                text = size(x) if self.chart.log_x else f"{x / 1024:.2g}k"
                parts.append(_text(last, _HEIGHT - _BOTTOM + 16, text, "middle"))
        parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, self.chart.x_label, "middle"))
        return "".join(parts)

    def band(self, curve: Curve) -> str:
        """The interval of each point, as one area."""
        there = [f"{self.x(p.x):.1f},{self.y(p.high):.1f}" for p in curve.points if p.high is not None]
        back = [f"{self.x(p.x):.1f},{self.y(p.low):.1f}" for p in reversed(curve.points) if p.low is not None]
        if len(there) < 2:
            return ""
        return f'<polygon points="{" ".join(there + back)}" class="band c{self.style(curve.series)[0]}"/>'

    def line(self, curve: Curve) -> str:
        colour, dash = self.style(curve.series)
        way = " ".join(f"{self.x(point.x):.1f},{self.y(point.y):.1f}" for point in curve.points)
        width = max(_WIDEST - colour, _NARROWEST)  # so that lines on each other show both
        dashes = "flat" if curve.flat else f"d{dash}"
        parts = [f'<polyline points="{way}" class="line {dashes}" style="stroke-width:{width:g}"/>']
        for point in [] if curve.flat else curve.points:
            said = f"{escape(self.label(curve.series))}, {size(point.x)}: {self._said(point)}"
            parts.append(f"<g><title>{said}</title>{marker(self.x(point.x), self.y(point.y), colour)}</g>")
        return f'<g class="c{colour}">{"".join(parts)}</g>'

    def _said(self, point: Point) -> str:
        if self.chart.unit != "%":
            return f"{point.y:.4g} {self.chart.unit}"
        return f"{percent(point.y)} % ({percent(point.low)}-{percent(point.high)}, n = {point.n})"


def _round_up(value: float) -> float:
    """The next number of 1, 2, 2.5, 4, 5, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))


def _text(x: float, y: float, text: str, anchor: str, classes: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{classes}">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    size_of = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f'<svg {size_of} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
