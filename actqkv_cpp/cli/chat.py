"""`actqkv chat`: read documents, then talk about them."""

from __future__ import annotations

from pathlib import Path

from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._output import Output
from actqkv_cpp.cli._repl import COMMANDS, Repl
from actqkv_cpp.cli._session import STDIN, load_documents, open_model, read_with_progress, texts_of
from actqkv_cpp.cli._terminal import open_lines

_QUESTION_TOKENS = 512  # kept free beside the answer


def chat(
    *,
    model: o.Model = None,
    documents: o.OptionalDocuments = None,
    ctx: o.Ctx = None,
    budget: o.Budget = 2048,
    method: o.Method = "actqkv",
    kv_type: o.KvType = "f16",
    gpu_layers: o.GpuLayers = 0,
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
    """Read documents, then talk about them.

    Ctrl-C stops a reading or an answer and keeps what is there; /help lists the commands of the conversation.

    \b
    Examples:
      actqkv chat -d book.txt
      actqkv chat model.gguf --ctx 128k -d book.txt -d notes.md
      actqkv chat model.gguf -d paper.pdf
    """
    output = Output(quiet=quiet, verbose=verbose)
    engine = o.EngineOptions(
        model=Path(model) if model else None,
        ctx=ctx,
        budget=budget,
        sink=sink,
        local=local,
        chunk=chunk,
        method=method,
        kv_type=kv_type,
        gpu_layers=gpu_layers,
        threads=threads,
        system=system,
        verbose=verbose,
        audit=audit,
        min_recall=min_recall,
    )
    sampling = o.SamplingOptions(temperature=temp, top_p=top_p, min_p=min_p, max_tokens=max_tokens, seed=seed)
    with reported(output):
        _chat(output, engine, sampling, documents or [])


def _chat(output: Output, engine: o.EngineOptions, sampling: o.SamplingOptions, documents: list[str]) -> None:
    files = load_documents(documents)
    lines = open_lines(
        stdin_taken=STDIN in documents,
        commands=COMMANDS,
        with_path=[name for name, command in COMMANDS.items() if "FILE" in command.usage],
    )
    reserve = sampling.max_tokens + _QUESTION_TOKENS
    llm = open_model(output, engine, texts_of(files), reserve=reserve)
    reading = None
    if files:
        names = ", ".join(file.name for file in files)
        reading = read_with_progress(
            output,
            names,
            lambda progress: llm.read(files, system=engine.system, reserve=reserve, progress=progress),
        )
    conversation = llm.chat(llm.document) if llm.document else llm.chat(system=engine.system)
    resume = "" if reading is None or reading.complete else "/read reads on, "
    output.note(f"{resume}/help shows the commands, Ctrl-D leaves")
    Repl(output, lines, conversation, sampling=sampling, reading=reading).run()
