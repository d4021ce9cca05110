"""`actqkv report` on results of `actqkv bench`: what is drawn, and what is refused. test_cli_eval.py has the others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_support import Actqkv, assert_failed

from actqkv_cpp.bench import MemoryUse, Result, Row, StageUse
from actqkv_cpp.bench.figure import draw, join
from actqkv_cpp.bench.results import Phase, Subject, read
from actqkv_cpp.errors import StateError

PHASES: tuple[Phase, ...] = ("prefill", "decode")
DEPTHS = (512, 8192, 131072)
SUBJECTS = (
    Subject("actqkv", "actqkv", "f16"),
    Subject("llama.cpp", "dense", "f16"),
    Subject("llama.cpp", "dense", "q8_0"),
)


def make_row(subject: Subject, phase: Phase, depth: int) -> Row:
    """llama.cpp slows down with the depth, and is not measured at the greatest."""
    ours = subject.engine == "actqkv"
    ms = 10.0 if ours else 10.0 + depth / 1000
    return Row(
        **subject._asdict(),
        phase=phase,
        depth=depth,
        ms_per_token=ms,
        measured=ours or depth < DEPTHS[-1],
        n=1,
        spread_ms=(ms, ms),
        context="read",
        stages={"graph": StageUse(ms_per_token=3.0, bytes_per_token=1e6)} if ours else None,
        memory=MemoryUse(resident_bytes=9, weights_bytes=4, kv_bytes=2, summary_bytes=1) if ours else None,
    )


def make_result(**change: Any) -> Result:
    """Nothing of it was measured."""
    known: dict[str, Any] = {
        "version": "0.1.0",
        "commit": None,
        "started": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a CPU", "threads": 2},
        "model": {"name": "a & b.gguf", "sha256": "0" * 64},
        "settings": {"retrieval": {"budget": 2048}},
        "rows": tuple(make_row(subject, phase, depth) for subject in SUBJECTS for phase in PHASES for depth in DEPTHS),
        "notes": ("llama.cpp f16 is not measured at 131,072",),
    }
    return Result(**(known | change))


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_result_file(tmp_path: Path) -> None:
    """A result that was written is read back as another one."""
    result = make_result()
    assert read(write(tmp_path / "bench.json", result.to_json())) == result


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: "[1]", "no result"),
        (lambda text: text.replace('"actqkv-bench"', '"actqkv-bench-kernels"'), "no result"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 7'), "version 7"),
        (lambda text: text.replace('"spread_ms"', '"spread"'), "lacks"),
        (lambda text: text.replace('"stages": {', '"stages": [1], "before": {'), "lacks"),
        (lambda text: text.replace('"ms_per_token": 10.0', '"ms_per_token": "fast"'), "lacks"),
        (lambda text: text.replace('"memory": {', '"memory": [1], "before": {'), "lacks"),
    ],
)
def test_files_that_are_none(tmp_path: Path, change: object, words: str) -> None:
    """A damaged or foreign file ends in a traceback, or in a picture of something else."""
    assert callable(change)
    path = tmp_path / "bench.json"
    path.write_text(change(json.dumps(make_result().to_json())), encoding="utf-8")
    with pytest.raises(StateError, match=words) as caught:
        read(path)
    assert caught.value.hint


def test_results_are_joined() -> None:
    """A curve is drawn through figures of two models, processors or budgets, or through one figure twice."""
    whole = make_result()
    halves = [make_result(rows=whole.rows[:6]), make_result(rows=whole.rows[6:])]
    assert join(halves) == whole.rows
    with pytest.raises(StateError, match="two results have prefill of actqkv f16 at 512"):
        join([whole, whole])
    for change, words in (
        ({"model": whole.model | {"sha256": "1" * 64}}, r"differ in model: a & b.gguf \(00000000\) and"),
        ({"machine": whole.machine | {"cpu": "another"}}, "differ in processor: a CPU and another"),
        ({"machine": whole.machine | {"threads": 1}}, "differ in threads: 2 and 1"),
        ({"settings": {"retrieval": {"budget": 512}}}, "differ in budget: 2048 and 512"),
    ):
        with pytest.raises(StateError, match=words):
            join([whole, make_result(rows=(), **change)])


def test_picture(actqkv: Actqkv, tmp_path: Path) -> None:
    """A picture cannot be drawn, not even over one of ours, or takes the place of somebody's file."""
    pytest.importorskip("matplotlib")
    write(tmp_path / "bench.json", make_result().to_json())
    path = tmp_path / "bench.png"
    for _ in range(2):
        drawn = actqkv("report", "bench.json", "-o", path.name)
        assert (drawn.status, drawn.out) == (0, ""), drawn.err
        assert path.read_bytes().startswith(b"\x89PNG\r")
    path.write_text("mine", encoding="utf-8")
    assert_failed(actqkv("report", "bench.json", "-o", path.name), path.name, "another name")
    assert path.read_text(encoding="utf-8") == "mine"


def test_what_was_not_measured_is_hollow(tmp_path: Path) -> None:
    """An extrapolated figure looks like a measured one, or two curves look alike."""
    pytest.importorskip("matplotlib")
    svg = tmp_path / "bench.svg"
    measured = tuple(replace(row, measured=True) for row in make_result().rows)
    for rows, n in ((make_result().rows, 2 * len(PHASES)), (measured, 0)):  # of llama.cpp with two types
        draw([make_result(rows=rows)], svg)
        text = svg.read_text(encoding="utf-8")
        assert text.count("stroke-dasharray") == n
        assert len(re.findall(r"<use [^>]*fill: #ffffff; stroke:", text)) == n
        assert len(set(re.findall(r"fill: none; stroke: (#\w+); stroke-width: 1\.5", text))) == len(SUBJECTS)


def test_wrong_results(actqkv: Actqkv, tmp_path: Path) -> None:
    """What cannot be drawn ends in a traceback, in a page of nothing, or over the file that was there."""
    marked = make_result().to_json()
    write(tmp_path / "bench.json", marked)
    write(tmp_path / "eval.json", {"format": "actqkv-eval", "format_version": 1})
    write(tmp_path / "old.json", {name: value for name, value in marked.items() if not name.startswith("format")})
    write(tmp_path / "kernels.json", {"format": "actqkv-bench-kernels", "format_version": 1, "kernels": []})
    for name in ("out.html", "out.png"):
        (tmp_path / name).write_text("<!-- actqkv report -->", encoding="utf-8")
    for files, out, words in (
        (["bench.json"], "out.html", ["out.html", "pictures only", ".svg"]),
        (["bench.json", "eval.json"], "out.png", ["actqkv eval", "actqkv bench", "drawn apart"]),
        (["old.json"], "out.png", ["old.json", "its format is not named", "must run again"]),
        (["kernels.json"], "out.png", ["kernels.json", "actqkv-bench-kernels", "actqkv bench --json"]),
        (["bench.json", "bench.json"], "out.png", ["two results have prefill of actqkv f16 at 512"]),
    ):
        assert_failed(actqkv("report", *files, "-o", out), *words)
        assert (tmp_path / out).read_text(encoding="utf-8") == "<!-- actqkv report -->"
