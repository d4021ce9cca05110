"""When this fails, an answer's chunks are chosen by wrong scores."""

from __future__ import annotations

import numpy as np
import ops_reference as reference
import pytest
from ops_support import EMULATED, KV_TYPES, Guarded, check, half, lib, pointer


@pytest.mark.parametrize(("n_head", "n_head_kv"), [(4, 4), (8, 2), (7, 1), (40, 2)])
@pytest.mark.parametrize(("d_head", "c"), [(64, 32), (80, 5), (96, 33), (128, 100), (256, 32)])
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_scores_are_the_best_keys(
    impl: int,
    rng: np.random.Generator,
    *,
    n_head: int,
    n_head_kv: int,
    d_head: int,
    c: int,
    n_threads: int,
    kv_type: str,
) -> None:
    query = rng.normal(size=(n_head, d_head)).astype(np.float32)
    rows = reference.store_rows(kv_type, half(rng.normal(size=(9, n_head_kv, c, d_head))))
    keys = reference.load_rows(kv_type, rows, d_head)
    chunks = np.array([0, 3, 4, 8], np.int32)
    scores = Guarded((n_head, len(chunks)))
    lib.actqkv_refine(
        impl,
        pointer(query),
        KV_TYPES[kv_type],
        pointer(rows),
        pointer(chunks),
        len(chunks),
        n_head,
        n_head_kv,
        d_head,
        c,
        0.125,
        pointer(scores),
        n_threads,
    )
    scores.check()
    expected = 0.125 * reference.refine(query.astype(np.float64), keys[chunks])
    lengths = 0.125 * np.linalg.norm(query, axis=1)[:, None] * np.sqrt(np.square(keys[chunks]).sum(axis=(1, 2, 3)))
    exact = kv_type == "f16" or impl == 0 or impl >= EMULATED
    check("refine" if exact else "refine quantised", scores.array, expected, lengths)


def test_no_candidates(impl: int) -> None:
    query, keys, scores = np.ones((2, 32), np.float32), np.ones(512, np.uint8), Guarded(0)
    none = np.empty(0, np.int32)
    f16 = KV_TYPES["f16"]
    lib.actqkv_refine(impl, pointer(query), f16, pointer(keys), pointer(none), 0, 2, 2, 32, 4, 1.0, pointer(scores), 2)
    scores.check()
