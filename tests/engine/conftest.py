"""Fixtures of the engine tests: one tiny model that most of them share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_gguf as tiny
from engine_support import loaded
from llama_cpp._internals import LlamaModel


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    """A tiny llama in F32 of 3 layers, 4 query heads and 2 KV heads."""
    with loaded(tiny.make_tiny_gguf(tmp_path_factory.mktemp("engine") / "model.gguf")) as model:
        yield model
