"""Training: stages of growing length under one learning-rate schedule; a killed run resumes exactly from its
checkpoint.

Matrices inside the layers are trained by Muon, everything else by AdamW, in bfloat16 with float32 master weights. The
run's folder receives `checkpoint.pt` and `log.jsonl`, one JSON object per line: `step` lines with the losses, `eval`
lines with the share of held-out answers predicted in full (teacher-forced).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.files import written_atomically
from models.network import Llama, NetworkConfig, wire
from models.samples import Batch, Role, SampleConfig, Sampler

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"

ROLE_WEIGHTS = {Role.ANSWER: 1.0, Role.REPEAT: 1.0, Role.QUOTE: 0.3, Role.LOOKUP: 2.0}
REPEAT_SHARE = 0.3  # of repeated random tokens among the samples at the very start
SELECTED_SHARE = 5 / 8  # of a batch's tokens enter the loss: all answers, the rest drawn from the text
MAX_COMPILED_TOKENS = 4096  # longer samples run uncompiled: their few steps do not repay the compilation


@dataclass(frozen=True)
class Stage:
    """`n_steps` steps, each on `n_accumulated` batches of `n_samples` samples of `n_tokens` tokens."""

    n_tokens: int
    n_samples: int
    n_accumulated: int
    n_steps: int


@dataclass(frozen=True)
class TrainConfig:
    """The recipe of a run.

    Attributes:
        stages: run in order.
        seed: of weights and samples.
        matrix_lr: peak learning rate of Muon.
        other_lr: peak learning rate of AdamW; for the embedding `embedding_lr`.
        n_warmup: steps over which learning rates rise.
        decay_share: last share of all steps, over which learning rates fall linearly, to `min_lr_scale` of the peak.
        text_weight: weight in the loss of predicting plain text, beside 1 for answers.
        wired: start with `network.wire`.
        save_every: steps between checkpoints; between evaluations `eval_every`.
        compiled: through torch.compile, which needs a C++ compiler.
        n_threads: threads of PyTorch; results are repeatable for one number of threads on one machine.
    """

    stages: tuple[Stage, ...]
    seed: int = 1234
    matrix_lr: float = 0.005
    other_lr: float = 2e-3
    embedding_lr: float = 1e-2
    n_warmup: int = 40
    decay_share: float = 0.6
    min_lr_scale: float = 0.03
    text_weight: float = 0.1
    wired: bool = True
    save_every: int = 20
    eval_every: int = 100
    compiled: bool = True
    n_threads: int = 2

    @property
    def n_steps(self) -> int:
        return sum(stage.n_steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, float]:
        """Index of the stage that `step`, from 0, belongs to, and how much of that stage is done, 0 to 1."""
        for index, stage in enumerate(self.stages):
            if step < stage.n_steps:
                return index, step / stage.n_steps
            step -= stage.n_steps
        raise ValueError(f"step {step + self.n_steps}: expected fewer than {self.n_steps}")

    def lr_scale(self, step: int) -> float:
        """What the peak learning rates are multiplied by at `step`."""
        done = step / self.n_steps
        fall = 1.0 if done < 1 - self.decay_share else max(self.min_lr_scale, (1 - done) / self.decay_share)
        return min(1.0, (step + 1) / self.n_warmup) * fall


def train(folder: Path, *, tokenizer: Any, network_config: NetworkConfig, config: TrainConfig) -> Llama:
    """Train a network, or finish a run that was cut off, in `folder`.

    Args:
        folder: holds the run's checkpoint and log.
        tokenizer: a SentencePiece processor.
        network_config: shape of the network.
        config: the recipe; a resumed run must be given the same one, and the same shape.

    Returns:
        The trained network.
    """
    torch.set_num_threads(config.n_threads)
    torch.use_deterministic_algorithms(True)
    trainer = Trainer(tokenizer, network_config=network_config, config=config)
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        trainer.load(checkpoint)
    log = folder / LOG
    _keep_log_until(log, trainer.step)
    while trainer.step < config.n_steps:
        records = [trainer.train_step()]
        if trainer.step % config.eval_every == 0 or trainer.step == config.n_steps:
            records.append(trainer.evaluate())
        with log.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        if trainer.step % config.save_every == 0 or trainer.step == config.n_steps:
            trainer.save(checkpoint)
    return trainer.network


def _keep_log_until(log: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a run resumes from, and a line cut off by the kill."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with written_atomically(log) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


class Muon:
    """Gradient descent with momentum whose updates are made orthogonal (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon).

    Args:
        matrices: what is trained, each [rows, columns].
        lr: peak learning rate.
        momentum: of the running mean of gradients, with a Nesterov step.
        weight_decay: times the learning rate, per step.
    """

    def __init__(self, matrices: Sequence[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.02):
        self.matrices = list(matrices)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.means = [torch.zeros_like(matrix) for matrix in self.matrices]

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        lr = self.lr * lr_scale
        for matrix, mean in zip(self.matrices, self.means, strict=True):
            if matrix.grad is None:
                raise RuntimeError("step before backward")
            mean.lerp_(matrix.grad, 1 - self.momentum)
            update = orthogonalised(matrix.grad.lerp(mean, self.momentum))
            matrix.mul_(1 - lr * self.weight_decay)
            n_rows, n_columns = matrix.shape
            matrix.add_(update, alpha=-lr * max(1.0, n_rows / n_columns) ** 0.5)


def orthogonalised(matrix: Tensor, n_iterations: int = 5) -> Tensor:
    """About the nearest matrix with singular values 1, by a quintic Newton-Schulz iteration in bfloat16."""
    tall = matrix.size(0) > matrix.size(1)
    x: Tensor = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    result: Tensor = x.mT if tall else x
    return result.float()


@dataclass(frozen=True)
class Selection:
    """A batch, and those of its tokens that enter the loss.

    Attributes:
        tokens, positions: [B, T], what the network reads.
        indices: [n], into the B x T predictions laid end to end.
        targets: [n], the tokens to predict.
        weights: [n], in the loss.
        roles: [n].
    """

    tokens: Tensor
    positions: Tensor
    indices: Tensor
    targets: Tensor
    weights: Tensor
    roles: Tensor


def select(batch: Batch, *, n_answer_tokens: int, text_weight: float, generator: torch.Generator) -> Selection:
    """All answer tokens of a batch and as many random text tokens as fill up `SELECTED_SHARE`, a fixed number.

    Args:
        batch: tokens to choose from.
        n_answer_tokens: of the whole step; the weights of answers are divided by it.
        text_weight: what the weights of text add up to.
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
    missing = (0, n_selected - len(indices))  # padding may leave too few; compiled code wants one shape
    return Selection(
        tokens=batch.tokens[:, :-1].contiguous(),
        positions=batch.positions[:, :-1].contiguous(),
        indices=functional.pad(indices, missing),
        targets=functional.pad(targets[indices], missing),
        weights=functional.pad(weights, missing),
        roles=functional.pad(roles[indices], missing, value=int(Role.PADDING)),
    )


