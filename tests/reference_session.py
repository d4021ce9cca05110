"""The oracle's session: one window after another through the formulas of reference.py.

What a layer computes in a window is chained here in the order of docs/algorithms.md; where the text leaves a choice,
the plainest reading is taken and marked "Reading:". Shapes and symbols are those of reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import reference as ref
from reference import QKV, Floats, Ints, Params, Phase, Rope, Statistics
from reference_search import N_UNDIVIDED_TOKENS, search_votes


class LayerResult(TypedDict):
    """What one layer did in one window; statistics and summaries are those the window worked with."""

    bias: Floats  # [m]
    weights: Floats  # [m]
    probe: Floats  # [H*d]
    scores: Floats  # [N] that decide, of a search votes, [0] where it is not made as all are attended; with a list per
    #                 KV head [G, N], votes or masses
    entropy: float  # NaN for N <= 1, and for a search
    budget: int  # chunks this layer may take, N at most
    refined: Floats  # [N] logarithms of votes by keys, where `refine` decides: -inf for others; else the scores
    plan: Ints  # ascending chunk ids [k], or [G, k]
    attended: Ints  # ascending positions of the past, or [G, ...]; the window itself comes on top
    out: Floats  # [m, H*d]
    mean: Floats  # [H*d], after this window's update
    var: Floats  # [H*d]
    summaries: Floats  # [N, H*d], or [N, 2, G, d] for bounds, [N, G, d + 1] for spreads


@dataclass
class _Layer:
    """State of one layer between windows."""

    k: Floats  # [n, G, d], without RoPE
    v: Floats  # [n, G, d]
    received: Floats  # [n, H], attention received since the key's own window until it left local
    statistics: Statistics
    summaries: list[Floats] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


class ReferenceSession:
    """A session over unrotated q, k, v: feed windows in order, read what each layer planned and put out.

    `question`, one [H*d] vector per layer, turns on the question-aware term in prefill (section 3.4).
    """

    def __init__(  # noqa: PLR0917 - the shapes in the order of docs/algorithms.md section 1
        self,
        params: Params,
        n_layer: int,
        n_head: int,
        n_head_kv: int,
        d_head: int,
        rope: Rope,
        *,
        question: Sequence[Floats] | None = None,
    ) -> None:
        self.params, self.rope, self.question = params, rope, question
        self.n_past = 0
        n_channels = n_head * d_head
        self.layers = [
            _Layer(
                k=np.zeros((0, n_head_kv, d_head)),
                v=np.zeros((0, n_head_kv, d_head)),
                received=np.zeros((0, n_head)),
                statistics=Statistics(np.zeros(n_channels), np.zeros(n_channels)),
            )
            for _ in range(n_layer)
        ]
        self._budgets: list[int] = []

    def window(self, qkv: Sequence[QKV], phase: Phase) -> list[LayerResult]:
        """One window through all layers: qkv holds (q [m, H, d], k [m, G, d], v [m, G, d]) of each."""
        self.begin(phase)
        results = [self.layer(layer, *arrays, phase) for layer, arrays in enumerate(qkv)]
        self.end(len(qkv[0][0]))
        return results

    def begin(self, phase: Phase) -> None:
        """Start of a window: close the chunks that have left local, then share out the budget."""
        n_chunks = ref.n_closed_chunks(self.n_past, self.params)
        c = self.params.n_chunk_tokens
        for state in self.layers:
            for b in range(len(state.summaries), n_chunks):
                tokens = slice(self.params.n_sink + b * c, self.params.n_sink + (b + 1) * c)
                # Reading: a key without RoPE is R_0 k, as it is stored.
                roped = self.params.positions == "exact" and self.params.summary_keys == "attended"
                positions = np.arange(tokens.start, tokens.stop) if roped else 0
                keys = self.params.stored(ref.rotate(state.k[tokens], positions, self.rope))
                if self.params.summary == "bounds":
                    state.summaries.append(ref.chunk_bounds(keys))
                elif self.params.summary == "spread":
                    state.summaries.append(ref.chunk_spread(keys, self._centre(state, roped=roped), self.params.stored))
                else:
                    summary = ref.chunk_summary(keys, state.received[tokens], self.params.summary)
                    state.summaries.append(self.params.stored(summary))
        self._budgets = self._share(n_chunks, phase)

    def _centre(self, state: _Layer, *, roped: bool) -> Floats:
        """What is taken off all means [G, d]: the mean of the sinks' keys, 0 without sinks."""
        n_sink = self.params.n_sink
        sinks = self.params.stored(ref.rotate(state.k[:n_sink], np.arange(n_sink) if roped else 0, self.rope))
        centre: Floats = sinks.sum(axis=0) / max(n_sink, 1)
        return centre

    def _share(self, n_chunks: int, phase: Phase) -> list[int]:
        """Chunks per layer: everything, nothing, the top-k of prefill, or the cut-off's shares.

        Reading: a step's shares come from the values of the windows before it, since those of the layers after l are
        not known yet at layer l; its own values join the history when it ends.
        """
        n_dense, k, select = self.params.n_dense_layers, self.params.top_k, self.params.select
        dense, n_sharing = [n_chunks] * n_dense, len(self.layers) - n_dense
        if select in {"all", "none"}:
            return dense + [n_chunks if select == "all" else 0] * n_sharing
        equal = dense + [min(k, n_chunks)] * n_sharing
        if phase == "prefill" or self.params.cutoff == "none" or select == "oracle":
            return equal
        history = [state.entropies for state in self.layers[n_dense:]]
        if self.params.cutoff == "published":
            h = ref.mean_entropies(history, least=ref.N_ENTROPIES)
            return equal if h is None else dense + ref.layer_budgets_published(h, k, n_chunks)
        h = ref.mean_entropies(history)
        return equal if h is None else dense + ref.layer_budgets(h, k, n_chunks)

    def layer(
        self, layer: int, q: Floats, k: Floats, v: Floats, phase: Phase, *, attended_plan: Ints | None = None
    ) -> LayerResult:
        """One layer of the window that `begin` started; k and v join the memory, out attends.

        attended_plan: chunks to attend in place of the plan made here.
        """
        if phase == "decode" and len(q) != 1:
            raise ValueError(f"a decode window is one token, not {len(q)}")
        state, params = self.layers[layer], self.params
        z = ref.fixed_distance_queries(q, params, self.rope)
        bias, weights = self._weigh(state, z, phase)
        if params.positions == "exact" and params.summary_keys == "attended":
            # Reading: queries meet roped summaries as they meet roped keys; the bias is of z in any case.
            z = ref.rotate(q, self.n_past + np.arange(len(q)), self.rope).reshape(len(q), -1)
        probe = ref.probe_query(z, weights)
        summaries, scores = self._scores(state, layer, probe.reshape(q.shape[1:]), k.shape[1:], phase)
        if params.select == "oracle":
            scores = self._mass(state, q, k, len(scores) if scores.ndim == 1 else scores.shape[1])
        answers = phase == "decode" and params.select == "top_k" and scores.ndim == 1
        n_chunks, budget, entropy = scores.shape[-1], self._budgets[layer], math.nan
        if answers and params.scan > 0:
            scores = self._search(state, q, n_chunks) if budget < n_chunks else np.zeros(0)
        elif scores.ndim == 1:
            entropy = ref.score_entropy(scores, params.cutoff_temperature)
        if not math.isnan(entropy):
            state.entropies.append(entropy)  # Reading: a window without a value (N <= 1) contributes none.
        refined, n_refined = scores, min(n_chunks, params.refine * budget)
        if answers and budget < n_refined:
            refined = self._refine(state, q, scores, n_refined)
        plan = np.array([ref.top_k(row, budget) for row in np.atleast_2d(refined)])
        plan = np.arange(n_chunks) if scores.size == 0 and scores.ndim == 1 else plan[0] if scores.ndim == 1 else plan
        attended, out = self._attend(state, q, k, v, plan if attended_plan is None else attended_plan)
        return LayerResult(
            bias=bias,
            weights=weights,
            probe=probe,
            scores=scores,
            entropy=entropy,
            budget=budget,
            refined=refined,
            plan=plan,
            attended=attended,
            out=out,
            mean=state.statistics.mean,
            var=state.statistics.var,
            summaries=summaries,
        )

    def _scores(
        self, state: _Layer, layer: int, probe: Floats, kv_shape: tuple[int, ...], phase: Phase
    ) -> tuple[Floats, Floats]:
        """Summaries, and scores [N] of one list for all heads, or logarithms of votes [G, N]. probe: [H, d].

        Votes are the logarithms of section 4's, which order alike and do not underflow.
        """
        params = self.params
        bounds = params.summary == "bounds"
        spread = params.summary == "spread"
        of_spread = (kv_shape[0], kv_shape[1] + 1)
        shape = (2, *kv_shape) if bounds else of_spread if spread else (probe.size,)
        summaries = np.array(state.summaries).reshape(-1, *shape)
        if params.granularity == "kv_head":
            if bounds:
                per_head = ref.quest_scores(probe, summaries[:, 0], summaries[:, 1])
            else:
                per_head = np.einsum("hd,nhd->hn", probe, summaries.reshape(-1, *probe.shape))
            if not len(summaries):
                return summaries, np.zeros((kv_shape[0], 0))
            return summaries, np.log(ref.quest_group_scores(per_head, kv_shape[0], params.vote))
        if bounds:
            return summaries, ref.bound_scores(probe, summaries)
        if spread:
            return summaries, ref.spread_scores(probe, summaries)
        question = self.question[layer] if self.question is not None and phase == "prefill" else None
        return summaries, ref.chunk_scores(probe.ravel(), summaries, params.score, question, params.question_weight)

    def _mass(self, state: _Layer, q: Floats, k: Floats, n_chunks: int) -> Floats:
        """The oracle's masses, averaged over heads: [N], or each KV head's part of that, [G, N]."""
        n, m, n_head_kv = self.n_past, len(q), k.shape[1]
        keys, window = np.arange(n + m), np.arange(n, n + m)
        every = np.concatenate([state.k, k])
        logits = ref.attention_logits(q, window, every, keys, params=self.params, rope=self.rope)
        mass = ref.chunk_mass(ref.softmax(logits), self.params, n_chunks) / q.shape[1]
        parts = mass.reshape(n_head_kv, q.shape[1] // n_head_kv, n_chunks).sum(axis=1)
        summed: Floats = parts if self.params.granularity == "kv_head" else parts.sum(axis=0)
        return summed

    def end(self, n_tok: int) -> None:
        """End of a window of `n_tok` tokens."""
        self.n_past += n_tok

    def _weigh(self, state: _Layer, z: Floats, phase: Phase) -> tuple[Floats, Floats]:
        """Bias and weights of the window's tokens; in prefill the statistics are updated first.

        Reading: in decode the bias is measured against the statistics as they stand; its one weight is 1 anyway.
        """
        if self.params.probe == "mean":
            return np.zeros(len(z)), np.full(len(z), 1 / len(z))
        if phase == "prefill":
            update = ref.update_statistics if self.params.statistics == "ours" else ref.update_statistics_published
            state.statistics = update(state.statistics, z, self.params.t_max)
        bias = ref.activation_bias(z, state.statistics.mean, state.statistics.var)
        if phase == "prefill" and state.statistics.n_windows <= self.params.probe_warmup:
            return bias, np.full(len(z), 1 / len(z))
        return bias, ref.probe_weights(bias)

    def _met(self, state: _Layer, q: Floats, chunks: Ints) -> tuple[Floats, list[Floats]]:
        """The step's query q [1, H, d], scaled, and keys [c, G, d] of closed chunks, as they meet."""
        params = self.params
        exact = params.positions == "exact"
        query = ref.rotate(q, self.n_past if exact else params.n_local, self.rope)[0]
        keys = []
        for b in chunks:
            tokens = np.arange(params.n_chunk_tokens) + params.n_sink + b * params.n_chunk_tokens
            rotated = ref.rotate(state.k[tokens], tokens if exact else 0, self.rope)
            keys.append(params.kept_keys(rotated, np.ones(len(tokens), dtype=bool)))
        return query * (query.shape[1] ** -0.5 if params.scale is None else params.scale), keys

    def _search(self, state: _Layer, q: Floats, n_chunks: int) -> Floats:
        """Votes [N] by the index of a history of which no part is divided into cells."""
        if n_chunks * self.params.n_chunk_tokens >= N_UNDIVIDED_TOKENS:
            raise NotImplementedError("the reference knows no cells of longer stretches")
        query, keys = self._met(state, q, np.arange(n_chunks))
        return search_votes(query, keys, self._centre(state, roped=self.params.positions == "exact"))

    def _refine(self, state: _Layer, q: Floats, scores: Floats, n_candidates: int) -> Floats:
        """Logarithms [N] of all query heads' votes for the best `n_candidates` by their keys; -inf for the rest."""
        candidates = ref.top_k(scores, n_candidates)
        query, keys = self._met(state, q, candidates)
        votes = np.full(len(scores), -np.inf)
        votes[candidates] = np.log(ref.quest_group_scores(ref.key_scores(query, keys), 1, "sum")[0])
        return votes

    def _attend(self, state: _Layer, q: Floats, k: Floats, v: Floats, plan: Ints) -> tuple[Ints, Floats]:
        """Attend, add up what local and the window received, and append k and v."""
        n, m = self.n_past, len(q)
        state.k, state.v = np.concatenate([state.k, k]), np.concatenate([state.v, v])
        state.received = np.concatenate([state.received, np.zeros((m, q.shape[1]))])
        window, n_head, n_head_kv = np.arange(n, n + m), q.shape[1], k.shape[1]
        # One KV head after another where each has its own list; else all of them at once.
        lists = plan if plan.ndim == 2 else plan[None]
        per_list = n_head // len(lists), n_head_kv // len(lists)
        all_attended, outs = [], []
        for i, of_list in enumerate(lists):
            heads, kv = (slice(i * size, (i + 1) * size) for size in per_list)
            attended = ref.attended_past(n, of_list, self.params)
            keys = np.concatenate([attended, window])
            k_list, v_list = state.k[keys][:, kv], state.v[keys][:, kv]
            out, weights = ref.attend(q[:, heads], window, k_list, v_list, keys, params=self.params, rope=self.rope)
            still_local = keys >= n - self.params.n_local
            state.received[keys[still_local], heads] += weights.sum(axis=0).T[still_local]
            all_attended.append(attended)
            outs.append(out)
        return all_attended[0] if plan.ndim == 1 else np.array(all_attended), np.concatenate(outs, axis=1)
