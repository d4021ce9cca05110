"""The oracle is tested: by hand-computed cases of ALGORITHMS.md, by identities, and against llama.cpp itself."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import reference as ref
import tiny_gguf as tiny
from llama_oracle import LlamaError, ggml_rope, load_llama
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


SMALL = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=4, budget=4 + 12 + 3 * 4)
ROPE = ref.Rope(n_rot=8, freq_base=100.0)


def cut(n_prefill: int, m: int, n_decode: int = 0) -> list[tuple[int, ref.Phase]]:
    """Windows: `n_prefill` of `m` tokens, then `n_decode` of one."""
    prefill: list[tuple[int, ref.Phase]] = [(m, "prefill")] * n_prefill
    return prefill + [(1, "decode")] * n_decode


def run_windows(
    params: ref.Params, windows: list[tuple[int, ref.Phase]], *, n_layer: int = 1, rope: ref.Rope = ROPE
) -> tuple[list[list[ref.LayerResult]], list[list[ref.QKV]]]:
    """Random windows through a session: results and inputs, by window and layer."""
    rng = np.random.default_rng(1)
    session = ref.ReferenceSession(params, n_layer, 4, 2, 8, rope)
    inputs = [[random_qkv(rng, m) for _ in range(n_layer)] for m, _ in windows]
    return [session.window(qkv, phase) for qkv, (_, phase) in zip(inputs, windows, strict=True)], inputs


# The whole model against llama.cpp

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
    assert nmse(ref.forward(path, tokens).logits, logits) < NMSE_BOUNDS["F32"][0]


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_forward_equals_llama_decode_quantised(quantisation: str, tmp_path: Path) -> None:
    """Breaks when weights of a stored type are read wrongly, or llama.cpp's rounding grew."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", quantisation=quantisation)
    tokens = random_tokens(100)
    with load_llama(path) as llama:
        logits = llama.decode(tokens)
    assert nmse(ref.forward(path, tokens).logits, logits) < NMSE_BOUNDS[quantisation][0]


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q6_K"])
def test_forward_equals_llama_decode_k_quants(file_type: str, tmp_path: Path) -> None:
    """Breaks when the K-quant helper makes a file that libllama or the oracle reads differently."""
    source = tiny.make_tiny_gguf(tmp_path / "f16.gguf", n_embd=256, n_layer=2, quantisation="F16")
    path = tiny.quantize_gguf(source, tmp_path / "k.gguf", file_type)
    tokens = random_tokens(60)
    with load_llama(path) as llama:
        logits = llama.decode(tokens)
    assert path.stat().st_size < source.stat().st_size
    assert nmse(ref.forward(path, tokens).logits, logits) < NMSE_BOUNDS[file_type][0]


