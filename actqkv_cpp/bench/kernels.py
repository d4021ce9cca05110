"""Each kernel by itself, with the roofline that it could reach: `actqkv bench --kernels`.

Every call works on other chunks of a working set of at least four times the last-level cache, so that what is read
comes from memory, as it does in a session.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp import machine, provenance
from actqkv_cpp._native import KV_TYPES, ffi, lib  # type: ignore[attr-defined]
from actqkv_cpp.errors import MemoryPlanError, ParameterError

_CACHES = 4  # the working set, in last-level caches
_UNKNOWN_CACHE_BYTES = 32 << 20  # where the system does not tell
_SAMPLE_S, _QUICK_SAMPLE_S = 0.02, 0.002
_PATTERN_BYTES = 4 << 20  # of random content, repeated over the working set
_PEAK_SIZE, _PEAK_ROUNDS = 1024, 5  # of the matrix products that give the peak
_SCALE = 0.125
_SUMMARY_BOUNDS = lib.ACTQKV_SUMMARY_BOUNDS
_TYPES = {
    np.dtype(np.float32): "float *",
    np.dtype(np.float16): "actqkv_f16 *",
    np.dtype(np.int32): "int32_t *",
    np.dtype(np.uint8): "uint8_t *",
}
_SPAN = np.dtype(
    [
        *((name, np.uint64) for name in ("far", "near", "v")),
        *((name, np.int64) for name in ("far_stride", "near_stride", "v_stride", "first")),
        *((name, np.int32) for name in ("n_tok", "kv_type")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernels are called with: the heads of a model, and an answering step at a depth.

    Args:
        depth: tokens of the past, as chunks of `chunk` tokens.
        granted: chunks that a layer attends; `sketched` and `refined` of them are candidates before.
        window: queries of a window that reads.

    Raises:
        ParameterError: fewer chunks than candidates, or heads that do not go together.
    """

    n_head: int = 32
    n_head_kv: int = 8
    d_head: int = 64
    chunk: int = 32
    depth: int = 131072
    budget: int = 2048
    granted: int = 46
    sketched: int = 736
    refined: int = 138
    window: int = 256
    kv_type: str = "f16"

    def __post_init__(self) -> None:
        if self.n_head % self.n_head_kv or self.d_head % 16:
            raise ParameterError(
                f"kernels are measured on heads of a multiple of 16, in equal groups: {self.n_head} query heads, "
                f"{self.n_head_kv} KV heads of {self.d_head} are not",
                "measure another model",
            )
        if self.granted < 1 or self.n_chunks < self.sketched:
            raise ParameterError(
                f"a depth of {self.depth} tokens has {self.n_chunks} chunks, {self.sketched} candidates are wanted",
                "give a greater --lengths, or a smaller --budget",
            )

    @property
    def n_chunks(self) -> int:
        return self.depth // self.chunk

    @property
    def tile_bytes(self) -> int:
        """Keys, or values, of one chunk and KV head."""
        return self.chunk * int(lib.actqkv_row_bytes(KV_TYPES[self.kv_type], self.d_head))

    @property
    def chunk_bytes(self) -> int:
        return self.n_head_kv * self.tile_bytes

    @property
    def sketch_bytes(self) -> int:
        return self.n_head_kv * int(lib.actqkv_sketch_bytes(self.d_head, self.chunk))

    @property
    def summary_width(self) -> int:
        """Numbers of a summary: bounds."""
        return 2 * self.n_head_kv * self.d_head


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What one kernel takes, and what it could.

    Args:
        kernel: its name in kernels.h.
        work: what one call does.
        ms: of one call, the median of the samples.
        spread_ms: least and greatest sample.
        bytes: that one call must read, each once.
        operations: multiplications, additions and exponentials of the formula.
        read_share: of the measured read bandwidth.
        compute_share: of the measured peak of operations. The greater of both says what limits the kernel at best.
        n: samples.
        calls: of one sample.
    """

    kernel: str
    work: str
    ms: float
    spread_ms: tuple[float, float]
    bytes: int
    operations: int
    read_share: float
    compute_share: float
    n: int
    calls: int

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.ms / 1e6

    @property
    def gop_per_s(self) -> float:
        return self.operations / self.ms / 1e6

    def to_json(self) -> dict[str, Any]:
        found = asdict(self) | {"gb_per_s": self.gb_per_s, "gop_per_s": self.gop_per_s}
        return found | {"spread_ms": list(self.spread_ms)}


@dataclass(frozen=True, kw_only=True)
class KernelResult:
    """All kernels of one run. `to_json()` gives the names of `actqkv bench --kernels --json`."""

    machine: dict[str, Any]
    shape: Shape
    working_set_bytes: int
    kernels: tuple[Kernel, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "shape": asdict(self.shape),
            "working_set_bytes": self.working_set_bytes,
            "kernels": [kernel.to_json() for kernel in self.kernels],
        }


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One kernel: `make(i)` prepares the i-th call, on other data than the others', and returns it."""

    kernel: str
    work: str
    bytes: int
    operations: int
    make: Callable[[int], Callable[[], object]]


