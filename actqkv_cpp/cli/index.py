"""`actqkv index`: read documents once, into a KV file that opens at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._arguments import split
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._output import Output, human_bytes
from actqkv_cpp.cli._session import Documents, load_documents, open_model, read_all, texts_of
from actqkv_cpp.errors import ActqkvError, ParameterError

if TYPE_CHECKING:
    from actqkv_cpp.figures import FileInfo


def index(
    context: typer.Context,
    *,
    model: o.Model = None,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Documents to read; with --list, --info and --verify KV files or folders."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="The KV file to write.")] = None,
    list_files: Annotated[bool, typer.Option("--list", help="A line for each KV file, here or in FILE.")] = False,
    info: Annotated[bool, typer.Option("--info", help="What each KV file holds, and how it was read.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of each KV file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list and --info, print one JSON object.")] = False,
    ctx: o.Ctx = None,
    budget: o.Budget = 2048,
    method: o.Method = "actqkv",
    kv_type: o.KvType = "f16",
    gpu_layers: o.GpuLayers = None,
    vram: o.Vram = None,
    threads: o.Threads = None,
    sink: o.Sink = 64,
    local: o.Local = 512,
    chunk: o.Chunk = None,
    system: o.System = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Read documents once and keep what was read: -d of chat and ask takes the file and opens it at once.

    Interrupted, or killed, the same command goes on where it was. The first argument is the MODEL where it ends in
    .gguf.

    \b
    Examples:
      actqkv index book.pdf -o book.akv
      actqkv index model.gguf book.pdf -o book.akv --kv-type q8_0
      actqkv ask model.gguf -d book.akv "Who kept the key?"
      actqkv index --info book.akv
    """
    output = Output(quiet=quiet, verbose=verbose)
    with reported(output):
        path, names = split(([model] if model is not None else []) + (files or []), documents=True)
        looks = [list_files, info, verify]
        if sum(looks) > 1 or (any(looks) and (out is not None or path is not None)):
            raise typer.BadParameter("--list, --info and --verify go alone, with KV files")
        if as_json and not (list_files or info):
            raise typer.BadParameter("--json goes with --list or --info")
        if any(looks):
            _look(output, names, info=info, verify=verify, as_json=as_json)
            return
        if out is None or not names:
            raise typer.BadParameter("give a document, and -o FILE to write")
        engine = o.EngineOptions.of(context, model=path, kv_file=out)
        _index(output, engine, names, out)


def _index(output: Output, engine: o.EngineOptions, names: list[str], out: Path) -> None:
    from actqkv_cpp import kvfile  # noqa: PLC0415 (heavy)

    if out.is_dir():
        raise ParameterError(f"{out} is a folder", "give -o a file's name")
    found = Documents(None, load_documents(names))
    before = kvfile.info(out) if out.exists() else None
    if before is not None and not before.complete:
        output.note(f"{out} holds {before.n_done:,} of {before.n_tokens:,} tokens: going on from there")
    llm = open_model(output, engine, texts_of(found.files), reserve=o.DEFAULT_MAX_TOKENS)
    if llm.session is None:
        raise ParameterError(f"llama.cpp runs this model, {llm.engine_reason}: its keys and values cannot be kept")
    if before is not None and before.complete:
        llm.read(found.files, system=engine.system, reserve=o.DEFAULT_MAX_TOKENS)  # refuses where it is of another
    else:
        read_all(output, llm, found, system=engine.system, reserve=o.DEFAULT_MAX_TOKENS)
    done = "is complete already" if before is not None and before.complete else "written"
    output.note(f"{out} {done}: {kvfile.info(out).n_tokens:,} tokens, {human_bytes(_on_disk(out))}")


# ---- looking at files


def _look(output: Output, names: list[str], *, info: bool, verify: bool, as_json: bool) -> None:
    from actqkv_cpp import kvfile  # noqa: PLC0415 (heavy)

    paths = list(_paths(names or ["."]))
    if not paths:
        raise ParameterError(f"no KV files in {', '.join(names or ['this folder'])}", "name one")
    if verify:
        for path in paths:
            kvfile.verify(path)
            output.line(f"{path}: every byte in use is as it was written")
        return
    rows: list[dict[str, Any]] = []
    failed: list[ActqkvError] = []
    for path in paths:
        try:
            rows.append(_row(path))
        except ActqkvError as error:
            failed.append(error)
    if as_json:
        output.json({"files": rows})
    else:
        for row in rows:
            _show(output, row, long=info)
    for failure in failed[:-1]:
        output.note(f"error: {failure}")
    if failed:
        raise failed[-1]


def _paths(names: list[str]) -> Iterator[Path]:
    for name in names:
        path = Path(name)
        yield from sorted(path.glob("*.akv")) if path.is_dir() else [path]


def _row(path: Path) -> dict[str, Any]:
    from actqkv_cpp import kvfile, saved  # noqa: PLC0415 (heavy)

    info: FileInfo = kvfile.info(path)
    tokens, _, section = kvfile.read(path)
    found = saved.decode(section, tokens)
    params = asdict(info.params)
    for name in ("n_ctx", "n_threads"):
        del params[name]
    return {
        "file": str(path),
        "documents": [file.name for file in found.files],
        "model": found.model.to_json(),
        "tokens": info.n_tokens,
        "tokens_read": info.n_tokens if info.complete else info.n_done,
        "complete": info.complete,
        "bytes": _on_disk(path),
        "version": info.version,
        "reading": params,
        "changed": [change for file in found.files if file.origin and (change := file.origin.change())],
    }


def _show(output: Output, row: dict[str, Any], *, long: bool) -> None:
    share = "" if row["complete"] else f"{row['tokens_read']:,} of "
    names, params = ", ".join(row["documents"]), row["reading"]
    line = (
        f"{row['file']}: {share}{row['tokens']:,} tokens of {names}, {params['kv_type']}, {human_bytes(row['bytes'])}"
    )
    output.entry("", f"{line}, {row['model']['name']}")
    if not long:
        return
    sizes = ", ".join(f"{name} {params[name]}" for name in ("n_sink", "n_local", "n_window", "budget"))
    output.entry("  ", f"model: {row['model']['name']} ({row['model']['exact']})")
    output.entry("  ", f"read by method {params['method']}, positions {params['columns']['positions']}, {sizes}")
    output.entry("  ", f"chunks of {params['columns']['chunk']} tokens, format version {row['version']}")
    for change in row["changed"]:
        output.entry("  ", change)


def _on_disk(path: Path) -> int:
    """Bytes that the file takes; what is not written yet takes none."""
    return path.stat().st_blocks * 512
