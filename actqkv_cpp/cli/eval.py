"""`actqkv eval`: retrieval methods side by side on generated and published tasks."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

import actqkv_cpp
from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._arguments import model_path
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._interrupt import Interrupt
from actqkv_cpp.cli._output import Output
from actqkv_cpp.cli._session import silence_llama_cpp
from actqkv_cpp.config import parse_size
from actqkv_cpp.errors import Cancelled, ParameterError, unknown_name
from actqkv_cpp.files import file_hash

if TYPE_CHECKING:
    from actqkv_cpp.evaluation.recalls import Recalls
    from actqkv_cpp.evaluation.results import Result
    from actqkv_cpp.evaluation.runner import Plan
    from actqkv_cpp.evaluation.samples import Suite

_TABLE_WIDTH = 120  # where standard output is not a terminal
_RATE_SPAN_S = 600.0  # methods differ in speed: the time left is told by the last ten minutes


@dataclass(frozen=True, kw_only=True)
class _Request:
    suites: tuple[str, ...]
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    samples: int | None
    seed: int
    text: Path | None
    longbench: tuple[Path, ...]
    infinitebench: tuple[Path, ...]
    truncate: int | None
    recalls: str
    out: Path | None
    json: bool


def evaluate(
    *,
    model: o.Model = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            metavar="NAMES",
            help="passkey, number, kv, needle, ruler, facts, read-once, long-answer, perplexity. "
            "[default: needle, where no file is given]",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        str, o._option("--lengths", metavar="SIZES", help="Tokens of a session, all in all.", default="4k")
    ] = "4k",
    methods: Annotated[
        str,
        o._option(
            "--methods",
            metavar="NAMES",
            help="Methods to compare. llama.cpp: its own dense attention; NAME:chunk=16:refine=4: with other "
            "parameters of Retrieval; NAME:kv_type=q8_0: with chunks of another type; NAME+question: the question "
            "first too.",
            default="actqkv",
        ),
    ] = "actqkv",
    budgets: Annotated[
        str, o._option("--budgets", metavar="SIZES", help="Tokens attended at a time.", default="2k")
    ] = "2k",
    samples: Annotated[
        int | None,
        o._option(
            "--samples", metavar="N", help="Documents of each suite and length.", default="the suite's own", min=1
        ),
    ] = None,
    seed: Annotated[int, o._option("--seed", metavar="N", help="Of all documents.", default="0", min=0)] = 0,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="Text for perplexity. [default: a generated one]", show_default=False
        ),
    ] = None,
    longbench: Annotated[
        list[Path] | None, typer.Option("--longbench", metavar="FILE", help="JSON lines of LongBench. Repeat for more.")
    ] = None,
    infinitebench: Annotated[
        list[Path] | None,
        typer.Option(
            "--infinitebench", metavar="FILE", help="JSON lines of InfiniteBench, named by task. Repeat for more."
        ),
    ] = None,
    truncate: Annotated[
        int | None,
        o._size("--truncate", help="Cut the middle out of documents of files beyond this.", default="nothing is cut"),
    ] = None,
    recalls: Annotated[
        str,
        o._option(
            "--recalls",
            metavar="NAME",
            help="Record while answering: needle (was its chunk chosen), mass (also of true attention; slow) or none.",
            default="none",
        ),
    ] = "none",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Journal and result; a run that was stopped goes on from there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    kv_type: o.KvType = "f16",
    threads: o.Threads = None,
    sink: o.Sink = 64,
    local: o.Local = 512,
    chunk: o.Chunk = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare retrieval methods on tasks that need the whole document.

    Documents and questions are generated from the seed; answers are greedy. A method that cannot run at a length is
    n/a, with the reason. `actqkv report` draws the result.

    \b
    Examples:
      actqkv eval --suite passkey,kv --lengths 4k,32k --methods actqkv,dense
      actqkv eval model.gguf --suite needle --lengths 8k,32k,128k --out needle
      actqkv eval model.gguf --longbench hotpotqa.jsonl --truncate 32k --json
    """
    output = Output(quiet=quiet, verbose=verbose)
    with reported(output):
        files = (*(longbench or ()), *(infinitebench or ()))
        request = _Request(
            suites=o.parse_list(suite if suite is not None else "" if files else "needle", str),
            lengths=o.parse_list(lengths, parse_size),
            methods=o.parse_list(methods, str),
            budgets=o.parse_list(budgets, parse_size),
            samples=samples,
            seed=seed,
            text=text,
            longbench=tuple(longbench or ()),
            infinitebench=tuple(infinitebench or ()),
            truncate=truncate,
            recalls=recalls,
            out=out,
            json=as_json,
        )
        path = model_path(model, hint="give a GGUF file, or leave it out for the bundled model; texts have --text FILE")
        settings = {"n_sink": sink, "n_local": local, "chunk": chunk, "kv_type": kv_type, "n_threads": threads}
        _eval(output, path or actqkv_cpp.default_model_path(), settings, request)


