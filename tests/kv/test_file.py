"""When this fails, a chunk is lost where the system refuses to have its file stand for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="a program's own mmap does not take the place of macOS's")
def test_a_file_that_cannot_be_mapped(compiled: Callable[..., Path], tmp_path: Path) -> None:
    """Breaks when memory that a file could not be mapped over is zeros, which attention would take for keys."""
    program = compiled("file_driver.cpp", "kv/file.cpp")
    done = subprocess.run([program, tmp_path / "a.akv"], capture_output=True, text=True, check=True)
    status, n_kept, n_bytes = map(int, done.stdout.split())
    assert status == 9  # ACTQKV_ERR_FILE
    assert n_kept == n_bytes
