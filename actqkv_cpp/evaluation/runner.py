"""Runs suites under methods: the one loop of an evaluation.

    for each suite and length:  for each sample:  for each method:  read, ask, keep a record

A sample is made once for all methods. Its document is read once for all of its questions, and once for all methods
whose readings are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actqkv_cpp import provenance
from actqkv_cpp.config import LLAMA_CPP
from actqkv_cpp.errors import ParameterError
from actqkv_cpp.evaluation.engines import Engines, EngineSettings, Method
from actqkv_cpp.evaluation.journal import Journal
from actqkv_cpp.evaluation.recalls import Recalls
from actqkv_cpp.evaluation.results import Cell, Record, Result, rows
from actqkv_cpp.evaluation.samples import Finding, Room, Sample, Suite
from actqkv_cpp.evaluation.suites.long_answer import SUITE as LONG_ANSWER
from actqkv_cpp.evaluation.suites.perplexity import SUITE as PERPLEXITY
from actqkv_cpp.files import file_hash

if TYPE_CHECKING:
    from actqkv_cpp import Llama
    from actqkv_cpp.document import Document, Progress

# Told (tokens done, tokens in all, what goes on); returning False stops the run at the end of a window.
Watch = Callable[[int, int, str], object]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run.

    Attributes:
        suites: of `SUITES` or from files.
        lengths: tokens, at least 1; suites from files have lengths of their own.
        methods: in the order of the results.
        n_samples: samples of each suite and length; None: each suite's own number.
        longest: tokens to which longer documents of files are cut in the middle; None: they are not cut.
        text: for perplexity.
        recalls: what is recorded while answering.
        files: names and SHA-256 of the files that samples come from.

    Raises:
        ParameterError: a length of no tokens.
    """

    suites: tuple[Suite, ...]
    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    seed: int
    n_samples: int | None = None
    longest: int | None = None
    text: str | None = None
    recalls: Recalls = "none"
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.lengths, default=1) < 1:
            raise ParameterError("a length of 0 tokens has no room for anything", "use lengths of 1k or more")
        object.__setattr__(self, "lengths", tuple(dict.fromkeys(self.lengths)))

    def lengths_of(self, suite: Suite) -> tuple[int | None, ...]:
        return (None,) if suite.from_file else self.lengths

    def n_samples_of(self, suite: Suite) -> int:
        if suite.from_file:
            return min(suite.n_samples, self.n_samples or suite.n_samples)
        return self.n_samples or suite.n_samples

    def cells(self) -> list[Cell]:
        """All cells, in the order of the results."""
        return [
            cell(suite, length, method)
            for suite in self.suites
            for length in self.lengths_of(suite)
            for method in self.methods
        ]


def cell(suite: Suite, length: int | None, method: Method) -> Cell:
    return Cell(suite=suite.name, method=method.name, budget=method.budget, length=length)


@dataclass(frozen=True)
class _Task:
    """One sample of a suite at a length."""

    suite: Suite
    length: int | None
    index: int
    sample: Sample

    @property
    def n_tokens(self) -> int:
        """What it counts for in telling the time left."""
        return self.length or self.suite.n_tokens

    def cell(self, method: Method) -> Cell:
        return cell(self.suite, self.length, method)


