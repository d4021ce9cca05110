"""What this installation has and uses: processor, llama-cpp-python, CUDA; and what to do about what is missing."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from actqkv_cpp import __version__, machine
from actqkv_cpp.errors import ActqkvError
from actqkv_cpp.figures import Cuda, Gpu
from actqkv_cpp.gpu import LEAST_CAPABILITY

State = Literal["ok", "unused", "broken"]

_LEAST_FREE_BYTES = 1 << 30  # CUDA's own state and a session's chunks do not start with less
_FEATURES = {  # that our kernels, or llama.cpp's, have versions for
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "sve",
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and the remedy unless all is well.

    state: ok; unused: actqkv runs without it; broken: it does not run.
    """

    what: str
    state: State
    text: str
    remedy: str | None = None


@dataclass(frozen=True)
class LlamaCpp:
    """The installed llama-cpp-python; version None: there is none, expected None: our own metadata is not installed."""

    version: str | None
    expected: str | None
    libraries: tuple[str, ...]

    @property
    def cuda(self) -> bool:
        """Whether it was built with CUDA."""
        return any("ggml-cuda" in name for name in self.libraries)


def diagnose() -> list[Finding]:
    """Everything there is to say, best read in order; never raises for what it finds.

    Example:
        >>> all(finding.state != "broken" for finding in diagnose())
        True
    """
    findings = [Finding("actqkv", "ok", f"{__version__}, Python {platform.python_version()}, {platform.system()}")]
    installed = find_llama_cpp()
    findings += judge_llama_cpp(installed)
    try:
        from actqkv_cpp import _cuda, _native  # noqa: PLC0415 (heavy, and what may not load)

        kernels, threaded, cuda = _native.kernel_name(), _native.has_threads(), _cuda.find_cuda()
    except ActqkvError as error:
        return [*findings, Finding("libactqkv", "broken", str(error), error.hint)]
    findings += judge_processor(kernels, threaded=threaded)
    gpu = list(judge_cuda(cuda, installed))
    return [*findings, *gpu, summary(gpu)]


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """What `doctor --json` prints."""
    return {"runs": all(one.state != "broken" for one in findings), "findings": [asdict(one) for one in findings]}


# ---- llama-cpp-python


def find_llama_cpp() -> LlamaCpp:
    """Without importing it, which may fail."""
    try:
        found = version("llama-cpp-python")
    except PackageNotFoundError:
        found = None
    expected = None
    with suppress(PackageNotFoundError):
        pins = [re.match(r"llama-cpp-python==([\w.]+)", line) for line in requires("actqkv") or []]
        expected = next((pin[1] for pin in pins if pin), None)
    spec = find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    names = sorted({path.name for path in folder.glob("lib*")}) if folder and folder.is_dir() else []
    return LlamaCpp(found, expected, tuple(names))


def judge_llama_cpp(found: LlamaCpp) -> Iterator[Finding]:
    """Whether it is there and the one we were built with."""
    what = "llama-cpp-python"
    install = f"pip install llama-cpp-python=={found.expected}" if found.expected else "pip install actqkv"
    if found.version is None:
        yield Finding(what, "broken", "not installed", install)
    elif found.expected and found.version != found.expected:
        yield Finding(what, "broken", f"{found.version}, actqkv was built with {found.expected}", install)
    elif not found.libraries:
        yield Finding(
            what, "broken", f"{found.version} has no libraries", f"{install} --force-reinstall --no-cache-dir"
        )
    else:
        backends = [re.sub(r"^libggml-|\..*$", "", name) for name in found.libraries if "libggml-" in name]
        named = ", ".join(dict.fromkeys(name for name in backends if name != "base"))
        yield Finding(what, "ok", f"{found.version}, backends: {named or 'none of their own'}")


def cuda_build(found: LlamaCpp) -> str:
    """The one command that gives llama-cpp-python CUDA."""
    pinned = found.expected or found.version
    package = "llama-cpp-python" + (f"=={pinned}" if pinned else "")
    return f"CMAKE_ARGS=-DGGML_CUDA=on pip install --no-cache-dir --force-reinstall {package}"


# ---- processor


