"""What every format gives: text and anchors, and the builder that collects them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# No text of any format has use for these: controls but tab and newline, noncharacters, halves of surrogate pairs.
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Anchor(NamedTuple):
    """A place of a document that people know by name, such as "p. 214" or a heading: from character `start` of the
    text to the next anchor."""

    start: int
    label: str


@dataclass(frozen=True)
class Extract:
    """The text of a document and its anchors, in order."""

    text: str
    anchors: tuple[Anchor, ...] = ()


class Builder:
    """Collects text piece by piece, and anchors where they stand."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._anchors: list[Anchor] = []
        self._n_newlines = 2  # at the end of the text; at its beginning none are wanted
        self.n = 0

    def write(self, text: str) -> None:
        text = _UNWANTED.sub("", text)
        if text:
            self._parts.append(text)
            self.n += len(text)
            n_newlines = len(text) - len(text.rstrip("\n"))
            self._n_newlines = n_newlines + (self._n_newlines if n_newlines == len(text) else 0)

    def gap(self, n_newlines: int) -> None:
        """Have the text end in at least so many newlines, unless nothing was written."""
        if n_newlines > self._n_newlines:
            self.write("\n" * (n_newlines - self._n_newlines))

    @property
    def at_line_start(self) -> bool:
        return self._n_newlines > 0

    def anchor(self, label: str, start: int | None = None) -> None:
        """A place called `label` begins at `start`, by default here. Without a word it is none."""
        label = " ".join(_UNWANTED.sub("", label).split())
        if label:
            self._anchors.append(Anchor(self.n if start is None else start, label))

    def add(self, extract: Extract) -> None:
        """The text of another extract with its anchors."""
        start = self.n
        self.write(extract.text)
        self._anchors += [Anchor(start + anchor.start, anchor.label) for anchor in extract.anchors]

    def build(self) -> Extract:
        """The text without white space at its end."""
        text = "".join(self._parts).rstrip()
        return Extract(text, tuple(anchor for anchor in self._anchors if anchor.start < len(text)))


def one_line(error: BaseException) -> str:
    """What a library says of a file that it cannot read."""
    return " ".join(str(error).split()) or type(error).__name__


def last_before(anchors: Sequence[Anchor], at: int) -> Anchor | None:
    """The anchor that character `at` belongs to."""
    found = None
    for anchor in anchors:
        if anchor.start > at:
            break
        found = anchor
    return found
