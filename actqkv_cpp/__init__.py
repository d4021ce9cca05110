"""actqkv_cpp: chat with documents far longer than a model's window.

    from actqkv_cpp import Llama
    llm = Llama("model.gguf", n_ctx=131072)
    print(llm.read("book.txt").ask("Who kept the key?"))

Importing the package is cheap: llama.cpp and the native library load with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actqkv_cpp import _env
from actqkv_cpp.config import Retrieval, parse_size
from actqkv_cpp.errors import (
    ActqkvError,
    Cancelled,
    ComputeError,
    ContextError,
    DocumentError,
    GpuMemoryError,
    InternalError,
    KVFileError,
    LibraryError,
    MemoryPlanError,
    ModelError,
    ParameterError,
    StateError,
    ThreadError,
)
from actqkv_cpp.gpu import GpuUse, NoGpu
from actqkv_cpp.results import Answer, Audit, Memory, Source, Timing, Usage

if TYPE_CHECKING:
    from actqkv_cpp._native import methods
    from actqkv_cpp.chat import Chat, Turn
    from actqkv_cpp.document import Document
    from actqkv_cpp.llama import Llama
    from actqkv_cpp.recording import Record, Recording

__version__ = "0.1.0"

_env.let_threads_sleep()  # before anything loads llama.cpp and, with it, OpenMP

__all__ = [
    "ActqkvError",
    "Answer",
    "Audit",
    "Cancelled",
    "Chat",
    "ComputeError",
    "ContextError",
    "Document",
    "DocumentError",
    "GpuMemoryError",
    "GpuUse",
    "InternalError",
    "KVFileError",
    "LibraryError",
    "Llama",
    "Memory",
    "MemoryPlanError",
    "ModelError",
    "NoGpu",
    "ParameterError",
    "Record",
    "Recording",
    "Retrieval",
    "Source",
    "StateError",
    "ThreadError",
    "Timing",
    "Turn",
    "Usage",
    "default_model_path",
    "methods",
    "parse_size",
]

_LAZY = {
    "Llama": "llama",
    "Document": "document",
    "Chat": "chat",
    "Turn": "chat",
    "Record": "recording",
    "Recording": "recording",
    "methods": "_native",
}


def default_model_path() -> Path:
    """The bundled model: a small one for trying out and for tests, not for work."""
    return Path(__file__).parent / "data" / "needle-q8_0.gguf"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
