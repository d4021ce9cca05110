"""Documents that are not plain text, from the command line."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import tiny_documents as tiny
from cli_support import QUESTION, Actqkv, assert_failed


def test_text(actqkv: Actqkv, tmp_path: Path) -> None:
    """`actqkv text` prints something else than the text that offsets count in."""
    path = tmp_path / "a.pdf"
    path.write_bytes(tiny.pdf([["The key hung in the mill."], ["Gr\u00fc\u00dfe."]]))
    assert actqkv("text", path).out == "The key hung in the mill.\n\nGr\u00fc\u00dfe.\n"
    found = json.loads(actqkv("text", path, "--json").out)
    assert found["text"][found["anchors"][1][0] :] == "Gr\u00fc\u00dfe."
    assert_failed(actqkv("text", tmp_path / "b.pdf"), "no such file")


@pytest.mark.model
def test_sources_of_a_pdf(actqkv: Actqkv, book: Path, tmp_path: Path) -> None:
    """A source of a PDF names no page, or its offsets are not those of the text that `actqkv text` prints."""
    lines = textwrap.wrap(" ".join(book.read_text(encoding="utf-8").split()), 90)
    path = tmp_path / "book.pdf"
    path.write_bytes(tiny.pdf([lines[i : i + 20] for i in range(0, len(lines), 20)]))
    found = actqkv("ask", "-d", path, QUESTION, "--json")
    assert found.status == 0, found.err
    text = actqkv("text", path).out
    starts = [text.index(line) for line in lines[::20]]
    (answer,) = json.loads(found.out)["answers"]
    assert answer["sources"]
    for source in answer["sources"]:
        assert text[source["start"] : source["end"]] == source["text"]
        assert source["place"] == f"p. {sum(start <= source['start'] for start in starts)}"
    assert f"{path}:" in (shown := actqkv("ask", "-d", path, QUESTION, "--sources").out)
    assert ", p. " in shown


@pytest.mark.model
def test_text_of_a_kv_file(actqkv: Actqkv, tmp_path: Path) -> None:
    """The text that offsets of a KV file's sources count in cannot be had."""
    path, other = tmp_path / "a.html", tmp_path / "b.txt"
    path.write_text("<h1>The mill</h1><p>The key hung there.", encoding="utf-8")
    other.write_text("More.", encoding="utf-8")
    assert actqkv("index", path, "-o", tmp_path / "a.akv").status == 0
    assert actqkv("text", tmp_path / "a.akv", "--json").out == actqkv("text", path, "--json").out
    assert actqkv("index", path, other, "-o", tmp_path / "b.akv").status == 0
    assert_failed(actqkv("text", tmp_path / "b.akv"), "holds 2 documents")
