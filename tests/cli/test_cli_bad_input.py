"""Bad input: exit status 1 with one line of error and a hint; wrong usage: 2. Never a traceback, never an abort."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import LONG, Actqkv, Result, assert_failed, command, environment
from tiny_gguf import (
    make_absurd_gguf,
    make_empty_file,
    make_not_gguf,
    make_truncated_gguf,
    make_vocab_only_gguf,
)

from actqkv_cpp import kvfile

QUESTION = "Who?"


def _assert_failed(found: Result, *words: str) -> None:
    assert_failed(found, *words)
    assert len(found.err.splitlines()) <= 4, found.err  # error and hint, after notes on model and reading


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["is empty"]),
        (b"  \n", ["is empty"]),
        (b"text\x00more", ["byte 0 at offset 4"]),
        (b"caf\xe9", ["byte 0xe9 at offset 3", "iconv"]),
        (b"%PDF-1.4", ["damaged PDF", "qpdf"]),
        (b"GGUF\x03\x00\x00\x00", ["GGUF model"]),
        (b"\xff\xfeM\x00", ["in UTF-16, not text in UTF-8", "iconv"]),
    ],
)
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_document(actqkv: Actqkv, tmp_path: Path, command: str, data: bytes, words: list[str]) -> None:
    """A document that is no text is read as nonsense."""
    (tmp_path / "book.txt").write_bytes(data)
    _assert_failed(actqkv(command, "-d", "book.txt", *([QUESTION] if command == "ask" else [])), "book.txt", *words)


def test_document_that_is_not_there(actqkv: Actqkv, tmp_path: Path) -> None:
    """A typing error in a name ends in a traceback."""
    _assert_failed(actqkv("ask", "-d", "bok.txt", QUESTION), "bok.txt", "no such file")
    (tmp_path / "books").mkdir()
    _assert_failed(actqkv("ask", "-d", "books", QUESTION), "books", "folder")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda path: path.with_name("missing.gguf"), "missing.gguf"),
        (make_empty_file, "empty"),
        (make_not_gguf, "GGUF"),
        (make_truncated_gguf, "model.gguf"),
        (make_vocab_only_gguf, "model.gguf"),
        (lambda path: make_absurd_gguf(path, "n_kv"), "model.gguf"),
        (lambda path: path.parent, ""),
    ],
    ids=["missing", "empty", "not gguf", "truncated", "vocabulary only", "absurd", "folder"],
)
def test_model(actqkv: Actqkv, tmp_path: Path, book: Path, make: Callable[[Path], Path], word: str) -> None:
    """A broken model file ends in an abort of ggml, or in a page of its log."""
    model = make(tmp_path / "model.gguf")
    _assert_failed(actqkv("chat", model, "-d", book), word)


@pytest.mark.model
def test_document_longer_than_ctx(actqkv: Actqkv) -> None:
    """A long document is cut to the context, or read for minutes before it is refused."""
    found = actqkv("ask", "-d", LONG, QUESTION, "--ctx", "4k")
    _assert_failed(found, "4096", "--ctx", "harbour.txt")
    assert "read " not in found.err


@pytest.mark.model
def test_answer_that_leaves_no_room(actqkv: Actqkv, book: Path) -> None:
    """--max-tokens is promised but the context is full before."""
    _assert_failed(actqkv("ask", "-d", book, QUESTION, "--ctx", "4k", "--max-tokens", "4k"), "4096", "--max-tokens")


@pytest.mark.model
def test_ctx_larger_than_ram(actqkv: Actqkv, book: Path) -> None:
    """A context that does not fit in RAM brings the machine down instead of being refused."""
    _assert_failed(actqkv("ask", "-d", book, QUESTION, "--ctx", "1000m"), "bytes", "--ctx")


@pytest.mark.model
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--budget 100", ["608"]),
        ("--local 4k", ["--budget 2,048 is less than"]),
        ("--budget 2k --sink 3k", ["--sink 3,072"]),
        ("--chunk 0", ["--chunk"]),
        ("--chunk 1", ["a chunk has 1 tokens", "made of 4", "--chunk of at least"]),
        ("--local 0", [""]),
        ("--method actqk", ["did you mean 'actqkv'?"]),
        ("--method dense --ctx 20k", ["end at the 8192 tokens", "--ctx is 20480", "use --method actqkv"]),
        ("--kv-type f64", ["did you mean 'f16'?"]),
        ("--ctx 1000000m", ["--ctx is 1048576000000, expected at most"]),
        ("--threads 1000", ["--threads is 1000, expected 1 to 512"]),
        ("--min-recall 0.9", ["--min-recall needs audits", "add --audit"]),
    ],
)
def test_values_that_contradict(actqkv: Actqkv, book: Path, options: str, words: list[str]) -> None:
    """A wrong retrieval option is ignored, told in words of the library, or refused after the document was read."""
    found = actqkv("ask", "-d", book, QUESTION, *options.split())
    _assert_failed(found, *words)
    assert "read " not in found.err


def test_document_without_its_option(actqkv: Actqkv, book: Path, tmp_path: Path) -> None:
    """-d *.txt takes the second document for a model, or for a question."""
    (tmp_path / "b.txt").write_text("more", encoding="utf-8")
    _assert_failed(actqkv("ask", "-d", book, "b.txt", QUESTION), "b.txt", "-d of its own")


@pytest.mark.parametrize(
    ("command", "hint"), [("chat", "-d of its own"), ("bench", "bundled model"), ("eval", "--text FILE")]
)
def test_document_in_the_place_of_the_model(actqkv: Actqkv, book: Path, command: str, hint: str) -> None:
    """Who forgets -d is told to download a book again."""
    _assert_failed(actqkv(command, book), f"{book} is a file, but no GGUF model", hint)


@pytest.mark.parametrize("question", ["word " * 100, "nul \ufffd / a/b?"])
@pytest.mark.model
def test_questions_that_are_no_names(actqkv: Actqkv, book: Path, question: str) -> None:
    """A long question fails as a file name."""
    assert actqkv("ask", "-d", book, question, "--max-tokens", "1").status == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask"],
        ["ask", "-d", "book.txt"],
        ["ask", "Who?"],
        ["ask", "-d", "book.txt", "Who?", "--unknown"],
        ["ask", "-d", "book.txt", "Who?", "--ctx", "many"],
        ["ask", "-d", "book.txt", "Who?", "--max-tokens", "0"],
        ["ask", "-d", "book.txt", "Who?", "--top-p", "2"],
        ["ask", "-d", "book.txt", "Who?", "--seed", "4294967296"],
        ["chat", "--threads", "0"],
        ["chat", "--gpu-layers", "some"],
        ["chatt"],
    ],
    ids=" ".join,
)
def test_usage(actqkv: Actqkv, arguments: list[str]) -> None:
    """Wrong usage is no failure of the work: scripts tell them apart by the status 2."""
    found = actqkv(*arguments)
    assert (found.status, found.out) == (2, "")
    assert "--help" in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize("question", ["", "  ", "caf\udce9"])
def test_question(actqkv: Actqkv, book: Path, question: str) -> None:
    """An empty question is asked all the same, or one that is not UTF-8 ends in a traceback."""
    _assert_failed(actqkv("ask", "-d", book, question))


def test_standard_input(actqkv: Actqkv, book: Path) -> None:
    """Standard input given twice, or holding nothing, is waited for."""
    _assert_failed(actqkv("ask", "-d", "-", "-d", "-", QUESTION), "once")
    _assert_failed(actqkv("ask", "-d", "-", QUESTION), "stdin is empty")


@pytest.mark.model
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(book: Path, tmp_path: Path, closed: str) -> None:
    """A standard stream that the caller closed ends in a traceback, or the KV file gets its number."""
    arguments = command("ask", "-d", book, QUESTION, "--max-tokens", 1, "--kv-file", tmp_path / "a.akv")
    found = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert ("1>" in closed) == (not found.stdout)
    kvfile.verify(tmp_path / "a.akv")


@pytest.mark.parametrize("text", ['{"q": 1}', "no json", '["question"]'])
def test_questions_file(actqkv: Actqkv, book: Path, tmp_path: Path, text: str) -> None:
    """A file of questions in another shape ends in a traceback."""
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
    _assert_failed(actqkv("ask", "-d", book, "--questions", "q.jsonl"), "q.jsonl")
