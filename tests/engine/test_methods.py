"""Breaks when a method with room for everything is not dense, or answers otherwise over a reading that it shares."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from engine_support import Pieces, check, one_by_one, open_session, random_tokens, read, small
from llama_cpp._internals import LlamaModel

from actqkv_cpp import ParameterError, Retrieval, methods
from actqkv_cpp._native import Session
from actqkv_cpp.bench.kernel_jobs import candidates

N = 220
TOKENS = random_tokens(N + 20)
PIECES: Pieces = [(N, "prefill"), *one_by_one(20)]
ALL = [name for name, row in methods().items() if "none" not in {row["prefill"], row["decode"]}]


def retrieval(name: str, **columns: Any) -> Retrieval:
    """The method's row at small sizes, with its own positions."""
    dense_layers = min(methods()[name]["dense_layers"], 1)  # of 3
    return small(**{"method": name, "positions": None, "chunk": 8, "dense_layers": dense_layers} | columns)


@pytest.mark.parametrize("positions", ["clamped", "exact"])
@pytest.mark.parametrize("name", ALL)
def test_room_for_everything_is_dense(name: str, positions: Any, tiny_llama: LlamaModel) -> None:
    """Breaks when selecting every chunk, per layer or per KV head, is not attending everything."""
    logits = []
    for method in ("dense", name):
        row = dataclasses.replace(retrieval(method), positions=positions, budget=1024)
        with open_session(tiny_llama, row) as session:
            logits.append(read(session, TOKENS, PIECES, n_logits=1))
    check("windows", logits[1], logits[0])


