"""Breaks when a session tells of itself what it did not do: records, true attention mass, audits."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference as ref
from engine_support import Pieces, check, one_by_one, open_session, random_tokens, read, small
from llama_cpp._internals import LlamaModel
from numpy.typing import NDArray

from actqkv_cpp import ParameterError, Record, Recording, Retrieval
from actqkv_cpp._native import Session
from actqkv_cpp.figures import Mass

N_LAYER, N_HEAD, N_HEAD_KV = 3, 4, 2
PIECES: Pieces = [(203, "prefill"), (27, "question"), *one_by_one(9)]
TOKENS = random_tokens(sum(n for n, _ in PIECES))
ROPE = ref.Rope(n_rot=32)

METHODS: dict[str, Retrieval] = {
    "default": small(refine=2),
    "exact": small(refine=2, positions="exact"),
    "published": small(method="published", probe_warmup=0),
    "quest": small(method="quest", positions="exact", chunk=8, dense_layers=1),
    "quest reads by retrieval": small(method="quest", positions="exact", chunk=8, dense_layers=0, prefill="top"),
    "no sinks": small(n_sink=0),
    "oracle": small(method="oracle"),
    "dense": small(method="dense", positions="exact"),
    "streaming": small(method="streaming"),
}

Seen = dict[tuple[int, int], dict[str, NDArray[np.float32]]]


def recorded(session: Session, mass: Mass) -> tuple[Recording, Seen]:
    """A session's records, and what the observer saw of the same windows."""
    seen: Seen = defaultdict(dict)
    session.observer = lambda name, layer, n_past, data: seen[n_past, layer].update({name: data})
    recording = Recording(session.params.n_sink, session.params.n_chunk_tokens, session.n_layer)
    session.set_recorder(recording.add, mass=mass)
    read(session, TOKENS, PIECES, n_logits=0)
    session.set_recorder(None)
    session.observer = None
    return recording, seen


def true_mass(session: Session, seen: Seen, record: Record) -> ref.Floats:
    """Mass of a window's chunks per query head [H, N], over queries, from the q and k that the observer saw."""
    found = session.params
    params = ref.Params(
        n_sink=found.n_sink, n_local=found.n_local, n_chunk_tokens=found.n_chunk_tokens,
        budget=found.budget, positions=found.columns["positions"], storage="f16",
    )  # fmt: skip
    starts = sorted({n_past for n_past, _ in seen})
    keys = np.concatenate([seen[n, record.layer]["k"] for n in starts if n <= record.n_past]).astype(np.float64)
    q = seen[record.n_past, record.layer]["q"].astype(np.float64)
    window = record.n_past + np.arange(len(q))
    logits = ref.attention_logits(q, window, keys, np.arange(len(keys)), params=params, rope=ROPE)
    return ref.chunk_mass(ref.softmax(logits), params, record.n_chunks)


