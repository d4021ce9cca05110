"""The sink: what a terminal shows, whatever its width and whatever a document holds."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from actqkv_cpp import (
    Answer,
    Audit,
    ContextError,
    DocumentError,
    Memory,
    ParameterError,
    Source,
    Timing,
    Usage,
)
from actqkv_cpp.cli import _errors
from actqkv_cpp.cli._output import Meter, Output, answer_figures, clock, human_bytes, shorten
from actqkv_cpp.cli._transcript import Transcript, Turn
from actqkv_cpp.files import written_atomically

_SOURCE = Source(document="book.txt", start=10, end=20, text="ten  words\n", score=0.5)


def _answer() -> Answer:
    return Answer(
        question="Who?",
        text="The ferryman.",
        sources=(_SOURCE,),
        usage=Usage(
            document_tokens=90, prompt_tokens=100, completion_tokens=3, attended_tokens=64, attended_tokens_mean=60.0
        ),
        timing=Timing(prefill_s=1.0, prefill_tokens_per_s=90.0, decode_tokens_per_s=10.0, first_token_s=0.1),
        memory=Memory(kv_bytes=2048, summary_bytes=512),
        finish_reason="stop",
    )


def test_figures_of_an_answer() -> None:
    """What /stats says hides the tokens of dense layers, or an audit's recall and the budget it led to."""
    answer = _answer()
    plain = answer_figures(answer)
    assert not any(word in line for line in plain for word in ("audit", "dense"))
    usage = dataclasses.replace(answer.usage, dense_tokens=5000)
    audit = Audit(n=12, recall=0.91234, min_recall=0.5, budget=4096)
    lines = answer_figures(dataclasses.replace(answer, usage=usage, audit=audit))
    assert "attended: at most 64 of 103 tokens at a time, 5,000 in the method's dense layers" in lines
    assert "audit: recall 0.912 on average, 0.500 at worst, in 12 checks; budget 4,096" in lines
    nothing = Audit(n=0, recall=None, min_recall=None, budget=2048)
    assert "audit: nothing was checked; budget 2,048" in answer_figures(dataclasses.replace(answer, audit=nothing))


@pytest.mark.parametrize("width", [8, 20, 40, 60, 80, 200])
def test_progress_is_one_line(width: int) -> None:
    """A progress line that is wider than the terminal wraps, and every refresh leaves a line behind."""
    meter = Meter("reading a/rather/long/path/to/a/document.txt", "tokens")
    for done in (1000, 2000, 131072):
        meter.update(done, 131072)
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(meter)
    out = console.file
    assert isinstance(out, io.StringIO)
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    assert len(lines[0].rstrip()) < width
    assert "131,072" in lines[0] or width < 20


