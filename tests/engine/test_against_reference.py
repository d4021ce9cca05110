"""Breaks when a quantity of the method is not what docs/algorithms.md says: q, k, v of a real forward pass are recorded
in every window and layer and go through the NumPy reference, window by window, beside the engine.

The reference attends the engine's plan, so that one chunk chosen otherwise cannot hide behind the next one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import reference as ref
import tiny_gguf as tiny
from engine_support import BOUNDS, TIE, Pieces, check, loaded, nmse, one_by_one, open_session, random_tokens, small
from numpy.typing import NDArray
from reference_model import ReferenceModel
from reference_session import LayerResult, ReferenceSession

from actqkv_cpp._native import Session

N_LAYER = 3
K = 5  # chunks that the budget of SMALL leaves
PIECES: Pieces = [(250, "prefill"), *one_by_one(12), (60, "prefill"), *one_by_one(8)]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-mha": {"n_head_kv": 4},
    "llama-yarn": {"rope_scaling": ("yarn", 4.0, 64)},
    "llama-yarn-magnitude": {"rope_scaling": ("yarn", 4.0, 512), "metadata": {"rope.scaling.attn_factor": 1.3}},
    "llama-3": {"rope_scaling": "llama3"},
    "qwen2": {"arch": "qwen2"},
    "llama-48": {"d_head": 48, "n_head": 6},  # three query heads per KV head; half a block ends each head
    "qwen3-mqa": {"arch": "qwen3", "n_head_kv": 1},
}

# The row of the published method with cosine scores and representatives: what the variants below start from.
PAPER: dict[str, Any] = {"summary": "head", "score": "cosine", "scan": 0, "refine": 1}

LISTS: dict[str, Any] = {"summary": "bounds", "granularity": "kv_head", "scan": 0, "refine": 1, "cutoff": "none"}

ROW: dict[str, Any] = {"positions": None, "chunk": 8}  # of `small`: the method's own positions, small chunks

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "default exact": {"positions": "exact"},
    "default refine 2": {"refine": 2},
    "default refine 3 exact": {"refine": 3, "positions": "exact"},
    "default scan off": {"scan": 0, "refine": 2},
    "default by spreads alone": {"scan": 0, "refine": 1},
    "bounds": {"summary": "bounds"},
    "spread of roped keys": {"positions": "exact", "summary_keys": "attended"},
    "head": PAPER,
    "head exact": {**PAPER, "positions": "exact"},
    "head dot": {**PAPER, "score": "dot"},
    "head refine": {**PAPER, "refine": 2},
    "kv_head": {**PAPER, "summary": "kv_head"},
    "kv_head dot exact": {**PAPER, "summary": "kv_head", "score": "dot", "positions": "exact"},
    "mean": {**PAPER, "summary": "mean"},
    "mean dot": {**PAPER, "summary": "mean", "score": "dot"},
    "cutoff none": {**PAPER, "cutoff": "none"},
    "cutoff published": {**PAPER, "cutoff": "published"},
    "temperature": {**PAPER, "cutoff_temperature": 0.05},
    "statistics published": {**PAPER, "statistics": "published"},
    "statistics capped": {**PAPER, "statistics_cap": 1, "statistics": "published"},
    "mean probe (InfLLM)": {**PAPER, "probe": "mean", "score": "dot", "cutoff": "none"},
    "warm-up": {**PAPER, "probe_warmup": 5},
    "published": {"method": "published"},
    "published without warm-up": {"method": "published", "probe_warmup": 0},
    "answers attend all": {**PAPER, "decode": "all"},
    "reading attends all": {"prefill": "all"},
    "reading retrieves nothing": {"prefill": "none"},
    "actqkv-uniform": {"method": "actqkv-uniform"},
    "actqkv-equal": {"method": "actqkv-equal"},
    "infllm": {"method": "infllm"},
    "streaming": {"method": "streaming"},
    "quest": {**ROW, "method": "quest"},
    "quest retrieval prefill": {**ROW, "method": "quest", "prefill": "top"},
    "quest by sum": {**ROW, "method": "quest", "prefill": "top", "vote": "sum", "dense_layers": 0},
    "quest-clamped": {**ROW, "method": "quest-clamped", "dense_layers": 1},
    "quest lists per layer": {**ROW, "method": "quest", "granularity": "layer", "prefill": "top"},
    "lists per KV head": LISTS,
    "lists per KV head of heads": {**LISTS, "summary": "head"},
    "lists per KV head of means": {**LISTS, "summary": "mean"},
    "dense layers and cut-off": {**PAPER, "dense_layers": 1, "cutoff_temperature": 0.02},
    "oracle": {"method": "oracle"},
    "oracle exact": {"method": "oracle", "positions": "exact"},
    "oracle per KV head": {"method": "oracle", "granularity": "kv_head"},
    "answers by the oracle": {"decode": "oracle"},
}

Arrays = dict[str, NDArray[np.float32]]


@dataclass
class Recorder:
    """All that the observer saw, by window and layer."""

    windows: dict[int, dict[int, Arrays]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))

    def __call__(self, name: str, layer: int, n_past: int, data: NDArray[np.float32]) -> None:
        self.windows[n_past][layer][name] = data


def record(session: Session, pieces: Pieces) -> Recorder:
    session.observer = recorder = Recorder()
    tokens, at = random_tokens(sum(n for n, _ in pieces)), 0
    for n, phase in pieces:
        session.decode(tokens[at : at + n], phase=phase)
        at += n
    session.observer = None
    return recorder


def reference_params(session: Session, select: str) -> ref.Params:
    """The parameters in force, in the words of the reference."""
    found, columns = session.params, session.params.columns
    warmup = columns["probe_warmup"]
    return ref.Params(
        n_sink=found.n_sink,
        n_local=found.n_local,
        n_chunk_tokens=found.n_chunk_tokens,
        budget=found.budget,
        positions=columns["positions"],
        select={"top": "top_k"}.get(select, select),  # type: ignore[arg-type]
        probe={"bias": "activation", "mean": "mean"}[columns["probe"]],  # type: ignore[arg-type]
        statistics={"pooled": "ours", "published": "published"}[columns["statistics"]],  # type: ignore[arg-type]
        t_max=columns["statistics_cap"],
        probe_warmup=1000 // N_LAYER if warmup < 0 else warmup,
        summary=columns["summary"],
        score=columns["score"],
        summary_keys=columns["summary_keys"],
        granularity=columns["granularity"],
        vote=columns["vote"],
        n_dense_layers=columns["dense_layers"],
        scan=columns["scan"],
        refine=columns["refine"],
        question_weight=columns["question_weight"],
        cutoff={"layerwise": "ours"}.get(columns["cutoff"], columns["cutoff"]),
        cutoff_temperature=columns["cutoff_temperature"],
        storage=found.kv_type,  # type: ignore[arg-type]
    )


class Question:
    """The question of section 3.4 as it grows: its tokens' queries, and what each received in its own window."""

    def __init__(self) -> None:
        self.z: list[list[ref.Floats]] = [[] for _ in range(N_LAYER)]
        self.received: list[list[ref.Floats]] = [[] for _ in range(N_LAYER)]

    def add(self, layer: int, z: ref.Floats, received: ref.Floats) -> None:
        self.z[layer].append(z)
        self.received[layer].append(received.sum(axis=1))

    def vectors(self) -> list[ref.Floats]:
        return [
            ref.question_vector(np.concatenate(z), np.concatenate(received))
            for z, received in zip(self.z, self.received, strict=True)
        ]


