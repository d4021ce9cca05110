"""When this fails, a model with layers on a device gives other logits than the same model on the CPU.

The device is a GPU of a llama-cpp-python that was built with one; or an RPC server with memory of its own, in a process
of its own, where ACTQKV_TEST_RPC names a libggml-rpc of llama-cpp-python's version (built with GGML_BACKEND_DL).
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from engine_support import check, loaded, one_by_one, open_session, random_tokens, read, small
from tiny_gguf import make_tiny_gguf

N_LAYER = 3
CPU_TYPE = 0  # enum ggml_backend_dev_type

_SERVER = """
import ctypes, sys
from pathlib import Path
import llama_cpp
folder = Path(llama_cpp.__file__).parent / "lib"
cpu, base = (ctypes.CDLL(str(folder / name)) for name in ("libggml-cpu.so.0", "libggml-base.so.0"))
rpc = ctypes.CDLL(sys.argv[1])
for function in (cpu.ggml_backend_cpu_init, base.ggml_backend_get_device):
    function.restype = ctypes.c_void_p
base.ggml_backend_get_device.argtypes = [ctypes.c_void_p]
device = (ctypes.c_void_p * 1)(base.ggml_backend_get_device(cpu.ggml_backend_cpu_init()))
rpc.ggml_backend_rpc_start_server.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p
]
rpc.ggml_backend_rpc_start_server(sys.argv[2].encode(), None, 1, 1, device)
"""


def _ggml(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the ggml that libllama is linked to: of its own copy, since it has a list of devices of its own."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    for library in ("libggml.so.0", "libggml-base.so.0"):
        found = getattr(ctypes.CDLL(str(folder / library)), name, None)
        if found is not None:
            found.restype, found.argtypes = result, arguments
            return found
    raise AttributeError(name)


def devices() -> list[int]:
    """Those that are no CPU."""
    count = _ggml("ggml_backend_dev_count", ctypes.c_size_t)
    get = _ggml("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind = _ggml("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    return [found for i in range(count()) if kind(found := get(i)) != CPU_TYPE]


@contextmanager
def rpc_server(library: str) -> Iterator[None]:
    """A server, and its device among ggml's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-c", _SERVER, library, endpoint], stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                with socket.socket() as trial:
                    if trial.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            load = _ggml("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)
            address = _ggml("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
            add = address(load(library.encode()), b"ggml_backend_rpc_add_server")
            registered = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(add)(endpoint.encode())
            _ggml("ggml_backend_register", None, ctypes.c_void_p)(registered)
            yield
        finally:
            server.kill()


@pytest.fixture(scope="session")  # ggml forgets no device: the server must outlive every later test
def device() -> Iterator[None]:
    """Some device is there."""
    library = os.environ.get("ACTQKV_TEST_RPC")
    if devices():
        yield
    elif library:
        with rpc_server(library):
            yield
    else:
        pytest.skip("no device but the CPU: llama-cpp-python has no CUDA, and ACTQKV_TEST_RPC names no libggml-rpc")


def logits_of(path: Path, n_gpu_layers: int) -> Any:
    """Of a reading with a ragged last window, some answers, and a rewind."""
    tokens = random_tokens(130)
    pieces = [(120, "prefill"), *one_by_one(6)]
    with loaded(path, n_gpu_layers) as model, open_session(model, small()) as session:
        assert (session.stats().gpu.memory_bytes > 0) == (n_gpu_layers > 0)
        first = read(session, tokens, pieces, n_logits=1)  # type: ignore[arg-type]
        session.rewind(60)
        session.decode(tokens[60:110])
        return [*first, *session.decode(tokens[110:120], n_logits=3), session.state_get()[:64]]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("n_gpu_layers", [1, 2, N_LAYER, N_LAYER + 1])
def test_logits_are_those_of_the_cpu(device: None, tmp_path: Path, arch: str, n_gpu_layers: int) -> None:
    """The head alone, some layers, all of them, all of them and the head; tied embeddings and scaled rotations too."""
    more: dict[str, Any] = {"llama": {"rope_scaling": "llama3"}, "qwen2": {"tied": True}, "qwen3": {}}[arch]
    path = make_tiny_gguf(tmp_path / "tiny.gguf", arch=arch, n_layer=N_LAYER, **more)
    *expected, fingerprint = logits_of(path, 0)
    *actual, same = logits_of(path, n_gpu_layers)
    assert same == fingerprint
    for found, wanted in zip(actual, expected, strict=True):
        check("windows", found, wanted)
