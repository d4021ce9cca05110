"""Breaks when the installed CUDA kernels miss a card that they are meant for, or need a llama.cpp built with CUDA."""

from __future__ import annotations

import shutil
import struct
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from actqkv_cpp import _cuda

ROOT = Path(__file__).resolve().parents[1]
TARGETS = "80-real 86-real 89-real 90"  # CMakeLists.txt's, where nobody asks for others
FATBIN_MAGIC = 0xBA55ED50
PTX, SASS = 1, 2


@pytest.fixture(scope="module")
def library() -> Path:
    spec = find_spec("actqkv_cpp._actqkv")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).with_name("libactqkv_cuda.so")
    if not path.exists():
        found = "it was built without" if shutil.which("nvcc") else "there is no nvcc"
        pytest.skip(f"actqkv has no CUDA kernels: {found}")
    if (targets := _cuda.find_cuda(path).targets) != TARGETS:
        pytest.skip(f"CUDA kernels were built for {targets}, as somebody asked for")
    return path


def code_in(library: Path) -> list[set[tuple[int, int]]]:
    """What nvcc put in for each source file: (PTX or SASS, target). As cuobjdump reads it, which not every toolkit has:
    containers of a header [magic u32, version u16, header bytes u16, bytes u64], and entries [kind u16, version u16,
    header bytes u32, bytes u64, 12 bytes, target u32, ...]."""
    data, found = library.read_bytes(), []
    at = data.find(struct.pack("<I", FATBIN_MAGIC))
    while at >= 0:
        version, n_header, n_bytes = struct.unpack_from("<HHQ", data, at + 4)
        if (version, n_header) == (1, 16):  # else the number stands in code, by chance
            entry, end = at + n_header, at + n_header + n_bytes
            found.append(set())
            while entry < end:
                kind, n_own, n_code, target = struct.unpack_from("<HxxIQ12xI", data, entry)
                found[-1].add((kind, target))
                entry += n_own + n_code
        at = data.find(struct.pack("<I", FATBIN_MAGIC), at + 4)
    return found


def test_every_kernel_is_there_for_every_card(library: Path) -> None:
    """A card from Ampere to Hopper finds no code, or a later one no PTX to compile."""
    found = code_in(library)
    assert len(found) == len(list((ROOT / "native/kernels/cuda").glob("*.cu")))
    for one in found:
        assert one == {(SASS, 80), (SASS, 86), (SASS, 89), (SASS, 90), (PTX, 90)}


def test_those_are_the_targets_by_default() -> None:
    """The test above skips whatever is built, since the default is another one."""
    assert f"set(CMAKE_CUDA_ARCHITECTURES {TARGETS})" in (ROOT / "CMakeLists.txt").read_text()


def test_it_needs_nothing_of_ggml(library: Path) -> None:
    """Our kernels load only beside a llama-cpp-python built with CUDA, which a build in isolation never sees."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm: it comes with binutils")
    told = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in told, "CUDA's runtime is linked statically"
    assert not [line for line in told.splitlines() if "ggml" in line or "llama" in line]
