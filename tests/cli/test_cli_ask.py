"""`actqkv ask`: one reading, answers on standard output, everything else on standard error."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cli_support import ANSWER, LONG, OTHER_ANSWER, OTHER_QUESTION, QUESTION, Actqkv, command, environment

from actqkv_cpp.__main__ import main
from actqkv_cpp.cli.ask import _load_questions
from actqkv_cpp.errors import DocumentError

pytestmark = pytest.mark.model


def test_answer(actqkv: Actqkv, book: Path) -> None:
    """The main job fails, or its answer cannot be piped because notes are mixed into it."""
    found = actqkv("ask", "-d", book, QUESTION)
    assert (found.status, found.out) == (0, f"{ANSWER}\n")
    assert "--ctx" in found.err  # the size that was chosen
    assert "tokens of" in found.err
    assert "\x1b" not in found.out + found.err
    assert "llama" not in found.err.lower().replace("llama.cpp", "")  # libllama's log


def test_several_questions_with_sources(actqkv: Actqkv, book: Path) -> None:
    """Several questions read the document again, or their passages do not point into the file."""
    found = actqkv("ask", "-d", book, QUESTION, OTHER_QUESTION, "--sources")
    assert found.status == 0
    assert found.out.startswith(f"> {QUESTION}\n{ANSWER}\n[1] {book}:")
    assert f"\n\n> {OTHER_QUESTION}\n{OTHER_ANSWER}\n[1] {book}:" in found.out
    assert found.err.count("tokens of") == 1


def test_json(actqkv: Actqkv, book: Path) -> None:
    """--json is another object than was promised, or a source's offsets do not give its text."""
    found = actqkv("ask", "-d", book, QUESTION, OTHER_QUESTION, "--json")
    assert found.status == 0
    result = json.loads(found.out)
    assert set(result) == {"model", "method", "answers", "usage", "memory", "gpu", "timing"}
    assert (result["model"], result["method"]) == ("needle-q8_0.gguf", "actqkv")
    assert [set(answer) for answer in result["answers"]] == [{"question", "answer", "sources"}] * 2
    assert [answer["answer"] for answer in result["answers"]] == [ANSWER, OTHER_ANSWER]
    assert set(result["usage"]) == {"document_tokens", "prompt_tokens", "completion_tokens", "attended_tokens"}
    assert set(result["memory"]) == {"kv_bytes", "summary_bytes"}
    assert set(result["timing"]) == {"prefill_s", "prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s"}
    numbers = [*result["usage"].values(), result["memory"]["kv_bytes"], *result["timing"].values()]
    assert all(number > 0 for number in numbers)
    assert result["usage"]["prompt_tokens"] < 2 * result["usage"]["document_tokens"]
    text = book.read_bytes().decode("utf-8")
    for answer in result["answers"]:
        assert answer["sources"]
        for source in answer["sources"]:
            assert set(source) == {"document", "number", "start", "end", "text", "score", "place"}
            assert source["document"] == str(book)
            assert text[source["start"] : source["end"]] == source["text"]


def test_standard_input_and_questions_in_a_file(actqkv: Actqkv, book: Path, tmp_path: Path) -> None:
    """A document cannot be piped, or an evaluation run cannot bring its questions in a file."""
    (tmp_path / "q.txt").write_text(f"\n{QUESTION}\n\n", encoding="utf-8")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": QUESTION, "answer": ANSWER}) + "\n", encoding="utf-8")
    for name in ("q.txt", "q.jsonl"):
        found = actqkv("ask", "-d", "-", "--questions", name, stdin=book.read_bytes())
        assert (found.status, found.out) == (0, f"{ANSWER}\n")
        assert "stdin" in found.err


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_of_questions(tmp_path: Path, mark: str, ending: str) -> None:
    """A question with a line separator of Unicode is cut, or its file is no JSON lines any more; or the mark with which
    editors begin a file is part of the first question."""
    asked = ["Who\u2028kept it?", "When\x85?"]
    lines = [json.dumps({"question": text}, ensure_ascii=False) for text in asked] if ending == ".jsonl" else asked
    path = tmp_path / f"q{ending}"
    path.write_bytes((mark + "\r\n".join([*lines, ""])).encode())
    assert _load_questions(path) == asked


@pytest.mark.parametrize("line", ["Who?", "[]", '{"text": "Who?"}', '{"question": null}', '{"question": ["Who?"]}'])
def test_lines_without_a_question(tmp_path: Path, line: str) -> None:
    """What is no question is asked, None for one, or ends in a traceback."""
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question": "Where?"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DocumentError, match="a question each"):
        _load_questions(path)


def test_model_and_quiet(actqkv: Actqkv, babbler: Path, book: Path) -> None:
    """A first argument that is a model is taken for a question, or --quiet is not."""
    found = actqkv("ask", babbler, "-d", book, "Who?", "--max-tokens", "5", "-q")
    assert (found.status, found.err) == (0, "")
    renamed = babbler.with_name("model without an ending")
    renamed.write_bytes(babbler.read_bytes())
    found = actqkv("ask", renamed, "-d", book, "Who?", "--max-tokens", "5")
    assert found.status == 0
    assert "cut at 5 tokens: --max-tokens" in found.err


