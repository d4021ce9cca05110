"""`actqkv chat` as a person uses it, in a pseudo-terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import ANSWER, LONG, OTHER_ANSWER, OTHER_QUESTION, QUESTION, Actqkv, Terminal, command

pytestmark = pytest.mark.model

Start = Callable[..., Terminal]


def test_conversation(terminal: Start, book: Path, tmp_path: Path) -> None:
    """A chat fails at the main job: reading visibly, answering, showing passages, saving, leaving."""
    person = terminal("chat", "-d", book)
    person.wait("reading .*book.txt")
    seen = person.prompt()
    assert "tokens of" in seen
    assert "/help" in seen
    person.type(QUESTION)
    assert ANSWER in person.prompt()
    person.type("/sources")
    seen = person.prompt()
    assert f"[1] {book}:" in seen
    assert ANSWER in seen
    person.type("/stats")
    seen = person.prompt()
    assert "attended: at most" in seen
    assert "of KV" in seen
    person.type("/save talk.json")
    assert "saved 1 answers to talk.json" in person.prompt()
    person.type("/save talk.json")
    assert "saved 1 answers" in person.prompt()
    person.type("/quit")
    assert person.end() == 0
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [turn["answer"] for turn in saved["turns"]] == [ANSWER]
    assert "Traceback" not in person.log


def test_aside_and_reset(terminal: Start, book: Path, tmp_path: Path) -> None:
    """/ask changes the conversation, or the conversation cannot go on after it or after /reset."""
    person = terminal("chat", "-d", book)
    person.prompt()
    person.type(QUESTION)
    assert ANSWER in person.prompt()
    person.type(f"/ask {OTHER_QUESTION}")
    assert OTHER_ANSWER in person.prompt()
    person.type(QUESTION)
    person.prompt()
    person.type("/reset")
    assert "starts again" in person.prompt()
    person.type(OTHER_QUESTION)
    assert OTHER_ANSWER in person.prompt()
    person.press("d")
    assert person.end() == 0
    assert "error:" not in person.log


def test_ctrl_c_while_reading_then_read_on(terminal: Start, book: Path) -> None:
    """Ctrl-C in a reading leaves the chat, loses what was read, or hides that the rest is unknown."""
    person = terminal("chat", "-d", LONG)
    person.wait("/s, ")  # a rate is shown: some windows were read
    person.press("c")
    seen = person.prompt()
    assert "stopped: read the first" in seen
    assert "/read reads on" in seen
    person.type("Who is the aunt of Crana Wugsen?")
    assert "known of" in person.prompt()
    person.type("/read")
    person.wait("reading .*harbour.txt")
    person.wait("/s, ")
    person.press("c")
    seen = person.prompt()
    assert "stopped: read the first" in seen
    assert "without the rest is forgotten; no turns yet" in seen
    person.press("d")
    assert person.end() == 0


def test_ctrl_c_while_answering(terminal: Start, babbler: Path, book: Path) -> None:
    """Ctrl-C in an answer leaves the chat or loses the answer so far; at the prompt it leaves instead of hinting."""
    person = terminal("chat", babbler, "-d", book, "--max-tokens", "100k")
    person.prompt()
    person.type("Who?")
    person.wait(r"(?s)\x1b\[\?2004l.{60}")  # the line editor has ended, some of the answer is there
    person.press("c")
    assert "stopped" in person.prompt()
    person.type("/save talk.md")
    assert "saved 1 answers" in person.prompt()
    person.press("c")
    assert "/quit or Ctrl-D leaves" in person.prompt()
    person.press("d")
    assert person.end() == 0


def test_read_more(terminal: Start, book: Path) -> None:
    """/read does not add a document to a chat, or its errors end the chat."""
    person = terminal("chat", "--ctx", "8k")
    person.prompt()
    person.type("/read missing.txt")
    assert "no such file: missing.txt" in person.prompt()
    person.type(f"/read {LONG}")
    assert "hint: use a larger --ctx" in person.prompt()
    person.type(f"/read {book}")
    assert "tokens of" in person.prompt()
    person.type(QUESTION)
    assert ANSWER in person.prompt()
    person.type("/sources")
    assert f"[1] {book}:" in person.prompt()
    person.press("d")
    assert person.end() == 0


def test_wrong_commands(terminal: Start, babbler: Path) -> None:
    """A wrong /command ends the chat, or is asked of the model."""
    person = terminal("chat", babbler, "--ctx", "1k")
    person.prompt()
    for line, words in [
        ("/sorces", "did you mean '/sources'?"),
        ("/sources", "there is no answer yet"),
        ("/read", "/read needs a file"),
        ("/ask", "/ask needs a question"),
        ("/save", "/save needs a name, or a file"),
        ("/save /no/such/folder/talk.md", "No such file or directory"),
        ("/help", "Leave; so does Ctrl-D."),
    ]:
        person.type(line)
        assert words in person.prompt(), line
    person.type("/quit")
    assert person.end() == 0


def test_history_of_lines(terminal: Start, babbler: Path) -> None:
    """The arrow key does not bring back what was typed in an earlier chat."""
    for key in ("/stats first", "\x1b[A"):
        person = terminal("chat", babbler, "--ctx", "1k")
        person.prompt()
        person.type(key)
        assert "context: 0 of 1,024" in person.prompt()
        person.press("d")
        assert person.end() == 0


def test_document_from_standard_input(terminal: Start, book: Path) -> None:
    """With -d - the questions are read from the pipe, which is at its end."""
    words = " ".join(shlex.quote(word) for word in command("chat", "-d", "-"))
    person = terminal(f"{words} < {shlex.quote(str(book))}", shell=True)
    person.prompt()
    person.type(QUESTION)
    assert ANSWER in person.prompt()
    person.press("d")
    assert person.end() == 0


def test_standard_input_is_the_terminal(terminal: Start) -> None:
    """-d - at a terminal waits without a word for a document to be typed."""
    person = terminal("ask", "-d", "-", "Who?")
    person.wait("standard input is a terminal")
    person.wait("pipe a document into it")
    assert person.end() == 1


def test_lines_from_a_pipe(actqkv: Actqkv, book: Path) -> None:
    """A script cannot hold a conversation, or its answers are mixed with prompts and colours."""
    found = actqkv("chat", "-d", book, stdin=f"{QUESTION}\n/sources\n/nonsense\n")
    assert found.status == 0
    assert found.out.startswith(f"{ANSWER}\n[1] {book}:")
    assert "unknown command" in found.err
    assert "\x1b" not in found.out + found.err


def test_no_terminal_for_questions(actqkv: Actqkv, book: Path) -> None:
    """With -d - and no terminal the chat reads for minutes and then has nobody to talk to."""
    found = actqkv("chat", "-d", "-", stdin=book.read_bytes(), new_session=True)
    assert found.status == 1
    assert "there is no terminal for the questions" in found.err
