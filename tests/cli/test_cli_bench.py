"""`actqkv bench`: what it prints and how it fails. Figures are not looked at: a benchmark is never a test."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from cli_support import Actqkv, assert_failed
from tiny_gguf import make_tiny_gguf

from actqkv_cpp import __version__, methods
from actqkv_cpp.__main__ import main
from actqkv_cpp.bench import measure
from actqkv_cpp.bench.results import read
from actqkv_cpp.files import file_hash

FAST = ("--quick", "--threads", "1")
KEYS = {"engine", "method", "kv_type", "phase", "depth", "tokens_per_s", "ms_per_token", "measured", "n"}
STAGES = {"graph", "probe", "score", "refine", "attend", "append", "summarize", "other"}


def test_json(actqkv: Actqkv, babbler: Path, tmp_path: Path) -> None:
    """--json is another object than was promised or than is read back, an engine is missing, or a copied context is
    called read."""
    found = actqkv("bench", babbler, "--lengths", "512,256,768", "--peer-read", "512", "--json", *FAST)
    assert found.status == 0, found.err
    result = json.loads(found.out)
    (tmp_path / "bench.json").write_text(found.out, encoding="utf-8")
    assert read(tmp_path / "bench.json").to_json() == result
    assert (result["format"], result["format_version"], result["version"]) == ("actqkv-bench", 1, __version__)
    assert {"commit", "started", "machine", "model", "settings", "rows"} <= set(result)
    assert result["model"]["sha256"] == file_hash(babbler)
    assert result["machine"]["threads"] == 1
    assert result["machine"]["read_gb_per_s"] > 0
    assert result["model"]["bytes"] > 0
    rows = result["rows"]
    assert {(row["engine"], row["phase"], row["depth"]) for row in rows} == {
        (engine, phase, depth)
        for engine in ("actqkv", "llama.cpp")
        for phase in ("prefill", "decode")
        for depth in (256, 512, 768)
    }
    for row in rows:
        assert set(row) >= KEYS
        assert row["measured"] is True
        assert row["n"] == 1
        assert row["kv_type"] == "f16"
        assert row["tokens_per_s"] * row["ms_per_token"] == pytest.approx(1000)
        assert row["spread_ms"][0] <= row["ms_per_token"] <= row["spread_ms"][1]
        peer = row["engine"] == "llama.cpp"
        assert row["method"] == ("dense" if peer else "actqkv")
        assert row["context"] == ("copied" if peer and row["depth"] > 512 else "read")
        assert (row["stages"] is None) == (row["memory"] is None) == peer
        assert (row["least_ms_per_token"] is None) == (peer or row["depth"] == 256)
    ours = [row for row in rows if row["engine"] == "actqkv"]
    for row in ours:
        assert set(row["stages"]) == STAGES
        assert sum(stage["ms_per_token"] for stage in row["stages"].values()) <= 1.01 * row["ms_per_token"]
        memory = row["memory"]
        assert memory["resident_bytes"] > memory["kv_bytes"] > 0
    assert math.isclose(2 * ours[0]["memory"]["kv_bytes"], ours[2]["memory"]["kv_bytes"], rel_tol=0.1)


def test_copies_of_ours(actqkv: Actqkv, babbler: Path) -> None:
    """--read reads on all the same, or a session made of copies is called read."""
    lengths = ("--lengths", "1k,2560", "--read", "1k", "--peer-read", "256", "--budget", "640")
    found = actqkv("bench", babbler, *lengths, "--json", *FAST)
    assert found.status == 0, found.err
    ours = [row for row in json.loads(found.out)["rows"] if row["engine"] == "actqkv"]
    assert [(row["depth"], row["context"]) for row in ours if row["phase"] == "decode"] == [
        (1024, "read"),
        (2560, "copied"),
    ]
    assert ours[3]["memory"]["kv_bytes"] > 2 * ours[0]["memory"]["kv_bytes"] > 0
    found = actqkv("bench", babbler, *lengths, *FAST)
    assert "except at 2,560: copies of chunks follow the first 1,024 there" in " ".join(found.out.split())


def test_samples_that_take_too_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], babbler: Path
) -> None:
    """A depth at which llama.cpp would take hours is measured all the same, or left out in silence."""
    monkeypatch.setattr(measure, "_SAMPLE_LIMIT_S", 0.0)
    arguments = ["bench", str(babbler), "--lengths", "256,512,768", "--peer-read", "256", "--json", *FAST]
    monkeypatch.setattr(sys, "argv", ["actqkv", *arguments])
    with contextlib.suppress(SystemExit):
        main()
    result = json.loads(capsys.readouterr().out)
    measured = {(row["engine"], row["depth"]): row["measured"] for row in result["rows"] if row["phase"] == "decode"}
    assert measured == {
        (engine, depth): engine == "actqkv" or depth < 768
        for engine in ("actqkv", "llama.cpp")
        for depth in (256, 512, 768)
    }
    assert "llama.cpp f16 is not measured at 768: a sample of decode would take" in " ".join(result["notes"])


def test_least_depth_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], babbler: Path
) -> None:
    """What ours at the least depth is compared with was measured at another time, or at another depth."""
    taken: list[tuple[str, str, int]] = []
    sample = measure.Benchmark._sample

    def noting(self: measure.Benchmark, engine: Any, phase: Any) -> Any:
        taken.append((phase, engine.subject.engine, engine.depth))
        _, stats = sample(self, engine, phase)
        return engine.depth / 1e6 * self._sample_tokens(phase), stats  # a token takes a microsecond per token before it

    monkeypatch.setattr(measure.Benchmark, "_sample", noting)
    arguments = ["bench", str(babbler), "--lengths", "256,768", "--peer-read", "256", "--repeat", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["actqkv", *arguments, "--json"])
    with contextlib.suppress(SystemExit):
        main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    least = [row["least_ms_per_token"] for row in rows if row["engine"] == "actqkv"]
    assert least == [None, None, pytest.approx(0.256), pytest.approx(0.256)]
    deep = [(phase, engine, depth) for phase, engine, depth in taken[8:] if phase == "decode"]
    assert deep == 2 * [("decode", "actqkv", 768), ("decode", "llama.cpp", 768), ("decode", "actqkv", 256)]


def test_kv_type(actqkv: Actqkv, babbler: Path) -> None:
    """--kv-type does not reach both engines, or the plan is that of f16."""
    rows = {}
    for kv_type in ("f16", "q8_0"):
        found = actqkv(
            "bench", babbler, "--lengths", "512", "--peer-read", "512", "--kv-type", kv_type, "--json", *FAST
        )
        assert found.status == 0, found.err
        rows[kv_type] = json.loads(found.out)["rows"]
        assert {(row["engine"], row["kv_type"]) for row in rows[kv_type]} == {
            (e, kv_type) for e in ("actqkv", "llama.cpp")
        }
    memory = {t: next(row["memory"] for row in found if row["memory"]) for t, found in rows.items()}
    assert memory["q8_0"]["kv_bytes"] < memory["f16"]["kv_bytes"]


def test_peer_kv_types(actqkv: Actqkv, babbler: Path) -> None:
    """llama.cpp is not measured with each type, its rows of two types are mixed up, or one takes the other's blob."""
    lengths = ("--lengths", "256,512", "--peer-read", "512", "--peer-kv-types", "f16,q8_0,f16")
    found = actqkv("bench", babbler, *lengths, "--json", *FAST)
    assert found.status == 0, found.err
    result = json.loads(found.out)
    assert result["settings"]["peer_kv_types"] == ["f16", "q8_0"]
    rows = {(row["engine"], row["kv_type"], row["phase"], row["depth"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 12
    assert {row[:2] for row in rows} == {("actqkv", "f16"), ("llama.cpp", "f16"), ("llama.cpp", "q8_0")}
    assert all(row["measured"] and row["context"] == "read" for row in rows.values())
    found = actqkv("bench", babbler, *lengths, *FAST)
    assert re.search(r"^.* llama\.cpp +ours/ +llama\.cpp +ours/ ", found.out, re.MULTILINE)
    assert re.search(r"^.* f16 tok/s +llama\.cpp +q8_0 tok/s +llama\.cpp ", found.out, re.MULTILINE)
    assert re.findall(r"^  (?:prefill|decode) +(?:256|512)(?: +[\d,.-]+){8}$", found.out, re.MULTILINE)
    for kv_type in ("f16", "q8_0"):
        assert f"llama.cpp {kv_type} (dense, flash attention) read up to 512 tokens" in found.out


def test_copies_that_llama_cpp_cannot_make(actqkv: Actqkv, babbler: Path) -> None:
    """llama.cpp dies of moving quantised keys of heads that are no multiple of 64, and takes the benchmark along."""
    found = actqkv("bench", babbler, "--lengths", "512", "--peer-read", "256", "--kv-type", "q4_0", *FAST)
    assert found.status == 0, found.err
    assert "llama.cpp cannot copy q4_0 keys of heads of 32: --peer-read 512" in found.out + found.err


def test_another_llama_cpp(actqkv: Actqkv, babbler: Path) -> None:
    """The llama_cpp of --peer-python is not measured, or takes the place of the linked one."""
    lengths = ("--lengths", "256,512", "--peer-read", "256")
    found = actqkv("bench", babbler, *lengths, "--peer-python", sys.executable, "--json", *FAST)
    assert found.status == 0, found.err
    result = json.loads(found.out)
    assert result["settings"]["other_version"] == llama_cpp.__version__
    rows = {(row["engine"], row["phase"], row["depth"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 12
    for phase in ("prefill", "decode"):
        for depth, context in ((256, "read"), (512, "copied")):
            linked, other = (rows[name, phase, depth] for name in ("llama.cpp", "other llama.cpp"))
            assert (linked["context"], other["context"]) == (context, context)
            assert other["ms_per_token"] > 0
            assert other["method"] == "dense"
    found = actqkv("bench", babbler, "--lengths", "256", "--peer-python", sys.executable, *FAST)
    assert re.search(r"^.* f16 tok/s +llama\.cpp +f16 tok/s +other ", found.out, re.MULTILINE)
    assert f"other llama.cpp is that of --peer-python, {llama_cpp.__version__}," in found.out


def test_interpreters_without_llama_cpp(actqkv: Actqkv, babbler: Path, tmp_path: Path) -> None:
    """--peer-python without llama_cpp, or without Python, ends in a traceback, or is left out."""
    with_peer = ("bench", babbler, "--lengths", "256", *FAST, "--peer-python")
    assert_failed(actqkv(*with_peer, tmp_path / "python"), "does not run", "--peer-python")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    assert_failed(actqkv(*with_peer, bare), "has no llama_cpp", "pip install")
    dying = tmp_path / "dying"
    dying.write_text('#!/bin/sh\n[ "$2" = -c ] || kill -SEGV $$\n')
    dying.chmod(0o755)
    assert_failed(actqkv(*with_peer, dying), "does not run this model", "status -11")


def test_exact_methods_beyond_the_trained_length(actqkv: Actqkv, babbler: Path) -> None:
    """A method that answers nothing beyond the trained 2,048 tokens ends the benchmark there, first or not."""
    found = actqkv("bench", babbler, "--lengths", "2k", "--peer-read", "256", "--methods", "dense", *FAST)
    assert found.status == 0, found.err
    assert "dense is measured at clamped positions: its exact ones end at 2,048." in found.out


def test_tables(actqkv: Actqkv, babbler: Path) -> None:
    """The tables lack a ratio, or do not say what was copied."""
    found = actqkv("bench", babbler, "--lengths", "256,512", "--peer-read", "256", "--methods", "actqkv,dense", *FAST)
    assert found.status == 0, found.err
    assert len(re.findall(r"^  (?:prefill|decode) +(?:256|512) +[\d,.]+ ", found.out, re.MULTILINE)) == 16
    assert len(re.findall(r"^.* f16 tok/s +llama\.cpp ", found.out, re.MULTILINE)) == 2
    assert "At 512 llama.cpp's context is made of copies of the first 256 tokens" in found.out
    assert "~" not in found.out
    assert "\x1b" not in found.out + found.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "5x"], ["5x", "128k"]),
        (["--lengths", ","], ["no length", "512"]),
        (["--lengths", "300"], ["300", "256"]),
        (["--lengths", "0"], ["256"]),
        (["--lengths", "1000m"], ["bytes"]),
        (["--methods", "actqvk"], ["actqvk", "actqkv"]),
        (["--methods", ""], ["no method"]),
        (["--lengths", "256", "--budget", "128"], ["budget"]),
        (["--lengths", "256", "--peer-read", "0"], ["--peer-read"]),
        (["--lengths", "512", "--read", "300"], ["--read", "256"]),
        (["--lengths", "512", "--read", "256"], ["clamped"]),
        (["--kernels", "--lengths", "1k"], ["chunks", "--lengths"]),
        (["--kernels", "--peer-python", "python"], ["--kernels", "--peer-python"]),
        (["--kernels", "--peer-kv-types", "f16"], ["--kernels", "--peer-kv-types"]),
        (["--peer-kv-types", "f16,q5_0"], ["q5_0", "--peer-kv-types", "f16, q8_0, q4_0"]),
        (["--peer-kv-types", ","], ["no type", "f16, q8_0, q4_0"]),
        (["--kv-type", "f64", "--lengths", "256"], ["f64", "f16"]),
        (["--kernels", "--read", "1k"], ["--kernels", "--read"]),
        (["--kernels", "--methods", "dense"], ["--kernels", "--methods"]),
    ],
)
def test_wrong_values(actqkv: Actqkv, babbler: Path, arguments: list[str], words: list[str]) -> None:
    """A value that means nothing ends in a traceback, or in figures."""
    assert_failed(actqkv("bench", babbler, *arguments, *FAST), *words)


SEARCH = ["search", "search"]
KERNELS = ["summarize", "probe", "score", "spread", "cells", *SEARCH, "cutoff", "refine", "attend", "attend"]


def test_kernels(actqkv: Actqkv, babbler: Path) -> None:
    """A kernel is missing, a rate is not its amount over its time, or the shape is not the model's."""
    found = actqkv("bench", babbler, "--kernels", "--lengths", "8704", "--budget", "1k", "--json", *FAST)
    assert found.status == 0, found.err
    result = json.loads(found.out)
    assert (result["format"], result["format_version"]) == ("actqkv-bench-kernels", 1)
    assert {"version", "commit", "started"} <= set(result)
    assert [row["kernel"] for row in result["kernels"]] == KERNELS
    shape, machine = result["shape"], result["machine"]
    assert (shape["depth"], shape["budget"], shape["d_head"], shape["granted"]) == (8704, 1024, 32, 14)
    assert result["working_set_bytes"] >= 4 * machine["last_level_cache_bytes"] > 0
    for row in result["kernels"]:
        assert row["spread_ms"][0] <= row["ms"] <= row["spread_ms"][1]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["gop_per_s"] == pytest.approx(row["operations"] / row["ms"] / 1e6)
        assert 0 < row["read_share"] == pytest.approx(row["gb_per_s"] / machine["read_gb_per_s"], rel=0.05)
        assert 0 < row["compute_share"] == pytest.approx(row["gop_per_s"] / machine["peak_gop_per_s"], rel=0.05)
    attend = result["kernels"][-2]
    assert attend["bytes"] == 2 * 1024 * shape["n_head_kv"] * 32 * 2
    cells, score, vote = result["kernels"][4:7]
    n_pairs = 65536 * 3 * (16 + 64 + 128 + 128)  # of a key and a centre, as blocks become wider
    assert cells["bytes"] == 65536 * 32 * 2
    assert n_pairs * 2 * 32 < cells["operations"] < 1.1 * n_pairs * 2 * 32
    n_cells = 2 * 4096 // 64 + 512 // 32  # of two stretches, of which k-means leaves some out, and of what is left over
    assert 0.8 * n_cells < score["bytes"] / shape["n_head_kv"] / (8 + 32 / 2) <= 1.1 * n_cells
    n_keys, n_scores = shape["n_head"] * (shape["picked"] * 64 + 512), shape["n_head"] * n_cells
    assert shape["picked"] == methods()["actqkv"]["scan"] // 64
    assert 0.8 * n_keys < (vote["operations"] - n_scores) / (32 // 4 + 7) < 1.25 * n_keys
    assert 0.8 * n_keys < (vote["bytes"] - 4 * n_scores) / (3 + 32 // 8) < 1.4 * n_keys, "a cell's keys by sixteens"


def test_kernels_without_a_model(actqkv: Actqkv) -> None:
    """--kernels loads a model that nobody named, or its table lacks a kernel."""
    found = actqkv("bench", "--kernels", "--kv-type", "q8_0", "--budget", "1k", *FAST)
    assert found.status == 0, found.err
    assert re.findall(r"^  ([a-z]+) .+ \d+ %$", found.out, re.MULTILINE) == KERNELS
    assert "32 query heads, 8 KV heads of 64, q8_0 KV" in found.out


def test_wrong_use(actqkv: Actqkv, babbler: Path) -> None:
    """An unknown option is ignored."""
    for arguments in (["--lenghts", "256"], ["--repeat", "0"], ["--threads", "0"]):
        assert actqkv("bench", babbler, *arguments).status == 2


def test_model_that_llama_cpp_runs(actqkv: Actqkv, tmp_path: Path) -> None:
    """llama.cpp is compared with itself and called ours."""
    model = make_tiny_gguf(tmp_path / "gemma.gguf", arch="gemma", tied=True)
    assert_failed(actqkv("bench", model, "--lengths", "256", *FAST), "llama.cpp")