@dataclass(frozen=True)
class Step:
    """One layer of one window in both."""

    phase: str
    layer: int
    found: Arrays
    expected: LayerResult


def check_plan(plan: ref.Ints, result: LayerResult, where: str) -> int:
    """The engine's plan is the reference's, but for chunks whose scores tie. Returns how many differ."""
    assert plan.shape == result["plan"].shape, where
    stages = (result[name] for name in ("refined", "scores"))
    rows = zip(*(np.atleast_2d(x) for x in (plan, result["plan"], *stages)), strict=True)
    return sum(check_list(*row, where) for row in rows)


def check_list(plan: ref.Ints, expected: ref.Ints, *stages_and_where: Any) -> int:
    """A tie: the least score taken and the greatest left out differ by less than TIE of the scores' spread."""
    *stages, where = stages_and_where
    assert (np.diff(plan) > 0).all(), f"{where}: a plan is ascending and without repetition"
    swapped = np.setdiff1d(plan, expected)
    if len(swapped) == 0:
        return 0
    missed = np.setdiff1d(expected, plan)
    # the first stage that knows all of them; before it they were proposed by a tie
    deciding = next(stage for stage in stages if np.isfinite(stage[np.append(swapped, missed)]).all())
    gap = deciding[missed].max() - deciding[swapped].min()
    spread = deciding[np.isfinite(deciding)].std()
    assert gap < TIE * spread, f"{where}: took {swapped} and left {missed}, scores {gap / spread:.1e} spreads apart"
    return len(swapped)


