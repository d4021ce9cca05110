"""Breaks when tests/gpu.py, which only a machine with a GPU runs, calls well what it skipped or what failed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import pytest

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs it with these options and a folder of its own; its status and what it prints."""

    def run(*arguments: str, **parts: Callable[..., bool]) -> tuple[int, str]:
        for name, part in parts.items():
            monkeypatch.setitem(gpu.PARTS, name, part)
        (tmp_path / gpu.LIBRARY).touch()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *arguments])
        status = gpu.main()
        return status, capsys.readouterr().out

    return run


def ends(result: Any) -> Callable[..., bool]:
    def part(out: Path, options: argparse.Namespace) -> bool:
        if isinstance(result, Exception):
            raise result
        return bool(result)

    return part


def test_what_was_skipped_is_not_ok(script: Run) -> None:
    """A part that could not run reads as one that ran; or fails the run."""
    status, out = script("--only", "build,check", build=ends(True), check=ends(gpu.Skipped("no such thing")))
    assert status == 0
    assert out.endswith("build: ok\ncheck: skipped: no such thing\n")


def test_a_failure_hides_no_other_part(script: Run) -> None:
    """The parts behind a failed one do not run, or the run ends well."""
    status, out = script("--only", "build,check,time", build=ends(False), check=ends(OSError("x")), time=ends(True))
    assert status == 1
    assert out.endswith("build: FAILED\ncheck: FAILED\ntime: ok\n")


def test_all_is_all(script: Run) -> None:
    """One command leaves a part out; or a part's limit is not what was asked for."""
    left: dict[str, float] = {}

    def part(name: str) -> Callable[..., bool]:
        def note(out: Path, options: argparse.Namespace) -> bool:
            left[name] = gpu._left(options)
            return True

        return note

    names = list(gpu.PARTS)
    status, _ = script("--all", "--limit", "7200", **{name: part(name) for name in names})
    assert status == 0
    assert list(left) == names
    assert {"install", "million"} <= set(names)
    assert all(7100 < seconds <= 7200 for seconds in left.values())
    assert set(gpu.PART_LIMIT_S) == set(names)


def test_runs_on_the_processor_are_not_compared(script: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`targets` takes times of a llama-cpp-python without CUDA for a card's."""
    monkeypatch.setattr(gpu, "_is_installed", lambda: True)
    (tmp_path / "llama_cpp.py").write_text("def llama_supports_gpu_offload():\n    return False\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, out = script("--only", "targets,million")
    assert status == 0
    assert out.count("skipped: llama-cpp-python was built without CUDA (actqkv doctor has the command)") == 2


def test_targets_are_of_the_run_within_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """The speed beside llama.cpp is taken from another run than the memory; or the floor is wrong."""

    def row(engine: str, phase: str, depth: int, ms: float, **more: Any) -> dict[str, Any]:
        return {
            "engine": engine,
            "phase": phase,
            "depth": depth,
            "ms_per_token": ms,
            "gpu": None,
            "memory": None,
        } | more

    on_card = [
        row("actqkv", "decode", 2048, 2.0),
        row("actqkv", "decode", 131072, 2.1, gpu={"memory_bytes": 900 << 20, "hit_rate": 0.6}),
        row("llama.cpp", "decode", 131072, 3.0, memory={"weights_bytes": 4e9, "kv_bytes": 16e9}),
        row("actqkv", "prefill", 2048, 0.1),
        row("actqkv", "prefill", 131072, 0.1),
    ]
    in_ram = [row("actqkv", "decode", 131072, 2.1), row("llama.cpp", "decode", 131072, 21.0)]
    gpu._tell_times({"card": on_card, "ram": in_ram}, 4000.0)
    assert "floor of llama.cpp's decode at 131,072, keys and values on the card: 5.0000 ms" in capsys.readouterr().out
    found = gpu._compare({"card": on_card, "ram": in_ram})
    assert found["GPU memory besides weights in the same run, MiB"] == (900.0, 1024.0, True)
    assert found["decode, speed over llama.cpp's with KV on the card"] == (3.0 / 2.1, 1.4, True)
    assert found["decode, speed over llama.cpp's with KV in RAM"][2]
