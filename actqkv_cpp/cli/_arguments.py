"""The arguments that stand before the options: an optional MODEL, then questions or documents."""

from __future__ import annotations

from pathlib import Path

from actqkv_cpp.errors import ParameterError

_GGUF = b"GGUF"


_DOCUMENT = "give each document a -d of its own"


def split(arguments: list[str], *, documents: bool = False) -> tuple[Path | None, list[str]]:
    """MODEL, or None, and questions, or `documents`, among which a file is no MODEL unless its name ends in .gguf."""
    first = Path(arguments[0]) if arguments else None
    if first is None or not (first.suffix == ".gguf" or (_is_file(first) and not documents)):
        return None, arguments
    return model_path(arguments[0]), arguments[1:]


def model_path(argument: str | None, *, hint: str = _DOCUMENT) -> Path | None:
    """MODEL where nothing else can stand there, or None.

    Args:
        hint: what to do about a file of another kind.

    Raises:
        ParameterError: it is such a file, a document for example. A name that ends in .gguf is left to the loader.
    """
    path = Path(argument) if argument else None
    if path is None or path.suffix == ".gguf" or not _is_file(path):
        return path
    with path.open("rb") as file:
        if file.read(len(_GGUF)) != _GGUF:
            raise ParameterError(f"{path} is a file, but no GGUF model", hint)
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a question may be no possible name at all
        return False
