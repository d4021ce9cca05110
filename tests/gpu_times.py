"""What the kernels of libactqkv_cuda take on a GPU. tests/gpu.py runs each group in a process of its own.

python tests/gpu_times.py FOLDER GROUP          # FOLDER with the library; times-GROUP.json goes there
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import time as clock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

OPS = Path(__file__).resolve().parent / "ops"
LIBRARY = "libactqkv_cuda.so"
HEADS, KV_HEADS, D, CHUNK, LAYERS = 32, 8, 128, 32, 32  # Llama-8B's attention
STRETCH = 65536  # keys of the longest stretches of an index
SPREAD = KV_HEADS * (D // 32 * 18 + 2)  # bytes of a chunk's spread
MIB = 1 << 20


class Timer:
    """Arrays on the GPU, and the time of what is queued there."""

    def __init__(self) -> None:
        sys.path.insert(0, str(OPS))
        import ops_support  # noqa: PLC0415 (reads ACTQKV_TEST_CUDA)

        self.ffi = ops_support.ffi
        self.gpu = ops_support.gpu(ops_support.ON_GPU)
        self.table, self.stream, self.check = self.gpu.table, self.gpu.stream, self.gpu.check

    def take(self, kind: str, n_bytes: int, *, pinned: bool = False) -> Any:
        """Memory with bytes that are small numbers in every format."""
        memory = self.ffi.new("void **")
        taken = self.table.take_pinned(n_bytes, memory) if pinned else self.table.take(0, n_bytes, memory)
        self.check(taken)
        self.check(self.table.fill(self.stream, memory[0], 0x11, n_bytes))
        return self.ffi.cast(kind, memory[0])

    def numbers(self, numbers: Sequence[int]) -> Any:
        array = self.take("int32_t *", len(numbers) * 4)
        here = self.ffi.new("int32_t[]", list(numbers))
        self.check(self.table.copy(self.stream, array, here, len(numbers) * 4))
        self.check(self.table.wait(self.stream))
        return array

    def ms(self, function: Callable[[int], int], n: int = 64) -> float:
        """Of one call, the least of five rounds of n; function gets the number of the call."""
        best = float("inf")
        for _ in range(5):
            self.check(self.table.start_clock(self.stream))
            for i in range(n):
                self.check(function(i))
            spent = self.ffi.new("float *")
            self.check(self.table.stop_clock(self.stream, spent))
            best = min(best, spent[0] / n)
        return best


Note = Callable[[str, float, int], float]


def measure(out: Path, group: str) -> bool:
    os.environ["ACTQKV_TEST_CUDA"] = str(out / LIBRARY)
    timer = Timer()
    rows: list[dict[str, Any]] = []

    def note(what: str, ms: float, n_bytes: int) -> float:
        rate = n_bytes / ms / 1e6
        rows.append({"what": what, "ms": round(ms, 5), "gb_per_s": round(rate, 1)})
        print(f"{what:58} {ms:9.4f} ms {rate:9.1f} GB/s", flush=True)
        return rate

    holds = GROUPS[group](timer, note)
    (out / f"times-{group}.json").write_text(json.dumps(rows, indent=2))
    return holds


def _bandwidth(timer: Timer, note: Note) -> float:
    """Of a copy on the GPU, which reads and writes: both count."""
    size = 256 * MIB
    one, two = timer.take("uint8_t *", size), timer.take("uint8_t *", size)
    return note("copy on the GPU", timer.ms(lambda _: timer.table.copy(timer.stream, two, one, size), 8), 2 * size)


def _time_copies(timer: Timer, note: Note) -> bool:
    _bandwidth(timer, note)
    size, copy, stream = 256 * MIB, timer.table.copy, timer.stream
    one, pinned = timer.take("uint8_t *", size), timer.take("uint8_t *", size, pinned=True)
    note("copy to the GPU, pinned", timer.ms(lambda _: copy(stream, one, pinned, size), 4), size)
    note("copy from the GPU, pinned", timer.ms(lambda _: copy(stream, pinned, one, size), 4), size)
    _time_pinning(timer, note)
    chunk = 2 * KV_HEADS * CHUNK * D * 2
    ms = timer.ms(lambda i: copy(stream, one, pinned + i * chunk, chunk))
    note("copy of 64 chunks to the GPU, one by one", ms, chunk)
    n = 64
    chunks = timer.numbers(range(0, 4 * n, 4))
    for name, rest in (("on the GPU", one), ("from pinned memory", pinned)):
        ms = timer.ms(
            lambda _, r=rest: timer.table.gather(stream, r, chunk, timer.ffi.NULL, r, chunks, n, chunk, one + size // 2)
        )
        note(f"{n} chunks brought together by a kernel, {name}", ms, n * chunk)
    return True


def _time_pinning(timer: Timer, note: Note) -> None:
    """What a reading pays for its chunks to be read by a GPU; and an ordinary copy, without."""
    size, at = 256 * MIB, timer.ffi
    memory = mmap.mmap(-1, size)
    memory[:] = bytes(size)
    start = at.from_buffer(memory)
    target = timer.take("uint8_t *", size)
    ms = timer.ms(lambda _: timer.table.copy(timer.stream, target, start, size), 2)
    note("copy to the GPU, ordinary memory", ms, size)
    begun = clock.perf_counter()
    timer.check(timer.table.pin(start, size))
    note("pinning memory that is in use", 1000 * (clock.perf_counter() - begun), size)
    timer.check(timer.table.unpin(start))


def _time_retrieval(timer: Timer, note: Note) -> bool:
    table, stream, null = timer.table, timer.stream, timer.ffi.NULL
    width = 2 * KV_HEADS * D
    for n_tokens in (128 << 10, 1 << 20):
        n = n_tokens // CHUNK
        reps = timer.take("actqkv_f16 *", n * width * 2)
        probe, scores = timer.take("float *", width * 4), timer.take("float *", n * 4)
        chosen = timer.take("int32_t *", n * 4)
        name = f"{n_tokens >> 10}K tokens"
        ms = timer.ms(lambda _, r=reps, p=probe, s=scores, n=n: table.score(stream, p, 1, r, null, n, width, 1, s))
        note(f"score, bounds, {name}", ms, n * width * 2)
        ms = timer.ms(lambda _, s=scores, n=n, c=chosen: table.top_k(stream, s, n, 92, c))
        note(f"top-k, 92 of {n}", ms, n * 4)
        ms = timer.ms(lambda _, s=scores, n=n, p=probe: table.entropy(stream, s, n, 1000, p))
        note(f"entropy of {n}", ms, n * 4)
    return True


def _time_plan(timer: Timer, note: Note) -> bool:
    """An answering step's plan in one layer at 128K tokens, 46 chunks granted, by spreads and then keys of two chunks
    per granted one (scan=0, refine=2): every kernel, then all as a session queues them, keys of candidates and of the
    plan on the GPU."""
    t, s, null = timer.table, timer.stream, timer.ffi.NULL
    n, granted = (128 << 10) // CHUNK, 46
    n_refined = 2 * granted
    key_bytes = KV_HEADS * CHUNK * D * 2
    query, folded = timer.take("float *", HEADS * D * 4), timer.take("float *", KV_HEADS * (D + 1) * 4)
    spreads = timer.take("uint8_t *", n * SPREAD)
    keys, near, plan = (timer.take("uint8_t *", m * key_bytes) for m in (n, n_refined, granted))
    scores, votes = timer.take("float *", n * 4), timer.take("float *", n_refined * 4)
    of_heads, entropy = timer.take("float *", HEADS * n_refined * 4), timer.take("float *", 4)
    chunks, listed = timer.numbers(range(0, n, n // n_refined)), timer.numbers(range(n))
    at, kept = (timer.take("int32_t *", n_refined * 4) for _ in range(2))
    heads = (HEADS, KV_HEADS, D, CHUNK, 1)
    timer.check(t.top_k(s, scores, n_refined, n_refined, at))  # `at` names somebody
    steps: list[tuple[str, int, Callable[[], int]]] = [
        ("query", HEADS * D * 4, lambda: t.spread_query(s, query, HEADS, KV_HEADS, D, folded)),
        (f"spreads of {n}", n * SPREAD, lambda: t.spread_scores(s, folded, spreads, n, KV_HEADS, D, scores)),
        ("entropy", n * 4, lambda: t.entropy(s, scores, n, 1000, entropy)),
        (f"top-k, {n_refined} of {n}", n * 4, lambda: t.top_k(s, scores, n, n_refined, kept)),
        (
            f"keys of {n_refined} brought together",
            2 * n_refined * key_bytes,
            lambda: t.gather(s, keys, key_bytes, null, null, chunks, n_refined, key_bytes, near),
        ),
        (
            f"keys of {n_refined}",
            n_refined * key_bytes,
            lambda: t.refine(s, query, 1, near, null, n_refined, *heads, of_heads),
        ),
        (
            f"{granted} of {n_refined} elected",
            HEADS * n_refined * 4,
            lambda: t.elect(s, of_heads, n_refined, HEADS, granted, chunks, votes, at, kept),
        ),
        (
            f"keys of {granted} brought together",
            2 * granted * key_bytes,
            lambda: t.gather(s, near, key_bytes, null, null, at, granted, key_bytes, plan),
        ),
        (
            f"values of {granted} brought together",
            2 * granted * key_bytes,
            lambda: t.gather(s, keys, key_bytes, null, null, listed, granted, key_bytes, plan),
        ),
    ]
    for name, n_bytes, step in steps:
        note(f"plan: {name}", timer.ms(lambda _, f=step: f()), n_bytes)

    def all_steps(_: int) -> int:
        for _, _, step in steps:
            timer.check(step())
        return 0

    ms = timer.ms(all_steps, 32)
    note("plan: all of it", ms, sum(n_bytes for _, n_bytes, _ in steps))
    print(f"a step of {LAYERS} layers plans for {ms * LAYERS:.3f} ms", flush=True)
    return True


def _stretch() -> Any:
    """Bytes of a divided stretch of STRETCH keys, all cells of 64 of them (native/kernels/cpu/cells.h)."""
    import numpy as np  # noqa: PLC0415 (as long as it takes to load)

    rng = np.random.default_rng(0)
    n_cells, n_blocks = STRETCH // 64, -(-(STRETCH // 64 + STRETCH // 256 + 1) // 16)
    blocks = np.zeros((n_blocks, 16 * (16 + D // 2)), np.uint8)
    floats = np.full((n_blocks, 16), 0.01, np.float32).view(np.uint8)
    cells = np.arange(n_blocks * 16, dtype=np.uint32).reshape(n_blocks, 16)
    blocks[:, :64] = blocks[:, 64:128] = blocks[:, -128:-64] = floats
    blocks[:, 128:-128] = rng.integers(0, 256, (n_blocks, 8 * D))
    blocks[:, -64:] = (256 * 4 * cells + 63).view(np.uint8)
    keys = rng.integers(0, 256, (n_cells, 64 * (3 + D // 8)), np.uint8)
    keys[:, 64:192] = rng.integers(0, STRETCH // CHUNK, (n_cells, 64)).astype(np.uint16).view(np.uint8)
    head = np.array([n_cells, STRETCH, 0, 0], np.uint32).view(np.uint8)
    found = np.concatenate([head, blocks.reshape(-1), keys.reshape(-1)])
    return np.pad(found, (0, -len(found) % 64))


def _time_search(timer: Timer, note: Note) -> bool:
    """An answering step's plan in one layer by an index, as by default (scan=4096). Every call searches that of another
    layer, so that the second-level cache holds little of it. Keys are random."""
    ffi, t, s = timer.ffi, timer.table, timer.stream
    one, granted, n_picked = _stretch(), 46, 4096 // 64
    here, of_stretch = ffi.from_buffer(one), KV_HEADS * len(one)
    query = timer.take("float *", HEADS * D * 4)
    numbers = ffi.new("float[]", [math.sin(i * i) for i in range(HEADS * D)])
    timer.check(t.copy(s, query, numbers, HEADS * D * 4))
    for n_tokens, layers in ((128 << 10, LAYERS), (1 << 20, 4)):
        n, n_chunks = n_tokens // STRETCH, n_tokens // CHUNK
        index = timer.take("uint8_t *", layers * n * of_stretch)
        for i in range(layers * n * KV_HEADS):
            timer.check(t.copy(s, index + i * len(one), here, len(one)))
        args, lists = ffi.new("struct actqkv_search_args *"), []
        for layer in range(layers):
            lists.append(ffi.new("struct actqkv_stretch[]", n))
            for i in range(n):
                lists[-1][i] = (index + (layer * n + i) * of_stretch, len(one), i * (STRETCH // CHUNK), STRETCH, 0)
        args.n_head, args.n_head_kv, args.d_head, args.scale, args.query = HEADS, KV_HEADS, D, D**-0.5, query
        args.stretches, args.n_stretches, args.n_chunks, args.n_picked = lists[0], n, n_chunks, n_picked
        args.n_cells = n_tokens // 64
        args.scores = timer.take("float *", HEADS * args.n_cells * 4)
        args.picked, args.votes = timer.take("int32_t *", HEADS * n_picked * 4), timer.take("float *", n_chunks * 4)
        args.scratch = timer.take("uint8_t *", t.search_scratch(args))
        chosen = timer.take("int32_t *", granted * 4)
        centres, sketches = KV_HEADS * args.n_cells * (D // 2 + 16), HEADS * n_picked * 64 * (3 + D // 8)

        def score(i: int, args: Any = args, lists: list[Any] = lists) -> int:
            args.stretches = lists[i % len(lists)]
            return int(t.search_score(s, args))

        def all_steps(i: int, score: Any = score, args: Any = args, chosen: Any = chosen) -> int:
            timer.check(score(i) or t.search_vote(s, args))
            return int(t.top_k(s, args.votes, args.n_chunks, granted, chosen))

        name = f"{n_tokens >> 10}K tokens"
        note(f"search: {args.n_cells} cells scored, {name}", timer.ms(score), centres)
        ms = timer.ms(lambda _, a=args: t.search_vote(s, a))
        note(f"search: {n_picked} cells looked into, votes, {name}", ms, 2 * sketches)
        ms = timer.ms(all_steps)
        note(f"search: all of it, {granted} of {n_chunks} chosen, {name}", ms, centres + 2 * sketches)
        print(f"a step of {LAYERS} layers searches {name} for {ms * LAYERS:.3f} ms", flush=True)
    return True


def _time_attend(timer: Timer, note: Note) -> bool:
    """Every call attends other chunks than the last 31, so that the second-level cache holds none of them."""
    ffi, table = timer.ffi, timer.table
    bandwidth, shares = _bandwidth(timer, note), {}
    for m, n_tokens, name, kv_type, row in (
        (1, 2048, "f16", 1, D * 2),
        (1, 2048, "q8_0", 8, D // 32 * 34),
        (1, 2048, "q4_0", 2, D // 32 * 18),
        (1, 32768, "f16", 1, D * 2),
        (256, 2048, "f16", 1, D * 2),
        (256, 2048, "q8_0", 8, D // 32 * 34),
    ):
        n_chunks, layers = n_tokens // CHUNK, LAYERS if n_tokens <= 2048 else 4
        chunk_bytes = KV_HEADS * CHUNK * row
        kv = timer.take("uint8_t *", 2 * layers * n_chunks * chunk_bytes)
        q, out = (timer.take("float *", m * HEADS * D * 4) for _ in range(2))
        own = timer.take("actqkv_f16 *", KV_HEADS * m * D * 2)
        scratch = timer.take("uint8_t *", table.attend_scratch(HEADS, KV_HEADS, D, m, n_tokens + m, n_chunks, 1))
        calls = []
        for layer in range(layers):
            spans = ffi.new("struct actqkv_span[]", n_chunks)
            for i in range(n_chunks):
                spans[i].far = kv + (layer * n_chunks + i) * chunk_bytes
                spans[i].v = kv + ((layers + layer) * n_chunks + i) * chunk_bytes
                spans[i].far_stride = spans[i].v_stride = CHUNK * row
                spans[i].first, spans[i].n_tok, spans[i].kv_type = i * CHUNK, CHUNK, kv_type
            args = ffi.new("struct actqkv_attend_args *")
            args.n_head, args.n_head_kv, args.d_head, args.m = HEADS, KV_HEADS, D, m
            args.n_past, args.n_clamp, args.scale = n_tokens, 0, D**-0.5
            args.q_near = args.q_far = args.q_turned = q
            args.spans, args.n_spans = spans, n_chunks
            args.k_window = args.v_window = own
            args.window_stride, args.out, args.scratch = m * D, out, scratch
            calls.append((args, spans))
        ms = timer.ms(lambda i, c=calls: table.attend(timer.stream, c[i % len(c)][0]))
        what = f"{'decode' if m == 1 else 'window of 256'} {n_tokens} {name}"
        n_bytes = 2 * n_chunks * chunk_bytes
        shares[what] = round(note(f"attend, {what}", ms, n_bytes) / bandwidth, 3)
        if len(shares) == 1:
            alone, _ = calls[0]
            alone.n_spans = 0
            ms = timer.ms(lambda _, a=alone: table.attend(timer.stream, a))
            note("attend, the window alone: what a call costs at least", ms, 2 * KV_HEADS * D * 2)
        for memory in (kv, q, out, own, scratch):
            timer.check(table.wait(timer.stream))
            timer.check(table.give_back(memory))
    share = shares["decode 2048 f16"]
    print(f"attend at 2048 tokens, share of the copy's bandwidth {share:.3f}, wanted 0.5", flush=True)
    return share >= 0.5


GROUPS: dict[str, Callable[[Timer, Note], bool]] = {
    "copies": _time_copies,
    "retrieval": _time_retrieval,
    "plan": _time_plan,
    "search": _time_search,
    "attend": _time_attend,
}


if __name__ == "__main__":
    sys.exit(0 if measure(Path(sys.argv[1]), sys.argv[2]) else 1)
