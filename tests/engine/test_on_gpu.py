"""When this fails, a session whose attention runs on a GPU gives other logits than one on the CPU.

The GPU is the emulator, or a real one where there is one.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_support import F32Array, Session, check, nmse, one_by_one, open_session, random_tokens, read, small
from llama_cpp._internals import LlamaModel

from actqkv_cpp import Retrieval
from actqkv_cpp._native import make_params, model_pointer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
from cuda_library import build_emulated
from ops_support import EMULATED, ON_GPU, ffi, gpu
from ops_support import cpu as lib

N_READ, N_ANSWER, SEVERAL, N_LONG = 170, 8, 4, 590  # SEVERAL: tokens answered before a rewind
PLENTY = 64 << 20


@pytest.fixture(params=[EMULATED, pytest.param(ON_GPU, marks=pytest.mark.cuda)], ids=["emulated", "cuda"])
def table(request: pytest.FixtureRequest) -> Any:
    return gpu(request.param).table


def use_gpu(session: Session, table: Any, limit_bytes: int = PLENTY) -> str:
    """The error, empty where it went well."""
    error = ffi.new("struct actqkv_error *")
    status = lib.actqkv_use_gpu(session._handle_to_read(), table, 0, limit_bytes, error)
    return str(ffi.string(error.message).decode()) if status else ""


def counts(session: Session) -> Any:
    return session.stats().gpu


def watch_first_layer(session: Session) -> list[F32Array]:
    """Fills with what attention gives in the first layer, window by window."""
    outs: list[F32Array] = []

    def keep(name: str, layer: int, n_past: int, found: F32Array) -> None:
        if name == "out" and layer == 0:
            outs.append(found.copy())

    session.observer = keep
    return outs


def least_limit(session: Session, table: Any, n_slots: int) -> int:
    """The limit with so many slots per layer, found by halving."""
    low, high = 0, PLENTY
    while high - low > 1:
        middle = (low + high) // 2
        too_small = bool(use_gpu(session, table, middle)) or counts(session).n_slots < n_slots
        low, high = (middle, high) if too_small else (low, middle)
    return high


@pytest.mark.parametrize(
    ("columns", "kv_type"),
    [
        ({}, "f16"),
        ({}, "q4_0"),
        ({"positions": "exact"}, "q8_0"),
        ({"method": "infllm"}, "f16"),  # sums of weights
    ],
    ids=["default", "q4_0", "exact", "sums"],
)
def test_logits_are_those_of_the_cpu(tiny_llama: LlamaModel, table: Any, columns: dict[str, Any], kv_type: str) -> None:
    """Of quantised chunks the first layer's attention is compared: where a key that is off by a rounding goes to the
    next of 16 steps, later layers and logits are off by far more than attention is.
    """
    tokens = random_tokens(N_READ + N_ANSWER)
    pieces = [(N_READ, "prefill"), *one_by_one(N_ANSWER)]
    logits, firsts = [], []
    for on_gpu in (False, True):
        with open_session(tiny_llama, small(**columns), kv_type=kv_type) as session:
            assert not on_gpu or use_gpu(session, table) == ""
            firsts.append(watch_first_layer(session))
            logits.append(read(session, tokens, pieces, n_logits=1))  # type: ignore[arg-type]
            found = counts(session)
    assert found.n_calls == 3 * (N_ANSWER + -(-N_READ // 16))
    assert found.n_hits > found.n_misses == 0  # there is room for every chunk that closes
    assert found.n_planned == 0  # who watches wants scores, which the CPU has
    expected, actual = (np.concatenate(outs) for outs in firsts)
    assert nmse(actual, expected) < (1e-10 if kv_type == "f16" else 1e-6)  # BOUNDS of tests/ops
    if kv_type == "f16":
        check("windows", logits[1], logits[0])


def planning_bytes(model: LlamaModel, retrieval: Retrieval, kv_type: str, table: Any) -> int:
    """The least limit with which steps are planned there."""
    plan, error = ffi.new("struct actqkv_gpu_memory *"), ffi.new("struct actqkv_error *")
    params = make_params(retrieval, n_ctx=1024, n_threads=1, kv_type=kv_type)
    assert lib.actqkv_gpu_memory_plan(model_pointer(model), params, table, plan, error) == 0
    assert plan.least_bytes < plan.planning_bytes < plan.useful_bytes
    return int(plan.planning_bytes)


@pytest.mark.parametrize("roomy", [True, False], ids=["all hot", "few hot"])
@pytest.mark.parametrize(
    ("columns", "kv_type"),
    [
        ({}, "f16"),
        ({"positions": "exact", "summary_keys": "attended"}, "q8_0"),
        ({"sketch": 1, "refine": 1}, "q4_0"),
        ({"sketch": 1, "refine": 2, "cutoff": "none"}, "f16"),
        ({"chunk": 4, "budget": 4 + 32 + 4, "sketch": 4, "refine": 2}, "f16"),
        ({"refine": 1}, "f16"),
    ],
    ids=["default", "exact", "spreads alone", "keys", "many chunks", "sketches"],
)
def test_steps_are_planned_there(
    tiny_llama: LlamaModel, table: Any, columns: dict[str, Any], kv_type: str, *, roomy: bool
) -> None:
    """With the same plans as the CPU's: another one would change logits by far more than rounding does."""
    retrieval = small(**columns)
    tokens = random_tokens(N_LONG + SEVERAL)
    limit = PLENTY if roomy else planning_bytes(tiny_llama, retrieval, kv_type, table)
    logits, sources, attended = [], [], []
    for on_gpu in (False, True):
        with open_session(tiny_llama, retrieval, kv_type=kv_type) as session:
            session.decode(tokens[:N_LONG])
            assert not on_gpu or use_gpu(session, table, limit) == ""
            session.sources_begin()
            logits.append(read(session, tokens[N_LONG:], one_by_one(SEVERAL), n_logits=1))
            sources.append(session.sources_end())
            found = counts(session)
            attended.append(session.stats().attended_tokens_mean)
    assert found.n_planned == found.n_calls == 3 * SEVERAL
    assert (found.n_misses == 0) == roomy
    assert found.memory_bytes <= limit
    check("windows", logits[1], logits[0])
    np.testing.assert_allclose(sources[1], sources[0], rtol=1e-3, atol=1e-7)
    assert attended[1] == attended[0]


