"""On a machine with an NVIDIA GPU: builds the CUDA kernels for it, checks them, and measures them.

    python tests/gpu.py                    # all of it: build, check, time, engine, targets, sanitize
    python tests/gpu.py --only build,time  # some of it

Needs nvcc and Python with NumPy, pytest and cffi. The parts `engine` and `targets` also need an installed actqkv and,
for weights on the GPU, a llama-cpp-python built with CUDA (actqkv doctor has the command); without actqkv they are
skipped, and that is said. `targets` takes --model, best a Llama of 8B in Q4_K_M, else it makes one of 1B with random
weights, for which it needs the package gguf. Every part runs even if one before it failed, but for the build, and is
ended after PART_LIMIT_S; the exit status is 1 if any failed. Logs, `times.json` and `targets.json` go to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "native" / "kernels" / "cuda"
OPS = ROOT / "tests" / "ops"
NEEDS_THE_HOST = OPS / "test_row_types.py"  # no kernel of the GPU
LIBRARY = "libactqkv_cuda.so"
KINDS = ("memcheck", "racecheck", "initcheck", "synccheck")  # of compute-sanitizer
SANITIZED = "not more_keys and not whole_window and not list_per and (32 or 64)"  # small shapes: it is slow
HEADS, KV_HEADS, D, CHUNK, LAYERS = 32, 8, 128, 32, 32  # Llama-8B's attention
SKETCH = 2 * D + (2 + D // 8) * CHUNK  # bytes of a chunk's sketch for one KV head
MIB = 1 << 20
PART_LIMIT_S = {"check": 120, "sanitize": 150, "engine": 90, "targets": 210}  # all of it: under 10 minutes


def run(command: list[Any], log: Path, *, limit_s: float | None = None, **env: str) -> bool:
    """Shows and keeps what a command prints; whether it ended well, and within its time."""
    print("$", *command, flush=True)
    with log.open("w") as file, ExitStack() as stack:
        child = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | env
        )
        assert child.stdout is not None
        if limit_s is not None:
            timer = threading.Timer(limit_s, child.kill)
            timer.start()
            stack.callback(timer.cancel)
        for line in child.stdout:
            file.write(line)
            print(line, end="", flush=True)
        return child.wait() == 0


def build(out: Path, options: argparse.Namespace) -> bool:
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


def check(out: Path, options: argparse.Namespace) -> bool:
    """Every op test against NumPy."""
    limit_s = PART_LIMIT_S["check"]
    return run(_tests("--tb=short", "-ra"), out / "check.log", limit_s=limit_s, ACTQKV_TEST_CUDA=str(out / LIBRARY))


def sanitize(out: Path, options: argparse.Namespace) -> bool:
    """Small shapes under compute-sanitizer: memory, races in shared memory, what is read before it is written."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("no compute-sanitizer here")
        return False
    ended_well = True
    for kind in KINDS:
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
        limit_s = PART_LIMIT_S["sanitize"] / len(KINDS)
        ended_well &= run(command, out / f"{kind}.log", limit_s=limit_s, ACTQKV_TEST_CUDA=str(out / LIBRARY))
    return ended_well


# ---- sessions


def engine(out: Path, options: argparse.Namespace) -> bool:
    """Logits of sessions that attend on the GPU, and of models with layers there, against the CPU's; then the command
    line on the bundled model, with and without the GPU.
    """
    if find_spec("actqkv_cpp._actqkv") is None:
        print("skipped: actqkv is not installed (pip install .)")
        return True
    env = {"ACTQKV_CUDA_LIBRARY": str(out / LIBRARY)}
    tests = [ROOT / "tests/engine/test_on_gpu.py", ROOT / "tests/engine/test_devices.py"]
    command = [sys.executable, "-m", "pytest", "-m", "", "-k", "not emulated", "-ra", "--tb=short", *tests]
    ended_well = run(command, out / "engine.log", limit_s=PART_LIMIT_S["engine"], **env)
    answers = []
    for vram in ("1g", "0"):
        ask = [sys.executable, "-m", "actqkv_cpp", "ask", "-d", ROOT / "examples/harbour.txt", "--json", "-q"]
        log = out / f"ask-vram-{vram}.log"
        question = ["--vram", vram, "--gpu-layers", "0", "--max-tokens", "32", "Who was elected in Sussith?"]
        ended_well &= run([*ask, *question], log, limit_s=60, **env)
        answers.append(_object_in(log))
    on_gpu, on_cpu = answers
    traffic = on_gpu.get("gpu")
    if not ended_well or not traffic:
        return False
    rate = traffic["n_hits"] / max(traffic["n_hits"] + traffic["n_misses"], 1)
    print(f"hit rate of the last answer {rate:.3f}, wanted 0.8; {traffic}")
    return rate >= 0.8 and [a["answer"] for a in on_gpu["answers"]] == [a["answer"] for a in on_cpu["answers"]]


def _object_in(log: Path) -> dict[str, Any]:
    """The JSON object that a command printed, with whatever it said around it."""
    text = log.read_text()
    found: dict[str, Any] = json.loads(text[text.index("{\n") : text.rindex("\n}") + 2]) if "{\n" in text else {}
    return found


