"""What a benchmark found. Frozen; `Result.to_json()` is what `actqkv bench --json` prints, and `read` takes it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from actqkv_cpp import resultfile
from actqkv_cpp.figures import GpuStats

FORMAT = "actqkv-bench"
FORMAT_VERSION = 1

EngineName = Literal["actqkv", "llama.cpp", "other llama.cpp"]  # linked; of --peer-python
Phase = Literal["prefill", "decode"]
Context = Literal["read", "copied", "none"]


class Subject(NamedTuple):
    """What a figure is of: an engine, its method of retrieval, and the type in which it keeps keys and values."""

    engine: EngineName
    method: str
    kv_type: str

    @property
    def label(self) -> str:
        """Ours by the method, llama.cpp's by the engine, which is dense: "actqkv f16", "llama.cpp q8_0"."""
        return f"{self.method if self.engine == 'actqkv' else self.engine} {self.kv_type}"


@dataclass(frozen=True, kw_only=True)
class StageUse:
    """What one stage of a window took, per token of the phase. `gb_per_s` is bytes over time; 0 where nothing ran."""

    ms_per_token: float
    bytes_per_token: float

    @property
    def gb_per_s(self) -> float:
        return self.bytes_per_token / self.ms_per_token / 1e6 if self.ms_per_token > 0 else 0.0

    def to_json(self) -> dict[str, float]:
        return asdict(self) | {"gb_per_s": self.gb_per_s}


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of the process at one depth, before llama.cpp's context is made, against what must be held.

    The session that stays at the least depth is among the resident bytes.
    """

    resident_bytes: int
    weights_bytes: int
    kv_bytes: int
    summary_bytes: int

    @property
    def ratio(self) -> float:
        """Resident over weights + KV + summaries."""
        return self.resident_bytes / (self.weights_bytes + self.kv_bytes + self.summary_bytes)

    def to_json(self) -> dict[str, float]:
        return asdict(self) | {"ratio": self.ratio}


@dataclass(frozen=True, kw_only=True)
class GpuTraffic:
    """What attention on a GPU took, per token of the phase; `hit_rate` (0..1) of planned chunks, None: none planned."""

    hit_rate: float | None
    stalls_per_token: float
    to_bytes_per_token: float
    from_bytes_per_token: float
    wait_ms_per_token: float
    memory_bytes: int
    pinned_bytes: int

    @classmethod
    def of(cls, stats: Sequence[GpuStats], n_tokens: int) -> GpuTraffic | None:
        """Of all samples, of so many tokens together; None where none of them ran on a GPU."""
        used = [one for one in stats if one.n_calls]
        if not used:
            return None
        n_hits, n_planned = sum(one.n_hits for one in used), sum(one.n_hits + one.n_misses for one in used)
        return cls(
            hit_rate=n_hits / n_planned if n_planned else None,
            stalls_per_token=sum(one.n_stalls for one in used) / n_tokens,
            to_bytes_per_token=sum(one.to_bytes for one in used) / n_tokens,
            from_bytes_per_token=sum(one.from_bytes for one in used) / n_tokens,
            wait_ms_per_token=sum(one.wait_ms for one in used) / n_tokens,
            memory_bytes=used[-1].memory_bytes,
            pinned_bytes=used[-1].pinned_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine in one phase at one depth.

    Args:
        engine: "actqkv", "llama.cpp" or "other llama.cpp", that of --peer-python.
        method: of retrieval; theirs is "dense".
        depth: tokens that stand in the context before the measured ones.
        ms_per_token: the median of the samples; extrapolated where `measured` is false.
        measured: false where the figure is a straight line through the two greatest measured depths.
        n: samples: batches of prefill, or runs of decode steps.
        spread_ms: least and greatest sample, in ms per token.
        context: how the tokens before came to be there: all "read"; "copied", the first ones read and copied behind
            each other (the KV is of the right size, its content repeats); "none" where nothing was measured.
        stages: where the time of ours went, by stage.
        least_ms_per_token: of ours at the least depth, in samples that were taken in turn with these.
        memory: of ours.
        gpu: of ours, where attention ran on a GPU.
    """

    engine: EngineName
    method: str
    kv_type: str
    phase: Phase
    depth: int
    ms_per_token: float
    measured: bool
    n: int
    spread_ms: tuple[float, float]
    context: Context
    stages: dict[str, StageUse] | None = None
    least_ms_per_token: float | None = None
    memory: MemoryUse | None = None
    gpu: GpuTraffic | None = None

    @property
    def subject(self) -> Subject:
        return Subject(self.engine, self.method, self.kv_type)

    @property
    def tokens_per_s(self) -> float:
        return 1000.0 / self.ms_per_token if self.ms_per_token > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "method": self.method,
            "kv_type": self.kv_type,
            "phase": self.phase,
            "depth": self.depth,
            "tokens_per_s": self.tokens_per_s,
            "ms_per_token": self.ms_per_token,
            "measured": self.measured,
            "n": self.n,
            "spread_ms": list(self.spread_ms),
            "context": self.context,
            "stages": {name: stage.to_json() for name, stage in self.stages.items()} if self.stages else None,
            "least_ms_per_token": self.least_ms_per_token,
            "memory": self.memory.to_json() if self.memory else None,
            "gpu": asdict(self.gpu) if self.gpu else None,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """The row of a result file. KeyError, TypeError or ValueError where it is none."""
        found = _known(cls, value)
        low, high = map(float, found["spread_ms"])
        return cls(
            **found
            | {
                "ms_per_token": float(found["ms_per_token"]),
                "spread_ms": (low, high),
                "stages": {name: StageUse(**_known(StageUse, stage)) for name, stage in (found["stages"] or {}).items()}
                or None,
                "memory": MemoryUse(**_known(MemoryUse, found["memory"])) if found["memory"] else None,
                "gpu": GpuTraffic(**_known(GpuTraffic, found["gpu"])) if found["gpu"] else None,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """All of one run, with where it comes from.

    Args:
        version, commit: of actqkv; the commit where it is known.
        started: when, ISO 8601 in UTC.
        machine, model: as `provenance` describes them; the model with its sha256.
        settings: what was asked for, and what is in force.
        notes: sentences about what was not measured, and why.
    """

    version: str
    commit: str | None
    started: str
    machine: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "commit": self.commit,
            "started": self.started,
            "machine": self.machine,
            "model": self.model,
            "settings": self.settings,
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """The result of a file. KeyError, TypeError or ValueError where it is none."""
        rows = tuple(Row.from_json(row) for row in value["rows"])
        return cls(**_known(cls, value) | {"rows": rows, "notes": tuple(value["notes"])})

    def find(self, subject: Subject, phase: Phase, depth: int) -> Row | None:
        """The row of these, if there is one."""
        wanted = (subject, phase, depth)
        return next((row for row in self.rows if (row.subject, row.phase, row.depth) == wanted), None)


def read(path: Path) -> Result:
    """The result in a file that `actqkv bench --json` was written to.

    Raises:
        StateError: it is cut short, no result of a benchmark, or of another version.
        OSError: it cannot be read.
    """
    return resultfile.read(
        path, kind=FORMAT, version=FORMAT_VERSION, command="actqkv bench --json", make=Result.from_json
    )


def _known(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in a JSON object, which has derived figures too; of an earlier one, those it has."""
    return {field.name: value[field.name] for field in fields(kind) if field.name in value or field.default is MISSING}
