"""What longbench and infinitebench share: samples that stand in a file of JSON lines on the user's disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from actqkv_cpp.errors import DocumentError, ParameterError
from actqkv_cpp.evaluation.samples import Question, Room, Sample, Suite

_CONTEXT = "{context}"
_Given = Mapping[str, Any]  # attributes of a Question, its text aside
_CHARS_PER_TOKEN = 4  # about, for telling the time left
_N_CTX_STEP = 1024  # sessions for prompts of about one length are made alike


@dataclass(frozen=True)
class Task:
    """One data set: its published prompt, how many tokens it may answer with, and its metric.

    Attributes:
        prompt: with {context}, where it is split: before and with it is the document, behind it the question.
        score: of an answer to a question.
    """

    prompt: str
    max_tokens: int
    score: Callable[[Question, str], float]

    def sample(self, room: Room, slots: Mapping[str, str], question: _Given) -> Sample:
        """The sample of one line: `slots` fill the prompt, `question` are the other attributes of its Question."""
        before, _, after = self.prompt.partition(_CONTEXT)
        text = fill(after, slots).strip("\n") or fill(before, slots).strip()  # an instruction alone is said again, last
        asked = Question(text=text, **question)
        head, context = fill(before, slots), slots["context"]
        n_tokens = room.count(head + context)
        n_other = room.n_template + room.n_askings * room.count(asked.text) + self.max_tokens + _N_CTX_STEP // 16
        n_cut = max(n_tokens + n_other - room.n_ctx, 0) if room.n_ctx else 0
        if n_cut:
            n_left = room.count(context) - n_cut
            if n_left < 1:
                raise ParameterError(
                    f"{room.n_ctx} tokens leave no room for a document: prompt and answer take {n_other}",
                    "use a greater --truncate",
                )
            context = room.cut(context, n_left)
        return Sample(
            document=head + context,
            questions=(asked,),
            n_ctx=room.n_ctx if n_cut else -(-(n_tokens + n_other) // _N_CTX_STEP) * _N_CTX_STEP,
            max_tokens=self.max_tokens,
            n_cut=n_cut,
            recalls=room.recalls,
        )


def fill(template: str, slots: Mapping[str, str]) -> str:
    """The template with {name} replaced for each name in `slots`; other braces stay as they are."""
    for name, text in slots.items():
        template = template.replace("{" + name + "}", text)
    return template


@dataclass(frozen=True)
class FileSuite(Suite):
    """A suite whose samples are lines of a file, as long as they are."""

    from_file: ClassVar[bool] = True
    n_chars: int = 0  # of all samples

    @property
    def n_tokens(self) -> int:
        return max(self.n_chars // (_CHARS_PER_TOKEN * self.n_samples), 1)


def suite(name: str, about: str, task: Task, slots: Sequence[Mapping[str, str]], questions: Sequence[_Given]) -> Suite:
    """The suite of one data set; of each sample what fills the prompt, and the other attributes of its question."""
    return FileSuite(
        name=name,
        about=about,
        n_samples=len(slots),
        make=lambda room, index: task.sample(room, slots[index], questions[index]),
        score=task.score,
        n_chars=sum(len(one["context"]) for one in slots),
    )


def lines(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line.

    Args:
        fields: that each line must have, with their types.

    Raises:
        DocumentError: the file is not there, holds nothing, or a line is no object with these fields; with its number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DocumentError(f"{path}: {reason}", "give a file of JSON lines") from None
    n_lines = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DocumentError(f"{path}:{number}: not JSON ({error})", "a line is one JSON object") from None
        _check(path, number, row, fields)
        n_lines += 1
        yield number, row
    if not n_lines:
        raise DocumentError(f"{path} is empty", "a line is one JSON object with " + ", ".join(fields))


def _check(path: Path, number: int, row: Any, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    needed = ", ".join(fields)
    if not isinstance(row, dict):
        raise DocumentError(f"{path}:{number}: not a JSON object", f"a line is an object with {needed}")
    for name, kind in fields.items():
        if name not in row:
            raise DocumentError(f"{path}:{number}: no field {name!r}", f"a line has the fields {needed}")
        if not isinstance(row[name], kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join({"str": "text", "list": "a list"}.get(k.__name__, "a number") for k in kinds)
            raise DocumentError(
                f"{path}:{number}: field {name!r} is {type(row[name]).__name__}, expected {expected}",
                f"a line has the fields {needed}",
            )