@dataclass
class Runner:
    """One run. `records` goes on where the journal stops; what is in it is not run again.

    Raises:
        ParameterError: nothing at all can run; a suite has no room in a length, or the texts for it are too short.
        Cancelled, KeyboardInterrupt: the run was stopped; the journal has what was done.
    """

    plan: Plan
    engines: Engines
    journal: Journal
    watch: Watch
    _done: int = 0
    _total: int = 0
    _missing: list[Record] = field(default_factory=list)

    def run(self) -> list[Record]:
        """All records: of the journal, and of cells that can give no figure."""
        rooms = [(suite, length) for suite in self.plan.suites for length in self.plan.lengths_of(suite)]
        self._check(rooms)
        self._total = sum(self._n_tokens(suite, length) for suite, length in rooms)
        for suite, length in rooms:
            self._suite(suite, length)
        return [*self.journal.records.values(), *self._missing]

    def _check(self, rooms: Sequence[tuple[Suite, int | None]]) -> None:
        """Refuse at once what could only fail later: a run of which nothing fits, a suite without room."""
        reasons = [self._why_not(suite, length, m) for suite, length in rooms for m in self._left(suite, length)]
        if reasons and all(reasons):
            raise ParameterError(f"nothing can run: {reasons[0]}", "use smaller --lengths, or other --methods")
        for suite, length in rooms:
            if length is not None:
                suite.make(self._room(suite, length), 0)

    def _n_tokens(self, suite: Suite, length: int | None) -> int:
        """Tokens that are left to be read, about."""
        n_left = sum(
            not self.journal.has(cell(suite, length, method), index) and not self._why_not(suite, length, method)
            for method in self.plan.methods
            for index in range(self.plan.n_samples_of(suite))
        )
        return n_left * (length or suite.n_tokens)

    def _left(self, suite: Suite, length: int | None) -> list[Method]:
        """Methods of which the journal lacks a sample: whether the others can run now does not matter."""
        return [
            method
            for method in self.plan.methods
            if not all(
                self.journal.has(cell(suite, length, method), index) for index in range(self.plan.n_samples_of(suite))
            )
        ]

    def _why_not(self, suite: Suite, length: int | None, method: Method) -> str | None:
        if suite is PERPLEXITY and (method.name == LLAMA_CPP or method.question_aware):
            return "perplexity is measured over our own sessions, and asks nothing"
        if suite is LONG_ANSWER and method.question_aware:
            return "the questions of long-answer come after a text that is generated, not before the document"
        return self.engines.why_not(method, length) if length is not None else None

    def _room(self, suite: Suite, length: int | None) -> Room:
        return Room(
            suite=suite.name,
            n_ctx=length or self.plan.longest or 0,
            n_samples=self.plan.n_samples_of(suite),
            seed=self.plan.seed,
            count=self.engines.count,
            cut=self.engines.cut,
            n_template=self.engines.n_template_tokens(),
            n_askings=2 if any(method.question_aware for method in self.plan.methods) else 1,
            text=self.plan.text,
            recalls=self.plan.recalls,
        )

    def _suite(self, suite: Suite, length: int | None) -> None:
        able: list[Method] = []
        for method in self._left(suite, length):
            reason = self._why_not(suite, length, method)
            if reason is None:
                able.append(method)
            else:
                self._missing.append(Record(cell=cell(suite, length, method), sample=0, reason=reason))
        room = self._room(suite, length)
        for index in range(self.plan.n_samples_of(suite)):
            left = [method for method in able if not self.journal.has(cell(suite, length, method), index)]
            if left:
                sample = suite.make(room, index)
                while left:
                    left = self._read(_Task(suite, length, index, sample), left)

    def _read(self, task: _Task, methods: Sequence[Method]) -> list[Method]:
        """Read a sample under the first of `methods`, answer under it and under those that read alike; the others."""
        method, *others = methods
        reason = self._why_not(task.suite, task.sample.n_ctx, method)
        if reason is not None:  # of a suite from a file, whose samples have lengths of their own
            self._missing.append(Record(cell=task.cell(method), sample=task.index, reason=reason))
            return others
        llm = self.engines.use(method, task.sample.n_ctx)
        if method.question_aware:
            self._record(task, method, *self._question_aware(task, llm, method))
            return others
        progress = self._progress(task, method)
        document = task.suite.read(llm, task.sample, progress)
        findings = list(task.suite.answer(llm, document, task.sample, progress))
        n_read, read_s = (document.tokens_read, document.read_s) if document else (0, 0.0)
        self._record(task, method, findings, n_read, read_s)
        return [other for other in others if not self._answer_too(task, llm, document, method, other)]

    def _answer_too(self, task: _Task, llm: Llama, document: Document | None, reader: Method, method: Method) -> bool:
        """Answer by `method` over what `reader` read; False where its own reading would have been another one."""
        if document is None or not task.suite.shares_reading or not self.engines.reads_alike(reader, method):
            return False
        try:
            with llm.answering(self.engines.retrieval(method)):
                progress = self._progress(task, method)
                self._record(task, method, list(task.suite.answer(llm, document, task.sample, progress)), 0, 0.0)
        except ParameterError:
            return False
        return True

    def _question_aware(self, task: _Task, llm: Llama, method: Method) -> tuple[list[Finding], int, float]:
        """A reading for each question, which stands before the document: findings, tokens and seconds of reading."""
        findings: list[Finding] = []
        n_read, read_s = 0, 0.0
        for question in task.sample.questions:
            document = task.suite.read(llm, task.sample, self._progress(task, method), question=question.text)
            assert document is not None
            findings.append(task.suite.ask(document, question, task.sample))
            n_read, read_s = n_read + document.tokens_read, read_s + document.read_s
        return findings, n_read, read_s

    def _progress(self, task: _Task, method: Method) -> Progress:
        where = task.cell(method)
        label = f"{where.suite} {task.sample.n_ctx:,} {where.method}, sample {task.index + 1}"

        def progress(done: int, total: int) -> object:
            share = min(done / total, 1.0) if total else 0.0
            return self.watch(self._done + int(share * task.n_tokens), self._total, label)

        return progress

    def _record(self, task: _Task, method: Method, findings: Sequence[Finding], n_read: int, read_s: float) -> None:
        self._done += task.n_tokens
        self.journal.add(
            Record(
                cell=task.cell(method),
                sample=task.index,
                findings=tuple(findings),
                n_read=n_read,
                read_s=read_s,
                n_cut=task.sample.n_cut,
                resident_bytes=provenance.resident_bytes() or 0,
            )
        )


