"""On a machine with an NVIDIA GPU: builds the CUDA kernels for it, checks them, and measures them.

    python tests/gpu.py                    # build, check, time, engine, targets, sanitize
    python tests/gpu.py --only build,time  # some of it
    python tests/gpu.py --only million     # a million tokens, by itself

Needs nvcc and Python with NumPy, pytest and cffi. The parts `engine`, `targets` and `million` also need an installed
actqkv and, for weights on the GPU, a llama-cpp-python built with CUDA (actqkv doctor has the command); without actqkv
they are skipped, and that is said. `targets` takes --model, else it writes one of Llama-8B's shape with random weights,
for which it needs the package gguf. Every part runs even if one before it failed, each in processes of its own, and is
ended after PART_LIMIT_S, all of them after nine minutes; the exit status is 1 if any failed. Logs, times and
`targets.json` go to --out.

A machine without network gets what it needs from a folder, made elsewhere by tests/gpu_pack.py:

    python tests/gpu.py --pack FOLDER --only install,build,check,time,sanitize     # llama-cpp-python builds meanwhile
    python tests/gpu.py --pack FOLDER --only engine,targets                        # waits for it
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time as clock
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_times import GROUPS, LIBRARY

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "native" / "kernels" / "cuda"
OPS = ROOT / "tests" / "ops"
NEEDS_THE_HOST = OPS / "test_row_types.py"  # no kernel of the GPU
KINDS = ("memcheck", "racecheck", "initcheck", "synccheck")  # of compute-sanitizer
SANITIZED = (  # small shapes: it is slow
    "long_row or (not more_keys and not whole_window and not list_per and not scores_follow and (32 or 64))"
)
MIB = 1 << 20
PART_LIMIT_S = {"check": 120, "time": 120, "sanitize": 120, "engine": 90, "targets": 200, "million": 540}
INSTALL_LIMIT_S = 400  # that `engine` waits for an installation
ENDS_AT = clock.monotonic() + 540  # of the whole run: machines that are lent end a command after 10 minutes


def run(command: list[Any], log: Path, *, limit_s: float | None = None, **env: str) -> bool:
    """Shows and keeps what a command prints; whether it ended well, and within its time."""
    print("$", *command, flush=True)
    with log.open("w") as file, ExitStack() as stack:
        try:
            child = subprocess.Popen(
                list(map(str, command)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | env,
                cwd=log.parent,  # not the sources' folder, whose actqkv_cpp/ hides an installed one
                start_new_session=True,
            )
        except OSError as error:  # not there
            print(error, flush=True)
            return False
        assert child.stdout is not None
        stack.callback(_end, child)
        timer = threading.Timer(min(limit_s or ENDS_AT, _left(ENDS_AT)), _end, [child])
        timer.start()
        stack.callback(timer.cancel)
        for line in child.stdout:
            file.write(line)
            print(line, end="", flush=True)
        return child.wait() == 0


def _end(child: subprocess.Popen[str]) -> None:
    """With what it has started: a program under compute-sanitizer has the pipe too, whose end run() waits for."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _left(deadline: float) -> float:
    """Seconds, and at least one."""
    return max(deadline - clock.monotonic(), 1)


def _nvcc() -> str:
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def build(out: Path, options: argparse.Namespace) -> bool:
    """The library for the GPU that is here, each file with its registers and spills in the log."""
    nvcc = _nvcc()
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


def _tests(*more: str, files: Sequence[Path] = (OPS,)) -> list[Any]:
    options = [f"--confcutdir={OPS}", f"--ignore={NEEDS_THE_HOST}", "-c", ROOT / "pyproject.toml", "-m", "cuda"]
    return [sys.executable, "-m", "pytest", *options, *more, *files]


def check(out: Path, options: argparse.Namespace) -> bool:
    """Every op test against NumPy, a process per file: a kernel that fails may take the GPU's state with it."""
    ended_well, deadline = True, clock.monotonic() + PART_LIMIT_S["check"]
    for file in sorted(set(OPS.glob("test_*.py")) - {NEEDS_THE_HOST}):
        limit_s, env = _left(deadline), {"ACTQKV_TEST_CUDA": str(out / LIBRARY)}
        ended_well &= run(_tests("--tb=short", files=[file]), out / f"check-{file.stem}.log", limit_s=limit_s, **env)
    return ended_well


