"""Training samples: conversations about a generated document, with what each token weighs in the loss and where it
sits.

Everything about step S follows from the seed and S, so a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from actqkv_cpp.evaluation.generator.documents import Copy, Mix, Question, build_document
from actqkv_cpp.evaluation.generator.facts import TASKS
from actqkv_cpp.evaluation.generator.smalltalk import SMALL_TALK
from actqkv_cpp.evaluation.samples import Draft
from models.network import N_STAGES
from models.recipe import CHAIN_TASKS, HAYSTACK_ODDS, HAYSTACKS, SampleConfig, Stage
from models.tokenizer import ASSISTANT, BOS, DOCUMENT, END, FIRST_TEXT_ID, USER

CHARS_PER_TOKEN: Final = 2.75  # low on purpose: the document must leave room for the questions
SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "Answer from the document.",
    "You answer questions about the document.",
    "Use only the text below.",
    "Answer briefly.",
    "You are a careful reader. Answer the question using only the given document.",
)
INTRODUCTIONS: Final = (
    "Read the document and answer the question.",
    "Answer the question about the text below.",
    "There is important information hidden in the text. Find it.",
    "Here is a document.",
    "Document:",
    "Context:",
)
QUESTION_FORMS: Final = ("Question: {q}", "{q}", "{q}", "Now answer: {q}", "{q} Answer from the text above.")


class Role(IntEnum):
    """What a token is to the loss (weights: `draw.ROLE_WEIGHTS`)."""

    PADDING = -1
    TEXT = 0
    ANSWER = 1
    REPEAT = 2  # the second occurrence of random tokens
    QUOTE = 3  # the rest of a quoted sentence
    LOOKUP = 4  # the first tokens of an answer: what follows is copying


N_LOOKUP = 3
MAX_TARGETS = 12  # tokens of one place to look at


@dataclass(frozen=True)
class Span:
    """Where an answer with its end mark lies in a sample: tokens [start, start + length)."""

    start: int
    length: int
    task: str


@dataclass(frozen=True)
class Lookup:
    """Where token `query` finds the next token: `stages[i]` are the tokens to look at in the i-th look."""

    query: int
    stages: tuple[tuple[int, ...], ...]

    @property
    def hops(self) -> bool:
        """Whether what is found first only leads to the next token."""
        return len(set(self.stages)) > 1


@dataclass
class Sample:
    """Token ids with one role each, the answers among them, and what they are read from."""

    ids: list[int] = field(default_factory=lambda: [BOS])
    roles: list[int] = field(default_factory=lambda: [int(Role.TEXT)])
    spans: list[Span] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)

    def put(self, ids: list[int], role: Role = Role.TEXT) -> None:
        self.ids += ids
        self.roles += [int(role)] * len(ids)

    def cut(self, n_tokens: int) -> None:
        """Make it exactly `n_tokens` long, padded with end marks."""
        self.put([END] * (n_tokens - len(self.ids)), Role.PADDING)
        del self.ids[n_tokens:], self.roles[n_tokens:]
        self.spans = [span for span in self.spans if span.start + span.length <= n_tokens]
        self.lookups = [lookup for lookup in self.lookups if lookup.query < n_tokens - 1]


@dataclass(frozen=True)
class Placed:
    """A text inside a sample: its characters from `offset` on are a document's, its tokens start at `start`."""

    start: int
    begins: Sequence[int]  # of each token, in characters of the text
    offset: int

    def token_at(self, character: int) -> int:
        """Index in the sample of the token that holds a character of the document."""
        return self.start + bisect_right(self.begins, self.offset + character) - 1

    def tokens_in(self, start: int, end: int) -> tuple[int, ...]:
        return tuple(range(self.token_at(start), self.token_at(end - 1) + 1))[:MAX_TARGETS]


@dataclass(frozen=True)
class Batch:
    """Samples side by side.

    Attributes:
        tokens, roles, positions: [B, T + 1] (int64).
        spans: the answers of each sample.
        lookups: of each sample.
    """

    tokens: Tensor
    roles: Tensor
    positions: Tensor
    spans: list[list[Span]]
    lookups: list[list[Lookup]]


