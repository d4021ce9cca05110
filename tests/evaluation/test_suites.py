"""Samples: they fit their room, hold their answers where they say, and are the same from the same seed."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import pytest
from evaluation_support import words_room

from actqkv_cpp.errors import ParameterError
from actqkv_cpp.evaluation.samples import Sample, Suite
from actqkv_cpp.evaluation.suites import SUITES, ruler
from actqkv_cpp.evaluation.suites.retrieve import repeated_digits

N_CTX = 8192
ASKING = [suite for suite in SUITES.values() if suite.name != "perplexity"]


@pytest.fixture(params=ASKING, ids=lambda suite: str(suite.name))
def suite(request: pytest.FixtureRequest) -> Suite:
    made: Suite = request.param
    return made


def samples(suite: Suite, n: int = 8, *, n_ctx: int = N_CTX, seed: int = 0) -> list[Sample]:
    room = words_room(suite.name, n_ctx, n_samples=n, seed=seed)
    return [suite.make(room, index) for index in range(n)]


def test_fits_the_room(suite: Suite) -> None:
    """A sample is longer than its session, or leaves much of it empty."""
    room = words_room(suite.name, N_CTX)
    for sample in samples(suite):
        assert sample.n_ctx == N_CTX
        n_tokens = room.count(sample.document)
        asked = max(room.count(question.text) for question in sample.questions)
        assert n_tokens + asked + sample.max_tokens + room.n_template <= N_CTX
        if suite.name != "long-answer":  # whose room is filled by what is generated
            assert n_tokens > 0.88 * N_CTX


def test_same_seed_same_samples(suite: Suite) -> None:
    """A run cannot be repeated; or another seed, length or number gives the same sample."""
    first = samples(suite, 3)
    assert samples(suite, 3) == first
    assert samples(suite, 3, seed=1) != first
    assert len({sample.document for sample in first}) == 3


def test_answers_stand_where_needles_say(suite: Suite) -> None:
    """The passage whose selection is recorded is not the one with the answer."""
    n_found = 0
    for sample in samples(suite):
        for question in sample.questions:
            passages = [sample.document[begin:end] for begin, end in question.needles]
            assert all(passages)
            if suite.name == "ruler" and question.task == "variable_tracking":
                assert all(any(name in passage for passage in passages) for name in question.references)
            elif passages and question.task not in ("twohop", "var", "var3", "list"):
                assert all(any(answer in passage for passage in passages) for answer in question.references)
            n_found += len(passages)
    assert n_found


def test_right_answers_are_right(suite: Suite) -> None:
    """A perfect answer does not get the full score, or an empty one gets some."""
    assert suite.score is not None
    for sample in samples(suite):
        for question in sample.questions:
            assert suite.score(question, ", ".join(question.references)) == 1.0
            assert suite.score(question, "") == 0.0


def test_depths_are_swept() -> None:
    """All needles stand at one depth."""
    for name in ("passkey", "number", "needle"):
        assert [sample.questions[0].depth for sample in samples(SUITES[name], 3)] == [0.0, 0.5, 1.0]
        depths = [sample.questions[0].depth for sample in samples(SUITES[name], 11)]
        assert depths == [i / 10 for i in range(11)]
        for sample in samples(SUITES[name], 11):
            (begin, _), depth = sample.questions[0].needles[0], sample.questions[0].depth
            assert begin / len(sample.document) == pytest.approx(depth, abs=0.05)


def test_kv_is_one_object_of_pairs() -> None:
    """The JSON object is none, or its keys repeat."""
    for sample in samples(SUITES["kv"], 2):
        pairs = json.loads(sample.document[sample.document.index("{") :])
        assert len(sample.questions) == 10
        places = []
        for question in sample.questions:
            key = re.findall(r'Key: "([^"]+)"', question.text)[0]
            assert pairs[key] == question.references[0]
            places.append(list(pairs).index(key) / len(pairs))
        assert places == sorted(places)
        assert places[-1] - places[0] > 0.8


def test_repeated_digits() -> None:
    """Ten digits without repetitions are another task."""
    from random import Random  # noqa: PLC0415

    for seed in range(20):
        digits = repeated_digits(Random(seed))
        assert re.fullmatch(r"\d{10}", digits)
        assert len(re.findall(r"(.)\1*", digits)) <= 5


def test_ruler_has_eight_tasks() -> None:
    """A task of RULER is left out, or asks for the wrong number of answers."""
    found = samples(SUITES["ruler"], 8)
    n_answers = {sample.questions[0].task: len(sample.questions[0].references) for sample in found}
    assert n_answers == {
        "niah_single": 1,
        "niah_multikey": 1,
        "niah_multikey_uuid": 1,
        "niah_multivalue": 4,
        "niah_multiquery": 4,
        "variable_tracking": 5,
        "common_words": 10,
        "frequent_words": 3,
    }
    assert len(ruler.TASKS) == 8


def test_word_counts() -> None:
    """The words asked for are not the most frequent of the list."""
    for index, n_top in ((6, 10), (7, 3)):
        sample = samples(SUITES["ruler"], 8)[index]
        question = sample.questions[0]
        text = sample.document[sample.document.rindex("Below is") :] if index == 6 else sample.document
        counts = Counter(re.findall(r"\d+\. (\w+)", text) if index == 6 else re.findall(r"\b[a-z]{6}\b", text))
        top = [word for word, _ in counts.most_common(n_top)]
        assert set(top) == set(question.references)
        assert counts[top[-1]] > counts.most_common(n_top + 1)[-1][1]


def test_kv_depths_are_where_the_keys_stand() -> None:
    """The depths of kv are those of another object's keys, or fall together in tenths."""
    for sample in samples(SUITES["kv"], 3):
        assert len({math.floor(10 * (question.depth or 0.0) + 0.5) for question in sample.questions}) == 10
        for question in sample.questions:
            ((begin, _),) = question.needles
            assert begin / len(sample.document) == pytest.approx(question.depth, abs=0.05)


def test_read_once_asks_ten_at_spread_depths() -> None:
    """The ten questions are about one corner of the document."""
    for sample in samples(SUITES["read-once"], 2):
        depths = [question.depth for question in sample.questions]
        assert len(depths) == 10
        assert min(d for d in depths if d is not None) < 0.25
        assert max(d for d in depths if d is not None) > 0.75


@pytest.mark.parametrize("name", list(SUITES))
def test_no_room(name: str) -> None:
    """A length that is too short gives an empty document instead of a word."""
    with pytest.raises(ParameterError, match=name) as caught:
        SUITES[name].make(words_room(name, 128), 0)
    assert caught.value.hint
