"""What libactqkv_cuda tells of this machine's GPUs, through the native module."""

from __future__ import annotations

from pathlib import Path

from actqkv_cpp._native import ffi, lib  # type: ignore[attr-defined]  # the one door to the cffi module
from actqkv_cpp.figures import Cuda, Gpu


def find_cuda(library: Path | None = None) -> Cuda:
    """What our CUDA library, by default the installed one, finds on this machine; starts CUDA where there is a GPU."""

    def text(chars: object) -> str:
        return str(ffi.string(chars).decode("utf-8", "replace"))

    reason = ffi.new("char[]", 512)
    table = lib.actqkv_cuda_load(ffi.NULL if library is None else str(library).encode(), reason, len(reason))
    if table == ffi.NULL:
        return Cuda(library_problem=text(reason) or "out of memory")
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
