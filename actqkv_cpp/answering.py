"""One answer: sample, read back, stop. Works on either engine; `Document` and `Chat` share it."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import llama_cpp
import numpy as np
from llama_cpp import LogitsProcessorList
from numpy.typing import NDArray

from actqkv_cpp.config import MAX_SEED
from actqkv_cpp.errors import ParameterError, unknown_name
from actqkv_cpp.results import FinishReason

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from actqkv_cpp.llama import Llama

_WHOLE, _NUMBERS = ("max_tokens", "min_tokens", "top_k", "seed"), ("temperature", "top_p", "min_p")
_OR_NONE = ("max_tokens", "seed")

OnText: TypeAlias = Callable[[str], object]  # pieces of the answer as they come; returning False ends the answer


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of `Document.ask`, `Chat.ask` and `Chat.say`, all of which draw answers."""

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str] | None
    on_text: OnText | None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn. Arguments as in llama_cpp.Llama.create_completion; temperature 0.0 is greedy, max_tokens
    None goes on up to n_ctx.

    Before `min_tokens` no control token is drawn, so that the answer neither ends nor begins another turn.
    """

    max_tokens: int | None = 1024
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 0.95
    min_p: float = 0.05
    top_k: int = 40
    seed: int | None = None
    stop: tuple[str, ...] = ()
    on_text: OnText | None = None

    @classmethod
    def of(cls, **options: Unpack[SamplingOptions]) -> Sampling:
        """ParameterError, with the nearest known name, for an unknown option."""
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise unknown_name("argument", name, known)
        stop = options.get("stop") or ()
        stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
        given: dict[str, Any] = {**options, "stop": stops}
        return cls(**given)

    def __post_init__(self) -> None:
        for names, kind, what in ((_WHOLE, Integral, "a whole number"), (_NUMBERS, Real, "a number")):
            for name in names:
                value = getattr(self, name)
                if not (isinstance(value, kind) or (value is None and name in _OR_NONE)):
                    raise ParameterError(f"{name} is {what}, not {value!r}")
        for text in self.stop:
            if not isinstance(text, str):
                raise ParameterError(f"stop is a text or several, not {text!r}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ParameterError(f"max_tokens is at least 1, not {self.max_tokens}", "None goes on up to n_ctx")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise ParameterError(f"min_tokens is 0 to max_tokens ({self.max_tokens}), not {self.min_tokens}")
        if not self.temperature >= 0.0:
            raise ParameterError(f"temperature is at least 0, not {self.temperature}")
        if self.seed is not None and not -1 <= self.seed <= MAX_SEED:
            raise ParameterError(f"seed is 0 to {MAX_SEED}, or -1 for a new one each time, not {self.seed}")


@dataclass(kw_only=True)
class Generated:
    """An answer while it grows. `n_tokens` counts sampled tokens without the one that ends it; the history has
    `n_prompt` before them."""

    text: str = ""
    n_prompt: int = 0
    n_tokens: int = 0
    finish_reason: FinishReason = "length"
    context_full: bool = False
    first_token_at: float | None = None  # time.perf_counter()
    decode_s: float = 0.0


class _Stream:
    """Text out of bytes of tokens: whole characters, no stop text, no leading space."""

    def __init__(self, stop: tuple[str, ...], on_text: OnText | None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [text for text in stop if text]
        self._on_text = on_text
        self._n_out = 0
        self.text = ""
        self.stopped = self.refused = False

    def push(self, piece: bytes) -> None:
        self.text += self._decoder.decode(piece)
        if not self._n_out:
            self.text = self.text.lstrip()
        found = [at for stop in self._stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        self._show(len(self.text) - (0 if self.stopped else self._held()))

    def end(self) -> None:
        """Nothing follows. Of a character that was cut with the answer nothing is shown, as in llama_cpp."""
        self._show(len(self.text))

    def _show(self, ready: int) -> None:
        """Hand on the first `ready` characters, unless nothing more is wanted."""
        if ready > self._n_out and not self.refused:
            out, self._n_out = self.text[self._n_out : ready], ready
            self.refused = self._on_text is not None and self._on_text(out) is False

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        lengths = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)


def generate(llm: Llama, into: Generated, sampling: Sampling) -> None:
    """Answer from where the history stands: its last token's logits are there. What is read back is in the history.

    `into` is filled as tokens come, so that an exception, KeyboardInterrupt included, leaves what was said.
    """
    stream = _Stream((*sampling.stop, *llm._template.stop), sampling.on_text)
    seed = llm._seed
    if sampling.seed is not None:
        llm.set_seed(sampling.seed)
    llm._sampler = llm._init_sampler(
        temp=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
        logits_processor=LogitsProcessorList([_no_end(llm, into, sampling)]) if sampling.min_tokens else None,
    )
    llm._seed = seed
    try:
        while True:
            token = llm.sample()
            into.first_token_at = into.first_token_at or time.perf_counter()
            if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
                into.finish_reason = "stop"
                break
            into.n_tokens += 1
            stream.push(llm._encoder.piece(token))
            into.text = stream.text
            ended = stream.stopped or stream.refused
            if ended:
                into.finish_reason = "stop" if stream.stopped else "cancelled"
            if llm.n_tokens >= llm.n_ctx():
                into.context_full = not ended
                break
            begin = time.perf_counter()
            llm.eval([token])  # also the last one: the history ends with what was said
            into.decode_s += time.perf_counter() - begin
            if ended or (sampling.max_tokens is not None and into.n_tokens >= sampling.max_tokens):
                break
    finally:
        llm._sampler = None
        stream.end()
        into.text = stream.text.rstrip()


def _no_end(llm: Llama, into: Generated, sampling: Sampling) -> Callable[..., NDArray[np.single]]:
    """A logits processor that takes control tokens, ends among them, out of the choice before `min_tokens`."""
    vocab = llm._model.vocab
    control = [t for t in range(llm._n_vocab) if llama_cpp.llama_vocab_is_control(vocab, t)]
    ends = [t for t in range(llm._n_vocab) if llama_cpp.llama_vocab_is_eog(vocab, t)]
    banned = np.array(sorted({*control, *ends}), np.intp)

    def process(tokens: NDArray[np.intc], logits: NDArray[np.single]) -> NDArray[np.single]:
        if into.n_tokens < sampling.min_tokens:
            logits[banned] = -np.inf
        return logits

    return process
