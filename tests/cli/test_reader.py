"""Documents as files: what is taken out of each format, where its places are, what is refused with a reason."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import tiny_documents as tiny

from actqkv_cpp import DocumentError, StateError, reader
from actqkv_cpp.formats.extract import Anchor

PDF = tiny.pdf([["The key hung in the mill.", "Nobody (not even Marten) knew."], [], ["Later it was gone."]])
DOCX = tiny.docx(
    [("heading 1", "The Mill"), ("", "The key & the lock."), ("", "Marten\tmiller"), ("heading 2", "Later")]
)
EPUB = tiny.epub(
    {"one.xhtml": "<body><h1>The <i>Mill</i></h1><p>The key&#160;hung.</p></body>", "two.xhtml": "<p>It was gone.</p>"},
    contents={"one.xhtml": "Not this", "two.xhtml": "Chapter <b>Two</b>"},
)
HTML = (
    "<!DOCTYPE html><html><head><meta charset=utf-8><title>No</title><style>p {}</style></head><body>"
    "<script>var no = '<p>no</p>';</script><h1>The <b>mill</b> at Grünau\n</h1><p>The   key<br>hung.</p>"
    "<ul><li>one<li>two</ul><table><tr><td>a</td><td><p>b</p></td></tr><tr><td>c<td>d</table>"
    "<pre>x\n  y</pre>tail &amp; &lt;p&gt;</body>"
).encode()


def load(folder: Path, name: str, data: bytes) -> reader.TextFile:
    path = folder / name
    path.write_bytes(data)
    found = reader.load(path)
    assert found.name == str(path)
    assert reader.TextFile.from_json(found.to_json()) == found
    return found


def test_text_is_the_file_itself(tmp_path: Path) -> None:
    """Offsets of sources point to other places of the file when a mark or a line end is dropped."""
    text = "\ufeffGrüße,\r\n日本 \U0001f600\n"
    assert load(tmp_path, "letter.md", text.encode("utf-8")).text == text
    assert load(tmp_path, "letter.txt", text.encode("utf-8")).text == text


def test_source_code_is_told_by_line(tmp_path: Path) -> None:
    """A source in a program names no line, the wrong one, or takes a comment for a heading."""
    file = load(tmp_path, "a.py", b"# not a heading\nx = 1\n\ny = 2\n")
    assert [file.place(file.text.index(word)) for word in ("#", "x", "y")] == ["line 1", "line 2", "line 4"]
    assert file.anchors == ()


def test_markdown(tmp_path: Path) -> None:
    """A heading's place is wrong (line ends of two bytes), a comment in code is taken for one, or one is missed."""
    file = load(tmp_path, "a.md", b"Before\r\n\r\n# One  #\r\n\r\n```\r\n# not\r\n```\r\nTwo\r\n===\r\nmore\r\n")
    assert file.place(0) is None
    assert [file.place(file.text.index(word)) for word in ("# One", "# not", "Two", "more")] == [
        "One",
        "One",
        "Two",
        "Two",
    ]


def test_markdown_code_within_a_line(tmp_path: Path) -> None:
    """Code that begins a line, fenced in three backticks within it, hides all headings that follow."""
    file = load(tmp_path, "a.md", b"# One\n\n```pip install x```\n\n# Two\n\n~~~ a ` b\n# not\n~~~\n\n# Three\n")
    assert [anchor.label for anchor in file.anchors] == ["One", "Two", "Three"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("---\ntitle: One\n---\n# Two\n", ["Two"]),
        ("\ufeff---\r\ntitle: One\r\n---\r\n# Two\r\n", ["Two"]),
        ("---\n\n# One\n\nmore\n\n# Two\n", ["One", "Two"]),
    ],
)
def test_markdown_front_matter(tmp_path: Path, text: str, labels: list[str]) -> None:
    """Settings before the text are taken for a heading, or a rule there hides all headings."""
    assert [anchor.label for anchor in load(tmp_path, "a.md", text.encode()).anchors] == labels


def test_pdf(tmp_path: Path) -> None:
    """Lines of a PDF are lost or run together, or a passage is told to stand on another page."""
    file = load(tmp_path, "a.pdf", PDF)
    assert file.text == "The key hung in the mill.\nNobody (not even Marten) knew.\n\nLater it was gone."
    assert file.anchors == (Anchor(0, "p. 1"), Anchor(file.text.index("Later"), "p. 3"))
    assert file.place(len(file.text) - 1) == "p. 3"


@pytest.mark.parametrize(("first", "labels"), [("i", ["p. i", "p. ii"]), ("214", ["p. 214", "p. 215"])])
def test_pdf_has_printed_page_numbers(tmp_path: Path, first: str, labels: list[str]) -> None:
    """A page is told by its place in the file where another number is printed on it."""
    file = load(tmp_path, "a.pdf", tiny.pdf([["One."], ["Two."]], first_label=first))
    assert [anchor.label for anchor in file.anchors] == labels


