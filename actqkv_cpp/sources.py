"""Which passages an answer came from: chunks of the documents by the attention mass of the answer's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp.figures import Params
from actqkv_cpp.reader import TextFile
from actqkv_cpp.results import Source
from actqkv_cpp.template import Span

_N_PASSAGES = 3
_N_CHUNKS = 6  # ranked chunks looked at: neighbours of a passage join it, others fill the three places


@dataclass(frozen=True, order=True)
class _Passage:
    """Blocks first .. last that lie in one span, with their attention mass."""

    mass: float
    span: int
    first: int
    last: int

    def touches(self, other: _Passage) -> bool:
        return self.span == other.span and self.first - 1 <= other.last and other.first - 1 <= self.last


def find(
    mass: NDArray[np.float64], params: Params, spans: Sequence[Span], files: Sequence[TextFile]
) -> tuple[Source, ...]:
    """The passages of most attention, best first.

    Chunks that lie in a document are ranked by mass; from the best down, a chunk joins the passage beside it or opens
    one of three. Sinks are left out: they draw attention whatever they say. A passage's score is its share of the mass
    that fell on the documents.

    Args:
        mass: [n_blocks] as Session.sources_end gives it.
        params: of the session.
        spans: where documents lie in the session.
        files: the documents, by the numbers in `spans`.
    """
    chunks = [chunk for i, span in enumerate(spans) for chunk in _chunks(mass, params, i, span) if chunk.mass > 0.0]
    total = sum(chunk.mass for chunk in chunks)
    passages: list[_Passage] = []
    for chunk in sorted(chunks, reverse=True)[:_N_CHUNKS]:
        beside = [passage for passage in passages if passage.touches(chunk)]
        if not beside and len(passages) == _N_PASSAGES:
            break
        passages = [passage for passage in passages if passage not in beside] + [_merged([chunk, *beside])]
    return tuple(
        _source(files[spans[passage.span].document], spans[passage.span], passage, passage.mass / total, params)
        for passage in sorted(passages, reverse=True)
    )


def character_ends(text: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ends of tokens, given in bytes of the text, as ends in whole characters of it [n]."""
    data = np.frombuffer(text.encode(), np.uint8)
    begins = np.flatnonzero((data & 0xC0) != 0x80)
    return np.searchsorted(np.append(begins[1:], len(data)), ends, side="right").astype(np.int64)


def _chunks(mass: NDArray[np.float64], params: Params, i: int, span: Span) -> list[_Passage]:
    """The blocks that lie in a span, each a passage of its own; block 0, the sinks, is not among them.

    A block that lies there in part counts by that part: its mass is spread evenly over its tokens.
    """
    c = params.n_chunk_tokens
    first = max((span.start - params.n_sink) // c + 1, 1)
    last = min((span.end - 1 - params.n_sink) // c + 1, len(mass) - 1)
    found = []
    for b in range(first, last + 1):
        begin = params.n_sink + (b - 1) * c
        share = (min(begin + c, span.end) - max(begin, span.start)) / c
        found.append(_Passage(float(mass[b]) * share, i, b, b))
    return found


def _merged(passages: Iterable[_Passage]) -> _Passage:
    all_ = list(passages)
    mass = sum(passage.mass for passage in all_)
    return _Passage(mass, all_[0].span, min(p.first for p in all_), max(p.last for p in all_))


def _source(file: TextFile, span: Span, passage: _Passage, score: float, params: Params) -> Source:
    """A passage as a stretch of its document's text, cut at whole characters."""
    n_sink, c = params.n_sink, params.n_chunk_tokens
    begin = max(n_sink + (passage.first - 1) * c - span.start, 0)
    end = min(n_sink + passage.last * c - span.start, len(span.ends))
    data = file.text.encode()
    start = len(data[: int(span.ends[begin - 1]) if begin else 0].decode("utf-8", "ignore"))
    stop = len(data[: int(span.ends[end - 1])].decode("utf-8", "ignore"))
    text = file.text[start:stop]
    return Source(document=file.name, start=start, end=stop, text=text, score=score, place=file.place(start))