def targets(out: Path, options: argparse.Namespace) -> bool:
    """What issue 6 wants: `actqkv bench` beside llama.cpp with its keys and values on the card, and in RAM."""
    if find_spec("actqkv_cpp._actqkv") is None:
        print("skipped: actqkv is not installed (pip install .)")
        return True
    env = {"ACTQKV_CUDA_LIBRARY": str(out / LIBRARY)}
    model = options.model or out / "s1b.gguf"
    if not model.exists():
        make = [sys.executable, "-m", "models.random_weights", "s1b", model]
        if not run(make, out / "model.log", limit_s=120, PYTHONPATH=str(ROOT)):
            return False
    rows: dict[str, list[dict[str, Any]]] = {}
    for peer, more in (("card", []), ("ram", ["--peer-kv-in-ram"])):
        sizes = ["--lengths", options.lengths, "--vram", "1g"]
        command = [sys.executable, "-m", "actqkv_cpp", "bench", model, *sizes, "--json", "-q"]
        log = out / f"bench-{peer}.json"
        if not run([*command, "--quick", *more], log, limit_s=PART_LIMIT_S["targets"] / 2, **env):
            return False
        rows[peer] = _object_in(log)["rows"]
    found = _compare(rows, options.lengths)
    (out / "targets.json").write_text(json.dumps(found, indent=2))
    for name, (value, wanted, holds) in found.items():
        print(f"{name:62} {value:10.3f}  wanted {wanted:8.3f}  {'ok' if holds else 'MISSED'}")
    return all(holds for _, _, holds in found.values())


def _compare(rows: dict[str, list[dict[str, Any]]], lengths: str) -> dict[str, tuple[float, float, bool]]:
    """Name -> found, wanted, whether it holds; of the least and the greatest length."""

    def ms(peer: str, engine: str, phase: str, depth: int) -> float:
        wanted = (engine, phase, depth)
        return next(row["ms_per_token"] for row in rows[peer] if (row["engine"], row["phase"], row["depth"]) == wanted)

    depths = sorted({row["depth"] for row in rows["card"]})
    near, far = depths[0], depths[-1]
    ours = ms("card", "actqkv", "decode", far)
    on_gpu = next(row["gpu"] or {} for row in rows["card"] if row["engine"] == "actqkv" and row["depth"] == far)
    mib_taken = on_gpu.get("memory_bytes", 0) / MIB
    read_s = (ms("card", "actqkv", "prefill", near) + ms("card", "actqkv", "prefill", far)) / 2 * far / 1000
    return {
        f"decode, ms at {far:,} over ms at {near:,}": (r := ours / ms("card", "actqkv", "decode", near), 1.1, r <= 1.1),
        "decode, speed over llama.cpp's with KV on the card": (
            r := ms("card", "llama.cpp", "decode", far) / ours, 1.4, r >= 1.4,
        ),
        "decode, speed over llama.cpp's with KV in RAM": (
            r := ms("ram", "llama.cpp", "decode", far) / ours, 5.0, r >= 5.0,
        ),
        f"prefill of {far:,}, seconds (by the rates at both lengths)": (read_s, 25.0, read_s <= 25.0),
        "GPU memory besides weights, MiB": (mib_taken, 1024.0, 0 < mib_taken <= 1024.0),
    }  # fmt: skip


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


def time(out: Path, options: argparse.Namespace) -> bool:
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
    n, n_candidates = 736, 16 * 46  # refined and sketched candidates of a step at 2K tokens
    keys = timer.take("uint8_t *", n * KV_HEADS * CHUNK * D * 2)
    query, scores = timer.take("float *", HEADS * D * 4), timer.take("float *", HEADS * n * 4)
    chunks = timer.take("int32_t *", n * 4)
    every = timer.ffi.new("int32_t[]", list(range(n)))
    timer.check(table.copy(stream, chunks, every, n * 4))
    sketches = timer.take("uint8_t *", n_candidates * KV_HEADS * SKETCH)
    candidates = timer.take("int32_t *", n_candidates * 4)
    timer.check(table.copy(stream, candidates, timer.ffi.new("int32_t[]", list(range(n_candidates))), n_candidates * 4))
    found = timer.take("float *", HEADS * n_candidates * 4)
    ms = timer.ms(
        lambda _: table.sketch_scores(
            stream, query, sketches, candidates, n_candidates, HEADS, KV_HEADS, D, CHUNK, 1, found
        )
    )
    note(f"sketches, {n_candidates} candidates", ms, n_candidates * KV_HEADS * SKETCH)
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


PARTS: dict[str, Callable[[Path, argparse.Namespace], bool]] = {
    "build": build,
    "check": check,
    "time": time,
    "engine": engine,
    "targets": targets,
    "sanitize": sanitize,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu", help="folder for the library, logs and times"
    )
    parser.add_argument("--model", type=Path, help="GGUF model of `targets`; default one of 1B with random weights")
    parser.add_argument("--lengths", default="2k,128k", help="depths of `targets`")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in wanted:
        print(f"== {name}", flush=True)
        results[name] = bool(PARTS[name](options.out.resolve(), options))
        if name == "build" and not results[name]:
            break
    print(*(f"{name}: {'ok' if ended_well else 'FAILED'}" for name, ended_well in results.items()), sep="\n")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
