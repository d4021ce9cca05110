"""When this fails, closed chunks hold other keys and values than were read, or not those that llama.cpp would."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import ops_reference as reference
import pytest
from ops_support import KV_TYPES, Guarded, half, lib, pointer

QUANTISED = ["q8_0", "q4_0"]


def stored(kv_type: str, x: npt.NDArray[np.float16], *, turned: bool = False) -> npt.NDArray[np.uint8]:
    n_bytes = lib.actqkv_row_bytes(KV_TYPES[kv_type], x.shape[-1])
    out = Guarded((*x.shape[:-1], n_bytes), np.uint8)
    lib.actqkv_store_rows(KV_TYPES[kv_type], turned, pointer(x), x[..., 0].size, x.shape[-1], pointer(out))
    out.check()
    return out.array


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("d", [16, 32, 64, 80, 96, 128, 256])
def test_rows_are_the_definition(rng: np.random.Generator, *, kv_type: str, d: int) -> None:
    x = half(rng.normal(size=(3, 40, d)) * 10.0 ** rng.integers(-6, 4, size=(3, 40, 1)))
    np.testing.assert_array_equal(stored(kv_type, x), reference.store_rows(kv_type, x))


@pytest.mark.parametrize("kv_type", QUANTISED)
def test_rows_are_those_of_llama_cpp(rng: np.random.Generator, kv_type: str) -> None:
    """Both ways, by the independent implementation of the format's own package."""
    x = half(rng.normal(size=(40, 128)))
    kind = gguf.GGMLQuantizationType[kv_type.upper()]
    raw = stored(kv_type, x)
    np.testing.assert_array_equal(raw, gguf.quants.quantize(x.astype(np.float32), kind))
    np.testing.assert_allclose(gguf.quants.dequantize(raw, kind), reference.load_rows(kv_type, raw, 128), rtol=1e-6)


@pytest.mark.parametrize(("kv_type", "steps"), [("q8_0", 127), ("q4_0", 8)])
def test_the_error_is_a_step_at_most(rng: np.random.Generator, *, kv_type: str, steps: int) -> None:
    """Half a step, and a whole one at q4_0's far end, which has 7 steps on one side; the scale's rounding on top."""
    x = half(rng.normal(size=(200, 64)))
    back = reference.load_rows(kv_type, stored(kv_type, x), 64)
    step = np.abs(x.astype(np.float64).reshape(200, 2, 32)).max(axis=2, keepdims=True) / steps
    error = np.abs(back - x).reshape(200, 2, 32) / step
    assert error.max() <= (0.5 if kv_type == "q8_0" else 1.0) + steps * 2.0**-11 + 1e-6


@pytest.mark.parametrize("kv_type", QUANTISED)
@pytest.mark.parametrize("value", [0.0, 65504.0, -65504.0, 6e-8, np.inf, np.nan])
def test_extreme_values_do_no_harm(kv_type: str, value: float) -> None:
    """A block of them, or one among others, leaves the other blocks of its row as they are."""
    x = half(np.full((2, 96), 0.5))
    plain = stored(kv_type, x)
    x[0, 32:64], x[1, 40] = value, value
    raw = stored(kv_type, x).reshape(2, 3, -1)
    np.testing.assert_array_equal(raw[:, [0, 2]], plain.reshape(2, 3, -1)[:, [0, 2]])
    if np.isfinite(value):
        back = reference.load_rows(kv_type, raw.reshape(2, -1), 96)
        assert np.abs(back - x.astype(np.float64)).max() <= abs(value) / 8 + 0.5


@pytest.mark.parametrize("n", [16, 48, 64, 80, 96, 128, 256, 512, 640])
def test_turned_by_hadamard(rng: np.random.Generator, n: int) -> None:
    x = rng.normal(size=(5, n)).astype(np.float32)
    turned = Guarded(x.shape)
    turned.array[:] = x
    lib.actqkv_turn(pointer(turned), 5, n)
    turned.check()
    np.testing.assert_allclose(turned.array, reference.turn(x.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(turned.array @ turned.array.T, x @ x.T, atol=1e-3)  # products stay
    lib.actqkv_turn(pointer(turned), 5, n)
    np.testing.assert_allclose(turned.array, x, atol=1e-5)


@pytest.mark.parametrize("kv_type", QUANTISED)
@pytest.mark.parametrize("d", [64, 80, 96, 256, 640])
def test_turned_rows(rng: np.random.Generator, *, kv_type: str, d: int) -> None:
    """What is turned back differs by rounding alone; a channel that sticks out no longer spoils its block."""
    x = half(rng.normal(size=(3, 50, d)))
    x[..., 7] *= 20
    errors = {}
    for turned in (False, True):
        back = reference.load_rows(kv_type, stored(kv_type, x, turned=turned), d)
        back = reference.turn(back) if turned else back
        errors[turned] = float(((back - x)[..., :16] ** 2).sum())
    assert errors[True] < errors[False] / 2
    assert np.array_equal(stored("f16", x, turned=True), stored("f16", x))


def test_bytes_of_a_row() -> None:
    expected = {"f16": (40, 160, 256), "q8_0": (0, 102, 136), "q4_0": (0, 54, 72)}
    for kv_type, sizes in expected.items():
        assert tuple(lib.actqkv_row_bytes(KV_TYPES[kv_type], d) for d in (20, 80, 128)) == sizes
    assert lib.actqkv_row_bytes(0, 128) == lib.actqkv_row_bytes(3, 128) == 0