def test_docx(tmp_path: Path) -> None:
    """Paragraphs, tables or headings of a Word document are lost."""
    file = load(tmp_path, "a.docx", DOCX)
    assert file.text == "The Mill\n\nThe key & the lock.\n\nMarten\tmiller\n\nLater"
    assert file.anchors == (Anchor(0, "The Mill"), Anchor(file.text.index("Later"), "Later"))


def test_epub(tmp_path: Path) -> None:
    """Chapters of an EPUB are lost or in another order; one without a heading is not told by the table of contents."""
    file = load(tmp_path, "a.epub", EPUB)
    assert file.text == "The Mill\n\nThe key hung.\n\nIt was gone."
    assert file.anchors == (Anchor(0, "The Mill"), Anchor(file.text.index("It"), "Chapter Two"))


def test_html(tmp_path: Path) -> None:
    """A script or a style is read as text, blocks run together, or a heading's place is wrong."""
    file = load(tmp_path, "a.html", "<p>Före</p>".encode() + HTML)
    assert file.text == (
        "Före\n\nThe mill at Grünau\n\nThe key\nhung.\n\none\ntwo\n\na\tb\nc\td\n\nx\n  y\n\ntail & <p>"
    )
    assert file.anchors == (Anchor(file.text.index("The mill"), "The mill at Grünau"),)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ('<meta charset="iso-8859-1">caf\xe9 \x93so\x94'.encode("latin-1"), "café “so”"),
        ('<?xml version="1.0" encoding="utf-16"?>é'.encode(), "é"),
        ("\ufeff<meta charset=latin-1>é".encode(), "é"),
        (b'<meta charset="klingon">x', None),
        (b'<meta charset="rot13">x', None),
        (b"caf\xe9", None),
    ],
)
def test_html_encodings(tmp_path: Path, data: bytes, text: str | None) -> None:
    """A page is read in another encoding than it names, or a wrong name ends in a traceback."""
    if text is not None:
        assert load(tmp_path, "a.html", data).text == text
    else:
        with pytest.raises(DocumentError, match=r"is not UTF-|unknown encoding") as found:
            load(tmp_path, "a.html", data)
        assert "UTF-8" in str(found.value.hint)


def test_formats_are_known_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PDF or a page on standard input is taken for text."""

    class Stdin:
        closed = False

        def __init__(self, data: bytes) -> None:
            self.buffer = self
            self.read = lambda: data

        def isatty(self) -> bool:
            return False

    for data, start in [(PDF, "The key hung"), (b"\n" + HTML, "The mill"), (DOCX, "The Mill"), (b"<p>x", "<p>x")]:
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        assert reader.load_stdin().text.startswith(start)


@pytest.mark.parametrize(
    ("name", "data", "words", "hint"),
    [
        ("a.txt", b"", "is empty", "a word"),
        ("a.txt", b"\xef\xbb\xbf \r\n\t", "is empty", "a word"),
        ("a.txt", "\u2003\u00a0\n".encode(), "is empty", "a word"),
        ("a.txt", b"text\x00more", "byte 0 at offset 4", "UTF-8"),
        ("a.txt", b"caf\xe9 au lait", "byte 0xe9 at offset 3", "iconv"),
        ("a.md", "naïve".encode() + b"\xc3", "byte 0xc3 at offset 6", "iconv"),
        ("a.txt", "text".encode("utf-16"), "UTF-16", "iconv"),
        ("a.txt", b"GGUF\x03\x00\x00\x00", "GGUF model", "argument of its own"),
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1", "password", "DOCX"),
        ("a.txt", b"%PDF-1.7\n", "damaged PDF", "qpdf"),
        ("a.pdf", b"just text", "damaged PDF", "qpdf"),
        ("a.pdf", PDF[:200], "damaged PDF", "qpdf"),
        ("a.pdf", tiny.pdf([["One."]], locked=True), "password", "qpdf --decrypt"),
        ("a.pdf", tiny.pdf([[], []]), "its 2 pages", "ocrmypdf"),
        ("a.docx", DOCX[:-40], "damaged archive", "again"),
        ("a.docx", tiny.zipped({"word/document.xml": "<w:x"}), "damaged DOCX", "word processor"),
        ("a.docx", tiny.docx([]), "without text", "a word"),
        ("a.epub", tiny.zipped({"META-INF/container.xml": "<a/>"}), "damaged EPUB", "again"),
        ("a.epub", tiny.epub({"a.xhtml": "<p>One.</p>"}, locked=True), "DRM", "shop"),
        ("a.epub", tiny.epub({"a.xhtml": "<p/>"}), "without text", "a word"),
        ("a.odt", tiny.zipped({"content.xml": "<a/>"}), "zip archive", "PDF or text"),
        ("a.html", b"<html><script>x</script>", "without text", "browser"),
    ],
)
def test_refused(tmp_path: Path, name: str, data: bytes, words: str, hint: str) -> None:
    """A file that holds no text is read as nonsense, or refused without saying why and what to do."""
    with pytest.raises(DocumentError, match=words) as found:
        load(tmp_path, name, data)
    assert str(tmp_path / name) in str(found.value)
    assert "\n" not in str(found.value)
    assert hint in str(found.value.hint)


@pytest.mark.parametrize(
    ("name", "data", "module"),
    [("a.pdf", PDF, "pypdfium2"), ("a.docx", DOCX, "mammoth"), ("a.html", HTML, "lxml"), ("a.epub", EPUB, "lxml")],
)
def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, module: str) -> None:
    """Without the extra, a traceback of an import instead of the command that installs it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DocumentError, match=module) as found:
        load(tmp_path, name, data)
    assert found.value.hint == 'pip install "actqkv[documents]"'


