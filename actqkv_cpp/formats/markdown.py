"""Markdown: the text as it is, headings as anchors.

A scan of lines, since anchors need no more and a parser of all of CommonMark takes seconds per megabyte.
"""

from __future__ import annotations

import re

from actqkv_cpp.formats.extract import Anchor

_LINE = re.compile(r"([^\r\n]*)(?:\r\n|\r|\n|$)")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")  # with a backtick behind it, it is code within a line
_HASHES = re.compile(r"\ufeff? {0,3}#{1,6}(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*$")
_NO_PARAGRAPH = re.compile(r"\s*$|\s*[#>|*+-]|\s*\d+[.)]\s|    |\t")  # a line that an underline makes no heading of
_FRONT_MATTER, _ITS_ENDS = "---", ("---", "...")


def anchors(text: str) -> tuple[Anchor, ...]:
    """The headings of a Markdown text, hashed or underlined, where their lines begin; not those in fenced code."""
    found: list[Anchor] = []
    fence = ""  # that the current code began with
    before = (0, "")  # the line before: where it begins, and what it says
    for match in _LINE.finditer(text, _after_front_matter(text)):
        line, start = match[1], match.start()
        if fence:
            mark = _FENCE.match(line)
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
            line = ""
        elif mark := _FENCE.match(line):
            fence, line = mark[1], ""
        elif heading := _HASHES.match(line):
            if heading[1]:
                found.append(Anchor(start, " ".join(heading[1].split())))
        elif _UNDERLINE.match(line) and not _NO_PARAGRAPH.match(before[1]):
            found.append(Anchor(before[0], " ".join(before[1].split())))
            line = ""
        before = (start, line)
    return tuple(found)


def _after_front_matter(text: str) -> int:
    """Where the text begins behind the settings that some files have before it; where nothing ends them, their first
    line is a rule."""
    lines = _LINE.finditer(text)
    if next(lines)[1].removeprefix("\ufeff").rstrip() != _FRONT_MATTER:
        return 0
    return next((line.end() for line in lines if line[1].rstrip() in _ITS_ENDS), 0)
