"""perplexity: how well the next token of a long text is foretold, per position, and how far from dense attention.

At ten depths a stretch of the text enters token by token, as an answer would, so that methods which choose only
while answering are measured too. Its tokens are scored from the logits before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp.config import Retrieval
from actqkv_cpp.errors import Cancelled, ParameterError
from actqkv_cpp.evaluation.generator import make_document
from actqkv_cpp.evaluation.samples import Draft, Finding, Room, Sample, Suite

if TYPE_CHECKING:
    from actqkv_cpp import Llama
    from actqkv_cpp.document import Document, Progress

REFERENCE_CTX = 32 * 1024  # beyond it dense attention costs more than everything else, and there is no divergence
_N_STRETCHES = 10
_STRETCH_TOKENS = 32
_TEXT_SHARE = 1.1  # of the room: generated text is made a little too long, then its tokens are counted off
_PARTS = 1024  # tokens read between two looks at whether to go on

LogRows = list[NDArray[np.float32]]  # one [stretch, vocabulary] of log probabilities for each stretch


@dataclass(frozen=True)
class _Perplexity(Suite):
    """Text in, no questions; the dense reference of the latest text is kept for the next method."""

    shares_reading: ClassVar[bool] = False
    _reference: dict[tuple[str, str, int], LogRows] = field(default_factory=dict)  # by model, text and length

    def read(self, llm: Llama, sample: Sample, progress: Progress, *, question: str | None = None) -> Document | None:
        return None

    def answer(self, llm: Llama, document: Document | None, sample: Sample, progress: Progress) -> Iterator[Finding]:
        tokens = np.asarray(llm.tokenize(sample.document.encode(), special=False), np.int32)
        if len(tokens) < sample.n_ctx:
            raise ParameterError(
                f"the text of perplexity has {len(tokens)} tokens, the length is {sample.n_ctx}",
                "give a longer --text, or smaller --lengths",
            )
        tokens = tokens[: sample.n_ctx]
        rows = _score(llm, llm.retrieval, tokens, progress, kv_type=llm.kv_type)
        reference = self._dense(llm, sample, tokens, rows, progress)
        for i, begin in enumerate(_stretches(len(tokens))):
            yield _finding(
                tokens[begin : begin + _STRETCH_TOKENS],
                rows[i],
                reference[i] if reference else None,
                depth=(i + 1) / _N_STRETCHES,
            )

    def _dense(
        self, llm: Llama, sample: Sample, tokens: NDArray[np.int32], rows: LogRows, progress: Progress
    ) -> LogRows | None:
        """What dense attention over f16 says of the same text: exact inside the trained window, clamped beyond it, at
        the default size of local, since methods differ in theirs."""
        if sample.n_ctx > REFERENCE_CTX:
            return None
        key = (llm.model_path, sample.document, sample.n_ctx)
        if key not in self._reference:
            exact = sample.n_ctx <= llm._model.n_ctx_train()
            dense = Retrieval("dense", positions="exact" if exact else "clamped")
            self._reference.clear()
            same = exact and (llm.retrieval.method, llm.retrieval.positions, llm.kv_type) == ("dense", None, "f16")
            self._reference[key] = rows if same else _score(llm, dense, tokens, progress, kv_type="f16")
        return self._reference[key]


def _stretches(n_tokens: int) -> list[int]:
    """Where each stretch begins: so that it ends at a tenth, two tenths, ... of the text."""
    return [n_tokens * (i + 1) // _N_STRETCHES - _STRETCH_TOKENS for i in range(_N_STRETCHES)]


def _score(llm: Llama, retrieval: Retrieval, tokens: NDArray[np.int32], progress: Progress, *, kv_type: str) -> LogRows:
    """Log probabilities before each token of each stretch, from a session of its own over the loaded model."""
    from actqkv_cpp._native import Session  # noqa: PLC0415 (heavy)

    rows: LogRows = []
    n_threads = llm.session.params.n_threads if llm.session else llm.n_threads
    with Session(llm._model, retrieval, n_ctx=len(tokens), n_threads=n_threads, kv_type=kv_type) as session:
        for begin in _stretches(len(tokens)):
            last = begin - 1  # whose logits foretell the first of the stretch
            while session.n_past < last:
                session.decode(tokens[session.n_past : min(session.n_past + _PARTS, last)])
                if progress(session.n_past, len(tokens)) is False:
                    raise Cancelled("the reading was stopped")
            logits = [
                session.decode(tokens[i : i + 1], phase="decode", n_logits=1)[0]
                for i in range(last, last + _STRETCH_TOKENS)
            ]
            rows.append(_log_softmax(np.stack(logits)))
    return rows


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)
    return result


def _finding(
    tokens: NDArray[np.int32],
    rows: NDArray[np.float32],
    reference: NDArray[np.float32] | None,
    *,
    depth: float,
) -> Finding:
    """One stretch: score is the share of its tokens that were the likeliest; nll and kl are in nats per token."""
    measures = {"nll": float(-rows[np.arange(len(tokens)), tokens].mean())}
    if reference is not None:
        measures["kl"] = float((np.exp(reference) * (reference - rows)).sum(axis=1).mean())
        measures["same_top"] = float((reference.argmax(axis=1) == rows.argmax(axis=1)).mean())
    return Finding(score=float((rows.argmax(axis=1) == tokens).mean()), n=len(tokens), depth=depth, measures=measures)


def _perplexity(room: Room, index: int) -> Sample:
    least = 2 * _N_STRETCHES * _STRETCH_TOKENS
    if room.n_ctx < least:
        raise ParameterError(f"perplexity has {room.n_ctx} tokens, it needs {least}", "use lengths of 1k or more")
    if room.text is not None:
        return room.sample(Draft(room.text, ()), 0)
    n_tokens = room.n_ctx
    while True:
        n_tokens = int(_TEXT_SHARE * n_tokens)
        text = make_document(n_tokens, seed=f"perplexity {room.seed} {room.n_ctx} {index}", heldout=True).text
        if room.count(text) >= room.n_ctx:
            return room.sample(Draft(text, ()), 0)


SUITE = _Perplexity(
    name="perplexity",
    about="next tokens of a long text at ten depths; the score is the share foretold right",
    n_samples=1,
    make=_perplexity,
    score=None,
)
