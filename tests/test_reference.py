"""The oracle's formulas are tested: by worked cases of docs/algorithms.md, by identities, and RoPE against ggml."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import reference as ref
from llama_oracle import ggml_rope
from reference_support import EXACT, NMSE_BOUNDS, ROPE, SMALL, nmse, random_qkv

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
