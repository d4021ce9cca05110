"""Tiny deterministic GGUF models: valid ones that libllama loads, and broken ones that must be refused.

Weights are random with a fixed seed, scaled so that the residual stream stays of order one, attention logits have a
standard deviation of about two (softmax peaked here and there), and a head's keys lean towards its queries (so that
similar text attends to similar text). The tokenizer is of the SPM kind with byte fall-back, a few word pieces and the
control tokens of CHAT_TEMPLATE.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
MetaValue: TypeAlias = bool | int | float | str | list[str] | list[int] | list[float]
RopeScaling: TypeAlias = tuple[Literal["linear"], float] | tuple[Literal["yarn"], float, int] | Literal["llama3"] | None

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3  # <0x00>; byte b is token FIRST_BYTE + b
CONTROL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FIRST_CONTROL = FIRST_BYTE + 256
EOT = FIRST_CONTROL + CONTROL_TOKENS.index("<|end|>")
MIN_VOCAB = 338  # special, byte and control tokens and the single characters; word pieces come after them

SPM_SPACE = "\u2581"
_CHARACTERS = SPM_SPACE + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()/"
# fmt: off
_WORDS = (
    "the", "of", "and", "to", "in", "is", "was", "it", "on", "at", "he", "she", "who", "what", "where", "key", "book",
    "page", "door", "house", "river", "name", "kept", "found", "answer", "question", "green", "stone", "first",
    "last", "number", "city", "year", "a", "an", "no", "yes", "not",
)
# fmt: on

# llama.cpp writes Llama-3's frequency factors with these two (convert_hf_to_gguf.py); the original context is ours,
# short enough for a tiny head to have wavelengths on both sides of it.
LLAMA3_FACTOR, LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIG_CTX = 8.0, 1.0, 4.0, 64

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # enum llama_ftype


@dataclass(frozen=True)
class _Shape:
    """Sizes of one tiny model, by the names of docs/algorithms.md section 1."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    d_head: int
    n_ff: int
    n_vocab: int
    n_expert: int