def evaluate(plan: Plan, settings: EngineSettings, *, folder: Path | None, watch: Watch) -> Result:
    """Run a plan; go on from `folder`'s journal where there is one, and write the result there.

    Raises:
        as `Engines`, `Journal` and `Runner`.

    Example:
        >>> plan = Plan(suites=(SUITES["kv"],), lengths=(4096,), methods=tuple(methods(["dense"], [2048])), seed=0)
        >>> evaluate(plan, settings, folder=Path("kv"), watch=print).rows[0].total.score
    """
    with Engines(settings) as engines:
        run = provenance.describe_run()
        header: dict[str, Any] = {
            "version": run["version"],
            "commit": run["commit"],
            "model": file_hash(settings.model),
            "parameters": _parameters(plan, settings),
        }
        facts = {
            "started": run["started"],
            "machine": provenance.describe_machine(n_threads=engines.n_threads),
        }
        with Journal(folder, header, facts) as journal:
            records = Runner(plan, engines, journal, watch).run()
            result = Result(
                version=run["version"],
                commit=run["commit"],
                model=provenance.describe_model(engines.any()) | {"sha256": header["model"]},
                parameters=header["parameters"],
                rows=rows(plan.cells(), records),
                **journal.facts,
            )
            journal.finish(result.to_json())
    return result


def _parameters(plan: Plan, settings: EngineSettings) -> dict[str, Any]:
    """Everything that the results depend on, beside model and version."""
    return {
        "suites": [suite.name for suite in plan.suites],
        "lengths": list(plan.lengths),
        "methods": list(dict.fromkeys(method.name for method in plan.methods)),
        "budgets": list(dict.fromkeys(method.budget for method in plan.methods if method.budget is not None)),
        "samples": {suite.name: plan.n_samples_of(suite) for suite in plan.suites},
        "seed": plan.seed,
        "truncate": plan.longest,
        "recalls": plan.recalls,
        "files": dict(plan.files),
        "n_sink": settings.n_sink,
        "n_local": settings.n_local,
        "chunk": settings.chunk,
        "kv_type": settings.kv_type,
    }
