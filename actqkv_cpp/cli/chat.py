"""`actqkv chat`: read documents, then talk about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from actqkv_cpp import default_model_path
from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._arguments import model_path
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._output import Output
from actqkv_cpp.cli._repl import COMMANDS, Repl
from actqkv_cpp.cli._saved import ReadEvent, SavedChat, check_same
from actqkv_cpp.cli._saved import load as load_chat
from actqkv_cpp.cli._session import (
    STDIN,
    TEMPLATE_TOKENS,
    find_documents,
    load_document,
    open_model,
    start,
    texts_of,
    unfinished,
)
from actqkv_cpp.cli._terminal import open_lines
from actqkv_cpp.errors import ParameterError, StateError
from actqkv_cpp.reader import TextFile

_QUESTION_TOKENS = 512  # kept free beside the answer


def chat(
    context: typer.Context,
    *,
    model: o.Model = None,
    documents: o.OptionalDocuments = None,
    ctx: o.Ctx = None,
    budget: o.Budget = 2048,
    method: o.Method = "actqkv",
    kv_type: o.KvType = "f16",
    kv_file: o.KvFile = None,
    gpu_layers: o.GpuLayers = None,
    vram: o.Vram = None,
    threads: o.Threads = None,
    sink: o.Sink = 64,
    local: o.Local = 512,
    chunk: o.Chunk = None,
    temp: o.Temp = 0.0,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.05,
    max_tokens: o.MaxTokens = o.DEFAULT_MAX_TOKENS,
    seed: o.Seed = None,
    audit: o.Audit = 0,
    min_recall: o.MinRecall = None,
    system: o.System = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Go on with a chat of /save NAME: its model, documents and turns."),
    ] = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Read documents, then talk about them.

    Ctrl-C stops a reading or an answer and keeps what is there; /help lists the commands of the conversation.

    \b
    Examples:
      actqkv chat -d book.txt
      actqkv chat model.gguf --ctx 128k -d book.txt -d notes.md
      actqkv chat model.gguf -d paper.pdf
      actqkv chat --resume paper
    """
    output = Output(quiet=quiet, verbose=verbose)
    sampling = o.SamplingOptions.of(context)
    with reported(output):
        engine = o.EngineOptions.of(context, model=model_path(model))
        if resume is None:
            _chat(output, engine, sampling, documents or [])
            return
        if documents or system is not None:
            raise ParameterError("--resume brings its own documents and system text", "leave -d and --system out")
        saved = load_chat(resume)
        path = engine.model or (Path(saved.model) if saved.model else None)
        _chat(output, replace(engine, model=path, system=saved.system), sampling, list(saved.documents), saved)


def _chat(
    output: Output,
    engine: o.EngineOptions,
    sampling: o.SamplingOptions,
    documents: list[str],
    saved: SavedChat | None = None,
) -> None:
    found = find_documents(documents)
    later = _check(saved, found.all_files(), engine) if saved is not None else {}
    lines = open_lines(
        stdin_taken=STDIN in documents,
        commands=COMMANDS,
        with_path=[name for name, command in COMMANDS.items() if "FILE" in command.usage],
    )
    reserve = sampling.max_tokens + _QUESTION_TOKENS
    texts = [*texts_of(found.files), *(file.text for file in later.values())]
    for turn in saved.turns if saved is not None else ():
        texts.append(turn.question)
        reserve += len(turn.tokens) + TEMPLATE_TOKENS
    llm = open_model(output, engine, texts, reserve=reserve, opened=found.opened)
    conversation = start(output, llm, found, system=engine.system, reserve=reserve)
    stopped = bool(unfinished(conversation))
    if stopped and saved is not None:  # its turns cannot follow a part of what they were about
        raise KeyboardInterrupt
    output.note(f"{'/read reads on, ' if stopped else ''}/help shows the commands, Ctrl-D leaves")
    repl = Repl(
        output,
        lines,
        conversation,
        sampling=sampling,
        documents=documents[:1] if found.opened is not None and len(conversation.readings) == 1 else documents,
        system=engine.system,
    )
    if saved is not None:
        repl.take_up(saved, later)
    repl.run()


def _check(saved: SavedChat, files: list[TextFile], engine: o.EngineOptions) -> dict[str, TextFile]:
    """The documents that a saved chat read between its turns, by digest.

    Raises:
        DocumentError: a document has changed since, or is missing.
        StateError: another model is given than it was held with.
    """
    path = engine.model or default_model_path()
    if path.is_file() and path.stat().st_size != saved.model_bytes:
        raise StateError(
            f"the chat was held with a model of {saved.model_bytes:,} bytes, {path} has {path.stat().st_size:,}",
            "name the model that it was held with: actqkv chat MODEL --resume NAME",
        )
    events = [event for event in saved.events if isinstance(event, ReadEvent)]
    for file, event in zip(files, events, strict=False):
        check_same(file, event)
    later: dict[str, TextFile] = {}
    for event in events[len(files) :]:
        read = load_document(event.path)
        file = next((file for file in read if file.sha256 == event.sha256), read[0])
        check_same(file, event)
        later[event.sha256] = file
    return later
