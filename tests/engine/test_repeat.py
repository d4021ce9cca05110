"""Breaks when a history that was made long by copies (for measurements) costs another step than one that was read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_support import SMALL, index_bytes, open_session, random_tokens, rest_bytes, small
from llama_cpp._internals import LlamaModel
from numpy.typing import NDArray

from actqkv_cpp import ContextError, ParameterError, Retrieval
from actqkv_cpp._native import Session

METHODS: dict[str, Retrieval] = {
    "default": small(scan=64, refine=2),
    "q4_0": small(scan=64, refine=2),
    "head": small(summary="head", score="cosine", scan=0, refine=1),
    "quest-clamped": small(method="quest-clamped", chunk=16, budget=4 + 32 + 2 * 16),
    "streaming": small(prefill="none", decode="none"),
}
N_READ, N_LONG = 96, 96 + 16 * 21  # windows of 16, chunks of 8 or 16
SINK, CHUNK_TOKENS = 4, {"quest-clamped": 16}  # of the others: 8
TOKENS = random_tokens(N_LONG)
N_LAYERS = 3
KV_BYTES = (2 * 32 * 2, 2 * 18)  # of a token's keys: 2 KV heads of 32 in f16, in q4_0
SINK_BYTES = 3 * SINK * 2 * 32 * 2  # of a layer: keys in both forms, and values
CHECKSUM_BYTES = 8
OTHER_BYTES = {  # of a chunk, behind its summary: norms; the second KV head's bounds, and norms
    "head": (4,),
    "quest-clamped": (2 * 32 * 2, 4),
}


def open_of(model: LlamaModel, name: str, **options: Any) -> Session:
    return open_session(model, METHODS[name], kv_type="q4_0" if name == "q4_0" else "f16", **options)


def step(session: Session) -> dict[str, NDArray[np.float32]]:
    """One answered token; what layer 0 observed of it."""
    seen: dict[str, NDArray[np.float32]] = {}

    def observe(name: str, layer: int, n_past: int, data: NDArray[np.float32]) -> None:
        if layer == 0:
            seen[name] = data

    session.observer = observe
    session.stats_reset()
    seen["logits"] = session.decode([TOKENS[0]], phase="decode", n_logits=1)
    session.observer = None
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_a_step_costs_what_it_does_after_a_reading(name: str, tiny_llama: LlamaModel) -> None:
    """Other chunks, other bytes or other tokens attended: a benchmark over copies would measure something else."""
    with open_of(tiny_llama, name) as read, open_of(tiny_llama, name) as copied:
        read.decode(TOKENS)
        copied.decode(TOKENS[:N_READ])
        copied.repeat(N_LONG)
        assert copied.n_past == N_LONG
        seen = [step(session) for session in (read, copied)]
        assert read.n_chunks == copied.n_chunks > 0
        assert {key: data.shape for key, data in seen[0].items()} == {key: data.shape for key, data in seen[1].items()}
        stats = [session.stats() for session in (read, copied)]
        for stage in ("score", "refine", "attend", "append"):
            assert getattr(stats[0], stage).bytes == getattr(stats[1], stage).bytes
        assert stats[0].attended_tokens_max == stats[1].attended_tokens_max
        assert np.isfinite(seen[1]["logits"]).all()


@pytest.mark.parametrize("name", METHODS)
def test_copies_are_of_the_chunks_in_turn(name: str, tiny_llama: LlamaModel) -> None:
    """A copy is of another chunk, or an array of it (keys, values, summaries) or its tokens were left out."""
    chunk = CHUNK_TOKENS.get(name, 8)
    with open_of(tiny_llama, name) as session:
        session.decode(TOKENS[:N_READ])
        n_closed = (N_READ - 32 - SINK) // chunk
        session.repeat(N_LONG)
        end, more = SINK + n_closed * chunk, N_LONG - N_READ
        again = np.resize(TOKENS[SINK:end], more)
        np.testing.assert_array_equal(session.history()[0], [*TOKENS[:end], *again, *TOKENS[end:N_READ]])
        seen = step(session)
        for scores in seen.get("scores", seen.get("head_scores", np.zeros((0, 1)))).reshape(-1, session.n_chunks):
            np.testing.assert_array_equal(scores[: n_closed + more // chunk], np.resize(scores[:n_closed], len(scores)))
        for layer in layers_of_state(session, chunk, KV_BYTES[name == "q4_0"] * chunk):
            for array in layer[:2]:
                np.testing.assert_array_equal(array, np.resize(array[:n_closed], array.shape))
            for part in cut(layer[2], *OTHER_BYTES.get(name, ())):
                np.testing.assert_array_equal(part, np.resize(part[:n_closed], part.shape))


def layers_of_state(session: Session, chunk: int, kv_bytes: int) -> list[list[NDArray[np.uint8]]]:
    """Per layer keys, values [n_chunks][kv_bytes], and everything else of chunks [n_chunks][bytes], by state.cpp."""
    n_chunks, n_ctx = session.n_chunks, session.params.n_ctx
    of_layer, others = session.plan.summary_bytes // N_LAYERS, 0
    if session.params.columns["scan"] > 0:  # of so few, nothing of the index is in a state
        of_layer -= rest_bytes(chunk, n_head_kv=2, d_head=32)
        others -= index_bytes(chunk, n_head_kv=2, d_head=32)
    others += of_layer // ((n_ctx - SINK) // chunk)
    sizes = [n_chunks * kv_bytes, n_chunks * kv_bytes, n_chunks * others]
    blob = np.frombuffer(session.state_get(), np.uint8)[:-CHECKSUM_BYTES]
    layers = []
    for _ in range(N_LAYERS):
        parts = []
        for size in reversed(sizes):
            blob, part = blob[: len(blob) - size], blob[len(blob) - size :]
            parts.append(part.reshape(n_chunks, -1))
        layers.append(parts[::-1])
        blob = blob[: len(blob) - SINK_BYTES]
    return layers


def cut(array: NDArray[np.uint8], *widths: int) -> list[NDArray[np.uint8]]:
    """The arrays [n_chunks][bytes] that lie behind each other in one; `widths`: bytes of all but the first."""
    n_chunks = len(array)
    ends = np.cumsum([array.shape[1] - sum(widths), *widths]) * n_chunks
    return [part.reshape(n_chunks, -1) for part in np.split(array.reshape(-1), ends[:-1])]


def test_the_end_is_a_checkpoint(tiny_llama: LlamaModel) -> None:
    """A sample of the benchmark changes the next one, or reads the copies."""
    with open_of(tiny_llama, "default") as session:
        session.decode(TOKENS[:N_READ])
        session.repeat(N_LONG)
        logits = []
        for _ in range(2):
            logits.append(session.decode(TOKENS[:40], n_logits=1))
            session.rewind(N_LONG)
        np.testing.assert_array_equal(*logits)
        assert session.stats().n_replayed_tokens == 2 * 40
        session.repeat(N_LONG + 16)  # and once more, from there
        assert session.n_past == N_LONG + 16


@pytest.mark.parametrize(
    ("retrieval", "n_read", "wanted", "raised", "words"),
    [
        (SMALL, N_READ, 1040, ContextError, "n_ctx 1024"),
        (SMALL, N_READ, 80, ParameterError, "cannot become 80"),
        (SMALL, N_READ, N_READ + 8, ParameterError, "windows of 16"),
        (SMALL, N_READ - 1, N_LONG, ParameterError, "windows of 16"),
        (small(chunk=24), N_READ, N_READ + 32, ParameterError, "chunks of 24"),
        (SMALL, 32, N_LONG, ParameterError, "no chunk is closed"),
        (small(positions="exact"), N_READ, N_LONG, ParameterError, "clamped"),
    ],
)
def test_what_cannot_be_repeated(
    tiny_llama: LlamaModel, *, retrieval: Retrieval, n_read: int, wanted: int, raised: type[Exception], words: str
) -> None:
    """Copies that would not be whole windows or chunks, or that do not fit, are made all the same."""
    with open_session(tiny_llama, retrieval) as session:
        session.decode(TOKENS[:n_read])
        before = session.state_get()
        with pytest.raises(raised, match=words):
            session.repeat(wanted)
        assert session.state_get() == before
