"""Breaks when an answer's passages are cut, merged or ranked wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from actqkv_cpp import sources
from actqkv_cpp.reader import TextFile
from actqkv_cpp.template import Span

SENTENCES = [f"Sentence é{i:02d} is here." for i in range(30)]
TEXT = " ".join(SENTENCES)
START = 3  # the document's first token in the session


def words(text: str) -> list[tuple[int, int]]:
    """Tokens as a tokenizer of words would make them: a word with the space before it."""
    ends = [i for i, char in enumerate(text) if char == " " and i] + [len(text)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def span_of(text: str, document: int = 0, start: int = START) -> Span:
    return Span(document, start, np.array([len(text[:end].encode()) for _, end in words(text)], np.int64))


SPAN, FILE = span_of(TEXT), TextFile("a.txt", TEXT, by_line=True)


def weights_at(places: dict[int, float], text: str = TEXT, start: int = START) -> np.ndarray:
    """Attention on the word that holds a character of the text."""
    out = np.zeros(400)
    for at, weight in places.items():
        out[start + next(i for i, (a, b) in enumerate(words(text)) if a <= at < b)] += weight
    return out


def find(
    weights: np.ndarray, spans: tuple[Span, ...] = (SPAN,), files: tuple[TextFile, ...] = (FILE,)
) -> list[tuple[str, str, float]]:
    found = sources.find(weights, spans, files)
    for source in found:
        file = files[source.number]
        assert (file.name, file.text[source.start : source.end]) == (source.document, source.text)
    return [(source.document, source.text, round(source.score, 3)) for source in found]


def at(i: int, word: str = "is") -> int:
    return TEXT.index(SENTENCES[i]) + SENTENCES[i].index(word)


@pytest.mark.parametrize("word", ["Sentence", "é", "is", "here"])
@pytest.mark.parametrize("i", [0, 7, 29])
def test_a_token_gives_its_sentence(i: int, word: str) -> None:
    """Breaks when tokens are laid on other characters, or the first and the last sentence have no source."""
    assert find(weights_at({at(i, word): 1.0})) == [("a.txt", SENTENCES[i], 1.0)]


def test_attention_within_a_sentence_adds_up() -> None:
    """Breaks when one attended word beats a sentence that all is attended of."""
    found = find(weights_at({at(3): 3.0, at(9, "Sent"): 2.0, at(9, "is"): 2.0, at(9, "here"): 1.0}))
    assert found == [("a.txt", SENTENCES[9], 0.625), ("a.txt", SENTENCES[3], 0.375)]


def test_three_best_and_neighbours_joined() -> None:
    """Breaks when neighbours stand apart, more than three passages appear, or the order is not by score."""
    found = find(weights_at({at(5): 30.0, at(6): 20.0, at(12): 40.0, at(18): 6.0, at(22): 4.0}))
    assert found == [
        ("a.txt", f"{SENTENCES[5]} {SENTENCES[6]}", 0.5),
        ("a.txt", SENTENCES[12], 0.4),
        ("a.txt", SENTENCES[18], 0.06),
    ]


def test_a_glance_at_a_neighbour_does_not_join_it() -> None:
    """Breaks when the sentence that holds the answer drowns among those around it."""
    found = find(weights_at({at(5): 95.0, at(6): 5.0}))
    assert found == [("a.txt", SENTENCES[5], 0.95), ("a.txt", SENTENCES[6], 0.05)]


def test_what_is_hardly_attended_is_no_source() -> None:
    """Breaks when places are filled with what heads glance at."""
    assert find(weights_at({at(5): 99.5, at(12): 0.5})) == [("a.txt", SENTENCES[5], 0.995)]


def test_template_and_question_are_no_sources() -> None:
    """Breaks when the first token of a history, or the question after the documents, is cited or counted."""
    weights = weights_at({at(5): 1.0})
    weights[0] = weights[SPAN.end] = weights[-1] = 50.0
    assert find(weights) == [("a.txt", SENTENCES[5], 1.0)]


def test_documents_do_not_merge() -> None:
    """Breaks when a passage runs from one document into the next, or its document is another one."""
    other = "Other words. More of them."
    spans = (SPAN, span_of(other, 1, SPAN.end))
    weights = weights_at({at(29): 1.0}) + weights_at({0: 3.0}, other, SPAN.end)
    found = find(weights, spans, (FILE, TextFile("b.txt", other)))
    assert found == [("b.txt", "Other words.", 0.75), ("a.txt", SENTENCES[29], 0.25)]


def test_documents_of_one_name() -> None:
    """Breaks when nothing tells which of two documents of one name a source stands in."""
    files = (TextFile("a.txt", TEXT), TextFile("a.txt", "Other words. More of them."))
    weights = weights_at({0: 1.0}, files[1].text, SPAN.end)
    (source,) = sources.find(weights, (SPAN, span_of(files[1].text, 1, SPAN.end)), files)
    assert (source.number, source.text) == (1, "Other words.")


def test_place() -> None:
    """Breaks when a source is told to stand elsewhere than it begins."""
    text = "a = 1\nb = 2\nc = 3\n"
    (source,) = sources.find(
        weights_at({text.index("3"): 1.0}, text), (span_of(text),), (TextFile("a.py", text, by_line=True),)
    )
    assert (source.text, source.place) == ("c = 3", "line 3")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("It rained. Dr. Low *slept. It rained.", "Dr. Low *slept."),
        ("It rained. J. R. Low *slept! It rained.", "J. R. Low *slept!"),
        ('He said: "It *rained." She slept.', 'He said: "It *rained."'),
        ("Long lines of running text that a file has wrapped are one\nsentence, *and stay so. Next.", None),
        ("A heading\n\nText *here. More.", "Text *here."),
        ("x = 1\ny = *2\nz = 3", "y = *2"),
        ("雨が降った。彼は*寝た。雨。", "彼は*寝た。"),
        ("It cost approx. five* pounds. More.", "It cost approx. five* pounds."),
        ("*", "*"),
    ],
)
def test_sentences(text: str, sentence: str | None) -> None:
    """Breaks when a sentence is cut at an abbreviation or a wrapped line, or runs on over a heading or a row."""
    start, end = sources.sentence_around(text, text.index("*"))
    assert text[start:end] == (sentence if sentence is not None else text.removesuffix(" Next."))


def test_a_sentence_without_end_is_cut_between_words() -> None:
    """Breaks when a text without full stops is cited whole, or cut within a word."""
    text = "word " * 1000
    start, end = sources.sentence_around(text, 2502)
    assert start <= 2502 < end
    assert set(text[start:end].split()) == {"word"}
    assert 200 < end - start <= 800


@pytest.mark.parametrize("weights", [np.zeros(0), np.zeros(400), np.eye(1, 400, 390)[0]])
def test_nothing_attended(weights: np.ndarray) -> None:
    """Breaks when an answer that looked at no document cites one."""
    assert find(weights) == []