@pytest.mark.parametrize("flash_attn", [False, True])
def test_llama_oracle_f16_kv_is_close(flash_attn: bool, tmp_path: Path) -> None:
    """Breaks when the context parameters of load_llama no longer reach libllama."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf")
    tokens = random_tokens(100)
    with load_llama(path, flash_attn=flash_attn, kv_type="f16") as llama:
        logits = llama.decode(tokens)
    error = nmse(ref.forward(path, tokens).logits, logits)
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
    assert nmse(ref.forward(path, tokens).logits, logits) < NMSE_BOUNDS["F32"][0]


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
    model = ref.ReferenceModel(path)
    q, k, v = ref.forward(path, random_tokens(200)).qkv[1]
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
        ref.ReferenceModel(path)


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


# How closed chunks are kept


@pytest.mark.parametrize(
    ("storage", "scale", "steps"),
    [("q8_0", 1 / 127, [127, -127, 64, 32, -32, 0, 0]), ("q4_0", -1 / 8, [-8, 7, -4, -2, 2, 0, 0])],
)
def test_requantised_by_hand(storage: Literal["q8_0", "q4_0"], scale: float, steps: list[int]) -> None:
    x = np.zeros((1, 48))
    x[0, :7] = [1, -1, 0.5, 0.25, -0.25, 0.003, -0.003]  # 0.5 is 63.5 steps of q8_0
    x[0, 32:] = -2.0  # half a block, with a scale of its own
    back = ref.requantised(x, storage)
    np.testing.assert_array_equal(back[0, :7], np.array(steps) * np.float64(np.float16(scale)))
    np.testing.assert_allclose(back[0, 32:], -2.0, rtol=2**-11)


# Section 2: positions

ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"freq_scale": 0.25},
    "yarn": {"freq_scale": 0.25, "ext_factor": 1.0, "n_ctx_orig": 64},
    "yarn-tuned": {
        "freq_scale": 0.125,
        "ext_factor": 0.5,
        "attn_factor": 1.2,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "n_ctx_orig": 4096,
    },
}


@pytest.mark.parametrize("pairing", ["norm", "neox"])
@pytest.mark.parametrize("variant", ROPE_VARIANTS)
@pytest.mark.parametrize("n_rot", [32, 16])
@pytest.mark.parametrize("with_factors", [False, True])
def test_rotate_equals_ggml(pairing: Literal["norm", "neox"], variant: str, n_rot: int, with_factors: bool) -> None:
    """Breaks when the oracle's RoPE (pairing, partial, factors, linear, YaRN) is not ggml_rope_ext."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(9, 3, 32)).astype(np.float32)
    positions = rng.integers(0, 500, 9).astype(np.int32)
    factors = rng.uniform(1, 8, n_rot // 2).astype(np.float32) if with_factors else None
    options = ROPE_VARIANTS[variant]
    expected = ggml_rope(x, positions, pairing=pairing, n_rot=n_rot, freq_base=1e4, freq_factors=factors, **options)
    rope = ref.Rope(n_rot, 1e4, pairing, None if factors is None else factors.astype(np.float64), **options)
    actual = ref.rotate(x.astype(np.float64), positions.astype(np.int64), rope)
    assert nmse(actual, expected) < NMSE_BOUNDS["rope"][0]


def test_rotate_pairs_by_hand() -> None:
    """Breaks when NORM no longer turns neighbours, NEOX no longer halves, or the rest of the head is touched."""
    x = np.array([1.0, 0.0, 0.0, 0.0, 5.0]).reshape(1, 1, 5)
    cos, sin = math.cos(3.0), math.sin(3.0)
    norm = ref.rotate(x, 3, ref.Rope(4, 100.0, "norm"))
    neox = ref.rotate(x, 3, ref.Rope(4, 100.0, "neox"))
    np.testing.assert_allclose(norm.ravel(), [cos, sin, 0, 0, 5], atol=EXACT)
    np.testing.assert_allclose(neox.ravel(), [cos, 0, sin, 0, 5], atol=EXACT)


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_rotation_at_zero_is_the_magnitude(variant: str) -> None:
    """Breaks when R_0 is not the identity but for YaRN's factor on the rotated dimensions (section 2)."""
    rope = ref.Rope(16, 1e4, "neox", **ROPE_VARIANTS[variant])
    x = np.random.default_rng(0).normal(size=(2, 3, 32))
    factor = np.where(np.arange(32) < 16, rope.magnitude, 1.0)
    np.testing.assert_allclose(ref.rotate(x, 0, rope), x * factor, atol=EXACT)
    assert (rope.magnitude == 1) == (not variant.startswith("yarn"))


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_clamped_logits_depend_on_the_clamped_distance(variant: str) -> None:
    """Breaks when a clamped logit is not (R_min(i-j, n_local) q).(R_0 k).scale."""
    rope = ref.Rope(8, 100.0, "neox", **ROPE_VARIANTS[variant])
    params = ref.Params(n_local=5, scale=0.3)
    q, k, _ = random_qkv(np.random.default_rng(2), 1, (2, 1, 12))
    for distance in (0, 1, 4, 5, 6, 40):
        logits = ref.attention_logits(q, np.array([100]), k, np.array([100 - distance]), params=params, rope=rope)
        rotated = ref.rotate(q, min(distance, 5), rope)
        expected = 0.3 * (rotated[0] @ ref.rotate(k, 0, rope)[0, 0])
        np.testing.assert_allclose(logits[0, :, 0], expected, rtol=1e-9)


def test_keys_after_the_query_are_masked() -> None:
    """Breaks when a window is not causal."""
    q, k, _ = random_qkv(np.random.default_rng(3), 4)
    positions = np.arange(4)
    logits = ref.attention_logits(q, positions, k, positions, params=SMALL, rope=ROPE)
    assert np.array_equal(np.isneginf(logits[:, 0]), np.triu(np.ones((4, 4), dtype=bool), 1))


# Section 1: the attended set


def test_attended_past_by_hand() -> None:
    """Breaks when sinks, plan, remainder and local are not cut where section 1 says."""
    # n_sink 4, n_local 12, c 4: at 31 tokens local is [19, 31), chunks [4,8) .. [12,16), remainder [16, 19).
    assert ref.n_closed_chunks(31, SMALL) == 3
    attended = ref.attended_past(31, np.array([1]), SMALL)
    assert attended.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, *range(16, 31)]
    # One token more closes chunk [16, 20).
    assert ref.n_closed_chunks(32, SMALL) == 4
    assert ref.attended_past(32, np.array([], dtype=np.int64), SMALL).tolist() == [0, 1, 2, 3, *range(20, 32)]


