"""When this fails, an answer's chunks are not those whose keys it attends to, though the index has them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ops_reference as reference
import pytest
from ops_support import ALONE, EMULATED, Guarded, check, ffi, half, lib, pointer
from test_cells import SIZES, Halves, kept, make_stretch

SCALE = 0.125
HEADS = [(4, 4), (8, 2), (7, 1), (20, 2)]
PARTS = [(40, True), (17, True), (1, False), (1, False), (3, False)]  # chunks, and whether they are divided


@dataclass
class Index:
    """Keys [n, G, c, d] and all their stretches, as bytes [G, bytes] and as the oracle reads them."""

    values: reference.Array  # turned
    common: reference.Array  # [G, d], turned
    parts: list[tuple[int, bool]]
    raw: list[reference.Bytes]
    found: list[list[reference.Stretch]]  # [G][stretches]

    @property
    def n_divided(self) -> list[int]:
        """Cells of each KV head in divided stretches."""
        return [
            sum(len(s.reaches) for s, (_, divided) in zip(of_head, self.parts, strict=True) if divided)
            for of_head in self.found
        ]


def index_of(
    impl: int, keys: Halves, parts: list[tuple[int, bool]], common: npt.NDArray[np.float32] | None = None
) -> Index:
    n, n_head_kv, c, d = keys.shape
    values = reference.turn(keys.astype(np.float64))
    shared = np.zeros((n_head_kv, d), np.float32) if common is None else common
    assert sum(n_chunks for n_chunks, _ in parts) == n
    raw, found, first = [], [[] for _ in range(n_head_kv)], 0
    for n_chunks, divided in parts:
        own = keys[first : first + n_chunks]
        stretches = [stretch_of(impl, own[:, g], shared[g], divided=divided) for g in range(n_head_kv)]
        n_bytes = max(len(one) for one in stretches)
        room = np.full((n_head_kv, -(-n_bytes // 64) * 64), 0xA5, np.uint8)
        for g, one in enumerate(stretches):
            room[g, : len(one)] = one
            found[g].append(reference.stretch(one, d, n_chunks * c, in_order=0 if divided else c))
        raw.append(room)
        first += n_chunks
    return Index(values, reference.turn(shared.astype(np.float64)), parts, raw, found)


def stretch_of(impl: int, keys: Halves, common: npt.NDArray[np.float32], *, divided: bool) -> reference.Bytes:
    """Of keys [chunks, c, d], as the impl makes it. A GPU makes none, where the CPU's kernels may be missing."""
    if impl >= EMULATED:
        turned = reference.turn(keys.astype(np.float64))
        return reference.write_stretch(turned, reference.turn(common.astype(np.float64)), divided=divided)
    rows, _ = kept("f16", np.stack([keys, keys], axis=1))
    return make_stretch(impl, "f16", rows, common, divided=divided).array


@dataclass
class Found:
    scores: npt.NDArray[np.float32]
    picked: npt.NDArray[np.int32]
    votes: npt.NDArray[np.float32]
    n_bytes: int | None  # None: a GPU


def search(
    impl: int, index: Index, query: npt.NDArray[np.float32], n_picked: int, *, n_threads: int = 1, scale: float = SCALE
) -> Found:
    n, n_head_kv, c, d = index.values.shape
    stretches = ffi.new("struct actqkv_stretch[]", len(index.parts))
    first = 0
    for s, (n_chunks, divided), raw in zip(stretches, index.parts, index.raw, strict=True):
        s.data, s.head_stride, s.first_chunk = pointer(raw), raw.shape[1], first
        s.n_keys, s.in_order = n_chunks * c, 0 if divided else c
        first += n_chunks
    n_divided, n_cells = ffi.new("int64_t *"), 0
    for g, of_head in enumerate(index.found):
        n_own = sum(len(s.reaches) for s in of_head)
        n_cells = max(n_cells, n_own)
        if impl < EMULATED:
            assert lib.actqkv_search_cells(stretches, len(stretches), g, d, n_divided) == n_own
            assert n_divided[0] == index.n_divided[g]
    scores, votes = Guarded((len(query), n_cells + 3)), Guarded(n)
    picked = Guarded((len(query), n_picked), np.int32)
    args = ffi.new("struct actqkv_search_args *")
    args.n_head, args.n_head_kv, args.d_head, args.scale = len(query), n_head_kv, d, scale
    args.query, args.stretches, args.n_stretches, args.n_chunks = pointer(query), stretches, len(stretches), n
    args.n_cells, args.scores, args.votes = n_cells + 3, pointer(scores), pointer(votes)
    args.n_picked, args.picked, args.n_threads = n_picked, pointer(picked), n_threads
    n_bytes = run(impl, args)
    for array in (scores, picked, votes):
        array.check()
    return Found(scores.array, picked.array, votes.array, n_bytes)


