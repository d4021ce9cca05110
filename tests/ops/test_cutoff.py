"""When this fails, layers get the wrong number of chunks, or not their best ones."""

from __future__ import annotations

import numpy as np
import ops_reference as reference
import pytest
from ops_support import Guarded, check, lib, pointer


@pytest.mark.parametrize("n", [0, 1, 2, 3, 15, 16, 17, 1000, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.001])
def test_entropy_follows_the_formula(impl: int, rng: np.random.Generator, *, n: int, temperature: float) -> None:
    scores = rng.uniform(-1, 1, size=n).astype(np.float32)
    actual = lib.actqkv_entropy(impl, pointer(scores), n, temperature)
    expected = reference.entropy(scores.astype(np.float64), np.float32(temperature))
    assert 0 <= actual <= 1
    check("entropy", [1 + actual], [1 + expected])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_entropy_of_what_is_not_finite_is_zero(impl: int, value: float) -> None:
    scores = np.zeros(20, np.float32)
    scores[7] = value
    assert lib.actqkv_entropy(impl, pointer(scores), 20, 1.0) == 0


def test_entropy_ends(impl: int) -> None:
    flat = np.full(77, 0.3, np.float32)
    assert lib.actqkv_entropy(impl, pointer(flat), 77, 1.0) == pytest.approx(1, abs=1e-6)
    assert lib.actqkv_entropy(impl, pointer(flat), 77, 0.0) == 0
    peak = flat.copy()
    peak[5] = 1e4
    assert lib.actqkv_entropy(impl, pointer(peak), 77, 1.0) == 0


@pytest.mark.parametrize(
    ("scores", "temperature"),
    [([0.0, 1e30], 1e-10), ([-3e38, 3e38], 1.0), ([0.0, 5.0], 1e-38), ([0.0, 5.0], 1e-45), ([2.0, 2.0], 1e-45)],
)
def test_entropy_of_scores_that_lie_far_apart(impl: int, scores: list[float], temperature: float) -> None:
    """Of such scores only the greatest count, 20 of 40 or all."""
    n_greatest = 20 * scores.count(max(scores))
    array = np.array(20 * scores, np.float32)
    expected = np.log(n_greatest) / np.log(40)
    assert lib.actqkv_entropy(impl, pointer(array), 40, temperature) == pytest.approx(expected, abs=1e-6)


def chosen(impl: int, scores: np.ndarray, k: int) -> list[int]:  # type: ignore[type-arg]
    out, scratch = Guarded(max(min(k, len(scores)), 0), np.int32), Guarded(len(scores), np.int32)
    lib.actqkv_top_k(impl, pointer(scores), len(scores), k, pointer(out), pointer(scratch))
    out.check()
    scratch.check()
    return list(out.array)


@pytest.mark.parametrize("n", [0, 1, 2, 47, 1000])
@pytest.mark.parametrize("k", [0, 1, 46, 1000, 2000])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k(impl: int, rng: np.random.Generator, n: int, k: int, ties: bool) -> None:
    scores = rng.normal(size=n).astype(np.float32)
    if ties:
        scores = np.round(scores)
    assert chosen(impl, scores, k) == list(reference.top_k(scores.astype(np.float64), k))


@pytest.mark.parametrize(
    ("n", "k"),
    [
        *[(65, 1), (64, 64), (257, 64), (255, 64), (193, 16), (20_000, 1), (20_000, 17)],
        *[(4097, 1024), (4099, 1025), (1025, 1024), (1026, 1024), (9000, 2000), (50_000, 1023), (50_000, 1024)],
    ],
)
@pytest.mark.parametrize(
    "kind", ["any", "ties", "equal", "rising", "falling", "few above", "best together", "infinite"]
)
def test_top_k_of_many(impl: int, rng: np.random.Generator, *, n: int, k: int, kind: str) -> None:
    """Where the best are looked for among the greatest of every so many: wherever those lie, and however many tie."""
    scores = rng.normal(size=n).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "equal":
        scores[:] = -2.5
    elif kind in {"rising", "falling"}:
        scores = np.sort(scores)[:: 1 if kind == "rising" else -1].copy()
    elif kind == "few above":  # fewer than k, and the others tie
        scores[:] = -1
        scores[rng.integers(0, n, size=k // 2 + 1)] = 2
    elif kind == "best together":  # in the same place of every stride
        scores[: n // 2] += 50 * (np.arange(n // 2) % max(4 * k, 64) < 3)
    elif kind == "infinite":
        scores[rng.integers(0, n, size=k // 2 + 1)] = np.inf
        scores[rng.integers(0, n, size=n // 2)] = -np.inf
    assert chosen(impl, scores, k) == list(reference.top_k(scores.astype(np.float64), k))


@pytest.mark.parametrize("outlier", [-1e30, 1e30, np.nan])
def test_top_k_beside_an_outlier(impl: int, rng: np.random.Generator, outlier: float) -> None:
    """One far value makes the range of scores so wide that all others fall into one part of it."""
    scores = (100 + rng.normal(size=500)).astype(np.float32)
    scores[77] = outlier
    assert chosen(impl, scores, 46) == list(reference.top_k(scores.astype(np.float64), 46))


def test_top_k_order_of_special_values(impl: int) -> None:
    scores = np.array([np.nan, -np.inf, 0.0, -0.0, np.inf, 0.0, np.nan], np.float32)
    assert chosen(impl, scores, 1) == [4]
    assert chosen(impl, scores, 3) == [2, 3, 4]
    assert chosen(impl, scores, 5) == [1, 2, 3, 4, 5]
    assert chosen(impl, scores, 6) == [0, 1, 2, 3, 4, 5]


def test_top_k_equal_scores_keep_order(impl: int) -> None:
    assert chosen(impl, np.zeros(100, np.float32), 7) == list(range(7))
