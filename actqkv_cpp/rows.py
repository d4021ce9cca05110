"""Logits of the positions that were asked for, seen through the indices of all positions.

llama_cpp.Llama keeps an array of n_ctx x n_vocab and reads `scores[: n_tokens, :]`, `scores[i, :]`, `scores[-1, :]`.
Here only an unbroken stretch of rows up to the last token exists; reading keeps the absolute row numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Rows(np.ndarray[Any, np.dtype[np.float32]]):
    """Rows `first` .. of a taller matrix: row numbers and row slices count from the top of that matrix.

    Elementwise and reducing NumPy functions keep `first`, so that a slice taken after a log-softmax still counts from
    the top. Absent rows read as NaN (one row) or are left out (slices).
    """

    first: int

    @classmethod
    def of(cls, rows: NDArray[np.float32], first: int) -> Rows:
        view = rows.view(cls)
        view.first = first
        return view

    def __array_finalize__(self, source: Any) -> None:
        self.first = getattr(source, "first", 0)

    def __reduce__(self) -> Any:
        return Rows.of, (np.array(self), self.first)

    def __getitem__(self, key: Any) -> Any:
        plain = self.view(np.ndarray)
        row, *rest = key if isinstance(key, tuple) and key else (key,)
        if isinstance(row, (int, np.integer)):
            n_rows = self.first + len(plain)
            if not -n_rows <= row < n_rows:
                raise IndexError(f"row {row} of {n_rows}")
            at = int(row) % n_rows - self.first
            line = plain[at] if at >= 0 else np.full(plain.shape[1:], np.nan, plain.dtype)
            return line[tuple(rest)]
        if isinstance(row, slice) and row.step in (None, 1):
            begin, end, _ = row.indices(self.first + len(plain))
            cut = plain[max(begin - self.first, 0) : max(end - self.first, 0)]
            columns = (slice(None), *rest)
            return Rows.of(cut[columns], max(self.first - begin, 0))
        return plain[key]


class LogitRows:
    """The rows kept of all positions: an unbroken stretch that ends at the last token read."""

    def __init__(self, n_vocab: int) -> None:
        self._first = 0
        self._n = 0
        self._rows: NDArray[np.float32] = np.empty((0, n_vocab), np.float32)

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self._first + self._n

    @property
    def shape(self) -> tuple[int, int]:
        return self.end, self._rows.shape[1]

    def put(self, start: int, rows: NDArray[np.float32], *, keep: bool) -> None:
        """Rows of positions `start` on; earlier rows stay if `keep` and they end there."""
        if not keep or start != self.end or self._n == 0:
            self._first, self._n, self._rows = start, len(rows), rows
            return
        if self._n + len(rows) > len(self._rows):  # grow by doubling: one row arrives per generated token
            grown = np.empty((2 * (self._n + len(rows)), self._rows.shape[1]), np.float32)
            grown[: self._n] = self._rows[: self._n]
            self._rows = grown
        self._rows[self._n : self._n + len(rows)] = rows
        self._n += len(rows)

    def truncate(self, end: int) -> None:
        """Forget the rows of positions `end` on."""
        self._n = min(max(end - self._first, 0), self._n)

    def last(self) -> NDArray[np.float32] | None:
        """The row of the last token, or None."""
        return self._rows[self._n - 1] if self._n else None

    def view(self) -> Rows:
        return Rows.of(self._rows[: self._n], self._first)

    def __getitem__(self, key: Any) -> Any:
        return self.view()[key]
