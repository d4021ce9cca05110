"""The exceptions of actqkv_cpp.

ActqkvError                 everything raised here on purpose; `.hint` says what to do about it, or is None
├── ModelError              the GGUF is missing, broken, or has no graph here           (also ValueError)
├── DocumentError           a document is missing, empty, damaged or cannot be read as text (also ValueError)
├── ContextError            the tokens do not fit n_ctx; names both sizes               (also ValueError)
├── MemoryPlanError         the session would not fit in RAM; names the plan in bytes   (also MemoryError)
│   └── GpuMemoryError      what was asked for does not fit in a GPU's memory
├── ParameterError          a value is out of range, contradictory or unknown           (also ValueError)
├── StateError              a saved state or KV file is damaged or of another model; a closed session
├── KVFileError             a KV file cannot be made, opened or written: the disk is full  (also OSError)
├── Cancelled               a progress callback said stop; what was read is kept
├── ComputeError            ggml reported a failed computation                          (also RuntimeError)
├── ThreadError             two threads used one session at the same time               (also RuntimeError)
├── LibraryError            the native library is missing, or two copies of llama.cpp are loaded (also ImportError)
└── InternalError           a defect of actqkv; please report it                        (also RuntimeError)

Where `llama_cpp.Llama` raises a ValueError or RuntimeError, the exception here is a subclass of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ActqkvError(Exception):
    """Base of all exceptions here. `str(error)` is one line of what, expected and actual; `hint` the remedy or None."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ModelError(ActqkvError, ValueError):
    """The GGUF is missing, broken, or its architecture has no graph here."""


class DocumentError(ActqkvError, ValueError):
    """A document is missing, empty, damaged, protected, or in a format or encoding that cannot be read as text."""


class ContextError(ActqkvError, ValueError):
    """The tokens do not fit n_ctx. The message names both sizes, the hint the remedies."""


class MemoryPlanError(ActqkvError, MemoryError):
    """The session would not fit in RAM. The message names the plan in bytes."""


class GpuMemoryError(MemoryPlanError):
    """What was asked for does not fit in a GPU's memory. The message names the plan, the hint the way without."""


class ParameterError(ActqkvError, ValueError):
    """A parameter is out of range, contradicts another, or is unknown."""


class StateError(ActqkvError):
    """A saved state or KV file is damaged or belongs to another model or parameters; or the session is closed."""


class KVFileError(ActqkvError, OSError):
    """A KV file cannot be made, opened or written; the message has the system's reason."""


class Cancelled(ActqkvError):
    """A progress callback said stop. Completed windows are kept; the session stays usable."""


class ComputeError(ActqkvError, RuntimeError):
    """ggml reported a failed computation."""


class ThreadError(ActqkvError, RuntimeError):
    """Two threads used one session at the same time, or a callback re-entered the session that called it."""


class LibraryError(ActqkvError, ImportError):
    """The native library is missing, or two copies of llama.cpp are loaded in this process."""


class InternalError(ActqkvError, RuntimeError):
    """A defect of actqkv. The message says where."""


# By the name of the code in enum actqkv_status; the numbers are read from the library.
STATUS_ERRORS: dict[str, tuple[type[ActqkvError], str | None]] = {
    "ACTQKV_ERR_ARGUMENT": (ParameterError, None),
    "ACTQKV_ERR_MODEL": (ModelError, "this model runs densely through llama.cpp"),
    "ACTQKV_ERR_MEMORY": (MemoryPlanError, "use a smaller n_ctx or a smaller kv_type"),
    "ACTQKV_ERR_FULL": (ContextError, "use a larger n_ctx, or reset() to start a new history"),
    "ACTQKV_ERR_STATE": (StateError, "load what was saved with this model and these parameters, or read it again"),
    "ACTQKV_ERR_FILE": (KVFileError, "check the path, its permissions and the space on its disk"),
    "ACTQKV_ERR_CANCELLED": (Cancelled, None),
    "ACTQKV_ERR_COMPUTE": (ComputeError, None),
    "ACTQKV_ERR_INTERNAL": (InternalError, "please report this with the message"),
}


def error_from_status(name: str, message: str) -> ActqkvError:
    """The exception for one actqkv_status code, by its name in actqkv.h; an unknown name gives InternalError."""
    kind, hint = STATUS_ERRORS.get(name, (InternalError, None))
    return kind(message or name, hint)


def unknown_name(what: str, name: str, known: Iterable[str]) -> ParameterError:
    """ParameterError for an unknown `what` called `name`, with the nearest known name as the hint."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    all_names = f"known: {', '.join(names)}" if names else "there is none yet"
    return ParameterError(f"unknown {what} {name!r}", f"did you mean {near[0]!r}?" if near else all_names)
