"""Training: cycles of the learning rate, in stages of growing length; a killed run resumes exactly from its
checkpoint.

Matrices inside the layers are trained by Muon, everything else by AdamW, in bfloat16 with float32 master weights, or in
float32 alone where a processor is slow at bfloat16. The run's folder receives `checkpoint.pt` and `log.jsonl`, one JSON
object per line: `step` lines with the losses, `eval` lines with the share of held-out answers predicted in full
(teacher-forced).
"""

from __future__ import annotations

import json
import os
import time
import timeit
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from actqkv_cpp.files import written_atomically
from models.draw import Selection, drawn
from models.export import read_weights, rounded
from models.hop import wire_hop
from models.network import Llama, wire
from models.recipe import NetworkConfig, TrainConfig
from models.samples import Role, Sampler

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


def train(
    folder: Path, *, tokenizer: Any, network_config: NetworkConfig, config: TrainConfig, start: Path | None = None
) -> Llama:
    """Train a network, or finish a run that was cut off, in `folder`, on a CUDA GPU where there is one.

    Args:
        folder: holds the run's checkpoint and log.
        tokenizer: a SentencePiece processor.
        network_config: shape of the network.
        config: the recipe; a resumed run must be given the same one, and the same shape.
        start: GGUF file that earlier cycles of the recipe made, to go on from where there is no checkpoint yet.

    Returns:
        The trained network.

    Raises:
        ValueError: `start` is of another shape, or not of the end of a cycle.
    """
    torch.set_num_threads(config.n_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.use_deterministic_algorithms(device.type == "cpu")
    trainer = Trainer(tokenizer, network_config=network_config, config=config, device=device)
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        trainer.load(checkpoint)
    elif start:
        trainer.start_from(start)
    log = folder / LOG
    _keep_log_until(log, trainer.step)
    n_processes = 0 if device.type == "cpu" else max(1, (os.cpu_count() or 1) - 2)  # a GPU outruns one that draws
    for selections in drawn(tokenizer, config, trainer.step, n_processes=n_processes):
        if trainer.step in config.first_steps[1:]:
            trainer.start_cycle()
        records = [trainer.train_step(selections)]
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
        dtype: that updates are computed in.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.matrices = list(matrices)
        self.dtype = dtype
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.means = [torch.zeros_like(matrix) for matrix in self.matrices]

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        lr = self.lr * lr_scale
        for matrix, mean in zip(self.matrices, self.means, strict=True):
            if matrix.grad is None:
                raise RuntimeError("step before backward")
            mean.lerp_(matrix.grad, 1 - self.momentum)
            update = orthogonalised(matrix.grad.lerp(mean, self.momentum).to(self.dtype))
            matrix.mul_(1 - lr * self.weight_decay)
            n_rows, n_columns = matrix.shape
            matrix.add_(update, alpha=-lr * max(1.0, n_rows / n_columns) ** 0.5)


def orthogonalised(matrix: Tensor, n_iterations: int = 5) -> Tensor:
    """About the nearest matrix with singular values 1, by a quintic Newton-Schulz iteration in the type of `matrix`."""
    tall = matrix.size(0) > matrix.size(1)
    x: Tensor = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    result: Tensor = x.mT if tall else x
    return result.float()


def fastest_type(device: torch.device, *, n: int = 512) -> torch.dtype:
    """bfloat16, or float32 where products of n x n matrices are faster in it: by tens of times on a processor without
    instructions for bfloat16.
    """
    if device.type != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.eye(n, dtype=dtype)
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=4))

    return min((torch.bfloat16, torch.float32), key=seconds)