@pytest.mark.parametrize("n_past", [0, 1, 3, 4, 11, 12, 15, 16, 19, 20, 21, 57])
def test_nothing_is_in_limbo(n_past: int) -> None:
    """Breaks when a token of the past is in none of sinks, chunks, remainder and local."""
    every = np.arange(ref.n_closed_chunks(n_past, SMALL))
    assert ref.attended_past(n_past, every, SMALL).tolist() == list(range(n_past))
    least = len(ref.attended_past(n_past, every[:0], SMALL))
    assert least <= SMALL.n_sink + SMALL.n_local + SMALL.n_chunk_tokens - 1


def test_budget_below_the_minimum_is_refused() -> None:
    """Breaks when a budget without room for one chunk is taken (section 1)."""
    assert ref.Params().top_k == 46
    with pytest.raises(ValueError, match="608"):
        ref.Params(budget=607)


# Section 3.1: activation bias


def windows_of(z: ref.Floats, lengths: list[int]) -> Iterator[ref.Floats]:
    return iter(np.split(z, np.cumsum(lengths)[:-1]))


def test_statistics_equal_those_of_all_tokens() -> None:
    """Breaks when the running mean and variance are not numpy's over all tokens, whatever the windows."""
    z = np.random.default_rng(5).normal(3.0, 2.0, (37, 6))
    for lengths in ([37], [1, 36], [16, 16, 5], [1] * 37):
        statistics = ref.Statistics(np.zeros(6), np.zeros(6))
        for window in windows_of(z, lengths):
            statistics = ref.update_statistics(statistics, window, t_max=1000)
        np.testing.assert_allclose(statistics.mean, z.mean(axis=0), rtol=EXACT)
        np.testing.assert_allclose(statistics.var, z.var(axis=0), rtol=EXACT)
        assert (statistics.n_tokens, statistics.n_windows) == (37, len(lengths))


def test_statistics_fade_beyond_the_cap() -> None:
    """Breaks when tokens seen are not capped at t_max * 256 in the update."""
    old = ref.Statistics(np.array([1.0]), np.array([2.0]), n_tokens=10_000, n_windows=40)
    new = ref.update_statistics(old, np.array([[3.0], [5.0]]), t_max=1)
    # N = 256, m = 2, u = 4, v = 1, D = 3
    assert new.mean[0] == pytest.approx(1 + 3 * 2 / 258)
    assert new.var[0] == pytest.approx((256 * 2 + 2 * 1 + 9 * 256 * 2 / 258) / 258)
    assert new.n_tokens == 10_002


def test_published_statistics_are_exact_for_equal_windows() -> None:
    """Breaks when the published update is not the unbiased variance of windows of equal length (section 3.1)."""
    z = np.random.default_rng(6).normal(size=(40, 3))
    statistics = ref.Statistics(np.zeros(3), np.zeros(3))
    for window in windows_of(z, [8] * 5):
        statistics = ref.update_statistics_published(statistics, window, t_max=100)
    np.testing.assert_allclose(statistics.mean, z.mean(axis=0), rtol=1e-9, atol=EXACT)
    np.testing.assert_allclose(statistics.var, z.var(axis=0, ddof=1), rtol=1e-9)


