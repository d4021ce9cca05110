"""Breaks when an inspection tells of another text, chunk or figure than the engine worked with."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actqkv_cpp import Answer, Llama, Retrieval
from actqkv_cpp.cli._output import Output
from actqkv_cpp.cli.inspect import _show
from actqkv_cpp.inspection import Inspection, render
from actqkv_cpp.reader import TextFile

TEXT = "A weaver described the second vase near the shore; Łódź </script> & more. They counted the golden rug. "
# Two of one name: only their numbers tell them apart.
FILES = [TextFile("two <b>.txt", TEXT * 3), TextFile("two <b>.txt", "é" + TEXT * 3)]
SMALL = Retrieval(n_local=64, window=32, n_sink=4, chunk=16, budget=116)
METHODS = {
    "actqkv": SMALL,
    "lists per KV head": Retrieval(
        "quest-clamped", n_local=64, window=32, n_sink=4, chunk=16, budget=116, dense_layers=1
    ),
}


@pytest.fixture(params=METHODS)
def found(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Inspection]:
    with Llama(tiny_model, n_ctx=2048, n_threads=1, retrieval=METHODS[request.param], verbose=False) as llm:
        with llm.record(mass="answers") as recording:
            document = llm.read(FILES)
            answer = document.ask("where", max_tokens=4)
        yield Inspection.of(llm, document, answer, recording)


def test_tokens_are_the_texts(found: Inspection) -> None:
    """Breaks when a token's characters are another's, also where a character takes several bytes."""
    for doc, file in zip(found.documents, FILES, strict=True):
        assert (doc.name, doc.text) == (file.name, file.text)
        assert (np.diff(doc.ends) >= 0).all()
        assert doc.ends[-1] == len(file.text)
        whole = "".join(doc.text[slice(*doc.range_of(doc.start + i, doc.start + i + 1))] for i in range(len(doc.ends)))
        assert whole == file.text
    assert found.documents[0].range_of(0, found.documents[0].start) == (0, 0)


def test_tokens_at(tiny_model: Path) -> None:
    """Breaks when characters of a document are looked for in tokens that do not hold them."""
    with Llama(tiny_model, n_ctx=2048, n_threads=1, retrieval=SMALL, verbose=False) as llm:
        document = llm.read(FILES)
        for i, file in enumerate(FILES):
            at = file.text.index("Łódź")
            first, last = document.tokens_at(at, at + 4, i)
            start, ends = document.token_ends(i)
            begin = int(ends[first - start - 1]) if first > start else 0
            assert begin <= at
            assert int(ends[last - start - 1]) >= at + 4
            assert file.text[begin : int(ends[last - start - 1])].strip(" ;") == "Łódź"


def test_figures_follow_from_the_records(found: Inspection) -> None:
    """Breaks when a step, a layer's mean or a passage is not what was recorded."""
    recording = found.recording
    n_steps = found.answer.usage.completion_tokens + 1
    assert len(found.steps) == n_steps
    assert all(len(step.layers) == recording.n_layer for step in found.steps)
    for layer in found.layers():
        of_layer = [r for r in recording.answers() if r.layer == layer["layer"]]
        assert layer["mass_recall"] == pytest.approx(np.mean([r.mass_recall for r in of_layer]), abs=1e-3)
        assert layer["share"] == pytest.approx(np.mean([r.n_chosen for r in of_layer]), abs=1e-3)
    best = found.passages[0]
    assert found.choosing == ((0, 1, 2) if found.method == "actqkv" else (1, 2))  # not the dense layer
    choosing = [r for r in recording.answers() if r.layer in found.choosing]
    assert found.mass_recall == pytest.approx(np.mean([r.mass_recall for r in choosing]))
    masks = [r.chosen_mask().mean(axis=0)[best.chunk] for r in choosing if r.n_chunks > best.chunk]
    assert best.attended == pytest.approx(sum(masks) / n_steps / len(found.choosing))
    doc = found.documents[best.number]
    assert best.document == doc.name
    token = recording.n_sink + best.chunk * recording.n_chunk_tokens
    assert (best.start, best.end) == doc.range_of(token, token + recording.n_chunk_tokens)


