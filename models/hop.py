"""The wired second hop: what a question's first lookup finds becomes what the next one looks for.

"Where does Ann's sister live?" asks for the home of somebody whom only the document names. The first guided layer
finds the name, the second must look for it. Training alone did not get there in a million tokens: queries and keys of
the second would have to learn to match names both at once. But the first layer matches names already, those of
questions that ask directly, and from these a linear regression reads off which query goes with which name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from models.network import N_STAGES, Layer, Llama, guided_heads, layers_of
from models.recipe import SampleConfig, Stage
from models.samples import Batch, Sampler

CHAINS = Stage(511, 1, 1, 0, document_share=(0.5, 0.7), fact_density=(0.5, 0.9), chain_share=1.0)
N_MOMENT_DOCUMENTS = 60
RIDGE = 10.0  # of the regression
AMPLITUDE = 2.0  # of what the residual stream carries from the first layer to the second
SHARPNESS = 1.5  # of the second lookup, as a multiple of the first's: queries from a regression are too short
OUTPUT_SHARE = 0.7  # of what the two older guided heads write, written by the new one


@dataclass(frozen=True)
class Example:
    """A question that goes through a name, beside one that asks for the same value by that name.

    Attributes:
        asked: what the first layer's attention reads where the answer to the former begins: [n_embd].
        name: what it reads at the name in the document, mean over its tokens: [n_embd].
        query: of its first head where the answer to the latter begins, not rotated: [head_dim].
    """

    asked: Tensor
    name: Tensor
    query: Tensor


@torch.no_grad()
def wire_hop(network: Llama, tokenizer: Any, samples: SampleConfig, *, n_examples: int, seed: str) -> None:
    """Give the third guided head of the first two guided layers the two ends of a hop, and clear the rest of its group.

    In the first layer it looks where the first head looks, and writes the query that goes with the name found there
    into directions of the residual stream that hardly anything else uses. In the second it adds the part of the query
    that follows from the question, matches keys as the first layer does, and writes what the other guided heads would.

    Args:
        network: changed in place.
        tokenizer: a SentencePiece processor.
        samples: how documents and questions are drawn.
        n_examples: that the regression is made from.
        seed: of what is drawn.
    """
    config = network.config
    first, second, *_ = _guided_layers(network)
    sampler = Sampler(tokenizer, config=replace(samples, gap_share=0.0), seed=seed)
    quiet, rms = _quiet_directions(network, sampler)
    from_asked, from_name = _regression(list(islice(_examples(network, sampler), n_examples)))

    head_dim, head = config.head_dim, guided_heads(config)[-1]
    own = slice(head * head_dim, (head + 1) * head_dim)
    for layer in (first, second):  # clear what the second KV head's group asks and writes
        layer.q.weight[own.start :] = 0.0
        layer.attn_out.weight[:, own.start :] = 0.0
    first.q.weight[own] = first.q.weight[:head_dim]
    first.k.weight[head_dim:] = first.k.weight[:head_dim]
    first.v.weight[head_dim:] = from_name
    first.attn_out.weight[:, own] = AMPLITUDE * quiet

    to_second = first.attn_norm.weight / second.attn_norm.weight
    carried = quiet.T / second.attn_norm.weight * (rms / AMPLITUDE)
    older = second.attn_out.weight[:, :head_dim] + second.attn_out.weight[:, head_dim : 2 * head_dim]
    second.k.weight[head_dim:] = first.k.weight[:head_dim] * to_second
    second.v.weight[head_dim:] = second.v.weight[:head_dim]
    _blind(network, quiet)
    second.q.weight[own] = SHARPNESS * (from_asked * to_second + carried)
    second.attn_out.weight[:, own] = OUTPUT_SHARE * older


def _examples(network: Llama, sampler: Sampler) -> Iterator[Example]:
    first = _guided_layers(network)[0]
    while True:
        batch = sampler.batch(CHAINS)
        begins = {span.start - 1 for span in batch.spans[0]}
        lookups = [lookup for lookup in batch.lookups[0] if lookup.query in begins]
        direct = {lookup.stages[0]: lookup.query for lookup in lookups if not lookup.hops}
        hops = [lookup for lookup in lookups if lookup.hops and lookup.stages[1] == lookup.stages[-1]]
        pairs = [(hop, direct[hop.stages[1]]) for hop in hops if hop.stages[1] in direct]
        if not pairs:
            continue
        read = first.attn_norm(_stream(network, batch, 0))
        queries = first.q(read)[:, : network.config.head_dim]
        for hop, begin in pairs:
            yield Example(read[hop.query].clone(), read[list(hop.stages[0])].mean(0), queries[begin].clone())


def _guided_layers(network: Llama) -> list[Layer]:
    return layers_of(network)[-N_STAGES:]


def _stream(network: Llama, batch: Batch, n_guided: int) -> Tensor:
    """The residual stream behind `n_guided` guided layers, of one sample without its last token: [T, n_embd]."""
    device, n_layers = network.embedding.weight.device, len(network.layers) - N_STAGES + n_guided
    return network.stream(batch.tokens[:, :-1].to(device), batch.positions[:, :-1].to(device), n_layers)[0]


def _regression(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Matrices [head_dim, n_embd] that take what was asked, and the name found, to parts of the query to make next."""
    asked = torch.stack([example.asked for example in examples])
    known = torch.cat((asked, torch.stack([example.name for example in examples])), dim=1)
    wanted = torch.stack([example.query for example in examples])
    weights = torch.linalg.solve(known.T @ known + RIDGE * torch.eye(known.shape[1]).to(known), known.T @ wanted)
    from_asked, from_name = weights.T.split(asked.shape[1], dim=1)
    return from_asked, from_name


def _quiet_directions(network: Llama, sampler: Sampler) -> tuple[Tensor, float]:
    """Orthonormal directions that the residual stream before the second layer uses least: [n_embd, head_dim]; and its
    root mean square where answers begin.
    """
    everywhere, answers = [], []
    for index in range(N_MOMENT_DOCUMENTS):
        batch = sampler.batch(replace(CHAINS, chain_share=float(index % 2)))
        stream = _stream(network, batch, 1)
        everywhere.append(stream)
        answers.append(stream[[span.start - 1 for span in batch.spans[0]]])
    tokens, begins = torch.cat(everywhere), torch.cat(answers)
    moments = tokens.T @ tokens / len(tokens) + begins.T @ begins / len(begins)
    directions = torch.linalg.eigh(moments).eigenvectors[:, : network.config.head_dim].contiguous()
    return directions, float(begins.square().mean(1).sqrt().mean())


def _blind(network: Llama, directions: Tensor) -> None:
    """Keep what follows the first guided layer's attention from reading `directions`."""
    guided = _guided_layers(network)
    readers = [(matrix, layer.ffn_norm) for layer in guided for matrix in (layer.gate, layer.up)]
    readers += [(matrix, layer.attn_norm) for layer in guided[1:] for matrix in (layer.q, layer.k, layer.v)]
    readers.append((network.output, network.norm))
    for matrix, norm in readers:
        matrix.weight -= matrix.weight * norm.weight @ directions @ (directions.T / norm.weight)
