"""Calls libactqkv_cuda on arrays of the host: each is copied to memory of its own on the GPU, and back.

The same kernel texts exist twice: compiled by nvcc for a GPU, and by the host's compiler against tests/emulator, which
runs them where there is none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "native" / "kernels" / "cuda"
EMULATOR = ROOT / "tests" / "emulator"

WITHOUT_THREADS = {"to_f16", "summarize", "mean", "spread", "spread_query", "entropy"} | {
    "elect", "gather",
}  # fmt: skip
ARRAYS_OF_ATTEND = ("q_near", "q_far", "q_turned", "k_window", "v_window", "out", "weight_sums", "span_mass")
ARRAYS_OF_SEARCH = ("query", "scores", "picked", "votes")


def build_emulated() -> Path:
    """The library of the emulator, compiled once per state of its sources. FileNotFoundError without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: install one, or set CXX")
    sources = sorted([*CUDA.glob("*.cu"), EMULATOR / "emulator.cpp"])
    headers = [*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), CUDA.parent / "kernels.h", EMULATOR / "cuda_runtime.h"]
    every = [Path(__file__), *sources, *headers]  # this file has the flags
    state = hashlib.sha256(b"".join(path.read_bytes() for path in every)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"actqkv-emulated-{os.getuid()}-{state}"
    library = folder / "libactqkv_cuda.so"
    if library.exists():
        return library
    folder.mkdir(exist_ok=True)
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-Wno-unknown-pragmas", f"-I{EMULATOR}", f"-I{CUDA}"]
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]  # a GPU aligns every access
    with tempfile.TemporaryDirectory(dir=folder) as objects:
        compiling = [
            subprocess.Popen([compiler, *flags, "-x", "c++", "-c", source, "-o", f"{objects}/{source.stem}.o"])
            for source in sources
        ]
        statuses = [one.wait() for one in compiling]
        assert not any(statuses), "the kernels do not compile for the host"
        part = f"{objects}/library"
        subprocess.run([compiler, "-shared", "-o", part, *(f"{objects}/{s.stem}.o" for s in sources)], check=True)
        Path(part).replace(library)
    return library


class Gpu:
    """One stream of the first GPU; `call` runs one kernel."""

    def __init__(self, ffi: Any, table: Any) -> None:
        self.ffi, self.table = ffi, table
        stream = ffi.new("struct actqkv_cuda_stream **")
        self.check(table.open(0, stream))
        self.stream = stream[0]

    def check(self, status: int) -> None:
        assert status == 0, self.ffi.string(self.table.error_text(status)).decode()

    def call(self, name: str, arguments: tuple[Any, ...], arrays: dict[int, memoryview]) -> Any:
        """`arguments` are those of the CPU's function after impl; `arrays` the host's memory by address."""
        run = Call(self, arrays)
        try:
            if name in {"attend", "search"}:
                return getattr(run, name)(arguments[0])
            return run.plain(name, arguments)
        finally:
            run.end()


