"""llama.cpp itself as an oracle: load a GGUF and decode tokens with libllama, through llama_cpp's low-level ctypes API.

Where tests load a model past `actqkv_cpp.Llama`, `use_extra_bufts` has to be off: built with gcc 12 on a CPU with AMX,
llama-cpp-python 0.3.36 crashes on quantised models otherwise (native/model/extra_buffers.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import llama_cpp
import numpy as np
from numpy.typing import NDArray

# ggml_type values: ggml.h keeps them stable, since GGUF files store them.
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}

FLASH_ATTN_OFF, FLASH_ATTN_ON = 0, 1  # enum llama_flash_attn_type


class LlamaError(RuntimeError):
    """libllama refused: the model does not load, the context is not made, or llama_decode failed."""


class PlainLlama(llama_cpp.Llama):
    """llama_cpp.Llama on plain buffers."""

    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.use_extra_bufts = False
        self._model_params = params


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Swallow libllama's log; a failed load is reported by LlamaError."""


class LlamaOracle:
    """One libllama model with one context; a context manager. `close()` may be called twice.

    Attributes: `model` and `ctx`, the raw pointers as llama_cpp has them; `n_vocab`, `n_ctx`.
    """

    def __init__(self, model: Any, ctx: Any) -> None:
        self.model, self.ctx = model, ctx
        self.vocab: Any = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_ctx: int = llama_cpp.llama_n_ctx(ctx) if ctx else 0
        self.n_past = 0

    def decode(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append `tokens` [n] to the context and return the logits [n, n_vocab] of every one of them."""
        n = len(tokens)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = self.n_past + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = 1
            status = llama_cpp.llama_decode(self.ctx, batch)
            if status != 0:
                raise LlamaError(f"llama_decode returned {status} for {n} tokens after {self.n_past}")
            flat = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), shape=(n * self.n_vocab,))
            logits: NDArray[np.float32] = flat.reshape(n, self.n_vocab).copy()
        finally:
            llama_cpp.llama_batch_free(batch)
        self.n_past += n
        return logits

    def reset(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)
        self.n_past = 0

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Tokens of `text` by the model's own tokenizer."""
        raw = text.encode()
        out = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), out, len(out), add_special, parse_special)
        if n < 0:
            raise LlamaError(f"llama_tokenize needs {-n} tokens for {len(raw)} bytes")
        return list(out[:n])

    def detokenize(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """Text of `tokens`; special tokens as they are written when `special`."""
        raw = b""
        buffer = ctypes.create_string_buffer(256)
        for token in tokens:
            n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
            if n < 0:
                raise LlamaError(f"piece of token {token} is longer than {len(buffer)} bytes")
            raw += buffer.raw[:n]
        return raw.decode(errors="replace")

    def close(self) -> None:
        """Free the context, then the model."""
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
        if self.model:
            llama_cpp.llama_model_free(self.model)
        self.ctx = self.model = None

    def __enter__(self) -> LlamaOracle:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def load_llama(
    path: str | Path,
    *,
    n_ctx: int = 512,
    flash_attn: bool = False,
    kv_type: Literal["f32", "f16", "q8_0", "q4_0"] = "f32",
    n_threads: int = 2,
    vocab_only: bool = False,
) -> LlamaOracle:
    """Load a GGUF with libllama on the CPU, without extra buffer types.

    Args:
        n_ctx: tokens the context holds; one `decode` takes at most as many.
        flash_attn: llama.cpp's fused attention; off (the default) gives the tighter oracle.
        kv_type: of K and V in the context; f32 (the default) is the tighter oracle; a quantised V needs `flash_attn`.
        vocab_only: read the tokenizer only; there is no context then.

    Raises:
        LlamaError: when libllama refuses the file or the context.
    """
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False
    model_params.n_gpu_layers = 0
    model_params.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise LlamaError(f"libllama does not load {path}")
    if vocab_only:
        return LlamaOracle(model, None)

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
    params.n_threads = params.n_threads_batch = n_threads
    params.flash_attn_type = FLASH_ATTN_ON if flash_attn else FLASH_ATTN_OFF
    params.type_k = params.type_v = KV_TYPES[kv_type]
    params.offload_kqv = params.op_offload = False
    ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        llama_cpp.llama_model_free(model)
        raise LlamaError(f"libllama makes no context of {n_ctx} tokens for {path}")
    return LlamaOracle(model, ctx)


ROPE_MODES = {"norm": 0, "neox": 2}  # GGML_ROPE_TYPE_*


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def ggml_rope(
    x: NDArray[np.float32],
    positions: NDArray[np.int32],
    *,
    pairing: Literal["norm", "neox"],
    n_rot: int,
    freq_base: float,
    freq_factors: NDArray[np.float32] | None = None,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    n_ctx_orig: int = 0,
) -> NDArray[np.float32]:
    """ggml_rope_ext of x [n, heads, d] at `positions` [n], from the very libggml that libllama uses.

    Symbols are looked up through libllama's handle, which reaches the libraries it depends on: a second copy of ggml
    would be another library.
    """
    lib = llama_cpp.llama_cpp._lib
    pointer, size, real, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_new_tensor_3d": (pointer, [pointer, number, size, size, size]),
        "ggml_new_tensor_1d": (pointer, [pointer, number, size]),
        "ggml_rope_ext": (pointer, [pointer] * 4 + [number] * 3 + [real] * 6),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_graph_compute_with_ctx": (number, [pointer, pointer, number]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_free": (None, [pointer]),
    }
    call: dict[str, Any] = {}
    for name, (result, arguments) in signatures.items():
        call[name] = getattr(lib, name)
        call[name].restype, call[name].argtypes = result, arguments

    n, n_head, d = x.shape
    f32, i32 = 0, 26  # enum ggml_type
    ctx = call["ggml_init"](_InitParams(3 * x.nbytes + (1 << 21), None, False))
    try:
        source = call["ggml_new_tensor_3d"](ctx, f32, d, n_head, n)
        where = call["ggml_new_tensor_1d"](ctx, i32, n)
        factors = None
        _fill(call["ggml_get_data"](source), x)
        _fill(call["ggml_get_data"](where), positions)
        if freq_factors is not None:
            factors = call["ggml_new_tensor_1d"](ctx, f32, n_rot // 2)
            _fill(call["ggml_get_data"](factors), freq_factors)
        yarn = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
        rotated = call["ggml_rope_ext"](ctx, source, where, factors, n_rot, ROPE_MODES[pairing], n_ctx_orig, *yarn)
        graph = call["ggml_new_graph"](ctx)
        call["ggml_build_forward_expand"](graph, rotated)
        status = call["ggml_graph_compute_with_ctx"](ctx, graph, 1)
        if status != 0:
            raise LlamaError(f"ggml_graph_compute_with_ctx returned {status}")
        raw = ctypes.string_at(call["ggml_get_data"](rotated), x.nbytes)
    finally:
        call["ggml_free"](ctx)
    return np.frombuffer(raw, dtype=np.float32).reshape(x.shape)


def _fill(address: int, values: NDArray[Any]) -> None:
    ctypes.memmove(address, np.ascontiguousarray(values).ctypes.data, values.nbytes)
