"""From options to a model that has room for the documents: what commands do before the first question."""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import actqkv_cpp
from actqkv_cpp import reader
from actqkv_cpp.cli._interrupt import Interrupt
from actqkv_cpp.cli._options import EngineOptions
from actqkv_cpp.cli._output import Output, Progress, clock, human_bytes
from actqkv_cpp.config import Retrieval
from actqkv_cpp.errors import Cancelled, DocumentError, MemoryPlanError, ParameterError, unknown_name
from actqkv_cpp.gpu import GpuUse, mib
from actqkv_cpp.reader import TextFile

if TYPE_CHECKING:
    from actqkv_cpp import Chat, Document, Llama
    from actqkv_cpp.figures import FileInfo
    from actqkv_cpp.reading import Reading

    Asked: TypeAlias = Document | Chat

STDIN = "-"
_INDEX_AGAIN = "leave it out, or index the document again with it"
_SPARE_TOKENS = 8 * 1024  # what the default --ctx has beyond documents, question and answer
TEMPLATE_TOKENS = 256  # more than the chat templates known to us put around documents and one question
_WINDOW_TOKENS = 256  # of reading, unless local is shorter


def load_documents(names: Sequence[str]) -> list[TextFile]:
    """The documents of -d, those in KV files included, checked before any model is loaded."""
    return [file for _, files in _load_each(names) for file in files]


def _load_each(names: Sequence[str]) -> list[tuple[str, list[TextFile]]]:
    if names.count(STDIN) > 1:
        raise DocumentError("standard input can be read only once", "give -d - once")
    return [(name, load_document(name)) for name in names]


def load_document(name: str) -> list[TextFile]:
    """A document, or those in a KV file."""
    from actqkv_cpp import saved  # noqa: PLC0415 (heavy)

    if name == STDIN:
        return [reader.load_stdin()]
    return list(saved.texts(name)) if reader.is_kv_file(name) else [reader.load(name)]


@dataclass(frozen=True)
class Documents:
    """What -d names: a KV file to be opened or none, then files to be read; `again` are KV files among them, each with
    its documents."""

    opened: Path | None
    files: list[TextFile]
    again: tuple[tuple[str, list[TextFile]], ...] = ()

    def all_files(self) -> list[TextFile]:
        """With those in the KV file that is opened."""
        return [*(load_document(str(self.opened)) if self.opened is not None else []), *self.files]


def find_documents(names: Sequence[str]) -> Documents:
    """The documents of -d, checked before any model is loaded. A KV file is opened where it stands first: keys and
    values depend on all text before them, so that those of any other KV file are of no use here.

    Raises:
        DocumentError, KVFileError, StateError: one cannot be read.
    """
    first = int(_is_kv_file(names[0])) if names else 0
    loaded = _load_each(names[first:])
    files = [file for _, some in loaded for file in some]
    again = tuple((name, some) for name, some in loaded if _is_kv_file(name))
    return Documents(Path(names[0]) if first else None, files, again)


def _is_kv_file(name: str) -> bool:
    return name != STDIN and reader.is_kv_file(name)


def texts_of(files: Sequence[TextFile]) -> list[str]:
    """The documents as the model reads them, names included."""
    return [heading + file.text for heading, file in zip(reader.headings(files), files, strict=True)]


def open_model(
    output: Output, options: EngineOptions, texts: Sequence[str], *, reserve: int, opened: Path | None = None
) -> Llama:
    """The model with a session of --ctx tokens, by default enough for `texts` and `reserve` tokens with room to spare.

    Args:
        opened: a KV file that comes before the texts; it is opened, and answered by its own method where no option asks
            for another.

    Raises:
        ModelError: the model is missing or broken.
        KVFileError, StateError: the KV file is.
        MemoryPlanError: --ctx, or what the texts need, does not fit in RAM.
        ParameterError: options that contradict each other, or the KV file.
    """
    if not options.verbose:
        silence_llama_cpp()
    info = _info(opened, options) if opened is not None else None
    retrieval = _retrieval(options) if info is None else _retrieval_of_file(options, info)
    path = options.model or actqkv_cpp.default_model_path()

    def load(n_ctx: int, **more: Any) -> Llama:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the model runs densely is part of the note below
            return actqkv_cpp.Llama(
                path,
                n_ctx=n_ctx,
                retrieval=retrieval,
                kv_type=options.kv_type if info is None else info.params.kv_type,
                kv_file=opened or options.kv_file,
                n_gpu_layers=options.gpu_layers,
                vram=options.vram,
                n_threads=options.threads,
                verbose=options.verbose,
                **more,
            )

    positions = actqkv_cpp.methods()[options.method] if info is None else info.params.columns
    exact = positions["positions"] == "exact"
    reserve += info.n_tokens if info is not None else 0
    _say_plan(output, path, options, retrieval)
    with output.waiting(f"loading {path.name}"):
        if options.ctx is None:
            llm, n_tokens = _load_with_room(load, texts, reserve, exact=exact)
        else:
            llm = load(options.ctx)
            n_tokens = _count(llm, texts) if options.kv_file is not None else 0
    n_in_file = info.n_tokens if info is not None else n_tokens if options.kv_file is not None else 0
    if opened is not None:
        _open(output, llm, opened)
    if options.audit or options.min_recall is not None:
        llm.audit(options.audit, min_recall=options.min_recall)
    bundled = "" if options.model else " (bundled, for trying out)"
    output.note(f"{path.name}{bundled}: {_engine(llm)}, --ctx {llm.n_ctx():,}{_memory(llm, n_in_file)}")
    if (place := _place(llm, asked=bool({"vram", "gpu_layers"} & options.given))) is not None:
        output.note(place)
    return llm


