"""Pictures, PNG or SVG, by matplotlib (the optional extra `plot`): what evaluations and benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from actqkv_cpp.errors import ParameterError
from actqkv_cpp.files import written_atomically
from actqkv_cpp.tables import size

MARK = "actqkv report"  # how a page or a picture of ours is known
FORMATS = (".png", ".svg")
COLOURS = ("#0b6e8f", "#c2562d", "#6a4fa3", "#9a7b12", "#4c4a48", "#2f855a", "#b03a6f", "#5a7fb8")
MARKERS = "os^Dv"
INK, SOFT, RULE = "#1c1b1a", "#6b6763", "#e6e2dc"
_COLUMNS = 3
_PANEL_INCHES = (4.2, 3.1)
_DPI = 160


def draw(panels: Sequence[Callable[[Any], None]], path: Path) -> None:
    """One picture of at least one panel; each is called with axes of its own.

    Raises:
        ParameterError: matplotlib is not installed.
    """
    try:
        figures = import_module("matplotlib.figure")
    except ImportError:
        raise ParameterError(
            "pictures are drawn by matplotlib, which is not installed", 'pip install "actqkv[plot]"'
        ) from None
    n_columns = min(_COLUMNS, len(panels))
    n_rows = -(-len(panels) // _COLUMNS)
    width, height = _PANEL_INCHES
    figure = figures.Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    for i, panel in enumerate(panels):
        panel(figure.add_subplot(n_rows, n_columns, i + 1))
    mark = {"Software" if path.suffix == ".png" else "Creator": MARK}
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=_DPI, facecolor="white", metadata=mark)


def style(axes: Any, title: str) -> None:
    """Title and ticks as in every picture of ours."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def style_curves(axes: Any, *, x_label: str, y_label: str) -> None:
    """Labels, lines across and the legend of a panel of curves."""
    axes.set_xlabel(x_label, fontsize=8, color=SOFT)
    axes.set_ylabel(y_label, fontsize=8, color=SOFT)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, frameon=False)


def style_tokens(axes: Any, xs: Sequence[int]) -> None:
    """x by its logarithm, with a tick for each of these numbers of tokens."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [size(x) for x in xs])
    axes.minorticks_off()
