"""What a suite is made of: samples (a document and its questions), the room they must fit, and their scorer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from actqkv_cpp.errors import ParameterError
from actqkv_cpp.evaluation import recalls
from actqkv_cpp.evaluation.recalls import Recalls

if TYPE_CHECKING:
    from actqkv_cpp import Llama, Recording
    from actqkv_cpp.chat import Chat
    from actqkv_cpp.document import Document, Progress

_SLACK_TOKENS = 16  # where two texts meet, the tokenizer may need a few more than for each alone
_FULL = 0.985  # of the room: as near as fitting tries to come, so that a document is tokenised once or twice
_MEASURED = (40, 80)  # sizes whose difference gives the tokens that one more piece takes


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a document.

    Attributes:
        text: stands last in the prompt.
        references: the expected answers; what is made of them is the suite's to say.
        depth: where in the document the answer stands, 0 to 1; None where that means nothing.
        task: the part of a suite it belongs to; "" where a suite has one part.
        needles: (start, end) of the passages that hold the answer, in characters of the document.
        classes: among which a classification chooses.
    """

    text: str
    references: tuple[str, ...]
    depth: float | None = None
    task: str = ""
    needles: tuple[tuple[int, int], ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A document, read once, and the questions about it.

    Attributes:
        document: everything that stands before the question, instructions included.
        n_ctx: tokens of the session it is read in.
        max_tokens: of one answer.
        seed: of whatever is sampled.
        n_cut: tokens taken out of the middle of the document to make it fit.
        recalls: what is recorded while answering.
    """

    document: str
    questions: tuple[Question, ...]
    n_ctx: int
    max_tokens: int
    seed: int = 0
    n_cut: int = 0
    recalls: Recalls = "none"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one question.

    Attributes:
        score: 0 to 1.
        n: how many samples it counts for: 1, or the positions of a stretch of text.
        answer: what was said.
        attended_max, attended_mean: tokens that one query attended.
        dense_max: the same of layers that attend everything under a method that chooses, most.
        prompt_tokens, completion_tokens: as in `Usage`.
        seconds: from the question to the end of the answer.
        kv_bytes, summary_bytes: of the session then.
        measures: other figures, by name; means over `n`.
        recalls: shares of what was looked for that was selected, or is among the sources, by name.
    """

    score: float
    n: int = 1
    task: str = ""
    depth: float | None = None
    references: tuple[str, ...] = ()
    answer: str = ""
    attended_max: int = 0
    attended_mean: float = 0.0
    dense_max: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    decode_tokens_per_s: float = 0.0
    kv_bytes: int = 0
    summary_bytes: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    recalls: dict[str, float] = field(default_factory=dict)


class Drafted(Protocol):
    """What fitting looks at."""

    @property
    def document(self) -> str: ...

    @property
    def questions(self) -> Sequence[Question]: ...


@dataclass(frozen=True)
class Draft:
    """A document and its questions, before it is known to fit."""

    document: str
    questions: tuple[Question, ...]


AnyDraft = TypeVar("AnyDraft", bound=Drafted)


@dataclass(frozen=True, kw_only=True)
class Room:
    """The room that samples of one suite have at one length.

    A length is that of the whole session: template, document, question and answer fit it, so that a length of the
    trained window can be answered with exact positions.

    Attributes:
        n_ctx: tokens in all.
        n_samples: how many samples there will be; depths are spread over them.
        seed: of the run.
        count: tokens that a text takes.
        cut: takes a text and a number of tokens; gives what is left when its middle is taken out to have no more.
        n_template: tokens that the chat template puts around document and question.
        n_askings: how often a question stands in the prompt: twice where some method has it before the document too.
        text: a text of the user's, for the suite that scores text; None: a generated one.
        recalls: what is recorded while answering.
    """

    suite: str
    n_ctx: int
    n_samples: int
    seed: int
    count: Callable[[str], int]
    cut: Callable[[str, int], str]
    n_template: int
    n_askings: int = 1
    text: str | None = None
    recalls: Recalls = "none"

    def rng(self, index: int) -> random.Random:
        """A source of chance that depends on suite, length, seed and sample alone."""
        return random.Random(f"{self.suite} {self.n_ctx} {self.seed} {index}")

    def n_free(self, questions: Sequence[Question], max_tokens: int) -> int:
        """Tokens that are left for a document.

        Raises:
            ParameterError: none are.
        """
        taken = self.n_template + _SLACK_TOKENS + max_tokens
        taken += self.n_askings * max((self.count(question.text) for question in questions), default=0)
        if taken >= self.n_ctx:
            raise ParameterError(
                f"{self.suite} has no room for a document in {self.n_ctx} tokens: template, question and answer "
                f"take {taken}",
                f"use lengths of {-(-2 * taken // 1024)}k or more",
            )
        return self.n_ctx - taken

    def fit(self, make: Callable[[int], AnyDraft], max_tokens: int) -> AnyDraft:
        """The draft made of as many pieces as fit, or nearly as many.

        Args:
            make: makes a draft of so many pieces; pieces are about equally long.
        """
        few, more = (make(n) for n in _MEASURED)
        n_free = self.n_free(more.questions, max_tokens)
        n_few, n_more = self.count(few.document), self.count(more.document)
        per_piece = max((n_more - n_few) / (_MEASURED[1] - _MEASURED[0]), 0.01)
        n_pieces = max(int((_FULL * n_free - n_few) / per_piece) + _MEASURED[0], 1)
        while True:
            draft = make(n_pieces)
            n_tokens = self.count(draft.document)
            if n_tokens <= n_free:
                return draft
            if n_pieces == 1:
                raise ParameterError(
                    f"{self.suite} does not fit {self.n_ctx} tokens: its shortest document takes {n_tokens}, "
                    f"{n_free} are left for it",
                    "use greater lengths",
                )
            n_pieces = max(min(int(n_pieces * _FULL * n_free / n_tokens), n_pieces - 1), 1)

    def sample(self, draft: Drafted, max_tokens: int, *, seed: int = 0) -> Sample:
        """The draft as a sample of this room."""
        return Sample(
            document=draft.document,
            questions=tuple(draft.questions),
            n_ctx=self.n_ctx,
            max_tokens=max_tokens,
            seed=seed,
            recalls=self.recalls,
        )


def spread(index: int, n: int) -> float:
    """Depth number `index` of `n` that are spread evenly from the beginning (0) to the end (1)."""
    return index / (n - 1) if n > 1 else 0.5


@dataclass(frozen=True)
class Suite:
    """A suite whose samples are documents to be read and asked about. Others override `read` and `answer`.

    Attributes:
        name: on the command line.
        about: what a reader of results should know of it, in one sentence.
        n_samples: samples per length, where the user does not say.
        make: sample number `index` (0 .. n_samples - 1) for a room.
        score: of an answer, 0 to 1; None where nothing is asked.
        shares_reading: whether one reading serves several methods.
    """

    name: str
    about: str
    n_samples: int
    make: Callable[[Room, int], Sample]
    score: Callable[[Question, str], float] | None
    shares_reading: ClassVar[bool] = True
    from_file: ClassVar[bool] = False  # its documents have lengths of their own

    @property
    def n_tokens(self) -> int:
        """Tokens of a sample, about; of suites from files, whose documents have lengths of their own."""
        return 1

    def read(self, llm: Llama, sample: Sample, progress: Progress, *, question: str | None = None) -> Document | None:
        """Read the sample's document; `question` stands before it in question-aware reading."""
        return llm.read(text=sample.document, question=question, reserve=0, progress=progress)

    def answer(self, llm: Llama, document: Document | None, sample: Sample, progress: Progress) -> Iterator[Finding]:
        """Ask what the sample asks; a finding for each question, in order."""
        assert document is not None
        for question in sample.questions:
            yield self.ask(document, question, sample)

    def ask(self, document: Document | Chat, question: Question, sample: Sample) -> Finding:
        """Ask one question, greedily."""
        assert self.score is not None
        llm = document.llm
        with recalls.recorded(llm, sample.recalls) as trace:
            said = document.ask(question.text, max_tokens=sample.max_tokens)
        rate = said.timing.decode_tokens_per_s
        decode_s = said.usage.completion_tokens / rate if rate else 0.0
        score = self.score(question, said.text)
        found = _recalls(llm, trace, question) if trace is not None else {}
        if score == 1.0 and llm.session is not None:
            found |= recalls.of_sources(said.sources, question.needles)
        return Finding(
            score=score,
            task=question.task,
            depth=question.depth,
            references=question.references,
            answer=said.text,
            attended_max=said.usage.attended_tokens,
            attended_mean=said.usage.attended_tokens_mean,
            dense_max=said.usage.dense_tokens,
            prompt_tokens=said.usage.prompt_tokens,
            completion_tokens=said.usage.completion_tokens,
            seconds=said.timing.first_token_s + decode_s,
            decode_tokens_per_s=rate,
            kv_bytes=said.memory.kv_bytes,
            summary_bytes=said.memory.summary_bytes,
            recalls=found,
        )


def _recalls(llm: Llama, trace: Recording, question: Question) -> dict[str, float]:
    """Of the answer that `trace` recorded; needles stand in the document that was read last."""
    assert llm.document is not None
    return recalls.measure(trace, [llm.document.tokens_at(*needle) for needle in question.needles])
