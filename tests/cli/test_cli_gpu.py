"""Breaks when the commands do not say what a GPU does for them, or fail where it does nothing.

The GPU is the emulator.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from cli_support import Actqkv, assert_failed
from emulated import emulated_gpu

SMALL = ("--ctx", "1k", "--sink", "4", "--local", "32", "--chunk", "8", "--budget", "76", "--threads", "1")


@pytest.fixture
def note(tmp_path: Path) -> Path:
    path = tmp_path / "note.txt"
    path.write_text("The lamp stood on the shelf. " * 6)
    return path


def test_ask_says_where_it_attends(actqkv: Actqkv, babbler: Path, note: Path) -> None:
    """The same answer as on the processor; JSON has what went over the bus."""
    arguments = ("ask", babbler, "-d", note, "Where?", "--json", "--max-tokens", "4", *SMALL)
    on_gpu = actqkv(*arguments, **emulated_gpu())
    on_cpu = actqkv(*arguments, "--vram", "0", **emulated_gpu())
    assert on_gpu.status == on_cpu.status == 0, on_gpu.err + on_cpu.err
    before, after = on_gpu.err.split("method actqkv attends")
    assert "to be loaded: attention on GPU 0 (emulated), at most 512 MiB of its memory" in before
    assert "attention on GPU 0 (emulated), at most " in after
    [place] = [line for line in after.splitlines() if "attention on" in line]
    assert "; 0 layers on the GPU: llama-cpp-python was built without CUDA, this builds it: " in place
    assert place.endswith(f"--force-reinstall llama-cpp-python=={version('llama-cpp-python')}")
    assert "attention on the processor: vram is 0" in on_cpu.err
    without = actqkv(*arguments, **emulated_gpu(devices=0))
    assert "CUDA" not in without.err, "who has no GPU is told of it"
    found, other = json.loads(on_gpu.out), json.loads(on_cpu.out)
    assert found["answers"][0]["answer"] == other["answers"][0]["answer"]
    assert found["gpu"]["n_calls"] > 0
    assert 0 < found["gpu"]["memory_bytes"] <= 512 << 20
    assert other["gpu"] is None


def test_stats_and_a_failure_in_between(actqkv: Actqkv, babbler: Path, note: Path) -> None:
    """/stats has hit rate and bytes; where the GPU fails, the answer comes from the processor and /stats says why."""
    arguments = ("chat", babbler, "-d", note, "--max-tokens", "4", *SMALL)
    fine = actqkv(*arguments, stdin="Where?\n/stats\n", **emulated_gpu())
    assert fine.status == 0, fine.err
    assert "GPU: " in fine.err
    assert "of planned chunks were there" in fine.err
    failed = actqkv(*arguments, stdin="Where?\n/stats\n", **emulated_gpu(fail_launch=30))
    assert failed.status == 0, failed.err
    assert "attention on the processor: GPU: launch failure" in failed.err
    assert failed.out == fine.out


def test_memory_that_cannot_be_pinned(actqkv: Actqkv, babbler: Path, note: Path) -> None:
    """Slow copies are said nowhere, or at every step; the answer needs no word of them."""
    arguments = ("ask", babbler, "-d", note, "Where?", "--max-tokens", "2", *SMALL)
    found = actqkv(*arguments, **emulated_gpu(fail_pin=1))
    assert found.status == 0, found.err
    assert found.err.count("are in ordinary memory, which is copied more slowly") == 1


def test_bad_vram(actqkv: Actqkv, babbler: Path, note: Path) -> None:
    """Too little is refused with what is needed; no size is wrong usage; no GPU is said, and the processor answers."""
    arguments = ("ask", babbler, "-d", note, "Where?", "--max-tokens", "2", *SMALL)
    assert_failed(actqkv(*arguments, "--vram", "10k", **emulated_gpu()), "needs at least", "or --vram 0")
    for wrong in ("much", "-1", "6x"):
        found = actqkv(*arguments, f"--vram={wrong}")
        assert found.status == 2, found.err
        assert "not a size in bytes" in " ".join(found.err.split())
    for env, why in (
        ({"ACTQKV_CUDA_LIBRARY": "/nowhere/lib.so"}, "the CUDA kernels do not load: /nowhere/lib.so"),
        (emulated_gpu(devices=0), "there is no GPU 0, 0 are visible"),
    ):
        found = actqkv(*arguments, "--vram", "1g", **env)
        assert found.status == 0, found.err
        assert f"attention on the processor: {why}" in found.err
