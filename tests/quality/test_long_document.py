"""Breaks when the bundled model no longer answers questions about a document four times its window."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from actqkv_cpp import Document, Llama, Source

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "examples" / "harbour.txt").read_text(encoding="utf-8")
QUESTIONS = [json.loads(line) for line in (ROOT / "examples" / "questions.jsonl").read_text().splitlines()]

LEAST_RIGHT = 21  # of 24; all when this was written, and an answer or two may change with the machine's rounding

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def document() -> Document:
    llm = Llama(n_ctx=40960, n_threads=2, verbose=False)
    assert llm.metadata["llama.context_length"] == "8192"
    return llm.read(text=TEXT, name="harbour.txt")


def test_a_document_beyond_the_window_is_answered(document: Document) -> None:
    answers = [document.ask(q["question"], max_tokens=48) for q in QUESTIONS]
    right = [str(answer).strip() == q["answer"] for answer, q in zip(answers, QUESTIONS, strict=True)]
    assert sum(right) >= LEAST_RIGHT, f"{sum(right)} of {len(right)}"
    assert all(answer.usage.attended_tokens < 2600 for answer in answers)  # budget, remainder and question


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_answers_are_as_the_page_says(document: Document, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    command = re.search(r"actqkv (ask -d examples/harbour.txt .*)", text)
    answers = re.search(r"The answers are `(.*)` and `(.*)`\.", text)
    assert command
    assert answers
    *_, first, second = shlex.split(command[1])
    assert [str(document.ask(question)).strip() for question in (first, second)] == list(answers.groups())


def test_a_passage_holds_its_answer(document: Document) -> None:
    """Breaks when sources point elsewhere than where the answer stands."""
    passkeys = [q for q in QUESTIONS if q["task"] == "passkey" and q["depth"] > 0.01]  # sinks are no sources
    found = [(document.ask(q["question"], max_tokens=16), q["answer"]) for q in passkeys]
    right = [(answer, value) for answer, value in found if str(answer).strip() == value]
    assert right
    for answer, value in right:
        assert any(value in source.text for source in answer.sources), f"{value}: {_where(answer.sources)}"
        assert all(TEXT[source.start : source.end] == source.text for source in answer.sources)


def _where(sources: tuple[Source, ...]) -> list[tuple[int, int]]:
    return [(source.start, source.end) for source in sources]
