"""A Llama in PyTorch, and a start in which the circuit that copies from the context is already there in outline.

Shapes: B sequences of T tokens. Rotary embedding turns the two halves of a head against each other, as in the Hugging
Face code; `export.py` reorders rows of q and k so that llama.cpp, which turns neighbouring pairs, computes the same
function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.recipe import NetworkConfig

N_STAGES = 3  # last layers whose attention training guides, each to one stage of a lookup


def guided_heads(config: NetworkConfig) -> list[int]:
    """Of those layers: the first two, which share a KV head, and the first of the next KV head."""
    return [0, 1, config.heads_per_kv]


class Rotation:
    """Cosines and sines of the rotary embedding at `positions` [B, T], which need not be consecutive."""

    def __init__(self, positions: Tensor, config: NetworkConfig) -> None:
        frequencies = rope_frequencies(config).to(positions.device)
        angles = positions.float()[:, None, :, None] * frequencies  # [B, 1, T, head_dim / 2]
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
        return self.mix(self.attend(x, rotate)[0])

    def mix(self, x: Tensor) -> Tensor:
        """The second half of the layer: [..., n_embd] -> [..., n_embd]."""
        h = self.ffn_norm(x)
        hidden: Tensor = self.down(functional.silu(self.gate(h)) * self.up(h))
        return x + hidden

    def attend(self, x: Tensor, rotate: Rotation, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The first half of the layer.

        Args:
            x: [B, T, n_embd].
            rotate: of the positions of `x`.
            rows: [B, R], tokens whose attention is wanted.

        Returns:
            [B, T, n_embd], and the attention logits of `rows` in the guided heads, [B, guided heads, R, T], not masked;
            empty without `rows`.
        """
        h = self.attn_norm(x)
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
        if rows is None:
            return x + out, x.new_zeros(0)
        guided = guided_heads(config)
        index = rows[:, None, :, None].expand(-1, len(guided), -1, config.head_dim)
        looking = q[:, guided].gather(2, index)
        logits = looking @ k[:, guided].transpose(2, 3) / math.sqrt(config.head_dim)
        return x + out, logits


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
        normed: Tensor = self.norm(self.stream(tokens, positions, len(self.layers)))
        return normed

    def stream(self, tokens: Tensor, positions: Tensor, n_layers: int) -> Tensor:
        """The residual stream behind the first `n_layers`: `tokens` and `positions` [B, T] -> [B, T, n_embd]."""
        x, rotate = self.embed(tokens, positions)
        for layer in self.layers[:n_layers]:
            x = layer(x, rotate)
        return x

    def guided_features(
        self, tokens: Tensor, positions: Tensor, *, indices: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`features` of some tokens, and where other tokens look in the last layers.

        Args:
            tokens, positions: [B, T].
            indices: [n], into the B x T tokens laid end to end.
            rows: [B, R], tokens whose attention is wanted.

        Returns:
            [n, n_embd], and the attention logits of the last `N_STAGES` layers, [N_STAGES, B, guided heads, R, T].
        """
        x, rotate = self.embed(tokens, positions)
        layers = layers_of(self)
        logits = []
        for index, layer in enumerate(layers):
            guided = index >= len(layers) - N_STAGES
            x, looks = layer.attend(x, rotate, rows if guided else None)
            logits += [looks] if guided else []
            last = index == len(layers) - 1
            x = layer.mix(x.flatten(0, 1)[indices] if last else x)
        normed: Tensor = self.norm(x)
        return normed, torch.stack(logits)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        """What the first layer reads, and the rotation: `tokens` and `positions` [B, T] -> [B, T, n_embd]."""
        x: Tensor = self.embedding(tokens)
        if torch.is_autocast_enabled(tokens.device.type):
            x = x.bfloat16()
        return x, Rotation(positions, self.config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at consecutive positions: [B, T] -> [B, T, n_vocab]."""
        logits: Tensor = self.output(self.features(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None]))
        return logits


# The wired start. Attention that finds the earlier occurrence of a token and copies what followed took too long to
# appear from random weights on two CPU cores, so the weights start with it. All of them stay trainable.

N_BACK = 4  # layer 0 copies the tokens 1 to 4 places back
N_FAST = 10  # rotary pairs, from the fastest, by which layer 0 finds its place
SHARPNESS = 8.5  # of layer 0's attention to that place
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
    for layer in layers_of(network):
        layer.attn_out.weight.mul_(0.2)
        layer.down.weight.mul_(0.5)
    identity = _directions(config, generator)
    slots = [_directions(config, generator) for _ in range(N_BACK)]
    first, *later = layers_of(network)
    _wire_previous_tokens(first, identity, slots, constant)
    for index, layer in enumerate(later, start=1):
        for kv_head, slot in enumerate(KEY_SLOTS[(index - 1) % len(KEY_SLOTS)][: config.n_kv_heads]):
            _wire_match(layer, kv_head, identity, slots, slot, _directions(config, generator), 2.3 + 0.6 * index)
    network.output.weight.copy_(0.006 * network.embedding.weight)
    network.output.weight[:, 0] = 0.0


def layers_of(network: Llama) -> list[Layer]:
    """The layers of a network, first to last."""
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
