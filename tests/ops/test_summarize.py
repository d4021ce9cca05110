"""When this fails, closed chunks are stood for by the wrong keys."""

from __future__ import annotations

import numpy as np
import ops_reference as reference
import pytest
from ops_support import Guarded, check, half, lib, pointer

KINDS = [reference.HEAD, reference.KV_HEAD, reference.MEAN, reference.BOUNDS]


def run(impl, kind, n_rep, keys, sums):  # type: ignore[no-untyped-def]
    """keys [G][c][d] float16, sums [H][c] float32, both inside wider arrays so that the strides matter."""
    n_head, n_head_kv, c, d = len(sums), *keys.shape
    wide_keys = np.full((n_head_kv, c + 3, d), 99, np.float16)
    wide_keys[:, :c] = keys
    wide_sums = np.full((n_head, c + 5), 1e9, np.float32)
    wide_sums[:, :c] = sums
    n_rows = {reference.HEAD: n_head, reference.BOUNDS: 2 * n_head_kv}.get(kind, n_head_kv)
    rep, norm = Guarded((n_rows, d), np.float16), Guarded(1)
    lib.actqkv_summarize(
        impl, kind, n_rep, pointer(wide_keys), (c + 3) * d, pointer(wide_sums), c + 5, n_head, n_head_kv, d, c,
        pointer(rep), pointer(norm),
    )  # fmt: skip
    rep.check()
    norm.check()
    return rep.array, float(norm.array[0])


@pytest.mark.parametrize("kind", KINDS, ids=["head", "kv_head", "mean", "bounds"])
@pytest.mark.parametrize(("n_head", "n_head_kv"), [(4, 4), (8, 4), (8, 2), (8, 1), (14, 2)])
@pytest.mark.parametrize(("c", "d", "n_rep"), [(32, 64, 4), (16, 80, 1), (31, 300, 7), (1, 32, 4), (4, 20, 4)])
def test_summary_follows_the_formula(
    impl: int, rng: np.random.Generator, *, kind: int, n_head: int, n_head_kv: int, c: int, d: int, n_rep: int
) -> None:
    keys = half(rng.normal(size=(n_head_kv, c, d)))
    sums = rng.uniform(0, 3, size=(n_head, c)).astype(np.float32)
    rep, norm = run(impl, kind, n_rep, keys, sums)
    expected, expected_norm = reference.summarize(kind, n_rep, keys.astype(np.float64), sums.astype(np.float64))
    check("summarize.rep", rep.astype(np.float64), expected)
    check("summarize.norm", [norm], [expected_norm])


@pytest.mark.parametrize("case", ["ties", "too few", "none", "not finite"])
@pytest.mark.parametrize("kind", KINDS[:2], ids=["head", "kv_head"])
def test_degenerate_attention(impl: int, rng: np.random.Generator, *, kind: int, case: str) -> None:
    c, d = 32, 64
    keys = half(rng.normal(size=(2, c, d)))
    sums = np.zeros((4, c), np.float32)
    if case == "ties":  # the lower index wins, also among the largest
        sums[:] = 1
        sums[:, 20:22] = 2
    elif case == "too few":
        sums[:, 3:6] = 1
    elif case == "not finite":
        sums[:, 1:7] = 1
        sums[:, 2] = np.nan
        sums[:, 9] = np.inf
    rep, norm = run(impl, kind, 4, keys, sums)
    expected, expected_norm = reference.summarize(kind, 4, keys.astype(np.float64), sums.astype(np.float64))
    check("summarize.rep", rep.astype(np.float64), expected)
    check("summarize.norm", [norm], [expected_norm])
