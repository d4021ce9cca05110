"""Calls the kernels through cffi on arrays with guard bytes, and the error bound of every op.

On a machine with a GPU and without llama-cpp-python, ACTQKV_TEST_CUDA names a libactqkv_cuda to test, alone; on one of
another kind (tests/neon.py), ACTQKV_TEST_KERNELS a library of native/kernels/cpu.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_library import CUDA, ROOT, Gpu, build_emulated

ALONE, KERNELS = os.environ.get("ACTQKV_TEST_CUDA"), os.environ.get("ACTQKV_TEST_KERNELS")
if ALONE or KERNELS:
    from cffi import FFI

    sys.path.insert(0, str(ROOT / "bindings"))
    from build_ffi import declarations

    ffi = FFI()
    ffi.cdef(declarations(ROOT / "native/kernels/kernels.h") + declarations(CUDA / "kernels_cuda.h"))
    ffi.cdef("const struct actqkv_cuda * actqkv_cuda_table(void);")
    cpu = ffi.dlopen(KERNELS) if KERNELS else None
else:
    import llama_cpp  # noqa: F401  first: our module links to the libraries that it loads

    from actqkv_cpp._actqkv import ffi
    from actqkv_cpp._actqkv import lib as cpu

NAMES = {0: "scalar", 1: "avx2", 2: "avx512", 3: "neon", 4: "avx512-vnni", 100: "emulated", 101: "cuda"}
EMULATED, ON_GPU = 100, 101  # the CUDA kernels: on the host, on a GPU


def impls() -> list[Any]:
    """Every impl: those that this machine's processor runs (one with AVX-512 has AVX2), and the CUDA kernels."""
    if ALONE:
        return [pytest.param(ON_GPU, marks=pytest.mark.cuda)]
    own = [0, *{0: (), 1: (1,), 2: (1, 2), 3: (3,), 4: (1, 2, 4)}[cpu.actqkv_impl_best()]]
    return own if KERNELS else [*own, EMULATED, pytest.param(ON_GPU, marks=pytest.mark.cuda)]


def cpu_impls() -> list[int]:
    """Those of kernels that a GPU has not."""
    return [i for i in impls() if isinstance(i, int) and i < EMULATED]


def table_at(path: str | None) -> Any:
    """The functions of a libactqkv_cuda, None: of the installed one. Skips the test where it does not load."""
    if ALONE:
        return ffi.dlopen(path).actqkv_cuda_table()
    reason = ffi.new("char[]", 512)
    table = cpu.actqkv_cuda_load(ffi.NULL if path is None else path.encode(), reason, len(reason))
    if table == ffi.NULL:
        pytest.skip(f"no CUDA kernels: {ffi.string(reason).decode()}")
    return table


@functools.cache
def gpu(impl: int) -> Gpu:
    """The GPU, or what stands for it. Skips the test where there is none."""
    if KERNELS:
        pytest.skip("kernels of a CPU alone")
    if impl == EMULATED:
        try:
            return Gpu(ffi, table_at(str(build_emulated())))
        except FileNotFoundError as error:
            pytest.skip(str(error))
    table, n = table_at(ALONE or os.environ.get("ACTQKV_CUDA_LIBRARY")), ffi.new("int32_t *")
    status = table.n_devices(n)
    if status != 0 or n[0] == 0:
        pytest.skip(f"no GPU: {ffi.string(table.error_text(status)).decode() if status else 'the driver has none'}")
    return Gpu(ffi, table)


WITHOUT_IMPL = (
    "actqkv_turn",
    "actqkv_stretch_bytes",
    "actqkv_stretch_cells",
    "actqkv_stretch_is_sound",
    "actqkv_stretch_scratch",
    "actqkv_search_cells",
    "actqkv_search_scratch",
    "actqkv_mean",
    "actqkv_spread",
    "actqkv_spread_bytes",
    "actqkv_spread_query",
    "actqkv_spread_query_size",
    "actqkv_row_bytes",
    "actqkv_store_rows",
    "actqkv_attend_scratch",
)


class Kernels:
    """The functions of kernels.h by their names. impl comes first where there are several."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(impl: int, *arguments: Any) -> Any:
            if impl >= EMULATED:
                return gpu(impl).call(name.removeprefix("actqkv_"), arguments, ARRAYS)
            if ALONE:
                pytest.skip("compares with the CPU's kernels, which are not here")
            return getattr(cpu, name)(impl, *arguments)

        if name in WITHOUT_IMPL:
            return (lambda *arguments: 0) if ALONE else getattr(cpu, name)
        return call


lib = Kernels()
ARRAYS: dict[int, memoryview] = {}  # what pointer() was asked for: the memory around it, by address


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
    "spread": 1e-11,  # by what the products and the reach are at most, which may cancel; queries added up in float
    "spread rounded": 1e-9,  # the same; queries rounded to 16 bits
    "cells": 1e-6,  # by |query| |centre|, which may cancel, and the reach; queries rounded to 8 bits
    "vote": 1e-12,  # by the size of the scores: a difference of them
    "entropy": 1e-12,  # of 1 + h: h is a difference of numbers near ln n, so its error is absolute, about 1e-6
    "attend.out": 1e-11,  # e^x by polynomial, logits of magnitude 10 rounded in float
    "attend.sums": 1e-11,
    "attend.mass": 1e-11,
    "attend.rounded": 1e-6,  # a GPU's window of quantised rows: tensor cores take their values once rounded to half
}


def nmse(actual: npt.ArrayLike, expected: npt.ArrayLike, size: npt.ArrayLike | None = None) -> float:
    """size: what the error is measured by where results may cancel to nearly 0; default the expected values."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    by = np.broadcast_to(b if size is None else np.asarray(size, np.float64), b.shape)
    return float(((a - b) ** 2).sum() / max((by**2).sum(), 1e-30))


def check(
    op: str,
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    size: npt.ArrayLike | None = None,
    *,
    bound: str | None = None,
) -> None:
    """bound: its name in the table, where it is not the op's own."""
    assert np.shape(actual) == np.shape(expected)
    assert np.all(np.isfinite(actual)), op
    error = nmse(actual, expected, size)
    most = BOUNDS[bound or op]
    assert error <= most, f"{op}: NMSE {error:.2e}, bound {most:.0e}"


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
    around = array._all if isinstance(array, Guarded) else a
    ARRAYS[a.ctypes.data] = memoryview(around.reshape(-1).view(np.uint8)) if around.size else memoryview(bytearray(16))
    return ffi.cast(TYPES[a.dtype.name], a.ctypes.data)


KV_TYPES = {name[len("ACTQKV_KV_") :].lower(): n for n, name in ffi.typeof("enum actqkv_kv_type").elements.items()}


def half(x: npt.ArrayLike) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(np.asarray(x), np.float16)
