"""The oracle: docs/algorithms.md in NumPy float64, section by section.

Independent of the native code by design: nothing here is fast, everything is a formula of the text. Where the text
leaves a choice, the plainest reading is taken and marked "Reading:".

Shapes: `m` tokens of a window, `n` tokens before it, `H`, `G` query and KV heads of dimension `d`, `N` closed chunks of
`c` tokens. q is [m, H, d], k and v are [m, G, d], all before RoPE. reference_search.py has the search by an index,
reference_session.py chains the formulas over windows and layers, reference_model.py feeds them from a GGUF's own
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
QKV: TypeAlias = tuple[Floats, Floats, Floats]
Phase: TypeAlias = Literal["prefill", "decode"]
Storage: TypeAlias = Literal["f64", "f16", "q8_0", "q4_0"]
SummaryKind: TypeAlias = Literal["head", "kv_head", "mean", "bounds", "spread"]

N_REPRESENTATIVES = 4  # section 3, published default
N_ENTROPIES = 100  # section 3.6: h_l is the mean of the last 100 values
STATS_WINDOW = 256  # section 3.1: the cap on old statistics is t_max windows of the published 256 tokens
PUBLISHED_MIN_BUDGET = 32  # section 3.6, published clamp


@dataclass(frozen=True)
class Params:
    """A method as a row (sections 1 to 6); the defaults are ActQKV's."""

    n_sink: int = 64
    n_local: int = 512
    n_chunk_tokens: int = 32
    budget: int = 2048
    positions: Literal["clamped", "exact"] = "clamped"
    select: Literal["top_k", "all", "none", "oracle"] = "top_k"  # all: dense; none: streaming
    probe: Literal["activation", "mean"] = "activation"  # mean: InfLLM
    statistics: Literal["ours", "published"] = "ours"
    t_max: int = 1000
    probe_warmup: int = 0  # windows per layer whose probe is the plain mean (section 3.7)
    summary: SummaryKind = "head"  # bounds: section 4's, over keys without RoPE; these and spreads want the dot product
    score: Literal["cosine", "dot"] = "cosine"  # dot: InfLLM
    summary_keys: Literal["unrotated", "attended"] = "unrotated"  # attended: section 4, over roped keys where exact
    granularity: Literal["layer", "kv_head"] = "layer"  # kv_head: section 4, one list per KV head
    vote: Literal["max", "sum"] = "max"
    n_dense_layers: int = 0  # section 4: the first layers attend everything
    scan: int = 0  # answering: keys that each query head looks for in an index of them; 0: off, summaries choose
    refine: int = 1  # answering: the keys of those refine * budget chunks decide; 1: off
    question_weight: float = 4.0  # lambda of section 3.4
    cutoff: Literal["ours", "published", "none"] = "ours"
    cutoff_temperature: float = 1.0
    scale: float | None = None  # of the attention logits; None: 1/sqrt(d)
    storage: Storage = "f64"  # of K, V and summaries: f16 as an engine has them, closed chunks smaller still

    def __post_init__(self) -> None:
        least = self.n_sink + self.n_local + self.n_chunk_tokens
        if self.select == "top_k" and self.budget < least:
            raise ValueError(f"budget {self.budget} is below n_sink + n_local + n_chunk_tokens = {least}")
        if self.summary in {"bounds", "spread"} and self.score != "dot":
            raise ValueError("bounds and spreads have no direction: their score is a sum of products")

    @property
    def top_k(self) -> int:
        """Chunks that the budget leaves beside sinks and local (section 1: 46 = (2048 - 64 - 512) / 32).

        Reading: a rest of less than a chunk is not used.
        """
        return (self.budget - self.n_sink - self.n_local) // self.n_chunk_tokens

    def stored(self, x: Floats) -> Floats:
        """x as it reads back from memory."""
        return x if self.storage == "f64" else x.astype(np.float16).astype(np.float64)

    def kept(self, x: Floats, closed: NDArray[np.bool_]) -> Floats:
        """Values x [n, G, d] as they read back, those of closed chunks marked."""
        stored = self.stored(x)
        if self.storage in {"f64", "f16"}:
            return stored
        quantised: Floats = np.where(closed[:, None, None], requantised(stored, self.storage), stored)
        return quantised

    def kept_keys(self, x: Floats, closed: NDArray[np.bool_]) -> Floats:
        """The same of keys, which closed chunks keep turned, so that no channel sticks out of its block."""
        stored = self.stored(x)
        if self.storage in {"f64", "f16"}:
            return stored
        back = turned(requantised(turned(stored), self.storage))
        quantised: Floats = np.where(closed[:, None, None], back, stored)
        return quantised