@pytest.mark.parametrize("name", methods())
def test_a_small_budget_is_not_dense(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when a method attends everything whatever its budget, or the test above cannot fail."""
    logits = []
    for method in ("dense", name):
        positions = methods()[name]["positions"].replace("auto", "exact")
        row = dataclasses.replace(retrieval(method), positions=positions)
        with open_session(tiny_llama, row) as session:
            logits.append(read(session, TOKENS, PIECES, n_logits=1))
    assert (np.abs(logits[1] - logits[0]).max() > 1e-3) == (name != "dense")


@pytest.mark.parametrize("refine", [1, 3])
def test_candidates_are_those_of_a_step(tiny_llama: LlamaModel, refine: int) -> None:
    """Breaks when a benchmark of kernels measures other numbers of cells and keys than an answering step reads."""
    row, n_closed = small(refine=refine), 4096 // 8
    n_picked, n_refined = candidates("actqkv", 5, n_closed)
    assert (n_picked, n_refined) == (3072 // 64, 5)
    key_bytes, sketch_bytes = 8 * 2 * 32 * 2, 3 + 32 // 8  # 2 KV heads of 32
    with open_session(tiny_llama, row, n_ctx=4200) as session:
        session.decode(random_tokens(4 + 4096 + 32))
        session.stats_reset()
        session.decode(TOKENS[:1], phase="decode")
        assert session.n_chunks == n_closed
        of_layer = session.stats().refine.bytes / session.n_layer
    n_sixteens = (of_layer - (n_refined * refine * key_bytes if refine > 1 else 0)) / (16 * sketch_bytes)
    assert n_sixteens * session.n_layer % 1 == 0
    assert 4 <= n_sixteens / 4 / n_picked < 7  # of each of 4 heads: cells of about 64 keys, room for whole sixteens


def test_exact_positions_end_at_the_trained_length(tiny_llama: LlamaModel) -> None:
    """Breaks when exact positions are used where the model was not trained, or the refusal does not say what to do."""
    for name, remedy in (("quest", "use method 'quest-clamped'"), ("dense", "use positions 'clamped'")):
        with open_session(tiny_llama, retrieval(name), n_ctx=2048):
            pass
        with pytest.raises(ParameterError, match=f"end at the 2048 tokens .* n_ctx is 2049: {remedy}"):
            open_session(tiny_llama, retrieval(name), n_ctx=2049)
    for name in sorted({*methods()} - {"quest", "dense"}):
        with open_session(tiny_llama, retrieval(name), n_ctx=2049):
            pass


def test_dense_layers_are_reported_apart(tiny_llama: LlamaModel) -> None:
    """Breaks when what dense layers attend hides in the figures of the others."""
    with open_session(tiny_llama, retrieval("quest")) as session:
        read(session, TOKENS, PIECES[:1], n_logits=0)
        session.stats_reset()
        session.decode(TOKENS[N : N + 1], phase="decode")
        stats, params = session.stats(), session.params
        assert stats.dense_tokens_max == stats.dense_tokens_mean == N + 1
        remainder = (N - params.n_local - params.n_sink) % params.n_chunk_tokens
        assert stats.attended_tokens_max == stats.attended_tokens_mean == params.budget + remainder + 1
    with open_session(tiny_llama, retrieval("quest-clamped", granularity="layer")) as session:
        assert (session.stats().dense_tokens_max, session.stats().dense_tokens_mean) == (0, 0.0)


# ---- several methods over one reading

SHARED: dict[str, tuple[Retrieval, Retrieval]] = {  # what reads, what answers
    "no cut-off": (retrieval("actqkv", cutoff_temperature=0.02), retrieval("actqkv-equal")),
    "no search": (retrieval("actqkv"), retrieval("actqkv", scan=0)),
    "budget": (
        retrieval("actqkv", prefill="none"),
        dataclasses.replace(retrieval("actqkv", prefill="none"), budget=52),
    ),
    "dense after quest": (retrieval("quest"), retrieval("dense")),
    "quest's sum after quest": (retrieval("quest"), retrieval("quest", vote="sum")),
    "oracle after quest": (retrieval("quest"), retrieval("oracle", prefill="all")),
    "streaming after quest": (retrieval("quest"), small(method="streaming", positions="exact", prefill="all")),
    "oracle answers": (retrieval("actqkv"), retrieval("actqkv", decode="oracle")),
    "dense answers": (retrieval("infllm"), retrieval("infllm", decode="all")),
    "actqkv after streaming": (
        retrieval("actqkv", prefill="none"),
        retrieval("actqkv", prefill="none", scan=0, refine=2),
    ),
}


def answer(session: Session) -> np.ndarray:  # type: ignore[type-arg]
    return read(session, TOKENS[N:], PIECES[1:])


@pytest.mark.parametrize("name", SHARED)
def test_one_reading_serves_several_methods(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when a method answers otherwise over another's reading than over its own, or changes it."""
    reading, answering = SHARED[name]
    with open_session(tiny_llama, answering) as alone, open_session(tiny_llama, reading) as session:
        for each in (alone, session):
            read(each, TOKENS, PIECES[:1], n_logits=0)
        session.checkpoint()
        before = answer(session)
        session.rewind(N)
        session.set_answering(answering)
        assert session.answering.method == answering.method
        assert session.params.method == reading.method
        after = answer(session)
        np.testing.assert_array_equal(after, answer(alone))
        assert np.abs(after - before).max() > 1e-4  # and it is another method
        session.rewind(N)
        session.set_answering(reading)
        np.testing.assert_array_equal(answer(session), before)


def test_a_budget_of_answering_leaves_reading_alone(tiny_llama: LlamaModel) -> None:
    """Breaks when a budget set for answers changes what later reading retrieves."""
    wide = dataclasses.replace(retrieval("actqkv"), budget=1000)
    with open_session(tiny_llama, retrieval("actqkv")) as session, open_session(tiny_llama, wide) as other:
        session.set_answering(wide)
        session.decode(TOKENS[:N])
        assert session.stats().attended_tokens_max < 4 + 32 + 5 * 8 + 8 + 16
        session.decode(TOKENS[N : N + 1], phase="decode")
        assert session.stats().attended_tokens_max == N + 1
        assert (session.params.budget, session.answering.budget) == (76, 1000)
        with pytest.raises(Exception, match="other parameters"):
            other.state_set(session.state_get())


UNEQUAL: list[tuple[Retrieval, Retrieval, str]] = [
    (retrieval("actqkv"), dataclasses.replace(retrieval("actqkv"), chunk=16), "n_chunk_tokens is 16, the reading's 8"),
    (retrieval("actqkv"), retrieval("infllm"), "positions is 'clamped', the reading's 'exact', summary is 'head'"),
    (retrieval("actqkv"), retrieval("actqkv-uniform"), "probe is 'mean', the reading's 'bias'"),
    (retrieval("actqkv"), retrieval("quest"), "prefill is 'all', the reading's 'top'"),
    (retrieval("actqkv-equal"), retrieval("actqkv"), "it has a cut-off, for which the reading kept no entropies"),
    (retrieval("actqkv"), retrieval("actqkv", cutoff_temperature=1.0), "cutoff_temperature is 1, the reading's 1000"),
    (retrieval("actqkv"), retrieval("actqkv", dense_layers=1), "n_dense_layers is 1, the reading's 0"),
    (retrieval("dense"), retrieval("quest"), "the reading made no summaries"),
    (retrieval("actqkv", scan=0), retrieval("actqkv"), "the reading made no index"),
    (retrieval("actqkv", decode="oracle"), retrieval("actqkv"), "the reading made no index"),
    (retrieval("quest"), retrieval("quest", granularity="layer"), "granularity is 'layer', the reading's 'kv_head'"),
    (retrieval("infllm"), retrieval("infllm", representatives=2), "n_representatives is 2, the reading's 4"),
]


@pytest.mark.parametrize("name", ["streaming", "dense", "oracle"])
def test_a_question_where_nothing_is_scored(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when the weight of a question is looked for where a method keeps none of what it is made of."""
    pieces: Pieces = [(50, "prefill"), (7, "question"), (3, "decode")]
    found = []
    for weight in (0.0, 1.0):
        with open_session(tiny_llama, retrieval(name, summary="mean", question_weight=weight)) as session:
            found.append(read(session, TOKENS[:60], pieces))
    np.testing.assert_array_equal(found[1], found[0])


@pytest.mark.parametrize(("reading", "answering", "message"), UNEQUAL, ids=[message for *_, message in UNEQUAL])
def test_unequal_stores_are_refused(
    reading: Retrieval, answering: Retrieval, message: str, tiny_llama: LlamaModel
) -> None:
    """Breaks when a method answers from stores that are not its own, or the refusal does not say what differs."""
    with open_session(tiny_llama, reading) as session:
        with pytest.raises(ParameterError, match=message) as caught:
            session.set_answering(answering)
        assert "\n" not in str(caught.value)
        assert session.answering == session.params
        with pytest.raises(ParameterError, match="n_local is 16, the reading's 32"):
            session.set_answering(dataclasses.replace(reading, n_local=16))
