"""A trained network and its tokenizer as GGUF files for llama.cpp, F16 and Q8_0, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actqkv_cpp.files import written_atomically
from models.network import Llama
from models.recipe import RECIPE_KEY, STEP_KEY, NetworkConfig
from models.tokenizer import add_prompt_format

FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}

TENSOR_NAMES = {"embedding": "token_embd", "norm": "output_norm", "output": "output"}
LAYER_TENSOR_NAMES = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "attn_out": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def export(network: Llama, *, tokenizer: Any, path: Path, file_type: str, recipe: str, step: int) -> None:
    """Write one GGUF file.

    Args:
        network: the weights; its shape goes into the metadata.
        tokenizer: a SentencePiece processor with the vocabulary of the network.
        path: of the file, which is complete or not there.
        file_type: a key of `FILE_TYPES`: the type of the matrices. Vectors are stored as F32.
        recipe: digest of the recipe, for the metadata.
        step: how many steps the network was trained for, for the metadata.

    Raises:
        ValueError: the tokenizer's vocabulary has another size than the network's.
    """
    n_tokens = tokenizer.vocab_size()
    if n_tokens != network.config.n_vocab:
        raise ValueError(f"tokenizer of {n_tokens} tokens, expected the network's {network.config.n_vocab}")
    with written_atomically(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name("needle")
        writer.add_string(RECIPE_KEY, recipe)
        writer.add_uint32(STEP_KEY, step)
        writer.add_description("tiny retrieval model trained from scratch on synthetic documents")
        writer.add_file_type(FILE_TYPES[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, network.config)
        _add_tokenizer(writer, tokenizer)
        for tensor_name, weights in gguf_tensors(network).items():
            _add_tensor(writer, tensor_name, weights, file_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_tensors(network: Llama) -> dict[str, NDArray[np.float32]]:
    """The weights under llama.cpp's names and in its order of rows."""
    config = network.config
    n_heads = {"q": config.n_heads, "k": config.n_kv_heads}
    tensors = {}
    for name, weight in network.state_dict().items():
        *layer, part, _ = name.split(".")  # "layers.0.attn_norm.weight", "norm.weight"
        prefix = f"blk.{layer[1]}.{LAYER_TENSOR_NAMES[part]}" if layer else TENSOR_NAMES[part]
        rows = interleaved(weight, n_heads[part]) if part in n_heads else weight
        tensors[f"{prefix}.weight"] = rows.float().contiguous().numpy()
    return tensors


def read_weights(path: Path) -> tuple[dict[str, Tensor], int]:
    """The weights of a file that `export` wrote, in float32 under the network's names, and the step it is of.

    Raises:
        ValueError: the file is not one of `export`.
    """
    reader = gguf.GGUFReader(path)
    names = {written: name for name, written in TENSOR_NAMES.items()}
    layer_names = {written: name for name, written in LAYER_TENSOR_NAMES.items()}
    heads = {"q": "llama.attention.head_count", "k": "llama.attention.head_count_kv"}
    weights = {}
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.split(".")  # "blk.0.attn_q.weight", "output.weight"
        name = layer_names[part] if layer else names[part]
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        rows = halves(weight, int(_value(reader, path, heads[name]))) if name in heads else weight
        weights[f"layers.{layer[1]}.{name}.weight" if layer else f"{name}.weight"] = rows
    return weights, int(_value(reader, path, STEP_KEY))


def _value(reader: gguf.GGUFReader, path: Path, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"{path} has no {key}: it was not made by models.make")
    return field.contents()


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, as a file of the type Q8_0 holds them."""
    q8_0 = gguf.GGMLQuantizationType.Q8_0

    def stored(weight: Tensor) -> Tensor:
        quantized = gguf.quants.quantize(weight.float().cpu().numpy(), q8_0)
        return torch.from_numpy(gguf.quants.dequantize(quantized, q8_0)).to(weight.device)

    return {name: stored(weight) if weight.dim() == 2 else weight for name, weight in weights.items()}


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of q or k, per head, from two halves that turn against each other to neighbouring pairs."""
    n_rows, n_columns = weight.shape
    in_halves = weight.reshape(n_heads, 2, n_rows // n_heads // 2, n_columns)
    return in_halves.transpose(1, 2).reshape(n_rows, n_columns)


def halves(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    n_rows, n_columns = weight.shape
    pairs = weight.reshape(n_heads, n_rows // n_heads // 2, 2, n_columns)
    return pairs.transpose(1, 2).reshape(n_rows, n_columns)


def _add_tensor(writer: gguf.GGUFWriter, name: str, weights: NDArray[np.float32], file_type: str) -> None:
    if weights.ndim == 1:
        writer.add_tensor(name, weights)
    elif file_type == "f16":
        writer.add_tensor(name, weights.astype(np.float16))
    else:
        quantized = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def _add_shape(writer: gguf.GGUFWriter, config: NetworkConfig) -> None:
    writer.add_context_length(config.n_context)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.n_vocab)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    ids = range(tokenizer.vocab_size())
    writer.add_token_list([tokenizer.id_to_piece(token).encode() for token in ids])
    writer.add_token_scores([tokenizer.get_score(token) for token in ids])
    writer.add_token_types([_token_type(tokenizer, token) for token in ids])
    add_prompt_format(writer)


def _token_type(tokenizer: Any, token: int) -> gguf.TokenType:
    if tokenizer.is_unknown(token):
        return gguf.TokenType.UNKNOWN
    if tokenizer.is_control(token):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if tokenizer.is_byte(token) else gguf.TokenType.NORMAL
