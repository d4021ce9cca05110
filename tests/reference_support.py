"""What the tests of the oracle share: random inputs, small parameters, and their bounds with reasons."""

from __future__ import annotations

from typing import Any

import numpy as np
import reference as ref
import tiny_gguf as tiny
from numpy.typing import NDArray

# NMSE of llama_decode's logits against `forward`, by what makes them differ: (bound, reason). Measured values are of
# 200 tokens through the tiny models; each bound is about five times the largest of them.
NMSE_BOUNDS = {
    "F32": (6e-11, "f32 sums against f64: 3e-13 to 1.2e-11"),
    "F16": (3e-6, "activations rounded to f16 before every product: 5e-7"),
    "BF16": (2e-4, "activations rounded to bf16: 3e-5"),
    "Q8_0": (2e-3, "activations quantised to q8_0 before every product: 4e-4"),
    "Q4_0": (2e-3, "the same activations in q8_0; the weights are equal on both sides: 4e-4"),
    "Q4_K_M": (4e-3, "activations in q8_K, one scale per 256: 8e-4"),
    "Q6_K": (4e-3, "activations in q8_K, one scale per 256: 8e-4"),
    "f16 KV": (1e-5, "K and V rounded to f16: 2e-7 to 2e-6, the most with YaRN's magnitude raised"),
    "rope": (2e-11, "f32 angles of up to 500 radians against f64: 6e-15 to 4e-12"),
}
EXACT = 1e-12  # float64 identities: sums in another order
SMALL = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=4, budget=4 + 12 + 3 * 4)
ROPE = ref.Rope(n_rot=8, freq_base=100.0)


def nmse(actual: ref.Floats, expected: NDArray[np.floating[Any]]) -> float:
    return float(((actual - expected) ** 2).sum() / (expected**2).sum())


def random_tokens(n: int, n_vocab: int = 512, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(tiny.FIRST_BYTE, n_vocab, n)]


def random_qkv(rng: np.random.Generator, m: int, shape: tuple[int, int, int] = (4, 2, 8)) -> ref.QKV:
    n_head, n_head_kv, d = shape
    return (
        rng.normal(size=(m, n_head, d)) * 1.5,
        rng.normal(size=(m, n_head_kv, d)) * 1.5,
        rng.normal(size=(m, n_head_kv, d)),
    )


def cut(n_prefill: int, m: int, n_decode: int = 0) -> list[tuple[int, ref.Phase]]:
    """Windows: `n_prefill` of `m` tokens, then `n_decode` of one."""
    prefill: list[tuple[int, ref.Phase]] = [(m, "prefill")] * n_prefill
    return prefill + [(1, "decode")] * n_decode
