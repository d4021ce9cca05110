"""What reading and asking report. Frozen; `to_json()` gives the names of `actqkv ask --json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from actqkv_cpp.figures import GpuStats

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A passage the answer's tokens attended to.

    `start` and `end` count Unicode code points of the document's text, so that document_text[start:end] == text; of a
    PDF, DOCX, EPUB or HTML file that is the text which `actqkv text FILE` prints, else the decoded file.
    `score` is the share (0..1) of the attention that went to the documents and fell on this passage.
    `place` is what people call the place where it begins: "p. 214", a heading, "line 120"; None where nothing is known.
    `number` is the document's among those read, from 0: two may have the same name.
    """

    document: str
    start: int
    end: int
    text: str
    score: float
    place: str | None = None
    number: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one answer: of the documents read, of everything before the answer (documents included), of the answer.

    `attended_tokens` is the most that any one query attended: sinks + retrieved + remainder + local + window;
    `attended_tokens_mean` the mean over queries and layers. Layers that a method attends densely (Quest's first)
    are left out of both: `dense_tokens` is the most that a query attended there, 0 where there are none.
    """

    document_tokens: int
    prompt_tokens: int
    completion_tokens: int
    attended_tokens: int
    attended_tokens_mean: float
    dense_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that the tokens read so far occupy: K and V of all layers, and the summaries and
    the index of their chunks (`summary_bytes`)."""

    kv_bytes: int
    summary_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """`prefill_s` and `prefill_tokens_per_s` are of reading the documents (of the prompt where there are none);
    `first_token_s` runs from the question to the first token of the answer. 0.0 where nothing was measured."""

    prefill_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What audits found during one answer (`Llama.audit`): `n` of them, the mean and the least recall of true attention
    mass (0..1; None where n is 0), and the budget in tokens after the answer."""

    n: int
    recall: float | None
    min_recall: float | None
    budget: int

    def __str__(self) -> str:
        found = "nothing was checked" if self.recall is None else f"recall {self.recall:.3f} on average"
        worst = "" if self.min_recall is None else f", {self.min_recall:.3f} at worst, in {self.n} checks"
        return f"{found}{worst}; budget {self.budget:,}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. `finish_reason` is "stop" (ended by itself or at a stop text), "length" (max_tokens reached, or
    n_ctx full: then `context_full` is true) or "cancelled" (interrupted; `text` holds what came before)."""

    question: str
    text: str
    sources: tuple[Source, ...]
    usage: Usage
    timing: Timing
    memory: Memory
    finish_reason: FinishReason
    context_full: bool = False
    audit: Audit | None = None  # where audits are on
    gpu: GpuStats | None = None  # where attention ran on a GPU

    @property
    def answer(self) -> str:
        """The same as `text`."""
        return self.text

    def __str__(self) -> str:
        return self.text

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Answer:
        """The answer of `to_json`. KeyError, TypeError or ValueError where it is none."""
        audit, gpu = value.get("audit"), value.get("gpu")
        return cls(
            question=value["question"],
            text=value["answer"],
            sources=tuple(Source(**source) for source in value["sources"]),
            usage=Usage(**value["usage"]),
            timing=Timing(**value["timing"]),
            memory=Memory(**value["memory"]),
            finish_reason=value["finish_reason"],
            audit=None if audit is None else Audit(**audit),
            gpu=None if gpu is None else GpuStats(**gpu),
        )

    def to_json(self) -> dict[str, Any]:
        """One answer with its own usage, memory and timing; its audit and what a GPU did, where there are such."""
        audit = {} if self.audit is None else {"audit": self.audit.to_json()}
        gpu = {} if self.gpu is None else {"gpu": asdict(self.gpu)}
        return (
            audit
            | gpu
            | {
                "question": self.question,
                "answer": self.text,
                "sources": [source.to_json() for source in self.sources],
                "finish_reason": self.finish_reason,
                "usage": self.usage.to_json(),
                "memory": self.memory.to_json(),
                "timing": self.timing.to_json(),
            }
        )
