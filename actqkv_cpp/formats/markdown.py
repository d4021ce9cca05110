"""Markdown: the text as it is, headings as anchors."""

from __future__ import annotations

import re
from itertools import pairwise

from actqkv_cpp.formats.extract import Anchor

_LINE_END = re.compile(r"\r\n|\r|\n")


def anchors(text: str) -> tuple[Anchor, ...]:
    """The headings of a Markdown text (CommonMark), where their lines begin."""
    from markdown_it import MarkdownIt  # noqa: PLC0415 (tens of milliseconds)

    parser = MarkdownIt("commonmark").disable("inline")
    starts = [0, *(found.end() for found in _LINE_END.finditer(text))]
    found = []
    for token, inside in pairwise(parser.parse(text)):
        if token.type == "heading_open" and token.map is not None and inside.content.strip():
            found.append(Anchor(starts[token.map[0]], " ".join(inside.content.split())))
    return tuple(found)