@pytest.mark.parametrize("width", [30, 100])
def test_long_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """A terminal cuts long lines in the middle of words, or a pipe gets them in pieces."""
    text = "the ferryman of Orsk keeps the key of the mill below the stairs"
    for terminal in (True, False):
        out = io.StringIO()
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr(out, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setenv("COLUMNS", str(width))
        Output().entry("ok      found  ", text)
        lines = out.getvalue().splitlines()
        assert " ".join(" ".join(lines).split()) == f"ok found {text}"
        assert (len(lines) > 1) == (terminal and width == 30)
        assert not terminal or max(map(len, lines)) <= width
        assert all(line.startswith(" " * 7) for line in lines[1:])


def test_control_characters_stay_out_of_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    """A document or a model can move the cursor or retitle the window of whoever reads it."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    Output().data("a\x1b[2Jb\x07\tc\n\x9b1m")
    assert out.getvalue() == "a\ufffd[2Jb\ufffd\tc\n\ufffd1m"


def test_words_for_numbers() -> None:
    """Times and sizes read wrong."""
    assert (clock(0), clock(59.6), clock(61), clock(3661)) == ("0:00", "1:00", "1:01", "1:01:01")
    assert (human_bytes(10), human_bytes(2048), human_bytes(3 << 20), human_bytes(5 << 30)) == (
        "10 B",
        "2 KiB",
        "3 MiB",
        "5.0 GiB",
    )
    assert (shorten("abcdef", 6), shorten("abcdef", 5), shorten("abcdef", 2)) == ("abcdef", "ab...", "..")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ParameterError("two\nlines", "and a\nhint"), ("two lines", "and a hint")),
        (OSError(28, "No space left on device", "out.md"), ("out.md: No space left on device", "check")),
        (MemoryError(), ("out of memory", "--ctx")),
        (KeyError("x"), ("unexpected KeyError: 'x'", "report")),
    ],
)
def test_every_error_is_a_line_and_a_hint(error: Exception, message: tuple[str, str]) -> None:
    """An exception nobody thought of, or one of several lines, breaks the one-line error."""
    text, hint = _errors.explain(error)
    assert text == message[0]
    assert message[1] in hint
    assert "\n" not in hint


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DocumentError("no such file: missing/budget.txt"), "no such file: missing/budget.txt"),
        (DocumentError("no such file: budget"), "no such file: budget"),
        (DocumentError("a/vram/b.txt is empty"), "a/vram/b.txt is empty"),
        (ContextError("n_ctx.txt takes 9 tokens; n_ctx is 5"), "n_ctx.txt takes 9 tokens; --ctx is 5"),
        (ContextError("my budget takes 9 tokens; n_ctx is 5"), "my budget takes 9 tokens; --ctx is 5"),
        (OSError(2, "No such file or directory", "vram"), "vram: No such file or directory"),
        (
            ParameterError("budget 10 is less than n_sink 4 + n_local 8"),
            "--budget 10 is less than --sink 4 + --local 8",
        ),
        (ParameterError("budget (at least n_sink + n_local) is 5"), "--budget (at least --sink + --local) is 5"),
        (ParameterError("x", "a smaller budget, kv_type or vram 0"), "x; a smaller --budget, --kv-type or --vram 0"),
        (ParameterError("x", "or a kv_file; min_recall is 0.5"), "x; or a --kv-file; --min-recall is 0.5"),
    ],
    ids=str,
)
def test_names_of_options(error: Exception, told: str) -> None:
    """A file's name is changed in a message, or a parameter is told by a name that no option has."""
    text, hint = _errors.explain(error)
    assert told in (text, f"{text}; {hint}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_what_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A full disk is told without the file that did not fit, or by a temporary name."""
    with suppress(OSError), Path("/dev/full").open("w", encoding="utf-8") as full:  # closing it fails once more
        monkeypatch.setattr(sys, "stdout", full)
        output = Output()
        with pytest.raises(OSError, match="standard output") as caught:
            output.line("text")
        monkeypatch.undo()
    assert _errors.explain(caught.value)[0] == "standard output: No space left on device"

    def write(path: Path) -> None:
        with written_atomically(path) as temporary:
            if path.parent.exists():
                temporary.symlink_to("/dev/full")
            temporary.write_text("text")

    for path in (tmp_path / "none" / "a.json", tmp_path / "a.json"):
        with pytest.raises(OSError, match="No ") as caught:
            write(path)
        assert _errors.explain(caught.value)[0].startswith(f"{path}: No ")


def test_read_only_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a read-only disk refuses is told by a temporary name: such a disk refuses the removal of no file too."""

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("write_text", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    path = tmp_path / "a.md"
    with pytest.raises(OSError, match="Read-only") as caught, written_atomically(path) as temporary:
        temporary.write_text("text")
    assert _errors.explain(caught.value)[0] == f"{path}: Read-only file system"


def test_transcript(tmp_path: Path) -> None:
    """/save loses an answer or its sources, or overwrites a file of the user's."""
    whole = (Turn("chat", "Who?", "The ferryman.", _answer(), 0), Turn("ask", "Who?", "The ferryman.", _answer()))
    transcript = Transcript("m.gguf", "actqkv", ("book.txt",), (*whole, Turn("chat", "Where?", "In the", None, 1)))
    transcript.save(tmp_path / "a.json", overwrite=False)
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [turn["kind"] for turn in saved["turns"]] == ["chat", "ask", "chat"]
    assert saved["turns"][2] == {"kind": "chat", "question": "Where?", "answer": "In the"}
    assert saved["turns"][0]["sources"][0]["start"] == 10
    transcript.save(tmp_path / "a.md", overwrite=False)
    text = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert text.count("The ferryman.") == 2
    assert "book.txt, characters 10 to 20" in text
    assert text.endswith("## Where?\n\nIn the\n")
    with pytest.raises(ParameterError, match="exists"):
        transcript.save(tmp_path / "a.md", overwrite=False)
    transcript.save(tmp_path / "a.md", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]
