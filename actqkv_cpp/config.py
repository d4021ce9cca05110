"""How a session reads and retrieves: `Retrieval`, and sizes as people write them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

from actqkv_cpp.errors import ParameterError, unknown_name

Positions = Literal["auto", "clamped", "exact"]
Selection = Literal["all", "top", "none", "oracle"]
Summary = Literal["head", "kv_head", "mean", "bounds", "spread"]
Probe = Literal["mean", "bias"]
Statistics = Literal["pooled", "published"]
Score = Literal["cosine", "dot"]
Cutoff = Literal["none", "layerwise", "published"]
SummaryKeys = Literal["unrotated", "attended"]
Granularity = Literal["layer", "kv_head"]
Vote = Literal["max", "sum"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "positions": get_args(Positions),
    "prefill": get_args(Selection),
    "decode": get_args(Selection),
    "summary": get_args(Summary),
    "probe": get_args(Probe),
    "statistics": get_args(Statistics),
    "score": get_args(Score),
    "cutoff": get_args(Cutoff),
    "summary_keys": get_args(SummaryKeys),
    "granularity": get_args(Granularity),
    "vote": get_args(Vote),
}
_SIZES = ("budget", "n_sink", "n_local", "chunk", "window")
_COUNTS = ("representatives", "probe_warmup", "statistics_cap", "scan", "refine", "dense_layers")
_NUMBERS = ("cutoff_temperature", "question_weight")
LLAMA_CPP = "llama.cpp"  # the method that is not ours: dense attention by llama.cpp itself, for comparison
MAX_SEED = 2**32 - 1  # llama.cpp has 32 bits for it
_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}
_BYTE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", re.IGNORECASE)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Tokens meant by `size`: a number, or text such as "2k", "128K", "1m", "1.5k" (k = 1024).

    Raises:
        ParameterError: not a whole number of tokens, or negative.

    Example:
        >>> parse_size("128k")
        131072
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ParameterError(f"a size is not negative: {size}")
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    n_tokens = float(found[1]) * _UNITS[found[2].lower()] if found else 0.5
    if not n_tokens.is_integer():
        raise ParameterError(f"not a size in tokens: {size!r}", "write 2048, 2k, 128k or 1m (k = 1024)")
    return int(n_tokens)


def parse_bytes(size: int | str) -> int:
    """Bytes meant by `size`: a number, or text such as "6g", "512m", "1.5GB" (k = 1024, m = 1024 k, g = 1024 m).

    Raises:
        ParameterError: not a size in bytes, or negative.

    Example:
        >>> parse_bytes("6g")
        6442450944
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _BYTES.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise ParameterError(f"not a size in bytes: {size!r}", "write 6g, 512m or a number of bytes")
    return int(float(found[1]) * _BYTE_UNITS[found[2].lower()])


