"""Results as one picture: heat maps and curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from actqkv_cpp import drawing
from actqkv_cpp.drawing import COLOURS, INK, MARKERS
from actqkv_cpp.errors import ParameterError
from actqkv_cpp.evaluation.results import Result
from actqkv_cpp.evaluation.views import Chart, HeatMap, Series, View
from actqkv_cpp.tables import size

_HEAT = ("#d2694c", "#f3ecdc", "#3f8f8b")  # of a share: 0, one half, 1
_NONE = "#efece7"  # a cell without a figure


def draw(results: Sequence[Result], path: Path) -> None:
    """Heat maps, then curves, in one picture.

    Raises:
        ParameterError: matplotlib is not installed, or the results have nothing to draw: one length, one budget.
        StateError: the results do not belong together (`View`).
    """
    view = View(tuple(results))
    panels = [_with(_heat_map, one, view) for maps in view.heat_maps() for one in maps]
    for charts in (view.by_length(), view.by_budget(), view.by_position()):
        panels += [_with(_chart, chart, view) for chart in charts]
    if not panels:
        raise ParameterError(
            "there is nothing to draw: one length, one budget and no depths",
            "evaluate at several --lengths or --budgets",
        )
    drawing.draw(panels, path)


def _with(panel: Callable[[Any, Any, View], None], what: Any, view: View) -> Callable[[Any], None]:
    return lambda axes: panel(axes, what, view)


def _heat_map(axes: Any, found: HeatMap, view: View) -> None:
    colours = import_module("matplotlib.colors")
    heat = colours.LinearSegmentedColormap.from_list("heat", _HEAT).with_extremes(bad=_NONE)
    scores = [[found.cells.get((depth, length)) for length in found.lengths] for depth in found.depths]
    grid = [[float("nan") if s is None or s.score is None else s.score for s in line] for line in scores]
    axes.imshow(grid, cmap=heat, vmin=0, vmax=1, aspect="auto")
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            if not math.isnan(value):
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=INK)
    axes.set_xticks(range(len(found.lengths)), [size(length) for length in found.lengths])
    axes.set_yticks(range(len(found.depths)), [f"{depth:.0%}" for depth in found.depths])
    drawing.style(axes, f"{found.suite}, {view.label(found.series)}: {found.title}")


def _chart(axes: Any, chart: Chart, view: View) -> None:
    scale = 100.0 if chart.unit == "%" else 1.0
    methods = list(dict.fromkeys(series.method for series in view.series))
    for curve in chart.curves:
        colour = COLOURS[methods.index(curve.series.method) % len(COLOURS)]
        mark = None if curve.flat else MARKERS[methods.index(curve.series.method) % len(MARKERS)]
        xs = [point.x for point in curve.points]
        label = _label(curve.series, chart, view)
        line = ":" if curve.flat else "-"
        axes.plot(xs, [scale * p.y for p in curve.points], line, marker=mark, ms=4, color=colour, label=label)
        if all(point.low is not None and point.high is not None for point in curve.points):
            low, high = ([scale * (end or 0.0) for end in ends] for ends in zip(*_ends(curve.points), strict=True))
            axes.fill_between(xs, low, high, color=colour, alpha=0.1, linewidth=0)
    xs = sorted({point.x for curve in chart.curves for point in curve.points})
    if chart.log_x:
        drawing.style_tokens(axes, xs)
    axes.set_ylim(0, 104 if chart.unit == "%" else None)
    drawing.style_curves(axes, x_label=chart.x_label, y_label=chart.unit)
    drawing.style(axes, chart.title)


def _ends(points: Sequence[Any]) -> list[tuple[float | None, float | None]]:
    return [(point.low, point.high) for point in points]


def _label(series: Series, chart: Chart, view: View) -> str:
    return series.method if chart.x_label.startswith("budget") else view.label(series)
