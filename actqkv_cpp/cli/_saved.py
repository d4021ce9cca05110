"""Chats that go on another day: what was said, by name. What was read is read again, or opened from a KV file.

    {"format": "actqkv-chat", "format_version": 1, "model": path or null, "model_bytes", "system",
     "documents": [paths as -d had them], "events": [{"read": path, "sha256"} or {"question", "answer", "tokens",
     "details"}]}

Events in their order; the first are the documents, by the text that was taken out of them. `tokens` are those of an
answer: fed again after its question they leave the session as it was. `details`: the answer as in `Answer.to_json`, or
null.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actqkv_cpp import _env
from actqkv_cpp.errors import DocumentError, ParameterError, StateError, unknown_name
from actqkv_cpp.files import written_atomically
from actqkv_cpp.origin import HASH_CHARS
from actqkv_cpp.reader import TextFile
from actqkv_cpp.results import Answer

if TYPE_CHECKING:
    from actqkv_cpp import Chat

_FORMAT, _FORMAT_VERSION = "actqkv-chat", 1
_NAME = re.compile(r"[\w-]+")  # what has a dot or a slash is a file


def is_name(text: str) -> bool:
    """Whether a chat can be called so."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class ReadEvent:
    """A document that was read, and the SHA-256 of its text."""

    path: str
    sha256: str


@dataclass(frozen=True)
class TurnEvent:
    question: str
    answer: str
    tokens: tuple[int, ...]
    details: Answer | None


@dataclass(frozen=True)
class SavedChat:
    """A chat on disk; see the top of this file. `name` is that of the file."""

    name: str
    model: str | None
    model_bytes: int
    system: str | None
    documents: tuple[str, ...]
    events: tuple[ReadEvent | TurnEvent, ...]

    @property
    def turns(self) -> list[TurnEvent]:
        return [event for event in self.events if isinstance(event, TurnEvent)]


def events_of(
    chat: Chat, n_given: int, details: dict[int, Answer], kv_files: dict[str, str]
) -> tuple[ReadEvent | TurnEvent, ...]:
    """What became of a chat, in its order.

    Args:
        n_given: documents of -d, which come first.
        details: answers by the number of their turn.
        kv_files: those that documents were taken out of, by the digests of these.

    Raises:
        ParameterError: a document is no file and could not be read again.
    """
    events: list[ReadEvent | TurnEvent] = []
    n_files = 0
    for i, files in enumerate(chat.documents_by_turn):
        for number, file in enumerate(files[n_files:], n_files):
            path = Path(kv_files.get(file.sha256, file.name))
            if number >= n_given and not path.is_file():
                raise ParameterError(
                    f"{path} is no file, so that it could not be read again", "save its text in a file first"
                )
            events.append(ReadEvent(str(path.absolute()), file.sha256))
        n_files = len(files)
        if i < len(chat.turns):
            turn = chat.turns[i]
            events.append(TurnEvent(turn.question, turn.answer, tuple(turn.tokens.tolist()), details.get(i)))
    return tuple(events)


def check_same(file: TextFile, event: ReadEvent) -> None:
    """DocumentError where a document has changed since the chat was saved."""
    if (now := file.sha256) != event.sha256:
        raise DocumentError(
            f"{file.name} has changed since the chat was saved: sha256 {event.sha256[:HASH_CHARS]} then, "
            f"{now[:HASH_CHARS]} now",
            "start a new chat, or bring the old text back",
        )


def save(chat: SavedChat, *, overwrite: bool) -> Path:
    """Write a chat; readable by the user alone.

    Raises:
        ParameterError: there is one of this name and `overwrite` is false.
    """
    path = _path(chat.name)
    if path.exists() and not overwrite:
        raise ParameterError(
            f"there is a chat {chat.name} already",
            f"choose another name, or remove {path}; actqkv chat --resume {chat.name} goes on with it",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    events = [
        {"read": event.path, "sha256": event.sha256}
        if isinstance(event, ReadEvent)
        else {
            "question": event.question,
            "answer": event.answer,
            "tokens": event.tokens,
            "details": event.details.to_json() if event.details else None,
        }
        for event in chat.events
    ]
    value = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "model": chat.model,
        "model_bytes": chat.model_bytes,
        "system": chat.system,
        "documents": chat.documents,
        "events": events,
    }
    with written_atomically(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")
    return path


def load(name: str) -> SavedChat:
    """The chat of this name.

    Raises:
        ParameterError: there is none; the hint names those that there are.
        StateError: its file is damaged or of another version.
    """
    path = _path(name)
    if not path.is_file():
        raise unknown_name("chat", name, [file.stem for file in path.parent.glob("*.json")])
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if (value["format"], value["format_version"]) != (_FORMAT, _FORMAT_VERSION):
            raise StateError(
                f"{path} has another format: version {value['format_version']}, expected {_FORMAT_VERSION}"
            )
        return SavedChat(
            name=name,
            model=_text(value["model"]) if value["model"] is not None else None,
            model_bytes=int(value["model_bytes"]),
            system=_text(value["system"]) if value["system"] is not None else None,
            documents=tuple(_text(name) for name in value["documents"]),
            events=tuple(_event(event) for event in value["events"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"the saved chat {path} is damaged: {error!r}", "remove it") from None


def _path(name: str) -> Path:
    if not is_name(name):
        raise ParameterError(f"{name!r} is no name of a chat", "use letters, digits, - and _")
    return _env.data_dir() / "chats" / f"{name}.json"


def _event(value: dict[str, Any]) -> ReadEvent | TurnEvent:
    if "read" in value:
        return ReadEvent(_text(value["read"]), _text(value["sha256"]))
    details = Answer.from_json(value["details"]) if value["details"] is not None else None
    tokens = tuple(int(token) for token in value["tokens"])
    return TurnEvent(_text(value["question"]), _text(value["answer"]), tokens, details)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