DECIDES = {"top": {"layer": "scores", "kv_head": "votes"}, "oracle": {"layer": "mass", "kv_head": "mass"}}


def is_searched(phase: str, found: Arrays, result: LayerResult) -> bool:
    return phase == "decode" and "scores" in found and math.isnan(result["entropy"])


def check_layer(
    found: Arrays, result: LayerResult, phase: str, decides: str | None, where: str, *, kv_type: str
) -> int:
    """Every observed array equals the reference's. Returns how many chunks of the plan differ, by ties.

    decides: the array by which chunks are chosen here; None where all or none are attended.
    """
    given = decides if result["scores"].size else None
    assert {"scores", "votes", "mass"} & set(found) == {given} - {None}, where
    n_swapped = 0
    if "weights" in found:
        check("weights", found["weights"], result["weights"], where)
    if "bias" in found:
        assert phase != "decode", where
        for name in ("mean", "var", "bias"):
            check(name, found[name], result[name], where)
    if given is not None:
        if given != "mass":
            check("probe", found["probe"], result["probe"], where)
            assert int(found["share"][0]) == result["budget"], where
        searched = is_searched(phase, found, result)
        spreads = result["summaries"].ndim == 3 and given == "scores"
        what = "votes of a search" if searched else "scores of spreads" if spreads else given
        check(what, found[given].reshape(-1), result["scores"].reshape(-1), where)
        n_swapped = check_plan(plan_of(found).astype(np.int64), result, where)
    if "entropy" in found:
        check("entropy", 1 + found["entropy"][0], 1 + result["entropy"], where)
    check("out" if kv_type == "f16" else f"out {kv_type}", found["out"], result["out"], where)
    return n_swapped


def plan_of(found: Arrays) -> NDArray[np.float32]:
    return found["plans"] if "plans" in found else found["plan"]


def compare(session: Session, rope: ref.Rope, pieces: Pieces = PIECES) -> list[Step]:
    """Record, replay through the reference, compare; what both have, by window and layer."""
    recorder = record(session, pieces)
    columns = session.params.columns
    _, phases = session.history()
    ours = reference_params(session, "top")
    first = recorder.windows[0][0]
    n_head, d_head = first["q"].shape[1:]
    replay = ReferenceSession(ours, N_LAYER, n_head, first["k"].shape[1], d_head, rope)
    question = Question()
    steps: list[Step] = []
    n_swapped = n_planned = 0
    for n_past in sorted(recorder.windows):
        phase = {0: "prefill", 1: "decode", 2: "question"}[int(phases[n_past])]
        known: ref.Phase = "decode" if phase == "decode" else "prefill"
        selects = columns["decode" if phase == "decode" else "prefill"]
        replay.params = reference_params(session, selects)
        if phase == "question" and phases[n_past - 1] != phases[n_past]:
            question = Question()
        replay.begin(known)
        for layer in range(N_LAYER):
            found = recorder.windows[n_past][layer]
            q, k, v = (found[name].astype(np.float64) for name in "qkv")
            plan = plan_of(found).astype(np.int64) if {"plan", "plans"} & set(found) else None
            before = len(replay.layers[layer].entropies)
            result = replay.layer(layer, q, k, v, known, attended_plan=plan)
            here = "all" if layer < columns["dense_layers"] else selects
            decides = DECIDES.get(here, {}).get(columns["granularity"])
            if here != "top":  # nothing is scored: no entropy joins the history
                del replay.layers[layer].entropies[before:]
            where = f"layer {layer}, {phase} window of {len(q)} at {n_past}"
            n_swapped += check_layer(found, result, phase, decides, where, kv_type=session.params.kv_type)
            n_planned += 0 if plan is None else plan.size
            if phase == "question":
                received = replay.layers[layer].received[n_past:]
                question.add(layer, ref.fixed_distance_queries(q, ours, replay.rope), received)
            steps.append(Step(phase, layer, found, result))
        replay.end(len(q))
        if phase == "question" and columns["question_weight"] > 0:
            replay.question = question.vectors()
    assert n_swapped <= n_planned / 1000, f"{n_swapped} of {n_planned} chunks chosen otherwise: too many to be ties"
    votes = [step for step in steps if is_searched(step.phase, step.found, step.expected)]
    errors = [nmse(step.found["scores"], step.expected["scores"]) for step in votes]
    assert not errors or np.median(errors) <= BOUNDS["votes of a search, median of steps"][0]
    return steps


@dataclass
class Model:
    """A loaded tiny model, and its RoPE as the reference reads it from the file."""

    loaded: Any
    rope: ref.Rope


