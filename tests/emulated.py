"""The emulator's libactqkv_cuda in place of the installed one, for tests of what is above the C API."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "ops"))
from cuda_library import build_emulated


def emulated_gpu(**faults: int) -> dict[str, str]:
    """The environment that has a process find the emulator's GPU. Skips the test without a compiler.

    Args:
        faults: as tests/emulator/cuda_runtime.h has them, in small letters.
    """
    try:
        library = build_emulated()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    wishes = {f"ACTQKV_EMULATOR_{name.upper()}": str(value) for name, value in faults.items()}
    return {"ACTQKV_CUDA_LIBRARY": str(library)} | wishes