def run(impl: int, args: Any) -> int | None:
    """Both halves; the bytes that the CPU says it has read."""
    if impl >= EMULATED:
        lib.actqkv_search(impl, args)
        return None
    n_scratch = lib.actqkv_search_scratch(args)
    scratch = np.full(n_scratch + 128, 0xA5, np.uint8)
    start = -scratch.ctypes.data % 64
    args.scratch = ffi.cast("void *", scratch.ctypes.data + start)
    lib.actqkv_search_score(impl, args)
    n_bytes = int(lib.actqkv_search_vote(impl, args))
    assert (scratch[start + n_scratch :] == 0xA5).all(), "written outside the scratch"
    return n_bytes


def group(index: Index, query: reference.Array, g: int) -> slice:
    r = len(query) // len(index.found)
    return slice(g * r, (g + 1) * r)


def looked_at(index: Index, g: int, picked: npt.NDArray[np.int32]) -> list[tuple[int, reference.Stretch, Any]]:
    """Of each stretch of KV head g that picked cells [n_picked] lie in, or that is not divided: its first chunk, itself
    and which of its keys."""
    found, first_cell, first = [], 0, 0
    for (n_chunks, divided), s in zip(index.parts, index.found[g], strict=True):
        own = np.isin(s.cells, picked - first_cell) if divided else np.ones(len(s.sizes), bool)
        found.append((first, s, own))
        first_cell += len(s.reaches)
        first += n_chunks
    return found


