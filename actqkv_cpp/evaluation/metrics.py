"""Scores of answers, 0 to 1, each written from its definition.

`said` is the model's answer, `reference` one expected answer; a suite takes the best over its references. Where a
benchmark's own script and its definition differ, the definition counts, and the function says so.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from importlib import import_module

from actqkv_cpp.errors import ParameterError

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_OPTIONS = "ABCD"


# ---- exact answers


def exact(said: str, reference: str) -> float:
    """Whether the answer is the reference, word for word; space around it aside."""
    return float(said.strip() == reference.strip())


def contains(said: str, reference: str) -> float:
    """Whether the reference stands in the answer."""
    return float(reference in said)


def share_contained(said: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, case aside. RULER's metric."""
    lower = said.lower()
    return sum(reference.lower() in lower for reference in references) / len(references)


def first_integer(said: str, reference: str) -> float:
    """Whether the first run of digits in the answer is the reference. InfiniteBench, passkey and number."""
    found = re.search(r"[0-9]+", said)
    return float(found is not None and found[0] == reference)


def word_among(said: str, reference: str) -> float:
    """Whether the reference is a word of the answer, with its punctuation taken for spaces. InfiniteBench, KV."""
    return float(reference in _words(said, ":\"'.,?!{}"))


# ---- LongBench


def qa_f1(said: str, reference: str) -> float:
    """F1 of the words that both have, in lower case, without punctuation and articles (SQuAD's definition)."""
    return _f1(_plain_words(said), _plain_words(reference))


def qa_f1_zh(said: str, reference: str) -> float:
    """As `qa_f1`, over Chinese words (jieba's). ParameterError where jieba is not installed."""
    return _f1(_chinese_words(said), _chinese_words(reference))


def qa_f1_characters(said: str, reference: str) -> float:
    """As `qa_f1`, over characters: InfiniteBench's for Chinese."""
    return _f1(list(_without_punctuation(said)), list(_without_punctuation(reference)))


def rouge_l(said: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3.1, beta 1), over the whole text.

    Words are what spaces separate. Scripts of the benchmarks cut texts into sentences first and differ somewhat.
    """
    return _subsequence_f1(said.split(), reference.split())


def rouge_l_zh(said: str, reference: str) -> float:
    """As `rouge_l`, over Chinese words (jieba's). ParameterError where jieba is not installed."""
    return _subsequence_f1(_cut_chinese(said), _cut_chinese(reference))


def classification(said: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (classes named in the answer) where the reference is among them, else 0.

    A class whose name is only part of the reference's does not count as named.
    """
    named = [name for name in classes if name in said and (name == reference or name not in reference)]
    return 1.0 / len(named) if reference in named else 0.0


def retrieval(said: str, reference: str) -> float:
    """Share of the numbers in the answer that are the number of the reference ("Paragraph 7")."""
    number = re.search(r"\d+", reference)
    return count(said, number[0] if number else reference)


def count(said: str, reference: str) -> float:
    """Share of the numbers in the answer that are the reference; 0 without numbers."""
    numbers = re.findall(r"\d+", said)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(said: str, reference: str) -> float:
    """Edit similarity of the first line of code: 1 - (characters to insert or delete) / (characters of both).

    The first line that has no backtick and no comment sign (# or //) counts as code.
    """
    lines = said.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")
    return _subsequence_f1(line, reference)


# ---- InfiniteBench


def choice(said: str, option: str, letter: str) -> float:
    """Whether the answer chooses the option of `letter`, A to D: by the letter with which it begins, as the option's
    own words, by either behind "answer is" and the like, or by the first of its words that is one of the four."""
    if said[:1] and said[0] in _OPTIONS:
        return float(said[0] == letter)
    if said == option:
        return 1.0
    plain = " ".join(_words(said, "\"'.,?!{}"))
    for words in ("answer is:", "answer:", "answer is", "option is"):
        if words in plain:
            return float(plain.split(words, 1)[1].lstrip().startswith((letter, option)))
    chosen = next((word for word in plain.split() if word in _OPTIONS), None)
    return float(chosen == letter)


def code_debug(said: str, function: str, letter: str) -> float:
    """Whether the answer names the faulty function or its letter: at its beginning, or behind "answer is:" and the
    like."""
    if said.startswith((f"{letter}.", f"{letter}:")) or said.strip() == letter:
        return 1.0
    plain = " ".join(_words(re.sub("[Oo]ption", " ", said), "`'\"-*"))
    for words in ("answer is:", "is:", "answer:"):
        if words in plain:
            return float(plain.split(words, 1)[1].lstrip().startswith((letter, function)))
    return 0.0


def last_integer(said: str, reference: str) -> float:
    """Whether the last word of the answer is the number: InfiniteBench, Code.Run."""
    words = _words(said, ".`'\":")
    return float(bool(words) and _is_integer(words[-1]) and int(words[-1]) == int(reference))


def first_number(said: str, reference: str) -> float:
    """Whether the first number of the answer is the reference: InfiniteBench, Math.Find."""
    found = _NUMBER.search(said)
    return float(found is not None and float(found[0]) == float(reference))


def leading_numbers(said: str, references: Sequence[str]) -> float:
    """Share of the intermediate results that are right up to the first wrong one: InfiniteBench, Math.Calc."""
    numbers = re.findall(r"[0-9]+", said)
    n_right = 0
    for number, reference in zip(numbers, references, strict=False):
        if int(number) != int(reference):
            break
        n_right += 1
    return n_right / len(references)


def name_among(said: str, reference: str) -> float:
    """Whether the name is a word of the answer, case aside: InfiniteBench, dialogues."""
    return float(reference.upper() in (word.upper() for word in _words(said, ":\"'.,?!{}")))


# ---- parts


def _words(text: str, signs: str) -> list[str]:
    """What is left between spaces when `signs` are taken for spaces."""
    return text.translate(dict.fromkeys(map(ord, signs), " ")).split()


def _plain_words(text: str) -> list[str]:
    lower = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", lower).split()


def _without_punctuation(text: str) -> str:
    """In lower case, without space, ASCII punctuation and what Unicode calls punctuation."""
    drop = set(string.punctuation) | set(string.whitespace)
    return "".join(c for c in text.lower() if c not in drop and unicodedata.category(c)[0] not in "PZ")


def _cut_chinese(text: str) -> list[str]:
    try:
        jieba = import_module("jieba")
    except ImportError:
        raise ParameterError(
            "Chinese texts are scored by words, and jieba, which finds them, is not installed",
            'pip install "actqkv[eval]"',
        ) from None
    return [word for word in jieba.cut(text, cut_all=False) if word.strip()]


def _chinese_words(text: str) -> list[str]:
    return [plain for word in _cut_chinese(text) if (plain := _without_punctuation(word))]


def _f1(said: Sequence[str], reference: Sequence[str]) -> float:
    n_common = sum((Counter(said) & Counter(reference)).values())
    return 2.0 * n_common / (len(said) + len(reference)) if n_common else 0.0


def _subsequence_f1(a: Sequence[str], b: Sequence[str]) -> float:
    """2 x longest common subsequence / (length of both); 0 where one is empty."""
    return 2.0 * _longest_common(a, b) / (len(a) + len(b)) if a and b else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of one number (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    everything = (1 << len(a)) - 1
    row = everything
    for item in b:
        matched = row & places.get(item, 0)
        row = (row + matched | row - matched) & everything
    return len(a) - row.bit_count()


def _is_integer(word: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", word) is not None
