"""What is run, in which order, and how a figure is made of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import Any

import llama_cpp
import numpy as np

from actqkv_cpp import Llama, machine, provenance
from actqkv_cpp._native import Session, methods, row_bytes
from actqkv_cpp.bench.engines import Engine, LinkedPeer, OtherPeer, Ours, Peer, Progress, Tokens, head_dimension
from actqkv_cpp.bench.results import GpuTraffic, MemoryUse, Phase, Row, StageUse, Subject
from actqkv_cpp.errors import MemoryPlanError, ParameterError
from actqkv_cpp.figures import GpuStats, Stage, Stats

PREFILL_TOKENS = 512
_PHASES: tuple[Phase, ...] = ("decode", "prefill")
_PHASE_LIMIT_S = 60.0  # an engine that has spent this much in one phase at one depth takes no further samples
_SAMPLE_LIMIT_S = 300.0  # llama.cpp is extrapolated where one sample would take longer
_READING_LIMIT_S = 1800.0  # a depth that would take our engine longer to reach is extrapolated
_FREE_BYTES = 512 << 20  # left to the rest of the machine beside llama.cpp's context

# Yields a function of (done, total), for what is going on.
ShowProgress = Callable[[str, str], AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to measure.

    Args:
        lengths: depths in tokens, whole windows.
        methods: of ours, one after another; the first alternates with llama.cpp.
        decode_tokens: of one sample; a whole chunk's worth includes the closing of one.
        repeat: samples of each engine, phase and depth, at most.
        read: tokens that our session really reads; deeper contexts are made of copies. None: all.
        peer_read: the same of llama.cpp.
        kv_type: of our keys and values.
        peer_kv_types: of llama.cpp's, each measured by itself.
        peer_python: an interpreter whose llama_cpp is measured beside the one that we link.
        peer_kv_in_ram: llama.cpp keeps keys and values off the GPU that weights are on.

    Raises:
        ParameterError: there are no lengths, or llama.cpp may read nothing.
    """

    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    decode_tokens: int
    repeat: int
    read: int | None
    peer_read: int
    kv_type: str
    peer_kv_types: tuple[str, ...]
    peer_python: str | None = None
    peer_kv_in_ram: bool = False

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ParameterError("no length to measure at", "name some, for example 512,8k")
        if self.peer_read < 1:
            raise ParameterError("llama.cpp must read something to copy from", "give --peer-read 8k")
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))

    @property
    def n_ctx(self) -> int:
        """Tokens that a session needs which reaches the greatest length."""
        return self.n_ctx_at(self.lengths[-1])

    def n_ctx_at(self, depth: int) -> int:
        """Tokens that a session needs for samples after `depth` tokens."""
        return depth + max(PREFILL_TOKENS, self.decode_tokens + 1)


@dataclass
class _Samples:
    """Seconds of each sample, and what our stages took meanwhile."""

    n_tokens: int
    seconds: list[float] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    gpu: list[GpuStats] = field(default_factory=list)

    def add(self, seconds: float, stats: Stats | None) -> None:
        self.seconds.append(seconds)
        self.gpu += [stats.gpu] if stats is not None else []
        for name, stage in _stages(stats).items():
            before = self.stages.get(name, Stage(0.0, 0))
            self.stages[name] = Stage(before.ms + stage.ms, before.bytes + stage.bytes)

    @property
    def ms_per_token(self) -> list[float]:
        return [1000.0 * seconds / self.n_tokens for seconds in self.seconds]

    def row(self, engine: Engine, phase: Phase, memory: MemoryUse | None, least: _Samples | None) -> Row:
        """`least`: of our engine, at the least depth."""
        each = self.ms_per_token
        n = self.n_tokens * len(each)
        return Row(
            **engine.subject._asdict(),
            phase=phase,
            depth=engine.depth,
            ms_per_token=median(each),
            measured=True,
            n=len(each),
            spread_ms=(min(each), max(each)),
            context="copied" if engine.copied else "read",
            stages={
                name: StageUse(ms_per_token=stage.ms / n, bytes_per_token=stage.bytes / n)
                for name, stage in self.stages.items()
            }
            or None,
            least_ms_per_token=median(least.ms_per_token) if least else None,
            memory=memory,
            gpu=GpuTraffic.of(self.gpu, n),
        )


