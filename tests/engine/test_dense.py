"""Breaks when the engine's forward pass is not llama.cpp's: method "dense" selects everything at exact positions.

The oracle is llama_decode with its fused attention and K and V in f16, which rounds where we round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf as tiny
from engine_support import Pieces, check, loaded, one_by_one, open_session, random_tokens, read
from llama_oracle import load_llama

from actqkv_cpp import Retrieval

YARN = ("yarn", 4.0, 512)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-mha": {"n_head_kv": 4},
    "llama-mqa": {"n_head_kv": 1},
    "llama-6-to-3": {"n_embd": 192, "n_head": 6, "n_head_kv": 3},
    "llama-wide-heads": {"d_head": 64},
    "llama-narrow-heads": {"d_head": 16},
    "llama-heads-of-24": {"d_head": 24},
    "llama-heads-of-96": {"d_head": 96, "n_head": 2, "n_head_kv": 1},
    "llama-tied": {"tied": True},
    "llama-bias": {"qkv_bias": True},
    "llama-one-layer": {"n_layer": 1},
    "llama-rope-base": {"rope_base": 5e5},
    "llama-linear": {"rope_scaling": ("linear", 4.0)},
    "llama-linear-old-key": {"metadata": {"rope.scale_linear": 4.0}},
    "llama-scaling-none": {"metadata": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}},
    "llama-yarn": {"rope_scaling": ("yarn", 4.0, 64)},
    "llama-yarn-magnitude": {"rope_scaling": YARN, "metadata": {"rope.scaling.attn_factor": 1.3}},
    "llama-3": {"rope_scaling": "llama3"},
    "llama-3-tied": {"rope_scaling": "llama3", "tied": True},
    "qwen2": {"arch": "qwen2"},
    "qwen2-tied": {"arch": "qwen2", "tied": True},
    "qwen2-linear": {"arch": "qwen2", "rope_scaling": ("linear", 4.0)},
    "qwen2-yarn": {"arch": "qwen2", "rope_scaling": ("yarn", 4.0, 64)},
    "qwen3": {"arch": "qwen3"},
    "qwen3-tied": {"arch": "qwen3", "tied": True},
    "qwen3-linear": {"arch": "qwen3", "rope_scaling": ("linear", 4.0), "d_head": 16},
    "qwen3-yarn": {"arch": "qwen3", "rope_scaling": ("yarn", 4.0, 64)},
}

# Keys of other architectures, which libllama 0.3.36 does not read for ours (test_reference_model.py asks libllama).
IGNORED_KEYS = {
    "attention.scale": 0.5,
    "attention.sliding_window": 32,
    "logit_scale": 0.5,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_attn_factor": 1.5,
    "rope.scaling.yarn_beta_fast": 8.0,
    "rope.scaling.yarn_beta_slow": 4.0,
    "rope.scaling.yarn_log_multiplier": 0.5,
}

WINDOWS = (1, 7, 64, 256)
N_TOKENS = 150
MIXED: Pieces = [(93, "prefill"), (5, "decode"), (30, "prefill"), (2, "decode"), (20, "question")]
DOCUMENT: Pieces = [(N_TOKENS - 4, "prefill"), (4, "decode")]


def dense(window: int) -> Retrieval:
    return Retrieval("dense", n_sink=4, n_local=256, chunk=16, window=window)


def compare(path: Path, bound: str, windows: tuple[int, ...], pieces: Pieces = DOCUMENT) -> None:
    """Logits of every token equal llama_decode's, and those of other windows."""
    tokens = random_tokens(sum(n for n, _ in pieces))
    with load_llama(path, flash_attn=True, kv_type="f16") as llama:
        expected = llama.decode([int(token) for token in tokens])
    with loaded(path) as model:
        for window in windows:
            with open_session(model, dense(window)) as session:
                check(bound, read(session, tokens, pieces), expected, f"window {window}")


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, tmp_path: Path) -> None:
    """Breaks when an architecture, a rope variant, a head layout or a tied output is not computed as libllama does."""
    compare(tiny.make_tiny_gguf(tmp_path / "model.gguf", **MODELS[name]), "dense F32", (7, 64))


@pytest.mark.parametrize("key", IGNORED_KEYS)
def test_keys_that_libllama_ignores(key: str, tmp_path: Path) -> None:
    """Breaks when we read a key that libllama leaves out for this architecture."""
    options: dict[str, Any] = {"rope_scaling": YARN, "metadata": {key: IGNORED_KEYS[key]}}
    compare(tiny.make_tiny_gguf(tmp_path / "model.gguf", **options), "dense F32", (64,))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_reading_and_answering_in_turn(arch: str, window: int, tmp_path: Path) -> None:
    """Breaks when a window size, or the way from one phase into the next, changes what a token sees."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", arch=arch, n_layer=2)
    compare(path, "dense F32", (window,), MIXED)


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_stored_types(quantisation: str, tmp_path: Path) -> None:
    """Breaks when weights of a stored type are multiplied in another way than libllama does."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", quantisation=quantisation)
    compare(path, f"dense {quantisation}", WINDOWS)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_k_quants(arch: str, tmp_path: Path) -> None:
    """Breaks when a K-quant model, with its mixture of types, is not computed as libllama does."""
    source = tiny.make_tiny_gguf(tmp_path / "f16.gguf", arch=arch, n_embd=256, n_layer=2, quantisation="F16")
    path = tiny.quantize_gguf(source, tmp_path / "k.gguf", "Q4_K_M")
    compare(path, "dense Q4_K_M", WINDOWS)


def test_split_model(tmp_path: Path) -> None:
    """Breaks when tensors of the later files of a split model are not found."""
    compare(tiny.make_tiny_gguf(tmp_path / "model.gguf", split_max_tensors=8), "dense F32", (64,))


def test_window_independence(tmp_path: Path) -> None:
    """Breaks when the window size changes more than rounding.

    It is not bit-exact: ggml multiplies one column, a few and many by different loops, which sum in another order.
    """
    tokens = random_tokens(N_TOKENS)
    logits = []
    with loaded(tiny.make_tiny_gguf(tmp_path / "model.gguf")) as model:
        for window in WINDOWS:
            with open_session(model, dense(window)) as session:
                logits.append(read(session, tokens, DOCUMENT))
    for window, other in zip(WINDOWS[1:], logits[1:], strict=True):
        check("windows", other, logits[0], f"window {window}")


def test_prefill_equals_decode_but_for_rounding(tmp_path: Path) -> None:
    """Breaks when a dense token depends on how it was read."""
    tokens = random_tokens(60)
    ways: list[Pieces] = [[(60, "prefill")], one_by_one(60)]
    rows = []
    with loaded(tiny.make_tiny_gguf(tmp_path / "model.gguf")) as model:
        for pieces in ways:
            with open_session(model, dense(64)) as session:
                rows.append(read(session, tokens, pieces))
    check("windows", rows[1], rows[0])


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads(n_threads: int, tmp_path: Path) -> None:
    """Breaks when the number of threads changes more than rounding, or a second run differs at all."""
    tokens = random_tokens(60)
    rows = []
    with loaded(tiny.make_tiny_gguf(tmp_path / "model.gguf")) as model:
        for threads in (1, n_threads, n_threads):
            with open_session(model, dense(32), n_threads=threads) as session:
                rows.append(read(session, tokens, [(50, "prefill"), (10, "decode")]))
    check("windows", rows[1], rows[0])
    np.testing.assert_array_equal(rows[1], rows[2])