def judge_processor(kernels: str, *, threaded: bool) -> Iterator[Finding]:
    """Its features, which kernels run on it, on how many threads, and llama.cpp's extra buffer types."""
    flags = sorted(_FEATURES & set(machine._cpu_flags().split()))
    features = " ".join(flags) or platform.machine()
    yield Finding("processor", "ok", f"{machine.available_cores()} cores, {features}; kernels: {kernels}")
    if not threaded:
        yield Finding(
            "threads",
            "unused",
            "the kernels run on one: they were built without OpenMP",
            "install the compiler's OpenMP, for example libomp-dev, or libomp of Homebrew, and install actqkv again",
        )
    verdict = machine.extra_buffers()
    what = "repacked weights"
    if verdict.safe:
        yield Finding(what, "ok", f"used ({verdict.reason})")
    else:
        yield Finding(
            what,
            "unused",
            f"not used: {verdict.reason}",
            "build llama-cpp-python with a newer compiler, gcc 13 or clang",
        )


# ---- CUDA


def judge_cuda(cuda: Cuda, llama: LlamaCpp) -> Iterator[Finding]:
    """Our kernels, the driver, every GPU, llama-cpp-python's build. Stops where the rest cannot be known."""
    if cuda.library_problem is not None:
        yield Finding(
            "CUDA kernels",
            "unused",
            f"not installed: {cuda.library_problem}",
            "install NVIDIA's CUDA toolkit, put nvcc on PATH or into CUDACXX, and install actqkv again",
        )
        return
    yield Finding("CUDA kernels", "ok", f"built with CUDA {_version(cuda.toolkit)} for {cuda.targets}")
    yield _judge_driver(cuda)
    for index, device in enumerate(cuda.devices):
        yield _judge_device(index, device)
    if not llama.cuda:
        yield Finding("weights on a GPU", "unused", "llama-cpp-python was built without CUDA", cuda_build(llama))
    else:
        yield Finding("weights on a GPU", "ok", "llama-cpp-python was built with CUDA")


def _judge_driver(cuda: Cuda) -> Finding:
    what, found = "driver", f"supports CUDA {_version(cuda.driver)}"
    if cuda.driver == 0:
        return Finding(what, "unused", "none is loaded", "install NVIDIA's driver, and look whether nvidia-smi runs")
    if cuda.driver // 1000 < cuda.toolkit // 1000:
        return Finding(
            what,
            "unused",
            f"{found}, the kernels were built with {_version(cuda.toolkit)}",
            f"update the driver, or install actqkv again with the nvcc of CUDA {cuda.driver // 1000}",
        )
    if cuda.driver_problem is not None:
        return Finding(what, "unused", f"{found}: {cuda.driver_problem}", "look whether nvidia-smi runs")
    if not cuda.devices:
        return Finding(what, "unused", f"{found} and sees no GPU", "look at CUDA_VISIBLE_DEVICES and nvidia-smi")
    return Finding(what, "ok", found)


def _judge_device(index: int, device: Gpu) -> Finding:
    what = f"GPU {index}"
    if device.problem is not None:
        free = "see in nvidia-smi which process has its memory" if "memory" in device.problem else "restart the machine"
        return Finding(what, "unused", f"{device.name}: {device.problem}", free)
    gib = 1 << 30
    capability = ".".join(map(str, device.capability))
    text = f"{device.name}, {capability}, {device.free_bytes / gib:.1f} of {device.memory_bytes / gib:.1f} GiB free"
    if device.capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return Finding(what, "unused", f"{text}: older than {least}", "nothing: sessions attend on the processor")
    if device.free_bytes < _LEAST_FREE_BYTES:
        return Finding(what, "unused", f"{text}: too little", "see in nvidia-smi which process has its memory")
    return Finding(what, "ok", text)


def summary(gpu: Sequence[Finding]) -> Finding:
    """What a session uses."""
    missing = [one.what for one in gpu if one.state != "ok"]
    why = f"; not ready for a GPU: {', '.join(missing)}" if missing else ""
    attends = {one.what for one in gpu if one.state == "ok"}
    where = "GPU 0" if {"CUDA kernels", "driver", "GPU 0"} <= attends else "the processor"
    return Finding("in use", "ok", f"sessions attend on {where}{why}")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