def test_bias_reaches_the_end_of_the_text(found: Inspection) -> None:
    """Breaks when the last tokens of the documents have no bias, because their window goes on behind them."""
    for doc in found.documents if found.has_bias else ():
        assert np.isfinite(found.bias[:, doc.start : doc.start + len(doc.ends)]).all()


def test_anchors_are_the_tokens_of_most_bias(found: Inspection) -> None:
    """Breaks when an anchor is not among the greatest biases, or a method without bias has anchors."""
    assert (found.method == "actqkv") == found.has_bias == bool(found.anchors)
    for anchor in found.anchors:
        doc = found.documents[anchor.number]
        assert doc.name == anchor.document
        assert doc.text[anchor.start : anchor.end] == anchor.text
    biases = [anchor.bias for anchor in found.anchors]
    assert biases == sorted(biases, reverse=True)
    if biases:
        tokens = [
            doc.start + i for doc in found.documents for i in range(len(doc.ends))
        ]  # names of documents lie between
        assert biases[0] == pytest.approx(np.nanmax(found.bias[:, tokens].mean(axis=0)))


def test_json(found: Inspection) -> None:
    """Breaks when the object cannot be written as JSON, or leaves out what it promises."""
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {"answer", "anchors", "passages", "layers", "steps", "mass_recall", "parameters"} <= set(value)
    assert 0 < value["mass_recall"] <= 1
    step = value["steps"][-1]["layers"][-1]
    assert set(step) == {"layer", "share", "entropy", "mass_recall", "chunk_recall", "chunks"}
    assert [len(chunks) for chunks in step["chunks"]] == [step["share"]] * len(step["chunks"])
    assert {passage["number"] for passage in value["passages"]} == {0, 1}
    for document in value["documents"]:
        assert document["bias"] is None or len(document["bias"]) == len(document["token_ends"])


def test_terminal(found: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks when a person reads the text of another document of the same name."""
    _show(Output(), found)
    out = capsys.readouterr().out
    for passage in found.passages[:5]:
        text = " ".join(FILES[passage.number].text[passage.start : passage.end].split())
        assert f"(document {passage.number + 1}):{passage.start}-{passage.end}  {text[:72]}\n" in out


def test_page(found: Inspection) -> None:
    """Breaks when the page loads something, a text breaks out of it, or its data are not the inspection's."""
    page = render(found)
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", page)
    assert page.count("</script>") == 2  # the data's and the program's own
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert [doc["text"] for doc in data["documents"]] == [file.text for file in FILES]
    assert [sum(doc["sizes"]) for doc in data["documents"]] == [len(file.text) for file in FILES]
    assert len(data["steps"]) == len(found.steps)
    assert data["nChunks"] == found.attended.shape[1]
    assert (data["bias"] is not None) == found.has_bias
    if data["bias"]:
        rows = np.array([np.frombuffer(base64.b64decode(row), np.uint8) for row in data["bias"]])
        known = rows > 0
        np.testing.assert_array_equal(known, np.isfinite(found.bias))
        back = 2.0 ** ((rows[known] - 128.0) / 24)
        np.testing.assert_allclose(back, np.clip(found.bias[known], 2.0 ** (-127 / 24), 2.0 ** (127 / 24)), rtol=0.04)


def test_nothing_to_retrieve(tiny_model: Path) -> None:
    """Breaks when a text that is attended whole has no inspection."""
    with Llama(tiny_model, n_ctx=1024, n_threads=1, verbose=False) as llm:
        with llm.record(mass="answers") as recording:
            document = llm.read(text="short")
            answer: Answer = document.ask("where", max_tokens=2)
        found = Inspection.of(llm, document, answer, recording)
        value = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert (value["mass_recall"], value["passages"]) == (None, [])
        assert '"nChunks":0' in render(found)
