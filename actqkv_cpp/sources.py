"""Which passages an answer came from: sentences of the documents by the attention that the answer's tokens gave them.

Attention comes per token of the past, as the sum of its squared weights over answered tokens, heads and layers
(`Session.sources_end`): heads that retrieve put their weight on few tokens and decide, what heads spread over all that
is attended comes to next to nothing. Every token is treated alike, whether sink, chunk, remainder or local. Template
and question are in no document; with them goes the history's first token, which draws attention whatever it says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp.reader import TextFile
from actqkv_cpp.results import Source
from actqkv_cpp.template import Span

N_PASSAGES = 3
_N_SENTENCES = 12  # looked at: neighbours of a passage join it, others compete for the three places
_LEAST_SCORE = 0.01  # of a passage beside the best
_REACH_CHARS = 300  # of a sentence before and after the attended word
_PASSAGE_CHARS = 800  # neighbours join up to this length ...
_JOINED_SHARE = 0.1  # ... where the lesser has this share of the other's attention

# Where a sentence may end: at a full stop and the like before white space, in Chinese and Japanese also without, and
# with a line so short that it is none of running text (a heading, code, a row of a table) or empty.
_END = re.compile(r"[.!?\u2026][\"'\u2019\u201d)\]]*(?=\s)|[\u3002\uff01\uff1f]|\n")
_SHORT_LINE_CHARS = 50
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Za-z]|Mrs?|Ms|Dr|Prof|St|No|pp|vs|cf|al|[Ff]igs?|[Vv]ol|e\.g|i\.e)\.$")


@dataclass
class _Passage:
    """Characters [start, end) of a span's document, and their part of the attention."""

    span: int
    start: int
    end: int
    weight: float


def find(weights: NDArray[np.float64], spans: Sequence[Span], files: Sequence[TextFile]) -> tuple[Source, ...]:
    """The passages of most attention, best first: at most three, each of whole sentences.

    From the most attended token down, the sentence around it is taken with all attention that falls on it; sentences
    that follow each other and were attended alike become one passage. A passage's score is its share of what fell on
    the documents.

    Args:
        weights: [n] of the history's first tokens, as Session.sources_end gives them.
        spans: where documents lie in the session.
        files: the documents, by the numbers in `spans`.
    """
    found: list[_Passage] = []
    for i, span in enumerate(spans):
        found += _sentences(i, weights[span.start : span.end], span, files[span.document].text)
    total = sum(float(weights[span.start : span.end].sum()) for span in spans)
    found.sort(key=lambda passage: -passage.weight)
    passages = _joined(found[:_N_SENTENCES], [files[span.document].text for span in spans])
    passages.sort(key=lambda passage: -passage.weight)
    kept = [p for i, p in enumerate(passages[:N_PASSAGES]) if i == 0 or p.weight >= _LEAST_SCORE * total]
    return tuple(_source(spans[passage.span].document, files, passage, total) for passage in kept)


def character_ends(text: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ends of tokens, given in bytes of the text, as ends in whole characters of it [n]."""
    data = np.frombuffer(text.encode(), np.uint8)
    begins = np.flatnonzero((data & 0xC0) != 0x80)
    return np.searchsorted(np.append(begins[1:], len(data)), ends, side="right").astype(np.int64)


def sentence_around(text: str, at: int) -> tuple[int, int]:
    """Start and end of the sentence that character `at` of a text stands in, without white space around it.

    Example:
        >>> sentence_around("It rained. Dr. Low slept.", 15)
        (11, 25)
    """
    first, last = max(at - _REACH_CHARS, 0), min(at + _REACH_CHARS, len(text))
    start, end = first, last
    if first and not text[first - 1].isspace():  # within a word
        start = next((i for i in range(first, at) if text[i].isspace()), first)
    if last < len(text) and not text[last].isspace():
        end = next((i for i in range(last, at, -1) if text[i - 1].isspace()), last)
    for match in _END.finditer(text, first, last):
        if not _ends_sentence(text, match):
            continue
        if match.end() > at:
            end = min(end, match.end())
            break
        start = match.end()
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Whether what `_END` found in a text does."""
    if match[0] == "\n":
        return match.start() - (text.rfind("\n", 0, match.start()) + 1) <= _SHORT_LINE_CHARS
    follows = text[match.end() : match.end() + 2].strip()
    return not follows.islower() and not _ABBREVIATION.search(text[max(match.end() - 8, 0) : match.end()])


def _sentences(i: int, weights: NDArray[np.float64], span: Span, text: str) -> list[_Passage]:
    """The most attended sentences of a span, with all attention on each."""
    if not weights.any():
        return []
    ends = character_ends(text, span.ends)[: len(weights)]
    left = weights.copy()
    found: list[_Passage] = []
    for token in np.argsort(-weights, kind="stable"):
        if len(found) == _N_SENTENCES or weights[token] <= 0.0:
            break
        if left[token] == 0.0:  # in a sentence that was taken
            continue
        begin = int(ends[token - 1]) if token else 0
        word = next((at for at in range(begin, int(ends[token])) if not text[at].isspace()), begin)
        start, end = sentence_around(text, word)
        first = min(int(np.searchsorted(ends, start, side="right")), int(token))
        last = max(int(np.searchsorted(ends, end, side="left")), int(token)) + 1
        weight = float(left[first:last].sum())
        left[first:last] = 0.0
        if start < end:
            found.append(_Passage(i, start, end, weight))
    return found


def _joined(passages: list[_Passage], texts: Sequence[str]) -> list[_Passage]:
    """Passages between which nothing stands, as one; `texts` are of the spans."""
    out: list[_Passage] = []
    for passage in sorted(passages, key=lambda p: (p.span, p.start)):
        before = out[-1] if out else None
        if (
            before is not None
            and before.span == passage.span
            and not texts[passage.span][before.end : passage.start].strip()
            and passage.end - before.start <= _PASSAGE_CHARS
            and min(before.weight, passage.weight) >= _JOINED_SHARE * max(before.weight, passage.weight)
        ):
            before.end = max(before.end, passage.end)
            before.weight += passage.weight
        else:
            out.append(passage)
    return out


def _source(number: int, files: Sequence[TextFile], passage: _Passage, total: float) -> Source:
    file = files[number]
    return Source(
        document=file.name,
        start=passage.start,
        end=passage.end,
        text=file.text[passage.start : passage.end],
        score=passage.weight / total,
        place=file.place(passage.start),
        number=number,
    )
