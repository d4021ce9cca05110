"""Has the sessions of one model attend on a GPU, or on the processor with the reason why."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import llama_cpp

from actqkv_cpp import _cuda, doctor, gpu, modelfile
from actqkv_cpp._native import Session, methods
from actqkv_cpp.config import Retrieval, parse_bytes
from actqkv_cpp.errors import ComputeError, GpuMemoryError, MemoryPlanError
from actqkv_cpp.figures import Cuda
from actqkv_cpp.gpu import GpuUse, Layers, NoGpu

ATTENTION_BYTES = 1 << 30  # kept free of weights unless `vram` says how much: enough for 128K tokens
_ELSEWHERE = "give a smaller vram, or vram 0: on the processor"


def _unfit(retrieval: Retrieval) -> NoGpu | None:
    """Why a session of this kind attends on the processor wherever it is; None: it does not."""
    row = methods()[retrieval.method]
    granularity, prefill, decode = (
        getattr(retrieval, name) or row[name] for name in ("granularity", "prefill", "decode")
    )
    if granularity == "kv_head":
        return NoGpu(f"{retrieval.method} has a list of chunks per KV head", there=True)
    if prefill == decode == "all":
        return NoGpu(f"{retrieval.method} attends everything", there=True)
    return None


class Placement:
    """Where sessions attend. First layers(), then the model is loaded, then plan() and enter().

    Args:
        vram: bytes of the GPU's memory that attention may take, "6g" or a number; None: what is of use, as far as it is
            free; 0: none.
        device: the GPU's number.
        spread: weights go to all GPUs, by what is free there, as llama.cpp does; else to that one.

    Attributes:
        vram: in bytes, or None.
        limit_bytes: that attention takes at most, whatever becomes free later; known by layers().

    Raises:
        ParameterError: `vram` is no size.
    """

    def __init__(self, vram: int | str | None, device: int, *, spread: bool = True) -> None:
        self.vram = None if vram is None else parse_bytes(vram)
        self.limit_bytes = self.vram or 0
        self._device, self._spread = device, spread
        self._planned: GpuUse | NoGpu = NoGpu("llama.cpp runs the model")

    def layers(self, path: str, wanted: int | None) -> Layers:
        """How many layers of the model at `path` go to GPUs, by what is free there now; loads nothing but its metadata.

        Args:
            wanted: as many; -1: all; None: as many as fit beside attention.

        Raises:
            GpuMemoryError: the layers asked for do not fit.
        """
        layers = self._choose_layers(path, wanted)
        if self.vram is None:
            cuda = _cuda.find_cuda()
            usable = gpu.find(cuda, self._device) is None
            free = cuda.devices[self._device].free_bytes if usable else 0
            self.limit_bytes = gpu.default_limit(free, math.ceil(layers.n_bytes * self._weights(cuda)[1]))
        return layers

    def _weights(self, cuda: Cuda) -> tuple[int, float]:
        """Free bytes of the GPUs that weights go to, and which share of them comes to the one that attends."""
        here = cuda.devices[self._device].free_bytes if self._device < len(cuda.devices) else 0
        if not self._spread:
            return here, 1.0
        free = sum(one.free_bytes for one in cuda.devices if one.problem is None)
        return free, here / free if here else 1.0

    def _choose_layers(self, path: str, wanted: int | None) -> Layers:
        if wanted == 0:
            return Layers(0, 0)
        cuda = _cuda.find_cuda()
        if not llama_cpp.llama_supports_gpu_offload():
            of_use = wanted is not None or gpu.find(cuda, self._device) is None
            command = doctor.cuda_build(doctor.find_llama_cpp())
            reason = f"llama-cpp-python was built without CUDA, this builds it: {command}"
            return Layers(0, 0, reason if of_use else None)
        if not cuda.devices:  # a GPU of another kind: libllama alone knows it
            return Layers(0 if wanted is None else wanted, 0)
        reserve = ATTENTION_BYTES if self.vram is None else self.vram
        free, share = self._weights(cuda)
        free -= int(gpu.SPARE_BYTES / share)
        return gpu.choose_layers(wanted, *modelfile.sizes(path), free, reserve, share=share)

    def fewer(self, path: str, failed: Layers, why: str) -> Layers:
        """What to try where libllama failed to load so many layers: as many as fit now, and a quarter less. Attention
        keeps its limit."""
        n = min(self._choose_layers(path, None).n, failed.n * 3 // 4)
        return Layers(n, failed.most, f"no more could be loaded ({why})", failed.n_bytes * n // failed.n)

    def expected(self, retrieval: Retrieval) -> GpuUse | NoGpu:
        """Where sessions of this kind will attend, before anything is loaded, with as much as they may take at most."""
        if self.vram == 0:
            return NoGpu("vram is 0")
        cuda = _cuda.find_cuda()
        problem = gpu.find(cuda, self._device) or _unfit(retrieval)
        return problem or GpuUse(self._device, cuda.devices[self._device].name, self.limit_bytes)

    def plan(self, model: Any, retrieval: Retrieval, *, n_ctx: int, n_threads: int, kv_type: str) -> None:
        """Decide for sessions of this kind; allocates nothing but CUDA's own state.

        Raises:
            GpuMemoryError: `vram` is less than such a session needs, or more than is free.
        """
        self._planned = self.expected(retrieval)
        if isinstance(self._planned, GpuUse):
            needs = _cuda.plan(model, retrieval, n_ctx=n_ctx, n_threads=n_threads, kv_type=kv_type)
            asked = self.vram is not None
            self._planned = gpu.choose(_cuda.find_cuda(), self._device, needs, self.limit_bytes, asked=asked)

    def enter(self, session: Session) -> None:
        """Have a session attend where it was planned.

        Raises:
            GpuMemoryError: another process took the memory meanwhile, and `vram` was given; else the reason is kept.
        """
        if isinstance(self._planned, NoGpu):
            return
        try:
            session.use_gpu(_cuda.load(), self._planned.device, self._planned.limit_bytes)
        except (MemoryPlanError, ComputeError) as error:
            if self.vram is not None:
                raise GpuMemoryError(str(error), _ELSEWHERE) from error
            self._planned = NoGpu(str(error), there=True)

    def found(self, session: Session | None) -> GpuUse | NoGpu:
        """Where `session` attends now, and what keeps it from being fast there: a GPU that failed is left."""
        if session is None or session.closed or isinstance(self._planned, NoGpu):
            return self._planned
        if session.stats().gpu.n_slots:
            return replace(self._planned, problem=session.gpu_problem)
        return NoGpu(session.gpu_problem or "this session was not taken there", there=True)
