"""long-answer: facts planted early, thousands of generated tokens, then questions about the facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from actqkv_cpp.errors import Cancelled, ParameterError
from actqkv_cpp.evaluation import metrics
from actqkv_cpp.evaluation.samples import Draft, Finding, Room, Sample, Suite
from actqkv_cpp.evaluation.suites.facts import SINGLE_TASKS, draft_facts

if TYPE_CHECKING:
    from actqkv_cpp import Llama
    from actqkv_cpp.document import Document, Progress

_FACTS_TOKENS = 1024  # of the document, at most a quarter of the room
_N_QUESTIONS = 5
_ANSWER_TOKENS = 64
_TURN_TOKENS = 512  # kept for the templates and questions of both turns, and the short answer
_WRITE = "Tell everything that you can about this, at length and in your own words."
_TEMPERATURE = 0.8  # of the long text; the likeliest tokens alone fall into a loop


@dataclass(frozen=True)
class _LongAnswer(Suite):
    """A conversation: the facts are read, a text that fills the session is generated, then the questions are asked."""

    shares_reading: ClassVar[bool] = False

    def answer(self, llm: Llama, document: Document | None, sample: Sample, progress: Progress) -> Iterator[Finding]:
        chat = llm.chat(document)
        n_read = llm.n_tokens
        n_write = sample.n_ctx - n_read - _TURN_TOKENS

        def going_on(_: str) -> object:
            return progress(llm.n_tokens, sample.n_ctx)

        said = chat.say(
            _WRITE,
            min_tokens=n_write,
            max_tokens=n_write,
            temperature=_TEMPERATURE,
            seed=sample.seed,
            on_text=going_on,
        )
        if said.finish_reason == "cancelled":
            raise Cancelled("the long answer was stopped")
        for question in sample.questions:
            yield self.ask(chat, question, sample)


def _long_answer(room: Room, index: int) -> Sample:
    """The facts alone: what is generated behind them fills the rest of the room when the sample is answered."""
    n_tokens = min(_FACTS_TOKENS, room.n_ctx // 4)
    draft = draft_facts(room, index, n_tokens, tasks=SINGLE_TASKS, count=2)
    n_needed = room.count(draft.document) + _TURN_TOKENS
    if 2 * n_needed > room.n_ctx:
        raise ParameterError(
            f"{room.suite} has no room for a long answer in {room.n_ctx} tokens: facts and questions take {n_needed}",
            f"use lengths of {-(-2 * n_needed // 1024)}k or more",
        )
    return room.sample(Draft(draft.document, draft.questions[:_N_QUESTIONS]), _ANSWER_TOKENS, seed=index)


SUITE = _LongAnswer(
    name="long-answer",
    about="facts, then a generated text that fills the session, then questions about the facts",
    n_samples=3,
    make=_long_answer,
    score=lambda question, said: metrics.contains(said, question.references[0]),
)
