"""When this fails, chunks that hold the answer are not among the candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import ops_reference as reference
import pytest
from ops_support import ALONE, ARRAYS, EMULATED, ON_GPU, Guarded, check, ffi, gpu, half, lib, pointer

Bytes = reference.Bytes
EXACT = (0, EMULATED, ON_GPU)  # impls that do not round the query


def bytes_of(n_head_kv: int, d: int) -> int:
    """Of a spread (../../native/kernels/cpu/spread.cpp)."""
    return n_head_kv * (-(-d // 32) * 18 + 2)


def call(name: str, maker: int, *arguments: Any) -> None:
    """The CPU's function, which is the same in every impl, or the GPU's."""
    if maker >= EMULATED:
        gpu(maker).call(name, arguments, ARRAYS)
    else:
        getattr(lib, f"actqkv_{name}")(*arguments)


@pytest.fixture(params=[0, EMULATED, pytest.param(ON_GPU, marks=pytest.mark.cuda)], ids=["cpu", "emulated", "cuda"])
def maker(request: pytest.FixtureRequest) -> int:
    if ALONE and request.param != ON_GPU:
        pytest.skip("the GPU's kernels alone are here")
    return int(request.param)


def spreads_of(maker: int, keys: np.ndarray, centre: np.ndarray) -> Bytes:
    """Of all chunks: f16 keys [n, G, c, d] -> bytes [n, bytes]."""
    n, n_head_kv, c, d = keys.shape
    found = np.zeros((n, bytes_of(n_head_kv, d)), np.uint8)
    for chunk, spread in zip(keys, found, strict=True):
        contiguous, own = np.ascontiguousarray(chunk), Guarded(spread.shape, np.uint8)
        call("spread", maker, pointer(contiguous), c * d, pointer(centre), n_head_kv, d, c, pointer(own))
        own.check()
        spread[:] = own.array
    return found


def parts(spreads: Bytes, n_head_kv: int, d: int) -> tuple[reference.Array, reference.Array]:
    """Means [n, G, d] and spreads [n, G] as the bytes have them; between heads lies what fills up their last block."""
    padded = -(-d // 32) * 32
    rows = np.ascontiguousarray(spreads[:, : -2 * n_head_kv]).reshape(len(spreads), n_head_kv, -1)
    values = reference.load_rows("q4_0", rows, padded)
    assert (values[..., d:] == 0).all()
    tail = np.ascontiguousarray(spreads[:, -2 * n_head_kv :]).view(np.float16).astype(np.float64)
    return values[..., :d], tail


def rounded(x: reference.Array) -> reference.Array:
    """[..., d] through q4_0, zeros behind it."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 32)]).astype(np.float32)
    blocks = padded.reshape(*x.shape[:-1], -1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1) / -8
    scale = np.where(extreme == 0, 1, extreme)
    steps = np.minimum(np.floor(blocks / scale + 8.5), 15) - 8
    return np.asarray((steps * scale.astype(np.float16)).reshape(padded.shape)[..., : x.shape[-1]], np.float64)


def almost_equal(found: reference.Array, expected: reference.Array) -> None:
    """But for the values that lie so near the middle of two steps that float rounds them to the other one."""
    other = np.abs(found - expected) > 1e-3 * np.abs(expected).max()
    assert other.mean() < 1e-3
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 7


