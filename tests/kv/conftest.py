"""Compiles the small programs that run C++ of native/kv without a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"

sys.path.insert(0, str(ROOT / "tests" / "ops"))  # cuda_library


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A program from one source beside this file and others of native/."""

    def compile_program(driver: str, *sources: str) -> Path:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            pytest.skip("no C++ compiler: install one, or set CXX")
        made = tmp_path_factory.mktemp("program") / Path(driver).stem
        include = [f"-I{NATIVE}", f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'kernels'}"]
        files = [Path(__file__).with_name(driver), *(NATIVE / name for name in sources)]
        subprocess.run([compiler, "-std=c++17", "-O1", "-pthread", *include, *files, "-o", made, "-ldl"], check=True)
        return made

    return compile_program
