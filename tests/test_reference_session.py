"""The oracle's session is tested: against its formulas one by one, and against attention written anew."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import reference as ref
from reference_session import LayerResult, ReferenceSession
from reference_support import EXACT, ROPE, SMALL, cut, random_qkv


def run_windows(
    params: ref.Params, windows: list[tuple[int, ref.Phase]], *, n_layer: int = 1, rope: ref.Rope = ROPE
) -> tuple[list[list[LayerResult]], list[list[ref.QKV]]]:
    """Random windows through a session: results and inputs, by window and layer."""
    rng = np.random.default_rng(1)
    session = ReferenceSession(params, n_layer, 4, 2, 8, rope)
    inputs = [[random_qkv(rng, m) for _ in range(n_layer)] for m, _ in windows]
    return [session.window(qkv, phase) for qkv, (_, phase) in zip(inputs, windows, strict=True)], inputs


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
    session = ReferenceSession(params, 1, 4, 2, 8, ROPE, question=[question])
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
