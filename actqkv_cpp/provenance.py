"""Where figures come from: the machine, the model, and which actqkv measured them. `bench` and `eval` print it."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from actqkv_cpp import __version__, machine
from actqkv_cpp._native import kernel_name

if TYPE_CHECKING:
    from actqkv_cpp import Llama

_BANDWIDTH_BYTES = 256 << 20  # of all threads together: several times a desktop's last-level cache
_BANDWIDTH_ROUNDS = 5
_CPU_INFO = Path("/proc/cpuinfo")


def describe_run() -> dict[str, Any]:
    """Which actqkv measures, and when it began: ISO 8601 in UTC, to the second. At the top of what `--json` says."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"version": __version__, "commit": commit(), "started": started}


def describe_machine(*, n_threads: int) -> dict[str, Any]:
    """What `--json` says under `machine`."""
    verdict = machine.extra_buffers()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": n_threads,
        "load_average": round(os.getloadavg()[0], 2),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernels": kernel_name(),
        "extra_buffers": verdict.safe,
        "system": f"{platform.system()} {platform.release()}",
        "llama_cpp_python": version("llama-cpp-python"),
    }


def describe_model(llm: Llama) -> dict[str, Any]:
    """What `--json` says under `model`."""
    model = llm._model.model
    description = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model, description, len(description))
    return {
        "name": Path(llm.model_path).name,
        "description": description.value.decode("utf-8", "replace").replace(" ?B", ""),  # no size that it names
        "bytes": int(llama_cpp.llama_model_size(model)),
        "parameters": int(llama_cpp.llama_model_n_params(model)),
        "layers": int(llama_cpp.llama_model_n_layer(model)),
        "trained_length": int(llama_cpp.llama_model_n_ctx_train(model)),
    }


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+" where files differ; None where installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        differ = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if differ.returncode else "")


def read_bandwidth(n_threads: int) -> float:
    """GB/s at which `n_threads` read memory in order: the best of a few rounds."""
    parts = [np.ones(_BANDWIDTH_BYTES // n_threads, np.int8) for _ in range(n_threads)]
    best = min(_seconds_to_read(parts) for _ in range(_BANDWIDTH_ROUNDS))
    return sum(part.nbytes for part in parts) / best / 1e9


def resident_bytes() -> int | None:
    """Resident set of this process; None where the system does not tell."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def _seconds_to_read(parts: list[NDArray[np.int8]]) -> float:
    threads = [threading.Thread(target=part.max) for part in parts]  # max of int8 is one vector instruction per line
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def _cpu_name() -> str:
    """Its brand; with family and model where the system tells, since generations share a brand."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        first = _CPU_INFO.read_text().partition("\n\n")[0]  # processor
        pairs = (line.partition(":") for line in first.splitlines())
        facts = {name.strip(): value.strip() for name, _, value in pairs}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name
