"""The recipe of the bundled model: every setting that its file follows from. No PyTorch here."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Final

from actqkv_cpp.evaluation.generator.documents import Mix, build_document
from actqkv_cpp.evaluation.generator.smalltalk import SMALL_TALK
from actqkv_cpp.evaluation.suites.retrieve import kv_draft
from actqkv_cpp.evaluation.suites.ruler import niah_draft

RECIPE_KEY: Final = "needle.recipe"  # of the digest, in a GGUF's metadata
STEP_KEY: Final = "needle.step"  # of the step that the weights were exported after
N_DIGEST_DOCUMENTS: Final = 20

TASK_ODDS: Final = {
    "passkey": 1.2,
    "number": 0.5,
    "fact": 3.0,
    "multi": 1.2,
    "json": 0.7,
    "twohop": 1.6,
    "var": 1.0,
    "list": 0.5,
    "quote": 0.5,
    "absent": 2.5,
}

SLOW_ODDS: Final = {"number": 1.5, "list": 1.5, "quote": 1.5}  # of tasks that are learnt slowly, where they get more

CHAIN_TASKS: Final = ("twohop", "var", "absent")  # of documents in which many values are reached through other names

HAYSTACKS: Final = {
    "kv": partial(kv_draft, n_questions=16),
    "needles": partial(niah_draft, n_queries=16, hay="needles", apart=True),
    "uuid needles": partial(niah_draft, n_queries=16, hay="needles", kind="uuids", apart=True),
}  # documents of the evaluation's suites kv and ruler in which everything looks like what is asked for
HAYSTACK_ODDS: Final = {"kv": 3.0, "needles": 1.0, "uuid needles": 1.0}


@dataclass(frozen=True)
class TokenizerConfig:
    """Size of the vocabulary, and the generated text it is learnt from."""

    n_vocab: int = 3072
    n_documents: int = 900
    n_document_tokens: int = 1500


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network; the defaults are the shipped model's (8.3 M parameters)."""

    n_vocab: int = 3072
    n_embd: int = 384
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 64
    n_ff: int = 512
    rope_base: float = 1e9
    norm_eps: float = 1e-5
    n_context: int = 8192

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} KV heads evenly")

    @property
    def heads_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn.

    Attributes:
        heldout: names and places that training never draws.
        max_gap: longest random jump of the positions, in tokens; jumps are meant to make heads indifferent to distance,
            after PoSE (Zhu et al. 2023, arXiv:2309.10400).
        gap_share: share of the samples with jumps.
        sentence_share: share of the questions about attributes and relations that ask for a whole sentence.
        small_talk_share: share of the turns that are small talk.
        task_odds: of each of the generator's tasks.
    """

    heldout: bool = False
    max_gap: int = 16384
    gap_share: float = 0.3
    sentence_share: float = 0.08
    small_talk_share: float = 0.03
    task_odds: dict[str, float] = field(default_factory=lambda: dict(TASK_ODDS))


@dataclass(frozen=True)
class Stage:
    """`n_steps` steps, each on `n_accumulated` batches of `n_samples` samples of `n_tokens` tokens.

    Attributes:
        document_share: least and largest share of a sample that its document takes; the rest is for questions.
        fact_density: least and largest share of a document's text that states facts.
        haystack_share: share of the documents that are hay of one kind (`HAYSTACKS`).
        chain_share: share of the documents with no tasks but `CHAIN_TASKS`.
        task_odds: of the generator's tasks where they are others than `SampleConfig.task_odds`.
        repeat_chance: by which a digit of a long number repeats the one before.
    """

    n_tokens: int
    n_samples: int
    n_accumulated: int
    n_steps: int
    document_share: tuple[float, float]
    fact_density: tuple[float, float]
    haystack_share: float = 0.0
    chain_share: float = 0.0
    task_odds: dict[str, float] = field(default_factory=dict)
    repeat_chance: float = 0.5

    @property
    def n_step_tokens(self) -> int:
        return self.n_tokens * self.n_samples * self.n_accumulated


@dataclass(frozen=True)
class Cycle:
    """Stages under one rise and fall of the learning rate.

    Each cycle but the first starts from what a Q8_0 file holds of the weights, with new optimisers: training can go on
    from the file that earlier cycles made.

    Attributes:
        stages: run in order.
        peak: of the learning rates, as a share of `TrainConfig`'s.
        decay_share: last share of the cycle's steps, over which learning rates fall linearly, to `min_lr_scale`.
        n_hop_examples: that the second hop is wired from at the cycle's start (`hop.wire_hop`); 0: it is left as it is.
    """

    stages: tuple[Stage, ...]
    peak: float = 1.0
    decay_share: float = 0.6
    n_hop_examples: int = 0

    @property
    def n_steps(self) -> int:
        return sum(stage.n_steps for stage in self.stages)


@dataclass(frozen=True)
class TrainConfig:
    """The recipe of a run.

    Attributes:
        cycles: run in order.
        samples: how they are drawn.
        seed: of weights and samples.
        matrix_lr: peak learning rate of Muon.
        other_lr: peak learning rate of AdamW; for the embedding `embedding_lr`.
        n_warmup: steps over which learning rates rise at the start of a cycle.
        min_lr_scale: what learning rates fall to at the end of a cycle, as a share of their peaks.
        text_weight: weight in the loss of predicting plain text, beside 1 for answers.
        guide_weight: weight in the loss of looking at the right places, beside 1 for answers.
        wired: start with `network.wire`.
        save_every: steps between checkpoints; between evaluations `eval_every`.
        n_threads: threads of PyTorch; results are repeatable for one number of threads on one machine.
    """

    cycles: tuple[Cycle, ...]
    samples: SampleConfig = SampleConfig()
    seed: int = 1234
    matrix_lr: float = 0.008
    other_lr: float = 2e-3
    embedding_lr: float = 1e-2
    n_warmup: int = 40
    min_lr_scale: float = 0.03
    text_weight: float = 0.1
    guide_weight: float = 0.5
    wired: bool = True
    save_every: int = 20
    eval_every: int = 100
    n_threads: int = 2

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of all cycles."""
        return tuple(stage for cycle in self.cycles for stage in cycle.stages)

    @property
    def n_steps(self) -> int:
        return sum(cycle.n_steps for cycle in self.cycles)

    @property
    def first_steps(self) -> list[int]:
        """Of each cycle, from 0."""
        return [0, *accumulate(cycle.n_steps for cycle in self.cycles[:-1])]

    def n_tokens_before(self, step: int) -> int:
        """Tokens that training has seen when `step`, from 0, begins."""
        return sum(self.stages[self.stage_at(earlier)[0]].n_step_tokens for earlier in range(step))

    def stage_at(self, step: int) -> tuple[int, float]:
        """Index of the stage that `step`, from 0, belongs to, and how much of that stage is done, 0 to 1."""
        return _place([stage.n_steps for stage in self.stages], step)

    def lr_scale(self, step: int) -> float:
        """What the learning rates are multiplied by at `step`, from 0."""
        index, done = _place([cycle.n_steps for cycle in self.cycles], step)
        cycle = self.cycles[index]
        fall = 1.0 if done < 1 - cycle.decay_share else (1 - done) / cycle.decay_share
        rise = min(1.0, (done * cycle.n_steps + 1) / self.n_warmup)
        return max(self.min_lr_scale, cycle.peak * fall) * rise