# How closed chunks are kept (section 3.3 leaves it open): ggml's q8_0 and q4_0

N_BLOCK = 32  # values of one head that share a scale; the last block of a head may have fewer


def turned(x: Floats) -> Floats:
    """x [..., d] times the Hadamard matrix of the largest power of two in d (256 at most), which is its own inverse."""
    p = min(x.shape[-1] & -x.shape[-1], 256)
    matrix = np.ones((1, 1))
    while len(matrix) < p:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    out: Floats = (x.reshape(*x.shape[:-1], -1, p) @ matrix / math.sqrt(p)).reshape(x.shape)
    return out


def requantised(x: Floats, storage: Storage) -> Floats:
    """x [..., d] through q8_0 or q4_0: the block's scale in f16, the steps found in f32 with the scale before it.

    q8_0: 127 steps to the largest magnitude either way, the nearest, halves away from 0. q4_0: 16 steps from -8 to 7,
    where -8 is the value of the largest magnitude, the nearest, halves up.
    """
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], N_BLOCK):
        block = x[..., start : start + N_BLOCK].astype(np.float32)
        largest = np.take_along_axis(block, np.abs(block).argmax(axis=-1)[..., None], axis=-1)
        scale = np.abs(largest) / np.float32(127) if storage == "q8_0" else largest / np.float32(-8)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        steps = block * inverse
        if storage == "q8_0":
            whole = np.trunc(steps + np.copysign(0.5, steps.astype(np.float64)))
        else:
            whole = np.minimum(np.floor(steps + np.float32(8.5)), 15.0) - 8
        out[..., start : start + N_BLOCK] = whole * scale.astype(np.float16)
    return out


# Section 2: positions


