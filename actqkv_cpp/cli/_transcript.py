"""A conversation as a file: JSON or Markdown, by the ending of its name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actqkv_cpp.errors import ParameterError
from actqkv_cpp.files import written_atomically
from actqkv_cpp.results import Answer, Source


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `kind` is "chat", or "ask" where it stood outside the conversation.

    Attributes:
        details: None where the answer was broken off, so that only its text is known.
        number: of the conversation's turns, from 0; None outside.
    """

    kind: Literal["chat", "ask"]
    question: str
    text: str
    details: Answer | None
    number: int | None = None

    def to_json(self) -> dict[str, Any]:
        found = self.details.to_json() if self.details else {"question": self.question, "answer": self.text}
        return {"kind": self.kind, **found}

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.details.sources if self.details else ()


@dataclass(frozen=True)
class Transcript:
    model: str
    method: str
    documents: tuple[str, ...]
    turns: tuple[Turn, ...]

    def save(self, path: Path, *, overwrite: bool) -> None:
        """Write JSON where the name ends in .json, else Markdown. The file appears whole or not at all.

        Raises:
            ParameterError: the file exists and `overwrite` is false.
        """
        if path.exists() and not overwrite:
            raise ParameterError(f"{path} exists", "choose another name, or remove it first")
        text = self.to_json() if path.suffix.lower() == ".json" else self.to_markdown()
        with written_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")

    def to_json(self) -> str:
        turns = [turn.to_json() for turn in self.turns]
        head = {"model": self.model, "method": self.method, "documents": list(self.documents)}
        return json.dumps(head | {"turns": turns}, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        documents = ", ".join(self.documents) or "none"
        lines = ["# Conversation", "", f"Model: {self.model}  ", f"Method: {self.method}  ", f"Documents: {documents}"]
        for turn in self.turns:
            aside = " (outside the conversation)" if turn.kind == "ask" else ""
            lines += ["", f"## {' '.join(turn.question.split())}{aside}", "", turn.text.strip()]
            lines += [""] if turn.sources else []
            for s in turn.sources:
                place = f", {s.place}" if s.place else ""
                lines.append(f"- {s.document}{place}, characters {s.start} to {s.end} ({s.score:.0%})")
        return "\n".join(lines) + "\n"
