"""Breaks when wrong use of the engine is not refused in one clear line, or a refusal changes something."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf as tiny
from engine_support import (
    SMALL,
    in_child,
    index_bytes,
    loaded,
    one_by_one,
    open_session,
    random_tokens,
    read,
    rest_bytes,
    small,
)
from llama_cpp._internals import LlamaModel

from actqkv_cpp import ActqkvError, ContextError, ModelError, ParameterError, Retrieval
from actqkv_cpp._native import memory_plan, model_check

N_VOCAB = 512

# Columns of Retrieval -> what the message says: the parameter, its value, what is allowed.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n_local": 0}, "n_local is 0, expected 1 to"),
    ({"n_sink": 1 << 21}, "n_sink is 2097152, expected 0 to"),
    ({"chunk": 0}, "n_chunk_tokens is 0, expected 1 to 1024"),
    ({"chunk": 1025, "budget": 4000}, "n_chunk_tokens is 1025, expected 1 to 1024"),
    ({"window": 0}, r"n_window .* is 0, expected 1 to 32"),
    ({"window": 33}, r"n_window \(at most n_local\) is 33, expected 1 to 32"),
    ({"budget": 43}, r"budget \(at least n_sink \+ n_local \+ n_chunk_tokens\) is 43, expected 44 to"),
    ({"budget": 1 << 30}, "budget .* is 1073741824, expected 44 to 1073741823"),
    ({"budget": 1 << 40}, "budget is 1099511627776, expected at most 2147483647"),
    ({"representatives": 0}, "n_representatives is 0, expected 1 to 8"),
    ({"representatives": 9}, "n_representatives is 9, expected 1 to 8"),
    ({"probe_warmup": -2}, "probe_warmup is -2, expected -1 to"),
    ({"statistics_cap": 0}, "statistics_cap is 0, expected 1 to"),
    ({"scan": -1}, "scan is -1, expected 0 to 16777216"),
    ({"scan": (1 << 24) + 1}, "scan is 16777217, expected 0 to 16777216"),
    ({"refine": 0}, "refine is 0, expected 1 to 1024"),
    ({"refine": 1025}, "refine is 1025, expected 1 to 1024"),
    ({"cutoff_temperature": 0.0}, "cutoff_temperature is 0, expected > 0"),
    ({"cutoff_temperature": -1.0}, "cutoff_temperature is -1, expected > 0"),
    ({"cutoff_temperature": float("nan")}, "cutoff_temperature is nan, expected > 0"),
    ({"cutoff_temperature": float("inf")}, "cutoff_temperature is inf, expected > 0"),
    ({"question_weight": -1.0}, "question_weight is -1, expected >= 0"),
    ({"question_weight": float("inf")}, "question_weight is inf, expected >= 0"),
    ({"summary": "bounds", "score": "cosine"}, "summaries 'bounds' and 'spread' go with score 'dot'"),
    ({"score": "cosine"}, "summaries 'bounds' and 'spread' go with score 'dot'"),
    ({"scan": 0, "cutoff": "none", "granularity": "kv_head"}, "'spread' goes with granularity 'layer'"),
    ({"summary": "bounds", "question_weight": 1.0}, "'head', 'kv_head' and 'mean', not with 'bounds'"),
    ({"method": "nope"}, "unknown method 'nope'"),
]


@pytest.mark.parametrize(("columns", "message"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_contradictions_are_refused(columns: dict[str, Any], message: str, tiny_llama: LlamaModel) -> None:
    """Breaks when a contradiction is taken, or its message does not name the value and what is allowed."""
    with pytest.raises(ParameterError, match=message) as caught:
        open_session(tiny_llama, small(**columns))
    assert "\n" not in str(caught.value)
    with pytest.raises(ParameterError, match=message):
        memory_plan(tiny_llama, small(**columns), n_ctx=1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 0}, "n_ctx is 0, expected 1 to"),
        ({"n_ctx": -1}, "n_ctx is -1, expected 1 to"),
        ({"n_ctx": 1 << 30}, "n_ctx is 1073741824, expected 1 to 1073741823"),
        ({"n_ctx": 1 << 31}, "n_ctx is 2147483648, expected at most 2147483647"),
        ({"n_threads": 0}, "n_threads is 0, expected 1 to 512"),
        ({"n_threads": 513}, "n_threads is 513, expected 1 to 512"),
        ({"n_threads": 1.5}, "n_threads is 1.5, expected a whole number"),
    ],
    ids=str,
)
def test_sizes_of_a_session(options: dict[str, Any], message: str, tiny_llama: LlamaModel) -> None:
    """Breaks when an impossible n_ctx or number of threads reaches an allocation."""
    with pytest.raises(ParameterError, match=message):
        open_session(tiny_llama, SMALL, **options)


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_kv_types_take_whole_half_blocks(kv_type: str, tmp_path: Path) -> None:
    """Breaks when a head that ends within half a block is read past its end; f16 takes it."""
    with loaded(tiny.make_tiny_gguf(tmp_path / "model.gguf", d_head=40)) as model:
        with pytest.raises(ParameterError, match=f"kv_type {kv_type} .* multiple of 16, the model's are 40: use f16"):
            memory_plan(model, SMALL, n_ctx=100, kv_type=kv_type)
        memory_plan(model, small(scan=0), n_ctx=100)
        with pytest.raises(ParameterError, match=r"scan takes heads of a multiple of 16, .* are 40: use scan 0"):
            memory_plan(model, SMALL, n_ctx=100)


def test_summaries_are_planned(tiny_llama: LlamaModel) -> None:
    """Breaks when the plan counts other summaries than there are: 3 layers, 2 KV heads of 32, chunks of 8."""
    n_chunks = (100_000 - SMALL.n_sink) // 8
    index, norm = index_bytes(8, n_head_kv=2, d_head=32), 4
    spread = 2 * (18 + 2)  # a block of 4-bit values and a number in half for each head
    plan = memory_plan(tiny_llama, SMALL, n_ctx=100_000)
    rest = rest_bytes(8, n_head_kv=2, d_head=32)
    assert plan.summary_bytes == 3 * (n_chunks * (spread + index) + rest)
    plan = memory_plan(tiny_llama, small(summary="bounds", scan=0), n_ctx=100_000)
    assert plan.summary_bytes == 3 * n_chunks * (2 * 2 * 2 * 32 + norm)


def test_smaller_kv_types_are_planned_smaller(tiny_llama: LlamaModel) -> None:
    """Breaks when the plan does not count the bytes of closed chunks by their type."""
    n_ctx = 100_000
    plans = {t: memory_plan(tiny_llama, SMALL, n_ctx=n_ctx, kv_type=t) for t in ("f16", "q8_0", "q4_0")}
    n_values = 2 * 3 * 2 * 32 * n_ctx  # K and V, layers, KV heads
    for kv_type, bits in (("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)):
        assert plans[kv_type].kv_bytes == pytest.approx(n_values * bits / 8, rel=0.01)
        assert plans[kv_type].summary_bytes == plans["f16"].summary_bytes


def test_auto_positions_follow_the_trained_length(tiny_llama: LlamaModel) -> None:
    """Breaks when "auto" is not exact within the trained 2048 tokens and clamped beyond."""
    for n_ctx, expected in ((2048, "exact"), (2049, "clamped")):
        with open_session(tiny_llama, small(positions=None), n_ctx=n_ctx) as session:
            assert session.params.columns["positions"] == expected


def test_published_warmup_follows_the_layers(tiny_llama: LlamaModel) -> None:
    """Breaks when -1 is not the published 1000 layer calls."""
    with open_session(tiny_llama, small(method="published")) as session:
        assert session.params.columns["probe_warmup"] == 1000 // 3


# ---- calls


CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "token too large": (
        lambda s: s.decode(np.array([5, N_VOCAB])),
        ParameterError,
        "token 1 is 512, expected 0 to 511",
    ),
    "token negative": (lambda s: s.decode(np.array([-1])), ParameterError, "token 0 is -1, expected 0 to 511"),
    "too many logits": (lambda s: s.decode(np.array([5]), n_logits=2), ParameterError, "n_logits must be 0 to n"),
    "negative logits": (lambda s: s.decode(np.array([5]), n_logits=-1), ParameterError, "n_logits must be 0 to n"),
    "rewind behind 0": (lambda s: s.rewind(-1), ParameterError, "rewind to -1, the history has 60 tokens"),
    "rewind ahead": (lambda s: s.rewind(61), ParameterError, "rewind to 61, the history has 60 tokens"),
    "no room": (
        lambda s: s.decode(np.full(41, 5)),
        ContextError,
        "41 tokens after 60 do not fit n_ctx 100",
    ),
    "no room to answer": (
        lambda s: s.decode(np.full(41, 5), phase="decode"),
        ContextError,
        "41 tokens after 60 do not fit n_ctx 100",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_refused_calls_change_nothing(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when a refused call leaves tokens behind, or a message does not say what was expected."""
    call, kind, message = CALLS[name]
    tokens = random_tokens(60)
    with open_session(tiny_llama, n_ctx=100) as session, open_session(tiny_llama, n_ctx=100) as other:
        for s in (session, other):
            s.decode(tokens)
        before = session.state_get()
        with pytest.raises(kind, match=message):
            call(session)
        assert session.state_get() == before
        further = (tokens[:5], tokens[5:40])
        for part in further:
            found, expected = session.decode(part, n_logits=1), other.decode(part, n_logits=1)
            np.testing.assert_array_equal(found, expected)


