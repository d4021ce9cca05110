"""When this fails, a GPU's slots hold other bytes than the chunks that they are said to hold."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_library import build_emulated

SOURCES = ("kv/gpu_chunks.cpp", "kv/gpu_memory.cpp", "kv/hot_chunks.cpp", "kernels/cuda/load.cpp")


@pytest.fixture(scope="module")
def program(compiled: Callable[..., Path]) -> Path:
    return compiled("gpu_chunks_driver.cpp", *SOURCES)


@pytest.mark.parametrize("seed", range(3))
def test_planned_chunks_are_there(program: Path, seed: int) -> None:
    """Plans and guesses of several layers; then a GPU that is too small says so with both sizes."""
    done = subprocess.run([program, build_emulated(), str(seed)], capture_output=True, text=True, check=True)
    counted, refused = done.stdout.splitlines()
    assert counted == "right 1000 wrong 0"
    assert refused == "67108864 MiB for chunks on GPU 0, which has 1024 MiB free: out of memory"