def test_published_statistics_by_hand() -> None:
    """Breaks when the published formula, its first window or its cap on t is misread."""
    one = ref.update_statistics_published(ref.Statistics(np.zeros(1), np.zeros(1)), np.array([[4.0]]), t_max=100)
    assert (one.mean[0], one.var[0]) == (4.0, 0.0)
    old = ref.Statistics(np.array([1.0]), np.array([2.0]), n_tokens=900, n_windows=50)
    new = ref.update_statistics_published(old, np.array([[3.0], [5.0]]), t_max=10)
    assert new.mean[0] == pytest.approx((1 * 10 + 4) / 11)
    assert new.var[0] == pytest.approx((2 * (10 - 0.5) + 1 + 9 / 1.1) / 10.5)


def test_bias_and_weights_by_hand() -> None:
    """Breaks when bias_i = mean_e (z - mu)^2 / (s2 + s2_bar/100) or its normalisation is misread."""
    mean, var = np.array([1.0, 2.0]), np.array([1.0, 3.0])
    bias = ref.activation_bias(np.array([[1.0, 2.0], [2.0, 5.0]]), mean, var)
    expected = (1 / (1 + 0.02) + 9 / (3 + 0.02)) / 2
    np.testing.assert_allclose(bias, [0, expected], rtol=EXACT)
    np.testing.assert_allclose(ref.probe_weights(bias), [0, 1])


def test_weights_fall_back_to_equal() -> None:
    """Breaks when constant queries, a single first token or infinite biases do not give 1/m."""
    constant = np.ones((3, 4))
    assert ref.activation_bias(constant, constant[0], np.zeros(4)).tolist() == [0, 0, 0]
    for bias in (np.zeros(4), np.array([1.0, math.inf, 0, 0]), np.array([math.nan, 1, 1, 1])):
        assert ref.probe_weights(bias).tolist() == [0.25] * 4


# Section 3.3: summary


def test_summary_takes_the_four_most_attended_keys() -> None:
    """Breaks when representatives are not chosen per query head, or ties do not go to the lowest index."""
    keys = np.arange(6.0).reshape(6, 1, 1) * 10
    received = np.array([[1, 5, 5, 5, 1, 1], [9, 0, 1, 1, 1, 0]], dtype=float).T  # [c, H]
    by_head = ref.chunk_summary(keys, received)
    assert by_head.tolist() == [np.mean([0, 10, 20, 30]), np.mean([0, 20, 30, 40])]
    group = received.sum(axis=1)  # 10, 5, 6, 6, 2, 1
    assert group.tolist() == [10, 5, 6, 6, 2, 1]
    assert ref.chunk_summary(keys, received, "kv_head").tolist() == [15.0, 15.0]
    assert ref.chunk_summary(keys, received, "mean").tolist() == [25.0, 25.0]


def test_summary_with_few_weights_is_the_mean() -> None:
    """Breaks when fewer than 4 keys of non-zero weight do not give the mean of the chunk's keys."""
    keys = np.arange(6.0).reshape(6, 1, 1)
    received = np.array([[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 0, 0]], dtype=float).T
    assert ref.chunk_summary(keys, received).tolist() == [2.5, 1.5]


# Sections 3.4 and 3.5: score and selection


def test_scores_by_hand() -> None:
    """Breaks when cosine, dot or the question's term is misread."""
    summaries = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    probe, question = np.array([5.0, 0.0]), np.array([0.0, 7.0])
    half = math.sqrt(0.5)
    np.testing.assert_allclose(ref.chunk_scores(probe, summaries), [1, 0, half, 0])
    np.testing.assert_allclose(ref.chunk_scores(probe, summaries, "dot"), [10, 0, 5, 0])
    np.testing.assert_allclose(ref.chunk_scores(probe, summaries, question=question), [1, 4, 5 * half, 0])


def test_question_vector_is_the_mean_of_four() -> None:
    """Breaks when the question is not the mean of its 4 most attended query vectors."""
    z = np.arange(6.0)[:, None] * np.ones(2)
    assert ref.question_vector(z, np.array([1.0, 9, 9, 9, 9, 0])).tolist() == [2.5, 2.5]


