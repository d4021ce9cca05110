"""What is drawn of results, before it is drawn: heat maps, curves and labels. `page` and `figure` share it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from actqkv_cpp.errors import StateError
from actqkv_cpp.evaluation.recalls import SELECTED
from actqkv_cpp.evaluation.results import Result, Row, Score
from actqkv_cpp.tables import size

_COMMON = ("n_sink", "n_local", "chunk", "kv_type")  # parameters that figures beside each other must share
_EACH = "draw a report for each"


@dataclass(frozen=True)
class Series:
    """A method at a budget: what has one colour."""

    method: str
    budget: int | None

    def label(self, *, with_budget: bool) -> str:
        return f"{self.method} {size(self.budget)}" if with_budget and self.budget is not None else self.method


@dataclass(frozen=True)
class Point:
    """One figure of a curve: x in tokens, score with its interval; `y` alone where it is no share."""

    x: int
    y: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `flat`: it does not depend on x and is drawn across."""

    series: Series
    points: tuple[Point, ...]
    flat: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart: curves over lengths, budgets or positions.

    Attributes:
        unit: "%" where y is a share of 0 to 1, otherwise what y counts.
        log_x: whether equal factors of x are equally far apart.
    """

    title: str
    x_label: str
    unit: str
    curves: tuple[Curve, ...]
    log_x: bool = True


@dataclass(frozen=True)
class HeatMap:
    """Shares by depth and length under one method.

    Attributes:
        title: "answered right", or what else is shared out.
        cells: (depth, length) -> its score.
    """

    suite: str
    series: Series
    title: str
    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    cells: dict[tuple[float, int], Score]


@dataclass(frozen=True)
class View:
    """Results of one model, joined.

    Raises:
        StateError: they are of different models, or of runs with other parameters (`_COMMON`), or two of them have the
            same figure.
    """

    results: tuple[Result, ...]

    def __post_init__(self) -> None:
        first = self.results[0]
        for result in self.results[1:]:
            if result.model.get("sha256") != first.model.get("sha256"):
                raise StateError(
                    f"the results are of different models: {first.model['name']} and {result.model['name']}",
                    _EACH,
                )
            for name in _COMMON:
                theirs, ours = result.parameters.get(name), first.parameters.get(name)
                if theirs != ours:
                    raise StateError(f"the results are of different runs: {name} {ours} and {theirs}", _EACH)
        cells = [row.cell for row in self.rows]
        twice = next((cell for cell in cells if cells.count(cell) > 1), None)
        if twice is not None:
            raise StateError(
                f"two results have {twice.suite} under {twice.method} at {size(twice.length)}", "give one of them"
            )

    @property
    def rows(self) -> list[Row]:
        """Suite by suite in the order of the results, each from its shortest length."""
        return sorted(self._given, key=lambda row: (self.suites.index(row.cell.suite), row.cell.length or 0))

    @property
    def _given(self) -> list[Row]:
        return [row for result in self.results for row in result.rows]

    @property
    def series(self) -> list[Series]:
        """All methods in the order of the results, each with its budgets from the least."""
        found = dict.fromkeys(Series(row.cell.method, row.cell.budget) for row in self._given)
        methods = list(dict.fromkeys(series.method for series in found))
        return sorted(found, key=lambda series: (methods.index(series.method), series.budget or 0))

    @property
    def with_budget(self) -> bool:
        """Whether labels must say the budget, since a method has several."""
        budgets = {series.budget for series in self.series if series.budget is not None}
        return len(budgets) > 1

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(row.cell.suite for row in self._given))

    @property
    def lengths(self) -> list[int]:
        return sorted({row.cell.length for row in self.rows if row.cell.length is not None})

    def label(self, series: Series) -> str:
        return series.label(with_budget=self.with_budget)

    # -- charts

    def by_length(self) -> list[Chart]:
        """Score against length, a chart for each suite that was run at several."""
        charts = []
        for suite in self.suites:
            rows = [row for row in self.rows if row.cell.suite == suite and row.cell.length is not None]
            if len({row.cell.length for row in rows}) > 1:
                n_rows = Counter(Series(row.cell.method, row.cell.budget) for row in rows)
                curves = tuple(self._curve(series, rows) for series in self.series if n_rows[series] > 1)
                charts.append(Chart(suite, "length in tokens", "%", tuple(curve for curve in curves if curve.points)))
        return charts

    def by_budget(self) -> list[Chart]:
        """Score against budget, a chart for each suite and length that was run at several."""
        charts = []
        for suite, length in dict.fromkeys((row.cell.suite, row.cell.length) for row in self.rows):
            rows = [row for row in self.rows if (row.cell.suite, row.cell.length) == (suite, length)]
            budgets = sorted({row.cell.budget for row in rows if row.cell.budget is not None})
            if len(budgets) < 2:
                continue
            curves = []
            for method in dict.fromkeys(row.cell.method for row in rows):
                found = [row for row in rows if row.cell.method == method]
                flat = found[0].cell.budget is None
                points = tuple(
                    _point(budget, row.total)
                    for row in found
                    for budget in (budgets if flat else [row.cell.budget or 0])
                    if row.total.score is not None
                )
                if points:
                    curves.append(Curve(Series(method, None), points, flat))
            charts.append(Chart(f"{suite}, {size(length)}", "budget in tokens", "%", tuple(curves)))
        return charts

    def by_position(self) -> list[Chart]:
        """Divergence from dense attention, and perplexity, against the position in the text."""
        charts = []
        for name, title, unit in (
            ("kl", "divergence from dense", "nats per token"),
            ("perplexity", "perplexity", "perplexity"),
        ):
            for length in self.lengths:
                rows = [row for row in self.rows if row.cell.length == length and name in row.total.measures]
                curves = tuple(
                    Curve(
                        Series(row.cell.method, row.cell.budget),
                        tuple(
                            Point(round(depth * length), score.measures[name], None, None, score.n)
                            for depth, score in row.depths.items()
                            if name in score.measures
                        ),
                    )
                    for row in rows
                )
                if curves:
                    charts.append(Chart(f"{title}, {size(length)}", "position in tokens", unit, curves, log_x=False))
        return charts

    def heat_maps(self) -> list[tuple[HeatMap, ...]]:
        """For each suite and method: what was answered right and, where recorded, what was selected.

        Of suites that sweep depths: the needle, and others that were run at several lengths and have one part. Methods
        that were run at some of a suite's lengths only are left out.
        """
        found = []
        for suite in self.suites:
            rows = [row for row in self.rows if row.cell.suite == suite and row.cell.length is not None]
            lengths = {row.cell.length for row in rows}
            if (suite != "needle" and len(lengths) < 2) or any(
                row.tasks or "nll" in row.total.measures for row in rows
            ):
                continue
            for series in self.series:
                mine = [row for row in rows if Series(row.cell.method, row.cell.budget) == series]
                if any(row.depths for row in mine) and len(mine) == len(lengths):
                    found.append(_maps(suite, series, mine))
        return found

    def _curve(self, series: Series, rows: Sequence[Row]) -> Curve:
        points = tuple(
            _point(row.cell.length or 0, row.total)
            for row in sorted(rows, key=lambda row: row.cell.length or 0)
            if Series(row.cell.method, row.cell.budget) == series and row.total.score is not None
        )
        return Curve(series, points)


def _point(x: int, score: Score) -> Point:
    return Point(x, score.score or 0.0, score.ci_low, score.ci_high, score.n)


def _maps(suite: str, series: Series, rows: Sequence[Row]) -> tuple[HeatMap, ...]:
    lengths = tuple(sorted({row.cell.length or 0 for row in rows}))
    depths = tuple(sorted({depth for row in rows for depth in row.depths}))
    right = {(d, row.cell.length or 0): score for row in rows for d, score in row.depths.items()}
    maps = [HeatMap(suite, series, "answered right", depths, lengths, right)]
    selected = {
        place: Score(n=score.n, score=score.recalls[SELECTED], ci_low=None, ci_high=None)
        for place, score in right.items()
        if SELECTED in score.recalls
    }
    if selected:
        maps.append(HeatMap(suite, series, "needle's chunk selected", depths, lengths, selected))
    return tuple(maps)