class Call:
    """What one call has on the GPU."""

    def __init__(self, gpu: Gpu, arrays: dict[int, memoryview]) -> None:
        self.gpu, self.ffi, self.table, self.arrays = gpu, gpu.ffi, gpu.table, arrays
        self.taken: dict[int, tuple[Any, Any, int]] = {}  # address on the host -> memory there and here, bytes

    def take(self, n_bytes: int) -> Any:
        memory = self.ffi.new("void **")
        self.gpu.check(self.table.take(0, max(n_bytes, 1), memory))
        return memory[0]

    def there(self, pointer: Any) -> Any:
        """The same array on the GPU, of the same type; guards on both sides come along."""
        if pointer == self.ffi.NULL:
            return pointer
        address = int(self.ffi.cast("uintptr_t", pointer))
        memory = self.arrays[address]
        here = self.ffi.from_buffer(memory)
        start = int(self.ffi.cast("uintptr_t", here))
        if start not in self.taken:
            self.taken[start] = (self.take(len(here)), here, len(here))
            self.gpu.check(self.table.copy(self.gpu.stream, self.taken[start][0], here, len(here)))
        base = int(self.ffi.cast("uintptr_t", self.taken[start][0]))
        return self.ffi.cast(self.ffi.typeof(pointer), base + address - start)

    def finish(self, status: int) -> None:
        """Waits, and brings every array back."""
        self.gpu.check(status)
        self.gpu.check(self.table.wait(self.gpu.stream))
        for there, here, n_bytes in self.taken.values():
            self.gpu.check(self.table.copy(self.gpu.stream, here, there, n_bytes))
        self.gpu.check(self.table.wait(self.gpu.stream))

    def end(self) -> None:
        for there, _, _ in self.taken.values():
            self.gpu.check(self.table.give_back(there))

    def plain(self, name: str, arguments: tuple[Any, ...]) -> Any:
        function: Callable[..., int] = getattr(self.table, name)
        if name not in WITHOUT_THREADS:
            arguments = arguments[:-1]  # n_threads; of top_k its scratch
        running = None
        there: list[Any] = []
        for one in arguments:
            kind = self.ffi.typeof(one) if isinstance(one, self.ffi.CData) else None
            if kind is not None and kind.item.kind == "struct":
                running = self.ffi.new("struct actqkv_running *", one[0])
                running.mean, running.var = self.there(one.mean), self.there(one.var)
                there.append(running)
            else:
                there.append(one if kind is None else self.there(one))
        if name == "entropy":
            return self.number(lambda out: function(self.gpu.stream, *there, out))
        self.finish(function(self.gpu.stream, *there))
        if running is not None:
            arguments[0].n_tokens, arguments[0].n_windows = running.n_tokens, running.n_windows
        return None

    def number(self, function: Callable[[Any], int]) -> float:
        here = bytearray(4)
        at = int(self.ffi.cast("uintptr_t", self.ffi.from_buffer(here)))
        self.arrays = {**self.arrays, at: memoryview(here)}
        self.finish(function(self.there(self.ffi.cast("float *", at))))
        return float(self.ffi.cast("float *", at)[0])

    def attend(self, args: Any) -> None:
        there = self.ffi.new("struct actqkv_attend_args *", args[0])
        for name in ARRAYS_OF_ATTEND:
            setattr(there, name, self.there(getattr(args, name)))
        n_lists = args.n_head_kv if args.span_stride else 1
        spans = self.ffi.new("struct actqkv_span[]", max(n_lists * args.n_spans, 1))
        for i in range(n_lists * args.n_spans):
            spans[i] = args.spans[i]
            for name in ("far", "near", "v"):
                setattr(spans[i], name, self.there(getattr(spans[i], name)))
        there.spans = spans
        n_keys = sum(spans[i].n_tok for i in range(args.n_spans)) + args.m
        size = self.table.attend_scratch(
            args.n_head, args.n_head_kv, args.d_head, args.m, n_keys, args.n_spans, n_lists
        )
        there.scratch = self.scratch(size)
        self.finish(self.table.attend(self.gpu.stream, there))

    def search(self, args: Any) -> None:
        """Scores and votes, one after the other."""
        there = self.ffi.new("struct actqkv_search_args *", args[0])
        stretches = self.ffi.new("struct actqkv_stretch[]", max(args.n_stretches, 1))
        for i in range(args.n_stretches):
            stretches[i] = args.stretches[i]
            stretches[i].data = self.there(stretches[i].data)
        there.stretches = stretches
        for name in ARRAYS_OF_SEARCH:
            setattr(there, name, self.there(getattr(args, name)))
        there.scratch = self.scratch(self.table.search_scratch(there))
        self.gpu.check(self.table.search_score(self.gpu.stream, there))
        self.finish(self.table.search_vote(self.gpu.stream, there))

    def scratch(self, size: int) -> Any:
        here = bytearray(b"\xff" * size)  # NaN: nothing in it may be read before it is written
        at = int(self.ffi.cast("uintptr_t", self.ffi.from_buffer(here)))
        self.arrays = {**self.arrays, at: memoryview(here)}
        return self.there(self.ffi.cast("void *", at))