@dataclass(frozen=True)
class Rope:
    """RoPE as libllama has it; the field names are those of ggml_rope_ext.

    `attn_factor` is the model's own (`rope.scaling.attn_factor`). libllama divides it by ggml's YaRN magnitude and
    multiplies by the same, so that what reaches the values is `magnitude`.
    """

    n_rot: int
    freq_base: float = 10000.0
    pairing: Literal["norm", "neox"] = "norm"
    freq_factors: Floats | None = None  # [n_rot / 2], divisors of the frequencies
    freq_scale: float = 1.0  # 1 / factor, for linear scaling and YaRN
    ext_factor: float = 0.0  # 1: YaRN
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    n_ctx_orig: int = 0

    @property
    def magnitude(self) -> float:
        """Factor on the rotated dimensions of every rotated vector, also at position 0."""
        return self.attn_factor * (1 - 0.1 * math.log(self.freq_scale) if self.ext_factor != 0 else 1.0)

    def frequencies(self) -> Floats:
        """Angle per position, of each pair [n_rot / 2]."""
        index = np.arange(self.n_rot // 2)
        extrapolated: Floats = self.freq_base ** (-2.0 * index / self.n_rot)
        if self.freq_factors is not None:
            extrapolated = extrapolated / self.freq_factors
        interpolated: Floats = self.freq_scale * extrapolated
        if self.ext_factor == 0:
            return interpolated
        low = max(0.0, math.floor(self._yarn_dimension(self.beta_fast)))
        high = min(self.n_rot - 1.0, math.ceil(self._yarn_dimension(self.beta_slow)))
        ramp = 1 - np.clip((index - low) / max(0.001, high - low), 0, 1)
        mix = ramp * self.ext_factor
        blended: Floats = interpolated * (1 - mix) + extrapolated * mix
        return blended

    def _yarn_dimension(self, n_rotations: float) -> float:
        """Index of the pair that makes `n_rotations` turns over the original context."""
        turns = math.log(self.n_ctx_orig / (n_rotations * 2 * math.pi))
        return self.n_rot * turns / (2 * math.log(self.freq_base))


def rotate(x: Floats, positions: Ints | int, rope: Rope) -> Floats:
    """R_p x of section 2: x [n, heads, d], one position per row (or one for all); dimensions from n_rot on stay."""
    n_half = rope.n_rot // 2
    pair = np.arange(n_half)
    first, second = (2 * pair, 2 * pair + 1) if rope.pairing == "norm" else (pair, pair + n_half)
    angle = np.broadcast_to(np.asarray(positions, dtype=np.float64), x.shape[:1])[:, None, None] * rope.frequencies()
    cos, sin = rope.magnitude * np.cos(angle), rope.magnitude * np.sin(angle)
    out = np.array(x, dtype=np.float64)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def fixed_distance_queries(q: Floats, params: Params, rope: Rope) -> Floats:
    """z of section 3.1: R_{n_local} q, heads concatenated, [m, H*d]; in both position modes."""
    return rotate(q, params.n_local, rope).reshape(len(q), -1)


def attention_logits(
    q: Floats, q_positions: Ints, k: Floats, k_positions: Ints, *, params: Params, rope: Rope
) -> Floats:
    """Logits of section 2 for every pair, [m, H, n_keys], -inf where the key comes after the query.

    clamped: the true relative position while i - j < n_local, n_local from there on; exact: always the true one. Which
    chunks are closed follows from the first query: what is kept of their keys is never met nearby.
    """
    closed = in_closed_chunks(k_positions, int(q_positions[0]), params)
    n_gqa = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if params.scale is None else params.scale

    def products(rotated_q: Floats, rotated_k: Floats) -> Floats:
        logits: Floats = np.einsum("ihd,jhd->ihj", rotated_q, np.repeat(rotated_k, n_gqa, axis=1)) * scale
        return logits

    logits = products(rotate(q, q_positions, rope), params.kept_keys(rotate(k, k_positions, rope), closed))
    distance = (q_positions[:, None] - k_positions[None, :])[:, None, :]
    if params.positions == "clamped":
        # R_0 is not left out: it carries YaRN's magnitude on the rotated dimensions.
        far = products(rotate(q, params.n_local, rope), params.kept_keys(rotate(k, 0, rope), closed))
        logits = np.where(distance < params.n_local, logits, far)
    return np.where(distance >= 0, logits, -np.inf)


# Section 1: what a window attends


def n_closed_chunks(n_past: int, params: Params) -> int:
    """Chunks all of whose tokens lie before n - n_local; chunk b is [n_sink + b*c, n_sink + (b+1)*c)."""
    return max(0, (n_past - params.n_local - params.n_sink) // params.n_chunk_tokens)


def in_closed_chunks(positions: Ints, n_past: int, params: Params) -> NDArray[np.bool_]:
    """Which positions a window at `n_past` finds in closed chunks."""
    end = params.n_sink + n_closed_chunks(n_past, params) * params.n_chunk_tokens
    inside: NDArray[np.bool_] = (positions >= params.n_sink) & (positions < end)
    return inside


def attended_past(n_past: int, plan: Ints, params: Params) -> Ints:
    """Ascending positions of the past that a window at `n_past` attends: sinks, planned chunks, remainder, local."""
    chosen = np.zeros(n_past, dtype=bool)
    chosen[: params.n_sink] = True
    for b in plan:
        start = params.n_sink + int(b) * params.n_chunk_tokens
        chosen[start : start + params.n_chunk_tokens] = True
    # Remainder and local are neighbours: all that lies after the last closed chunk.
    local = max(0, n_past - params.n_local)
    remainder = params.n_sink + n_closed_chunks(n_past, params) * params.n_chunk_tokens
    chosen[min(local, remainder) :] = True
    return np.flatnonzero(chosen).astype(np.int64)


def softmax(logits: Floats) -> Floats:
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    normed: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return normed


def attend(
    q: Floats, q_positions: Ints, k: Floats, v: Floats, k_positions: Ints, *, params: Params, rope: Rope
) -> tuple[Floats, Floats]:
    """One softmax over the union of all parts (section 2): output [m, H*d] and weights [m, H, n_keys]."""
    weights = softmax(attention_logits(q, q_positions, k, k_positions, params=params, rope=rope))
    values = params.kept(v, in_closed_chunks(k_positions, int(q_positions[0]), params))
    out = np.einsum("ihj,jhd->ihd", weights, np.repeat(values, q.shape[1] // v.shape[1], axis=1))
    return out.reshape(len(q), -1), weights


# Section 3.1: activation bias


@dataclass
class Statistics:
    """Running mean and variance of z per channel [H*d], of one layer of one session."""

    mean: Floats
    var: Floats
    n_tokens: int = 0
    n_windows: int = 0


def update_statistics(old: Statistics, z: Floats, t_max: int) -> Statistics:
    """Statistics after a window z [m, H*d]; the old ones weigh as many tokens as were seen, t_max * 256 at most."""
    m, u, v = len(z), z.mean(axis=0), z.var(axis=0)
    if old.n_tokens == 0:
        return Statistics(u, v, m, 1)
    weight = min(old.n_tokens, t_max * STATS_WINDOW)
    delta = u - old.mean
    var = (weight * old.var + m * v + delta**2 * (weight * m / (weight + m))) / (weight + m)
    return Statistics(old.mean + delta * m / (weight + m), var, old.n_tokens + m, old.n_windows + 1)


def update_statistics_published(old: Statistics, z: Floats, t_max: int) -> Statistics:
    """The published update, exact only for windows of equal length; t counts windows and is capped at t_max."""
    m, u, v = len(z), z.mean(axis=0), z.var(axis=0)
    if old.n_windows == 0:
        return Statistics(u, v * m / (m - 1) if m > 1 else np.zeros_like(v), m, 1)
    t = min(old.n_windows, t_max)
    delta = u - old.mean
    var = (old.var * (t - 1 / m) + v + delta**2 / (1 + 1 / t)) / (t + 1 - 1 / m)
    return Statistics((old.mean * t + u) / (t + 1), var, old.n_tokens + m, old.n_windows + 1)


def activation_bias(z: Floats, mean: Floats, var: Floats) -> Floats:
    """bias_i [m] of section 3.1. Reading: 0 where the mean variance is 0, since the formula is 0/0 there."""
    mean_var = var.mean()
    if mean_var == 0:
        return np.zeros(len(z))
    bias: Floats = ((z - mean) ** 2 / (var + mean_var / 100)).mean(axis=1)
    return bias


def probe_weights(bias: Floats) -> Floats:
    """w_i [m] of section 3.1; 1/m each where the biases sum to 0 or are not finite."""
    total = bias.sum()
    if total == 0 or not np.isfinite(total):
        return np.full(len(bias), 1 / len(bias))
    weights: Floats = bias / total
    return weights


# Section 3.2: probe-query


def probe_query(z: Floats, weights: Floats) -> Floats:
    """sum_i w_i z_i, [H*d]."""
    return weights @ z


# Section 3.3: chunk summary


def chunk_summary(keys: Floats, received: Floats, kind: Literal["head", "kv_head", "mean"] = "head") -> Floats:
    """rep [H*d] of a chunk from its keys [c, G, d] and the attention each received per query head [c, H].

    head: 4 keys per query head; kv_head: 4 per KV head, by the attention of the whole group; mean: all keys. KV heads
    are repeated to query heads in every case.
    Reading: "the mean", where fewer than 4 keys have a weight, is that of all keys of the chunk.
    """
    n_head, n_head_kv = received.shape[1], keys.shape[1]
    n_gqa = n_head // n_head_kv
    if kind == "kv_head":
        grouped = received.reshape(len(keys), n_head_kv, n_gqa).sum(axis=2)
        received = np.repeat(grouped, n_gqa, axis=1)
    representatives = []
    for head in range(n_head):
        of_head, weight = keys[:, head // n_gqa], received[:, head]
        few = np.count_nonzero(weight) < N_REPRESENTATIVES
        chosen = np.arange(len(keys)) if kind == "mean" or few else top_k(weight, N_REPRESENTATIVES)
        representatives.append(of_head[chosen].mean(axis=0))
    return np.concatenate(representatives)


# Section 3.4: score


def cosine(a: Floats, rows: Floats) -> Floats:
    """cos(a, row) for every row [N]. Reading: 0 where either vector is 0."""
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(a)
    cosines: Floats = np.divide(rows @ a, norms, out=np.zeros(len(rows)), where=norms > 0)
    return cosines


def chunk_scores(
    probe: Floats,
    summaries: Floats,
    kind: Literal["cosine", "dot"] = "cosine",
    question: Floats | None = None,
    question_weight: float = 4.0,
) -> Floats:
    """Scores [N] of all chunks, summaries [N, H*d]; `question` [H*d] adds lambda * cos(question, rep)."""
    scores = cosine(probe, summaries) if kind == "cosine" else summaries @ probe
    if question is not None:
        scores = scores + question_weight * cosine(question, summaries)
    return scores


def question_vector(z: Floats, received: Floats) -> Floats:
    """Mean of the 4 most attended rows of z [m, H*d], by the attention each of the question's tokens received [m]."""
    mean: Floats = z[top_k(received, N_REPRESENTATIVES)].mean(axis=0)
    return mean


# Section 3.5: selection


def top_k(scores: Floats, k: int) -> Ints:
    """Ascending indices of the k highest scores; of equal scores the lowest index is taken first."""
    return np.sort(np.argsort(-scores, kind="stable")[:k]).astype(np.int64)


def chunk_bounds(keys: Floats) -> Floats:
    """Least and greatest key per KV head and channel [2, G, d] of a chunk's keys [c, G, d]."""
    return np.stack([keys.min(axis=0), keys.max(axis=0)])


def bound_scores(query: Floats, bounds: Floats) -> Floats:
    """Section 4's upper bound of q.k in every chunk, summed over query heads: query [H, d], bounds [N, 2, G, d]."""
    n_gqa = len(query) // bounds.shape[2]
    per_head = np.repeat(bounds, n_gqa, axis=2)
    scores: Floats = np.maximum(query * per_head[:, 0], query * per_head[:, 1]).sum(axis=(1, 2))
    return scores


def key_scores(query: Floats, keys: Sequence[Floats]) -> Floats:
    """The largest q.k of every query head in each chunk [H, N]: query [H, d], keys [c, G, d] of N chunks."""
    n_gqa = len(query) // keys[0].shape[1] if keys else 1
    products = [np.einsum("hd,jhd->hj", query, np.repeat(chunk, n_gqa, axis=1)) for chunk in keys]
    return np.array([chunk.max(axis=1) for chunk in products]).T


# Spreads: of the engine's own making (native/kernels/cpu/spread.cpp says what they are), no part of the papers


def chunk_spread(keys: Floats, centre: Floats, stored: Callable[[Floats], Floats]) -> Floats:
    """Mean of a chunk's keys [c, G, d] less the centre [G, d], turned and rounded to q4_0, and behind it the root of
    their mean square distance from it per channel: [G, d + 1]."""
    mean = keys.mean(axis=0)
    spread = np.sqrt(((keys - mean) ** 2).mean(axis=(0, 2)))
    return np.column_stack([requantised(turned(mean - centre), "q4_0"), stored(spread)])


def spread_scores(query: Floats, spreads: Floats) -> Floats:
    """Scores [N], summed over query heads: the greatest product of query [H, d] with a box of the half-width that
    spreads [N, G, d + 1] say, around their means."""
    query = turned(query)
    per_head = np.repeat(spreads, len(query) // spreads.shape[1], axis=1)
    products = np.einsum("hd,nhd->n", query, per_head[:, :, :-1])
    scores: Floats = products + per_head[:, :, -1] @ np.abs(query).sum(axis=1)
    return scores


# Section 3.6: layer-wise cut-off


def score_entropy(scores: Floats, temperature: float = 1.0) -> float:
    """h in [0, 1], the entropy of softmax(score / temperature) over ln N; NaN for N <= 1, where ln N is no divisor.

    Reading: chunks that were not scored, -inf, do not count.
    """
    scores = scores[scores > -np.inf]
    if len(scores) <= 1:
        return math.nan
    p = softmax(scores / temperature)
    return float(-(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum() / math.log(len(p)))


def _round(x: float) -> int:
    """Reading: halves go up, as lround has it for what is not negative."""
    return math.floor(x + 0.5)


def layer_budgets(h: Floats, k: int, n_chunks: int) -> list[int]:
    """k_l of every layer from its mean entropy h [L]; the sum is min(L*k, L*N).

    Reading: the pool starts at that sum, so that the clamp's two ends never cross; where h is 0 from some layer on,
    those layers share what is left equally.
    """
    n_layer = len(h)
    low, high = min(n_chunks, math.ceil(0.7 * k)), min(n_chunks, 2 * k)
    pool = n_layer * min(k, n_chunks)
    budgets = []
    for layer in range(n_layer):
        n_after = n_layer - layer - 1
        rest = h[layer:].sum()
        share = pool * h[layer] / rest if n_chunks > 1 and rest > 0 else pool / (n_after + 1)
        least, most = max(low, pool - n_after * high), min(high, pool - n_after * low)
        budgets.append(min(max(_round(share), least), most))
        pool -= budgets[-1]
    return budgets


def layer_budgets_published(h: Floats, k: int, n_chunks: int) -> list[int]:
    """The published clamp to [32, 2k], whatever that does to the total. Reading: the pool is carried here too."""
    pool = len(h) * k
    budgets = []
    for layer in range(len(h)):
        rest = h[layer:].sum()
        share = pool * h[layer] / rest if rest > 0 else pool / (len(h) - layer)
        budget = min(max(_round(share), PUBLISHED_MIN_BUDGET), 2 * k)
        pool -= budget
        budgets.append(min(budget, n_chunks))
    return budgets


def mean_entropies(history: Sequence[Sequence[float]], least: int = 1) -> Floats | None:
    """h_l [L], the mean of each layer's last 100 values; None (equal shares) while a layer has fewer than `least`."""
    if any(len(values) < least for values in history):
        return None
    return np.array([np.mean(values[-N_ENTROPIES:]) for values in history])


# Section 4: Quest


def quest_summary(rotated_keys: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest value per KV head and channel [G, d] of a page's roped keys [c, G, d]."""
    return rotated_keys.min(axis=0), rotated_keys.max(axis=0)


def quest_scores(rotated_q: Floats, lows: Floats, highs: Floats) -> Floats:
    """Upper bound of q.k per query head and page [H, N]; rotated_q [H, d], lows and highs [N, G, d]."""
    n_gqa = len(rotated_q) // lows.shape[1]
    low, high = np.repeat(lows, n_gqa, axis=1), np.repeat(highs, n_gqa, axis=1)
    bounds: Floats = np.maximum(rotated_q * low, rotated_q * high).sum(axis=2).T
    return bounds


def quest_group_scores(scores: Floats, n_head_kv: int, vote: Literal["max", "sum"] = "max") -> Floats:
    """One vote per KV head and page [G, N]: the maximum (or sum) over the group of the softmax over pages of [H, N]."""
    shares = softmax(scores).reshape(n_head_kv, -1, scores.shape[1])
    votes: Floats = shares.max(axis=1) if vote == "max" else shares.sum(axis=1)
    return votes


# Section 6: the oracle


def chunk_mass(weights: Floats, params: Params, n_chunks: int) -> Floats:
    """True attention mass of every chunk per query head [H, N], summed over queries: weights [m, H, n_keys] of all keys
    from token 0 on."""
    first, c = params.n_sink, params.n_chunk_tokens
    of_chunks = weights[:, :, first : first + n_chunks * c].sum(axis=0)
    mass: Floats = of_chunks.reshape(weights.shape[1], n_chunks, c).sum(axis=2)
    return mass
