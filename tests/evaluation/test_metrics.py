"""Every metric on examples that were worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from actqkv_cpp.evaluation import metrics as m

CLASSES = ("Date", "Other date", "Number", "Number of something")


@pytest.mark.parametrize(
    ("metric", "said", "reference", "score"),
    [
        (m.exact, " 19698 ", "19698", 1),
        (m.exact, "19698.", "19698", 0),
        (m.contains, "It is 1234567, I think", "1234567", 1),
        (m.contains, "It is 123456", "1234567", 0),
        # the first run of digits, not any
        (m.first_integer, "The pass key is 71432.", "71432", 1),
        (m.first_integer, "1. The pass key is 71432.", "71432", 0),
        (m.first_integer, "no number", "71432", 0),
        (m.first_integer, "071432", "71432", 0),
        # punctuation separates words; part of a word does not count
        (m.word_among, '"b01d": "4f2a".', "4f2a", 1),
        (m.word_among, "4f2a-11", "4f2a", 0),
        # said: blue whale swims; reference: blue whale -> 2 common of 3 and 2: 2*2/5
        (m.qa_f1, "The blue whale, swims!", "a blue whale", 4 / 5),
        (m.qa_f1, "yes yes", "yes", 2 / 3),
        (m.qa_f1, "no", "yes", 0),
        (m.qa_f1, "the", "the", 0),  # nothing is left of either
        # characters of 北京市 and 北京: 2 common of 3 and 2
        (m.qa_f1_characters, "北京市。", "北京", 4 / 5),
        # the cat sat on mat / the cat lay on the mat: the cat on mat is the subsequence: 2*4/(5+6)
        (m.rouge_l, "the cat sat on mat", "the cat lay on the mat", 8 / 11),
        (m.rouge_l, "mat the on", "on the mat", 1 / 3),
        (m.rouge_l, "", "on the mat", 0),
        (m.retrieval, "Paragraph 7", "Paragraph 7", 1),
        (m.retrieval, "Paragraph 7 or 12", "Paragraph 7", 1 / 2),
        (m.retrieval, "Paragraph 17", "Paragraph 7", 0),
        (m.retrieval, "段落7", "段落7", 1),
        (m.count, "There are 12 of 12, not 13", "12", 2 / 3),
        (m.count, "twelve", "12", 0),
        # the comment is skipped; abcd / abxd: abd is common, 2*3/8
        (m.code_similarity, "# next\nabcd\nmore", "abxd", 6 / 8),
        (m.code_similarity, "\n\nreturn x", "return x", 1),
        (m.code_similarity, "```python", "return x", 0),
        (m.last_integer, "The value is 7.", "7", 1),
        (m.last_integer, "7 apples", "7", 0),
        (m.last_integer, "so -3", "-3", 1),
        (m.first_number, "about 3.50 or 4", "3.5", 1),
        (m.first_number, "4 or 3.5", "3.5", 0),
        (m.name_among, 'It is "Anna".', "ANNA", 1),
        (m.name_among, "Annabel", "ANNA", 0),
    ],
)
def test_worked_examples(metric: Callable[[str, str], float], said: str, reference: str, score: float) -> None:
    """A published metric gives other figures than its definition."""
    assert metric(said, reference) == pytest.approx(score)


def test_share_contained() -> None:
    """RULER's share counts a reference twice, or minds the case."""
    assert m.share_contained("abc, DEF", ["ABC", "def", "ghi"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("said", "reference", "score"),
    [
        ("Number", "Number", 1),
        ("Date or Number", "Number", 1 / 2),
        ("Number of something", "Number of something", 1),  # "Number" is only part of its name
        ("Number of something", "Number", 1 / 2),
        ("nothing", "Date", 0),
    ],
)
def test_classification(said: str, reference: str, score: float) -> None:
    """An answer that names all classes is right."""
    assert m.classification(said, reference, CLASSES) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "letter", "score"),
    [
        ("B", "B", 1),
        ("B. Paul", "C", 0),
        ("The answer is: C, since", "C", 1),
        ("The correct option is D", "D", 1),
        ("It must be A or B", "A", 1),
        ("Paul", "B", 1),
        ("The answer is Paul.", "B", 1),
        ("The answer is Nora.", "B", 0),
        ("", "A", 0),
    ],
)
def test_choice(said: str, letter: str, score: float) -> None:
    """An option is found by its letter or its words, or by neither, or another one is."""
    assert m.choice(said, "Paul", letter) == score


@pytest.mark.parametrize(
    ("said", "score"),
    [("B", 1), ("B. fetch_rows", 1), ("The answer is: fetch_rows", 1), ("The answer is: C", 0), ("C", 0), ("", 0)],
)
def test_code_debug(said: str, score: float) -> None:
    """The faulty function is found by name or letter, or by neither."""
    assert m.code_debug(said, "fetch_rows", "B") == score


def test_leading_numbers() -> None:
    """A wrong intermediate result does not end the count."""
    assert m.leading_numbers("[3, 1, 9, 6]", ["3", "1", "2", "6"]) == pytest.approx(2 / 4)
    assert m.leading_numbers("3", ["3", "1"]) == pytest.approx(1 / 2)


def test_longest_common_subsequence() -> None:
    """The bits of the fast table differ from the table of the definition."""
    from random import Random  # noqa: PLC0415

    def by_table(a: str, b: str) -> int:
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    rng = Random(3)
    for _ in range(50):
        a, b = ("".join(rng.choices("abcd", k=rng.randrange(0, 90))) for _ in range(2))
        assert m._longest_common(a, b) == by_table(a, b)


def test_chinese_words() -> None:
    """Chinese answers are scored by characters where words are meant."""
    assert m.qa_f1_zh("我来到北京", "北京") == pytest.approx(2 * 1 / (3 + 1))  # 我 来到 北京
    assert m.rouge_l_zh("我来到北京", "来到北京") == pytest.approx(2 * 2 / (3 + 2))


def test_chinese_words_without_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing optional package ends in a traceback."""

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(m, "import_module", missing)
    with pytest.raises(m.ParameterError) as caught:
        m.qa_f1_zh("我", "我")
    assert "actqkv[eval]" in str(caught.value.hint)