class Benchmark:
    """One run over one loaded model.

    Args:
        llm: gives the model and the number of threads; its own session is closed.
        show: shows progress.
        note: takes a sentence about what was not measured, and why.

    Raises:
        ParameterError: a length is not whole windows, or the other interpreter's llama_cpp does not run the model.

    Example:
        >>> rows = list(Benchmark(llm, spec, show=output.progress, note=output.note).rows())
    """

    def __init__(self, llm: Llama, spec: Spec, *, show: ShowProgress, note: Callable[[str], None]) -> None:
        assert llm.session is not None, "the caller refuses models that run on llama.cpp only"
        window = llm.session.params.n_window
        for length in spec.lengths:
            _require_windows("a length", length, window)
        if spec.read is not None:
            _require_windows("--read", spec.read, window)
        llm.session.close()
        self._model = llm._model
        self._d_head = head_dimension(llm)
        self._retrieval, self._placement = llm.retrieval, llm._placement
        self._n_threads = llm.n_threads
        self._weights_bytes = int(llama_cpp.llama_model_size(llm._model.model))
        self._spec = spec
        self._show, self._note = show, note
        rng = np.random.default_rng(0)
        self._tokens: Tokens = rng.integers(0, llm.n_vocab(), spec.n_ctx, dtype=np.int32)
        self._peers: list[Peer] = []
        for kv_type in spec.peer_kv_types:
            sizes: Any = {"n_batch": PREFILL_TOKENS, "n_threads": llm.n_threads, "kv_type": kv_type}
            self._peers.append(LinkedPeer(llm._model, kv_in_ram=spec.peer_kv_in_ram, **sizes))
            if spec.peer_python is not None:
                self._peers.append(OtherPeer(spec.peer_python, llm.model_path, **sizes))

    @property
    def other_version(self) -> str | None:
        """Of the llama_cpp of the other interpreter."""
        return next((peer.version for peer in self._peers if isinstance(peer, OtherPeer)), None)

    def rows(self) -> Iterator[Row]:
        """Rows as they are measured, then those that are extrapolated."""
        try:
            for i, method in enumerate(self._spec.methods):
                with self._session(method) as session, self._least(method) as least:
                    yield from self._method(Ours(session, read=self._spec.read), least, self._peers if i == 0 else [])
        finally:
            for peer in self._peers:
                peer.quit()

    @contextmanager
    def _least(self, method: str) -> Iterator[Ours | None]:
        """An engine of ours at the least length, to stay there, where there are longer ones to compare with it."""
        depth = self._spec.lengths[0]
        if len(self._spec.lengths) == 1:
            yield None
            return
        with self._session(method, n_ctx=self._spec.n_ctx_at(depth)) as session:
            engine = Ours(session)
            with self._show(f"{method} for comparison, reading", "tokens") as progress:
                engine.reach(self._tokens[:depth], progress)
            yield engine

    def _session(self, method: str, *, n_ctx: int | None = None) -> Session:
        """`n_ctx` None: for all lengths."""
        spec, retrieval = self._spec, replace(self._retrieval, method=method)
        if methods()[method]["positions"] == "exact" and spec.n_ctx > self._model.n_ctx_train():
            retrieval = replace(retrieval, positions="clamped")
            if n_ctx is None:
                self._note(
                    f"{method} is measured at clamped positions: its exact ones end at {self._model.n_ctx_train():,}."
                )
        n_ctx = spec.n_ctx if n_ctx is None else n_ctx
        session = Session(self._model, retrieval, n_ctx=n_ctx, n_threads=self._n_threads, kv_type=spec.kv_type)
        try:
            self._placement.enter(session)
        except BaseException:
            session.close()
            raise
        return session

    def _method(self, ours: Ours, least: Ours | None, peers: Sequence[Peer]) -> Iterator[Row]:
        """One method of ours at each depth, alternating with the peers and with itself at the least depth."""
        subjects = [ours.subject, *(peer.subject for peer in peers)]
        measured: dict[Subject, list[Row]] = {subject: [] for subject in subjects}
        missing: dict[Subject, list[int]] = {subject: [] for subject in subjects}
        for depth in self._spec.lengths:
            engines: list[Engine] = []
            if self._reading_takes(measured[ours.subject], ours.depth, ours.to_read(depth)) > _READING_LIMIT_S:
                missing[ours.subject].append(depth)
            else:
                with self._show(f"{ours.subject.method}, reading", "tokens") as progress:
                    ours.reach(self._tokens[:depth], progress)
                engines.append(ours)
            memory = self._memory(ours.session) if engines else None
            try:
                for peer in peers:
                    if self._in_time(measured[peer.subject], depth) and self._filled(peer, ours.session, depth):
                        engines.append(peer)
                    else:
                        missing[peer.subject].append(depth)
                for row in self._measure(engines, least if least and depth > least.depth else None, depth, memory):
                    measured[row.subject].append(row)
                    yield row
            finally:
                for peer in peers:
                    peer.close()
        for subject, depths in missing.items():
            yield from self._extrapolate(measured[subject], depths, subject)

    def _measure(
        self, engines: Sequence[Engine], least: Ours | None, depth: int, memory: MemoryUse | None
    ) -> Iterator[Row]:
        """Rows of all engines at one depth, sample by sample in turn, with `least`, which is at another."""
        spec = self._spec
        for phase in _PHASES:
            all_engines = [*engines, *([least] if least else [])]
            samples = [_Samples(self._sample_tokens(phase)) for _ in all_engines]
            with self._show(f"{phase} after {depth:,}", "samples") as progress:
                for i in range(spec.repeat):
                    for engine, own in zip(all_engines, samples, strict=True):
                        if sum(own.seconds) < _PHASE_LIMIT_S:
                            own.add(*self._sample(engine, phase))
                    progress(i + 1, spec.repeat)
            for engine, own in zip(engines, samples, strict=False):
                is_ours = isinstance(engine, Ours)
                yield own.row(engine, phase, memory if is_ours else None, samples[-1] if is_ours and least else None)

    def _sample_tokens(self, phase: Phase) -> int:
        return self._spec.decode_tokens if phase == "decode" else PREFILL_TOKENS

    def _sample(self, engine: Engine, phase: Phase) -> tuple[float, Stats | None]:
        """Seconds of one sample, and our stages' share; the engine is back at its depth afterwards."""
        tokens = self._tokens[engine.depth :]
        n_tokens = self._sample_tokens(phase)
        seconds = engine.decode(tokens[: n_tokens + 1]) if phase == "decode" else engine.prefill(tokens[:n_tokens])
        stats = engine.session.stats() if isinstance(engine, Ours) else None
        engine.rewind()
        return seconds, stats

    def _memory(self, session: Session) -> MemoryUse | None:
        """Of the process now, less what is kept for llama.cpp; no context of llama.cpp exists at this point."""
        resident = provenance.resident_bytes()
        if resident is None:
            return None
        plan, params = session.plan, session.params
        n_chunks = max(params.n_ctx // params.n_chunk_tokens, 1)
        return MemoryUse(
            resident_bytes=resident - sum(peer.blob_bytes for peer in self._peers),
            weights_bytes=self._weights_bytes,
            kv_bytes=plan.kv_bytes * session.n_past // params.n_ctx,
            summary_bytes=plan.summary_bytes * min(session.n_chunks, n_chunks) // n_chunks,
        )

    # -- llama.cpp

    def _filled(self, peer: Peer, session: Session, depth: int) -> bool:
        """Whether the peer now holds `depth` tokens; not, with a note, where they do not fit in memory."""
        n_read = min(depth, self._spec.peer_read)
        engine, _, kv_type = peer.subject
        if n_read < depth and kv_type != "f16" and self._d_head % 64 != 0:
            # build_rope_shift of libllama 0.3.36 dereferences a rotation that it makes for multiples of 64 only
            self._note(
                f"{engine} cannot copy {kv_type} keys of heads of {self._d_head}: --peer-read {depth:,} reads this far"
            )
            return False
        n_ctx = depth + n_read + PREFILL_TOKENS  # the last copy may reach beyond the depth before it is cut
        n_bytes = session.plan.kv_bytes * n_ctx // session.params.n_ctx  # as ours
        n_bytes = n_bytes * row_bytes(kv_type, self._d_head) // row_bytes(self._spec.kv_type, self._d_head)
        free = machine.available_memory()
        if free is not None and n_bytes + _FREE_BYTES > free:
            needs = f"its context needs {n_bytes:,} bytes, {free:,} are free"
            self._note(f"{peer.subject.label} is not measured at {depth:,}: {needs}")
            return False
        try:
            peer.open(n_ctx)
        except MemoryPlanError as error:
            self._note(str(error))
            return False
        keep = n_read < self._spec.lengths[-1]
        with self._show(f"{peer.subject.label}, reading", "tokens") as progress:
            peer.fill(self._tokens[: depth + 1], n_read=n_read, keep=keep, progress=progress)
        return True

    def _in_time(self, measured: Sequence[Row], depth: int) -> bool:
        """Whether samples at `depth` take a bearable time, by what earlier depths have taken; not, with a note."""
        for phase in _PHASES:
            known = [row for row in measured if row.phase == phase]
            if len(known) > 1 and (takes := line(known, depth) * self._sample_tokens(phase) / 1000) > _SAMPLE_LIMIT_S:
                self._note(
                    f"{known[0].subject.label} is not measured at {depth:,}: a sample of {phase} would take "
                    f"{takes:,.0f} s"
                )
                return False
        return True

    # -- what was not measured

    def _reading_takes(self, measured: Sequence[Row], depth: int, target: int) -> float:
        """Seconds it takes to read on from `depth` to `target`, by the prefill rates measured so far."""
        prefill = [row for row in measured if row.phase == "prefill"]
        if not prefill or target <= depth:
            return 0.0
        rates = [line(prefill, at) if len(prefill) > 1 else prefill[0].ms_per_token for at in (depth, target)]
        return (target - depth) * sum(rates) / 2 / 1000

    def _extrapolate(self, measured: Sequence[Row], depths: Sequence[int], subject: Subject) -> Iterator[Row]:
        for depth in depths:
            for phase in _PHASES:
                known = [row for row in measured if row.phase == phase]
                if len(known) < 2:
                    self._note(
                        f"{subject.label}: no {phase} figure at {depth:,}: two measured depths are needed for a line"
                    )
                    continue
                ms = line(known, depth)
                yield Row(
                    **subject._asdict(),
                    phase=phase,
                    depth=depth,
                    ms_per_token=ms,
                    measured=False,
                    n=0,
                    spread_ms=(ms, ms),
                    context="none",
                )


def _require_windows(what: str, n_tokens: int, window: int) -> None:
    if n_tokens < 1 or n_tokens % window:
        raise ParameterError(
            f"{what} of {n_tokens} tokens is not whole windows of {window}", f"use multiples of {window}"
        )


def line(measured: Sequence[Row], depth: int) -> float:
    """ms per token at `depth`, on the straight line through the last two of `measured`, never below the last."""
    a, b = measured[-2:]
    slope = (b.ms_per_token - a.ms_per_token) / (b.depth - a.depth)
    return b.ms_per_token + max(slope, 0.0) * (depth - b.depth)


def _stages(stats: Stats | None) -> dict[str, Stage]:
    """The stages by name, and `other`: what the windows took beside them."""
    if stats is None:
        return {}
    stages = {f.name: value for f in fields(stats) if isinstance(value := getattr(stats, f.name), Stage)}
    rest = stats.prefill_ms + stats.decode_ms - sum(stage.ms for stage in stages.values())
    return stages | {"other": Stage(max(rest, 0.0), 0)}