def _place(counts: Sequence[int], step: int) -> tuple[int, float]:
    """Index of the part that `step`, from 0, belongs to, of parts of `counts` steps, and how much of it is done."""
    first = 0
    for index, count in enumerate(counts):
        if step - first < count:
            return index, (step - first) / count
        first += count
    raise ValueError(f"step {step}: expected fewer than {first}")


@dataclass(frozen=True)
class Recipe:
    """Everything that the files of a run follow from."""

    tokenizer: TokenizerConfig
    network: NetworkConfig
    training: TrainConfig

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the settings and of documents and questions as the generator writes them.

        It stands in the metadata of the GGUF files (`RECIPE_KEY`), to tell a file from one of another recipe.
        """
        hashed = hashlib.sha256(self.to_json().encode())
        samples = self.training.samples
        for index in range(N_DIGEST_DOCUMENTS):
            mix = Mix(weights=list(samples.task_odds.values()), tasks=tuple(samples.task_odds), sentence_share=0.3)
            document = build_document(random.Random(f"digest-{index}"), 4000, mix)
            haystacks = [make(random.Random(f"digest-{index}"), 20) for make in HAYSTACKS.values()]
            hashed.update(repr((document, SMALL_TALK, haystacks, HAYSTACK_ODDS)).encode())
        return hashed.hexdigest()


def _slow_tasks(short: int, longer: int, longest: int, *, haystack_share: float, repeat_chance: float = 0.5) -> Cycle:
    """A cycle of so many steps on samples of 2K, 4K and 8K, with more of the tasks that are learnt slowly."""
    shares: dict[str, Any] = {
        "haystack_share": haystack_share,
        "chain_share": 0.1,
        "task_odds": SLOW_ODDS,
        "repeat_chance": repeat_chance,
    }
    return Cycle(
        (
            Stage(2048, 2, 1, short, document_share=(0.5, 0.8), fact_density=(0.2, 0.7), **shares),
            Stage(4096, 1, 1, longer, document_share=(0.6, 0.8), fact_density=(0.2, 0.6), **shares),
            Stage(8192, 1, 1, longest, document_share=(0.65, 0.85), fact_density=(0.1, 0.5), **shares),
        ),
        peak=0.6,
        decay_share=0.9,
    )


FULL = Recipe(
    tokenizer=TokenizerConfig(),
    network=NetworkConfig(),
    training=TrainConfig(
        cycles=(
            Cycle(
                (
                    Stage(256, 16, 2, 200, document_share=(0.4, 0.75), fact_density=(0.35, 0.8)),
                    Stage(512, 8, 2, 750, document_share=(0.4, 0.75), fact_density=(0.15, 0.7)),
                    Stage(2048, 2, 2, 420, document_share=(0.75, 0.9), fact_density=(0.06, 0.5)),
                    Stage(8192, 1, 1, 110, document_share=(0.68, 0.85), fact_density=(0.05, 0.35)),
                ),
                decay_share=0.45,
            ),
            Cycle(
                (
                    Stage(2048, 2, 2, 200, document_share=(0.75, 0.9), fact_density=(0.06, 0.5)),
                    Stage(2048, 2, 2, 150, document_share=(0.75, 0.9), fact_density=(0.06, 0.5), haystack_share=0.2),
                    Stage(4096, 1, 2, 280, document_share=(0.68, 0.85), fact_density=(0.05, 0.35), haystack_share=0.2),
                    Stage(8192, 1, 1, 130, document_share=(0.68, 0.85), fact_density=(0.05, 0.35), haystack_share=0.15),
                ),
                peak=0.6,
                decay_share=0.8,
            ),
            Cycle(
                (
                    Stage(2048, 2, 2, 420, document_share=(0.5, 0.8), fact_density=(0.2, 0.7), haystack_share=0.1),
                    Stage(4096, 1, 2, 120, document_share=(0.6, 0.8), fact_density=(0.2, 0.6), haystack_share=0.1),
                    Stage(8192, 1, 1, 100, document_share=(0.65, 0.85), fact_density=(0.1, 0.5), haystack_share=0.1),
                ),
                peak=0.6,
                decay_share=0.9,
            ),
            Cycle(
                (
                    Stage(4096, 1, 2, 360, document_share=(0.6, 0.8), fact_density=(0.2, 0.6), haystack_share=0.05),
                    Stage(8192, 1, 1, 260, document_share=(0.65, 0.85), fact_density=(0.1, 0.5), haystack_share=0.05),
                ),
                peak=0.6,
                decay_share=0.9,
            ),
            Cycle(
                (
                    Stage(512, 8, 1, 500, document_share=(0.45, 0.7), fact_density=(0.4, 0.9), chain_share=0.7),
                    Stage(2048, 2, 1, 300, document_share=(0.5, 0.8), fact_density=(0.2, 0.7), chain_share=0.3),
                    Stage(
                        4096,
                        1,
                        1,
                        200,
                        document_share=(0.6, 0.8),
                        fact_density=(0.2, 0.6),
                        haystack_share=0.1,
                        chain_share=0.2,
                    ),
                    Stage(
                        8192,
                        1,
                        1,
                        100,
                        document_share=(0.65, 0.85),
                        fact_density=(0.1, 0.5),
                        haystack_share=0.1,
                        chain_share=0.1,
                    ),
                ),
                peak=0.6,
                decay_share=0.8,
                n_hop_examples=4096,
            ),
            _slow_tasks(150, 150, 100, haystack_share=0.15),
            _slow_tasks(250, 150, 60, haystack_share=0.2, repeat_chance=0.8),
        ),
    ),
)
SMOKE = Recipe(
    tokenizer=TokenizerConfig(n_vocab=1792, n_documents=12, n_document_tokens=400),
    network=NetworkConfig(n_vocab=1792, n_embd=128, n_layers=4, n_heads=4, n_kv_heads=2, n_ff=128, n_context=512),
    training=TrainConfig(
        cycles=(
            Cycle((Stage(256, 2, 2, 5, document_share=(0.4, 0.75), fact_density=(0.35, 0.8)),)),
            Cycle(
                (
                    Stage(256, 2, 2, 3, document_share=(0.4, 0.75), fact_density=(0.35, 0.8)),
                    Stage(512, 2, 1, 4, document_share=(0.4, 0.75), fact_density=(0.15, 0.7), haystack_share=0.3),
                ),
                peak=0.5,
            ),
            Cycle(
                (Stage(512, 2, 1, 3, document_share=(0.45, 0.7), fact_density=(0.4, 0.9), chain_share=0.7),),
                peak=0.5,
                n_hop_examples=16,
            ),
        ),
        n_warmup=2,
        save_every=3,
        eval_every=8,
        n_threads=1,
    ),
)
