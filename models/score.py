"""Exact-match accuracy of `actqkv ask` on a question set, as the figures in README.md are made.

    python -m models.score models/heldout/eval_128k.jsonl -- --budget 2k --threads 2
    python -m models.score passkeys.jsonl --model model.gguf

Every document is read once, by the installed `actqkv` command; its questions are answered greedily, one after another,
none seeing another. What stands behind `--` goes to `actqkv ask` as it is. The report is JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def ask(document: dict[str, Any], model: str | None, options: Sequence[str]) -> dict[str, Any]:
    """What `actqkv ask --json` prints for one document of a set, all of its questions in one reading.

    Raises:
        SystemExit: the command failed; its message stands on standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, questions = Path(folder, "document.txt"), Path(folder, "questions.jsonl")
        text.write_text(document["document"], encoding="utf-8")
        questions.write_text("".join(json.dumps(one) + "\n" for one in document["questions"]), encoding="utf-8")
        which = [model] if model else []
        command = ["actqkv", "ask", *which, "-d", str(text), "--questions", str(questions), "--json", *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    answered: dict[str, Any] = json.loads(done.stdout)
    return answered


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Exact-match accuracy of actqkv ask on a question set.")
    parser.add_argument("set", type=Path, help="of python -m models.generate --jsonl")
    parser.add_argument("--model", help="GGUF file (default: the bundled model)")
    parser.add_argument("options", nargs="*", help="for actqkv ask, behind --")
    args = parser.parse_args(argv)

    right: dict[str, list[bool]] = defaultdict(list)
    used: list[dict[str, Any]] = []
    with args.set.open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            answered = ask(document, args.model, args.options)
            used.append({name: answered[name] for name in ("usage", "memory", "timing")})
            for question, said in zip(document["questions"], answered["answers"], strict=True):
                right[question["task"]].append(said["answer"].strip() == question["answer"])
    tasks = {task: {"right": sum(found), "n": len(found)} for task, found in sorted(right.items())}
    everything = [one for found in right.values() for one in found]
    report = {"set": args.set.name, "right": sum(everything), "n": len(everything), "tasks": tasks, "documents": used}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
