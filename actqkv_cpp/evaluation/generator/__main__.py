"""Generate long documents with planted facts, and questions about them.

    python -m actqkv_cpp.evaluation.generator --tokens 4k --text                          a document to look at
    python -m actqkv_cpp.evaluation.generator --tokens 128k --tasks passkey --count 20 --seed a --heldout --jsonl
    python -m actqkv_cpp.evaluation.generator --tokens 2k --count 2 --seed held-2048 --documents 20 --heldout --jsonl

The last is how models/heldout/eval_2k.jsonl was made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from actqkv_cpp import default_model_path, parse_size
from actqkv_cpp.evaluation.generator import filler
from actqkv_cpp.evaluation.generator.documents import Question, at_most, make_document
from actqkv_cpp.evaluation.generator.facts import TASKS
from actqkv_cpp.evaluation.generator.vocabulary import Vocabulary


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m actqkv_cpp.evaluation.generator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tokens", type=parse_size, default=2048, help="length of a document: 2k, 128k, 1m or a number"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated, of: %(default)s")
    parser.add_argument("--count", type=int, help="questions per task; without it facts fill --density of the text")
    parser.add_argument("--density", type=float, default=0.3, help="share of facts without --count (%(default)s)")
    parser.add_argument("--seed", default="1", help="document i is made from the seed SEED-i")
    parser.add_argument("--documents", type=int, default=1, help="how many (%(default)s)")
    parser.add_argument("--heldout", action="store_true", help="names and places that training never saw")
    parser.add_argument(
        "--styles", help="styles of the filler, comma-separated: " + ",".join(dict.fromkeys(filler.STYLES))
    )
    parser.add_argument(
        "--model", type=Path, default=default_model_path(), help="GGUF whose tokens are counted (the bundled one)"
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--jsonl", action="store_true", help="one JSON object per document, with its questions")
    form.add_argument("--questions", action="store_true", help="one JSON object per question, without the documents")
    form.add_argument("--text", action="store_true", help="the documents alone")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        vocabulary = Vocabulary(args.model)
        for index in range(args.documents):
            _print_document(f"{args.seed}-{index}", args, vocabulary)
    except ValueError as error:
        parser.error(str(error))


def _print_document(name: str, args: argparse.Namespace, vocabulary: Vocabulary) -> None:
    document = make_document(
        args.tokens,
        tasks=args.tasks.split(","),
        seed=name,
        heldout=args.heldout,
        density=args.density,
        count=args.count,
        styles=args.styles.split(",") if args.styles else None,
        encode=vocabulary.encode,
    )
    questions = [_as_json(question) for question in at_most(document.questions, args.count)]
    if args.text:
        print(document.text)
    elif args.questions:
        for question in questions:
            print(json.dumps(question))
    else:
        n_tokens = len(vocabulary.encode(document.text))
        row = {"id": name, "tokens": n_tokens, "document": document.text, "questions": questions}
        print(json.dumps(row))


def _as_json(question: Question) -> dict[str, object]:
    return {
        "question": question.question,
        "answer": question.answer,
        "depth": question.depth,
        "task": question.task,
        "passages": question.passages,
    }


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