@pytest.mark.parametrize("planned", ["there", "on the CPU"])
def test_the_host_waits_once_per_layer(tiny_llama: LlamaModel, planned: str) -> None:
    """A step waits for more than its result: for a copy from ordinary memory behind kernels, or behind other copies."""
    table, n_waits = gpu(EMULATED).table, ctypes.CDLL(str(build_emulated())).actqkv_emulator_n_waits
    tokens = random_tokens(N_LONG + SEVERAL)
    limit = planning_bytes(tiny_llama, small(), "f16", table) - (planned != "there")
    with open_session(tiny_llama) as session:
        session.decode(tokens[:N_LONG])
        assert use_gpu(session, table, limit) == ""
        for begin in range(SEVERAL):
            before = n_waits()
            session.decode(tokens[N_LONG + begin : N_LONG + begin + 1], phase="decode")
            assert n_waits() - before == 3, "layers"
        found = counts(session)
    assert found.n_planned == (3 * SEVERAL if planned == "there" else 0)
    assert found.n_stalls > 0, "nothing was copied beside"


def test_with_less_memory_steps_are_planned_on_the_cpu(tiny_llama: LlamaModel, table: Any) -> None:
    tokens = random_tokens(N_READ + SEVERAL)
    with open_session(tiny_llama) as session:
        session.decode(tokens[:N_READ])
        assert use_gpu(session, table, planning_bytes(tiny_llama, small(), "f16", table) - 1) == ""
        read(session, tokens[N_READ:], one_by_one(SEVERAL), n_logits=1)
        found = counts(session)
    assert found.n_calls == 3 * SEVERAL
    assert found.n_planned == 0


def test_few_slots_change_nothing(tiny_llama: LlamaModel, table: Any) -> None:
    """Chunks leave and come back; with room for all of them none is copied twice."""
    tokens = random_tokens(N_READ + N_ANSWER)
    pieces = [(N_READ, "prefill"), *one_by_one(N_ANSWER)]
    results = []
    for n_slots in (10, 10_000):
        with open_session(tiny_llama) as session:
            limit = PLENTY if n_slots > 1000 else least_limit(session, table, n_slots)
            assert use_gpu(session, table, limit) == ""
            results.append((read(session, tokens, pieces, n_logits=1), counts(session), session.n_chunks))  # type: ignore[arg-type]
    (tight, few, _), (roomy, many, n_chunks) = results
    check("windows", tight, roomy)
    assert few.n_slots == 10
    assert many.n_misses + many.n_prefetched <= 3 * n_chunks < few.n_misses + few.n_prefetched
    assert many.to_bytes < few.to_bytes


def test_rewind_and_another_document(tiny_llama: LlamaModel, table: Any) -> None:
    """Chunks that closed again with other keys are not taken from the GPU's old copies."""
    first, other = random_tokens(N_READ + SEVERAL, seed=1), random_tokens(N_READ + SEVERAL, seed=2)
    with open_session(tiny_llama) as session:
        assert use_gpu(session, table) == ""
        read(session, first, [(N_READ, "prefill"), *one_by_one(SEVERAL)], n_logits=1)
        session.rewind(64)
        session.decode(other[64:N_READ])
        actual = read(session, other[N_READ:], one_by_one(SEVERAL), n_logits=1)
    with open_session(tiny_llama) as on_cpu:
        on_cpu.decode(first[:64])
        on_cpu.decode(other[64:N_READ])
        expected = read(on_cpu, other[N_READ:], one_by_one(SEVERAL), n_logits=1)
    check("windows", actual, expected)


def test_another_state(tiny_llama: LlamaModel, table: Any) -> None:
    """A loaded state brings its own chunks."""
    one, two = random_tokens(N_READ, seed=3), random_tokens(N_READ, seed=4)
    answer = random_tokens(SEVERAL, seed=5)
    with open_session(tiny_llama) as source:
        source.decode(two)
        state = source.state_get()
        expected = read(source, answer, one_by_one(SEVERAL), n_logits=1)
    with open_session(tiny_llama) as session:
        assert use_gpu(session, table) == ""
        session.decode(one)
        session.state_set(state)
        check("windows", read(session, answer, one_by_one(SEVERAL), n_logits=1), expected)


def test_too_little_memory_is_refused(tiny_llama: LlamaModel, table: Any) -> None:
    """One line with what is needed; the session goes on, on the CPU."""
    with open_session(tiny_llama) as session:
        message = use_gpu(session, table, 1000)
        assert "0 MiB of GPU memory: a window needs" in message
        assert "chunks that each of 3 layers may attend" in message
        session.decode(random_tokens(50))
        assert counts(session).n_calls == 0
