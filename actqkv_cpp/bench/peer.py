"""llama.cpp's own context as something that reads, answers and goes back; here, or in another interpreter.

This file imports nothing of ours: `bench --peer-python` runs it as a script in an interpreter that has another build of
llama_cpp, and no actqkv. There it takes commands from standard input and answers on standard output, one JSON object
per line: see `main`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

_MAIN, _SPARE = 0, 1  # sequences of the context


class LlamaCpp:
    """Contexts over one model, one at a time: dense, flash attention on.

    Args:
        model: pointer to a llama_model.
        n_batch: tokens of one `prefill`, computed at once.
        type_kv: enum ggml_type of keys and values.
    """

    no_memory: type[Exception] = MemoryError  # raised where llama.cpp makes no context of the size wanted
    failed: type[Exception] = RuntimeError  # raised where it does not compute

    def __init__(self, model: Any, *, n_batch: int, n_threads: int, type_kv: int, kv_in_ram: bool = False) -> None:
        self._model, self._kv_in_ram = model, kv_in_ram  # beside weights on a GPU
        self._n_batch, self._n_threads, self._type_kv = n_batch, n_threads, type_kv
        self._ctx: Any = None
        self._n_past = 0
        self._blob: NDArray[np.uint8] = np.empty(0, np.uint8)  # what was read so far, and how many tokens that is
        self._blob_tokens = 0
        self.depth = 0
        self.copied = False

    @property
    def blob_bytes(self) -> int:
        """Bytes kept between contexts."""
        return self._blob.nbytes

    def open(self, n_ctx: int) -> None:
        """Make a context of `n_ctx` tokens, which holds none."""
        self.close()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, self._n_batch, self._n_batch
        params.n_threads = params.n_threads_batch = self._n_threads
        params.n_seq_max, params.kv_unified = 2, True  # the second sequence is where copies are made
        params.type_k = params.type_v = self._type_kv
        params.offload_kqv = not self._kv_in_ram
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._ctx = llama_cpp.llama_init_from_model(self._model, params)
        if not self._ctx:
            raise self.no_memory(f"llama.cpp makes no context of {n_ctx} tokens")
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)
        self.depth = self._n_past = 0
        self.copied = False

    def close(self) -> None:
        if self._ctx:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._ctx)
            self._ctx = None

    def fill(self, tokens: NDArray[np.int32], *, n_read: int, keep: bool, progress: Callable[[int, int], Any]) -> None:
        """Hold all of `tokens` but the last: read the first `n_read`, and copy them behind each other for the others.

        What an earlier context read is not read again. keep: this one's is kept for the next.
        """
        depth = len(tokens) - 1
        if self._blob_tokens:
            self._set(_MAIN)
            self.depth = self._n_past = self._blob_tokens
        if self.depth < n_read:
            for begin in range(self.depth, n_read, self._n_batch):
                self.prefill(tokens[begin : min(begin + self._n_batch, n_read)])
                progress(self._n_past, n_read)
            self.depth = n_read
            if keep:
                self._blob = np.empty(llama_cpp.llama_state_seq_get_size(self._ctx, _MAIN), np.uint8)
                n = llama_cpp.llama_state_seq_get_data(self._ctx, _pointer(self._blob), self._blob.size, _MAIN)
                self._blob, self._blob_tokens = self._blob[:n], n_read
        while self.depth < depth:
            self._append(min(n_read, depth - self.depth))
        self._step(int(tokens[depth]))  # rotates the copies' keys
        self.rewind()

    def decode(self, tokens: NDArray[np.int32]) -> float:
        """Seconds to answer all tokens but the first, which brings the weights back into the caches."""
        self._step(int(tokens[0]))
        begin = time.perf_counter()
        for token in tokens[1:].tolist():
            self._step(token)
        return time.perf_counter() - begin

    def prefill(self, tokens: NDArray[np.int32]) -> float:
        """Seconds to read tokens as one batch; the logits of the last are computed."""
        begin = time.perf_counter()
        ctypes.memmove(self._batch.token, np.ascontiguousarray(tokens).ctypes.data, tokens.nbytes)
        self._compute(len(tokens))
        return time.perf_counter() - begin

    def rewind(self) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, _MAIN, self.depth, -1)
        self._n_past = self.depth

    def _append(self, n_tokens: int) -> None:
        """Put the first `n_tokens` of the blob behind what the context holds, at the positions that follow.

        Their keys are rotated there by llama.cpp before the next batch. They have not seen what now stands before
        them, which changes what is in the KV but not how much of it there is.
        """
        self._set(_SPARE)
        llama_cpp.llama_memory_seq_rm(self._memory, _SPARE, n_tokens, -1)
        llama_cpp.llama_memory_seq_add(self._memory, _SPARE, 0, -1, self.depth)
        llama_cpp.llama_memory_seq_cp(self._memory, _SPARE, _MAIN, -1, -1)
        llama_cpp.llama_memory_seq_rm(self._memory, _SPARE, -1, -1)
        self.depth = self._n_past = self.depth + n_tokens
        self.copied = True

    def _set(self, sequence: int) -> None:
        if not llama_cpp.llama_state_seq_set_data(self._ctx, _pointer(self._blob), self._blob.size, sequence):
            raise self.failed("llama.cpp does not take back the state that it gave")

    def _step(self, token: int) -> None:
        self._batch.token[0] = token
        self._compute(1)

    def _compute(self, n: int) -> None:
        batch = self._batch
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i] = self._n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = _MAIN
            batch.logits[i] = i == n - 1
        status = llama_cpp.llama_decode(self._ctx, batch)
        if status != 0:
            raise self.failed(f"llama_decode returned {status} for {n} tokens after {self._n_past}")
        llama_cpp.llama_get_logits_ith(self._ctx, -1)  # waits for the computation
        self._n_past += n


def _pointer(blob: NDArray[np.uint8]) -> Any:
    return blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _load(path: str, *, extra_buffers: bool) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, extra_buffers
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"does not load {path}")
    return model


def main() -> None:
    """Answer commands {"do": name, ...} by {"done": result}, after {"progress": [done, total]}, or by {"error": text}.

    The first is "load": path, extra_buffers and the arguments of LlamaCpp; the others are its methods.
    """
    # what llama.cpp prints must not stand between the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    llama_cpp.llama_backend_init()
    engine: Any = None

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")

    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        try:
            if "tokens" in command:
                command["tokens"] = np.array(command["tokens"], np.int32)
            if do == "load":
                model = _load(command.pop("path"), extra_buffers=command.pop("extra_buffers"))
                engine = LlamaCpp(model, **command)
                done: Any = llama_cpp.__version__
            elif do == "fill":
                engine.fill(**command, progress=lambda n, of: answer(progress=[n, of]))
                done = {"depth": engine.depth, "copied": engine.copied, "blob_bytes": engine.blob_bytes}
            else:
                done = getattr(engine, do)(**command)
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}", no_memory=isinstance(error, MemoryError))
        else:
            answer(done=done)


if __name__ == "__main__":
    main()