def tiny_vocab(n_vocab: int) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of the SPM tokenizer, padded with unused tokens to `n_vocab`."""
    kind = gguf.TokenType
    tokens: list[tuple[str, float, int]] = [
        ("<unk>", 0.0, kind.UNKNOWN),
        ("<s>", 0.0, kind.CONTROL),
        ("</s>", 0.0, kind.CONTROL),
    ]
    tokens += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    tokens += [(name, 0.0, kind.CONTROL) for name in CONTROL_TOKENS]
    # Every prefix of a word is a piece: SPM merges neighbours only into pieces that exist.
    prefixes = [SPM_SPACE + word[:end] for word in _WORDS for end in range(1, len(word) + 1)]
    pieces = list(_CHARACTERS) + sorted(set(prefixes), key=lambda piece: (len(piece), piece))
    assert len(tokens) + len(_CHARACTERS) <= MIN_VOCAB
    if n_vocab < MIN_VOCAB:
        raise ValueError(f"n_vocab {n_vocab} is below {MIN_VOCAB}, which bytes and characters need")
    tokens += [(piece, -float(rank), kind.NORMAL) for rank, piece in enumerate(pieces, start=1)]
    tokens = tokens[:n_vocab]
    tokens += [(f"<unused_{i}>", 0.0, kind.UNUSED) for i in range(n_vocab - len(tokens))]
    return [t for t, _, _ in tokens], [s for _, s, _ in tokens], [int(k) for _, _, k in tokens]


def llama3_freq_factors(n_rot: int, rope_base: float, orig_ctx: int = LLAMA3_ORIG_CTX) -> FloatArray:
    """The n_rot/2 divisors of RoPE's frequencies that Llama-3.1 and later store as `rope_freqs.weight`."""
    wavelength = 2 * math.pi * rope_base ** (np.arange(0, n_rot, 2) / n_rot)
    smooth = (orig_ctx / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    blended = 1 / ((1 - smooth) / LLAMA3_FACTOR + smooth)
    long, short = wavelength > orig_ctx / LLAMA3_LOW, wavelength < orig_ctx / LLAMA3_HIGH
    return np.where(short, 1.0, np.where(long, LLAMA3_FACTOR, blended)).astype(np.float32)


def make_tiny_gguf(
    path: str | Path,
    *,
    arch: str = "llama",
    seed: int = 0,
    n_layer: int = 3,
    n_embd: int = 128,
    n_head: int = 4,
    n_head_kv: int = 2,
    d_head: int | None = None,
    n_ff: int | None = None,
    n_vocab: int = 512,
    n_ctx_train: int = 2048,
    rope_base: float = 10000.0,
    rope_dim: int | None = None,
    rope_scaling: RopeScaling = None,
    qkv_bias: bool | None = None,
    qk_norm: bool | None = None,
    tied: bool = False,
    quantisation: str = "F32",
    n_expert: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    metadata: Mapping[str, MetaValue] | None = None,
    drop: frozenset[str] = frozenset(),
    split_max_tensors: int = 0,
) -> Path:
    """Write a tiny model that libllama loads, and return its path.

    Args:
        arch: llama, qwen2, qwen3, or any other that has the same tensors (gemma, when `tied`).
        n_embd: for K-quants (`quantize_gguf`) this, n_head * d_head and n_ff must be multiples of 256.
        d_head: n_embd / n_head when None.
        n_ff: 2 * n_embd when None.
        n_vocab: at least MIN_VOCAB.
        rope_dim: rotated dimensions of a head, all when None. With fewer, libllama 0.3.36 refuses a llama and ABORTS
            on a qwen2 or qwen3 (an assertion in its graph), so such files belong in a child process.
        rope_scaling: ("linear", factor), ("yarn", factor, orig_ctx), or "llama3": a `rope_freqs.weight` tensor.
        qkv_bias: biases on q, k, v; for qwen2 when None.
        qk_norm: RMS norms of each head's q and k; for qwen3 when None.
        tied: no `output.weight`: the head uses the token embedding.
        quantisation: F32, F16, BF16, Q8_0 or Q4_0, of every matrix; vectors are always F32.
        n_expert: with more than 0, the feed-forward is a mixture of experts, two of them used.
        metadata: set over what would be written; a key without a dot belongs to the architecture ("block_count").
        drop: names of tensors left out.
        split_max_tensors: with more than 0, the model is split into files of as many tensors; the first is returned.
    """
    path = Path(path)
    d_head = n_embd // n_head if d_head is None else d_head
    n_ff = 2 * n_embd if n_ff is None else n_ff
    shape = _Shape(n_layer, n_embd, n_head, n_head_kv, d_head, n_ff, n_vocab, n_expert)
    tensors = _tensors(
        shape,
        np.random.default_rng(seed),
        qkv_bias=arch == "qwen2" if qkv_bias is None else qkv_bias,
        qk_norm=arch == "qwen3" if qk_norm is None else qk_norm,
        tied=tied,
    )
    if rope_scaling == "llama3":
        if arch != "llama":
            raise ValueError(f"libllama reads rope_freqs.weight for llama, not for {arch}")
        tensors["rope_freqs.weight"] = llama3_freq_factors(rope_dim or d_head, rope_base)

    values = _metadata(
        arch,
        shape,
        n_ctx_train=n_ctx_train,
        rope_base=rope_base,
        rope_dim=rope_dim,
        rope_scaling=rope_scaling,
        chat_template=chat_template,
    )
    values["general.file_type"] = _FILE_TYPES[quantisation]
    for key, value in (metadata or {}).items():
        values[key if "." in key and not key.startswith(("rope.", "attention.")) else f"{arch}.{key}"] = value
    kept = {name: tensor for name, tensor in tensors.items() if name not in drop}
    _write(path, arch, values, kept, quantisation=quantisation, split_max_tensors=split_max_tensors)
    if split_max_tensors:
        return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]
    return path


