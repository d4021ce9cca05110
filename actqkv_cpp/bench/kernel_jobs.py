"""What `actqkv bench --kernels` calls: each kernel of an answering step, and those of a window that reads."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from actqkv_cpp._native import KV_TYPES, call, ffi, lib, row_bytes  # type: ignore[attr-defined]
from actqkv_cpp.errors import ParameterError

Call = Callable[[], object]

_PATTERN_BYTES = 4 << 20  # of random content, repeated over the working set
_PATTERN_CHUNKS = 64  # the same, where content is made chunk by chunk
_SCALE = 0.125  # of logits
_ALIGNMENT = 64  # of scratch memory
_REFINED = 2  # chunks that a method that refines looks at the keys of, per chunk that it attends
_STRETCH_TOKENS = (65536, 16384, 4096, 1024)  # as native/kv/stretches.cpp divides chunks; what is left over is in order
_CELL_KEYS = 64  # that a cell has, on average
_CENTRES = 16  # that lie together in a stretch
_LEAST_BLOCK, _WIDER, _ROUNDS, _NEIGHBOURS = 1024, 4, 3, 128  # as native/kernels/cpu/kmeans.cpp has them
_TURNED_MOST = 256  # channels that are turned together
_DISTINCT = 5  # stretches of a length that an index is made of: rarely a divisor of the number of KV heads
_DRAWS = 8  # of cells, whose bytes are counted
_SPAN = np.dtype(
    [
        *((name, np.uint64) for name in ("far", "near", "v")),
        *((name, np.int64) for name in ("far_stride", "near_stride", "v_stride", "first")),
        *((name, np.int32) for name in ("n_tok", "kv_type")),
    ]
)
_STRETCH = np.dtype(
    [
        ("data", np.uint64),
        *((name, np.int64) for name in ("head_stride", "first_chunk", "n_keys")),
        *((name, np.int32) for name in ("in_order", "unused")),
    ]
)
_C_ARRAYS = {
    np.dtype(np.float32): "float[]",
    np.dtype(np.float16): "actqkv_f16[]",
    np.dtype(np.int32): "int32_t[]",
    np.dtype(np.uint8): "uint8_t[]",
    _SPAN: "struct actqkv_span[]",
    _STRETCH: "struct actqkv_stretch[]",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernels are called with: the heads of a model, and an answering step at a depth.

    Args:
        chunk: tokens of a chunk.
        depth: tokens of the past, as chunks.
        budget: tokens that a step attends, as chunks.
        granted: chunks that a layer attends.
        picked: cells of the index that each query head looks into.
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
    picked: int = 48
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
    """Into how many cells each query head of an answering step looks, and at the keys of how many chunks, where
    `share` are attended."""
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
        n_operations: multiplications, additions and exponentials of the formula; where it has none, comparisons.
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
        n_chunks = max(1, _PATTERN_BYTES // self.chunk_bytes)
        self.rows = self._rows(n_chunks * shape.n_head_kv * shape.chunk)

    def __iter__(self) -> Iterator[Job]:
        yield self._summarize()
        yield self._probe()
        yield self._score()
        yield self._spread()
        yield self._cells()
        yield from self._search()
        yield self._cutoff()
        yield self._refine()
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

    def _cells(self) -> Job:
        """A stretch of the longest kind, of each KV head in turn; on one thread."""
        shape, n_chunks = self.shape, _STRETCH_TOKENS[0] // self.shape.chunk
        n_keys, n_bytes = n_chunks * shape.chunk, n_chunks * self.tile_bytes
        keys = self._sets(shape.n_head_kv * n_bytes, self._rows(shape.n_head_kv * n_keys))

        def make(i: int) -> Call:
            of_head = keys[i // shape.n_head_kv % len(keys)][i % shape.n_head_kv * self.tile_bytes :]
            return self._make_stretch(of_head, self.chunk_bytes, n_chunks)[1]

        work = f"a stretch of {n_keys:,} keys"
        n_operations = _operations_of_cells(n_keys, shape.d_head, is_turned=shape.kv_type != "f16")
        return Job(kernel="cells", work=work, n_bytes=n_bytes, n_operations=n_operations, make=make)

    def _search(self) -> Iterator[Job]:
        index = _Index(self)
        yield self._search_score(index)
        yield self._search_vote(index)

    def _search_score(self, index: _Index) -> Job:
        sets = self._sets(len(index.fronts), index.fronts)

        def make(i: int) -> Call:
            return index.call(lib.actqkv_search_score, fronts=sets[i % len(sets)])

        n_cells = sum(index.n_cells)
        n_bytes = n_cells * (8 + self.shape.d_head // 2)  # a step, a reach and a centre
        n_operations = n_cells * self.shape.n_head // self.shape.n_head_kv * 2 * (self.shape.d_head + 1)
        work = f"score {max(index.n_cells):,} cells"
        return Job(kernel="search", work=work, n_bytes=n_bytes, n_operations=n_operations, make=make)

    def _search_vote(self, index: _Index) -> Job:
        """Cells from anywhere: those that are like one query are little of an index, and would stay in the cache."""
        shape = self.shape
        sets = self._sets(len(index.data), index.data)

        def make(i: int) -> Callable[[], Any]:
            return index.call(
                lib.actqkv_search_vote, data=sets[i % len(sets)], scores=self._normal(*index.scores.shape)
            )

        index.call(lib.actqkv_search_score)()  # leaves the queries in scratch memory
        n_of_group = shape.n_head // shape.n_head_kv
        n_keys = index.n_looked_at * shape.n_head
        # Each head's keys: few cells are read by two. Of a key the signs, the logit, the softmax and the vote.
        n_bytes = int(np.mean([make(i)() for i in range(_DRAWS)])) + 4 * n_of_group * sum(index.n_cells)
        n_operations = int(n_keys * (shape.d_head // 4 + 3 + 4)) + n_of_group * sum(index.n_divided)
        work = f"vote by {index.n_looked_at:,.0f} keys a head"
        return Job(kernel="search", work=work, n_bytes=n_bytes, n_operations=n_operations, make=make)

    def _refine(self) -> Job:
        shape, n = self.shape, min(_REFINED * self.shape.granted, self.shape.n_chunks)
        n_of = max(n, self.working_set_bytes // self.chunk_bytes)
        keys = _memory(n_of * self.chunk_bytes, self.rows)
        scores = np.empty(shape.n_head * n, np.float32)

        def make(_: int) -> Call:
            given = (self.kv_type, _data(keys), _data(self._chosen(n, n_of)), n, *self.heads, shape.chunk, _SCALE)
            return partial(lib.actqkv_refine, self.impl, _data(self.query), *given, _data(scores), self.n_threads)

        n_bytes, n_operations = n * self.chunk_bytes, 2 * n * shape.n_head * self.key_stride
        work = f"{n} chunks, refine={_REFINED}"
        return Job(kernel="refine", work=work, n_bytes=n_bytes, n_operations=n_operations, make=make)

    def _cutoff(self) -> Job:
        n, k = self.shape.n_chunks, self.shape.granted
        votes = self._sets(4 * n, self._pattern(np.float32))
        chosen, scratch = (np.empty(n, np.int32) for _ in range(2))

        def make(i: int) -> Call:
            given = (_data(votes[i % len(votes)]), n, k, _data(chosen), _data(scratch))
            return partial(lib.actqkv_top_k, self.impl, *given)

        return Job(kernel="cutoff", work=f"{k} of {n:,}", n_bytes=4 * n, n_operations=n, make=make)

    def _attend(self, m: int) -> Job:
        """A window of `m` queries; all of the budget as chunks from anywhere."""
        shape, n_spans = self.shape, self.shape.budget // self.shape.chunk
        n_keys, n_of = n_spans * shape.chunk, max(n_spans, self.working_set_bytes // self.chunk_bytes)
        keys, values = (_memory(n_of * self.chunk_bytes, self.rows) for _ in range(2))
        q, out = (_data(self._normal(m, shape.n_head, shape.d_head)) for _ in range(2))
        k_window, v_window = (_data(self._normal(shape.n_head_kv, m, shape.d_head, dtype=np.float16)) for _ in range(2))
        scratch = _scratch(int(lib.actqkv_attend_scratch(*self.heads, m, n_keys + m, self.n_threads)))

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
            args.out, args.scratch, args.n_threads = out, scratch, self.n_threads

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
        return self.rng.standard_normal(shape, np.float32).astype(dtype, copy=False)

    def _pattern(self, dtype: DTypeLike) -> NDArray[Any]:
        return self._normal(_PATTERN_BYTES // np.dtype(dtype).itemsize, dtype=dtype)

    def _rows(self, n_rows: int) -> NDArray[np.uint8]:
        """Keys of one head each, as they are kept."""
        values = self._normal(n_rows, self.shape.d_head, dtype=np.float16)
        rows = np.empty(n_rows * int(lib.actqkv_row_bytes(self.kv_type, self.shape.d_head)), np.uint8)
        lib.actqkv_store_rows(self.kv_type, 0, _data(values), n_rows, self.shape.d_head, _data(rows))
        return rows

    def _stretch(self, n_chunks: int, in_order: int) -> NDArray[np.uint8]:
        """Where the stretch of so many chunks of a KV head will be; `in_order` as the kernels have it."""
        n_bytes = int(lib.actqkv_stretch_bytes(self.shape.d_head, n_chunks * self.shape.chunk, in_order))
        return np.zeros(math.ceil(n_bytes / _ALIGNMENT) * _ALIGNMENT, np.uint8)

    def _make_stretch(
        self, keys: NDArray[np.uint8], chunk_stride: int, n_chunks: int
    ) -> tuple[NDArray[np.uint8], Call]:
        """A divided stretch, and what makes it."""
        d, c = self.shape.d_head, self.shape.chunk
        stretch, common = self._stretch(n_chunks, 0), _data(np.zeros(d, np.float32))
        scratch = _scratch(int(lib.actqkv_stretch_scratch(d, n_chunks * c)))
        given = (self.kv_type, _data(keys), chunk_stride, c, n_chunks, common, d)
        return stretch, partial(lib.actqkv_make_stretch, self.impl, *given, _data(stretch), scratch)

    def _stretch_in_order(self, keys: NDArray[np.uint8], n_chunks: int) -> NDArray[np.uint8]:
        """The stretch of chunks that lie one behind the other."""
        d, c = self.shape.d_head, self.shape.chunk
        stretch, common = self._stretch(n_chunks, c), _data(np.zeros(d, np.float32))
        scratch = _scratch(int(lib.actqkv_stretch_scratch(d, c)))
        for chunk in range(n_chunks):
            given = (self.kv_type, _data(keys[chunk * self.tile_bytes :]), c, common, d, n_chunks * c, chunk)
            lib.actqkv_add_chunk(self.impl, *given, _data(stretch), scratch)
        return stretch

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


class _Index:
    """The index of a layer at the shape's depth, of random keys. Chunks are named by their place in a stretch, so that
    any stretch of a length may stand in the place of another.

    Attributes:
        data: all stretches, one behind the other, those of all KV heads each.
        fronts: the same without keys, which scores are not made of.
        n_cells: of each KV head.
        n_divided: cells of it that are picked from.
        n_looked_at: keys that a query head looks at, on average, where any cells are picked.
        scores: [H][cells], as the last call of actqkv_search_score left them.
    """

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, shape = jobs, jobs.shape
        runs = _runs(shape.n_chunks, shape.chunk)
        keys = jobs._rows(_DISTINCT * max(run.n for run in runs) * shape.chunk).reshape(_DISTINCT, -1)
        kinds = {run.n: [self._made(of_one, run) for of_one in keys] for run in runs}
        ends = {n: max(_front_bytes(one, shape.d_head) for one in of_kind) for n, of_kind in kinds.items()}
        heads = [
            [kinds[run.n][(i * shape.n_head_kv + g) % _DISTINCT] for g in range(shape.n_head_kv)]
            for i, run in enumerate(runs)
        ]
        self.data = np.concatenate([one for of_run in heads for one in of_run])
        self.fronts = np.concatenate(
            [one[: ends[run.n]] for of_run, run in zip(heads, runs, strict=True) for one in of_run]
        )
        self._table, self._fronts_table = (np.zeros(len(runs), _STRETCH) for _ in range(2))
        for table, lengths in ((self._table, {n: len(kinds[n][0]) for n in kinds}), (self._fronts_table, ends)):
            strides = np.array([lengths[run.n] for run in runs])
            table["head_stride"] = strides
            table["data"] = shape.n_head_kv * (np.cumsum(strides) - strides)  # from where all of them begin
            table["first_chunk"] = [run.first for run in runs]
            table["n_keys"] = [run.n * shape.chunk for run in runs]
            table["in_order"] = [run.in_order for run in runs]
        self._count()
        self.scores = np.zeros((shape.n_head, max(self.n_cells)), np.float32)
        self._picked = np.zeros((shape.n_head, shape.picked), np.int32)
        self._votes = np.empty(shape.n_chunks, np.float32)
        self._scratch = _scratch(int(lib.actqkv_search_scratch(self._args(self._table))))

    def call(
        self,
        function: Any,
        *,
        data: NDArray[np.uint8] | None = None,
        fronts: NDArray[np.uint8] | None = None,
        scores: NDArray[np.float32] | None = None,
    ) -> Callable[[], Any]:
        """A step of the search: in `fronts`, or in `data`; in the index's own arrays where none is given."""
        memory = fronts if fronts is not None else self.data if data is None else data
        table = (self._table if fronts is None else self._fronts_table).copy()
        table["data"] += np.uint64(memory.ctypes.data)
        scores = self.scores if scores is None else scores
        args = self._args(table)
        own = (_data(self._picked), _data(self._votes), self._scratch)
        held = (_data(self.jobs.query), _data(table), _data(scores), *own)
        args.query, args.stretches, args.scores, args.picked, args.votes, args.scratch = held

        def run(_held: Any = (held, memory)) -> Any:  # args holds pointers only
            return function(self.jobs.impl, args)

        return run

    def _made(self, keys: NDArray[np.uint8], run: _Run) -> NDArray[np.uint8]:
        if run.in_order:
            return self.jobs._stretch_in_order(keys, run.n)
        stretch, make = self.jobs._make_stretch(keys, self.jobs.tile_bytes, run.n)
        make()
        return stretch

    def _args(self, table: NDArray[Any]) -> Any:
        args, shape = ffi.new("struct actqkv_search_args *"), self.jobs.shape
        args.n_head, args.n_head_kv, args.d_head = self.jobs.heads
        args.scale, args.n_threads = _SCALE, self.jobs.n_threads
        args.n_stretches, args.n_chunks = len(table), shape.n_chunks
        args.n_cells, args.n_picked = max(self.n_cells), shape.picked
        args.stretches = ffi.cast("struct actqkv_stretch *", table.ctypes.data)
        return args

    def _count(self) -> None:
        shape, table, n_divided = self.jobs.shape, self._table.copy(), ffi.new("int64_t *")
        table["data"] += np.uint64(self.data.ctypes.data)
        self.n_cells, self.n_divided, looked_at = [], [], []
        rest = int(table["n_keys"][table["in_order"] > 0].sum())
        divided = int(table["n_keys"].sum()) - rest
        for g in range(shape.n_head_kv):
            n = lib.actqkv_search_cells(_data(table), len(table), g, shape.d_head, n_divided)
            self.n_cells.append(int(n))
            self.n_divided.append(int(n_divided[0]))
            looked_at.append(rest + min(shape.picked / max(n_divided[0], 1), 1) * divided)
        self.n_looked_at = float(np.mean(looked_at))


