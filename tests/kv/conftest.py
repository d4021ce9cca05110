"""The small programs that run C++ of native/kv without a session, as a fixture."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import compile_program

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT / "tests" / "ops"))  # cuda_library


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A program from one source beside this file and others of native/."""

    def compile_here(driver: str, *sources: str) -> Path:
        try:
            return compile_program(tmp_path_factory.mktemp("program"), driver, *sources)
        except FileNotFoundError as error:
            pytest.skip(str(error))

    return compile_here
