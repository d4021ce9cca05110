"""Rows, intervals and the result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_support import make_result

from actqkv_cpp.errors import StateError
from actqkv_cpp.evaluation.results import Cell, Record, interval, read, rows
from actqkv_cpp.evaluation.samples import Finding

CELL = Cell(suite="kv", method="actqkv", budget=2048, length=4096)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Wilson 1927, as tabled by Newcombe (1998, Statistics in Medicine 17, 857-872, method 3)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval(right: int, n: int, low: float, high: float) -> None:
    """Intervals in tables are too narrow, or leave 0 to 1."""
    assert interval(right / n, n) == pytest.approx((low, high), abs=6e-5)


def test_rows() -> None:
    """Means over findings are wrong: by task, by depth, weighted by positions, of what was recorded only."""
    findings = (
        Finding(score=1.0, task="a", depth=0.049, attended_max=2100, attended_mean=2000.0, recalls={"x": 1.0}),
        Finding(score=0.0, task="b", depth=0.96, attended_max=2200, attended_mean=2100.0),
        Finding(score=0.5, task="b", n=2, measures={"nll": 0.0}),
    )
    missing = Cell(suite="kv", method="dense", budget=None, length=4096)
    row, other = rows(
        [CELL, missing],
        [
            Record(cell=CELL, sample=0, findings=findings, n_read=100, read_s=0.5, n_cut=7),
            Record(cell=missing, sample=0, reason="too long"),
        ],
    )
    assert (row.total.n, row.total.score) == (4, 0.5)
    assert (row.total.ci_low, row.total.ci_high) == interval(0.5, 4)
    assert {task: (score.n, score.score) for task, score in row.tasks.items()} == {"a": (1, 1.0), "b": (3, 1 / 3)}
    assert {depth: score.score for depth, score in row.depths.items()} == {0.0: 1.0, 1.0: 0.0}
    assert row.total.recalls == {"x": 1.0}
    assert row.total.measures == {"nll": 0.0, "perplexity": 1.0}
    assert (row.attended_max, row.attended_mean, row.prefill_tokens_per_s, row.n_cut) == (2200, 2050.0, 200.0, 1)
    assert (other.total.score, other.total.n, other.reason) == (None, 0, "too long")


def test_result_file(tmp_path: Path) -> None:
    """A result that was written is read back as another one."""
    result = make_result()
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result.to_json()), encoding="utf-8")
    assert read(path) == read(tmp_path) == result
    for row in result.to_json()["rows"]:
        assert set(row) >= {"suite", "method", "budget", "length", "n", "score", "ci_low", "ci_high"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: "", "cut short"),
        (lambda text: "[1]", "no result"),
        (lambda text: '{"rows": []}', "no result"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 7'), "version 7"),
        (lambda text: text.replace('"ci_low"', '"low"'), "lacks"),
    ],
)
def test_files_that_are_none(tmp_path: Path, change: object, words: str) -> None:
    """A damaged or foreign file ends in a traceback, or in a report of nothing."""
    assert callable(change)
    path = tmp_path / "result.json"
    path.write_text(change(json.dumps(make_result().to_json())), encoding="utf-8")
    with pytest.raises(StateError, match=words) as caught:
        read(path)
    assert caught.value.hint