class Trainer:
    """A network, its optimisers, and how far they are."""

    def __init__(self, tokenizer: Any, *, network_config: NetworkConfig, config: TrainConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.step = 0
        self.n_tokens_seen = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        torch.manual_seed(config.seed)
        self.network = Llama(network_config)
        if config.wired:
            wire(self.network)
        self._muon, self._adam, self._others = self._optimisers()
        self._compiled_stage = -1
        self._loss: Callable[..., tuple[Tensor, Tensor]] = self._loss_of

    def train_step(self) -> dict[str, Any]:
        """One step of the optimisers; returns its line of the log."""
        config = self.config
        index, progress = config.stage_at(self.step)
        stage = config.stages[index]
        self._compile(index)
        loss = {"answer": Mean(), "text": Mean(), "repeat": Mean()}
        for selection in self._draw(stage, REPEAT_SHARE * max(0.0, 1 - 2 * progress) if index == 0 else 0.0):
            total, per_token = self._loss(
                selection.tokens, selection.positions, selection.indices, selection.targets, selection.weights
            )
            total.backward()  # type: ignore[no-untyped-call]
            loss["text"].add(per_token[selection.roles == Role.TEXT])
            loss["repeat"].add(per_token[selection.roles == Role.REPEAT])
            answered = (selection.roles > Role.TEXT) & (selection.roles != Role.REPEAT)
            loss["answer"].add(per_token[answered])
        lr_scale = config.lr_scale(self.step)
        self._update(lr_scale)
        self.step += 1
        self.n_tokens_seen += stage.n_tokens * stage.n_samples * stage.n_accumulated
        losses = {f"{name}_loss": mean.value() for name, mean in loss.items()}
        return self._record("step", n_tokens=stage.n_tokens, lr_scale=round(lr_scale, 4), **losses)

    @torch.no_grad()
    def evaluate(self, *, n_samples: int = 24, seed: str = "held-out") -> dict[str, Any]:
        """Share of held-out answers of which every token is the likeliest one; returns its line of the log."""
        stage = self.config.stages[self.config.stage_at(self.step - 1)[0]]
        n_samples = max(4, min(n_samples, n_samples * 1024 // stage.n_tokens))
        sampler = Sampler(self.tokenizer, config=SampleConfig(heldout=True, gap_share=0.0), seed=seed)
        n_asked: Counter[str] = Counter()
        n_right: Counter[str] = Counter()
        for _ in range(n_samples):
            batch = sampler.batch(stage.n_tokens - 1, 1)
            with torch.autocast("cpu", torch.bfloat16):
                features = self.network.features(batch.tokens[:, :-1], batch.positions[:, :-1])
                predicted = self.network.output(features)[0].argmax(-1)
            for span in batch.spans[0]:
                answer = batch.tokens[0, span.start : span.start + span.length]
                n_asked[span.task] += 1
                n_right[span.task] += torch.equal(predicted[span.start - 1 : span.start - 1 + span.length], answer)
        shares = {task: round(n_right[task] / n_asked[task], 4) for task in sorted(n_asked)}
        return self._record("eval", n_tokens=stage.n_tokens, accuracy=shares, n=dict(sorted(n_asked.items())))

    def save(self, path: Path) -> None:
        """Write a checkpoint; `path` holds the old or the new one at any time."""
        state = {
            "step": self.step,
            "n_tokens_seen": self.n_tokens_seen,
            "seconds": self._seconds(),
            "network": self.network.state_dict(),
            "muon": self._muon.means,
            "adam": self._adam.state_dict(),
        }
        with written_atomically(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe."""
        state = torch.load(path, weights_only=True)
        self.network.load_state_dict(state["network"])
        for mean, saved in zip(self._muon.means, state["muon"], strict=True):
            mean.copy_(saved)
        self._adam.load_state_dict(state["adam"])
        self.step, self.n_tokens_seen = state["step"], state["n_tokens_seen"]
        self._seconds_before, self._started = state["seconds"], time.monotonic()

    def _optimisers(self) -> tuple[Muon, torch.optim.AdamW, list[Tensor]]:
        config, network = self.config, self.network
        matrices = [weight for weight in network.layers.parameters() if weight.dim() == 2]
        embedding = network.embedding.weight
        vectors = [weight for weight in network.layers.parameters() if weight.dim() == 1]
        others: list[Tensor] = [*vectors, *network.norm.parameters(), *network.output.parameters()]
        adam = torch.optim.AdamW(
            [
                {"params": [embedding], "peak_lr": config.embedding_lr},
                {"params": others, "peak_lr": config.other_lr},
            ],
            lr=config.other_lr,
            betas=(0.9, 0.97),
            weight_decay=0.0,
            fused=True,
        )
        return Muon(matrices, lr=config.matrix_lr), adam, [*others, embedding]

    def _compile(self, stage: int) -> None:
        if stage == self._compiled_stage:
            return
        self._compiled_stage = stage
        compiled = self.config.compiled and self.config.stages[stage].n_tokens <= MAX_COMPILED_TOKENS
        self._loss = torch.compile(self._loss_of, dynamic=False) if compiled else self._loss_of

    def _draw(self, stage: Stage, repeat_share: float) -> list[Selection]:
        """The step's batches, which depend on the seed and the number of the step alone."""
        sampler = Sampler(self.tokenizer, config=SampleConfig(), seed=f"train-{self.config.seed}-{self.step}")
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        batches = [
            sampler.batch(stage.n_tokens, stage.n_samples, repeat_share=repeat_share)
            for _ in range(stage.n_accumulated)
        ]
        n_answer_tokens = max(1, sum(int((batch.roles[:, 1:] > Role.TEXT).sum()) for batch in batches))
        text_weight = self.config.text_weight / stage.n_accumulated
        return [
            select(batch, n_answer_tokens=n_answer_tokens, text_weight=text_weight, generator=generator)
            for batch in batches
        ]

    def _loss_of(
        self, tokens: Tensor, positions: Tensor, indices: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, and the plain one per selected token, [n], detached; see `Selection`."""
        with torch.autocast("cpu", torch.bfloat16):
            features = self.network.features(tokens, positions)
            logits = self.network.output(features.flatten(0, 1)[indices])
        per_token = functional.cross_entropy(logits.float(), targets, reduction="none")
        return (per_token * weights).sum(), per_token.detach()

    def _update(self, lr_scale: float) -> None:
        torch.nn.utils.clip_grad_norm_(self._others, 1.0)
        self._muon.step(lr_scale)
        for group in self._adam.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale
        self._adam.step()
        self.network.zero_grad()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _record(self, event: str, **values: object) -> dict[str, Any]:
        return {
            "event": event,
            "step": self.step,
            **values,
            "n_tokens_seen": self.n_tokens_seen,
            "seconds": round(self._seconds(), 1),
        }


class Mean:
    """A mean over tokens that come in pieces."""

    def __init__(self) -> None:
        self._total, self._n = 0.0, 0

    def add(self, values: Tensor) -> None:
        self._total += float(values.sum())
        self._n += len(values)

    def value(self) -> float | None:
        return round(self._total / self._n, 5) if self._n else None
