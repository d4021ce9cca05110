"""On a machine with an NVIDIA GPU: builds the CUDA kernels for it, checks them, and measures them.

    python tests/gpu.py --all              # everything, a million tokens included, as long as it takes
    python tests/gpu.py                    # all but `million`, in at most nine minutes
    python tests/gpu.py --only build,time  # some of it
    python tests/gpu.py --limit 3600       # seconds that each part may take, and no end for all of them

Needs nvcc and Python with NumPy, pytest and cffi. The parts `engine`, `targets` and `million` also need an installed
actqkv, the latter two a llama-cpp-python built with CUDA (actqkv doctor has the command). `targets` and `million` take
--model, else they write one of Llama-8B's shape with random weights, for which they need the package gguf. Every part
runs even if one before it failed, each in processes of its own, and ends as ok, FAILED, or skipped with the reason; the
exit status is 1 if any failed. Logs, times and `targets.json` go to --out.

A machine without network gets what it needs from a folder, made elsewhere by tests/gpu_pack.py:

    python tests/gpu.py --pack FOLDER --all
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
SANITIZED_SESSIONS = "cuda and (keys and planned_there or default and those_of_the_cpu)"
NOT_INSTALLED = "actqkv is not installed (pip install .)"
MIB = 1 << 20
PART_LIMIT_S = {
    "install": 90,
    "build": 300,
    "check": 120,
    "time": 120,
    "engine": 90,
    "targets": 200,
    "sanitize": 150,
    "million": 540,
}
WHOLE_LIMIT_S = 540  # of a run without --all or --limit: machines that are lent end a command after 10 minutes
INSTALL_LIMIT_S = 400  # that `engine` waits for an installation
LIMIT_OF_TARGETS = "1g"  # of GPU memory besides weights
FIFTH_OF_HARBOUR = "26m"  # slots for every fifth chunk of examples/harbour.txt


class Skipped(Exception):
    """A part cannot run here, and that is no failure; the text is the reason."""


def run(command: list[Any], log: Path, *, limit_s: float, **env: str) -> bool:
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
        timer = threading.Timer(limit_s, _end, [child])
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


def _left(options: argparse.Namespace) -> float:
    """Seconds that the part has left, and at least one."""
    return max(options.ends_at - clock.monotonic(), 1)


def _nvcc() -> str:
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def build(out: Path, options: argparse.Namespace) -> bool:
    """The library for the GPU that is here, each file with its registers and spills in the log."""
    nvcc = _nvcc()
    flags = ["-std=c++17", "-O3", "-arch=native", "-lineinfo", "-Xptxas=-v", "-Xcompiler=-fPIC,-Wall", f"-I{CUDA}"]
    sources = sorted(CUDA.glob("*.cu"))
    seen = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv"]
    run(seen, out / "gpu.log", limit_s=30)

    def compiled(source: Path) -> bool:
        command = [nvcc, *flags, "-c", source, "-o", out / f"{source.stem}.o"]
        return run(command, out / f"build-{source.stem}.log", limit_s=_left(options))

    with ThreadPoolExecutor() as pool:
        if not all(list(pool.map(compiled, sources))):
            return False
    objects = [out / f"{source.stem}.o" for source in sources]
    return run([nvcc, "-shared", "-o", out / LIBRARY, *objects], out / "link.log", limit_s=_left(options))


def _tests(*more: str, files: Sequence[Path] = (OPS,)) -> list[Any]:
    options = [f"--confcutdir={OPS}", f"--ignore={NEEDS_THE_HOST}", "-c", ROOT / "pyproject.toml", "-m", "cuda"]
    return [sys.executable, "-m", "pytest", *options, *more, *files]


def check(out: Path, options: argparse.Namespace) -> bool:
    """Every op test against NumPy, a process per file: a kernel that fails may take the GPU's state with it."""
    ended_well = True
    for file in sorted(set(OPS.glob("test_*.py")) - {NEEDS_THE_HOST}):
        limit_s, env = _left(options), {"ACTQKV_TEST_CUDA": str(out / LIBRARY)}
        ended_well &= run(_tests("--tb=short", files=[file]), out / f"check-{file.stem}.log", limit_s=limit_s, **env)
    return ended_well