@pytest.fixture(scope="module", params=["llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tiny.make_tiny_gguf(tmp_path_factory.mktemp("model") / "model.gguf", **MODELS[request.param])
    with loaded(path) as opened:
        yield Model(opened, ReferenceModel(path).rope)


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str, model: Model) -> None:
    """Breaks when a column of the table of methods does not do what its section says."""
    with open_session(model.loaded, small(**METHODS[name])) as session:
        steps = compare(session, model.rope)
    assert steps[-1].expected["scores"].shape[-1] > 4 * K  # several times more chunks than the budget takes


@pytest.mark.parametrize("positions", ["clamped", "exact"])
@pytest.mark.parametrize("method", ["default", "head dot", "mean"])
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_models(method: str, positions: Any, model: Model) -> None:
    """Breaks when heads are grouped, or positions rotated (YaRN's magnitude included), otherwise than in section 2."""
    with open_session(model.loaded, small(**METHODS[method] | {"positions": positions})) as session:
        compare(session, model.rope, PIECES[:5])


KEPT: dict[str, dict[str, Any]] = {
    "default": {"refine": 3},
    "exact": {"refine": 3, "positions": "exact"},
    "head": PAPER,
    "quest": METHODS["quest retrieval prefill"],
    "dense": {"method": "dense", "positions": "exact"},
    "oracle per KV head": METHODS["oracle per KV head"],
}


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("model", ["llama", "qwen2", "llama-48"], indirect=True)
def test_kv_types(name: str, kv_type: str, model: Model) -> None:
    """Breaks when closed chunks are not kept as kv_type says, or sinks, local or summaries are."""
    with open_session(model.loaded, small(**KEPT[name]), kv_type=kv_type) as session:
        steps = compare(session, model.rope)
    errors = [nmse(step.found["out"], step.expected["out"]) for step in steps]
    assert np.median(errors) <= BOUNDS["out, median of windows"][0]


SIZES: dict[str, dict[str, Any]] = {
    "no sinks": {"n_sink": 0},
    "sinks over several windows": {"n_sink": 40, "budget": 40 + 32 + 5 * 8},
    "ragged": {"n_sink": 5, "n_local": 29, "chunk": 7, "window": 11},
    "window of one": {"window": 1},
    "window as long as local": {"window": 32},
    "chunk longer than local": {"chunk": 24, "n_local": 16, "budget": 4 + 16 + 2 * 24},
    "chunk of one": {"chunk": 1, "budget": 4 + 32 + 9, "representatives": 1},
    "chunk of several cells": {"chunk": 40, "budget": 4 + 32 + 40},
    "budget beyond the history": {"budget": 2048},
    "least budget": {"budget": 4 + 32 + 8},
}


@pytest.mark.parametrize("positions", ["clamped", "exact"])
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, positions: Any, model: Model) -> None:
    """Breaks when sinks, chunks, remainder, local and window do not meet where section 1 says."""
    with open_session(model.loaded, small(positions=positions, **SIZES[name])) as session:
        compare(session, model.rope, [(150, "prefill"), *one_by_one(3), (30, "prefill"), (1, "decode")])


@pytest.mark.parametrize("positions", ["clamped", "exact"])
@pytest.mark.parametrize("row", ["head", "head dot", "kv_head", "mean"])
def test_question_aware(row: str, positions: Any, model: Model) -> None:
    """Breaks when the term of section 3.4 is not of the mean of the 4 most attended queries, or acts in answers."""
    pieces: Pieces = [
        (5, "prefill"),
        (27, "question"),
        (180, "prefill"),
        *one_by_one(4),
        (24, "question"),  # two windows: the second one is read with the question of the first
        (60, "prefill"),
        *one_by_one(3),
    ]
    columns = METHODS[row] | {"positions": positions, "question_weight": 4.0}
    with open_session(model.loaded, small(**columns)) as session:
        steps = compare(session, model.rope, pieces)
    with open_session(model.loaded, small(**columns | {"question_weight": 0.0})) as session:
        without = compare(session, model.rope, pieces)
    differ = {a.phase for a, b in zip(steps, without, strict=True) if not np.array_equal(*(plans(a, b)))}
    assert "prefill" in differ  # the question changes what a reading retrieves


def plans(a: Step, b: Step) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    none = np.zeros(0, np.float32)
    return a.found.get("plan", none), b.found.get("plan", none)


