"""When this fails, windows are represented by the wrong probe, and retrieval misses what it should find."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import ops_reference as reference
import pytest
from ops_support import Guarded, check, ffi, lib, pointer


class State:
    """struct actqkv_running over guarded arrays."""

    def __init__(self, n_channels: int) -> None:
        self.mean, self.var = Guarded(n_channels), Guarded(n_channels)
        self.struct = ffi.new("struct actqkv_running *", {"mean": pointer(self.mean), "var": pointer(self.var)})

    def set(self, mean: npt.ArrayLike, var: npt.ArrayLike) -> State:
        self.mean.array[:], self.var.array[:] = mean, var
        self.struct.n_windows, self.struct.n_tokens = 1, 8
        return self

    def as_reference(self) -> reference.Running:
        return reference.Running(self.mean.array.astype(np.float64), self.var.array.astype(np.float64))


def queries(rng: np.random.Generator, m: int, n_channels: int) -> npt.NDArray[np.float32]:
    offset, spread = rng.normal(size=n_channels) * 3, rng.uniform(0.1, 2, size=n_channels)
    return (offset + rng.normal(size=(m, n_channels)) * spread).astype(np.float32)


@pytest.mark.parametrize("n_channels", [1, 96, 257, 1024])
@pytest.mark.parametrize("published", [False, True], ids=["pooled", "published"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_update_follows_the_formula(
    impl: int, rng: np.random.Generator, *, n_channels: int, published: bool, n_threads: int
) -> None:
    cap = 2  # reached by the windows below
    state, expected = State(n_channels), reference.Running(np.zeros(n_channels), np.zeros(n_channels))
    for m in (1, 256, 300, 7, 256):
        z = queries(rng, m, n_channels)
        lib.actqkv_probe_update(impl, state.struct, pointer(z), m, n_channels, published, cap, n_threads)
        expected = reference.probe_update(expected, z.astype(np.float64), published=published, cap=cap)
        check("probe.mean", state.mean.array, expected.mean, np.sqrt((z**2).mean(axis=0)))
        if m > 1:
            check("probe.var", state.var.array, expected.var)
        assert state.struct.n_windows == expected.n_windows
        assert state.struct.n_tokens == expected.n_tokens
    state.mean.check()
    state.var.check()


@pytest.mark.parametrize("m", [1, 5, 256, 300])
@pytest.mark.parametrize("n_channels", [32, 257, 1024])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_weights_and_mix_follow_the_formula(
    impl: int, rng: np.random.Generator, *, m: int, n_channels: int, n_threads: int
) -> None:
    z = queries(rng, m, n_channels)
    state = State(n_channels).set(rng.normal(size=n_channels), rng.uniform(0.1, 2, size=n_channels))
    bias, weights, probe = Guarded(m), Guarded(m), Guarded(n_channels)
    lib.actqkv_probe_weights(impl, state.struct, pointer(z), m, n_channels, pointer(bias), pointer(weights), n_threads)
    lib.actqkv_probe_mix(impl, pointer(z), pointer(weights), m, n_channels, pointer(probe), n_threads)
    expected_bias, expected_weights = reference.probe_weights(state.as_reference(), z.astype(np.float64))
    check("probe.bias", bias.array, expected_bias)
    check("probe.weights", weights.array, expected_weights)
    check("probe.probe", probe.array, expected_weights @ z.astype(np.float64), np.sqrt((z**2).mean(axis=0)))
    for out in (bias, weights, probe):
        out.check()


@pytest.mark.parametrize("case", ["no variance", "no bias", "variance not finite", "query not finite"])
def test_weights_fall_back_to_the_plain_mean(impl: int, case: str) -> None:
    m, n_channels = 6, 40
    z = np.ones((m, n_channels), np.float32)
    state = State(n_channels).set(1, 1)
    if case == "no variance":
        state.set(0, 0)
    elif case == "variance not finite":
        state.var.array[3] = np.inf
    elif case == "query not finite":
        z[2, 5] = np.inf
    bias, weights = Guarded(m), Guarded(m)
    lib.actqkv_probe_weights(impl, state.struct, pointer(z), m, n_channels, pointer(bias), pointer(weights), 2)
    np.testing.assert_array_equal(weights.array, np.float32(1 / m))
    if case != "query not finite":
        np.testing.assert_array_equal(bias.array, 0)
