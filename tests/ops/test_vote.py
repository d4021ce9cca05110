"""When this fails, a KV head attends chunks that its query heads did not vote for."""

from __future__ import annotations

import numpy as np
import ops_reference as reference
import pytest
from ops_support import Guarded, check, half, lib, pointer


@pytest.mark.parametrize("n", [1, 2, 5, 64, 333])
@pytest.mark.parametrize("width", [32, 80, 256])
@pytest.mark.parametrize(("n_head", "n_blocks"), [(4, 4), (8, 2), (7, 1), (40, 2)])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_scores_of_every_head(
    impl: int, rng: np.random.Generator, *, n: int, width: int, n_head: int, n_blocks: int, n_threads: int
) -> None:
    queries = rng.normal(size=(n_head, width)).astype(np.float32)
    reps = half(rng.normal(size=(n_blocks, n + 3, width)))  # blocks lie apart
    scores = Guarded((n_head, n))
    lib.actqkv_head_scores(
        impl, pointer(queries), pointer(reps), (n + 3) * width, n_blocks, n, width, n_head, pointer(scores), n_threads
    )
    scores.check()
    of_blocks = reps[:, :n].astype(np.float64)
    expected = reference.head_scores(queries.astype(np.float64), of_blocks)
    lengths = np.repeat(np.linalg.norm(of_blocks, axis=2), n_head // n_blocks, axis=0)
    check("score", scores.array, expected, lengths * np.linalg.norm(queries, axis=1)[:, None])


@pytest.mark.parametrize("n", [1, 2, 47, 1000])
@pytest.mark.parametrize("by_sum", [False, True], ids=["max", "sum"])
@pytest.mark.parametrize(("n_head", "n_head_kv"), [(4, 4), (8, 2), (7, 1), (70, 1)])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_votes_follow_the_formula(
    impl: int, rng: np.random.Generator, *, n: int, by_sum: bool, n_head: int, n_head_kv: int, spread: float
) -> None:
    scores = (rng.normal(size=(n_head, n)) * spread).astype(np.float32)
    votes = Guarded((n_head_kv, n))
    lib.actqkv_vote(impl, pointer(scores), n, n_head, n_head_kv, by_sum, pointer(votes), 2)
    votes.check()
    expected = reference.vote(scores.astype(np.float64), n_head_kv, by_sum=by_sum)
    check("vote", votes.array, expected, np.full(expected.shape, 1 + spread))


def test_votes_by_hand(impl: int) -> None:
    """A head with one clear favourite outvotes a head that is sure of nothing; far below, order is kept."""
    scores = np.array([[0, 0, 0, 0], [-400, -300, 0, -500]], np.float32)
    votes = Guarded((1, 4))
    lib.actqkv_vote(impl, pointer(scores), 4, 2, 1, False, pointer(votes), 1)
    np.testing.assert_allclose(votes.array[0], [np.log(0.25), np.log(0.25), 0, np.log(0.25)], atol=1e-6)
    lib.actqkv_vote(impl, pointer(scores[1:].copy()), 4, 1, 1, False, pointer(votes), 1)
    assert list(np.argsort(-votes.array[0])) == [2, 1, 0, 3]


def test_no_chunks(impl: int) -> None:
    scores, votes = Guarded((2, 0)), Guarded((1, 0))
    lib.actqkv_vote(impl, pointer(scores), 0, 2, 1, False, pointer(votes), 2)
    votes.check()
