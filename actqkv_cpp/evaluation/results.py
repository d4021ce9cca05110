"""What an evaluation found: records of samples, rows made of them, and the result file. Frozen.

`Result.to_json()` is what `actqkv eval --json` prints and what result.json holds; `read` takes it back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actqkv_cpp import resultfile
from actqkv_cpp.evaluation.samples import Finding

FORMAT = "actqkv-eval"
FORMAT_VERSION = 1
RESULT = "result.json"  # in the folder of --out
_Z_95 = 1.959964  # of a two-sided interval of 95 %
_N_DEPTHS = 10  # depths are reported in tenths of the document, halves as the next


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of the comparison: a suite at a length, under a method at a budget.

    Attributes:
        length: tokens of the session; None where every sample has its own.
        budget: tokens attended; None where all are.
    """

    suite: str
    method: str
    budget: int | None
    length: int | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one sample gave in one cell; a line of the journal.

    Attributes:
        sample: its number.
        findings: one for each question.
        n_read, read_s: tokens of the document and the seconds it took to read them; 0 where a reading was shared.
        n_cut: tokens taken out of the middle of the document.
        resident_bytes: of the process, after the last answer; 0 where the system does not tell.
        reason: why there are no findings.
    """

    cell: Cell
    sample: int
    findings: tuple[Finding, ...] = ()
    n_read: int = 0
    read_s: float = 0.0
    n_cut: int = 0
    resident_bytes: int = 0
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Record:
        """The record of a journal's line. KeyError, TypeError or ValueError where it is none."""
        findings = tuple(
            Finding(**(finding | {"references": tuple(finding["references"])})) for finding in value["findings"]
        )
        return cls(**(value | {"cell": Cell(**value["cell"]), "findings": findings}))


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean with its interval.

    Attributes:
        n: samples it is the mean of.
        score: 0 to 1; None where there are no samples.
        ci_low, ci_high: Wilson's interval of 95 %.
        measures, recalls: as `Finding`, means.
    """

    n: int
    score: float | None
    ci_low: float | None
    ci_high: float | None
    measures: dict[str, float] = field(default_factory=dict)
    recalls: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """All samples of one cell.

    Attributes:
        total: over everything.
        tasks: by the part of the suite, where it has parts.
        depths: by depth in tenths (0.0 .. 1.0), where samples have one.
        n_documents: documents read.
        reason: why there is no score, or not one of every sample.
        attended_mean, attended_max: tokens that one query attended.
        dense_max: the same of layers that attend everything under a method that chooses (Quest's first two); None:
            there are none.
        length_mean: tokens of prompts, on average.
        prefill_tokens_per_s, decode_tokens_per_s: over all samples; None where nothing was measured.
        kv_bytes, summary_bytes: the most that one session held; resident_bytes: the most the process did.
        n_cut: documents whose middle was cut out.
    """

    cell: Cell
    total: Score
    tasks: dict[str, Score]
    depths: dict[float, Score]
    n_documents: int
    reason: str | None
    attended_mean: float | None
    attended_max: int | None
    dense_max: int | None
    length_mean: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    kv_bytes: int | None
    summary_bytes: int | None
    resident_bytes: int | None
    n_cut: int

    def to_json(self) -> dict[str, Any]:
        rest = asdict(self)
        cell, total, tasks, depths = (rest.pop(name) for name in ("cell", "total", "tasks", "depths"))
        return {
            **cell,
            **total,
            **rest,
            "tasks": [{"task": name, **score} for name, score in tasks.items()],
            "depths": [{"depth": depth, **score} for depth, score in depths.items()],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """The row of a result file. KeyError, TypeError or ValueError where it is none."""
        rest = dict(value)
        cell = Cell(**{name: rest.pop(name) for name in ("suite", "method", "budget", "length")})
        total = Score(**{name: rest.pop(name) for name in ("n", "score", "ci_low", "ci_high", "measures", "recalls")})
        tasks, depths = rest.pop("tasks"), rest.pop("depths")
        return cls(
            cell=cell,
            total=total,
            tasks={task.pop("task"): Score(**task) for task in map(dict, tasks)},
            depths={depth.pop("depth"): Score(**depth) for depth in map(dict, depths)},
            **rest,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """All of one run, with where it comes from.

    Attributes:
        version, commit: of actqkv; the commit where it is known.
        started: when, ISO 8601 in UTC.
        machine, model: as `bench --json` has them; the model with its sha256.
        parameters: everything that was asked for, the seed among it.
    """

    version: str
    commit: str | None
    started: str
    machine: dict[str, Any]
    model: dict[str, Any]
    parameters: dict[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "commit": self.commit,
            "started": self.started,
            "machine": self.machine,
            "model": self.model,
            "parameters": self.parameters,
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """The result of a file. KeyError, TypeError or ValueError where it is none."""
        names = ("version", "commit", "started", "machine", "model", "parameters")
        rows = tuple(Row.from_json(row) for row in value["rows"])
        return cls(**{name: value[name] for name in names}, rows=rows)


def result_file(path: Path) -> Path:
    """The file itself, or the result in the folder that `actqkv eval --out` made."""
    return path / RESULT if path.is_dir() else path


def read(path: Path) -> Result:
    """The result in a file, or in the folder that `actqkv eval --out` made.

    Raises:
        StateError: it is cut short, no result of an evaluation, or of another version.
        OSError: it cannot be read.
    """
    return resultfile.read(
        result_file(path), kind=FORMAT, version=FORMAT_VERSION, command="actqkv eval", make=Result.from_json
    )


def interval(score: float, n: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share `score` of `n` samples.

    For scores between 0 and 1 that are no plain yes or no it is on the safe side: no values in [0, 1] with that mean
    vary more. Questions about one document are not independent; the interval takes them as if they were.

    Example:
        >>> [round(end, 3) for end in interval(0.9, 10)]
        [0.596, 0.982]
    """
    z2 = _Z_95 * _Z_95
    middle = (score + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 / (1 + z2 / n) * math.sqrt(max(score * (1 - score), 0.0) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0) if score > 0 else 0.0, min(middle + half, 1.0) if score < 1 else 1.0


def rows(cells: Sequence[Cell], records: Iterable[Record]) -> tuple[Row, ...]:
    """A row for each cell, in this order."""
    found: dict[Cell, list[Record]] = defaultdict(list)
    for record in records:
        found[record.cell].append(record)
    return tuple(_row(cell, sorted(found[cell], key=lambda record: record.sample)) for cell in cells)


def _row(cell: Cell, records: Sequence[Record]) -> Row:
    done = [record for record in records if record.findings]
    findings = [finding for record in done for finding in record.findings]
    attended = [finding for finding in findings if finding.attended_max]
    read_s = sum(record.read_s for record in done)
    decoded = [f for f in findings if f.decode_tokens_per_s]
    decode_s = sum(f.completion_tokens / f.decode_tokens_per_s for f in decoded)
    without = [record.reason for record in records if record.reason]
    reason = without[0] if without else None
    if reason and done:
        reason = f"{len(without)} of {len(records)} samples: {reason}"
    return Row(
        cell=cell,
        total=_score(findings),
        tasks=_by(findings, lambda finding: finding.task or None),
        depths=_by(findings, lambda f: None if f.depth is None else math.floor(f.depth * _N_DEPTHS + 0.5) / _N_DEPTHS),
        n_documents=len(done),
        reason=reason,
        attended_mean=_mean([finding.attended_mean for finding in attended]),
        attended_max=max((finding.attended_max for finding in attended), default=None),
        dense_max=max((finding.dense_max for finding in attended), default=0) or None,
        length_mean=_mean([float(finding.prompt_tokens) for finding in findings if finding.prompt_tokens]),
        prefill_tokens_per_s=sum(record.n_read for record in done) / read_s if read_s else None,
        decode_tokens_per_s=sum(f.completion_tokens for f in decoded) / decode_s if decode_s else None,
        kv_bytes=max((finding.kv_bytes for finding in attended), default=None),
        summary_bytes=max((finding.summary_bytes for finding in attended), default=None),
        resident_bytes=max((record.resident_bytes for record in done), default=0) or None,
        n_cut=sum(record.n_cut > 0 for record in done),
    )


def _by(findings: Sequence[Finding], key: Callable[[Finding], Any]) -> dict[Any, Score]:
    groups: dict[Any, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[key(finding)].append(finding)
    return {name: _score(groups[name]) for name in sorted(name for name in groups if name is not None)}


def _score(findings: Sequence[Finding]) -> Score:
    n = sum(finding.n for finding in findings)
    if not n:
        return Score(n=0, score=None, ci_low=None, ci_high=None)
    score = sum(finding.score * finding.n for finding in findings) / n
    low, high = interval(score, n)
    measures = _means([(finding.measures, finding.n) for finding in findings])
    if "nll" in measures:
        measures["perplexity"] = math.exp(measures["nll"])
    recalls = _means([(finding.recalls, finding.n) for finding in findings])
    return Score(n=n, score=score, ci_low=low, ci_high=high, measures=measures, recalls=recalls)


def _means(found: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Of each name, over those that have it."""
    names = dict.fromkeys(name for values, _ in found for name in values)
    return {
        name: sum(values[name] * n for values, n in found if name in values)
        / sum(n for values, n in found if name in values)
        for name in names
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