def _metadata(
    arch: str,
    shape: _Shape,
    *,
    n_ctx_train: int = 2048,
    rope_base: float = 10000.0,
    rope_dim: int | None = None,
    rope_scaling: RopeScaling = None,
    chat_template: str | None = CHAT_TEMPLATE,
) -> dict[str, MetaValue]:
    pieces, scores, types = tiny_vocab(shape.n_vocab)
    values: dict[str, MetaValue] = {
        "general.name": f"tiny {arch}",
        f"{arch}.block_count": shape.n_layer,
        f"{arch}.context_length": n_ctx_train,
        f"{arch}.embedding_length": shape.n_embd,
        f"{arch}.feed_forward_length": shape.n_ff,
        f"{arch}.attention.head_count": shape.n_head,
        f"{arch}.attention.head_count_kv": shape.n_head_kv,
        f"{arch}.attention.key_length": shape.d_head,
        f"{arch}.attention.value_length": shape.d_head,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": rope_dim or shape.d_head,
        f"{arch}.rope.freq_base": rope_base,
        f"{arch}.vocab_size": shape.n_vocab,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.eot_token_id": EOT,
        "tokenizer.ggml.unknown_token_id": UNK,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    if shape.n_expert:
        values[f"{arch}.expert_count"] = shape.n_expert
        values[f"{arch}.expert_used_count"] = 2
    if isinstance(rope_scaling, tuple):
        values[f"{arch}.rope.scaling.type"] = rope_scaling[0]
        values[f"{arch}.rope.scaling.factor"] = rope_scaling[1]
        if rope_scaling[0] == "yarn":
            values[f"{arch}.rope.scaling.original_context_length"] = rope_scaling[2]
    if chat_template is not None:
        values["tokenizer.chat_template"] = chat_template
    return values


def _tensors(
    shape: _Shape, rng: np.random.Generator, *, qkv_bias: bool, qk_norm: bool, tied: bool
) -> dict[str, FloatArray]:
    """All tensors by GGUF name, matrices as [n_out, n_in]."""
    n_embd, n_ff, d = shape.n_embd, shape.n_ff, shape.d_head
    n_q, n_kv = shape.n_head * d, shape.n_head_kv * d
    gain = 1.6  # q and k of standard deviation 1.6 give attention logits one of 1.6 * 1.6 = 2.6

    def matrix(n_out: int, n_in: int, scale: float = 1.0) -> FloatArray:
        return rng.normal(0.0, scale / math.sqrt(n_in), (n_out, n_in)).astype(np.float32)

    def experts(n_out: int, n_in: int) -> FloatArray:
        return np.stack([matrix(n_out, n_in) for _ in range(shape.n_expert)])

    def norm(size: int, scale: float = 1.0) -> FloatArray:
        return (scale * rng.normal(1.0, 0.1, size)).astype(np.float32)

    # A tied embedding is also the output head: 0.3 keeps the logits from following the last token alone.
    tensors: dict[str, FloatArray] = {
        "token_embd.weight": rng.normal(0.0, 0.3 if tied else 1.0, (shape.n_vocab, n_embd)).astype(np.float32)
    }
    for layer in range(shape.n_layer):
        block: dict[str, FloatArray] = {"attn_norm.weight": norm(n_embd)}
        wq, wk = matrix(n_q, n_embd, gain), matrix(n_kv, n_embd, gain)
        first_of_group = wq.reshape(shape.n_head_kv, -1, d, n_embd)[:, 0].reshape(n_kv, n_embd)
        # corr(q, k) = 0.3: a query meets the key of a token like its own at a logit of 0.3 * gain^2 * sqrt(d).
        wk = (0.3 * first_of_group + math.sqrt(1 - 0.3**2) * wk).astype(np.float32)
        block |= {"attn_q.weight": wq, "attn_k.weight": wk, "attn_v.weight": matrix(n_kv, n_embd)}
        if qkv_bias:
            for name, size in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                block[f"attn_{name}.bias"] = rng.normal(0.0, 0.5, size).astype(np.float32)
        if qk_norm:
            block |= {"attn_q_norm.weight": norm(d, gain), "attn_k_norm.weight": norm(d, gain)}
        block |= {"attn_output.weight": matrix(n_embd, n_q), "ffn_norm.weight": norm(n_embd)}
        if shape.n_expert:
            block |= {
                "ffn_gate_inp.weight": matrix(shape.n_expert, n_embd),
                "ffn_gate_exps.weight": experts(n_ff, n_embd),
                "ffn_up_exps.weight": experts(n_ff, n_embd),
                "ffn_down_exps.weight": experts(n_embd, n_ff),
            }
        else:
            block |= {
                "ffn_gate.weight": matrix(n_ff, n_embd),
                "ffn_up.weight": matrix(n_ff, n_embd),
                "ffn_down.weight": matrix(n_embd, n_ff),
            }
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    tensors["output_norm.weight"] = norm(n_embd)
    if not tied:
        tensors["output.weight"] = matrix(shape.n_vocab, n_embd, 3.0)  # logits of standard deviation 3
    return tensors


def _write(
    path: Path,
    arch: str,
    values: Mapping[str, MetaValue],
    tensors: Mapping[str, FloatArray],
    *,
    quantisation: str = "F32",
    split_max_tensors: int = 0,
) -> None:
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    for key, value in values.items():
        _add(writer, key, value)
    matrix_type = gguf.GGMLQuantizationType[quantisation]
    for name, tensor in tensors.items():
        # Routers stay F32, as llama.cpp's own converter and quantiser leave them.
        kind = matrix_type if tensor.ndim > 1 and "ffn_gate_inp" not in name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: MetaValue) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def quantize_gguf(source: str | Path, target: str | Path, file_type: str = "Q4_K_M") -> Path:
    """Quantise an F32 or F16 model with libllama to `file_type`: Q4_K_M, Q5_K_M, Q6_K, Q2_K, Q8_0, ... ."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {source}")
    return Path(target)


# Models that libllama loads and our graph does not know: they run densely, with a notice.


def make_moe_gguf(path: str | Path, *, seed: int = 0, quantisation: str = "F32") -> Path:
    """Architecture llama with a mixture of four experts."""
    return make_tiny_gguf(path, seed=seed, n_expert=4, n_ff=64, quantisation=quantisation)


def make_gemma_gguf(path: str | Path, *, seed: int = 0, quantisation: str = "F32") -> Path:
    """Architecture gemma: the tensor names of a tied llama, another forward pass (GELU, scaled embedding)."""
    return make_tiny_gguf(path, arch="gemma", seed=seed, tied=True, quantisation=quantisation)


def make_mamba_gguf(path: str | Path, *, seed: int = 0) -> Path:
    """Architecture mamba: a recurrent state in place of keys and values, which cannot go back to an earlier token."""
    shape = _Shape(n_layer=2, n_embd=64, n_head=0, n_head_kv=0, d_head=0, n_ff=0, n_vocab=1024, n_expert=0)
    n_inner, n_state, n_conv, rank = 128, 8, 4, 4
    rng = np.random.default_rng(seed)

    def matrix(n_out: int, n_in: int, scale: float = 1.0) -> FloatArray:
        return rng.normal(0.0, scale / math.sqrt(n_in), (n_out, n_in)).astype(np.float32)

    values = _metadata("mamba", shape) | {
        "mamba.ssm.conv_kernel": n_conv,
        "mamba.ssm.inner_size": n_inner,
        "mamba.ssm.state_size": n_state,
        "mamba.ssm.time_step_rank": rank,
    }
    tensors = {"token_embd.weight": matrix(shape.n_vocab, shape.n_embd, 8.0)}
    for layer in range(shape.n_layer):
        block = {
            "attn_norm.weight": np.ones(shape.n_embd, np.float32),
            "ssm_in.weight": matrix(2 * n_inner, shape.n_embd),
            "ssm_conv1d.weight": matrix(n_inner, n_conv),
            "ssm_conv1d.bias": np.zeros(n_inner, np.float32),
            "ssm_x.weight": matrix(rank + 2 * n_state, n_inner),
            "ssm_dt.weight": matrix(n_inner, rank),
            "ssm_dt.bias": np.full(n_inner, -2.0, np.float32),
            "ssm_a": np.full((n_inner, n_state), -0.05, np.float32),
            "ssm_d": np.ones(n_inner, np.float32),
            "ssm_out.weight": matrix(shape.n_embd, n_inner),
        }
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    tensors |= {"output_norm.weight": np.ones(shape.n_embd, np.float32)}
    tensors |= {"output.weight": matrix(shape.n_vocab, shape.n_embd, 3.0)}
    kept = {name: value for name, value in values.items() if ".rope." not in name and ".attention.key" not in name}
    _write(Path(path), "mamba", {n: v for n, v in kept.items() if ".attention.value" not in n}, tensors)
    return Path(path)


# Files that must be refused with a message, never with an abort.


def make_vocab_only_gguf(path: str | Path) -> Path:
    """Hyper-parameters and tokenizer, not one tensor; libllama loads it with `vocab_only` alone."""
    shape = _Shape(3, 128, 4, 2, 32, 256, 512, 0)
    _write(Path(path), "llama", _metadata("llama", shape), {})
    return Path(path)


def make_missing_tensor_gguf(path: str | Path, name: str = "blk.1.attn_q.weight") -> Path:
    """A llama without the tensor `name`."""
    return make_tiny_gguf(path, drop=frozenset({name}))


def make_unknown_arch_gguf(path: str | Path) -> Path:
    """An architecture that libllama does not know."""
    return make_tiny_gguf(path, arch="nosuchmodel")


def make_truncated_gguf(path: str | Path, *, keep: float = 0.5) -> Path:
    """A llama whose file ends after the share `keep` of its bytes."""
    whole = make_tiny_gguf(path)
    data = whole.read_bytes()
    whole.write_bytes(data[: int(len(data) * keep)])
    return whole


def make_not_gguf(path: str | Path) -> Path:
    """A text file under a model's name."""
    Path(path).write_text("This is not a model, it is a text about models.\n" * 40)
    return Path(path)


