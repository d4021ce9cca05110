"""Recalls of an answer: was what it needed among the chosen chunks? Made of what `Llama.record` records, but for the
first two, which every right answer has whose question has needles.

source_found      1 where one of the answer's sources holds a needle
source_recall     share of the needles (of as many as there may be sources) that the answer's sources hold

needle_selected   when the answer began, share of the needles of which at least one layer had chosen a chunk
needle_recall     share of the needles' chunks that were chosen, over layers and answered tokens
attention_mass    share of the true attention over chunks that fell on the chosen ones (docs/algorithms.md section 7)
oracle_chunks     share of the chunks of largest true attention that were chosen

A needle in sinks, local or remainder is attended anyway and counts as chosen. Layers that attend everything (Quest's
first two) say nothing of a choice and are left out, unless all layers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp.results import Source
from actqkv_cpp.sources import N_PASSAGES

if TYPE_CHECKING:
    from actqkv_cpp import Llama, Record, Recording

# What is recorded while answering; "mass" attends everything once more, which takes as long as dense attention.
Recalls = Literal["none", "needle", "mass"]
SELECTED = "needle_selected"


@contextmanager
def recorded(llm: Llama, wish: Recalls) -> Iterator[Recording | None]:
    """Record what is answered within the block; None where nothing is wanted or llama.cpp runs the model."""
    if wish == "none" or llm.session is None:
        yield None
        return
    with llm.record(mass="answers" if wish == "mass" else "none") as trace:
        yield trace


def measure(trace: Recording, needles: Sequence[tuple[int, int]]) -> dict[str, float]:
    """The recalls of one answer, by name; those that were not recorded are left out.

    Args:
        needles: (first, last + 1) positions of each needle's tokens in the session.
    """
    found: dict[str, float] = {}
    answers = [record for record in trace.answers() if record.chosen is not None] or trace.answers()
    if needles and answers:
        begin = min(record.n_past for record in answers)
        first_step = [record for record in answers if record.n_past == begin]
        chunks = [trace.chunks_of(*needle) for needle in needles]
        found[SELECTED] = _mean([max(_found(record, one) > 0 for record in first_step) for one in chunks])
        found["needle_recall"] = _mean([_found(record, one) for record in answers for one in chunks])
    for name, by_layer in (("attention_mass", trace.mass_recall()), ("oracle_chunks", trace.chunk_recall())):
        if (value := _known_mean(by_layer)) is not None:
            found[name] = value
    return found


def of_sources(sources: Sequence[Source], needles: Sequence[tuple[int, int]]) -> dict[str, float]:
    """The recalls of an answer's sources.

    A source holds a needle where they share at least half of the characters of the shorter: sources are sentences,
    a needle may be several.

    Args:
        needles: (start, end) in characters of the document.
    """
    if not needles:
        return {}
    held = sum(any(_holds(source, *needle) for source in sources) for needle in needles)
    return {"source_found": float(held > 0), "source_recall": min(held / min(len(needles), N_PASSAGES), 1.0)}


def _holds(source: Source, start: int, end: int) -> bool:
    shared = min(source.end, end) - max(source.start, start)
    return 2 * shared >= min(source.end - source.start, end - start)


def _found(record: Record, chunks: tuple[int, int]) -> float:
    share = record.found(*chunks)
    return 1.0 if math.isnan(share) else share


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _known_mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
