"""Breaks when the package exports something else than it says, or when importing it becomes slow."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import actqkv_cpp


def test_all_is_the_public_surface() -> None:
    """Breaks when a public name is missing from __all__, or __all__ names what is not there."""
    ours = {
        name for name, value in vars(actqkv_cpp).items() if getattr(value, "__module__", "").startswith("actqkv_cpp")
    }
    assert {name for name in ours if not name.startswith("_")} <= set(actqkv_cpp.__all__)
    for name in actqkv_cpp.__all__:
        assert getattr(actqkv_cpp, name) is not None


def test_unknown_name() -> None:
    """Breaks when the lazy import swallows unknown names."""
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = actqkv_cpp.no_such_name


def test_import_is_cheap() -> None:
    """Breaks when importing the package loads NumPy, llama.cpp or the native library."""
    code = (
        "import sys, actqkv_cpp; print([m for m in ('numpy', 'llama_cpp', 'actqkv_cpp._actqkv') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("pattern", "only"),
    [(r"\bos\.(environ|getenv)\b", "_env.py"), (r"import .*\b_actqkv\b|_actqkv import", "_native.py")],
)
def test_one_place_for(pattern: str, only: str) -> None:
    """Breaks when another module reads the environment, or imports the native module past its rules."""
    package = Path(actqkv_cpp.__file__).parent
    found = {
        file.relative_to(package).as_posix() for file in package.rglob("*.py") if re.search(pattern, file.read_text())
    }
    assert found == {only}
