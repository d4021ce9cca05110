"""`actqkv bench`: prefill and decode at each depth, beside llama.cpp on the same weights."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

import actqkv_cpp
from actqkv_cpp import machine
from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._arguments import model_path
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._output import Output
from actqkv_cpp.cli._session import open_model
from actqkv_cpp.config import parse_size
from actqkv_cpp.errors import ModelError, ParameterError, unknown_name
from actqkv_cpp.files import file_hash

if TYPE_CHECKING:
    from actqkv_cpp import Llama
    from actqkv_cpp.bench import Result
    from actqkv_cpp.bench.kernel_jobs import Shape
    from actqkv_cpp.bench.kernels import Kernel

_DECODE_TOKENS, _QUICK_DECODE_TOKENS = 32, 8  # of one sample
_KERNELS_OF = "actqkv"  # the method whose answering step --kernels takes apart
_SMALLEST_CTX = 4096  # of a session that is opened for the model's shape
_TABLE_WIDTH = 120  # where standard output is not a terminal


@dataclass(frozen=True, kw_only=True)
class _Request:
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    read: int | None
    peer_read: int
    peer_kv_types: tuple[str, ...] | None
    peer_python: str | None
    peer_kv_in_ram: bool
    repeat: int
    quick: bool
    json: bool


def bench(
    context: typer.Context,
    *,
    model: o.Model = None,
    lengths: Annotated[
        str, o._option("--lengths", metavar="SIZES", help="Depths to measure at.", default="512,8k,32k,128k")
    ] = "512,8k,32k,128k",
    methods: Annotated[
        str, o._option("--methods", metavar="NAMES", help="Methods of ours, one after another.", default="actqkv")
    ] = "actqkv",
    read: Annotated[
        int | None,
        o._size("--read", help="Tokens that our session really reads; deeper contexts are copies.", default="all"),
    ] = None,
    peer_read: Annotated[
        int,
        o._size("--peer-read", help="Tokens that llama.cpp really reads; deeper contexts are copies.", default="8k"),
    ] = 8192,
    peer_kv_types: Annotated[
        str | None,
        o._option(
            "--peer-kv-types",
            metavar="TYPES",
            help="Types in which llama.cpp keeps keys and values, each measured: f16, q8_0, q4_0.",
            default="that of --kv-type",
        ),
    ] = None,
    peer_python: Annotated[
        str | None,
        o._option(
            "--peer-python",
            metavar="PATH",
            help="A Python whose llama_cpp, another build, is measured too.",
            default="only the linked one",
        ),
    ] = None,
    peer_kv_in_ram: Annotated[
        bool, typer.Option("--peer-kv-in-ram", help="llama.cpp keeps keys and values off the GPU that weights are on.")
    ] = False,
    repeat: Annotated[int, o._option("--repeat", metavar="N", help="Samples of each figure.", default="5", min=1)] = 5,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="Each kernel by itself instead, as an answering step at the last length calls it."
        ),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One short sample of each figure.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    budget: o.Budget = 2048,
    kv_type: o.KvType = "f16",
    gpu_layers: o.GpuLayers = None,
    vram: o.Vram = None,
    threads: o.Threads = None,
    sink: o.Sink = 64,
    local: o.Local = 512,
    chunk: o.Chunk = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure reading and answering at each depth, beside llama.cpp.

    Both run in turn on the same loaded weights, with the same threads: our session, and llama.cpp's own context with
    dense flash attention. A sample is 512 tokens of prefill, or 32 steps of decode.

    --peer-python PATH measures the llama.cpp of another installation too, for example one that another compiler built;
    it runs in a child process, in turn with the others.

    --kernels measures each kernel beside what this machine's memory and processor allow: on the heads of MODEL, or,
    with none, on 32 heads of 64.

    \b
    Examples:
      actqkv bench --lengths 512,8k
      actqkv bench model.gguf --json > bench.json
      actqkv bench model.gguf --lengths 1k,4k,16k --methods actqkv,dense --quick
      actqkv bench model.gguf --lengths 8k,128k --peer-kv-types f16,q8_0
      actqkv bench --kernels
    """
    output = Output(quiet=quiet, verbose=verbose)
    with reported(output):
        request = _Request(
            lengths=o.parse_list(lengths, parse_size),
            methods=o.parse_list(methods, str),
            read=read,
            peer_read=peer_read,
            peer_kv_types=None if peer_kv_types is None else _kv_types(peer_kv_types),
            peer_python=peer_python,
            peer_kv_in_ram=peer_kv_in_ram,
            repeat=1 if quick else repeat,
            quick=quick,
            json=as_json,
        )
        path = model_path(model, hint="give a GGUF file, or leave it out for the bundled model")
        engine = o.EngineOptions.of(context, model=path, method=_to_open_with(request.methods))
        if kernels:
            _bench_kernels(output, engine, request)
        else:
            _bench(output, engine, request)


def _kv_types(text: str) -> tuple[str, ...]:
    """The types of --peer-kv-types, each once.

    Raises:
        ParameterError: there is none, or an unknown one.
    """
    from actqkv_cpp._native import KV_TYPES  # noqa: PLC0415 (heavy)

    found = tuple(dict.fromkeys(o.parse_list(text, str)))
    unknown = [name for name in found if name not in KV_TYPES]
    if unknown or not found:
        raise ParameterError(
            f"unknown kv_type {unknown[0]!r} in --peer-kv-types" if unknown else "no type to measure llama.cpp with",
            f"known: {', '.join(KV_TYPES)}",
        )
    return found


