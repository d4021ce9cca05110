"""When this fails, a session whose attention runs on a GPU gives other logits than one on the CPU.

The GPU is the emulator, or a real one where there is one.
"""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
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
N_DIVIDED, N_CTX = 1400, 2048  # of which 1,024 tokens, at least, are divided into cells
PLENTY = 64 << 20
BY_SPREADS: dict[str, Any] = {"scan": 0, "refine": 2}
BY_SEARCH: dict[str, Any] = {"scan": 256}  # four cells of sixteen and more


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


Seen = dict[tuple[int, int], dict[str, F32Array]]  # by n_past and layer


def watch(session: Session) -> Seen:
    """Fills with what is planned, by which scores, and what attention gives."""
    seen: Seen = defaultdict(dict)

    def keep(name: str, layer: int, n_past: int, found: F32Array) -> None:
        if name in {"plan", "scores", "out"}:
            seen[n_past, layer][name] = found.copy()

    session.observer = keep
    return seen


def end_of_same_plans(found: Seen, expected: Seen) -> int:
    """The first window with another plan; a key off by a rounding may move a cell's centre, and by that votes."""
    for at, one in sorted(expected.items()):
        if not np.array_equal(found[at].get("plan", []), one.get("plan", [])):
            check("votes of a search", found[at]["scores"], one["scores"])
            return at[0]
    return sys.maxsize


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
    next of 16 steps, later layers and logits are off by far more than attention is. Logits as long as plans are alike.
    """
    tokens = random_tokens(N_READ + N_ANSWER)
    pieces = [(N_READ, "prefill"), *one_by_one(N_ANSWER)]
    logits, seen = [], []
    for on_gpu in (False, True):
        with open_session(tiny_llama, small(**columns), kv_type=kv_type) as session:
            assert not on_gpu or use_gpu(session, table) == ""
            seen.append(watch(session))
            logits.append(read(session, tokens, pieces, n_logits=1))  # type: ignore[arg-type]
            found = counts(session)
    assert found.n_calls == 3 * (N_ANSWER + -(-N_READ // 16))
    assert found.n_hits > found.n_misses == 0  # there is room for every chunk that closes
    assert found.n_planned == 0  # who watches wants scores, which the CPU has
    expected, actual = (np.concatenate([arrays["out"] for at, arrays in s.items() if at[1] == 0]) for s in seen)
    assert nmse(actual, expected) < (1e-10 if kv_type == "f16" else 1e-6)  # BOUNDS of tests/ops
    if kv_type == "f16":
        n_same = min(end_of_same_plans(seen[1], seen[0]) - N_READ, N_ANSWER) + 1
        assert n_same > 1, "no step is compared"
        check("windows", logits[1][:n_same], logits[0][:n_same])


def planning_bytes(model: LlamaModel, retrieval: Retrieval, kv_type: str, table: Any) -> int:
    """The least limit with which steps are planned there."""
    plan, error = ffi.new("struct actqkv_gpu_memory *"), ffi.new("struct actqkv_error *")
    params = make_params(retrieval, n_ctx=N_CTX, n_threads=1, kv_type=kv_type)
    assert lib.actqkv_gpu_memory_plan(model_pointer(model), params, table, plan, error) == 0
    assert plan.least_bytes < plan.planning_bytes < plan.useful_bytes
    return int(plan.planning_bytes)


@pytest.mark.parametrize("roomy", [True, False], ids=["all hot", "few hot"])
@pytest.mark.parametrize(
    ("columns", "kv_type"),
    [
        (BY_SPREADS, "f16"),
        (BY_SPREADS | {"positions": "exact", "summary_keys": "attended"}, "q8_0"),
        (BY_SPREADS | {"refine": 1}, "q4_0"),
        (BY_SPREADS | {"cutoff": "none"}, "f16"),
        (BY_SPREADS | {"chunk": 4, "budget": 4 + 32 + 4, "refine": 4}, "f16"),
        (BY_SEARCH, "f16"),
        (BY_SEARCH | {"positions": "exact"}, "q8_0"),
        (BY_SEARCH | {"refine": 2, "cutoff": "none"}, "q4_0"),
        (BY_SEARCH | {"summary": "bounds"}, "f16"),
    ],
    ids=[
        *("keys", "exact", "spreads alone", "no cut-off", "many chunks"),
        *("search", "search exact", "search and keys", "search beside bounds"),
    ],
)
def test_steps_are_planned_there(
    tiny_llama: LlamaModel, table: Any, columns: dict[str, Any], kv_type: str, *, roomy: bool
) -> None:
    """With the same plans as the CPU's: another one would change logits by far more than rounding does."""
    retrieval, n = small(**columns), N_LONG if columns["scan"] == 0 else N_DIVIDED
    tokens = random_tokens(n + SEVERAL)
    limit = PLENTY if roomy else planning_bytes(tiny_llama, retrieval, kv_type, table)
    logits, sources, attended = [], [], []
    for on_gpu in (False, True):
        with open_session(tiny_llama, retrieval, n_ctx=N_CTX, kv_type=kv_type) as session:
            session.decode(tokens[:n])
            assert not on_gpu or use_gpu(session, table, limit) == ""
            session.sources_begin()
            logits.append(read(session, tokens[n:], one_by_one(SEVERAL), n_logits=1))
            sources.append(session.sources_end())
            found = counts(session)
            attended.append(session.stats().attended_tokens_mean)
    assert found.n_planned == found.n_calls == 3 * SEVERAL
    assert (found.n_misses == 0) == roomy
    assert found.memory_bytes <= limit
    check("windows", logits[1], logits[0])
    np.testing.assert_allclose(sources[1], sources[0], rtol=1e-3, atol=1e-7)
    assert attended[1] == attended[0]


