"""The journal of a run: what each sample gave, so that a killed run goes on where it stopped.

    OUT/journal.jsonl    first line: format, version, and the parameters that make the results what they are;
                         then one line per sample and cell (`Record`), on disk before the next sample begins
    OUT/result.json      written at the end, completely or not at all

A line without its line end is what a kill left of it: it is cut off. Anything else that is no record is an error, and
so are a header of another version or with other parameters; nothing is overwritten then.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from actqkv_cpp.errors import ParameterError, StateError
from actqkv_cpp.evaluation.results import FORMAT, FORMAT_VERSION, RESULT, Cell, Record
from actqkv_cpp.files import named, written_atomically

JOURNAL = "journal.jsonl"


class Journal:
    """Records of one run, in memory and, with a folder, on disk. A context manager.

    Args:
        folder: made if it is not there; None: memory only.
        header: everything that fixes the results; `facts` that may differ when a run goes on are kept from its start.

    Attributes:
        records: all of them, also those of the runs before.
        facts: of the run's start.

    Raises:
        ParameterError: the folder is a file.
        StateError: it holds a run of other parameters, of another version, or a damaged journal.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, header: dict[str, Any], facts: dict[str, Any]) -> None:
        self.records: dict[tuple[Cell, int], Record] = {}
        self.facts = facts
        self.folder = folder
        self._file: IO[str] | None = None
        self._header = {"format": f"{FORMAT}-journal", "format_version": FORMAT_VERSION, "header": header}
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise ParameterError(f"{folder} is a file", "give --out a folder")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL
        if not path.exists() and (folder / RESULT).exists():
            raise StateError(f"{folder / RESULT} has no journal beside it", _AWAY)
        self._file = path.open("a", encoding="utf-8")
        try:
            self._open(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def has(self, cell: Cell, sample: int) -> bool:
        return (cell, sample) in self.records

    def add(self, record: Record) -> None:
        """Keep a record; it is on disk when this returns."""
        self.records[record.cell, record.sample] = record
        if self._file is not None:
            self._write(record.to_json())

    def finish(self, result: dict[str, Any]) -> Path | None:
        """Write the result file; its path, or None without a folder."""
        if self.folder is None:
            return None
        path = self.folder / RESULT
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return path

    def _open(self, path: Path) -> None:
        """Take back what the file holds, or begin it."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except OSError:
            raise StateError(f"another run writes {path}", "wait for its end, or give another --out") from None
        if path.stat().st_size:
            self._take_back(path)
        if not path.stat().st_size:
            self._write(self._header | {"facts": self.facts})

    def _write(self, value: dict[str, Any]) -> None:
        assert self._file is not None
        with named(self._file.name):
            self._file.write(json.dumps(value) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _take_back(self, path: Path) -> None:
        """Records of the runs before; what a kill left of a last line is cut off the file."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", "replace").splitlines()
        if not lines:
            begin = json.dumps({"format": self._header["format"]})[:-1].encode()
            if data[: len(begin)] != begin[: len(data)]:
                raise StateError(f"{path} is no journal of actqkv eval", _AWAY)
            os.truncate(path, 0)
            return
        self._compare(path, _parse(path, 1, lines[0]))
        for number, line in enumerate(lines[1:], 2):
            try:
                record = Record.from_json(_parse(path, number, line))
            except (KeyError, TypeError, ValueError) as error:
                raise StateError(f"{path}:{number}: no record of a sample ({error})", _AWAY) from None
            self.records[record.cell, record.sample] = record
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def _compare(self, path: Path, found: dict[str, Any]) -> None:
        """StateError where the run in the folder is not this one."""
        if found.get("format") != self._header["format"]:
            raise StateError(f"{path} is no journal of actqkv eval", _AWAY)
        if found.get("format_version") != FORMAT_VERSION:
            raise StateError(
                f"{path} has format version {found.get('format_version')}, this actqkv writes {FORMAT_VERSION}", _AWAY
            )
        theirs, ours = _flat(found.get("header")), _flat(json.loads(json.dumps(self._header["header"])))
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise StateError(
                    f"{path} is of a run with {name} {theirs.get(name)}, now it is {ours.get(name)}", _AWAY
                )
        self.facts = dict(found.get("facts") or {})


_AWAY = "give another --out, or move that folder away"


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise StateError(f"{path}:{number}: not JSON ({error})", _AWAY) from None
    if not isinstance(value, dict):
        raise StateError(f"{path}:{number}: not a JSON object", _AWAY)
    return value


def _flat(value: Any) -> dict[str, Any]:
    """Nested objects as one, names joined by dots."""
    if not isinstance(value, dict):
        return {"": value}
    return {f"{name}.{inner}".rstrip("."): v for name, part in value.items() for inner, v in _flat(part).items()}
