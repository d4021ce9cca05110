"""When this fails, keys and values are stored wrongly."""

from __future__ import annotations

import numpy as np
import pytest
from ops_support import Guarded, lib, pointer


def convert(impl: int, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    out = Guarded(len(x), np.float16)
    lib.actqkv_to_f16(impl, pointer(x), pointer(out), len(x))
    out.check()
    return out.array


@pytest.mark.parametrize("n", [0, 1, 7, 16, 33, 1000])
def test_random_numbers(impl: int, rng: np.random.Generator, n: int) -> None:
    x = (rng.normal(size=n) * 10.0 ** rng.integers(-9, 6, size=n)).astype(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(convert(impl, x).view(np.uint16), x.astype(np.float16).view(np.uint16))


def test_every_half_and_the_ties_between(impl: int) -> None:
    h = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (h[:-1] + h[1:]) / 2
    x = np.concatenate([h, -h, ties, -ties, np.nextafter(ties, 0), [np.inf, -np.inf, 65519, 65520, 1e30]])
    x = np.ascontiguousarray(x, np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(convert(impl, x).view(np.uint16), x.astype(np.float16).view(np.uint16))
    assert np.isnan(convert(impl, np.array([np.nan], np.float32))[0])
