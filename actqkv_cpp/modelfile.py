"""A look at a model file before libllama opens it, so that bad files are errors with a reason.

libllama puts its reasons into its log only, and on a few well-formed but absurd files it aborts, which would kill
Python. The metadata is read by ggml's own GGUF reader (gguf.h), which checks sizes.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp._ggml import libggml

from actqkv_cpp.errors import ModelError

_REMEDY = "download it again, or convert the model again"
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of libllama, which aborts above it
_FULL_ROTARY = ("qwen2", "qwen3")  # libllama aborts when these rotate only a part of a head
_GGML_LOG_ERROR = 4  # enum ggml_log_level
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_GGUF_TYPE_UINT32, _GGUF_TYPE_STRING = 4, 8


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


libggml.gguf_init_from_file.restype = ctypes.c_void_p
libggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
libggml.gguf_free.argtypes = [ctypes.c_void_p]
libggml.gguf_find_key.restype = ctypes.c_int64
libggml.gguf_find_key.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
libggml.gguf_get_kv_type.argtypes = [ctypes.c_void_p, ctypes.c_int64]
libggml.gguf_get_val_u32.restype = ctypes.c_uint32
libggml.gguf_get_val_u32.argtypes = [ctypes.c_void_p, ctypes.c_int64]
libggml.gguf_get_val_str.restype = ctypes.c_char_p
libggml.gguf_get_val_str.argtypes = [ctypes.c_void_p, ctypes.c_int64]


def check(model_path: str | Path, overrides: Mapping[str, object] | None = None) -> str:
    """The path as text.

    Args:
        overrides: of the metadata, as in `kv_overrides`.

    Raises:
        ModelError: there is no such file, it is no GGUF, its metadata is damaged, or libllama would abort on it.

    Example:
        >>> check("model.gguf")
        'model.gguf'
    """
    path = Path(model_path)
    try:
        gguf = _opened(path)
    except FileNotFoundError:
        raise ModelError(f"Model path does not exist: {path}", "leave it out for the bundled model") from None
    try:
        _check_sizes(path, gguf, overrides or {})
    finally:
        libggml.gguf_free(gguf)
    return str(path)


def check_adapter(lora_path: str | Path, model_path: str | Path) -> None:
    """ModelError where a file is no LoRA adapter for the model: the base hands on the null pointer that comes of it."""
    path = Path(lora_path)
    try:
        adapter, model = _opened(path), _opened(Path(model_path))
    except FileNotFoundError:
        raise ModelError(f"no such adapter: {path}", "check lora_path") from None
    try:
        kind, of, arch = (
            _string(adapter, "general.type"),
            *(_string(gguf, "general.architecture") for gguf in (adapter, model)),
        )
    finally:
        libggml.gguf_free(adapter)
        libggml.gguf_free(model)
    if (kind, of) != ("adapter", arch):
        raise ModelError(f"{path} is a GGUF of type {kind} for {of}, expected an adapter for {arch}", "check lora_path")


def _opened(path: Path) -> int:
    """The metadata of a GGUF, to be freed. FileNotFoundError where there is no file, else as `check`."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder", "name the .gguf file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if magic != b"GGUF":
        what = "is empty" if not magic else f"is not a GGUF model: it begins with {magic!r}"
        raise ModelError(f"{path} {what}", _REMEDY)
    try:
        name = str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(f"the name {str(path)!r} is not UTF-8, in which llama.cpp takes it", "rename it") from None
    gguf = libggml.gguf_init_from_file(name, _InitParams(True, None))
    if not gguf:
        raise ModelError(f"{path}: its metadata is damaged, truncated, or of an unknown GGUF version", _REMEDY)
    return int(gguf)


def sizes(path: str | Path) -> tuple[int, int]:
    """Layers of a model that `check` has passed, and bytes of its file, or of all files of a split model."""
    first = Path(path)
    gguf = libggml.gguf_init_from_file(str(first).encode(), _InitParams(True, None))
    try:
        n_layer = _number(gguf, f"{_string(gguf, 'general.architecture')}.block_count") if gguf else None
    finally:
        libggml.gguf_free(gguf)
    split = _SPLIT.fullmatch(first.name)
    files = first.parent.glob(f"{split[1]}-*-of-{split[2]}.gguf") if split else [first]
    return n_layer or 0, sum(file.stat().st_size for file in files)


def _check_sizes(path: Path, gguf: int, overrides: Mapping[str, object]) -> None:
    """Refuse what libllama aborts on."""

    def number(key: str) -> int | None:
        given = overrides.get(f"{arch}.{key}")
        return given if isinstance(given, int) else _number(gguf, f"{arch}.{key}")

    arch = _string(gguf, "general.architecture")
    if arch is None:
        raise ModelError(f"{path} names no architecture", _REMEDY)
    n_layer = number("block_count")
    if n_layer is not None and n_layer > _MAX_LAYERS:
        raise ModelError(f"{path}: {arch}.block_count is {n_layer}, llama.cpp takes at most {_MAX_LAYERS}", _REMEDY)
    n_rot, n_embd, n_head = map(number, ("rope.dimension_count", "embedding_length", "attention.head_count"))
    d_head = number("attention.key_length") or (n_embd or 0) // (n_head or 1)
    if arch in _FULL_ROTARY and n_rot is not None and n_rot != d_head:
        raise ModelError(f"{path}: {arch}.rope.dimension_count is {n_rot}, a head has {d_head}", _REMEDY)


def _number(gguf: int, key: str) -> int | None:
    at = libggml.gguf_find_key(gguf, key.encode())
    found = at >= 0 and libggml.gguf_get_kv_type(gguf, at) == _GGUF_TYPE_UINT32
    return int(libggml.gguf_get_val_u32(gguf, at)) if found else None


def _string(gguf: int, key: str) -> str | None:
    at = libggml.gguf_find_key(gguf, key.encode())
    found = at >= 0 and libggml.gguf_get_kv_type(gguf, at) == _GGUF_TYPE_STRING
    return str(libggml.gguf_get_val_str(gguf, at).decode("utf-8", "replace")) if found else None


def short_of_gpu_memory(log: Iterable[str]) -> str | None:
    """The line of libllama's errors that says that a GPU's memory did not suffice; None: something else failed."""
    lines = [line for line in log if "alloc" in line]
    return lines[0] if lines and not any("cpu" in line.lower() for line in lines) else None


@contextmanager
def logged_errors() -> Iterator[list[str]]:
    """Collects what libllama logs as errors meanwhile; its log goes on as before."""
    lines: list[str] = []
    before, user = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user))

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, data: Any) -> None:
        if level == _GGML_LOG_ERROR:
            lines.append(text.decode("utf-8", "replace").strip())
        if before:
            before(level, text, data)

    llama_cpp.llama_log_set(collect, user)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(before, user)