def _eval(output: Output, model: Path, settings: dict[str, Any], request: _Request) -> None:
    from actqkv_cpp.evaluation import engines, runner  # noqa: PLC0415 (heavy)

    if not output.verbose:
        silence_llama_cpp()
    plan = _plan(request)
    folder = request.out
    with Interrupt() as stop, output.progress("preparing", rate_span_s=_RATE_SPAN_S) as show:

        def watch(done: int, total: int, what: str) -> bool:
            show(done, total, what)
            return not stop.requested

        try:
            result = runner.evaluate(plan, engines.EngineSettings(model=model, **settings), folder=folder, watch=watch)
        except (Cancelled, KeyboardInterrupt):
            output.note("the same command goes on from here" if folder else "with --out a stopped run goes on later")
            raise KeyboardInterrupt from None
    if folder:
        output.note(f"wrote {folder / 'result.json'}")
    _show(output, result, as_json=request.json)


def _plan(request: _Request) -> Plan:
    """What was asked for, checked before a model is loaded."""
    from actqkv_cpp import reader  # noqa: PLC0415 (heavy)
    from actqkv_cpp.evaluation.engines import methods  # noqa: PLC0415 (heavy)
    from actqkv_cpp.evaluation.runner import Plan  # noqa: PLC0415 (heavy)

    text = reader.load_plain(request.text) if request.text else None
    suites = _suites(request)
    if not request.lengths and not all(suite.from_file for suite in suites):
        raise ParameterError("no length to evaluate at", "name some, for example --lengths 4k,32k")
    files = (*((request.text,) if request.text else ()), *request.longbench, *request.infinitebench)
    return Plan(
        suites=suites,
        lengths=request.lengths,
        methods=tuple(methods(request.methods, request.budgets)),
        seed=request.seed,
        n_samples=request.samples,
        longest=request.truncate,
        recalls=_recalls(request.recalls),
        text=text,
        files={str(path): file_hash(path) for path in files},
    )


def _recalls(name: str) -> Recalls:
    from actqkv_cpp.evaluation.recalls import Recalls  # noqa: PLC0415 (heavy)

    if name not in get_args(Recalls):
        raise unknown_name("value of --recalls", name, get_args(Recalls))
    return cast("Recalls", name)


def _suites(request: _Request) -> tuple[Suite, ...]:
    from actqkv_cpp.evaluation.suites import SUITES, infinitebench, longbench  # noqa: PLC0415 (heavy)

    found: list[Suite] = []
    for name in request.suites:
        if name not in SUITES:
            raise unknown_name("suite", name, SUITES)
        found.append(SUITES[name])
    for path in request.longbench:
        found += longbench.load(path)
    for path in request.infinitebench:
        found += infinitebench.load(path)
    if not found:
        raise ParameterError("no suite to evaluate", f"name some of {', '.join(SUITES)}")
    names = [suite.name for suite in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ParameterError(f"suite {twice} is asked for twice", "name it once; join files of one data set")
    return tuple(found)


def _show(output: Output, result: Result, *, as_json: bool) -> None:
    from actqkv_cpp.evaluation.summary import render  # noqa: PLC0415 (heavy)

    if as_json:
        output.json(result.to_json())
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _TABLE_WIDTH
    output.line(render(result, width=width))