def sanitize(out: Path, options: argparse.Namespace) -> bool:
    """Small shapes under compute-sanitizer: memory, races in shared memory, what is read before it is written; and
    sessions, whose copies and streams are looked at for memory, where actqkv is installed.
    """
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise Skipped("there is no compute-sanitizer: it comes with the CUDA toolkit")
    library = str(out / LIBRARY)
    ops = {"ACTQKV_TEST_CUDA": library}
    runs: list[tuple[str, str, list[Any], dict[str, str]]] = [
        (kind, kind, _tests("-x", "-k", SANITIZED), ops) for kind in KINDS
    ]
    if _is_installed():
        runs.append(
            ("sessions", "memcheck", _sessions("-x", "-k", SANITIZED_SESSIONS), {"ACTQKV_CUDA_LIBRARY": library})
        )
    else:
        print(f"sessions are left out: {NOT_INSTALLED}")
    ended_well = True
    for i, (name, kind, tests, env) in enumerate(runs):
        command = [tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all", *tests]
        ended_well &= run(command, out / f"sanitize-{name}.log", limit_s=_left(options) / (len(runs) - i), **env)
    return ended_well


# ---- sessions

SESSIONS = ROOT / "tests/engine/test_on_gpu.py"


def _sessions(*more: str, files: Sequence[Path] = (SESSIONS,)) -> list[Any]:
    return [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-m", "", *more, *files]


def engine(out: Path, options: argparse.Namespace) -> bool:
    """Logits of sessions that attend on the GPU, and of models with layers there, against the CPU's; then the command
    line on the bundled model, with and without the GPU, where it has room for a part of the chunks.
    """
    _need_actqkv(out, options)
    env = {"ACTQKV_CUDA_LIBRARY": str(out / LIBRARY)}
    command = _sessions(
        "-k", "not emulated", "-ra", "--tb=short", files=[SESSIONS, ROOT / "tests/engine/test_devices.py"]
    )
    ended_well = run(command, out / "engine.log", limit_s=_left(options), **env)
    answers = []
    for vram in (FIFTH_OF_HARBOUR, "0"):
        ask = [sys.executable, "-m", "actqkv_cpp", "ask", "-d", ROOT / "examples/harbour.txt", "--json", "-q"]
        log = out / f"ask-vram-{vram}.log"
        question = ["--vram", vram, "--gpu-layers", "0", "--max-tokens", "32", "Who was elected in Sussith?"]
        ended_well &= run([*ask, *question], log, limit_s=_left(options), **env)
        answers.append(_object_in(log))
    on_gpu, on_cpu = answers
    traffic = on_gpu.get("gpu")
    if not ended_well or not traffic:
        return False
    rate = traffic["n_hits"] / max(traffic["n_hits"] + traffic["n_misses"], 1)
    print(
        f"hit rate with slots for a fifth of the chunks {rate:.3f}, wanted 0.8 (native/README.md, On a GPU); {traffic}"
    )
    same = [a["answer"] for a in on_gpu["answers"]] == [a["answer"] for a in on_cpu["answers"]]
    return same and traffic["n_hits"] > 0 and traffic["n_misses"] > 0


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
    return model if model.exists() or run(make, out / "model.log", limit_s=_left(options)) else None


def _need_weights_on_gpu(out: Path, options: argparse.Namespace) -> None:
    """Skips where llama-cpp-python has no CUDA: llama.cpp, and our weights, would be timed on the processor."""
    look = "import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_gpu_offload())"
    if not run([sys.executable, "-c", look], out / "offload.log", limit_s=_left(options)):
        raise Skipped("llama-cpp-python was built without CUDA (actqkv doctor has the command)")


def _copy_gb_per_s(out: Path, options: argparse.Namespace) -> float | None:
    """Of a copy on the GPU, as `time` measured it, or measured now; None: it cannot be."""
    times = out / "times-copies.json"
    copies = [sys.executable, ROOT / "tests/gpu_times.py", out, "copies"]
    if not times.exists() and not run(copies, out / "time-copies.log", limit_s=_left(options)):
        return None
    rates = {row["what"]: row["gb_per_s"] for row in json.loads(times.read_text())}
    return float(rates["copy on the GPU"])


def targets(out: Path, options: argparse.Namespace) -> bool:
    """What is wanted at the greatest length within 1 GiB of GPU memory beside weights: `actqkv bench` beside llama.cpp
    with its keys and values on the card, and beside llama.cpp with them in RAM.
    """
    _need_actqkv(out, options)
    _need_weights_on_gpu(out, options)
    model = _model(out, options)
    if model is None:
        return False
    sizes = ("--lengths", options.lengths, "--vram", LIMIT_OF_TARGETS)
    rows = {
        "card": _bench(out, "card", model, *sizes, limit_s=_left(options) / 2),
        "ram": _bench(out, "ram", model, *sizes, "--peer-kv-in-ram", limit_s=_left(options)),
    }
    _tell_times(rows, _copy_gb_per_s(out, options))
    return _told(out / "targets.json", _compare(rows))


def million(out: Path, options: argparse.Namespace) -> bool:
    """A million tokens in q8_0 within 2 GiB."""
    _need_actqkv(out, options)
    _need_weights_on_gpu(out, options)
    model = _model(out, options)
    if model is None:
        return False
    sizes = ["--lengths", "2k,1m", "--kv-type", "q8_0", "--vram", options.vram_of_million]
    rows = _bench(out, "million", model, *sizes, limit_s=_left(options))
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


def _tell_times(rows: dict[str, list[dict[str, Any]]], copy_gb_per_s: float | None) -> None:
    """Every row, and llama.cpp's floors: a step reads all weights, keys and values, at the speed of a copy at best."""
    print("ms per token by engine, phase and depth:")
    for name, found in rows.items():
        for row in found:
            hits = (row["gpu"] or {}).get("hit_rate")
            more = "" if hits is None else f", hit rate {hits:.3f}"
            print(f"  {name:5} {row['engine']:10} {row['phase']:8} {row['depth']:8,} {row['ms_per_token']:9.4f}{more}")
    for row in rows["card"]:
        if (held := row["memory"]) and copy_gb_per_s:
            n_bytes = held["weights_bytes"] + held["kv_bytes"]
            floor = f"{n_bytes / copy_gb_per_s / 1e6:.4f} ms: {n_bytes / 1e9:.2f} GB at {copy_gb_per_s:.0f} GB/s"
            print(f"floor of llama.cpp's decode at {row['depth']:,}, keys and values on the card: {floor}")


def _compare(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Target]:
    """Of the least and the greatest length."""
    depths = sorted({row["depth"] for found in rows.values() for row in found}) or [0]
    near, far = depths[0], depths[-1]
    card, ram = rows["card"], rows["ram"]
    ours = _ms(card, "actqkv", "decode", far)
    reading = [_ms(card, "actqkv", "prefill", depth) for depth in (near, far)]
    read_s = sum(reading) / 2 * far / 1000 if all(reading) else None  # type: ignore[arg-type]
    return {
        f"decode, ms at {far:,} over ms at {near:,}": _at_most(_ratio(ours, _ms(card, "actqkv", "decode", near)), 1.1),
        "decode, speed over llama.cpp's with KV on the card": _at_least(
            _ratio(_ms(card, "llama.cpp", "decode", far), ours), 1.4
        ),
        "decode, speed over llama.cpp's with KV in RAM": _at_least(
            _ratio(_ms(ram, "llama.cpp", "decode", far), _ms(ram, "actqkv", "decode", far)), 5.0
        ),
        f"prefill of {far:,}, seconds (by the rates at both lengths)": _at_most(read_s, 25.0),
        "prefill, ms per token there over at the least length": _at_most(_ratio(reading[1], reading[0]), 1.25),
        "GPU memory besides weights in the same run, MiB": _at_most(_mib_taken(card, far), 1024.0),
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
        raise Skipped("no --pack: what is installed is used")
    pack, site = options.pack.resolve(), _site(out)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site]
    if not run([*pip, *sorted(pack.glob("*.whl"))], out / "install.log", limit_s=_left(options)):
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


def _is_installed() -> bool:
    return find_spec("actqkv_cpp") is not None and find_spec("actqkv_cpp._actqkv") is not None


def _need_actqkv(out: Path, options: argparse.Namespace) -> None:
    """Waits where `install` has begun, which moves the part's end; skips where nobody has installed actqkv."""
    ended = out / "installed"
    if (out / "install-llama.log").exists():
        begun, most_s = clock.monotonic(), min(INSTALL_LIMIT_S, options.all_end_at - clock.monotonic())
        while not ended.exists() and clock.monotonic() < begun + most_s:
            clock.sleep(1)
        options.ends_at = min(options.ends_at + clock.monotonic() - begun, options.all_end_at)
        importlib.invalidate_caches()
        status = ended.read_text().strip() if ended.exists() else "not ended"
        log = (out / "install-llama.log").read_text(errors="replace")
        print(f"installation: {status}", "" if status == "0" else log[-4000:], flush=True)
        _see_site(out)
    if not _is_installed():
        if options.pack is not None:
            raise RuntimeError("actqkv was not installed from --pack: install-llama.log has the reason")
        raise Skipped(NOT_INSTALLED)


# ---- times


def time(out: Path, options: argparse.Namespace) -> bool:
    """What every kernel takes, and GB/s of what it has to read beside what a copy reads; a process for each group."""
    ended_well = True
    for group in GROUPS:
        command = [sys.executable, ROOT / "tests/gpu_times.py", out, group]
        ended_well &= run(command, out / f"time-{group}.log", limit_s=_left(options))
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
NEED_THE_LIBRARY = ("check", "time", "engine", "targets", "sanitize", "million")
FAILED = "FAILED"


def _attempt(name: str, out: Path, options: argparse.Namespace) -> str:
    """What became of one part: "ok", "FAILED", or "skipped: REASON"."""
    print(f"== {name}", flush=True)
    if name in NEED_THE_LIBRARY and not (out / LIBRARY).exists():
        print("the kernels were not built: the part `build` does")
        return FAILED
    _see_site(out)
    begun = clock.monotonic()
    options.ends_at = min(begun + (options.limit or PART_LIMIT_S[name]), options.all_end_at)
    try:
        return "ok" if PARTS[name](out, options) else FAILED
    except Skipped as reason:
        return f"skipped: {reason}"
    except Exception:  # a defect of one part hides no other's
        traceback.print_exc()
        return FAILED
    finally:
        print(f"== {name} took {clock.monotonic() - begun:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", default=",".join(DEFAULT), help="parts, with commas between")
    which.add_argument("--all", action="store_true", help="all parts, `million` too, as long as they take together")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="that each part may take; default by part")
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
    whole = options.all or options.limit is not None
    options.all_end_at = float("inf") if whole else clock.monotonic() + WHOLE_LIMIT_S
    wanted = list(PARTS) if options.all else options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    results = {name: _attempt(name, out, options) for name in wanted}
    print(*(f"{name}: {became}" for name, became in results.items()), sep="\n")
    return 1 if FAILED in results.values() else 0


if __name__ == "__main__":
    sys.exit(main())
