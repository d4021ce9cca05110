"""libactqkv_cuda through the native module: what it tells of this machine's GPUs, what a session would take of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actqkv_cpp import _env
from actqkv_cpp._native import (  # type: ignore[attr-defined]  # the one door to the cffi module
    call,
    ffi,
    lib,
    make_params,
    model_pointer,
)
from actqkv_cpp.config import Retrieval
from actqkv_cpp.errors import LibraryError
from actqkv_cpp.figures import Cuda, Gpu, GpuPlan


def text(chars: object) -> str:
    return str(ffi.string(chars).decode("utf-8", "replace"))


def load(library: Path | None = None) -> Any:
    """The library's table of functions. LibraryError with the reason where it does not load.

    Args:
        library: default what ACTQKV_CUDA_LIBRARY names, else the installed one.
    """
    path = library or _env.cuda_library()
    reason = ffi.new("char[]", 512)
    table = lib.actqkv_cuda_load(ffi.NULL if path is None else str(path).encode(), reason, len(reason))
    if table == ffi.NULL:
        raise LibraryError(text(reason) or "out of memory")
    return table


def plan(model: Any, retrieval: Retrieval, *, n_ctx: int, n_threads: int, kv_type: str) -> GpuPlan:
    """What the attention of a session would take of a GPU's memory; allocates nothing."""
    params = make_params(retrieval, n_ctx=n_ctx, n_threads=n_threads, kv_type=kv_type)
    found = ffi.new("struct actqkv_gpu_memory *")
    call(lib.actqkv_gpu_memory_plan, model_pointer(model), params, load(), found)
    return GpuPlan(found.window_bytes, found.least_bytes, found.useful_bytes, found.planning_bytes)


def find_cuda(library: Path | None = None) -> Cuda:
    """What our CUDA library finds on this machine; starts CUDA where there is a GPU. `library` as in `load`."""
    try:
        table = load(library)
    except LibraryError as error:
        return Cuda(library_problem=str(error))
    driver, n = ffi.new("int32_t *"), ffi.new("int32_t *")
    table.driver_version(driver)
    status = table.n_devices(n)
    devices = []
    for index in range(n[0] if status == 0 else 0):
        found = ffi.new("struct actqkv_cuda_device *")
        failed = table.device(index, found)
        devices.append(
            Gpu(
                name=text(found.name),
                capability=(found.major, found.minor),
                memory_bytes=found.memory_bytes,
                free_bytes=found.free_bytes,
                problem=text(table.error_text(failed)) if failed else None,
            )
        )
    return Cuda(
        library_problem=None,
        toolkit=table.toolkit,
        targets=text(table.targets),
        driver=driver[0],
        driver_problem=text(table.error_text(status)) if status else None,
        devices=tuple(devices),
    )
