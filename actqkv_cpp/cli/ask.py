"""`actqkv ask`: read documents once, answer questions about them, leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actqkv_cpp import reader
from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._arguments import split
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._interrupt import Interrupt
from actqkv_cpp.cli._output import Output
from actqkv_cpp.cli._session import TEMPLATE_TOKENS, find_documents, open_model, read_all, texts_of
from actqkv_cpp.errors import DocumentError, ParameterError

if TYPE_CHECKING:
    from actqkv_cpp import Answer, Llama
    from actqkv_cpp.cli._session import Asked


@dataclass(frozen=True, kw_only=True)
class _Request:
    documents: list[str]
    questions: list[str]
    json: bool
    sources: bool


def ask(
    context: typer.Context,
    *,
    model: o.Model = None,
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION", help="Answered from the documents, one by one.")
    ] = None,
    documents: o.Documents,
    questions_file: Annotated[
        Path | None,
        typer.Option(
            "--questions", metavar="FILE", help='More questions: one per line, or a .jsonl file of {"question": ...}.'
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="Print the passages each answer came from.")] = False,
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
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Answer questions about documents that are read once.

    The first argument is the MODEL where it ends in .gguf or names a file, else a question for the bundled model.

    \b
    Examples:
      actqkv ask -d book.txt "Who kept the key?"
      actqkv ask model.gguf -d book.txt -d notes.md "Who kept the key?" "Where?" --sources
      actqkv ask model.gguf -d book.txt --questions questions.txt --json > answers.json
    """
    output = Output(quiet=quiet, verbose=verbose)
    with reported(output):
        path, asked = split(([model] if model is not None else []) + (questions or []))
        if questions_file is not None:
            asked += _load_questions(questions_file)
        if not asked:
            raise typer.BadParameter("ask at least one question")
        engine = o.EngineOptions.of(context, model=path)
        sampling = o.SamplingOptions.of(context)
        request = _Request(documents=documents, questions=asked, json=as_json, sources=sources)
        _ask(output, engine, sampling, request)


def _load_questions(path: Path) -> list[str]:
    text = reader.load_plain(path).removeprefix("\ufeff")  # the mark of Windows' editors
    lines = [line for part in text.split("\n") if (line := part.strip())]  # not at U+2028, which may stand in JSON
    if path.suffix != ".jsonl":
        return lines
    try:
        found = [json.loads(line)["question"] for line in lines]
    except (ValueError, KeyError, TypeError):
        found = [None]
    if not all(isinstance(question, str) for question in found):
        raise DocumentError(f"{path} is not JSON lines with a question each", 'a line is {"question": "..."}')
    return found


def _ask(output: Output, engine: o.EngineOptions, sampling: o.SamplingOptions, request: _Request) -> None:
    for question in request.questions:
        o.check_text(question, "a question")
        if not question.strip():
            raise ParameterError("a question is empty", "leave it out")
    found = find_documents(request.documents)
    texts = [*texts_of(found.files), max(request.questions, key=len)]
    llm = open_model(output, engine, texts, reserve=sampling.max_tokens, opened=found.opened)
    reserve = sampling.max_tokens + max(map(llm.count_tokens, request.questions)) + TEMPLATE_TOKENS
    document = read_all(output, llm, found, system=engine.system, reserve=reserve)
    answers: list[Answer] = []
    answer_all = _answer_silently if request.json else _answer_aloud
    try:
        with Interrupt() as stop:
            for answer in answer_all(output, document, sampling, request, stop):
                answers.append(answer)
                stop.check()
    finally:  # an interrupt or an error loses nothing of what was answered
        if request.json and answers:
            output.json(to_json(llm, answers))


def _answer_aloud(
    output: Output, document: Asked, sampling: o.SamplingOptions, request: _Request, stop: Interrupt
) -> Iterator[Answer]:
    """Answers for a reader, shown as they come."""
    for i, question in enumerate(request.questions):
        if len(request.questions) > 1:
            output.line(f"\n> {question}" if i else f"> {question}")
        with output.answering() as show:

            def on_text(piece: str, show: Callable[[str], None] = show) -> bool:
                show(piece)
                return not stop.requested

            answer = document.ask(question, on_text=on_text, **sampling.arguments())
        if request.sources:
            output.sources(answer.sources)
        output.answer_note(answer)
        yield answer


def _answer_silently(
    output: Output, document: Asked, sampling: o.SamplingOptions, request: _Request, stop: Interrupt
) -> Iterator[Answer]:
    """Answers for a program: only how far it is shows."""
    n = len(request.questions)
    with output.progress("answering", "questions") as show:
        for i, question in enumerate(request.questions):
            show(i, n)
            answer = document.ask(question, on_text=lambda _: not stop.requested, **sampling.arguments())
            if answer.finish_reason != "stop":
                output.note(f"question {i + 1}: {question}")
                output.answer_note(answer)
            yield answer


def to_json(llm: Llama, answers: Sequence[Answer]) -> dict[str, Any]:
    """The object of --json: one reading, all answers. Prompt tokens count the documents once; rates are over all."""
    last, n = answers[-1], len(answers)
    documents = last.usage.document_tokens
    dense = max(answer.usage.dense_tokens for answer in answers)
    completion = sum(answer.usage.completion_tokens for answer in answers)
    rates = [(a.usage.completion_tokens, a.timing.decode_tokens_per_s) for a in answers if a.timing.decode_tokens_per_s]
    decode_s = sum(tokens / rate for tokens, rate in rates)
    return {
        "model": Path(llm.model_path).name,
        "method": llm.retrieval.method if llm.engine == "actqkv" else "dense",
        "answers": [
            {"question": a.question, "answer": a.text, "sources": [source.to_json() for source in a.sources]}
            | ({} if a.audit is None else {"audit": a.audit.to_json()})
            for a in answers
        ],
        "usage": {
            "document_tokens": documents,
            "prompt_tokens": documents + sum(answer.usage.prompt_tokens - documents for answer in answers),
            "completion_tokens": completion,
            "attended_tokens": max(answer.usage.attended_tokens for answer in answers),
        }
        | ({"dense_tokens": dense} if dense else {}),
        "memory": last.memory.to_json(),
        "gpu": None if last.gpu is None else asdict(last.gpu),
        "timing": {
            "prefill_s": last.timing.prefill_s,
            "prefill_tokens_per_s": last.timing.prefill_tokens_per_s,
            "decode_tokens_per_s": sum(tokens for tokens, _ in rates) / decode_s if decode_s else 0.0,
            "first_token_s": sum(answer.timing.first_token_s for answer in answers) / n,
        },
    }
