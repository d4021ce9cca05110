"""Breaks when an answer's passages are cut, merged or ranked wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from actqkv_cpp import sources
from actqkv_cpp.figures import Params
from actqkv_cpp.reader import TextFile
from actqkv_cpp.template import Span

PARAMS = Params("actqkv", {"chunk": 4}, 4096, 1, 256, 8, 512, 2048, "f16")  # n_sink 8, chunks of 4
TEXT = "".join(f"{i:03d}é" for i in range(100))  # one token each: 4 characters, 5 bytes
SPAN = Span(0, 3, np.arange(1, 101, dtype=np.int64) * 5)  # tokens 3 .. 102
FILE = TextFile("a.txt", TEXT)


def _find(
    mass: dict[int, float], spans: tuple[Span, ...] = (SPAN,), files: tuple[TextFile, ...] = (FILE,)
) -> list[tuple[str, int, int, float]]:
    blocks = np.zeros(40)
    for block, value in mass.items():
        blocks[block] = value
    found = sources.find(blocks, PARAMS, spans, files)
    texts = {file.name: file.text for file in files}
    for source in found:
        assert texts[source.document][source.start : source.end] == source.text
    return [(source.document, source.start, source.end, round(source.score, 3)) for source in found]


def test_block_to_text() -> None:
    """Breaks when a block's tokens are laid on other characters; block 2 is tokens 12 .. 15, the document's 9 .. 12."""
    assert _find({2: 1.0}) == [("a.txt", 9 * 4, 13 * 4, 1.0)]


def test_ends_are_clipped_to_the_document() -> None:
    """Breaks when a passage reaches into the template or another document; block 24 holds tokens 100 .. 103."""
    assert _find({24: 1.0}) == [("a.txt", 97 * 4, 100 * 4, 1.0)]


def test_three_best_neighbours_merged() -> None:
    """Breaks when neighbours stand apart, more than three passages appear, or the order is not by score."""
    found = _find({0: 50.0, 5: 3.0, 6: 2.0, 12: 4.0, 18: 0.5, 22: 0.4, 30: 9.0})
    assert found == [
        ("a.txt", 21 * 4, 29 * 4, 0.505),
        ("a.txt", 49 * 4, 53 * 4, 0.404),
        ("a.txt", 73 * 4, 77 * 4, 0.051),
    ]


def test_a_chunk_between_two_joins_them() -> None:
    """Breaks when two passages that meet stay two."""
    assert _find({5: 3.0, 7: 2.0, 6: 1.0}) == [("a.txt", 21 * 4, 33 * 4, 1.0)]


def test_sinks_are_left_out() -> None:
    """Breaks when the sinks, which always draw attention, are cited."""
    assert _find({0: 9.0}) == []


def test_documents_do_not_merge() -> None:
    """Breaks when a passage runs from one document into the next."""
    two = Span(1, 103, np.arange(1, 41, dtype=np.int64) * 5)
    found = _find({24: 1.0, 25: 2.0}, (SPAN, two), (FILE, TextFile("b.txt", TEXT[:160])))
    assert [(name, end - start) for name, start, end, _ in found] == [("b.txt", 20), ("a.txt", 12)]
    assert [score for *_, score in found] == [0.75, 0.25]


@pytest.mark.parametrize("mass", [{}, {39: 1.0}])
def test_nothing_attended(mass: dict[int, float]) -> None:
    """Breaks when an answer that looked at no document cites one."""
    assert _find(mass) == []
