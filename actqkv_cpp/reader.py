"""Documents as files: their text from a path or from standard input, checked before any work starts."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from actqkv_cpp.errors import DocumentError, StateError
from actqkv_cpp.formats import docx, epub, html, markdown, pdf
from actqkv_cpp.formats.extract import Anchor, Extract, last_before, one_line
from actqkv_cpp.origin import Origin

STDIN_NAME = "stdin"
_KV_FILE = b"AKVFILE\0"

_HTML_NAMES, _MARKDOWN_NAMES = (".html", ".htm", ".xhtml"), (".md", ".markdown")
_HTML_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html)\b", re.IGNORECASE)
_UNPACKED_BYTES = 1 << 30  # of a zip archive, at most

# First bytes of what people hand over by mistake, and what to do about it.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (_KV_FILE, "a KV file of actqkv", "open it: llm.open(path), or give it to the -d of actqkv chat or ask"),
    (b"GGUF", "a GGUF model", "the model is an argument of its own: actqkv chat model.gguf -d book.txt"),
    (
        b"\xd0\xcf\x11\xe0",
        "an Office file of the old kind, or one with a password",
        "save it as DOCX without a password",
    ),
    (b"{\\rtf", "an RTF file", "save it as DOCX or as plain text first"),
    (b"\x1f\x8b", "a gzip file", "unpack it first with gunzip"),
    (b"\xff\xfe", "in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 book.txt > book.utf8.txt"),
    (b"\xfe\xff", "in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 book.txt > book.utf8.txt"),
)


@dataclass(frozen=True)
class TextFile:
    """A document in memory.

    Attributes:
        name: what sources are reported under.
        text: of text, Markdown and source code the whole file as decoded, so that offsets into it are offsets of the
            file; of other formats the text taken out of it, which `actqkv text FILE` prints.
        anchors: pages or headings, by ascending `start`, an offset into `text` in code points.
        by_line: places are told by line instead.
        origin: the file on disk that it was read from; None where there was none.
    """

    name: str
    text: str
    anchors: tuple[Anchor, ...] = ()
    by_line: bool = False
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def place(self, at: int) -> str | None:
        """What people call the place of character `at`: "p. 214", a heading, "line 120"; None where nothing is known.

        Example:
            >>> TextFile("a.py", "x = 1\\ny = 2\\n", by_line=True).place(6)
            'line 2'
        """
        if self.by_line:
            return f"line {self.text.count(chr(10), 0, at) + 1}"
        anchor = last_before(self.anchors, at)
        return anchor.label if anchor is not None else None

    def to_json(self) -> dict[str, Any]:
        """The document as strings, numbers and lists: what `from_json` takes back."""
        return {
            "name": self.name,
            "text": self.text,
            "anchors": [[anchor.start, anchor.label] for anchor in self.anchors],
            "by_line": self.by_line,
        }

    @classmethod
    def from_json(cls, value: Any) -> TextFile:
        """The document of `to_json`.

        Raises:
            StateError: `value` is none.
        """
        try:
            name, text, by_line = value["name"], value["text"], value["by_line"]
            anchors = tuple(Anchor(start, label) for start, label in value["anchors"])
            starts = [anchor.start for anchor in anchors]
            valid = (
                isinstance(name, str)
                and isinstance(text, str)
                and isinstance(by_line, bool)
                and all(type(start) is int and isinstance(label, str) for start, label in anchors)
                and starts == sorted(starts)
                and (not starts or 0 <= starts[0] <= starts[-1] <= len(text))
            )
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise StateError("a document lacks its name, text or anchors, or they do not fit each other")
        return cls(name, text, anchors, by_line)


def is_kv_file(path: str | Path) -> bool:
    """Whether a file is a KV file, or should be one by its name. Of a pipe nothing is read: it gives its bytes once."""
    found = Path(path)
    if found.suffix == ".akv":
        return True
    try:
        if not found.is_file():
            return False
        with found.open("rb") as file:
            return file.read(len(_KV_FILE)) == _KV_FILE
    except (OSError, ValueError):
        return False


def headings(files: Sequence[TextFile], *, before: Sequence[TextFile] = ()) -> list[str]:
    """What stands before each document in the text that the model reads: its name, with as many folders as tell it from
    the others; nothing before a single one. The same from whatever folder the names are seen.

    Args:
        before: documents that stand before these.

    Example:
        >>> headings([TextFile("texts/a.txt", "A."), TextFile("b.txt", "B.")])
        ['Document: a.txt\\n\\n', 'Document: b.txt\\n\\n']
    """
    if len(before) + len(files) == 1:
        return [""]
    paths = [PurePath(os.path.abspath(file.name)).parts for file in (*before, *files)]
    return [f"Document: {_shortest(path, set(paths))}\n\n" for path in paths[len(before) :]]


def _shortest(path: tuple[str, ...], paths: set[tuple[str, ...]]) -> PurePath:
    """The shortest end of a path that no other has."""
    free = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in paths - {path}))
    return PurePath(*path[-next(free, len(path)) :])


def load(path: str | Path) -> TextFile:
    """The text of a file, whole: PDF, DOCX, EPUB, HTML, Markdown; anything else in UTF-8 as it is, told by line.

    Args:
        path: a file, a named pipe or a process substitution; its name is what sources are reported under.

    Raises:
        DocumentError: it is missing, a folder, not readable, empty, binary, damaged, protected, or not in its
            encoding (with the byte offset); or the extra that reads its format is not installed.

    Example:
        >>> load("book.txt").text[:6]
        'Call m'
    """
    data, found = _bytes(path)
    return replace(_document(str(path), data), origin=Origin.of(path, found, data))


def load_plain(path: str | Path) -> str:
    """The text of a file in UTF-8 as it is, whatever its name says. DocumentError as for `load`."""
    return _plain(str(path), _bytes(path)[0])


def check_words(name: str, text: str) -> None:
    """DocumentError where a text is empty, white space alone, or a byte-order mark."""
    if not text.lstrip("\ufeff").strip():
        raise DocumentError(f"{name} is empty", "it needs at least a word")


def load_stdin() -> TextFile:
    """The text of standard input, up to its end; of the formats that `load` knows by their first bytes.

    Raises:
        DocumentError: it is a terminal, or as for `load`.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise DocumentError("standard input is closed", "pipe a document into it")
    if sys.stdin.isatty():
        raise DocumentError(
            "standard input is a terminal, not a document", "pipe a document into it: cat book.txt | actqkv ... -d -"
        )
    return _document(STDIN_NAME, sys.stdin.buffer.read())