@pytest.mark.parametrize(
    "piece", ["<a", "<!--", "<![", "<![CDATA[", "<?", "</", "<!", '<b a="', "&", "&#", "<div>", "<script>"]
)
def test_pages_that_stall_parsers(tmp_path: Path, piece: str) -> None:
    """A page of unfinished tags takes minutes, or ends in a traceback."""
    begin = time.process_time()
    file = load(tmp_path, "a.html", b"<p>word</p>" + piece.encode() * 50_000)
    assert file.text.startswith("word")
    assert time.process_time() - begin < 10


def test_archive_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small archive fills the memory."""
    monkeypatch.setattr(reader, "_UNPACKED_BYTES", 1000)
    with pytest.raises(DocumentError, match="at most 1,000 are read"):
        load(tmp_path, "a.epub", tiny.epub({"a.xhtml": f"<p>{'a' * 1000}</p>"}))


@pytest.mark.parametrize(("name", "whole"), [("a.pdf", PDF), ("a.docx", DOCX), ("a.epub", EPUB), ("a.html", HTML)])
def test_damage_is_an_error_or_text(tmp_path: Path, name: str, whole: bytes) -> None:
    """A damaged file ends in a traceback of the library that reads it."""
    rng = random.Random(name)
    n_texts = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / name).write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            found = reader.load(tmp_path / name)
        except DocumentError:
            continue
        n_texts += 1
        assert reader.TextFile.from_json(found.to_json()) == found
    assert n_texts < 100


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("text"),
        lambda value: value.update(anchors=[[5, "b"], [1, "a"]]),
        lambda value: value.update(anchors=[[99, "a"]]),
        lambda value: value.update(anchors=[["1", "a"]]),
        lambda value: value.update(anchors=[[1]]),
        lambda value: value.update(name=7),
    ],
)
def test_foreign_json(change: Callable[[dict[str, object]], object]) -> None:
    """A document out of a damaged KV file brings offsets that lie outside its text."""
    value = reader.TextFile("a.txt", "the text", (Anchor(1, "a"),)).to_json()
    change(value)
    with pytest.raises(StateError, match="document"):
        reader.TextFile.from_json(value)


def test_pipes_are_read_once(tmp_path: Path) -> None:
    """A process substitution loses its first bytes to the look whether it is a KV file; a named pipe is waited for."""
    text = "The key hung in the mill. " * 1000
    reading, writing = os.pipe()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    names = {f"/dev/fd/{reading}": lambda: os.fdopen(writing, "w"), str(fifo): lambda: fifo.open("w")}
    for name, open_end in names.items():

        def write(open_end: Callable[[], IO[str]] = open_end) -> None:
            with open_end() as end:
                end.write(text)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        assert not reader.is_kv_file(name)
        assert reader.load(name).text == text
        writer.join()
    os.close(reading)


def test_refused_paths(tmp_path: Path) -> None:
    """A wrong path ends in a traceback."""
    with pytest.raises(DocumentError, match="no such file"):
        reader.load(tmp_path / "missing.txt")
    with pytest.raises(DocumentError, match="is a folder"):
        reader.load(tmp_path)
    with pytest.raises(DocumentError, match="cannot read"):
        reader.load("nul\0name.txt")


@pytest.mark.parametrize(
    ("before", "names", "found"),
    [
        ((), ("one.txt",), ("",)),
        ((), ("texts/one.txt", "two.txt"), ("one.txt", "two.txt")),
        (("one.txt",), ("two.txt",), ("two.txt",)),
        ((), ("x/a/notes.txt", "x/b/notes.txt", "y.txt"), ("a/notes.txt", "b/notes.txt", "y.txt")),
        ((), ("a/x/n", "b/x/n"), ("a/x/n", "b/x/n")),
        (("a/notes.txt",), ("b/notes.txt",), ("b/notes.txt",)),
        ((), ("here/notes.txt", "here/../there/notes.txt"), ("here/notes.txt", "there/notes.txt")),
        ((), ("text", "text"), ("text", "text")),
        ((), ("/notes", "/a/notes"), ("/notes", "a/notes")),
    ],
)
def test_headings(
    before: tuple[str, ...], names: tuple[str, ...], found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of one name cannot be told apart, or are called otherwise when they are read from another folder."""
    monkeypatch.chdir("/")
    expected = [f"Document: {name}\n\n" if name else "" for name in found]

    def told(prefix: str) -> list[str]:
        earlier, files = ([reader.TextFile(prefix + name, "") for name in some] for some in (before, names))
        return reader.headings(files, before=earlier)

    assert told("") == expected
    monkeypatch.chdir("/usr")
    if not any(name.startswith("/") for name in names):
        assert told("/") == told("../") == told("/usr/lib/") == expected