def test_top_k_breaks_ties_to_the_lowest_index() -> None:
    """Breaks when equal scores are not taken from the left, or ids are not ascending."""
    assert ref.top_k(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 2]
    assert ref.top_k(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 4).tolist() == [1, 2, 3, 4]
    assert ref.top_k(np.zeros(5), 3).tolist() == [0, 1, 2]
    assert ref.top_k(np.arange(200.0) // 100, 50).tolist() == list(range(100, 150))
    assert ref.top_k(np.zeros(2), 5).tolist() == [0, 1]
    assert ref.top_k(np.zeros(0), 5).tolist() == []


# Section 3.6: cut-off


def test_entropy_is_normalised() -> None:
    """Breaks when h is not H(p)/ln N of softmax(score / temperature)."""
    assert ref.score_entropy(np.zeros(7)) == pytest.approx(1)
    assert ref.score_entropy(np.array([0.0, 1e4])) == pytest.approx(0)
    p = 1 / (1 + math.exp(-2))  # scores 1 and 0 at temperature 1/2
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert ref.score_entropy(np.array([1.0, 0.0]), 0.5) == pytest.approx(entropy)
    assert math.isnan(ref.score_entropy(np.zeros(1)))


def test_budgets_by_hand() -> None:
    """Breaks when the shares, their clamps or the carried pool are not those of section 3.6."""
    # k 10, N 100: lo 7, hi 20. Pool 30: 30*0.9/1.2 = 22.5 is clamped to min(20, 30 - 2*7 = 16) = 16;
    # pool 14: 14*0.1/0.3 = 4.7 is clamped to lo = 7; the last takes the 7 that are left.
    assert ref.layer_budgets(np.array([0.9, 0.1, 0.2]), 10, 100) == [16, 7, 7]
    # 20*0.5/0.8 = 12.5 rounds half up to 13.
    assert ref.layer_budgets(np.array([0.5, 0.3]), 10, 100) == [13, 7]
    assert ref.layer_budgets(np.zeros(3), 10, 100) == [10, 10, 10]
    assert ref.layer_budgets(np.array([0.5, 0.2]), 10, 4) == [4, 4]


def test_budgets_sum_to_the_pool() -> None:
    """Breaks when the total of the shares is not exactly min(L*k, L*N), or a share leaves its bounds."""
    rng = np.random.default_rng(8)
    for _ in range(2000):
        n_layer, k, n_chunks = int(rng.integers(1, 9)), int(rng.integers(1, 60)), int(rng.integers(0, 150))
        h = rng.random(n_layer) ** 4 * (rng.random(n_layer) > 0.2)
        budgets = ref.layer_budgets(h, k, n_chunks)
        assert sum(budgets) == min(n_layer * k, n_layer * n_chunks)
        assert min(budgets) >= min(n_chunks, math.ceil(0.7 * k))
        assert max(budgets) <= min(n_chunks, 2 * k)


def test_published_budgets() -> None:
    """Breaks when the published clamp to [32, 2k] or its wait for 100 values is misread."""
    # Pool 92: 92*0.9/1.0 = 83; the 9 that are left are lifted to 32.
    assert ref.layer_budgets_published(np.array([0.9, 0.1]), 46, 1000) == [83, 32]
    history = [[0.5] * 100, [0.5] * 99]
    assert ref.mean_entropies(history, least=100) is None
    history[1] += [0.7]
    h = ref.mean_entropies(history, least=100)
    assert h is not None
    np.testing.assert_allclose(h, [0.5, 0.502])


def test_mean_entropies_take_the_last_hundred() -> None:
    """Breaks when h_l is not the mean of the last 100 values, or of fewer if there are fewer."""
    h = ref.mean_entropies([[0.0] * 50 + [1.0] * 100, [0.25, 0.75]])
    assert h is not None
    assert h.tolist() == [1.0, 0.5]
    assert ref.mean_entropies([[], []]) is None


# Section 4: Quest


def test_quest_score_bounds_every_product() -> None:
    """Breaks when a page's score is below a q.k in it, or the group's vote is not per KV head."""
    rng = np.random.default_rng(9)
    pages, q = rng.normal(size=(5, 16, 2, 8)), rng.normal(size=(4, 8))
    lows, highs = (np.array(part) for part in zip(*map(ref.quest_summary, pages), strict=True))
    scores = ref.quest_scores(q, lows, highs)
    products = np.einsum("hd,pchd->hpc", q, np.repeat(pages, 2, axis=2))
    assert (scores[:, :, None] >= products - EXACT).all()
    votes = ref.quest_group_scores(scores, 2)
    np.testing.assert_allclose(votes[1], ref.softmax(scores)[2:].max(axis=0))
    np.testing.assert_allclose(ref.quest_group_scores(scores, 2, "sum")[0], ref.softmax(scores)[:2].sum(axis=0))


def test_chunk_mass_by_hand() -> None:
    """Breaks when the oracle's mass is of other tokens than the chunk's, or not summed over queries."""
    params = ref.Params(n_sink=1, n_local=1, n_chunk_tokens=2, budget=4)
    weights = np.array([[[0.5, 0.1, 0.2, 0.0, 0.1, 0.1]], [[0.0, 0.3, 0.3, 0.2, 0.1, 0.1]]])  # [2, 1, 6]
    np.testing.assert_allclose(ref.chunk_mass(weights, params, 2), [[0.9, 0.4]])


# The session


def dense_output(inputs: list[list[ref.QKV]], layer: int) -> ref.Floats:
    """Causal attention at exact positions over all windows, written without the oracle's own attend."""
    q, k, v = (np.concatenate([window[layer][part] for window in inputs]) for part in range(3))
    positions = np.arange(len(q))
    rq, rk = ref.rotate(q, positions, ROPE), ref.rotate(k, positions, ROPE)
    out = np.empty_like(q)
    for i in range(len(q)):
        for head in range(q.shape[1]):
            logits = rk[: i + 1, head // 2] @ rq[i, head] / math.sqrt(q.shape[2])
            weights = np.exp(logits - logits.max())
            out[i, head] = weights @ v[: i + 1, head // 2] / weights.sum()
    return out.reshape(len(q), -1)


@pytest.mark.parametrize("windows", [[16] * 4, [7, 16, 1, 30, 10], [64]])
@pytest.mark.parametrize("select", ["all", "top_k"])
def test_everything_selected_is_dense_attention(windows: list[int], select: Literal["all", "top_k"]) -> None:
    """Breaks when exact positions with every chunk selected are not plain causal attention."""
    params = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=4, budget=200, positions="exact", select=select)
    results, inputs = run_windows(params, [(m, "prefill") for m in windows], n_layer=2)
    for layer in range(2):
        out = np.concatenate([window[layer]["out"] for window in results])
        np.testing.assert_allclose(out, dense_output(inputs, layer), atol=1e-11)


def test_clamped_equals_exact_within_local() -> None:
    """Breaks when a session shorter than n_local differs between the two modes of position."""
    outs = []
    for positions in ("clamped", "exact"):
        params = ref.Params(n_sink=4, n_local=40, n_chunk_tokens=4, budget=60, positions=positions)
        results, _ = run_windows(params, cut(5, 8))
        outs.append(np.concatenate([window[0]["out"] for window in results]))
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-11)


def test_session_follows_the_sections() -> None:
    """Breaks when the session does not chain bias, weights, probe, scores and plan as the functions define them."""
    results, inputs = run_windows(SMALL, cut(6, 8, 3))
    z = [ref.fixed_distance_queries(window[0][0], SMALL, ROPE) for window in inputs]
    seen = np.concatenate(z[:6])
    for index, (result,) in enumerate(results):
        n_chunks = ref.n_closed_chunks(8 * min(index, 6) + max(0, index - 6), SMALL)
        assert result["summaries"].shape == (n_chunks, 32)
        assert result["scores"].shape == (n_chunks,)
        assert len(result["plan"]) == result["budget"] == min(3, n_chunks)
        until = np.concatenate(z[: index + 1]) if index < 6 else seen
        np.testing.assert_allclose(result["mean"], until.mean(axis=0), atol=EXACT)
        np.testing.assert_allclose(result["var"], until.var(axis=0), atol=EXACT)
        np.testing.assert_allclose(result["weights"], result["bias"] / result["bias"].sum())
        np.testing.assert_allclose(result["probe"], result["weights"] @ z[index])
        assert result["plan"].tolist() == ref.top_k(result["scores"], result["budget"]).tolist()
    np.testing.assert_allclose(results[-1][0]["probe"], z[-1][0])


def test_received_attention_counts_while_local() -> None:
    """Breaks when a key's weights are not summed from its own window until it leaves local (section 3.3)."""
    # Windows of 7 leave a remainder of 0 to 7 tokens: there, a key is attended and its weights no longer count.
    params = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=8, budget=40)
    results, inputs = run_windows(params, cut(7, 7))
    k = np.concatenate([window[0][1] for window in inputs])
    received, in_remainder = np.zeros((49, 4)), 0
    for index, window in enumerate(inputs):
        n = 7 * index
        keys = np.concatenate([results[index][0]["attended"], np.arange(n, n + 7)])
        logits = ref.attention_logits(window[0][0], np.arange(n, n + 7), k[keys], keys, params=params, rope=ROPE)
        for key, weight in zip(keys, ref.softmax(logits).sum(axis=0).T, strict=True):
            received[key] += weight if key >= n - 12 else 0
        in_remainder += len([key for key in keys if 4 + 8 * ref.n_closed_chunks(n, params) <= key < n - 12])
    assert in_remainder > 0
    # Chunk 0 is [4, 12): its end lies before n - 12 from the window at n = 28 on.
    assert [len(window[0]["summaries"]) for window in results] == [0, 0, 0, 0, 1, 2, 3]
    expected = [ref.chunk_summary(k[t : t + 8], received[t : t + 8]) for t in (4, 12, 20)]
    np.testing.assert_allclose(results[6][0]["summaries"], expected, atol=EXACT)