def scores_of(impl: int, query: np.ndarray, spreads: Bytes, *, n_head_kv: int, n: int) -> np.ndarray:
    n_head, d = query.shape
    folded, scores = Guarded(n_head_kv * (-(-d // 32) * 32 + 1)), Guarded(n)
    call("spread_query", impl, pointer(query), n_head, n_head_kv, d, pointer(folded))
    folded.check()
    arguments = (pointer(spreads), n, n_head_kv, d, pointer(scores), 2 if n % 2 else 1)
    lib.actqkv_spread_scores(impl, pointer(folded), *arguments)
    scores.check()
    return scores.array


@pytest.mark.parametrize("n_head_kv", [1, 3])
@pytest.mark.parametrize(("d", "c"), [(64, 32), (80, 16), (96, 5), (256, 8), (20, 1), (1024, 3), (25, 4)])
def test_spreads_are_the_definition(maker: int, rng: np.random.Generator, *, n_head_kv: int, d: int, c: int) -> None:
    keys = half(rng.normal(size=(20, n_head_kv, c, d)) + 5 * rng.normal(size=(n_head_kv, 1, d)))
    centre = Guarded((n_head_kv, d))
    call("mean", maker, pointer(np.ascontiguousarray(keys[0])), c * d, n_head_kv, d, c, pointer(centre))
    centre.check()
    np.testing.assert_allclose(centre.array, keys[0].astype(np.float64).mean(axis=1), atol=1e-5)
    means, spreads = parts(spreads_of(maker, keys, centre.array.copy()), n_head_kv, d)
    expected, expected_spreads = reference.spread(keys.astype(np.float64), centre.array.astype(np.float64))
    almost_equal(means[1:], rounded(expected[1:]))
    np.testing.assert_allclose(spreads, expected_spreads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n_head", "n_head_kv"), [(4, 4), (8, 2), (7, 1), (9, 3), (1, 1), (64, 8)])
@pytest.mark.parametrize("d", [64, 80, 96, 256, 20])
@pytest.mark.parametrize("n", [1, 5, 16, 33, 100])
def test_scores_follow_the_formula(
    impl: int, rng: np.random.Generator, *, n_head: int, n_head_kv: int, d: int, n: int
) -> None:
    query = (rng.normal(size=(n_head, d)) * rng.uniform(0.1, 10, size=(n_head, 1))).astype(np.float32)
    keys = half(rng.normal(size=(n, n_head_kv, 4, d)))
    spreads = spreads_of(impl if ALONE else 0, keys, np.zeros((n_head_kv, d), np.float32))
    scores = scores_of(impl, query, spreads, n_head_kv=n_head_kv, n=n)
    means, wide = parts(spreads, n_head_kv, d)
    expected = reference.spread_scores(query.astype(np.float64), means, wide)
    r = n_head // n_head_kv
    most = np.repeat(np.linalg.norm(means, axis=2) + wide * np.sqrt(d), r, axis=1) @ np.linalg.norm(query, axis=1)
    check("spread", scores, expected, most, bound="spread" if impl in EXACT else "spread rounded")


def test_a_long_row_is_scored_in_parts(impl: int, rng: np.random.Generator) -> None:
    """40 heads of 256: more than a query packed on the stack, or in a GPU's shared memory, has room for."""
    query, keys = rng.normal(size=(40, 256)).astype(np.float32), half(rng.normal(size=(5, 40, 2, 256)))
    spreads = spreads_of(impl if ALONE else 0, keys, np.zeros((40, 256), np.float32))
    expected = reference.spread_scores(query.astype(np.float64), *parts(spreads, 40, 256))
    np.testing.assert_allclose(scores_of(impl, query, spreads, n_head_kv=40, n=5), expected, rtol=1e-4)


def test_spreads_find_the_key(impl: int, rng: np.random.Generator) -> None:
    """Of 200 chunks of keys that share a large offset, those around the query are first."""
    keys = rng.normal(size=(200, 1, 32, 64))
    query = rng.normal(size=(1, 64)).astype(np.float32)
    keys[123] += 0.7 * query[0]
    keys += 30 * rng.normal(size=64)
    centre = keys[0, :, 0].astype(np.float32)
    spreads = spreads_of(impl, half(keys), centre)
    assert scores_of(impl, query, spreads, n_head_kv=1, n=200).argmax() == 123


def test_odd_inputs(impl: int) -> None:
    """Nothing to score; keys that are all alike; a query of zeros; a head too large; keys that are not finite."""
    assert ALONE or lib.actqkv_spread_bytes(1, 2048) == 0
    assert ALONE or lib.actqkv_spread_bytes(4, 64) == bytes_of(4, 64) == 4 * (2 * 18 + 2)
    alike, none = half(np.ones((3, 1, 4, 16))), np.zeros((1, 16), np.float32)
    call("mean", impl, ffi.NULL, 0, 1, 16, 0, pointer(none))
    assert (none == 0).all()
    spreads = spreads_of(impl, alike, none)
    query = np.ones((2, 16), np.float32)
    assert scores_of(impl, query, spreads, n_head_kv=1, n=0).size == 0
    np.testing.assert_allclose(scores_of(impl, query, spreads, n_head_kv=1, n=3), 32, rtol=1e-3)
    assert (scores_of(impl, 0 * query, spreads, n_head_kv=1, n=3) == 0).all()
    alike[1] = np.nan
    found = scores_of(impl, query, spreads_of(impl, alike, none), n_head_kv=1, n=3)
    np.testing.assert_allclose(found[[0, 2]], 32, rtol=1e-3)
