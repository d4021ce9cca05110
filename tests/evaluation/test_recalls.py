"""Recalls of what was chosen: from records made by hand, and on the bundled model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actqkv_cpp import Llama, Record, Recording, Retrieval
from actqkv_cpp.evaluation import recalls
from actqkv_cpp.results import Source

N_SINK, CHUNK = 8, 4


def record(layer: int, chosen: list[int] | None, **change: Any) -> Record:
    """An answered token at position 100 over ten chunks."""
    known: dict[str, Any] = {
        "n_past": 100,
        "n_tokens": 1,
        "phase": "decode",
        "layer": layer,
        "n_chunks": 10,
        "n_chosen": 10 if chosen is None else len(chosen),
        "chosen": None if chosen is None else np.array([chosen], np.int32),
        "bias": None,
        "weights": None,
        "entropy": float("nan"),
        "mass": None,
    }
    return Record(**(known | change))


def trace(*records: Record) -> Recording:
    return Recording(N_SINK, CHUNK, 3, list(records))


def test_needle() -> None:
    """The wrong chunk, step or layer decides whether a needle was selected."""
    needle = (N_SINK + 5 * CHUNK + 1, N_SINK + 6 * CHUNK)  # all of it in chunk 5
    later = record(0, [5], n_past=101)
    found = recalls.measure(trace(record(0, [1]), record(1, [4, 5]), record(2, [6]), later), [needle])
    assert found == {"needle_selected": 1.0, "needle_recall": 2 / 4}
    missed = recalls.measure(trace(record(0, [1]), record(1, [4]), record(2, [6]), later), [needle])
    assert missed == {"needle_selected": 0.0, "needle_recall": 1 / 4}
    reading = record(0, [5], phase="prefill", n_past=50)
    assert recalls.measure(trace(reading, record(0, [1])), [needle])["needle_selected"] == 0.0


def test_several_needles() -> None:
    """One of two needles counts as both."""
    needles = [(N_SINK + i * CHUNK, N_SINK + (i + 1) * CHUNK) for i in (2, 7)]
    assert recalls.measure(trace(record(0, [2])), needles)["needle_selected"] == 0.5


def test_attended_anyway() -> None:
    """A needle in the sinks or near the end counts as missed."""
    near = (N_SINK + 10 * CHUNK, N_SINK + 11 * CHUNK)  # behind the ten chunks that can be retrieved
    for needle in ((0, 4), near):
        assert recalls.measure(trace(record(0, [1])), [needle])["needle_selected"] == 1.0


def test_layers_that_attend_everything() -> None:
    """Quest's dense layers find every needle, whatever its choice is worth; or a dense method finds none."""
    needle = (N_SINK + 5 * CHUNK, N_SINK + 6 * CHUNK)
    assert recalls.measure(trace(record(0, None), record(1, [1])), [needle])["needle_selected"] == 0.0
    assert recalls.measure(trace(record(0, None), record(1, None)), [needle])["needle_selected"] == 1.0


def test_mass() -> None:
    """Recalls of true attention are left out where they were measured, or made up where they were not."""
    mass = np.zeros((1, 10), np.float32)
    mass[0, [1, 2]] = 3.0, 1.0
    found = recalls.measure(trace(record(0, [1], mass=mass), record(1, [2], mass=mass)), [])
    assert found == {"attention_mass": pytest.approx(0.5), "oracle_chunks": pytest.approx(0.5)}
    assert recalls.measure(trace(record(0, [1])), []) == {}


@pytest.mark.model
@pytest.mark.parametrize(("method", "selected"), [("dense", 1.0), ("streaming", 0.0), ("actqkv", 1.0)])
def test_on_the_model(method: str, selected: float) -> None:
    """Positions of a needle in the document are not those of its tokens in the session."""
    noise = "The grass is green. The sky is blue. " * 40
    fact = "The pass key is 71432. Remember it. 71432 is the pass key. "
    retrieval = Retrieval(method, budget=256, n_sink=16, n_local=128, window=128)
    with Llama(n_ctx=2048, n_threads=1, verbose=False, retrieval=retrieval) as llm:
        document = llm.read(text=noise + fact + noise)
        with recalls.recorded(llm, "mass") as recording:
            document.ask("What is the pass key?", max_tokens=8)
        assert recording is not None
        found = recalls.measure(recording, [document.tokens_at(len(noise), len(noise) + len(fact))])
    assert found["needle_selected"] == selected
    if method != "streaming":
        assert found["attention_mass"] > 0.2


def test_of_sources() -> None:
    """Breaks when a source that only touches a needle counts, or more needles are asked for than there are places."""
    sources = [Source(document="a", start=start, end=end, text="", score=0.3) for start, end in [(0, 20), (50, 65)]]
    assert recalls.of_sources(sources, [(5, 15)]) == {"source_found": 1.0, "source_recall": 1.0}
    assert recalls.of_sources(sources, [(60, 70), (61, 71)]) == {"source_found": 1.0, "source_recall": 0.5}
    assert recalls.of_sources(sources, [(70, 80)]) == {"source_found": 0.0, "source_recall": 0.0}
    assert recalls.of_sources(sources, [(40, 110)]) == {"source_found": 1.0, "source_recall": 1.0}  # of three sentences
    needles = [(0, 4), (4, 8), (8, 12), (70, 80), (90, 99)]
    assert recalls.of_sources(sources, needles)["source_recall"] == 1.0
    assert recalls.of_sources([], needles)["source_recall"] == 0.0
    assert recalls.of_sources(sources, []) == {}