def test_decode_leaves_statistics_and_uses_the_cutoff() -> None:
    """Breaks when a decode window updates statistics, or its shares are not those of the entropies before it."""
    # At a temperature of 0.02 the entropies of random chunks differ enough to move the shares.
    params = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=4, budget=4 + 12 + 10 * 4, cutoff_temperature=0.02)
    results, _ = run_windows(params, cut(16, 16, 120), n_layer=3)
    shares = []
    for step in range(16, len(results)):
        history = [[w[layer]["entropy"] for w in results[:step]] for layer in range(3)]
        h = ref.mean_entropies([[value for value in values if not math.isnan(value)] for values in history])
        assert h is not None
        shares.append(ref.layer_budgets(h, 10, len(results[step][0]["scores"])))
        assert [result["budget"] for result in results[step]] == shares[-1]
        assert sum(shares[-1]) == 30
        np.testing.assert_array_equal(results[step][0]["mean"], results[15][0]["mean"])
        np.testing.assert_array_equal(results[step][0]["var"], results[15][0]["var"])
    assert len({tuple(share) for share in shares}) > 2
    assert all(result["budget"] == min(10, len(result["scores"])) for window in results[:16] for result in window)


ROWS: dict[str, dict[str, Any]] = {
    "published statistics": {"statistics": "published", "t_max": 2},
    "fading statistics": {"n_local": 600, "budget": 640, "t_max": 1},
    "mean probe, dot score": {"probe": "mean", "score": "dot"},
    "per KV head": {"summary": "kv_head", "n_chunk_tokens": 8},
    "mean of keys": {"summary": "mean", "n_chunk_tokens": 8},
    "temperature": {"cutoff_temperature": 0.2},
    "no cut-off": {"cutoff": "none"},
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_reach_the_session(row: str) -> None:
    """Breaks when a field of Params is not what the session computes with."""
    params = ref.Params(**{"n_sink": 4, "n_local": 12, "n_chunk_tokens": 4, "budget": 56, **ROWS[row]})
    m = 160 if params.n_local > 100 else 16
    results, inputs = run_windows(params, cut(6, m, 2))
    update = ref.update_statistics if params.statistics == "ours" else ref.update_statistics_published
    statistics = ref.Statistics(np.zeros(32), np.zeros(32))
    for (result,), ((q, _, _),) in zip(results[:6], inputs[:6], strict=True):
        z = ref.fixed_distance_queries(q, params, ROPE)
        statistics = update(statistics, z, params.t_max)
        weights = ref.probe_weights(ref.activation_bias(z, statistics.mean, statistics.var))
        expected = z.mean(axis=0) if params.probe == "mean" else weights @ z
        np.testing.assert_allclose(result["probe"], expected)
    (last,) = results[-1]
    np.testing.assert_allclose(last["scores"], ref.chunk_scores(last["probe"], last["summaries"], params.score))
    assert last["entropy"] == pytest.approx(ref.score_entropy(last["scores"], params.cutoff_temperature), nan_ok=True)
    if params.summary != "head":
        grouped = last["summaries"].reshape(-1, 2, 2, 8)
        np.testing.assert_array_equal(grouped[:, :, 0], grouped[:, :, 1])
    if params.summary == "mean":
        k = np.concatenate([window[0][1] for window in inputs])
        np.testing.assert_allclose(last["summaries"][1].reshape(2, 2, 8)[:, 0], k[12:20].mean(axis=0))
    if params.cutoff == "none":
        assert last["budget"] == params.top_k


def test_published_cutoff_reaches_the_session() -> None:
    """Breaks when the published clamp is not used once every layer has 100 values, and equal shares before."""
    params = ref.Params(n_sink=0, n_local=1, n_chunk_tokens=1, budget=41, cutoff="published", cutoff_temperature=0.02)
    results, _ = run_windows(params, cut(50, 2, 80), n_layer=2)
    budgets = [[result["budget"] for result in window] for window in results]
    n_values = [sum(not math.isnan(w[0]["entropy"]) for w in results[:step]) for step in range(len(results))]
    for step in range(50, len(results)):
        if n_values[step] < 100:
            assert budgets[step] == [40, 40]
        else:
            h = ref.mean_entropies([[w[layer]["entropy"] for w in results[:step]] for layer in range(2)])
            assert h is not None
            assert budgets[step] == ref.layer_budgets_published(h, 40, len(results[step][0]["scores"]))
    assert budgets[-1] != [40, 40]


def test_question_counts_in_prefill_only() -> None:
    """Breaks when the question's term is left out of prefill or reaches decode."""
    rng = np.random.default_rng(12)
    question = rng.normal(size=32)
    params = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=4, budget=28, question_weight=3.0)
    session = ref.ReferenceSession(params, 1, 4, 2, 8, ROPE, question=[question])
    for m, phase in cut(4, 16, 1):
        (result,) = session.window([random_qkv(rng, m)], phase)
        term = 3.0 * ref.cosine(question, result["summaries"]) if phase == "prefill" else 0.0
        np.testing.assert_allclose(result["scores"], ref.cosine(result["probe"], result["summaries"]) + term)


