"""A GGUF file of Llama-8B's shape in Q4_K (the output in Q6_K) with random weights, written as fast as a disk takes it.

    python tests/gpu_model.py llama8b.gguf                    # 4.6 GB
    python tests/gpu_model.py small.gguf --layers 1 --vocab 3072

Bytes of blocks are drawn once and repeated; their scales keep values at a mean of 0 and a variance of 1/columns, so
that the residual stream stays finite. For tests/gpu.py; models/random_weights.py draws and quantises other shapes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))  # models/, and not before an installed actqkv_cpp

from models.random_weights import _add_tokenizer

N_EMBD, N_HEADS, N_KV_HEADS, N_FF, D_HEAD, N_CONTEXT = 4096, 32, 8, 14336, 128, 8192
BLOCK = 256  # values
N_DRAWN = 4099  # blocks that are repeated: a prime, so that rows differ
Q4_K, Q6_K = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K


def blocks(kind: gguf.GGMLQuantizationType, n_columns: int) -> NDArray[np.uint8]:
    """Random blocks [N_DRAWN, bytes] for rows of so many values."""
    raw = np.random.default_rng(int(kind)).integers(0, 256, (N_DRAWN, 144 if kind == Q4_K else 210), np.uint8)
    if (
        kind == Q4_K
    ):  # d (scale q) - d_min m, of scales and m below 64 and q below 16: about 210 d wide at d_min = 7.5 d
        d = n_columns**-0.5 / 210
        raw[:, :4] = np.array([d, 7.5 * d], np.float16).view(np.uint8)
    else:  # d (scale q), of scales from -128 to 127 and q from -32 to 31: about 1370 d wide
        raw[:, -2:] = np.array([n_columns**-0.5 / 1370], np.float16).view(np.uint8)
    return raw


def matrix(kind: gguf.GGMLQuantizationType, n_rows: int, n_columns: int) -> NDArray[np.uint8]:
    return np.resize(blocks(kind, n_columns), (n_rows, n_columns // BLOCK * (144 if kind == Q4_K else 210)))


def tensors(n_layers: int, n_vocab: int) -> Iterator[tuple[str, NDArray[Any], gguf.GGMLQuantizationType | None]]:
    ones = np.ones(N_EMBD, np.float32)
    n_q, n_kv = N_HEADS * D_HEAD, N_KV_HEADS * D_HEAD
    yield "token_embd.weight", matrix(Q4_K, n_vocab, N_EMBD), Q4_K
    for layer in range(n_layers):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", ones, None
        for name, n_rows, n_columns in (
            ("attn_q", n_q, N_EMBD),
            ("attn_k", n_kv, N_EMBD),
            ("attn_v", n_kv, N_EMBD),
            ("attn_output", N_EMBD, n_q),
            ("ffn_gate", N_FF, N_EMBD),
            ("ffn_up", N_FF, N_EMBD),
            ("ffn_down", N_EMBD, N_FF),
        ):
            yield f"blk.{layer}.{name}.weight", matrix(Q4_K, n_rows, n_columns), Q4_K
    yield "output_norm.weight", ones, None
    yield "output.weight", matrix(Q6_K, n_vocab, N_EMBD), Q6_K


def write(path: Path, *, n_layers: int = 32, n_vocab: int = 128256) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random 8B")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    _add_tokenizer(writer, n_vocab)
    for name, values, kind in tensors(n_layers, n_vocab):
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128256)
    options = parser.parse_args()
    write(options.out, n_layers=options.layers, n_vocab=options.vocab)