def test_seed_and_temperature(actqkv: Actqkv, babbler: Path, book: Path) -> None:
    """--seed does not repeat an answer, or --temp does nothing."""

    def ask(*more: str) -> str:
        return actqkv("ask", babbler, "-d", book, "Who?", "--max-tokens", "12", *more).out

    assert ask("--temp", "1.5", "--seed", "7") == ask("--temp", "1.5", "--seed", "7")
    assert ask("--temp", "1.5", "--seed", "7") != ask("--temp", "1.5", "--seed", "8")


def test_locale_that_is_not_utf8(actqkv: Actqkv, babbler: Path, tmp_path: Path) -> None:
    """A document of other letters ends in a traceback on a terminal that lacks them."""
    (tmp_path / "letters.txt").write_text("Żółw 日本 “quoted”. " * 200, encoding="utf-8")
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    found = actqkv("ask", babbler, "-d", "letters.txt", "Who?", "--max-tokens", "40", "--sources", **plain)
    assert found.status == 0
    found = actqkv("ask", babbler, "-d", "letters.txt", "Who?", "--max-tokens", "4", "--json", **plain)
    assert "日本" in json.loads(found.out)["answers"][0]["sources"][0]["text"]


def _interrupt(arguments: list[str], *, after: str, folder: Path) -> tuple[int, str, str]:
    """Run until `after` was written to standard error, send Ctrl-C, return status and both outputs."""
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=environment(), text=True
    ) as child:
        assert child.stderr is not None
        err = ""
        while after not in err and (line := child.stderr.readline()):
            err += line
        time.sleep(1.0)
        child.send_signal(signal.SIGINT)
        out, rest = child.communicate(timeout=60)
        return child.returncode, out, err + rest


def test_ctrl_c_while_reading(tmp_path: Path) -> None:
    """Ctrl-C in a long reading ends in a traceback, or is not heard."""
    status, out, err = _interrupt(command("ask", "-d", LONG, QUESTION), after="--ctx", folder=tmp_path)
    assert (status, out) == (130, "")
    assert "stopped: read the first" in err
    assert "Traceback" not in err


def test_ctrl_c_while_modules_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right after the start ends in a traceback out of an import."""

    class Loading(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "actqkv_cpp.cli", Loading("actqkv_cpp.cli"))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130


def test_ctrl_c_while_answering_keeps_answers(babbler: Path, book: Path, tmp_path: Path) -> None:
    """The answers of a long evaluation run are lost to Ctrl-C."""
    asked = command("ask", babbler, "-d", book, "--json", "--max-tokens", "100k", "Who?", "Where?")
    status, out, err = _interrupt(asked, after="tokens of", folder=tmp_path)
    assert status == 130
    assert [answer["question"] for answer in json.loads(out)["answers"]] == ["Who?"]
    assert "Traceback" not in err


@pytest.mark.parametrize("method", ["oracle", "streaming", "quest"])
def test_methods(actqkv: Actqkv, babbler: Path, tmp_path: Path, method: str) -> None:
    """A method of another kind of retrieval cannot be asked for, or the notes do not say what it attends."""
    document = tmp_path / "short.txt"
    document.write_text("The cook kept the key. " * 10, encoding="utf-8")
    found = actqkv("ask", babbler, "-d", document, "Who?", "--method", method, "--max-tokens", "2")
    assert found.status == 0, found.err
    n_tokens = {"oracle": "2,048", "streaming": "576", "quest": "2,048"}[method]
    assert f"method {method} attends {n_tokens} tokens at a time" in found.err


def test_dense_layers_are_told(actqkv: Actqkv, book: Path) -> None:
    """A method's dense layers attend everything, and the figures do not say so."""
    found = actqkv(
        "ask", "-d", book, QUESTION, "--json", "--method", "quest-clamped", "--local", "256", "--budget", "400"
    )
    assert found.status == 0
    usage = json.loads(found.out)["usage"]
    assert usage["attended_tokens"] < 500
    assert usage["dense_tokens"] > usage["document_tokens"] > 600


def test_audits(actqkv: Actqkv, book: Path) -> None:
    """--audit and --min-recall do not reach the answers, or one without the other is ignored."""
    found = actqkv("ask", "-d", book, QUESTION, "--json", "--audit", "1", "--min-recall", "1")
    assert found.status == 0
    audit = json.loads(found.out)["answers"][0]["audit"]
    assert set(audit) == {"n", "recall", "min_recall", "budget"}
    assert 0 <= audit["min_recall"] <= audit["recall"] <= 1
    assert audit["n"] > 0
    alone = actqkv("ask", "-d", book, QUESTION, "--min-recall", "0.9")
    assert (alone.status, alone.out) == (1, "")
    assert alone.err.splitlines()[-2:] == [
        "error: --min-recall needs audits",
        "hint: add --audit 16: a check every 16 tokens",
    ]