def test_decode_window_is_one_token() -> None:
    """Breaks when several tokens pass as one decode window."""
    with pytest.raises(ValueError, match="one token"):
        run_windows(SMALL, [(2, "decode")])


def test_streaming_attends_no_chunk() -> None:
    """Breaks when the streaming row attends more than sinks, remainder and local."""
    params = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=4, budget=28, select="none")
    results, _ = run_windows(params, cut(4, 16))
    assert results[3][0]["plan"].size == 0
    assert results[3][0]["attended"].tolist() == [0, 1, 2, 3, *range(36, 48)]


def test_model_with_a_dense_session_equals_forward(tmp_path: Path) -> None:
    """Breaks when the model fed by a session over windows differs from the plain forward pass."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", arch="qwen3", n_layer=2)
    model = ref.ReferenceModel(path)
    params = ref.Params(n_sink=4, n_local=12, n_chunk_tokens=4, positions="exact", select="all")
    tokens = random_tokens(50)
    logits, results = ref.forward_session(model, model.session(params), tokens, cut(3, 16, 2))
    np.testing.assert_allclose(logits, ref.forward(path, tokens).logits, atol=1e-9)
    assert [len(window) for window in results] == [2] * 5


def test_sparse_model_differs_but_little_at_a_generous_budget(tmp_path: Path) -> None:
    """Breaks when retrieval selects nothing useful: more budget has to bring the logits nearer to dense ones."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", n_layer=2)
    model = ref.ReferenceModel(path)
    tokens = random_tokens(256)
    dense = ref.forward(path, tokens).logits
    errors = []
    for budget in (40, 120, 264):
        params = ref.Params(n_sink=4, n_local=16, n_chunk_tokens=8, budget=budget, positions="exact")
        logits, _ = ref.forward_session(model, model.session(params), tokens, cut(16, 16))
        errors.append(nmse(logits[-64:], dense[-64:]))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-20
