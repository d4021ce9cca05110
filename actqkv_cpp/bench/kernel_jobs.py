"""What `actqkv bench --kernels` calls: each kernel of an answering step, and those of a window that reads."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from actqkv_cpp._native import KV_TYPES, call, ffi, lib, row_bytes  # type: ignore[attr-defined]
from actqkv_cpp.errors import ParameterError

Call = Callable[[], object]

_PATTERN_BYTES = 4 << 20  # of random content, repeated over the working set
_PATTERN_CHUNKS = 64  # the same, where content is made chunk by chunk
_SCALE = 0.125  # of logits
_TEMPERATURE = 1000.0  # of the cut-off
_ALIGNMENT = 64  # of attend's scratch memory
_SPAN = np.dtype(
    [
        *((name, np.uint64) for name in ("far", "near", "v")),
        *((name, np.int64) for name in ("far_stride", "near_stride", "v_stride", "first")),
        *((name, np.int32) for name in ("n_tok", "kv_type")),
    ]
)
_C_ARRAYS = {
    np.dtype(np.float32): "float[]",
    np.dtype(np.float16): "actqkv_f16[]",
    np.dtype(np.int32): "int32_t[]",
    np.dtype(np.uint8): "uint8_t[]",
    _SPAN: "struct actqkv_span[]",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernels are called with: the heads of a model, and an answering step at a depth.

    Args:
        chunk: tokens of a chunk.
        depth: tokens of the past, as chunks.
        budget: tokens that a step attends, as chunks.
        granted: chunks that a layer attends; `sketched` and `refined` of them are candidates before.
        window: queries of a window that reads.

    Raises:
        ParameterError: no chunks to choose from, or heads that do not go together.
    """

    n_head: int = 32
    n_head_kv: int = 8
    d_head: int = 64
    chunk: int = 32
    depth: int = 131072
    budget: int = 2048
    granted: int = 46
    sketched: int = 736
    refined: int = 92
    window: int = 256
    kv_type: str = "f16"

    def __post_init__(self) -> None:
        if self.n_head % self.n_head_kv or self.d_head % 16:
            raise ParameterError(
                f"kernels are measured on heads of a multiple of 16, in equal groups: {self.n_head} query heads, "
                f"{self.n_head_kv} KV heads of {self.d_head} are not",
                "measure another model",
            )
        if not 1 <= self.granted < self.n_chunks:
            raise ParameterError(
                f"a depth of {self.depth} tokens has {self.n_chunks} chunks, {self.granted} are to be attended",
                "give a greater --lengths, or a smaller --budget",
            )

    @property
    def n_chunks(self) -> int:
        return self.depth // self.chunk


