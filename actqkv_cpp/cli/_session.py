"""From options to a model that has room for the documents: what `chat` and `ask` do before the first question."""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import actqkv_cpp
from actqkv_cpp import reader
from actqkv_cpp.cli._interrupt import Interrupt
from actqkv_cpp.cli._options import EngineOptions
from actqkv_cpp.cli._output import Output, Progress, clock, human_bytes
from actqkv_cpp.config import Retrieval
from actqkv_cpp.errors import Cancelled, DocumentError, MemoryPlanError, ParameterError, unknown_name
from actqkv_cpp.reader import TextFile

if TYPE_CHECKING:
    from actqkv_cpp import Document, Llama

STDIN = "-"
_SPARE_TOKENS = 8 * 1024  # what the default --ctx has beyond documents, question and answer
TEMPLATE_TOKENS = 256  # more than the chat templates known to us put around documents and one question
_WINDOW_TOKENS = 256  # of reading, unless local is shorter


def load_documents(names: Sequence[str]) -> list[TextFile]:
    """The documents of -d, checked before any model is loaded."""
    if names.count(STDIN) > 1:
        raise DocumentError("standard input can be read only once", "give -d - once")
    return [reader.load_stdin() if name == STDIN else reader.load(name) for name in names]


def texts_of(files: Sequence[TextFile]) -> list[str]:
    """The documents as the model reads them, names included."""
    return [heading + file.text for heading, file in zip(reader.headings(files), files, strict=True)]


def open_model(output: Output, options: EngineOptions, texts: Sequence[str], *, reserve: int) -> Llama:
    """The model with a session of --ctx tokens, by default enough for `texts` and `reserve` tokens with room to spare.

    Raises:
        ModelError: the file is missing or broken.
        MemoryPlanError: --ctx, or what the texts need, does not fit in RAM.
    """
    if not options.verbose:
        silence_llama_cpp()
    retrieval = _retrieval(options)
    path = options.model or actqkv_cpp.default_model_path()

    def load(n_ctx: int, **more: Any) -> Llama:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the model runs densely is part of the note below
            return actqkv_cpp.Llama(
                path,
                n_ctx=n_ctx,
                retrieval=retrieval,
                kv_type=options.kv_type,
                n_gpu_layers=options.gpu_layers,
                n_threads=options.threads,
                verbose=options.verbose,
                **more,
            )

    exact = actqkv_cpp.methods()[options.method]["positions"] == "exact"
    with output.waiting(f"loading {path.name}"):
        llm = load(options.ctx) if options.ctx is not None else _load_with_room(load, texts, reserve, exact=exact)
    if options.audit or options.min_recall is not None:
        llm.audit(options.audit, min_recall=options.min_recall)
    bundled = "" if options.model else " (bundled, for trying out)"
    output.note(f"{path.name}{bundled}: {_engine(llm)}, --ctx {llm.n_ctx():,}{_memory(llm)}")
    return llm


@dataclass(frozen=True)
class Reading:
    """How far a reading went. `done` is less than `total` where Ctrl-C stopped it; `rate` is in tokens per second."""

    names: str
    done: int
    total: int
    seconds: float
    rate: float

    @property
    def complete(self) -> bool:
        return self.done >= self.total

    def __str__(self) -> str:
        what = f"{self.done:,}" if self.complete else f"the first {self.done:,} of {self.total:,}"
        return f"read {what} tokens of {self.names} in {clock(self.seconds)} ({self.rate:,.0f}/s)"


def read_with_progress(output: Output, names: str, work: Callable[[Progress], object], *, already: int = 0) -> Reading:
    """Run `work` with a progress function that shows itself and stops the work at Ctrl-C; what was read is kept.

    Args:
        already: tokens that were read before and count as done.
    """
    done, total, begin = already, 0, time.monotonic()
    with Interrupt() as stop, output.progress(f"reading {names}") as show:

        def progress(n_done: int, n_total: int) -> bool:
            nonlocal done, total
            done, total = n_done, n_total
            show(done, total)
            return done >= total or not stop.requested

        with suppress(Cancelled, KeyboardInterrupt):
            work(progress)
    seconds = time.monotonic() - begin
    result = Reading(names, done, total, seconds, (done - already) / seconds)
    output.note(str(result) if result.complete else f"stopped: {result}")
    return result


def read_all(output: Output, llm: Llama, files: list[TextFile], *, system: str | None, reserve: int) -> Document:
    """The documents, read whole. KeyboardInterrupt where Ctrl-C stopped that."""
    names = ", ".join(file.name for file in files)
    reading = read_with_progress(
        output, names, lambda progress: llm.read(files, system=system, reserve=reserve, progress=progress)
    )
    if not reading.complete or llm.document is None:
        raise KeyboardInterrupt
    return llm.document


def _load_with_room(load: Callable[..., Llama], texts: Sequence[str], reserve: int, *, exact: bool) -> Llama:
    """exact: the method's positions end at the trained length, so the room to spare does too."""
    vocabulary = load(1, vocab_only=True)
    template = 2 * TEMPLATE_TOKENS  # around the documents, and around the question
    needed = sum(vocabulary.count_tokens(text) for text in texts) + template + reserve
    trained = vocabulary.n_ctx_train
    vocabulary.close()
    roomy = needed + _SPARE_TOKENS
    try:
        return load(min(roomy, max(needed, trained)) if exact else roomy)
    except MemoryPlanError:
        return load(needed)


@cache
def silence_llama_cpp() -> Any:
    """llama-cpp-python prints libllama's warnings even without verbose. The callback lives as long as the process."""
    import llama_cpp  # noqa: PLC0415 (heavy)

    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    return silent


def _retrieval(options: EngineOptions) -> Retrieval:
    if options.method not in (known := actqkv_cpp.methods()):
        raise unknown_name("method", options.method, known)
    chunk = options.chunk if options.chunk is not None else known[options.method]["chunk"]
    least = options.sink + options.local + chunk
    if options.budget < least:
        raise ParameterError(
            f"budget {options.budget:,} is less than n_sink {options.sink:,} + n_local {options.local:,} "
            f"+ one chunk of {chunk:,}",
            f"use a budget of {least:,} or more, or lower the others",
        )
    return Retrieval(
        method=options.method,
        budget=options.budget,
        n_sink=options.sink,
        n_local=options.local,
        chunk=options.chunk,
        window=min(_WINDOW_TOKENS, options.local),
    )


def _engine(llm: Llama) -> str:
    if llm.engine_reason:
        return f"densely through llama.cpp: {llm.engine_reason}"
    retrieval = llm.retrieval
    n_tokens = {
        "all": "all",
        "top": f"{retrieval.budget:,}",
        "oracle": f"{retrieval.budget:,}",
        "none": f"{int(retrieval.n_sink) + int(retrieval.n_local):,}",
    }[retrieval.decode or actqkv_cpp.methods()[retrieval.method]["decode"]]
    return f"method {retrieval.method} attends {n_tokens} tokens at a time"


def _memory(llm: Llama) -> str:
    return f" in {human_bytes(llm.session.plan.total_bytes)}" if llm.session else ""