class Sampler:
    """Draws samples.

    Args:
        tokenizer: a SentencePiece processor.
        seed: of everything drawn.
    """

    def __init__(self, tokenizer: Any, *, config: SampleConfig, seed: str) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.rng = random.Random(seed)
        self.lengths = [
            1 if tokenizer.is_byte(token) else len(tokenizer.id_to_piece(token))
            for token in range(tokenizer.vocab_size())
        ]  # in characters; control symbols never come from text
        self.space = tokenizer.piece_to_id("\u2581")
        self.sentence_ends = {END, tokenizer.piece_to_id("."), tokenizer.piece_to_id("<0x0A>")}

    def batch(self, stage: Stage, *, repeat_share: float = 0.0) -> Batch:
        """The samples of one batch of a stage, each of one token more than the stage says.

        Args:
            stage: lengths, and what documents are like.
            repeat_share: about this share of the samples are repeated random tokens.
        """
        n_tokens = stage.n_tokens + 1
        samples, positions = [], []
        for _ in range(stage.n_samples):
            kind = self.rng.random()
            if kind < repeat_share:
                sample = self._repeated(n_tokens)
            elif kind < repeat_share + stage.haystack_share:
                sample = self._conversation(n_tokens, *self._haystack(n_tokens))
            else:
                chained = kind < repeat_share + stage.haystack_share + stage.chain_share
                sample = self._conversation(n_tokens, *self._document(stage, chained=chained))
            samples.append(sample)
            positions.append(self._positions(samples[-1].ids))
        return Batch(
            tokens=torch.tensor([sample.ids for sample in samples]),
            roles=torch.tensor([sample.roles for sample in samples]),
            positions=torch.from_numpy(np.stack(positions)),
            spans=[sample.spans for sample in samples],
            lookups=[sample.lookups for sample in samples],
        )

    def _repeated(self, n_tokens: int) -> Sample:
        """Random tokens, a gap, and the same tokens again: heads that copy form early on these."""
        n_vocab = self.tokenizer.vocab_size()

        def draw(n: int) -> list[int]:
            return [self.rng.randrange(FIRST_TEXT_ID, n_vocab) for _ in range(n)]

        sample = Sample()
        while len(sample.ids) < n_tokens:
            segment = draw(self.rng.choice((8, 16, 32, 64)))
            sample.put(segment)
            sample.put(draw(self.rng.choice((0, 5, 20))))
            sample.put(segment[:2])  # a repeat shows only after its first tokens
            sample.put(segment[2:], Role.REPEAT)
        sample.cut(n_tokens)
        return sample

    def _conversation(self, n_tokens: int, text: str, questions: list[Question]) -> Sample:
        rng, sample = self.rng, Sample()
        lead = " " if rng.random() < 0.8 else ""
        if rng.random() < 0.12:
            sample.put([DOCUMENT, *self._encode(f" {rng.choice(SYSTEM_PROMPTS)}"), END])
        layout = rng.random()
        if layout < 0.6 or not questions:
            document = self._put_text(sample, DOCUMENT, lead, text)
        else:
            document = self._first_exchange(sample, layout, lead, text, questions.pop())
        max_absent = 2 + n_tokens // 700  # "not stated" is half of all answers otherwise
        for question in questions:
            if len(sample.ids) >= n_tokens:
                break
            if rng.random() < self.config.small_talk_share:
                self._put_small_talk(sample)
            if question.task == "absent":
                max_absent -= 1
                if max_absent < 0:
                    continue
            self._put_question(sample, question)
            self._put_answer(sample, question, document)
        sample.cut(n_tokens)
        return sample

    def _first_exchange(self, sample: Sample, layout: float, lead: str, text: str, question: Question) -> Placed:
        """The document and its first question in other orders than the usual one, and the answer."""
        rng = self.rng
        if layout < 0.78:
            introduction = f"{rng.choice(INTRODUCTIONS)}\n\n" if rng.random() < 0.5 else ""
            asked = rng.choice(QUESTION_FORMS).format(q=question.question)
            document = self._put_text(sample, USER, lead + introduction, text, f"\n\n{asked}")
        elif layout < 0.9:
            again = f"\n\n{question.question}" if rng.random() < 0.5 else ""
            document = self._put_text(sample, USER, f"{lead}{question.question}\n\n", text, again)
        else:
            self._put_question(sample, question)
            document = self._put_text(sample, DOCUMENT, lead, text)
        self._put_answer(sample, question, document)
        return document

    def _put_text(self, sample: Sample, role: int, before: str, text: str, after: str = "") -> Placed:
        """A turn that holds the document."""
        ids, begins = self._encode_with_places(before + text + after)
        placed = Placed(len(sample.ids) + 1, begins, len(before))
        sample.put([role, *ids, END])
        return placed

    def _put_question(self, sample: Sample, question: Question) -> None:
        lead = " " if self.rng.random() < 0.8 else ""
        sample.put([USER, *self._encode(lead + question.question), END])

    def _put_answer(self, sample: Sample, question: Question, document: Placed) -> None:
        sample.put([ASSISTANT])
        ids, begins = self._encode_with_places(f" {question.answer}")
        start = len(sample.ids)
        sample.spans.append(Span(start, len(ids) + 1, question.task))
        sample.put(ids[:N_LOOKUP], Role.LOOKUP)
        sample.put([*ids[N_LOOKUP:], END], Role.QUOTE if question.task == "quote" else Role.ANSWER)
        if not question.copies:
            sample.lookups.append(Lookup(start - 1, ((0,),) * N_STAGES))
        bridges = [document.tokens_in(*bridge) for bridge in question.bridges]
        for index, begin in enumerate(begins):
            character = max(0, begin - 1)  # of the answer, without the space before it
            copy = next((c for c in question.copies if c.start <= character < c.start + c.length), None)
            if copy is None:
                continue
            place = document.token_at(copy.at + character - copy.start)
            if begin == 0 and ids[0] == self.space == sample.ids[place - 1]:
                place -= 1  # the space is a token of its own in both texts
            first = bridges if character == copy.start else []
            sample.lookups.append(Lookup(start + index - 1, (*first, *((place,),) * (N_STAGES - len(first)))))

    def _put_small_talk(self, sample: Sample) -> None:
        talk = self.rng.choice(SMALL_TALK)
        sample.put([USER, *self._encode(f" {self.rng.choice(talk.said)}"), END, ASSISTANT])
        ids = self._encode(f" {talk.reply}")
        sample.spans.append(Span(len(sample.ids), len(ids) + 1, "small talk"))
        sample.put([*ids, END], Role.ANSWER)

    def _document(self, stage: Stage, *, chained: bool) -> tuple[str, list[Question]]:
        """A document that leaves room for questions; `chained`: of `CHAIN_TASKS` alone."""
        rng = self.rng
        n_tokens = stage.n_tokens + 1
        task_odds = {**self.config.task_odds, **stage.task_odds}
        tasks = list(task_odds)
        n_chars = int(n_tokens * rng.uniform(*stage.document_share) * CHARS_PER_TOKEN)
        if chained:
            tasks = list(CHAIN_TASKS)
        elif rng.random() < 0.25:  # a document about few kinds of facts
            answerable = [task for task in TASKS if task != "absent"]
            tasks = [*rng.sample(answerable, rng.choice((1, 2, 3))), "absent"]
        odds = [task_odds[task] for task in tasks]
        while True:
            density = rng.uniform(*stage.fact_density)
            mix = Mix(
                tasks=tasks,
                weights=odds,
                density=density,
                heldout=self.config.heldout,
                sentence_share=self.config.sentence_share,
                repeat_chance=stage.repeat_chance,
            )
            document = build_document(rng, n_chars, mix)
            if len(self._encode(document.text)) < n_tokens * 0.92 - 40:
                return document.text, list(document.questions)
            n_chars = int(n_chars * 0.85)

    def _haystack(self, n_tokens: int) -> tuple[str, list[Question]]:
        """A document whose hay is all of one kind, and as much as leaves room for questions."""
        name = self.rng.choices(list(HAYSTACK_ODDS), list(HAYSTACK_ODDS.values()))[0]
        seed = self.rng.random()

        def make(n_pieces: int) -> Draft:
            return HAYSTACKS[name](random.Random(seed), n_pieces)

        few, more = (len(self._encode(make(n).document)) for n in (8, 24))
        wanted = n_tokens * self.rng.uniform(0.3, 0.7)
        draft = make(max(1, 8 + int((wanted - few) * (24 - 8) / (more - few))))
        questions = []
        for asked in draft.questions:
            ((start, end),), (answer,) = asked.needles, asked.references
            copy = Copy(0, draft.document.index(answer, start), len(answer))
            questions.append(Question(asked.text, answer, asked.depth or 0.0, name, ((start, end),), (copy,)))
        self.rng.shuffle(questions)
        return draft.document, questions

    def _positions(self, ids: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions that jump ahead at a few sentence ends, for some samples; plain ones for the rest."""
        plain = np.arange(len(ids), dtype=np.int64)
        max_gap, rng = self.config.max_gap, self.rng
        if rng.random() >= self.config.gap_share:
            return plain
        ends = [index + 1 for index, token in enumerate(ids[:-1]) if token in self.sentence_ends]
        positions = plain.copy()
        for end in rng.sample(ends, min(len(ends), rng.choice((1, 1, 2, 3, 5)))):
            positions[end:] += int(math.exp(rng.uniform(0.0, math.log(max_gap))))
        return plain if positions[-1] > 2 * max_gap else positions

    def _encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the character of `text` (ASCII) at which each begins."""
        ids = self._encode(text)
        return ids, list(accumulate((self.lengths[token] for token in ids), initial=0))[:-1]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text)
        return ids
