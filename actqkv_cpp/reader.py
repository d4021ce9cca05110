"""Documents as files: UTF-8 text and Markdown from a path or from standard input, checked before any work starts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from actqkv_cpp.errors import DocumentError

STDIN_NAME = "stdin"

# First bytes of what people hand over by mistake, and what to do about it.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF model", "the model is an argument of its own: actqkv chat model.gguf -d book.txt"),
    (b"%PDF", "a PDF", "take its text first, for example with pdftotext book.pdf book.txt"),
    (b"PK\x03\x04", "a zip archive (docx, epub, odt, ...)", "take its text first, for example with pandoc -t plain"),
    (b"\xd0\xcf\x11\xe0", "an Office file", "save it as plain text first"),
    (b"{\\rtf", "an RTF file", "save it as plain text first"),
    (b"\x1f\x8b", "a gzip file", "unpack it first with gunzip"),
    (b"\xff\xfe", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 book.txt > book.utf8.txt"),
    (b"\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 book.txt > book.utf8.txt"),
)


@dataclass(frozen=True)
class TextFile:
    """A document in memory. `text` is the whole file as decoded: offsets into it are offsets of the file."""

    name: str
    text: str


def load(path: str | Path) -> TextFile:
    """The text of a file, whole.

    Args:
        path: a file, a named pipe or a process substitution; its name is what sources are reported under.

    Raises:
        DocumentError: it is missing, a directory, not readable, empty, binary, or not UTF-8 (with the byte offset).

    Example:
        >>> load("book.txt").text[:6]
        'Call m'
    """
    name = str(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DocumentError(f"no such document: {name}", "check the path") from None
    except IsADirectoryError:
        raise DocumentError(f"{name} is a directory, not a document", "name its files one by one") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise DocumentError(f"cannot read {name}: {reason}", "check its permissions") from None
    return _decode(name, data)


def load_stdin() -> TextFile:
    """The text of standard input, up to its end.

    Raises:
        DocumentError: it is a terminal, or as for `load`.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise DocumentError("standard input is closed", "pipe a document into it")
    if sys.stdin.isatty():
        raise DocumentError(
            "standard input is a terminal, not a document", "pipe a document into it: cat book.txt | actqkv ... -d -"
        )
    return _decode(STDIN_NAME, sys.stdin.buffer.read())


def _decode(name: str, data: bytes) -> TextFile:
    for signature, kind, hint in _SIGNATURES:
        if data.startswith(signature):
            raise DocumentError(f"{name} is {kind}, not UTF-8 text", hint)
    if (at := data.find(0)) >= 0:
        raise DocumentError(f"{name} is binary: byte 0 at offset {at:,}", "documents are UTF-8 text or Markdown")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}",
            "convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 book.txt > book.utf8.txt",
        ) from None
    if not text.strip("\ufeff \t\r\n\f\v"):
        raise DocumentError(f"{name} is empty", "a document needs at least a word")
    return TextFile(name, text)
