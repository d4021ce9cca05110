"""When this fails, a plan made on a GPU attends other chunks than it chose. The GPU alone has these kernels."""

from __future__ import annotations

import numpy as np
import ops_reference as reference
import pytest
from ops_support import ALONE, ARRAYS, EMULATED, ON_GPU, Guarded, check, gpu, pointer


@pytest.fixture(params=[EMULATED, pytest.param(ON_GPU, marks=pytest.mark.cuda)], ids=["emulated", "cuda"])
def impl(request: pytest.FixtureRequest) -> int:
    if ALONE and request.param != ON_GPU:
        pytest.skip("the GPU's kernels alone are here")
    return int(request.param)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (20, 7), (736, 138)])
@pytest.mark.parametrize("n_head", [1, 7, 32])
def test_elected_chunks(impl: int, rng: np.random.Generator, *, n: int, k: int, n_head: int) -> None:
    """The votes of all heads decide, and the names of the best are given in their order."""
    scores = (5 * rng.normal(size=(n_head, n))).astype(np.float32)
    candidates = np.sort(rng.choice(10_000, n, replace=False)).astype(np.int32)
    votes, at, elected = Guarded((1, n)), Guarded(k, np.int32), Guarded(k, np.int32)
    arguments = (pointer(scores), n, n_head, k, pointer(candidates), pointer(votes), pointer(at), pointer(elected))
    gpu(impl).call("elect", arguments, ARRAYS)
    for output in (votes, at, elected):
        output.check()
    expected = reference.vote(scores.astype(np.float64), 1, by_sum=True)
    check("vote", votes.array, expected, np.full(expected.shape, 6.0))
    assert (elected.array == candidates[np.sort(np.argsort(-expected[0])[:k])]).all()
    assert (elected.array == candidates[at.array]).all()


@pytest.mark.parametrize("n_bytes", [2, 34, 48, 16_400, 18_002])
@pytest.mark.parametrize("hot", [True, False], ids=["some hot", "all there"])
def test_gathered_chunks(impl: int, rng: np.random.Generator, *, n_bytes: int, hot: bool) -> None:
    """Each from its slot, or from the rest of memory where it has none."""
    everywhere = rng.integers(0, 256, (9, n_bytes), np.uint8)
    chunks = np.array([7, 0, 3, 4], np.int32)
    slot_of = np.full(9, -1, np.int32)
    slot_of[[3, 7]] = [0, 2]
    slots = rng.integers(0, 256, (3, n_bytes + 16), np.uint8)  # what else a slot holds lies behind
    slots[0, :n_bytes], slots[2, :n_bytes] = everywhere[3], everywhere[7]
    rest = everywhere.copy()
    rest[[3, 7]] = 0
    found = Guarded((4, n_bytes), np.uint8)
    if hot:
        source = (pointer(slots), n_bytes + 16, pointer(slot_of), pointer(rest))
    else:
        source = (pointer(everywhere), n_bytes, pointer(None), pointer(None))
    gpu(impl).call("gather", (*source, pointer(chunks), 4, n_bytes, pointer(found)), ARRAYS)
    found.check()
    assert (found.array == everywhere[chunks]).all()
