"""What tests of the evaluation share: a result made up, and rooms without a model."""

from __future__ import annotations

from typing import Any

from actqkv_cpp.evaluation.results import Cell, Record, Result, rows
from actqkv_cpp.evaluation.samples import Finding, Room

LENGTHS = (4096, 8192, 16384)
METHODS: tuple[tuple[str, int | None], ...] = (("actqkv", 1024), ("actqkv", 2048), ("streaming", 2048), ("dense", None))


def make_result(**change: Any) -> Result:
    """Scores, heat maps, positions and a cell that cannot run; nothing of it was measured."""
    cells = [
        Cell(suite=suite, method=method, budget=budget, length=length)
        for suite in ("needle", "perplexity")
        for length in LENGTHS
        for method, budget in METHODS
    ]
    records = []
    for cell in cells:
        if cell.method == "dense" and cell.length == LENGTHS[-1]:
            records.append(Record(cell=cell, sample=0, reason="exact positions end at <8,192> tokens"))
            continue
        records += [Record(cell=cell, sample=i, findings=(_finding(cell, i),)) for i in range(11)]
    known: dict[str, Any] = {
        "version": "0.1.0",
        "commit": None,
        "started": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a <CPU>", "threads": 2},
        "model": {
            "name": "a & b.gguf",
            "description": "llama",
            "parameters": 11_300_000,
            "trained_length": 8192,
            "sha256": "0",
        },
        "parameters": {"seed": 5, "samples": {"needle": 11}},
        "rows": rows(cells, records),
    }
    return Result(**(known | change))


def _finding(cell: Cell, i: int) -> Finding:
    if cell.suite == "perplexity":
        return Finding(score=0.5, n=32, depth=i / 10, measures={"nll": 2.0, "kl": 0.01 * i})
    good = cell.method != "streaming" or i > 8
    recalls = {"needle_selected": 1.0} if cell.method == "actqkv" else {}
    return Finding(score=float(good), depth=i / 10, attended_max=2048, attended_mean=2000.0, recalls=recalls)


def words_room(suite: str, n_ctx: int, *, n_samples: int = 11, seed: int = 0, text: str | None = None) -> Room:
    """A room whose tokens are four characters each."""
    return Room(
        suite=suite,
        n_ctx=n_ctx,
        n_samples=n_samples,
        seed=seed,
        count=lambda text: -(-len(text) // 4),
        cut=lambda text, n: text[: 2 * n] + text[len(text) - 2 * n :],
        n_template=20,
        text=text,
    )
