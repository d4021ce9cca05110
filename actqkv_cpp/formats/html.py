"""HTML by lxml: text as a browser would show it, without scripts and styles; headings are anchors."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from contextlib import suppress

from actqkv_cpp.errors import DocumentError
from actqkv_cpp.formats.extract import Builder, Extract

_SKIPPED = {"script", "style", "title", "template", "noscript", "iframe", "svg", "math", "object", "canvas"}
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
# Newlines before and after: a blank line, or a line of its own.
_GAPS = dict.fromkeys(
    ("p", "blockquote", "pre", "table", "ul", "ol", "dl", "section", "article", "header", "footer", "main", "aside",
     "nav", "figure", "form", "fieldset", "hr", "address", "details", *sorted(_HEADINGS)), 2
) | dict.fromkeys(
    ("div", "li", "tr", "dt", "dd", "caption", "figcaption", "summary", "option", "legend", "body", "head"), 1
)  # fmt: skip
_CHARSET = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_HEAD_BYTES = 1024  # within which a page names its encoding
# As browsers take them; the last ones cannot be, since the name itself was readable byte by byte.
_WEB_NAMES = {"iso8859-1": "cp1252", "ascii": "cp1252"} | dict.fromkeys(
    ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"), "utf-8"
)


def read(name: str, data: bytes) -> Extract:
    """The text of an HTML page.

    Raises:
        DocumentError: it is not in the encoding that it names (UTF-8 where it names none), or shows no text.
    """
    found = extract(name, decode(name, data))
    if not found.text:
        raise DocumentError(f"{name} is an HTML page without text", "a page that scripts fill: save it from a browser")
    return found


def extract(name: str, page: str) -> Extract:
    """The text of a page in memory; empty where it shows none.

    Raises:
        DocumentError: the extra is not installed.
    """
    try:
        from lxml import etree  # noqa: PLC0415 (an extra)
    except ImportError:
        raise DocumentError(
            f"{name} is made of HTML, which lxml reads, and that is not installed", 'pip install "actqkv[documents]"'
        ) from None
    target = _Target()
    parser = etree.HTMLParser(target=target, encoding="utf-8", huge_tree=True)
    with suppress(etree.XMLSyntaxError):  # a page without an element
        parser.feed(page.encode("utf-8", "replace"))
        parser.close()
    return target.close()


def decode(name: str, data: bytes) -> str:
    """A page's characters, by its mark, the encoding it names, or UTF-8."""
    found = _CHARSET.search(data[:_HEAD_BYTES])
    encoding = "utf-8-sig" if data.startswith(codecs.BOM_UTF8) or not found else found[1].decode("ascii")
    try:
        known = codecs.lookup(encoding).name
        return data.decode(_WEB_NAMES.get(known, known))
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not {encoding.removesuffix('-sig').upper()}: byte 0x{data[error.start]:02x} at offset "
            f"{error.start:,}",
            "convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 page.html > page.utf8.html",
        ) from None
    except (LookupError, ValueError):  # ValueError: a codec that is no text encoding
        raise DocumentError(
            f"{name} names an unknown encoding: {encoding}", "convert it to UTF-8 and take the name out"
        ) from None


class _Target:
    """Takes the parser's events and builds the text."""

    def __init__(self) -> None:
        self.builder = Builder()
        self._skipped: str | None = None  # the element whose content is passed over
        self._n_skipped = 0  # how deeply it is nested in itself
        self._n_pre = 0
        self._gap = 0  # newlines, tabs or a space that count as soon as a word follows
        self._tabs = 0
        self._space = False
        self._n_cells = 0  # of the current row
        self._new_cell = False  # nothing stands in the current cell yet: blocks in it begin no line
        self._heading: tuple[int, list[str]] | None = None  # where it begins, and its words

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if self._skipped is not None:
            self._n_skipped += tag == self._skipped
        elif tag in _SKIPPED:
            self._skipped, self._n_skipped = tag, 1
        elif tag in ("td", "th"):
            self._begin_cell()
        else:
            self._break(tag)
            if tag in _HEADINGS:
                self._separate()
                self._heading = (self.builder.n, [])
            elif tag == "pre":
                self._n_pre += 1

    def end(self, tag: str) -> None:
        if self._skipped is not None:
            self._n_skipped -= tag == self._skipped
            if not self._n_skipped:
                self._skipped = None
            return
        if tag == "pre":
            self._n_pre = max(self._n_pre - 1, 0)
        elif tag == "tr":
            self._gap = 0  # of blocks in its last cell
        if tag != "br":
            self._break(tag)

    def _begin_cell(self) -> None:
        self.end_heading()
        if self._n_cells:
            self._gap = 0
            self._tabs += 1
        self._n_cells += 1
        self._new_cell, self._space = True, False

    def _break(self, tag: str) -> None:
        if tag == "br":
            self.builder.write("\n")
            self._space = False
        elif tag in _GAPS:
            self.end_heading()
            if tag in ("tr", "table"):
                self._n_cells = self._tabs = 0
                self._new_cell = False
            self._gap = max(self._gap, 0 if self._new_cell else _GAPS[tag])
            self._space = False

    def _separate(self) -> None:
        """Write what stands between the last word and the next."""
        self.builder.gap(self._gap)
        self.builder.write("\t" * self._tabs or (" " if self._space and not self.builder.at_line_start else ""))
        self._gap = self._tabs = 0
        self._space = self._new_cell = False

    def end_heading(self) -> None:
        """Its anchor, if a heading is open; one that was never closed ends where the next block begins."""
        if self._heading is not None:
            start, words = self._heading
            self._heading = None
            self.builder.anchor("".join(words), start)

    def close(self) -> Extract:
        self.end_heading()
        return self.builder.build()

    def data(self, data: str) -> None:
        if self._skipped is not None:
            return
        if self._heading is not None:
            self._heading[1].append(data)
        if self._n_pre:
            self._separate()
            self.builder.write(data.replace("\r\n", "\n"))
            return
        words = data.split()
        self._space = self._space or data[:1].isspace()
        if words:
            self._separate()
            self.builder.write(" ".join(words))
            self._space = data[-1].isspace()
