"""A recording of one reading and one answer, told in terms of the documents' text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp.recording import Record, Recording
from actqkv_cpp.results import Answer

if TYPE_CHECKING:
    from actqkv_cpp.document import Conversation
    from actqkv_cpp.llama import Llama

_N_BEST = 20  # anchors and passages that a report names
_SHORT = 4  # decimals of figures in JSON


@dataclass(frozen=True)
class DocumentText:
    """A document that was read: token `start + i` of the session ends at character `ends[i]` of `text`."""

    name: str
    text: str
    start: int
    ends: NDArray[np.int64]

    def range_of(self, first: int, last: int) -> tuple[int, int]:
        """Characters of the session's tokens [first, last) that lie in this document; (0, 0) where none do."""
        a, b = max(first - self.start, 0), min(last - self.start, len(self.ends))
        return (int(self.ends[a - 1]) if a else 0, int(self.ends[b - 1])) if a < b else (0, 0)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A token far from its layer's running average. `bias` is relative to its window: 1.0 is an average token.
    `number` is the document's among those read, from 0."""

    document: str
    number: int
    start: int
    end: int
    text: str
    bias: float


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A chunk of the text, and the share (0..1) of the choosing layers' steps that attended it. `number` is the
    document's among those read, from 0."""

    chunk: int
    document: str
    number: int
    start: int
    end: int
    attended: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One answered token: what was read back (`token`), at `n_past`, and a record per layer."""

    token: str
    n_past: int
    layers: tuple[Record, ...]


@dataclass(frozen=True)
class Inspection:
    """All that `actqkv inspect` shows.

    Args:
        model: file name.
        method: of the session; `parameters` are its sizes and columns.
        documents: as far as they were read.
        answer: to the question.
        recording: of the reading and of the answer's steps, with mass of the latter.
        tokens: text of the session's tokens by position, where a step was.
    """

    model: str
    method: str
    parameters: dict[str, Any]
    documents: tuple[DocumentText, ...]
    answer: Answer
    recording: Recording
    tokens: dict[int, str]

    @classmethod
    def of(cls, llm: Llama, document: Conversation, answer: Answer, recording: Recording) -> Inspection:
        """Of a question just asked, while its answer is still what the session ends with."""
        assert llm.session is not None
        params = llm.session.params
        sizes = {name: getattr(params, name) for name in ("budget", "n_sink", "n_local", "n_window", "n_ctx")}
        texts = tuple(
            DocumentText(file.name, file.text, *document.token_ends(i)) for i, file in enumerate(document.files)
        )
        positions = {record.n_past for record in recording.answers()}
        tokens = {n: llm._encoder.piece(int(llm.input_ids[n])).decode("utf-8", "replace") for n in positions}
        columns = {name: value for name, value in params.columns.items() if value != ""}
        return cls(Path(llm.model_path).name, params.method, sizes | columns, texts, answer, recording, tokens)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The answered tokens in order; the first is the prompt's last token, from which the answer's first comes."""
        by_place: dict[int, list[Record]] = {}
        for record in self.recording.answers():
            by_place.setdefault(record.n_past, []).append(record)
        return tuple(
            Step(token=self.tokens[n_past], n_past=n_past, layers=tuple(records))
            for n_past, records in sorted(by_place.items())
        )

    @cached_property
    def bias(self) -> NDArray[np.float64]:
        """Relative bias [n_layer, n_tokens] of the tokens up to the end of the documents; NaN where none is known, as
        of a document that was opened: its last tokens alone were read again, and say nothing of the others."""
        bias = self.recording.token_bias(max((doc.start + len(doc.ends) for doc in self.documents), default=0))
        for doc in self.documents:
            if not np.isfinite(bias[:, doc.start]).any():
                bias[:, doc.start : doc.start + len(doc.ends)] = np.nan
        return bias

    @property
    def has_bias(self) -> bool:
        return bool(np.isfinite(self.bias).any())

    @cached_property
    def anchors(self) -> tuple[Anchor, ...]:
        """The tokens of the documents with the greatest bias, averaged over layers; empty where the method has none."""
        if not self.has_bias:
            return ()
        mean = mean_of_known(self.bias)
        best = np.argsort(-np.nan_to_num(mean, nan=-np.inf), kind="stable")
        found: list[Anchor] = []
        for token in best[: 4 * _N_BEST]:
            for number, start, end in self._places(int(token), int(token) + 1):
                doc, bias = self.documents[number], float(mean[token])
                if (text := doc.text[start:end]).strip() and math.isfinite(bias):
                    found.append(Anchor(document=doc.name, number=number, start=start, end=end, text=text, bias=bias))
        return tuple(found[:_N_BEST])

    @cached_property
    def choosing(self) -> tuple[int, ...]:
        """Layers that left something out in some step: the others are dense and tell nothing. All, where all are."""
        found = sorted({record.layer for record in self.recording.answers() if record.chosen is not None})
        return tuple(found or range(self.recording.n_layer))

    @property
    def mass_recall(self) -> float:
        """Attention-mass recall averaged over the steps of the layers that choose; NaN: there was nothing to find."""
        recalls = np.array([r.mass_recall for r in self.recording.answers() if r.layer in self.choosing])
        return float(np.nanmean(recalls)) if np.isfinite(recalls).any() else math.nan

    @cached_property
    def attended(self) -> NDArray[np.float64]:
        """Share of the steps that attended each chunk, per layer [n_layer, n_chunks]."""
        return self.recording.chosen_counts() / max(len(self.steps), 1)

    @cached_property
    def passages(self) -> tuple[Passage, ...]:
        """The chunks that most steps of the layers that choose attended, best first."""
        mean = self.attended[list(self.choosing)].mean(axis=0) if self.attended.size else np.zeros(0)
        c, n_sink = self.recording.n_chunk_tokens, self.recording.n_sink
        found = []
        for chunk in np.argsort(-mean, kind="stable")[:_N_BEST].tolist():
            for number, start, end in self._places(n_sink + chunk * c, n_sink + (chunk + 1) * c):
                name, share = self.documents[number].name, float(mean[chunk])
                found.append(Passage(chunk=chunk, document=name, number=number, start=start, end=end, attended=share))
        return tuple(found)

    def _places(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Number and characters of each document that the session's tokens [first, last) lie in."""
        for number, doc in enumerate(self.documents):
            start, end = doc.range_of(first, last)
            if start < end:
                yield number, start, end

    def layers(self) -> list[dict[str, Any]]:
        """Per layer, averaged over steps: share in chunks, entropy, recalls; None where there is no such thing."""
        recording = self.recording
        columns = {
            "share": recording.share(),
            "entropy": recording.entropy(),
            "mass_recall": recording.mass_recall(),
            "chunk_recall": recording.chunk_recall(),
        }
        return [
            {"layer": layer} | {name: plain(values[layer]) for name, values in columns.items()}
            for layer in range(recording.n_layer)
        ]

    def to_json(self) -> dict[str, Any]:
        """One object for programs; offsets count Unicode code points of a document's text."""
        return {
            "model": self.model,
            "method": self.method,
            "parameters": self.parameters,
            "question": self.answer.question,
            "answer": self.answer.text,
            "usage": self.answer.usage.to_json(),
            "gpu": None if self.answer.gpu is None else asdict(self.answer.gpu),
            "mass_recall": plain(self.mass_recall),
            "documents": [self._document_json(doc) for doc in self.documents],
            "anchors": [asdict(anchor) for anchor in self.anchors],
            "passages": [asdict(passage) for passage in self.passages],
            "layers": self.layers(),
            "steps": [self._step_json(step) for step in self.steps],
        }

    def _document_json(self, doc: DocumentText) -> dict[str, Any]:
        bias = mean_of_known(self.bias[:, doc.start : doc.start + len(doc.ends)]) if self.has_bias else None
        return {
            "name": doc.name,
            "first_token": doc.start,
            "token_ends": doc.ends.tolist(),
            "bias": None if bias is None else [plain(value) for value in bias],
        }

    def _step_json(self, step: Step) -> dict[str, Any]:
        layers = [
            {
                "layer": record.layer,
                "share": record.n_chosen,
                "entropy": plain(record.entropy),
                "mass_recall": plain(record.mass_recall),
                "chunk_recall": plain(record.chunk_recall),
                "chunks": None if record.chosen is None else record.chosen.tolist(),
            }
            for record in step.layers
        ]
        return {"token": step.token, "n_past": step.n_past, "layers": layers}


def mean_of_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis of what is not NaN; NaN where nothing is known."""
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0)
    mean: NDArray[np.float64] = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return mean


def plain(value: float) -> float | None:
    """A number as JSON has it: NaN becomes None."""
    return round(float(value), _SHORT) if math.isfinite(value) else None
