"""Each kernel by itself, with the roofline that it could reach: `actqkv bench --kernels`.

Every call works on other chunks of a working set of at least four times the last-level cache, so that what is read
comes from memory, as it does in a session.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from actqkv_cpp import machine, provenance
from actqkv_cpp.bench.kernel_jobs import Job, Jobs, Shape
from actqkv_cpp.errors import MemoryPlanError

FORMAT = "actqkv-bench-kernels"
FORMAT_VERSION = 1

_CACHES = 4  # the working set, in last-level caches
_UNKNOWN_CACHE_BYTES = 32 << 20  # where the system does not tell
_SAMPLE_S, _QUICK_SAMPLE_S = 0.02, 0.002
_PEAK_SIZE, _PEAK_ROUNDS = 1024, 5  # of the matrix products that give the peak


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What one kernel takes, and what it could.

    Args:
        kernel: its name in kernels.h.
        work: what one call does.
        ms: of one call, the median of the samples.
        spread_ms: least and greatest sample.
        bytes: that one call must read, each once.
        operations: multiplications, additions and exponentials of the formula; where it has none, comparisons.
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
    """All kernels of one run. `to_json()` gives the names of `actqkv bench --kernels --json`.

    Args:
        version, commit, started: as of `bench.Result`.
        machine: as `provenance` describes it, with the measured limits that shares are of.
        shape: what the kernels were called with.
        working_set_bytes: over which the calls of one kernel were spread.
    """

    version: str
    commit: str | None
    started: str
    machine: dict[str, Any]
    shape: Shape
    working_set_bytes: int
    kernels: tuple[Kernel, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "commit": self.commit,
            "started": self.started,
            "machine": self.machine,
            "shape": asdict(self.shape),
            "working_set_bytes": self.working_set_bytes,
            "kernels": [kernel.to_json() for kernel in self.kernels],
        }


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
    run = provenance.describe_run()
    cache = last_level_cache()
    working_set = _CACHES * cache
    free = machine.available_memory()
    if free is not None and 2 * working_set > free:
        raise MemoryPlanError(f"the working set needs {2 * working_set:,} bytes, {free:,} are free", "free some memory")
    bandwidth, peak = provenance.read_bandwidth(n_threads), peak_gop_per_s(n_threads)
    kernels = []
    for job in Jobs(shape, working_set_bytes=working_set, n_threads=n_threads):
        n_sets = max(2, math.ceil(working_set / job.n_bytes))
        samples, n_calls = _time(job, n_sets, repeat=repeat, sample_s=_QUICK_SAMPLE_S if quick else _SAMPLE_S)
        ms = median(samples)
        kernels.append(
            Kernel(
                kernel=job.kernel,
                work=job.work,
                ms=ms,
                spread_ms=(min(samples), max(samples)),
                bytes=job.n_bytes,
                operations=job.n_operations,
                read_share=job.n_bytes / ms / 1e6 / bandwidth,
                compute_share=job.n_operations / ms / 1e6 / peak,
                n=len(samples),
                calls=n_calls,
            )
        )
        if show:
            show(kernels[-1])
    return KernelResult(
        **run,
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


def _time(job: Job, n_sets: int, *, repeat: int, sample_s: float) -> tuple[list[float], int]:
    """Milliseconds of a call in each of `repeat` samples, and calls of a sample: as many as take `sample_s`, each on
    the next set of data."""
    first = job.make(0)
    first()  # what is done once
    begin = time.perf_counter()
    first()
    n_calls = max(1, min(n_sets, int(sample_s / max(time.perf_counter() - begin, 1e-7))))
    samples = []
    for sample in range(repeat):
        calls = [job.make((1 + sample * n_calls + i) % n_sets) for i in range(n_calls)]
        begin = time.perf_counter()
        for call in calls:
            call()
        samples.append(1000 * (time.perf_counter() - begin) / n_calls)
    return samples, n_calls
