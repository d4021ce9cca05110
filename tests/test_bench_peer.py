"""Breaks when the stand-in for a long context of llama.cpp costs another time than a context that it read."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))  # models/ belongs to the repository, not to the installed package

from actqkv_cpp import Llama, machine
from actqkv_cpp.bench.engines import LinkedPeer
from models import random_weights

DEPTH, N_COPIED, N_WINDOW, N_ANSWER = 16384, 2048, 256, 9
N_ROUNDS = 11
BOUND = 1.15  # medians of contexts that were made alike differ by up to 1.1 on a shared machine


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LinkedPeer]]:
    """Two contexts of S160: one has read all of its tokens, one copies of an eighth of them."""
    path = tmp_path_factory.mktemp("peer") / "s160.gguf"
    random_weights.write(path, shape="s160", file_type="q4_k_m")
    tokens = np.random.default_rng(0).integers(10, 31000, DEPTH + 1).astype(np.int32)
    with ExitStack() as stack:
        llm = stack.enter_context(Llama(path, n_ctx=512, verbose=False))
        made = {}
        for name, n_read in (("read", DEPTH), ("copied", N_COPIED)):
            engine = LinkedPeer(llm._model, n_batch=N_WINDOW, n_threads=machine.available_cores(), kv_type="f16")
            made[name] = stack.enter_context(closing(engine))
            engine.open(DEPTH + 2 * N_WINDOW)
            engine.fill(tokens, n_read=n_read, keep=True, progress=lambda n, of: None)
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "n_tokens"), [(LinkedPeer.prefill, N_WINDOW), (LinkedPeer.decode, N_ANSWER)], ids=["prefill", "decode"]
)
def test_copies_take_as_long(
    contexts: dict[str, LinkedPeer], phase: Callable[[LinkedPeer, np.ndarray], float], n_tokens: int
) -> None:
    """The copies are attended in another way than what was read, and llama.cpp's figures are of something else."""
    assert contexts["copied"].copied
    assert not contexts["read"].copied
    tokens = np.random.default_rng(1).integers(10, 31000, n_tokens).astype(np.int32)
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    for n_round in range(N_ROUNDS):
        for name in sorted(contexts, reverse=n_round % 2 == 1):
            seconds[name].append(phase(contexts[name], tokens))
            contexts[name].rewind()
    ratio = statistics.median(seconds["copied"]) / statistics.median(seconds["read"])
    assert 1 / BOUND < ratio < BOUND, {name: sorted(times) for name, times in seconds.items()}
