"""Breaks when a step attends other tokens than it plans, or its figures (statistics, sources) say otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import reference as ref
from engine_support import SMALL, Pieces, one_by_one, open_session, random_tokens, read, small
from llama_cpp._internals import LlamaModel
from numpy.typing import NDArray

from actqkv_cpp import Retrieval
from actqkv_cpp._native import Session

N_LAYER = 3
PIECES: Pieces = [(203, "prefill"), *one_by_one(10), (27, "question"), *one_by_one(4)]
TOKENS = random_tokens(sum(n for n, _ in PIECES))

METHODS: dict[str, Retrieval] = {
    "default": SMALL,
    "exact": small(positions="exact"),
    "no cut-off": small(cutoff="none"),
    "head": small(summary="head", score="cosine", refine=1),
    "ragged": small(n_sink=5, n_local=29, chunk=7, window=11),
    "no sinks": small(n_sink=0),
    "dense": small(method="dense", positions="exact"),
    "streaming": small(prefill="none", decode="none"),
    "answers attend all": small(decode="all"),
}


@dataclass
class Plans:
    """How many chunks each layer of each window retrieved."""

    n_chunks: dict[int, list[int]] = field(default_factory=dict)

    def __call__(self, name: str, layer: int, n_past: int, data: NDArray[np.float32]) -> None:
        if name == "plan":
            self.n_chunks.setdefault(n_past, []).append(len(data))


def reference_params(session: Session) -> ref.Params:
    p = session.params
    return ref.Params(n_sink=p.n_sink, n_local=p.n_local, n_chunk_tokens=p.n_chunk_tokens, budget=p.budget)


def retrieved(session: Session, plans: Plans, n_past: int, phase: str) -> list[int]:
    """Chunks per layer of the window at n_past, planned or by the method."""
    select = session.params.columns["decode" if phase == "decode" else "prefill"]
    n_closed = ref.n_closed_chunks(n_past, reference_params(session))
    if select == "top":
        return plans.n_chunks.get(n_past, [0] * N_LAYER)
    return [n_closed if select == "all" else 0] * N_LAYER


@pytest.mark.parametrize("name", METHODS)
def test_statistics_follow_from_the_plans(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when attended_tokens are not sinks + plan + remainder + local + window, each token of the past once."""
    with open_session(tiny_llama, METHODS[name]) as session:
        session.observer = plans = Plans()
        params, at = reference_params(session), 0
        for n, phase in PIECES:
            session.stats_reset()
            plans.n_chunks.clear()
            session.decode(TOKENS[at : at + n], phase=phase)
            most, total, n_queries = 0, 0.0, 0
            start = at
            while start < at + n:
                window = session.params.n_window
                end = start + 1 if phase == "decode" else min(at + n, (start // window + 1) * window)
                m = end - start
                # With every closed chunk attended, the past is: none is left out, none counted twice.
                everything = np.arange(ref.n_closed_chunks(start, params))
                assert len(ref.attended_past(start, everything, params)) == start
                for chunks in retrieved(session, plans, start, phase):
                    past = start - (len(everything) - chunks) * params.n_chunk_tokens
                    most = max(most, past + m)
                    total += past * m + m * (m + 1) / 2
                    n_queries += m
                start = end
            stats = session.stats()
            assert stats.attended_tokens_max == most
            np.testing.assert_allclose(stats.attended_tokens_mean, total / n_queries, rtol=1e-12)
            at += n


@pytest.mark.parametrize("name", ["default", "exact", "no cut-off", "head", "ragged", "no sinks", "streaming"])
def test_answers_keep_the_budget(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when a step attends more than budget + remainder + itself: every layer, or all of them on average."""
    with open_session(tiny_llama, METHODS[name]) as session:
        read(session, TOKENS, PIECES[:1], n_logits=0)
        params = session.params
        for token in TOKENS[203:250]:
            session.stats_reset()
            session.decode(np.array([token]), phase="decode")
            allowed = params.budget + (params.n_chunk_tokens - 1) + 1
            stats = session.stats()
            assert stats.attended_tokens_mean <= allowed
            if params.columns["cutoff"] == "none" or params.columns["decode"] == "none":
                assert stats.attended_tokens_max <= allowed
            else:  # one layer may take 2k
                assert stats.attended_tokens_max <= 2 * allowed - params.n_sink - params.n_local


# ---- sources


def recorded(session: Session, n: int, phase: Any) -> NDArray[np.float64]:
    at = session.n_past
    session.sources_begin()
    session.decode(TOKENS[at : at + n], phase=phase)
    return session.sources_end()


@pytest.mark.parametrize("name", METHODS)
def test_sources_lie_in_what_was_attended(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when a token of the past has no weight or too much, or one has weight that was not attended."""
    with open_session(tiny_llama, METHODS[name]) as session:
        assert recorded(session, 203, "prefill").size == 0  # reading is no answer
        weights = recorded(session, 10, "decode")
        params = session.params
        assert len(weights) == 212
        assert (weights[: params.n_sink] > 0).all()
        assert (weights[212 - params.n_local :] > 0).all()
        assert weights.max() <= 10
        assert 10 / 212 < weights.sum() < 10  # squares of what makes one per query, on at most 212 tokens
        if params.columns["decode"] == "none":  # streaming: sinks, then nothing before local
            assert (weights[params.n_sink : 203 - params.n_local - params.n_chunk_tokens] == 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_sources_change_nothing(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when watching what is attended changes what comes out, or the sums that summaries are made of."""

    def logits(watched: bool) -> NDArray[np.float32]:
        with open_session(tiny_llama, METHODS[name]) as session:
            session.decode(TOKENS[:160])
            if watched:
                session.sources_begin()
            for token in TOKENS[160:210]:
                out = session.decode(np.array([token], np.int32), phase="decode", n_logits=1)
            return out

    np.testing.assert_array_equal(logits(True), logits(False))


def test_sources_equal_the_reference(tiny_llama: LlamaModel) -> None:
    """Breaks when weights are not squared, averaged over heads and layers, summed over queries, and kept per token."""
    with open_session(tiny_llama, METHODS["dense"]) as session:
        seen: dict[tuple[int, int], dict[str, NDArray[np.float32]]] = {}
        session.observer = lambda name, layer, n_past, data: seen.setdefault((n_past, layer), {}).update({name: data})
        n, m = 100, 9
        session.decode(TOKENS[:n])
        found = recorded(session, m, "decode")
        expected = np.zeros_like(found)
        params, rope = ref.Params(positions="exact", n_local=32), ref.Rope(n_rot=32)
        for layer in range(N_LAYER):
            keys = np.concatenate([seen[at, layer]["k"] for at in sorted({at for at, _ in seen})])
            for at in range(n, n + m):
                q = seen[at, layer]["q"].astype(np.float64)
                logits = ref.attention_logits(
                    q, np.array([at]), keys[: at + 1].astype(np.float64), np.arange(at + 1), params=params, rope=rope
                )
                expected[:at] += (ref.softmax(logits)[0] ** 2).mean(axis=0)[:at] / N_LAYER
    np.testing.assert_allclose(found, expected, rtol=4e-3)  # keys in f16: 5e-4 of a logit, twice that squared


def test_sources_stop_when_they_end(tiny_llama: LlamaModel) -> None:
    """Breaks when a second recording starts with the mass of the first, or one goes on after its end."""
    with open_session(tiny_llama) as session:
        session.decode(TOKENS[:100])
        assert (recorded(session, 5, "decode") > 0).any()
        session.decode(TOKENS[105:110], phase="decode")
        assert session.sources_end().size == 0
        one = recorded(session, 1, "decode")
        assert len(one) == 110
        assert 0 < one.sum() < 1


def test_sources_count_a_token_once(tiny_llama: LlamaModel) -> None:
    """Breaks when tokens that were answered before, and are read again after a rewind, count as if they were new."""
    with open_session(tiny_llama) as session:
        session.decode(TOKENS[:100])
        session.decode(TOKENS[100:107], phase="decode")
        once = recorded(session, 3, "decode")
        session.rewind(107)  # no checkpoint lies here: tokens from 96 on are read again
        np.testing.assert_array_equal(recorded(session, 3, "decode"), once)
        session.rewind(107)
        session.sources_begin()
        session.decode(TOKENS[107:109], phase="decode")
        session.rewind(109)
        session.decode(TOKENS[109:110], phase="decode")
        np.testing.assert_array_equal(session.sources_end(), once)
        session.rewind(107)
        session.sources_begin()
        session.decode(TOKENS[107:109], phase="decode")
        session.rewind(108)  # and the one behind it is answered anew
        session.decode(TOKENS[108:110], phase="decode")
        assert once.sum() < session.sources_end().sum() < once.sum() + 1


# ---- other figures


def test_counts(tiny_llama: LlamaModel) -> None:
    """Breaks when tokens and windows are counted in the wrong column, or a reset forgets one."""
    with open_session(tiny_llama) as session:
        session.decode(TOKENS[:40])  # windows of 16, 16, 8
        session.decode(TOKENS[40:60])  # the last of them again: 16, 12
        session.decode(TOKENS[60:63], phase="decode")
        stats = session.stats()
        assert (stats.n_prefill_tokens, stats.n_decode_tokens) == (40 + 8 + 20, 3)
        assert (stats.n_windows, stats.n_replayed_tokens) == (3 + 2 + 3, 8)
        assert min(stats.prefill_ms, stats.decode_ms, stats.graph.ms, stats.attend.ms) > 0
        assert min(stats.graph.bytes, stats.attend.bytes, stats.append.bytes) > 0
        session.stats_reset()
        stats = session.stats()
        assert stats.n_windows == stats.attended_tokens_max == stats.attended_tokens_mean == 0
        assert stats.graph.bytes == stats.score.bytes == stats.probe.bytes == 0


def test_chunks_close_behind_local(tiny_llama: LlamaModel) -> None:
    """Breaks when the number of retrievable chunks is not that of section 1, at the last window's first token."""
    with open_session(tiny_llama) as session:
        params = reference_params(session)
        session.decode(TOKENS[:30])
        for n in range(30, 120):
            session.decode(TOKENS[n : n + 1], phase="decode")
            assert session.n_chunks == ref.n_closed_chunks(n, params)
