"""Files that are either complete or not there, their hashes, and errors that name the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actqkv_cpp.errors import ParameterError

_MARK_BYTES = 4096  # from the beginning of a file, in which its mark stands
_HASHED_BYTES = 1 << 20  # of one read


def check_free(path: Path, mark: str) -> None:
    """ParameterError where `path` cannot be written, or would overwrite a file without `mark`: one that is not ours.

    Example:
        >>> check_free(Path("report.html"), "actqkv report")
    """
    if path.is_dir():
        raise ParameterError(f"{path} is a folder", "give a file's name")
    if not path.parent.is_dir():
        raise ParameterError(f"{path.parent} is no folder", "make it first")
    if path.exists():
        with path.open("rb") as file:
            if mark.encode() not in file.read(_MARK_BYTES):
                raise ParameterError(f"{path} exists and was not written by {mark}", "choose another name")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. A model of 5 GB takes seconds."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(_HASHED_BYTES):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def named(name: str | Path, *, instead_of: str | Path | None = None) -> Iterator[None]:
    """Errors of the system within the block name this file where they name none, or `instead_of`."""
    try:
        yield
    except OSError as error:
        nameless = error.filename is None or str(error.filename) == str(instead_of)
        if error.errno is None or not nameless:
            raise
        raise OSError(error.errno, error.strerror, str(name)) from error


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block writes there becomes `path` when it ends without an error.

    Example:
        >>> with written_atomically(Path("notes.txt")) as temporary:
        ...     temporary.write_text("complete")
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with named(path, instead_of=temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a read-only disk refuses this even where there is no such file
            temporary.unlink()