def _bytes(path: str | Path) -> tuple[bytes, os.stat_result]:
    """What a file holds, and what the system said of it before it was read."""
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            found = os.fstat(file.fileno())
            return file.read(), found
    except FileNotFoundError:
        raise DocumentError(f"no such file: {name}", "check the path") from None
    except IsADirectoryError:
        raise DocumentError(f"{name} is a folder, not a file", "name its files one by one") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise DocumentError(f"cannot read {name}: {reason}", "check its permissions") from None


def _document(name: str, data: bytes) -> TextFile:
    """By the first bytes where a format has its own, else by the ending of the name."""
    suffix = PurePath(name).suffix.lower()
    if suffix == ".pdf" or data.lstrip().startswith(b"%PDF-"):
        found = pdf.read(name, data)
    elif data.startswith(b"PK\x03\x04"):
        found = _zipped(name, data)
    elif suffix in _HTML_NAMES or (not suffix and _HTML_START.match(data)):
        found = html.read(name, data)
    else:
        text = _plain(name, data)
        headings = suffix in _MARKDOWN_NAMES
        return TextFile(name, text, markdown.anchors(text) if headings else (), by_line=not headings)
    return TextFile(name, found.text, found.anchors)


def _zipped(name: str, data: bytes) -> Extract:
    """A zip archive: DOCX and EPUB are."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member.filename: member.file_size for member in archive.infolist()}
    except Exception as error:  # zipfile raises more than BadZipFile
        raise DocumentError(f"{name} is a damaged archive: {one_line(error)}", "get or save it again") from None
    n_bytes = sum(members.values())
    if n_bytes > _UNPACKED_BYTES:
        raise DocumentError(
            f"{name} unpacks to {n_bytes:,} bytes, at most {_UNPACKED_BYTES:,} are read",
            "take the text out of it first",
        )
    if "word/document.xml" in members:
        return docx.read(name, data)
    if "META-INF/container.xml" in members:
        return epub.read(name, data)
    raise DocumentError(
        f"{name} is a zip archive, neither DOCX nor EPUB",
        "unpack it, or save an ODT, PPTX or XLSX as PDF or text first",
    )


def _plain(name: str, data: bytes) -> str:
    for magic, what, hint in _SIGNATURES:
        if data.startswith(magic):
            raise DocumentError(f"{name} is {what}, not text in UTF-8", hint)
    if (at := data.find(0)) >= 0:
        raise DocumentError(
            f"{name} is binary: byte 0 at offset {at:,}",
            "documents are PDF, DOCX, EPUB, HTML, Markdown, or text and source code in UTF-8",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}",
            "convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 book.txt > book.utf8.txt",
        ) from None
    check_words(name, text)
    return text