def measure(
    shape: Shape, *, n_threads: int, repeat: int, quick: bool, show: Callable[[Kernel], object] | None = None
) -> KernelResult:
    """Measure every kernel.

    Args:
        n_threads: of those kernels that take some; the others are measured on one.
        repeat: samples of each.
        quick: short samples.
        show: called with each as it is done.

    Raises:
        MemoryPlanError: the working set does not fit in memory.
    """
    cache = last_level_cache()
    working_set = _CACHES * cache
    free = machine.available_memory()
    if free is not None and 2 * working_set > free:
        raise MemoryPlanError(f"the working set needs {2 * working_set:,} bytes, {free:,} are free", "free some memory")
    bandwidth, peak = provenance.read_bandwidth(n_threads), peak_gop_per_s(n_threads)
    kernels = []
    for job in _Jobs(shape, working_set, n_threads):
        n_sets = max(2, math.ceil(working_set / max(job.bytes, 1)))
        found = _time(
            job,
            n_sets,
            bandwidth=bandwidth,
            peak=peak,
            repeat=repeat,
            sample_s=_QUICK_SAMPLE_S if quick else _SAMPLE_S,
        )
        kernels.append(found)
        if show:
            show(found)
    return KernelResult(
        machine=provenance.describe_machine(n_threads=n_threads)
        | {"read_gb_per_s": round(bandwidth, 1), "peak_gop_per_s": round(peak, 1), "last_level_cache_bytes": cache},
        shape=shape,
        working_set_bytes=working_set,
        kernels=tuple(kernels),
    )


def last_level_cache() -> int:
    """Bytes of the last-level cache of the first processor."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * factor)
    return max(sizes) or _UNKNOWN_CACHE_BYTES


def peak_gop_per_s(n_threads: int) -> float:
    """Multiplications and additions of float per nanosecond in NumPy's product of matrices, by `n_threads` cores."""
    a = np.ones((_PEAK_SIZE, _PEAK_SIZE), np.float32)
    out = np.empty_like(a)

    def seconds() -> float:
        begin = time.perf_counter()
        np.matmul(a, a, out=out)
        return time.perf_counter() - begin

    best = 2 * _PEAK_SIZE**3 / min(seconds() for _ in range(_PEAK_ROUNDS)) / 1e9
    return best * min(n_threads / machine.available_cores(), 1)


def _time(job: _Job, n_sets: int, *, bandwidth: float, peak: float, repeat: int, sample_s: float) -> Kernel:
    """Samples of as many calls as take `sample_s`, each call on the next set of data."""
    first = job.make(0)
    first()  # what is done once
    begin = time.perf_counter()
    first()
    n_calls = max(1, min(n_sets, int(sample_s / max(time.perf_counter() - begin, 1e-7))))
    samples, at = [], 1
    for _ in range(repeat):
        calls = [job.make((at + i) % n_sets) for i in range(n_calls)]
        at += n_calls
        begin = time.perf_counter()
        for call in calls:
            call()
        samples.append(1000 * (time.perf_counter() - begin) / n_calls)
    ms = median(samples)
    return Kernel(
        kernel=job.kernel,
        work=job.work,
        ms=ms,
        spread_ms=(min(samples), max(samples)),
        bytes=job.bytes,
        operations=job.operations,
        read_share=job.bytes / ms / 1e6 / bandwidth,
        compute_share=job.operations / ms / 1e6 / peak,
        n=len(samples),
        calls=n_calls,
    )


def _memory(n_bytes: int, pattern: NDArray[Any]) -> NDArray[np.uint8]:
    """Memory as the store reserves it, full of repetitions of `pattern`."""
    area = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    found = np.frombuffer(area, np.uint8)
    raw = np.ascontiguousarray(pattern).reshape(-1).view(np.uint8)
    for begin in range(0, n_bytes, raw.size):
        part = found[begin : begin + raw.size]
        part[:] = raw[: part.size]
    return found


