"""Breaks when generated documents are others than before, or their questions do not fit them."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from actqkv_cpp.evaluation.generator import Document, lexicon, make_document, templates
from actqkv_cpp.evaluation.generator.__main__ import main as generate_main
from actqkv_cpp.evaluation.generator.documents import Mix, build_document
from actqkv_cpp.evaluation.generator.facts import TASKS
from actqkv_cpp.evaluation.generator.source import VALUE_KINDS, Source

ROOT = Path(__file__).parents[2]
EXAMPLE = ["--tasks", "passkey,number,fact,multi,twohop,absent", "--styles", "prose,people,counts", "--heldout"]
EXAMPLE += ["--tokens", "32k", "--count", "4", "--seed", "harbour-master"]


def documents(*, heldout: bool = False, sentence_share: float = 0.0) -> list[Document]:
    """Sparse and dense documents, with every task."""
    mixes = [Mix(density=density, heldout=heldout, sentence_share=sentence_share) for density in (0.1, 0.4, 0.8)]
    return [build_document(random.Random(f"test-{index}"), 4500, mixes[index % 3]) for index in range(24)]


def test_same_seed_gives_the_same_document() -> None:
    assert make_document(800, seed=5) == make_document(800, seed=5)
    assert make_document(800, seed=5) != make_document(800, seed=6)


def test_example_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    generate_main([*EXAMPLE, "--text"])
    assert capsys.readouterr().out == (ROOT / "examples" / "harbour.txt").read_text(encoding="utf-8")
    generate_main([*EXAMPLE, "--questions"])
    assert capsys.readouterr().out == (ROOT / "examples" / "questions.jsonl").read_text(encoding="utf-8")


def test_answers_stand_where_questions_say() -> None:
    """A reader sent to the places of a question finds other words there."""
    for document in [*documents(), *documents(sentence_share=1.0)]:
        for question in document.questions:
            if question.task == "absent":
                assert (question.answer, question.depth) == (templates.NOT_STATED, -1.0)
                assert (question.copies, question.passages, question.bridges) == ((), (), ())
                continue
            assert question.copies
            for copy in question.copies:
                words = document.text[copy.at : copy.at + copy.length]
                assert words == question.answer[copy.start : copy.start + copy.length]
                assert any(start <= copy.at and copy.at + copy.length <= end for start, end in question.passages)
            last = max(start for start, _ in question.passages)
            assert question.depth == pytest.approx(last / len(document.text), abs=1e-4)


def test_plain_answers_are_read_in_one_piece() -> None:
    """Only lists are put together from several places, and only whole sentences say more than what is read."""
    for document in documents():
        for question in document.questions:
            if question.task not in ("absent", "list"):
                assert [(copy.start, copy.length) for copy in question.copies] == [(0, len(question.answer))]


def test_bridges_lead_to_the_answer() -> None:
    """What must be read first is missing, or is not what the passage with the answer speaks of."""
    n_steps = {"twohop": 1, "var": 1, "var3": 2}
    for document in documents():
        for question in document.questions:
            assert len(question.bridges) == n_steps.get(question.task, 0), question
            for index, (start, end) in enumerate(question.bridges):
                name = document.text[start:end]
                following = [*question.bridges[index + 1 :], (question.copies[0].at, 0)][0][0]
                passage = next(text for text in question.passages if text[0] <= following < text[1])
                assert name.lower() in document.text[slice(*passage)].lower(), question


def test_lists_follow_the_text() -> None:
    """All numbers of one key are asked for, and the answer has them in another order than the document."""
    questions = [q for document in documents() for q in document.questions if "magic numbers for" in q.question]
    assert questions
    for question in questions:
        places = [copy.at for copy in question.copies]
        assert places == sorted(places)


def test_every_task_is_asked_as_often_as_wanted() -> None:
    document = make_document(4000, seed=1, count=3)
    for task in TASKS:
        assert sum(question.task == task for question in document.questions) >= 3


def test_not_stated_is_not_stated() -> None:
    n_absent = n_stated = 0
    for document in [*documents(), *documents(heldout=True)]:
        for question in document.questions:
            patterns = list(statements_that_answer(question.question))
            stated = any(pattern.search(document.text) for pattern in patterns)
            if question.task == "absent":
                assert patterns, f"no template asks {question.question!r}"
                assert not stated, question
                n_absent += 1
            elif question.task in ("passkey", "multi", "json", "var"):
                assert stated, question  # so that the search above would find an answer
                n_stated += 1
    assert n_absent > 100
    assert n_stated > 100


def statements_that_answer(question: str) -> Iterator[re.Pattern[str]]:
    """Patterns of all sentences that would answer the question, found by inverting the templates."""
    pairs: list[tuple[Sequence[str], Sequence[str]]] = [
        (templates.ATTRIBUTE_QUESTIONS, templates.ATTRIBUTE_STATEMENTS),
        (templates.JSON_QUESTIONS, templates.JSON_LINES),
        (templates.VARIABLE_QUESTIONS, ["{name} = {value}"]),
        *((relation.questions, relation.statements) for relation in templates.RELATIONS),
        *(([phrase.question], [phrase.statement]) for phrase in (*templates.PLAIN_KEYS, *templates.KEYED_KEYS)),
    ]
    for asked, stated in pairs:
        for template in asked:
            slots = pattern_of(template, {}).fullmatch(question)
            if slots is None:
                continue
            values = {name.lower(): value for name, value in slots.groupdict().items()}
            yield from (pattern_of(statement, values, start=r"(?:\A|(?<=\n)|(?<=[.;\w] ))") for statement in stated)


def pattern_of(template: str, slots: Mapping[str, str], *, start: str = "") -> re.Pattern[str]:
    """A template with the given slots filled, and the others open; {Subject} and {subject} are one slot."""
    parts = []
    seen: set[str] = set()
    for text, slot, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(text))
        if slot is None:
            continue
        if slot.lower() in slots:
            parts.append(re.escape(slots[slot.lower()]))
        else:
            words = "|".join(lexicon.ATTRIBUTES) if slot == "attribute" else r"[^.\n]+"
            parts.append(rf"(?P={slot})" if slot in seen else rf"(?P<{slot}>{words})")
            seen.add(slot)
    return re.compile(start + "".join(parts), re.IGNORECASE)


@pytest.mark.parametrize("names", [lexicon.first_names(), lexicon.surnames(), lexicon.places()])
def test_heldout_names_are_disjoint_from_training_names(names: tuple[str, ...]) -> None:
    n_training = lexicon.n_training(names)
    assert len(set(names)) == len(names)
    assert not set(names[:n_training]) & set(names[n_training:])
    assert n_training / len(names) == pytest.approx(10 / 11, abs=1e-3)


@pytest.mark.parametrize("draw", [Source.first_name, Source.surname, Source.place])
def test_sources_keep_to_their_part_of_the_names(draw: Any) -> None:
    training, heldout = (
        {draw(source) for _ in range(3000)}
        for source in (Source(random.Random(1)), Source(random.Random(1), heldout=True))
    )
    assert not training & heldout
    assert len(training) > len(heldout) > 300


def test_every_value_kind_is_known() -> None:
    kinds = {*lexicon.ATTRIBUTES.values(), *(relation.value for relation in templates.RELATIONS)}
    assert kinds == set(VALUE_KINDS)


def test_filler_says_nothing_about_what_is_asked() -> None:
    document = make_document(3000, tasks=["quote"], seed=3, count=5, styles=["people"])
    for question in document.questions:
        assert document.text.count(question.answer) == 1


@pytest.mark.parametrize("options", [{"tasks": ["riddle"]}, {"tasks": []}, {"styles": ["verse"]}])
def test_unknown_tasks_and_styles_are_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="expected some of"):
        make_document(100, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required"),
        (["--text", "--jsonl"], "not allowed with"),
        (["--text", "--tasks", "riddle"], "expected some of passkey"),
        (["--text", "--model", "missing.gguf"], "no such file"),
        (["--text", "--tokens", "many"], "invalid"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate_main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
