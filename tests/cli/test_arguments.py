"""Breaks when a first argument is taken for something else than it is, or looked at longer than needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from actqkv_cpp import ParameterError
from actqkv_cpp.cli._arguments import split


def test_four_bytes_tell_a_model(tmp_path: Path) -> None:
    """A model of 30 GB without the usual ending is read whole before it is opened."""
    model = tmp_path / "model"
    with model.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(1 << 40)  # a hole: reading it whole ends in MemoryError
    assert split([str(model), "Who?"]) == (model, ["Who?"])
    with model.open("r+b") as file:
        file.write(b"Once")
    with pytest.raises(ParameterError, match="no GGUF model"):
        split([str(model), "Who?"])