@dataclass(frozen=True)
class Retrieval:
    """What a session attends, and how it chooses. Frozen; checked once, when made.

    A method is a row of the native table (`actqkv_cpp.methods()` lists them); every column of the row is a parameter
    here, None meaning the row's own value.

    Args:
        method: name of the row: "actqkv" and its variants "actqkv-uniform" (a plain mean as the probe), "actqkv-equal"
            (no cut-off) and "published"; "quest", "quest-clamped", "infllm", "streaming", "dense", "oracle". Or
            "llama.cpp": densely through llama.cpp itself, for comparison.
        budget: tokens attended per step: sinks + local + retrieved chunks. At least n_sink + n_local + chunk.
        n_sink: first tokens, always attended.
        n_local: last tokens, always attended.
        window: tokens of one forward pass while reading, at most n_local.
        positions: "exact" (true positions), "clamped" (everything outside local at one distance; any length), "auto"
            (exact if n_ctx fits the trained length, else clamped).
        prefill, decode: what is retrieved while reading, and while answering: "all" chunks, the "top" ones by score,
            "none", or the "oracle"'s: those of the largest true attention mass, for which everything is attended.
        summary: of a chunk: "head" (per query head, its most attended keys), "kv_head" (per KV head), "mean" of all
            keys, "bounds" (least and greatest of each channel) or "spread" (mean in 4 bits, and how far keys
            spread); the last two want score "dot".
        representatives: keys averaged into a summary, 1 .. chunk.
        probe: of a window: "bias" (activation bias) or "mean" of its queries.
        probe_warmup: windows per layer whose probe is the plain mean; -1 as published (1000 / layers).
        statistics: running statistics "pooled" (exact) or as "published".
        statistics_cap: t_max; statistics remember at most t_max * 256 tokens.
        score: of a chunk: "cosine" or "dot" product of probe and summary.
        scan: while answering, keys that each query head looks at, in cells of those that are like what it seeks; their
            attention chooses chunks. 0 is off: summaries choose.
        refine: while answering, the keys themselves choose from the refine * share best chunks; 1 is off.
        cutoff: while answering: "none", "layerwise" (by entropy) or as "published".
        cutoff_temperature: of the softmax over scores, > 0.
        question_weight: lambda of question-aware prefill; 0 is off.
        summary_keys: of which keys summaries are: "unrotated", or as "attended" (with exact positions, rotated).
        granularity: one list of chunks per "layer", or one per "kv_head", voted for by its group's query heads.
        vote: of a group, by the "max" or the "sum" of its heads' softmax over chunks.
        dense_layers: so many first layers attend everything, always; statistics report them apart.
        chunk: tokens of a chunk, the unit of retrieval: 32, of Quest's methods 16.

    Sizes also take "2k" and the like.

    Raises:
        ParameterError: a wrong value, with the choices; an unknown name, with the nearest known one. Values that
            contradict each other are refused when a session is made, by the same class.

    Example:
        >>> Retrieval(budget="4k", score="dot").budget
        4096
    """

    method: str = "actqkv"
    _: KW_ONLY
    budget: int | str = 2048
    n_sink: int | str = 64
    n_local: int | str = 512
    window: int | str = 256
    positions: Positions | None = None
    prefill: Selection | None = None
    decode: Selection | None = None
    summary: Summary | None = None
    representatives: int | None = None
    probe: Probe | None = None
    probe_warmup: int | None = None
    statistics: Statistics | None = None
    statistics_cap: int | None = None
    score: Score | None = None
    scan: int | None = None
    refine: int | None = None
    cutoff: Cutoff | None = None
    cutoff_temperature: float | None = None
    question_weight: float | None = None
    summary_keys: SummaryKeys | None = None
    granularity: Granularity | None = None
    vote: Vote | None = None
    dense_layers: int | None = None
    chunk: int | str | None = None

    def __new__(cls, *args: Any, **options: Any) -> Retrieval:
        """Looks at the names only: an unknown one raises ParameterError with the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise unknown_name("retrieval option", name, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ParameterError(f"method is a name, not {self.method!r}", "actqkv_cpp.methods() lists them")
        for name in _SIZES:
            if name != "chunk" or self.chunk is not None:
                object.__setattr__(self, name, parse_size(getattr(self, name)))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise unknown_name(f"value for {name}", str(value), choices)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ParameterError(f"{name} is a whole number, not {value!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
                raise ParameterError(f"{name} is a number, not {value!r}")


def check_retrieval(given: object) -> Retrieval:
    """What was given; ParameterError where it is no Retrieval, for example a method's name."""
    if not isinstance(given, Retrieval):
        raise ParameterError(f"retrieval is a Retrieval, not {given!r}", 'write Retrieval("quest")')
    return given


def parse_columns(text: str) -> dict[str, Any]:
    """Parameters of a `Retrieval` as people write them behind a method's name: "chunk=16:refine=4".

    Raises:
        ParameterError: an unknown name, with the nearest known one; a value that is no number where one is expected.

    Example:
        >>> parse_columns("chunk=16:score=cosine")
        {'chunk': 16, 'score': 'cosine'}
    """
    known = [field.name for field in dataclasses.fields(Retrieval) if field.name not in ("method", "budget")]
    columns: dict[str, Any] = {}
    for part in text.split(":"):
        name, sign, value = part.partition("=")
        if name not in known:
            raise unknown_name("retrieval option", name, known)
        if not sign or name in columns:
            raise ParameterError(f"{part!r}: expected each option once, with its value", f"write {name}=VALUE")
        columns[name] = _parse_column(name, value)
    return columns


def _parse_column(name: str, value: str) -> object:
    if name in _CHOICES:
        return value
    if name in _SIZES:
        return parse_size(value)
    try:
        return int(value) if name in _COUNTS else float(value)
    except ValueError:
        raise ParameterError(f"{name} is a number, not {value!r}") from None