def _at(array: NDArray[Any], offset_bytes: int = 0, kind: str | None = None) -> Any:
    return ffi.cast(kind or _TYPES[array.dtype], array.ctypes.data + offset_bytes)


def _stored_keys(shape: Shape, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rows of whole chunks, as they are kept."""
    n_rows = max(1, _PATTERN_BYTES // shape.chunk_bytes) * shape.n_head_kv * shape.chunk
    values = rng.normal(size=(n_rows, shape.d_head)).astype(np.float16)
    kv_type = KV_TYPES[shape.kv_type]
    rows = np.empty(n_rows * int(lib.actqkv_row_bytes(kv_type, shape.d_head)), np.uint8)
    lib.actqkv_store_rows(kv_type, 0, _at(values), n_rows, shape.d_head, _at(rows))
    return rows


def _halves(rng: np.random.Generator) -> NDArray[np.float16]:
    return rng.normal(size=_PATTERN_BYTES // 2).astype(np.float16)


def _chosen(rng: np.random.Generator, n: int, n_of: int) -> NDArray[np.int32]:
    return np.sort(rng.choice(n_of, n, replace=False)).astype(np.int32)


@dataclass
class _Jobs:
    """What is measured, one after another, so that only one working set exists at a time."""

    shape: Shape
    working_set: int
    n_threads: int

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.impl = lib.actqkv_impl_best()
        self.query = (2 * self.rng.normal(size=(self.shape.n_head, self.shape.d_head))).astype(np.float32)
        self.rows = _stored_keys(self.shape, self.rng)

    def __iter__(self) -> Iterator[_Job]:
        yield self.summarize()
        yield self.probe()
        yield self.score()
        yield self.spread()
        yield self.sketch()
        yield self.refine()
        yield self.vote()
        yield self.cutoff()
        yield self.attend(1)
        yield self.attend(self.shape.window)

    def summarize(self) -> _Job:
        n_bytes = self.shape.n_head_kv * self.shape.chunk * self.shape.d_head * 2
        keys = _memory(self.working_set + n_bytes, _halves(self.rng))
        rep, norm = np.empty(self.shape.summary_width, np.float16), np.empty(1, np.float32)

        def make(i: int) -> Callable[[], object]:
            at = _at(keys, i * n_bytes % self.working_set // n_bytes * n_bytes, "actqkv_f16 *")
            stride = self.shape.chunk * self.shape.d_head
            sizes = (self.shape.n_head, self.shape.n_head_kv, self.shape.d_head, self.shape.chunk)
            out = (_at(rep), _at(norm))
            return lambda: lib.actqkv_summarize(self.impl, _SUMMARY_BOUNDS, 1, at, stride, ffi.NULL, 0, *sizes, *out)

        n_compared = self.shape.n_head_kv * self.shape.chunk * self.shape.d_head * 2
        return _Job(kernel="summarize", work="a chunk, by its bounds", bytes=n_bytes, operations=n_compared, make=make)

    def probe(self) -> _Job:
        m, n_channels = self.shape.window, self.shape.n_head * self.shape.d_head
        n_bytes = m * n_channels * 4
        queries = _memory(self.working_set + n_bytes, self.rng.normal(size=_PATTERN_BYTES // 4).astype(np.float32))
        mean, var, out = (np.ones(n_channels, np.float32) for _ in range(3))
        bias, weights = np.empty(m, np.float32), np.empty(m, np.float32)

        def make(i: int) -> Callable[[], object]:
            running = ffi.new("struct actqkv_running *", {"mean": _at(mean), "var": _at(var)})
            z = _at(queries, i * n_bytes % self.working_set // n_bytes * n_bytes, "float *")

            def run() -> None:
                lib.actqkv_probe_update(self.impl, running, z, m, n_channels, 0, 100, self.n_threads)
                lib.actqkv_probe_weights(self.impl, running, z, m, n_channels, _at(bias), _at(weights), self.n_threads)
                lib.actqkv_probe_mix(self.impl, z, _at(weights), m, n_channels, _at(out), self.n_threads)

            return run

        operations = m * n_channels * 9  # 4 of the statistics, 3 of the bias, 2 of the sum
        return _Job(kernel="probe", work=f"of {m} queries", bytes=n_bytes, operations=operations, make=make)

    def score(self) -> _Job:
        width, n = self.shape.summary_width, self.shape.n_chunks
        n_bytes = n * width * 2
        summaries = _memory(self.working_set + n_bytes, _halves(self.rng))
        probe, scores = self.rng.normal(size=width).astype(np.float32), np.empty(n, np.float32)

        def make(i: int) -> Callable[[], object]:
            at = _at(summaries, i * n_bytes % self.working_set // n_bytes * n_bytes, "actqkv_f16 *")
            into = _at(scores)
            return lambda: lib.actqkv_score(
                self.impl, _at(probe), 1.0, at, ffi.NULL, n, width, 1.0, into, self.n_threads
            )

        return _Job(kernel="score", work=f"{n:,} chunks", bytes=n_bytes, operations=2 * n * width, make=make)

    def spread(self) -> _Job:
        heads = (self.shape.n_head_kv, self.shape.d_head)
        n, one = self.shape.n_chunks, int(lib.actqkv_spread_bytes(*heads))
        n_bytes = n * one
        keys = self.rng.normal(size=(64, self.shape.n_head_kv, self.shape.chunk, self.shape.d_head)).astype(np.float16)
        centre, pattern = np.zeros(heads, np.float32), np.empty((64, one), np.uint8)
        for chunk, made in zip(keys, pattern, strict=True):
            stride = self.shape.chunk * self.shape.d_head
            lib.actqkv_spread(_at(chunk), stride, _at(centre), *heads, self.shape.chunk, _at(made))
        spreads = _memory(self.working_set + n_bytes, pattern)
        folded, scores = np.empty(int(lib.actqkv_spread_query_size(*heads)), np.float32), np.empty(n, np.float32)
        lib.actqkv_spread_query(_at(self.query), self.shape.n_head, *heads, _at(folded))

        def make(i: int) -> Callable[[], object]:
            at = _at(spreads, i * n_bytes % self.working_set // n_bytes * n_bytes, "uint8_t *")
            given = (self.impl, _at(folded), at, ffi.NULL, n, *heads)
            return lambda: lib.actqkv_spread_scores(*given, _at(scores), self.n_threads)

        operations = 2 * n * self.shape.n_head_kv * self.shape.d_head
        return _Job(kernel="spread", work=f"{n:,} chunks", bytes=n_bytes, operations=operations, make=make)

    def sketch(self) -> _Job:
        n, n_of = self.shape.sketched, max(self.shape.sketched, self.working_set // self.shape.sketch_bytes)
        keys = self.rng.normal(size=(64, self.shape.n_head_kv, self.shape.chunk, self.shape.d_head)).astype(np.float16)
        pattern = np.empty((64, self.shape.sketch_bytes), np.uint8)
        for chunk, sketch in zip(keys, pattern, strict=True):
            stride = self.shape.chunk * self.shape.d_head
            lib.actqkv_sketch(
                _at(chunk), stride, self.shape.n_head_kv, self.shape.d_head, self.shape.chunk, _at(sketch)
            )
        sketches = _memory(n_of * self.shape.sketch_bytes, pattern)
        scores = np.empty(self.shape.n_head * n, np.float32)
        sizes = (self.shape.n_head, self.shape.n_head_kv, self.shape.d_head, self.shape.chunk)

        def make(_: int) -> Callable[[], object]:
            chunks = _chosen(self.rng, n, n_of)
            given = (_at(self.query), _at(sketches))
            return lambda: lib.actqkv_sketch_scores(
                self.impl, *given, _at(chunks), n, *sizes, _SCALE, _at(scores), self.n_threads
            )

        operations = (
            n * self.shape.n_head * (self.shape.chunk * self.shape.d_head // 4 + 2 * self.shape.d_head)
        )  # a look-up adds once
        n_bytes = n * self.shape.sketch_bytes
        return _Job(kernel="sketch", work=f"{n} candidates", bytes=n_bytes, operations=operations, make=make)

    def refine(self) -> _Job:
        n, n_of = self.shape.refined, max(self.shape.refined, self.working_set // self.shape.chunk_bytes)
        keys = _memory(n_of * self.shape.chunk_bytes, self.rows)
        scores = np.empty(self.shape.n_head * n, np.float32)
        sizes = (self.shape.n_head, self.shape.n_head_kv, self.shape.d_head, self.shape.chunk)

        def make(_: int) -> Callable[[], object]:
            chunks = _chosen(self.rng, n, n_of)
            given = (_at(self.query), KV_TYPES[self.shape.kv_type], _at(keys))
            return lambda: lib.actqkv_refine(
                self.impl, *given, _at(chunks), n, *sizes, _SCALE, _at(scores), self.n_threads
            )

        operations = 2 * n * self.shape.chunk * self.shape.n_head * self.shape.d_head
        n_bytes = n * self.shape.chunk_bytes
        return _Job(kernel="refine", work=f"{n} candidates", bytes=n_bytes, operations=operations, make=make)

    def vote(self) -> _Job:
        n, n_head = self.shape.sketched, self.shape.n_head
        n_bytes = n_head * n * 4
        scores = _memory(self.working_set + n_bytes, (5 * self.rng.normal(size=_PATTERN_BYTES // 4)).astype(np.float32))
        votes = np.empty(n, np.float32)

        def make(i: int) -> Callable[[], object]:
            at = _at(scores, i * n_bytes % self.working_set // n_bytes * n_bytes, "float *")
            return lambda: lib.actqkv_vote(self.impl, at, n, n_head, 1, 1, _at(votes), self.n_threads)

        operations = n_head * n * 6  # two differences, exponentials and sums of each score
        return _Job(
            kernel="vote", work=f"{n_head} heads, {n} candidates", bytes=n_bytes, operations=operations, make=make
        )

    def cutoff(self) -> _Job:
        n, k = self.shape.n_chunks, self.shape.sketched
        n_bytes = n * 4
        scores = _memory(self.working_set + n_bytes, self.rng.normal(size=_PATTERN_BYTES // 4).astype(np.float32))
        chosen, scratch = np.empty(n, np.int32), np.empty(n, np.int32)

        def make(i: int) -> Callable[[], object]:
            at = _at(scores, i * n_bytes % self.working_set // n_bytes * n_bytes, "float *")

            def run() -> None:
                lib.actqkv_entropy(self.impl, at, n, 1000.0)
                lib.actqkv_top_k(at, n, k, _at(chosen), _at(scratch))

            return run

        operations = n * 6  # of the entropy: difference, factor, exponential, product and two sums
        return _Job(kernel="cutoff", work=f"{k} of {n:,}", bytes=n_bytes, operations=operations, make=make)

    def attend(self, n_queries: int) -> _Job:
        """All of the budget as chunks from anywhere."""
        n_spans, m = self.shape.budget // self.shape.chunk, n_queries
        n_keys, n_of = n_spans * self.shape.chunk, max(n_spans, self.working_set // self.shape.chunk_bytes)
        keys, values = (_memory(n_of * self.shape.chunk_bytes, self.rows) for _ in range(2))
        q, out = (self.rng.normal(size=(m, self.shape.n_head, self.shape.d_head)).astype(np.float32) for _ in range(2))
        k_window, v_window = (
            self.rng.normal(size=(self.shape.n_head_kv, m, self.shape.d_head)).astype(np.float16) for _ in range(2)
        )
        sizes = (self.shape.n_head, self.shape.n_head_kv, self.shape.d_head, m)
        scratch = np.empty(int(lib.actqkv_attend_scratch(*sizes, n_keys + m, self.n_threads)) + 64, np.uint8)

        def make(_: int) -> Callable[[], object]:
            chunks = _chosen(self.rng, n_spans, n_of).astype(np.uint64) * self.shape.chunk_bytes
            spans = np.zeros(n_spans, _SPAN)
            spans["far"], spans["v"] = keys.ctypes.data + chunks, values.ctypes.data + chunks
            spans["far_stride"] = spans["v_stride"] = self.shape.tile_bytes
            spans["first"] = np.arange(n_spans) * self.shape.chunk
            spans["n_tok"], spans["kv_type"] = self.shape.chunk, KV_TYPES[self.shape.kv_type]
            args = ffi.new("struct actqkv_attend_args *")
            args.n_head, args.n_head_kv, args.d_head, args.m = sizes
            args.n_past, args.n_clamp, args.scale = n_keys, 1, _SCALE
            args.q_near = args.q_far = args.q_turned = _at(q)
            args.spans = ffi.cast("struct actqkv_span *", spans.ctypes.data)
            args.n_spans = n_spans
            args.k_window, args.v_window = _at(k_window), _at(v_window)
            args.window_stride = m * self.shape.d_head
            args.out, args.n_threads = _at(out), self.n_threads
            args.scratch = ffi.cast("void *", -(-scratch.ctypes.data // 64) * 64)

            def run(_held: Any = spans) -> None:
                lib.actqkv_attend(self.impl, args)

            return run

        operations = (
            4 * m * self.shape.n_head * self.shape.d_head * n_keys
            + 2 * m * (m + 1) * self.shape.n_head * self.shape.d_head
        )
        work = f"{'one query' if m == 1 else f'{m} queries'}, {n_keys:,} keys"
        n_bytes = 2 * n_spans * self.shape.chunk_bytes
        return _Job(kernel="attend", work=work, bytes=n_bytes, operations=operations, make=make)
