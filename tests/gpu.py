"""On a machine with an NVIDIA GPU: builds the CUDA kernels for it, checks them, and measures them.

    python tests/gpu.py                    # all of it: build, check, sanitize, time
    python tests/gpu.py --only build,time  # some of it

Needs nvcc and Python with NumPy, pytest and cffi; neither llama-cpp-python nor an installed actqkv. Every part runs
even if one before it failed, but for the build; the exit status is 1 if any did. Logs and `times.json` go to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "native" / "kernels" / "cuda"
OPS = ROOT / "tests" / "ops"
NEEDS_THE_HOST = OPS / "test_row_types.py"  # no kernel of the GPU
LIBRARY = "libactqkv_cuda.so"
SANITIZED = "not more_keys and not whole_window and not list_per and (32 or 64)"  # small shapes: it is slow
HEADS, KV_HEADS, D, CHUNK, LAYERS = 32, 8, 128, 32, 32  # Llama-8B's attention
MIB = 1 << 20


def run(command: list[Any], log: Path, **env: str) -> bool:
    """Shows and keeps what a command prints; whether it ended well."""
    print("$", *command, flush=True)
    with log.open("w") as file:
        child = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | env
        )
        assert child.stdout is not None
        for line in child.stdout:
            file.write(line)
            print(line, end="", flush=True)
        return child.wait() == 0


def build(out: Path) -> bool:
    """The library for the GPU that is here, each file with its registers and spills in the log."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    flags = ["-std=c++17", "-O3", "-arch=native", "-lineinfo", "-Xptxas=-v", "-Xcompiler=-fPIC,-Wall", f"-I{CUDA}"]
    sources = sorted(CUDA.glob("*.cu"))
    run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv"], out / "gpu.log")
    with ThreadPoolExecutor() as pool:
        done = pool.map(
            lambda s: run([nvcc, *flags, "-c", s, "-o", out / f"{s.stem}.o"], out / f"build-{s.stem}.log"), sources
        )
        if not all(list(done)):
            return False
    objects = [out / f"{source.stem}.o" for source in sources]
    return run([nvcc, "-shared", "-o", out / LIBRARY, *objects], out / "link.log")


def _tests(*more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        f"--confcutdir={OPS}",
        f"--ignore={NEEDS_THE_HOST}",
        "-m",
        "cuda",
        *more,
        str(OPS),
    ]


def check(out: Path) -> bool:
    """Every op test against NumPy."""
    return run(_tests("--tb=short", "-ra"), out / "check.log", ACTQKV_TEST_CUDA=str(out / LIBRARY))


def sanitize(out: Path) -> bool:
    """Small shapes under compute-sanitizer: memory, races in shared memory, what is read before it is written."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("no compute-sanitizer here")
        return False
    ended_well = True
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [
            tool,
            "--tool",
            kind,
            "--error-exitcode",
            "9",
            "--target-processes",
            "all",
            *_tests("-x", "-k", SANITIZED),
        ]
        ended_well &= run(command, out / f"{kind}.log", ACTQKV_TEST_CUDA=str(out / LIBRARY))
    return ended_well


# ---- times


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


def time(out: Path) -> bool:
    """Copies, score, top-k, refine, attend; GB/s of what each has to read, beside what a copy reads."""
    os.environ["ACTQKV_TEST_CUDA"] = str(out / LIBRARY)
    timer = Timer()
    rows: list[dict[str, Any]] = []

    def note(what: str, ms: float, n_bytes: int) -> float:
        rate = n_bytes / ms / 1e6
        rows.append({"what": what, "ms": round(ms, 5), "gb_per_s": round(rate, 1)})
        print(f"{what:58} {ms:9.4f} ms {rate:9.1f} GB/s", flush=True)
        return rate

    size = 256 * MIB
    one, two = timer.take("uint8_t *", size), timer.take("uint8_t *", size)
    pinned = timer.take("uint8_t *", size, pinned=True)
    copy, stream = timer.table.copy, timer.stream
    # A copy on the GPU reads and writes: its bandwidth counts both.
    bandwidth = note("copy on the GPU", timer.ms(lambda _: copy(stream, two, one, size), 8), 2 * size)
    note("copy to the GPU, pinned", timer.ms(lambda _: copy(stream, one, pinned, size), 4), size)
    note("copy from the GPU, pinned", timer.ms(lambda _: copy(stream, pinned, one, size), 4), size)
    chunk = 2 * KV_HEADS * CHUNK * D * 2
    note(
        "copy of 64 chunks to the GPU, one by one",
        timer.ms(lambda i: copy(stream, one, pinned + i * chunk, chunk)),
        chunk,
    )

    _time_retrieval(timer, note)
    shares = _time_attend(timer, note, bandwidth)
    (out / "times.json").write_text(json.dumps({"rows": rows, "attend_share_of_copy": shares}, indent=2))
    return shares["decode 2048 f16"] >= 0.5


def _time_retrieval(timer: Timer, note: Callable[[str, float, int], float]) -> None:
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
        ms = timer.ms(lambda _, s=scores, n=n, c=chosen: table.top_k(stream, s, n, 736, c))
        note(f"top-k, 736 of {n}", ms, n * 4)
        ms = timer.ms(lambda _, s=scores, n=n, p=probe: table.entropy(stream, s, n, 1000, p))
        note(f"entropy of {n}", ms, n * 4)
    n = 736
    keys = timer.take("uint8_t *", n * KV_HEADS * CHUNK * D * 2)
    query, scores = timer.take("float *", HEADS * D * 4), timer.take("float *", HEADS * n * 4)
    chunks = timer.take("int32_t *", n * 4)
    every = timer.ffi.new("int32_t[]", list(range(n)))
    timer.check(table.copy(stream, chunks, every, n * 4))
    ms = timer.ms(lambda _: table.refine(stream, query, 1, keys, chunks, n, HEADS, KV_HEADS, D, CHUNK, 1, scores))
    note(f"refine, {n} candidates", ms, n * KV_HEADS * CHUNK * D * 2)


def _time_attend(timer: Timer, note: Callable[[str, float, int], float], bandwidth: float) -> dict[str, float]:
    """Every call attends other chunks than the last 31, so that the second-level cache holds none of them."""
    ffi, table = timer.ffi, timer.table
    shares = {}
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
    return shares


PARTS: dict[str, Callable[[Path], bool]] = {"build": build, "check": check, "sanitize": sanitize, "time": time}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu", help="folder for the library, logs and times"
    )
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in wanted:
        print(f"== {name}", flush=True)
        results[name] = PARTS[name](options.out.resolve())
        if name == "build" and not results[name]:
            break
    print(*(f"{name}: {'ok' if ended_well else 'FAILED'}" for name, ended_well in results.items()), sep="\n")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
