"""Breaks when doctor misses what is wrong with an installation, or names a remedy that does not help."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from actqkv_cpp import _cuda, _native, doctor, machine
from actqkv_cpp.doctor import Finding, LlamaCpp
from actqkv_cpp.figures import Cuda, Gpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
from cuda_library import build_emulated

GIB = 1 << 30
CARD = Gpu("Card", (8, 9), 24 * GIB, 20 * GIB)
READY = Cuda(None, 13000, "80 86", 13010, None, (CARD,))
BUILT = LlamaCpp("0.3.36", "0.3.36", ("libggml-base.so", "libggml-cpu.so", "libggml-cuda.so", "libllama.so"))
PLAIN = dataclasses.replace(BUILT, libraries=("libggml-base.so", "libggml-cpu.so", "libllama.so"))


def test_this_installation_runs() -> None:
    """Breaks when doctor calls the installation under test broken."""
    findings = doctor.diagnose()
    assert doctor.report(findings)["runs"]
    texts = {one.what: one.text for one in findings}
    assert _native.kernel_name() in texts["processor"]
    assert "backends: cpu" in texts["llama-cpp-python"]
    assert findings[-1].what == "in use"


def test_a_machine_that_is_ready() -> None:
    """Breaks when a working GPU is reported as not usable."""
    findings = list(doctor.judge_cuda(READY, BUILT))
    assert {one.state for one in findings} == {"ok"}
    assert any("Card, 8.9, 20.0 of 24.0 GiB free" in one.text for one in findings)
    assert "not ready" not in doctor.summary(findings).text


@pytest.mark.parametrize(
    ("cuda", "llama", "what", "text", "remedy"),
    [
        (Cuda("no such file"), BUILT, "CUDA kernels", "no such file", "CUDACXX"),
        (dataclasses.replace(READY, driver=0, devices=()), BUILT, "driver", "none", "install NVIDIA's driver"),
        (
            dataclasses.replace(READY, driver=12040, driver_problem="insufficient", devices=()),
            BUILT,
            "driver",
            "supports CUDA 12.4, the kernels were built with 13.0",
            "update the driver",
        ),
        (
            dataclasses.replace(READY, driver_problem="unknown error", devices=()),
            BUILT,
            "driver",
            "unknown",
            "nvidia-smi",
        ),
        (dataclasses.replace(READY, devices=()), BUILT, "driver", "no GPU", "CUDA_VISIBLE_DEVICES"),
        (
            dataclasses.replace(READY, devices=(dataclasses.replace(CARD, capability=(7, 5)),)),
            BUILT,
            "GPU 0",
            "older than 8.0",
            "on the processor",
        ),
        (
            dataclasses.replace(READY, devices=(CARD, dataclasses.replace(CARD, free_bytes=GIB // 2))),
            BUILT,
            "GPU 1",
            "0.5 of 24.0 GiB free",
            "which process",
        ),
        (
            dataclasses.replace(READY, devices=(dataclasses.replace(CARD, problem="out of memory"),)),
            BUILT,
            "GPU 0",
            "out of memory",
            "which process",
        ),
        (
            READY,
            PLAIN,
            "weights on a GPU",
            "without CUDA",
            "CMAKE_ARGS=-DGGML_CUDA=on pip install --no-cache-dir --force-reinstall llama-cpp-python==0.3.36",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_what_keeps_a_gpu_from_being_used(cuda: Cuda, llama: LlamaCpp, what: str, text: str, remedy: str) -> None:
    """Breaks when one of these is not said in one line with its remedy; none of them keeps actqkv from running."""
    findings = list(doctor.judge_cuda(cuda, llama))
    (found,) = [one for one in findings if one.state != "ok"]
    assert found.what == what
    assert found.state == "unused"
    assert text in found.text
    assert found.remedy is not None
    assert remedy in found.remedy
    assert "\n" not in found.text + found.remedy
    assert what in doctor.summary(findings).text


@pytest.mark.parametrize(
    ("found", "text", "remedy"),
    [
        (LlamaCpp(None, "0.3.36", ()), "not installed", "pip install llama-cpp-python==0.3.36"),
        (
            dataclasses.replace(BUILT, version="0.3.20"),
            "0.3.20, actqkv was built with 0.3.36",
            "pip install llama-cpp-python==0.3.36",
        ),
        (dataclasses.replace(BUILT, libraries=()), "no libraries", "--force-reinstall"),
    ],
)
def test_a_llama_cpp_python_that_does_not_fit(found: LlamaCpp, text: str, remedy: str) -> None:
    """Breaks when an installation that cannot run is not called broken."""
    (one,) = doctor.judge_llama_cpp(found)
    assert one.state == "broken"
    assert text in one.text
    assert remedy in (one.remedy or "")
    assert not doctor.report([one])["runs"]


def test_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when doctor raises where llama-cpp-python or our own metadata is missing."""

    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", nothing)
    monkeypatch.setattr(doctor, "requires", nothing)
    assert doctor.find_llama_cpp().version is None
    (one,) = doctor.judge_llama_cpp(doctor.find_llama_cpp())
    assert one == Finding("llama-cpp-python", "broken", "not installed", "pip install actqkv")


def test_repacked_weights_that_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when doctor hides that llama.cpp's fast weights are off."""
    monkeypatch.setattr(machine, "extra_buffers", lambda: machine.Verdict(False, "killed by signal 11"))
    _, one = doctor.judge_processor("avx2", threaded=True)
    assert one.state == "unused"
    assert "killed by signal 11" in one.text
    assert one.remedy


def test_a_build_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when kernels that run on one thread, for want of OpenMP, are told by their slowness only."""
    monkeypatch.setattr(machine, "extra_buffers", lambda: machine.Verdict(True, "tried"))
    one = next(one for one in doctor.judge_processor("avx2", threaded=False) if one.what == "threads")
    assert one.state == "unused"
    assert "OpenMP" in one.text
    assert "libomp" in str(one.remedy)


def test_what_the_library_tells() -> None:
    """Breaks when devices, versions or reasons come wrong through the C interface."""
    try:
        found = _cuda.find_cuda(build_emulated())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert found == Cuda(None, 13000, "emulated", 13000, None, (Gpu("emulated", (8, 0), 1 << 30, 1 << 30),))
    missing = _cuda.find_cuda(Path("/nowhere/libactqkv_cuda.so"))
    assert "/nowhere/libactqkv_cuda.so" in (missing.library_problem or "")


def test_another_interface(tmp_path: Path) -> None:
    """Breaks when a library of another version of actqkv is called through this one's table."""
    other = Path(
        _native.lib.__file__ if hasattr(_native.lib, "__file__") else sys.modules["actqkv_cpp._actqkv"].__file__
    )
    found = _cuda.find_cuda(other)
    expected = f"interface none, expected {_native.lib.ACTQKV_CUDA_INTERFACE}"
    assert expected in (found.library_problem or "")
