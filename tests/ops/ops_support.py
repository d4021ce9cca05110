"""Calls the kernels through cffi on arrays with guard bytes, and the error bound of every op."""

from __future__ import annotations

from typing import Any

import llama_cpp  # noqa: F401  first: our module links to the libraries that it loads
import numpy as np
import numpy.typing as npt

from actqkv_cpp._actqkv import ffi, lib

NAMES = {0: "scalar", 1: "avx2", 2: "avx512", 3: "neon", 4: "avx512-vnni"}


def impls() -> list[int]:
    """Every impl this machine runs: a processor with AVX-512 also has AVX2."""
    return [0, *{0: (), 1: (1,), 2: (1, 2), 3: (3,), 4: (1, 2, 4)}[lib.actqkv_impl_best()]]


# Largest normalised mean square error against float64. float has 24 bits: one rounding is about 1e-15 here, and sums
# of n terms in float add a few times that; half has 11 bits: one rounding is about 3e-8.
BOUNDS = {
    "probe.mean": 1e-12,  # by the length of the queries: a mean may cancel
    "probe.var": 1e-11,  # squares double the relative error
    "probe.bias": 1e-11,
    "probe.weights": 1e-11,
    "probe.probe": 1e-12,  # by the length of the queries
    "summarize.rep": 1e-7,  # stored in half
    "summarize.norm": 1e-7,  # of a mean that may round to the other neighbour in half
    "refine": 1e-12,  # by the sum over heads of |q| |k|
    "refine quantised": 1e-9,  # the same; queries rounded to 16 bits: half a step of 1/32767 of the largest, each
    "score": 1e-12,  # by |probe| |rep|: a dot product may cancel
    "vote": 1e-12,  # by the size of the scores: a difference of them
    "entropy": 1e-12,  # of 1 + h: h is a difference of numbers near ln n, so its error is absolute, about 1e-6
    "attend.out": 1e-11,  # e^x by polynomial, logits of magnitude 10 rounded in float
    "attend.sums": 1e-11,
    "attend.mass": 1e-11,
}


def nmse(actual: npt.ArrayLike, expected: npt.ArrayLike, size: npt.ArrayLike | None = None) -> float:
    """size: what the error is measured by where results may cancel to nearly 0; default the expected values."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    by = np.broadcast_to(b if size is None else np.asarray(size, np.float64), b.shape)
    return float(((a - b) ** 2).sum() / max((by**2).sum(), 1e-30))


def check(op: str, actual: npt.ArrayLike, expected: npt.ArrayLike, size: npt.ArrayLike | None = None) -> None:
    assert np.shape(actual) == np.shape(expected)
    assert np.all(np.isfinite(actual)), op
    error = nmse(actual, expected, size)
    assert error <= BOUNDS[op], f"{op}: NMSE {error:.2e}, bound {BOUNDS[op]:.0e}"


GUARD = 64  # elements on either side


class Guarded:
    """An output array between guard bytes; inside it starts as the same pattern, so that gaps show too."""

    def __init__(self, shape: tuple[int, ...] | int, dtype: npt.DTypeLike = np.float32) -> None:
        n = int(np.prod(shape))
        self._all = np.empty(n + 2 * GUARD, dtype)
        self._all.view(np.uint8)[:] = 0xA5
        self.array = self._all[GUARD : GUARD + n].reshape(shape)

    def check(self) -> None:
        for edge in (self._all[:GUARD], self._all[-GUARD:]):
            assert np.all(np.ascontiguousarray(edge).view(np.uint8) == 0xA5), "written outside the output"

    @property
    def untouched(self) -> npt.NDArray[np.bool_]:
        """Elements that still hold the pattern."""
        size = self.array.itemsize
        raw = np.ascontiguousarray(self.array).view(np.uint8).reshape(*self.array.shape, size)
        return np.asarray(np.all(raw == 0xA5, axis=-1))


TYPES = {
    "float32": "float *",
    "float64": "double *",
    "float16": "actqkv_f16 *",
    "int32": "int32_t *",
    "uint8": "uint8_t *",
}


def pointer(array: npt.NDArray[Any] | Guarded | None) -> Any:
    """The array as the kernel's type; the caller keeps it alive."""
    if array is None:
        return ffi.NULL
    a = array.array if isinstance(array, Guarded) else array
    assert a.flags["C_CONTIGUOUS"] or isinstance(array, Guarded)
    return ffi.cast(TYPES[a.dtype.name], a.ctypes.data)


KV_TYPES = {"f16": lib.ACTQKV_KV_F16, "q8_0": lib.ACTQKV_KV_Q8_0, "q4_0": lib.ACTQKV_KV_Q4_0}


def half(x: npt.ArrayLike) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(np.asarray(x), np.float16)
