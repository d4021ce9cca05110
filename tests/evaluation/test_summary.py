"""The tables of an evaluation in the terminal."""

from __future__ import annotations

from evaluation_support import make_result

from actqkv_cpp.evaluation.results import Cell, Record, rows
from actqkv_cpp.evaluation.samples import Finding
from actqkv_cpp.evaluation.summary import render

WIDTH = 80
METHODS = ["actqkv", *(f"actqkv:summary=kv_head:refine={n}" for n in range(2, 6)), "streaming"]


def test_methods_with_many_columns_are_told_apart_by_task() -> None:
    """Breaks when names of methods are cut in the table of tasks, or a method is missing there."""
    cells = [Cell(suite="facts", method=method, budget=2048, length=1024) for method in METHODS]
    findings = tuple(Finding(score=score, task=task) for task, score in (("fact", 1.0), ("fact", 0.0), ("absent", 1.0)))
    records = [Record(cell=cell, sample=0, findings=findings) for cell in cells]
    text = render(make_result(rows=rows(cells, records)), width=WIDTH)
    assert max(map(len, text.splitlines())) <= WIDTH
    by_task = text[text.index("by task") :]
    assert [by_task.count(f"{method} 2k") for method in METHODS] == [1] * len(METHODS)
    assert by_task.count("50.0 (2)") == by_task.count("100.0 (1)") == len(METHODS)


def test_figures_of_many_recalls_are_whole() -> None:
    """Breaks when a table wider than the terminal cuts its figures."""
    cell = Cell(suite="facts", method="actqkv", budget=2048, length=1024)
    recalls = {f"recall number {i}": 0.125 + i / 1000 for i in range(9)}
    records = [Record(cell=cell, sample=0, findings=(Finding(score=1.0, recalls=recalls),))]
    text = render(make_result(rows=rows([cell], records)), width=WIDTH)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text
    assert [text.count(f"recall number {i}") for i in range(9)] == [1] * 9
    assert [text.count(f"{12.5 + i / 10:.1f}") for i in range(9)] == [1] * 9