def test_full_to_the_last_token(tiny_llama: LlamaModel) -> None:
    """Breaks when the last token of n_ctx does not fit, or one more does."""
    for retrieval in (SMALL, small(positions="exact"), small(chunk=64, budget=200)):
        with open_session(tiny_llama, retrieval, n_ctx=101) as session:
            read(session, random_tokens(101), [(90, "prefill"), *one_by_one(11)], n_logits=1)
            with pytest.raises(ContextError):
                session.decode(np.array([5]), phase="decode")
            session.rewind(100)
            session.decode(np.array([5]), phase="decode")
            assert session.n_past == 101


def test_nothing_to_read(tiny_llama: LlamaModel) -> None:
    """Breaks when a call without tokens does more than nothing."""
    with open_session(tiny_llama) as session:
        for phase in ("prefill", "decode", "question"):
            assert session.decode(np.array([], np.int32), phase=phase).shape == (0, N_VOCAB)
        session.checkpoint()
        session.rewind(0)
        assert session.n_past == session.n_chunks == 0
        assert session.sources_end().size == 0


# ---- models that our graph does not compute

FOREIGN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "mixture of experts": (tiny.make_moe_gguf, "mixture of experts"),
    "gemma": (tiny.make_gemma_gguf, "architecture 'gemma' is not one of llama, qwen2, qwen3"),
    "mistral3": (lambda path: tiny.make_tiny_gguf(path, arch="mistral3"), "architecture 'mistral3'"),
    "rope scaling": (
        lambda path: tiny.make_tiny_gguf(path, metadata={"rope.scaling.type": "longrope"}),
        "rope scaling 'longrope' is not one of none, linear, yarn",
    ),
    "not causal": (
        lambda path: tiny.make_tiny_gguf(path, metadata={"attention.causal": False}),
        "attention that is not causal",
    ),
    # ggml aborts where it meets the first two, and never ends the third
    "rotation beyond the head": (
        lambda path: tiny.make_tiny_gguf(path, arch="qwen2", rope_dim=64),
        "rope.dimension_count is 64, expected an even number from 2 to 32",
    ),
    "rotation of half a pair": (
        lambda path: tiny.make_tiny_gguf(path, arch="qwen2", rope_dim=31),
        "rope.dimension_count is 31, expected an even number from 2 to 32",
    ),
    "rotation of nothing": (
        lambda path: tiny.make_tiny_gguf(path, arch="qwen2", metadata={"rope.dimension_count": 0}),
        "rope.dimension_count is 0, expected an even number from 2 to 32",
    ),
    "rotation beyond all measure": (
        lambda path: tiny.make_tiny_gguf(path, arch="qwen2", metadata={"rope.dimension_count": 0xFFFFFFFF}),
        "qwen2.rope.dimension_count is 4.29497e\\+09, expected 0 to",
    ),
    # ggml aborts where it meets the first; with the others every logit would be NaN
    "negative epsilon": (
        lambda path: tiny.make_tiny_gguf(path, metadata={"attention.layer_norm_rms_epsilon": -1e-5}),
        "the epsilon of its norms is below",
    ),
    "epsilon that is told as 0": (
        lambda path: tiny.make_tiny_gguf(path, metadata={"attention.layer_norm_rms_epsilon": 4e-7}),
        "the epsilon of its norms is below",
    ),
    "negative base": (
        lambda path: tiny.make_tiny_gguf(path, metadata={"rope.freq_base": -10000.0}),
        "rope.freq_base is not a positive number",
    ),
    "negative scaling": (
        lambda path: tiny.make_tiny_gguf(path, rope_scaling=("linear", -4.0)),
        "rope.scaling.factor is negative",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_models_are_refused(name: str, tmp_path: Path) -> None:
    """Breaks when a model that libllama loads and our graph would compute wrongly is taken."""
    make, message = FOREIGN[name]
    with loaded(make(tmp_path / "model.gguf")) as model:
        for call in (model_check, open_session):
            with pytest.raises(ModelError, match=message) as caught:
                call(model)
            assert caught.value.hint == "this model runs densely through llama.cpp"


# ---- memory

MEMORY: dict[str, Retrieval] = {
    "small windows": SMALL,
    "default sizes": Retrieval(n_sink=64, n_local=512, budget=1024, positions="clamped"),
    "head": Retrieval(n_local=256, budget=512, summary="head", score="cosine", question_weight=1.0),
    "dense": Retrieval("dense", n_local=256, positions="clamped"),
    "quest": Retrieval("quest-clamped", n_local=256, budget=512),
}
MEMORY_N_CTX = 12_000
PYTHON_BYTES = 1 << 20  # what the interpreter and NumPy may take meanwhile


def rss_of_a_full_session(path: str, name: str) -> None:
    """Fill a session to its n_ctx, with checkpoints on the way; print its plan and what it took. Runs in a child."""

    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    tokens = np.tile(random_tokens(4000), MEMORY_N_CTX // 4000 + 1)
    with loaded(Path(path)) as model:
        before = anonymous_bytes()
        with open_session(model, MEMORY[name], n_ctx=MEMORY_N_CTX) as session:
            while session.n_past + 1500 < MEMORY_N_CTX:
                session.decode(tokens[:1211], n_logits=1)
                session.decode(tokens[:40], phase="question", n_logits=1)
                session.decode(tokens[:3], phase="decode", n_logits=1)
                session.checkpoint()
            session.decode(tokens[: MEMORY_N_CTX - session.n_past], n_logits=1)
            assert session.n_past == MEMORY_N_CTX
            print(session.plan.total_bytes, anonymous_bytes() - before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("name", MEMORY)
def test_the_plan_is_an_upper_bound(name: str, tmp_path: Path) -> None:
    """Breaks when a full session takes more than its plan said, or the plan is far from the truth."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf")
    said = in_child(f"import test_params; test_params.rss_of_a_full_session({str(path)!r}, {name!r})")
    planned, taken = map(int, said.split())
    print(f"planned {planned / 1e6:.2f} MB, taken {taken / 1e6:.2f} MB")
    assert taken <= planned + PYTHON_BYTES
    assert planned < 2 * taken


def run_out_of_memory(path: str) -> None:
    """Print what a call for the logits of 512 tokens raises where their graph's 65 MB cannot be had, and whether
    the session answers as before. Runs in a child."""
    tokens = np.full(512, tiny.FIRST_BYTE, np.int32)
    with loaded(Path(path)) as model, open_session(model, Retrieval("dense", window=512), n_ctx=2048) as session:
        session.decode(tokens[:5])
        expected = session.decode(tokens[:1], phase="decode", n_logits=1)
        session.rewind(5)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (70 << 20), -1))  # room for the array of logits itself
        try:
            session.decode(tokens, n_logits=512)
        except ActqkvError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        print(np.array_equal(session.decode(tokens[:1], phase="decode", n_logits=1), expected))


def test_a_graph_that_does_not_fit(tmp_path: Path) -> None:
    """Breaks when graphs that were made before lie in memory that was given back for one that could not be."""
    path = tiny.make_tiny_gguf(tmp_path / "model.gguf", n_vocab=32000)
    said = in_child(f"import test_params; test_params.run_out_of_memory({str(path)!r})")
    assert said.splitlines() == ["cannot allocate the graph's buffer for 512 tokens", "True"]
