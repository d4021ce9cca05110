"""Results as one picture: tokens per second against the depth, reading and answering."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from actqkv_cpp import drawing
from actqkv_cpp.bench.results import Phase, Result, Row, Subject
from actqkv_cpp.drawing import COLOURS, MARKERS
from actqkv_cpp.errors import StateError

_PHASES: tuple[Phase, ...] = ("prefill", "decode")
_TICKS = (1.0, 2.0, 5.0)  # times powers of ten, of tokens per second
_HASH_CHARS = 8  # of the model's SHA-256, in errors


def draw(results: Sequence[Result], path: Path) -> None:
    """A panel for each phase, in it a curve for each engine, method and type of keys and values; both axes are
    logarithms. What was not measured is hollow, at the end of a dashed line.

    Raises:
        ParameterError: matplotlib is not installed.
        StateError: the results do not belong together (`join`).
    """
    rows = join(results)
    drawing.draw([partial(_panel, rows=rows, phase=phase, model=results[0].model["name"]) for phase in _PHASES], path)


def join(results: Sequence[Result]) -> tuple[Row, ...]:
    """The rows of all results, at least one.

    Raises:
        StateError: they differ in model, processor, threads or budget, or two of them have the same figure.
    """
    first = _common(results[0])
    for result in results[1:]:
        other = _common(result)
        for name, value in first.items():
            if other[name] != value:
                raise StateError(f"the results differ in {name}: {value} and {other[name]}", "draw a report for each")
    rows = tuple(row for result in results for row in result.rows)
    seen: set[tuple[Subject, Phase, int]] = set()
    for row in rows:
        figure = (row.subject, row.phase, row.depth)
        if figure in seen:
            raise StateError(
                f"two results have {row.phase} of {row.subject.label} at {row.depth:,}", "give one of them"
            )
        seen.add(figure)
    return rows


def _common(result: Result) -> dict[str, Any]:
    """What figures of one curve must have in common."""
    return {
        "model": f"{result.model['name']} ({result.model['sha256'][:_HASH_CHARS]})",
        "processor": result.machine["cpu"],
        "threads": result.machine["threads"],
        "budget": result.settings["retrieval"]["budget"],
    }


def _panel(axes: Any, *, rows: Sequence[Row], phase: Phase, model: str) -> None:
    for i, subject in enumerate(dict.fromkeys(row.subject for row in rows)):
        curve = sorted((row for row in rows if (row.subject, row.phase) == (subject, phase)), key=lambda row: row.depth)
        measured = [row for row in curve if row.measured]
        colour, look = COLOURS[i % len(COLOURS)], {"marker": MARKERS[i % len(MARKERS)], "ms": 4}
        axes.plot(*_points(measured), "-", color=colour, label=subject.label, **look)
        if len(measured) < len(curve):
            axes.plot(*_points(curve), "--", color=colour, linewidth=1)
            others = [row for row in curve if not row.measured]
            axes.plot(*_points(others), " ", color=colour, markerfacecolor="w", **look)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(import_module("matplotlib.ticker").LogLocator(subs=_TICKS))
    axes.yaxis.set_major_formatter("{x:,g}")
    drawing.style_tokens(axes, sorted({row.depth for row in rows}))
    drawing.style_curves(axes, x_label="depth in tokens", y_label="tokens/s")
    drawing.style(axes, f"{phase}, {model}")


def _points(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    return [row.depth for row in rows], [row.tokens_per_s for row in rows]
