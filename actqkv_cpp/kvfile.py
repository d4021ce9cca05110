"""KV files (.akv) as the library has them: what one holds, and sessions that write or open one.

The format is described in native/kv/file.h. What `saved.py` puts into a file's section is opaque here.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp import _native
from actqkv_cpp._native import Session, call, found_params, model_pointer, native_plan, set_number, token_array
from actqkv_cpp.errors import ParameterError, StateError
from actqkv_cpp.figures import FileInfo, MemoryPlan

ffi, lib = _native.ffi, _native.lib  # type: ignore[attr-defined]  # not its own, but it alone may import them

CHECKPOINT_TOKENS = 4096  # from one point to the next from which a killed reading can go on


def info(path: str | Path) -> FileInfo:
    """What a KV file holds; no model is needed.

    Raises:
        KVFileError: it is missing or cannot be read.
        StateError: it is no KV file, of another version, damaged or truncated. Chunks are not checked: see `verify`.
    """
    found = _info(path)
    numbers = {field.name: getattr(found, field.name) for field in dataclasses.fields(FileInfo)}
    return FileInfo(**numbers | {"params": found_params(found.params), "complete": bool(found.complete)})


def read(path: str | Path) -> tuple[NDArray[np.int32], NDArray[np.int8], bytes]:
    """Tokens [n] and their phases [n] of the whole reading, and the section that `begin` was given."""
    found = _info(path)
    tokens, phases = np.empty(found.n_tokens, np.int32), np.empty(found.n_tokens, np.int8)
    section = bytearray(found.section_bytes)
    into = zip(("int32_t[]", "int8_t[]", "uint8_t[]"), (tokens, phases, section), strict=True)
    call(lib.actqkv_file_read, _name(path), *(ffi.from_buffer(kind, array) for kind, array in into))
    return tokens, phases, bytes(section)


def verify(path: str | Path) -> None:
    """Check every byte that is in use. StateError where one is not as it was written."""
    call(lib.actqkv_file_verify, _name(path), ffi.NULL, ffi.NULL)


def plan(model: Any, path: str | Path, *, n_ctx: int, n_threads: int) -> MemoryPlan:
    """What a session over the file would need, all of it in memory."""
    return native_plan(model, _params(path, n_ctx=n_ctx, n_threads=n_threads))


def open_session(model: Any, path: str | Path, *, n_ctx: int, n_threads: int, write: bool = False) -> Session:
    """A session where the reading of a KV file stands; it reads, and at first answers, by the method of that reading.

    Args:
        write: what is left of the reading goes on into the file, as after `begin`.

    Raises:
        KVFileError: the file cannot be opened, or another process writes it.
        StateError: it is damaged, no KV file, or of another model.
        ContextError: the reading does not fit n_ctx.
    """
    params = _params(path, n_ctx=n_ctx, n_threads=n_threads)
    given = model_pointer(model), _name(path), n_ctx, n_threads, write
    session = Session.__new__(Session)
    session._begin(model, params, lambda *out: call(lib.actqkv_session_open, *given, *out))
    return session


def begin(
    session: Session, path: str | Path, tokens: Any, phases: Any, section: bytes, *, checkpoint_tokens: int
) -> None:
    """Make the KV file of a reading, and write it as the session reads on, until `end`.

    Args:
        tokens, phases: [n] of the whole reading, as `Session.history` has them; the session holds their beginning.
        section: the caller's own; `read` gives it back.
        checkpoint_tokens: least distance of checkpoints.

    Raises:
        KVFileError: there is such a file, or it cannot be made; from `Session.decode`: the disk is full.
    """
    numbers, kinds = token_array(tokens), np.ascontiguousarray(phases, np.int8)
    arrays = ffi.from_buffer("int32_t[]", numbers), ffi.from_buffer("int8_t[]", kinds)
    data = ffi.from_buffer("uint8_t[]", section), len(section)
    with session._exclusive() as handle:
        call(lib.actqkv_file_begin, handle, _name(path), *arrays, numbers.size, *data, checkpoint_tokens)


def spill(session: Session) -> None:
    """From now on chunks leave memory once they are in the file, which then stands for them."""
    with session._exclusive() as handle:
        call(lib.actqkv_file_spill, handle, True)


def sync(session: Session) -> None:
    """Write a checkpoint now: a reading that ends here goes on from the last window's start."""
    with session._exclusive() as handle:
        call(lib.actqkv_file_sync, handle)


def end(session: Session) -> None:
    """Complete the file of a reading that is all read; the session writes it no more."""
    with session._exclusive() as handle:
        call(lib.actqkv_file_end, handle)


def leave(session: Session) -> None:
    """The session writes no file from now on; the file stays as it is. Nothing where there is none."""
    with session._exclusive() as handle:
        lib.actqkv_file_leave(handle)


def _info(path: str | Path) -> Any:
    found = ffi.new("struct actqkv_file_info *")
    try:
        call(lib.actqkv_file_info, _name(path), found)
    except StateError as error:
        raise StateError(str(error), "name another file, or index the document again") from None
    return found


def _params(path: str | Path, *, n_ctx: int, n_threads: int) -> Any:
    """struct actqkv_params * of the file's reading, with these sizes."""
    found = _info(path)  # owns what the next line copies
    params = ffi.new("struct actqkv_params *", found.params)
    set_number(params, "n_ctx", n_ctx)
    set_number(params, "n_threads", n_threads)
    return params


def _name(path: str | Path) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ParameterError(f"a NUL in the name of a file: {str(path)!r}")
    return encoded
