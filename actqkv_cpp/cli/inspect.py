"""`actqkv inspect`: one question about documents, and what the engine did to answer it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._arguments import split
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._interrupt import Interrupt
from actqkv_cpp.cli._output import Output
from actqkv_cpp.cli._session import find_documents, open_model, read_all, texts_of
from actqkv_cpp.errors import ParameterError
from actqkv_cpp.files import check_free, written_atomically

if TYPE_CHECKING:
    from actqkv_cpp.inspection import Anchor, Inspection, Passage

_N_SHOWN = 5  # anchors and passages in the terminal
_EXCERPT = 72  # characters of a passage there


def inspect(
    context: typer.Context,
    *,
    model: o.Model = None,
    question: Annotated[list[str] | None, typer.Argument(metavar="QUESTION", help="Answered and looked into.")] = None,
    documents: o.Documents,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page to look at; it needs no network.")
    ] = None,
    ctx: o.Ctx = None,
    budget: o.Budget = 2048,
    method: o.Method = "actqkv",
    kv_type: o.KvType = "f16",
    vram: o.Vram = None,
    threads: o.Threads = None,
    sink: o.Sink = 64,
    local: o.Local = 512,
    chunk: o.Chunk = None,
    max_tokens: o.MaxTokens = 128,
    system: o.System = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Show what the engine did for a question: anchors, chunks of every layer and step, recall of true attention.

    Every step attends everything once more, to know what it should have found: answers come slowly. The first argument
    is the MODEL where it ends in .gguf or names a file.

    \b
    Examples:
      actqkv inspect -d book.txt "Who kept the key?" --html inspect.html
      actqkv inspect model.gguf -d book.txt "Who kept the key?" --json > inspect.json
    """
    output = Output(quiet=quiet, verbose=verbose)
    with reported(output):
        path, asked = split(([model] if model is not None else []) + (question or []))
        if len(asked) != 1:
            raise typer.BadParameter(f"ask one question, not {len(asked)}")
        engine = o.EngineOptions.of(context, model=path)
        if html is not None:
            from actqkv_cpp.inspection.page import MARK  # noqa: PLC0415 (heavy)

            check_free(html, MARK)
        found = _inspect(output, engine, documents, asked[0], max_tokens)
        if html is not None:
            _write(html, found)
            output.note(f"wrote {html}")
        if as_json:
            output.json(found.to_json())
        elif html is None:
            _show(output, found)
        else:
            output.line(found.answer.text)


def _inspect(
    output: Output, engine: o.EngineOptions, documents: list[str], question: str, max_tokens: int
) -> Inspection:
    from actqkv_cpp.inspection import Inspection  # noqa: PLC0415 (heavy)

    o.check_text(question, "the question")
    if not question.strip():
        raise ParameterError("the question is empty", "ask something")
    found = find_documents(documents)
    llm = open_model(output, engine, [*texts_of(found.files), question], reserve=max_tokens, opened=found.opened)
    if found.opened is not None:
        output.note(f"{found.opened} does not say which of its tokens were anchors when it was read")
    with llm.record(mass="answers") as recording:
        reserve = max_tokens + llm.count_tokens(question)
        document = read_all(output, llm, found, system=engine.system, reserve=reserve)
        with Interrupt() as stop, output.progress("answering", "tokens") as show:
            said = 0

            def on_text(piece: str) -> bool:
                nonlocal said
                said += 1
                show(said, max_tokens)
                return not stop.requested

            answer = document.ask(question, max_tokens=max_tokens, on_text=on_text)
    output.answer_note(answer)
    return Inspection.of(llm, document, answer, recording)


def _write(path: Path, found: Inspection) -> None:
    """The page appears whole or not at all."""
    from actqkv_cpp.inspection import render  # noqa: PLC0415 (heavy)

    with written_atomically(path) as temporary:
        temporary.write_text(render(found), encoding="utf-8", errors="replace")


def _show(output: Output, found: Inspection) -> None:
    """A summary for a terminal."""
    output.line(found.answer.text)
    output.line()
    output.line("layer  chunks  entropy  mass recall  chunk recall")
    for layer in found.layers():
        cells = (_number(layer[name]) for name in ("entropy", "mass_recall", "chunk_recall"))
        share = "-" if layer["share"] is None else f"{layer['share']:.1f}"
        output.line(f"{layer['layer']:5}  {share:>6}  {{:>7}}  {{:>11}}  {{:>12}}".format(*cells))
    if passages := found.passages[:_N_SHOWN]:
        output.line("\nattended most, by share of steps and layers that choose:")
        for passage in passages:
            text = found.documents[passage.number].text[passage.start : passage.end]
            excerpt = " ".join(text.split())[:_EXCERPT]
            output.entry(f"{passage.attended:5.0%}  ", f"{_place(found, passage)}  {excerpt}")
    if anchors := found.anchors[:_N_SHOWN]:
        output.line("\nanchors, by activation bias relative to their window:")
        for anchor in anchors:
            output.entry(f"{anchor.bias:5.1f}  ", f"{_place(found, anchor)}  {anchor.text.strip()!r}")
    if found.answer.gpu is not None:
        output.line(f"\nGPU: {found.answer.gpu}")
    output.note("--html OUT writes a page to look at, --json all of it for programs")


def _place(found: Inspection, there: Anchor | Passage) -> str:
    """Document and offsets; of documents with one name also which of them it is."""
    twice = sum(doc.name == there.document for doc in found.documents) > 1
    which = f" (document {there.number + 1})" if twice else ""
    return f"{there.document}{which}:{there.start}-{there.end}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