@pytest.mark.parametrize("name", METHODS)
def test_records_are_what_was_done(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when a record differs from what the layer planned, or a window or layer has none."""
    with open_session(tiny_llama, METHODS[name]) as session:
        recording, seen = recorded(session, "none")
        columns, window = session.params.columns, session.params.n_window
    assert len(recording) == len(seen)
    for record in recording:
        arrays = seen[record.n_past, record.layer]
        assert record.n_tokens == len(arrays["q"]) <= window
        assert record.phase == ("decode" if record.n_past >= 230 else "question" if record.n_past >= 203 else "prefill")
        assert record.mass is record.oracle is None
        assert np.isnan([record.mass_recall, record.chunk_recall]).all()
        for what in ("bias", "weights"):
            found = getattr(record, what)
            assert (found is None) == (what not in arrays)
            np.testing.assert_array_equal([] if found is None else found, arrays.get(what, []))
        assert record.entropy == pytest.approx(float(arrays.get("entropy", [np.nan])[0]), nan_ok=True)
        plan = arrays.get("plans", arrays.get("plan"))
        chosen = record.chosen_mask()
        if plan is not None:
            expected = np.zeros((len(np.atleast_2d(plan)), record.n_chunks), np.bool_)
            np.put_along_axis(expected, np.atleast_2d(plan).astype(np.int64), True, axis=1)
            assert (chosen == expected).all()
            assert record.n_chosen == plan.shape[-1]
        else:
            select = columns["decode" if record.phase == "decode" else "prefill"]
            assert chosen.all() if record.layer < columns["dense_layers"] or select == "all" else not chosen.any()
    n_answered = len(one_by_one(9)) * N_LAYER
    assert len(recording.answers()) == n_answered


@pytest.mark.parametrize("name", METHODS)
def test_mass_is_the_references(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when recorded mass is not the softmax mass over everything, or recalls are not shares of it."""
    with open_session(tiny_llama, METHODS[name]) as session:
        recording, seen = recorded(session, "all")
        for record in recording:
            expected = true_mass(session, seen, record) / N_HEAD
            assert (record.mass is None) == (record.n_chunks == 0)
            if record.mass is None:
                continue
            per_list = expected.reshape(len(record.mass), -1, record.n_chunks).sum(axis=1)
            check("mass", record.mass, per_list, f"layer {record.layer} at {record.n_past}")
            rows = np.broadcast_to(record.chosen_mask(), per_list.shape)
            assert record.mass_recall == pytest.approx(per_list[rows].sum() / per_list.sum(), abs=1e-3)
            best = [ref.top_k(row.astype(np.float64), record.n_chosen) for row in record.mass]
            np.testing.assert_array_equal(record.oracle, best)
            if name == "oracle":
                assert record.chunk_recall == 1


@pytest.mark.parametrize(("name", "recall"), [("dense", 1.0), ("streaming", 0.0), ("oracle", None), ("default", None)])
def test_recalls_by_layer(name: str, recall: float | None, tiny_llama: LlamaModel) -> None:
    """Breaks when section 7's figures are of other windows than the answered ones, or of other layers."""
    with open_session(tiny_llama, METHODS[name]) as session:
        recording, _ = recorded(session, "answers")
    assert all((record.mass is not None) == (record.phase == "decode") for record in recording)
    found = recording.mass_recall()
    for layer in range(N_LAYER):
        of_layer = [record.mass_recall for record in recording.answers() if record.layer == layer]
        assert found[layer] == pytest.approx(np.mean(of_layer))
    if recall is not None:
        np.testing.assert_allclose(found, recall, atol=1e-6)
        needle = recording.needle_recall(60, 70)
        np.testing.assert_array_equal(needle, recall)
    else:
        assert (found > 0).all()
        assert (found < 1).all()


def test_measures_by_hand() -> None:
    """Breaks when a measure of section 7 is not what a person counts."""

    def record(layer: int, chosen: list[int], mass: list[float] | None, phase: Any = "decode") -> Record:
        return Record(
            n_past=40, n_tokens=1, phase=phase, layer=layer, n_chunks=4, n_chosen=len(chosen),
            chosen=np.array([chosen], np.int32), bias=None, weights=None, entropy=0.5,
            mass=None if mass is None else np.array([mass], np.float32),
        )  # fmt: skip

    recording = Recording(n_sink=4, n_chunk_tokens=8, n_layer=2)
    for each in (
        record(0, [0, 2], [0.1, 0.2, 0.4, 0.3]),
        record(0, [2, 3], [0.1, 0.2, 0.4, 0.3]),
        record(1, [1], None),
        record(1, [0, 1, 2], [1, 0, 0, 0], "prefill"),
    ):
        recording.add(each)
    np.testing.assert_allclose(recording.mass_recall(), [(0.5 + 0.7) / 2, np.nan])
    np.testing.assert_allclose(recording.chunk_recall(), [(0.5 + 1) / 2, np.nan])
    assert recording.chunks_of(4, 12) == (0, 1)
    assert recording.chunks_of(11, 13) == (0, 2)
    assert recording.chunks_of(0, 4) == (0, 0)
    np.testing.assert_allclose(recording.needle_recall(11, 13), [(0.5 + 0) / 2, 0.5])
    np.testing.assert_allclose(recording.needle_recall(28, 30), [0.5, 0])
    np.testing.assert_allclose(recording.needle_recall(36, 40), [np.nan, np.nan])  # not retrievable: local
    np.testing.assert_allclose(recording.share(), [2, 1])
    np.testing.assert_allclose(recording.chosen_counts(), [[1, 0, 2, 1], [0, 1, 0, 0]])


def test_token_bias(tiny_llama: LlamaModel) -> None:
    """Breaks when a token's bias lands on another token, or is not relative to its window."""
    with open_session(tiny_llama, METHODS["default"]) as session:
        recording, seen = recorded(session, "none")
    bias = recording.token_bias(len(TOKENS))
    assert np.isnan(bias[:, 230:]).all()
    for (n_past, layer), arrays in seen.items():
        if "bias" in arrays:
            expected = arrays["bias"] / arrays["bias"].mean()
            np.testing.assert_allclose(bias[layer, n_past : n_past + len(expected)], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["default", "quest", "oracle"])
def test_watching_changes_nothing(name: str, tiny_llama: LlamaModel) -> None:
    """Breaks when recording or auditing changes a result, or goes on after it was switched off."""
    with open_session(tiny_llama, METHODS[name]) as plain, open_session(tiny_llama, METHODS[name]) as session:
        calls: list[Record] = []
        session.set_recorder(calls.append, mass="all")
        session.set_audit(1)
        np.testing.assert_array_equal(
            read(session, TOKENS, PIECES, n_logits=1), read(plain, TOKENS, PIECES, n_logits=1)
        )
        session.set_recorder(None)
        session.set_audit(0)
        n_calls, n_audits = len(calls), session.stats().n_audits
        assert n_calls > 0
        assert n_audits > 0
        session.decode(TOKENS[:1], phase="decode")
        assert (len(calls), session.stats().n_audits) == (n_calls, n_audits)
        assert plain.stats().attended_tokens_mean == pytest.approx(
            (session.stats().attended_tokens_mean), rel=0.05
        )  # neither counts as attended


def test_a_recorder_that_fails(tiny_llama: LlamaModel) -> None:
    """Breaks when an exception in a recorder is lost."""

    def fail(record: Record) -> None:
        raise LookupError(record.layer)

    with open_session(tiny_llama) as session:
        session.set_recorder(fail)
        with pytest.raises(LookupError, match="0"):
            session.decode(TOKENS[:50])
        with pytest.raises(ParameterError, match="N at least 0"):
            session.set_audit(-1)


# ---- audits


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_audited_recall_is_the_references(name: str, every: int, tiny_llama: LlamaModel) -> None:
    """Breaks when an audit's recall is not that of its layer and KV head, or heads do not take turns."""
    with open_session(tiny_llama, METHODS[name]) as session:
        recording, seen = Recording(0, 1, N_LAYER), defaultdict(dict)
        session.observer = lambda what, layer, n_past, data: seen[n_past, layer].update({what: data})
        session.set_recorder(recording.add)
        read(session, TOKENS, PIECES[:2], n_logits=0)
        session.set_audit(every)
        n_dense = session.params.columns["dense_layers"]
        turns, recalls = [], []
        for i, token in enumerate(TOKENS[230:]):
            session.decode(np.array([token]), phase="decode")
            stats = session.stats()
            assert stats.n_audits == (i + 1) // every
            if (i + 1) % every:
                continue
            layer, g = stats.audit_layer, stats.audit_head
            turns.append((layer, g))
            record = next(r for r in recording.records[-N_LAYER:] if r.layer == layer)
            r = N_HEAD // N_HEAD_KV
            mass = true_mass(session, seen, record)[g * r : g * r + r].sum(axis=0)
            mask = record.chosen_mask()
            recalls.append(stats.audit_recall_last)
            assert stats.audit_recall_last == pytest.approx(
                mass[mask[g if len(mask) > 1 else 0]].sum() / mass.sum(), abs=1e-3
            )
        assert stats.audit_recall == pytest.approx(np.mean(recalls))
        heads = [(layer, g) for g in range(N_HEAD_KV) for layer in range(n_dense, N_LAYER)]
        assert turns == (heads * 9)[: len(turns)]
        assert stats.audit_ms > 0
        session.stats_reset()
        assert (session.stats().n_audits, session.stats().audit_recall) == (0, 0)


def test_audits_reach_beyond_the_budget(tiny_llama: LlamaModel) -> None:
    """Breaks when scratch for an audit is not there after the budget changed, and memory is overrun."""
    retrieval = small(budget=44)
    with open_session(tiny_llama, retrieval) as session:
        session.set_audit(1)
        session.decode(random_tokens(900))
        for budget in (76, 500, 44):
            session.set_answering(replace(retrieval, budget=budget))
            session.decode(TOKENS[:1], phase="decode")
        assert session.stats().n_audits == 3