@pytest.mark.parametrize("budget", [5 * 4, 20 * 4])
def test_published_cutoff(budget: int, model: Model) -> None:
    """Breaks when the published clamp to [32, 2k] comes before every layer has 100 values, or not after."""
    sizes: dict[str, Any] = {"n_local": 16, "window": 4, "chunk": 4, "budget": 4 + 16 + budget}
    columns = {"cutoff": "published", "cutoff_temperature": 0.02}
    with open_session(model.loaded, small(**PAPER, **sizes, **columns)) as session:
        steps = compare(session, model.rope, [(280, "prefill"), *one_by_one(60)])
    shares = [int(step.found["share"][0]) for step in steps if step.phase == "decode"]
    k = budget // 4
    assert shares[:N_LAYER] == [k] * N_LAYER
    if 2 * k < 32:
        assert shares[-N_LAYER:] == [2 * k] * N_LAYER
    else:
        assert min(shares[-N_LAYER:]) >= 32


@pytest.mark.parametrize(("row", "temperature"), [("default", 1.0), ("mean dot", 0.02), ("head", 0.02)])
def test_layerwise_cutoff_keeps_the_pool(row: str, temperature: float, model: Model) -> None:
    """Breaks when the layers' shares do not add up to L*k, or layers never differ."""
    with open_session(model.loaded, small(**METHODS[row] | {"cutoff_temperature": temperature})) as session:
        steps = compare(session, model.rope)
    shares = np.array([int(s.found["share"][0]) for s in steps if s.phase == "decode"]).reshape(-1, N_LAYER)
    assert (shares.sum(axis=1) == N_LAYER * K).all()
    assert len(np.unique(shares)) > 1


@pytest.mark.parametrize("positions", ["clamped", "exact"])
@pytest.mark.parametrize("refine", [2, 3, 8])
def test_refine_never_loses(refine: int, positions: Any, model: Model) -> None:
    """Breaks when a refined plan's keys get fewer votes than those of the plan that the bounds alone would make."""
    with open_session(model.loaded, small(scan=0, refine=refine, positions=positions)) as session:
        steps = compare(session, model.rope)
    gains = []
    for step in steps:
        if step.phase == "decode":
            plan, by_keys = step.found["plan"].astype(np.int64), np.exp(step.expected["refined"])
            without = ref.top_k(step.expected["scores"], len(plan))
            gains.append(by_keys[plan].sum() - by_keys[without].sum())
    assert min(gains) > -TIE * max(gains)
    assert np.mean(np.array(gains) > 0) > 0.5  # and mostly gains


@pytest.mark.parametrize("positions", ["clamped", "exact"])
def test_every_key_of_a_short_history_is_looked_at(positions: Any, model: Model) -> None:
    """Breaks when an answering step passes over chunks that are no part of a longer stretch, or reads them twice."""
    one_chunk: dict[str, Any] = {"chunk": 4, "budget": 4 + 32 + 4, "scan": 64}
    pieces: Pieces = [(1000, "prefill"), *one_by_one(9), (30, "prefill"), *one_by_one(3)]
    with open_session(model.loaded, small(positions=positions, **one_chunk), n_ctx=1100) as session:
        steps = compare(session, model.rope, pieces)
        n_bytes = session.stats().refine.bytes
    n_chunks = [len(step.found["scores"]) for step in steps if step.phase == "decode"]
    assert min(n_chunks) > 240
    n_head, d_head = steps[0].found["q"].shape[1:]
    assert n_bytes == sum(n_chunks) * n_head * 16 * (3 + d_head // 8)  # a cell for each, with room for 16 keys


def test_bounds_bound_every_key() -> None:
    """Breaks when the reference's bound (section 4) is below a product it bounds, or not a bound by hand."""
    rng = np.random.default_rng(0)
    keys = list(rng.normal(size=(6, 8, 2, 16)))
    bounds = np.array([ref.chunk_bounds(chunk) for chunk in keys])
    query = rng.normal(size=(4, 16))
    assert (ref.bound_scores(query, bounds) >= ref.key_scores(query, keys).sum(axis=0)).all()
    one = np.array([[[1.0, -2.0]], [[3.0, 4.0]]])  # two keys of one KV head
    assert ref.chunk_bounds(one).tolist() == [[[1, -2]], [[3, 4]]]
    two_heads = np.array([[2.0, -1.0], [0.0, 1.0]])
    assert ref.bound_scores(two_heads, ref.chunk_bounds(one)[None]).tolist() == [(6 + 2) + 4]
    assert ref.key_scores(two_heads, [one]).tolist() == [[max(2 + 2, 6 - 4)], [max(-2, 4)]]
