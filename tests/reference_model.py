"""The oracle's model: llama, qwen2 and qwen3 from the GGUF itself in NumPy float64, attending densely or by a session.

Shapes and symbols are those of reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np
from reference import QKV, Floats, Params, Phase, Rope, attend
from reference_session import LayerResult, ReferenceSession

Attend: TypeAlias = Callable[[int, Floats, Floats, Floats], Floats]


@dataclass(frozen=True)
class Forward:
    """A forward pass: logits [n, n_vocab] and, per layer, q, k, v before RoPE (and after biases and norms)."""

    logits: Floats
    qkv: list[QKV]


class ReferenceModel:
    """A GGUF's weights in float64 and its forward pass, attention left to the caller."""

    def __init__(self, path: str | Path) -> None:
        reader = gguf.GGUFReader(path)
        self._values = {key: item.contents() for key, item in reader.fields.items() if key.find("tokenizer.") != 0}
        self._weights = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }
        self.arch: str = self._values["general.architecture"]
        if self.arch not in ("llama", "qwen2", "qwen3") or self._number("expert_count", 0):
            raise ValueError(f"no forward pass for {self.arch}")
        self.n_layer = int(self._number("block_count"))
        self.n_head = int(self._number("attention.head_count"))
        self.n_head_kv = int(self._number("attention.head_count_kv", self.n_head))
        self.d_head = int(self._number("attention.key_length", self._number("embedding_length") / self.n_head))
        self.rope = self._rope()

    def _number(self, key: str, default: float | None = None) -> float:
        name = f"{self.arch}.{key}"
        if default is None or name in self._values:
            return float(self._values[name])
        return default

    def _rope(self) -> Rope:
        """What libllama 0.3.36 makes of the metadata for these architectures.

        Of YaRN's keys it reads attn_factor and the original context; yarn_ext_factor, yarn_attn_factor, yarn_beta_fast
        and yarn_beta_slow it leaves to other architectures, as it does `attention.scale`.
        """
        kind = self._values.get(f"{self.arch}.rope.scaling.type", "linear")
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        return Rope(
            n_rot=int(self._number("rope.dimension_count", self.d_head)),
            freq_base=self._number("rope.freq_base", 10000.0),
            pairing="norm" if self.arch == "llama" else "neox",
            freq_factors=self._weights.get("rope_freqs.weight"),
            freq_scale=1 / factor if factor > 0 and kind != "none" else 1.0,
            ext_factor=1.0 if kind == "yarn" else 0.0,
            attn_factor=self._number("rope.scaling.attn_factor", 1.0),
            n_ctx_orig=int(self._number("rope.scaling.original_context_length", self._number("context_length"))),
        )

    def _norm(self, x: Floats, name: str) -> Floats:
        eps = self._number("attention.layer_norm_rms_epsilon")
        normed: Floats = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * self._weights[name]
        return normed

    def _linear(self, x: Floats, name: str) -> Floats:
        y: Floats = x @ self._weights[f"{name}.weight"].T
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _heads(self, x: Floats, block: str, which: str, n_head: int) -> Floats:
        """q, k or v of a layer, [m, n_head, d]; qwen3 normalises each head of q and k."""
        heads = self._linear(x, f"{block}.attn_{which}").reshape(len(x), n_head, self.d_head)
        norm = f"{block}.attn_{which}_norm.weight"
        return self._norm(heads, norm) if norm in self._weights else heads

    def window(self, tokens: Sequence[int], attention: Attend) -> Forward:
        """One window: `attention(layer, q, k, v)` returns the attention's output [m, H*d]."""
        x = self._weights["token_embd.weight"][list(tokens)]
        qkv: list[QKV] = []
        for layer in range(self.n_layer):
            block = f"blk.{layer}"
            normed = self._norm(x, f"{block}.attn_norm.weight")
            q = self._heads(normed, block, "q", self.n_head)
            k = self._heads(normed, block, "k", self.n_head_kv)
            v = self._heads(normed, block, "v", self.n_head_kv)
            qkv.append((q, k, v))
            x = x + self._linear(attention(layer, q, k, v), f"{block}.attn_output")
            normed = self._norm(x, f"{block}.ffn_norm.weight")
            gate = self._linear(normed, f"{block}.ffn_gate")
            silu = gate / (1 + np.exp(-gate))
            x = x + self._linear(silu * self._linear(normed, f"{block}.ffn_up"), f"{block}.ffn_down")
        head = "output" if "output.weight" in self._weights else "token_embd"
        return Forward(self._linear(self._norm(x, "output_norm.weight"), head), qkv)

    def session(self, params: Params) -> ReferenceSession:
        """An empty session of this model's shapes."""
        return ReferenceSession(params, self.n_layer, self.n_head, self.n_head_kv, self.d_head, self.rope)


def forward(gguf_path: str | Path, tokens: Sequence[int]) -> Forward:
    """Plain dense causal forward pass of a GGUF over `tokens`, in float64."""
    model = ReferenceModel(gguf_path)
    positions = np.arange(len(tokens))
    params = Params(positions="exact", select="all")

    def dense(_: int, q: Floats, k: Floats, v: Floats) -> Floats:
        return attend(q, positions, k, v, positions, params=params, rope=model.rope)[0]

    return model.window(tokens, dense)


@dataclass
class _Recorder:
    """The session's attention for one window of the model, keeping what each layer did."""

    session: ReferenceSession
    phase: Phase
    results: list[LayerResult] = field(default_factory=list)

    def __call__(self, layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        self.results.append(self.session.layer(layer, q, k, v, self.phase))
        return self.results[-1]["out"]


def forward_session(
    model: ReferenceModel, session: ReferenceSession, tokens: Sequence[int], windows: Iterable[tuple[int, Phase]]
) -> tuple[Floats, list[list[LayerResult]]]:
    """The model with the session's sparse attention: `windows` cut the tokens as (length, phase).

    Returns the logits [n, n_vocab] and, per window, every layer's result.
    """
    logits: list[Floats] = []
    results: list[list[LayerResult]] = []
    start = 0
    for length, phase in windows:
        attention = _Recorder(session, phase)
        session.begin(phase)
        logits.append(model.window(tokens[start : start + length], attention).logits)
        session.end(length)
        results.append(attention.results)
        start += length
    return np.concatenate(logits), results
