"""Where the lines of a chat come from: a terminal with line editing and history, or standard input as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, NestedCompleter, PathCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from actqkv_cpp import _env
from actqkv_cpp.errors import ParameterError

PROMPT = "> "


class Lines(Protocol):
    """A source of lines."""

    def next(self) -> str:
        """The next line. EOFError at the end of input; KeyboardInterrupt where Ctrl-C dropped the line."""
        ...


def open_lines(*, stdin_taken: bool, commands: Iterable[str], with_path: Iterable[str]) -> Lines:
    """The lines that the user types, or that standard input holds.

    Args:
        stdin_taken: standard input was a document, so that questions come from the terminal itself.
        commands: completed by Tab at the start of a line.
        with_path: those of them that a path follows.

    Raises:
        ParameterError: there is no terminal to ask.
    """
    if not stdin_taken and not sys.stdin.isatty():
        return _PipedLines(sys.stdin)
    source = _open_tty() if stdin_taken else sys.stdin
    if not sys.stderr.isatty():  # nowhere to draw a prompt: the terminal still edits the line by itself
        return _PipedLines(source)
    paths = PathCompleter(expanduser=True)
    nested: dict[str, Completer | None] = dict.fromkeys(commands)
    return _EditedLines(source, NestedCompleter(nested | dict.fromkeys(with_path, paths)))


def _open_tty() -> TextIO:
    try:
        return Path("/dev/tty").open(encoding="utf-8", errors="replace")
    except OSError:
        raise ParameterError(
            "standard input is the document and there is no terminal for the questions",
            'name the questions: actqkv ask -d - "question"',
        ) from None


class _PipedLines:
    def __init__(self, source: TextIO) -> None:
        self._source = source
        if hasattr(source, "reconfigure"):
            source.reconfigure(errors="replace")

    def next(self) -> str:
        line = self._source.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class _EditedLines:
    def __init__(self, source: TextIO, completer: Completer) -> None:
        self._session: PromptSession[str] = PromptSession(
            input=create_input(source),
            output=create_output(sys.stderr),  # standard output is for answers
            history=_history(),
            completer=completer,
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
        )

    def next(self) -> str:
        return self._session.prompt(PROMPT)


def _history() -> History:
    """The lines of earlier chats, private to the user; of this chat alone where the file cannot be written."""
    with suppress(OSError, RuntimeError):  # RuntimeError: no home directory
        file = _env.cache_dir() / "history"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("ab"):
            return FileHistory(file)
    return InMemoryHistory()
