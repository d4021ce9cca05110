"""Compiles the small programs that run C++ of native/kv without a session."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"


def compile_program(folder: Path, driver: str, *sources: str) -> Path:
    """A program from one source beside this file and others of native/. FileNotFoundError without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: install one, or set CXX")
    made = folder / Path(driver).stem
    include = [f"-I{NATIVE}", f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'kernels'}"]
    files = [Path(__file__).with_name(driver), *(NATIVE / name for name in sources)]
    subprocess.run([compiler, "-std=c++17", "-O1", "-pthread", *include, *files, "-o", made, "-ldl"], check=True)
    return made
