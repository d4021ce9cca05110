"""The machine a benchmark ran on: its name, its memory, and how fast memory can be read."""

from __future__ import annotations

import os
import platform
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp import machine
from actqkv_cpp._native import kernel_name

_BANDWIDTH_BYTES = 256 << 20  # of all threads together: several times a desktop's last-level cache
_BANDWIDTH_ROUNDS = 5


def describe(*, n_threads: int) -> dict[str, Any]:
    """What `bench --json` says under `machine`. Takes a fraction of a second, for the bandwidth."""
    verdict = machine.extra_buffers()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": n_threads,
        "load_average": round(os.getloadavg()[0], 2),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "read_gb_per_s": round(read_bandwidth(n_threads), 1),
        "kernels": kernel_name(),
        "extra_buffers": verdict.safe,
        "system": f"{platform.system()} {platform.release()}",
        "llama_cpp_python": version("llama-cpp-python"),
    }


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
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
