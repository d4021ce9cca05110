"""`actqkv eval` and `actqkv report`: what they print and write, and how they fail."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_support import Actqkv, assert_failed, command, environment
from tiny_gguf import make_tiny_gguf

FAST = ("--threads", "1", "--samples", "1")
ROW = {"suite", "method", "budget", "length", "n", "score", "ci_low", "ci_high"}
SMALL = ("--lengths", "1k", "--budgets", "256", "--local", "128", "--sink", "16", *FAST)


def test_json_and_files(actqkv: Actqkv, babbler: Path, tmp_path: Path) -> None:
    """--json is another object than was promised, or result.json another than --json."""
    run = ("eval", babbler, "--suite", "passkey,kv", "--methods", "actqkv,dense", "--out", "out", "--json", *SMALL)
    found = actqkv(*run)
    assert found.status == 0, found.err
    result = json.loads(found.out)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert {"machine", "model", "rows", "parameters", "version", "commit"} <= set(result)
    assert len(result["model"]["sha256"]) == 64
    assert result["parameters"]["seed"] == 0
    assert [(row["suite"], row["method"], row["budget"], row["length"]) for row in result["rows"]] == [
        (suite, method, budget, 1024)
        for suite in ("passkey", "kv")
        for method, budget in (("actqkv", 256), ("dense", None))
    ]
    for row in result["rows"]:
        assert set(row) >= ROW
        assert 0 <= row["ci_low"] <= row["score"] <= row["ci_high"] <= 1
    again = actqkv(*run)
    assert again.out == found.out
    assert_failed(actqkv(*run, "--seed", "1"), "seed", "--out")


def test_tables_and_report(actqkv: Actqkv, babbler: Path, tmp_path: Path) -> None:
    """The tables lack intervals or reasons; or no page comes of the result."""
    run = ("eval", babbler, "--suite", "needle,ruler", "--methods", "actqkv,quest", "--out", "out", *FAST)
    found = actqkv(*run, "--lengths", "1k,4k", "--budgets", "512", "--local", "128", "--sink", "16")
    assert found.status == 0, found.err
    assert re.search(r"actqkv +512 +1k +\d+\.\d +\d+\.\d-\d+\.\d +1 ", found.out)
    assert re.search(r"quest +512 +4k +n/a", found.out)
    assert "n/a: quest at 4k: exact positions end at the trained length of 2,048 tokens." in found.out
    assert "\x1b" not in found.out + found.err
    drawn = actqkv("report", "out/result.json", "-o", "report.html")
    assert (drawn.status, drawn.out) == (0, "")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!-- actqkv report -->\n<!doctype html>")
    (tmp_path / "mine.html").write_text("mine", encoding="utf-8")
    assert_failed(actqkv("report", "out/result.json", "-o", "mine.html"), "mine.html exists", "another name")
    assert (tmp_path / "mine.html").read_text(encoding="utf-8") == "mine"


def test_ctrl_c_and_on(babbler: Path, tmp_path: Path) -> None:
    """Ctrl-C loses what was done, or leaves a journal that cannot be gone on with."""
    run = command("eval", babbler, "--suite", "kv", "--out", "out", *SMALL[:-2], "--samples", "40", "--json")
    child = subprocess.Popen(run, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = tmp_path / "out" / "journal.jsonl"
    for _ in range(600):
        if journal.exists() and journal.read_text(encoding="utf-8").count("\n") > 2:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130, error.decode()
    assert b"the same command goes on from here" in error
    done = journal.read_text(encoding="utf-8")
    assert 2 < done.count("\n") < 41
    assert not (tmp_path / "out" / "result.json").exists()
    assert done.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "pasky"], ["pasky", "did you mean 'passkey'?"]),
        (["--suite", ""], ["no suite"]),
        (["--suite", "kv,kv"], ["kv", "twice"]),
        (["--methods", "actqvk"], ["actqvk", "actqkv"]),
        (["--methods", ""], ["no method"]),
        (["--lengths", "5x"], ["5x", "128k"]),
        (["--lengths", ""], ["no length"]),
        (["--lengths", "64"], ["no room", "64"]),
        (["--lengths", "1000m"], ["GB", "--lengths"]),
        (["--budgets", "100"], ["--budget", "608"]),
        (["--text", "none.txt", "--suite", "perplexity"], ["none.txt"]),
        (["--longbench", "none.jsonl"], ["none.jsonl"]),
        (["--longbench", "half.jsonl"], ["half.jsonl:2", "'context'"]),
        (["--infinitebench", "half.jsonl"], ["half", "kv_retrieval"]),
        (["--kv-type", "f64"], ["f64", "f16"]),
        (["--recalls", "neddle"], ["neddle", "needle"]),
        (["--out", "half.jsonl"], ["half.jsonl"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values(actqkv: Actqkv, babbler: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    """A value that means nothing ends in a traceback, or in figures."""
    line = {"input": "Who?", "context": "Anna.", "answers": ["Anna"], "dataset": "hotpotqa"}
    text = json.dumps(line) + "\n" + json.dumps({"input": "Who?"}) + "\n"
    (tmp_path / "half.jsonl").write_text(text, encoding="utf-8")
    assert_failed(actqkv("eval", babbler, "--lengths", "1k", *arguments, *FAST), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["half.jsonl"]


def test_text_that_is_too_short(actqkv: Actqkv, babbler: Path, tmp_path: Path) -> None:
    """Perplexity of a short text is that of another length."""
    (tmp_path / "short.txt").write_text("A few words.", encoding="utf-8")
    assert_failed(actqkv("eval", babbler, "--suite", "perplexity", "--text", "short.txt", *SMALL), "1024", "--text")


def test_without_chat_template(actqkv: Actqkv, tmp_path: Path) -> None:
    """A base model is asked in prompts that it has never seen."""
    model = make_tiny_gguf(tmp_path / "base.gguf", chat_template=None)
    assert_failed(actqkv("eval", model, *SMALL), "base.gguf", "chat template")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.json", None, ["none.json"]),
        ("cut.json", '{"format": "actqkv-eval", "rows', ["cut.json", "cut short"]),
        ("other.json", "{}", ["other.json", "no result"]),
        ("later.json", '{"format": "actqkv-eval", "format_version": 99}', ["later.json", "99"]),
    ],
)
def test_wrong_results(actqkv: Actqkv, tmp_path: Path, name: str, text: str | None, words: list[str]) -> None:
    """A damaged result ends in a traceback, or in an empty page over the one that was there."""
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "report.html").write_text("before", encoding="utf-8")
    assert_failed(actqkv("report", name, "-o", "report.html"), *words)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "before"


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_unknown_kind_of_report(actqkv: Actqkv, name: str) -> None:
    """A page is written under a name that means something else."""
    assert_failed(actqkv("report", "result.json", "-o", name), name, ".html")


def test_wrong_use(actqkv: Actqkv) -> None:
    """An unknown option is ignored."""
    for arguments in ("eval --suites kv", "eval --samples 0", "eval --seed -1", "report"):
        assert actqkv(*arguments.split()).status == 2
