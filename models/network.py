"""A Llama in PyTorch, and a start in which the circuit that copies from the context is already sketched.

Shapes: B sequences of T tokens. Rotary embedding turns the two halves of a head against each other, as in the Hugging
Face code; `export.py` reorders rows of q and k so that llama.cpp, which turns neighbouring pairs, computes the same
function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network; the defaults are the shipped model's (11.3 M parameters)."""

    n_vocab: int = 2048
    n_embd: int = 512
    n_layers: int = 5
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 64
    n_ff: int = 768
    rope_base: float = 500_000.0
    norm_eps: float = 1e-5
    n_context: int = 8192

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} KV heads evenly")

    @property
    def heads_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads


class Rotation:
    """Cosines and sines of the rotary embedding at `positions` [B, T], which need not be consecutive."""

    def __init__(self, positions: Tensor, config: NetworkConfig) -> None:
        angles = positions.float()[:, None, :, None] * rope_frequencies(config)  # [B, 1, T, head_dim / 2]
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [B, heads, T, head_dim], rotated in float32 and returned in its own type."""
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), dim=-1).to(x.dtype)


def rope_frequencies(config: NetworkConfig) -> Tensor:
    """Angle per position of each pair of dimensions, falling from 1: [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return torch.as_tensor(config.rope_base) ** -exponents


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, and scale."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Layer(nn.Module):
    """Attention with grouped queries, then SwiGLU, each added to the residual stream."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        n_q, n_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.q = nn.Linear(config.n_embd, n_q, bias=False)
        self.k = nn.Linear(config.n_embd, n_kv, bias=False)
        self.v = nn.Linear(config.n_embd, n_kv, bias=False)
        self.attn_out = nn.Linear(n_q, config.n_embd, bias=False)
        self.ffn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotate: Rotation) -> Tensor:
        x = x + self._attend(self.attn_norm(x), rotate)
        h = self.ffn_norm(x)
        hidden: Tensor = self.down(functional.silu(self.gate(h)) * self.up(h))
        return x + hidden

    def _attend(self, h: Tensor, rotate: Rotation) -> Tensor:
        config = self.config
        n_batch, n_tokens, _ = h.shape

        def heads(linear: nn.Linear, n: int) -> Tensor:
            projected: Tensor = linear(h)
            return projected.view(n_batch, n_tokens, n, config.head_dim).transpose(1, 2)

        q = rotate(heads(self.q, config.n_heads))
        k = rotate(heads(self.k, config.n_kv_heads)).repeat_interleave(config.heads_per_kv, dim=1)
        v = heads(self.v, config.n_kv_heads).repeat_interleave(config.heads_per_kv, dim=1)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.attn_out(attended.transpose(1, 2).reshape(n_batch, n_tokens, -1))
        return out


class Llama(nn.Module):
    """The whole network; the output matrix is its own, not the embedding's."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_vocab, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.output = nn.Linear(config.n_embd, config.n_vocab, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("attn_out.weight", "down.weight"))
                nn.init.normal_(weight, 0.0, 0.02 / math.sqrt(2 * config.n_layers) if into_residual else 0.02)

    def features(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the output matrix reads: `tokens` and `positions` [B, T] -> [B, T, n_embd]."""
        x: Tensor = self.embedding(tokens)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        rotate = Rotation(positions, self.config)
        for layer in self.layers:
            x = layer(x, rotate)
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at consecutive positions: [B, T] -> [B, T, n_vocab]."""
        logits: Tensor = self.output(self.features(tokens, torch.arange(tokens.shape[1])[None]))
        return logits

    def n_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())


# The wired start. Attention that finds the earlier occurrence of a token and copies what followed took too long to
# appear from random weights on two CPU cores, so the weights start with it. All of them stay trainable.

N_BACK = 4  # layer 0 copies the tokens 1 to 4 places back
N_FAST = 16  # rotary pairs, from the fastest, by which layer 0 finds its place
SHARPNESS = 7.0  # of layer 0's attention to that place
EMBEDDING = None  # a head of a later layer whose keys read the token itself instead of a copied one
# for layers 1, 2, ...: what the keys of each KV head read
KEY_SLOTS: tuple[tuple[int | None, int | None], ...] = ((0, EMBEDDING), (0, 1), (0, 0), (0, 1), (0, EMBEDDING))


@torch.no_grad()
def wire(network: Llama, *, seed: int = 7) -> None:
    """Overwrite the random start with one in which heads already match and copy tokens.

    The heads of layer 0's first KV head attend 1 to 4 places back, by rotation alone, and copy a projection of those
    tokens into slots of the residual stream. In every later layer the keys read a slot ("the token before this one") or
    the token itself, the queries read the current token, both in the slowest rotary pairs, where distance hardly
    matters; values and outputs start near a copy of the embedding.
    """
    config = network.config
    generator = torch.Generator().manual_seed(seed)
    constant = _embed_with_constant(network, generator)
    for layer in _layers(network):
        layer.attn_out.weight.mul_(0.2)
        layer.down.weight.mul_(0.5)
    identity = _directions(config, generator)
    slots = [_directions(config, generator) for _ in range(N_BACK)]
    first, *later = _layers(network)
    _wire_previous_tokens(first, identity, slots, constant)
    for index, layer in enumerate(later, start=1):
        for kv_head, slot in enumerate(KEY_SLOTS[(index - 1) % len(KEY_SLOTS)][: config.n_kv_heads]):
            _wire_match(layer, kv_head, identity, slots, slot, _directions(config, generator), 2.3 + 0.6 * index)
    network.output.weight.copy_(0.006 * network.embedding.weight)
    network.output.weight[:, 0] = 0.0


def _layers(network: Llama) -> list[Layer]:
    return [layer for layer in network.layers if isinstance(layer, Layer)]


def _embed_with_constant(network: Llama, generator: torch.Generator) -> float:
    """Draw the embedding with one constant channel, 0; returns that channel's value after the norm."""
    n_embd = network.config.n_embd
    constant = 0.3 * math.sqrt(n_embd)
    network.embedding.weight.normal_(0.0, 1.0, generator=generator)
    network.embedding.weight[:, 0] = constant
    return constant / math.sqrt((n_embd - 1 + constant**2) / n_embd)


def _directions(config: NetworkConfig, generator: torch.Generator) -> Tensor:
    """`head_dim` orthonormal directions of the residual stream, clear of the constant channel: [head_dim, n_embd]."""
    columns: Tensor = torch.linalg.qr(torch.randn(config.n_embd, config.head_dim, generator=generator))[0]
    columns[0] = 0.0
    return columns.T.contiguous()


def _wire_previous_tokens(layer: Layer, identity: Tensor, slots: list[Tensor], constant: float) -> None:
    """Heads of the first KV head: query and key are constants, rotated so that they meet 1, 2, ... places apart."""
    config = layer.config
    head_dim, half = config.head_dim, config.head_dim // 2
    frequencies = rope_frequencies(config)[:N_FAST]
    scale = SHARPNESS / constant
    layer.k.weight[:head_dim] = 0.0
    layer.k.weight[:N_FAST, 0] = scale
    layer.v.weight[:head_dim] = identity
    for head in range(config.heads_per_kv):
        angles = -(head + 1) * frequencies
        query = layer.q.weight[head * head_dim : (head + 1) * head_dim]
        query.zero_()
        query[:N_FAST, 0] = scale * angles.cos()
        query[half : half + N_FAST, 0] = scale * angles.sin()
        layer.attn_out.weight[:, head * head_dim : (head + 1) * head_dim] = 1.2 * slots[head % N_BACK].T


def _wire_match(  # noqa: PLR0917 (private, one caller)
    layer: Layer, kv_head: int, identity: Tensor, slots: list[Tensor], slot: int | None, copied: Tensor, gain: float
) -> None:
    """Heads of one KV head: keys read `slot`, queries the current token; the find is copied unless `slot` is None."""
    config = layer.config
    head_dim, half = config.head_dim, config.head_dim // 2
    slow = torch.cat((torch.arange(half // 2, half), torch.arange(half + half // 2, head_dim)))
    read = identity if slot is None else slots[slot]
    layer.k.weight[kv_head * head_dim + slow] += gain * read[slow]
    if slot is not None:
        layer.v.weight[kv_head * head_dim : (kv_head + 1) * head_dim] += copied
    for member in range(config.heads_per_kv):
        head = kv_head * config.heads_per_kv + member
        layer.q.weight[head * head_dim + slow] += (gain if member < 3 else 0.4 * gain) * identity[slow]
        if slot is not None:
            layer.attn_out.weight[:, head * head_dim : (head + 1) * head_dim] += 0.5 * copied.T
