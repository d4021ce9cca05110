"""When this fails, candidates are thrown away that hold the answer."""

from __future__ import annotations

import numpy as np
import ops_reference as reference
import pytest
from ops_support import ALONE, ARRAYS, EMULATED, Guarded, ffi, gpu, half, lib, pointer

SCALE = 0.125


def sketches_of(keys: reference.Array, impl: int = 0) -> np.ndarray:
    """Of all chunks: f16 keys [n, G, c, d] -> bytes [n, G, bytes]. A GPU makes its own."""
    n, n_head_kv, c, d_head = keys.shape
    n_bytes = 4 + d_head + (1 + d_head // 8) * -(-c // 32) * 32  # ../../native/kernels/cpu/sketch.cpp
    found = Guarded((n, n_head_kv, n_bytes), np.uint8)
    for i, chunk in enumerate(keys):
        contiguous, own = np.ascontiguousarray(chunk), Guarded((n_head_kv, n_bytes), np.uint8)
        arguments = (pointer(contiguous), c * d_head, n_head_kv, d_head, c, pointer(own))
        if impl >= EMULATED:
            gpu(impl).call("sketch", arguments, ARRAYS)
        else:
            assert lib.actqkv_sketch_bytes(d_head, c) == n_bytes
            lib.actqkv_sketch(*arguments)
        own.check()
        found.array[i] = own.array
    return found.array


@pytest.mark.parametrize(("n_head", "n_head_kv"), [(4, 4), (8, 2), (7, 1), (20, 2)])
@pytest.mark.parametrize(("d_head", "c"), [(64, 32), (80, 5), (8, 1), (96, 33), (128, 100), (256, 32)])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_scores_are_the_best_sketched_keys(
    impl: int, rng: np.random.Generator, *, n_head: int, n_head_kv: int, d_head: int, c: int, n_threads: int
) -> None:
    query = rng.normal(size=(n_head, d_head)).astype(np.float32)
    keys = half(rng.normal(size=(9, n_head_kv, c, d_head)) + 3 * rng.normal(size=d_head))
    sketches = sketches_of(keys, impl)
    chunks = np.array([0, 3, 4, 8], np.int32)
    scores = Guarded((n_head, len(chunks)))
    lib.actqkv_sketch_scores(
        impl,
        pointer(query),
        pointer(sketches),
        pointer(chunks),
        len(chunks),
        n_head,
        n_head_kv,
        d_head,
        c,
        SCALE,
        pointer(scores),
        n_threads,
    )
    scores.check()
    turned, exact = reference.turn(query.astype(np.float64)), keys[chunks].astype(np.float64)
    expected = SCALE * reference.refine(turned, reference.sketched(exact))
    # of whole numbers, all are off by half a unit at most: table entries, sums times sizes, sizes and means
    heads = np.arange(n_head) // (n_head // n_head_kv)
    unit = np.abs(turned).reshape(n_head, -1, 4).sum(axis=2).max(axis=1)[:, None] / 63
    reach = np.abs(turned).sum(axis=1)[:, None]
    mean = reference.turn(exact).mean(axis=2)
    size = np.abs(reference.turn(exact) - mean[:, :, None]).mean(axis=3).max(axis=2)[:, heads].T
    mean_unit, size_unit = np.abs(mean).max(axis=2)[:, heads].T / 127, size / 255
    off = (unit * (d_head / 4 + 1) * size + reach * (size_unit + mean_unit)) / 2
    halves = 1e-3 * reach * (np.abs(mean).max() + size)  # units are rounded to half
    assert (np.abs(scores.array - expected) <= SCALE * (off + halves)).all()


def test_every_impl_gives_the_same(impl: int, rng: np.random.Generator) -> None:
    query = rng.normal(size=(8, 64)).astype(np.float32)
    sketches = sketches_of(half(rng.normal(size=(40, 2, 32, 64))), impl)
    chunks = np.arange(0, 40, 3, dtype=np.int32)
    found = []
    for each in (0, impl):
        scores = Guarded((8, len(chunks)))
        lib.actqkv_sketch_scores(
            each, pointer(query), pointer(sketches), pointer(chunks), len(chunks), 8, 2, 64, 32, 1.0, pointer(scores), 1
        )
        found.append(scores.array)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_sketches_rank_as_keys_do(impl: int, rng: np.random.Generator) -> None:
    """Of 200 chunks, the one with a key near the query is first by its sketch."""
    keys = rng.normal(size=(200, 1, 32, 64))
    query = rng.normal(size=(1, 64)).astype(np.float32)
    keys[123, 0, 7] = 0.95 * query[0] + 0.31 * keys[123, 0, 7]
    sketches = sketches_of(half(keys), impl)
    chunks = np.arange(200, dtype=np.int32)
    scores = Guarded((1, 200))
    lib.actqkv_sketch_scores(
        impl, pointer(query), pointer(sketches), pointer(chunks), 200, 1, 1, 64, 32, 1.0, pointer(scores), 2
    )
    assert scores.array[0].argmax() == 123


def test_odd_inputs(impl: int) -> None:
    """No candidates; a query of zeros, of infinities; keys that are all alike."""
    assert ALONE or {lib.actqkv_sketch_bytes(*size) for size in ((12, 4), (2048, 4), (64, 1025))} == {0}
    alike = half(np.ones((2, 1, 4, 16)))
    sketches, chunks = sketches_of(alike, impl), np.array([0, 1], np.int32)
    for query in (np.zeros(16), np.full(16, np.inf), np.ones(16)):
        vector, scores = query.astype(np.float32), Guarded((1, 2))
        arguments = (pointer(sketches), pointer(chunks))
        lib.actqkv_sketch_scores(impl, pointer(vector), *arguments, 0, 1, 1, 16, 4, 1.0, ffi.NULL, 2)
        lib.actqkv_sketch_scores(impl, pointer(vector), *arguments, 2, 1, 1, 16, 4, 1.0, pointer(scores), 2)
        scores.check()
        if np.isfinite(query).all():
            np.testing.assert_allclose(scores.array, query.sum(), rtol=1e-3)  # the mean's unit is rounded to half
