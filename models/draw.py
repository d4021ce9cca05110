"""What one step of training is made of: batches, and which of their tokens count for how much in the losses.

A step's batches depend on the seed and the number of the step alone, so that a resumed run draws what an uninterrupted
one would, in however many processes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.network import N_STAGES
from models.recipe import TrainConfig
from models.samples import MAX_TARGETS, Batch, Lookup, Role, Sampler

ROLE_WEIGHTS = {Role.ANSWER: 1.0, Role.REPEAT: 1.0, Role.QUOTE: 0.3, Role.LOOKUP: 2.0}
REPEAT_SHARE = 0.3  # of repeated random tokens among the samples at the very start
SELECTED_SHARE = 3 / 8  # of a batch's tokens enter the loss: all answers, the rest drawn from the text
GUIDED_SHARE = 1 / 8  # of a sample's tokens, at most, have their attention guided
MAX_GUIDED = 320  # of them in one sample
HOP_WEIGHT = 8.0  # of guided attention that goes through other places, beside 1: an eighth of it does at most
N_AHEAD = 4  # steps that a drawing process is ahead


@dataclass(frozen=True)
class Selection:
    """A batch, and those of its tokens that enter the loss.

    Attributes:
        tokens, positions: [B, T], what the network reads.
        indices: [n], into the B x T predictions laid end to end.
        targets: [n], the tokens to predict.
        weights: [n], in the loss.
        roles: [n].
        rows: [B, R], tokens whose attention is guided.
        places: [N_STAGES, B, R, MAX_TARGETS], the tokens each should look at in the last layers.
        place_weights: as `places`, in the loss; 0 where there is none.
    """

    tokens: Tensor
    positions: Tensor
    indices: Tensor
    targets: Tensor
    weights: Tensor
    roles: Tensor
    rows: Tensor
    places: Tensor
    place_weights: Tensor

    def to(self, device: torch.device) -> Selection:
        """The same on another device."""
        return Selection(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def select(
    batch: Batch, *, n_answer_tokens: int, text_weight: float, guide_weight: float, generator: torch.Generator
) -> Selection:
    """All answer tokens of a batch and as many random text tokens as fill up `SELECTED_SHARE`, a fixed number.

    Args:
        batch: tokens to choose from.
        n_answer_tokens: of the whole step; the weights of answers are divided by it.
        text_weight: what the weights of text add up to.
        guide_weight: what the weights of places to look at add up to.
        generator: draws the text tokens.
    """
    targets, roles = batch.tokens[:, 1:].reshape(-1), batch.roles[:, 1:].reshape(-1)
    n_selected = int(len(targets) * SELECTED_SHARE)
    answers = (roles > Role.TEXT).nonzero()[:, 0][:n_selected]
    text = (roles == Role.TEXT).nonzero()[:, 0]
    text = text[torch.randperm(len(text), generator=generator)[: n_selected - len(answers)]]
    indices = torch.cat((answers, text))
    of_role = torch.tensor([0.0, *(ROLE_WEIGHTS[role] for role in sorted(ROLE_WEIGHTS))])
    answer_weights = of_role[roles[answers]] / n_answer_tokens
    weights = torch.cat((answer_weights, torch.full((len(text),), text_weight / max(1, len(text)))))
    rows, places, place_weights = guide(batch.lookups, batch.tokens.shape[1] - 1, generator)
    missing = (0, n_selected - len(indices))  # padding may leave too few
    return Selection(
        tokens=batch.tokens[:, :-1].contiguous(),
        positions=batch.positions[:, :-1].contiguous(),
        indices=functional.pad(indices, missing),
        targets=functional.pad(targets[indices], missing),
        weights=functional.pad(weights, missing),
        roles=functional.pad(roles[indices], missing, value=int(Role.PADDING)),
        rows=rows,
        places=places,
        place_weights=place_weights * guide_weight,
    )


def guide(
    lookups: Sequence[Sequence[Lookup]], n_tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows`, `places` and `place_weights`, which add up to 1, of a `Selection`.

    Of too many lookups, all that hop come in, as far as there is room, and random others.
    """
    n_rows = min(MAX_GUIDED, int(n_tokens * GUIDED_SHARE))
    rows = torch.zeros(len(lookups), n_rows, dtype=torch.int64)
    places = torch.zeros(N_STAGES, len(lookups), n_rows, MAX_TARGETS, dtype=torch.int64)
    weights = torch.zeros(places.shape)
    for sample, found in enumerate(lookups):
        mixed = [found[index] for index in torch.randperm(len(found), generator=generator).tolist()]
        chosen = sorted(mixed, key=lambda lookup: not lookup.hops)[:n_rows]
        for row, lookup in enumerate(chosen):
            rows[sample, row] = lookup.query
            for stage, tokens in enumerate(lookup.stages):
                places[stage, sample, row, : len(tokens)] = torch.tensor(tokens)
                weights[stage, sample, row, : len(tokens)] = (HOP_WEIGHT if lookup.hops else 1.0) / len(tokens)
    return rows, places, weights / weights.sum().clamp(min=1)


def draw(tokenizer: Any, config: TrainConfig, step: int) -> list[Selection]:
    """What step number `step`, from 0, is trained on."""
    index, progress = config.stage_at(step)
    stage = config.stages[index]
    repeat_share = REPEAT_SHARE * max(0.0, 1 - 2 * progress) if index == 0 else 0.0
    sampler = Sampler(tokenizer, config=config.samples, seed=f"train-{config.seed}-{step}")
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    batches = [sampler.batch(stage, repeat_share=repeat_share) for _ in range(stage.n_accumulated)]
    n_answer_tokens = max(1, sum(int((batch.roles[:, 1:] > Role.TEXT).sum()) for batch in batches))
    loss_weights = {
        "text_weight": config.text_weight / stage.n_accumulated,
        "guide_weight": config.guide_weight / stage.n_accumulated,
    }
    return [select(batch, n_answer_tokens=n_answer_tokens, **loss_weights, generator=generator) for batch in batches]


def drawn(tokenizer: Any, config: TrainConfig, first_step: int, *, n_processes: int = 0) -> Iterator[list[Selection]]:
    """What the steps from `first_step` on are trained on, in order.

    Args:
        tokenizer: a SentencePiece processor.
        config: the recipe.
        first_step: counted from 0.
        n_processes: that draw ahead; 0: each step is drawn when it is asked for.
    """
    steps = range(first_step, config.n_steps)
    if n_processes == 0:
        yield from (draw(tokenizer, config, step) for step in steps)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, _start_drawing) as pool:
        coming: list[Future[list[Selection]]] = []
        for step in steps:
            coming.append(pool.submit(draw, tokenizer, config, step))
            if len(coming) > N_AHEAD * n_processes:
                yield coming.pop(0).result()
        yield from (future.result() for future in coming)


def _start_drawing() -> None:
    torch.set_num_threads(1)
