"""Two engines with one face: read up to a depth, answer a token, read a batch, go back to the depth."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from actqkv_cpp._native import KV_TYPES, Session
from actqkv_cpp.bench.results import Context, EngineName
from actqkv_cpp.errors import ComputeError, MemoryPlanError

if TYPE_CHECKING:
    from actqkv_cpp import Llama

Tokens = NDArray[np.int32]
Progress = Callable[[int, int], object]

_READ_TOKENS = 4096  # of one call while reading, for progress and Ctrl-C
_MAIN, _SPARE = 0, 1  # sequences of llama.cpp's context


def head_dimension(llm: Llama) -> int:
    """Numbers of one head's key."""
    arch, n_head = llm.metadata["general.architecture"], llama_cpp.llama_model_n_head(llm._model.model)
    return int(llm.metadata.get(f"{arch}.attention.key_length", llm._model.n_embd() // n_head))


class Engine(Protocol):
    """What is measured. The context holds `depth` tokens; `step` and `prefill` add to them, `rewind` goes back."""

    name: EngineName
    method: str
    kv_type: str
    depth: int
    context: Context

    def step(self, token: int) -> None:
        """Answer one token: its logits are computed."""

    def prefill(self, tokens: Tokens) -> None:
        """Read tokens [n] as one batch; the logits of the last are computed."""

    def rewind(self) -> None:
        """Forget what came after `depth`."""


class Ours:
    """A session of ours."""

    name: EngineName = "actqkv"
    context: Context = "read"

    def __init__(self, session: Session) -> None:
        self.session = session
        self.method = session.params.method
        self.kv_type = session.params.kv_type
        self.depth = 0

    def reach(self, tokens: Tokens, progress: Progress) -> None:
        """Read on until the context holds all of `tokens`, which begin with what was read before."""
        for begin in range(self.depth, len(tokens), _READ_TOKENS):
            self.session.decode(tokens[begin : begin + _READ_TOKENS])
            progress(min(begin + _READ_TOKENS, len(tokens)), len(tokens))
        self.depth = len(tokens)
        self.session.checkpoint()  # so that a rewind reads nothing again

    def step(self, token: int) -> None:
        self.session.decode([token], phase="decode", n_logits=1)

    def prefill(self, tokens: Tokens) -> None:
        self.session.decode(tokens, n_logits=1)

    def rewind(self) -> None:
        if self.session.n_past > self.depth:
            self.session.rewind(self.depth)


class Peer:
    """A context of llama.cpp over the same model: dense, flash attention on. A context manager.

    Args:
        model: a llama_cpp LlamaModel.
        n_ctx: tokens the context holds.
        n_batch: tokens of one `prefill`, computed at once.
        kv_type: a key of KV_TYPES.

    Raises:
        MemoryPlanError: llama.cpp makes no context of this size.
    """

    name: EngineName = "llama.cpp"
    method = "dense"

    def __init__(self, model: Any, *, n_ctx: int, n_batch: int, n_threads: int, kv_type: str) -> None:
        self._ctx: Any = None
        self.kv_type = kv_type
        self.depth = 0
        self.context: Context = "read"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_batch
        params.n_threads = params.n_threads_batch = n_threads
        params.n_seq_max, params.kv_unified = 2, True  # the second sequence is where copies are made
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._ctx = llama_cpp.llama_init_from_model(model.model, params)
        if not self._ctx:
            raise MemoryPlanError(f"llama.cpp makes no context of {n_ctx} tokens")
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._n_batch = n_batch
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        self._n_past = 0

    def close(self) -> None:
        if self._ctx:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._ctx)
            self._ctx = None

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, tokens: Tokens, progress: Progress) -> None:
        """Read on until the context holds all of `tokens`, which begin with what it holds."""
        for begin in range(self.depth, len(tokens), self._n_batch):
            self.prefill(tokens[begin : begin + self._n_batch])
            progress(min(begin + self._n_batch, len(tokens)), len(tokens))
        self.depth = self._n_past

    def save(self) -> NDArray[np.uint8]:
        """What the context holds, for `load` and `append`."""
        blob = np.empty(llama_cpp.llama_state_seq_get_size(self._ctx, _MAIN), np.uint8)
        n_bytes = llama_cpp.llama_state_seq_get_data(self._ctx, _pointer(blob), blob.size, _MAIN)
        return blob[:n_bytes]

    def load(self, blob: NDArray[np.uint8], n_tokens: int) -> None:
        """Begin with the `n_tokens` of a `blob` that another context saved."""
        self._set(blob, _MAIN)
        self.depth = self._n_past = n_tokens

    def append(self, blob: NDArray[np.uint8], n_tokens: int) -> None:
        """Put the first `n_tokens` of `blob` behind what the context holds, at the positions that follow.

        Their keys are rotated there by llama.cpp before the next batch. They have not seen what now stands before
        them, which changes what is in the KV but not how much of it there is.
        """
        self._set(blob, _SPARE)
        llama_cpp.llama_memory_seq_rm(self._memory, _SPARE, n_tokens, -1)
        llama_cpp.llama_memory_seq_add(self._memory, _SPARE, 0, -1, self.depth)
        llama_cpp.llama_memory_seq_cp(self._memory, _SPARE, _MAIN, -1, -1)
        llama_cpp.llama_memory_seq_rm(self._memory, _SPARE, -1, -1)
        self.depth = self._n_past = self.depth + n_tokens
        self.context = "copied"

    def step(self, token: int) -> None:
        self._batch.token[0] = token
        self._decode(1)

    def prefill(self, tokens: Tokens) -> None:
        ctypes.memmove(self._batch.token, np.ascontiguousarray(tokens).ctypes.data, tokens.nbytes)
        self._decode(len(tokens))

    def rewind(self) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, _MAIN, self.depth, -1)
        self._n_past = self.depth

    def _set(self, blob: NDArray[np.uint8], sequence: int) -> None:
        if not llama_cpp.llama_state_seq_set_data(self._ctx, _pointer(blob), blob.size, sequence):
            raise ComputeError("llama.cpp does not take back the state that it gave")

    def _decode(self, n: int) -> None:
        batch = self._batch
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i] = self._n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = _MAIN
            batch.logits[i] = i == n - 1
        status = llama_cpp.llama_decode(self._ctx, batch)
        if status != 0:
            raise ComputeError(f"llama_decode returned {status} for {n} tokens after {self._n_past}")
        llama_cpp.llama_get_logits_ith(self._ctx, -1)  # waits for the computation
        self._n_past += n


def _pointer(blob: NDArray[np.uint8]) -> Any:
    return blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
