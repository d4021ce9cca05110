"""What the engine did, window by window and layer by layer, and how good its selection was: docs/algorithms.md, 7.

with llm.record(mass="answers") as trace:
    llm.read("book.txt").ask("Who kept the key?")
print(trace.mass_recall(), trace.chosen_counts())
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp.figures import Phase


@dataclass(frozen=True, kw_only=True)
class Record:
    """One layer in one window.

    Attributes:
        n_past: position of the window's first token.
        n_tokens: of the window: m; 1 while answering.
        phase: how the window was read.
        layer: number of the layer.
        n_chunks: N, chunks that could be retrieved; chunk b is the tokens n_sink + b*c up to n_sink + (b+1)*c.
        n_chosen: chunks of each list: the layer's share of the budget.
        chosen: chunk ids [1, n_chosen], or [G, n_chosen] with a list per KV head, ascending; None: all of them.
        bias: activation bias of the window's tokens [m]; None where the method has none, or while answering.
        weights: of the window's queries in its probe [m], sum 1; None while answering, or where nothing is scored.
        entropy: of the softmax over scores, 0 to 1; NaN where there is no cut-off or at most one chunk.
        mass: true attention mass per chunk, [1, N] or [G, N], where it was asked for: summed over the window's queries,
            averaged over all heads of the layer; with a list per KV head, each head's part of that.
    """

    n_past: int
    n_tokens: int
    phase: Phase
    layer: int
    n_chunks: int
    n_chosen: int
    chosen: NDArray[np.int32] | None
    bias: NDArray[np.float32] | None
    weights: NDArray[np.float32] | None
    entropy: float
    mass: NDArray[np.float32] | None

    def chosen_mask(self) -> NDArray[np.bool_]:
        """Which chunks were chosen, [1 or G, N]."""
        if self.chosen is None:
            return np.ones((1, self.n_chunks), np.bool_)
        mask = np.zeros((len(self.chosen), self.n_chunks), np.bool_)
        np.put_along_axis(mask, self.chosen.astype(np.int64), True, axis=1)
        return mask

    @property
    def mass_recall(self) -> float:
        """Share of the mass over all chunks (everything outside sinks, local and remainder) that the chosen ones have.

        A mean over queries and heads, each weighted by what it attends there. NaN where the mass is unknown or 0.
        """
        if self.mass is None or not (total := float(self.mass.sum(dtype=np.float64))) > 0:
            return float("nan")
        return float(self.mass[self._rows()].sum(dtype=np.float64)) / total

    @property
    def oracle(self) -> NDArray[np.int64] | None:
        """The chunks of the largest mass, as many as were chosen, in the shape of `chosen`; None: mass unknown."""
        if self.mass is None:
            return None
        best = np.argsort(-self.mass, axis=1, kind="stable")[:, : self.n_chosen]
        return np.sort(best, axis=1)

    @property
    def chunk_recall(self) -> float:
        """Share of the oracle's chunks that were chosen; NaN where the mass is unknown or nothing is chosen."""
        if (oracle := self.oracle) is None or not oracle.size:
            return float("nan")
        return float(np.take_along_axis(self._rows(), oracle, axis=1).mean())

    def _rows(self) -> NDArray[np.bool_]:
        """`chosen_mask` in the shape of the mass."""
        assert self.mass is not None
        return np.broadcast_to(self.chosen_mask(), self.mass.shape)

    def found(self, first: int, last: int) -> float:
        """Share of the chunks first .. last - 1 that were chosen; those that were not retrievable are not counted.

        NaN where none of them was.
        """
        mask = self.chosen_mask()[:, max(first, 0) : last]
        return float(mask.mean()) if mask.size else float("nan")


@dataclass
class Recording:
    """Records in the order in which windows ran; a window that was read again is there again. Made by `Llama.record`.

    Attributes:
        n_sink, n_chunk_tokens, n_layer: of the session, so that chunk ids can be read as tokens.
    """

    n_sink: int
    n_chunk_tokens: int
    n_layer: int
    records: list[Record] = field(default_factory=list)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def add(self, record: Record) -> None:
        self.records.append(record)

    def answers(self) -> list[Record]:
        """Records of answered tokens."""
        return [record for record in self.records if record.phase == "decode"]

    def chunks_of(self, start: int, end: int) -> tuple[int, int]:
        """The chunks (first, last + 1) that hold tokens [start, end) of the history; sinks are in none."""
        first = max(start - self.n_sink, 0) // self.n_chunk_tokens
        return first, max(-(-(end - self.n_sink) // self.n_chunk_tokens), first)

    # -- section 7, over answered tokens: one figure per layer [n_layer], NaN where nothing was measured

    def mass_recall(self) -> NDArray[np.float64]:
        """Attention-mass recall of each layer, averaged over answered tokens."""
        return self._by_layer([record.mass_recall for record in self.answers()])

    def chunk_recall(self) -> NDArray[np.float64]:
        """Share of the oracle's chunks that each layer chose, averaged over answered tokens."""
        return self._by_layer([record.chunk_recall for record in self.answers()])

    def needle_recall(self, start: int, end: int) -> NDArray[np.float64]:
        """Share of the chunks with tokens [start, end) of the history that each layer chose, averaged over answered
        tokens (and KV heads). Windows in which they lay in sinks, remainder or local, attended anyway, do not count.
        """
        first, last = self.chunks_of(start, end)
        return self._by_layer([record.found(first, last) for record in self.answers()])

    def entropy(self) -> NDArray[np.float64]:
        """Entropy of each layer's scores, averaged over answered tokens."""
        return self._by_layer([record.entropy for record in self.answers()])

    def share(self) -> NDArray[np.float64]:
        """Chunks that each layer attended, averaged over answered tokens."""
        return self._by_layer([float(record.n_chosen) for record in self.answers()])

    def _by_layer(self, values: list[float]) -> NDArray[np.float64]:
        layers = np.array([record.layer for record in self.answers()], np.int64)
        found = np.array(values, np.float64)
        kept = ~np.isnan(found)
        sums, counts = (
            np.bincount(layers[kept], weights, self.n_layer).astype(np.float64) for weights in (found[kept], None)
        )
        means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(self.n_layer, np.nan), where=counts > 0)
        return means

    # -- over tokens of the history

    def token_bias(self, n_tokens: int) -> NDArray[np.float64]:
        """Activation bias of tokens [n_layer, n_tokens], each window's relative to its mean: 1.0 is an average token.

        NaN where none was recorded. Of tokens read more than once, the last reading counts.
        """
        bias: NDArray[np.float64] = np.full((self.n_layer, n_tokens), np.nan)
        for record in self.records:
            if record.bias is not None and record.n_past < n_tokens:
                mean = float(record.bias.mean())
                relative: Any = record.bias / mean if mean > 0 else np.ones(record.n_tokens)
                n = min(record.n_tokens, n_tokens - record.n_past)  # of a window that goes on behind them
                bias[record.layer, record.n_past : record.n_past + n] = relative[:n]
        return bias

    def chosen_counts(self) -> NDArray[np.float64]:
        """How often each layer chose each chunk for an answered token, [n_layer, n_chunks]; of lists per KV head, the
        share of the lists counts."""
        answers = self.answers()
        counts = np.zeros((self.n_layer, max((record.n_chunks for record in answers), default=0)))
        for record in answers:
            counts[record.layer, : record.n_chunks] += record.chosen_mask().mean(axis=0)
        return counts
