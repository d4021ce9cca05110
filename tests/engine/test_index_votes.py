"""When this fails, a step over a long history looks elsewhere than its index says, or the index is of other keys.

The index of the longest stretches is taken from a state, read by the description in native/kernels/cpu/cells.h
(tests/ops/ops_reference.py) and searched by the formulas (reference_search.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reference as ref
import tiny_gguf as tiny
from engine_support import check, divided_bytes, index_bytes, loaded
from llama_cpp._internals import LlamaModel
from numpy.typing import NDArray
from reference_model import ReferenceModel
from reference_search import N_RUN, Cell, cell_votes, in_127ths, sketched
from test_index import ALL_LEVELS, LEVELS, LOCAL, SINK, STRETCH, TOKENS, with_chunks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import ops_reference

N_LAYER, H, G, D = 2, 4, 2, 32
ROW_BYTES = {"f16": 2 * D, "q8_0": D + 2}  # of a key
SPREAD_BYTES = G * (D // 2 + 2 + 2)  # of a chunk
REACH = 3  # root mean squares from its centre that a cell's keys are taken to lie


@dataclass
class Model:
    loaded: LlamaModel
    rope: ref.Rope


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("votes") / "model.gguf"
    tiny.make_tiny_gguf(path, n_layer=N_LAYER, n_embd=64, n_head=H, n_head_kv=G, d_head=D)
    with loaded(path) as opened:
        yield Model(opened, ReferenceModel(path).rope)


@dataclass
class Layer:
    """What a state has of a layer: turned keys [n_chunks, G, c, d] of closed chunks, what is common, the index."""

    keys: ref.Floats
    common: ref.Floats  # [G, d]
    index: NDArray[np.uint8]


@dataclass
class Step:
    """An answered token, by layer; queries [H, d] as they meet keys, turned and scaled."""

    queries: list[ref.Floats]
    votes: list[ref.Floats]
    layers: list[Layer]
    n_bytes: int  # of sketches that were looked at


def layers_of(state: bytes, n_chunks: int, chunk: int, kv_type: str) -> list[Layer]:
    """native/session/state.cpp: per layer near and far keys and values of sinks, keys, values, spreads, index."""
    n_of_stretch = STRETCH // chunk
    n_index = n_chunks // n_of_stretch * n_of_stretch * index_bytes(chunk, n_head_kv=G, d_head=D)
    kept = n_chunks * G * chunk * ROW_BYTES[kv_type]
    sizes = [SINK * G * 2 * D] * 3 + [kept, kept, n_chunks * SPREAD_BYTES, n_index]
    raw = np.frombuffer(state, np.uint8)[-8 - N_LAYER * sum(sizes) : -8].reshape(N_LAYER, -1)
    layers = []
    for of_layer in raw:
        _, far, _, keys, _, _, index = np.split(of_layer, np.cumsum(sizes)[:-1])
        values = ops_reference.load_rows(kv_type, keys.reshape(n_chunks, G, chunk, -1), D)
        sinks = ops_reference.load_rows("f16", far.reshape(G, SINK, -1), D)
        values = ref.turned(values) if kv_type == "f16" else values
        layers.append(Layer(values, ref.turned(sinks.mean(axis=1)), index.copy()))
    return layers


def answer_after(model: Model, *, chunk: int, n_chunks: int, scan: int, kv_type: str = "f16") -> Step:
    n = SINK + LOCAL + n_chunks * chunk
    seen: dict[tuple[str, int], ref.Floats] = {}

    def observe(name: str, layer: int, n_past: int, data: NDArray[np.float32]) -> None:
        seen[name, layer] = data.astype(np.float64)

    with with_chunks(model.loaded, chunk, scan, kv_type) as session:
        session.decode(TOKENS[:n])
        session.stats_reset()
        session.observer = observe
        session.decode(TOKENS[:1], phase="decode")
        assert session.n_chunks == n_chunks
        layers = layers_of(bytes(session.state_get()), n_chunks, chunk, kv_type)
        n_bytes = session.stats().refine.bytes
    queries = [ref.turned(ref.rotate(seen["q", layer], LOCAL, model.rope)[0]) * D**-0.5 for layer in range(N_LAYER)]
    return Step(queries, [seen["scores", layer] for layer in range(N_LAYER)], layers, n_bytes)


def cells_of(stretch: ops_reference.Stretch) -> list[Cell]:
    own = [slice(*ends) for ends in zip(stretch.starts, stretch.starts[1:], strict=False)]
    units = [stretch.units[keys.start] for keys in own]
    sizes = [np.rint(stretch.sizes[keys, None] / unit) for keys, unit in zip(own, units, strict=True)]
    return [
        Cell(centre[None], np.array([unit]), whole, stretch.signs[keys, None])
        for centre, unit, whole, keys in zip(stretch.centres, units, sizes, own, strict=True)
    ]


def votes_of(queries: ref.Floats, layer: Layer, g: int, n_picked: int) -> tuple[ref.Floats, int]:
    """Votes [n_chunks] of a KV head's queries [r, d], and the bytes of sketches that they look at."""
    n_chunks, _, chunk, _ = layer.keys.shape
    n_divided = STRETCH // chunk
    n_bytes = divided_bytes(n_divided * chunk, D)
    stretch = ops_reference.stretch(layer.index[g * n_bytes : (g + 1) * n_bytes], D, n_divided * chunk)
    cells, cell_chunks = cells_of(stretch), np.split(stretch.chunks, stretch.starts[1:-1])
    runs = [run for left in layer.keys[n_divided:, g] for run in np.split(left, range(N_RUN, chunk, N_RUN))]
    rest = [sketched(run[:, None], layer.common[g, None]) for run in runs]
    rest_chunks = np.repeat(np.arange(n_divided, n_chunks), chunk)
    votes, n_bytes = np.zeros(n_chunks), 0
    for query in queries:
        reaches = REACH * np.linalg.norm(query) * stretch.reaches
        picked = ref.top_k(in_127ths(query[None])[0] @ stretch.centres.T + reaches, n_picked)
        chunks = np.concatenate([*(cell_chunks[i] for i in picked), rest_chunks])
        looked_at = [*(cells[i] for i in picked), *rest]
        votes += cell_votes(query[None], looked_at, chunks, n_chunks)
        n_bytes += sum(-(-len(cell.sizes) // 16) * 16 * (3 + D // 8) for cell in looked_at)
    return votes, n_bytes


@pytest.mark.parametrize(
    ("chunk", "n_left", "scan", "kv_type"),
    [(8, 5, 256, "f16"), (8, 0, 64, "q8_0"), (33, 30, 2048, "q8_0"), (1024, 3, 64, "f16")],
)
def test_votes_are_those_of_the_cells_picked(model: Model, *, chunk: int, n_left: int, scan: int, kv_type: str) -> None:
    """Breaks when a step looks into other cells than the best, or at other keys, or passes over some that are left."""
    step = answer_after(model, chunk=chunk, n_chunks=STRETCH // chunk + n_left, scan=scan, kv_type=kv_type)
    n_bytes = 0
    for query, votes, layer in zip(step.queries, step.votes, step.layers, strict=True):
        found = [votes_of(of_head, layer, g, scan // 64) for g, of_head in enumerate(np.split(query, G))]
        check("votes of a search", votes, sum(own for own, _ in found))
        n_bytes += sum(n for _, n in found)
    assert step.n_bytes == n_bytes


def stretches_of(n_chunks: int, chunk: int) -> list[slice]:
    """The chunks of each stretch."""
    found, first = [], 0
    for n_of_stretch in [n // chunk for n in LEVELS if n // chunk > 1]:
        while first + n_of_stretch <= n_chunks:
            found.append(slice(first, first + n_of_stretch))
            first += n_of_stretch
    return [*found, slice(first, n_chunks)]


@pytest.mark.parametrize(("chunk", "n_chunks"), [(8, ALL_LEVELS // 8 + 5), (1, ALL_LEVELS + 405), (33, 2656)])
def test_votes_are_about_the_attention_of_all_keys(model: Model, *, chunk: int, n_chunks: int) -> None:
    """Where all cells are looked into. Breaks when stretches of any length are of other keys than their chunks': votes
    and attention have nothing in common then. Sketches say less where few keys share their cells."""
    step = answer_after(model, chunk=chunk, n_chunks=n_chunks, scan=1 << 17)
    assert 1 < step.n_bytes / (N_LAYER * H * n_chunks * chunk * (3 + D // 8)) < 1.2
    n_compared = 0
    for query, votes, layer in zip(step.queries, step.votes, step.layers, strict=True):
        keys = np.repeat(layer.keys.transpose(1, 0, 2, 3).reshape(G, -1, D), H // G, axis=0)
        weights = ref.softmax(np.einsum("hd,hnd->hn", query, keys))
        weights[weights < 1 / weights.shape[1]] = 0
        attention = weights.sum(axis=0).reshape(n_chunks, chunk).sum(axis=1)
        for own in stretches_of(n_chunks, chunk):
            if own.stop - own.start > 100:
                assert attention[own].sum() / 3 < votes[own].sum() < 3 * attention[own].sum()
                assert np.corrcoef(votes[own] ** 0.25, attention[own] ** 0.25)[0, 1] > 0.45  # not of the few greatest
                n_compared += 1
    assert n_compared >= N_LAYER
