"""Breaks when benchmark models cannot be made: libllama or our graph refuses them, or they are never the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))  # models/ belongs to the repository, not to the installed package

from actqkv_cpp import Llama
from models import random_weights


@pytest.mark.parametrize("file_type", ["f16", "q8_0", "q4_k_m"])
def test_model_runs(tmp_path: Path, file_type: str) -> None:
    """A model of random weights does not load, runs densely, or its activations overflow."""
    path = tmp_path / "tiny.gguf"
    random_weights.write(path, shape="tiny", file_type=file_type)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]
    with Llama(path, n_ctx=512, n_threads=1, verbose=False) as llm:
        assert llm.engine == "actqkv"
        assert llm.n_vocab() == random_weights.SHAPES["tiny"].n_vocab
        assert llm.tokenize(b"Who kept the key?")
        assert llm.session is not None
        logits = llm.session.decode(np.arange(300), n_logits=1)
        assert np.isfinite(logits).all()
        assert 0.1 < logits.std() < 10


def test_same_arguments_give_the_same_file(tmp_path: Path) -> None:
    """Figures of two days were read on two models."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        random_weights.main(["tiny", str(tmp_path / name), "--type", "q4_k_m", "--seed", str(seed)])
    one, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert one == same
    assert one != other


def test_wrong_use(tmp_path: Path) -> None:
    """A misspelt shape or type, or a folder that is not there, ends in a traceback, or leaves files behind."""
    for arguments in (["s161", "out.gguf"], ["tiny", "out.gguf", "--type", "q5"], ["tiny"]):
        with pytest.raises(SystemExit) as usage:
            random_weights.main(arguments)
        assert usage.value.code == 2
    with pytest.raises(SystemExit, match="error: "):
        random_weights.main(["tiny", str(tmp_path / "missing" / "out.gguf")])
    with pytest.raises(ValueError, match="q4_k_m"):
        random_weights.write(tmp_path / "out.gguf", shape="tiny", file_type="q5")
    assert not list(tmp_path.iterdir())
