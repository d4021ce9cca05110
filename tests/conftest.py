"""Fixtures that several folders share: tiny models, the bundled one, and a cache folder of the run's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_gguf import make_tiny_gguf

import actqkv_cpp
from actqkv_cpp import Llama, Retrieval

N_THREADS = 1  # two test runs on two cores must not spin against each other


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run in an empty folder, and their child processes import the same actqkv_cpp as they do: in the
    repository's root Python would find the source folder, which has no built module, before the installed package.
    Verdicts about the machine are the run's own; the first one takes a second.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        patch.setenv("PYTHONPATH", str(Path(actqkv_cpp.__file__).parents[1]), prepend=os.pathsep)
        patch.setenv("ACTQKV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in F32 with a chat template."""
    return make_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Llama]:
    """A Llama over the tiny model, dense method, n_ctx 1024. Its history is whatever the last test left."""
    with_dense = Retrieval("dense", n_local=64, window=32, n_sink=4, chunk=16)
    llm = Llama(tiny_model, n_ctx=1024, n_threads=N_THREADS, retrieval=with_dense, verbose=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def needle() -> Iterator[Llama]:
    """A Llama over the bundled model, default method, n_ctx 8192."""
    llm = Llama(n_ctx=8192, n_threads=N_THREADS, verbose=False)
    yield llm
    llm.close()
