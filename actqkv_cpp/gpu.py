"""Where a session attends: on a GPU where there is one, within the bytes of its memory that were granted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from actqkv_cpp.errors import GpuMemoryError
from actqkv_cpp.figures import Cuda, GpuPlan

LEAST_CAPABILITY = (8, 0)  # the tensor cores' instructions that our kernels use came with Ampere
SPARE_BYTES = 512 << 20  # of free memory, left to CUDA and to whoever else uses the GPU, unless --vram says otherwise
_MIB = 1 << 20


@dataclass(frozen=True)
class GpuUse:
    """Attention runs on GPU `device`, called `name`, and takes at most `limit_bytes` of its memory.

    With `planning_bytes` or more, answering steps are planned there too; 0: never, or not known. `problem` costs time
    only.
    """

    device: int
    name: str
    limit_bytes: int
    planning_bytes: int = field(default=0, compare=False)
    problem: str | None = field(default=None, compare=False)
    there: ClassVar[bool] = True

    def __str__(self) -> str:
        apart = self.limit_bytes < self.planning_bytes
        plans = f"; its plans on the processor, there from {mib(self.planning_bytes)} on" if apart else ""
        return f"GPU {self.device} ({self.name}), at most {mib(self.limit_bytes)} of its memory{plans}" + (
            f"; {self.problem}" if self.problem else ""
        )


@dataclass(frozen=True)
class NoGpu:
    """Attention runs on the processor, since `reason`; `remedy` helps, or is None.

    there: there is a GPU, so that not using it is worth a word.
    """

    reason: str
    remedy: str | None = None
    there: bool = False

    def __str__(self) -> str:
        return f"the processor: {self.reason}" + (f" ({self.remedy})" if self.remedy else "")


def mib(n_bytes: int) -> str:
    """Bytes rounded up: "512 MiB"."""
    return f"{-(-n_bytes // _MIB):,} MiB"


def find(cuda: Cuda, device: int) -> NoGpu | None:
    """What keeps `device` from being used, whatever the session; None: nothing."""
    if cuda.library_problem is not None:
        return NoGpu(f"the CUDA kernels do not load: {cuda.library_problem}", "actqkv doctor has more")
    if cuda.driver == 0:
        return NoGpu("no NVIDIA driver is loaded", "look whether nvidia-smi runs")
    if cuda.driver_problem is not None:
        return NoGpu(f"the NVIDIA driver fails: {cuda.driver_problem}", "actqkv doctor has more")
    if not 0 <= device < len(cuda.devices):
        return NoGpu(f"there is no GPU {device}, {len(cuda.devices)} are visible", "look at CUDA_VISIBLE_DEVICES")
    found = cuda.devices[device]
    if found.problem is not None:
        return NoGpu(f"GPU {device} ({found.name}): {found.problem}", "nvidia-smi shows who uses it", there=True)
    if found.capability < LEAST_CAPABILITY:
        have, least = (".".join(map(str, version)) for version in (found.capability, LEAST_CAPABILITY))
        return NoGpu(f"GPU {device} ({found.name}) has compute capability {have}, {least} is needed", there=True)
    return None


def default_limit(free_bytes: int, weights_bytes: int = 0) -> int:
    """Bytes of a GPU's memory that attention may take unless --vram says how many: what weights that are still to come
    leave of what is free, but for SPARE_BYTES."""
    return max(free_bytes - weights_bytes - SPARE_BYTES, 0)


def choose(cuda: Cuda, device: int, plan: GpuPlan, limit_bytes: int, *, asked: bool) -> GpuUse | NoGpu:
    """Whether a session of this plan attends on `device`, and with how much of its memory.

    Args:
        limit_bytes: that may be taken; more than is of use is not.
        asked: the user said so many; else what is free may have become less, and the processor will do.

    Raises:
        GpuMemoryError: what was asked for is less than the session needs there, or more than is free.
    """
    problem = find(cuda, device)
    if problem is not None:
        return problem
    found = cuda.devices[device]
    parts = f"{mib(plan.window_bytes)} for a window and open blocks, the rest for the chunks that a step attends"
    if not asked:
        limit = min(limit_bytes, default_limit(found.free_bytes), plan.useful_bytes)
        if limit >= plan.least_bytes:
            return GpuUse(device, found.name, limit, plan.planning_bytes)
        return NoGpu(
            f"GPU {device} ({found.name}) has {mib(found.free_bytes)} free, of which attention may take {mib(limit)} "
            f"and needs {mib(plan.least_bytes)}",
            "a smaller budget needs less",
            there=True,
        )
    if limit_bytes < plan.least_bytes:
        raise GpuMemoryError(
            f"vram is {mib(limit_bytes)}, attention on a GPU needs at least {mib(plan.least_bytes)}: {parts}",
            f"give vram {-(-plan.least_bytes // _MIB)}m or more, a smaller budget, or vram 0: on the processor",
        )
    limit = min(limit_bytes, plan.useful_bytes)
    if limit > found.free_bytes:
        raise GpuMemoryError(
            f"attention is to take {mib(limit)} of GPU {device} ({found.name}), which has {mib(found.free_bytes)} free",
            "give a smaller vram, end what else uses the GPU (nvidia-smi shows it), or give vram 0: on the processor",
        )
    return GpuUse(device, found.name, limit, plan.planning_bytes)


@dataclass(frozen=True)
class Layers:
    """`n` of `most` layers of a model go to the GPU, the output counting as one; `reason`: why not more, or None."""

    n: int
    most: int
    reason: str | None = None
    n_bytes: int = 0  # that they take, at most

    def __str__(self) -> str:
        count = f"{self.n} of {self.most}" if self.most else f"{self.n}"
        return f"{count} layers on the GPU" + (f": {self.reason}" if self.reason else "")


def choose_layers(
    wanted: int | None, n_layer: int, weights_bytes: int, free_bytes: int, reserve_bytes: int, *, share: float = 1.0
) -> Layers:
    """How many layers go to GPUs.

    Args:
        wanted: as many; -1: all; None: as many as fit.
        weights_bytes: of the model's files. A layer is taken to have an equal part of them, which is more than it has
            where the embedding, which stays on the processor, is large.
        free_bytes: of all GPUs together.
        reserve_bytes: of `free_bytes`, kept for attention, which runs on one of them.
        share: of the weights, that come to that one.

    Raises:
        GpuMemoryError: the layers asked for do not fit; names the plan, and how many do.
    """
    most = n_layer + 1
    each = -(-weights_bytes // most)
    fitting = max(min(int(free_bytes - reserve_bytes / share) // each, most), 0)
    if wanted is None:
        short = f"of {mib(weights_bytes)} of weights no more fit beside {mib(reserve_bytes)} for attention"
        reason = None if fitting == most else f"{short}, {mib(free_bytes)} are free"
        return Layers(fitting, most, reason, fitting * each)
    n = most if wanted < 0 else min(wanted, most)
    if n > fitting:
        raise GpuMemoryError(
            f"{n} of {most} layers take {mib(n * each)} of GPU memory and attention {mib(reserve_bytes)}, "
            f"{mib(free_bytes)} are free",
            f"give n_gpu_layers {fitting}, a smaller vram, or end what else uses the GPU (nvidia-smi shows it)",
        )
    return Layers(n, most, None, n * each)