@pytest.mark.parametrize("columns", [BY_SPREADS, BY_SEARCH], ids=["spreads", "search"])
@pytest.mark.parametrize("planned", ["there", "on the CPU"])
def test_the_host_waits_once_per_layer(tiny_llama: LlamaModel, columns: dict[str, Any], planned: str) -> None:
    """A step waits for more than its result: for a copy from ordinary memory behind kernels, or behind other copies."""
    table, n_waits = gpu(EMULATED).table, ctypes.CDLL(str(build_emulated())).actqkv_emulator_n_waits
    n = N_LONG if columns["scan"] == 0 else N_DIVIDED
    tokens, retrieval = random_tokens(n + SEVERAL), small(**columns)
    limit = planning_bytes(tiny_llama, retrieval, "f16", table) - (planned != "there")
    with open_session(tiny_llama, retrieval, n_ctx=N_CTX) as session:
        session.decode(tokens[:n])
        assert use_gpu(session, table, limit) == ""
        for begin in range(n, n + SEVERAL):
            before = n_waits()
            session.decode(tokens[begin : begin + 1], phase="decode")
            assert n_waits() - before == 3, "layers"
        found = counts(session)
    assert found.n_planned == (3 * SEVERAL if planned == "there" else 0)
    assert found.n_stalls > 0, "nothing was copied beside"


@pytest.mark.parametrize("columns", [BY_SPREADS, BY_SEARCH], ids=["spreads", "search"])
def test_with_less_memory_steps_are_planned_on_the_cpu(
    tiny_llama: LlamaModel, table: Any, columns: dict[str, Any]
) -> None:
    tokens, retrieval = random_tokens(N_READ + SEVERAL), small(**columns)
    with open_session(tiny_llama, retrieval, n_ctx=N_CTX) as session:
        session.decode(tokens[:N_READ])
        assert use_gpu(session, table, planning_bytes(tiny_llama, retrieval, "f16", table) - 1) == ""
        read(session, tokens[N_READ:], one_by_one(SEVERAL), n_logits=1)
        found = counts(session)
    assert found.n_calls == 3 * SEVERAL
    assert found.n_planned == 0


def test_another_scan_than_there_is_room_for(tiny_llama: LlamaModel, table: Any) -> None:
    """Is planned on the CPU; fewer keys are searched, and chunks without a search planned, as that is possible."""
    tokens = random_tokens(N_READ)
    with open_session(tiny_llama, small(**BY_SEARCH)) as session:
        session.decode(tokens)
        assert use_gpu(session, table) == ""
        n_planned = []
        for scan in (128, 512, 0):
            session.set_answering(small(scan=scan))
            session.decode(tokens[:1], phase="decode")
            n_planned.append(counts(session).n_planned)
    assert n_planned == [3, 3, 3]


def test_an_index_there_grows_as_the_cpus(tiny_llama: LlamaModel, table: Any) -> None:
    """The answer's tokens close chunks, until three short stretches and the rest become a longer one."""
    n, n_answer = 4 + 32 + 4096 - 12, 24
    tokens, logits, n_planned = random_tokens(n + n_answer), [], 0
    for on_gpu in (False, True):
        with open_session(tiny_llama, small(**BY_SEARCH), n_ctx=8192) as session:
            session.decode(tokens[:n])
            assert not on_gpu or use_gpu(session, table) == ""
            logits.append(read(session, tokens[n:], one_by_one(n_answer), n_logits=1))
            n_planned = counts(session).n_planned
    assert n_planned == 3 * n_answer
    check("windows", logits[1], logits[0])


def test_rewind_to_another_index(tiny_llama: LlamaModel, table: Any) -> None:
    """Stretches that reach beyond, and keys in order, are not those of the first document."""
    n, first, other = 992, random_tokens(1100, seed=1), random_tokens(1100, seed=2)
    answers = []
    for answered_before in (True, False):
        with open_session(tiny_llama, small(**BY_SEARCH), n_ctx=N_CTX) as session:
            session.decode(first[:n])
            session.checkpoint()
            if answered_before:
                session.decode(first[n:])
            assert use_gpu(session, table) == ""
            if answered_before:
                read(session, first, one_by_one(SEVERAL))
                session.rewind(n)
            session.decode(other[n:])
            answers.append(read(session, other, one_by_one(SEVERAL), n_logits=1))
    np.testing.assert_array_equal(answers[0], answers[1])


def test_few_slots_change_nothing(tiny_llama: LlamaModel, table: Any) -> None:
    """Chunks leave and come back; with room for all of them none is copied twice."""
    tokens = random_tokens(N_READ + N_ANSWER)
    pieces = [(N_READ, "prefill"), *one_by_one(N_ANSWER)]
    results = []
    for n_slots in (10, 10_000):
        with open_session(tiny_llama, small(**BY_SPREADS)) as session:
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


@pytest.mark.parametrize(("columns", "n"), [({}, N_READ), (BY_SEARCH, N_DIVIDED)], ids=["default", "search"])
def test_another_state(tiny_llama: LlamaModel, table: Any, columns: dict[str, Any], n: int) -> None:
    """A loaded state brings its own chunks, and their index."""
    one, two = random_tokens(n, seed=3), random_tokens(n, seed=4)
    answer, retrieval = random_tokens(SEVERAL, seed=5), small(**columns)
    with open_session(tiny_llama, retrieval, n_ctx=N_CTX) as source:
        source.decode(two)
        state = source.state_get()
        expected = read(source, answer, one_by_one(SEVERAL), n_logits=1)
    with open_session(tiny_llama, retrieval, n_ctx=N_CTX) as session:
        session.decode(one)
        assert use_gpu(session, table) == ""
        read(session, answer, one_by_one(1))
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
