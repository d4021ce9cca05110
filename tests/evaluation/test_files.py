"""LongBench and InfiniteBench from JSON lines: prompts, references, truncation, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_support import words_room

from actqkv_cpp.errors import ActqkvError, DocumentError
from actqkv_cpp.evaluation.samples import Sample, Suite
from actqkv_cpp.evaluation.suites import infinitebench, longbench

LONG = {"input": "Who?", "context": "Anna did.\n" * 50, "answers": ["Anna", "Anna B."], "dataset": "hotpotqa"}
INFINITE = {"id": 0, "input": "Who?", "context": "Anna did.\n" * 50, "answer": ["Anna"], "options": []}
OPTIONS = {"options": ["Ann", "Bob", "Cid", "Dan"], "answer": ["Cid"]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(suites: list[Suite], *, longest: int = 0) -> tuple[Suite, Sample]:
    (suite,) = suites
    return suite, suite.make(words_room(suite.name, longest), 0)


def test_longbench(tmp_path: Path) -> None:
    """The document is not first, the question not last, or the best reference does not count."""
    suite, sample = only(longbench.load(write(tmp_path / "a.jsonl", LONG)))
    (question,) = sample.questions
    assert suite.name == "longbench/hotpotqa"
    assert sample.document.endswith("\nAnna did.\n")
    assert sample.document.startswith("Answer the question based on the given passages.")
    assert question.text.endswith("Question: Who?\nAnswer:")
    assert sample.n_cut == 0
    assert sample.n_ctx % 1024 == 0
    assert suite.score(question, "anna b") == 1.0
    assert suite.score(question, "Bert") == 0.0


def test_a_file_of_several_data_sets(tmp_path: Path) -> None:
    """Data sets of one file are mixed up, or those of LongBench-E are unknown."""
    path = write(tmp_path / "a.jsonl", LONG, LONG | {"dataset": "lcc"}, LONG | {"dataset": "lcc_e"})
    assert {suite.name: suite.n_samples for suite in longbench.load(path)} == {
        "longbench/hotpotqa": 1,
        "longbench/lcc": 2,
    }


def test_every_task_has_a_prompt_and_a_score(tmp_path: Path) -> None:
    """A prompt loses its context or keeps a slot unfilled; a score does not tell right from wrong."""
    row = LONG | {"answers": ["Paragraph 3"], "all_classes": ["Paragraph 3", "Date"]}
    for name in longbench.TASKS:
        suite, sample = only(longbench.load(write(tmp_path / "a.jsonl", row | {"dataset": name})))
        _check_prompt(sample)
        if "zh" not in name and name not in ("dureader", "vcsum"):  # which need jieba
            right = "3" if name == "passage_count" else "Paragraph 3"
            references = ("3",) if name == "passage_count" else sample.questions[0].references
            question = sample.questions[0].__class__(text="", references=references, classes=("Paragraph 3", "Date"))
            assert suite.score(question, right) == 1.0, name
            assert suite.score(question, "wrong") < 0.5, name


@pytest.mark.parametrize(
    ("name", "row", "right"),
    [
        ("passkey", {"answer": ["71432"]}, "71432"),
        ("number_string", {"answer": ["1122334455"]}, "It is 1122334455"),
        ("kv_retrieval", {"answer": ["4f2a"]}, '"4f2a"'),
        ("longbook_sum_eng", {"answer": ["a short summary"]}, "a short summary"),
        ("longbook_choice_eng", OPTIONS, "C"),
        ("longbook_qa_eng", {"answer": ["Anna", "Bob"]}, "bob"),
        ("longbook_qa_chn", {"answer": ["北京"]}, "北京"),
        ("longdialogue_qa_eng", {"answer": ["ANNA"]}, "Anna"),
        (
            "math_find",
            {"input": "You should answer with only one number. The largest number of the list is:", "answer": 7},
            "7",
        ),
        ("math_calc", {"answer": [3, 4]}, "[3, 4]"),
        ("code_run", {"input": "What is func_2(-3)?", "answer": 5}, "It returns 5"),
        ("code_debug", OPTIONS, "C"),
    ],
)
def test_infinitebench(tmp_path: Path, name: str, row: dict[str, Any], right: str) -> None:
    """A task of InfiniteBench has another prompt or metric than published."""
    suite, sample = only(infinitebench.load(write(tmp_path / f"{name}.jsonl", INFINITE | row)))
    _check_prompt(sample)
    assert suite.name == f"infinitebench/{name}"
    assert suite.score(sample.questions[0], right) == 1.0
    assert suite.score(sample.questions[0], "nothing") == 0.0


def test_every_task_of_infinitebench_is_tested() -> None:
    """A task was added without a test."""
    (mark,) = test_infinitebench.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == set(infinitebench.TASKS)


def _check_prompt(sample: Sample) -> None:
    assert "Anna did." in sample.document
    assert sample.questions[0].text
    for text in (sample.document, sample.questions[0].text):
        assert not any(
            "{" + slot + "}" in text for slot in ("context", "input", "question", "prefix", "func", "OPTION_A")
        )


def test_middle_truncation(tmp_path: Path) -> None:
    """A document is cut without being asked, at an end, or without a word; or the question is cut too."""
    context = "".join(f"{i:04d} " for i in range(2000))
    path = write(tmp_path / "a.jsonl", LONG | {"context": context, "input": "Who? " * 20})
    _, whole = only(longbench.load(path))
    _, cut = only(longbench.load(path), longest=1024)
    room = words_room("x", 1024)
    assert context in whole.document
    assert whole.n_cut == 0
    assert cut.n_cut > 1000
    assert cut.n_ctx == 1024
    assert "0000 0001" in cut.document
    assert cut.document.endswith("1998 1999 ")
    assert "1000" not in cut.document
    assert "Who? " * 20 in cut.questions[0].text
    used = room.count(cut.document) + room.count(cut.questions[0].text) + cut.max_tokens
    assert 900 < used <= 1024


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"input": "x"}\n', [":1", "'context'"]),
        ("a.jsonl", json.dumps(LONG) + "\n\n" + json.dumps(LONG | {"answers": "Anna"}), [":3", "'answers'", "a list"]),
        ("a.jsonl", json.dumps(LONG) + "\n{", [":2", "not JSON"]),
        ("a.jsonl", "[1]", [":1", "object"]),
        ("a.jsonl", "\n", ["empty"]),
        ("a.jsonl", json.dumps(LONG | {"dataset": "hotpotqb"}), [":1", "hotpotqb", "hotpotqa"]),
        ("kv_retrieval.jsonl", json.dumps(INFINITE | {"answer": []}), [":1", "'answer'"]),
        ("kv_retrieval.jsonl", json.dumps(LONG), [":1", "'answer'"]),
        ("code_debug.jsonl", json.dumps(INFINITE | OPTIONS | {"answer": ["Eve"]}), [":1", "Eve"]),
        ("code_debug.jsonl", json.dumps(INFINITE | {"options": ["Ann"]}), [":1", "'options'"]),
        ("code_run.jsonl", json.dumps(INFINITE), [":1", "func_1"]),
        ("math_find.jsonl", json.dumps(INFINITE), [":1", "'input'"]),
        ("kv_retreival.jsonl", json.dumps(INFINITE), ["kv_retreival", "kv_retrieval"]),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    """A line that lacks something ends in a traceback, or its number is not told."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ActqkvError) as caught:
        (longbench if name == "a.jsonl" else infinitebench).load(path)
    for word in words:
        assert word in f"{caught.value} {caught.value.hint}"


def test_file_that_is_not_there(tmp_path: Path) -> None:
    """A typing error in a name ends in a traceback."""
    with pytest.raises(DocumentError, match=r"none\.jsonl"):
        longbench.load(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(DocumentError, match="UTF-8"):
        longbench.load(tmp_path / "latin.jsonl")