def make_empty_file(path: str | Path) -> Path:
    """A file of no bytes."""
    Path(path).write_bytes(b"")
    return Path(path)


ABSURD_KINDS = ("n_kv", "n_tensors", "key_length", "string_length", "array_length", "n_dims", "tensor_size", "version")


def make_absurd_gguf(path: str | Path, kind: str) -> Path:
    """A well-formed start of a GGUF file with one absurd size in it; `kind` is one of ABSURD_KINDS."""
    huge = 1 << 60

    def string(text: bytes, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(text) if length is None else length) + text

    def header(n_tensors: int, n_kv: int, version: int = 3) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv)

    def tensor(n_dims: int, dims: tuple[int, ...]) -> bytes:
        return string(b"token_embd.weight") + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, 0, 0)

    architecture = string(b"general.architecture") + struct.pack("<I", gguf.GGUFValueType.STRING) + string(b"llama")
    array_key = string(b"tokenizer.ggml.scores") + struct.pack("<I", gguf.GGUFValueType.ARRAY)
    contents = {
        "n_kv": header(0, huge) + architecture,
        "n_tensors": header(huge, 1) + architecture,
        "key_length": header(0, 1) + string(b"general.architecture", huge),
        "string_length": header(0, 1)
        + string(b"general.architecture")
        + struct.pack("<I", gguf.GGUFValueType.STRING)
        + string(b"llama", huge),
        "array_length": header(0, 2) + architecture + array_key + struct.pack("<IQ", gguf.GGUFValueType.FLOAT32, huge),
        "n_dims": header(1, 1) + architecture + tensor(1 << 31, (128,)),
        "tensor_size": header(1, 1) + architecture + tensor(2, (1 << 40, 1 << 40)),
        "version": header(0, 1, version=77) + architecture,
    }
    Path(path).write_bytes(contents[kind] + bytes(64))
    return Path(path)


# Keys and values that libllama refuses, and those on which libllama 0.3.36 aborts (GGML_ASSERT), killing the process:
# whoever opens one of the latter has to look at the metadata first.
REFUSED_HPARAMS = (("attention.head_count", 0), ("attention.head_count_kv", 3), ("embedding_length", 1 << 20))
ABORTING_HPARAMS = (("block_count", 1 << 20),)


def make_absurd_hparams_gguf(path: str | Path, key: str, value: int) -> Path:
    """A llama one of whose hyper-parameters does not fit its tensors; see REFUSED_HPARAMS and ABORTING_HPARAMS."""
    return make_tiny_gguf(path, metadata={key: value})
