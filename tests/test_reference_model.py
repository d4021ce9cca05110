"""The oracle's model is tested: against llama.cpp itself, and fed by a session against its own forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import tiny_gguf as tiny
from llama_oracle import load_llama
from reference_model import ReferenceModel, forward, forward_session
from reference_support import NMSE_BOUNDS, cut, nmse, random_tokens

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-mha": {"n_head_kv": 4},
    "llama-mqa": {"n_head_kv": 1},
    "llama-wide-heads": {"d_head": 64},
    "llama-tied": {"tied": True},
    "llama-bias": {"qkv_bias": True},
    "llama-linear": {"rope_scaling": ("linear", 4.0)},
    "llama-linear-old-key": {"metadata": {"rope.scale_linear": 4.0}},
    "llama-yarn": {"rope_scaling": ("yarn", 4.0, 64)},
    "llama-yarn-magnitude": {"rope_scaling": ("yarn", 4.0, 512), "metadata": {"rope.scaling.attn_factor": 1.3}},
    "llama-3": {"rope_scaling": "llama3"},
    "qwen2": {"arch": "qwen2"},
    "qwen2-yarn": {"arch": "qwen2", "rope_scaling": ("yarn", 4.0, 64)},
    "qwen3": {"arch": "qwen3"},
    "qwen3-linear": {"arch": "qwen3", "rope_scaling": ("linear", 4.0), "d_head": 16},
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_llama_decode(name: str, tmp_path: Path) -> None:
    """Breaks when the oracle's forward pass, or a RoPE variant in it, is not llama.cpp's."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", **MODELS[name])
    tokens = random_tokens(160)
    with load_llama(path) as llama:
        logits = llama.decode(tokens)
    assert nmse(forward(path, tokens).logits, logits) < NMSE_BOUNDS["F32"][0]


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_forward_equals_llama_decode_quantised(quantisation: str, tmp_path: Path) -> None:
    """Breaks when weights of a stored type are read wrongly, or llama.cpp's rounding grew."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", quantisation=quantisation)
    tokens = random_tokens(100)
    with load_llama(path) as llama:
        logits = llama.decode(tokens)
    assert nmse(forward(path, tokens).logits, logits) < NMSE_BOUNDS[quantisation][0]


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q6_K"])
def test_forward_equals_llama_decode_k_quants(file_type: str, tmp_path: Path) -> None:
    """Breaks when the K-quant helper makes a file that libllama or the oracle reads differently."""
    source = tiny.make_tiny_gguf(tmp_path / "f16.gguf", n_embd=256, n_layer=2, quantisation="F16")
    path = tiny.quantize_gguf(source, tmp_path / "k.gguf", file_type)
    tokens = random_tokens(60)
    with load_llama(path) as llama:
        logits = llama.decode(tokens)
    assert path.stat().st_size < source.stat().st_size
    assert nmse(forward(path, tokens).logits, logits) < NMSE_BOUNDS[file_type][0]


@pytest.mark.parametrize("flash_attn", [False, True])
def test_llama_oracle_f16_kv_is_close(flash_attn: bool, tmp_path: Path) -> None:
    """Breaks when the context parameters of load_llama no longer reach libllama."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf")
    tokens = random_tokens(100)
    with load_llama(path, flash_attn=flash_attn, kv_type="f16") as llama:
        logits = llama.decode(tokens)
    error = nmse(forward(path, tokens).logits, logits)
    assert NMSE_BOUNDS["F32"][0] < error < NMSE_BOUNDS["f16 KV"][0]


@pytest.mark.parametrize(
    "key", ["attention.scale", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "logit_scale"]
)
def test_keys_that_libllama_ignores(key: str, tmp_path: Path) -> None:
    """Breaks when libllama starts to read a key for llama that the oracle, following 0.3.36, leaves out."""
    path = tiny.make_tiny_gguf(tmp_path / "m.gguf", rope_scaling=("yarn", 4.0, 512), metadata={key: 0.5})
    tokens = random_tokens(60)
    with load_llama(path) as llama:
        logits = llama.decode(tokens)
    assert nmse(forward(path, tokens).logits, logits) < NMSE_BOUNDS["F32"][0]


# Fed by a session


def test_model_with_a_dense_session_equals_forward(tmp_path: Path) -> None:
    """Breaks when the model fed by a session over windows differs from the plain forward pass."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", arch="qwen3", n_layer=2)
    model = ReferenceModel(path)
    params = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=4, positions="exact", select="all")
    tokens = random_tokens(50)
    logits, results = forward_session(model, model.session(params), tokens, cut(3, 16, 2))
    np.testing.assert_allclose(logits, forward(path, tokens).logits, atol=1e-9)
    assert [len(window) for window in results] == [2] * 5


def test_sparse_model_differs_but_little_at_a_generous_budget(tmp_path: Path) -> None:
    """Breaks when retrieval selects nothing useful: more budget has to bring the logits nearer to dense ones."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", n_layer=2)
    model = ReferenceModel(path)
    tokens = random_tokens(256)
    dense = forward(path, tokens).logits
    errors = []
    for budget in (40, 120, 264):
        params = ref.Params(n_sink=4, n_local=16, n_chunk_tokens=8, budget=budget, positions="exact")
        logits, _ = forward_session(model, model.session(params), tokens, cut(16, 16))
        errors.append(nmse(logits[-64:], dense[-64:]))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-20