def names_of(reading: Reading) -> str:
    """The documents that were read, or are still to be."""
    return ", ".join(file.name for file in reading.done.files[len(reading.place.files) :])


def unfinished(chat: Chat) -> list[Reading]:
    """Those of its readings that Ctrl-C stopped."""
    return [reading for reading in chat.readings if reading.n_read < reading.n_total]


def progress_of(names: str, done: int, total: int, seconds: float, *, already: int = 0) -> str:
    """How far a reading went.

    Args:
        done, total: tokens; done is less where Ctrl-C stopped it, total is 0 where a KV file held all.
        seconds: that it took, without the `already` tokens before; 0 where that is not known.
    """
    if not total:
        return f"nothing is left to read of {names}"
    what = f"{done:,}" if done >= total else f"the first {done:,} of {total:,}"
    took = f" in {clock(seconds)} ({(done - already) / seconds:,.0f}/s)" if seconds else ""
    return f"read {what} tokens of {names}{took}"


def read_with_progress(output: Output, names: str, work: Callable[[Progress], object], *, already: int = 0) -> bool:
    """Run `work` with a progress function that shows itself and stops the work at Ctrl-C; what was read is kept.

    Args:
        already: tokens that were read before and count as done.

    Returns:
        whether it ended by itself.
    """
    done, total, begin = already, 0, time.monotonic()
    stopped = False
    with Interrupt() as stop, output.progress(f"reading {names}") as show:

        def progress(n_done: int, n_total: int) -> bool:
            nonlocal done, total
            done, total = n_done, n_total
            show(done, total)
            return done >= total or not stop.requested

        try:
            work(progress)
        except (Cancelled, KeyboardInterrupt):
            stopped = True
    seconds = time.monotonic() - begin
    how_far = progress_of(names, done, total, seconds, already=already) if total or not stopped else "nothing was read"
    output.note(f"stopped: {how_far}" if stopped else how_far)
    return not stopped


def read_all(output: Output, llm: Llama, found: Documents, *, system: str | None, reserve: int) -> Asked:
    """The documents, read whole. KeyboardInterrupt where Ctrl-C stopped that."""
    chat = start(output, llm, found, system=system, reserve=reserve)
    if unfinished(chat):
        raise KeyboardInterrupt
    return chat if found.opened is not None and found.files else cast("Document", llm.document)


def start(output: Output, llm: Llama, found: Documents, *, system: str | None, reserve: int) -> Chat:
    """A conversation over the documents. Where Ctrl-C stops what is left of a KV file's, the others are not begun."""
    files, document = found.files, llm.document
    names = ", ".join(file.name for file in files)
    for name, read_again in found.again:
        note_again(output, llm, name, read_again)
    if document is None and files:
        read_with_progress(
            output, names, lambda progress: llm.read(files, system=system, reserve=reserve, progress=progress)
        )
        note_gpu_problem(output, llm)
        return llm.chat(llm.document)
    if document is not None and document.tokens_read < document.tokens_total:
        rest, already = document, document.tokens_read
        whole = ", ".join(rest.names)
        read_with_progress(output, whole, lambda progress: rest.resume(progress=progress), already=already)
    chat = llm.chat(document) if document is not None else llm.chat(system=system)
    if files and unfinished(chat):
        output.note(f"not begun: {names}; /read FILE reads it, after what /read reads on")
    elif files:
        read_with_progress(output, names, lambda progress: chat.read(files, progress=progress))
    note_gpu_problem(output, llm)
    return chat


def note_gpu_problem(output: Output, llm: Llama) -> None:
    """Say what reading has shown of the GPU: that it failed and was left, or that memory could not be pinned."""
    if llm.session is not None and llm.session.gpu_problem:
        output.note(f"attention on {llm.gpu}")


def note_again(output: Output, llm: Llama, name: str, files: Sequence[TextFile]) -> None:
    """Say that documents of a KV file are read and it is not opened, and how many tokens that are: the progress shows
    the time left."""
    n_tokens = sum(llm.count_tokens(file.text) for file in files)
    output.note(
        f"{name}: its {n_tokens:,} tokens are read again, as keys and values hold only after the text that they were "
        "read after; given as the first -d it opens at once"
    )