def candidates(method: str, share: int, n_chunks: int) -> tuple[int, int]:
    """Of how many chunks an answering step looks at the sketches, and then at the keys, where `share` are attended."""
    row, found = ffi.new("struct actqkv_method *"), ffi.new("int64_t[2]")
    call(lib.actqkv_method_find, method.encode(), row)
    call(lib.actqkv_method_candidates, row, share, n_chunks, found, found + 1)
    return found[0], found[1]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kernel to measure.

    Args:
        kernel: its name in kernels.h.
        work: what one call does.
        n_bytes: that one call must read, each once.
        n_operations: multiplications, additions and exponentials of the formula.
        make: prepares the i-th call, on other data than the others', and returns it.
    """

    kernel: str
    work: str
    n_bytes: int
    n_operations: int
    make: Callable[[int], Call]


class Jobs:
    """All of them, one after another, so that only one working set exists at a time.

    Args:
        working_set_bytes: over which the calls of one job are spread.
        n_threads: of those kernels that take some; the others run on one.
    """

    def __init__(self, shape: Shape, *, working_set_bytes: int, n_threads: int) -> None:
        self.shape, self.working_set_bytes, self.n_threads = shape, working_set_bytes, n_threads
        self.impl = lib.actqkv_impl_best()
        self.kv_type = KV_TYPES[shape.kv_type]
        self.kv_heads = (shape.n_head_kv, shape.d_head)
        self.heads = (shape.n_head, *self.kv_heads)
        self.key_stride = shape.chunk * shape.d_head  # values of a chunk and KV head
        self.tile_bytes = shape.chunk * row_bytes(shape.kv_type, shape.d_head)  # the same as kept
        self.chunk_bytes = shape.n_head_kv * self.tile_bytes  # of keys, or of values
        self.rng = np.random.default_rng(0)
        self.query = 2 * self._normal(shape.n_head, shape.d_head)
        self.rows = self._rows()

    def __iter__(self) -> Iterator[Job]:
        yield self._summarize()
        yield self._probe()
        yield self._score()
        yield self._spread()
        yield self._sketch()
        yield self._refine()
        yield self._vote()
        yield self._cutoff()
        yield self._attend(1)
        yield self._attend(self.shape.window)

    def _summarize(self) -> Job:
        bounds, n_values = lib.ACTQKV_SUMMARY_BOUNDS, self.shape.n_head_kv * self.key_stride
        keys = self._sets(2 * n_values, self._pattern(np.float16))
        summary, norm = np.empty(2 * math.prod(self.kv_heads), np.float16), np.empty(1, np.float32)
        no_sums = (ffi.NULL, 0)

        def make(i: int) -> Call:
            given = (_data(keys[i % len(keys)]), self.key_stride, *no_sums, *self.heads, self.shape.chunk)
            return partial(lib.actqkv_summarize, self.impl, bounds, 1, *given, _data(summary), _data(norm))

        work = "a chunk, by its bounds"
        return Job(kernel="summarize", work=work, n_bytes=2 * n_values, n_operations=2 * n_values, make=make)

    def _probe(self) -> Job:
        m, n_channels = self.shape.window, self.shape.n_head * self.shape.d_head
        n_bytes = 4 * m * n_channels
        queries = self._sets(n_bytes, self._pattern(np.float32))
        mean, var, probe = (_data(np.ones(n_channels, np.float32)) for _ in range(3))
        bias, weights = (_data(np.empty(m, np.float32)) for _ in range(2))

        def make(i: int) -> Call:
            running = ffi.new("struct actqkv_running *", {"mean": mean, "var": var})
            z, sizes, threads = _data(queries[i % len(queries)]), (m, n_channels), self.n_threads

            def run() -> None:
                lib.actqkv_probe_update(self.impl, running, z, *sizes, 0, 100, threads)
                lib.actqkv_probe_weights(self.impl, running, z, *sizes, bias, weights, threads)
                lib.actqkv_probe_mix(self.impl, z, weights, *sizes, probe, threads)

            return run

        n_operations = m * n_channels * 9  # 4 of the statistics, 3 of the bias, 2 of the sum
        return Job(kernel="probe", work=f"of {m} queries", n_bytes=n_bytes, n_operations=n_operations, make=make)

    def _score(self) -> Job:
        n, width = self.shape.n_chunks, 2 * math.prod(self.kv_heads)  # numbers of a summary: bounds
        n_bytes = 2 * n * width
        summaries = self._sets(n_bytes, self._pattern(np.float16))
        probe, scores, no_norms = self._normal(width), np.empty(n, np.float32), ffi.NULL

        def make(i: int) -> Call:
            of_chunks = (_data(summaries[i % len(summaries)]), no_norms, n, width)
            given = (_data(probe), 1.0, *of_chunks, 1.0)
            return partial(lib.actqkv_score, self.impl, *given, _data(scores), self.n_threads)

        return Job(kernel="score", work=f"{n:,} chunks", n_bytes=n_bytes, n_operations=2 * n * width, make=make)

    def _spread(self) -> Job:
        n, one = self.shape.n_chunks, int(lib.actqkv_spread_bytes(*self.kv_heads))
        centre = np.zeros(self.kv_heads, np.float32)

        def spread(keys: Any, out: Any) -> None:
            lib.actqkv_spread(keys, self.key_stride, _data(centre), *self.kv_heads, self.shape.chunk, out)

        spreads = self._sets(n * one, self._of_chunks(one, spread))
        folded = np.empty(int(lib.actqkv_spread_query_size(*self.kv_heads)), np.float32)
        lib.actqkv_spread_query(_data(self.query), *self.heads, _data(folded))
        scores = np.empty(n, np.float32)

        def make(i: int) -> Call:
            given = (_data(folded), _data(spreads[i % len(spreads)]), n, *self.kv_heads)
            return partial(lib.actqkv_spread_scores, self.impl, *given, _data(scores), self.n_threads)

        n_operations = 2 * n * math.prod(self.kv_heads)
        return Job(kernel="spread", work=f"{n:,} chunks", n_bytes=n * one, n_operations=n_operations, make=make)

    def _sketch(self) -> Job:
        shape, n = self.shape, self.shape.sketched
        one = shape.n_head_kv * int(lib.actqkv_sketch_bytes(shape.d_head, shape.chunk))

        def sketch(keys: Any, out: Any) -> None:
            lib.actqkv_sketch(keys, self.key_stride, *self.kv_heads, shape.chunk, out)

        n_of = max(n, self.working_set_bytes // one)
        sketches = _memory(n_of * one, self._of_chunks(one, sketch))
        scores = np.empty(shape.n_head * n, np.float32)

        def make(_: int) -> Call:
            given = (_data(self.query), _data(sketches), _data(self._chosen(n, n_of)), n, *self.heads, shape.chunk)
            return partial(lib.actqkv_sketch_scores, self.impl, *given, _SCALE, _data(scores), self.n_threads)

        look_ups = shape.chunk * shape.d_head // 4  # each adds once
        n_operations = n * shape.n_head * (look_ups + 2 * shape.d_head)
        return Job(kernel="sketch", work=f"{n} candidates", n_bytes=n * one, n_operations=n_operations, make=make)

    def _refine(self) -> Job:
        shape, n = self.shape, self.shape.refined
        n_of = max(n, self.working_set_bytes // self.chunk_bytes)
        keys = _memory(n_of * self.chunk_bytes, self.rows)
        scores = np.empty(shape.n_head * n, np.float32)

        def make(_: int) -> Call:
            given = (self.kv_type, _data(keys), _data(self._chosen(n, n_of)), n, *self.heads, shape.chunk, _SCALE)
            return partial(lib.actqkv_refine, self.impl, _data(self.query), *given, _data(scores), self.n_threads)

        n_bytes, n_operations = n * self.chunk_bytes, 2 * n * shape.n_head * self.key_stride
        return Job(kernel="refine", work=f"{n} candidates", n_bytes=n_bytes, n_operations=n_operations, make=make)

    def _vote(self) -> Job:
        n, n_head = self.shape.sketched, self.shape.n_head
        n_bytes = 4 * n_head * n
        scores = self._sets(n_bytes, 5 * self._pattern(np.float32))
        votes, one_list, by_sum = np.empty(n, np.float32), 1, 1

        def make(i: int) -> Call:
            given = (_data(scores[i % len(scores)]), n, n_head, one_list, by_sum)
            return partial(lib.actqkv_vote, self.impl, *given, _data(votes), self.n_threads)

        work = f"{n_head} heads, {n} candidates"
        n_operations = n_head * n * 6  # two differences, exponentials and sums of each score
        return Job(kernel="vote", work=work, n_bytes=n_bytes, n_operations=n_operations, make=make)

    def _cutoff(self) -> Job:
        n, k = self.shape.n_chunks, self.shape.sketched
        scores = self._sets(4 * n, self._pattern(np.float32))
        chosen, scratch = (np.empty(n, np.int32) for _ in range(2))

        def make(i: int) -> Call:
            given, out = (_data(scores[i % len(scores)]), n), (_data(chosen), _data(scratch))

            def run() -> None:
                lib.actqkv_entropy(self.impl, *given, _TEMPERATURE)
                lib.actqkv_top_k(self.impl, *given, k, *out)

            return run

        n_operations = n * 6  # of the entropy: difference, factor, exponential, product and two sums
        return Job(kernel="cutoff", work=f"{k} of {n:,}", n_bytes=4 * n, n_operations=n_operations, make=make)

    def _attend(self, m: int) -> Job:
        """A window of `m` queries; all of the budget as chunks from anywhere."""
        shape, n_spans = self.shape, self.shape.budget // self.shape.chunk
        n_keys, n_of = n_spans * shape.chunk, max(n_spans, self.working_set_bytes // self.chunk_bytes)
        keys, values = (_memory(n_of * self.chunk_bytes, self.rows) for _ in range(2))
        q, out = (_data(self._normal(m, shape.n_head, shape.d_head)) for _ in range(2))
        k_window, v_window = (_data(self._normal(shape.n_head_kv, m, shape.d_head, dtype=np.float16)) for _ in range(2))
        scratch_bytes = int(lib.actqkv_attend_scratch(*self.heads, m, n_keys + m, self.n_threads))
        scratch = np.empty(scratch_bytes + _ALIGNMENT, np.uint8)
        aligned = _data(scratch[-scratch.ctypes.data % _ALIGNMENT :])

        def make(_: int) -> Call:
            at = self._chosen(n_spans, n_of).astype(np.uint64) * self.chunk_bytes
            spans = np.zeros(n_spans, _SPAN)
            spans["far"], spans["v"] = keys.ctypes.data + at, values.ctypes.data + at
            spans["far_stride"] = spans["v_stride"] = self.tile_bytes
            spans["first"] = np.arange(n_spans) * shape.chunk
            spans["n_tok"], spans["kv_type"] = shape.chunk, self.kv_type
            at_spans, args = _data(spans), ffi.new("struct actqkv_attend_args *")
            args.n_head, args.n_head_kv, args.d_head = self.heads
            args.m, args.n_past, args.n_clamp, args.scale = m, n_keys, 1, _SCALE
            args.q_near = args.q_far = args.q_turned = q
            args.spans, args.n_spans = at_spans, n_spans
            args.k_window, args.v_window, args.window_stride = k_window, v_window, m * shape.d_head
            args.out, args.scratch, args.n_threads = out, aligned, self.n_threads

            def run(_held: Any = at_spans) -> None:  # args holds pointers only
                lib.actqkv_attend(self.impl, args)

            return run

        past, window = 4 * m * n_keys, 2 * m * (m + 1)  # a window attends half of itself, causally
        n_operations = shape.n_head * shape.d_head * (past + window)
        work = f"{'one query' if m == 1 else f'{m} queries'}, {n_keys:,} keys"
        n_bytes = 2 * n_spans * self.chunk_bytes
        return Job(kernel="attend", work=work, n_bytes=n_bytes, n_operations=n_operations, make=make)

    # -- what calls work on

    def _normal(self, *shape: int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        return self.rng.normal(size=shape).astype(dtype)

    def _pattern(self, dtype: DTypeLike) -> NDArray[Any]:
        return self._normal(_PATTERN_BYTES // np.dtype(dtype).itemsize, dtype=dtype)

    def _rows(self) -> NDArray[np.uint8]:
        """Rows of whole chunks, as they are kept."""
        n_rows = max(1, _PATTERN_BYTES // self.chunk_bytes) * self.shape.n_head_kv * self.shape.chunk
        values = self._normal(n_rows, self.shape.d_head, dtype=np.float16)
        rows = np.empty(n_rows * int(lib.actqkv_row_bytes(self.kv_type, self.shape.d_head)), np.uint8)
        lib.actqkv_store_rows(self.kv_type, 0, _data(values), n_rows, self.shape.d_head, _data(rows))
        return rows

    def _of_chunks(self, n_bytes: int, make: Callable[[Any, Any], None]) -> NDArray[np.uint8]:
        """What `make(keys, out)` writes of some random chunks, `n_bytes` of each."""
        shape = self.shape
        keys = self._normal(_PATTERN_CHUNKS, shape.n_head_kv, shape.chunk, shape.d_head, dtype=np.float16)
        made = np.empty((_PATTERN_CHUNKS, n_bytes), np.uint8)
        for chunk, out in zip(keys, made, strict=True):
            make(_data(chunk), _data(out))
        return made

    def _sets(self, n_bytes: int, pattern: NDArray[Any]) -> NDArray[Any]:
        """Data of as many calls as fill the working set, `n_bytes` of each: [call, value]."""
        n_sets = math.ceil(self.working_set_bytes / n_bytes)
        return _memory(n_sets * n_bytes, pattern).reshape(n_sets, -1)

    def _chosen(self, n: int, n_of: int) -> NDArray[np.int32]:
        """Ascending ids of n chunks out of `n_of`."""
        return np.sort(self.rng.choice(n_of, n, replace=False)).astype(np.int32)


def _memory(n_bytes: int, pattern: NDArray[Any]) -> NDArray[Any]:
    """Memory as the store reserves it, full of repetitions of `pattern`, whose type it has."""
    area = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    values = np.frombuffer(area, pattern.dtype)
    flat = pattern.reshape(-1)
    for begin in range(0, len(values), len(flat)):
        part = values[begin : begin + len(flat)]
        part[:] = flat[: len(part)]
    return values


def _data(array: NDArray[Any]) -> Any:
    """The values of a contiguous array, as a C array that keeps them alive."""
    return ffi.from_buffer(_C_ARRAYS[array.dtype], array)