class _Run(NamedTuple):
    """A run of chunks that are a stretch of an index; `in_order` as struct actqkv_stretch has it."""

    first: int
    n: int
    in_order: int


def _runs(n_chunks: int, chunk: int) -> list[_Run]:
    """The stretches of an index."""
    runs, first = [], 0
    for n in (n_tokens // chunk for n_tokens in _STRETCH_TOKENS):
        while n > 1 and first + n <= n_chunks:
            runs.append(_Run(first, n, 0))
            first += n
    return [*runs, _Run(first, n_chunks - first, chunk)] if first < n_chunks else runs


def _front_bytes(stretch: NDArray[np.uint8], d_head: int) -> int:
    """Bytes of a stretch in front of its keys: cells, as native/kernels/cpu/cells.h lays them out."""
    n_cells = int(stretch[:4].view(np.uint32)[0])
    return 16 + math.ceil(n_cells / _CENTRES) * _CENTRES * (16 + d_head // 2)


def _operations_of_cells(n_keys: int, d: int, *, is_turned: bool) -> int:
    """What native/kernels/cpu/kmeans.cpp does, as if all blocks of a width were equal, and then cells.cpp."""
    n_operations, n_centres, width = 0, n_keys // _CELL_KEYS, _LEAST_BLOCK // _WIDER
    while width < n_keys:
        width *= _WIDER
        n_of_block = min(width // _CELL_KEYS, n_centres)
        n_operations += _ROUNDS * n_keys * d * (2 * min(n_of_block, _NEIGHBOURS) + 1)  # the nearest centre; its mean
        if n_of_block > _NEIGHBOURS:
            n_operations += 2 * n_centres * n_of_block * d
    turned = min(d & -d, _TURNED_MOST)
    n_of_turning = 0 if is_turned else turned.bit_length()  # sums by halves, then a factor
    return n_operations + n_keys * d * (n_of_turning + 7)  # less what is common; means, sizes and reaches


def _scratch(n_bytes: int) -> Any:
    """Scratch memory of a kernel."""
    memory = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    return _data(memory[-memory.ctypes.data % _ALIGNMENT :])


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
