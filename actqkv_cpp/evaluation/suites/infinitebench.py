"""infinitebench: InfiniteBench (Zhang et al. 2024, arXiv 2402.13718) from JSON lines of the published data.

A file is one task, told by its name: kv_retrieval.jsonl and so on. Prompts are those published for chat models; lengths
of answers and metrics are the published ones, except that ROUGE-L of summaries is over whole texts. The synthetic tasks
exist without a file too, as the suites passkey, number and kv.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from actqkv_cpp.errors import DocumentError, unknown_name
from actqkv_cpp.evaluation import metrics
from actqkv_cpp.evaluation.samples import Question, Suite
from actqkv_cpp.evaluation.suites.files import Task, lines, suite

_FIELDS: dict[str, type | tuple[type, ...]] = {"context": str, "input": str, "answer": (list, str, int, float)}
_LETTERS = "ABCD"
_OPTIONS = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}"
_FIND = "There is an important info hidden inside a lot of irrelevant text. Find it{}. I will quiz you about the "
_FIND += "important information there.\n\n{{context}}\n\n{{input}}"
_FAULTY = (
    "There is ONLY ONE function in the large project that is deliberately made to include an obvious error. Please "
    "find the function that contains the most obvious errors. I will give you four options to narrow your scope. You "
    "can inspect through the options and think. Eventually, tell me the answer using one single letter (A, B, C, or D)."
    "\n\n{context}\n\nWhich funtion has deliberate error?\n" + _OPTIONS + "\n\nYou should first find the functions in "
    "the options. Repeat their content, inspect through code, and at last give me your answer for the function that "
    "has the deliberate and obvious error in A, B, C, or D."
)
_MASKED = (
    'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and you '
    "should try to guess who that character is.\n\nThe dialogue:\n\n---\n\n{context}\n\n---\n\nEnd of dialogue.\n\n"
    'Which character is most likely "$$MASK$$"? Just say the name used by the scriptwriter (before the colon marks) of '
    "one single character and nothing else."
)


def _first(metric: Callable[[str, str], float], question: Question, said: str) -> float:
    return metric(said, question.references[0])


def _best(metric: Callable[[str, str], float], question: Question, said: str) -> float:
    return max(metric(said, reference) for reference in question.references)


TASKS = {
    "passkey": Task(_FIND.format(" and memorize them"), 6, partial(_first, metrics.first_integer)),
    "number_string": Task(_FIND.format(""), 12, partial(_first, metrics.first_integer)),
    "kv_retrieval": Task(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        50,
        partial(_first, metrics.word_among),
    ),
    "longbook_sum_eng": Task("Summarize the following book.\n\n{context}", 1200, partial(_best, metrics.rouge_l)),
    "longbook_choice_eng": Task(
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n\nOnly one of the following options "
        "is correct, tell me the answer using one single letter (A, B, C, or D). Don't say anything else.\n" + _OPTIONS,
        40,
        lambda question, said: metrics.choice(said, question.references[0], question.references[1]),
    ),
    "longbook_qa_eng": Task(
        "Read the book below and answer a question.\n\n{context}\n\nQuestion: {input}\n\nBe very concise.",
        40,
        partial(_best, metrics.qa_f1),
    ),
    "longbook_qa_chn": Task(
        "请根据以下书籍回答我的问题。\n\n{context}\n\n问题：{input}\n请尽量简短地回答。",  # noqa: RUF001
        40,
        partial(_best, metrics.qa_f1_characters),
    ),
    "longdialogue_qa_eng": Task(_MASKED, 40, partial(_first, metrics.name_among)),
    "math_find": Task("{prefix}\n\n{context}\n\n{input}", 3, partial(_first, metrics.first_number)),
    "math_calc": Task(
        "Compute the intermediate values in the following long expression.\n\n{context}",
        30000,
        lambda question, said: metrics.leading_numbers(said, question.references),
    ),
    "code_run": Task(
        "Following is a set of Python functions. There is a function called named {func}.\n\n{context}\n\nPlease give "
        "me the exact number of the return value of {func_call}. Be concise. Your response must end with the final "
        "returned value.",
        5,
        partial(_first, metrics.last_integer),
    ),
    "code_debug": Task(
        _FAULTY, 5, lambda question, said: metrics.code_debug(said, question.references[0], question.references[1])
    ),
}
_WITH_OPTIONS = ("longbook_choice_eng", "code_debug")


def load(path: Path) -> list[Suite]:
    """The suite of the file's task.

    Raises:
        DocumentError: a line lacks a field, or something in it; with its number.
        ParameterError: the file has no name of a task.
    """
    name = path.name.split(".")[0]
    if name not in TASKS:
        error = unknown_name("task of InfiniteBench (the file's name tells it)", name, TASKS)
        raise type(error)(f"{path}: {error}", error.hint)
    fields = _FIELDS | ({"options": list} if name in _WITH_OPTIONS else {})
    found = list(lines(path, fields))
    slots = [_slots(path, number, name, row) for number, row in found]
    questions = [{"references": _references(path, number, name, row)} for number, row in found]
    return [suite(f"infinitebench/{name}", "InfiniteBench", TASKS[name], slots, questions)]


def _slots(path: Path, number: int, name: str, row: dict[str, Any]) -> dict[str, str]:
    """What fills the prompt of one line."""
    slots = {"context": row["context"], "input": row["input"]}
    if name in _WITH_OPTIONS:
        if len(row["options"]) != len(_LETTERS):
            raise DocumentError(f"{path}:{number}: field 'options' has {len(row['options'])} entries, expected 4")
        slots |= {f"OPTION_{letter}": str(row["options"][i]) for i, letter in enumerate(_LETTERS)}
    if name == "code_run":
        call = re.search(r"\bfunc_\d+\(-?\d+\)", row["input"])
        if call is None:
            raise DocumentError(f"{path}:{number}: field 'input' has no call such as func_1(2)")
        slots |= {"func_call": call[0], "func": call[0].split("(")[0]}
    if name == "math_find":
        target = re.search(r"[Tt]he (.+?) (?:of|in)\b|[Tt]he (\w+ number)", row["input"])
        if target is None:
            raise DocumentError(f"{path}:{number}: field 'input' does not say which number is asked for")
        slots["prefix"] = f"What is the {(target[1] or target[2]).lower()} in the following list?"
    return slots


def _references(path: Path, number: int, name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """The expected answers; behind an option its letter."""
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not answers:
        raise DocumentError(f"{path}:{number}: field 'answer' is empty")
    if name not in _WITH_OPTIONS:
        return tuple(str(answer) for answer in answers)
    if len(answers) == 2 and answers[1] in list(_LETTERS):
        return str(answers[0]), str(answers[1])
    if answers[0] not in row["options"]:
        raise DocumentError(f"{path}:{number}: the answer {answers[0]!r} is none of the options")
    return str(answers[0]), _LETTERS[row["options"].index(answers[0])]
