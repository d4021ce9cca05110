"""The tiny models are tested: what is meant to load does, what is meant to be broken is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import tiny_gguf as tiny
from llama_oracle import LlamaError, load_llama
from reference_model import ReferenceModel, forward
from reference_support import random_tokens


def test_split_model_equals_whole(tmp_path: Path) -> None:
    """Breaks when the split files do not add up to the model that was split."""
    whole = tiny.make_tiny_gguf(tmp_path / "whole.gguf")
    first = tiny.make_tiny_gguf(tmp_path / "split.gguf", split_max_tensors=8)
    tokens = random_tokens(20)
    with load_llama(whole) as a, load_llama(first) as b:
        assert "-00001-of-" in first.name
        np.testing.assert_array_equal(a.decode(tokens), b.decode(tokens))


def test_models_are_deterministic(tmp_path: Path) -> None:
    """Breaks when two runs no longer make the same file from the same seed."""
    a = tiny.make_tiny_gguf(tmp_path / "a.gguf", seed=3).read_bytes()
    assert a == tiny.make_tiny_gguf(tmp_path / "b.gguf", seed=3).read_bytes()
    assert a != tiny.make_tiny_gguf(tmp_path / "c.gguf", seed=4).read_bytes()


def test_attention_is_peaked_here_and_there(tmp_path: Path) -> None:
    """Breaks when tiny models attend uniformly or to one token only: retrieval tests on them would mean nothing."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf")
    model = ReferenceModel(path)
    q, k, v = forward(path, random_tokens(200)).qkv[1]
    positions = np.arange(200)
    _, weights = ref.attend(q, positions, k, v, positions, params=ref.Params(positions="exact"), rope=model.rope)
    largest = weights[100:].max(axis=-1)
    assert 0.1 < np.median(largest) < 0.6
    assert largest.max() > 0.9


@pytest.mark.parametrize("make", [tiny.make_moe_gguf, tiny.make_gemma_gguf])
def test_foreign_models_load_in_libllama(make: Any, tmp_path: Path) -> None:
    """Breaks when the models meant for the dense path are not valid for libllama, or ours claims to know them."""
    path = make(tmp_path / "model.gguf")
    with load_llama(path) as llama:
        assert np.isfinite(llama.decode(random_tokens(40))).all()
    with pytest.raises(ValueError, match="no forward pass"):
        ReferenceModel(path)


REFUSED: dict[str, Any] = {
    "vocab only": tiny.make_vocab_only_gguf,
    "missing tensor": tiny.make_missing_tensor_gguf,
    "unknown architecture": tiny.make_unknown_arch_gguf,
    "truncated": tiny.make_truncated_gguf,
    "truncated header": lambda path: tiny.make_truncated_gguf(path, keep=0.01),
    "not a GGUF": tiny.make_not_gguf,
    "empty": tiny.make_empty_file,
    **{kind: lambda path, kind=kind: tiny.make_absurd_gguf(path, kind) for kind in tiny.ABSURD_KINDS},
    **{
        f"{key}={value}": lambda path, key=key, value=value: tiny.make_absurd_hparams_gguf(path, key, value)
        for key, value in tiny.REFUSED_HPARAMS
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    """Breaks when a file that is meant to be broken loads after all."""
    with pytest.raises(LlamaError, match="does not load"):
        load_llama(REFUSED[name](tmp_path / "broken.gguf"))


@pytest.mark.parametrize(
    "options",
    [{"metadata": dict([pair])} for pair in tiny.ABORTING_HPARAMS] + [{"arch": "qwen3", "rope_dim": 16}],
    ids=str,
)
def test_some_files_abort_libllama(options: dict[str, Any], tmp_path: Path) -> None:
    """Breaks when libllama refuses politely what it aborts on in 0.3.36: our own check may then go."""
    path = tiny.make_tiny_gguf(tmp_path / "abort.gguf", **options)
    code = f"import llama_oracle; llama_oracle.load_llama({str(path)!r})"
    # GGML_NO_BACKTRACE: ggml would start a debugger to print one.
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={"GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        check=False,
    )
    assert child.returncode < 0


def test_vocab_only_file_has_a_tokenizer(tmp_path: Path) -> None:
    """Breaks when the tokenizer loses its byte fall-back, its word pieces or its control tokens."""
    with load_llama(tiny.make_vocab_only_gguf(tmp_path / "vocab.gguf"), vocab_only=True) as llama:
        tokens = llama.tokenize("<|user|>the green key: é\n<|end|>")
        assert tokens[0] == tiny.FIRST_CONTROL + 1
        assert tokens[-1] == tiny.EOT
        assert tiny.FIRST_BYTE + ord("\n") in tokens
        assert tiny.FIRST_BYTE + 0xC3 in tokens
        assert len(tokens) < 14  # "the", "green" and "key" are one piece each
        assert llama.detokenize(tokens).replace("<|user|> ", "<|user|>") == "<|user|>the green key: é\n<|end|>"
