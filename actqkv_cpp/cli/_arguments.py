"""The arguments that stand before the options: an optional MODEL, then questions or documents."""

from __future__ import annotations

from pathlib import Path

from actqkv_cpp.errors import ParameterError

_GGUF = b"GGUF"


def split(arguments: list[str], *, documents: bool = False) -> tuple[Path | None, list[str]]:
    """MODEL, or None, and questions, or `documents`, among which a file is no MODEL unless its name ends in .gguf."""
    first = Path(arguments[0]) if arguments else None
    if first is None or not (first.suffix == ".gguf" or (_is_file(first) and not documents)):
        return None, arguments
    if first.suffix != ".gguf":
        with first.open("rb") as file:
            if file.read(len(_GGUF)) != _GGUF:
                raise ParameterError(f"{first} is a file, but no GGUF model", "give each document a -d of its own")
    return first, arguments[1:]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a question may be no possible name at all
        return False