def check_votes(index: Index, query: npt.NDArray[np.float32], found: Found) -> None:
    """Each is the attention of the chunk's keys that count, as sketched; logits are off by half a unit of whole numbers
    each."""
    turned = SCALE * reference.turn(query.astype(np.float64))
    n, d = len(index.values), query.shape[1]
    least, most, n_bytes = np.zeros(n), np.zeros(n), 0
    for h, q in enumerate(turned):
        g = h // (len(query) // len(index.found))
        chunks, logits, sizes, units = [], [], [], []
        for first, s, own in looked_at(index, g, found.picked[h]):
            chunks.append(first + s.chunks[own])
            logits.append(s.keys[own] @ q)
            sizes.append(s.sizes[own])
            units.append(s.units[own])
            n_padded = -(-np.diff(s.starts)[np.unique(s.cells[own])] // 16) * 16
            n_bytes += int(n_padded.sum()) * (3 + d // 8)
        entry = np.abs(q).reshape(-1, 4).sum(axis=1).max() / 63
        off = entry * (d / 8 * np.concatenate(sizes).max() + 128 * np.concatenate(units).max()) + 1e-4
        weights = reference.softmax(np.concatenate(logits))
        limit = reference.LEAST / len(weights)
        for side, summed in ((-1, least), (1, most)):
            counts = weights * np.exp(4 * side * off) >= limit
            summed[:] += np.bincount(np.concatenate(chunks), weights * np.exp(2 * side * off) * counts, minlength=n)
    assert (found.votes >= least - 1e-5).all()
    assert (found.votes <= most + 1e-5).all()
    assert (1 - reference.LEAST) * len(query) <= found.votes.sum() <= (1 + 1e-4) * len(query)
    assert found.n_bytes in {n_bytes, None}


@pytest.mark.parametrize(("n_head", "n_head_kv"), HEADS)
@pytest.mark.parametrize(("d_head", "c"), [(d, c) for d, c, _ in SIZES])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_search_follows_the_formulas(
    impl: int, rng: np.random.Generator, *, n_head: int, n_head_kv: int, d_head: int, c: int, n_threads: int
) -> None:
    """Over stretches of several lengths: scores of cells, the best of them, votes of the keys in these."""
    n = sum(n_chunks for n_chunks, _ in PARTS)
    common = 2 * rng.normal(size=(n_head_kv, d_head))
    keys = half(common[:, None] + rng.normal(size=(n, n_head_kv, c, d_head)))
    index = index_of(impl, keys, PARTS, common.astype(np.float32))
    query = (2 * rng.normal(size=(n_head, d_head))).astype(np.float32)
    found = search(impl, index, query, 6, n_threads=n_threads)
    turned = SCALE * reference.turn(query.astype(np.float64))
    for g, of_head in enumerate(index.found):
        heads = group(index, turned, g)
        expected = reference.cell_scores(turned[heads], of_head)
        lengths = np.linalg.norm(turned[heads], axis=1)[:, None]
        centres = np.concatenate([np.linalg.norm(s.centres, axis=1) + s.reaches for s in of_head])
        own = found.scores[heads, : expected.shape[1]]
        check("cells", own, expected, lengths * centres)
        for row, picked in zip(own, found.picked[heads], strict=True):
            best = reference.top_k(row[: index.n_divided[g]].astype(np.float64), 6)
            np.testing.assert_array_equal(picked, [*best, *[-1] * (6 - len(best))])
    check_votes(index, query, found)


def test_every_impl_gives_the_same(impl: int, rng: np.random.Generator) -> None:
    """Over the same stretches, and with any number of threads: votes of threads are added up in another order."""
    if ALONE:
        pytest.skip("compares with the CPU's kernels, which are not here")
    keys = half(rng.normal(size=(62, 2, 32, 64)))
    index = index_of(0, keys, PARTS)
    query = (3 * rng.normal(size=(8, 64))).astype(np.float32)
    expected = search(0, index, query, 8)
    for n_threads in (1, 2, 5, 9):
        found = search(impl, index, query, 8, n_threads=n_threads)
        assert (found.picked == expected.picked).all()
        assert found.n_bytes in {expected.n_bytes, None}
        np.testing.assert_allclose(found.votes, expected.votes, rtol=2e-3, atol=1e-5)
        again = search(impl, index, query, 8, n_threads=n_threads)
        np.testing.assert_array_equal(again.votes, found.votes)


def test_fewer_threads_than_asked_for() -> None:
    """Breaks when parts of threads that the system does not give are left out, or garbage is taken for their votes."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_every_impl_gives_the_same"],
        env=os.environ | {"OMP_THREAD_LIMIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout


@pytest.mark.parametrize("n_picked", [1, 4, 1000])
@pytest.mark.parametrize("c", [16, 32])
def test_what_is_attended_most_is_found(impl: int, rng: np.random.Generator, *, n_picked: int, c: int) -> None:
    """One key that all heads look for, among 4096: its chunk has the most attention, and the most votes."""
    n = 4096 // c
    keys = half(rng.normal(size=(n, 2, c, 64)))
    query = (4 * rng.normal(size=(8, 64))).astype(np.float32)
    for g in range(2):
        keys[77, g, 3] = half(3 * query[4 * g : 4 * g + 4].mean(axis=0))
    index = index_of(impl, keys, [(n, True)])
    found = search(impl, index, query, n_picked)
    turned = SCALE * reference.turn(query.astype(np.float64))
    logits = np.einsum("grd,ngcd->grnc", turned.reshape(2, 4, -1), index.values)
    attention = reference.softmax(logits.reshape(8, -1)).reshape(8, n, c).sum(axis=(0, 2))
    assert attention.argmax() == 77
    assert found.votes.argmax() == 77
    if n_picked == 1000:  # all cells: the same attention, but for what sketches lose
        assert ((found.picked >= 0).sum(axis=1) == np.repeat(index.n_divided, 4)).all()
        assert abs(found.votes[77] - attention[77]) < 0.2 * attention[77]


@pytest.mark.parametrize("n_picked", [0, 1])
def test_what_is_not_divided_is_looked_at_whole(impl: int, rng: np.random.Generator, n_picked: int) -> None:
    """Also where not one cell is picked; chunks none of whose keys are looked at have no vote."""
    keys = half(rng.normal(size=(62, 2, 32, 64)))
    index = index_of(impl, keys, PARTS)
    query = rng.normal(size=(8, 64)).astype(np.float32)
    found = search(impl, index, query, n_picked)
    assert (found.votes[57:] > 0).all()
    check_votes(index, query, found)
    if n_picked == 0:
        assert not found.votes[:57].any()
        assert found.votes[57:].sum() >= 8 * (1 - reference.LEAST)


def test_rare_keys_are_found_in_any_chunk(impl: int, rng: np.random.Generator) -> None:
    """Five keys of one kind among 4096 others, in five chunks of four stretches, by a quarter of all cells."""
    parts = [(64, True), (32, True), (32, True), (1, False)]
    kinds = rng.normal(size=(40, 64))[rng.integers(0, 40, size=(129, 1, 32))]
    keys = kinds + 0.3 * rng.normal(size=(129, 1, 32, 64))
    rare, chunks = 1.5 * rng.normal(size=64), [5, 60, 70, 111, 128]
    keys[chunks, 0, [0, 9, 17, 30, 31]] = rare + 0.05 * rng.normal(size=(5, 64))
    index = index_of(impl, half(keys), parts)
    found = search(impl, index, rare[None].astype(np.float32), 32)
    assert sorted(np.argsort(found.votes)[-5:]) == chunks


@pytest.mark.parametrize("value", [0.0, 1e30, np.inf, np.nan])
def test_odd_queries_do_no_harm(impl: int, rng: np.random.Generator, value: float) -> None:
    """What is looked at stays within the stretches; a query of zeros looks at all of its cells' keys alike."""
    index = index_of(impl, half(rng.normal(size=(62, 2, 32, 64))), PARTS)
    found = search(impl, index, np.full((8, 64), value, np.float32), 3, n_threads=2)
    assert ((found.picked >= 0) & (found.picked < np.repeat(index.n_divided, 4)[:, None])).all()
    if value == 0:
        check_votes(index, np.zeros((8, 64), np.float32), found)


def test_no_chunks(impl: int) -> None:
    index = Index(np.zeros((0, 1, 32, 64)), np.zeros((1, 64)), [], [], [[]])
    found = search(impl, index, np.ones((2, 64), np.float32), 4)
    assert (found.picked == -1).all()
    assert not found.n_bytes
