"""Going back in a chat, branching, and going on another day."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import ANSWER, OTHER_QUESTION, QUESTION, Actqkv, assert_failed

from actqkv_cpp import DocumentError, ParameterError, StateError
from actqkv_cpp.cli import _saved
from actqkv_cpp.cli._saved import ReadEvent, SavedChat, TurnEvent
from actqkv_cpp.reader import TextFile


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with a folder of its own for saved chats."""
    return {"ACTQKV_DATA_DIR": str(tmp_path / "data")}


def chat(actqkv: Actqkv, home: dict[str, str], *arguments: object, lines: list[str]) -> tuple[list[str], str]:
    """Lines of answers, and what went to standard error."""
    found = actqkv("chat", *arguments, "--ctx", "4k", stdin="\n".join(lines) + "\n", **home)
    assert found.status == 0, found.err
    return found.out.splitlines(), found.err


@pytest.mark.model
def test_undo_and_edit(actqkv: Actqkv, home: dict[str, str], book: Path) -> None:
    """/undo or /edit leave the last turn in the conversation, or lose an earlier one."""
    lines = [QUESTION, OTHER_QUESTION, "/undo", f"/edit {QUESTION}", OTHER_QUESTION, "/undo", "/undo", "/undo", "/edit"]
    out, err = chat(actqkv, home, "-d", book, lines=lines)
    assert out[0] == out[2] == ANSWER
    assert out[1:] == [out[1], ANSWER, out[1]]
    assert f"forgotten; after turn 1: {QUESTION}" in err
    assert err.count("forgotten; no turns yet") == 1
    assert err.count("error: there is no turn to undo") == 1
    assert "error: /edit needs the question" in err


@pytest.mark.model
def test_branches(actqkv: Actqkv, home: dict[str, str], book: Path) -> None:
    """A branch does not begin where it should, cannot be left, or reads the document again."""
    lines = [QUESTION, OTHER_QUESTION, "/branch 1", OTHER_QUESTION, "/undo", "/switch 1", QUESTION, "/branch"]
    wrong = ["/branch 9", "/branch x", "/switch 3", "/switch"]
    out, err = chat(actqkv, home, "-d", book, lines=[*lines, "/save a.json", *wrong])
    assert out[0] == ANSWER
    assert out[1] == out[2]
    assert f"branch 2; after turn 1: {QUESTION}; /switch 1 goes back" in err
    assert f"branch 1; after turn 2: {OTHER_QUESTION}" in err
    assert "branch 1 (here): 3 turns" in err
    assert "branch 2: 1 turn\n" in err
    assert "saved 3 answers to a.json" in err
    assert err.count("tokens of") == 1
    assert "there is no turn 9, the last is 3" in err
    assert "needs the number of a turn, not 'x'" in err
    assert "there is no branch 3, the last is 2" in err
    assert "needs the number of a branch, not ''" in err


@pytest.mark.model
def test_another_day(actqkv: Actqkv, home: dict[str, str], book: Path, tmp_path: Path) -> None:
    """A saved chat goes on differently, loses its sources, or does not say that a document has changed."""
    mine, second = tmp_path / "book.txt", tmp_path / "second.txt"
    mine.write_bytes(book.read_bytes())
    second.write_text("The lamp of Orsk is green. " * 5, encoding="utf-8")
    lines = [QUESTION, f"/read {second}", OTHER_QUESTION, "/save talk", "/save talk", QUESTION, "/sources"]
    out, err = chat(actqkv, home, "-d", mine, lines=lines)
    assert err.count("saved; actqkv chat --resume talk goes on") == 2
    again, err = chat(actqkv, home, "--resume", "talk", lines=["/sources", QUESTION, "/sources"])
    assert f"gone on with, after turn 2: {OTHER_QUESTION}" in err
    assert err.count("tokens of") == 2
    assert again[0].startswith("[1] ")
    assert again[again.index(out[2]) :] == out[2:]
    assert_failed(actqkv("chat", "--resume", "tolk", **home), "unknown chat 'tolk'", "'talk'")
    empty = {"ACTQKV_DATA_DIR": str(tmp_path / "none")}
    assert_failed(actqkv("chat", "--resume", "talk", **empty), "unknown chat 'talk'", "there is none yet")
    assert_failed(actqkv("chat", "--resume", "talk", "-d", book, **home), "leave -d and --system out")
    mine.write_text("another text", encoding="utf-8")
    assert_failed(actqkv("chat", "--resume", "talk", **home), "book.txt has changed since the chat was saved")


def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved chat is not what was saved, a damaged one ends in a traceback, or others may read it."""
    monkeypatch.setenv("ACTQKV_DATA_DIR", str(tmp_path))
    one = SavedChat(
        "one", "m.gguf", 7, None, ("a.txt",), (ReadEvent("a.txt", "00"), TurnEvent("Who?", "é", (1, 2), None))
    )
    path = _saved.save(one, overwrite=False)
    with pytest.raises(ParameterError, match="there is a chat one already"):
        _saved.save(one, overwrite=False)
    assert _saved.load("one") == one
    assert path.stat().st_mode & 0o077 == 0
    value = json.loads(path.read_text(encoding="utf-8"))
    for damage in ({"events": [{"question": "Who?"}]}, {"documents": [7]}, {"format_version": 9}, {"model_bytes": "x"}):
        path.write_text(json.dumps(value | damage), encoding="utf-8")
        with pytest.raises(StateError):
            _saved.load("one")
    path.write_bytes(b"\xff{")
    with pytest.raises(StateError, match="damaged"):
        _saved.load("one")
    for name in ("../one", "a.b", ""):
        with pytest.raises(ParameterError, match="no name of a chat"):
            _saved.load(name)


def test_changed_document() -> None:
    """A chat goes on over another text than it was held about."""
    file = TextFile("a.txt", "text")
    _saved.check_same(file, ReadEvent("a.txt", file.sha256))
    with pytest.raises(DocumentError, match="has changed"):
        _saved.check_same(TextFile("a.txt", "Text"), ReadEvent("a.txt", file.sha256))
