"""`actqkv inspect`: a page to look at, an object for programs, a summary for a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import ANSWER, QUESTION, Actqkv

pytestmark = pytest.mark.model

SMALL = ("--sink", "16", "--local", "128", "--budget", "400", "--threads", "1")


def test_page_and_json(actqkv: Actqkv, book: Path, tmp_path: Path) -> None:
    """--html and --json do not tell of the same answer, or a page is not replaced by the next one."""
    page = tmp_path / "page.html"
    for _ in range(2):
        found = actqkv("inspect", "-d", book, QUESTION, "--json", "--html", page, *SMALL)
        assert found.status == 0, found.err
    value = json.loads(found.out)
    assert (value["question"], value["answer"]) == (QUESTION, ANSWER)
    assert value["mass_recall"] > 0.5
    assert {"chunks", "entropy", "mass_recall"} <= set(value["steps"][0]["layers"][0])
    assert QUESTION in page.read_text(encoding="utf-8")
    assert f"wrote {page}" in found.err


def test_summary(actqkv: Actqkv, book: Path) -> None:
    """Without --json and --html a person sees nothing but the answer."""
    found = actqkv("inspect", "-d", book, QUESTION, *SMALL)
    assert found.status == 0, found.err
    lines = found.out.splitlines()
    assert lines[0] == ANSWER
    assert "layer  chunks  entropy  mass recall  chunk recall" in lines
    assert any("Sussith elected" in line for line in lines[2:])  # of the passage with the answer, attended most


def test_bad_input(actqkv: Actqkv, book: Path, tmp_path: Path) -> None:
    """A file of somebody's is overwritten, or wrong use does not end with one line and a hint."""
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    found = actqkv("inspect", "-d", book, QUESTION, "--html", mine)
    assert (found.status, mine.read_text()) == (1, "mine")
    assert "exists and was not written by actqkv inspect" in found.err
    assert "hint: choose another name" in found.err
    assert actqkv("inspect", "-d", book, QUESTION, "--html", tmp_path / "none" / "page.html").status == 1
    assert actqkv("inspect", "-d", book).status == 2
    assert actqkv("inspect", "-d", book, "one", "two").status == 2
