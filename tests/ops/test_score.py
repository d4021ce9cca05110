"""When this fails, chunks are ranked wrongly."""

from __future__ import annotations

import numpy as np
import ops_reference as reference
import pytest
from ops_support import Guarded, check, half, lib, pointer


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 64, 333])
@pytest.mark.parametrize("width", [32, 80, 100, 1024])
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_scores_follow_the_formula(
    impl: int, rng: np.random.Generator, *, n: int, width: int, cosine: bool, n_threads: int
) -> None:
    probe = rng.normal(size=width).astype(np.float32)
    reps = half(rng.normal(size=(n, width)))
    norms = rng.uniform(0.5, 9, size=n).astype(np.float32) if cosine else None
    scores = Guarded(n)
    lib.actqkv_score(
        impl, pointer(probe), 3.5, pointer(reps), pointer(norms), n, width, 0.25, pointer(scores), n_threads
    )
    scores.check()
    expected = reference.score(probe.astype(np.float64), reps.astype(np.float64), norms, 3.5, 0.25)
    lengths = np.linalg.norm(probe) * np.linalg.norm(reps.astype(np.float64), axis=1)
    check("score", scores.array, expected, 0.25 * lengths / (1 if norms is None else 3.5 * norms))


@pytest.mark.parametrize("probe_norm", [0.0, 2.0, np.inf, np.nan])
def test_a_norm_that_cannot_divide_scores_zero(impl: int, probe_norm: float) -> None:
    probe, reps = np.ones(64, np.float32), half(np.ones((4, 64)))
    norms = np.array([8, 0, np.nan, np.inf], np.float32)
    scores = Guarded(4)
    lib.actqkv_score(impl, pointer(probe), probe_norm, pointer(reps), pointer(norms), 4, 64, 1.0, pointer(scores), 1)
    np.testing.assert_array_equal(scores.array, [4 if probe_norm == 2 else 0, 0, 0, 0])
