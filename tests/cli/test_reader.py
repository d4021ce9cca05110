"""Documents as files: what is taken, and what is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from actqkv_cpp import DocumentError, reader


def test_text_is_the_file_itself(tmp_path: Path) -> None:
    """Offsets of sources point to other places of the file when a mark or a line end is dropped."""
    text = "\ufeffGrüße,\r\n日本 \U0001f600\n"
    path = tmp_path / "letter.md"
    path.write_bytes(text.encode("utf-8"))
    assert reader.load(path) == reader.TextFile(str(path), text)


@pytest.mark.parametrize(
    ("data", "words", "hint"),
    [
        (b"", "is empty", "a word"),
        (b"\xef\xbb\xbf \r\n\t", "is empty", "a word"),
        (b"text\x00more", "byte 0 at offset 4", "UTF-8"),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3", "iconv"),
        ("naïve".encode() + b"\xc3", "byte 0xc3 at offset 6", "iconv"),
        ("text".encode("utf-16"), "UTF-16", "iconv"),
        (b"%PDF-1.7\n", "PDF", "pdftotext"),
        (b"PK\x03\x04rest", "zip", "pandoc"),
        (b"GGUF\x03\x00\x00\x00", "GGUF model", "argument of its own"),
    ],
)
def test_refused(tmp_path: Path, data: bytes, words: str, hint: str) -> None:
    """A file that is no UTF-8 text is read as nonsense, or refused without saying where and what to do."""
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    with pytest.raises(DocumentError, match=words) as found:
        reader.load(path)
    assert str(path) in str(found.value)
    assert hint in str(found.value.hint)


def test_refused_paths(tmp_path: Path) -> None:
    """A wrong path ends in a traceback."""
    with pytest.raises(DocumentError, match="no such document"):
        reader.load(tmp_path / "missing.txt")
    with pytest.raises(DocumentError, match="is a directory"):
        reader.load(tmp_path)
    with pytest.raises(DocumentError, match="cannot read"):
        reader.load("nul\0name.txt")