def sanitize(out: Path, options: argparse.Namespace) -> bool:
    """Small shapes under compute-sanitizer: memory, races in shared memory, what is read before it is written."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("no compute-sanitizer here")
        return False
    ended_well, deadline = True, clock.monotonic() + PART_LIMIT_S["sanitize"]
    for i, kind in enumerate(KINDS):
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
        limit_s = _left(deadline) / (len(KINDS) - i)
        ended_well &= run(command, out / f"{kind}.log", limit_s=limit_s, ACTQKV_TEST_CUDA=str(out / LIBRARY))
    return ended_well


# ---- sessions


def engine(out: Path, options: argparse.Namespace) -> bool:
    """Logits of sessions that attend on the GPU, and of models with layers there, against the CPU's; then the command
    line on the bundled model, with and without the GPU.
    """
    if not _has_actqkv(out):
        return options.pack is None
    env = {"ACTQKV_CUDA_LIBRARY": str(out / LIBRARY)}
    tests = [ROOT / "tests/engine/test_on_gpu.py", ROOT / "tests/engine/test_devices.py"]
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-m", ""]
    command += ["-k", "not emulated", "-ra", "--tb=short", *tests]
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


def _bench(out: Path, name: str, model: Path, *more: str, limit_s: float) -> list[dict[str, Any]]:
    """Rows of `actqkv bench`; none where it failed."""
    command = [sys.executable, "-m", "actqkv_cpp", "bench", model, "--json", "-q", "--quick", *more]
    log = out / f"bench-{name}.json"
    ended_well = run(command, log, limit_s=limit_s, ACTQKV_CUDA_LIBRARY=str(out / LIBRARY))
    return list(_object_in(log).get("rows", [])) if ended_well else []


def _model(out: Path, options: argparse.Namespace) -> Path | None:
    model: Path = options.model or out / "llama8b.gguf"
    make = [sys.executable, ROOT / "tests/gpu_model.py", model]
    return model if model.exists() or run(make, out / "model.log", limit_s=120) else None


def targets(out: Path, options: argparse.Namespace) -> bool:
    """What issue 6 wants at the greatest length: `actqkv bench` beside llama.cpp with its keys and values on the card,
    and, within 1 GiB of GPU memory, beside llama.cpp with them in RAM.
    """
    if not _has_actqkv(out):
        return options.pack is None
    model = _model(out, options)
    if model is None:
        return False
    limit_s, lengths = PART_LIMIT_S["targets"] / 2, ("--lengths", options.lengths)
    rows = {
        "card": _bench(out, "card", model, *lengths, limit_s=limit_s),
        "ram": _bench(out, "ram", model, *lengths, "--vram", "1g", "--peer-kv-in-ram", limit_s=limit_s),
    }
    return _told(out / "targets.json", _compare(rows, model))


def million(out: Path, options: argparse.Namespace) -> bool:
    """A million tokens in q8_0 within 2 GiB; with what a card has free, if --lengths says 1m as well."""
    if not _has_actqkv(out):
        return options.pack is None
    model = _model(out, options)
    if model is None:
        return False
    sizes = ["--lengths", "2k,1m", "--kv-type", "q8_0", "--vram", options.vram_of_million]
    rows = _bench(out, "million", model, *sizes, limit_s=PART_LIMIT_S["million"])
    return _told(out / "million.json", _compare_million(rows))


Target = tuple[float | None, float, bool]  # found, wanted, whether it holds


def _told(to: Path, found: dict[str, Target]) -> bool:
    to.write_text(json.dumps(found, indent=2))
    for name, (value, wanted, holds) in found.items():
        shown = "  not found" if value is None else f"{value:11.3f}"
        print(f"{name:62}{shown}  wanted {wanted:8.3f}  {'ok' if holds else 'MISSED'}")
    return all(holds for _, _, holds in found.values())


def _ms(rows: list[dict[str, Any]], engine: str, phase: str, depth: int) -> float | None:
    which = (engine, phase, depth)
    return next((row["ms_per_token"] for row in rows if (row["engine"], row["phase"], row["depth"]) == which), None)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _at_most(value: float | None, wanted: float) -> Target:
    return value, wanted, value is not None and value <= wanted


def _at_least(value: float | None, wanted: float) -> Target:
    return value, wanted, value is not None and value >= wanted


def _mib_taken(rows: list[dict[str, Any]], depth: int) -> float | None:
    on_gpu = [row["gpu"] for row in rows if row["engine"] == "actqkv" and row["depth"] == depth and row["gpu"]]
    return on_gpu[0]["memory_bytes"] / MIB if on_gpu else None


def _compare(rows: dict[str, list[dict[str, Any]]], model: Path) -> dict[str, Target]:
    """Of the least and the greatest length; the floor of a step is what reading the weights once would take."""
    depths = sorted({row["depth"] for found in rows.values() for row in found}) or [0]
    near, far = depths[0], depths[-1]
    card, ram = rows["card"], rows["ram"]
    ours, least = _ms(card, "actqkv", "decode", far), _ms(ram, "actqkv", "decode", far)
    reading = [_ms(card, "actqkv", "prefill", depth) for depth in (near, far)]
    read_s = sum(reading) / 2 * far / 1000 if all(reading) else None  # type: ignore[arg-type]
    print(f"weights: {model.stat().st_size / 1e9:.2f} GB; ms per token by engine, phase and depth:")
    for name, found in rows.items():
        for row in found:
            hits = (row["gpu"] or {}).get("hit_rate")
            more = "" if hits is None else f", hit rate {hits:.3f}"
            print(f"  {name:5} {row['engine']:10} {row['phase']:8} {row['depth']:8,} {row['ms_per_token']:9.4f}{more}")
    return {
        f"decode, ms at {far:,} over ms at {near:,}": _at_most(_ratio(ours, _ms(card, "actqkv", "decode", near)), 1.1),
        "the same within 1 GiB": _at_most(_ratio(least, _ms(ram, "actqkv", "decode", near)), 1.1),
        "decode, speed over llama.cpp's with KV on the card": _at_least(
            _ratio(_ms(card, "llama.cpp", "decode", far), ours), 1.4
        ),
        "decode, speed over llama.cpp's with KV in RAM": _at_least(
            _ratio(_ms(ram, "llama.cpp", "decode", far), ours), 5.0
        ),
        f"prefill of {far:,}, seconds (by the rates at both lengths)": _at_most(read_s, 25.0),
        "prefill, ms per token there over at the least length": _at_most(_ratio(reading[1], reading[0]), 1.25),
        "GPU memory besides weights within 1 GiB, MiB": _at_most(_mib_taken(ram, far), 1024.0),
    }


def _compare_million(rows: list[dict[str, Any]]) -> dict[str, Target]:
    depths = sorted({row["depth"] for row in rows}) or [0]
    near, far = (_ms(rows, "actqkv", "decode", depth) for depth in (depths[0], depths[-1]))
    return {
        f"decode, speed at {depths[-1]:,} over speed at {depths[0]:,}": _at_least(_ratio(near, far), 0.8),
        "GPU memory besides weights, MiB": _at_most(_mib_taken(rows, depths[-1]), 2048.0),
    }


# ---- what a machine without network is given


def _site(out: Path) -> Path:
    return out / "site"


def _see_site(out: Path) -> None:
    """Has this process and its children find what was installed there."""
    site = str(_site(out))
    if site not in sys.path and _site(out).exists():
        sys.path.insert(0, site)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    importlib.invalidate_caches()


def install(out: Path, options: argparse.Namespace) -> bool:
    """What tests need, at once; llama-cpp-python with CUDA and actqkv in the background, for `engine` to wait for."""
    if options.pack is None:
        print("skipped: no --pack")
        return True
    pack, site = options.pack.resolve(), _site(out)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site]
    if not run([*pip, *sorted(pack.glob("*.whl"))], out / "install.log", limit_s=60):
        return False
    ended = out / "installed"
    ended.unlink(missing_ok=True)
    building = shlex.join([*map(str, pip), "--no-build-isolation", "--upgrade"])
    native = "-DCMAKE_CUDA_ARCHITECTURES=native -DLLAVA_BUILD=off"
    [llama] = (shlex.quote(str(path)) for path in pack.glob("llama_cpp_python-*.tar.gz"))
    script = f"""
    export CMAKE_ARGS="{native} -DGGML_CUDA=on"
    {building} {llama} || CMAKE_ARGS="{native}" {building} {llama} &&
    {building} {shlex.quote(str(ROOT))}
    echo $? > {shlex.quote(str(ended))}
    """  # where CUDA's libraries are missing, weights stay on the processor, and sessions are tested at least
    subprocess.Popen(
        ["sh", "-c", script],
        stdout=(out / "install-llama.log").open("w"),
        stderr=subprocess.STDOUT,
        cwd=out,
        env=os.environ
        | {"CUDACXX": _nvcc(), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1), "PYTHONPATH": str(site)},
        start_new_session=True,  # it outlives this command
    )
    return True


def _has_actqkv(out: Path) -> bool:
    """Whether actqkv is installed; waits where `install` has begun to."""
    ended = out / "installed"
    if (out / "install-llama.log").exists():
        deadline = min(clock.monotonic() + INSTALL_LIMIT_S, ENDS_AT)
        while not ended.exists() and clock.monotonic() < deadline:
            clock.sleep(1)
        importlib.invalidate_caches()
        status = ended.read_text().strip() if ended.exists() else "not ended"
        log = (out / "install-llama.log").read_text(errors="replace")
        print(f"installation: {status}", "" if status == "0" else log[-4000:], flush=True)
    if find_spec("actqkv_cpp") is None or find_spec("actqkv_cpp._actqkv") is None:
        print("skipped: actqkv is not installed (pip install .)")
        return False
    return True


# ---- times


def time(out: Path, options: argparse.Namespace) -> bool:
    """What every kernel takes, and GB/s of what it has to read beside what a copy reads; a process for each group."""
    ended_well, deadline = True, clock.monotonic() + PART_LIMIT_S["time"]
    for group in GROUPS:
        command = [sys.executable, ROOT / "tests/gpu_times.py", out, group]
        ended_well &= run(command, out / f"time-{group}.log", limit_s=_left(deadline))
    return ended_well


PARTS: dict[str, Callable[[Path, argparse.Namespace], bool]] = {
    "install": install,
    "build": build,
    "check": check,
    "time": time,
    "engine": engine,
    "targets": targets,
    "sanitize": sanitize,
    "million": million,
}
DEFAULT = [name for name in PARTS if name != "million"]
NEED_THE_LIBRARY = ("check", "time", "engine", "sanitize")


def _attempt(name: str, out: Path, options: argparse.Namespace) -> bool:
    """One part, whatever becomes of it."""
    print(f"== {name}", flush=True)
    if name in NEED_THE_LIBRARY and not (out / LIBRARY).exists():
        print("skipped: the kernels were not built")
        return False
    _see_site(out)
    begun = clock.monotonic()
    try:
        return bool(PARTS[name](out, options))
    except Exception:  # a defect of one part hides no other's
        traceback.print_exc()
        return False
    finally:
        print(f"== {name} took {clock.monotonic() - begun:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(DEFAULT), help="parts, with commas between")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu", help="folder for the library, logs and times"
    )
    parser.add_argument("--pack", type=Path, help="what tests/gpu_pack.py made, for a machine without network")
    parser.add_argument("--model", type=Path, help="GGUF model of `targets`; default one of 8B with random weights")
    parser.add_argument("--lengths", default="2k,128k", help="depths of `targets`")
    parser.add_argument("--vram-of-million", default="2g", help="GPU memory that `million` may take besides weights")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    _see_site(out)
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    results = {name: _attempt(name, out, options) for name in wanted}
    print(*(f"{name}: {'ok' if ended_well else 'FAILED'}" for name, ended_well in results.items()), sep="\n")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
