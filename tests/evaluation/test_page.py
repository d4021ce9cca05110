"""The report: one file that needs nothing else, with what the results say and nothing that they do not."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluation_support import LENGTHS, make_result

from actqkv_cpp import drawing
from actqkv_cpp.errors import ParameterError, StateError
from actqkv_cpp.evaluation import figure, page
from actqkv_cpp.evaluation.views import View
from actqkv_cpp.files import check_free

VOID = {"meta", "line", "rect", "circle", "path", "polyline", "polygon", "br", "link", "img"}


class _Balance(HTMLParser):
    """Collects tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles.append(data)


@pytest.fixture(scope="module")
def html() -> str:
    return page.render([make_result()])


def parsed(html: str) -> _Balance:
    parser = _Balance()
    parser.feed(html)
    return parser


def test_stands_alone(html: str) -> None:
    """The page loads something, runs a script, or is no whole HTML."""
    assert not re.search(r"<(?:script|link|img|iframe)|\b(?:src|href)=|https?:|url\(|@import", html)
    parser = parsed(html)
    assert parser.wrong == []
    assert parser.open == []
    assert "prefers-color-scheme: dark" in html


def test_only_pages_of_ours_are_overwritten(html: str, tmp_path: Path) -> None:
    """A report takes the place of somebody's file."""
    path = tmp_path / "report.html"
    for text in (None, html):
        if text is not None:
            path.write_text(text, encoding="utf-8")
        check_free(path, drawing.MARK)
    path.write_text("<!doctype html>mine", encoding="utf-8")
    for taken, words in ((path, "was not written by actqkv report"), (tmp_path, "is a folder"), (path / "a", "no fol")):
        with pytest.raises(ParameterError, match=words):
            check_free(taken, drawing.MARK)


def test_text_is_escaped(html: str) -> None:
    """A name with a sign of HTML breaks the page."""
    assert "a &amp; b.gguf" in html
    assert "a &lt;CPU&gt;" in html
    assert "<CPU>" not in html
    assert "&lt;8,192&gt;" in html


def test_maps_and_charts(html: str) -> None:
    """A heat map, the map of selected chunks or a chart is missing, or shows other figures than the results."""
    for title in (
        "Accuracy against length",
        "Accuracy against budget",
        "Foretelling text, per position",
        "All figures",
    ):
        assert f"<h2>{title}</h2>" in html
    assert html.count("needle&#x27;s chunk selected</p>") == 2  # of actqkv at two budgets
    assert html.count("<p>answered right</p>") == 4
    titles = parsed(html).titles
    assert titles.count("4k, depth 0%: 0.0 % of 1") == 1  # streaming
    assert titles.count("4k, depth 0%: 100.0 % of 1") == 3 + 2
    assert titles.count("16k, depth 0%: n/a") == 1  # dense
    assert any(re.fullmatch(r"streaming 2k, 4k: 18\.2 % \(.*, n = 11\)", title) for title in titles)
    assert 'title="exact positions end at &lt;8,192&gt; tokens"' in html


def test_without_recalls() -> None:
    """A map of what was never recorded is drawn."""
    result = make_result()
    rows = tuple(row for row in result.rows if row.cell.method != "actqkv")
    found = page.render([make_result(rows=rows)])
    assert "chunk selected" not in found
    assert "<p>answered right</p>" in found
    assert "Accuracy against budget" not in found


def test_results_are_joined() -> None:
    """Results of different models, or one result twice, are drawn as one; or rows stand in the order of the files."""
    one = make_result()
    halves = [make_result(rows=one.rows[12:]), make_result(rows=one.rows[:12])]
    joined = View(tuple(halves))
    assert sorted(map(str, joined.rows)) == sorted(map(str, one.rows))
    for suite in joined.suites:
        lengths = [row.cell.length or 0 for row in joined.rows if row.cell.suite == suite]
        assert lengths == sorted(lengths)
    with pytest.raises(StateError, match="two results have needle under actqkv at 4k"):
        page.render([one, one])
    with pytest.raises(StateError, match="different models"):
        page.render([one, make_result(model=one.model | {"sha256": "1"})])
    other = make_result(rows=one.rows[12:], parameters=one.parameters | {"chunk": 16})
    with pytest.raises(StateError, match="chunk None and 16"):
        page.render([halves[1], other])


def test_views() -> None:
    """A chart joins points that do not belong together."""
    view = View((make_result(),))
    by_length = {chart.title: chart for chart in view.by_length()}
    assert set(by_length) == {"needle", "perplexity"}
    points = {view.label(curve.series): [point.x for point in curve.points] for curve in by_length["needle"].curves}
    assert points["actqkv 2k"] == list(LENGTHS)
    assert points["dense"] == list(LENGTHS[:2])
    flat = [curve for chart in view.by_budget() for curve in chart.curves if curve.flat]
    assert {curve.series.method for curve in flat} == {"dense"}
    assert all([point.x for point in curve.points] == [1024, 2048] for curve in flat)


@pytest.mark.parametrize("suffix", drawing.FORMATS)
def test_pictures(tmp_path: Path, suffix: str) -> None:
    """A picture cannot be drawn, or half of one is left."""
    path = tmp_path / f"figure{suffix}"
    for _ in range(2):
        check_free(path, drawing.MARK)
        figure.draw([make_result()], path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_nothing_to_draw(tmp_path: Path) -> None:
    """A picture of nothing is written."""
    result = make_result()
    row = next(
        row for row in result.rows if row.cell.suite == "needle" and row.cell.method == "dense" and not row.depths
    )
    with pytest.raises(ParameterError, match="nothing to draw"):
        figure.draw([make_result(rows=(row,))], tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
