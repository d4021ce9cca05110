"""Result files of `actqkv eval` and `actqkv bench`: JSON objects that name their format and its version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from actqkv_cpp.errors import StateError

_T = TypeVar("_T")


def format_of(path: Path) -> str | None:
    """The format that a file names; None where it names none.

    Raises:
        StateError: it is cut short, or no JSON.
        OSError: it cannot be read.
    """
    value = _load(path)
    return str(value["format"]) if isinstance(value, dict) and "format" in value else None


def read(path: Path, *, kind: str, version: int, command: str, make: Callable[[dict[str, Any]], _T]) -> _T:
    """What `make` makes of the object in a file.

    Args:
        kind: the format that it must name.
        version: of the format.
        command: that writes such files.
        make: raises an error of names, types or values where part of the object is missing or of another kind.

    Raises:
        StateError: the file is cut short, of another format or version, or lacks part of a result.
        OSError: it cannot be read.
    """
    value = _load(path)
    if not isinstance(value, dict) or value.get("format") != kind:
        raise StateError(f"{path} is no result of {command}", f"give a file that {command} wrote")
    if value.get("format_version") != version:
        raise StateError(
            f"{path} has format version {value.get('format_version')}, this actqkv reads {version}",
            f"run {command} again with this version",
        )
    try:
        return make(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} lacks part of a result ({error})", f"run {command} again") from None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise StateError(f"{path} is cut short or no JSON ({error})", "run the command that wrote it again") from None