def _bench_kernels(output: Output, engine: o.EngineOptions, request: _Request) -> None:
    from actqkv_cpp.bench.kernels import measure  # noqa: PLC0415 (heavy)
    from actqkv_cpp.bench.report import render_kernels  # noqa: PLC0415 (heavy)

    if request.methods != (_KERNELS_OF,):
        raise ParameterError(f"--kernels measures those of the method {_KERNELS_OF}", "leave --methods out")
    for name, given in (("--peer-python", request.peer_python), ("--peer-kv-types", request.peer_kv_types)):
        if given is not None:
            raise ParameterError("--kernels measures nothing of llama.cpp", f"leave {name} out")
    if request.read is not None:
        raise ParameterError("--kernels reads nothing", "leave --read out")
    if not request.lengths:
        raise ParameterError("no length to measure at", "name one, for example 128k")
    shape = _shape(output, engine, request.lengths[-1])
    n_threads = engine.threads or machine.available_cores()

    def show(kernel: Kernel) -> None:
        output.note(f"{kernel.kernel}, {kernel.work}: {kernel.ms:.3g} ms")

    result = measure(shape, n_threads=n_threads, repeat=request.repeat, quick=request.quick, show=show)
    if request.json:
        output.json(result.to_json())
    else:
        output.line(render_kernels(result, width=_width()))


def _shape(output: Output, engine: o.EngineOptions, depth: int) -> Shape:
    """The heads of the model, if one is named, and what the method does at that depth."""
    import llama_cpp  # noqa: PLC0415 (heavy)

    from actqkv_cpp.bench.engines import head_dimension  # noqa: PLC0415 (heavy)
    from actqkv_cpp.bench.kernel_jobs import Shape, candidates  # noqa: PLC0415 (heavy)

    chunk = engine.chunk or actqkv_cpp.methods()[_KERNELS_OF]["chunk"]
    granted = (engine.budget - engine.sink - engine.local) // chunk
    picked, _ = candidates(_KERNELS_OF, max(granted, 1), depth // chunk)
    found = Shape(
        chunk=chunk,
        depth=depth,
        budget=engine.budget,
        granted=granted,
        picked=picked,
        kv_type=engine.kv_type,
    )
    if engine.model is None:
        return found
    llm = open_model(output, replace(engine, ctx=_SMALLEST_CTX), [], reserve=0)
    try:
        return replace(
            found,
            n_head=llama_cpp.llama_model_n_head(llm._model.model),
            n_head_kv=llama_cpp.llama_model_n_head_kv(llm._model.model),
            d_head=head_dimension(llm),
        )
    finally:
        llm.close()


def _to_open_with(methods: tuple[str, ...]) -> str:
    """The first of methods that all exist; not one that ends at the trained length."""
    known = actqkv_cpp.methods()
    for name in methods:
        if name not in known:
            raise unknown_name("method", name, known)
    if not methods:
        raise ParameterError("no method to measure", f"name some of {', '.join(sorted(known))}")
    return next((name for name in methods if known[name]["positions"] != "exact"), "actqkv")


def _bench(output: Output, engine: o.EngineOptions, request: _Request) -> None:
    from actqkv_cpp import provenance  # noqa: PLC0415 (heavy)
    from actqkv_cpp.bench import Result, Row  # noqa: PLC0415 (heavy)
    from actqkv_cpp.bench.measure import Benchmark, Spec  # noqa: PLC0415 (heavy)

    spec = Spec(
        lengths=request.lengths,
        methods=request.methods,
        decode_tokens=_QUICK_DECODE_TOKENS if request.quick else _DECODE_TOKENS,
        repeat=request.repeat,
        read=request.read,
        peer_read=request.peer_read,
        peer_python=request.peer_python,
        peer_kv_in_ram=request.peer_kv_in_ram,
        kv_type=engine.kv_type,
        peer_kv_types=(engine.kv_type,) if request.peer_kv_types is None else request.peer_kv_types,
    )
    llm = open_model(output, replace(engine, ctx=spec.n_ctx), [], reserve=0)
    if llm.session is None:
        raise ModelError(
            f"there is nothing to compare: llama.cpp runs this model ({llm.engine_reason})",
            "measure a model of another architecture, or use llama.cpp's own llama-bench",
        )
    settings = asdict(spec) | {"retrieval": asdict(llm.retrieval), "positions": _positions(llm)}
    rows: list[Row] = []
    notes: list[str] = []
    found = Result(
        **provenance.describe_run(),
        machine=provenance.describe_machine(n_threads=llm.n_threads)
        | {"read_gb_per_s": round(provenance.read_bandwidth(llm.n_threads), 1)},
        model=provenance.describe_model(llm) | {"sha256": file_hash(llm.model_path)},
        settings=settings,
        rows=(),
        notes=(),
    )
    benchmark = Benchmark(llm, spec, show=output.progress, note=notes.append)
    settings["other_version"] = benchmark.other_version
    try:
        for row in benchmark.rows():
            rows.append(row)
            output.note(f"{row.subject.label} {row.phase} after {row.depth:,}: {row.tokens_per_s:,.1f} tokens/s")
    finally:  # an interrupt or an error loses nothing of what was measured
        if rows:
            _show(output, replace(found, rows=tuple(rows), notes=tuple(notes)), as_json=request.json)


def _positions(llm: Llama) -> str:
    """Positions of keys that are in force: exact up to the trained length, clamped beyond it."""
    assert llm.session is not None
    return str(llm.session.params.columns["positions"])


def _show(output: Output, result: Result, *, as_json: bool) -> None:
    from actqkv_cpp.bench.report import render  # noqa: PLC0415 (heavy)

    if as_json:
        output.json(result.to_json())
        return
    output.line(render(result, width=_width()))


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _TABLE_WIDTH
