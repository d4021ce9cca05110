"""longbench: LongBench v1 (Bai et al. 2023, arXiv 2308.14508) from JSON lines of the published data.

Prompts, lengths of answers and metrics are the published ones, with two differences: prompts go through the chat
template for every data set, and ROUGE-L is over whole texts. Only the first line of an answer counts in trec,
triviaqa, samsum and lsht.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from actqkv_cpp.errors import unknown_name
from actqkv_cpp.evaluation import metrics
from actqkv_cpp.evaluation.samples import Question, Suite
from actqkv_cpp.evaluation.suites.files import Task, lines, suite

_FIELDS = {"input": str, "context": str, "answers": list, "dataset": str}

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)
_CONCISE = (
    "answer the question based on the story as concisely as you can, using a single phrase if possible. Do not provide "
    "any explanation."
)
_UNANSWERABLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)


def _best(metric: Callable[[str, str], float], question: Question, said: str) -> float:
    return max(metric(said, reference) for reference in question.references)


def _first_line(score: Callable[[Question, str], float], question: Question, said: str) -> float:
    return score(question, said.lstrip("\n").split("\n")[0])


def _classification(question: Question, said: str) -> float:
    return max(metrics.classification(said, reference, question.classes) for reference in question.references)


_QA, _QA_ZH = partial(_best, metrics.qa_f1), partial(_best, metrics.qa_f1_zh)
_ROUGE, _ROUGE_ZH = partial(_best, metrics.rouge_l), partial(_best, metrics.rouge_l_zh)
_CODE = partial(_best, metrics.code_similarity)
_RETRIEVAL = partial(_best, metrics.retrieval)

TASKS = {
    "narrativeqa": Task(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question as "
        "concisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}"
        f"\n\nNow, {_CONCISE}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        _QA,
    ),
    "qasper": Task(
        f"You are given a scientific article and a question. Answer the question {_UNANSWERABLE}"
        f"Article: {{context}}\n\n Answer the question based on the above article {_UNANSWERABLE}"
        "Question: {input}\n\nAnswer:",
        128,
        _QA,
    ),
    "multifieldqa_en": Task(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        _QA,
    ),
    "multifieldqa_zh": Task(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，"  # noqa: RUF001
        "不要输出任何其他字词。\n\n问题：{input}\n回答：",  # noqa: RUF001
        64,
        _QA_ZH,
    ),
    "hotpotqa": Task(_PASSAGES, 32, _QA),
    "2wikimqa": Task(_PASSAGES, 32, _QA),
    "musique": Task(_PASSAGES, 32, _QA),
    "dureader": Task(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",  # noqa: RUF001
        128,
        _ROUGE_ZH,
    ),
    "gov_report": Task(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        _ROUGE,
    ),
    "qmsum": Task(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512,
        _ROUGE,
    ),
    "multi_news": Task(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, "
        "write a one-page summary of all the news.\n\nSummary:",
        512,
        _ROUGE,
    ),
    "vcsum": Task(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",  # noqa: RUF001
        512,
        _ROUGE_ZH,
    ),
    "trec": Task(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        partial(_first_line, _classification),
    ),
    "triviaqa": Task(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32,
        partial(_first_line, _QA),
    ),
    "samsum": Task(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        partial(_first_line, _ROUGE),
    ),
    "lsht": Task(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",  # noqa: RUF001
        64,
        partial(_first_line, _classification),
    ),
    "passage_count": Task(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        32,
        partial(_best, metrics.count),
    ),
    "passage_retrieval_en": Task(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer '
        "is: ",
        32,
        _RETRIEVAL,
    ),
    "passage_retrieval_zh": Task(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要"  # noqa: RUF001
        '\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',  # noqa: RUF001
        32,
        _RETRIEVAL,
    ),
    "lcc": Task("Please complete the code given below. \n{context}Next line of code:\n", 64, _CODE),
    "repobench-p": Task("Please complete the code given below. \n{context}{input}Next line of code:\n", 64, _CODE),
}


def load(path: Path) -> list[Suite]:
    """A suite for each data set in the file; the lines of LongBench-E (dataset "hotpotqa_e") count as the plain ones.

    Raises:
        DocumentError: a line lacks a field, or has another type there; with its number.
        ParameterError: a data set that LongBench does not have.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, row in lines(path, _FIELDS):
        name = row["dataset"].removesuffix("_e")
        if name not in TASKS:
            error = unknown_name("data set of LongBench", name, TASKS)
            raise type(error)(f"{path}:{number}: {error}", error.hint)
        found[name].append(row)
    return [_suite(name, rows) for name, rows in found.items()]


def _suite(name: str, rows: list[dict[str, Any]]) -> Suite:
    slots = [{"context": row["context"], "input": row["input"]} for row in rows]
    questions = [
        {
            "references": tuple(str(answer) for answer in row["answers"]) or ("",),
            "classes": tuple(row.get("all_classes") or ()),
        }
        for row in rows
    ]
    return suite(f"longbench/{name}", "LongBench v1", TASKS[name], slots, questions)
