"""Fixtures of the op tests: the impl, and a generator whose seed is printed when a test fails."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
from ops_support import EMULATED, NAMES, impls


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU knows no n_threads: one number of them is enough there."""
    given = [getattr(getattr(item, "callspec", None), "params", {}) for item in items]
    items[:] = [
        item
        for item, params in zip(items, given, strict=True)
        if params.get("impl", 0) < EMULATED or params.get("n_threads", 1) == 1
    ]


@pytest.fixture(params=impls(), ids=lambda i: NAMES[i])
def impl(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name, so that a failure repeats; ACTQKV_TEST_SEED draws other inputs."""
    seed = zlib.crc32(request.node.name.encode()) + int(os.environ.get("ACTQKV_TEST_SEED", "0"))
    print(f"seed {seed}")
    return np.random.default_rng(seed)