def _info(opened: Path, options: EngineOptions) -> FileInfo:
    """What the KV file holds, where the options do not contradict it."""
    from actqkv_cpp import kvfile  # noqa: PLC0415 (heavy)

    info = kvfile.info(opened)
    if "kv_type" in options.given and options.kv_type != info.params.kv_type:
        raise ParameterError(f"kv_type is {options.kv_type}, {opened} has {info.params.kv_type}", _INDEX_AGAIN)
    if options.system is not None:
        raise ParameterError(f"{opened} was read with its own system message", "give --system to actqkv index")
    if options.kv_file is not None:
        raise ParameterError(f"{opened} is on disk already, --kv-file is for what is to be read", "leave it out")
    return info


def _open(output: Output, llm: Llama, opened: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        document = llm.open(opened)
    for warning in said:
        output.note(f"warning: {warning.message}")
    part = "" if document.tokens_read == document.tokens_total else f"the first {document.tokens_read:,} of "
    output.note(f"opened {opened}: {part}{document.tokens_total:,} tokens of {', '.join(document.names)}")


def _load_with_room(
    load: Callable[..., Llama], texts: Sequence[str], reserve: int, *, exact: bool
) -> tuple[Llama, int]:
    """The model with room for texts and reserve, and the tokens of the texts.

    Args:
        exact: the method's positions end at the trained length, so the room to spare does too.
    """
    vocabulary = load(1, vocab_only=True)
    n_tokens = _count(vocabulary, texts)
    needed = n_tokens + TEMPLATE_TOKENS + reserve  # another template around the question
    trained = vocabulary.n_ctx_train
    vocabulary.close()
    roomy = needed + _SPARE_TOKENS
    try:
        return load(min(roomy, max(needed, trained)) if exact else roomy), n_tokens
    except MemoryPlanError:
        return load(needed), n_tokens


def _count(llm: Llama, texts: Sequence[str]) -> int:
    """Tokens of the texts and of a template around them, at most."""
    return sum(llm.count_tokens(text) for text in texts) + TEMPLATE_TOKENS


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


def _retrieval_of_file(options: EngineOptions, info: FileInfo) -> Retrieval:
    """The reading's own Retrieval, with what was given in its place. What cannot answer is refused when it opens."""
    from actqkv_cpp import saved  # noqa: PLC0415 (heavy)

    sizes = {"budget": options.budget, "n_sink": options.sink, "n_local": options.local, "chunk": options.chunk}
    names = {"budget": "budget", "n_sink": "sink", "n_local": "local", "chunk": "chunk"}
    given: dict[str, Any] = {name: size for name, size in sizes.items() if names[name] in options.given}
    reading = saved.answering(info.params, None)
    if "method" not in options.given:
        return replace(reading, **given)
    if options.method not in (known := actqkv_cpp.methods()):
        raise unknown_name("method", options.method, known)
    kept = {name: getattr(reading, name) for name in ("budget", "n_sink", "n_local", "window")}
    return Retrieval(options.method, **kept | given)


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


def _say_plan(output: Output, path: Path, options: EngineOptions, retrieval: Retrieval) -> None:
    """What weights and attention will take of a GPU at most, before they do."""
    from actqkv_cpp.placement import Placement  # noqa: PLC0415 (heavy)

    if not path.is_file():
        return
    placement = Placement(options.vram, 0)
    layers = placement.layers(str(path), options.gpu_layers)
    attention = placement.expected(retrieval)
    weights = f"{layers}, at most {mib(layers.n_bytes)}; " if layers.n else ""
    if weights or isinstance(attention, GpuUse):
        output.note(f"to be loaded: {weights}attention on {attention}")


def _place(llm: Llama, *, asked: bool) -> str | None:
    """On what attention runs, where that is worth a line: there is a GPU, or one was asked for."""
    if llm.session is None and asked and llm._placement.vram is not None:
        return "--vram has no effect: llama.cpp runs the model"
    layers = f"; {llm.gpu_layers}" if llm.gpu_layers.n or llm.gpu_layers.reason else ""
    if llm.session is None or not (asked or layers or llm.gpu.there):
        return layers.removeprefix("; ") or None
    return f"attention on {llm.gpu}{layers}"


def _memory(llm: Llama, n_in_file: int) -> str:
    """Where its keys and values will be, at most; `n_in_file` of the tokens lie in a KV file."""
    if llm.session is None:
        return ""
    plan, n_ctx = llm.session.plan, llm.n_ctx()
    disk = f" of RAM, {human_bytes(plan.file_bytes(n_ctx, n_in_file))} in {llm.kv_file}" if n_in_file else ""
    return f" in {human_bytes(plan.needed_bytes(n_ctx, n_in_file=n_in_file))}{disk}"
