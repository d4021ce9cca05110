"""GGUF models of a benchmark's shape with random weights: right in size and speed, empty in the head.

    python -m models.random_weights s160 s160.gguf                  # Q4_K_M, 100 MB
    python -m models.random_weights tiny tiny.gguf --type f16

Weights are normal with a fixed seed and of variance 1/columns, so that the residual stream stays finite at any depth.
The tokenizer is the bundled model's, filled up with unused tokens. Matrices are written as F16; llama.cpp's own
quantiser makes the other types.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from actqkv_cpp import default_model_path
from actqkv_cpp.files import written_atomically
from models.tokenizer import add_prompt_format

FILE_TYPES = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
N_CONTEXT = 8192  # trained length in the metadata: longer sessions read with clamped positions, as long documents do
N_HEAD_CHANNELS = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama; a head has 64 channels. Columns are multiples of 256, as K-quants want them."""

    n_embd: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_ff: int
    n_vocab: int


SHAPES = {
    "tiny": Shape(n_embd=256, n_layers=2, n_heads=4, n_kv_heads=2, n_ff=512, n_vocab=3072),
    "s160": Shape(n_embd=1024, n_layers=8, n_heads=16, n_kv_heads=4, n_ff=2816, n_vocab=32000),
    "s1b": Shape(n_embd=2048, n_layers=16, n_heads=32, n_kv_heads=8, n_ff=8192, n_vocab=32000),
    # keys and values of s1b, and little else, so that a million tokens are read in an hour
    "s1b-kv": Shape(n_embd=256, n_layers=16, n_heads=8, n_kv_heads=8, n_ff=256, n_vocab=4096),
}


def write(path: Path, *, shape: str, file_type: str = "q4_k_m", seed: int = 0) -> None:
    """Write one GGUF file; equal arguments give equal files.

    Args:
        path: of the file, which is complete or not there.
        shape: a key of `SHAPES`.
        file_type: one of `FILE_TYPES`.

    Raises:
        KeyError: there is no such shape.
        ValueError: there is no such type.
        RuntimeError: llama.cpp's quantiser failed.

    Example:
        >>> write(Path("tiny.gguf"), shape="tiny")
    """
    if file_type not in FILE_TYPES:
        raise ValueError(f"no type {file_type!r}, expected one of {', '.join(FILE_TYPES)}")
    with written_atomically(path) as temporary:
        if file_type == "f16":
            _write_f16(temporary, shape, seed)
            return
        full = path.with_name(path.name + ".f16.tmp")
        try:
            _write_f16(full, shape, seed)
            _quantise(full, temporary, file_type)
        finally:
            full.unlink(missing_ok=True)


def _write_f16(path: Path, name: str, seed: int) -> None:
    shape = SHAPES[name]
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_name(f"random {name}")
    writer.add_description("random weights, for benchmarks only")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_shape(writer, shape)
    _add_tokenizer(writer, shape.n_vocab)
    for tensor_name, weights in _tensors(shape, np.random.default_rng(seed)):
        writer.add_tensor(tensor_name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(shape: Shape, rng: np.random.Generator) -> Iterator[tuple[str, NDArray[Any]]]:
    """All tensors by GGUF name: matrices [rows, columns] in F16, norms in F32."""
    n_embd, n_ff = shape.n_embd, shape.n_ff
    n_q, n_kv = shape.n_heads * N_HEAD_CHANNELS, shape.n_kv_heads * N_HEAD_CHANNELS

    def matrix(n_rows: int, n_columns: int) -> NDArray[np.float16]:
        weights = rng.standard_normal((n_rows, n_columns), np.float32)
        return (weights / np.float32(np.sqrt(n_columns))).astype(np.float16)

    ones = np.ones(n_embd, np.float32)
    yield "token_embd.weight", rng.standard_normal((shape.n_vocab, n_embd), np.float32).astype(np.float16)
    for layer in range(shape.n_layers):
        yield f"blk.{layer}.attn_norm.weight", ones
        yield f"blk.{layer}.attn_q.weight", matrix(n_q, n_embd)
        yield f"blk.{layer}.attn_k.weight", matrix(n_kv, n_embd)
        yield f"blk.{layer}.attn_v.weight", matrix(n_kv, n_embd)
        yield f"blk.{layer}.attn_output.weight", matrix(n_embd, n_q)
        yield f"blk.{layer}.ffn_norm.weight", ones
        yield f"blk.{layer}.ffn_gate.weight", matrix(n_ff, n_embd)
        yield f"blk.{layer}.ffn_up.weight", matrix(n_ff, n_embd)
        yield f"blk.{layer}.ffn_down.weight", matrix(n_embd, n_ff)
    yield "output_norm.weight", ones
    yield "output.weight", matrix(shape.n_vocab, n_embd)


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(N_HEAD_CHANNELS)
    writer.add_value_length(N_HEAD_CHANNELS)
    writer.add_rope_dimension_count(N_HEAD_CHANNELS)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """The bundled model's tokens, then unused ones."""
    fields = gguf.GGUFReader(default_model_path()).fields
    pieces: list[str] = fields["tokenizer.ggml.tokens"].contents()
    scores: list[float] = fields["tokenizer.ggml.scores"].contents()
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    n_more = n_vocab - len(pieces)
    if n_more < 0:
        raise ValueError(f"n_vocab {n_vocab} is less than the tokenizer's {len(pieces)}")
    writer.add_token_list(pieces + [f"<unused_{i}>" for i in range(n_more)])
    writer.add_token_scores(scores + [0.0] * n_more)
    writer.add_token_types(types + [int(gguf.TokenType.UNUSED)] * n_more)
    add_prompt_format(writer)


def _quantise(source: Path, target: Path, file_type: str) -> None:
    import llama_cpp  # noqa: PLC0415 (heavy, and F16 does without it)

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type.upper()}")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {file_type}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m models.random_weights", description=__doc__.split("\n", 1)[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--type", default="q4_k_m", choices=FILE_TYPES, help="of the matrices (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    args = parser.parse_args(argv)
    try:
        write(args.out, shape=args.shape, file_type=args.type, seed=args.seed)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
