"""The options that commands share: their types, their help, and the frozen records that commands hand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from actqkv_cpp import parse_size
from actqkv_cpp.config import MAX_SEED, parse_bytes
from actqkv_cpp.errors import ParameterError

DEFAULT_MAX_TOKENS = 1024


def _parse_size(value: str | int) -> int:
    """Parser of an option that counts tokens: 2048, 2k, 128k, 1m."""
    try:
        return parse_size(value)
    except ParameterError as error:
        raise typer.BadParameter(f"{error}; {error.hint}" if error.hint else str(error)) from None


def _parse_bytes(value: str | int) -> int:
    """Parser of an option that counts bytes: 6g, 512m, 0."""
    try:
        return parse_bytes(value)
    except ParameterError as error:
        raise typer.BadParameter(f"{error}; {error.hint}") from None


def _parse_positive_size(value: str | int) -> int:
    if (n_tokens := _parse_size(value)) < 1:
        raise typer.BadParameter("at least 1 token")
    return n_tokens


def _option(*names: str, help: str, metavar: str, default: str, **more: Any) -> Any:
    """An option whose help names its default; tests compare that with the default itself."""
    return typer.Option(*names, metavar=metavar, help=f"{help} [default: {default}]", show_default=False, **more)


def _size(name: str, *, help: str, default: str, parser: Callable[[str | int], int] = _parse_size) -> Any:
    return _option(name, help=help, metavar="SIZE", default=default, parser=parser)


_DOCUMENT = typer.Option(
    "-d",
    "--document",
    metavar="FILE",
    help="File to read: PDF, DOCX, EPUB, HTML, Markdown, text or source code; - is standard input. A KV file "
    "(.akv) of actqkv index opens at once as the first; others are read again. Repeat for more.",
)
_MODEL = typer.Argument(metavar="MODEL", help="GGUF file. [default: the bundled model]", show_default=False)

Documents = Annotated[list[str], _DOCUMENT]
OptionalDocuments = Annotated[list[str] | None, _DOCUMENT]
Model = Annotated[str | None, _MODEL]
Ctx = Annotated[
    int | None,
    _size("--ctx", help="Tokens the session holds: 2k, 128k, 1m.", default="what the documents need plus 8k"),
]
Budget = Annotated[
    int, _size("--budget", help="Tokens attended at a time: the first, the last and retrieved chunks.", default="2k")
]
Sink = Annotated[int, _size("--sink", help="First tokens, always attended.", default="64")]
Local = Annotated[int, _size("--local", help="Last tokens, always attended.", default="512")]
Chunk = Annotated[
    int | None, _size("--chunk", help="Tokens of a chunk, the unit of retrieval.", default="32, of Quest's methods 16")
]
Method = Annotated[
    str,
    _option(
        "--method",
        help="How chunks are chosen: actqkv, actqkv-uniform, actqkv-equal, published, quest, quest-clamped, infllm, "
        "streaming, dense or oracle.",
        metavar="NAME",
        default="actqkv",
    ),
]
KvType = Annotated[
    str,
    _option(
        "--kv-type",
        help="Type in which keys and values are kept: f16, q8_0 or q4_0.",
        metavar="TYPE",
        default="f16",
    ),
]
KvFile = Annotated[
    Path | None,
    _option(
        "--kv-file",
        help="Write keys and values to this file while reading, and keep them there; after an interruption go on from "
        "it.",
        metavar="FILE",
        default="they are kept in RAM",
    ),
]
GpuLayers = Annotated[
    int | None,
    _option(
        "--gpu-layers",
        help="Layers of the model on the GPU, the output counting as one; -1 is all.",
        metavar="N",
        default="as many as fit, where llama-cpp-python has CUDA",
        min=-1,
    ),
]
Vram = Annotated[
    int | None,
    _option(
        "--vram",
        help="Memory of a GPU that attention may take beside weights: 6g, 512m; 0 attends on the processor.",
        metavar="BYTES",
        default="what is of use, as far as it is free",
        parser=_parse_bytes,
    ),
]
Threads = Annotated[
    int | None, _option("--threads", help="Threads to compute with.", metavar="N", default="one per core", min=1)
]
Temp = Annotated[
    float,
    _option("--temp", help="Sampling temperature; 0 takes the likeliest token.", metavar="T", default="0", min=0),
]
TopP = Annotated[
    float,
    _option("--top-p", help="Sample from the likeliest tokens of mass P.", metavar="P", default="0.95", min=0, max=1),
]
MinP = Annotated[
    float,
    _option(
        "--min-p", help="Drop tokens less likely than P times the likeliest.", metavar="P", default="0.05", min=0, max=1
    ),
]
MaxTokens = Annotated[
    int,
    _size(
        "--max-tokens",
        help="Most tokens of one answer, kept free in the context.",
        default="1k",
        parser=_parse_positive_size,
    ),
]
Seed = Annotated[
    int | None,
    _option("--seed", help="Seed of the sampling.", metavar="N", default="a new one each time", min=0, max=MAX_SEED),
]
Audit = Annotated[
    int,
    _option(
        "--audit",
        help="Every N answered tokens, check what share of the true attention one head's chunks have; 0 is off.",
        metavar="N",
        default="0",
        min=0,
    ),
]
MinRecall = Annotated[
    float | None,
    _option(
        "--min-recall",
        help="Double the budget, up to 8 times, where the last 8 audits have less than this share on average.",
        metavar="R",
        default="the budget stays",
        min=0,
        max=1,
    ),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no notes, only answers and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log, and tracebacks of errors.")]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the model and its session are made of; named as the parameters of the commands are."""

    model: Path | None
    budget: int
    sink: int
    local: int
    chunk: int | None
    method: str
    kv_type: str
    threads: int | None
    verbose: bool
    ctx: int | None = None
    gpu_layers: int | None = None
    vram: int | None = None
    system: str | None = None
    audit: int = 0
    min_recall: float | None = None
    kv_file: Path | None = None
    given: frozenset[str] = frozenset()  # names of the options that were given, as against defaults

    @classmethod
    def of(cls, context: typer.Context, *, model: Path | None, **others: Any) -> EngineOptions:
        """From the parameters of a command; `others` are those that it has by another name."""
        names = {field.name for field in fields(cls)} & context.params.keys()
        values = {name: context.params[name] for name in names} | others | {"model": model, "given": _given(context)}
        if values.get("kv_file") is not None:
            values["kv_file"] = Path(values["kv_file"])
        return cls(**values)


def _given(context: typer.Context) -> frozenset[str]:
    """Names of the parameters that the command line gives."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source is not None and source.name != "DEFAULT")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How answers are sampled, by the argument names of `Document.ask` and `Chat.say`."""

    temperature: float
    top_p: float
    min_p: float
    max_tokens: int
    seed: int | None

    @classmethod
    def of(cls, context: typer.Context) -> SamplingOptions:
        """From the parameters of a command."""
        given = context.params
        names = {field.name: "temp" if field.name == "temperature" else field.name for field in fields(cls)}
        return cls(**{name: given[parameter] for name, parameter in names.items()})

    def arguments(self) -> dict[str, Any]:
        return asdict(self)


def parse_list(text: str, parse: Callable[[str], Any]) -> tuple[Any, ...]:
    """The parts of a list with commas, parsed one by one."""
    return tuple(parse(part.strip()) for part in text.split(",") if part.strip())


def check_text(text: str, what: str) -> str:
    """`text` of the command line, where it was UTF-8.

    Raises:
        ParameterError: it holds bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ParameterError(f"{what} is not UTF-8", "type it in a terminal with a UTF-8 locale") from None
    return text
