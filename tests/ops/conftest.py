"""Fixtures of the op tests: the impl, and a generator whose seed is printed when a test fails."""

from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np
import pytest
from ops_support import EMULATED, NAMES, cpu_impls, impls


def is_repeated(params: dict[str, Any]) -> bool:
    """Whether it says nothing new of a GPU, which knows no n_threads, or is one of those that take the emulator seconds
    each and that others stand for: many queries, with every ratio of heads and every place where sums begin."""
    if params.get("impl", 0) < EMULATED:
        return False
    m, ratio = params.get("m"), (params.get("n_head"), params.get("n_head_kv"))
    many = (m == 70 or (m == 45 and params["n_far"] > 3)) and ratio != (8, 2)
    summed = m == 12 and params.get("first_summed", 90) != 90
    return params.get("n_threads", 1) > 1 or (params["impl"] == EMULATED and (many or summed))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not is_repeated(getattr(getattr(item, "callspec", None), "params", {}))]


@pytest.fixture(params=impls(), ids=lambda i: NAMES[i])
def impl(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=cpu_impls(), ids=lambda i: NAMES[i])
def cpu_impl(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name, so that a failure repeats; ACTQKV_TEST_SEED draws other inputs."""
    seed = zlib.crc32(request.node.name.encode()) + int(os.environ.get("ACTQKV_TEST_SEED", "0"))
    print(f"seed {seed}")
    return np.random.default_rng(seed)