class Trainer:
    """A network, its optimisers, and how far they are."""

    def __init__(
        self, tokenizer: Any, *, network_config: NetworkConfig, config: TrainConfig, device: torch.device
    ) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = fastest_type(device)
        self.config = config
        self.step = 0
        self.n_tokens_seen = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        torch.manual_seed(config.seed)
        self.network = Llama(network_config)
        if config.wired:
            wire(self.network)
        self.network.to(device)
        self._muon, self._adam, self._others = self._optimisers()

    def train_step(self, selections: Sequence[Selection]) -> dict[str, Any]:
        """One step of the optimisers on what was drawn for it; returns its line of the log."""
        config = self.config
        stage = config.stages[config.stage_at(self.step)[0]]
        loss = {"answer": Mean(), "text": Mean(), "repeat": Mean(), "guide": Mean()}
        for selection in (one.to(self.device) for one in selections):
            total, per_token, guided = self._loss(selection)
            loss["guide"].add(guided)
            total.backward()  # type: ignore[no-untyped-call]
            loss["text"].add(per_token[selection.roles == Role.TEXT])
            loss["repeat"].add(per_token[selection.roles == Role.REPEAT])
            answered = (selection.roles > Role.TEXT) & (selection.roles != Role.REPEAT)
            loss["answer"].add(per_token[answered])
        lr_scale = config.lr_scale(self.step)
        self._update(lr_scale)
        self.step += 1
        self.n_tokens_seen += stage.n_step_tokens
        losses = {f"{name}_loss": mean.value() for name, mean in loss.items()}
        return self._record("step", n_tokens=stage.n_tokens, lr_scale=round(lr_scale, 4), **losses)

    @torch.no_grad()
    def evaluate(self, *, n_samples: int = 24, seed: str = "held-out") -> dict[str, Any]:
        """Share of held-out answers of which every token is the likeliest one; returns its line of the log."""
        stage = self.config.stages[self.config.stage_at(self.step - 1)[0]]
        n_samples = max(4, min(n_samples, n_samples * 1024 // stage.n_tokens))
        sampler = Sampler(self.tokenizer, config=replace(self.config.samples, heldout=True, gap_share=0.0), seed=seed)
        n_asked: Counter[str] = Counter()
        n_right: Counter[str] = Counter()
        for _ in range(n_samples):
            batch = sampler.batch(replace(stage, n_tokens=stage.n_tokens - 1, n_samples=1))
            tokens, positions = batch.tokens[:, :-1].to(self.device), batch.positions[:, :-1].to(self.device)
            with self._autocast():
                predicted = self.network.output(self.network.features(tokens, positions))[0].argmax(-1).cpu()
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

    def start_from(self, path: Path) -> None:
        """Begin where the cycles that made a GGUF file ended.

        Raises:
            ValueError: the file is of another shape, or not of the end of a cycle.
        """
        weights, step = read_weights(path)
        ends = self.config.first_steps[1:]
        if step not in ends:
            raise ValueError(f"{path} is of step {step}: expected the end of a cycle that others follow, {ends}")
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path} is not of this recipe's shape: {error}") from error
        self.step = step
        self.n_tokens_seen = self.config.n_tokens_before(step)

    def start_cycle(self) -> None:
        """Go on as from a Q8_0 file of the weights: rounded, and with new optimisers; first the hop is wired, where the
        recipe says so.
        """
        self.network.load_state_dict(rounded(self.network.state_dict()))
        cycle = self.config.cycles[self.config.first_steps.index(self.step)]
        if cycle.n_hop_examples:
            wire_hop(
                self.network,
                self.tokenizer,
                self.config.samples,
                n_examples=cycle.n_hop_examples,
                seed=f"hop-{self.config.seed}",
            )
        self._muon, self._adam, self._others = self._optimisers()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe."""
        state = torch.load(path, map_location=self.device, weights_only=True)
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
        return Muon(matrices, lr=config.matrix_lr, dtype=self.dtype), adam, [*others, embedding]

    def _loss(self, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss; detached, the plain one per selected token, [n], and that of guided attention, [1]."""
        with self._autocast():
            features, looks = self.network.guided_features(
                selection.tokens, selection.positions, indices=selection.indices, rows=selection.rows
            )
            logits = self.network.output(features)
        per_token = functional.cross_entropy(logits.float(), selection.targets, reduction="none")
        misplaced = misplaced_attention(looks.float(), selection.rows, selection.places, selection.place_weights)
        total = (per_token * selection.weights).sum() + misplaced
        mean = misplaced.detach() / selection.place_weights.sum().clamp(min=1e-9)
        return total, per_token.detach(), mean[None]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

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


def misplaced_attention(logits: Tensor, rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of attention against the places it should go to, the mean over the guided heads.

    Args:
        logits: [N_STAGES, B, guided heads, R, T], not masked.
        rows: [B, R], the tokens that look.
        places, weights: [N_STAGES, B, R, MAX_TARGETS].
    """
    later = torch.arange(logits.shape[-1], device=logits.device) > rows[:, :, None]  # [B, R, T]
    log_shares = logits.masked_fill(later[None, :, None], -1e9).log_softmax(-1)
    wanted = log_shares.gather(-1, places[:, :, None].expand(-1, -1, logits.shape[2], -1, -1))
    return -(wanted.mean(2) * weights).sum()


class Mean:
    """A mean over tokens that come in pieces."""

    def __init__(self) -> None:
        self._total, self._n = 0.0, 0

    def add(self, values: Tensor) -> None:
        self._total += float(values.sum())
        self._n += len(values)

    def value(self) -> float | None:
        return round(self._total / self._n, 5) if self._n else None
